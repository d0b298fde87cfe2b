# %% [markdown]
# # Lesson 20: retrieval, or a search engine in three lines
#
# CLIP (lesson 19) turns images and texts into unit vectors of one space. So to find the pictures for a text, turn all
# pictures into vectors once, turn the text into a vector, and look which are nearest (**E26**). LAION-5B, on which
# Stable Diffusion was trained, was collected with the help of such cosines, and DALL-E 2 begins where they end.
#
# You will see
# - text → image and image → image: one search, two kinds of query;
# - why finding the best *k* of a million needs no sorting;
# - **recall@k**, the number that says how good a search is, beside what chance would give;
# - arithmetic with meanings: a picture, minus one word, plus another;
# - an index on disk, and why it belongs to the model that made it.
#
# Run it from anywhere: `python lessons/20_retrieval.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib
import tempfile
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, checkpoint
from tinydiff.checkpoint import fingerprint
from tinydiff.data.captioned import Shapes
from tinydiff.data.shape_captions import parse
from tinydiff.data.shapes import draw
from tinydiff.image import to_signed
from tinydiff.models.clip import CLIP, CLIPConfig
from tinydiff.models.tokenizer import Tokenizer, clean
from tinydiff.nn import TransformerConfig
from tinydiff.optim import Adam
from tinydiff.retrieval import Index, recall

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"


def trained_here(steps=2 if QUICK else 250):
    """A tiny CLIP, in case that none comes with the package."""
    captions = Shapes().draw(Rng(0), 200)[1]
    towers = TransformerConfig(64, 2, 4, causal=True), TransformerConfig(64, 2, 4)
    merges = Tokenizer.train(map(clean, captions), 512).merges
    model = CLIP(CLIPConfig(merges, 28, *towers, patch=8, embedding=64), Rng(1))
    adam = Adam(model.parameters(), betas=(0.9, 0.98))
    for step in range(steps):
        pictures, texts = Shapes().draw(Rng(2).at(step), 64)
        model.loss(to_signed(pictures), *model.tokens(texts)).backward()
        adam.step(2e-3)
    return model


clip = CLIP.load("clip") if "clip" in checkpoint.shipped() else trained_here()

# %% [markdown]
# ## An index, and a search
#
# We draw scenes that CLIP has never seen, and keep their vectors. `Index.search` is a product of matrices, queries
# times vectors, and a choice of the largest entries.

# %%
scenes = Shapes().scenes(Rng(3), 60 if QUICK else 1500, "test")
pictures = np.stack([draw(scene) for scene in scenes])
vectors = clip.image_embedding(to_signed(pictures))  # (N, D), each of length 1
index = Index(vectors, [f"scene {i}" for i in range(len(scenes))], fingerprint(clip))

texts = ["a red circle", "a small yellow square on a black background", "a green cross left of a pink star", "stripes"]
found = index.search(clip.text_embedding(texts), k=8)


def sheet(file, titles, rows, cosines, first=None):
    """Draw what was found for each query: a row each, with the cosines above."""
    columns = len(rows[0]) + (first is not None)
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.15 * columns, 1.62 * len(rows)))
    for i, line in enumerate(axes):
        shown = ([] if first is None else [first[i]]) + [pictures[row] for row in rows[i]]
        above = ([] if first is None else ["query"]) + [f"{c:.2f}" for c in cosines[i]]
        for axis, picture, text in zip(line, shown, above, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(text, fontsize=9, labelpad=2)
        line[0].set_title(titles[i], fontsize=11, loc="left")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.07, top=0.92, wspace=0.06, hspace=0.42)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


sheet("20_by_text.png", texts, found.rows, found.cosines)
for text, rows in list(zip(texts, found.rows, strict=True))[:3]:
    fits = sum(parse(text).fits(scenes[row]) for row in rows)
    there = sum(parse(text).fits(scene) for scene in scenes)
    print(f"{text!r}: {fits} of the 8 nearest are all that it says; there are {there} such scenes")

# %% [markdown]
# ![by text](out/20_by_text.png)
#
# "A red circle" says nothing of size, place and background, and there what is found differs; it agrees in what was
# said. Of the second text there are two such scenes and of the third a single one; they come first, and after them,
# with a smaller cosine, scenes of which most is true.
#
# The other direction needs no other code: the query may as well be an image.

# %%
queries = Shapes(full=True).scenes(Rng(4), 3, "test")
shown = np.stack([draw(scene) for scene in queries])
alike = index.search(clip.image_embedding(to_signed(shown)), k=8)
sheet("20_by_image.png", ["", "", ""], alike.rows, alike.cosines, first=shown)

# %% [markdown]
# ![by image](out/20_by_image.png)
#
# ## The best k need no sorting
#
# To sort $N$ numbers takes about $N \log N$ steps, of which nearly all are spent on the order of things nobody asked
# for. A partial sort (`np.argpartition`) only separates the $k$ largest from the rest, in about $N$ steps; those few
# are then put in order. And the cosines are made and forgotten block by block, so that they never take more memory than
# a block. The answer is exact: it is what the full sort gives.

# %%
sizes = (1000, 4000) if QUICK else (1000, 10_000, 100_000, 400_000)
times: dict[str, list[float]] = {"cosines, and a full sort": [], "cosines, and a partial sort (Index)": []}
big = Rng(5).normal((sizes[-1], 64))
big /= np.linalg.norm(big, axis=1, keepdims=True)
for size in sizes:
    some, few = Index(big[:size], [""] * size, "random"), big[:10]
    began = time.perf_counter()
    full = np.argsort(-(few @ some.vectors.T), axis=1)[:, :8]
    times["cosines, and a full sort"].append(time.perf_counter() - began)
    began = time.perf_counter()
    part = some.search(few, 8)
    times["cosines, and a partial sort (Index)"].append(time.perf_counter() - began)
    assert (full == part.rows).mean() > 0.95  # but for cosines that are equal to rounding
print(f"ten queries among {sizes[-1]:,}: ", ", ".join(f"{name} {t[-1]:.3f} s" for name, t in times.items()))

figure, axis = plt.subplots(figsize=(6.5, 3.4))
for (name, seconds), color in zip(times.items(), (RED, BLUE), strict=True):
    axis.loglog(sizes, np.array(seconds) * 100, "o-", color=color, label=name)
axis.set(xlabel="vectors in the index", ylabel="milliseconds a query")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "20_time.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![time](out/20_time.png)
#
# For some millions that is enough. For more there are approximate searches, which look only at vectors whose neighbours
# looked promising: `Index.search_with_faiss`, if faiss is installed.
#
# ## How good is it? Recall
#
# Take $N$ held-out pairs, no two with one caption. Search with each caption among the $N$ images: **recall@k** is how
# often its own image is among the first $k$. Chance gives $k/N$. Captions that leave something out may describe another
# image as well, so the captions here name everything.

# %%
N = 50 if QUICK else 500
more, captions = Shapes(full=True).draw(Rng(6), 2 * N, "test")
own = sorted({clean(c): i for i, c in enumerate(captions)}.values())[:N]
images, words = clip.image_embedding(to_signed(more[own])), clip.text_embedding([captions[i] for i in own])
cosines = words @ images.T
ks = np.arange(1, 31)
curves = {
    "text to image": [recall(cosines, int(k)) for k in ks],
    "image to text": [recall(cosines.T, int(k)) for k in ks],
}
for name, curve in curves.items():
    print(f"{name}: recall@1 {curve[0]:.1%}, recall@5 {curve[4]:.1%}, of {N}")

figure, axis = plt.subplots(figsize=(6.5, 3.4))
for (name, curve), color in zip(curves.items(), (BLUE, GREEN), strict=True):
    axis.plot(ks, curve, "o-", ms=3, color=color, label=name)
axis.plot(ks, ks / N, color=GREY, ls="--", lw=1, label="chance")
axis.set(xlabel="k", ylabel=f"recall@k, {N} pairs", ylim=(0, 1.03))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "20_recall.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![recall](out/20_recall.png)
#
# ## Arithmetic with meanings
#
# If directions in the space mean something, one may walk along them: take the vector of an image, subtract that of the
# word which is right, add that of another, and search with the sum (scaled to length 1 again). Here the colour is to
# change and the rest to stay.

# %%
changes = [("red", "blue"), ("green", "yellow"), ("pink", "cyan")]
starts = [next(s for s in scenes if len(s.items) == 1 and s.items[0].colour == colour) for colour, _ in changes]
shown = np.stack([draw(scene) for scene in starts])
seen = clip.image_embedding(to_signed(shown))
away, towards = (clip.text_embedding([f"a {pair[i]} thing" for pair in changes]) for i in (0, 1))
walked = seen - away + towards
walked /= np.linalg.norm(walked, axis=1, keepdims=True)
changed = index.search(walked, k=6)
sheet("20_arithmetic.png", [f"− {a} + {b}" for a, b in changes], changed.rows, changed.cosines, first=shown)
hits = [
    any(i.colour == b for i in scenes[row].items)
    for (_, b), rows in zip(changes, changed.rows, strict=True)
    for row in rows
]
print(f"{np.mean(hits):.0%} of the scenes found by arithmetic have the new colour")

# %% [markdown]
# ![arithmetic](out/20_arithmetic.png)
#
# ## On disk
#
# An index of millions of vectors need not be read to be searched: it is *memory-mapped*, which means that the system
# fetches the pages of the file that the product comes to. But vectors mean something only to the model that made them:
# those of another CLIP live in a space of their own, turned and stretched, and a search with them finds nonsense
# without any sign that something is wrong. So the index carries a fingerprint of its model, and refuses another one.

# %%
with tempfile.TemporaryDirectory() as folder:
    index.save(folder)
    loaded = Index.load(folder, fingerprint(clip))
    print(f"{len(loaded):,} vectors in {(pathlib.Path(folder) / 'vectors.npy').stat().st_size:,} bytes, mapped")
    assert (loaded.search(vectors[:3], 5).rows == index.search(vectors[:3], 5).rows).all()
    stranger = CLIP(clip.config, Rng(7))
    try:
        Index.load(folder, fingerprint(stranger))
    except ValueError as error:
        print("as it should be:", str(error).replace(folder, "FOLDER"))
    del loaded

# %% [markdown]
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. The images of LAION-400M (400 million) have vectors of 512 numbers in half precision, 2 bytes each. How many
#    gigabytes (of 10⁹ bytes) is the index?
# 2. Unit vectors $a$ and $b$ have the cosine $c$. What is their distance $\lVert a-b\rVert$? (It follows that the
#    nearest by distance are the nearest by cosine.) Write a function of $c$.

# %%
gigabytes, distance = None, None

if gigabytes is not None:
    assert np.isclose(gigabytes, 400e6 * 512 * 2 / 1e9)
    print("exercise 1 is right")
if distance is not None:
    a, b = vectors[0].astype(float), vectors[1].astype(float)
    assert np.isclose(distance(a @ b), np.linalg.norm(a - b), atol=1e-5)
    print("exercise 2 is right")
