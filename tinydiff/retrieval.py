"""Retrieval: of many embeddings the k nearest, exactly (E26).

    index = Index(clip.image_embedding(images), names, fingerprint(clip))
    found = index.search(clip.text_embedding(["a red star"]), k=5)

Embeddings are unit vectors, so that the cosine of two is their inner product, and all cosines are one matrix product.
Text → image and image → image are the same search; only the query comes from another tower.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from tinydiff.files import PathLike, atomic_file

BLOCK = 1 << 22
"""Cosines that are held at once."""

VECTORS, ABOUT = "vectors.npy", "index.json"
"""The files of an index in its folder."""


class Found(NamedTuple):
    """What a search found, the nearest first: rows (Q, k) int64 of the index, and their cosines (Q, k) float32."""

    rows: np.ndarray
    cosines: np.ndarray


class Index:
    """Unit vectors to be searched, what they are of, and by which model.

    vectors: (N, D) float32, of unit length. names: N of them, such as paths. model: its `checkpoint.fingerprint`.
    Raises ValueError for vectors of another shape, dtype or length, or another number of names.
    """

    def __init__(self, vectors: np.ndarray, names: Sequence[str], model: str):
        if vectors.ndim != 2 or not vectors.size or vectors.dtype != np.float32 or len(names) != len(vectors):
            raise ValueError(
                f"an index takes vectors (N, D), float32, and N names; got {vectors.dtype} {vectors.shape} and "
                f"{len(names)} names"
            )
        _check_unit(vectors[:1000], "an index takes")
        self.vectors, self.names, self.model = vectors, tuple(names), model

    def __len__(self) -> int:
        """How many vectors there are."""
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int) -> Found:
        """The k vectors of the largest cosine with each query: exactly, by a product and a partial sort of each block.

        queries: (Q, D), floats, of unit length. Of vectors equally near, the one of the smaller row comes first; where
        they do not all fit among the k, any of them may. Raises ValueError for queries of another shape or length, or k
        outside 1..N.
        """
        self._check(queries, k)
        rows: np.ndarray = np.empty((len(queries), 0), np.int64)
        cosines: np.ndarray = np.empty((len(queries), 0), np.float32)
        size = max(k, BLOCK // len(queries))
        for start in range(0, len(self), size):
            block = np.asarray(self.vectors[start : start + size])
            cosines = np.concatenate([cosines, queries.astype(np.float32) @ block.T], axis=1)
            rows = np.concatenate([rows, np.broadcast_to(start + np.arange(len(block)), (len(queries), len(block)))], 1)
            best = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
            rows, cosines = (np.take_along_axis(a, best, axis=1) for a in (rows, cosines))
        order = np.lexsort((rows, -cosines), axis=1)
        return Found(*(np.take_along_axis(a, order, axis=1) for a in (rows, cosines)))

    def search_with_faiss(self, queries: np.ndarray, k: int) -> Found:
        """The same by faiss, for millions of vectors: a graph of neighbours (HNSW), fast, and nearly always right.

        Fewer than k are found at times; the rest then have row -1. Raises what `search` does, and ValueError where
        faiss is not installed.
        """
        self._check(queries, k)
        try:
            import faiss
        except ImportError as error:
            raise ValueError('faiss is not installed: pip install "tinydiff[faiss]", or search without it') from error
        graph = faiss.IndexHNSWFlat(self.vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efSearch = max(64, 2 * k)
        graph.add(np.ascontiguousarray(self.vectors))
        cosines, rows = graph.search(np.ascontiguousarray(queries, np.float32), k)
        return Found(rows, cosines)

    def _check(self, queries: np.ndarray, k: int) -> None:
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1] or not len(queries):
            raise ValueError(f"this index takes queries (Q, {self.vectors.shape[1]}), got {queries.shape}")
        if not 1 <= k <= len(self):
            raise ValueError(f"of {len(self)} vectors, the k nearest are 1..{len(self)}, got k = {k}")
        _check_unit(queries, "a search takes")

    def save(self, folder: PathLike) -> None:
        """Write the index to a folder: vectors.npy, and index.json, which comes last and goes first.

        Raises OSError, naming the file and the reason, where it cannot be written.
        """
        folder = pathlib.Path(folder)
        vectors = np.ascontiguousarray(self.vectors)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / ABOUT).unlink()
        with atomic_file(folder / VECTORS) as file:
            np.save(file, vectors, allow_pickle=False)
        with atomic_file(folder / ABOUT) as file:
            file.write(json.dumps({"model": self.model, "names": self.names}).encode())

    @classmethod
    def load(cls, folder: PathLike, model: str) -> Self:
        """The index in a folder, its vectors left on disk until a search needs them.

        model: `checkpoint.fingerprint` of the model whose queries will be searched for. Raises ValueError if the index
        is of another model, or damaged, and OSError where there is none.
        """
        folder = pathlib.Path(folder)
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            index = cls(np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False), about["names"], about["model"])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise OSError(f"there is no index in {folder}: {error.filename} is missing") from error
        except (KeyError, TypeError, ValueError, EOFError) as error:
            raise ValueError(f"the index in {folder} is damaged: {error}") from error
        if index.model != model:
            raise ValueError(
                f"the index in {folder} was made by another model ({index.model[:12]}, not {model[:12]}), to which "
                "vectors mean other things: make it again"
            )
        return index


def recall(cosines: np.ndarray, k: int) -> float:
    """The share of queries whose own item is among the k nearest (E26).

    cosines: (N, N), row i of query i, whose own item is column i. Another item that is equally near counts as nearer.
    Raises ValueError for another shape, or k < 1.
    """
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1] or not cosines.size or k < 1:
        raise ValueError(f"recall takes cosines (N, N) and k >= 1, got {cosines.shape} and k = {k}")
    nearer = (cosines >= np.diag(cosines)[:, None]).sum(axis=1) - 1
    return float(np.mean(nearer < k))


def _check_unit(vectors: np.ndarray, who: str) -> None:
    """Raise ValueError unless all rows have unit length."""
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = ~(abs(lengths - 1) < 1e-3)  # NaN too
    if wrong.any():
        raise ValueError(f"{who} vectors of unit length, got one of length {lengths[wrong][0]:.4g}")
