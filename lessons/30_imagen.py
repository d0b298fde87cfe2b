# %% [markdown]
# # Lesson 30: Imagen, a cascade that listens to a reader
#
# Imagen draws a small picture of a text and makes it larger with two more diffusion models (**E37**). Its ideas are
# small enough to be taken apart here.
#
# You will see
# - the cascade: text, small picture, larger picture, large picture;
# - what the text still tells a model that is shown the small picture;
# - why noise is put on the small picture on purpose, and how much;
# - what strong guidance does to pixels, and two ways to keep them in range;
# - a text encoder that never saw a picture: what it knows, and what texts alone cannot tell it.
#
# Run it from anywhere: `python lessons/30_imagen.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data.captioned import Shapes
from tinydiff.data.shapes import draw
from tinydiff.diffusion import Sampling, last
from tinydiff.image import fit, grid, to_signed, to_uint8
from tinydiff.metrics import psnr
from tinydiff.models import CLIP, Imagen, SceneReader, told_texts
from tinydiff.models.cascade import larger, smaller
from tinydiff.models.imagen import PERCENTILE

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer pictures and steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"
N, STEPS = (2, 2) if QUICK else (8, 15)
model, reader = Imagen.load(), SceneReader.load("scene_reader")


def show(name, rows, titles, inch=0.02):
    """Draw rows of pictures, each with a title to its left."""
    sheet, height = grid(np.concatenate(rows), columns=len(rows[0])), rows[0].shape[1]
    figure, axis = plt.subplots(figsize=(inch * sheet.shape[1] + 2.6, inch * sheet.shape[0]), layout="constrained")
    axis.imshow(sheet)
    axis.set_yticks((height + 2) * np.arange(len(rows)) + height // 2, [textwrap.fill(t, 28) for t in titles])
    axis.set(xticks=[])
    axis.tick_params(length=0, labelsize=8)
    axis.set_frame_on(False)
    figure.savefig(OUT / name, dpi=60 if QUICK else 130)
    plt.close(figure)


def bare(*axes):
    """Take the upper and the right line off some axes."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def right(pictures, texts):
    """The share of small pictures in which the scene reader sees all that the text of each names."""
    return reader.fits(pictures, texts).mean()


# %% [markdown]
# ## The cascade (E37)
#
# $$\underbrace{p(x_{16} \mid y)}_{\text{base model}} \;\cdot\;
# \underbrace{p(x_{32} \mid x_{16}, y)}_{\text{upsampler}} \;\cdot\;
# \underbrace{p(x_{64} \mid x_{32})}_{\text{upsampler}}$$
#
# The base model has only 16 x 16 pixels to get right, and what is where is decided there, where it is cheap: after as
# many pictures of training as this one took to draw shapes, U-Nets of its kind that began with 32 x 32 drew blobs. The
# real Imagen goes from 64 to 256 to 1024. Of its upsamplers, the first is told the text as ours is; our last one is
# not: it need not know what a star is, it draws edges.

# %%
texts = Shapes(full=True).draw(Rng(1), N, "test")[1]
how = Sampling(steps=STEPS, clip=PERCENTILE)
states = [x.clip(-1, 1) for x in model.text_to_image(texts, Rng(2), how)]
ends = [STEPS * (i + 1) + i for i in range(3)]  # of the three stages
rows = [states[0], states[STEPS // 2], *(states[end] for end in ends)]
titles = ["x_T, 16 x 16", "half-way", "16 x 16 pixels", "32 x 32 pixels", "64 x 64 pixels"]
show("30_cascade.png", rows, titles)
print(f"{right(states[ends[1]][:, ::2, ::2], texts):.0%} of {N} pictures of 32 x 32 show what the text says, "
      f"{right(smaller(states[-1], 2), texts):.0%} of the large ones, made small again")  # fmt: skip

# %% [markdown]
# ![the cascade](out/30_cascade.png)
#
# ## What is left to say
#
# A small star has five pixels across in the small picture, and so has a small circle. Which it is, the upsampler can
# ask the text. We give it small pictures of scenes of one small thing, and tell it the truth, nothing, or of another
# shape.

# %%
first, last_one = model.upsamplers
K = 2 if QUICK else 16
scenes = Shapes(number=1, full=True).scenes(Rng(10), 40 * K, "test")
scenes = [scene for scene in scenes if scene.items[0].size == "small"][:K]
blurred = smaller(to_signed(np.stack([draw(scene) for scene in scenes])), 2)
item = [scene.items[0] for scene in scenes]
other = {
    "circle": "star",
    "star": "circle",
    "square": "ring",
    "ring": "square",
    "triangle": "cross",
    "cross": "triangle",
}
told_it = {
    "the truth": [f"a small {i.colour} {i.shape}" for i in item],
    "nothing": [""] * len(item),
    "another shape": [f"a small {i.colour} {other[i.shape]}" for i in item],
}
rows = [larger(blurred, 2)]
for name, captions in told_it.items():
    rows.append(last(first.upsample(blurred, Rng(11), Sampling(steps=max(2, STEPS)), told=model.text(captions))))
    seen = [scene.items[0].shape if scene.items else None for scene in reader.read(rows[-1])]
    shares = [np.mean([a == b for a, b in zip(seen, of, strict=True)])
              for of in ([i.shape for i in item], [other[i.shape] for i in item])]  # fmt: skip
    print(f"told {name}: {shares[0]:.0%} have the true shape, {shares[1]:.0%} the other one")
show("30_told.png", [row[:8] for row in rows], ["16 x 16", *(f"told {name}" for name in told_it)], 0.03)

# %% [markdown]
# ![told the truth, nothing, another shape](out/30_told.png)
#
# ## Noise on purpose
#
# The upsampler learned from pairs: a picture, and the same picture made small. At work, what it is shown was *drawn*,
# and has flaws that no picture made small has. So in training the small picture is made noisy, and the network is told
# how much:
#
# $$\tilde x_{\text{small}} = \sqrt{\bar\alpha_s}\, x_{\text{small}} + \sqrt{1-\bar\alpha_s}\,\varepsilon,
# \qquad s \sim \text{Uniform}\{0, \dots, S\}$$
#
# At a high level only rough shapes are left to be believed, and it draws the rest as pictures are. We take scenes whose
# large pictures are known, and give it their small ones: once clean, once with flaws (each pixel a little off). PSNR
# says how near the result is to the truth.

# %%
scenes = Shapes().scenes(Rng(3), N, "test")
truth = to_signed(np.stack([draw(scene, 64) for scene in scenes]))
clean = smaller(truth, 2)
flawed = np.clip(clean + 0.15 * Rng(4).normal(clean.shape), -1, 1)
S = last_one.config.S
levels = (0, S // 6) if QUICK else (0, S // 24, S // 12, S // 6, S // 3, S)
up = Sampling(steps=max(2, STEPS // 2))


def enlarged(low, level):
    """What the upsampler makes of small pictures."""
    return last(last_one.upsample(low, Rng(5), up, level=level))


def bicubic(low):
    """What a graphics program makes of them."""
    return to_signed(np.stack([fit(x, (64, 64)) for x in to_uint8(low)]))


made = {name: [enlarged(low, level) for level in levels] for name, low in (("clean", clean), ("flawed", flawed))}
figure, axis = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
places = np.sqrt(levels)  # so that the low levels are not one on top of the other
for (name, pictures), low, color in zip(made.items(), (clean, flawed), (BLUE, RED), strict=True):
    quality = [psnr(x, truth).mean() for x in pictures]
    axis.plot(places, quality, "o-", color=color, label=f"upsampler, {name} small pictures")
    axis.axhline(psnr(bicubic(low), truth).mean(), color=color, ls=":", label=f"bicubic, {name}")
    print(f"{name}: PSNR " + ", ".join(f"{q:.1f} at {s}" for q, s in zip(quality, levels, strict=True)), end="; ")
    print(f"bicubic {psnr(bicubic(low), truth).mean():.1f}, pixels repeated {psnr(larger(low, 2), truth).mean():.1f}")
axis.set(xlabel="level of the noise, s", ylabel="PSNR in dB", xticks=places, xticklabels=levels)
axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1))
bare(axis)
figure.savefig(OUT / "30_levels.png", dpi=60 if QUICK else 130)
plt.close(figure)

shown_levels = levels if QUICK else (0, S // 6, S)
rows = [larger(flawed, 2), *(made["flawed"][levels.index(level)] for level in shown_levels), truth]
show("30_flaws.png", rows, ["small, with flaws", *(f"level {level}" for level in shown_levels), "the truth"])

# %% [markdown]
# ![levels](out/30_levels.png)
# ![flaws](out/30_flaws.png)
#
# Two things to see. Flaws that ruin a bicubic picture hardly matter to the upsampler, **even at level 0**: it has seen
# noise on small pictures all its life, and takes flaws for more of it. One that had learned from clean pictures alone
# would have no reason not to believe them. And every level costs: noise that was put on hides something that was true,
# and the curves fall. What a high level is for are flaws that do not look like noise, such as a crooked edge that a
# model drew: where the network sees less, it draws more of its own. Whether that is better, no PSNR can say, since a
# drawn picture has no truth beside it; `python examples/imagen.py "..." --level 200` shows it.
#
# ## Thresholds
#
# Guidance (E35) makes pictures fit the text better, and the more there is of it, the further $x_0$ is driven beyond
# $[-1, 1]$, where no picture is. **Static** thresholds cut it off there. **Dynamic** ones take $s$, a high percentile
# of $|x_0|$ in the picture, and if it is above 1, cut off at $s$ and divide by it:
#
# $$s = \max\big(1, \mathrm{percentile}(|x_0|)\big), \qquad x_0 \leftarrow \mathrm{clip}(x_0, -s, s)\,/\,s$$

# %%
strengths = (1.0, 6.0) if QUICK else (1.0, 3.0, 6.0, 10.0)
n = N if QUICK else 16
real, asked = Shapes(full=True).draw(Rng(6), n, "test")
told, nothing = model.text(asked), model.text("")
ways = {"static": True, f"percentile {PERCENTILE:g}": PERCENTILE, "percentile 99.5": 99.5}
shares: dict[str, list[float]] = {name: [] for name in ways}
contrast: dict[str, list[float]] = {name: [] for name in ways}
rows, titles = [], []
for s in strengths:
    for name, clip in ways.items():
        way = Sampling(steps=STEPS, clip=clip)
        pictures = last(model.base.sample(told, Rng(7), way, guidance=s, negative=nothing))
        made_larger = last(first.upsample(pictures, Rng(12), up, told=told))
        shares[name].append(right(made_larger, asked))
        contrast[name].append(pictures.std())
        if s == strengths[-1]:
            rows, titles = [*rows, larger(pictures[:8], 2)], [*titles, f"guidance {s:g}, {name}"]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for axis, values, title in zip(
    axes, (shares, contrast), ("shows what the text says, at 32 x 32", "contrast, at 16 x 16"), strict=True
):
    for (name, of_each), color in zip(values.items(), (GREY, GREEN, RED), strict=True):
        axis.plot(strengths, of_each, "o-", color=color, label=name)
    axis.set(xlabel="guidance s", title=title)
axes[1].axhline(smaller(to_signed(real), 2).std(), color="black", ls=":", lw=1, label="real pictures")
axes[1].legend(frameon=False, fontsize=8)
bare(*axes)
figure.savefig(OUT / "30_thresholds.png", dpi=60 if QUICK else 130)
plt.close(figure)
show("30_guided.png", rows, titles, 0.03)
for name in ways:
    print(f"{name}: right {np.round(shares[name], 2)}, contrast {np.round(contrast[name], 2)}")

# %% [markdown]
# ![thresholds](out/30_thresholds.png)
# ![guided](out/30_guided.png)
#
# On photographs Imagen gains much by dynamic thresholds: cut off, ever more of a photograph is pure black or white. Our
# pictures are of another kind. A white background *is* pure white, all of it, and cutting off at 1 is just right for
# it; divide by the brightest few pixels instead, and the white turns grey. A lower percentile divides by less. What is
# good for photographs need not be good for shapes: measure it on your own data.
#
# ## A reader that never saw a picture
#
# CLIP's text tower learned from pictures. Imagen's text encoder learned from texts, of which there are far more, and
# was left as it was. Ours hid a fifth of the words of captions and learned to guess them (BERT; Devlin et al. 2019):
#
# $$L = -\frac{1}{|H|}\sum_{i \in H} \log p_\theta(y_i \mid y \text{ with } H \text{ hidden})$$
#
# What it learned of the language:

# %%
encoder = model.text_encoder
for text in (
    "a big red ___ on a white background",
    "a ___ red star on white",
    "a red star ___ of a blue ring",
    "a small star at the ___ left",
    "an ___ ring",
):
    print(f"{text:40}", ", ".join(f"{word} {p:.2f}" for word, p in encoder.fill(text, 4)))

# %% [markdown]
# Things, sizes, directions, and that "an" comes before "orange". But what is a disc? It may stand wherever a circle
# may, and so may a star. That a disc and a circle *look* alike is in no text. CLIP has seen both.

# %%
NOUNS = ["circle", "disc", "square", "box", "ring", "hoop", "cross", "plus", "triangle", "star"]
clip = CLIP.load("clip")


def noun_states(encoder):
    """What an encoder makes of each noun, averaged over some captions, without what all have in common: unit rows."""
    means = []
    for noun in NOUNS:
        told = told_texts(
            encoder, [f"a {size} {colour} {noun}" for size in ("big", "small") for colour in ("red", "blue")]
        )
        means.append(told.states[np.arange(4), told.mask.sum(axis=1) - 2].mean(axis=0))  # the last token before END
    centred = np.array(means) - np.mean(means, axis=0)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
for axis, (name, one) in zip(axes, {"CLIP's text tower": clip, "trained on texts alone": encoder}.items(), strict=True):
    z = noun_states(one)
    cosines = z @ z.T
    picture = axis.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set(title=name, xticks=range(10), yticks=range(10), yticklabels=NOUNS)
    axis.set_xticklabels(NOUNS, rotation=60)
    synonyms = [cosines[i, i + 1] for i in (0, 2, 4, 6)]
    others = [cosines[i, j] for i in range(10) for j in range(i) if not (i % 2 and j == i - 1 and i < 8)]
    print(f"{name}: cosine {np.mean(synonyms):.2f} for two names of one shape, {np.mean(others):.2f} for two shapes")
figure.colorbar(picture, ax=axes, label="cosine", shrink=0.8)
figure.savefig(OUT / "30_words.png", dpi=60 if QUICK else 130)
plt.close(figure)

# %% [markdown]
# ![words](out/30_words.png)
#
# On the left, pairs of names for one shape stand out: pictures taught them. On the right each word is on its own. (Not
# quite: the captions of training leave out some pairs of shape and colour, the same ones for "disc" as for "circle",
# and even that can be read from texts.) A U-Net that listens to the right one can still learn what a disc is, since
# *it* sees pictures: it only has to do the work itself. Does it? The base model was trained a second time, in the same
# way but told by CLIP. Of 500 captions of one thing, both draw everything right in 100 %; of 500 of two things, CLIP's
# listener does in 89 %, and this one in 52 %: mostly it draws the right things, one in the place of the other. To guess
# a hidden word, it never mattered which thing is above which; CLIP, which was shown scenes that differ in nothing else,
# had to know.
#
# Imagen's authors found T5 and CLIP equal by automatic scores, and T5 preferred by people where texts are long and
# intricate. Our texts are neither.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Half of the numbers of a picture's $x_0$ are 0.5, the others are -2. What are they after dynamic thresholds at
#    percentile 100? And after static ones? Two pairs of numbers.
# 2. At level $s$ the small picture is weighted by $\sqrt{\bar\alpha_s}$ and the noise by $\sqrt{1-\bar\alpha_s}$. What
#    is the signal-to-noise ratio, the square of the first over that of the second, as a function of $\bar\alpha_s$?

# %%
dynamic, static, snr = None, None, None

if dynamic is not None:
    assert np.allclose(dynamic, (0.25, -1)) and np.allclose(static, (0.5, -1))
    print("exercise 1 is right")
if snr is not None:
    assert np.isclose(snr(0.9), 9) and np.isclose(snr(0.5), 1)
    print("exercise 2 is right")
