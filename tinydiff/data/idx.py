"""The IDX format of the MNIST files: a magic number, the sizes of the axes, then one unsigned byte a value.

0000     magic number: 0, 0, 8 (unsigned bytes), number of axes
0004     one big-endian 32-bit size for each axis
then     the values, last axis fastest
"""

from __future__ import annotations

import gzip
import math
import pathlib
import zlib

import numpy as np

from tinydiff.files import PathLike


class DataError(RuntimeError):
    """Data that is missing, damaged or cannot be fetched: which, where, what was expected and what came."""


def unpack(content: bytes, where: str) -> bytes:
    """The content of a file, unpacked if it is gzip (told by its first two bytes, whatever the file's name).

    Raises DataError, naming `where`, for a damaged or truncated gzip file.
    """
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{where} is a damaged gzip file ({len(content)} bytes): {error}") from error


def read_file(path: PathLike) -> bytes:
    """The unpacked content of a file, gzip or not. Raises DataError where it cannot be read or is damaged."""
    try:
        return unpack(pathlib.Path(path).read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def parse(content: bytes, axes: int, where: str) -> np.ndarray:
    """The array in an unpacked IDX file with this number of axes: 3 for images (N, H, W), 1 for labels (N,).

    Returns uint8. Raises DataError, naming `where`, for another magic number or another length than the
    header says.
    """
    header = 4 + 4 * axes
    if len(content) < header:
        raise DataError(f"{where} is truncated: expected a header of {header} bytes, got {len(content)} bytes in all")
    magic, *shape = np.frombuffer(content[:header], ">u4").tolist()
    expected = 0x0800 + axes
    if magic != expected:
        raise DataError(
            f"{where} has the wrong magic number: expected {expected} (IDX, unsigned bytes, {axes} axes), "
            f"got {magic} (bytes {content[:4]!r})"
        )
    size = header + math.prod(shape)
    if len(content) != size:
        problem = "is truncated" if len(content) < size else "is too long"
        raise DataError(f"{where} {problem}: expected {size} bytes for shape {tuple(shape)}, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
