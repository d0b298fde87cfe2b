# %% [markdown]
# # Lesson 9: DDPM on MNIST, or all of it on digits
#
# Everything so far, on real images: the forward process (lesson 2), Algorithm 1 (lesson 6), Algorithm 2 (lesson 7), and
# in place of the little network a U-Net. A small one is trained before your eyes for some seconds, to see how learning
# looks; then the model that the package brings along, trained for longer, shows where it leads.
#
# You will see
# - **E20** the U-Net of lesson 8, a small one;
# - **E17, E18** its training: the same two lines as in the plane; the loss, and the samples as it learns;
# - **E19** sampling: a thousand steps and fifty, and what the network thinks it sees on the way;
# - what to expect of such a model, and a look whether it only repeats its training images.
#
# Run it from anywhere: `python lessons/09_ddpm_on_mnist.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, backend, optim
from tinydiff.data import mnist
from tinydiff.diffusion import Sampling, ddim, ddpm, last
from tinydiff.image import film_strip, grid, running_mean, to_signed
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig
from tinydiff.nn import UNetConfig

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREY = "#1f5fa8", "#c8401f", "#777777"

digits = mnist.load("embedded")
images = to_signed(digits.images[..., None])  # (4500, 28, 28, 1), float32 in [-1, 1]


def save(figure, file):
    figure.tight_layout(pad=0.6)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## The network (E20)
#
# $\varepsilon_\theta(x_t, t)$ gives an image of the size it gets; lesson 8 takes it apart. Ours first turns each 2 × 2
# patch of pixels into one "pixel" of four channels, which makes it about four times faster.

# %%
config = PixelDiffusionConfig(
    UNetConfig(base=16, multipliers=(1, 2), blocks=1, attention=(), patch=2),
    T=1000,
    schedule="linear",  # E6
    target="eps",  # E17
)
model = PixelDiffusion(config, Rng(0))
two = images[:2]
print(f"{model.count_parameters():,} parameters; {two.shape} in, {model(two, np.array([1, 1000])).shape} out")

# %% [markdown]
# ## Training (E17, E18)
#
# Algorithm 1 has not changed. `model.loss(x_0, rng)` draws $t$ and $\varepsilon$, makes $x_t$ (E4), and gives
# $\lVert \varepsilon - \varepsilon_\theta(x_t, t)\rVert^2$, the mean over all pixels. Adam takes the step. The samples
# are drawn with a moving average of the weights, which is steadier than the last ones.

# %%
STEPS, BATCH = (20, 16) if QUICK else (400, 32)
watched = [STEPS // 20, STEPS // 4, STEPS]
x_T = Rng(1).normal((4 if QUICK else 16, 28, 28, 1))  # noqa: N816

adam = optim.Adam(model.parameters(), betas=(0.9, 0.99))
ema = optim.EMA(adam, 0.98)
losses, learning, start = [], {}, time.perf_counter()
for step in range(1, STEPS + 1):
    rng = Rng(2).at(step)
    x_0 = images[rng.at(0).integers(0, len(images), (BATCH,))]
    loss = model.train().loss(x_0, rng.at(1))
    loss.backward()
    adam.step(lr=optim.warmup_cosine(step, STEPS, peak=3e-3, warmup=20), max_norm=1.0)
    ema.update()
    losses.append(loss.item())
    if step in watched:
        with ema.applied():
            learning[step] = last(ddim(model.denoiser(), x_T, model.schedule, Rng(3), steps=2 if QUICK else 10))
        print(f"step {step:4}: loss {np.mean(losses[-50:]):.3f}, {time.perf_counter() - start:5.1f} s")

figure, axes = plt.subplots(1, 4, figsize=(13, 3.3), width_ratios=(1, 1, 1, 1.4))
for axis, (step, x) in zip(axes, learning.items(), strict=False):
    axis.imshow(grid(x.clip(-1, 1)), cmap="gray")
    axis.set_title(f"after {step} steps", fontsize=11)
    axis.axis("off")
axes[-1].semilogy(losses, color=BLUE, alpha=0.25, lw=0.7)
axes[-1].semilogy(running_mean(np.array(losses), max(1, STEPS // 20)), color=BLUE)
axes[-1].set(xlabel="step", title="loss (E17)")
axes[-1].spines[["top", "right"]].set_visible(False)
save(figure, "09_learning.png")
assert QUICK or np.mean(losses[-50:]) < 0.15 < np.mean(losses[:10])

# %% [markdown]
# ![learning](out/09_learning.png)
#
# The loss falls steeply, then hardly at all, while the samples go from noise to bright blots on a dark ground and the
# first strokes. (The fine checks are the 2 × 2 patches, which the network does not yet fit together.) The steep part
# is learning what noise looks like, which is easy; all that makes a digit a digit is in the flat part, and this
# network has not seen enough of it. `python examples/train_mnist.py` takes some four minutes and gets readable digits.
#
# ## Trained for longer
#
# `PixelDiffusion.load` also takes the name of a model that the package brings along. It was trained by the same
# algorithm, for longer and on all 60,000 digits. It is a larger network on the cosine schedule (**E7**), which is told
# which digit it sees, predicts $v$ in place of $\varepsilon$ (**E15**), and learns its own variance (**E13**). Its
# digits below are drawn with a little guidance, 1.5, which lesson 12 explains.

# %%
shipped = PixelDiffusion.load("mnist")
n, steps = (4, 5) if QUICK else (60, 50)
label = np.arange(n) % 10
start = time.perf_counter()
states = [backend.to_numpy(x) for x in shipped.sample(n, Rng(4), Sampling(steps=steps), label=label)]
seconds = time.perf_counter() - start
print(f"{shipped.count_parameters():,} parameters; {n} digits in {len(states) - 1} steps took {seconds:.1f} s")

figure, axis = plt.subplots(figsize=(8, 5))
axis.imshow(grid(states[-1].clip(-1, 1), columns=10), cmap="gray")
axis.axis("off")
save(figure, "09_samples.png")

# %% [markdown]
# ![samples](out/09_samples.png)
#
# ## From noise to a digit (E19)
#
# The states on the way, and below them what the network *thinks* is there: the $x_0$ that goes with its output
# (**E15**). At first it is a blurred mean of all that is still possible. It has taken its shape while the states still
# look like noise.

# %%
denoise = shipped.denoiser(label[:3])
guesses = []


def and_remember(x_t, t):
    """denoise, and keep the guess of x_0."""
    prediction = denoise(x_t, t)
    guesses.append(prediction.x0)
    return prediction


x_T = Rng(5).normal((3, 28, 28, 1))  # noqa: N816
walk = list(ddim(and_remember, x_T, shipped.schedule, Rng(6), steps=4 if QUICK else 40))
strip = [film_strip(images, columns=10, rows=3) for images in ([x_T, *walk], guesses)]
figure, axes = plt.subplots(2, 1, figsize=(9, 6))
for axis, picture, title in zip(axes, strip, (r"$x_t$, from $t = T$ to 0", r"the guess of $x_0$"), strict=True):
    axis.imshow(picture, cmap="gray")
    axis.set_title(title, fontsize=11, loc="left")
    axis.axis("off")
save(figure, "09_film.png")

# %% [markdown]
# ![film strip](out/09_film.png)
#
# ## A thousand steps, fifty, ten
#
# Algorithm 2 as on the slide visits all $T$ times. DDIM needs far fewer for the same digits; we compare at equal noise.

# %%
few = label[: 2 if QUICK else 10]
told = shipped.denoiser(few)
x_T = Rng(7).normal((len(few), 28, 28, 1))  # noqa: N816
ways = [
    ("Algorithm 2", ddpm, 1000),
    ("Algorithm 2", ddpm, 20),
    ("DDIM", ddim, 50),
    ("DDIM", ddim, 10),
    ("DDIM", ddim, 4),
]
figure, axes = plt.subplots(len(ways), 1, figsize=(8, 5.2))
for axis, (sampler_name, sampler, steps) in zip(axes, ways, strict=True):
    name, start = f"{sampler_name}, {steps} steps", time.perf_counter()
    x = last(sampler(told, x_T, shipped.schedule, Rng(8), steps=min(steps, 4) if QUICK else steps))
    print(f"{name:24} {time.perf_counter() - start:6.2f} s")
    axis.imshow(grid(x.clip(-1, 1), columns=len(few)), cmap="gray")
    axis.set_title(name, fontsize=10, loc="left", pad=3)
    axis.axis("off")
save(figure, "09_steps.png")

# %% [markdown]
# ![steps](out/09_steps.png)
#
# With DDIM the noise $x_T$ alone decides: 50 and 10 steps give nearly the same digits, 4 steps a rougher copy.
# Algorithm 2 draws fresh noise in each step, so its digits are others.
#
# ## Does it only repeat what it saw?
#
# Below each of some samples, the most similar of our 4,500 digits, all of which the model was trained on. A copy would
# be the same to the pixel. Printed: how far the samples are from the nearest of them, on average, and how far 500 other
# digits are, which are not among them. (The model was trained on 55,500 more, and a copy of one of those would escape
# us. But a model that copies would copy ours too.)


# %%
def squared_distances(a, b):
    """Between all images of a (N, 784) and of b (M, 784): (N, M)."""
    return (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T


flat, other = images.reshape(-1, 784), to_signed(mnist.load("embedded", "test").images).reshape(-1, 784)
drawn = states[-1].clip(-1, 1).reshape(-1, 784)
for name, x in (("samples", drawn), ("other digits", other)):
    far = np.sqrt(squared_distances(x, flat).min(axis=1))
    print(f"distance to the nearest of the 4,500: {name:12} {far.mean():.1f} on average, {far.min():.1f} at least")
nearest = squared_distances(drawn[:8], flat).argsort(axis=1)[:, :4]
rows = [np.concatenate([drawn[i : i + 1], flat[found]]) for i, found in enumerate(nearest)]
figure, axes = plt.subplots(1, len(rows), figsize=(1.2 * len(rows), 5.4))
for axis, row in zip(axes, rows, strict=True):
    axis.imshow(grid(row.reshape(-1, 28, 28), columns=1), cmap="gray")
    axis.axis("off")
axes[0].set_title("a sample, and below it its nearest", fontsize=11, loc="left")
save(figure, "09_nearest.png")

# %% [markdown]
# ![nearest](out/09_nearest.png)
#
# ## What to expect
#
# | you see | it means |
# |---|---|
# | the loss stands still after a minute | normal: most of it cannot be learned away (lesson 6) |
# | grey blots | too few steps of training |
# | strokes, no digits | the same, later |
# | some samples unreadable | normal for a small model: more training, or guidance (lesson 12) |
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. A network that always answers 0 for $\varepsilon$ has which loss on digits? And for target $x_0$, on these images,
#    one line of NumPy?
# 2. How many calls of the network does a batch of 64 digits take in 50 steps of DDIM, with guidance (two calls a step)?

# %%
loss_of_zero_for_eps, loss_of_zero_for_x_0 = None, None
calls = None

if loss_of_zero_for_eps is not None:
    assert np.isclose(loss_of_zero_for_eps, 1) and np.isclose(loss_of_zero_for_x_0, (images**2).mean(), rtol=1e-3)
    print("exercise 1 is right")
if calls is not None:
    assert calls == 100  # each for the whole batch
    print("exercise 2 is right")
