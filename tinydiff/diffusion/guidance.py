"""Guidance: pushing the network's output towards a condition (E35).

classifier_free     one network, told the condition and not told it; the difference is exaggerated
classifier_guided   a network that knows of no condition, and a classifier that reads noisy images
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff import backend, ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.diffusion.gaussian import Prediction, predict
from tinydiff.diffusion.samplers import Denoise, reverse_sigma
from tinydiff.diffusion.schedule import Schedule

Gradient = Callable[[Array, int], Array]
"""gradient(x_t, t): grad_{x_t} log p(y | x_t) of each sample, shaped as x_t."""


def guided(conditional: Any, unconditional: Any, scale: float) -> Any:
    """eps_u + s (eps_c - eps_u): the unconditional output, moved s times the way to the conditional one.

    conditional, unconditional: outputs of one network, (B, ...), for any target: eps, x_0 and v differ only by
    a linear map. scale: s; 0 ignores the condition, 1 is no guidance, more than 1 exaggerates the condition.
    Returns the same shape. Raises ValueError if the two shapes differ.
    (E35; Ho & Salimans 2022, eq. 6, whose w is s - 1)
    """
    if conditional.shape != unconditional.shape:
        shapes = f"{tuple(conditional.shape)} and {tuple(unconditional.shape)}"
        raise ValueError(f"the two outputs must have one shape, got {shapes}")
    return unconditional + scale * (conditional - unconditional)


def classifier_free(
    conditional: Callable[[Any, Any], Any],
    unconditional: Callable[[Any, Any], Any],
    scale: float,
    learned_variance: bool = False,
    both: Callable[[Any, Any], tuple[Any, Any]] | None = None,
) -> Callable[[Any, Any], Any]:
    """Make a model(x_t, t) whose output is `guided`: a network that guides itself.

    conditional, unconditional: the network as functions (x_t, t) -> output, with the condition and without it.
    At scale 1 and 0 only the one that counts is called. learned_variance: whether the second half of the output's last
    axis is a variance (E13), which is taken from the conditional output and not exaggerated with the rest. both:
    (x_t, t) -> the two outputs, in place of one after the other, for a network that makes them faster at once.
    (E35; Ho & Salimans 2022)
    """
    both = both or (lambda x_t, t: (conditional(x_t, t), unconditional(x_t, t)))

    def model(x_t: Any, t: Any) -> Any:
        if scale == 1:
            return conditional(x_t, t)
        if scale == 0:
            return unconditional(x_t, t)
        c, u = both(x_t, t)
        if not learned_variance:
            return guided(c, u, scale)
        half = c.shape[-1] // 2
        return ops.concat([guided(c[..., :half], u[..., :half], scale), c[..., half:]])

    return model


def classifier_guided(
    denoise: Denoise,
    gradient: Gradient,
    schedule: Schedule,
    scale: float,
    variance: str | None = None,
    clip: bool = True,
) -> Denoise:
    """Make a denoise(x_t, t) that a classifier pushes towards the images it takes for class y.

        eps_hat = eps - s sqrt(1 - alpha_bar_t) grad log p(y | x_t)          for any sampler (their Algorithm 2)
        mu_hat = mu_theta + s sigma_t² grad log p(y | x_t)                   for `ddpm` (their Algorithm 1)

    The sign: eps points away from the data, so what is to be added to the score is taken from eps. At s = 1 the first
    is Bayes' rule, grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t); the second agrees as beta_t -> 0.

    gradient(x_t, t): what `class_gradient` makes. scale: s; 0 ignores the classifier, more than 1 trusts it too much.
    variance: None for the first form; for the second the sigma_t² that `ddpm` is given, "posterior", "beta" or
    "learned", when it takes all T steps (in fewer, sigma_t² would be another: use the first).
    Where alpha_bar_t = 0 the prediction stays as it is: x_t says nothing of y, and eps nothing of x_0.
    clip: as in `denoiser`, since the push may move x_0 out of [-1, 1]; False for data with no such bounds.
    Raises ValueError, when it denoises, for another variance, or a gradient that is not shaped as x_t.
    (E35; Dhariwal & Nichol 2021, Algorithms 1 and 2)
    """

    def guided_denoise(x_t: Array, t: int) -> Prediction:
        prediction = denoise(x_t, t)
        if schedule.alpha_bar[t] == 0:  # x_t is nothing but noise, in which there is no class to be read
            return prediction
        g = gradient(x_t, t)
        if g.shape != x_t.shape:
            raise ValueError(f"the gradient must be shaped as x_t, {x_t.shape}, got {g.shape}")
        eps = prediction.eps - scale * _push(prediction, t, schedule, variance) * g
        x0, eps, _ = predict(eps, x_t, t, schedule, "eps")
        if clip:
            x0, eps, _ = predict(x0.clip(-1, 1), x_t, t, schedule, "x0")
        return Prediction(x0, eps, prediction.v)

    return guided_denoise


def _push(prediction: Prediction, t: int, schedule: Schedule, variance: str | None) -> Any:
    """What the gradient counts in eps: sqrt(1 - alpha_bar_t), or what moves mu_theta (E15) by sigma_t² as much."""
    noise = schedule.one_minus_alpha_bar[t].item() ** 0.5
    if variance is None:
        return noise
    sigma_squared = reverse_sigma(prediction, t, schedule, variance) ** 2
    return sigma_squared * noise * schedule.alpha[t].item() ** 0.5 / schedule.beta[t].item()


def class_gradient(classifier: Callable[[Tensor, np.ndarray], Tensor], label: Array) -> Gradient:
    """grad_{x_t} log p(y | x_t), by backward through a classifier of noisy images.

        log p(y | x_t) = log softmax(logits)_y

    classifier(x_t, t): takes a Tensor (B, ...) and t (B,) int64 on the host; gives logits (B, K), those of a sample
    depending on that sample alone. label: y, (B,) whole numbers in 0..K-1. A classifier's parameters gather gradients
    too: set their requires_grad to False if it is not to be trained on, which saves that work.
    Raises ValueError, when it is called, for labels of another shape or range. (E35; Dhariwal & Nichol 2021, section 4)
    """

    def gradient(x_t: Array, t: int) -> Array:
        x = Tensor(x_t, requires_grad=True)
        logits = classifier(x, np.full(len(x_t), t))
        mean_log_p = -ops.cross_entropy(logits, backend.to_device(label, backend.device_of(x_t)))
        (mean_log_p * len(x_t)).backward()
        return x.grad

    return gradient
