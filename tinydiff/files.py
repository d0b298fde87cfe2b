"""Files that are complete or not there at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[BinaryIO]:
    """Open a file to write that takes its name only when complete: a temporary file beside it, then a rename.

    A missing folder is made. If the body fails, nothing new is left and an older file at path stays as is.
    Raises OSError, naming the path and the reason, where it cannot be written.
    """
    path = pathlib.Path(path)
    make_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def make_folder(path: PathLike) -> None:
    """Make the folder of a file that will be written, if it is missing. Raises OSError that says what is in the way."""
    folder = pathlib.Path(path).parent
    for above in (folder, *folder.parents):
        if above.exists() and not above.is_dir():
            raise OSError(f"cannot write {path}: {above} is not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
