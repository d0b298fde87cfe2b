# %% [markdown]
# # Lesson 10: fast samplers, or how few steps will do
#
# Algorithm 2 (**E19**) calls the network a thousand times for one batch of images. All the time that sampling takes is
# spent in these calls, so the question of this lesson is: how good are the samples after 10 calls, or 20, or 50?
#
# You will see
# - that behind the random walk of DDPM there is a smooth flow with the same destination, and samplers that follow it;
# - **DDIM**, which takes steps of first order along the flow, and **Heun** and **DPM-Solver++**, of second order;
# - what "order" means, measured: halve the steps, and the error falls to a half, or to a quarter;
# - how samples of DDPM, which adds noise at each step, compare;
# - one formula that looks right and fails, because a schedule is infinite at its end.
#
# To measure errors we need to know the right answer. So there is no trained network here: the data are simple enough
# for the best possible network to be a formula, and every error below is the sampler's own.
#
# Run it from anywhere: `python lessons/10_fast_samplers.py` takes about half a minute and writes its pictures to
# `lessons/out/`.

# %%
import functools
import itertools
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data import mnist
from tinydiff.diffusion import Schedule, ddim, ddpm, denoiser, dpm_solver, heun, last, timesteps
from tinydiff.image import grid, to_signed

QUICK = "TINYDIFF_QUICK" in os.environ  # set by the tests: fewer samples and steps
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"
COLORS = {"DDPM": GREY, "DDIM": BLUE, "Heun": RED, "DPM-Solver++": GREEN}

schedule = Schedule.cosine(1000)

# %% [markdown]
# ## Data whose best network is a formula
#
# Twenty-four soft dots on a spiral: with probability $1/24$ each, $x_0$ is drawn from $\mathcal N(c_k, w^2 I)$. Then
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$ (**E4**) is a sum of Gaussians as well,
# of variance $v_t = \bar\alpha_t w^2 + 1 - \bar\alpha_t$ around $\sqrt{\bar\alpha_t}\,c_k$, and Bayes' rule gives
# the best guess at $x_0$, which a perfectly trained network would output:
#
# $$E[x_0 \mid x_t] =
# \sum_k p_k \left(c_k + \tfrac{\sqrt{\bar\alpha_t} w^2}{v_t}\,(x_t - \sqrt{\bar\alpha_t}\,c_k)\right),
# \qquad p = \mathrm{softmax}_k\left(-\frac{\lVert x_t-\sqrt{\bar\alpha_t}\,c_k\rVert^2}{2 v_t}\right).$$

# %%
turn = np.linspace(0.6, 8.5, 24)
centres = (0.56 + 0.19 * (turn - 0.6))[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
width = 0.1


def best_network(x_t, t):
    """E[x_0 | x_t] for the spiral; x_t: (B, 2), t: (B,), all the same."""
    signal, noise = schedule.alpha_bar[t[0]], schedule.one_minus_alpha_bar[t[0]]
    v = signal * width**2 + noise
    logits = (np.sqrt(signal) * x_t @ centres.T - signal * (centres**2).sum(axis=1) / 2) / v
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return (noise * p @ centres + np.sqrt(signal) * width**2 * x_t) / v


denoise = denoiser(best_network, schedule, "x0", clip=False)  # points have no [-1, 1] to be clipped to


def true_samples(n, rng):
    """n draws from the data."""
    return centres[rng.integers(0, 24, (n,))] + width * rng.normal((n, 2), np.float64)


# %% [markdown]
# ## One destination, many ways
#
# DDPM walks: each step removes some noise and adds a little new noise. Song et al. (2021) found that there is a flow
# without any noise whose points, at each $t$, are distributed just as DDPM's. Write $\varphi_t$ for the angle with
# $\cos\varphi_t = \sqrt{\bar\alpha_t}$ and $\sin\varphi_t = \sqrt{1-\bar\alpha_t}$. Data are at $\varphi = 0$, noise
# at $\varphi = \pi/2$, and the flow is
#
# $$\frac{dx}{d\varphi} = v(x, t), \qquad v = \cos\varphi_t\,\varepsilon_\theta - \sin\varphi_t\,x_\theta,$$
#
# with the $v$ of **E15**: the velocity of the point. A sampler is now a method to solve this equation from
# $\varphi = \pi/2$ down to 0. What each of them does to get from $t$ to the next time $s$:
#
# - **DDIM** guesses $x_0$ and $\varepsilon$ at $t$, and mixes them anew:
#   $x_s = \sqrt{\bar\alpha_s}\,x_0 + \sqrt{1-\bar\alpha_s}\,\varepsilon$. It calls the network $N$ times in $N$ steps.
# - **Heun** tries DDIM's step, asks for $v$ there too, goes back, and takes the step with the mean of both:
#   $2N - 1$ calls.
# - **DPM-Solver++(2M)** takes DDIM's step, but with the $x_0$ that one expects in the middle of the step if $x_0$ goes
#   on changing as it did since the step before: $N$ calls.
#
# Heun pays for its second order with a second call. DPM-Solver++ has it for nothing: it remembers.
#
# Below, the same draws of noise (dots) on their way to the data, two of them for DDPM and sixteen for the others. The
# grey lines are the flow itself, followed in 1000 steps of Heun's, and the crosses are its ends.


# %%
def calls_of(name, steps):
    """How many times a sampler calls the network."""
    return 2 * steps - 1 if name == "Heun" else steps


noise = Rng(0).normal((400, 2), np.float64)
if QUICK:
    noise = noise[:60]
fine = 334 if QUICK else 1000
flow = np.stack([noise, *heun(denoise, noise, schedule, Rng(1), steps=fine, spacing="linspace")])
reference = flow[-1]

plans = [
    ("DDPM", ddpm, 1000, [3, 9]),
    ("DDIM", ddim, 7, range(16)),
    ("Heun", heun, 4, range(16)),
    ("DPM-Solver++", dpm_solver, 7, range(16)),
]
cloud = true_samples(1500, Rng(9))
figure, axes = plt.subplots(2, 2, figsize=(10, 10))
for axis, (name, sampler, steps, shown) in zip(axes.flat, plans, strict=True):
    path = np.stack([noise, *sampler(denoise, noise, schedule, Rng(1), steps=steps)])
    style = {"lw": 0.6} if name == "DDPM" else {"lw": 1, "marker": "o", "ms": 3}
    axis.scatter(*cloud.T, s=4, color="#e8c268", alpha=0.6, lw=0)
    axis.plot(flow[:, shown, 0], flow[:, shown, 1], color="#bbbbbb", lw=3)
    axis.plot(path[:, shown, 0], path[:, shown, 1], color=COLORS[name], **style)
    axis.scatter(*noise[shown].T, color="black", s=20, zorder=3)
    axis.scatter(*reference[shown].T, color="black", marker="x", s=30, lw=1, zorder=3)
    axis.set(title=f"{name}: {calls_of(name, steps)} calls", xticks=[], yticks=[], aspect="equal")
    axis.set(xlim=(-2.5, 2.7), ylim=(-2.7, 2.5))
figure.tight_layout()
figure.savefig(OUT / "10_paths.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![paths](out/10_paths.png)
#
# DDPM ends somewhere else, since it draws lots on the way. The flow's lines are nearly straight at first, where every
# guess is the middle of all data, and bend where it is decided which dot the point will belong to. There DDIM, which
# follows the tangent, leaves the line.
#
# ## Order, measured
#
# How far does each end from where the flow ends, for the same noise? We double the number of steps and look. A
# method is of order $p$ if this divides the error by $2^p$.
#
# The last step of all goes to $t = 0$, where nobody trained a network. All samplers take it as DDIM does, and it limits
# them: with the usual spacing, "trailing", it starts from $t = T/N$, where there is still noise left. "linspace"
# visits $t = 1$ before the end, and shows what a method can do. The dashed lines are "trailing".

# %%
steps_tried = (5, 10, 20, 40) if QUICK else (5, 10, 20, 40, 80, 160, 320)
samplers = {"DDIM": ddim, "Heun": heun, "DPM-Solver++": dpm_solver}


def error(sampler, steps, spacing):
    """The root mean square distance from where the flow ends."""
    end = last(sampler(denoise, noise, schedule, Rng(1), steps, spacing=spacing))
    return np.sqrt(((end - reference) ** 2).sum(axis=1).mean())


errors = {
    (name, spacing): np.array([error(sampler, steps, spacing) for steps in steps_tried])
    for name, sampler in samplers.items()
    for spacing in ("linspace", "trailing")
}
for (name, spacing), values in errors.items():
    print(f"{name:12s} {spacing:8s} steps {steps_tried}: error", *(f"{value:.4f}" for value in values))
if not QUICK:
    order = {key: np.log2(values[-4] / values[-1]) / 3 for key, values in errors.items()}
    print("order:", {f"{name}, {spacing}": round(float(p), 2) for (name, spacing), p in order.items()})
    assert 0.6 < order["DDIM", "linspace"] < 1.3
    assert order["Heun", "linspace"] > 1.7 and order["DPM-Solver++", "linspace"] > 1.7

# %% [markdown]
# ## A formula that looks right
#
# Papers often write the flow in the variables $\bar x = x/\sqrt{\bar\alpha}$ and
# $\sigma = \sqrt{1-\bar\alpha}/\sqrt{\bar\alpha}$, where it is as simple as it can be: $d\bar x/d\sigma = \varepsilon$.
# Then Heun's step is $\bar x_s = \bar x_t + (\sigma_s - \sigma_t)\,\frac12(\varepsilon_t + \varepsilon_s)$. It is the
# same flow, and where $\sigma$ starts at 80, with times chosen for it, it is the method of Karras et al. (2022). But
# $\sigma = \tan\varphi$: under the cosine schedule (**E7**) $\sigma_T$ is 20,000, and it would be infinite if
# $\bar\alpha_T$ were 0. A tiny difference between two $\varepsilon$ is multiplied by half of that.

# %%
sigma = np.sqrt(schedule.one_minus_alpha_bar / schedule.alpha_bar)


def heun_in_sigma(denoise, x_t, schedule, rng, steps, spacing):
    """Heun's method in x/sqrt(alpha_bar) and sigma, with the times of the other samplers."""
    times = [*timesteps(schedule.T, steps, spacing), 0]
    for t, s in itertools.pairwise(times):
        a_t, a_s = np.sqrt(schedule.alpha_bar[[t, s]])
        eps = denoise(x_t, t).eps
        x_s = x_t / a_t + (sigma[s] - sigma[t]) * eps
        if s > 0:
            x_s = x_t / a_t + (sigma[s] - sigma[t]) * (eps + denoise(a_s * x_s, s).eps) / 2
        x_t = a_s * x_s
        yield x_t


in_sigma = np.array([error(heun_in_sigma, steps, "linspace") for steps in steps_tried])
print(f"Heun in sigma: sigma_T = {sigma[-1]:.0f}, error", *(f"{value:.3g}" for value in in_sigma))

figure, axis = plt.subplots(figsize=(7.5, 5.2))
for (name, spacing), values in errors.items():
    calls = [calls_of(name, steps) for steps in steps_tried]
    style = {"marker": "o", "ms": 4} if spacing == "linspace" else {"ls": "--", "lw": 1}
    axis.loglog(calls, values, color=COLORS[name], label=f"{name}, {spacing}", **style)
axis.loglog([calls_of("Heun", n) for n in steps_tried], in_sigma, color="#d9a08f", label="Heun in σ, linspace")
corner = np.array([9, 30])
for p in (1, 2):
    axis.loglog(corner, 0.008 * (corner / corner[0]) ** -float(p), color="black", lw=0.8)
    axis.text(32, 0.008 * 3.33**-p, f"order {p}", fontsize=9, va="center")
axis.set(xlabel="calls of the network", ylabel="distance from the flow's end", ylim=(2e-5, 5))
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, loc="upper right", fontsize=9)
figure.tight_layout()
figure.savefig(OUT / "10_error.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![error](out/10_error.png)
#
# The angle has no such end: $\varphi$ stays between 0 and $\pi/2$ whatever the schedule. This is why `heun` uses it.
# The lesson is general: which variable a method is written in does not matter for infinitely many steps, and a great
# deal for ten.
#
# ## But are the samples good?
#
# DDPM has no flow to stay close to, and a sample may leave its line and still be a good sample. So let us ask a
# different question: are 12,000 samples distributed as the data are? We look at them from 60 directions, sort what we
# see, and measure how far each sample would have to move to make it the data's (the sliced Wasserstein distance). True
# samples have a distance too, by chance: the grey band.

# %%
n = 200 if QUICK else 12_000
directions = np.stack([f(np.linspace(0, np.pi, 60, endpoint=False)) for f in (np.cos, np.sin)])  # (2, 60)
many = true_samples(20 * n, Rng(7))
seen_many = np.sort(many @ directions, axis=0).reshape(n, 20, 60).mean(axis=1)
more_noise = Rng(10).normal((n, 2), np.float64)


def distance(samples):
    """How far samples are from the data, as a distance in the plane."""
    return np.sqrt(((np.sort(samples @ directions, axis=0) - seen_many) ** 2).mean())


chances = [distance(true_samples(n, Rng(20 + i))) for i in range(20)]
quality = {
    "DDPM, variance β̃": functools.partial(ddpm, variance="posterior"),
    "DDPM, variance β": functools.partial(ddpm, variance="beta"),
    **samplers,
}
steps_tried = (5, 10) if QUICK else (4, 6, 10, 16, 25, 50, 100)
samples = {
    (name, steps): last(sampler(denoise, more_noise, schedule, Rng(3), steps=steps))
    for name, sampler in quality.items()
    for steps in steps_tried
}
distances = {name: [distance(samples[name, steps]) for steps in steps_tried] for name in quality}
for name, values in distances.items():
    print(f"{name:18s} steps {steps_tried}: distance", *(f"{value:.3f}" for value in values))
print(f"by chance: {min(chances):.3f} to {max(chances):.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
for name, values in distances.items():
    calls = [calls_of(name, steps) for steps in steps_tried]
    dashed = "--" if name.endswith(" β") else "-"
    left.loglog(calls, values, color=COLORS[name.split(",")[0]], ls=dashed, marker="o", ms=4, label=name)
left.set(xlabel="calls of the network", ylabel="distance from the data", title="samples, sampler by sampler")
etas = np.linspace(0, 1, 3 if QUICK else 6)
for steps, shade in zip((10, 30, 100), ("#8fb8e0", "#3d7fc4", "#123f73"), strict=True):
    ends = [last(ddim(denoise, more_noise, schedule, Rng(3), steps, eta=eta)) for eta in etas]
    right.semilogy(etas, [distance(end) for end in ends], color=shade, marker="o", ms=4, label=f"{steps} steps")
right.set(xlabel="η: 0 no noise, 1 as much as DDPM with β̃", title="DDIM, by how much noise it draws")
for axis in (left, right):
    axis.axhspan(min(chances), max(chances), color="#eeeeee", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
figure.tight_layout()
figure.savefig(OUT / "10_quality.png", dpi=130)
plt.close(figure)
if not QUICK:
    few = steps_tried.index(10)
    assert distances["DPM-Solver++"][few] < distances["DDIM"][few] < distances["DDPM, variance β̃"][few]

# %% [markdown]
# ![quality](out/10_quality.png)
#
# The curves go down until nothing but chance is left: after some 25 calls for the two samplers of second order, after
# 100 for DDIM.
#
# For DDPM it matters how much noise it adds (**E13**). The variance $\tilde\beta_t$ is exact if the data are one single
# point. With it, or with $\eta = 1$, which is the same sampler, samples crowd together while steps are long. The
# variance $\beta_t$ is exact if the data are $\mathcal N(0, I)$. The spiral, seen through much noise, is more like the
# second: with $\beta_t$, DDPM in ten steps does as well as the samplers of second order. On other data the same choice
# can be the worse one, which is why Nichol and Dhariwal let the network learn it.
#
# ## Digits
#
# The same on images. The best network for a finite set of images is the softmax of lesson 2; here it knows 1000 digits,
# 100 of each kind. The flow leads every noise to one of them. Do few steps lead it there too?

# %%
digits = mnist.load("embedded")
each = 20 if QUICK else 100
known = np.concatenate([to_signed(digits.images[digits.labels == label][:each]) for label in range(10)]).reshape(
    -1, 784
)
squares = (known**2).sum(axis=1)


def memory(x_t, t):
    """E[x_0 | x_t] when the data are the known digits."""
    signal, rest = float(schedule.alpha_bar[t[0]]), float(schedule.one_minus_alpha_bar[t[0]])
    logits = (signal**0.5 * x_t @ known.T - signal * squares / 2) / rest
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True)) @ known


def nearest(samples):
    """Which of the known digits each sample is."""
    return (2 * samples @ known.T - squares).argmax(axis=1)


remember = denoiser(memory, schedule, "x0")
pixels = Rng(11).normal((30 if QUICK else 300, 784))
calls_tried = (5, 9) if QUICK else (3, 5, 9, 15, 25, 49, 99)
arrive = last(heun(remember, pixels, schedule, Rng(5), steps=30 if QUICK else 200))
ends = {
    (name, calls): last(
        sampler(remember, pixels, schedule, Rng(5), steps=(calls + 1) // 2 if name == "Heun" else calls)
    )
    for name, sampler in samplers.items()
    for calls in calls_tried
}
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(1.5, 1))
rows = [arrive, *(ends[name, 9] for name in samplers)]
sheet = grid(np.concatenate([row[:14] for row in rows]).reshape(-1, 28, 28), columns=14)
left.imshow(sheet, cmap="gray")
left.set(xticks=[], yticks=14 + 30 * np.arange(4), title="the flow's ends, and those of each sampler in 9 calls")
left.set_yticklabels(["the flow", *samplers])
left.tick_params(length=0)
left.spines[:].set_visible(False)
for name in samplers:
    share = [100 * np.mean(nearest(ends[name, calls]) == nearest(arrive)) for calls in calls_tried]
    print(f"{name:12s} calls {calls_tried}: led to the right digit", *(f"{value:.0f}%" for value in share))
    right.semilogx(calls_tried, share, color=COLORS[name], marker="o", ms=4, label=name)
right.set(xlabel="calls of the network", ylabel="led to the right digit, %", ylim=(0, 102))
right.set(xticks=calls_tried, xticklabels=calls_tried)
right.minorticks_off()
right.spines[["top", "right"]].set_visible(False)
right.legend(frameon=False)
figure.tight_layout()
figure.savefig(OUT / "10_digits.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![digits](out/10_digits.png)
#
# Here the second order gains nothing below some fifteen calls, and Heun, which spends two calls on every step, loses.
# Separate points make the flow bend more sharply than a long step can see, and no method is of any order until its
# steps are shorter than the bends. How the flow of a trained network bends depends on the data and on the network, and
# so does which sampler is best for it. Measure, on the model you have: `python examples/sample.py RUN --sampler dpm
# --steps 20` draws from yours.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. A batch takes one second a call. How long do 18 steps of Heun's method take, and 18 of DPM-Solver++?
# 2. Invent a sampler. DDIM uses the velocity at the start of a step, Heun the mean of both ends. The method of Adams
#    and Bashforth guesses the velocity in the middle of the step from the last two,
#    $v = \frac32 v_t - \frac12 v_{before}$, and costs one call a step. Write `my_sampler(denoise, noise, phi, times)`:
#    `phi[t]` is the angle, `times` the falling list of times, the last being 1; return the state at $t = 1$. Take the
#    first step with $v_t$ alone. Of three times the steps a method of first order makes a third of the error; yours
#    must make less than a fifth.

# %%
seconds_heun, seconds_dpm = None, None
my_sampler = None

if seconds_heun is not None:
    assert (seconds_heun, seconds_dpm) == (calls_of("Heun", 18), calls_of("DPM-Solver++", 18))
    print("exercise 1 is right")
if my_sampler is not None:
    phi = np.arctan2(np.sqrt(schedule.one_minus_alpha_bar), np.sqrt(schedule.alpha_bar))
    coarse, finer = (
        np.sqrt(((my_sampler(denoise, noise, phi, timesteps(1000, N, "linspace")) - flow[-2]) ** 2).sum(axis=1).mean())
        for N in (38, 112)  # 37 and 111 jumps, which divide 999 evenly
    )
    assert coarse / finer > 5, f"three times the steps divide the error by only {coarse / finer:.1f}"
    print("exercise 2 is right")
