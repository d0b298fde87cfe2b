"""A small convolutional network that reads digits, and so judges what the diffusion models draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tinydiff import image, ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, to_device, to_numpy
from tinydiff.data.augment import random_shift
from tinydiff.data.loader import Batches
from tinydiff.files import PathLike
from tinydiff.models.trained import load_trained
from tinydiff.nn import Conv2d, GroupNorm, Linear, Module
from tinydiff.rng import Rng
from tinydiff.train import LossAt
from tinydiff.workers import Share

GROUPS = 8
"""Of each GroupNorm."""


@dataclass(frozen=True)
class ClassifierConfig:
    """What a Classifier reads, and how large it is.

    size: height and width of the images, which have one channel. classes: how many kinds there are. width: channels of
    the first two convolutions; the last two have twice as many. features: how many numbers describe an image before
    the last layer. dropout: the share of them that is hidden in training.

    Raises ValueError for sizes below 1, a width that GroupNorm cannot group, or a dropout outside [0, 1).
    """

    size: tuple[int, int] = (28, 28)
    classes: int = 10
    width: int = 32
    features: int = 128
    dropout: float = 0.3

    def __post_init__(self) -> None:
        if min(*self.size, self.classes, self.features) < 1:
            raise ValueError(f"a classifier's sizes must be at least 1, got {self}")
        if self.width < 1 or self.width % GROUPS:
            raise ValueError(f"the width must be a multiple of {GROUPS}, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the dropout must be in [0, 1), got {self.dropout}")


class Classifier(Module):
    """Four 3 x 3 convolutions, of which the second and fourth halve the image, then a hidden and a last linear layer.

    Called as model(x) it gives logits (B, classes) for images x (B, H, W, 1), float32 in [-1, 1].
    """

    kind = "classifier"

    def __init__(self, config: ClassifierConfig, rng: Rng):
        self.config = config
        widths = (config.width, config.width, 2 * config.width, 2 * config.width)
        self.convs = [
            Conv2d(inputs, outputs, rng, stride=stride)
            for inputs, outputs, stride in zip((1, *widths), widths, (1, 2, 1, 2), strict=False)
        ]
        self.norms = [GroupNorm(channels, GROUPS, silu=True) for channels in widths]
        height, width = (-(-pixels // 4) for pixels in config.size)  # each stride rounds up
        self.hidden = Linear(height * width * widths[-1], config.features, rng)
        self.out = Linear(config.features, config.classes, rng)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The classifier in a training run's checkpoint, with the averaged weights (EMA), ready to read.

        path: the checkpoint, the folder it is in, or the name of a shipped one, "classifier". Raises CheckpointError if
        it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(ClassifierConfig(**fields), Rng(0)))

    def embed(self, x: Tensor) -> Tensor:
        """The features of images (B, H, W, 1): what the last layer sees, (B, features)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return ops.silu(self.hidden(x.reshape(len(x), -1)))

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        h = self.embed(x)
        if self.training and self.config.dropout:
            if rng is None:
                raise ValueError("a classifier with dropout needs an Rng while it trains")
            h = ops.dropout(h, p=self.config.dropout, rng=rng)
        return self.out(h)

    def features(self, images: Array) -> np.ndarray:
        """Describe images by the numbers that the last layer sees, in which Fréchet and kernel distances are measured.

        images: (N, H, W, 1), float32 in [-1, 1]. Returns (N, features), float32 on the host. Raises ValueError for
        images of another shape.
        """
        return self._of_each(self.embed, images)

    def probabilities(self, images: Array) -> np.ndarray:
        """What the classifier believes of each image: softmax(logits).

        images: (N, H, W, 1), float32 in [-1, 1]. Returns (N, classes), float32 on the host, rows summing to 1. Raises
        ValueError for images of another shape.
        """
        return self._of_each(lambda x: ops.softmax(self.out(self.embed(x))), images)

    def _of_each(self, function: Any, images: Array, batch: int = 250) -> np.ndarray:
        height, width = self.config.size
        if images.shape[1:] != (height, width, 1) or not len(images):
            raise ValueError(f"this classifier reads images of shape (N, {height}, {width}, 1), got {images.shape}")
        device = self.out.weight.device
        with no_grad():
            pieces = [function(Tensor(to_device(images[i : i + batch], device))) for i in range(0, len(images), batch)]
        return np.concatenate([to_numpy(piece.data) for piece in pieces])


def reading_loss(
    model: Classifier, images: np.ndarray, labels: np.ndarray, batch_size: int, rng: Rng, shift: int = 2
) -> LossAt:
    """What `train` minimises to teach the classifier these images: the mean of -log p(label given image).

    images: uint8 (N, H, W), moved by up to `shift` pixels each time they are seen, so that there are more of them.
    labels: (N,), whole numbers in 0..classes-1. rng: the stream that orders the batches. Raises ValueError as Batches.
    """
    batches = Batches(images, labels, batch_size=batch_size, rng=rng)

    def loss_at(step: int, rng: Rng, share: Share) -> Tensor:
        images, labels = (share.of(a) for a in batches.at(step - 1))
        x = to_device(image.to_signed(random_shift(images, shift, rng.at(0))[..., None]))
        return ops.cross_entropy(model(Tensor(x), rng.at(1)), to_device(labels))

    return loss_at
