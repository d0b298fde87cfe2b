# %% [markdown]
# # Lesson 25: editing by text
#
# Lesson 13 edited digits. With latents and a text nothing about the methods is new (**E36**), and the text makes them
# useful: *what* shall be there instead?
#
# You will see
# - image to image: a picture taken part of the way to noise, and brought back as another text says;
# - inpainting: a blue cross under the mask, and every pixel outside it untouched;
# - from one prompt to another, from the same noise.
#
# Run it from anywhere: `python lessons/25_editing_by_text.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data.shapes import Item, Scene, draw
from tinydiff.diffusion import Sampling
from tinydiff.image import grid, to_signed
from tinydiff.models import SceneReader, StableDiffusion
from tinydiff.models.stable_diffusion import with_known

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer pictures and steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
N, STEPS = (2, 4) if QUICK else (6, 40)
model, reader = StableDiffusion.load(), SceneReader.load("scene_reader")


def show(name, rows, titles, inch=0.03):
    """Draw rows of pictures, each with a title to its left."""
    sheet = grid(np.concatenate(rows), columns=len(rows[0]))
    figure, axis = plt.subplots(figsize=(inch * sheet.shape[1] + 2.6, inch * sheet.shape[0]), layout="constrained")
    axis.imshow(sheet)
    axis.set_yticks(34 * np.arange(len(rows)) + 16, [textwrap.fill(title, 28) for title in titles], fontsize=8)
    axis.set(xticks=[])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## Image to image
#
# SDEdit on latents: $z_0 = s\,\mathcal E(x)$, then
# $z_t = \sqrt{\bar\alpha_t} z_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$ at
# $t = \mathrm{round}(\text{strength} \cdot T)$, and from there the sampler, told the new text. The noise hides what the
# new text may change.

# %%
scene = Scene((Item("circle", "red", "big", 0.26, 0.5), Item("star", "orange", "small", 0.78, 0.5)), "white")
x = to_signed(draw(scene))[None].repeat(N, axis=0)
PROMPT = "a big blue circle left of a small orange star on a white background"
strengths = (0.3, 0.6) if QUICK else (0.2, 0.4, 0.6, 0.8, 1.0)
rows, distances = [x], []
for strength in strengths:
    *_, z = model.image_to_image(x, [PROMPT], Rng(1), strength, Sampling(steps=STEPS))
    rows.append(model.decode(z))
    distances.append(float(np.abs(rows[-1] - x).mean()))
show("25_image_to_image.png", rows, ["the picture", *(f"strength {s}" for s in strengths)])
print("how far it moved, mean over pixels:", dict(zip(strengths, np.round(distances, 3).tolist(), strict=True)))
assert distances[0] < distances[-1]

# %% [markdown]
# ![image to image](out/25_image_to_image.png)
#
# A little noise hides too little: the circle stays red, whatever the text says. All of it hides everything, and the
# picture is drawn anew. In between the layout is kept and the colour changes.
#
# ## Inpainting
#
# RePaint (lesson 13) on the latents. A latent counts as known if all of its 4 x 4 pixels are. What comes out of the
# decoder is near the known pixels, since the autoencoder is not exact; those are put back at the end.

# %%
mask = np.ones((32, 32), bool)
mask[:, 16:] = False  # the half where the star is
rows = [x, np.where(mask[..., None], x, 1)]
texts = (*(f"a big red circle left of a small {thing} on white" for thing in ("blue cross", "pink square")), "")
for text in texts:
    *_, z = model.inpaint(x, mask, [text], Rng(2), 10 if QUICK else STEPS)
    painted = with_known(model.decode(z), x, mask)
    assert (painted[:, mask] == x[:, mask]).all()
    rows.append(painted)
show("25_inpainting.png", rows, ["the picture", "what is known", *(text or "(no text)" for text in texts)])
for text, row in zip(texts, rows[2:], strict=True):
    there = [[f"{item.colour} {item.shape}" for item in scene.items] for scene in reader.read(row)]
    print(f"{text or '(no text)'!r}: the reader sees", "; ".join(" and ".join(names) for names in there[:3]), "...")

# %% [markdown]
# ![inpainting](out/25_inpainting.png)
#
# The text speaks of the whole picture, as the texts of training do. A model that is shown the mask in training, as
# GLIDE is, needs no walking back and forth.
#
# ## From one prompt to another
#
# The outputs for the two prompts are mixed,
# $(1-w)\,\varepsilon_\theta(z_t, t, y_1) + w\,\varepsilon_\theta(z_t, t, y_2)$, all from one $z_T$.

# %%
ways = [
    ("a big red circle on a white background", "a big blue square on a white background"),
    ("a small green star on the left on grey", "a small green star on the right on grey"),
]
rows = []
for first, second in ways:
    *_, z = model.interpolate(first, second, 4 if QUICK else 9, Rng(3), Sampling(steps=STEPS))
    rows.append(model.decode(z))
show("25_from_prompt_to_prompt.png", rows, [f"{a}\nto {b}" for a, b in ways])

# %% [markdown]
# ![from prompt to prompt](out/25_from_prompt_to_prompt.png)
#
# Colours glide, places jump or fade: half of a star on the left and half of one on the right is not a star in the
# middle. Where all pictures of a text look alike, mixing two texts mixes pictures; where a choice must be made, it is
# made at some $w$.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Which strength gives the picture back as the autoencoder makes it?
# 2. The mask hides a square of 10 x 10 pixels that begins at pixel 11. How many of the 64 latents are not known?

# %%
strength_of_nothing = None
latents_unknown = None

if strength_of_nothing is not None:
    assert strength_of_nothing == 0, "no noise, no steps"
    print("1 is right")
if latents_unknown is not None:
    assert latents_unknown == 16, "pixels 11 to 20 lie in the latents 2 to 5 along each side"
    print("2 is right")
