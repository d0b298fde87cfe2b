"""Byte-pair encoding: from a text to whole numbers and back, with a vocabulary learned from captions.

A text is a row of bytes (UTF-8), of which there are 256, so every text can be written. Training looks for the pair of
neighbours that is most frequent, gives it a number of its own, and begins again: frequent words end up as one token,
rare ones as some pieces (Sennrich et al. 2016; on bytes: Radford et al. 2019, §2.2).
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import numpy as np

from tinydiff.files import PathLike, atomic_file

PAD, START, END = range(3)
"""The tokens that no text has: what fills a row up, what begins every text, and what ends it."""

BYTES = 3
"""The token of byte 0; that of byte b is BYTES + b."""

MERGED = BYTES + 256
"""The token of the first merge; that of merge i is MERGED + i."""

Pair = tuple[int, int]


class Tokenizer:
    """Texts as whole numbers: PAD, START, END, then 256 bytes, then one for each merge.

    merges: pairs of tokens, in the order in which they are joined. Raises ValueError for a pair of tokens that are not
    bytes or earlier merges, or that comes twice.
    """

    def __init__(self, merges: Iterable[Sequence[int]] = ()):
        self.merges: tuple[Pair, ...] = tuple((int(a), int(b)) for a, b in merges)
        self.spelling = [b""] * BYTES + [bytes([b]) for b in range(256)]
        for pair in self.merges:
            if not all(BYTES <= token < len(self.spelling) for token in pair):
                raise ValueError(f"a merge joins bytes or what earlier merges made, {BYTES}..., got {pair}")
            self.spelling.append(self.spelling[pair[0]] + self.spelling[pair[1]])
        self.token_of = {pair: MERGED + i for i, pair in enumerate(self.merges)}
        if len(self.token_of) < len(self.merges):
            raise ValueError("each pair may be merged once, but one comes twice")
        self._tokens_of_word = functools.lru_cache(maxsize=2**14)(self._merge_word)

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.spelling)

    @classmethod
    def train(cls, captions: Iterable[str], size: int = 512) -> Self:
        """Learn merges from captions: join the most frequent pair of neighbours, until there are `size` tokens.

        Of pairs as frequent as each other, the one of smaller numbers goes first. It ends early when no pair is left
        that occurs twice. Raises ValueError for a size that has no room for the bytes.
        """
        if size < MERGED:
            raise ValueError(f"a tokenizer has {MERGED} tokens before it learns any, got a size of {size}")
        frequency = Counter(word for caption in captions for word in words(caption))
        tokens = {word: _bytes_of(word) for word in frequency}
        count, holders = Counter[Pair](), defaultdict[Pair, set[str]](set)

        def tally(word: str, sign: int) -> None:
            for pair in itertools.pairwise(tokens[word]):
                count[pair] += sign * frequency[word]
                holders[pair].add(word)

        for word in tokens:
            tally(word, 1)
        merges: list[Pair] = []
        while len(merges) < size - MERGED and count:
            best = min(count, key=lambda pair: (-count[pair], pair))
            if count[best] < 2:
                break
            for word in holders[best].copy():
                tally(word, -1)
                tokens[word] = _merge(tokens[word], best, MERGED + len(merges))
                tally(word, 1)
            merges.append(best)
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without START and END; none of an empty one. decode(encode(text)) == text.

        Half of a surrogate pair, which is no character, counts as a question mark.
        """
        return [token for word in words(text) for token in self._tokens_of_word(word)]

    def _merge_word(self, word: str) -> list[int]:
        """Merge pairs in the order in which they were learned."""
        tokens = _bytes_of(word)
        while pairs := self.token_of.keys() & set(itertools.pairwise(tokens)):
            first = min(pairs, key=lambda pair: self.token_of[pair])
            tokens = _merge(tokens, first, self.token_of[first])
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text that these tokens spell, PAD, START and END left out; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for a number that is no token.
        """
        tokens = [int(token) for token in tokens]
        if bad := [token for token in tokens if not 0 <= token < len(self)]:
            raise ValueError(f"tokens must be in 0..{len(self) - 1}, got {bad[0]}")
        return b"".join(self.spelling[token] for token in tokens).decode("utf-8", "replace")

    def batch(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of START, the text, END, and PAD up to a length: tokens and where they are.

        Returns (B, length) int64, and bool, False where PAD is. A text that is too long is cut, with a warning; its
        row ends in END all the same. Raises ValueError for a length below 2, and for one text in place of several.
        """
        if isinstance(texts, str) or length < 2:
            raise ValueError(f"a batch takes a list of texts and a length of at least 2, got {texts!r} and {length}")
        ids = np.full((len(texts), length), PAD)
        for row, text in zip(ids, texts, strict=True):
            tokens = self._fitting(text, length - 2)
            row[: len(tokens) + 2] = START, *tokens, END
        return ids, ids != PAD

    def _fitting(self, text: str, most: int) -> list[int]:
        """The first so many tokens of a text, with a warning if there are more."""
        tokens = self.encode(text)
        if len(tokens) > most:
            kept, lost = self.decode(tokens[:most]), self.decode(tokens[most:])
            warnings.warn(
                f"a text of {len(tokens)} tokens was cut to {most}: it now ends {kept[-20:]!r}, without {_short(lost)}",
                stacklevel=3,
            )
        return tokens[:most]

    def save(self, path: PathLike) -> None:
        """Write the merges as JSON, in numbers and, for the reader, spelled out. Raises OSError as `atomic_file`."""
        spelled = [text.decode("utf-8", "replace") for text in self.spelling[MERGED:]]
        with atomic_file(path) as file:
            file.write(json.dumps({"merges": self.merges, "spelled": spelled}, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read what `save` wrote. Raises OSError where it cannot be read, ValueError if it is no tokenizer."""
        try:
            return cls(json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["merges"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no tokenizer that tinydiff saved: {error}") from error


def words(text: str) -> Iterator[str]:
    """The pieces within which pairs are merged: words and signs, each with the space before it; runs of blanks.

    Joined, they are the text.
    """
    return (match[0] for match in re.finditer(r" ?\w+| ?[^\w\s]+|\s+", text))


def clean(text: str) -> str:
    """Lower case, with one space before each word, so that a word is the same wherever it stands."""
    return "".join(f" {word}" for word in text.lower().split())


def _bytes_of(word: str) -> list[int]:
    return [BYTES + byte for byte in word.encode("utf-8", "replace")]


def _merge(tokens: list[int], pair: Pair, merged: int) -> list[int]:
    """The tokens with each occurrence of the pair, from the left, as one."""
    result: list[int] = []
    for token in tokens:
        if result and (result[-1], token) == pair:
            result[-1] = merged
        else:
            result.append(token)
    return result


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "…")
