# %% [markdown]
# # Lesson 22: latent diffusion, end to end
#
# Everything so far diffused pixels. Stable Diffusion diffuses something smaller: what an autoencoder makes of the
# picture (lesson 17). The diffusion is *the same*, down to the last line of code (**E24**):
#
# $$L = \mathbb E\,\lVert \varepsilon - \varepsilon_\theta(z_t, t, \tau_\theta(y)) \rVert^2,\qquad
# z_t = \sqrt{\bar\alpha_t}\,z_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon,\qquad z_0 = s\,\mathcal E(x).$$
#
# You will see
# - the whole way (**E28**) on one screen: prompt, tokens, states, noise, guided denoising, decoder, picture;
# - what the scale $s$ is for, and what happens without it;
# - what the latents decode to on the way, from noise to picture;
# - what it saves.
#
# Run it from anywhere: `python lessons/22_latent_diffusion.py` takes half a minute and writes its pictures to
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
from tinydiff.diffusion import Prediction, Sampling, ddim, guided, predict, q_sample
from tinydiff.image import grid, to_signed, to_uint8
from tinydiff.models import StableDiffusion

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
STEPS = 4 if QUICK else 50


def save(figure, name):
    """Write a figure."""
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


model = StableDiffusion.load()
vae, clip, unet = model.vae, model.clip, model.unet

# %% [markdown]
# ## The whole way on one screen
#
# `StableDiffusion.text_to_image` is these lines, with checks. Each is a lesson: CLIP's text tower (19), cross-attention
# (21), guidance (12), DDIM (10), the decoder (17).

# %%
prompt, guidance = "a big yellow ring left of a small purple cross", 3.0
schedule, n = unet.schedule, 8

ids, mask = clip.tokens([prompt] * n)  # tokens
states = clip.text_states(ids, mask)  # τ_θ(y)
text, empty = model.text([prompt] * n), model.text([""] * n)
assert np.allclose(states.data, text.states)


def denoise(z_t, t):
    """E35 and E15: the network with and without the text, the difference exaggerated, and what that says of z_0."""
    times = np.full(n, t)
    v = guided(unet(z_t, times, text).data, unet(z_t, times, empty).data, guidance)
    x_0, eps, _ = predict(v, z_t, t, schedule, "v")
    return Prediction(x_0, eps)


noise = unet.noise(n, Rng(0).at(0))
way = [noise, *ddim(denoise, noise, schedule, Rng(1), steps=STEPS)]
pictures = vae.decode(way[-1])

*_, z_0 = model.text_to_image([prompt] * n, Rng(0), Sampling(steps=STEPS), guidance)
assert np.allclose(z_0, way[-1], atol=1e-3)

shown = [way[i] for i in np.linspace(0, len(way) - 1, min(8, len(way))).round().astype(int)]
strip = np.stack([model.decode(z[:4]) for z in shown], axis=1).reshape(-1, *pictures.shape[1:])
figure, axis = plt.subplots(figsize=(8, 4.3), layout="constrained")
axis.imshow(grid(strip, columns=len(shown)))
axis.set_title(f'"{prompt}": what the latents decode to on the way', fontsize=10)
axis.axis("off")
save(figure, "22_way.png")

# %% [markdown]
# ![from noise to picture](out/22_way.png)
#
# ## What the scale is for
#
# The schedule was made for data of variance 1: at $t = T$ nothing but noise must be left, and in the middle data and
# noise must be of a size. Latents as they come from an encoder have the variance that training happened to give them.
# So they are multiplied by $s = 1/\mathrm{std}$, measured once and kept with the model (0.18215 in Stable Diffusion
# 1.x).

# %%
x = to_signed(Shapes().draw(Rng(5), 8 if QUICK else 200, "test")[0])
z = vae.encode(x)
before = z.std() / vae.config.scale
print(f"the latents' standard deviation is {before:.2f}; s = {vae.config.scale:.3f} makes it {z.std():.2f}")

times = np.arange(0, schedule.T + 1)
figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for factor, name in ((1, "s as measured"), (0.1, "a tenth of it"), (10, "ten times as much")):
    signal = factor**2 * schedule.alpha_bar / np.maximum(schedule.one_minus_alpha_bar, 1e-12)
    axis.plot(times[1:], signal[1:], label=name)
axis.axhline(1, color="0.7", lw=0.8)
axis.set(yscale="log", ylim=(1e-4, 1e4), xlabel="t", ylabel="signal over noise, power")
axis.legend(frameon=False)
save(figure, "22_scale.png")

# %% [markdown]
# ![signal over noise](out/22_scale.png)
#
# With a tenth of $s$ the data drown at once, and most steps have nothing to learn from; with ten times as much, the
# noise is hardly seen until the end, and the last state is no $\mathcal N(0, I)$: sampling starts from what training
# never showed.
#
# ## What diffusion does to a picture, in pixels and in latents
#
# The same $t$, the same $\bar\alpha_t$. Noise on latents, once decoded, does not look like noise on pixels: it is wrong
# *objects*, not wrong pixels. The U-Net need not care for pixels at all; the decoder does.

# %%
rows = []
for t in (0, 100, 300, 500, 700):
    noisy = q_sample(z[:1], t, Rng(7).normal_like(z[:1]), schedule) if t else z[:1]
    pixels = q_sample(x[:1], t, Rng(7).normal_like(x[:1]), schedule) if t else x[:1]
    rows.append((t, pixels[0].clip(-1, 1), model.decode(noisy)[0]))
figure, axes = plt.subplots(2, len(rows), figsize=(8, 3.6), layout="constrained")
for column, (t, *images) in zip(axes.T, rows, strict=True):
    column[0].set_title(f"t = {t}", fontsize=9)
    for axis, picture in zip(column, images, strict=True):
        axis.imshow(to_uint8(picture))
        axis.axis("off")
save(figure, "22_noise.png")

# %% [markdown]
# ![noise on pixels, above, and on latents, below](out/22_noise.png)
#
# ## What it saves
#
# A network's work grows with the number of places it looks at.

# %%
pixels, latents = x[0].size, z[0].size
print(f"a picture has {pixels} numbers in {x[0].shape[0]}² places, its latents {latents} in {z[0].shape[0]}² places:")
print(f"{pixels / latents:.0f} times fewer numbers, {(x[0].shape[0] / z[0].shape[0]) ** 2:.0f} times fewer places;")
print("in Stable Diffusion 512 x 512 x 3 become 64 x 64 x 4: 48 times fewer numbers, 64 times fewer places.")

# %% [markdown]
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. An encoder gives latents of standard deviation 5.49. What is $s$?
# 2. How many times does the U-Net run for one picture, in 50 steps of DDIM with guidance 3?

# %%
s = None
runs = None

if s is not None:
    assert abs(s - 1 / 5.49) < 1e-3, "s times the standard deviation is 1"
    print("1 is right, and nearly that of Stable Diffusion 1.x")
if runs is not None:
    assert runs == 100, "with the text and without it, at each step"
    print("2 is right")
