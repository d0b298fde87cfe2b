# %% [markdown]
# # Lesson 23: guidance and negative prompts
#
# Lesson 12 guided digits by their class. With a text it is the same formula (**E35**):
#
# $$\varepsilon = \varepsilon_\theta(z_t, t, \text{""}) + s\,\bigl(\varepsilon_\theta(z_t, t, y) -
# \varepsilon_\theta(z_t, t, \text{""})\bigr).$$
#
# The empty text stands for "any picture": a tenth of the captions were emptied in training. Put another text in its
# place, and the formula moves *away from that*: a negative prompt.
#
# You will see
# - how much more often the picture is right with guidance, measured by a network that reads pictures;
# - what too much guidance does;
# - a negative prompt at work, counted.
#
# Run it from anywhere: `python lessons/23_guidance_by_text.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data.captioned import Shapes
from tinydiff.data.shape_captions import parse
from tinydiff.data.shapes import BACKGROUNDS
from tinydiff.diffusion import Sampling
from tinydiff.image import grid
from tinydiff.models import SceneReader, StableDiffusion

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer pictures and steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
N, HOW = (4, Sampling("dpm", 3)) if QUICK else (60, Sampling("dpm", 15))
model, reader = StableDiffusion.load(), SceneReader.load("scene_reader")


def save(figure, name):
    """Write a figure."""
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


def drawn(prompts, guidance, negative="", seed=0):
    """Pictures of the prompts, (N, 32, 32, 3) in [-1, 1]."""
    *_, z_0 = model.text_to_image(prompts, Rng(seed), HOW, guidance, negative)
    return model.decode(z_0)


# %% [markdown]
# ## How much guidance
#
# The prompts are full captions of scenes that training never saw: of one thing and of two. The scene reader, a small
# network trained to read pictures back (`examples/train_scene_reader.py`), says what is in each picture, and the
# captions' grammar whether that is what was asked for.

# %%
prompts = {
    "one thing": Shapes(number=1, full=True).draw(Rng(1), N, "test")[1],
    "two things": Shapes(number=2, full=True).draw(Rng(2), N, "test")[1],
}
strengths = (1.0, 3.0) if QUICK else (0.0, 1.0, 2.0, 3.0, 5.0, 10.0)


def right(prompts, pictures):
    """The share of pictures with everything that their prompts name."""
    return np.mean([parse(prompt).fits(scene) for prompt, scene in zip(prompts, reader.read(pictures), strict=True)])


shares, sheets = {kind: [] for kind in prompts}, []
for s in strengths:
    for kind, texts in prompts.items():
        pictures = drawn(texts, s)
        shares[kind].append(right(texts, pictures))
    sheets.append(pictures[:8])
    print(f"s = {s:4}: right in everything", ", ".join(f"{share[-1]:.0%} ({kind})" for kind, share in shares.items()))

figure, (left, middle) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained", width_ratios=(1, 1.5))
for kind, share in shares.items():
    left.plot(strengths, share, "o-", label=kind)
left.set(xlabel="guidance s", ylabel="right in everything", ylim=(-0.03, 1.03))
left.legend(frameon=False)
middle.imshow(grid(np.concatenate(sheets), columns=len(sheets[0])))
middle.set_yticks(34 * np.arange(len(strengths)) + 16, [f"s = {s:g}" for s in strengths])
middle.set(xticks=[], title="the same prompts, the same noise")
save(figure, "23_guidance.png")

# %% [markdown]
# ![guidance](out/23_guidance.png)
#
# At $s = 0$ the text has no say, and the picture is right by chance. At $s = 1$ the network does what training asked of
# it. Beyond, what the text adds is exaggerated: colours become purer and shapes clearer, up to a point where $z_t$ is
# pushed to places that no training image ever was.
#
# ## A negative prompt
#
# "a star" leaves the background open. Say what it must not be.

# %%
many = 8 if QUICK else 60
plain, negative = (drawn(["a star"] * many, 3.0, text, seed=4) for text in ("", "a star on a black background"))
counts = {
    name: np.mean([scene.background == "black" for scene in reader.read(pictures)])
    for name, pictures in (("no negative prompt", plain), ("not on black", negative))
}
print("on a black background:", ", ".join(f"{share:.0%} ({name})" for name, share in counts.items()))
print(f"(one in {len(BACKGROUNDS)} of the training scenes is)")

figure, axes = plt.subplots(1, 2, figsize=(8, 2.5), layout="constrained")
for axis, pictures, name in zip(axes, (plain, negative), counts, strict=True):
    axis.imshow(grid(pictures[:24], columns=8))
    axis.set_title(f'"a star", {name}', fontsize=9)
    axis.axis("off")
save(figure, "23_negative.png")

# %% [markdown]
# ![negative prompt](out/23_negative.png)
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. For which $s$ has the negative prompt no effect at all?
# 2. Someone writes the formula as $\varepsilon_c + w\,(\varepsilon_c - \varepsilon_u)$. What is our $s$ for $w = 2$?

# %%
no_effect = None
our_s = None

if no_effect is not None:
    assert no_effect == 1, "look at what multiplies the output without the text"
    print("1 is right")
if our_s is not None:
    assert our_s == 3, "collect what multiplies the conditional output"
    print("2 is right")
