# %% [markdown]
# # Lesson 28: the two coordinates of a picture
#
# DALL-E 2's decoder draws a picture of an embedding $z_i$, out of noise $x_T$. Run DDIM backwards and the noise of a
# given picture is found too. Then a picture *is* the pair $(z_i, x_T)$: what CLIP sees in it, and all the rest. This
# lesson changes one and keeps the other (**E34**).
#
# You will see
# - variations: $z_i$ kept, $x_T$ new;
# - inversion: both kept, and how much noise on the way loses how much of the picture;
# - interpolation: $z_i$ on the arc between two pictures, from one and the same $x_T$;
# - text diffs: $z_i$ moved by what two texts differ in, which edits a picture by words.
#
# Run it from anywhere: `python lessons/28_manipulations.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import itertools
import os
import pathlib
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data.shapes import Item, Scene, draw
from tinydiff.diffusion import Sampling, last
from tinydiff.image import grid, to_signed
from tinydiff.metrics import psnr
from tinydiff.models import DallE2, SceneReader
from tinydiff.models.scene_reader import agreement

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer pictures and steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
STEPS = 3 if QUICK else 25
HOW = Sampling(steps=STEPS)
model, reader = DallE2.load(prior=None, upsamplers=()), SceneReader.load("scene_reader")  # pictures in, pictures out


def show(name, rows, titles):
    """Draw rows of pictures, each with a title to its left."""
    sheet = grid(np.concatenate(rows), columns=len(rows[0]))
    figure, axis = plt.subplots(figsize=(0.03 * sheet.shape[1] + 2.6, 0.03 * sheet.shape[0]), layout="constrained")
    axis.imshow(sheet)
    axis.set_yticks(34 * np.arange(len(rows)) + 16, [textwrap.fill(title, 28) for title in titles], fontsize=8)
    axis.set(xticks=[])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


scenes = [
    Scene((Item("circle", "red", "big", 0.3, 0.5), Item("star", "yellow", "small", 0.75, 0.3)), "black"),
    Scene((Item("triangle", "green", "big", 0.5, 0.5),), "white"),
    Scene((Item("square", "blue", "small", 0.75, 0.75),), "grey"),
]
x = np.stack([to_signed(draw(scene)) for scene in scenes])

# %% [markdown]
# ## Variations
#
# The embedding of a picture, given to the decoder with fresh noise and no caption, `DallE2.variations`. What stays is
# what CLIP sees; what changes is what it does not. To look at variations is to look at CLIP.

# %%
K = 2 if QUICK else 6
varied = [model.pictures(last(model.variations(picture[None].repeat(K, axis=0), Rng(1), HOW))) for picture in x]
show("28_variations.png", [np.concatenate([x[i : i + 1], varied[i]]) for i in range(3)], ["a picture, variations"] * 3)
same = agreement(reader.read(np.concatenate(varied)), [scene for scene in scenes for _ in range(K)])
print("variations that keep the picture's", ", ".join(f"{name}: {share:.0%}" for name, share in same.items()))

# %% [markdown]
# ![variations](out/28_variations.png)
#
# ## Inversion
#
# DDIM follows a differential equation, and so can go back (lesson 13): from the picture, told its own $z_i$, up to the
# noise $x_T$ that it is drawn from, `DallE2.invert`. Down again with $\eta = 0$, the picture comes back. With more
# $\eta$ each step brings fresh noise, which forgets $x_T$: from the picture itself to a free variation.

# %%
etas = (0.0, 1.0) if QUICK else (0.0, 0.3, 0.6, 1.0)
found = model.invert(x, Rng(2), STEPS)  # x_T of each picture
rows = [model.pictures(last(model.variations(x, Rng(3), Sampling(steps=STEPS, eta=eta), x_T=found))) for eta in etas]
free = model.pictures(last(model.variations(x, Rng(3), HOW)))
show("28_inversion.png", [x, *rows, free], ["pictures", *(f"x_T found, η = {eta}" for eta in etas), "x_T new"])
near = {eta: psnr(pictures, x).mean() for eta, pictures in zip(etas, rows, strict=True)}
print(
    "PSNR:", *(f"η = {eta}: {value:.1f} dB;" for eta, value in near.items()), f"x_T new: {psnr(free, x).mean():.1f} dB"
)
if not QUICK:
    assert near[0.0] > 30 and near[0.0] > near[1.0] + 3

# %% [markdown]
# ![inversion](out/28_inversion.png)
#
# ## From one picture to another
#
# $$z_i(w) = \mathrm{slerp}\big(z_i^{(1)}, z_i^{(2)}, w\big)
#          = \frac{\sin((1-w)\,\theta)}{\sin\theta} z_i^{(1)} + \frac{\sin(w\,\theta)}{\sin\theta} z_i^{(2)},
#   \qquad \cos\theta = z_i^{(1)}\!\cdot z_i^{(2)}$$
#
# Embeddings have length 1, and so must those between: the straight line from one to the other runs through the inside
# of the sphere, where no embedding is. All pictures of a row start from **one** $x_T$; whatever differs comes from
# $z_i$. The slide's figure is this: two pictures, and the decoder along the arc.

# %%
F = 3 if QUICK else 9
pairs = [(1, 2), (0, 1)][: 1 if QUICK else 2]
ways = [model.pictures(last(model.interpolate(x[list(pair)], F, Rng(4), HOW))) for pair in pairs]
show("28_interpolation.png", ways, ["along the arc"] * len(ways))


def largest_step(way):
    """The largest difference of two neighbours, as a share of the difference of the ends; root mean squares."""
    steps = ((way[1:] - way[:-1]) ** 2).mean(axis=(1, 2, 3))
    return np.sqrt(steps.max() / ((way[-1] - way[0]) ** 2).mean())


print("the largest step of nine pictures, of the way from end to end:", *(f"{largest_step(way):.2f}" for way in ways))

# %% [markdown]
# ![interpolation](out/28_interpolation.png)
#
# Greys glide. Things seem to jump: a thing is here or there, green or blue, and where the decoder must choose, it
# chooses at some $w$, between two neighbours. But is it a jump? DDIM is a smooth function of $z_i$, and so there must
# be pictures in between. To find them, halve: draw the middle of the two neighbours that differ most, look where they
# differ most now, and again (`DallE2.bisect`).

# %%
M = 4 if QUICK else 33
halved = [sorted(w for w, _ in itertools.islice(model.bisect(x[list(pair)], Rng(4), HOW), M)) for pair in pairs]
even = [
    model.pictures(last(model.interpolate(x[list(pair)], places, Rng(4), HOW)))
    for pair, places in zip(pairs, halved, strict=True)
]
show("28_even_steps.png", [way[:: 1 if QUICK else 4] for way in even], ["halved where most changes"] * len(even))
for places, way in zip(halved, even, strict=True):
    print(f"of {M} pictures the largest step is {largest_step(way):.2f}, the smallest in w {np.diff(places).min():.1e}")

# %% [markdown]
# ![even steps](out/28_even_steps.png)
#
# There they are: most of the way from one picture to the other lies within a small part of the arc, where the decoder
# is of two minds. `python examples/evaluate_manipulations.py` does this for twenty pairs, and
# `python examples/dalle2.py --vary A --to B` for two pictures of yours.
#
# ## Text diffs
#
# How to say "the same, but blue"? As a direction: what the embeddings of two texts differ in,
#
# $$z_d = \frac{z_t(\text{new}) - z_t(\text{old})}{\lVert z_t(\text{new}) - z_t(\text{old}) \rVert},
#   \qquad z_i(\theta) = \mathrm{slerp}(z_i, z_d, \theta).$$
#
# The place of texts, which is not that of pictures (lesson 26), falls out of the difference. $x_T$ is the picture's
# own, by inversion, so that the rest stays where it is. The paper goes as far as $\theta$ = 0.25 to 0.5; near 1 there
# is only the difference, and no picture left.

# %%
diffs = [
    (1, "a big green triangle", "a big purple triangle"),
    (1, "a big green triangle", "a big green circle"),
    (2, "a small blue square", "a small orange square"),
][: 1 if QUICK else 3]
rows = []
for i, old, new in diffs:
    states = model.text_diff(x[i : i + 1], old, new, F, Rng(5), HOW, far=0.6, x_T=found[i : i + 1])
    rows.append(model.pictures(last(states)))
show("28_text_diffs.png", rows, [f"{old} to {new}" for _, old, new in diffs])

# %% [markdown]
# ![text diffs](out/28_text_diffs.png)
#
# Size, place and background stay, of which the texts say nothing new; colour or shape switches somewhere on the way.
#
# `python examples/dalle2.py --vary picture.png` does all of this with a picture of yours: alone, with `--eta`, `--to`
# or `--diff`.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Two embeddings of length 1 stand at a right angle. How long is their mean?
# 2. And the point half-way on the arc?

# %%
length_of_mean = None
length_on_arc = None

if length_of_mean is not None:
    assert abs(length_of_mean - 0.5**0.5) < 1e-3, "the diagonal of a square, halved"
    print("1 is right")
if length_on_arc is not None:
    assert length_on_arc == 1, "the arc is a part of the circle"
    print("2 is right")
