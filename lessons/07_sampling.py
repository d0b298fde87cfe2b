# %% [markdown]
# # Lesson 7: sampling, or how noise walks back to the data
#
# Training leaves us with $\varepsilon_\theta(x_t, t)$, a guess of the noise in $x_t$. How do a thousand guesses turn
# noise into data? In this lesson the guess is *perfect*: the data are a mixture of Gaussians, of which the best
# possible network is known in one line. So whatever goes wrong below, the sampler did it.
#
# You will see
# - **E19** Algorithm 2, line by line, and the score field its particles follow;
# - **what the slide's picture "$x_t - \varepsilon_\theta = x_{t-1}$" would do**, taken at its word;
# - **E15** where the step's mean comes from, **E13** the two variances $\tilde\beta_t$ and $\beta_t$, and why $z = 0$
#   at $t = 1$;
# - **E8** the density of a whole trajectory, and what it says about the data;
# - few steps instead of a thousand.
#
# Run it from anywhere: `python lessons/07_sampling.py` takes less than a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data.toys import GaussianMixture
from tinydiff.diffusion import (
    Schedule,
    ddim,
    ddpm,
    denoiser,
    forward_log_density,
    forward_trajectory,
    heun,
    last,
    q_sample,
    reverse_log_density,
    reverse_mean,
)

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"

n, T = (300, 100) if QUICK else (2000, 1000)
schedule = Schedule.linear(T)

angle = 3 * np.pi * np.sqrt(np.linspace(0.04, 1, 60))
middle = 0.2 * angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (60, 2), along a spiral
data = GaussianMixture(middle - middle.mean(axis=0), std=0.06)
x_0 = data.draw(n, Rng(0)).x  # (n, 2)
print("variance of the data:", x_0.var(axis=0))

# %% [markdown]
# ## The best network there is
#
# Noised data are a mixture too, with means $\sqrt{\bar\alpha_t}\,m_k$ and variance $\bar\alpha_t s^2 + 1 -
# \bar\alpha_t$ (E4). Its **score** $\nabla \log p(x_t)$ is an arrow towards where the points are denser, and the
# network that minimises E17's loss is nothing but that arrow, turned round and scaled:
#
# $$\varepsilon^*(x_t, t) = E[\varepsilon \mid x_t] = -\sqrt{1-\bar\alpha_t}\;\nabla \log p(x_t).$$

# %%


def network_for(schedule):
    """eps*(x_t, t) of our data, in place of a trained network."""
    return lambda x_t, t: data.best_eps(x_t, schedule.alpha_bar[t[0]])


eps_theta, denoise = network_for(schedule), denoiser(network_for(schedule), schedule, clip=False)
x_T = Rng(1).normal((n, 2))  # noqa: N816

# %% [markdown]
# ## Algorithm 2, line by line (E19, E15)
#
# | | |
# |---|---|
# | 1 | $x_T \sim \mathcal N(0, I)$ |
# | 2 | for $t = T, \dots, 1$: |
# | 3 | $\quad z \sim \mathcal N(0, I)$ if $t > 1$, else $z = 0$ |
# | 4 | $\quad x_{t-1} = (x_t - \beta_t/\sqrt{1-\bar\alpha_t}\;\varepsilon_\theta)/\sqrt{\alpha_t} + \sigma_t z$ |
# | 5 | return $x_0$ |
#
# Line 4 without $\sigma_t z$ is $\mu_\theta$ of E15: the mean of $q(x_{t-1} \mid x_t, x_0)$ (E12) with the guessed
# $x_0$ put in for the true one. The package's `ddpm` is this loop, as a generator that yields each state.

# %%
beta, alpha, alpha_bar = schedule.beta, schedule.alpha, schedule.alpha_bar
sigma = np.sqrt(schedule.reverse_variance("posterior"))
rng, x_t, by_hand = Rng(2), x_T, [x_T]
for t in range(T, 0, -1):
    z = rng.normal_like(x_t) if t > 1 else 0
    eps = eps_theta(x_t, np.full(n, t))
    mu = (x_t - float(beta[t] / np.sqrt(1 - alpha_bar[t])) * eps) / float(np.sqrt(alpha[t]))
    assert np.allclose(mu, reverse_mean(x_t, eps, t, schedule), atol=1e-5)  # E15
    x_t = mu + float(sigma[t]) * z
    by_hand.append(x_t)
states = [x_T, *ddpm(denoise, x_T, schedule, Rng(2), "posterior")]
largest = max(np.abs(a - b).max() for a, b in zip(by_hand, states, strict=True))
print(f"largest difference between the loop and ddpm: {largest:.1e}")
assert np.allclose(by_hand[-1], states[-1], atol=0.02)


# %%
def clean(axis, limit=2.6):
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")


def save(figure, file):
    figure.tight_layout(pad=0.6)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


lattice = np.stack(np.meshgrid(*2 * [np.linspace(-2.5, 2.5, 15, dtype=np.float32)]), axis=-1).reshape(-1, 2)
shown = [round(T * f) for f in (1, 0.5, 0.25, 0.12, 0.05, 0)]
figure, axes = plt.subplots(1, 6, figsize=(15, 2.9))
for axis, t in zip(axes, shown, strict=True):
    arrows = data.noised(alpha_bar[max(t, 1)]).score(lattice)
    length = np.linalg.norm(arrows, axis=1, keepdims=True)
    axis.quiver(*lattice.T, *(arrows / length * np.tanh(length)).T, color=RED, alpha=0.55, scale=16, width=0.006)
    axis.plot(*states[T - t].T, ".", ms=1.6, color=BLUE)
    axis.set_title(f"t = {t}", fontsize=11)
    clean(axis)
save(figure, "07_particles.png")

# %% [markdown]
# ![particles and score](out/07_particles.png)
#
# Blue: the particles. Red: the score $\nabla \log p(x_t)$ of that moment. While the noise is large all arrows point to
# the middle; the spiral's arms come out late. The particles first find the right neighbourhood, then the arm.
#
# ## The slide's picture, taken at its word
#
# The sampling slide draws "$x_t - \varepsilon_\theta(x_t, t) = x_{t-1}$": image minus noise is the cleaner image. As a
# picture it is fine; as a step it is wrong three times. $\varepsilon_\theta$ is *all* the noise in $x_t$, with variance
# 1, but $x_t$ holds only $\sqrt{1-\bar\alpha_t}$ of it, and one step must take out only a small part; what is left must
# be scaled up by $1/\sqrt{\alpha_t}$; and fresh noise must be put back.
#
# And one jump, from $x_T$ straight to the guessed $x_0 = (x_T - \sqrt{1-\bar\alpha_T}\,\varepsilon_\theta)/
# \sqrt{\bar\alpha_T}$? That is the mean of all data that could have led to $x_T$: nearly the mean of everything.

# %%
slide = x_T
size_of_slide, size_of_ours = [], [np.sqrt((x**2).mean()) for x in states]
for t in range(T, 0, -1):
    size_of_slide.append(np.sqrt((slide**2).mean()))
    if size_of_slide[-1] > 1e6:
        print(f"the slide's step has left all bounds by t = {t}")
        break
    slide = slide - eps_theta(slide, np.full(n, t))
    if t == T:
        slide_once = slide
jump = denoise(x_T, T).x0
no_noise = x_T  # Algorithm 2 with z = 0 throughout
for t in range(T, 0, -1):
    no_noise = reverse_mean(no_noise, denoise(no_noise, t).eps, t, schedule)


def energy_distance(x, y, most=2000):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, 0 for equal distributions only (Székely & Rizzo 2013)."""

    def mean_distance(a, b):
        return np.sqrt(((a[:most, None] - b[None, :most]) ** 2).sum(axis=-1)).mean()

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


panels = {
    "the data": x_0,
    "Algorithm 2": states[-1],
    r"$x_T - \varepsilon_\theta$, once": slide_once,
    r"one jump to $\hat x_0$": jump,
    "Algorithm 2 without z": no_noise,
}
figure, axes = plt.subplots(1, 6, figsize=(16.5, 3), width_ratios=(1, 1, 1, 1, 1, 1.25))
for axis, (name, x), colour in zip(axes, panels.items(), (GREY, BLUE, RED, RED, RED), strict=False):
    axis.plot(*x.T, ".", ms=1.8 if colour != RED else 5, color=colour)
    axis.set_title(name, fontsize=10.5)
    clean(axis)
    print(f"{name:30} energy distance to fresh data {energy_distance(x, data.draw(n, Rng(3)).x):.4f}")
axes[-1].semilogy(T - np.arange(len(size_of_slide)), size_of_slide, color=RED, label="the slide's step")
axes[-1].semilogy(T - np.arange(T + 1), size_of_ours, color=BLUE, label="Algorithm 2")
axes[-1].invert_xaxis()
axes[-1].set_title(r"size of $x_t$ (r.m.s.), $t$ falling", fontsize=10.5)
axes[-1].legend(frameon=False, fontsize=9)
axes[-1].spines[["top", "right"]].set_visible(False)
save(figure, "07_slide_step.png")

# %% [markdown]
# ![the slide's step](out/07_slide_step.png)
#
# Once, the slide's step takes all the noise out of $x_T$ and leaves next to nothing. Taken again and again it does
# worse: at small $t$, where $x_t$ holds little noise, it still takes out a whole $\varepsilon_\theta$, overshoots,
# and the error is multiplied by about $1/\sqrt{1-\bar\alpha_t}$ each time (last panel).
#
# Without the fresh noise (fifth panel) the particles slide down to the mean of what they might have become: noise
# decides between the possibilities, and the mean of a step is not one of them.
#
# ## Two variances, and the last step (E13, E19)
#
# $\sigma_t^2$ is $\tilde\beta_t$ or $\beta_t$. The first is right if the data are a single point, the second if they
# are $\mathcal N(0, I)$; real data lie between, so one makes samples too narrow and the other too wide. With many
# steps the two meet. We measure how far the samples lie off the spiral, against how far the data do. (With very few
# steps both are too wide: some particles do not reach the spiral at all.)
#
# And $z = 0$ at $t = 1$: $\mu_\theta(x_1, 1)$ is the final answer, and noise on top of it would stay there for good.

# %%


def off_the_arm(x):
    """The root mean square distance of the samples from the nearest of the 60 means."""
    return float(np.sqrt(((x[:, None] - data.means) ** 2).sum(axis=-1).min(axis=1).mean()))


def with_noise_at_the_end(x_T, s, variance):
    """Algorithm 2 with z drawn at t = 1 too."""
    before = list(ddpm(denoiser(network_for(s), s, clip=False), x_T, s, Rng(5), variance))
    sigma_1 = float(np.sqrt(s.reverse_variance(variance)[1]))
    return before[-1] + sigma_1 * Rng(6).normal_like(x_T)


few = (10, 20, 50) if QUICK else (10, 15, 20, 35, 50, 100, 200, 500)
curves = {r"$\beta_t$, noise at t = 1 too": [], r"$\beta_t$": [], r"$\tilde\beta_t$": []}
for steps in few:
    s = Schedule.linear(steps)
    exact = denoiser(network_for(s), s, clip=False)
    samples = [
        with_noise_at_the_end(x_T, s, "beta"),
        *(last(ddpm(exact, x_T, s, Rng(5), variance)) for variance in ("beta", "posterior")),
    ]
    for curve, x in zip(curves.values(), samples, strict=True):
        curve.append(off_the_arm(x))
    too, beta_t, tilde = (curve[-1] for curve in curves.values())
    print(f"T = {steps:4}: beta_t and noise at t = 1 too {too:.3f}, beta_t {beta_t:.3f}, beta_tilde_t {tilde:.3f}")
truth = off_the_arm(data.draw(20 * n, Rng(4)).x)

figure, axis = plt.subplots(figsize=(7, 4))
for (name, curve), style in zip(curves.items(), ("o--", "o-", "o-"), strict=True):
    axis.loglog(few, curve, style, color=BLUE if "tilde" in name else RED, label=name)
axis.axhline(truth, color=GREY, ls=":", label="the data")
axis.set(xlabel="T, all of them visited", ylabel="distance from the arm (r.m.s.)", title="How wide the samples are")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
save(figure, "07_variances.png")
if not QUICK:
    assert curves[r"$\beta_t$"][0] > curves[r"$\beta_t$"][-1] > 0.9 * truth
    assert abs(curves[r"$\tilde\beta_t$"][-1] - truth) < 0.1 * truth

# %% [markdown]
# ![two variances](out/07_variances.png)
#
# ## The density of a trajectory (E8)
#
# $$p_\theta(x_{0:T}) = p(x_T)\prod_t p_\theta(x_{t-1} \mid x_t), \qquad
# p_\theta(x_{t-1} \mid x_t) = \mathcal N\!\left(\mu_\theta(x_t, t), \sigma_t^2 I\right)$$
#
# Draw trajectories *forwards*, from data to noise, and ask for the density of walking them *backwards*. The ratio to
# the forward density, on average, is a bound on the data's own log-density (E10), which for a mixture we know:
#
# $$E_q\!\left[\log p_\theta(x_{0:T}) - \log q(x_{1:T} \mid x_0)\right] \le \log p(x_0).$$
#
# The network is perfect, so the gap is the price of Gaussian steps alone (E9): it closes as the steps get smaller.

# %%
points = x_0[: 100 if QUICK else 400].astype(np.float64)
exact_log_p = data.log_density(points).mean()
print(f"log p(x_0), exact: {exact_log_p:.3f} nats on average")
for steps in few:
    s = Schedule.linear(steps)
    path = [points, *forward_trajectory(points, s, Rng(7))]
    backwards = reverse_log_density(path, denoiser(network_for(s), s, clip=False), s, "beta")
    bound = (backwards - forward_log_density(path, s)).mean()
    print(f"T = {steps:4}: bound {bound:8.3f}, gap {exact_log_p - bound:.3f}")
assert bound < exact_log_p + 0.1

# %% [markdown]
# ## Few steps
#
# A thousand calls of the network for one picture are a lot. A sampler may also visit fewer of the thousand times that
# the network was trained on. DDIM (Song et al. 2021) moves along the score without fresh noise; Heun's method looks at
# both ends of a step, at two calls each.

# %%
calls = (5, 9, 19, 39) if QUICK else (5, 9, 15, 25, 49, 99, 199)
reference = data.draw(n, Rng(8)).x
samplers = {
    "Algorithm 2, times left out": lambda c: ddpm(denoise, x_T, schedule, Rng(9), "posterior", steps=c),
    "DDIM": lambda c: ddim(denoise, x_T, schedule, Rng(9), steps=c),
    "Heun": lambda c: heun(denoise, x_T, schedule, Rng(9), steps=(c + 1) // 2),
}
few_steps = {name: [last(sampler(c)) for c in calls] for name, sampler in samplers.items()}
floor = energy_distance(data.draw(n, Rng(10)).x, reference)
print(f"two draws of the data: distance {floor:.4f}; the data's width {truth:.3f}")

figure, axes = plt.subplots(3, 4, figsize=(9.5, 7.2))
for line, (name, results) in zip(axes, few_steps.items(), strict=True):
    for axis, c, x in zip(line, calls, results, strict=False):
        axis.plot(*x.T, ".", ms=1.6, color=BLUE)
        axis.set_title(f"{c} calls", fontsize=10)
        clean(axis)
    line[0].set_ylabel(name, fontsize=10.5)
save(figure, "07_few_steps.png")

figure, axis = plt.subplots(figsize=(7, 4))
for (name, results), colour in zip(few_steps.items(), (RED, BLUE, GREEN), strict=True):
    distance = [energy_distance(x, reference) for x in results]
    axis.loglog(calls, distance, "o-", color=colour, label=name)
    print(f"{name:28} distance", ", ".join(f"{c}: {d:.4f}" for c, d in zip(calls, distance, strict=True)))
    print(f"{'':28} width   ", ", ".join(f"{c}: {off_the_arm(x):.3f}" for c, x in zip(calls, results, strict=True)))
axis.axhline(floor, color=GREY, ls=":", label="two draws of the data")
axis.set(xlabel="calls of the network", ylabel="energy distance to the data", title="Steps left out")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
save(figure, "07_few_steps_measured.png")

# %% [markdown]
# ![few steps](out/07_few_steps.png)
# ![few steps, measured](out/07_few_steps_measured.png)
#
# At equal cost DDIM is ahead of Algorithm 2: without fresh noise there is less to repair. Heun's two calls a step do
# not pay off before the steps are short. The width of the arm, printed above, sees what the energy distance hardly
# does: too long steps end on the middle line.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. If $\varepsilon_\theta$ were the true noise $\varepsilon$ in $x_t$, what would the jump
#    $(x_t - \sqrt{1-\bar\alpha_t}\,\varepsilon)/\sqrt{\bar\alpha_t}$ give? Write it as a function of $x_0$ and
#    $\varepsilon$.
# 2. Data that are one single point $m$: which $\varepsilon_\theta(x_t, t)$ is best? With it, every sampler must end
#    at $m$ exactly.

# %%
jump_with_true_noise = None  # a function (x_0, eps) -> array
best_for_one_point = None  # a function (x_t, alpha_bar_t, m) -> array

if jump_with_true_noise is not None:
    eps = Rng(11).normal_like(x_0)
    x_t = q_sample(x_0, T // 2, eps, schedule)
    a = float(alpha_bar[T // 2])
    assert np.allclose(jump_with_true_noise(x_0, eps), (x_t - (1 - a) ** 0.5 * eps) / a**0.5, atol=1e-3)
    print("exercise 1 is right")
if best_for_one_point is not None:
    m = np.float32([0.3, -1.2])
    one_point = denoiser(lambda x, t: best_for_one_point(x, float(alpha_bar[t[0]]), m), schedule, clip=False)
    assert np.allclose(last(ddpm(one_point, x_T[:5], schedule, Rng(12))), m, atol=1e-3)
    assert np.allclose(last(ddim(one_point, x_T[:5], schedule, Rng(12), steps=3)), m, atol=1e-3)
    print("exercise 2 is right")
