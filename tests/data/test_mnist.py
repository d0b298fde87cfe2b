"""Loading MNIST from each place it may be, and one clear error for each way that can go wrong."""

import dataclasses
import gzip
import hashlib
import pathlib
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydiff.data import download, idx, mnist
from tinydiff.data.idx import DataError

# No deadline: a slow machine is no failure.
PROPERTY = settings(deadline=None)

IMAGES = {n: np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (6, 4)}
LABELS = {n: np.arange(n, dtype=np.uint8) for n in (6, 4)}


def idx_file(array):
    """An IDX file, written from the format's description and not by the package."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


CONTENT = {
    "train-images-idx3-ubyte": idx_file(IMAGES[6]),
    "train-labels-idx1-ubyte": idx_file(LABELS[6]),
    "t10k-images-idx3-ubyte": idx_file(IMAGES[4]),
    "t10k-labels-idx1-ubyte": idx_file(LABELS[4]),
}
TRAIN_IMAGES = "train-images-idx3-ubyte"


@pytest.fixture
def folder(tmp_path):
    """A folder with four good files, unpacked."""
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def assert_split(digits, n):
    assert digits.images.dtype == np.uint8 and (digits.images == IMAGES[n]).all()
    assert digits.labels.dtype == np.int64 and digits.labels.tolist() == list(range(n))


# ------------------------------------------------------------------------------- embedded


def test_the_embedded_halves_share_no_image():
    train, test = mnist.load("embedded", "train"), mnist.load("embedded", "test")
    assert np.bincount(train.labels).tolist() == [450] * 10 and np.bincount(test.labels).tolist() == [50] * 10
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in test.images}


@PROPERTY
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=30), per_class=st.integers(-1, 4))
def test_hold_out_takes_the_last_of_each_class_and_keeps_the_order(labels, per_class):
    n = len(labels)
    digits = mnist.Digits(np.arange(n, dtype=np.uint8)[:, None, None], np.array(labels), tuple("0123"))
    fewest = min(labels.count(label) for label in set(labels))
    if not 1 <= per_class < fewest:
        with pytest.raises(ValueError, match=rf"per_class must be 1\.\.{fewest - 1}.*got {per_class}"):
            mnist.hold_out(digits, per_class)
        return
    held = sorted(i for c in set(labels) for i in [i for i in range(n) if labels[i] == c][-per_class:])
    rest, those = mnist.hold_out(digits, per_class)
    assert those.images.ravel().tolist() == held
    assert rest.images.ravel().tolist() == sorted(set(range(n)) - set(held))
    assert those.labels.tolist() == [labels[i] for i in held] and those.class_names == digits.class_names


def test_a_split_of_another_name_is_refused():
    with pytest.raises(ValueError, match="'train' or 'test', got 'validation'"):
        mnist.load("embedded", "validation")


# ------------------------------------------------------------------------------- a folder of IDX files


@pytest.mark.parametrize("dot", [False, True], ids=["dash", "dot"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_folder_is_read_under_each_usual_name(packed, dot, tmp_path):
    for name, content in CONTENT.items():
        name = name.replace("-idx", ".idx") if dot else name
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    assert_split(mnist.load(tmp_path, "train"), 6)
    assert_split(mnist.load(str(tmp_path), "test"), 4)


def test_a_file_named_gz_that_was_unpacked_on_the_way_is_read(folder):
    (folder / TRAIN_IMAGES).rename(folder / f"{TRAIN_IMAGES}.gz")
    assert_split(mnist.load(folder), 6)


def test_class_names_of_a_folder_count_up_to_its_largest_label(folder):
    assert mnist.load(folder).class_names == tuple("0123456789")
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_file(LABELS[6] + 6))
    assert mnist.load(folder).class_names[-1] == "11"


def test_a_missing_folder_is_named_with_the_other_choices(tmp_path):
    with pytest.raises(DataError, match=r"nowhere' is not a folder, nor embedded, full or fashion"):
        mnist.load(tmp_path / "nowhere")


def test_a_missing_file_is_named_with_where_it_was_looked_for(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    assert_split(mnist.load(folder, "train"), 6)
    with pytest.raises(DataError) as caught:
        mnist.load(folder, "test")
    for word in ("no file t10k-labels-idx1-ubyte", str(folder), "t10k-labels.idx1-ubyte.gz"):
        assert word in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 15, 16, 16 + 6 * 784 - 1])
def test_a_truncated_file_is_refused_at_every_length(length, folder):
    (folder / TRAIN_IMAGES).write_bytes(CONTENT[TRAIN_IMAGES][:length])
    expected = "16 bytes" if length < 16 else f"{16 + 6 * 784} bytes for shape \\(6, 28, 28\\)"
    with pytest.raises(DataError, match=f"{TRAIN_IMAGES} is truncated: expected .*{expected}, got {length}"):
        mnist.load(folder)


def test_a_file_that_is_too_long_is_refused(folder):
    (folder / TRAIN_IMAGES).write_bytes(CONTENT[TRAIN_IMAGES] + b"more")
    with pytest.raises(DataError, match=f"too long: expected {16 + 6 * 784} .* got {16 + 6 * 784 + 4}"):
        mnist.load(folder)


def test_a_wrong_magic_number_says_what_was_expected_and_came(folder):
    (folder / TRAIN_IMAGES).write_bytes(CONTENT["train-labels-idx1-ubyte"] * 9)
    with pytest.raises(DataError, match=f"{TRAIN_IMAGES} has the wrong magic number: expected 2051 .*got 2049"):
        mnist.load(folder)
    (folder / TRAIN_IMAGES).write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(DataError, match=r"expected 2051 .*<htm"):
        mnist.load(folder)


def test_images_and_labels_of_different_number_are_refused(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(CONTENT["t10k-labels-idx1-ubyte"])
    with pytest.raises(DataError, match=r"train-images.* has 6 images but .*train-labels.* has 4 labels"):
        mnist.load(folder)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-20], lambda b: b[:50] + b"\0" * 20 + b[70:], lambda b: b[:5], lambda b: b[:10] + b"\xff" * 20],
)
def test_a_damaged_gzip_file_is_named(damage, folder):
    (folder / TRAIN_IMAGES).write_bytes(damage(gzip.compress(CONTENT[TRAIN_IMAGES])))
    with pytest.raises(DataError, match=f"{TRAIN_IMAGES} is a damaged gzip file"):
        mnist.load(folder)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: Is a directory"):
        idx.read_file(tmp_path)


# ------------------------------------------------------------------------------- downloads, from a local server


@dataclasses.dataclass
class Mirror:
    """A web server of this test: what it serves by path, and which paths it was asked for."""

    url: str
    files: dict[str, bytes]
    asked: list[str]
    cut: int = 0  # leave out this many bytes at the end of every file, while announcing all


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            here.asked.append(self.path)
            content = here.files.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write((content or b"")[: len(content or b"") - here.cut])

        def log_message(self, *message):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        here = Mirror(f"http://127.0.0.1:{server.server_port}/", {}, [])
        for name, content in CONTENT.items():
            here.files[f"/good/{name}.gz"] = gzip.compress(content)
            here.files[f"/bad/{name}.gz"] = gzip.compress(content[:-1] + b"\xff")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield here
        server.shutdown()
        thread.join()


@pytest.fixture
def publish(mirror, monkeypatch):
    """Publish the small files as data set "full" on the named mirrors."""

    def on(*mirrors, installed=None):
        sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
        addresses = tuple(m if m.startswith("http") else f"{mirror.url}{m}/" for m in mirrors)
        data = mnist.Published(addresses, sha256, tuple("abcdef"), installed)
        monkeypatch.setitem(mnist.PUBLISHED, "full", data)

    return on


DEAD = "http://127.0.0.1:9/"  # the discard port: nothing listens there


def test_a_download_is_checked_kept_and_not_repeated(mirror, publish, tmp_path, capsys):
    publish("good")
    digits = mnist.load("full", "train", cache=tmp_path)
    assert_split(digits, 6)
    assert digits.class_names == tuple("abcdef")
    assert f"{TRAIN_IMAGES}.gz: 100%" in capsys.readouterr().err
    assert_split(mnist.load("full", "train", cache=tmp_path), 6)
    assert mirror.asked == [f"/good/{name}.gz" for name in mnist.FILES["train"]]
    kept = {f"/good/{path.name}": path.read_bytes() for path in (tmp_path / "full").iterdir()}
    assert kept == {path: mirror.files[path] for path in mirror.asked}


def test_the_cache_is_found_through_the_environment(publish, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYDIFF_CACHE", str(tmp_path / "mine"))
    publish("good")
    assert_split(mnist.load("full", "test"), 4)
    assert (tmp_path / "mine" / "full" / "t10k-images-idx3-ubyte.gz").is_file()


@pytest.mark.parametrize("first", [DEAD, "absent", "bad"])
def test_a_mirror_that_fails_gives_way_to_the_second(first, publish, tmp_path):
    publish(first, "good")
    assert_split(mnist.load("full", cache=tmp_path), 6)


def test_a_transfer_that_breaks_off_says_how_far_it_came(mirror, publish, tmp_path):
    publish("good")
    mirror.cut = 7
    size = len(mirror.files[f"/good/{TRAIN_IMAGES}.gz"])
    with pytest.raises(DataError, match=f"broke off: expected {size} bytes, got {size - 7}"):
        mnist.load("full", cache=tmp_path)


def test_no_network_names_every_mirror_its_reason_and_the_way_out(mirror, publish, tmp_path):
    publish(DEAD, "absent", "bad")
    with pytest.raises(DataError) as caught:
        mnist.load("full", cache=tmp_path)
    message = str(caught.value)
    expected = hashlib.sha256(CONTENT[TRAIN_IMAGES]).hexdigest()
    came = hashlib.sha256(CONTENT[TRAIN_IMAGES][:-1] + b"\xff").hexdigest()
    for line in (
        f"{DEAD}{TRAIN_IMAGES}.gz: <urlopen error",
        f"{mirror.url}absent/{TRAIN_IMAGES}.gz: HTTP Error 404: Not Found",
        f"{mirror.url}bad/{TRAIN_IMAGES}.gz: what came: checksum mismatch: expected SHA-256 {expected}, got {came}",
        "--data embedded",
        "--data DIR",
    ):
        assert line in message
    assert not list((tmp_path / "full").iterdir())


def test_a_silent_server_is_given_up(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DataError, match="timed out"):
        download._download(f"http://127.0.0.1:{silent.getsockname()[1]}/file", timeout=0.05)


def test_a_damaged_file_in_the_cache_is_named_and_left(mirror, publish, tmp_path):
    publish("good")
    mnist.load("full", cache=tmp_path)
    path = tmp_path / "full" / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(mirror.files[f"/bad/{TRAIN_IMAGES}.gz"])
    with pytest.raises(DataError, match=rf"{path} \(delete it to download it again\): checksum mismatch"):
        mnist.load("full", cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_found_before_any_download(mirror, publish, tmp_path):
    publish("good")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot write .*set TINYDIFF_CACHE to a folder"):
        mnist.load("full", cache=tmp_path / "file")
    assert mirror.asked == []


def test_files_of_a_system_package_are_used_and_checked(mirror, publish, tmp_path):
    system = tmp_path / "system"
    system.mkdir()
    for name in mnist.FILES["train"]:
        (system / f"{name}.gz").write_bytes(gzip.compress(CONTENT[name], compresslevel=1))
    publish("good", installed=system)
    assert_split(mnist.load("full", "train", cache=tmp_path / "cache"), 6)
    assert mirror.asked == [] and not (tmp_path / "cache").exists()
    assert_split(mnist.load("full", "test", cache=tmp_path / "cache"), 4)  # not in the package: downloaded
    assert len(mirror.asked) == 2 and len(list(system.iterdir())) == 2
    (system / f"{TRAIN_IMAGES}.gz").write_bytes(mirror.files[f"/bad/{TRAIN_IMAGES}.gz"])
    with pytest.raises(DataError, match=f"{system}.*checksum mismatch"):
        mnist.load("full", "train", cache=tmp_path / "cache")


# ------------------------------------------------------------------------------- what is published


def test_every_published_data_set_has_two_mirrors_and_four_checksums():
    assert set(mnist.PUBLISHED) == {"full", "fashion"}
    for data in mnist.PUBLISHED.values():
        assert len(data.mirrors) == 2 and all(m.startswith("http") and m.endswith("/") for m in data.mirrors)
        assert set(data.sha256) == {name for names in mnist.FILES.values() for name in names}
        assert len(set(data.sha256.values())) == 4 and all(len(s) == 64 for s in data.sha256.values())
        assert len(data.class_names) == 10


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/tinydiff"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/tinydiff"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/tinydiff"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/tinydiff"),
        ("win32", {}, "home/AppData/Local/tinydiff"),
        ("linux", {"XDG_CACHE_HOME": "xdg", "TINYDIFF_CACHE": "mine"}, "mine"),
    ],
)
def test_the_cache_is_where_each_platform_keeps_caches(platform, variables, expected, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "TINYDIFF_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("home"))
    assert download.cache_folder() == pathlib.Path(expected)
