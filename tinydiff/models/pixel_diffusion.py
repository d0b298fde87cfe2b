"""Diffusion on pixels, as the deck begins: a U-Net, a noise schedule, and what the U-Net predicts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, beside, captured, to_device, to_numpy
from tinydiff.diffusion import (
    Sampling,
    Schedule,
    classifier_free,
    denoiser,
    draw_t,
    mean_slope,
    min_snr_weight,
    per_sample,
    q_sample,
    split_variance,
    squared_error,
    target_of,
    variance_bound,
    variance_bound_arrays,
)
from tinydiff.diffusion.samplers import Clip, Denoise
from tinydiff.files import PathLike
from tinydiff.models.trained import load_trained
from tinydiff.nn import Module, UNet, UNetConfig
from tinydiff.rng import Rng

SCHEDULES = {
    "linear": Schedule.linear,
    "cosine": Schedule.cosine,
    "cosine-shifted": lambda T: Schedule.cosine(T).shifted(4),
    "sigmoid": Schedule.sigmoid,
    "scaled-linear": Schedule.scaled_linear,
    "scaled-linear-zero": lambda T: Schedule.scaled_linear(T).zero_terminal_snr(),
}

TARGETS = ("eps", "x0", "v")
WEIGHTINGS = ("plain", "min-snr", "vlb")
USUAL_SAMPLING = Sampling()
USUAL_GUIDANCE = 1.5
"""Enough for a model trained for minutes to draw what it is asked for, little enough to keep its samples varied."""


def schedule_for(name: str, T: int, target: str) -> Schedule:
    """The schedule of this name, for a network that predicts the target.

    Raises ValueError where it ends without signal and the target is "eps", which does not tell x_0 there.
    """
    schedule = SCHEDULES[name](T)
    if target == "eps" and schedule.alpha_bar[-1] == 0:
        raise ValueError(f"the schedule {name!r} ends without signal: the target must be v or x0, got eps")
    return schedule


@dataclass(frozen=True)
class PixelDiffusionConfig:
    """What a PixelDiffusion is made of.

    unet: the network's sizes; with unet.classes it can be told what to draw. size: height and width of the images,
    in pixels. T: the number of diffusion steps. schedule: a name in SCHEDULES (E6, E7). target: what the network
    outputs, "eps" as in the deck, "x0" or "v" (E15). weighting: "plain" (E17), "min-snr" (Hang et al. 2023), which
    keeps the many easy steps from drowning the others, or "vlb", the bound's own (E16), by drawing each t as often
    as it counts (Nichol & Dhariwal 2021, section 3.3): fewer bits, not better pictures. label_drop: the share of
    labels hidden in training, so that guidance has an unconditional model to move away from (E35). class_names: one
    for each class. stratified: cut 1..T into as many equal parts as there are images and draw one t from each: the
    same on average, with less chance. learned_variance: the network also outputs how much noise its reverse steps
    need, trained on the bound (E13).

    Raises ValueError for a name that is not among these, or unless there are as many class names as classes.
    """

    unet: UNetConfig
    size: tuple[int, int] = (28, 28)
    T: int = 1000
    schedule: str = "cosine"
    target: str = "v"
    weighting: str = "plain"
    label_drop: float = 0.1
    class_names: tuple[str, ...] = ()
    stratified: bool = False
    learned_variance: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("target", self.target, TARGETS),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if value not in known:
                raise ValueError(f"the {name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"the share of hidden labels must be in [0, 1], got {self.label_drop}")
        factor = self.unet.patch * 2 ** (len(self.unet.multipliers) - 1)
        if min(self.size) < 1 or any(pixels % factor for pixels in self.size):
            raise ValueError(
                f"a U-Net of {len(self.unet.multipliers)} levels on patches of {self.unet.patch} takes images whose "
                f"height and width {factor} divides, got {self.size[0]} x {self.size[1]}"
            )
        if len(self.class_names) != (self.unet.classes or 0):
            raise ValueError(f"{self.unet.classes or 0} classes need as many names, got {self.class_names}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        return cls(**fields | {"unet": UNetConfig(**fields["unet"])})


class PixelDiffusion(Module):
    """A U-Net that turns noise into images: its training loss (Algorithm 1) and its samplers.

    Called as model(x_t, t, label) it gives the network's output, eps, x_0 or v as its configuration says, and after
    that, in as many channels, the variance if it learns one (see `split_variance`).
    """

    kind = "pixel-diffusion"

    def __init__(self, config: PixelDiffusionConfig, rng: Rng):
        self.config = config
        outputs = 2 * config.unet.channels if config.learned_variance else None
        self.unet = UNet(dataclasses.replace(config.unet, outputs=outputs), rng)
        self.schedule = schedule_for(config.schedule, config.T, config.target)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA), ready to sample.

        path: the checkpoint, or the folder it is in. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(PixelDiffusionConfig.from_dict(fields), Rng(0)))

    def __call__(self, x_t: Array, t: Array, label: Array | None = None, rng: Rng | None = None) -> Tensor:
        """The network's output for x_t (B, H, W, C) at the times t (B,); a label of -1, or None, is no label.

        A model with unet.extra takes its second images in the channels after those of x_t, or else sees zeros.
        """
        t, label, unet = beside(t, x_t), beside(label, x_t), self.config.unet
        if not unet.extra:
            return self.unet(Tensor(x_t), t, label, rng=rng)
        if x_t.shape[-1] == unet.channels:
            x_t = array_module(x_t).pad(x_t, ((0, 0), (0, 0), (0, 0), (0, unet.extra)))
        x_t, shown = x_t[..., : unet.channels], x_t[..., unet.channels :]
        return self.unet(Tensor(x_t), t, label, rng=rng, extra=Tensor(shown))

    def loss(self, x_0: Array, rng: Rng, label: Array | None = None) -> Tensor:
        """One draw of the training loss, the inner lines of Algorithm 1 (E17, E18; Ho et al. 2020, eq. 14).

            t ~ Uniform({1, ..., T}),  eps ~ N(0, I),  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
            L = || eps - eps_theta(x_t, t) ||²

        averaged over batch and pixels; for another target or weighting as `simple_loss` says. A learned variance adds a
        thousandth of the bound (E13; Nichol & Dhariwal 2021, eq. 16).
        x_0: (B, H, W, C), float32 in [-1, 1]. label: (B,) whole numbers, if the model has classes. rng: the stream of
        this step. Raises ValueError for labels out of range, missing or not wanted.
        """
        return self.loss_of(*self.draw(x_0, rng, label), rng=rng.at(3))

    def draw(self, x_0: Array, rng: Rng, label: Array | None = None) -> tuple[Array | None, ...]:
        """All that `loss` draws and looks up, the arguments of `loss_of`, on x_0's device; takes and raises the same.

        Returns x_t and what the network should output (B, H, W, C), between them t (B,); then the label (B,), some of
        them hidden, or None without classes, the weight (B, 1, 1, 1), or None for the plain loss, and with a learned
        variance the arrays that `variance_bound` takes last.
        """
        target = self.config.target
        label = self._hide_some(self._checked(label, len(x_0)), rng.at(2))
        t = draw_t(rng.at(0), len(x_0), self.schedule.T, self.config.stratified, self._often)
        eps = rng.at(1).normal_like(x_0)
        x_t, wanted = q_sample(x_0, t, eps, self.schedule), target_of(x_0, eps, t, self.schedule, target)
        weight = None
        if self.config.weighting == "min-snr":
            weight = per_sample(min_snr_weight(t, self.schedule, target=target), x_0)
        bound = variance_bound_arrays(x_0, t, self.schedule, target) if self.config.learned_variance else ()
        return x_t, beside(t, x_0), wanted, beside(label, x_0), weight, *bound

    def loss_of(
        self,
        x_t: Array,
        t: Array,
        wanted: Array,
        label: Array | None = None,
        weight: Array | None = None,
        *bound: Array,
        rng: Rng | None = None,
    ) -> Tensor:
        """The loss of what `draw` gave, the same each time unless rng is given, for dropout."""
        output = self(x_t, t, label, rng)
        if not self.config.learned_variance:
            return squared_error(output, wanted, weight)
        output, v = split_variance(output)
        bound_of_all = self.schedule.T * variance_bound(output.data - wanted, v, t, *bound)
        return squared_error(output, wanted, weight) + 0.001 * bound_of_all

    def sample(
        self,
        n: int,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        *,
        guidance: float | None = None,
        label: int | np.ndarray | None = None,
    ) -> Iterator[Array]:
        """Draw n images from noise, yielding x_T first, then each state down to x_0 (E19; Algorithm 2).

        how: the sampler and its steps, by default 50 of DDIM. guidance: s of E35; 1 is none, the default for a model
        without classes; with classes it is USUAL_GUIDANCE. label: the class, or one for each image; a model with
        classes that is told none draws them uniformly.
        Each state is (n, H, W, C), float32, x_0 in [-1, 1]. Equal rng, equal x_T, whatever the sampler and steps.
        Raises ValueError for more steps than T, a label out of range, and for a label or guidance asked of a model
        without classes; at the first state for a learned variance that the model has not.
        """
        if n < 1:
            raise ValueError(f"the number of images must be at least 1, got {n}")
        if label is None and self.config.unet.classes is not None:
            label = to_numpy(rng.at(2).integers(0, self.config.unet.classes, (n,)))
        denoise, x_T = self.denoiser(*self.told(n, label, guidance), how.clip), self.noise(n, rng.at(0))
        return itertools.chain([x_T], how.states(denoise, x_T, self.schedule, rng.at(1)))

    def noise(self, n: int, rng: Rng) -> Array:
        """x_T for n images: draws from N(0, I), (n, H, W, C) float32."""
        return rng.normal((n, *self.config.size, self.config.unet.channels))

    def told(
        self, n: int, label: int | np.ndarray | None = None, guidance: float | None = None
    ) -> tuple[Array | None, float]:
        """What `denoiser` is told for n images: a label for each, (n,) on the device in use, or None, and s of E35.

        label: the class, or one for each image, or None. guidance: by default USUAL_GUIDANCE with labels; 1, which is
        none, without. Raises ValueError for a label out of range or asked of a model without classes, and for guidance
        that is not finite, or without a label to move towards.
        """
        if guidance is None:
            guidance = 1.0 if label is None else USUAL_GUIDANCE
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}")
        if guidance != 1 and label is None:
            classes = self.config.unet.classes
            what = "a label to move towards" if classes else "a model with classes; this one was trained without labels"
            raise ValueError(f"guidance {guidance} needs {what}")
        if label is None:
            return None, guidance
        return to_device(self._checked(np.full(n, label) if isinstance(label, int) else label, n)), guidance

    def denoiser(
        self, label: Array | None = None, guidance: float = 1.0, clip: Clip = True, shown: Array | None = None
    ) -> Denoise:
        """The network as the samplers and the bound take it: denoise(x_t, t) -> Prediction.

        label: (B,) on the device of x_t, one for each x_t of the batch. guidance: s of E35; other than 1 it needs a
        label. clip: how each guess at x_0 is kept in [-1, 1], see Clip. shown: the second images of a model with
        unet.extra, (B, H, W, extra) on the device of x_t; by default it sees zeros.
        """
        self.eval()
        learned = self.config.learned_variance
        model = classifier_free(lambda x_t, t: self(x_t, t, label), lambda x_t, t: self(x_t, t), guidance, learned)

        @captured
        def network(x_t: Array, t: Array) -> Array:
            return model(x_t if shown is None else array_module(x_t).concatenate([x_t, shown], axis=-1), t).data

        return denoiser(lambda x_t, t: network(x_t, beside(t, x_t)), self.schedule, self.config.target, clip, learned)

    def _checked(self, label: Array | None, n: int) -> np.ndarray | None:
        """The labels on the host, after a check of their number and range."""
        classes = self.config.unet.classes
        if classes is None and label is not None:
            raise ValueError("a label was given to a model without classes")
        if classes is None:
            return None
        if label is None or label.shape != (n,):
            raise ValueError(f"{n} images need {n} labels, got {None if label is None else label.shape}")
        label = to_numpy(label)
        if wrong := [i for i in label.tolist() if not 0 <= i < classes]:
            raise ValueError(f"a label must be in 0..{classes - 1}, got {wrong[0]}")
        return label

    @functools.cached_property
    def _often(self) -> np.ndarray | None:
        """How often to draw each of t = 1..T: as its error counts in the bound (E16); None for alike."""
        if self.config.weighting != "vlb":
            return None
        slope = mean_slope(np.arange(1, self.schedule.T + 1), self.schedule, self.config.target)
        return slope**2 / (2 * self.schedule.beta[1:])

    def _hide_some(self, label: np.ndarray | None, rng: Rng) -> np.ndarray | None:
        """Replace a share of the labels by -1, no label, so that the model learns to do without (E35)."""
        if label is None:
            return None
        return np.where(to_numpy(rng.uniform(label.shape)) < self.config.label_drop, -1, label)
