"""Captioned images: every source in one form, what each gives, and a clear error for every folder that is not right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_mnist import folder as idx_folder
from tests.data.test_shapes import SEEDS
from tests.diffusion.common import PROPERTY
from tinydiff import Rng, backend
from tinydiff.data import captioned, mnist, shapes
from tinydiff.data.captioned import (
    CaptionedDigits,
    CaptionedFolder,
    Mixture,
    Shapes,
    caption_of_class,
    source_to_draw,
)
from tinydiff.data.idx import DataError
from tinydiff.data.shape_captions import parse
from tinydiff.data.shapes import OPPOSITE, SPLITS, draw

__all__ = ["idx_folder"]

N = 25


def pixels(i):
    """Image i of the folder: its number is its colour."""
    return np.full((6, 8, 3), [i, 2 * i, 255 - i], np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A folder of 25 images, the even ones with a second caption, and things that are no images."""
    lines = [f"{i:02}.png\tnumber {i}" for i in range(N)] + [f"{i:02}.png\talso {i}" for i in range(0, N, 2)]
    for i in range(N):
        Image.fromarray(pixels(i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "captions.txt").write_text("\n".join([*lines[:5], "", *lines[5:]]), encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


# ------------------------------------------------------------------------------- what all have in common


def source(name, folder):
    return {"shapes": lambda: Shapes(16), "digits": CaptionedDigits, "folder": lambda: CaptionedFolder(folder)}[name]()


@pytest.mark.parametrize("name", ["shapes", "digits", "folder"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_source(name, split, folder, device):
    images, captions = source(name, folder).draw(Rng(0), 7, split)
    assert type(images) is np.ndarray and images.dtype == np.uint8 and images.shape[0] == 7 and images.shape[3] == 3
    assert len(captions) == 7 and all(isinstance(text, str) and text for text in captions)
    again, same = source(name, folder).draw(Rng(0), 7, split)
    assert np.array_equal(again, images) and same == captions
    assert source(name, folder).draw(Rng(1), 7, split)[1] != captions


@pytest.mark.parametrize("name", ["shapes", "digits", "folder"])
def test_what_no_source_has(name, folder):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        source(name, folder).draw(Rng(0), 0)
    with pytest.raises(ValueError, match=r"the split must be one of train, test.*, got 'valid'"):
        source(name, folder).draw(Rng(0), 1, "valid")


def test_sources_by_name(folder):
    assert captioned.source("shapes") == Shapes(32)
    assert captioned.source("digits").draw(Rng(0), 1)[0].shape == (1, 32, 32, 3)
    assert captioned.source(str(folder)).captions[1] == ["number 1"]
    with pytest.raises(DataError, match="shape is not a folder"):
        captioned.source("shape")


# ------------------------------------------------------------------------------- digits


def test_digits_have_three_channels_and_margins():
    images, captions = CaptionedDigits("embedded", 33).draw(Rng(0), 200, "test")
    digits = mnist.load("embedded", "test")
    known = {digit.tobytes(): label for digit, label in zip(digits.images, digits.labels, strict=True)}
    assert images.shape == (200, 33, 33, 3)
    for picture, text in zip(images, captions, strict=True):
        assert (picture == picture[..., :1]).all() and not picture[:2].any() and not picture[30:, :].any()
        label = known[np.ascontiguousarray(picture[2:30, 2:30, 0]).tobytes()]
        assert text == f"a handwritten {captioned.NUMBERS[label]}"
    assert len(set(captions)) == 10


def test_captions_of_classes():
    assert caption_of_class("7") == "a handwritten seven"
    assert [caption_of_class(name) for name in mnist.PUBLISHED["fashion"].class_names][-1] == "a photo of an ankle boot"
    assert len({caption_of_class(name) for name in mnist.PUBLISHED["fashion"].class_names}) == 10


def test_a_folder_of_digits(idx_folder):
    images, captions = CaptionedDigits(idx_folder).draw(Rng(0), 3)
    assert images.shape == (3, 32, 32, 3) and all(text.startswith("a handwritten") for text in captions)


def test_digits_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"at least the images' own, \(28, 28\), got 27"):
        CaptionedDigits("embedded", 27)
    with pytest.raises(DataError, match="is not a folder"):
        CaptionedDigits(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"captions for the classes 0\.\.9 and T-shirt.*, not for '10'"):
        caption_of_class("10")


# ------------------------------------------------------------------------------- a folder


def test_a_folder(folder):
    source = CaptionedFolder(folder)
    assert source.images.shape == (N, 6, 8, 3) and source.captions[:3] == [["number 0", "also 0"], ["number 1"], [
        "number 2", "also 2"]]  # fmt: skip
    seen = {}
    for split in ("train", "test"):
        images, captions = source.draw(Rng(0), 500, split)
        for picture, text in zip(images, captions, strict=True):
            np.testing.assert_array_equal(picture, pixels(int(text.split()[1])))
        seen[split] = set(captions)
    everything = {text for captions in source.captions for text in captions}
    assert seen["test"] == {"number 9", "number 19"} and seen["train"] == everything - seen["test"]


def test_a_folder_of_other_files_and_letters(folder):
    """JPEG, grey, in a folder below, the name in capitals, captions in any script, a byte order mark."""
    for file in folder.glob("*.png"):
        file.unlink()
    (folder / "below").mkdir()
    Image.fromarray(pixels(3)).save(folder / "ONE.JPG")
    Image.fromarray(pixels(3)[..., 0]).save(folder / "below" / "two.png")
    (folder / "captions.txt").write_bytes("ONE.JPG\tкруг 🔴\nbelow/two.png\tein Quadrat\t(klein)\n".encode("utf-8-sig"))
    source = CaptionedFolder(str(folder))
    assert source.captions == [["круг 🔴"], ["ein Quadrat\t(klein)"]] and source.images.shape == (2, 6, 8, 3)
    with pytest.raises(DataError, match="of 2 images none is left to test on; it takes 10"):
        source.draw(Rng(0), 1, "test")


def add_line(text):
    def change(folder):
        with open(folder / "captions.txt", "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")

    return change


def truncate(folder):
    content = (folder / "07.png").read_bytes()
    (folder / "07.png").write_bytes(content[: content.index(b"IDAT") + 6])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "captions.txt").unlink(), "cannot read .*captions.txt, in which each line is"),
        (lambda folder: (folder / "captions.txt").write_text("\n \n"), "captions.txt has no captions"),
        (
            lambda folder: (folder / "captions.txt").write_bytes(b"00.png\t\xff\xfe"),
            "captions.txt is not text in UTF-8",
        ),
        (add_line("00.png a red circle"), "line 40: expected an image's name, a tab, and a caption, got '00.png a red"),
        (add_line("00.png\t "), "line 40: expected"),
        (add_line("\ta red circle"), "line 40: expected"),
        (add_line("99.png\ta red circle"), "line 40: there is no image 99.png in"),
        (lambda folder: Image.fromarray(pixels(1)).save(folder / "more.webp"), "1 of 26 images .*: more.webp"),
        (lambda folder: (folder / "05.png").write_text("no image"), "05.png is not a picture that Pillow can read"),
        (truncate, "cannot read .*07.png"),
        (
            lambda folder: Image.fromarray(pixels(1)[1:]).save(folder / "04.png"),
            "04.png is 8 x 5 and .*00.png is 8 x 6",
        ),
    ],
)
def test_a_folder_that_is_not_right(folder, change, words):
    change(folder)
    with pytest.raises(DataError, match=words):
        CaptionedFolder(folder)


def test_no_folder(folder):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        CaptionedFolder(folder / "nowhere")
    with pytest.raises(DataError, match=r"captions.txt is not a folder"):
        CaptionedFolder(folder / "captions.txt")


def test_a_mixture_has_as_many_of_each():
    one, two = Shapes(8, number=1), Shapes(8, number=2)
    images, captions = Mixture((one, two)).draw(Rng(0), 5, "test")
    for i, (source, part) in enumerate([(one, slice(0, 3)), (two, slice(3, 5))]):
        expected, said = source.draw(Rng(0).at(i), len(range(*part.indices(5))), "test")
        np.testing.assert_array_equal(images[part], expected)
        assert captions[part] == said
    assert Mixture((one, two)).draw(Rng(0), 1)[1] == one.draw(Rng(0).at(0), 1)[1]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Mixture((one, two)).draw(Rng(0), 0)


def test_a_model_that_draws_is_told_all_of_two_scenes_in_three():
    images, captions = source_to_draw("shapes").draw(Rng(0), 9)
    whole = [parse(caption) for caption in captions[3:]]
    assert images.shape == (9, 32, 32, 3) and [len(said.things) for said in whole] == [1] * 3 + [2] * 3
    assert all(said.things[0].place for said in whole[:3])
    assert isinstance(source_to_draw("digits"), CaptionedDigits)


# ------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("split", SPLITS)
def test_the_source(split):
    images, captions = Shapes(24).draw(Rng(5), 6, split)
    scenes = Shapes(24).scenes(Rng(5), 6, split)
    assert images.shape == (6, 24, 24, 3) and images.dtype == np.uint8
    for image, text, scene in zip(images, captions, scenes, strict=True):
        np.testing.assert_array_equal(image, draw(scene, 24))
        assert parse(text).fits(scene)
    assert Shapes(24).scenes(Rng(5), 3, split) == scenes[:3]
    assert not set(scenes) & set(Shapes().scenes(Rng(6), 6, split))


def test_the_splits_share_no_scene_and_the_source_says_how_many_things():
    train, test = (set(Shapes().scenes(Rng(0), 50, split)) for split in ("train", "test"))
    assert not train & test
    one = Shapes(8, number=1, full=True)
    assert all(len(scene.items) == 1 for scene in one.scenes(Rng(0), 20))
    assert all(parse(text).things[0].place for text in one.draw(Rng(0), 5)[1])


@PROPERTY
@given(seed=SEEDS, number=st.sampled_from([1, 2]))
def test_scenes_that_are_alike_differ_in_shapes_and_places_alone(seed, number):
    """In rows of four, of pairs seen in training: each second scene has the things of the one before, turned."""
    scenes = Shapes(number=number, alike=4).scenes(Rng(seed), 9)
    for first in (0, 4):
        row = scenes[first : first + 4]
        assert len({(s.background, *((i.colour, i.size) for i in s.items)) for s in row}) == 1
        assert len({tuple((i.x, i.y) for i in s.items) for s in (row[0], row[2])}) == 1
        for scene, turned in (row[:2], row[2:]):
            for a, b in zip(scene.items, turned.items, strict=True):
                assert (a.shape, a.x + b.x, a.y + b.y) == (b.shape, pytest.approx(1), pytest.approx(1))
        assert all((item.shape, item.colour) in shapes.SEEN for s in row for item in s.items)
        if number == 2:
            relations = [shapes.relation(*s.items) for s in row]
            inside = relations[0] in ("inside", "around")
            assert relations[::2] == [relations[0]] * 2
            assert relations[1::2] == [relations[0] if inside else OPPOSITE[relations[0]]] * 2
            assert not inside or all(s.items[0].shape in shapes.CONTAINERS for s in row)
    assert scenes[0] == Shapes(number=number).scenes(Rng(seed), 1)[0] and scenes[4].items[0] != scenes[0].items[0]
    assert scenes[:6] == Shapes(number=number, alike=4).scenes(Rng(seed), 6)


def test_alike_scenes_have_other_shapes():
    rows = np.array([[s.items[0].shape for s in Shapes(number=1, alike=6).scenes(Rng(i), 6)] for i in range(300)])
    assert np.mean(rows[:, 2:] == rows[:, :1]) == pytest.approx(1 / 5, abs=0.06)  # five shapes of each colour are seen
    assert np.mean(rows[:, 2] == rows[:, 4]) < 0.35 and set(rows[:, 4]) == set(shapes.SHAPES)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Shapes(alike=0), "at least 1 scene in a row is alike, got 0"),
        (lambda: Shapes(32).draw(Rng(0), 0), "at least 1, got 0"),
        (lambda: Shapes(32).draw(Rng(0), 1, "valid"), "the split must be one of"),
        (lambda: Shapes(0).draw(Rng(0), 1), "at least 1, got 0"),
        (lambda: Shapes(32, number=3).draw(Rng(0), 1), "1 or 2 things, got 3"),
    ],
)
def test_shapes_that_cannot_be(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_pictures_and_captions_live_on_the_host(device):
    images, _ = Shapes(8).draw(Rng(0), 2)
    assert isinstance(images, np.ndarray) and backend.to_device(images).shape == (2, 8, 8, 3)
