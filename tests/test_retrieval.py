"""Retrieval: the blocked search against a full sort and faiss, recall against a loop, the index on disk."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tinydiff import retrieval
from tinydiff.retrieval import Index, recall


def unit_rows(n, d, seed, dtype=np.float32):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def index_of(vectors):
    return Index(vectors, [f"picture {i}" for i in range(len(vectors))], "abc")


@PROPERTY
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.data())
def test_the_search_is_a_full_sort(N, Q, D, data):
    """E26: whatever the blocks."""
    k, block = data.draw(st.integers(1, N)), data.draw(st.integers(1, 200))
    vectors, queries = unit_rows(N, D, data.draw(st.integers(0, 99))), unit_rows(Q, D, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK", block)
        found = index_of(vectors).search(queries, k)
    assert found.rows.shape == found.cosines.shape == (Q, k)
    for query, rows, cosines in zip(queries, found.rows, found.cosines, strict=True):
        all_cosines = [float(np.dot(query.astype(float), v.astype(float))) for v in vectors]
        np.testing.assert_allclose(cosines, sorted(all_cosines, reverse=True)[:k], atol=1e-6)
        np.testing.assert_allclose([all_cosines[i] for i in rows], cosines, atol=1e-6)
        assert len(set(rows.tolist())) == k


def test_of_equals_the_first_comes_first(monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", 3)
    vectors = np.float32([[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    assert index_of(vectors).search(np.float32([[1, 0], [0, 1]]), 5).rows.tolist() == [[1, 3, 4, 0, 2], [0, 2, 1, 3, 4]]


def test_faiss_finds_the_same(monkeypatch):
    pytest.importorskip("faiss", reason="faiss, which tinydiff does not need, is not installed")
    index, queries = index_of(unit_rows(500, 8, 0)), unit_rows(20, 8, 1)
    exact, quick = index.search(queries, 5), index.search_with_faiss(queries, 5)
    np.testing.assert_array_equal(exact.rows, quick.rows)
    np.testing.assert_allclose(exact.cosines, quick.cosines, atol=1e-6)


def test_without_faiss_there_is_a_word(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ValueError, match=r'faiss is not installed: pip install "tinydiff\[faiss\]"'):
        index_of(unit_rows(5, 3, 0)).search_with_faiss(unit_rows(1, 3, 1), 2)


@PROPERTY
@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 2**32))
def test_recall_is_the_loop(N, k, seed):
    """E26; cosines rounded to few values, so that there are ties, which count against."""
    cosines = np.random.default_rng(seed).integers(0, 4, (N, N)) / 4
    hits = sum(sum(cosines[i, j] >= cosines[i, i] for j in range(N) if j != i) < k for i in range(N))
    assert recall(cosines, k) == hits / N


def test_an_index_is_saved_and_loaded(tmp_path):
    index = index_of(unit_rows(7, 3, 0))
    index.save(tmp_path / "deep" / "index")
    loaded = Index.load(tmp_path / "deep" / "index", "abc")
    assert isinstance(loaded.vectors, np.memmap) and len(loaded) == 7 and loaded.names == index.names
    np.testing.assert_array_equal(loaded.vectors, index.vectors)
    queries = unit_rows(2, 3, 1)
    np.testing.assert_array_equal(loaded.search(queries, 3).rows, index.search(queries, 3).rows)
    index_of(unit_rows(4, 3, 5)).save(tmp_path / "deep" / "index")
    assert len(Index.load(tmp_path / "deep" / "index", "abc")) == 4 and len(loaded) == 7
    np.testing.assert_array_equal(loaded.vectors, index.vectors)  # what is mapped stays as it was


def test_a_loaded_index_is_saved_in_its_own_place(tmp_path):
    index_of(unit_rows(7, 3, 0)).save(tmp_path)
    Index.load(tmp_path, "abc").save(tmp_path)
    np.testing.assert_array_equal(Index.load(tmp_path, "abc").vectors, unit_rows(7, 3, 0))


def test_an_index_that_was_not_written_to_its_end_is_none(tmp_path, monkeypatch):
    index_of(unit_rows(7, 3, 0)).save(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        index_of(unit_rows(7, 3, 1)).save(tmp_path)
    with pytest.raises(OSError, match="there is no index in"):
        Index.load(tmp_path, "abc")


def test_an_index_of_another_model(tmp_path):
    index_of(unit_rows(7, 3, 0)).save(tmp_path)
    with pytest.raises(ValueError, match=r"made by another model \(abc, not xyz\).*make it again"):
        Index.load(tmp_path, "xyz")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("index.json", b"{}"),
        ("index.json", b"\xff"),
        ("index.json", b"[]"),
        ("index.json", json.dumps({"model": "abc", "names": ["one"]}).encode()),
        ("vectors.npy", b""),
        ("vectors.npy", b"\x93NUMPY"),
        ("vectors.npy", b"\x80\x04K\x01."),
    ],
)
def test_a_damaged_index(name, content, tmp_path):
    index_of(unit_rows(7, 3, 0)).save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        Index.load(tmp_path, "abc")


def test_no_index(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(OSError, match=r"there is no index in .*index\.json is missing"):
            Index.load(folder, "abc")
    with pytest.raises(OSError, match="file is not a folder"):
        index_of(unit_rows(7, 3, 0)).save(tmp_path / "file")


def test_bad_input():
    x = unit_rows(7, 3, 0)
    for vectors, names in ((x, "abc"), (x.astype(np.float64), "abcdefg"), (x[0], "abc"), (x[:0], "")):
        with pytest.raises(ValueError, match=r"vectors \(N, D\), float32, and N names; got"):
            Index(vectors, names, "abc")
    for length in (2, 0, np.nan):
        with pytest.raises(ValueError, match="an index takes vectors of unit length, got one of length"):
            index_of(x * np.float32(length))
    for queries in (x[0], x[:, :2], x[:0]):
        with pytest.raises(ValueError, match=r"takes queries \(Q, 3\), got"):
            index_of(x).search(queries, 1)
    with pytest.raises(ValueError, match="a search takes vectors of unit length, got one of length 3"):
        index_of(x).search(3 * x, 1)
    for k in (0, 8):
        with pytest.raises(ValueError, match=rf"1\.\.7, got k = {k}"):
            index_of(x).search(x, k)
    for cosines, k in ((np.ones((2, 3)), 1), (np.ones((2, 2)), 0), (np.ones((0, 0)), 1)):
        with pytest.raises(ValueError, match=r"cosines \(N, N\) and k >= 1, got"):
            recall(cosines, k)
