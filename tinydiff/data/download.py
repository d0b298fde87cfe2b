"""Published files: fetched from the first mirror that serves them, checked, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys
from collections.abc import Sequence

from tinydiff.data.idx import DataError, read_file, unpack
from tinydiff.files import atomic_file

OFFLINE = (
    "Without a network, train on the digits that come with the package (--data embedded), "
    "or put the four files in a folder and name it (--data DIR)."
)


def cache_folder() -> pathlib.Path:
    """Where downloads are kept: the variable TINYDIFF_CACHE, else tinydiff/ in the user's cache folder."""
    if folder := os.environ.get("TINYDIFF_CACHE"):
        return pathlib.Path(folder).expanduser()
    home = pathlib.Path.home()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return pathlib.Path(base) / "tinydiff"


def check(content: bytes, sha256: str, where: str) -> bytes:
    """Give back a file's unpacked content if it has this SHA-256 (hexadecimal), else raise DataError."""
    came = hashlib.sha256(content).hexdigest()
    if came != sha256:
        raise DataError(f"{where}: checksum mismatch: expected SHA-256 {sha256}, got {came}")
    return content


def published(name: str, sha256: str, mirrors: Sequence[str], folder: pathlib.Path) -> bytes:
    """The unpacked content of a published file: from the folder if it is there, else from a mirror.

    name: the file's name, with .gz. sha256: of the unpacked content, which mirrors may pack differently.
    mirrors: addresses that end in "/", tried in order. folder: keeps the file as it came, once checked.
    Raises DataError for a file in the folder with another checksum; for a folder that cannot be written; and,
    with every mirror and its reason, when none serves the right file. The folder then stays as it was.
    """
    path = folder / name
    if path.exists():
        return check(read_file(path), sha256, f"{path} (delete it to download it again)")
    try:
        with atomic_file(path) as file:  # opened first: a folder that cannot be written shows before the download
            packed, content = _from_any(mirrors, name, sha256)
            file.write(packed)
    except OSError as error:
        raise DataError(f"{error}; set TINYDIFF_CACHE to a folder that can be written") from error
    return content


def _from_any(mirrors: Sequence[str], name: str, sha256: str) -> tuple[bytes, bytes]:
    """A file as it came from the first mirror that serves the right one, and its unpacked content."""
    failures = []
    for mirror in mirrors:
        try:
            packed = _download(mirror + name)
            return packed, check(unpack(packed, "what came"), sha256, "what came")
        except DataError as error:
            failures.append(f"  {mirror}{name}: {error}")
    raise DataError("\n".join([f"could not download {name}:", *failures, OFFLINE]))


def _download(url: str, timeout: float = 10) -> bytes:
    """What a server sends for this address, with a progress bar; DataError with the reason if it fails.

    timeout: seconds for which the server may stay silent.
    """
    import http.client
    import urllib.request

    from tqdm import tqdm

    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size or None, desc=url.rsplit("/", 1)[1], unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 16):
                    content += chunk
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise DataError(str(error) or type(error).__name__) from error
    if len(content) < size:
        raise DataError(f"the transfer broke off: expected {size} bytes, got {len(content)}")
    return bytes(content)
