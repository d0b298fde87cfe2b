# %% [markdown]
# # Lesson 4: the posterior, or one step back
#
# The forward process (lesson 2) is given. What a diffusion model must learn is its undoing, one step at a time. This
# lesson asks what there is to learn: which distribution does $x_{t-1}$ have, once $x_t$ is seen?
#
# You will see
# - **E12**: somebody who knows $x_0$ can answer exactly; the answer is a Gaussian, and it is Bayes' rule;
# - that its mean $\tilde\mu_t$ has two forms, one with $x_0$ and one with the noise $\varepsilon$;
# - its variance $\tilde\beta_t$, always below the $\beta_t$ of the step forward;
# - a walk back from pure noise to a digit by that answer;
# - **E9**: somebody who does not know $x_0$ can still answer with a Gaussian, *if the steps are small*. That is why
#   diffusion models take so many of them.
#
# Run it from anywhere: `python lessons/04_posterior.py` takes a few seconds and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data import mnist
from tinydiff.diffusion import Schedule, forward_marginal, posterior, q_sample, reverse_mean
from tinydiff.image import to_signed

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer chains and coarser curves, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"
schedule = Schedule.linear(100)


def normal(x, mean, variance):
    """The density of N(mean, variance) at x."""
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def save(figure, name):
    """Tidy up a figure and write it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## Bayes' rule, seen (E12)
#
# A pixel was $x_0 = 0.8$. At step $t$ we see $x_t$. Where was it one step earlier? Two things are known about
# $x_{t-1}$:
#
# - coming from $x_0$, it is likely to be near $\sqrt{\bar\alpha_{t-1}}\,x_0$: that is $q(x_{t-1} \mid x_0)$, **E4**;
# - a step of noise later it was seen at $x_t$: that is $q(x_t \mid x_{t-1})$, **E1**, read as a function of $x_{t-1}$.
#
# Bayes' rule multiplies the two and scales the product to an area of 1:
#
# $$q(x_{t-1} \mid x_t, x_0) = \frac{q(x_t \mid x_{t-1})\; q(x_{t-1} \mid x_0)}{q(x_t \mid x_0)}.$$
#
# Below, the product is computed number by number on a fine grid, with no algebra at all. The dashed line is the formula
#
# $$q(x_{t-1} \mid x_t, x_0) = \mathcal N(\tilde\mu_t, \tilde\beta_t), \quad
# \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t\,x_0 + \sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})\,x_t}
# {1-\bar\alpha_t}, \quad \tilde\beta_t = \beta_t\,\frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}.$$

# %%
x_0, grid = 0.8, np.linspace(-4, 4, 8001)
step = grid[1] - grid[0]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.7))
for t, x_t, axis in zip((2, 10, 40), (1.05, 0.1, -0.9), axes, strict=True):
    mean, std = forward_marginal(np.array([[x_0]]), t - 1, schedule)
    from_x_0 = normal(grid, mean[0, 0], std**2)  # E4
    seen_later = normal(x_t, np.sqrt(schedule.alpha[t]) * grid, schedule.beta[t])  # E1, as a function of x_{t-1}
    product = from_x_0 * seen_later
    by_bayes = product / (product.sum() * step)
    mu_tilde, beta_tilde = posterior(np.array([[x_t]]), np.array([[x_0]]), t, schedule)
    by_formula = normal(grid, mu_tilde[0, 0], beta_tilde)
    assert np.abs(by_bayes - by_formula).max() < 1e-9 * by_formula.max()

    axis.plot(grid, from_x_0, color=GREY, lw=1.6, label=r"$q(x_{t-1}\mid x_0)$")
    axis.plot(grid, seen_later, color=GREEN, lw=1.6, label=r"$q(x_t\mid x_{t-1})$")
    axis.plot(grid, by_bayes, color=BLUE, lw=2.6, label="their product, scaled")
    axis.plot(grid, by_formula, color=RED, lw=1.5, ls="--", label=r"$\mathcal{N}(\tilde\mu_t, \tilde\beta_t)$")
    axis.axvline(x_t, color=GREEN, lw=0.9, ls=":")
    shown = grid[np.maximum(from_x_0, seen_later) > 0.01]
    axis.set(title=f"t = {t}, seen: $x_t$ = {x_t}", xlabel="$x_{t-1}$", xlim=(shown[0], shown[-1]), yticks=[])
axes[2].legend(frameon=False, fontsize=9, loc="upper right")
save(figure, "04_bayes.png")

# %% [markdown]
# ![Bayes' rule](out/04_bayes.png)
#
# At $t = 2$ it is $x_0$ that says more; at $t = 40$ it is $x_t$ (dotted), since a step of little noise cannot have
# moved the pixel far. And the product of two Gaussians is narrower than either: two witnesses know more than one.
#
# ## One mean, two forms
#
# The network never sees $x_0$; it sees $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$. So
# knowing $\varepsilon$ is knowing $x_0$. Solve for $x_0$, put it into $\tilde\mu_t$, and the fractions collapse:
#
# $$\tilde\mu_t = \frac{1}{\sqrt{\alpha_t}}\left(x_t - \frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}}\;\varepsilon\right).$$
#
# That is the form in Algorithm 2: take some of the noise away, then undo the shrinking. `posterior` is the first form,
# `reverse_mean` the second.

# %%
digits = mnist.load("embedded")
images = to_signed(digits.images).astype(np.float64)
digit = images[[int(np.argmax(digits.labels == label)) for label in (3, 5, 8)]]  # a three, a five, an eight
eps = Rng(0).normal_like(digit)
for t in range(1, 101):
    noisy = q_sample(digit, t, eps, schedule)
    first_form, _ = posterior(noisy, digit, t, schedule)
    second_form = reverse_mean(noisy, eps, t, schedule)
    assert np.abs(first_form - second_form).max() < 1e-12
print("both forms of the mean agree to 1e-12 at every t")

# %% [markdown]
# How much does the mean listen to $x_0$, how much to $x_t$? And how does $\tilde\beta_t$ compare with $\beta_t$?

# %%
t_axis = np.arange(1, 101)
s = schedule
weight_0 = np.sqrt(s.alpha_bar_prev) * s.beta / s.one_minus_alpha_bar
weight_t = np.sqrt(s.alpha) * s.one_minus_alpha_bar_prev / s.one_minus_alpha_bar
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
left.plot(t_axis, weight_0[1:], ".-", color=BLUE, label="of $x_0$")
left.plot(t_axis, weight_t[1:], ".-", color=GREEN, label="of $x_t$")
left.set(xlabel="t", title=r"E12: the weights in $\tilde\mu_t$", xscale="log")
left.legend(frameon=False)
right.plot(t_axis, s.beta[1:], ".-", color=GREY, label=r"$\beta_t$: the step forward")
right.plot(
    t_axis[1:], s.posterior_variance[2:], ".-", color=RED, label=r"$\tilde\beta_t$: the step back, knowing $x_0$"
)
right.set(xlabel="t", title="two variances", xscale="log", yscale="log")
right.legend(frameon=False, loc="upper left")
save(figure, "04_weights.png")
assert weight_0[1] == 1 and weight_t[1] == 0 and s.posterior_variance[1] == 0
assert (s.posterior_variance[1:] < s.beta[1:]).all()
ratio = s.posterior_variance / s.beta.clip(1e-9)
print("beta_tilde_t/beta_t at t = 2, 10, 30, 100:", *ratio[[2, 10, 30, 100]].round(3))

# %% [markdown]
# ![weights and variances](out/04_weights.png)
#
# At $t = 1$ the mean is $x_0$ itself, and $\tilde\beta_1 = 0$ (off the logarithmic chart): who knows $x_0$ need not
# guess. From about $t = 30$ on the two variances hardly differ: there $x_t$ is so noisy that knowing $x_0$ is little
# help in saying what the last step added.
#
# ## Walking back with the answer in hand
#
# Start from pure noise and draw $x_{t-1}$ from $q(x_{t-1} \mid x_t, x_0)$ again and again, with $x_0$ the three. This
# is cheating: it uses what a model must find out. But it shows what the model imitates, and that any noise at all leads
# to the three. Between the two rows nothing differs but the noise.

# %%
rng = Rng(1)
three = np.broadcast_to(digit[0], (2, 28, 28))
x_t, shown = rng.at(0).normal_like(three), {}
for t in range(100, 0, -1):
    if t in (100, 80, 60, 40, 20, 10, 5, 2):
        shown[t] = x_t
    mean, variance = posterior(x_t, three, t, schedule)
    x_t = mean + np.sqrt(variance) * rng.at(t).normal_like(x_t)
shown[0] = x_t
assert np.abs(x_t - three).max() < 1e-12  # the last step has no noise left

figure, axes = plt.subplots(2, len(shown), figsize=(1.2 * len(shown), 2.7))
for column, (t, states) in zip(axes.T, shown.items(), strict=True):
    for axis, state in zip(column, states, strict=True):
        axis.imshow(state, cmap="gray", vmin=-1.5, vmax=1.5)
        axis.axis("off")
    column[0].set_title(f"t = {t}", fontsize=11)
save(figure, "04_walk_back.png")

# %% [markdown]
# ![walk back](out/04_walk_back.png)
#
# A check that the walk is right: the states on the way back must be distributed as the states on the way forth, at
# every $t$. Take 4000 pixels of value 0.8 and compare with **E4**. (Where the walk starts matters a little: from
# $\mathcal N(0,1)$, not exactly from $q(x_T \mid x_0)$. **E5** in lesson 2 says that this is nothing.)

# %%
n = 500 if QUICK else 4000
pixel = np.full((n, 1), 0.8)
x_t = rng.at(101).normal_like(pixel)
for t in range(100, 1, -1):
    mean, variance = posterior(x_t, pixel, t, schedule)
    x_t = mean + np.sqrt(variance) * rng.at(102, t).normal_like(x_t)  # now x_{t-1}
    if t - 1 in (75, 50, 25, 10, 1):
        expected, std = forward_marginal(pixel[:1], t - 1, schedule)
        off = (x_t.mean() - expected[0, 0]) / (std / np.sqrt(n))
        spread = (x_t.var() / std**2 - 1) / np.sqrt(2 / n)
        print(f"t = {t - 1:2}: mean {off:+.1f} and variance {spread:+.1f} standard errors from E4")
        assert abs(off) < 5 and abs(spread) < 5

# %% [markdown]
# ## Without knowing $x_0$ (E9)
#
# A model knows only $x_t$. Its question is $q(x_{t-1} \mid x_t)$, with $x_0$ averaged out, and this is *not* a
# Gaussian: it depends on the data. Yet **E8** gives the model nothing but a Gaussian to answer with,
# $p_\theta(x_{t-1} \mid x_t) = \mathcal N(\mu_\theta, \Sigma_\theta)$. Is that enough?
#
# Let $x_{t-1}$ be numbers that cluster around $-1$ and $+1$, and take one step forward with some $\beta$. The exact
# reverse is Bayes' rule once more, on the grid. Dashed: the Gaussian with the same mean and variance, the best that a
# model could answer.

# %%
grid = np.linspace(-3, 3, 3001)
step = grid[1] - grid[0]
clusters = 0.5 * normal(grid, -1, 0.25**2) + 0.5 * normal(grid, 1, 0.25**2)  # p(x_{t-1})


def exact_reverse(x_t, beta):
    """q(x_{t-1} | x_t) on the grid for each of several x_t (N,): (N, grid); and how likely those x_t are, (N,)."""
    joint = normal(x_t[:, None], np.sqrt(1 - beta) * grid, beta) * clusters
    likely = joint.sum(axis=1) * step
    return joint / likely[:, None], likely


def best_gaussian(density):
    """The Gaussian with the mean and the variance of each density (N, grid), on the grid; and these two (N, 1)."""
    mean = (density * grid).sum(axis=1, keepdims=True) * step
    variance = (density * (grid - mean) ** 2).sum(axis=1, keepdims=True) * step
    return normal(grid, mean, variance), mean, variance


figure, axes = plt.subplots(1, 4, figsize=(14, 3.3))
for beta, axis in zip((0.7, 0.3, 0.1, 0.01), axes, strict=True):
    density, _ = exact_reverse(np.array([0.15]), beta)
    gaussian, mean, variance = best_gaussian(density)
    axis.fill_between(grid, density[0], color=BLUE, alpha=0.25)
    axis.plot(grid, density[0], color=BLUE, lw=2, label=r"exact $q(x_{t-1}\mid x_t)$")
    axis.plot(grid, gaussian[0], color=RED, lw=1.6, ls="--", label="Gaussian")
    axis.axvline(0.15, color=GREEN, lw=1, ls=":", label="$x_t$ = 0.15")
    axis.set(title=rf"$\beta$ = {beta}", xlabel="$x_{t-1}$", yticks=[], xlim=(-2.2, 2.2))
    axis.set_ylim(bottom=0)
axes[3].legend(frameon=False, fontsize=9, loc="upper left")
save(figure, "04_reverse.png")

# %% [markdown]
# ![the reverse at four betas](out/04_reverse.png)
#
# After one big step, $x_t = 0.15$ may have come from either cluster: two peaks, and a Gaussian is a poor answer. After
# a small step there is hardly a choice: the number was where it is now, give or take $\sqrt\beta$, and from so near the
# logarithm of the data's density looks straight. A Gaussian times the exponential of a straight line is a Gaussian.
#
# Now measured: the KL divergence from the exact reverse to its best Gaussian, averaged over all $x_t$ as they occur.

# %%
betas = np.geomspace(0.002, 0.9, 8 if QUICK else 24)
x_t = np.linspace(-3, 3, 121 if QUICK else 601)
gaps, variances = [], []
for beta in betas:
    density, likely = exact_reverse(x_t, beta)
    gaussian, mean, variance = best_gaussian(density)
    tiny = 1e-300  # 0 log 0 is 0
    kl = (density * (np.log(density + tiny) - np.log(gaussian + tiny))).sum(axis=1) * step
    gaps.append((kl * likely).sum() / likely.sum())
    variances.append((variance[:, 0] * likely).sum() / likely.sum() / beta)
slope = np.polyfit(np.log(betas[:4]), np.log(gaps[:4]), 1)[0]
print(f"for small beta the gap falls like beta^{slope:.2f}; at beta = {betas[0]:.3f} it is {gaps[0]:.1e} nats a step")
assert np.all(np.diff(gaps[: len(gaps) // 2]) > 0) and 2.5 < slope < 3.5

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.7))
left.loglog(betas, gaps, "o-", color=BLUE, ms=4, label="measured")
left.loglog(betas, gaps[0] * (betas / betas[0]) ** 3, color=GREY, lw=1, ls="--", label=r"$\propto \beta^3$")
left.set(xlabel=r"$\beta$", ylabel="nats", title="E9: exact reverse to its best Gaussian (KL)", ylim=(gaps[0] / 3, 3))
left.legend(frameon=False)
right.semilogx(betas, variances, "o-", color=RED, ms=4)
right.axhline(1, color=GREY, lw=1, ls="--")
right.set(xlabel=r"$\beta$", title=r"variance of the exact reverse, over $\beta$", ylim=(0, 1.1))
save(figure, "04_gap.png")

# %% [markdown]
# ![the gap over beta](out/04_gap.png)
#
# The gap falls with the *third* power of $\beta$, nearly. Make the steps half as large, and you need twice as many,
# but each is eight times closer to Gaussian: the chain as a whole gains a factor of four. A thousand steps buy that.
#
# The right picture says more: for small $\beta$ the variance of the exact reverse is $\beta$, whatever the data. Then
# nothing is left to learn but the mean. This is why Ho et al. (2020) could fix $\sigma_t^2$ to $\beta_t$ or
# $\tilde\beta_t$ (**E13**) and let the network find only $\mu_\theta$, through the $\varepsilon$ of the second form:
#
# $$\mu_\theta = \frac{1}{\sqrt{\alpha_t}}\left(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\;
# \varepsilon_\theta(x_t, t)\right) \qquad \textbf{(E15)}.$$
#
# How wrong a chain of such steps is, in one number, is the subject of lesson 5.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Two steps, $\beta_1 = 0.1$ and $\beta_2 = 0.2$. What is $\tilde\beta_2$? And what is $\tilde\mu_2$ for $x_0 = 1$,
#    $x_2 = 0$? Use the formula, on paper.
# 2. Multiplying two Gaussians adds their *precisions*, $1/\text{variance}$. As a function of $x_{t-1}$,
#    $q(x_t \mid x_{t-1})$ has precision $\alpha_t/\beta_t$. What is the precision of the posterior? Write it as a
#    function of the numbers $\alpha_t$, $\beta_t$ and $\bar\alpha_{t-1}$; it must be $1/\tilde\beta_t$.

# %%
beta_tilde_2, mu_tilde_2 = None, None
precision = None  # lambda alpha, beta, alpha_bar_prev: ...

if beta_tilde_2 is not None:
    assert np.isclose(beta_tilde_2, 0.2 * 0.1 / 0.28) and np.isclose(mu_tilde_2, np.sqrt(0.9) * 0.2 / 0.28)
    print("exercise 1 is right")
if precision is not None:
    for t in range(2, 101):
        found = precision(schedule.alpha[t], schedule.beta[t], schedule.alpha_bar_prev[t])
        assert np.isclose(found, 1 / schedule.posterior_variance[t])
    print("exercise 2 is right")
