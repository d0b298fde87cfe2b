"""The machine's limits, measured, and how much arithmetic and traffic the work needs, counted.

share = (needed operations / operations a second of a large matrix product) / time taken
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.benchmarks.side import Side, Task

PRODUCT, TRIAD = 4096, 1 << 26
"""The sizes of the two measurements: a (4096, 4096) product, and arrays of 256 MB each."""


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, all cores together: operations and bytes a second."""

    flops: float
    bandwidth: float

    def share(self, seconds: float, flops: float = 0, moved: float = 0) -> float:
        """The part of the time that the work would take at the nearer of the two limits."""
        return max(flops / self.flops, moved / self.bandwidth) / seconds


def measure(product: int = PRODUCT, triad: int = TRIAD, tries: int = 5) -> Limits:
    """The machine's limits, as NumPy reaches them: the best of a few tries."""
    fastest = []
    for make, n in (("matrix_product", product), ("triad", triad)):
        with Side(Task(f"tests.benchmarks.ours:{make}", {"n": n})) as side:
            side.go()
            fastest.append(min(side.go()[0] for _ in range(tries)))
    return Limits(2 * product**3 / fastest[0], 12 * triad / fastest[1])


def unet_flops(config: Any, height: int, width: int) -> int:
    """Multiplications and additions of a U-Net's forward pass on one image, its convolutions done directly.

    Counted: all products with weights, and attention's two with the pixels themselves.
    """
    from tinydiff import Rng
    from tinydiff.nn import Downsample, UNet, Upsample

    model = UNet(config, Rng(0))
    pixels = height * width // config.patch**2
    total = weights(model.time) + pixels * (weights(model.conv_in) + weights(model.conv_out))
    for layer in (*model.down, *model.middle, *model.up):
        if isinstance(layer, (Downsample, Upsample)):
            pixels = pixels // 4 if isinstance(layer, Downsample) else pixels * 4
            total += pixels * weights(layer)
        else:
            of_time = weights(layer.block.emb)
            total += of_time + pixels * (weights(layer) - of_time)
            total += 2 * pixels**2 * layer.attention.out.weight.shape[0] if layer.attention else 0
    return 2 * total


def transformer_flops(width: int, layers: int, tokens: int) -> int:
    """Multiplications and additions of a transformer's forward pass on one sequence, its MLPs four times as wide."""
    return 2 * layers * (tokens * 12 * width**2 + 2 * tokens**2 * width)


def weights(module: Any) -> int:
    """How many numbers the module's matrices and kernels hold: the multiplications for one pixel."""
    return sum(p.size for p in module.parameters().values() if p.ndim >= 2)
