"""Files that are complete or not there at all."""

import pytest

from tinydiff.files import atomic_file, make_folder


def test_atomic_file_replaces_only_when_complete(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with atomic_file(path) as file:
        file.write(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of the thi")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot write .*file/a/b: .*/file is not a folder"):
        make_folder(tmp_path / "file" / "a" / "b")
