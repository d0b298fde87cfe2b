# %% [markdown]
# # Lesson 5: the bound, or how good is a diffusion model?
#
# A good model gives the data a high probability $p_\theta(x_0)$. To know it one would have to average over every path
# $x_T \to \dots \to x_0$ that ends in $x_0$, and nobody can. What can be had is a number that is never too good: a
# bound. In the end it is what one trains on, and what one reports.
#
# You will see
# - **E10**: the bound as an average along forward trajectories, and how far it is from the truth;
# - **E11**: the same number taken apart, a term for each step;
# - **E14** and **E16**: each term is a squared error with a weight, and where the weight went in $L_\text{simple}$;
# - **E13**: what the variance of the reverse steps has to do with it, and why one lets a network learn it;
# - the terms for digits, and a misprint on the slide.
#
# Run it from anywhere: `python lessons/05_bound.py` takes half a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data import mnist
from tinydiff.diffusion import (
    Prediction,
    Schedule,
    bits_per_dim,
    bound_term,
    bound_terms,
    denoiser,
    discretised_log_likelihood,
    forward_trajectory,
    gaussian_kl,
    gaussian_log_likelihood,
    log_likelihood,
    posterior,
    prior_term,
    q_sample,
    trajectory_bound,
    vlb_weight,
)
from tinydiff.image import to_signed

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer samples, steps and digits, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"


def save(figure, name):
    """Tidy up a figure and write it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## Average over paths, and take the logarithm too early (E10)
#
# Take a path from where it is likely, $q(x_{1:T} \mid x_0)$, and ask how much likelier the model finds it. On average,
# that is the model's probability, exactly (Sohl-Dickstein et al. 2015, eq. 6–9; **E21**):
#
# $$p_\theta(x_0) = E_q\left[\frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)}\right].$$
#
# A few rare paths make up most of that average, so it is useless for images. Now take the logarithm of each path's
# ratio first. The logarithm is concave, so the average comes out lower (Jensen's inequality), and turned around:
#
# $$-\log p_\theta(x_0) \;\le\; L = E_q\left[\log q(x_{1:T} \mid x_0) - \log p_\theta(x_{0:T})\right].$$
#
# That average is tame. We watch both where the truth is known: data that are single numbers from $\mathcal N(m, c)$.
# There the best possible network is a formula, since $x_0$ and $x_t$ are jointly Gaussian:
#
# $$E[x_0 \mid x_t] = m + \frac{\sqrt{\bar\alpha_t}\,c}{\bar\alpha_t c + 1 - \bar\alpha_t}
# \left(x_t - \sqrt{\bar\alpha_t}\,m\right).$$

# %%
m, c = 0.4, 0.3


def best_network(schedule, c=c):
    """The x_0 that the network of least squared error outputs for data N(m, c)."""

    def network(x_t, t):
        signal, noise = schedule.alpha_bar[t[0]], schedule.one_minus_alpha_bar[t[0]]
        return m + signal**0.5 * c / (signal * c + noise) * (x_t - signal**0.5 * m)

    return network


def exact_log_p(x_0, schedule):
    """log p_theta(x_0) with sigma_t² = beta_t: each reverse step is linear, and so each p_theta(x_t) a Gaussian."""
    network, mean, variance = best_network(schedule), 0.0, 1.0  # of p(x_T)
    for t in range(schedule.T, 0, -1):
        ends = np.array([[0.0], [1.0]])
        offset, end = posterior(ends, network(ends, [t]), t, schedule)[0][:, 0]
        mean, variance = offset + (end - offset) * mean, (end - offset) ** 2 * variance + schedule.beta[t]
    return -((x_0 - mean) ** 2 / variance + np.log(2 * np.pi * variance)) / 2


short = Schedule.cosine(8)
denoise = denoiser(best_network(short), short, "x0", clip=False)
n = 2000 if QUICK else 20_000
x_0 = np.full((n, 1), 1.0)
paths = [x_0, *forward_trajectory(x_0, short, Rng(0))]  # x_0, x_1, ..., x_8 for each of n paths
values = trajectory_bound(paths, denoise, short)
truth = -exact_log_p(1.0, short)
error = values.std() / np.sqrt(n)
print(f"-log p(x_0) = {truth:.4f} nats; the bound is {values.mean():.4f} ± {error:.4f}")
assert values.mean() > truth

counts = [1, 10, 100, 1000]
repeats = 10 if QUICK else 200
estimates = [
    -log_likelihood(np.full((repeats, 1), 1.0), denoise, short, Rng(1).at(k), k) for k in counts
]  # each from k paths, repeated
assert abs(estimates[-1].mean() - truth) < 5 * estimates[-1].std() / np.sqrt(repeats) + 0.02

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.hist(values, bins=80, color=BLUE, alpha=0.35, density=True)
left.axvline(values.mean(), color=BLUE, lw=2, label="E10: their average, the bound")
left.axvline(truth, color=RED, lw=2, ls="--", label=r"the truth, $-\log p_\theta(x_0)$")
left.set(
    xlabel="nats", yticks=[], title=r"$\log q - \log p_\theta$ of single paths", xlim=np.quantile(values, [0, 0.999])
)
left.legend(frameon=False, loc="upper left")
for k, estimate in zip(counts, estimates, strict=True):
    right.plot(np.full(repeats, k), estimate, ".", color=GREEN, alpha=0.15)
right.plot(counts, [e.mean() for e in estimates], "o-", color=GREEN, label=r"$-\log$ of the average of $k$ ratios")
right.axhline(truth, color=RED, lw=2, ls="--")
right.axhline(values.mean(), color=BLUE, lw=2)
right.set(xscale="log", xlabel="paths $k$", ylabel="nats", title="E21: from the bound to the truth")
right.legend(frameon=False)
save(figure, "05_paths.png")

# %% [markdown]
# ![paths](out/05_paths.png)
#
# One path gives the bound, on average; more paths, averaged before the logarithm, close in on the truth. For this one
# number a thousand paths do. For the 784 pixels of a digit not all the computers of the world would.
#
# ## Term by term (E11)
#
# Write both chains as products of their steps, turn each forward step around by Bayes' rule,
# $q(x_t \mid x_{t-1}) = q(x_{t-1} \mid x_t, x_0)\, q(x_t \mid x_0)/q(x_{t-1} \mid x_0)$, and nearly everything cancels:
#
# $$L = E_q\Big[\underbrace{\mathrm{KL}\big(q(x_T \mid x_0)\,\|\,p(x_T)\big)}_{L_T}
# + \sum_{t=2}^{T} \underbrace{\mathrm{KL}\big(q(x_{t-1} \mid x_t, x_0)\,\|\,p_\theta(x_{t-1} \mid x_t)\big)}_{L_{t-1}}
# \;\underbrace{-\log p_\theta(x_0 \mid x_1)}_{L_0}\Big].$$
#
# Each term compares the answer of somebody who knows $x_0$ (**E12**, lesson 4) with the model's. The KL of two
# Gaussians is a formula, so what is left to chance is only $x_t$.

# %%
terms = [*bound_terms(x_0, denoise, short, Rng(2), "beta", decoder=gaussian_log_likelihood)]
total = sum(terms)
print(f"by the terms:  the bound is {total.mean():.4f} ± {total.std() / np.sqrt(n):.4f}")
print("L_T, L_7, ..., L_1, L_0:", *(f"{term.mean():.4f}" for term in terms))
assert abs(total.mean() - values.mean()) < 5 * np.hypot(error, total.std() / np.sqrt(n))

# %% [markdown]
# Both are the same number. (The single sums vary *more* than the single paths here: along one path of a good model,
# chance in one step is made up for in the next.) What is won is that each term stands alone. Training may draw one $t$
# and leave out the rest (Algorithm 1), and one sees at which step a model fails.
#
# ## How large is the gap? (E10, E13)
#
# Even the best possible network leaves a gap: its steps are Gaussians of a *fixed* variance, and lesson 4 showed that
# this is only nearly right. Smaller steps help. Below: the bound averaged over the data, less the entropy of the data,
# which is the least that any model can have, for more and more steps.
#
# Which fixed variance? $\beta_t$ is the exact one if the data are $\mathcal N(0, 1)$, and $\tilde\beta_t$ if they are
# one single point. Our data lie between, so the right one does:
#
# $$\sigma_t^2 = \exp\big(v \log\beta_t + (1-v)\log\tilde\beta_t\big), \qquad 0 \le v \le 1 \qquad \textbf{(E13)}.$$
#
# For these data we know the right $v$ at each $t$. A network learns it (Nichol and Dhariwal 2021): it has a second
# output, trained on the bound, while the first is trained on $L_\text{simple}$ as ever.


# %%
def best_v(schedule, t, c=c):
    """The v whose variance is that of the exact reverse q(x_{t-1} | x_t) for data N(m, c)."""
    spread = schedule.alpha_bar * c + schedule.one_minus_alpha_bar  # the variance of x_t
    exact = np.log(schedule.beta[t] * spread[t - 1] / spread[t])
    low, high = schedule.posterior_log_variance[t], schedule.log_beta[t]
    return (exact - low) / (high - low)


def with_best_v(schedule):
    """The best network, with the best variance as its second output."""
    plain = denoiser(best_network(schedule), schedule, "x0", clip=False)
    return lambda x_t, t: Prediction(*plain(x_t, t)[:2], np.full_like(x_t, best_v(schedule, t)))


def exact_bound(schedule, variance):
    """The bound, averaged over the data. Each term is a polynomial of degree 2 in x_0 and eps, which are Gaussian, so
    that three points for each, sqrt(3) apart, give the average exactly (Gauss and Hermite)."""
    points, weights = np.array([-(3**0.5), 0.0, 3**0.5]), np.array([1, 4, 1]) / 6
    x_0, eps = (a.reshape(9, 1) for a in np.meshgrid(m + c**0.5 * points, points, indexing="ij"))
    weights, denoise = np.outer(weights, weights).ravel(), with_best_v(schedule)
    average = weights @ prior_term(x_0, schedule)
    for t in range(1, schedule.T + 1):
        x_t = q_sample(x_0, t, eps, schedule)
        average += weights @ bound_term(x_0, x_t, t, denoise, schedule, variance, gaussian_log_likelihood)
    return average


entropy = np.log(2 * np.pi * np.e * c) / 2
steps = [10, 20, 40] if QUICK else [10, 20, 40, 80, 160, 320, 640]
gaps = {
    variance: [exact_bound(Schedule.cosine(T), variance) - entropy for T in steps]
    for variance in ("posterior", "beta", "learned")
}
for T, of_all in zip(steps, zip(*gaps.values(), strict=True), strict=True):
    print(
        f"T = {T:3}: gap with beta_tilde_t {of_all[0]:.4f}, beta_t {of_all[1]:.5f}, the right one {of_all[2]:.1e} nats"
    )

assert gaps["beta"][0] / gaps["beta"][1] > 1.8 and max(gaps["learned"]) < 1e-5 < min(gaps["beta"])

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for variance, name, color in [
    ("posterior", r"$\tilde\beta_t$", GREY),
    ("beta", r"$\beta_t$", BLUE),
    ("learned", "the right one (E13)", RED),
]:
    left.loglog(steps, gaps[variance], "o-", color=color, label=name)
left.loglog(steps, gaps["beta"][0] * steps[0] / np.array(steps), color=BLUE, lw=1, ls=":", label=r"$\propto 1/T$")
left.set(xlabel="steps $T$", ylabel="nats", title="E10: bound less entropy", xticks=steps, xticklabels=steps)
left.minorticks_off()
left.legend(frameon=False, fontsize=9, loc=(0.03, 0.42), ncols=2)
hundred = Schedule.cosine(100)
for variance_of_data, color in zip((1, 0.3, 0.01, 0.0001), (BLUE, RED, GREEN, GREY), strict=True):
    v = [best_v(hundred, t, variance_of_data) for t in range(2, 101)]
    right.plot(range(2, 101), v, color=color, lw=2, label=f"{variance_of_data}")
right.set(xlabel="t", ylabel="v", xscale="log", title=r"E13: the right $v$, from $\tilde\beta_t$ (0) to $\beta_t$ (1)")
right.legend(frameon=False, fontsize=9, title="data's variance", loc=(0.02, 0.16))
save(figure, "05_gap.png")

# %% [markdown]
# ![the gap](out/05_gap.png)
#
# With $\beta_t$, twice the steps leave half the gap. With $\tilde\beta_t$ about half a nat stays, however many steps
# there are: in the first few, $\tilde\beta_t$ is too small by a factor that does not depend on $T$ ($\tilde\beta_2$ is
# about half of $\beta_2$). With the right variance there is no gap at all, since Gaussian data have a Gaussian reverse;
# what the chart shows is $L_T$.
#
# The right $v$ is a matter of scale: where the noise in $x_t$ is small beside the spread of the data, it is near 1;
# where it is large, the data look like a point, and it is nearer to 0. No single $v$ would do for all $t$ and all data.
#
# ## A term is a squared error (E14, E16)
#
# The KL of two Gaussians with one variance $\sigma^2$ is $\lVert\mu_1 - \mu_2\rVert^2/(2\sigma^2)$, **E14**. Put in
# $\tilde\mu_t$ and $\mu_\theta$, both in the form with the noise:
#
# $$L_{t-1} = \frac{\beta_t^2}{2\sigma_t^2\,\alpha_t(1-\bar\alpha_t)}\;
# \lVert\varepsilon - \varepsilon_\theta(x_t, t)\rVert^2 \qquad \textbf{(E16)}.$$
#
# Check it on digits, with a network that guesses badly: no noise at all, $\varepsilon_\theta = 0$.

# %%
digits = mnist.load("embedded")
images = to_signed(digits.images).reshape(-1, 784)
schedule = Schedule.linear(1000)
three = images[[int(np.argmax(digits.labels == 3))]].astype(np.float64)
for t in (2, 10, 100, 500, 1000):
    eps = Rng(5).at(t).normal_like(three)
    x_t = q_sample(three, t, eps, schedule)
    no_noise = denoiser(lambda x_t, t: 0 * x_t, schedule, "eps", clip=False)
    kl = bound_term(three, x_t, t, no_noise, schedule, "posterior")[0]
    weighted = vlb_weight(t, schedule, "posterior") * (eps**2).sum()
    print(f"t = {t:4}: KL {kl:10.3f} nats, weight times squared error {weighted:10.3f}")
    assert np.isclose(kl, weighted)

# %% [markdown]
# The weight is what $L_\text{simple}$ (**E17**) leaves out. Drawn over $t$ one sees what that does.

# %%
t_axis = np.arange(2, 1001)
figure, axis = plt.subplots(figsize=(6.5, 3.6))
for name, color in [("posterior", GREY), ("beta", BLUE)]:
    label = r"E16 with $\tilde\beta_t$" if name == "posterior" else r"E16 with $\beta_t$"
    axis.loglog(t_axis, vlb_weight(t_axis, schedule, name), color=color, lw=2, label=label)
weights = vlb_weight(t_axis, schedule, "beta")
axis.axhline(1, color=RED, lw=2, ls="--", label=r"$L_\mathrm{simple}$: 1")
axis.set(xlabel="t", title=r"weight of $\Vert\varepsilon - \varepsilon_\theta\Vert^2$ (linear schedule)")
axis.legend(frameon=False)
save(figure, "05_weights.png")
print(f"weight at t = 2 over weight at t = T: {weights[0] / weights[-1]:.0f} in the bound, 1 in L_simple")

# %% [markdown]
# ![weights](out/05_weights.png)
#
# The bound cares for the first steps most: there the last bits of each grey level are decided, which nobody sees.
# $L_\text{simple}$ moves the effort to large $t$, where shapes are decided. Its samples look better, and its bound is
# worse. Train for what you want; but report the bound if the question is "how many bits?".
#
# ## Grey levels: the decoder $L_0$
#
# A digit's pixel is one of 256 levels, not any real number. So the last step does not give a density but a probability:
# how much of $\mathcal N(\mu_\theta(x_1), \sigma_1^2)$ lies within half a level of $x_0$; for black and for white, also
# all that lies beyond (Ho et al. 2020, eq. 13). The 256 probabilities add up to 1, and $-\log_2$ of them counts bits.

# %%
levels = np.arange(256) / 127.5 - 1
figure, axes = plt.subplots(1, 2, figsize=(11, 2.9))
for axis, mean in zip(axes, (0.5, 0.985), strict=True):
    p = np.exp(discretised_log_likelihood(levels, np.full(256, mean), 2 * np.log(0.02)).numpy())
    assert np.isclose(p.sum(), 1)
    axis.bar(levels, p, width=1.6 / 255, color=BLUE)
    axis.axvline(mean, color=RED, lw=1.5, ls="--")
    axis.set(
        xlim=(mean - 0.09, mean + 0.09), xlabel="$x_0$", title=rf"p($x_0\mid x_1$), mean {mean}, $\sigma_1$ = 0.02"
    )
save(figure, "05_decoder.png")

# %% [markdown]
# ![decoder](out/05_decoder.png)
#
# ## The bound of digits, term by term
#
# As in lesson 2, the best possible network for a finite set of digits is a formula: the average of the digits, each
# weighted by how likely $x_t$ came from it. It has learned 500 digits by heart. To tell which of 500 it is takes
# $\log_2 500 = 8.97$ bits. Does the bound find them?

# %%
few = np.concatenate([images[digits.labels == label][:50] for label in range(10)])
square = (few**2).sum(axis=1)


def by_heart(schedule):
    """E[x_0 | x_t] where x_0 is one of the few."""

    def network(x_t, t):
        a = float(schedule.alpha_bar[t[0]])
        logits = -((x_t**2).sum(axis=1)[:, None] + a * square - 2 * a**0.5 * x_t @ few.T) / (2 * (1 - a))
        w = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (w / w.sum(axis=1, keepdims=True)) @ few

    return network


T = 50 if QUICK else 200
schedule = Schedule.cosine(T)
denoise = denoiser(by_heart(schedule), schedule, "x0")
seen = few[:: 50 if QUICK else 2]
unseen = np.concatenate([images[digits.labels == label][-2 if QUICK else -10 :] for label in range(10)])
bits = {
    name: np.array([bits_per_dim(term, x_0).mean() * 784 for term in bound_terms(x_0, denoise, schedule, Rng(6))])
    for name, x_0 in (("seen", seen), ("unseen", unseen))
}  # bits a digit: L_T, L_{T-1}, ..., L_1, L_0
for name, (L_T, *L_steps, L_0) in bits.items():
    print(f"{name:7}digits: L_T {L_T:.5f}, sum of L_t-1 {sum(L_steps):9.2f}, L_0 {L_0:9.1f} bits a digit")
assert abs(bits["seen"][1:-1].sum() - np.log2(500)) < 3
assert bits["unseen"].sum() > 784 * 8 > bits["seen"].sum()

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
t_axis = np.arange(T, 1, -1)
for name, color in [("seen", BLUE), ("unseen", RED)]:
    left.semilogy(t_axis, bits[name][1:-1].clip(1e-4), color=color, lw=2, label=f"{name} digits")
left.set(xlabel="t", ylabel="bits a digit", title="E11: each $L_{t-1}$", ylim=(1e-3, None))
left.legend(frameon=False)
right.plot(t_axis, np.cumsum(bits["seen"][1:-1]), color=BLUE, lw=2)
right.axhline(np.log2(500), color=GREY, lw=1, ls="--", label=r"$\log_2 500$")
right.set(xlabel="t", ylabel="bits a digit", xlim=(T, 0), ylim=(0, None), title="seen digits: added up on the way back")
right.legend(frameon=False, loc="lower right")
save(figure, "05_digits.png")

# %% [markdown]
# ![digits](out/05_digits.png)
#
# The steps $t \ge 2$ cost 9 bits and a little: the name of one digit in 500. They are spent early on the way back, at
# large $t$; after that the digit is decided and the network's guess is right. What they do *not* contain is the price
# of a $\sigma_1$ that is far too wide for a network that knows each pixel exactly: those are the 700 bits of $L_0$.
#
# Now the digits that the network has **not** seen: far more bits than the $784 \cdot 8 = 6272$ of a file without any
# compression. Its samples would be flawless, being copies, and the bound on new data is what exposes it. A *real*
# network, which cannot learn by heart so well, is measured the same way: `python examples/evaluate_nll.py RUN`.
#
# ## A misprint: the shifted index
#
# The slide at one place writes the terms with $q(x_t \mid x_{t+1}, x_0)$ instead of $q(x_{t-1} \mid x_t, x_0)$, and
# goes on with $\tilde\mu_t$. Either would be right by itself: the posterior of $x_t$ given $x_{t+1}$ has the mean
# $\tilde\mu_{t+1}$. Together they are one step apart: code that takes both from the slide uses the weights of $t$ on
# $x_{t+1}$. What does that cost, even if the network is perfect and knows $x_0$?

# %%
schedule = Schedule.linear(100 if QUICK else 1000)
pixel = np.full((1000, 1), 0.8)
price = []  # KL from the true q(x_t | x_{t+1}, x_0) to the misprinted one, nats a pixel
for t in range(2, schedule.T):
    x_next = q_sample(pixel, t + 1, Rng(7).at(t).normal_like(pixel), schedule)
    mean, variance = posterior(x_next, pixel, t + 1, schedule)
    misprinted_mean, misprinted_variance = posterior(x_next, pixel, t, schedule)
    kl = gaussian_kl(mean, np.log(variance), misprinted_mean, np.log(misprinted_variance))
    price.append(kl.numpy().mean())

walks = {}  # the standard deviation of x_t on a walk back from noise (lesson 4), over what it must be (E4)
for shift in (0, 1):
    x_t, walks[shift] = Rng(8).normal((4000, 1), np.float64), []
    for t in range(schedule.T - 1, 0, -1):  # from x_{t+1} to x_t
        mean, variance = posterior(x_t, np.full_like(x_t, 0.8), t + 1 - shift, schedule)
        x_t = mean + np.sqrt(variance) * Rng(9).at(t).normal_like(x_t)
        walks[shift].append(x_t.std() / np.sqrt(schedule.one_minus_alpha_bar[t]))
print(f"price of the misprint: {sum(price):.2f} nats, {sum(price) / np.log(2):.2f} bits a pixel, and infinity at t = 1")
assert abs(walks[0][-1] - 1) < 0.1 and walks[1][-1] < 1e-9

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
left.loglog(range(2, schedule.T), price, color=RED, lw=2)
left.set(xlabel="t", ylabel="nats a pixel", title="KL of the true step to the misprinted one")
t_axis = np.arange(schedule.T - 1, 0, -1)
right.semilogx(t_axis, walks[0], color=BLUE, lw=2, label=r"$\tilde\mu_{t+1}$ of $x_{t+1}$")
right.semilogx(t_axis, walks[1], color=RED, lw=2, label=r"$\tilde\mu_t$ of $x_{t+1}$, the misprint")
right.set(xlabel="t", title="noise in $x_t$ on the walk back, over E4", ylim=(0, 1.2))
right.legend(frameon=False, loc="lower right")
save(figure, "05_misprint.png")

# %% [markdown]
# ![misprint](out/05_misprint.png)
#
# The weights of neighbouring $t$ are alike, so far from the data nobody notices. Near the data each step takes too much
# noise away. The last one is absurd: $\tilde\beta_1 = 0$ says that $x_1$ *is* $x_0$, a step before the end, and the KL
# to a distribution without width is infinite. Read literally, the sum over $t = 2..T$ would also need an $x_{T+1}$,
# which does not exist, and leave out the step from $x_2$ to $x_1$.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Work out on paper: the KL from $\mathcal N(0.3, 0.04)$ to $\mathcal N(0.1, 0.04)$, in nats.
# 2. A model needs 1100 nats for a digit of 28 × 28 pixels. How many bits per dimension is that?
# 3. Write `best_variance(schedule, t, c)`, the variance of the exact reverse $q(x_{t-1} \mid x_t)$ for data
#    $\mathcal N(m, c)$. *Hint:* the variance of $x_t$ is $\bar\alpha_t c + 1 - \bar\alpha_t$, that of $x_{t-1}$
#    accordingly, and one step of **E1** leads from one to the other.

# %%
kl_of_exercise_1, bits_of_exercise_2 = None, None
best_variance = None  # lambda schedule, t, c: ...

if kl_of_exercise_1 is not None:
    kl = gaussian_kl(np.array(0.3), np.log(0.04), np.array(0.1), np.log(0.04)).item()
    assert np.isclose(kl_of_exercise_1, kl)
    print("exercise 1 is right")
if bits_of_exercise_2 is not None:
    assert np.isclose(bits_of_exercise_2, bits_per_dim(1100, np.zeros((1, 28, 28))), rtol=1e-3)
    print("exercise 2 is right")
if best_variance is not None:
    schedule = Schedule.cosine(20)
    for t in range(2, 21):
        low, high = schedule.posterior_log_variance[t], schedule.log_beta[t]
        v = best_v(schedule, t)
        assert np.isclose(best_variance(schedule, t, c), np.exp(v * high + (1 - v) * low))
    print("exercise 3 is right")
