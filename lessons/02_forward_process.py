# %% [markdown]
# # Lesson 2: the forward process, from a digit to noise
#
# A diffusion model learns to undo a process that destroys an image little by little. That process has nothing to
# learn: it is a fixed recipe for adding noise. This lesson follows it with real digits.
#
# You will see
# - **E1** one step, and **E2** the whole chain of steps;
# - **E3** and **E4**: the chain can be skipped, any $x_t$ is one line of code away;
# - **E5** why the end of the chain is pure noise, with a number for how pure;
# - **E6** and **E7**: the linear and the cosine schedule;
# - **what the slide misprints in E17**: two missing bars, and what they would cost.
#
# Run it from anywhere: `python lessons/02_forward_process.py` takes a few seconds and writes its pictures to
# `lessons/out/`.

# %%
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data import mnist
from tinydiff.diffusion import Schedule, ddpm, denoiser, forward_marginal, forward_trajectory, last, q_sample
from tinydiff.image import grid, to_signed

OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREY = "#1f5fa8", "#c8401f", "#777777"

digits = mnist.load("embedded")
images = to_signed(digits.images)  # (N, 28, 28), float32 in [-1, 1]
x_0 = images[[int(np.argmax(digits.labels == label)) for label in (3, 5, 8)]]  # a three, a five, an eight
schedule = Schedule.linear(1000)
print(schedule)


def show(file, rows, times, names):
    """Draw rows of images, a column for each time, and save the picture."""
    figure, axes = plt.subplots(len(rows), len(times), figsize=(1.15 * len(times) + 1.3, 1.2 * len(rows) + 0.35))
    for row, name, line in zip(rows, names, axes, strict=True):
        for image, axis in zip(row, line, strict=True):
            axis.imshow(image, cmap="gray", vmin=-1.5, vmax=1.5)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
    for time, axis in zip(times, axes[0], strict=True):
        axis.set_title(f"t = {time}", fontsize=11)
    figure.tight_layout(pad=0.4)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## One step, and then a thousand (E1, E2)
#
# $$q(x_t \mid x_{t-1}) = \mathcal N\!\left(\sqrt{1-\beta_t}\; x_{t-1},\; \beta_t I\right)$$
#
# Each step shrinks the image a little and adds a little noise. Why shrink at all? If the pixels have variance 1, the
# result has variance $(1-\beta_t)\cdot 1 + \beta_t = 1$ again: the noise replaces the image instead of piling up on it.
#
# `forward_trajectory` is a generator. It yields $x_1, x_2, \dots, x_T$, each drawn from the one before.

# %%
times = [0, 50, 100, 200, 300, 400, 600, 1000]
chain = [x_0, *forward_trajectory(x_0, schedule, Rng(0))]  # x_0, x_1, ..., x_1000
assert len(chain) == 1001

# %% [markdown]
# ## Skipping the chain (E3, E4)
#
# A Gaussian step after a Gaussian step is a Gaussian step. With $\alpha_t = 1-\beta_t$ and
# $\bar\alpha_t = \prod_{i\le t}\alpha_i$ the first $t$ steps together are
#
# $$q(x_t \mid x_0) = \mathcal N\!\left(\sqrt{\bar\alpha_t}\; x_0,\; (1-\bar\alpha_t) I\right)
# \qquad\text{or}\qquad x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon.$$
#
# One line instead of $t$ draws. Training depends on it: each training step asks for a random $t$.

# %%
jumps = [q_sample(x_0, t, Rng(1).normal_like(x_0), schedule) for t in times]
show(
    "02_chain_and_jump.png",
    [[chain[t][0] for t in times], [jump[0] for jump in jumps]],
    times,
    ["E1, step\nby step", "E4, at\nonce"],
)

# %% [markdown]
# ![chain and jump](out/02_chain_and_jump.png)
#
# The two rows are not the same picture, since other noise was drawn; they are draws from the same distribution. To see
# that, follow one single pixel of value 0.8 through 4000 chains, and hold the formula against them.

# %%
pixel, n = 0.8, 4000
short = Schedule.linear(100)
walks = np.stack([np.full(n, pixel), *forward_trajectory(np.full(n, pixel), short, Rng(2))])  # (101, n)
t_axis = np.arange(101)
mean, std = (np.array(v) for v in zip(*[forward_marginal(np.float64([pixel]), t, short) for t in t_axis], strict=True))
mean = mean[:, 0]

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1.15, 1))
left.plot(t_axis, walks[:, :25], color=GREY, lw=0.5, alpha=0.55)
left.plot(t_axis, mean, color=BLUE, lw=2.2, label=r"E4: mean $\sqrt{\bar\alpha_t}\,x_0$")
left.fill_between(t_axis, mean - 2 * std, mean + 2 * std, color=BLUE, alpha=0.16, label="E4: mean ± 2 std")
left.set(xlabel="t", ylabel="the pixel's value", title="E2: 25 chains of one pixel, T = 100", xlim=(0, 100))
left.legend(loc="lower left", frameon=False)
values = np.linspace(-4, 4, 400)
for t, color in zip((3, 20, 100), ("#7fb2e5", "#3d7fc4", "#123f73"), strict=True):
    right.hist(walks[t], bins=40, density=True, color=color, alpha=0.35)
    density = np.exp(-((values - mean[t]) ** 2) / (2 * std[t] ** 2)) / (std[t] * np.sqrt(2 * np.pi))
    right.plot(values, density, color=color, lw=2, label=f"t = {t}")
right.set(xlabel="the pixel's value", title="4000 chains (bars) and E4 (curves)", yticks=[], xlim=(-4, 4))
right.legend(frameon=False)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "02_one_pixel.png", dpi=130)
plt.close(figure)

for t in (1, 10, 50, 100):  # every average within 5 standard errors of the formula
    assert abs(walks[t].mean() - mean[t]) < 5 * std[t] / np.sqrt(n)
    assert abs(walks[t].var() - std[t] ** 2) < 5 * std[t] ** 2 * np.sqrt(2 / n)

# %% [markdown]
# ![one pixel](out/02_one_pixel.png)
#
# ## How pure is the noise at the end? (E5)
#
# Sampling will start from $\mathcal N(0, I)$, so $x_T$ had better be that. The Kullback-Leibler divergence per pixel,
#
# $$\mathrm{KL} = \tfrac12\left(\bar\alpha_T x_0^2 - \bar\alpha_T - \log(1-\bar\alpha_T)\right),$$
#
# says how far it is. `Schedule` warns where it is not small, as it does here about the first 400 of the 1000 steps
# taken alone: they leave a ghost of the image at the end. `Schedule.linear(400)` is safe: its betas are larger.

# %%
for name, s in [("linear", schedule), ("cosine", Schedule.cosine(1000))]:
    print(f"{name}: alpha_bar_T = {s.alpha_bar[-1]:.1e}, KL of these digits = {s.terminal_kl(x_0):.1e} nats per pixel")
cut_short = Schedule.from_betas(schedule.beta[1:401])  # warns
print(f"400 steps of 1000: alpha_bar = {cut_short.alpha_bar[-1]:.2f}, KL = {cut_short.terminal_kl(x_0):.1e}")

# %% [markdown]
# ## Two schedules (E6, E7)
#
# Linear (Ho et al. 2020): $\beta_t$ rises evenly from $10^{-4}$ to $0.02$.
# Cosine (Nichol and Dhariwal 2021): $\bar\alpha_t = f(t)/f(0)$ with
# $f(t) = \cos^2\!\left(\frac{t/T+s}{1+s}\cdot\frac\pi2\right)$, $s = 0.008$, $\beta_t$ clipped at 0.999.
#
# The linear schedule has destroyed the digit well before the end, and its last steps teach the network nothing. The
# cosine schedule spreads the loss over the whole way.

# %%
cosine = Schedule.cosine(1000)
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
for s, name, color in [(schedule, "linear (E6)", RED), (cosine, "cosine (E7)", BLUE)]:
    t_axis = np.arange(1, 1001)
    axes[0].plot(t_axis, s.beta[1:], color=color, lw=2, label=name)
    axes[1].plot(np.arange(1001), s.alpha_bar, color=color, lw=2, label=name)
    axes[2].plot(t_axis, s.snr[1:], color=color, lw=2, label=name)
axes[0].set(title=r"noise added in step t: $\beta_t$", yscale="log")
axes[1].set(title=r"signal left: $\bar\alpha_t$")
axes[2].set(title=r"signal-to-noise: $\bar\alpha_t/(1-\bar\alpha_t)$", yscale="log")
axes[2].axhline(1, color=GREY, lw=0.8, ls=":")
for axis in axes:
    axis.set(xlabel="t", xlim=(0, 1000))
    axis.spines[["top", "right"]].set_visible(False)
axes[1].legend(frameon=False)
figure.tight_layout()
figure.savefig(OUT / "02_schedules.png", dpi=130)
plt.close(figure)

times = [0, 100, 200, 300, 400, 500, 600, 700, 800, 1000]
eps = Rng(3).normal_like(x_0)
rows = [[q_sample(x_0, t, eps, s)[1] for t in times] for s in (schedule, cosine)]
show("02_linear_and_cosine.png", rows, times, ["linear", "cosine"])

# %% [markdown]
# ![the schedules](out/02_schedules.png)
# ![digits under both](out/02_linear_and_cosine.png)
#
# ## Two missing bars (the slide's E17)
#
# The training slide makes its noisy image as $x_t = \sqrt{\alpha_t}\,x_0 + \sqrt{1-\alpha_t}\,\varepsilon$. The bars
# are missing: it must be $\sqrt{\bar\alpha_t}$ and $\sqrt{1-\bar\alpha_t}$, as in E4. Without bars this is the noise
# of *one* step, of variance $\beta_t \le 0.02$, even at $t = T$. The network would never see a really noisy image, yet
# sampling starts from nothing but noise.

# %%
times = [1, 100, 200, 400, 600, 800, 1000]
with_bars = [q_sample(x_0, t, eps, schedule)[2] for t in times]
without = [(np.sqrt(schedule.alpha[t]) * x_0 + np.sqrt(1 - schedule.alpha[t]) * eps)[2] for t in times]
show("02_misprint.png", [with_bars, without], times, ["E4, with\nthe bars", "as the\nslide prints"])

signal_to_noise = schedule.alpha[1000] / (1 - schedule.alpha[1000])
print(f"signal-to-noise at t = T: {schedule.snr[1000]:.0e} with the bars, {signal_to_noise:.0f} as printed")

# %% [markdown]
# ![the misprint](out/02_misprint.png)
#
# What would training make of it? For a finite set of images we need not train to find out, because the best possible
# network is known. Given $x_t$, the image it came from was number $i$ with probability $w_i$, so the best guess is
#
# $$E[x_0 \mid x_t] = \sum_i w_i x^{(i)}, \qquad
# w = \mathrm{softmax}_i\left(-\frac{\lVert x_t - \sqrt{a}\,x^{(i)}\rVert^2}{2\,(1-a)}\right)$$
#
# with $a = \bar\alpha_t$ for the correct training and $a = \alpha_t$ for the misprint. We let both perfect students
# learn 500 digits by heart, 50 of each kind, and draw 500 samples by Algorithm 2 (E19). A sampler that works draws each
# kind 50 times, give or take 7.

# %%
few = np.concatenate([images[digits.labels == label][:50] for label in range(10)]).reshape(500, 784)
kind = np.repeat(np.arange(10), 50)
short = Schedule.linear(100)


def perfect_student(a):
    """The network that minimises the loss of training with x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps."""

    def network(x_t, t):
        a_t = float(a[t[0]])
        square_distance = ((x_t**2).sum(axis=1)[:, None] + a_t * (few**2).sum(axis=1)) - 2 * a_t**0.5 * x_t @ few.T
        logits = -square_distance / (2 * (1 - a_t))
        w = np.exp(logits - logits.max(axis=1, keepdims=True))
        best_x_0 = (w / w.sum(axis=1, keepdims=True)) @ few
        return (x_t - a_t**0.5 * best_x_0) / (1 - a_t) ** 0.5  # the eps that goes with it

    return network


def draw(a):
    """500 samples of the student of table a, and how often each kind of digit is among them."""
    samples = last(ddpm(denoiser(perfect_student(a), short), Rng(4).normal((500, 784)), short, Rng(5)))
    nearest = (2 * samples @ few.T - (few**2).sum(axis=1)).argmax(axis=1)
    return samples.reshape(-1, 28, 28), np.bincount(kind[nearest], minlength=10)


(right_samples, right_counts), (misprint_samples, misprint_counts) = draw(short.alpha_bar), draw(short.alpha)
print("digits 0 to 9 among 500 samples, with the bars:", *right_counts)
print("digits 0 to 9 among 500 samples, as printed:   ", *misprint_counts)
assert (np.abs(right_counts - 50) < 4 * np.sqrt(500 * 0.1 * 0.9)).all()  # what chance allows
assert misprint_counts[1] < 10 < 80 < misprint_counts[0]  # hardly a one, far too many zeros

figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), width_ratios=(1.6, 1))
for (pictures, bars), samples, counts, name, color in zip(
    axes,
    (right_samples, misprint_samples),
    (right_counts, misprint_counts),
    (r"trained with $\sqrt{\bar\alpha_t}$ (E4)", r"trained with $\sqrt{\alpha_t}$ (the slide)"),
    (BLUE, RED),
    strict=True,
):
    pictures.imshow(grid(samples[:60], columns=12), cmap="gray")
    pictures.set_title(name, fontsize=11, loc="left")
    pictures.axis("off")
    bars.bar(range(10), counts, color=color)
    bars.axhline(50, color=GREY, lw=1, ls="--")
    bars.set(xticks=range(10), ylim=(0, misprint_counts.max()), ylabel="of 500 samples")
    bars.spines[["top", "right"]].set_visible(False)
axes[1, 1].set_xlabel("digit")
figure.tight_layout()
figure.savefig(OUT / "02_misprint_samples.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![samples](out/02_misprint_samples.png)
#
# The misprint gives the wrong distribution even to a perfect student: its first step takes pure noise for a slightly
# noisy digit and jumps to the nearest one. Thin ones are never near, fat zeros often are. And a real network, which
# does not know the 500 digits by heart, would have to guess what to do with noise of a kind it was never shown.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Two steps with $\beta_1 = 0.1$ and $\beta_2 = 0.2$ start from a pixel $x_0 = 1$. What are the mean and the variance
#    of $x_2$? Work it out on paper with E1 twice, then with E4.
# 2. From which $t$ on does $x_t$ hold more noise than signal, that is $\bar\alpha_t < \frac12$, in the linear and in
#    the cosine schedule of 1000 steps? One line of NumPy each.

# %%
mean_of_x_2, variance_of_x_2 = None, None
first_t_linear, first_t_cosine = None, None

if mean_of_x_2 is not None:
    a, b = 0.9, 0.8
    assert np.isclose(mean_of_x_2, np.sqrt(a * b)) and np.isclose(variance_of_x_2, b * (1 - a) + (1 - b))
    print("exercise 1 is right")
if first_t_linear is not None:
    for s, t in [(schedule, first_t_linear), (cosine, first_t_cosine)]:
        assert s.alpha_bar[t] < 0.5 <= s.alpha_bar[t - 1]
    print("exercise 2 is right")
