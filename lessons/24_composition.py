# %% [markdown]
# # Lesson 24: composition, or drawing what was never seen
#
# A model that has seen red squares and green triangles, but never a red triangle: can it draw one? If it only remembers
# pictures, no. If it has learned that a word for a colour and a word for a shape are two things that go together in any
# way, yes. That is what people hope for when they type a prompt that no photograph in the world belongs to.
#
# Eight pairs of shape and colour were left out of everything that the shipped model was trained on: autoencoder, CLIP
# and U-Net. This lesson asks for them.
#
# You will see
# - pictures of the pairs, and how many are right;
# - what goes wrong where something does: which of the words was not heard;
# - two things at once, and whose colour is whose.
#
# Run it from anywhere: `python lessons/24_composition.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data.shape_captions import parse
from tinydiff.data.shapes import COLOURS, HELD_OUT, SEEN, SHAPES
from tinydiff.diffusion import Sampling
from tinydiff.image import grid
from tinydiff.models import SceneReader, StableDiffusion

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer pictures and steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
EACH, HOW = (1, Sampling("dpm", 3)) if QUICK else (6, Sampling("dpm", 15))
model, reader = StableDiffusion.load(), SceneReader.load("scene_reader")


def save(figure, name):
    """Write a figure."""
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


def drawn(prompts, seed=0):
    """Pictures of the prompts, and what of each is right."""
    pieces = []
    for i in range(0, len(prompts), 100):
        *_, z_0 = model.text_to_image(prompts[i : i + 100], Rng(seed).at(i), HOW)
        pieces.append(model.decode(z_0))
    pictures = np.concatenate(pieces)
    return pictures, [parse(p).report(scene) for p, scene in zip(prompts, reader.read(pictures), strict=True)]


# %% [markdown]
# ## Every shape in every colour
#
# One prompt for each of the 48 pairs. Rows are shapes, columns colours; boxes mark those that training never had.

# %%
prompts = [f"a big {colour} {shape} on a white background" for shape in SHAPES for colour in COLOURS]
if not QUICK:
    pictures, reports = drawn(prompts)
    figure, axis = plt.subplots(figsize=(6.8, 5.4), layout="constrained")
    axis.imshow(grid(pictures, columns=len(COLOURS)))
    for shape, colour in HELD_OUT:
        row, column = SHAPES.index(shape), list(COLOURS).index(colour)
        axis.add_patch(plt.Rectangle((34 * column - 1, 34 * row - 1), 33, 33, fill=False, lw=2))
    axis.set_xticks(34 * np.arange(len(COLOURS)) + 16, COLOURS, fontsize=9)
    axis.set_yticks(34 * np.arange(len(SHAPES)) + 16, SHAPES, fontsize=9)
    save(figure, "24_all_pairs.png")
    print(f"{np.mean([all(report.values()) for report in reports]):.0%} of the 48 pictures are right in everything")

# %% [markdown]
# ![all pairs](out/24_all_pairs.png)
#
# ## How often
#
# Each pair a few times, at random sizes and places.


# %%
def asked(pairs, each, seed):
    """Prompts for these pairs, at random sizes and places."""
    draws = np.random.default_rng(seed)
    places = ("in the centre", "on the left", "on the right", "at the top", "at the bottom")
    return [
        f"a {draws.choice(['small', 'big'])} {colour} {shape} {draws.choice(places)}" for shape, colour in pairs
        for _ in range(each)
    ]  # fmt: skip


seen = [SEEN[i] for i in range(0, len(SEEN), len(SEEN) // len(HELD_OUT))][: len(HELD_OUT)]
shares = {}
for name, pairs in (("seen in training", seen), ("never seen", HELD_OUT)):
    pictures, reports = drawn(asked(pairs, EACH, 1), seed=2)
    shares[name] = [np.mean([r[what] for r in reports]) for what in ("shape", "colour", "size", "place")]
    shares[name].append(np.mean([all(r.values()) for r in reports]))
    print(f"{name}: {shares[name][-1]:.0%} right in everything")

figure, axis = plt.subplots(figsize=(6.6, 3.2), layout="constrained")
for offset, (name, values) in zip((-0.2, 0.2), shares.items(), strict=True):
    axis.bar(np.arange(5) + offset, values, 0.38, label=name)
axis.set_xticks(range(5), ("shape", "colour", "size", "place", "everything"))
axis.set(ylim=(0, 1.18), ylabel="right")
axis.legend(frameon=False, ncol=2, loc="upper center")
save(figure, "24_shares.png")

# %% [markdown]
# ![shares](out/24_shares.png)
#
# ## Whose colour is whose
#
# Two things, two colours, and four ways to mix them up. Even large models give the cube the colour of the sphere, for a
# word and the thing it belongs to are bound only by where they stand in the text: a transformer must learn that.

# %%
pairs = [("red", "circle", "blue", "square"), ("green", "star", "purple", "cross"), ("yellow", "cross", "cyan", "ring")]
prompts = [
    f"a big {c} {s} left of a small {d} {r} on a white background" for a, s, b, r in pairs for c, d in ((a, b), (b, a))
]
pictures, reports = drawn([prompt for prompt in prompts for _ in range(EACH)], seed=3)
figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
axis.imshow(grid(pictures, columns=EACH))
titles = [p.removesuffix(" on a white background").replace(" left", "\nleft") for p in prompts]
axis.set_yticks(34 * np.arange(len(prompts)) + 16, titles)
axis.tick_params(length=0, labelsize=8)
axis.set(xticks=[])
axis.set_frame_on(False)
save(figure, "24_binding.png")
bound = np.mean([report["shape"] and report["colour"] for report in reports])
print(f"both shapes in their own colours: {bound:.0%} of {len(reports)}")

# %% [markdown]
# ![whose colour](out/24_binding.png)
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Six shapes and eight colours: what share of all pairs was left out?
# 2. A model draws the right shape in 95 % of new pairs, and the right colour in 95 %. If the two fail independently,
#    how often is the pair right?

# %%
share_left_out = None
pair_right = None

if share_left_out is not None:
    assert abs(share_left_out - len(HELD_OUT) / (6 * 8)) < 1e-3, "8 of 48"
    print("1 is right")
if pair_right is not None:
    assert abs(pair_right - 0.95**2) < 1e-4, "both must be right"
    print("2 is right")
