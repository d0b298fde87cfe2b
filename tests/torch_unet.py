"""The U-Net of nn/unet.py written independently in PyTorch, layer by layer, to compare results and speed with.

Needs torch, which tinydiff itself never does.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tinydiff.nn import UNet, UNetConfig


class TorchAttention(nn.Module):
    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class TorchBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, config: UNetConfig, attend: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(config.groups, inputs), nn.GroupNorm(config.groups, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.emb = nn.Linear(4 * config.base, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = TorchAttention(outputs, config.heads, config.groups) if attend else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        return self.attention(self.skip(x) + self.conv2(F.silu(self.norm2(h))))


class TorchUNet(nn.Module):
    """Takes x (B, C, H, W), t (B,) and labels (B,), -1 or None for no label; no context."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config, embedding, pixels = config, 4 * config.base, config.channels * config.patch**2
        widths = [config.base * m for m in config.multipliers]
        self.inner, self.outer = nn.Linear(config.base, embedding), nn.Linear(embedding, embedding)
        self.label = nn.Embedding(config.classes + 1, embedding) if config.classes else None
        self.conv_in = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [widths[0]]
        for i, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(TorchBlock(skips[-1], width, config, i in config.attention))
                skips.append(width)
            if width is not widths[-1] or i < len(widths) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        last = widths[-1]
        self.middle = nn.ModuleList([TorchBlock(last, last, config, True), TorchBlock(last, last, config, False)])
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(TorchBlock(last + skips.pop(), width, config, i in config.attention))
                last = width
            if i:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm_out = nn.GroupNorm(config.groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], pixels, 3, padding=1)

    def embed(self, t, label, dtype):
        half = self.config.base // 2
        omega = 10_000.0 ** (-torch.arange(half, dtype=dtype, device=t.device) / half)
        angles = t.to(dtype)[:, None] * omega
        emb = self.outer(F.silu(self.inner(torch.cat([angles.sin(), angles.cos()], 1))))
        if self.label is not None:
            emb = emb + self.label((torch.full_like(t, -1) if label is None else label) + 1)
        return F.silu(emb)

    def forward(self, x, t, label=None):
        emb = self.embed(t, label, x.dtype)
        h = self.conv_in(to_patches(x, self.config.patch))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, TorchBlock) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for layer in self.up:
            if isinstance(layer, TorchBlock):
                h = layer(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = layer(F.interpolate(h, scale_factor=2, mode="nearest"))
        return from_patches(self.conv_out(F.silu(self.norm_out(h))), self.config.patch)


def to_patches(x, f: int):
    """(B, C, f H, f W) -> (B, f² C, H, W). PyTorch's channels are (C, f, f), ours (f, f, C)."""
    if f == 1:
        return x
    return F.pixel_unshuffle(x, f).unflatten(1, (-1, f * f)).transpose(1, 2).flatten(1, 2)


def from_patches(x, f: int):
    """What to_patches took."""
    if f == 1:
        return x
    return F.pixel_shuffle(x.unflatten(1, (f * f, -1)).transpose(1, 2).flatten(1, 2), f)


def torch_name(name: str) -> str:
    """The name in TorchUNet of one of our parameters."""
    renamed = name.replace("time.", "").replace("gamma", "weight").replace("beta", "bias")
    head, dot, rest = renamed.partition(".")
    if head in ("down", "up", "middle"):
        index, _, rest = rest.partition(".")
        for wrapper in ("block.", "conv.") if head != "middle" else ("block.",):
            rest = rest.removeprefix(wrapper)
        return f"{head}.{index}.{rest}"
    return head + dot + rest


def to_torch_layout(name: str, array) -> torch.Tensor:
    """Our kernels are (kh, kw, in, out) and matrices (in, out); PyTorch's are (out, in, kh, kw) and (out, in).

    The rows of an embedding are the same in both.
    """
    tensor = torch.from_numpy(array)
    if name == "label.weight":
        return tensor
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    if tensor.ndim == 2:
        tensor = tensor.T.contiguous()
        return tensor[:, :, None, None] if ".attention." in name else tensor
    return tensor


def twin(model: UNet, dtype=torch.float32) -> TorchUNet:
    """A TorchUNet with the same weights."""
    peer = TorchUNet(model.config).to(dtype)
    peer.load_state_dict({torch_name(n): to_torch_layout(n, a) for n, a in model.state_dict().items()})
    return peer
