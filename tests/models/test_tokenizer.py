"""Byte-pair encoding: every text comes back, against a slow reference, and what cannot be."""

import json
import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY
from tinydiff.models.tokenizer import BYTES, END, MERGED, PAD, START, Tokenizer, clean, words

CAPTIONS = [
    "a big red circle above a small blue star",
    "a small red circle on a grey background",
    "a red, red star; a blue star!",
    "",
    "üben über über Übung",
    "aaaaaaa aaaa aa",
]
TRAINED = Tokenizer.train(CAPTIONS, MERGED + 60)

texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["a", " red", "star ", "🟥", "é", "  ", "\n", "ü", ".", "紅"]), max_size=12).map("".join),
)


# ------------------------------------------------------------------------------------ a slow reference


def slow_merges(captions, how_many):
    """The merges by the definition: count all pairs of all words of all captions anew, join the most frequent."""
    rows = [[(b,) for b in w.encode()] for c in captions for w in re.findall(r" ?\w+| ?[^\w\s]+|\s+", c)]
    merged = []
    for _ in range(how_many):
        counts = {}
        for row in rows:
            for i in range(len(row) - 1):
                counts[row[i], row[i + 1]] = counts.get((row[i], row[i + 1]), 0) + 1
        number = {(b,): b for b in range(256)} | {joined: 256 + i for i, joined in enumerate(merged)}
        ranked = sorted((-n, number[a], number[b], a, b) for (a, b), n in counts.items())
        if not ranked or ranked[0][0] > -2:
            break
        *_, left, right = ranked[0]
        merged.append(left + right)
        for row in rows:
            i = 0
            while i < len(row) - 1:
                if (row[i], row[i + 1]) == (left, right):
                    row[i : i + 2] = [left + right]
                i += 1
    return [bytes(m) for m in merged], rows


@PROPERTY
@given(st.lists(st.text("ab é", max_size=12), max_size=6), st.integers(0, 12))
def test_training_is_the_slow_reference(captions, how_many):
    """Pieces of one spelling can be made in two ways, so spellings are compared here, and whole encodings below."""
    expected, rows = slow_merges(captions, how_many)
    if len(set(expected)) < len(expected):
        return  # the reference, which knows pieces by their spelling, would take two of them for one
    tokenizer = Tokenizer.train(captions, MERGED + how_many)
    assert tokenizer.spelling[MERGED:] == expected
    encoded = [tokenizer.spelling[t] for c in captions for t in tokenizer.encode(c)]
    assert encoded == [bytes(token) for row in rows for token in row]


def test_the_most_frequent_pair_goes_first():
    tokenizer = Tokenizer.train(["low low low lower"], MERGED + 3)
    assert tokenizer.spelling[MERGED:] == [b"lo", b"low", b" low"]
    assert [tokenizer.spelling[t] for t in tokenizer.encode("slow lower")] == [b"s", b"low", b" low", b"e", b"r"]


def test_a_pair_that_occurs_once_is_not_worth_a_token():
    assert len(Tokenizer.train(["ab"], 1000)) == len(Tokenizer.train([], 1000)) == MERGED


def test_captions_take_one_token_a_word():
    captions = [clean(c) for c in CAPTIONS[:3]]
    assert len(Tokenizer.train(captions * 2, 1000).encode(clean("a small red circle above a blue star"))) == 8


# ---------------------------------------------------------------------------------- every text, and back


@PROPERTY
@given(texts)
def test_every_text_comes_back(text):
    for tokenizer in (Tokenizer(), TRAINED):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(BYTES <= token < len(tokenizer) for token in tokens)
    assert len(TRAINED.encode(text)) <= len(text.encode())
    assert "".join(words(text)) == text


@PROPERTY
@given(texts)
def test_cleaned_texts_stay_clean(text):
    assert clean(clean(text)) == clean(text)
    assert clean(f"  {text}\n") == clean(text) and "  " not in clean(text)


def test_half_a_surrogate_pair_is_a_question_mark():
    assert TRAINED.decode(TRAINED.encode("a \ud800 b")) == "a ? b"


def test_tokens_that_break_a_character_are_shown_as_such():
    assert TRAINED.decode(Tokenizer().encode("é")[:1]) == "�"


# --------------------------------------------------------------------------------------------- batches


def test_a_batch_begins_ends_and_is_filled_up():
    tokenizer = Tokenizer()
    ids, mask = tokenizer.batch(["ab", "", "🟥"], 6)
    a, b = BYTES + ord("a"), BYTES + ord("b")
    square = [BYTES + byte for byte in "🟥".encode()]
    assert ids.tolist() == [[START, a, b, END, PAD, PAD], [START, END, PAD, PAD, PAD, PAD], [START, *square, END]]
    assert ids.dtype == np.int64 and mask.dtype == bool and (mask == (ids != PAD)).all()
    assert [tokenizer.decode(row) for row in ids] == ["ab", "", "🟥"]


@PROPERTY
@given(texts, st.integers(2, 20))
def test_a_text_that_is_too_long_is_cut_with_a_warning(text, length):
    tokens = TRAINED.encode(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids, mask = TRAINED.batch([text], length)
    assert len(caught) == (len(tokens) > length - 2)
    row = ids[0][mask[0]].tolist()
    assert row == [START, *tokens[: length - 2], END] and ids.shape == (1, length)


def test_the_warning_says_what_was_lost():
    with pytest.warns(
        UserWarning, match=r"18 tokens was cut to 8: it now ends 'a red st', without 'ar on grey'"
    ) as seen:
        Tokenizer().batch(["a red star on grey"], 10)
    assert seen[0].filename == __file__


# ---------------------------------------------------------------------------------- saved, and bad input


def test_it_is_saved_as_json(tmp_path):
    TRAINED.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.merges == TRAINED.merges and len(loaded) == len(TRAINED)
    assert " red" in json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["spelled"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"merges": [[1]]}', '{"merges": 3}', '{"merges": [[2, 5]]}', "\xff"])
def test_a_file_that_is_no_tokenizer(text, tmp_path):
    (tmp_path / "t.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"t\.json is no tokenizer"):
        Tokenizer.load(tmp_path / "t.json")
    with pytest.raises(OSError, match="missing"):
        Tokenizer.load(tmp_path / "missing.json")


@pytest.mark.parametrize("merges", [[(0, 5)], [(5, MERGED)], [(5, 6), (MERGED, MERGED + 1)], [(-1, 5)]])
def test_merges_of_what_is_not_there(merges):
    with pytest.raises(ValueError, match="bytes or what earlier merges made, 3"):
        Tokenizer(merges)


def test_bad_input():
    with pytest.raises(ValueError, match="one comes twice"):
        Tokenizer([(5, 6), (5, 6)])
    with pytest.raises(ValueError, match="has 259 tokens before it learns any, got a size of 258"):
        Tokenizer.train(CAPTIONS, 258)
    with pytest.raises(ValueError, match=r"in 0\.\.258, got 259"):
        Tokenizer().decode([5, 259])
    for bad, length in (("a red star", 8), (["a"], 1)):
        with pytest.raises(ValueError, match="a list of texts and a length of at least 2, got"):
            Tokenizer().batch(bad, length)
