"""python -m tinydiff doctor: it runs real kernels, and says what to do where a device does not work."""

import subprocess
import sys

import numpy as np
import pytest

from tinydiff import __main__ as program
from tinydiff import __version__, backend, cli, doctor, ops


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tinydiff", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(program.main)
    return stop.value.code


def test_report(monkeypatch, capsys):
    assert run(monkeypatch, "doctor") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = {words[0]: words[1:] for words in lines}
    assert told["tinydiff"] == [__version__] and told["NumPy"][0] == f"{np.__version__},"
    assert ["device", "cpu", "works"] in lines
    assert told["matplotlib"][0][0].isdigit()


def test_cuda_works_or_the_reason_is_given(monkeypatch, capsys):
    assert run(monkeypatch, "doctor") == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("device cuda")]
    problem = backend.device_problem("cuda")
    assert problem in line if problem else line.endswith("works")


def test_devices_of_the_suite(device):
    assert doctor.device_problem(backend.device()) is None


@pytest.mark.parametrize("kernel", ["matmul", "conv2d"])
def test_a_kernel_that_is_wrong_is_noticed(monkeypatch, capsys, kernel):
    right = getattr(ops, kernel)
    monkeypatch.setattr(ops, kernel, lambda *a, **s: right(*a, **s) * 1.01)
    assert run(monkeypatch, "doctor") == 1
    assert "gives wrong results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (None, "No NVIDIA driver was found"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "look at the driver"),
        ("| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |", "pip install -e '.[cuda12]'"),
        ("| NVIDIA-SMI 580.65   Driver Version: 580.65   CUDA Version: 13.0 |", "pip install -e '.[cuda13]'"),
    ],
)
def test_advice_where_cuda_does_not_work(monkeypatch, said, advice):
    monkeypatch.setattr(backend, "device_problem", lambda name: "the reason")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: said and "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, said, "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **s: answer)
    problem = doctor.device_problem("cuda")
    assert problem.startswith("does not work: the reason. ") and advice in problem


def test_packages():
    assert doctor.version("numpy") == np.__version__
    assert doctor.version("no-such-package-at-all") == "not installed"


def test_usage(monkeypatch, capsys):
    assert run(monkeypatch) == 2
    assert run(monkeypatch, "--help") == 0
    assert "doctor" in capsys.readouterr().out
