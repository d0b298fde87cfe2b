"""A text encoder that never saw a picture: it learned from texts alone, by guessing hidden words (E37).

    a red [?] on a white background   ── bidirectional transformer ──   star 0.21, circle 0.20, ...

Imagen's point is that such an encoder, trained on far more text than there are captions of images, may tell a U-Net
more than CLIP's can. Imagen listens to T5, which guesses hidden spans (Raffel et al. 2020). This one guesses single
tokens, as BERT does (Devlin et al. 2019); Saharia et al. 2022 compare T5, BERT and CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tinydiff import checkpoint, ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import Array, array_module, to_device, to_numpy
from tinydiff.checkpoint import CheckpointError
from tinydiff.files import PathLike
from tinydiff.models.clip import CLIP, TextConfig, TextTower, caption_tokens
from tinydiff.models.text_diffusion import TextDiffusion
from tinydiff.models.tokenizer import BYTES, END, MERGED, START, Tokenizer, clean
from tinydiff.models.trained import load_trained, warn_of_another
from tinydiff.nn import Linear, Module, TransformerConfig
from tinydiff.rng import Rng

SMALL_ENCODER = TransformerConfig(128, 3, 4)
"""As large as the text tower of the shipped CLIP, but each token sees all."""

GAP = "___"
"""What stands for a hidden word in a text that is written by hand."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """What a MaskedTextEncoder is made of.

    merges: the tokenizer's, see Tokenizer. length: of a text, in tokens, START and END among them. text: the
    transformer. hidden: the share of a text's tokens that must be guessed in training.

    Raises ValueError for a causal transformer, a share outside (0, 1], and as TextConfig does.
    """

    merges: tuple[tuple[int, int], ...] = ()
    length: int = 32
    text: TransformerConfig = SMALL_ENCODER
    hidden: float = 0.2

    def __post_init__(self) -> None:
        if self.text.causal:
            raise ValueError(f"guessing from both sides takes a transformer that is not causal, got {self.text}")
        if not 0 < self.hidden <= 1:
            raise ValueError(f"the share of hidden tokens must be in (0, 1], got {self.hidden}")
        self.tower()

    def tower(self) -> TextConfig:
        """The sizes of the tower; its vocabulary has one token more than the tokenizer, which hides another."""
        return TextConfig(MERGED + len(self.merges) + 1, self.length, self.text)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        return cls(**fields | {"text": TransformerConfig(**fields["text"])})


class MaskedTextEncoder(Module):
    """A bidirectional transformer, and a linear head that guesses what was hidden from it.

    The head is there for training; a U-Net listens to the states before it.
    """

    kind = "text-encoder"

    def __init__(self, config: TextEncoderConfig, rng: Rng):
        self.config, self.tokenizer = config, Tokenizer(config.merges)
        self.text = TextTower(config.tower(), rng)
        self.head = Linear(config.text.width, len(self.tokenizer), rng)
        self.mask_token = len(self.tokenizer)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The encoder in a training run's checkpoint, with the averaged weights (EMA), ready for use.

        path: see `checkpoint.find`. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(TextEncoderConfig.from_dict(fields), Rng(0)))

    # ------------------------------------------------------------------------------------------ training

    def loss(self, ids: Array, mask: Array, rng: Rng) -> Tensor:
        """One draw of the training loss (Devlin et al. 2019, section 3.1).

            L = −(1/|H|) Σ_{i in H} log p_θ(y_i | y with H hidden)

        H is a random part of the batch's tokens. ids, mask: as `tokens` gives them. rng: the stream of this step.
        """
        return self.loss_of(*self.draw(ids, mask, rng))

    def draw(self, ids: Array, mask: Array, rng: Rng) -> tuple[Array, Array, Array, Array]:
        """All that `loss` draws, the arguments of `loss_of`: what is shown, the mask, the true ids, what is in H."""
        hidden = self.chosen(ids, rng.at(0))
        return self.corrupted(ids, hidden, rng.at(1)), mask, ids, hidden

    def chosen(self, ids: Array, rng: Rng) -> Array:
        """Which tokens are to be guessed, bool (B, M): a random share, and of each text that has any, one at least."""
        module = array_module(ids)
        u = module.where(ids < BYTES, 2.0, rng.uniform(ids.shape))  # never START, END and PAD
        return (u <= module.maximum(u.min(axis=1, keepdims=True), self.config.hidden)) & (u < 2)

    def corrupted(self, ids: Array, hidden: Array, rng: Rng) -> Array:
        """The tokens as they are shown: of the hidden ones, 80 % hidden, 10 % another token, 10 % as they are.

        So that the states of tokens which are not hidden are worth something, too: any of them may be wrong.
        """
        module, u = array_module(ids), rng.at(0).uniform(ids.shape)
        other = rng.at(1).integers(BYTES, self.mask_token, ids.shape)
        return module.where(hidden & (u < 0.8), self.mask_token, module.where(hidden & (u >= 0.9), other, ids))

    def loss_of(self, shown: Array, mask: Array, ids: Array, hidden: Array) -> Tensor:
        """The loss of what `draw` gave; 0 if nothing is hidden."""
        logits, weights = self.logits(shown, mask), hidden.reshape(-1).astype(self.head.weight.dtype)
        weights = weights / array_module(weights).maximum(weights.sum(), 1)
        return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1), weights)

    def logits(self, ids: Array, mask: Array) -> Tensor:
        """log p_θ of each token in each place, but for a constant: (B, M, vocabulary)."""
        return self.head(self.text(ids, mask))

    # ----------------------------------------------------------------------------------------------- use

    def tokens(self, captions: Sequence[str]) -> tuple[Array, Array]:
        """Captions as the transformer takes them: in lower case, as tokens (B, length) int64, and where they are, bool.

        A caption that is too long is cut, with a warning; see `Tokenizer.batch`, which raises what this does.
        """
        return caption_tokens(self.tokenizer, captions, self.config.length, self.head.weight.device)

    def text_states(self, ids: Array, mask: Array) -> Tensor:
        """What the transformer makes of each token, for a U-Net to look at (E27): (B, M, width)."""
        return self.text(ids, mask)

    def fill(self, text: str, n: int = 5) -> list[tuple[str, float]]:
        """The n likeliest tokens in the place of the gap, with their probabilities: fill("a red ___").

        Raises ValueError for a text without a gap, with two, or that is too long, or for n below 1.
        """
        if text.count(GAP) != 1 or n < 1:
            raise ValueError(f"expected a text with one {GAP} and a number of guesses above 0, got {text!r} and {n}")
        before, after = (self.tokenizer.encode(clean(part)) for part in text.split(GAP))
        row = np.array([[START, *before, self.mask_token, *after, END]])
        with no_grad():
            logits = self.logits(to_device(row, self.head.weight.device), to_device(row >= 0, self.head.weight.device))
        p = to_numpy(ops.softmax(logits[0, 1 + len(before)]).data)
        return [(self.tokenizer.decode([i]).strip(), float(p[i])) for i in (-p).argsort()[:n]]


TrainedTextEncoder = CLIP | MaskedTextEncoder
"""What a U-Net may listen to; each knows its width, config.text.width."""


def load_text_encoder(path: PathLike) -> TrainedTextEncoder:
    """The text encoder in a checkpoint, whichever it is: a CLIP's text tower knows pictures, the other texts alone.

    path: see `checkpoint.find`. Raises CheckpointError if it cannot be read, or holds another kind of model.
    """
    kind = checkpoint.kind_of(path)
    if kind == CLIP.kind:
        return CLIP.load(path)
    if kind == MaskedTextEncoder.kind:
        return MaskedTextEncoder.load(path)
    expected = f"{CLIP.kind!r} or {MaskedTextEncoder.kind!r}"
    raise CheckpointError(f"{path} holds no text encoder: expected {expected}, got {kind!r}")


def check_listens(model: TextDiffusion, text_encoder: TrainedTextEncoder) -> None:
    """Warn if a model was trained with another text encoder. Raises ValueError if it cannot read this one's."""
    wanted, width = model.config.unet.context, text_encoder.config.text.width
    if wanted != width:
        raise ValueError(f"the U-Net reads texts of width {wanted}, the text encoder's have width {width}")
    warn_of_another("text encoder", text_encoder, model.config.text_encoder, "U-Net")
