"""Time a U-Net training step against PyTorch eager on the same weights and batch, and measure the memory of both.

    python tests/benchmarks/unet_step.py [--json FILE]

The work: forward, mean squared error, backward and Adam, of a U-Net of 3.94 M parameters on 64 images of 32 x 32
(207 GFLOP). Steps of the two alternate in one run; medians and their ratio are printed. PyTorch runs in both of its
memory layouts, and the better one counts. Peak memory is what a fresh process grows by while it takes three steps.
Without torch only our own figures are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for torch_unet

WORK = "U-Net training step, batch 64, 32 x 32"
Step = Callable[[], float]


def our_step(batch: int = 64) -> Step:
    """A function that takes one training step of tinydiff and returns the loss."""
    from tinydiff import Rng, Tensor, nn, ops, optim

    model = nn.UNet(nn.UNetConfig(), Rng(0))
    optimiser = optim.Adam(model.parameters())
    x, eps = Rng(1).normal((batch, 32, 32, 1)), Rng(2).normal((batch, 32, 32, 1))
    t = np.arange(1, batch + 1)

    def step() -> float:
        loss = ops.mse_loss(model(Tensor(x), t), eps)
        loss.backward()
        optimiser.step(1e-3)
        return loss.item()

    return step


def torch_step(channels_last: bool, batch: int = 64) -> Step:
    """The same step in PyTorch eager, from the same weights."""
    import torch
    from torch_unet import twin

    from tinydiff import Rng, nn

    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = twin(nn.UNet(nn.UNetConfig(), Rng(0))).to(memory_format=layout)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, eps = (
        torch.from_numpy(Rng(s).normal((batch, 32, 32, 1))).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        for s in (1, 2)
    )
    t = torch.arange(1, batch + 1)

    def step() -> float:
        loss = torch.nn.functional.mse_loss(model(x, t), eps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def alternate(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """The median seconds of each step, taken in turns after two turns of warming up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(which: str) -> float:
    """Megabytes by which a fresh process grows while it builds the model and takes three steps."""
    command = [sys.executable, __file__, "--measure-memory", which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _print_own_memory(which: str) -> None:
    import tinydiff.nn  # noqa: F401  (imports count for neither)

    if which != "ours":
        import torch  # noqa: F401
        import torch_unet  # noqa: F401

    before = _status_megabytes("VmRSS")
    step = our_step() if which == "ours" else torch_step(which == "torch channels_last")
    for _ in range(3):
        step()
    print(_status_megabytes("VmHWM") - before)


def _status_megabytes(field: str) -> float:
    """A figure of this process's memory as Linux keeps it: VmRSS is now, VmHWM the largest so far."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each (default 9)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file")
    parser.add_argument("--measure-memory", metavar="WHICH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        return _print_own_memory(args.measure_memory)

    steps = {"ours": our_step()}
    if importlib.util.find_spec("torch"):
        steps |= {"torch contiguous": torch_step(False), "torch channels_last": torch_step(True)}
    else:
        print("torch is not installed: no comparison (pip install torch)")
    seconds = alternate(steps, args.repeats)
    memory = {name: peak_memory(name) for name in steps}
    print(f"{WORK}\n{'':22}{'median s':>10}{'peak MB':>10}")
    for name in steps:
        print(f"{name:22}{seconds[name]:10.3f}{memory[name]:10.0f}")

    row: dict[str, object] = {"work": WORK, "ours": seconds["ours"], "memory": memory["ours"]}
    peers = [name for name in steps if name != "ours"]
    if peers:
        best = min(peers, key=seconds.__getitem__)
        row |= {"peer": seconds[best], "peer_name": best, "ratio": seconds["ours"] / seconds[best]}
        row |= {"peer_memory": memory[best], "memory_ratio": memory["ours"] / memory[best]}
        print(f"time {row['ratio']:.2f} x and memory {row['memory_ratio']:.2f} x those of {best}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps([row], indent=2) + "\n")


if __name__ == "__main__":
    main()
