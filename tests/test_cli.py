"""What the command-line programs share: exit codes, folders, commands to copy."""

import os
import pathlib
import shlex
import sys

import pytest

from tinydiff import checkpoint, cli
from tinydiff.backend import DeviceError
from tinydiff.data.idx import DataError


def exit_of(main):
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "kind", [ValueError, OSError, FloatingPointError, MemoryError, DataError, DeviceError, checkpoint.CheckpointError]
)
def test_expected_errors_are_one_line(capsys, kind):
    assert exit_of(raising(kind("what went wrong"))) == 1
    assert capsys.readouterr() == ("", "error: what went wrong\n")


@pytest.mark.parametrize("kind", [TypeError, KeyError, AssertionError, RuntimeError])
def test_mistakes_of_the_program_keep_their_traceback(kind):
    with pytest.raises(kind):
        cli.run(raising(kind("a bug")))


def test_good_end_and_ctrl_c(capsys):
    assert exit_of(lambda: None) == 0
    assert exit_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nstopped\n"
    assert exit_of(raising(KeyboardInterrupt("resume with this"))) == 130
    assert capsys.readouterr().err == "\nresume with this\n"


def make_run(folder, when):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / checkpoint.NAME).write_bytes(b"")
    os.utime(folder / checkpoint.NAME, (when, when))


def test_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = "runs/toy"
    assert cli.new_folder(None, default) == cli.latest_folder(default) == pathlib.Path("runs/toy")
    make_run(tmp_path / "runs/toy", when=300)
    assert cli.new_folder(None, default) == pathlib.Path("runs/toy-2")
    make_run(tmp_path / "runs/toy-2", when=500)
    make_run(tmp_path / "runs/toy-4", when=400)
    (tmp_path / "runs/toy-9").mkdir()
    assert cli.new_folder(None, default) == pathlib.Path("runs/toy-3")
    assert cli.latest_folder(default) == pathlib.Path("runs/toy-2")
    assert cli.new_folder("runs/toy-9", default) == pathlib.Path("runs/toy-9")
    assert cli.new_folder("elsewhere/a", default).is_dir()
    with pytest.raises(ValueError, match=r"runs/toy-2 holds a run already.*--resume runs/toy-2"):
        cli.new_folder("runs/toy-2", default)
    pathlib.Path("file").write_text("in the way")
    with pytest.raises(OSError, match="file is not a folder"):
        cli.new_folder("file/run", default)


def test_the_device_is_the_given_one_or_named_by_the_environment(monkeypatch):
    flags = cli.parser("What it does.\n\n    as it is written")
    cli.add_device(flags)
    assert "What it does.\n\n    as it is written" in flags.format_help()
    monkeypatch.setenv("TINYDIFF_DEVICE", "tpu")
    with cli.on_device(flags.parse_args(["--device", "cpu"]).device) as device:
        assert device == "cpu"
    with pytest.raises(ValueError, match="tpu"), cli.on_device(flags.parse_args([]).device):
        pass
    monkeypatch.delenv("TINYDIFF_DEVICE")
    with cli.on_device(None) as device:
        assert device in ("cpu", "cuda")
    with pytest.raises(SystemExit):
        flags.parse_args(["--device", "tpu"])


def test_integers():
    assert cli.integers("1,-2,30") == (1, -2, 30)
    for text in ("1,,2", "a", ""):
        with pytest.raises(ValueError, match="invalid literal"):
            cli.integers(text)


def test_output(tmp_path, monkeypatch):
    """As chosen; beside a run's checkpoint; never within the package."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run" / checkpoint.NAME
    assert cli.output(pathlib.Path("here/a.png"), file, "grid.png") == pathlib.Path("here/a.png")
    assert pathlib.Path("here").is_dir()
    assert cli.output(None, file, "grid.png") == tmp_path / "run" / "grid.png"
    assert cli.output(None, checkpoint.SHIPPED / "mnist.npz", "grid.png") == pathlib.Path("grid.png")


def test_writable(tmp_path):
    cli.check_writable(tmp_path / "new" / "folder" / "file.png")
    assert (tmp_path / "new" / "folder").is_dir() and not any((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*file/a/b\.png: .*file is not a folder"):
        cli.check_writable(tmp_path / "file" / "a" / "b.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="a superuser may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        cli.check_writable(tmp_path / "file.png")


def test_commands_work_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside, outside = tmp_path / "a folder" / "x.py", tmp_path.parent / "y.py"
    rest = shlex.split(cli.command(inside, "--n", 3, "it's"))[1:]
    assert rest == ["a folder/x.py", "--n", "3", "it's"]
    assert shlex.split(cli.command(outside))[1:] == [str(outside)]
    monkeypatch.setattr(cli.shutil, "which", lambda name: os.path.join(os.path.dirname(sys.executable), "python"))
    assert cli.command(inside).startswith("python ")
    monkeypatch.setattr(cli.shutil, "which", lambda name: "/another/environment/python")
    assert shlex.split(cli.command(inside))[0] == cli.short(sys.executable)
    assert os.path.samefile(cli.short(sys.executable), sys.executable)


def test_progress_passes_everything_on(capsys):
    assert list(cli.progress(iter("abc"), "letters", 3)) == ["a", "b", "c"]
