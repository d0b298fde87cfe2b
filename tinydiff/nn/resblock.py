"""ResBlock: the block of the U-Net, told the time, and of the autoencoder, told nothing."""

from __future__ import annotations

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.nn.conv import Conv2d
from tinydiff.nn.linear import Linear
from tinydiff.nn.module import Module
from tinydiff.nn.norm import GroupNorm
from tinydiff.rng import Rng


class ResBlock(Module):
    """skip(x) + conv(SiLU(norm(conv(SiLU(norm(x))) + Linear(emb)))) (E20; Ho et al. 2020, App. B).

    x: images (B, H, W, inputs); emb: (B, embedding), the same for all pixels: what the block is told of the time and
    the class; a block made with embedding None is told nothing, and has no such term. Gives (B, H, W, outputs). skip is
    the identity, or a 1 x 1 convolution where the channels change. The second convolution starts at zero, so that the
    block starts as its skip. Raises ValueError for an emb that the block does not know, or one that it lacks.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int | None, rng: Rng, *, groups: int, dropout: float = 0.0
    ):
        self.dropout = dropout
        self.norm1 = GroupNorm(inputs, groups, silu=True)
        self.conv1 = Conv2d(inputs, outputs, rng)
        self.emb = Linear(embedding, outputs, rng) if embedding else None
        self.norm2 = GroupNorm(outputs, groups, silu=True)
        self.conv2 = Conv2d(outputs, outputs, rng, zero=True)
        self.skip = Conv2d(inputs, outputs, rng, kernel=1) if inputs != outputs else None

    def __call__(self, x: Tensor, emb: Tensor | None = None, rng: Rng | None = None) -> Tensor:
        h = self.norm2(self.conv1(self.norm1(x), self._told(emb)))
        if self.training and self.dropout:
            if rng is None:
                raise ValueError("a block with dropout needs an Rng while it trains")
            h = ops.dropout(h, p=self.dropout, rng=rng)
        return (self.skip(x) if self.skip else x) + self.conv2(h)

    def _told(self, emb: Tensor | None) -> Tensor | None:
        """What is added to all pixels of each image, or None."""
        if (emb is None) != (self.emb is None):
            raise ValueError(f"this block takes {'no' if self.emb is None else 'an'} embedding, got {emb}")
        return self.emb(emb) if self.emb is not None and emb is not None else None
