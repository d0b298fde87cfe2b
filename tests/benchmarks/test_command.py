"""The command line: its help, which rows it runs, its table and its files, and peers and devices that are not there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import roofline, rows, table
from tests.benchmarks.rows import ROWS, Row
from tests.benchmarks.side import Task

LIMITS = roofline.Limits(2e11, 4e10)
ROOT = pathlib.Path(__file__).parents[2]
TOY = Task("tests.benchmarks.test_side:counting")


def toy(name="toy", **changes):
    return Row(**{"id": name, "work": "counting", "ours": TOY, "peers": {"other": TOY}, "reach": 1.3} | changes)


@pytest.fixture
def toys(monkeypatch):
    """Three rows of next to no work, one of which runs only if named, and one that cannot run."""
    some = [toy(), toy("asked", asked_only=True, most=1), toy("not here", problem=lambda: "no such machine")]
    monkeypatch.setattr(command, "ROWS", some)
    monkeypatch.setattr(roofline, "measure", lambda: LIMITS)
    monkeypatch.setattr("tests.benchmarks.timing.TURN", 0)


@pytest.mark.parametrize("program", [["-m", "tests.benchmarks"], [str(ROOT / "tests" / "benchmarks")]])
def test_the_help_teaches(program, tmp_path):
    """`python FOLDER` works from any folder, without the package's folder on the path."""
    folder = ROOT if program[0] == "-m" else tmp_path
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, *program, "--help"]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert all(row.id in done.stdout and row.work in done.stdout for row in ROWS)
    assert "pip install torch" in done.stdout and "python -m tests.benchmarks unet-step" in done.stdout


def test_unknown_rows_and_repeats_are_refused(capsys):
    for arguments, message in ((["unet"], "no row unet; choose from unet-step"), (["--repeats", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            command.parse(arguments)
        assert message in capsys.readouterr().err


def test_rows_run_and_are_written(toys, tmp_path, capsys):
    files = ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md")]
    command.main(["--repeats", "2", *files])
    out = capsys.readouterr().out
    assert "toy" in out and "1.30" in out and "not here did not run: no such machine" in out and "asked" not in out
    row, absent, limits = json.loads((tmp_path / "rows.json").read_text())
    assert row["id"] == "toy" and row["ratio"] == row["ours"] / row["peer"] and row["peer_name"] == "other"
    assert {"work", "reach", "memory", "memory_ratio", "ratio_min", "ratio_max"} <= set(row)
    assert absent == {"id": "not here", "work": "counting", "problem": "no such machine"}
    assert limits == {"id": "roofline", "flops": 2e11, "bandwidth": 4e10}
    head, rule, line = (tmp_path / "rows.md").read_text().splitlines()
    assert head.count("|") == rule.count("|") == line.count("|") == 6
    assert line.startswith(f"| counting | {row['ratio']:.2f} (") and " s" not in line and " ms" not in line


def test_a_row_that_dies_does_not_end_the_others(capfd):
    dying = toy("dying", ours=Task("tests.benchmarks.test_side:no_such_function"))
    first, second = command.run([dying, toy()], 1, LIMITS)
    assert first["problem"].startswith("the process of tests.benchmarks.test_side:no_such_function ended")
    assert "AttributeError" in capfd.readouterr().err and second["ours"] >= 0


def test_only_the_named_rows_run(toys, capsys):
    command.main(["asked"])
    out = capsys.readouterr().out
    assert "asked" in out and "toy" not in out and "not here" not in out


def test_the_limits_alone(toys, capsys):
    command.main(["roofline"])
    out = capsys.readouterr().out
    assert "200 GFLOP/s" in out and "40 GB/s" in out and "Winograd" in out and "toy" not in out


@pytest.mark.parametrize(("module", "package"), [("in_torch", "torch"), ("in_jax", "jax")])
def test_a_missing_peer_is_named_and_ours_runs(module, package, monkeypatch):
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    row = toy(peers={"peer": Task(f"tests.benchmarks.{module}:unet_step"), "other": TOY})
    (figures,) = command.run([row], 1, LIMITS)
    assert figures["ours"] > 0 and figures["peer_name"] == "other"
    assert f"a peer is missing: {package} is not installed: pip install {package}" in table.terminal([figures], LIMITS)


def test_a_torch_without_a_gpu_is_named():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if torch.cuda.is_available():
        pytest.skip("this torch sees a GPU")
    peer = Task("tests.benchmarks.in_torch:unet_step", {"device": "cuda"})
    assert rows.missing(peer) == "this torch sees no GPU: pip install torch (a build with CUDA)"


def test_without_any_peer_the_row_still_prints_ours(monkeypatch):
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    (figures,) = command.run([toy(peers={"torch": Task("tests.benchmarks.in_torch:optimiser")})], 1, LIMITS)
    assert table.cells(figures)[-1] == "none" and figures["ours"] > 0
    assert table.markdown([figures]).count("\n") == 2


def test_absolute_times_stand_only_beside_a_gpu():
    figures = {"work": "w", "ratio": 1.0, "ratio_min": 0.9, "ratio_max": 1.1, "reach": 1.3, "memory_ratio": None}
    lines = [
        table.markdown([figures | {"id": name, "ours": 0.0123, "peer_name": "torch"}])
        for name in ("unet-step", "cuda-unet-step-64")
    ]
    assert ["12.3 ms" in line for line in lines] == [False, True]


def test_rows_that_need_what_is_not_installed_say_so(monkeypatch):
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    by_id = {row.id: row for row in ROWS}
    assert by_id["unet-step-compiled"].problem() == "numba is not installed: pip install -e '.[fast]'"
    assert by_id["jax"].problem() == "jax is not installed: pip install jax"
    assert by_id["unet-step"].problem() is None


def test_the_rows_are_consistent():
    """Their names are unique, their functions and arguments exist, and only one of them is compiled."""
    assert len({row.id for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.ours.make.startswith("tests.benchmarks.ours:")
        assert (row.ours.environment["TINYDIFF_COMPILED"] == "1") == row.id.endswith("compiled")
        for task in (row.ours, *row.peers.values()):
            module, _, function = task.make.partition(":")
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            assert f"def {function}(" in source
