"""Every equation of the deck that is built has its id in the code, in a lesson, in a test, and in the map of them."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAP = ROOT / "lessons" / "README.md"

BUILT = [*range(1, 40)]
"""The numbers of the ids: E1 to E39."""

TAUGHT_ALONE = {9}
"""What a lesson measures and no code of the package needs."""


def ids_in(text):
    """The numbers of all ids in a text, those within a range such as E5–E7 among them."""
    found = set()
    for first, last in re.findall(r"\bE(\d+)(?:\s*(?:–|-|to)\s*E(\d+))?\b", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def ids_of(folder):
    """The numbers of all ids in a folder's Python files, but for this one."""
    files = set((ROOT / folder).rglob("*.py")) - {pathlib.Path(__file__)}
    return set().union(*(ids_in(path.read_text(encoding="utf-8")) for path in files))


def test_ids_are_read():
    assert ids_in("E5–E7, (E10) and E12; BE3, E8x, E11 to E12") == {5, 6, 7, 10, 11, 12}


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("code", ids_of("tinydiff") | ids_of("examples") | TAUGHT_ALONE),
        ("lessons", ids_of("lessons")),
        ("tests", ids_of("tests")),
        ("map", ids_in(MAP.read_text(encoding="utf-8")) if MAP.exists() else set()),
    ],
)
def test_every_id_is_in(where, found):
    missing = sorted(set(BUILT) - found)
    assert not missing, f"no {', '.join(f'E{n}' for n in missing)} in the {where}"


def test_every_file_on_the_map_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", MAP.read_text(encoding="utf-8")):
        assert (MAP.parent / target).resolve().exists(), f"the map leads to {target}, which is not there"
