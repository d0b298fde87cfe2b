# %% [markdown]
# # Lesson 29: GLIDE, or say what shall be under the mask
#
# Lesson 13 filled holes in pictures, lesson 25 did it with a text, and both times no model had been trained for it.
# GLIDE trained one (**E36**). What is that worth?
#
# You will see
# - what the network is shown: the picture with a hole, and the mask, as further channels of its input;
# - why a fine-tuned model may begin where the model before it ended;
# - one mask, three ways: replacement, RePaint, and the model that sees, with a text and without;
# - editing by prompt: one thing taken out, another one named, and every other pixel as it was;
# - what happens when the text and the picture disagree.
#
# Run it from anywhere: `python lessons/29_glide.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import dataclasses
import itertools
import os
import pathlib
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data.masks import random_masks, without
from tinydiff.data.shape_captions import caption, parse
from tinydiff.data.shapes import Item, Scene, draw
from tinydiff.diffusion import Sampling, repaint, resampled
from tinydiff.image import grid, to_signed
from tinydiff.models import CLIP, SceneReader, TextDiffusion, TextDiffusionConfig, TextInpainting, told_texts
from tinydiff.models.pixel_inpainting import shown
from tinydiff.nn import UNetConfig

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer pictures and steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
N, STEPS = (2, 2) if QUICK else (8, 20)
GUIDANCE = 3.0
model, clip, reader = TextInpainting.load("glide"), CLIP.load("clip"), SceneReader.load("scene_reader")
nothing = told_texts(clip, "")


def show(name, rows, titles, inch=0.03):
    """Draw rows of pictures, each with a title to its left."""
    sheet = grid(np.concatenate(rows), columns=len(rows[0]))
    figure, axis = plt.subplots(figsize=(inch * sheet.shape[1] + 2.6, inch * sheet.shape[0]), layout="constrained")
    axis.imshow(sheet)
    axis.set_yticks(34 * np.arange(len(rows)) + 16, [textwrap.fill(title, 28) for title in titles], fontsize=8)
    axis.set(xticks=[])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    figure.savefig(OUT / name, dpi=60 if QUICK else 130)
    plt.close(figure)


def right_share(pictures, texts):
    """The share of the pictures in which the scene reader sees all that the text of each names."""
    return np.mean([parse(text).fits(scene) for text, scene in zip(texts, reader.read(pictures), strict=True)])


# %% [markdown]
# ## What the network is shown (E36)
#
# A mask $m$ is 1 where a pixel is known. Beside the noisy picture $x_t$ the U-Net sees the known pixels and the mask:
#
# $$\varepsilon_\theta\big(\,[\,x_t,\; m \odot x,\; m\,],\; t,\; \tau_\theta(y)\big)$$
#
# Three channels become seven. The mask must be a channel of its own, since a grey pixel and a hole are both 0.

# %%
scenes = [
    Scene((Item("circle", "red", "big", 0.27, 0.3), Item("star", "yellow", "small", 0.75, 0.7)), "black"),
    Scene((Item("square", "blue", "big", 0.5, 0.5),), "striped"),
    Scene((Item("ring", "green", "big", 0.5, 0.5),), "grey"),
    Scene((Item("cross", "pink", "small", 0.2, 0.5), Item("triangle", "orange", "big", 0.7, 0.4)), "white"),
]
x = to_signed(np.stack([draw(scene) for scene in scenes]))
masks = random_masks(Rng(3), len(x), (32, 32))
seen = shown(x, masks)
assert seen.shape[-1] == 4 and model.config.unet.channels + model.config.unet.extra == 7
as_pictures = [x, seen[..., :3], 2 * seen[..., 3:].repeat(3, axis=-1) - 1]
titles = ["the picture x", "its known pixels, 0 elsewhere", "the mask m, white where known"]
show(
    "29_shown.png",
    as_pictures,
    ["the picture x", "its known pixels, 0 elsewhere", "the mask m, white where known"],
    0.05,
)

# %% [markdown]
# ![what is shown](out/29_shown.png)
#
# In training another part of each picture is hidden: a rectangle, one side of a line, some strokes, or everything.
#
# ## Beginning where another model ended
#
# A first model learned to draw pictures of texts. The new channels need new weights in one place, the first
# convolution, and these begin at **zero**: so the fine-tuned model begins as exactly the model that it was made from,
# and learns from there what the new channels are good for. We check it with a small model that nobody trained.

# %%
small = UNetConfig(channels=3, base=8, multipliers=(1,), blocks=1, attention=(0,), heads=2, context=128)
before = TextDiffusion(TextDiffusionConfig(small), Rng(0))
for i, p in enumerate(before.parameters().values()):
    p[...] = p.data + 0.1 * Rng(1).at(i).normal(p.shape)  # some weights of a fresh model are 0 themselves
after = TextInpainting.started_from(before)
told = told_texts(clip, ["a red star"] * len(x))
x_t, t = Rng(2).normal(x.shape), np.full(len(x), 500)
said = before(x_t, t, told).numpy()
said_by_the_new = after(x_t, t, dataclasses.replace(told, shown=seen)).numpy()
new = after.count_parameters() - before.count_parameters()
print(f"{new} new weights; the largest difference of the outputs {np.abs(said - said_by_the_new).max():.1e}")
assert np.allclose(said, said_by_the_new, atol=1e-4)

# %% [markdown]
# ## One mask, three ways
#
# A big thing in the middle, half of which is hidden. Can the other half be painted so that the two fit? Once the text
# says what it is, and once nothing does but the half that is known.
#
# - **replacement**: the model is shown nothing. At each step the known half of $x_t$ is put back, with the noise that
#   belongs to $t$;
# - **RePaint** (lesson 13) does the same, and walks every stretch several times, so that the painted half may follow;
# - **fine-tuned**: the model is shown the known half at every step.
#
# The first two need no training: here they use the same weights, shown no picture (zeros, an empty mask), with which
# the model draws as the one before it did.

# %%
things = [
    Scene((Item(shape, colour, "big", 0.5, 0.5),), background)
    for shape, colour, background in [
        ("circle", "red", "white"),
        ("square", "blue", "grey"),
        ("triangle", "green", "black"),
        ("star", "pink", "striped"),
        ("ring", "orange", "checked"),
        ("cross", "purple", "white"),
        ("circle", "yellow", "black"),
        ("star", "cyan", "grey"),
    ]
][:N]
texts = [caption(scene, Rng(4).at(i), full=True) for i, scene in enumerate(things)]
whole = to_signed(np.stack([draw(scene) for scene in things]))
half = without("left", (32, 32))
how = Sampling(steps=STEPS)
told_of = {"with the text": (told_texts(clip, texts), GUIDANCE), "without a text": (nothing.repeated(N), 1.0)}


def replaced(told, guidance, way):
    """Paint with a model that sees nothing: back by so many steps, each stretch walked so often."""
    unseeing, x_T = model.denoiser(told, guidance, nothing.repeated(N)), model.noise(N, Rng(5))
    *_, x_0 = repaint(unseeing, x_T, model.schedule, Rng(6), whole, half, STEPS, *way)
    return x_0


def calls_of_repaint(way):
    """How many steps lead down, each of which calls the network."""
    return sum(a > b for a, b in itertools.pairwise(resampled(STEPS, *way)))


def fine_tuned(told, guidance=GUIDANCE, known=whole, mask=half):
    """Paint with the model that sees."""
    *_, x_0 = model.inpaint(known, mask, told, Rng(5), how, guidance=guidance, negative=nothing)
    return x_0


def seam(pictures):
    """How far neighbours on the two sides of the mask's edge are apart, on average."""
    return np.abs(pictures[:, :, 16] - pictures[:, :, 15]).mean()


once, often = (1, 1), (1, 2) if QUICK else (5, 2)
ways = {
    "replacement": (lambda *told: replaced(*told, once), calls_of_repaint(once)),
    "RePaint": (lambda *told: replaced(*told, often), calls_of_repaint(often)),
    "fine-tuned": (fine_tuned, STEPS),
}
rows, titles = [whole, np.where(half[..., None], whole, 0)], ["the picture", "what is known"]
print(f"across the edge of the mask, neighbours in the true pictures are {seam(whole):.3f} apart")
for what, told in told_of.items():
    for name, (paint, calls) in ways.items():
        painted = paint(*told)
        assert (painted[:, half] == whole[:, half]).all()  # whichever way: known pixels come back exactly
        rows, titles = [*rows, painted], [*titles, f"{name}, {calls} times, {what}"]
        print(f"{titles[-1]}: {right_share(painted, texts):.0%} as they were, at the edge {seam(painted):.3f} apart")
show("29_three_ways.png", rows, titles)

# %% [markdown]
# ![three ways](out/29_three_ways.png)
#
# The text makes it easy: it says what is there and where, and any way will do. Without it, all depends on how well the
# known half is understood. Replacement lets the model see it through the noise only, and by the time that there is
# little noise, its own half is settled. RePaint walks back and tries again, and pays with calls of the network. The
# fine-tuned model sees the half from the first step on, when $x_t$ is still all noise; what it makes of it, it had to
# learn. (Eight pictures are a sheet to look at, not a measurement.)
#
# ## Editing by prompt
#
# Two things; one is hidden by a square, and the text names another in its place. The text is about the whole picture,
# as all captions of the training were.

# %%
scene = Scene((Item("circle", "red", "small", 0.2, 0.5), Item("star", "orange", "big", 0.66, 0.5)), "white")
picture = to_signed(draw(scene))[None].repeat(N, axis=0)
at = (np.arange(32) + 0.5) / 32
hole = (np.abs(at[:, None] - 0.5) < 0.33) & (np.abs(at[None] - 0.66) < 0.31)
edits = ["a small red circle left of a big blue triangle on a white background"]
edits += ["a small red circle left of a big green cross on a white background"]
edits += ["a small red circle left of a big purple ring on a white background", ""]
edits = edits[:1] if QUICK else edits
rows, titles = [picture, np.where(hole[..., None], 0, picture)], ["the picture", "what is known"]
for text in edits:
    painted = fine_tuned(told_texts(clip, text), known=picture, mask=~hole)
    assert (painted[:, ~hole] == picture[:, ~hole]).all()
    rows, titles = [*rows, painted], [*titles, text or "(no text)"]
    if text:
        print(f"{right_share(painted, [text] * N):.0%} of {N}: {text}")
show("29_edits.png", rows, titles)

# %% [markdown]
# ![edits](out/29_edits.png)
#
# `python examples/glide.py "a small red circle left of a big blue triangle" --from picture.png --mask mask.png` does it
# with a picture of yours.
#
# ## When text and picture disagree
#
# What is known is white. The text says black. Who wins? The known pixels do, as they are kept; but the model may still
# paint what it was told as far as it can. More guidance is more of the text.

# %%
text = "a small red circle left of a big blue triangle on a black background"
rows, titles = [], []
for guidance in (1.0, 6.0):
    rows.append(fine_tuned(told_texts(clip, text), guidance, picture, ~hole))
    titles.append(f"'on a black background', guidance {guidance:g}")
    dark = np.mean(rows[-1][:, hole].mean(axis=-1) < -0.5)
    print(f"guidance {guidance:g}: {dark:.0%} of the painted pixels are dark")
show("29_disagree.png", rows, titles)

# %% [markdown]
# ![disagreement](out/29_disagree.png)
#
# The picture wins: no part of it turns black. What more guidance does instead is to leave the white patchy.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. The model's U-Net gathers patches of 2 x 2 pixels before its first convolution of 3 x 3, which has as many outputs
#    as `model.config.unet.base`. How many weights of it began at zero?
# 2. RePaint in `steps` steps, which goes back by `jump` so that each stretch is walked `resamplings` times: how many
#    calls of the network? Write a function of the three (`resampled`'s docstring has the formula).

# %%
new_weights, calls_of = None, None

if new_weights is not None:
    assert new_weights == 3 * 3 * 4 * 4 * model.config.unet.base, "3 x 3 places, 2 x 2 pixels, 4 channels, base outputs"
    print("exercise 1 is right")
if calls_of is not None:
    for steps, jump, times in ((20, 5, 4), (50, 10, 2), (7, 1, 3)):
        way = resampled(steps, jump, times)
        assert calls_of(steps, jump, times) == sum(a > b for a, b in itertools.pairwise(way))
    print("exercise 2 is right")
