# %% [markdown]
# # Lesson 6: training, Algorithm 1 in the plane
#
# A diffusion model is trained by showing it noisy data and asking for the noise. That is all of Algorithm 1. This
# lesson does it with points in the plane in place of images: a small network learns in seconds, and since the data are
# a mixture of Gaussians, the best possible network is known too, to hold the trained one against.
#
# You will see
# - **E18** Algorithm 1, line by line: the same functions that train the digits;
# - **E17** its loss, and why it never goes to zero: a floor under it, for each $t$;
# - the samples getting better while the loss hardly moves;
# - **what the slide's misprint in E17**, $\sqrt{\alpha_t}$ for $\sqrt{\bar\alpha_t}$, makes of the same network,
#   measured.
#
# Run it from anywhere: `python lessons/06_training.py` takes about half a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, Tensor, nn, no_grad, ops, optim
from tinydiff.data.toys import GaussianMixture
from tinydiff.diffusion import Schedule, ddpm, denoiser, draw_t, last, q_sample, simple_loss
from tinydiff.image import running_mean

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREY = "#1f5fa8", "#c8401f", "#777777"

STEPS, BATCH, N = (120, 64, 300) if QUICK else (2000, 256, 2000)
schedule = Schedule.linear(50 if QUICK else 200)
T, alpha_bar = schedule.T, schedule.alpha_bar

ring = GaussianMixture.ring(8)
data = GaussianMixture(ring.means, ring.std, weights=np.tile([3, 1], 4))  # every second group is a small one
points = data.draw(20_000, Rng(0)).x  # (20000, 2), float32


def clean(axis, limit=2.6):
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")


def save(figure, file):
    figure.tight_layout(pad=0.6)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## Algorithm 1, line by line (E18, E17)
#
# | | the deck | here |
# |---|---|---|
# | 1 | repeat | `for step in ...` |
# | 2 | $x_0 \sim q(x_0)$ | a batch of points |
# | 3 | $t \sim \mathrm{Uniform}(\{1, \dots, T\})$ | `draw_t` |
# | 4 | $\varepsilon \sim \mathcal N(0, I)$ | `normal_like` |
# | 5 | gradient step on $\lVert \varepsilon - \varepsilon_\theta(x_t, t)\rVert^2$ | `backward`, `adam.step` |
# | | where $x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$ | `q_sample` (E4) |
# | 6 | until converged | |
#
# One batch of it, with nothing hidden:

# %%
model = nn.MLP(nn.MLPConfig(), Rng(1))
print(f"the network has {model.count_parameters():,} parameters")

rng = Rng(2)
x_0 = points[rng.at(0).integers(0, len(points), (BATCH,))]  # line 2
t = draw_t(rng.at(1), BATCH, T)  # line 3: one t for each point
eps = rng.at(2).normal_like(x_0)  # line 4
x_t = q_sample(x_0, t, eps, schedule)
loss = ops.mse_loss(model(Tensor(x_t), t), Tensor(eps))  # line 5
print(f"the loss of a network that still answers 0 is the mean of eps²: {loss.item():.3f}")

# %% [markdown]
# `simple_loss` is these last two lines, and what every model of the package is trained with:


# %%
def eps_theta(model):
    """The network as a function of arrays."""
    return lambda x_t, t: model(Tensor(x_t), t)


assert np.isclose(simple_loss(eps_theta(model), x_0, t, eps, schedule).item(), loss.item())


def train(model, schedule, watch=()):
    """Algorithm 1. Returns the loss of each step, and the averaged weights' samples after those in `watch`."""
    adam, losses, samples = optim.Adam(model.parameters(), betas=(0.9, 0.99)), [], {}
    ema = optim.EMA(adam, 0.99)  # the average of the last weights draws better than the last ones
    for step in range(STEPS + 1):
        if step in watch:
            with ema.applied():
                samples[step] = draw(eps_theta(model))
        rng = Rng(3).at(step)
        x_0 = points[rng.at(0).integers(0, len(points), (BATCH,))]
        t, eps = draw_t(rng.at(1), BATCH, T), rng.at(2).normal_like(x_0)
        loss = simple_loss(eps_theta(model), x_0, t, eps, schedule)
        loss.backward()
        adam.step(lr=optim.warmup_cosine(step + 1, STEPS + 1, peak=5e-3, warmup=50), max_norm=1.0)
        ema.update()
        losses.append(loss.item())
    adam.vector[...] = ema.average
    return losses, samples


def draw(network):
    """N points by Algorithm 2, of the true schedule, whatever the network was trained on."""
    denoise = denoiser(network, schedule, clip=False)
    return last(ddpm(denoise, Rng(4).normal((N, 2)), schedule, Rng(5), "posterior"))


watched = [STEPS // 20, STEPS // 8, STEPS // 3, STEPS]
losses, samples = train(model, schedule, watched)


# %%
def energy_distance(x, y, most=1000):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, 0 for equal distributions only (Székely & Rizzo 2013)."""

    def mean_distance(a, b):
        return np.sqrt(((a[:most, None] - b[None, :most]) ** 2).sum(axis=-1)).mean()

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


fresh = data.draw(N, Rng(6)).x
figure, axes = plt.subplots(1, 5, figsize=(14, 3.1))
for axis, (step, x) in zip(axes, samples.items(), strict=False):
    axis.plot(*x.T, ".", ms=1.8, color=BLUE)
    axis.set_title(f"after {step} steps", fontsize=11)
    clean(axis)
    print(f"after {step:5} steps: energy distance to fresh data {energy_distance(x, fresh):.4f}")
axes[-1].plot(*fresh.T, ".", ms=1.8, color=GREY)
axes[-1].set_title("the data", fontsize=11)
clean(axes[-1])
save(figure, "06_samples.png")
print(f"two draws of the data themselves: {energy_distance(data.draw(N, Rng(7)).x, fresh):.4f}")

# %% [markdown]
# ![samples](out/06_samples.png)
#
# ## The floor under the loss (E17)
#
# The loss soon stops falling. Is the network stuck? From $x_t$ alone the noise cannot be known: many pairs of $x_0$
# and $\varepsilon$ give the same $x_t$. The best answer is the mean of all of them, $E[\varepsilon \mid x_t]$, and its
# error is what remains of the loss when there is nothing left to learn. For a mixture of Gaussians it has a formula,
# `GaussianMixture.best_eps`. We measure both, for each $t$, on points that training never saw.

# %%
times = np.unique(np.geomspace(1, T, 12 if QUICK else 40).round().astype(int))
x_0 = data.draw(1000 if QUICK else 4000, Rng(8)).x
eps = Rng(9).normal_like(x_0)


def error_at(network, t):
    """E17's loss at one t, on fresh data."""
    x_t = q_sample(x_0, int(t), eps, schedule)
    with no_grad():
        guess = network(x_t, np.full(len(x_t), t))
    return float(((eps - (guess.data if isinstance(guess, Tensor) else guess)) ** 2).mean())


def best(x_t, t):
    """The network that minimises E17's loss."""
    return data.best_eps(x_t, alpha_bar[t[0]])


learned = np.array([error_at(eps_theta(model), t) for t in times])
floor = np.array([error_at(best, t) for t in times])
weight = np.gradient(times.astype(float))
floor_of_all = (floor * weight).sum() / weight.sum()
print(f"mean over t: learned {(learned * weight).sum() / weight.sum():.3f}, the best possible {floor_of_all:.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.plot(losses, color=BLUE, alpha=0.25, lw=0.7)
left.plot(running_mean(np.array(losses), max(1, STEPS // 40)), color=BLUE, label="training loss")
left.axhline(floor_of_all, color=GREY, ls="--", label="the best possible")
left.set(xlabel="step", title="E17 over the training", ylim=(0, 1.3))
right.plot(times, learned, "o-", ms=3, color=BLUE, label="learned")
right.plot(times, floor, "--", color=GREY, label="the best possible")
right.set(xlabel="t", xscale="log", title=r"E17 at each $t$, on fresh data", ylim=(0, 1.1))
for axis in (left, right):
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
save(figure, "06_loss.png")
assert QUICK or ((learned > 0.97 * floor).all() and (learned < floor + 0.05).all())

# %% [markdown]
# ![loss](out/06_loss.png)
#
# Small $t$ are the hard ones: next to no noise, invisible beside the spread of the data. At large $t$ nearly all of
# $x_t$ *is* the noise. The average says little: judge by the samples, or by the distance from the floor.
#
# ## The misprint (the slide's E17)
#
# The slide makes its noisy point as $x_t = \sqrt{\alpha_t}\,x_0 + \sqrt{1-\alpha_t}\,\varepsilon$, without the bars. We
# need no new code for it. Training with the misprint *is* training on another schedule, one whose $\bar\alpha_t$ is our
# $\alpha_t$, that is with $\beta'_t = 1 - \alpha_t/\alpha_{t-1}$. The package takes it, and complains (E5):

# %%
with warnings.catch_warnings(record=True) as complaints:
    warnings.simplefilter("always")
    misprint = Schedule.from_betas(1 - schedule.alpha[1:] / schedule.alpha[:-1])
print("the package:", complaints[0].message)
assert np.allclose(misprint.alpha_bar, schedule.alpha)

misled = nn.MLP(nn.MLPConfig(), Rng(1))
misled_losses, _ = train(misled, misprint)


# %% [markdown]
# The loss of the misled network is high, since a few per cent of noise are hard to see; nothing in it says that
# something is wrong. Then Algorithm 2 starts it from pure noise, which it never saw. Is it only the network's fault,
# for not knowing what to do where it never was? To find out we give the misprint a *perfect* student too,
# $E[\varepsilon \mid x_t]$ of the misprint's $x_t$, which knows what to do everywhere. It takes pure noise for a
# slightly noisy point, and jumps to a near group, large or small: the small groups, a quarter of the data, get a
# third of the samples.


# %%
def perfectly_misled(x_t, t):
    """The best network for the slide's x_t."""
    return data.best_eps(x_t, schedule.alpha[t[0]])


panels = {
    r"trained with $\sqrt{\bar\alpha_t}$ (E4)": (samples[STEPS], BLUE),
    r"trained with $\sqrt{\alpha_t}$ (the slide)": (draw(eps_theta(misled)), RED),
    "the misprint's perfect student": (draw(perfectly_misled), RED),
}
print(f"training loss at the end: {np.mean(losses[-100:]):.3f}, of the misprint {np.mean(misled_losses[-100:]):.3f}")
figure, axes = plt.subplots(1, 4, figsize=(15, 3.7), width_ratios=(1, 1, 1, 1.3))
distances, small = [], []
for axis, (name, (x, colour)) in zip(axes, panels.items(), strict=False):
    size = float(np.abs(x).max())
    axis.plot(*x.T, ".", ms=1.8, color=colour)
    clean(axis, max(2.6, 1.05 * float(np.quantile(np.abs(x), 0.99))))
    if size > 2.6:
        axis.add_patch(plt.Rectangle((-2.6, -2.6), 5.2, 5.2, fill=False, color=GREY, ls=":"))
    axis.set_title(name, fontsize=11)
    distances.append(energy_distance(x, fresh))
    away = np.sqrt(((x[:, None] - data.means) ** 2).sum(axis=-1))  # (N, 8)
    in_a_group = away.min(axis=1) < 3 * data.std
    small.append((away.argmin(axis=1) % 2)[in_a_group].mean() if in_a_group.any() else np.nan)
    print(
        f"{name:45} energy distance {distances[-1]:.3f}, {in_a_group.mean():.0%} in a group, "
        f"{small[-1]:.0%} of these in a small one"
    )
for network, name, colour in ((eps_theta(model), "E4", BLUE), (eps_theta(misled), "the slide", RED)):
    axes[-1].plot(times, [error_at(network, t) for t in times], "o-", ms=3, color=colour, label=name)
axes[-1].plot(times, floor, "--", color=GREY, label="the best possible")
axes[-1].axhline(1, color=GREY, lw=0.8, ls=":")
axes[-1].set(xlabel="t", xscale="log", yscale="log", title=r"error at the true $x_t$ (1: answering 0)")
axes[-1].legend(frameon=False)
axes[-1].spines[["top", "right"]].set_visible(False)
save(figure, "06_misprint.png")
print("in the data 99% are in a group, 25% of these in a small one")
assert QUICK or (4 * distances[0] < distances[2] < distances[1] and abs(small[0] - 0.25) < 0.04 < small[2] - 0.25)

# %% [markdown]
# ![the misprint](out/06_misprint.png)
#
# Where the misprint's samples end up near the data (the dotted square is the frame of the other panels) they look
# right at a glance, which is what makes such a mistake hard to find. The last panel finds it: shown an $x_t$ of E4
# with $t$ near $T$, the network that learned E4 hears the noise clearly, and the misled one is no better than one that
# answers 0.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Data that are $\mathcal N(0, I)$ themselves: which $\varepsilon_\theta(x_t, t)$ is best? Write it as a function of
#    $x_t$ and $\bar\alpha_t$. (Everything is Gaussian: $E[\varepsilon \mid x_t]$ is a number times $x_t$.)
# 2. And what is its loss at $t$, the floor? A function of $\bar\alpha_t$.

# %%
best_for_normal_data = None  # a function (x_t, alpha_bar_t) -> array
floor_for_normal_data = None  # a function alpha_bar_t -> number

x_0, eps = Rng(10).at(0).normal((100_000, 2)), Rng(10).at(1).normal((100_000, 2))
if best_for_normal_data is not None:
    for t in (1, T // 3, T):
        x_t = q_sample(x_0, t, eps, schedule)
        error = eps - best_for_normal_data(x_t, alpha_bar[t])
        assert abs((error * x_t).mean()) < 0.01, "the error can still be told from x_t"
    print("exercise 1 is right")
if floor_for_normal_data is not None:
    for t in (1, T // 3, T):
        a, x_t = alpha_bar[t], q_sample(x_0, t, eps, schedule)
        slope = (eps * x_t).mean() / (x_t**2).mean()  # least squares finds the best number
        assert abs(((eps - slope * x_t) ** 2).mean() - floor_for_normal_data(a)) < 0.01
    print("exercise 2 is right")
