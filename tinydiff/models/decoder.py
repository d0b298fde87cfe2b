"""DALL-E 2's decoder: from an embedding of an image to an image (E33; Ramesh et al. 2022, section 2.1).

z_i ──┬── linear ─── added to the embedding of t ─────┐
      └── linear ─── tokens ──┐                       │
caption ── CLIP's text tower ─┴─ states ── context ── U-Net ── ε_θ(x_t, t, z_i, y)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, beside
from tinydiff.models.text_diffusion import Condition, TextDiffusion, TextDiffusionConfig, check_share
from tinydiff.nn import Linear
from tinydiff.rng import Rng


@dataclass(frozen=True)
class DecoderConfig(TextDiffusionConfig):
    """What a Decoder is made of.

    unet: the network's sizes, with unet.vector as many numbers as an embedding has. tokens: how many tokens of context
    it becomes. text_drop, image_drop: the shares of captions that are replaced by the empty one, and of embeddings that
    are replaced by 0, in training, so that guidance has something to move away from (E35). The others: see
    TextDiffusionConfig, which raises what this does; ValueError also for a U-Net that takes no text or no embedding, or
    less than one token.
    """

    text_drop: float = 0.5
    image_drop: float = 0.1
    tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("image embeddings", self.image_drop)
        if not (self.unet.context and self.unet.vector):
            raise ValueError(
                "a decoder needs a U-Net with a context, the width of a text's states, and a vector, the numbers of an "
                f"image embedding; got {self.unet.context} and {self.unet.vector}"
            )
        if self.tokens < 1:
            raise ValueError(f"an image embedding becomes 1 token of context or more, got {self.tokens}")


class Decoder(TextDiffusion):
    """ε_θ(x_t, t, z_i, y): diffusion on pixels, told the CLIP embedding z_i of the image that is wanted, and a caption.

    Condition.vector is z_i, (B, unet.vector), of length 1; 0 or None for none. The network is told √d z_i, d numbers of
    unit variance.
    """

    kind = "decoder"
    configured_by: ClassVar[type[TextDiffusionConfig]] = DecoderConfig
    config: DecoderConfig

    def __init__(self, config: DecoderConfig, rng: Rng):
        super().__init__(config, rng)
        unet = config.unet
        assert unet.context is not None and unet.vector is not None
        self.image_tokens = Linear(unet.vector, config.tokens * unet.context, rng)

    def __call__(self, x_t: Array, t: Array, told: Condition) -> Tensor:
        """The network's output for x_t (B, H, W, C) at the times t (B,).

        Raises ValueError without texts, and for image embeddings of another shape.
        """
        told = self.completed(told)
        z_i = self._scaled(told.vector, x_t)
        context, mask = self._with_image_tokens(told, z_i)
        return self.unet(Tensor(x_t), beside(t, x_t), context=context, mask=mask, vector=z_i)

    def completed(self, told: Condition) -> Condition:
        """What is told, with z_i = 0 where none is (E33). Raises ValueError without texts."""
        if told.states is None:
            raise ValueError("a decoder is told a text, if only the empty one")
        if told.vector is not None:
            return told
        shape = len(told.states), self.config.unet.vector
        return dataclasses.replace(told, vector=array_module(told.states).zeros(shape, told.states.dtype))

    def _scaled(self, z_i: Array, x_t: Array) -> Tensor:
        """√d z_i, (B, d), for z_i of length 1."""
        shape = len(x_t), self.config.unet.vector or 0
        if z_i.shape != shape:
            raise ValueError(f"a decoder is told image embeddings {shape}, got {z_i.shape}")
        return Tensor(math.sqrt(shape[1]) * z_i)

    def _with_image_tokens(self, told: Condition, z_i: Tensor) -> tuple[Tensor, Array | None]:
        """The states of the texts, then the tokens of the images, (B, M + tokens, context), and which are there."""
        states = self.read(told)
        assert states is not None
        B, n, module = len(z_i), self.config.tokens, array_module(told.states)
        context = ops.concat([states, self.image_tokens(z_i).reshape(B, n, -1)], axis=1)
        if told.mask is None:
            return context, None
        return context, module.concatenate([told.mask, module.ones((B, n), bool)], axis=1)

    def hide_some(self, told: Condition, empty: Condition, rng: Rng) -> Condition:
        """Replace shares of the captions by the empty one and of the z_i by 0, each on its own (E33)."""
        told = super().hide_some(told, empty, rng)
        if told.vector is None:
            raise ValueError("a decoder learns from image embeddings, but was told none")
        return told.some_replaced(Condition(vector=0 * told.vector[:1]), self.config.image_drop, rng.at(3))
