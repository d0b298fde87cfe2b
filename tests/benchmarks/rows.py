"""The rows of the table: what is done, by whom, and how fast it ought to be."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.roofline import transformer_flops, unet_flops
from tests.benchmarks.side import Task

COMPILED = {"TINYDIFF_COMPILED": "1"}
INSTALL = {"torch": "pip install torch", "jax": "pip install jax", "numba": "pip install -e '.[fast]'"}


@dataclass(frozen=True)
class Row:
    """One comparison.

    ours, peers: the tasks; of several peers the fastest counts. reach, hope: the ratios of time, ours to the peer's,
    that we must and would like to get down to. memory, memory_reach: whether memory is compared, and the ratio to
    reach. flops, moved: operations and bytes that the work needs. problem: why it cannot run here, or None.
    asked_only: run only if named. most: repeats at the most.
    """

    id: str
    work: str
    ours: Task
    peers: Mapping[str, Task]
    reach: float | None = None
    hope: float | None = None
    memory: bool = True
    memory_reach: float | None = None
    flops: Callable[[], float] = lambda: 0
    moved: float = 0
    problem: Callable[[], str | None] = lambda: None
    asked_only: bool = False
    most: int = 1000


def ours(make: str, arguments: Mapping[str, Any] | None = None, **environment: str) -> Task:
    """Our side of a row."""
    return Task(f"tests.benchmarks.ours:{make}", arguments or {}, {"TINYDIFF_COMPILED": "0"} | environment)


def in_torch(make: str, **arguments: Any) -> Task:
    """A PyTorch side."""
    return Task(f"tests.benchmarks.in_torch:{make}", arguments)


def both_layouts(make: str, **arguments: Any) -> dict[str, Task]:
    """PyTorch in its two memory layouts."""
    return {
        "torch contiguous": in_torch(make, channels_last=False, **arguments),
        "torch channels_last": in_torch(make, channels_last=True, **arguments),
    }


def missing(task: Task) -> str | None:
    """What must be installed for this task, and how; None if all is there."""
    if task.make.startswith("tests.benchmarks.in_jax:"):
        return not_installed("jax")
    if task.make.startswith("tests.benchmarks.in_torch:"):
        return not_installed("torch") or (torch_cuda_problem() if task.arguments.get("device") == "cuda" else None)
    return None


def not_installed(package: str) -> str | None:
    """That a package is not installed, and the command that does it; None if it is."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed: {INSTALL[package]}"


def cuda_problem() -> str | None:
    """Why the rows for a GPU cannot run, or None."""
    from tinydiff import backend

    return backend.device_problem("cuda")


def torch_cuda_problem() -> str | None:
    """That PyTorch finds no GPU, or None."""
    import torch

    return None if torch.cuda.is_available() else "this torch sees no GPU: pip install torch (a build with CUDA)"


# -------------------------------------------------------------------------------- arithmetic that rows need


def unet_forward_flops(images: int) -> float:
    """The default U-Net on this many images of 32 x 32."""
    from tinydiff.nn import UNetConfig

    return images * unet_flops(UNetConfig(), 32, 32)


def digits_forward_flops(images: int) -> float:
    """The U-Net of examples/train_mnist.py on this many images."""
    from tests.benchmarks.ours import digits_model

    model, _, _ = digits_model()
    return images * unet_flops(model.config.unet, *model.config.size)


TRAINING = 3
"""Backward multiplies twice for each time that forward does: for the gradient of the input and that of the weights."""
OPTIMISER_BYTES = 10.0e6 * 4 * 10
"""Weights, average and Adam's m and v are read and written, the gradient is read twice, the first time for its norm."""


# ----------------------------------------------------------------------------------------------- the rows

UNET_STEP = "training step of a U-Net (3.94 M parameters, 32 x 32, Adam)"

ROWS = [
    Row(
        "unet-step",
        f"{UNET_STEP}, batch 64",
        ours("unet_step"),
        both_layouts("unet_step"),
        reach=1.3,
        hope=1.0,
        memory_reach=1.0,
        flops=lambda: TRAINING * unet_forward_flops(64),
    ),
    Row(
        "unet-step-processes",
        f"{UNET_STEP}, batch 64, shared among processes as the training loop does",
        ours("unet_step", {"processes": 0}),
        both_layouts("unet_step"),
        reach=1.3,
        hope=1.0,
        memory=False,  # our processes share some of theirs
        flops=lambda: TRAINING * unet_forward_flops(64),
    ),
    Row(
        "unet-step-compiled",
        f"{UNET_STEP}, batch 64, compiled with Numba",
        ours("unet_step", **COMPILED),
        both_layouts("unet_step"),
        reach=1.0,
        hope=0.8,
        flops=lambda: TRAINING * unet_forward_flops(64),
        problem=lambda: not_installed("numba"),
    ),
    Row(
        "mnist-step",
        "training step of examples/train_mnist.py, batch 64",
        ours("mnist_step"),
        both_layouts("mnist_step"),
        reach=1.3,
        hope=1.0,
        memory=False,  # our processes share some of theirs
        flops=lambda: TRAINING * digits_forward_flops(64),
    ),
    Row(
        "unet-forward-64",
        "the U-Net without gradients, batch 64",
        ours("unet_forward"),
        both_layouts("unet_forward"),
        reach=1.3,
        hope=1.0,
        flops=lambda: unet_forward_flops(64),
    ),
    Row(
        "unet-forward-1",
        "the U-Net without gradients, one image",
        ours("unet_forward", {"batch": 1}),
        both_layouts("unet_forward", batch=1),
        reach=1.5,
        hope=1.0,
        flops=lambda: unet_forward_flops(1),
    ),
    Row(
        "transformer-step",
        "training step of a transformer (width 256, 6 layers, 4 heads, 64 tokens, Adam), batch 64",
        ours("transformer_step"),
        {"torch": in_torch("transformer_step")},
        reach=1.2,
        hope=1.0,
        flops=lambda: TRAINING * 64 * transformer_flops(width=256, layers=6, tokens=64),
    ),
    Row(
        "optimiser-10m",
        "Adam, clipping and a moving average of 10 M parameters",
        ours("optimiser"),
        {"torch default": in_torch("optimiser"), "torch fused": in_torch("optimiser", fused=True)},
        reach=1.0,
        moved=OPTIMISER_BYTES,
    ),
    Row(
        "optimiser-10m-compiled",
        "Adam, clipping and a moving average of 10 M parameters, compiled with Numba",
        ours("optimiser", **COMPILED),
        {"torch default": in_torch("optimiser"), "torch fused": in_torch("optimiser", fused=True)},
        reach=1.0,
        moved=OPTIMISER_BYTES,
        problem=lambda: not_installed("numba"),
    ),
    Row(
        "sample-64",
        "64 digits in 50 steps of DDIM with guidance",
        ours("sample"),
        both_layouts("sample"),
        reach=1.3,
        flops=lambda: 50 * 2 * digits_forward_flops(64),
        most=5,  # each is a hundred passes
    ),
    Row(
        "jax",
        f"{UNET_STEP}, batch 64, against JAX",
        ours("unet_step"),
        {"jax": Task("tests.benchmarks.in_jax:unet_step")},
        flops=lambda: TRAINING * unet_forward_flops(64),
        problem=lambda: not_installed("jax"),
        asked_only=True,
        most=3,
    ),
    *(
        Row(
            f"cuda-unet-step-{batch}",
            f"{UNET_STEP}, batch {batch}, on a GPU with TF32",
            ours("unet_step", {"batch": batch, "device": "cuda"}, CUPY_TF32="1"),
            {
                "torch eager": in_torch("unet_step", batch=batch, device="cuda", channels_last=True),
                "torch compile": in_torch("unet_step", batch=batch, device="cuda", channels_last=True, compiled=True),
            },
            reach=1.3,
            hope=1.0,
            memory=False,  # it lies on the GPU
            problem=cuda_problem,
        )
        for batch in (64, 512)
    ),
]
"""Every row, in the table's order."""
