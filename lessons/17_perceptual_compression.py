# %% [markdown]
# # Lesson 17: perceptual compression, or what an image is made of for the eye
#
# A diffusion model on pixels spends most of its work on what nobody looks at: the exact value of each pixel of a wall.
# Latent diffusion (Rombach et al. 2022) splits the task in two stages. The first, an autoencoder, throws away what the
# eye does not miss, once and for all (**E23**). The second, the diffusion model you know, works on what is left
# (**E24**). This lesson is about the first.
#
# You will see
# - the **factor 48** of Stable Diffusion, and what it saves;
# - what our own trained autoencoder keeps at a factor 12, beside two older ways to keep as many numbers;
# - what latents look like, and why they are still an image;
# - the **scale** that gives them unit variance, and what diffusion would do without it;
# - the weight of the **KL term**: too little and latents are arbitrary, too much and images blur.
#
# Run it from anywhere: `python lessons/17_perceptual_compression.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, Tensor, ops
from tinydiff.data.captioned import Shapes
from tinydiff.diffusion import Schedule
from tinydiff.image import grid, to_signed
from tinydiff.metrics import psnr
from tinydiff.models import VAE, VAEConfig
from tinydiff.models.vae import CONFIGS
from tinydiff.optim import EMA, Adam
from tinydiff.rng import Blank

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"


def pictures(rows, names, file, columns=8, scale=1.0):
    """Rows of images, each with its name, as one picture."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(columns * 1.05 * scale + 2.2, len(rows) * 1.1 * scale))
    for axis, row, name in zip(np.atleast_1d(axes), rows, names, strict=True):
        axis.imshow(grid(row[:columns], columns=columns), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(OUT / file, dpi=110, bbox_inches="tight")
    plt.close(figure)


# %% [markdown]
# ## The factor 48
#
# Stable Diffusion's autoencoder makes $64 \times 64 \times 4$ numbers of $512 \times 512 \times 3$. Each side is
# $f = 8$ times shorter. The model is in the package too, at its published size; a `Blank` stream makes its 83.7 million
# weights without drawing or storing them, so that they can be counted.

# %%
sd = CONFIGS["stable-diffusion"]
vae = VAE(sd, Blank())
pixels, latents = 512 * 512 * 3, (512 // vae.factor) ** 2 * sd.latent
print(f"Stable Diffusion's VAE: {vae.count_parameters():,} parameters, {pixels:,} -> {latents:,} numbers")
assert vae.count_parameters() == 83_653_863 and pixels == 48 * latents

# %% [markdown]
# What does the factor save? Convolutions cost as much as there are pixels: $f^2 = 64$ times less. Attention compares
# every pixel with every other: $f^4 = 4096$ times less. And the loss no longer asks for invisible detail.
#
# ## What is kept
#
# Ours is smaller: $32 \times 32 \times 3$ pixels become $8 \times 8 \times 4$ latents, $f = 4$, twelve times fewer
# numbers. `VAE.load("vae")` is the shipped model, trained by `examples/train_vae.py`. How good is that? Here are three
# rivals that keep about as many:
#
# - **small picture**: average each $4 \times 4$ block, $8 \times 8 \times 3 = 192$ numbers, and blow it up again;
# - **PCA of blocks**: the best *linear* autoencoder that, like ours, describes each $4 \times 4$ block by 4 numbers;
#   the idea behind JPEG;
# - **PCA of images**: the best linear one of all, which looks at whole images, and could not be used at another size.

# %%
source, shipped = Shapes(), VAE.load("vae")
seen = to_signed(source.draw(Rng(1), 400 if QUICK else 3000)[0])
x = to_signed(source.draw(Rng(2), 40 if QUICK else 300, "test")[0])
z = shipped.encode(x)
print(f"{x.shape[1:]} -> {z.shape[1:]}: {x[0].size / z[0].size:.0f} times fewer numbers")


def linear(rows, others, numbers):
    """The rows (N, D) as the best linear autoencoder gives them back that keeps so many numbers, found from others."""
    mean = others.mean(axis=0)
    _, _, directions = np.linalg.svd(others - mean, full_matrices=False)
    kept = (rows - mean) @ directions[:numbers].T
    return kept @ directions[:numbers] + mean


def blocks(images):
    """The 4 x 4 blocks of images, one row each."""
    return ops.space_to_depth(images, factor=4).data.reshape(-1, 48)


flat = linear(x.reshape(len(x), -1), seen.reshape(len(seen), -1), z[0].size)
by_block = linear(blocks(x), blocks(seen[:300]), 4).reshape(-1, 8, 8, 48)
kept = {
    "the image": x,
    "VAE, 256 numbers": shipped.decode(z),
    "PCA of images, 256": flat.reshape(x.shape),
    "PCA of blocks, 256": ops.depth_to_space(by_block, factor=4).data,
    "small picture, 192": ops.upsample_nearest(ops.downsample_average(x, factor=4), factor=4).data,
}
for name, images in list(kept.items())[1:]:
    print(f"{name:20} PSNR {psnr(images, x).mean():.1f} dB")
pictures(list(kept.values()), list(kept), "17_kept.png")
ours = kept["VAE, 256 numbers"]
assert psnr(ours, x).mean() > psnr(kept["PCA of blocks, 256"], x).mean() + 3

# %% [markdown]
# ![what is kept](out/17_kept.png)
#
# A linear code adds and subtracts fixed patterns: edges get a halo, and colours leak where there is nothing. The
# encoder is not linear: it *describes* each block (the colours on both sides, where the edge runs, how it is turned),
# and the decoder draws it. PCA of whole images does well on scenes as simple as these, a few things in nine places; no
# photograph is a sum of 256 pictures.
#
# ## Latents are still an image
#
# Each channel of $z$ can be looked at. Things are where they were, so a U-Net of convolutions is the right network for
# them. And each latent pixel speaks of its own surroundings: change one, and see where the image changes.

# %%
figure, axes = plt.subplots(3, 6, figsize=(9.2, 4.8))
for line, i in zip(axes, (0, 1, 2), strict=True):
    line[0].imshow(grid(x[i : i + 1]))
    for axis, channel in zip(line[1:5], range(4), strict=True):
        axis.imshow(z[i, :, :, channel], cmap="coolwarm", vmin=-3, vmax=3)
    moved = z[i : i + 1].copy()
    moved[0, 4, 4] += 2
    line[5].imshow(np.abs(shipped.decode(moved) - ours[i]).mean(axis=(0, 3)), cmap="magma")
for axis, name in zip(
    axes[0], ("image", *(f"channel {c}" for c in range(4)), "what one pixel\nof z moves"), strict=True
):
    axis.set_title(name, fontsize=10)
for axis in axes.ravel():
    axis.set(xticks=[], yticks=[])
figure.tight_layout(pad=0.5)
figure.savefig(OUT / "17_latents.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![latents](out/17_latents.png)
#
# ## The scale (E24)
#
# A diffusion model mixes $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$ and its schedule was
# made for data about as large as the noise. An autoencoder's latents have whatever size it liked. So they are
# multiplied by one number, measured from data and stored with the model: $\mathrm{scale} = 1/\mathrm{std}(z)$. For
# Stable Diffusion it is 0.18215. If it were forgotten there, the noise would have to be $1/0.18215 = 5.5$ times as
# large to do the same: in the middle of a schedule the image would still be plainly there.

# %%
raw = z / shipped.config.scale
print(f"scale {shipped.config.scale:.3f}: std {raw.std():.3f} before, {z.std():.3f} after")
assert abs(z.std() - 1) < 0.05

schedule = Schedule.cosine(1000)
unit = schedule.alpha_bar[1:] / (1 - schedule.alpha_bar[1:])
signal = {"z of unit variance": unit, "Stable Diffusion's z, unscaled": unit / 0.18215**2}
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.5))
bins = np.linspace(-4, 4, 81)
for channel, color in enumerate((BLUE, RED, GREEN, GREY)):
    left.hist(
        z[..., channel].ravel(), bins=bins, histtype="step", color=color, density=True, label=f"channel {channel}"
    )
left.plot(bins, np.exp(-(bins**2) / 2) / np.sqrt(2 * np.pi), color="black", lw=1, ls="--", label="N(0, 1)")
left.set(title="scaled latents of 300 images", xlabel="value", yticks=[])
left.legend(frameon=False, fontsize=8)
for (name, ratio), color in zip(signal.items(), (BLUE, RED), strict=True):
    right.plot(np.arange(1, 1001), ratio, color=color, label=name)
right.axhline(1, color=GREY, lw=0.8, ls=":")
right.set(yscale="log", ylim=(1e-5, 1e5), xlabel="t", title="signal over noise, cosine schedule")
right.legend(frameon=False, fontsize=9)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "17_scale.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![scale](out/17_scale.png)
#
# ## How much the KL term should weigh
#
# $$L = (x - \hat x)^2 + w\,\mathrm{KL}\!\left(q(z\mid x)\,\|\,\mathcal N(0, I)\right),\qquad
# z = m(x) + s(x)\,\varepsilon$$
#
# The encoder says how sure it is of each latent, $s$, and being sure costs nats. Let us train four little autoencoders
# that differ in $w$ alone, and measure three things: how well they rebuild, how many nats a latent they use, and what
# their decoders make of $z \sim \mathcal N(0, I)$.

# %%
weights = (1e-4, 0.1, 1.0, 5.0)
tiny = VAEConfig(base=32, multipliers=(1,), patch=4, attention=False)
steps = 8 if QUICK else 350


def trained(weight):
    """A little autoencoder whose KL term has this weight."""
    model = VAE(tiny, Rng(0))
    adam = Adam(model.parameters(), betas=(0.9, 0.99))
    average = EMA(adam, 0.98)
    for step in range(steps):
        batch = seen[Rng(3).at(step).integers(0, len(seen), (16,))]
        shown, price = model.draw(Tensor(batch), Rng(4).at(step))
        loss = ops.mse_loss(model.decoder(shown), batch) + weight * price
        loss.backward()
        adam.step(4e-3 * min(1, (steps - step) / (0.5 * steps)), max_norm=1.0)
        average.update()
    adam.vector[...] = average.average
    return model


def used_nats(model, images):
    """KL of a latent number, on average: how much of what it could say it does say."""
    m, log_variance = (t.numpy() for t in model.posterior(Tensor(images)))
    return 0.5 * float(np.mean(m**2 + np.exp(log_variance) - log_variance - 1))


models = [trained(weight) for weight in weights]
rebuilt = [model.decode(model.encode(x)) for model in models]
noise = Rng(5).normal((8, 8, 8, 4))
drawn = [model.decode(noise) for model in models]
quality, nats = [psnr(r, x).mean() for r in rebuilt], [used_nats(model, x) for model in models]
for weight, decibels, used in zip(weights, quality, nats, strict=True):
    print(f"w = {weight:<6g} PSNR {decibels:5.1f} dB, {used:.2f} nats a latent number")
pictures(
    [x, *rebuilt, *drawn],
    ["the image", *(f"rebuilt, w = {w:g}" for w in weights), *(f"from noise, w = {w:g}" for w in weights)],
    "17_kl.png",
)

figure, axis = plt.subplots(figsize=(5.6, 3.4))
axis.plot(nats, quality, color=BLUE, marker="o")
for weight, a, b in zip(weights, nats, quality, strict=True):
    axis.annotate(f"w = {weight:g}", (a, b), xytext=(8, -9), textcoords="offset points", fontsize=9)
axis.set(xscale="log", xlabel="nats a latent number", ylabel="PSNR, dB", title="what is paid, and what is got")
axis.margins(0.2)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "17_rate_distortion.png", dpi=130)
plt.close(figure)
if not QUICK:
    assert nats[0] > nats[1] > nats[2] > nats[3] and quality[1] > quality[2] > quality[3]

# %% [markdown]
# ![rebuilt and drawn](out/17_kl.png)
#
# ![rate and distortion](out/17_rate_distortion.png)
#
# With a weight of 5 a latent number may hardly say anything: all that is rebuilt is a blur, the average of the images
# that agree with so few nats. With a small one as much is rebuilt as these little networks learned to in a few seconds
# (0.1 costs nothing yet, and saves nine nats of ten), but what their decoders make of noise is no image: nothing made
# the latents of real images fill the Gaussian. A VAE that is to draw by itself, as in lesson 16, must find something
# between, and pays with blur. **Latent diffusion need not**: the diffusion model learns how real latents lie, so the
# first stage can take a small weight, just enough to keep its latents from wandering off. That is the whole idea.
#
# ## How exact must latents be?
#
# The diffusion model will not hit them exactly. So disturb the shipped model's latents with noise of a standard
# deviation $r$ (they have 1), and rebuild.

# %%
levels = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
disturbed = [shipped.decode(z + np.float32(r) * Rng(6).normal_like(z)) for r in levels]
for r, images in zip(levels, disturbed, strict=True):
    print(f"r = {r:<5g} PSNR {psnr(images, x).mean():.1f} dB")
pictures(disturbed, [f"r = {r:g}" for r in levels], "17_disturbed.png")

# %% [markdown]
# ![disturbed latents](out/17_disturbed.png)
#
# A hundredth of the latents' variance, $r = 0.1$, is seen in the figures and hardly by the eye. Since noise is drawn
# into $z$ while the autoencoder trains, its decoder learns to forgive.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. An autoencoder with $f = 8$ and 4 latent channels leaves 48 times fewer numbers of a colour image. How many times
#    fewer does one with $f = 4$ and 3 channels leave, another of Rombach et al.'s? And how many times fewer pixels?
# 2. Two images are apart by one grey level in each of their values (of 255), the least difference there is. What is the
#    PSNR, in dB? One line of NumPy; the range of values is 255.

# %%
fewer_numbers, fewer_pixels = None, None
finest_psnr = None

if fewer_numbers is not None:
    assert np.isclose(fewer_numbers, 4 * 4 * 3 / 3) and fewer_pixels == 16
    print("exercise 1 is right")
if finest_psnr is not None:
    assert np.isclose(finest_psnr, 20 * np.log10(255), atol=0.01)
    print("exercise 2 is right")
