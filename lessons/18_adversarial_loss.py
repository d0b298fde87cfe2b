# %% [markdown]
# # Lesson 18: the adversarial loss, or why an average is never sharp
#
# Lesson 17 left us with a question. An autoencoder that keeps few numbers cannot keep everything; what should its
# decoder draw where it does not know? Each measure of pixels has its own answer, and none of them is a picture. The
# first stage of latent diffusion therefore adds a second network that must not be able to tell what is drawn from what
# is real (**E23**).
#
# You will see
# - that **the best guess under a pixel loss is a blur**, by arithmetic and by training;
# - the **patch discriminator**, the **hinge loss**, and what each player minimises;
# - the **adaptive weight** $\lambda$ and the **delayed start**, which keep the game fair;
# - grass that is wrong in every pixel, and looks right;
# - what a critic says of the autoencoder that the package brings along.
#
# Run it from anywhere: `python lessons/18_adversarial_loss.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, Tensor
from tinydiff.autograd import no_grad
from tinydiff.data.captioned import Shapes
from tinydiff.image import grid, to_signed
from tinydiff.metrics import psnr
from tinydiff.models import VAE, AdversarialVAE, LossWeights, PatchDiscriminator, VAEConfig
from tinydiff.models.discriminator import hinge
from tinydiff.optim import EMA, Adam

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"


def save(figure, file):
    figure.tight_layout()
    figure.savefig(OUT / file, dpi=130, bbox_inches="tight")
    plt.close(figure)


# %% [markdown]
# ## One pixel, two possibilities
#
# A pixel is black ($-1$) with probability $p$, else white ($+1$), and nothing tells which. A decoder must say one
# number $\hat x$. Its expected loss is
#
# $$p\,|{-1} - \hat x| + (1-p)\,|1 - \hat x| \qquad\text{or}\qquad p\,(1 + \hat x)^2 + (1-p)\,(1 - \hat x)^2.$$

# %%
x_hat = np.linspace(-1.3, 1.3, 300)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for axis, power, name in zip(axes, (2, 1), ("squared", "absolute"), strict=True):
    for p, color in zip((0.5, 0.4, 0.2), (BLUE, GREEN, RED), strict=True):
        expected = p * np.abs(-1 - x_hat) ** power + (1 - p) * np.abs(1 - x_hat) ** power
        axis.plot(x_hat, expected, color=color, label=f"black with p = {p}")
        axis.plot(x_hat[expected.argmin()], expected.min(), "o", color=color)
    axis.set(title=f"expected {name} error", xlabel=r"what is drawn, $\hat x$", ylim=(0, 3))
    axis.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False, fontsize=9)
save(figure, "18_one_pixel.png")

# %% [markdown]
# ![one pixel](out/18_one_pixel.png)
#
# The squared error asks for the mean, $1 - 2p$: a grey that no image has. The absolute error asks for the median:
# black or white, but then *every* such pixel is the same, and at $p = \frac12$ any grey is as good. A thousand blades
# of grass become one flat lawn. Neither loss ever asks whether the result looks like something.
#
# ## Images that do not fit into their latents
#
# Take images in which something cannot be kept: a disc of "grass", cells of 2 x 2 pixels, each black or white at
# random, about 64 of them. The autoencoder has $4 \times 4 \times 2 = 32$ numbers for all: enough to say where the
# disc is and how bright the rest, and not which cells are white.

# %%
SIZE = 32


def lawns(rng, n):
    """n images (32, 32, 1) in [-1, 1]: a disc of random black and white cells on a flat grey."""
    draws = np.random.default_rng((rng.seed, *rng.path))
    cells = np.where(draws.integers(0, 2, (n, SIZE // 2, SIZE // 2)), 0.8, -0.8).repeat(2, axis=1).repeat(2, axis=2)
    y, x = np.mgrid[:SIZE, :SIZE]
    centre = draws.uniform(10, 22, (2, n, 1, 1))
    disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 81
    return np.where(disc, cells, draws.uniform(-0.6, 0.6, (n, 1, 1)))[..., None].astype(np.float32)


# %% [markdown]
# ## The two players (E23)
#
# The discriminator $D$ says of each *patch* of an image how real it looks. It need not judge the whole: that the disc
# is in the right place is the pixel loss's business. It minimises the **hinge loss**
#
# $$L_D = \tfrac12\,\mathbb E[\max(0,\, 1 - D(x))] + \tfrac12\,\mathbb E[\max(0,\, 1 + D(\hat x))],$$
#
# while the autoencoder minimises
#
# $$L = |x - \hat x| + w_R\,\mathrm{KL} + w_A\,\lambda\, L_G,\qquad L_G = -\mathbb E[D(\hat x)].$$
#
# Two things keep the game fair. **$D$ starts late**: a decoder that still draws mud is caught at once, and learns
# nothing from being caught. And **$\lambda$ is adaptive**: $D$ may be steep or flat, and nobody knows in advance, so
# its gradient is brought to the size of the reconstruction's, where both arrive in the decoder, at the kernel $W$ of
# its last layer:
#
# $$\lambda = \frac{|\partial L_{\mathrm{rec}} / \partial W|}{|\partial L_G / \partial W|}.$$
#
# So $w_A = 1$ means: listen to both alike. Our autograd knows first derivatives only, and they are enough:
# `AdversarialVAE.loss` differentiates each loss as far as $\hat x$, takes both gradients through the last layer to
# measure them, and hands their weighted sum back to the decoder.
#
# We train the same network three times: with pixels alone, absolute and squared, and with the discriminator.

# %%
config = VAEConfig(channels=1, base=32, multipliers=(1, 1), patch=4, latent=2, attention=False)
steps, start = (10, 4) if QUICK else (420, 100)
size = 4 if QUICK else 16


def trained(pixels, adversarial):
    """An autoencoder of lawns, and the terms of its loss at every step."""
    weights = LossWeights(pixels, adversarial=adversarial, regularisation=1e-3, start=start)
    model, terms = AdversarialVAE(config, weights, Rng(0)), []
    adam = Adam(model.parameters(), betas=(0.5, 0.99))
    average = EMA(adam, 0.98)
    for step in range(1, steps + 1):
        loss, of_step = model.loss(lawns(Rng(1).at(step), size), step, Rng(2).at(step))
        loss.backward()
        adam.step(2e-3, max_norm=1.0)
        average.update()
        terms.append(of_step)
    adam.vector[...] = average.average
    return model, terms


players = {"squared error": ("l2", 0.0), "absolute error": ("l1", 0.0), "discriminator": ("l1", 1.0)}
models = {name: trained(*how) for name, how in players.items()}
x = lawns(Rng(3), 8 if QUICK else 64)
rebuilt = {name: model.decode(model.encode(x)) for name, (model, _) in models.items()}
rows = {"the image": x, **rebuilt}
figure, axes = plt.subplots(len(rows), 1, figsize=(10, 4.7))
for axis, (name, images) in zip(axes, rows.items(), strict=True):
    axis.imshow(grid(images[:8], columns=8), cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
save(figure, "18_lawns.png")

grass = np.abs(x) > 0.7  # the cells
for name, images in rows.items():
    print(f"{name:14} PSNR {psnr(images, x).mean():5.1f} dB, contrast of the grass {images[grass].std():.2f}")
if not QUICK:
    flat, textured = rebuilt["absolute error"], rebuilt["discriminator"]
    assert textured[grass].std() > 1.3 * flat[grass].std() and psnr(textured, x).mean() < psnr(flat, x).mean()

# %% [markdown]
# ![lawns](out/18_lawns.png)
#
# Under pixel losses the lawn is a smear, or gone: that is the best answer to the question that was asked. With the
# discriminator there is grass where grass was. Cell by cell it is *another* lawn, and its PSNR is lower, for whoever
# draws a white cell where a black one is, is further off than who draws grey. PSNR is not what the eye measures.
#
# Look closely, though: the lawns are much alike. Each patch is judged by itself, and nobody asks whether two images
# show the same one. And a warning: **what such a decoder shows may be made up**, which does not matter for art and
# matters for X-rays.
#
# ## The game, step by step

# %%
terms = models["discriminator"][1]
at = np.arange(1, steps + 1)
figure, axes = plt.subplots(1, 4, figsize=(12.5, 2.9))
for axis, name, color in zip(
    axes, ("pixels", "generator", "discriminator", "balance"), (BLUE, GREEN, RED, GREY), strict=True
):
    axis.plot(at, [t.get(name, np.nan) for t in terms], color=color, lw=1)
    axis.axvline(start, color=GREY, lw=0.8, ls=":")
    axis.set(
        xlabel="step", title={"balance": r"$\lambda$", "generator": "$L_G$", "discriminator": "$L_D$"}.get(name, name)
    )
    axis.spines[["top", "right"]].set_visible(False)
axes[2].axhline(1, color=GREY, lw=0.8, ls="--")
axes[3].set_yscale("log")
save(figure, "18_game.png")

# %% [markdown]
# ![the game](out/18_game.png)
#
# $L_D = 1$ is what a $D$ gets that says 0 of everything. It begins there and falls quickly: flat lawns are easily
# told. Then the decoder answers, and it rises again. Neither curve "converges", and none should: they are the score of
# a game. Judge by the pictures.
#
# ## What a critic says of the shipped autoencoder
#
# `VAE.load("vae")` draws shapes, whose edges are sharp and which fit into their latents. Can a fresh discriminator,
# that sees real images and their reconstructions for some steps, tell them apart, patch by patch?

# %%
shipped, source = VAE.load("vae"), Shapes()
critic = PatchDiscriminator(3, Rng(4), base=16)
adam, scores = Adam(critic.parameters(), betas=(0.5, 0.99)), []
for step in range(4 if QUICK else 150):
    real = to_signed(source.draw(Rng(5).at(step), size)[0])
    loss = hinge(critic(Tensor(real)), critic(Tensor(shipped.decode(shipped.encode(real)))))
    loss.backward()
    adam.step(2e-3, max_norm=1.0)
    scores.append(loss.item())

real = to_signed(source.draw(Rng(6), 8 if QUICK else 64, "test")[0])
drawn = shipped.decode(shipped.encode(real))
with no_grad():
    of_real, of_drawn = critic(Tensor(real)).data, critic(Tensor(drawn)).data
right = 0.5 * (np.mean(of_real > 0) + np.mean(of_drawn < 0))
print(f"PSNR {psnr(drawn, real).mean():.1f} dB; the critic tells {right:.1%} of the patches rightly (50 % is guessing)")

figure, axes = plt.subplots(4, 6, figsize=(8.4, 5.9))
for column in range(6):
    for axis, picture in zip(axes[:2, column], (real, drawn), strict=True):
        axis.imshow(grid(picture[column : column + 1]))
    for axis, verdict in zip(axes[2:, column], (of_real, of_drawn), strict=True):
        axis.imshow(verdict[column, ..., 0], cmap="RdYlGn", vmin=-1, vmax=1)
for axis in axes.ravel():
    axis.set(xticks=[], yticks=[])
for axis, name in zip(axes[:, 0], ("real", "rebuilt", "verdict on\nthe real", "verdict on\nthe rebuilt"), strict=True):
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
save(figure, "18_verdicts.png")

# %% [markdown]
# ![verdicts](out/18_verdicts.png)
#
# Green patches look real to the critic, red ones drawn. Its verdicts on both rows are nearly the same: after 150 steps
# it does little better than guess. Where they differ, look at small things inside others, whose corners have got
# round. With more time a critic would find such places, and a decoder trained against it would have to mend them.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. A pixel is black ($-1$) with $p = 0.2$, else white ($+1$). What does a decoder draw that minimises the expected
#    squared error, and which one the absolute error?
# 2. A discriminator says $D(x) = 3$ of all real patches and $D(\hat x) = -0.5$ of all drawn ones. What is $L_D$? And
#    what is $L_G$?

# %%
under_squares, under_absolutes = None, None
L_D, L_G = None, None

if under_squares is not None:
    assert np.isclose(under_squares, 1 - 2 * 0.2) and under_absolutes == 1
    print("exercise 1 is right")
if L_D is not None:
    assert np.isclose(L_D, 0.5 * 0 + 0.5 * 0.5) and np.isclose(L_G, 0.5)
    print("exercise 2 is right")
