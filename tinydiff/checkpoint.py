"""Checkpoints: named arrays and a description in one .npz file, which is complete or not there at all.

The names say whose an array is: "model/...", "ema/...", "optimiser/...". The description ("meta") is JSON: the version
of the format, the kind of model, its configuration, how it is trained. Nothing is ever pickled: loading a checkpoint
from a stranger runs none of the stranger's code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from tinydiff.files import PathLike, atomic_file

FORMAT = 1
"""The version of the format; raised when older programs could no longer read it."""

ZIP = b"PK\x03\x04"
"""How an .npz file starts."""

NAME = "checkpoint.npz"
"""What a training run calls its checkpoint, in its folder."""

SHIPPED = pathlib.Path(__file__).with_name("pretrained")
"""The folder of the trained models that the package brings along, each NAME.npz with its card NAME.md."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, of another kind or a newer format: which, and what was expected."""


def save(
    path: PathLike, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, compressed: bool = False
) -> None:
    """Write a checkpoint, complete or not at all: until then an older one at this path stays as it is.

    arrays: host arrays by name. meta: what JSON can hold, with "kind", the kind of model. compressed: weights in half
    precision take a twelfth less, and saving ten times as long.
    Raises OSError, naming the path and the reason, where the file cannot be written.
    """
    text = json.dumps({**meta, "format": FORMAT}).encode()
    with atomic_file(path) as file:
        write = np.savez_compressed if compressed else np.savez
        write(file, allow_pickle=False, meta=np.frombuffer(text, np.uint8), **arrays)


def load(path: PathLike, kind: str, *, resume: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a checkpoint: its arrays by name, and its description, in which JSON's lists come back as tuples.

    path: see `find`. Raises CheckpointError, saying what is wrong with which file, if it is missing, cut short or
    damaged, a pickle, not of tinydiff, of a newer format, or of another kind of model. resume: also if it was exported,
    and so holds nothing to go on training with.
    """
    path = find(path)
    arrays, meta = _load(path)
    if meta["kind"] != kind:
        raise CheckpointError(f"{path} holds another model: expected {kind!r}, got {meta['kind']!r}")
    if resume and "losses" not in arrays:
        raise CheckpointError(f"{path} was exported: it has the averaged weights, but no state of the training")
    return arrays, meta


def kind_of(path: PathLike) -> str:
    """Which kind of model a checkpoint holds. path: see `find`. Raises CheckpointError as `load` does."""
    return _load(find(path))[1]["kind"]


def find(path: PathLike) -> pathlib.Path:
    """The checkpoint that a path names: the file itself, the one in a run's folder, or a shipped model by its name.

    Warns where a run hides the shipped model of its name.
    """
    path = pathlib.Path(path)
    inside = path / NAME if path.is_dir() else path
    if str(path) not in shipped():
        return inside
    if inside.exists():
        warnings.warn(
            f"{path} is the run in this folder, not the model of that name that tinydiff brings", stacklevel=2
        )
        return inside
    return SHIPPED / f"{path}.npz"


def shipped() -> list[str]:
    """The names of the trained models that the package brings along."""
    return sorted(path.stem for path in SHIPPED.glob("*.npz"))


def export(source: PathLike, path: PathLike) -> None:
    """Write what is needed to use a trained model, and no more: its averaged weights (EMA), in half precision.

    source: a checkpoint as `find` takes it, of any kind of model. path: the file to write, a checkpoint of about a
    tenth of the size, which cannot be trained on. Rounding moves a weight by at most 1/2048 of itself, or, if it is
    below 6e-5, by at most 3e-8.
    Raises CheckpointError if the source cannot be read, is the file to write, or has a weight beyond the range of half
    precision.
    """
    arrays, meta = _load(find(source))
    if pathlib.Path(path).resolve() == find(source).resolve():
        raise CheckpointError(f"{path} is the run's own checkpoint, which training goes on from; name another file")
    averaged = {name: a for name, a in arrays.items() if name.startswith("ema/")}
    if large := [name for name, a in averaged.items() if not np.all(np.abs(a) < np.finfo(np.float16).max)]:
        raise CheckpointError(f"{source} has weights beyond half precision's 65504 in {large[0]}")
    described = {name: meta[name] for name in ("kind", "config")}  # the rest may tell of folders of this machine
    save(path, {name: a.astype(np.float16) for name, a in averaged.items()}, described, compressed=True)


class Weights(Protocol):
    """What a fingerprint is taken of: a Module."""

    def state_dict(self) -> Mapping[str, np.ndarray]: ...


def fingerprint(model: Weights) -> str:
    """A text that two models share only if they have the same weights: the SHA-256 of these, in hexadecimal.

    The weights are taken in half precision, so that a trained model and its `export` have one fingerprint.
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.shape} ".encode())
        digest.update(np.ascontiguousarray(weight, np.float16).tobytes())
    return digest.hexdigest()


def _load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the description of a checkpoint of any kind."""
    arrays = _read(path)
    try:
        meta = _tuples(json.loads(arrays.pop("meta").tobytes()))
        version, _ = meta["format"], meta["kind"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of tinydiff: it holds no description of itself") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, newer than {FORMAT}, the newest that this tinydiff reads: update tinydiff"
        )
    return arrays, meta


def _tuples(value: Any) -> Any:
    """What JSON holds, its lists as tuples, which frozen configurations have instead."""
    if isinstance(value, dict):
        return {name: _tuples(v) for name, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; a CheckpointError that says why, if it is not one."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(ZIP))
        if start[:1] == b"\x80":
            raise CheckpointError(f"{path} is a pickle, which could run any code and is never loaded")
        if not ZIP.startswith(start):
            raise CheckpointError(f"{path} is not a checkpoint of tinydiff, an .npz file: it starts with {start!r}")
        if start != ZIP:
            raise EOFError("it ends at once")
        with np.load(path, allow_pickle=False) as archive:
            if any(name.endswith(".pkl") for name in archive.files):
                raise CheckpointError(f"{path} is a checkpoint of PyTorch: a pickle, which is never loaded")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}; trained models here: {', '.join(shipped())}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or was cut short ({path.stat().st_size} bytes): {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or holds pickles, which are never loaded: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def prefixed(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with "prefix/" before each name, as a checkpoint stores them."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def part(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names start with "prefix/", without it: what `prefixed` was given."""
    return {name.removeprefix(f"{prefix}/"): a for name, a in arrays.items() if name.startswith(f"{prefix}/")}


def remove_leftovers(path: PathLike) -> None:
    """Remove what a process that was killed while it wrote this checkpoint left beside it."""
    path = pathlib.Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()
