# %% [markdown]
# # Lesson 14: binomial diffusion, or noise without Gaussians
#
# The paper that began it all (Sohl-Dickstein, Weiss, Maheswaranathan and Ganguli, 2015, eq. numbers below are theirs)
# has *two* diffusion processes in its Table App. 1. The Gaussian one became the deck. The other one is for bits, and
# noise is the toss of a coin. It is **E21**, and it shows which parts of the theory need a Gaussian: none.
#
# You will see
# - the forward process, its marginal and its posterior, held against *all* the chains there are, counted one by one;
# - the bound of eq. 10–14, in bits, and the one thing in it that nobody trains (App. B);
# - what the network should be asked: two ways that can say the same, of which only one learns it;
# - the paper's heartbeat, learned, and its bound coming down to $\log_2 5$ bits, the entropy of the data;
# - eq. 6–9: $p(x_0)$ itself, as an average over forward trajectories.
#
# Run it from anywhere: `python lessons/14_binomial.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import itertools
import math
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, Tensor, no_grad, optim
from tinydiff.data import mnist
from tinydiff.data.heartbeat import heartbeats
from tinydiff.diffusion import binomial, draw_t
from tinydiff.diffusion.binomial import BinomialSchedule
from tinydiff.image import grid
from tinydiff.models.binomial_diffusion import BitNetwork

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer steps and samples, for the test suite
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"


def save(figure, file):
    """Save a figure without the frames that nobody needs."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## Noise is the toss of a coin
#
# $$q(x_t \mid x_{t-1}) = \mathrm{Bernoulli}\big(x_{t-1}(1-\beta_t) + 0.5\,\beta_t\big)$$
#
# Read it aloud: with probability $1-\beta_t$ the bit stays, with probability $\beta_t$ it is replaced by the toss of a
# fair coin (and half of those leave it as it was). After $t$ steps a bit was never replaced with probability
# $\bar\alpha_t = \prod_{i\le t}(1-\beta_i)$, so
#
# $$q(x_t \mid x_0) = \mathrm{Bernoulli}\big(\bar\alpha_t\, x_0 + 0.5\,(1-\bar\alpha_t)\big),$$
#
# which is **E4** with a coin in the place of $\varepsilon$. The paper chooses $\beta_t = 1/(T-t+1)$. Then
# $\bar\alpha_t = 1 - t/T$: each step erases the same share of the data. And $\beta_T = 1$: the last step replaces
# everything, $x_T$ is pure noise *exactly*, and the term $L_T$ of the bound is 0. No Gaussian schedule can do that
# and still let a network predict $\varepsilon$, which would have to be divided by $\sqrt{\bar\alpha_T} = 0$.

# %%
T = 200
schedule = BinomialSchedule.even(T)
assert np.allclose(schedule.alpha_bar, 1 - np.arange(T + 1) / T) and schedule.alpha_bar[T] == 0

digits = mnist.load("embedded")
black_and_white = (digits.images > 127).astype(np.float32)
x_0 = black_and_white[[int(np.argmax(digits.labels == label)) for label in (2, 4, 9)]]
times = [0, 40, 80, 120, 160, 200]
rows = np.stack([x_0, *(binomial.q_sample(x_0, t, schedule, Rng(0).at(t)) for t in times[1:])], axis=1)
figure, axis = plt.subplots(figsize=(7.2, 4.1), layout="constrained")
axis.imshow(grid(2 * rows.reshape(-1, 28, 28) - 1, columns=len(times)), cmap="gray")
axis.set_xticks(14 + 30 * np.arange(len(times)), [f"t = {t}" for t in times])
axis.set(yticks=[], title="A share t/T of the bits has been replaced by coin tosses")
axis.tick_params(length=0)
axis.spines[["left", "bottom"]].set_visible(False)
save(figure, "14_forward.png")

# %% [markdown]
# ![digits dissolving into coin tosses](out/14_forward.png)
#
# ## Everything, by counting
#
# A bit has two values, so four steps have $2^4 = 16$ chains. No integral is needed to know everything about them:
# list them, each with its probability, and add up. The share of the chains with $x_t = 1$ is the marginal. Of the
# chains that start in $x_0$ and are in $x_t$ at time $t$, the share with $x_{t-1} = 1$ is the posterior, for which
# Bayes' rule gives
#
# $$q(x_{t-1}=1 \mid x_t, x_0) = \frac{l\,m}{l\,m + (1-l)(1-m)}, \qquad
# l = q(x_t \mid x_{t-1}=1), \quad m = q(x_{t-1}=1 \mid x_0).$$
#
# It is **E12** with two numbers multiplied where there were two Gaussians.

# %%
short = BinomialSchedule.even(4)


def all_chains(x_0):
    """Every chain x_0, ..., x_4 with its probability: the definition, and nothing else."""
    for chain in itertools.product((0, 1), repeat=4):
        states, probability = (x_0, *chain), 1.0
        for t in range(1, 5):
            beta = short.beta[t]
            probability *= beta / 2 + (1 - beta) * (states[t] == states[t - 1])
        yield states, probability


marginals, posteriors = {}, {}
for start in (0, 1):
    assert math.isclose(sum(p for _, p in all_chains(start)), 1)
    for t in range(1, 5):
        counted = sum(p for states, p in all_chains(start) if states[t])
        formula = binomial.forward_marginal(np.array([float(start)]), t, short)[0]
        assert math.isclose(counted, formula, rel_tol=1e-12)
        marginals[start, t] = counted, formula
        for x_t in (0, 1):
            here = [(states, p) for states, p in all_chains(start) if states[t] == x_t]
            counted = sum(p for states, p in here if states[t - 1]) / sum(p for _, p in here)
            formula = binomial.posterior(np.array([float(x_t)]), np.array([float(start)]), t, short)[0]
            assert math.isclose(counted, formula, rel_tol=1e-12)
            posteriors[start, x_t, t] = counted, formula

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
steps = np.arange(1, 5)
for start, color in ((1, BLUE), (0, RED)):
    counted, formula = np.array([marginals[start, t] for t in steps]).T
    left.plot([0, *steps], [start, *formula], color=color, label=rf"$x_0 = {start}$")
    left.plot(steps, counted, "o", ms=8, mfc="none", color=color)
    for x_t, style in ((1, "-"), (0, "--")):
        counted, formula = np.array([posteriors[start, x_t, t] for t in steps]).T
        right.plot(steps, formula, style, color=color, label=rf"$x_0 = {start},\ x_t = {x_t}$")
        right.plot(steps, counted, "o", ms=8, mfc="none", color=color)
left.set(title=r"marginal $q(x_t = 1 \mid x_0)$", xlabel="t", xticks=range(5))
right.set(title=r"posterior $q(x_{t-1} = 1 \mid x_t, x_0)$", xlabel="t", xticks=steps)
for axis in (left, right):
    axis.set_ylim(-0.05, 1.05)
    axis.legend(frameon=False, fontsize=9)
save(figure, "14_enumeration.png")

# %% [markdown]
# ![lines: the formulas; circles: all chains counted](out/14_enumeration.png)
#
# Lines are the formulas, circles the counts. Look at $t = 1$ on the right: the posterior is certain, 0 or 1, whatever
# $x_1$ says, because $x_0$ is given. At $t = T$ it does not depend on $x_T$ at all, which knows nothing.
#
# ## The bound, in bits
#
# As in **E11**, a bound on $-\log p_\theta(x_0)$ is the sum of
#
# $$L_{t-1} = \mathrm{KL}\big(q(x_{t-1} \mid x_t, x_0)\,\|\,p_\theta(x_{t-1} \mid x_t)\big), \quad t = 1, \dots, T,$$
#
# and of $L_T = 0$. Where the Gaussian bound needs a decoder of its own for $t = 1$, here the same line serves: the
# posterior is certain there, and its KL *is* $-\log p_\theta(x_0 \mid x_1)$. Logarithms to base 2 make it bits, and a
# bit has a meaning: it is what a file would cost, compressed with this model.
#
# ## What to ask the network
#
# The paper's Table App. 1 writes $p_\theta(x_{t-1} \mid x_t) = \mathrm{Bernoulli}(f_\theta(x_t, t))$ and leaves $f$
# open. Two ways:
#
# 1. **Directly**: $f$ is the network's output, through a sigmoid.
# 2. **By way of $x_0$**: the network guesses $\hat x_0$, the probability that each bit of the data is 1 as the *other*
#    bits of $x_t$ tell it, and $f = q(x_{t-1} = 1 \mid x_t, \hat x_0)$, the posterior at that guess. It is what DDPM
#    does with $\tilde\mu_t(x_t, \hat x_0)$, and what D3PM (Austin et al. 2021, eq. 4) does for any alphabet. Nothing is
#    lost: if the guess is right, Bayes' rule makes $f$ exactly $q(x_{t-1} = 1 \mid x_t)$.
#
# With $T = 200$, hardly a bit changes in one step. A direct network spends its training on learning to copy $x_t$, to a
# precision of one in a thousand; the posterior knows that already. Let both learn the paper's toy.
#
# ## The heartbeat
#
# Twenty bits, a 1 in every fifth place. There are five such sequences, each as likely as the others, so the data have
# $\log_2 5 = 2.32$ bits of entropy; no model needs less on average. A model of twenty independent bits, each 1 with
# probability 1/5, needs 14.44. The network is small: the bits and the time in, two hidden layers, twenty log-odds out.

# %%
beats = heartbeats()  # (5, 20)
TRUTH, STEPS, BATCH = math.log2(5), 60 if QUICK else 2000, 128


def log_odds_of(network, x_t, t):
    """The network sees bits as -1 and 1, and the time on a scale of a thousand."""
    return network(Tensor(2 * x_t - 1), t * (1000 / T))


def by_x_0(network, x_0, x_t, t):
    """KL(q(x_{t-1} | x_t, x_0) to the posterior at the network's guess), for each bit."""
    return binomial.reverse_kl(log_odds_of(network, x_t, t), x_0, *binomial.evidence(x_t, t, schedule))


def directly(network, x_0, x_t, t):
    """KL(q(x_{t-1} | x_t, x_0) to Bernoulli(the network's output))."""
    log_odds, q = log_odds_of(network, x_t, t), binomial.posterior(x_t, x_0, t, schedule)
    return binomial.bernoulli_kl(q, binomial.probability(log_odds), binomial.probability(-log_odds))


def train(kl):
    """Algorithm 1 with coins (E18): the network, and the bound at each step in bits a sequence."""
    network, bits = BitNetwork(20, 128, Rng(0)), []
    adam = optim.AdamW(network.parameters(), betas=(0.9, 0.99))
    for step in range(1, STEPS + 1):
        rng = Rng(1).at(step)
        x_0 = beats[rng.at(0).integers(0, 5, (BATCH,))]
        t = draw_t(rng.at(1), BATCH, T, stratified=True)
        x_t = binomial.q_sample(x_0, t, schedule, rng.at(2))
        loss = kl(network, x_0, x_t, t).mean() * (20 * T / math.log(2))  # one t stands for all T of the sum
        loss.backward()
        adam.step(optim.warmup_cosine(step, STEPS, 3e-3, 100, 0.0), max_norm=20.0)
        bits.append(loss.item())
    return network, np.array(bits)


network, bits_by_x_0 = train(by_x_0)
_, bits_directly = train(directly)

# %% [markdown]
# One draw of $t$ per sample is a noisy estimate. For the final figure, `bound` goes through all $T$ terms.


# %%
def denoise(x_t, t):
    """The trained network as the samplers take it."""
    with no_grad():
        return log_odds_of(network, x_t, np.full(len(x_t), t)).data


many = beats[Rng(2).integers(0, 5, (50 if QUICK else 1000,))]
terms = binomial.bound(many, denoise, schedule, Rng(3)) / math.log(2)  # (T+1, B), in bits
total = terms.sum(axis=0)
error = total.std() / math.sqrt(len(total))
print(f"the bound after {STEPS} steps: {total.mean():.3f} ± {error:.3f} bits a sequence; log2 5 = {TRUTH:.3f}")
late, late_directly = bits_by_x_0[-200:].mean(), bits_directly[-200:].mean()
print(f"in the last 200 steps, by way of x_0: {late:.2f} bits, directly: {late_directly:.2f}")
if not QUICK:
    assert TRUTH - 3 * error < total.mean() < TRUTH + 0.15
    assert late_directly > 1.5 * late

window = np.ones(max(1, STEPS // 40)) / max(1, STEPS // 40)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for bits, color, name in ((bits_directly, RED, "directly"), (bits_by_x_0, BLUE, r"by way of $x_0$")):
    smooth = np.convolve(bits, window, "valid")
    left.plot(np.arange(len(smooth)) + len(window), smooth, color=color, label=name)
left.axhline(20 * (0.2 * math.log2(5) + 0.8 * math.log2(1.25)), color=GREY, ls=":", label="independent bits, 14.44")
left.axhline(TRUTH, color=GREEN, ls="--", label=r"$\log_2 5$")
left.set(yscale="log", xlabel="training step", title="the bound while learning, bits a sequence")
left.legend(frameon=False, fontsize=9)
t_axis = np.arange(1, T + 1)
mean = terms.mean(axis=1)
right.plot(t_axis, np.cumsum(mean[T - 1 :: -1])[::-1], color=BLUE, label="sum from T down to t")
right.plot(t_axis, T * mean[:T], color=GREY, lw=0.8, label=r"$T\,L_{t-1}$, its growth")
right.axhline(TRUTH, color=GREEN, ls="--")
right.set(xlabel="t", xlim=(T, 0), title="when the bits are spent, from noise to data")
right.legend(frameon=False, fontsize=9, loc="upper right")
save(figure, "14_bound.png")

# %% [markdown]
# ![the bound](out/14_bound.png)
#
# On the right: where the process decides. Early, in nearly pure noise, nothing is known, and posterior and model agree
# that nothing is; late, all is known. In between falls the decision for one of five sequences, and it costs about
# $\log_2 5$ bits. What the bound has above that is the price of a finite $T$, and of a network that has not finished
# learning. To see the first alone, take a network that has nothing to learn: $P(x_0 \mid x_t)$ of five known sequences
# is Bayes' rule again.


# %%
def perfect(schedule):
    """The log-odds of each bit of x_0, given all the other bits of x_t, for data that are the five heartbeats."""

    def denoise(x_t, t):
        kept = schedule.alpha_bar[t]
        with np.errstate(divide="ignore"):
            log_q = np.log((1 - kept) / 2 + kept * (x_t[:, None] == beats))  # (B, 5, 20): each bit's evidence
            log_q = log_q.sum(axis=2, keepdims=True) - log_q  # all but the bit's own
            weight = np.exp(log_q - log_q.max(axis=1, keepdims=True))
            return np.log((weight * beats).sum(axis=1)) - np.log((weight * (1 - beats)).sum(axis=1))

    return denoise


lengths = [3, 5, 10, 20] if QUICK else [3, 5, 10, 20, 50, 100, 200, 500]
ideal, edge = [], []
for steps in lengths:
    s = BinomialSchedule.even(steps)
    raw = binomial.bound(many.astype(np.float64), perfect(s), s, Rng(4))
    ideal.append(raw.sum(axis=0).mean() / math.log(2))
    edge.append(-binomial.bound_of_2015(raw, 20, s).mean() / math.log(2))
    print(f"T = {steps:3}: {ideal[-1]:6.3f} bits, and {edge[-1]:6.3f} by eq. 14 with its untrained last step")

figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
axis.plot(lengths, edge, "o-", color=RED, label=r"$-K$ of eq. 14, last step not trained")
axis.plot(lengths, ideal, "o-", color=BLUE, label="the bound, all steps trained")
axis.axhline(TRUTH, color=GREEN, ls="--", label=r"$\log_2 5$")
axis.set(xscale="log", yscale="log", xlabel="T", ylabel="bits a sequence", title="A perfect network in T steps")
axis.set_yticks([2, 3, 5, 10, 20], ["2", "3", "5", "10", "20"])
axis.minorticks_off()
axis.legend(frameon=False)
save(figure, "14_steps.png")

# %% [markdown]
# ![the bound against T](out/14_steps.png)
#
# **Why a finite T costs**: $p_\theta(x_{t-1} \mid x_t)$ draws each bit by itself. Whoever must decide for one of five
# sequences in a single step draws twenty bits that fit no sequence. In many small steps the bits can agree. It is the
# discrete form of **E9**: for small $\beta$ the reverse step has the form of the forward step.
#
# **The red line** is the bound exactly as the paper has it (eq. 14),
#
# $$K = -\sum_{t=2}^{T} \mathrm{KL}(\cdot\|\cdot) + H_q(X_T \mid X_0) - H_q(X_1 \mid X_0) - H_p(X_T).$$
#
# The sum starts at 2. For the last step the paper takes the forward step read backwards,
# $p(x_0 \mid x_1) = q(x_1 \mid x_0)$ (App. B.2, to avoid edge effects), and the price of that is
# $H_q(X_1 \mid X_0)$: twenty bits, each of them turned over with probability $1/2T$. Our last step is trained like all
# the others, as DDPM's is, and costs next to nothing. The paper reports $K = -2.414$ bits for its heartbeat, 12.02
# better than independent bits: 0.09 away from $\log_2 5$, as near as the red line comes between one and two thousand
# steps.
#
# ## Samples

# %%
n = 24
coins = (Rng(5).uniform((n, 20)) < 0.5).astype(np.float32)
states = [coins, *binomial.ancestral(denoise, coins, schedule, Rng(6))]
right_ones = np.array([(x[:, None] == beats).all(axis=2).any(axis=1).mean() for x in states])
print(f"{right_ones[-1]:.0%} of {n} samples are heartbeats; of random sequences, one in {2**20 / 5:,.0f} is")

shown = [0, 80, 120, 150, 170, 200]
figure, axes = plt.subplots(1, len(shown), figsize=(11, 2.9), layout="constrained")
for axis, i in zip(axes, shown, strict=True):
    axis.imshow(states[i], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=f"t = {T - i}")
axes[0].set_ylabel("24 samples, 20 bits each")
figure.savefig(OUT / "14_samples.png", dpi=130)
plt.close(figure)
if not QUICK:
    assert right_ones[-1] > 0.9

# %% [markdown]
# ![samples out of noise](out/14_samples.png)
#
# ## The probability itself (eq. 6–9)
#
# The bound is not the end. Multiply and divide by $q(x_{1:T} \mid x_0)$, and the model's probability is an average,
#
# $$p_\theta(x_0) = \mathbb{E}_{q(x_{1:T} \mid x_0)}\left[\, p(x_T) \prod_{t=1}^{T}
# \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})}\right],$$
#
# over trajectories of the *forward* process, which are cheap. (The bound is what remains when Jensen's inequality takes
# the logarithm inside.) We ask the perfect network of $T = 5$ steps, whose bound is loose, what it really thinks.

# %%
five = BinomialSchedule.even(5)
counts = [1, 3, 10, 30] if QUICK else [1, 3, 10, 30, 100, 300, 1000]
x_0 = np.repeat(beats.astype(np.float64), 4 if QUICK else 40, axis=0)
estimates = []
for k in counts:
    each = -binomial.log_likelihood(x_0, perfect(five), five, Rng(7), trajectories=k) / math.log(2)
    estimates.append((each.mean(), *np.percentile(each, (10, 90))))
middle, low, high = np.array(estimates).T
bound_of_five = binomial.bound(np.repeat(x_0, 20, axis=0), perfect(five), five, Rng(8)).sum(axis=0).mean() / math.log(2)
print(f"T = 5: bound {bound_of_five:.2f} bits, {counts[-1]} trajectories say {middle[-1]:.2f}")

figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
axis.fill_between(counts, low, high, color=BLUE, alpha=0.18, label="all but the lowest and the highest tenth")
axis.plot(counts, middle, "o-", color=BLUE, label=r"$-\log_2$ of the average, mean")
axis.axhline(bound_of_five, color=RED, label="the bound: what one trajectory gives on average")
axis.axhline(TRUTH, color=GREEN, ls="--", label=r"$\log_2 5$")
axis.set(
    xscale="log", xlabel="forward trajectories in the average", ylabel="bits", title="A perfect network in T = 5 steps"
)
axis.legend(frameon=False, fontsize=9)
save(figure, "14_likelihood.png")

# %% [markdown]
# ![the likelihood from trajectories](out/14_likelihood.png)
#
# The bound said 3.6 bits; the truth is about 2.6. Only what that has above $\log_2 5$ is the price of five steps.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Half-way, at $t = T/2$ of the paper's schedule: with what probability is a bit of $x_t$ the bit of $x_0$?
# 2. How many bits does a sequence of 24 bits with a pulse in every eighth place cost at least, and how many does a
#    model of independent bits need, each 1 with the right probability?
# 3. $H_q(X_1 \mid X_0)$ of twenty bits, for $T = 2000$, in bits: what eq. 14 pays for its last step.

# %%
same_half_way = None
least, independent = None, None
edge_of_2000 = None

if same_half_way is not None:
    x_0 = np.ones((1, 1))
    assert math.isclose(same_half_way, binomial.forward_marginal(x_0, T // 2, schedule)[0, 0], rel_tol=1e-6)
    print("exercise 1 is right")
if least is not None:
    assert math.isclose(least, math.log2(len(heartbeats(24, 8))), rel_tol=1e-3)
    assert math.isclose(independent, -24 * (math.log2(1 / 8) / 8 + 7 * math.log2(7 / 8) / 8), rel_tol=1e-3)
    print("exercise 2 is right")
if edge_of_2000 is not None:
    long = BinomialSchedule.even(2000)
    assert math.isclose(
        edge_of_2000, -binomial.bound_of_2015(np.zeros((2001, 1)), 20, long)[0] / math.log(2), rel_tol=1e-2
    )
    print("exercise 3 is right")
