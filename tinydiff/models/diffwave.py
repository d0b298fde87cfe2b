"""DiffWave: diffusion on sound itself, sample by sample (E38; Kong et al. 2021).

x_t ── conv ─┬─ layer 1 ─── layer 2 ─── ... ─── layer N      each layer looks `dilation` samples to both sides:
             t    └── skip ──┴───── Σ ────────────┴── conv, conv ── ε        1, 2, 4, ..., and again 1, 2, 4, ...
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tinydiff import ops
from tinydiff.autograd import Tensor
from tinydiff.backend import Array, array_module, beside, captured, to_device, to_numpy, value_range
from tinydiff.data.spectrum import Mel
from tinydiff.diffusion import Sampling, classifier_free, denoiser, draw_t, q_sample, squared_error, target_of
from tinydiff.diffusion.samplers import Clip, Denoise
from tinydiff.files import PathLike
from tinydiff.models.pixel_diffusion import SCHEDULES, TARGETS, USUAL_SAMPLING, schedule_for
from tinydiff.models.trained import load_trained
from tinydiff.nn import Conv1d, Embedding, Linear, Module, TimeEmbedding
from tinydiff.rng import Rng


@dataclass(frozen=True)
class DiffWaveConfig:
    """What a DiffWave is made of.

    length: of the waves, in samples; rate: samples a second. channels, layers: width and number of the residual layers.
    cycle: layer i has the dilation 2^(i mod cycle). patch: turn so many neighbouring samples into one place before the
    first layer, which is faster by about as much; 1 is the paper's. embedding: width of what the layers are told of the
    time and the label. T, schedule, target: as in PixelDiffusionConfig; the paper predicts "eps" on a linear schedule.
    class_names: of the labels it can be told, such as notes; none for a model without labels. label_drop: the share of
    labels hidden in training (E35). mel: the mel spectrograms that it can be told, which makes it a vocoder, or None.

    Raises ValueError for a name that is not among those known, sizes below 1, lengths that do not divide.
    """

    length: int = 2048
    rate: int = 8000
    channels: int = 48
    layers: int = 12
    cycle: int = 6
    patch: int = 8
    embedding: int = 64
    T: int = 200
    schedule: str = "cosine"
    target: str = "v"
    class_names: tuple[str, ...] = ()
    label_drop: float = 0.1
    mel: Mel | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("schedule", self.schedule, SCHEDULES), ("target", self.target, TARGETS)):
            if value not in known:
                raise ValueError(f"the {name} must be one of {', '.join(known)}, got {value!r}")
        sizes = (self.length, self.rate, self.channels, self.layers, self.cycle, self.patch)
        if min(sizes) < 1 or self.embedding < 2 or self.embedding % 2:
            raise ValueError(f"a DiffWave needs sizes of at least 1 and an even embedding, got {self}")
        if self.length % self.patch:
            raise ValueError(f"the patch {self.patch} must divide the length {self.length}")
        if self.mel is not None and (
            self.mel.rate != self.rate or self.mel.hop % self.patch or self.length % self.mel.hop
        ):
            raise ValueError(
                f"a mel spectrogram needs the model's rate {self.rate}, and a hop that the patch {self.patch} divides "
                f"and that divides the length {self.length}; got {self.mel}"
            )
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"the share of hidden labels must be in [0, 1], got {self.label_drop}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration that dataclasses.asdict turned into these fields."""
        return cls(**fields | {"mel": fields["mel"] and Mel(**fields["mel"])})

    @property
    def dilations(self) -> list[int]:
        """How many places apart the taps of each layer lie."""
        return [2 ** (i % self.cycle) for i in range(self.layers)]

    @property
    def receptive_field(self) -> int:
        """How many samples around it an output sample is computed from: patch (1 + 2 Σ dilations)."""
        return self.patch * (1 + 2 * sum(self.dilations))


class ResidualLayer(Module):
    """z = tanh(a) ⊙ σ(b), [a, b] = conv_dilated(h + W_t emb) + W_y label + W_m mel;  h ← (h + W_r z)/√2,  skip = W_s z.

    h: (B, L, C); emb, label: (B, E), what is known of the time and of the label, or None; mel: (B, L, C), or None.
    Gives the next h and the skip, (B, L, C) each. (E38; Kong et al. 2021, fig. 2 and section 3.2)
    """

    def __init__(self, config: DiffWaveConfig, dilation: int, rng: Rng):
        C, E = config.channels, config.embedding
        self.time = Linear(E, C, rng)
        self.conv = Conv1d(C, 2 * C, rng, dilation=dilation)
        self.label = Linear(E, 2 * C, rng, bias=False) if config.class_names else None
        self.mel = Linear(C, 2 * C, rng, bias=False) if config.mel else None
        self.out = Linear(C, 2 * C, rng)

    def __call__(self, h: Tensor, emb: Tensor, label: Tensor | None, mel: Tensor | None) -> tuple[Tensor, Tensor]:
        C = h.shape[2]
        bias = self.label(label) if self.label and label is not None else None
        y = self.conv(h + self.time(emb).reshape(len(h), 1, C), bias)
        if self.mel and mel is not None:
            y = y + self.mel(mel)
        z = ops.tanh(y[..., :C]) * ops.sigmoid(y[..., C:])
        out = self.out(z)
        return (h + out[..., :C]) * 0.5**0.5, out[..., C:]


class MelUpsampler(Module):
    """Features at every place of the wave from a mel spectrogram's frames: (B, L/hop, bands) -> (B, L/patch, C).

    A convolution shows each frame its neighbours; then each frame gives the hop/patch places that it covers. The latter
    is a transposed convolution whose kernel is as long as its stride.
    """

    def __init__(self, config: DiffWaveConfig, mel: Mel, rng: Rng):
        self.config, self.places = config, mel.hop // config.patch
        self.frames = Conv1d(mel.bands, 2 * config.channels, rng)
        self.spread = Linear(2 * config.channels, self.places * config.channels, rng)

    def __call__(self, mel: Tensor) -> Tensor:
        h = self.spread(ops.silu(self.frames(mel)))
        return ops.silu(h.reshape(len(mel), -1, self.config.channels))


class DiffWave(Module):
    """A dilated convolutional network that turns noise into sound: its training loss (E18) and its samplers (E19).

    Called as model(x_t, t, label, mel) it gives the network's output, eps, x_0 or v as its configuration says. Waves
    are (B, L) with values in [-1, 1]; a convolutional network takes them of any length that its patch divides. Raises
    ValueError for the target "eps" on a schedule that ends without signal.
    """

    kind = "diffwave"

    def __init__(self, config: DiffWaveConfig, rng: Rng):
        self.config = c = config
        self.schedule = schedule_for(c.schedule, c.T, c.target)
        self.time = TimeEmbedding(c.embedding, c.embedding, rng)
        self.label = Embedding(len(c.class_names) + 1, c.embedding, rng) if c.class_names else None
        self.mel = MelUpsampler(c, c.mel, rng) if c.mel else None
        self.conv_in = Linear(c.patch, c.channels, rng)
        self.layers = [ResidualLayer(c, dilation, rng) for dilation in c.dilations]
        self.conv_skip = Linear(c.channels, c.channels, rng)
        self.conv_out = Linear(c.channels, c.patch, rng, zero=True)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """The model in a training run's checkpoint, with the averaged weights (EMA), ready to sample.

        path: the checkpoint, or the folder it is in. Raises CheckpointError if it cannot be read.
        """
        return load_trained(path, cls.kind, lambda fields: cls(DiffWaveConfig.from_dict(fields), Rng(0)))

    def __call__(self, x_t: Array, t: Array, label: Array | None = None, mel: Array | None = None) -> Tensor:
        """The network's output for x_t (B, L) at the times t (B,); a label of -1, or None, is no label.

        mel: (B, L/hop, bands), as config.mel gives it; a vocoder needs one. The network's 1 x 1 convolutions are
        Linear layers, which work along the last axis. Raises ValueError for shapes, labels and conditions that do not
        fit.
        """
        self._check(x_t, t, label, mel)
        x, c = Tensor(x_t), self.config
        emb = ops.silu(self.time(beside(t, x_t)))
        rows = array_module(x_t).full(len(x), -1) if label is None else to_device(label, x.device)
        y = None if self.label is None else self.label(rows + 1)
        m = None if self.mel is None else self.mel(Tensor(beside(mel, x_t)))

        h = ops.relu(self.conv_in(x.reshape(len(x), -1, c.patch)))
        skips = []
        for layer in self.layers:
            h, skip = layer(h, emb, y, m)
            skips.append(skip)
        total = functools.reduce(lambda a, b: a + b, skips) * c.layers**-0.5
        return self.conv_out(ops.relu(self.conv_skip(total))).reshape(x.shape)

    def loss(self, x_0: Array, rng: Rng, label: Array | None = None, mel: Array | None = None) -> Tensor:
        """One draw of the training loss, the inner lines of Algorithm 1 (E17, E18; Kong et al. 2021, Algorithm 1).

            t ~ Uniform({1, ..., T}),  eps ~ N(0, I),  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
            L = || eps - eps_theta(x_t, t) ||²

        averaged over batch and samples; for another target as `simple_loss` says. x_0: (B, L), float32 in [-1, 1].
        label: (B,) whole numbers, if the model has classes. mel: (B, L/hop, bands), if it is a vocoder. rng: the stream
        of this step. Raises ValueError for a condition out of range, missing or not wanted.
        """
        return self.loss_of(*self.draw(x_0, rng, label, mel))

    def draw(
        self, x_0: Array, rng: Rng, label: Array | None = None, mel: Array | None = None
    ) -> tuple[Array | None, ...]:
        """All that `loss` draws and looks up, the arguments of `loss_of`, on x_0's device; takes and raises the same.

        Returns x_t and what the network should output (B, L), between them t (B,); then the label (B,), some of them
        hidden as -1, and the mel spectrograms, or None.
        """
        self._check_label(label, len(x_0), required=True)
        t, eps = draw_t(rng.at(0), len(x_0), self.schedule.T), rng.at(1).normal_like(x_0)
        if label is not None:
            hidden = to_numpy(rng.at(2).uniform((len(x_0),))) < self.config.label_drop
            label = np.where(hidden, -1, to_numpy(label))
        x_t = q_sample(x_0, t, eps, self.schedule)
        wanted = target_of(x_0, eps, t, self.schedule, self.config.target)
        return x_t, beside(t, x_0), wanted, beside(label, x_0), beside(mel, x_0)

    def loss_of(
        self, x_t: Array, t: Array, wanted: Array, label: Array | None = None, mel: Array | None = None
    ) -> Tensor:
        """The loss of what `draw` gave, the same each time."""
        return squared_error(self(x_t, t, label, mel), wanted)

    def sample(
        self,
        n: int,
        rng: Rng,
        how: Sampling = USUAL_SAMPLING,
        *,
        guidance: float = 1.0,
        label: int | np.ndarray | None = None,
        mel: Array | None = None,
    ) -> Iterator[Array]:
        """Draw n waves from noise, yielding x_T first, then each state down to x_0 (E19; Algorithm 2).

        how: the sampler and its steps, by default 50 of DDIM. guidance: s of E35; 1 is none. label: the class, or one
        for each wave; a model with classes that is told none draws them uniformly. mel: (n, L/hop, bands), what a
        vocoder is to sound like, for waves of any length L; else L is config.length. Each state is (n, L), float32,
        x_0 in [-1, 1]. Equal rng, equal x_T, whatever the sampler and steps.
        Raises ValueError for more steps than T, conditions that do not fit, and guidance of a model without classes.
        """
        if n < 1:
            raise ValueError(f"the number of waves must be at least 1, got {n}")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}")
        if guidance != 1 and self.label is None:
            raise ValueError(f"guidance {guidance} needs a model with classes; this one was trained without labels")
        if label is None and self.label is not None:
            label = to_numpy(rng.at(2).integers(0, len(self.config.class_names), (n,)))
        label = np.full(n, label) if isinstance(label, int) else label
        self._check_label(label, n, required=True)
        hop = self.config.mel.hop if self.config.mel else 1
        length = self.config.length if mel is None else mel.shape[1] * hop
        self._check_mel(mel, n, length)

        x_T = rng.at(0).normal((n, length))
        denoise = self.denoiser(beside(label, x_T), beside(mel, x_T), guidance, how.clip)
        return itertools.chain([x_T], how.states(denoise, x_T, self.schedule, rng.at(1)))

    def denoiser(
        self, label: Array | None = None, mel: Array | None = None, guidance: float = 1.0, clip: Clip = True
    ) -> Denoise:
        """The network as the samplers take it: denoise(x_t, t) -> Prediction.

        label, mel: on the device of x_t, one for each x_t of the batch. guidance: s of E35; other than 1 it needs a
        label. clip: how each guess at x_0 is kept in [-1, 1], see Clip.
        """
        self.eval()
        model = classifier_free(
            lambda x_t, t: self(x_t, t, label, mel), lambda x_t, t: self(x_t, t, None, mel), guidance
        )

        @captured
        def network(x_t: Array, t: Array) -> Array:
            return model(x_t, t).data

        return denoiser(lambda x_t, t: network(x_t, beside(t, x_t)), self.schedule, self.config.target, clip)

    def _check(self, x_t: Array, t: Array, label: Array | None, mel: Array | None) -> None:
        n, patch = len(x_t), self.config.patch
        if x_t.ndim != 2 or x_t.shape[1] % patch or getattr(t, "shape", None) != (n,):
            raise ValueError(
                f"expected waves (B, L), L a multiple of the patch {patch}, and times (B,); got {x_t.shape} and "
                f"{getattr(t, 'shape', t)}"
            )
        self._check_label(label, n, lowest=-1)
        self._check_mel(mel, *x_t.shape)

    def _check_label(self, label: Array | None, n: int, lowest: int = 0, required: bool = False) -> None:
        """Raise ValueError unless the labels are n, in lowest..classes-1, and given if they are required."""
        classes = len(self.config.class_names)
        if label is None and not (classes and required):
            return
        if not classes:
            raise ValueError("a label was given to a model without classes")
        if label is None or label.shape != (n,):
            raise ValueError(f"{n} waves need {n} labels, got {None if label is None else label.shape}")
        found = value_range(label)
        if found and not (lowest <= found[0] and found[1] < classes):
            wrong = found[0] if found[0] < lowest else found[1]
            raise ValueError(f"a label must be in {lowest}..{classes - 1}, got {wrong}")

    def _check_mel(self, mel: Array | None, n: int, length: int) -> None:
        """Raise ValueError unless the mel spectrograms are those that the model is to be told, or it is told none."""
        known = self.config.mel
        expected = None if known is None else (n, length // known.hop, known.bands)
        got = None if mel is None else mel.shape
        if got != expected:
            raise ValueError(f"{n} waves of {length} samples need mel spectrograms of shape {expected}, got {got}")
