"""What PyTorch does in each row: the functions of ours.py once more, from the same weights and inputs.

channels_last is the other memory layout of images that PyTorch knows; which of the two is faster depends on the work.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks import ours
from tests.benchmarks.side import Step
from tests.torch_unet import twin
from tinydiff import Rng
from tinydiff.diffusion.samplers import timesteps
from tinydiff.models.pixel_diffusion import USUAL_GUIDANCE
from tinydiff.nn import UNetConfig
from tinydiff.optim import warmup_cosine


def layout(channels_last: bool) -> torch.memory_format:
    """PyTorch's name of a memory layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def channels_first(x: np.ndarray, channels_last: bool) -> torch.Tensor:
    """Images (B, H, W, C) as (B, C, H, W) in one of the two layouts."""
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=layout(channels_last))


def unet_step(
    batch: int = 64,
    size: int = 32,
    config: UNetConfig = ours.UNET,
    channels_last: bool = False,
    device: str = "cpu",
    compiled: bool = False,
) -> Step:
    """A training step of a U-Net: forward, mean squared error, backward, Adam; gives the loss."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # on a GPU, as ours
    x, eps, t = ours.images(batch, size)
    x, eps = (channels_first(a, channels_last).to(device) for a in (x, eps))
    model = twin(ours.unet(config)).to(device, memory_format=layout(channels_last))
    forward, t = torch.compile(model) if compiled else model, torch.from_numpy(t).to(device)
    return training_step(model, lambda: F.mse_loss(forward(x, t), eps))


def transformer_step(batch: int = 64, tokens: int = 64, width: int = 256, layers: int = 6, heads: int = 4) -> Step:
    """A training step of a transformer: forward, mean squared error, backward, Adam; gives the loss."""
    from tests.torch_transformer import twin

    model, *arrays = ours.transformer(batch, tokens, width, layers, heads)
    peer, (x, wanted) = twin(model), map(torch.from_numpy, arrays)
    return training_step(peer, lambda: F.mse_loss(peer(x), wanted))


def training_step(model: torch.nn.Module, loss_of: Any) -> Step:
    """A step of Adam along the gradient of this loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> float:
        loss = loss_of()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def unet_forward(
    batch: int = 64,
    size: int = 32,
    config: UNetConfig = ours.UNET,
    channels_last: bool = False,
) -> Step:
    """A U-Net's forward pass without gradients; gives the mean square of the output."""
    x, _, t = ours.images(batch, size)
    x, t = channels_first(x, channels_last), torch.from_numpy(t)
    model = twin(ours.unet(config)).to(memory_format=layout(channels_last))

    def step() -> float:
        with torch.inference_mode():
            return (model(x, t) ** 2).mean().item()

    return step


def mnist_step(channels_last: bool = False, **changes: Any) -> Step:
    """A training step of examples/train_mnist.py: draws, shifts, loss, backward, AdamW, clipping, average; the loss."""
    model, recipe, digits = ours.digits_model(**changes)
    peer, tables = twin(model.unet).to(memory_format=layout(channels_last)), Tables(model.schedule)
    settings = recipe.settings()
    parameters = list(peer.parameters())
    optimiser = torch.optim.AdamW(parameters, betas=settings.betas, weight_decay=settings.weight_decay)
    averages = [p.detach().clone() for p in parameters]
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)
    count = itertools.count(1)

    def step() -> float:
        n = next(count)
        chosen = torch.randint(len(images), (recipe.batch_size,))
        x_0 = shifted(images[chosen], recipe.shift)[:, None].float() / 127.5 - 1
        x_0 = x_0.contiguous(memory_format=layout(channels_last))
        hidden = torch.rand(len(x_0)) < model.config.label_drop
        t, label = stratified_times(len(x_0), model.schedule.T), labels[chosen].masked_fill(hidden, -1)
        loss = x0_loss(peer, x_0, t, torch.randn_like(x_0), label, tables)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_norm)
        optimiser.param_groups[0]["lr"] = warmup_cosine(n, settings.steps, settings.lr, settings.warmup)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(settings.ema_decay, (1 + n) / (10 + n)))
        return loss.item()

    return step


class Tables:
    """What the loss needs of a schedule, by t: square roots of ᾱ_t and 1 − ᾱ_t, and min(SNR_t, 5)."""

    def __init__(self, schedule: Any):
        self.signal = torch.from_numpy(schedule.alpha_bar**0.5).float()
        self.noise = torch.from_numpy(schedule.one_minus_alpha_bar**0.5).float()
        self.weight = torch.from_numpy(np.minimum(schedule.snr, 5)).float()


def x0_loss(model: Any, x_0: Any, t: Any, eps: Any, label: Any, tables: Tables) -> Any:
    """The squared error of a network that predicts x_0 (B, C, H, W), weighted by min(SNR_t, 5)."""
    signal, noise, weight = (table[t][:, None, None, None] for table in (tables.signal, tables.noise, tables.weight))
    return (weight * (model(signal * x_0 + noise * eps, t, label) - x_0) ** 2).mean()


def stratified_times(n: int, T: int) -> torch.Tensor:
    """One t from each of n equal parts of 1..T."""
    return (1 + T * (torch.arange(n) + torch.rand(n, dtype=torch.float64)) / n).long().clamp(max=T)


def shifted(images: torch.Tensor, most: int) -> torch.Tensor:
    """Each image (B, H, W) moved by up to `most` pixels down and across, zeros coming in."""
    B, H, W = images.shape
    down, across = torch.randint(2 * most + 1, (2, B, 1))
    rows, columns = torch.arange(H) + down, torch.arange(W) + across
    return F.pad(images, (most,) * 4)[torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]


def optimiser(fused: bool = False, **sizes: int) -> Step:
    """Clipping to norm 1, Adam and a moving average, without a network; gives how far one average moved."""
    parameters = [torch.from_numpy(array).requires_grad_() for array in ours.kernels(**sizes).values()]
    gradients = [0.1 * p.detach() for p in parameters]
    averages = [p.detach().clone() for p in parameters]
    start = averages[-1].clone()
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=fused or None)
    count = itertools.count(1)

    def step() -> float:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient  # which clipping scales in place: from the second step on its norm is 1
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        n = next(count)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(0.99, (1 + n) / (10 + n)))
        return (averages[-1] - start).abs().sum().item()

    return step


def sample(n: int = 64, steps: int = 50, channels_last: bool = False, **changes: Any) -> Step:
    """DDIM with the model of examples/train_mnist.py and its usual guidance; gives the mean square of the digits."""
    model, _, _ = ours.digits_model(**changes)
    peer = twin(model.unet).to(memory_format=layout(channels_last))
    x_T = channels_first(Rng(3).at(0).normal((n, *model.config.size, 1)), channels_last)
    label, times = torch.arange(n) % 10, [*timesteps(model.schedule.T, steps), 0]
    signal, noise = model.schedule.alpha_bar**0.5, model.schedule.one_minus_alpha_bar**0.5

    def step() -> float:
        x_t = x_T
        with torch.inference_mode():
            for t, s in itertools.pairwise(times):
                here = torch.full((n,), t)
                plain = peer(x_t, here)
                x_0 = (plain + USUAL_GUIDANCE * (peer(x_t, here, label) - plain)).clamp(-1, 1)
                x_t = float(signal[s]) * x_0 + float(noise[s] / noise[t]) * (x_t - float(signal[t]) * x_0)
        return (x_t**2).mean().item()

    return step
