"""The whole loss of the first stage (E23): an autoencoder whose images a second network must not tell from real ones.

    L = L_rec + w_R R + w_A λ L_G,    L_rec = |x - x̂| + w_P Σ_l |φ_l(x) - φ_l(x̂)|²

R is the price of the latents (`VAE.draw`), φ_l are feature maps of a network that knows what matters in images, and
L_G = -D(x̂) falls as the discriminator D takes x̂ for real. Means of pixels are blurred where the eye sees texture;
the last two terms are there to be sharp. Rombach et al. 2022, appendix G; Esser et al. 2021, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array
from tinydiff.models.gan import frozen
from tinydiff.models.vae import VAE, VAEConfig
from tinydiff.nn import Conv2d, GroupNorm, Module
from tinydiff.rng import Rng

Features = Callable[[Tensor], Sequence[Tensor]]
"""features(images): feature maps (B, H', W', C') of images (B, H, W, C), any number of them."""

DISTANCES = {"l1": ops.absolute, "l2": lambda difference: difference * difference}
LARGEST_WEIGHT = 1e4
"""Of the adversarial term over what is asked for, where its own gradient vanishes."""


class PatchDiscriminator(Module):
    """Says of each patch of an image, not of the whole, whether it looks real: (B, H, W, channels) -> (B, H', W', 1).

    4 x 4 convolutions, `layers` of them halving the image, then one that does not, then the last; each doubles the
    width, from `base`. With 1 layer a patch is 16 x 16 pixels, with 2 it is 34 x 34, with 3 it is 70 x 70 (Isola et al.
    2017, section 3.2). GroupNorm and SiLU stand where theirs has BatchNorm, which would let an image see its batch.
    Raises ValueError for layers below 1 or a base that GROUPS does not divide.
    """

    GROUPS = 8

    def __init__(self, channels: int, rng: Rng, *, base: int = 32, layers: int = 1):
        if layers < 1 or base < 1 or base % self.GROUPS:
            raise ValueError(
                f"a discriminator needs layers >= 1 and a base that {self.GROUPS} divides, got {layers} and {base}"
            )
        widths = [base * 2**i for i in range(layers + 1)]
        strides = [2] * layers + [1]
        self.convs = [
            Conv2d(inputs, width, rng, kernel=4, stride=stride)
            for inputs, width, stride in zip([channels, *widths], widths, strides, strict=False)
        ]
        self.norms = [GroupNorm(width, self.GROUPS, silu=True) for width in widths[1:]]
        self.out = Conv2d(widths[-1], 1, rng, kernel=4)

    def __call__(self, x: Tensor) -> Tensor:
        h = ops.silu(self.convs[0](x))
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            h = norm(conv(h))
        return self.out(h)


@dataclass(frozen=True)
class LossWeights:
    """How much each term of E23 counts.

    pixels: "l1" for |x - x̂|, which forgives a sharp edge that lies a little off, or "l2" for its square. perceptual:
    w_P. regularisation: w_R. adversarial: w_A, 0 for no discriminator. start: the steps before it plays: a decoder that
    still draws nothing is too easily caught.

    Raises ValueError for another name or a negative weight.
    """

    pixels: str = "l1"
    perceptual: float = 1.0
    regularisation: float = 1e-4
    adversarial: float = 0.5
    start: int = 0

    def __post_init__(self) -> None:
        if self.pixels not in DISTANCES:
            raise ValueError(f"the distance of pixels must be one of {', '.join(DISTANCES)}, got {self.pixels!r}")
        if min(self.perceptual, self.regularisation, self.adversarial, self.start) < 0:
            raise ValueError(f"weights and the start cannot be negative, got {self}")


class AdversarialVAE(VAE):
    """A VAE and, at its side while it is trained, a discriminator and a judge of features.

    features: the φ_l of the perceptual term, or None for none: a function, such as a reader's `embed`, whose parameters
    are not this model's. Its checkpoints are a VAE's, for `VAE.load`. Raises TypeError for features that are a Module,
    which would be trained, and saved, as part of this one.
    """

    def __init__(self, config: VAEConfig, weights: LossWeights, rng: Rng, features: Features | None = None):
        if isinstance(features, Module):
            raise TypeError(f"features must be a function, got the module {type(features).__name__}; pass its method")
        super().__init__(config, rng.at(0))
        self.weights, self.features = weights, features
        self.discriminator = PatchDiscriminator(config.channels, rng.at(1)) if weights.adversarial else None

    def loss(self, x: Array, step: int, rng: Rng) -> tuple[Tensor, dict[str, float]]:
        """One draw of both players' losses, whose sum has the gradient of each for the player that minimises it.

            L as above, with λ = |∂L_rec/∂W| / |∂L_G/∂W|, W the kernel of the decoder's last layer,
            L_D = ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))],  in which x̂ is given

        λ makes w_A the share that the discriminator has in what the decoder learns, whatever the size of D.
        x: (B, H, W, channels), float32 in [-1, 1]. step: 1, 2, ...; up to weights.start, L_G and L_D are left out.
        rng: the stream of this step. Returns L + L_D, and the terms by name, each before its weight, and λ.
        (E23; Esser et al. 2021, eq. 6 and 7)
        """
        z, price = self.draw(Tensor(x), rng)
        h = self.decoder.features(z)
        drawn = self.decoder.last(h)

        # First-order gradients suffice for λ: each part is differentiated as far as x̂, and x̂'s gradient is their sum.
        x_hat = Tensor(drawn.data, requires_grad=True)
        reconstruction, terms = self.reconstruction(x_hat, x)
        value, gradient = reconstruction.item(), gradient_of(reconstruction, x_hat)
        terms["regularisation"] = price.item()
        loss = self.weights.regularisation * price

        if self.discriminator is not None and step > self.weights.start:
            with frozen(self.discriminator):
                fooling = -self.discriminator(x_hat).mean()
            of_fooling = gradient_of(fooling, x_hat)
            balance = self.at_last_layer(h, gradient) / (self.at_last_layer(h, of_fooling) + 1 / LARGEST_WEIGHT)
            weight = self.weights.adversarial * min(balance, LARGEST_WEIGHT)
            value, gradient = value + weight * fooling.item(), gradient + weight * of_fooling
            judging = hinge(self.discriminator(Tensor(x)), self.discriminator(drawn.detach()))
            loss = loss + judging
            terms |= {"generator": fooling.item(), "discriminator": judging.item(), "balance": balance}

        return loss + with_gradient(drawn, value, gradient), terms

    def reconstruction(self, x_hat: Tensor, x: Array) -> tuple[Tensor, dict[str, float]]:
        """L_rec of what was drawn, and its terms by name, each before its weight."""
        pixels = DISTANCES[self.weights.pixels](x_hat - x).mean()
        if self.features is None or not self.weights.perceptual:
            return pixels, {"pixels": pixels.item()}
        perceptual = perceptual_distance(self.features(x_hat), self.features(Tensor(x)))
        return pixels + self.weights.perceptual * perceptual, {
            "pixels": pixels.item(),
            "perceptual": perceptual.item(),
        }

    def at_last_layer(self, h: Tensor, gradient: Array) -> float:
        """|∂L/∂W| of the kernel W of the decoder's last layer, from that layer's input and ∂L/∂x̂."""
        last = self.decoder.conv_out
        W = Tensor(last.weight.data, requires_grad=True)
        y = ops.conv2d(h.detach(), W, stride=last.stride, padding=last.padding)
        y.backward(ops.space_to_depth(gradient, factor=self.config.patch).data)
        assert W.grad is not None
        return float((W.grad * W.grad).sum()) ** 0.5


def hinge(real: Tensor, drawn: Tensor) -> Tensor:
    """½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]: nothing is gained by being surer than ±1 (Lim & Ye 2017)."""
    return 0.5 * (ops.relu(1 - real).mean() + ops.relu(1 + drawn).mean())


def perceptual_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Σ_l |n(a_l) - n(b_l)|², each the mean over images and pixels, n(v) = v / |v| along the channels.

    a, b: feature maps (B, H', W', C') of two batches. (Zhang et al. 2018, eq. 1, with all channels counted alike)
    """
    apart = [_unit(p) - _unit(q) for p, q in zip(a, b, strict=True)]
    means = [(d * d).sum(axis=-1).mean() for d in apart]
    return ops.stack(means).sum()


def _unit(v: Tensor) -> Tensor:
    return v / ops.sqrt((v * v).sum(axis=-1, keepdims=True) + 1e-8)


def gradient_of(loss: Tensor, x: Tensor) -> Array:
    """∂loss/∂x of a leaf x, as an array; the loss's graph is freed."""
    x.grad = None
    loss.backward()
    assert x.grad is not None
    return x.grad


def with_gradient(x: Tensor, value: float, gradient: Array) -> Tensor:
    """A scalar of this value whose gradient with respect to x is this array: a loss that was differentiated already."""
    inner = (x * gradient).sum()
    return inner + (value - inner.item())
