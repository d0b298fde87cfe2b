"""CLIP: two networks, one that reads images and one that reads texts, and agree on what belongs together (E25).

Each ends in a unit vector; the cosine of the two says how well an image and a text fit. They learn it from images with
captions alone: of a batch of N, every image must find its own caption among the N, and every caption its image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tinydiff import ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, array_module, to_device, to_numpy
from tinydiff.files import PathLike
from tinydiff.models.tokenizer import MERGED, Tokenizer, clean
from tinydiff.models.trained import load_trained
from tinydiff.nn import Conv2d, GroupNorm, Linear, Module, Parameter, Transformer, TransformerConfig
from tinydiff.nn.embedding import Embedding
from tinydiff.nn.init import constant
from tinydiff.rng import Rng

TEMPERATURE = 0.07
"""What the cosines are divided by when training begins."""

LARGEST_SCALE = 100.0
"""What they are multiplied by at most, however sure the towers become."""

FIRST, GROUPS = 32, 8
"""Channels of the image tower's first convolution, and groups of its GroupNorms."""

SMALL_TEXT, SMALL_IMAGE = TransformerConfig(128, 3, 4, causal=True), TransformerConfig(128, 3, 4)
"""Towers that learn small pictures within an hour."""


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a text tower: of its vocabulary, of a text in tokens (at most), and of its transformer.

    Raises ValueError for a vocabulary or a length below 2.
    """

    vocabulary: int
    length: int
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.length) < 2:
            raise ValueError(f"a text tower needs 2 tokens and 2 places, got {self}")


VIT_L_14_TEXT = TextConfig(49_408, 77, TransformerConfig(768, 12, 12, causal=True, activation="quick-gelu"))
"""The text tower of CLIP ViT-L/14, which Stable Diffusion 1.x listens to: 123,060,480 parameters."""


class TextTower(Module):
    """Each token and its place as a vector, then a transformer (Radford et al. 2021, §2.4).

    Called with ids (B, M), whole numbers below the vocabulary, and mask (B, M) boolean, False where there is only
    padding, it gives (B, M, width), after the last LayerNorm. If the transformer is causal, as CLIP's, a token sees
    itself and those before it, and what comes out in the place of the last one has seen the whole text. Raises
    ValueError for more places than it knows.
    """

    def __init__(self, config: TextConfig, rng: Rng):
        self.config = config
        width = config.transformer.width
        self.tokens = Embedding(config.vocabulary, width, rng)
        self.places = Parameter(rng.normal((config.length, width)))
        self.transformer = Transformer(config.transformer, rng)

    def __call__(self, ids: Array, mask: Array) -> Tensor:
        if ids.ndim != 2 or ids.shape[1] > self.config.length:
            raise ValueError(f"a text has at most {self.config.length} tokens, got ids of shape {ids.shape}")
        return self.transformer(self.tokens(ids) + self.places[: ids.shape[1]], mask)


class ImageTower(Module):
    """A vision transformer: what is on each patch of pixels is a token, and their mean is what was seen.

    Called with x (B, size, size, channels) it gives (B, width). A patch becomes a token by a few convolutions, each of
    which halves the image, rather than by one linear layer: they know edges and corners much sooner (Xiao et al. 2021).
    There is no class token (Dosovitskiy et al. 2021); the mean of all does as well (Beyer et al. 2022).
    """

    def __init__(self, config: CLIPConfig, rng: Rng):
        width, halvings = config.image.width, config.patch.bit_length() - 1
        widths = [config.channels, *(min(width, FIRST << i) for i in range(halvings - 1)), width]
        self.convs = [Conv2d(w, wider, rng, stride=2) for w, wider in itertools.pairwise(widths)]
        self.norms = [GroupNorm(w, GROUPS, silu=True) for w in widths[1:-1]]
        self.places = Parameter(rng.normal(((config.size // config.patch) ** 2, width)))
        self.transformer = Transformer(config.image, rng)

    def __call__(self, x: Tensor) -> Tensor:
        h = self.convs[0](x)
        for norm, conv in zip(self.norms, self.convs[1:], strict=True):
            h = conv(norm(h))
        tokens = h.reshape(len(x), -1, h.shape[-1]) + self.places  # (B, H/p W/p, width)
        return self.transformer(tokens).mean(axis=1)


@dataclass(frozen=True)
class CLIPConfig:
    """What a CLIP is made of.

    merges: the tokenizer's, see Tokenizer. length: of a text, in tokens, START and END among them. text, image: the two
    transformers. size: height and width of the images; channels: of their pixels; patch: pixels along a patch, a power
    of two. embedding: how many numbers describe an image or a text in the end.

    Raises ValueError for sizes below 1, for a patch that is not 2, 4, 8, ... or does not divide the size, for an image
    tower whose width GroupNorm cannot group, for a text tower that is not causal, and as TextConfig does.
    """

    merges: tuple[tuple[int, int], ...] = ()
    length: int = 32
    text: TransformerConfig = SMALL_TEXT
    image: TransformerConfig = SMALL_IMAGE
    size: int = 32
    channels: int = 3
    patch: int = 8
    embedding: int = 128

    def __post_init__(self) -> None:
        if min(self.size, self.channels, self.patch, self.embedding) < 1:
            raise ValueError(f"CLIP needs sizes of at least 1, got {self}")
        if self.patch == 1 or self.patch.bit_count() != 1 or self.size % self.patch:
            raise ValueError(f"the patch must be 2, 4, 8, ... and divide the size {self.size}, got {self.patch}")
        if self.image.width % GROUPS:
            raise ValueError(f"the image tower's width must be a multiple of {GROUPS}, got {self.image.width}")
        if not self.text.causal:
            raise ValueError(f"CLIP's text tower needs a causal transformer, got {self.text}")
        self.text_tower()

    def text_tower(self) -> TextConfig:
        """The sizes of the text tower."""
        return TextConfig(MERGED + len(self.merges), self.length, self.text)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        towers = {name: TransformerConfig(**fields[name]) for name in ("text", "image")}
        return cls(**fields | towers)


class CLIP(Module):
    """The two towers, a linear head on each, and the learned scale of their cosines."""

    kind = "clip"

    def __init__(self, config: CLIPConfig, rng: Rng):
        self.config, self.tokenizer = config, Tokenizer(config.merges)
        self.image, self.text = ImageTower(config, rng), TextTower(config.text_tower(), rng)
        self.image_head = Linear(config.image.width, config.embedding, rng, bias=False)
        self.text_head = Linear(config.text.width, config.embedding, rng, bias=False)
        self.log_scale = constant(-math.log(TEMPERATURE), 1, rng.device)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The CLIP in a training run's checkpoint, with the averaged weights (EMA), ready for use.

        path: the checkpoint, the folder it is in, or the name of a shipped one, "clip". Raises CheckpointError if it
        cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(CLIPConfig.from_dict(fields), Rng(0)))

    # ------------------------------------------------------------------------------------------ training

    def embed_images(self, x: Tensor) -> Tensor:
        """I(x) / ‖I(x)‖: images (B, size, size, channels) -> (B, embedding)."""
        return unit(self.image_head(self.image(x)))

    def embed_texts(self, ids: Array, mask: Array) -> Tensor:
        """T(y) / ‖T(y)‖: texts as `tokens` gives them -> (B, embedding)."""
        return self.embed_states(self.text(ids, mask), mask)

    def embed_states(self, states: Tensor, mask: Array) -> Tensor:
        """The same from the states that the text tower gave, of which it takes that at the END token."""
        texts, ends = array_module(mask).arange(len(mask)), mask.sum(axis=1) - 1
        return unit(self.text_head(states[texts, ends]))

    def scale(self) -> Tensor:
        """What the cosines are multiplied by, one over the temperature: at most LARGEST_SCALE. (1,)."""
        return ops.minimum(ops.exp(self.log_scale), np.float32(LARGEST_SCALE))

    def loss(self, images: Array, ids: Array, mask: Array) -> Tensor:
        """How badly images and captions find each other (E25): `contrastive_loss` of scale I(x_i) · T(y_j).

        images: (N, size, size, channels), floats in [-1, 1]; ids, mask: as `tokens` gives them, on the same device.
        """
        logits = self.embed_images(Tensor(images)) @ self.embed_texts(ids, mask).transpose()
        return contrastive_loss(logits * self.scale())

    # ----------------------------------------------------------------------------------------------- use

    def tokens(self, captions: Sequence[str]) -> tuple[Array, Array]:
        """Captions as the text tower takes them: in lower case, as tokens (B, length) int64, and where they are, bool.

        A caption that is too long is cut, with a warning; see `Tokenizer.batch`, which raises what this does.
        """
        return caption_tokens(self.tokenizer, captions, self.config.length, self.log_scale.device)

    def text_states(self, ids: Array, mask: Array) -> Tensor:
        """What the text tower makes of each token, for a U-Net to look at (E27): (B, M, width)."""
        return self.text(ids, mask)

    def text_embedding(self, captions: Sequence[str]) -> np.ndarray:
        """Captions as unit vectors: (B, embedding), float32 on the host. Raises as `tokens`, and for no captions."""
        ids, mask = self.tokens(captions)
        return self._of_each(self.embed_texts, ids, mask)

    def image_embedding(self, images: Array) -> np.ndarray:
        """Images as unit vectors: (N, embedding), float32 on the host.

        images: (N, size, size, channels), float32 in [-1, 1]. Raises ValueError for images of another shape.
        """
        size, channels = self.config.size, self.config.channels
        if images.shape[1:] != (size, size, channels):
            raise ValueError(f"this CLIP takes images of shape (N, {size}, {size}, {channels}), got {images.shape}")
        return self._of_each(lambda x: self.embed_images(Tensor(to_device(x, self.log_scale.device))), images)

    def zero_shot(self, images: Array, prompts: Sequence[str]) -> np.ndarray:
        """Which of the prompts describes an image: softmax over j of scale I(x_i) · T(y_j) (Radford et al. 2021, §3.1).

        images: as `image_embedding` takes them; prompts: K texts. Returns (N, K), float32 on the host, rows summing to
        1: a classifier of K classes that was never trained to be one.
        """
        cosines = self.image_embedding(images) @ self.text_embedding(prompts).T
        return ops.softmax(cosines * self.scale().numpy()).numpy()

    def _of_each(self, function: Callable[..., Tensor], *arrays: Array, batch: int = 250) -> np.ndarray:
        if not len(arrays[0]):
            raise ValueError("expected one image or text at least, got none")
        starts = range(0, len(arrays[0]), batch)
        with no_grad():
            pieces = [function(*(a[i : i + batch] for a in arrays)) for i in starts]
        return np.concatenate([to_numpy(piece.data) for piece in pieces])


def caption_tokens(tokenizer: Tokenizer, captions: Sequence[str], length: int, device: str) -> tuple[Array, Array]:
    """Captions in lower case as tokens (B, length) int64, and where they are, bool, on a device.

    Warns and raises as `Tokenizer.batch` does.
    """
    texts = captions if isinstance(captions, str) else [clean(caption) for caption in captions]
    ids, mask = tokenizer.batch(texts, length)
    return to_device(ids, device), to_device(mask, device)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ along the last axis."""
    return x * (x * x).sum(axis=-1, keepdims=True) ** -0.5


def contrastive_loss(logits: Tensor) -> Tensor:
    """½ [CE over texts + CE over images]: the mean of −log softmax(logits)[i, i] along rows and along columns (E25).

    logits: (N, N), row i of image i, column j of text j. It is log N where all pairs look alike, and nears 0 where each
    stands out from all others. Equal captions in a batch need no care: their columns are equal, and what this loss and
    its gradient ask for is just what they would if the captions shared the probability of being right.
    Source: Radford et al. 2021, fig. 3.
    """
    own = array_module(logits.data).arange(len(logits))
    return (ops.cross_entropy(logits, own) + ops.cross_entropy(logits.transpose(), own)) * 0.5
