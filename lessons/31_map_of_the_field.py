# %% [markdown]
# # Lesson 31: a map of the field
#
# Four systems draw what a text says, and you have met the parts of all of them. Here they stand side by side, on the
# same prompts, each in miniature: **Stable Diffusion** (E28), **DALL-E 2** (E29), **GLIDE** (E36) and **Imagen** (E37).
#
# You will see
# - where the text enters each of them, and what it is that is diffused;
# - what a picture costs, counted product by product;
# - how often the picture shows what the text says, and how much pictures of one text differ;
# - what each idea bought.
#
# Run it from anywhere: `python lessons/31_map_of_the_field.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import contextlib
import os
import pathlib
import textwrap
from collections import Counter

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.autograd import Tensor
from tinydiff.data.captioned import Shapes
from tinydiff.diffusion import Sampling, last
from tinydiff.image import grid
from tinydiff.metrics import diversity
from tinydiff.models import CLIP, DallE2, Imagen, SceneReader, StableDiffusion, TextInpainting, told_texts
from tinydiff.models.cascade import larger, smaller
from tinydiff.models.glide import USUAL_GUIDANCE
from tinydiff.models.imagen import PERCENTILE
from tinydiff.models.prior import DiffusionPrior
from tinydiff.nn import Conv2d, Linear, UNet

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer pictures and steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
STEPS = 2 if QUICK else 20
HOW = Sampling(steps=STEPS)
DYNAMIC = Sampling(steps=STEPS, clip=PERCENTILE)

stable, dalle2, imagen = StableDiffusion.load(), DallE2.load(), Imagen.load()
glide, clip, reader = TextInpainting.load("glide"), CLIP.load("clip"), SceneReader.load("scene_reader")

# %% [markdown]
# ## Four ways from a text to a picture
#
# | | the text enters | is diffused |
# |---|---|---|
# | Stable Diffusion | as CLIP's states of its tokens, by cross-attention | the **latents** of an autoencoder |
# | DALL-E 2 | through the prior, and by cross-attention, too | an **embedding**; pixels; more pixels |
# | GLIDE | as in Stable Diffusion | **pixels** |
# | Imagen | so, too, but from an encoder that learned from **texts alone** | few pixels; **more**; more still |
#
# The real GLIDE made its pictures larger, too, and trained its own transformer from scratch, where ours reads what CLIP
# says. The real U-Nets differ in much else. What is left in miniature is the idea.
#
# Each becomes a function from prompts to pictures. GLIDE is shown nothing of any picture, and so draws all of it.

# %%


def by_stable_diffusion(prompts, rng):
    """Latents, decoded (E28)."""
    return stable.decode(last(stable.text_to_image(prompts, rng, HOW)))


def by_dalle2(prompts, rng):
    """An embedding, a picture of it, a larger one (E29)."""
    return last(dalle2.text_to_image(prompts, rng, HOW))


def by_glide(prompts, rng):
    """Pixels (E35, E36)."""
    told, nothing = told_texts(clip, prompts), told_texts(clip, "")
    return last(glide.sample(told, rng, HOW, guidance=USUAL_GUIDANCE, negative=nothing))


def by_imagen(prompts, rng):
    """A small picture, then larger ones (E37)."""
    return last(imagen.text_to_image(prompts, rng, DYNAMIC))


SYSTEMS = {
    "Stable Diffusion": by_stable_diffusion,
    "DALL-E 2": by_dalle2,
    "GLIDE": by_glide,
    "Imagen": by_imagen,
}

# %% [markdown]
# ## What is diffused, and by how many parameters
#
# Each stage diffuses an array of some size. A U-Net may gather patches of it first: then it begins with fewer places.
# The parameters are those that a drawing needs: an autoencoder's encoder and CLIP's image tower stay at home.


# %%
def numbers(stage):
    """How many numbers one picture is in this stage of diffusion."""
    return stage.config.unet.channels * int(np.prod(stage.config.size))


def parameters(*parts):
    """How many parameters these have together."""
    return sum(part.count_parameters() for part in parts)


stages = {
    "Stable Diffusion": [stable.unet],
    "DALL-E 2": list(dalle2.stages),
    "GLIDE": [glide],
    "Imagen": list(imagen.stages),
}
diffused = {name: [numbers(stage) for stage in some] for name, some in stages.items()}
diffused["DALL-E 2"].insert(0, dalle2.prior.config.embedding)
begins = {name: [stage.config.size[0] // stage.config.unet.patch for stage in some] for name, some in stages.items()}
size = {
    "Stable Diffusion": parameters(clip.text, stable.unet, stable.vae.decoder, stable.vae.conv_z),
    "DALL-E 2": parameters(clip.text, clip.text_head, dalle2.prior, *dalle2.stages),
    "GLIDE": parameters(clip.text, glide),
    "Imagen": parameters(imagen.text_encoder, *imagen.stages),
}

# %% [markdown]
# ## A meter
#
# Seconds depend on the machine, and on what else it does. Products do not. Almost all of the work of these networks is
# done by two kinds of layers, linear ones and convolutions. One that puts out $n$ numbers at each of $m$ places does
# $m$ times as many multiplications as it has weights, and as many additions. (Attention has two more products, of
# tokens with tokens, which are left out.) We put a meter on these layers for as long as something is drawn, and another
# one on the networks that are asked step by step.


# %%
@contextlib.contextmanager
def metered():
    """Count, while this is open, the multiply-adds of all layers, and of how many inputs networks were asked."""
    count, plain = Counter(), {kind: kind.__call__ for kind in (Linear, Conv2d, UNet, DiffusionPrior)}

    def layer(kind):
        def call(self, *inputs):
            y = plain[kind](self, *inputs)
            count["products"] += y.size // y.shape[-1] * self.weight.size
            return y

        return call

    def network(kind):
        def call(self, x, *others, **named):
            count[kind.__name__] += x.shape[0]
            before = count["products"]
            y = plain[kind](self, x, *others, **named)
            count[f"products of {kind.__name__}"] += count["products"] - before
            return y

        return call

    try:
        for kind in plain:
            kind.__call__ = (layer if kind in (Linear, Conv2d) else network)(kind)
        yield count
    finally:
        for kind, call in plain.items():
            kind.__call__ = call


x = Tensor(Rng(0).normal((2, 8, 8, 3)))
with metered() as tried:
    Linear(3, 5, Rng(1))(x), Conv2d(3, 7, Rng(1), stride=2)(x)  # as one counts by hand:
assert tried["products"] == 2 * 8 * 8 * 3 * 5 + 2 * 4 * 4 * (3 * 3 * 3) * 7

# %% [markdown]
# ## The same prompts
#
# One thing, named with all that there is to it; two things, likewise; and a few prompts that leave much open, each
# drawn several times. All systems take the same number of steps of DDIM, each with the guidance that is usual with it.
# The scene reader looks at every picture at 32 x 32 pixels, larger ones made smaller; diversity is the root mean square
# difference of two pictures of one prompt, at that size.

# %%
N, K, SHOWN = (2, 2, 2) if QUICK else (12, 6, 4)  # of each kind; of an open prompt; on the sheet
asked = {
    "one thing": Shapes(number=1, full=True).draw(Rng(1), N, "test")[1],
    "two things": Shapes(number=2, full=True).draw(Rng(2), N, "test")[1],
    "open": [
        prompt for prompt in ("a red star", "a blue circle", "a big thing")[: 2 if QUICK else 3] for _ in range(K)
    ],
}
prompts = [prompt for some in asked.values() for prompt in some]
right, spread, cost, sheet, copies = {}, {}, {}, [], []
for name, draw in SYSTEMS.items():
    with metered() as count:
        pictures = np.clip(draw(prompts, Rng(3)), -1, 1)
    cost[name] = {what: total / len(prompts) for what, total in count.items()}
    small = smaller(pictures, pictures.shape[1] // reader.config.size)
    fits = reader.fits(small[: 2 * N], prompts[: 2 * N])
    right[name] = {"one thing": fits[:N].mean(), "two things": fits[N:].mean()}
    spread[name] = diversity(small[2 * N :].reshape(-1, K, small[0].size))
    whole = larger(pictures, 64 // pictures.shape[1])  # 32 pixels a side, each drawn as 2 x 2
    sheet.append(np.concatenate([whole[:SHOWN], whole[N : N + SHOWN]]))
    copies.append(whole[2 * N : 2 * N + K])


def show(name, rows, titles):
    """Draw a row of pictures for each system, with a title over each column."""
    picture, n = grid(np.concatenate(rows), columns=len(rows[0])), len(rows[0])
    figure, axis = plt.subplots(figsize=(1.15 * n + 1.4, 1.15 * len(rows) + 0.9), layout="constrained")
    axis.imshow(picture, interpolation="nearest")
    axis.xaxis.tick_top()
    axis.set_xticks(66 * np.arange(n) + 32, [textwrap.fill(title, 16) for title in titles], fontsize=7)
    axis.set_yticks(66 * np.arange(len(rows)) + 32, SYSTEMS, fontsize=9)
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    figure.savefig(OUT / name, dpi=60 if QUICK else 130)
    plt.close(figure)


show("31_contact_sheet.png", sheet, asked["one thing"][:SHOWN] + asked["two things"][:SHOWN])
show("31_diversity.png", copies, asked["open"][:K])

# %% [markdown]
# ![contact sheet](out/31_contact_sheet.png)
# ![six pictures of one prompt](out/31_diversity.png)
#
# ## The table

# %%
least = min(each["products"] for each in cost.values())


def row(title, value):
    """A row of the table: a value for each system."""
    print(f"| {title:34} | " + " | ".join(f"{value(name):>25}" for name in SYSTEMS) + " |")


row("", str)
print(f"|{'-' * 36}|" + f"{'-' * 27}|" * len(SYSTEMS))
row("numbers that are diffused", lambda name: " + ".join(map(str, diffused[name])))
row("places that U-Nets begin with", lambda name: " + ".join(f"{side} x {side}" for side in begins[name]))
row("pixels of the picture", lambda name: "64 x 64" if len(stages[name]) > 1 else "32 x 32")
row("parameters that draw, millions", lambda name: f"{size[name] / 1e6:.1f}")
row("U-Net evaluations", lambda name: f"{cost[name]['UNet']:.0f}")
row("prior evaluations", lambda name: f"{cost[name].get('DiffusionPrior', 0):.0f}")
row("multiply-adds, 10^9", lambda name: f"{cost[name]['products'] / 1e9:.2f}")
row("  of them in U-Nets", lambda name: f"{cost[name]['products of UNet'] / cost[name]['products']:.0%}")
row("  as a ratio to the fewest", lambda name: f"{cost[name]['products'] / least:.1f}")
for kind in ("one thing", "two things"):
    row(f"{kind}: as the text says", lambda name, kind=kind: f"{right[name][kind]:.0%}")
row("two pictures of a prompt differ by", lambda name: f"{spread[name].value:.2f} ± {spread[name].error:.2f}")
print(
    f"\nper picture, {STEPS} steps of DDIM; the shares are of {N} pictures each, and have a standard error of ", end=""
)
print(f"up to {50 / N**0.5:.0f} points")

# %% [markdown]
# ## What each idea bought
#
# **Latents** are the least to diffuse. An autoencoder that is trained once makes 3072 numbers into 256, and then every
# step, every guidance, every training is done on those; the decoder, one pass at the end, puts the pixels back. That
# is why Stable Diffusion, and nearly all that came after it, fits on a graphics card at home: the larger the picture,
# the more is saved. Why is it not twelve times here? Our pixel models gather patches of pixels before they begin, and
# the latent one has spent what it saved on more parameters. The price is paid at the end: what the autoencoder cannot
# describe, no diffusion can draw.
#
# **An embedding first** buys a place to stand: an image *has* an embedding, and one can vary it, walk from one to
# another, move it along a text (lesson 28). It also buys choice: of what the text leaves open, the prior decides a part
# before anything is drawn. The price is a chain of three models, each of which may err. The prior is small, but it is
# asked twice as often as it has steps, for two candidates, and reads the whole text each time: what is missing in the
# row of the U-Nets is mostly its work. And what CLIP does not hold about a scene, the decoder must get from the text
# again.
#
# **Pixels, straight** is the plainest: one network, one loss, nothing before it and nothing after. Each step works at
# the full size of the picture, and so the cost of a step grows with its area (where there is attention between all
# places, with the area squared). It is easy to show such a network more, and that is what GLIDE bought: a mask and
# a picture as further channels, and it paints into what is there (lesson 29).
#
# **A reader of texts, and a cascade.** Imagen decides what is where among few pixels, where a step is cheap and little
# is to be learned, and lets two more networks add the others. All that it knows of language was learned without
# pictures, from texts, of which there is no end. Our reader has seen too few of them: it knows what each word may stand
# beside, and not well enough which thing is above which; told by CLIP, the same network does better (lesson 30).
# Imagen's authors, whose reader is thousands of times as large, found that an even larger one helped more than a larger
# U-Net.
#
# Compare with care. Our four were trained on the same scenes, but not for as long, and their networks are not of one
# size. Two of them draw four times as many pixels. A difference of a few points in the table is that of these four
# small models, and of few pictures; `examples/evaluate_text_to_image.py --model NAME` asks each for 500 prompts of a
# kind. What does not depend on training are the upper rows: what is diffused, and what that costs.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. How often does Imagen ask a U-Net for one picture drawn in `steps` steps (no more than 27), with guidance in the
#    small picture and none in the two larger ones? A function of `steps`.
# 2. Stable Diffusion of the paper has latents of 4 channels, an eighth as high and as wide as the picture. How many
#    times fewer numbers are these than a picture of 512 x 512 has? And ours?

# %%
evaluations, fewer, fewer_ours = None, None, None

if evaluations is not None:
    assert evaluations(STEPS) == round(cost["Imagen"]["UNet"]), "guidance asks twice, once with the text, once without"
    print("exercise 1 is right")
if fewer is not None:
    assert fewer == 3 * 512**2 / (4 * (512 // 8) ** 2) and fewer_ours == 3 * 32**2 / diffused["Stable Diffusion"][0]
    print("exercise 2 is right: and the larger the picture, the more that is")
