"""The README does what it says: its Python runs, and its commands name files, extras and flags that exist."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
FENCE = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PLAIN = {"cd", "export", "git", "ls", "source", "."}
"""Commands of the shell that there is nothing to check of."""
TOOLS = {"mypy", "pip", "pytest", "ruff", "venv"}
"""Programs of others, whose flags are not ours to check."""


def blocks(*languages):
    return [text for language, text in FENCE.findall(TEXT) if language in languages]


def commands():
    """The single commands of the shell blocks, without prompts, comments and what a console answers."""
    for text in blocks("bash", "sh", "shell", "console"):
        lines = text.replace("\\\n", " ").splitlines()
        prompted = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
        for line in prompted or lines:
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
                command = [word for word in words[:end] if not re.match(r"[A-Z_]+=", word)]
                if command:
                    yield command
                words = words[end + 1 :]


def python(*arguments, cwd):
    """Run a fresh Python that finds the package, without a window for figures."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@cache
def help_of(*program):
    done = python(*program, "--help", cwd=ROOT)
    assert done.returncode == 0, f"python {' '.join(program)} --help failed:\n{done.stderr}"
    return done.stdout


def test_there_is_a_readme():
    assert README.is_file(), f"{README} is missing"


@pytest.mark.parametrize("code", blocks("python", "py"))
def test_python_blocks_run(code, tmp_path):
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, f"{code}\n{done.stderr}"


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_commands_name_what_exists(command):
    if command[0].startswith("python") and command[1:2] == ["-m"] and command[2] in TOOLS:
        command = command[2:]
    name, *words = command
    if name == "pip":
        check_extras(words)
    elif name in TOOLS:
        check_paths(words)
    elif name.startswith("python") and words[0] != "-c":
        check_flags(words)
    else:
        known = name.startswith("python") or name in PLAIN or (ROOT / name).is_file()
        assert known, f"what is {name!r}? Check it here, or add it to PLAIN"


def check_flags(words):
    """The program, its subcommand and every --flag must exist, by its --help; a script without flags may lack that."""
    length = 1 if words[0] != "-m" else 3 if len(words) > 2 and not words[2].startswith("-") else 2
    program = words[:length]
    check_paths(program)
    flags = {word.split("=")[0] for word in words[length:] if word.startswith("--")}
    known = set(re.findall(r"--[\w-]+", help_of(*program))) if flags or words[0] == "-m" else set()
    assert flags <= known, f"{' '.join(program)} has no {sorted(flags - known)}"


def check_extras(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for found in filter(None, (re.fullmatch(r"\.\[(.+)\]", word) for word in words)):
        asked = {extra.strip() for extra in found[1].split(",")}
        assert asked <= set(extras), f"pyproject.toml has no extra {sorted(asked - set(extras))}"


def check_paths(words):
    """Words that look like a path of a Python file or of the tests must be one."""
    for word in words:
        if word.endswith(".py") or word.startswith("tests/"):
            assert (ROOT / word.split("::")[0]).exists(), f"there is no {word}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", TEXT))))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists(), f"the README links to {target}, which is not there"
