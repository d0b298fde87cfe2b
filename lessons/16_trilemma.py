# %% [markdown]
# # Lesson 16: the trilemma, or good, varied, fast: choose two
#
# Three families of models turn noise $z \sim \mathcal N(0, I)$ into images. Each is excellent at two of three things
# and poor at the third, which Xiao et al. (2022) call the *generative trilemma* (**E39**):
#
# | | quality | diversity | speed |
# |---|---|---|---|
# | GAN: a generator that must fool a critic | yes | **no** | yes |
# | VAE: a decoder that must rebuild what was described | **no** | yes | yes |
# | diffusion: many small steps of denoising | yes | yes | **no** |
#
# A table like this is easily said. Here we train the first two, take the third from the package, and measure. You will
# see
# - what a **VAE** and a **GAN** minimise, and what that does to their pictures;
# - **precision** and **recall**: quality and diversity as two numbers that can be told apart;
# - the triangle, drawn from measurements;
# - that the third corner is not fixed: a diffusion model can be asked for fewer steps.
#
# Run it from anywhere: `python lessons/16_trilemma.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data import mnist
from tinydiff.diffusion import Sampling, last
from tinydiff.image import grid, to_signed
from tinydiff.metrics import copying, frechet_distance, precision_recall
from tinydiff.models import GAN, Classifier, DigitVAE, DigitVAEConfig, GANConfig, PixelDiffusion
from tinydiff.optim import EMA, Adam

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"

digits = mnist.load("embedded")
images = to_signed(digits.images[Rng(0).permutation(len(digits))][..., None])  # (4500, 28, 28, 1) in [-1, 1]


def train(model, steps, lr, beta):
    """Minimise model.loss on batches of 64 digits; the model ends with the average of its weights."""
    adam = Adam(model.parameters(), betas=(beta, 0.99))
    average, losses = EMA(adam, 0.99), []
    for step in range(steps):
        batch = images[Rng(1).at(step).integers(0, len(images), (64,))]
        loss = model.loss(batch, Rng(2).at(step))
        loss.backward()
        adam.step(lr)
        average.update()
        losses.append(loss.item())
    adam.vector[...] = average.average
    return losses


def show(file, rows, names):
    """Draw a row of pictures for each name, and save the figure."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.72 * len(rows) + 0.1), squeeze=False)
    for (axis,), row, name in zip(axes, rows, names, strict=True):
        axis.imshow(grid(row, columns=len(row)), cmap="gray")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## The VAE: describe, then draw
#
# An encoder describes an image by a Gaussian over 16 numbers, $q(z \mid x) = \mathcal N(m, s^2)$; a decoder draws $\hat
# x(z)$. Both minimise a bound on $-\log p(x)$ (Kingma and Welling 2014), the ancestor of the bound of diffusion (E11):
#
# $$L = E_q\left[\frac{\lVert x - \hat x(z)\rVert^2}{2\sigma^2}\right]
#     + \mathrm{KL}\left(q(z \mid x)\,\Vert\,\mathcal N(0, I)\right), \qquad z = m + s\,\varepsilon.$$
#
# Every training image must be described, so none is forgotten. But where a description fits several images, the squared
# error is least for their *mean*, and the mean of sharp images is a blurred one. And $z$ drawn from noise may fall
# between the descriptions of digits, where the decoder never learned to draw: there it draws what lies between them.

# %%
vae = DigitVAE(DigitVAEConfig(), Rng(3))
vae_losses = train(vae, steps=10 if QUICK else 300, lr=3e-3, beta=0.9)
print(f"VAE: {vae.count_parameters():,} parameters, {vae_losses[0]:.0f} nats at first, {vae_losses[-1]:.0f} at last")
some = images[:14]
show(
    "16_vae.png",
    [some, vae.reconstruct(some), vae.sample(14, Rng(4))],
    ["digits", "described\nand redrawn", "drawn from\nnoise"],
)

# %% [markdown]
# ![the VAE](out/16_vae.png)
#
# ## The GAN: fool a critic
#
# A discriminator $D$ learns to tell digits from drawings, a generator $G$ to draw what $D$ takes for a digit
# (Goodfellow et al. 2014). With $\mathrm{softplus}(a) = \log(1 + e^a)$ the two minimise
#
# $$L_D = E[\mathrm{softplus}(-D(x))] + E[\mathrm{softplus}(D(G(z)))]
#     + \tfrac{\gamma}{2}\, E\lVert\nabla D(x)\rVert^2, \qquad L_G = E[\mathrm{softplus}(-D(G(z)))].$$
#
# No pixel is ever compared with another, so nothing is averaged: each drawing must look like *some* digit. But nothing
# asks $G$ for *every* digit either. And the losses say little: they are the score of a game, which may stay where it is
# while both players improve. (The last term of $L_D$ keeps the game from blowing up; `models/gan.py` says how it is
# estimated.)

# %%
gan = GAN(GANConfig(), Rng(5))
gan_losses = train(gan, steps=10 if QUICK else 300, lr=1.5e-3, beta=0.5)
print(f"GAN: {gan.count_parameters():,} parameters")

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, losses, title, color in zip(
    axes,
    (vae_losses, gan_losses),
    ("VAE: a bound that falls", r"GAN: the score $L_D + L_G$"),
    (GREEN, RED),
    strict=True,
):
    axis.plot(np.arange(1, 1 + len(losses)), losses, color=color, lw=1)
    axis.set(xlabel="step", title=title)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_yscale("log")
axes[0].set_yticks([200, 500, 1000, 2000], [200, 500, 1000, 2000])
axes[0].minorticks_off()
figure.tight_layout()
figure.savefig(OUT / "16_losses.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![two kinds of losses](out/16_losses.png)
#
# ## Three ways from noise to an image
#
# GAN and VAE draw in one pass of one small network. The diffusion model that comes with the package asks its U-Net 50
# times for each image (DDIM, without guidance). It was also trained for longer, and on more digits:
# `examples/trilemma.py` trains all three on the same data, for as long as you like.

# %%
diffusion = PixelDiffusion.load("mnist")
N = 20 if QUICK else 200


def with_steps(steps):
    """A function that draws n digits with the diffusion model in this many steps."""
    how = Sampling("dpm" if steps <= 20 else "ddim", steps)
    return lambda n, rng: last(diffusion.sample(n, rng, how, guidance=1.0))


drawn, seconds = {}, {}
many = 4 if QUICK else 50
for name, draw in (("GAN", gan.sample), ("VAE", vae.sample), ("diffusion", with_steps(many))):
    began = time.perf_counter()
    drawn[name] = np.clip(draw(N, Rng(6)), -1, 1)
    seconds[name] = (time.perf_counter() - began) / N
show("16_drawn.png", [x[:14] for x in drawn.values()], list(drawn))

# %% [markdown]
# ![drawn](out/16_drawn.png)
#
# ## Quality and diversity as two numbers
#
# One number, such as the Fréchet distance between the features of real and of drawn images, cannot say *what* is wrong.
# Two can (Kynkäänniemi et al. 2019). Put a ball around each real image that reaches to its third nearest neighbour; the
# balls together stand for "what real images are like". Then
#
# - **precision**: which share of the drawn images lies in a ball around a real one? (quality)
# - **recall**: which share of the real images lies in a ball around a drawn one? (diversity)
#
# On a plane we can see it. Real points come in three groups.

# %%
noise = Rng(7).normal((3, 60, 2), np.float64)
centres = np.array([[-2.0, 0], [2, 0], [0, 3]])
real = (centres[:, None] + 0.6 * noise).reshape(180, 2)
other = 0.6 * Rng(8).normal((180, 2), np.float64)
models = {
    "like the data": np.repeat(centres, 60, axis=0) + other,
    "one group forgotten,\nand nothing wrong (a GAN's fault)": np.repeat(centres[[0, 1]], 90, axis=0) + 0.8 * other,
    "all groups, and what lies\nbetween them (a VAE's fault)": np.repeat(centres, 60, axis=0) + 2.6 * other,
}
figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), sharex=True, sharey=True)
measured = {}
for axis, (name, points) in zip(axes, models.items(), strict=True):
    measured[name] = precision_recall(real, points)
    axis.plot(*real.T, ".", color=GREY, ms=4, label="real")
    axis.plot(*points.T, ".", color=RED, ms=4, label="drawn")
    axis.set_title(f"{name}\nprecision {measured[name].precision:.2f}, recall {measured[name].recall:.2f}", fontsize=10)
    axis.set(xticks=[], yticks=[], aspect="equal")
axes[0].legend(loc="lower center", ncols=2, frameon=False)
figure.tight_layout()
figure.savefig(OUT / "16_precision_recall.png", dpi=130)
plt.close(figure)
good, forgets, smears = measured.values()
assert forgets.precision > 0.9 > 0.75 > forgets.recall and smears.precision < 0.75 < smears.recall

# %% [markdown]
# ![precision and recall](out/16_precision_recall.png)
#
# For digits the plane is the space of 128 features in which a classifier of the package sees them, and the balls are
# around 200 real digits. The first row is real digits measured as if a model had drawn them: nobody can do better.

# %%
judge = Classifier.load("classifier")
reference, fresh = (judge.features(images[start : start + N]) for start in (0, N))
features = {"real digits": fresh} | {name: judge.features(x) for name, x in drawn.items()}
scores = {name: precision_recall(reference, f) for name, f in features.items()}
print(f"\n{'':12} precision  recall  Fréchet  ms an image")
for name, f in features.items():
    ms = f"{1000 * seconds[name]:11.2f}" if name in seconds else ""
    distance = frechet_distance(reference, f)
    print(f"{name:12} {scores[name].precision:9.2f} {scores[name].recall:7.2f} {distance:8.1f} {ms}")

# %% [markdown]
# ## The triangle (E39)
#
# Each corner is one of the three; speed is drawn by its logarithm, over four decades from the fastest.

# %%
angles = np.radians([90, 210, 330, 90])
corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)
fastest = min(seconds.values())
figure, axis = plt.subplots(figsize=(6.2, 5.4))
for ring in (0.25, 0.5, 0.75, 1):
    axis.plot(*(ring * corners).T, color="0.8", lw=0.8)
for corner, name in zip(corners, ("quality\n(precision)", "diversity\n(recall)", "speed\n(log)"), strict=False):
    axis.text(*(1.2 * corner), name, ha="center", va="center", fontsize=11)
for name, color in (("GAN", RED), ("VAE", GREEN), ("diffusion", BLUE)):
    speed = max(0, 1 - np.log10(seconds[name] / fastest) / 4)
    values = np.array([*scores[name], speed, scores[name].precision])
    points = values[:, None] * corners
    axis.plot(*points.T, "o-", color=color, lw=2, label=name)
    axis.fill(*points.T, color=color, alpha=0.08)
axis.set(aspect="equal", xlim=(-1.35, 1.35), ylim=(-0.75, 1.35))
axis.axis("off")
axis.legend(loc="upper right", frameon=False)
figure.tight_layout()
figure.savefig(OUT / "16_triangle.png", dpi=130)
plt.close(figure)
if not QUICK:
    assert scores["diffusion"].precision > scores["VAE"].precision  # sharper
    assert seconds["diffusion"] > 20 * max(seconds["GAN"], seconds["VAE"])  # and slower

# %% [markdown]
# ![the triangle](out/16_triangle.png)
#
# A few hundred steps leave GAN and VAE far from what they can be, and a VAE stopped so early draws pieces of digits
# rather than blurred ones. But each model already leans where its loss pulls it: the GAN is ahead of the VAE in
# quality and a little behind it in diversity, and both are hundreds of times faster than fifty steps of diffusion.
#
# ## The third corner moves
#
# A diffusion model is slow because it is asked 50 times. It need not be: a solver of second order (lesson 10) takes
# fewer, larger steps. The same network, from 1 step to 50:

# %%
counts = [1, 2] if QUICK else [1, 2, 4, 10]
ms, quality, variety, rows = [], [], [], []
for steps in counts:
    began = time.perf_counter()
    x = np.clip(with_steps(steps)(N, Rng(6)), -1, 1)
    ms.append(1000 * (time.perf_counter() - began) / N)
    precision, recall = precision_recall(reference, judge.features(x))
    quality.append(precision)
    variety.append(recall)
    rows.append(x[:14])
rows.append(drawn["diffusion"][:14])
show("16_fewer_steps.png", rows, [f"{steps} step{'s' * (steps > 1)}" for steps in [*counts, many]])
ms.append(1000 * seconds["diffusion"])
quality.append(scores["diffusion"].precision)
variety.append(scores["diffusion"].recall)

figure, axis = plt.subplots(figsize=(7, 3.6))
axis.plot(ms, quality, "o-", color=BLUE, label="diffusion: precision")
axis.plot(ms, variety, "o--", color=BLUE, label="diffusion: recall")
for name, color in (("GAN", RED), ("VAE", GREEN)):
    axis.plot(1000 * seconds[name], scores[name].precision, "o", color=color, label=f"{name}: precision")
    axis.plot(1000 * seconds[name], scores[name].recall, "x", color=color, label=f"{name}: recall")
axis.set(xscale="log", xlabel="milliseconds an image", ylim=(0, 1.05), title="What time buys")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()
figure.savefig(OUT / "16_what_time_buys.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![fewer steps](out/16_fewer_steps.png)
# ![what time buys](out/16_what_time_buys.png)
#
# In one step the network can only give the mean of the class it was asked for: next to no recall, and yet the highest
# precision, since the classifier's features hardly mind a blur (look at pictures, not at numbers alone). Ten steps do
# nearly what fifty do. That is where most research on the trilemma goes: solvers that take larger steps, and models
# taught to take them.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. A "model" gives back training images, the same that are measured against. What are its precision and recall? And
#    what does `copying`, the chance that a drawn image lies nearer to the training data than a test image does, say?
# 2. Another model draws one perfect digit, always the same. What is its precision, and its recall?

# %%
precision_of_a_copy, recall_of_a_copy, copying_of_a_copy = None, None, None
precision_of_one_digit, recall_of_one_digit = None, None

flat = images.reshape(len(images), -1)
if copying_of_a_copy is not None:
    assert (precision_of_a_copy, recall_of_a_copy) == precision_recall(reference, reference)
    assert copying_of_a_copy == copying(flat[:50], flat[1000:1050], flat[:1000]).value
    print("exercise 1 is right: no measure of two sets tells a copy from a perfect model")
if precision_of_one_digit is not None:
    always = np.repeat(reference[:1], N, axis=0)
    assert precision_of_one_digit == precision_recall(reference, always).precision
    assert abs(recall_of_one_digit - precision_recall(reference, always).recall) < 2 / N
    print("exercise 2 is right")
