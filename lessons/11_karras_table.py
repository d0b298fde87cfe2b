# %% [markdown]
# # Lesson 11: the Karras table, or four families in one
#
# By 2022 there were several families of diffusion models, each with its own theory, its own time and its own formulas.
# Karras, Aittala, Aila and Laine laid them side by side in one table (**E22**) and showed that its rows are choices
# that hardly depend on one another. The slide shows that table as a scan that can hardly be read; here it is as code.
#
# You will see
# - the noise level $\sigma$ in place of the time $t$, and one denoiser $D(x;\sigma)$ for all families;
# - the table drawn: time steps, what is put around the network, which noise it is trained on;
# - what the network is really asked to answer, and why the paper's own column asks something better;
# - one differential equation, two solvers, and their orders measured where the exact answer is known;
# - churn: noise that repairs the mistakes of earlier steps;
# - a model trained the DDPM way, sampled the paper's way.
#
# Run it from anywhere: `python lessons/11_karras_table.py` takes under a minute and writes its pictures to
# `lessons/out/`.

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
    Column,
    Schedule,
    churned,
    ddim,
    denoiser,
    from_ddpm,
    last,
    noise_levels,
    probability_flow,
)
from tinydiff.diffusion.edm import training_pair
from tinydiff.image import grid, to_signed
from tinydiff.models import PixelDiffusion

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"
TABLE = {"VP": Column.vp(), "VE": Column.ve(), "iDDPM": Column.iddpm(), "EDM": Column.edm()}
COLOURS = {"VP": RED, "VE": GREEN, "iDDPM": "#8a4fa8", "EDM": BLUE}


def save(figure, file):
    """Write a figure and close it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


def show(file, rows, titles, names):
    """Draw rows of images, a title above each column of them and a name before each row."""
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(1.15 * len(titles) + 1.6, 1.2 * len(rows) + 0.35))
    for row, name, line in zip(rows, names, axes, strict=True):
        for picture, axis in zip(row, line, strict=True):
            axis.imshow(picture.reshape(28, 28), cmap="gray", vmin=-1.5, vmax=1.5)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=11)
    figure.tight_layout(pad=0.4)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## Noise instead of time
#
# In the DDPM notation $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$. Divide by
# $\sqrt{\bar\alpha_t}$ and all that is left is the data with noise on it:
#
# $$x = y + n,\qquad n \sim \mathcal N(0, \sigma^2 I),\qquad \sigma_t = \sqrt{(1-\bar\alpha_t)/\bar\alpha_t}.$$
#
# The time $t$ was only a name for $\sigma$. (The paper writes $y$ for the data; its $x_0$ is the *first* sample, pure
# noise.) A denoiser $D(x;\sigma)$ guesses $y$. For a finite set of images the best one is known, as in lesson 2: the
# average of all images, each weighted by how likely it was the one. Each point may also be a Gaussian of some width.


# %%
def ideal(points, width=0.0, weights=None):
    """The denoiser D(x; sigma) that has the least error for data spread around these points."""
    log_weights = np.log(np.full(len(points), 1 / len(points)) if weights is None else weights)

    def D(x, sigma):
        variance = sigma**2 + width**2
        square_distance = (x**2).sum(axis=1)[:, None] + (points**2).sum(axis=1) - 2 * x @ points.T
        logits = log_weights - square_distance / (2 * variance)
        w = np.exp(logits - logits.max(axis=1, keepdims=True))
        nearest = w / w.sum(axis=1, keepdims=True) @ points
        return (width**2 * x + sigma**2 * nearest) / variance  # between the points and x, as their variances say

    return D


digits = mnist.load("embedded")
images = to_signed(digits.images).reshape(-1, 784)
few = np.concatenate([images[digits.labels == label][:50] for label in range(10)])  # 500, 50 of each kind
D = ideal(few)

five = few[262:263]
sigmas = [0.1, 1.0, 3.0, 4.0, 5.0, 7.0, 10.0, 80.0]
noisy = [five + sigma * Rng(1).normal_like(five) for sigma in sigmas]
guesses = [D(x, sigma) for x, sigma in zip(noisy, sigmas, strict=True)]
rows = [[x / np.sqrt(1 + sigma**2) for x, sigma in zip(noisy, sigmas, strict=True)], guesses]
show("11_noise_and_denoiser.png", rows, [f"σ = {sigma:g}" for sigma in sigmas], ["x, scaled\nto be seen", "D(x; σ)"])

# %% [markdown]
# ![noise and denoiser](out/11_noise_and_denoiser.png)
#
# Little noise: the digit is known. Much noise: $D$ gives the mean of all digits. What has to be decided is decided
# between, in a narrow range of $\sigma$; we come back to that.
#
# ## The table
#
# $$\begin{array}{l|llll}
# & \text{VP} & \text{VE} & \text{iDDPM + DDIM} & \text{EDM, the paper's own} \\ \hline
# \text{solver} & \text{Euler} & \text{Euler} & \text{Euler} & \text{Heun} \\
# \text{time steps } t_i,\ i<N
#   & 1 + \frac{i}{N-1}(\epsilon_s - 1)
#   & \sigma_{\max}^2 (\sigma_{\min}^2/\sigma_{\max}^2)^{i/(N-1)}
#   & u_j,\ j = \lfloor j_0 + \frac{M-1-j_0}{N-1} i + \frac12\rfloor
#   & (\sigma_{\max}^{1/\rho} + \frac{i}{N-1}(\sigma_{\min}^{1/\rho} - \sigma_{\max}^{1/\rho}))^\rho \\
# \sigma(t) & \sqrt{e^{\frac12\beta_d t^2 + \beta_{\min} t} - 1} & \sqrt t & t & t \\
# s(t) & 1/\sqrt{e^{\frac12\beta_d t^2 + \beta_{\min} t}} & 1 & 1 & 1 \\
# c_\text{skip} & 1 & 1 & 1 & \sigma_d^2/(\sigma^2+\sigma_d^2) \\
# c_\text{out} & -\sigma & \sigma & -\sigma & \sigma\,\sigma_d/\sqrt{\sigma^2+\sigma_d^2} \\
# c_\text{in} & 1/\sqrt{\sigma^2+1} & 1 & 1/\sqrt{\sigma^2+1} & 1/\sqrt{\sigma^2+\sigma_d^2} \\
# c_\text{noise} & (M-1)\,\sigma^{-1}(\sigma) & \ln\frac12\sigma
#   & M-1-\arg\min_j\lvert u_j-\sigma\rvert & \frac14\ln\sigma \\
# \text{noise to train on} & \sigma^{-1}(\sigma)\sim U(\epsilon_t,1)
#   & \ln\sigma\sim U(\ln\sigma_{\min},\ln\sigma_{\max})
#   & \sigma=u_j,\ j\sim U\{0..M-1\} & \ln\sigma\sim\mathcal N(P_\text{mean},P_\text{std}^2) \\
# \text{weight } \lambda(\sigma) & 1/\sigma^2 & 1/\sigma^2 & 1/\sigma^2 & (\sigma^2+\sigma_d^2)/(\sigma\,\sigma_d)^2
# \end{array}$$
#
# ($\sigma_d$ is $\sigma_\text{data}$, the standard deviation of the data: 0.5 in the paper.)
# `tinydiff/diffusion/edm.py` has it row for row: a column is a `Column`, a row is a field. The $u_j$ of iDDPM look
# forbidding ($u_M = 0$, $u_{j-1} = \sqrt{(u_j^2+1)/\max(\bar\alpha_{j-1}/\bar\alpha_j, C_1) - 1}$) and are old friends,
# counted downwards: the $\sigma_t$ of the cosine schedule of **E7**, whose clipping of $\beta_t$ at 0.999 is $C_1$.

# %%
u = noise_levels(Schedule.cosine(1000))[::-1]
print("u_0, u_1, ... =", *(f"{level:.4g}" for level in u[:10]), "...", *(f"{level:.2g}" for level in u[-2:]))
assert [round(level) for level in u[[0, 1, 8]]] == [20291, 642, 80]  # the paper lists these
assert np.allclose(TABLE["iDDPM"].times(992)[:-1], u[8:1000])

# %%
figure, axes = plt.subplots(2, 3, figsize=(12.5, 6.6))
sigma = np.geomspace(0.002, 150, 300)
for name, column in TABLE.items():
    look = {"color": COLOURS[name], "lw": 2, "label": name, "ls": "--" if name == "iDDPM" else "-"}  # often as VP is
    levels = column.sigmas(18)[:-1]
    axes[0, 0].plot(np.arange(18), levels, "o-", ms=3.5, color=COLOURS[name], label=name)
    for axis, row in zip(axes.flat[1:4], (column.c_skip, column.c_out, column.c_in), strict=True):
        axis.plot(sigma, np.broadcast_to(np.abs(row(sigma)), sigma.shape), **look)
    c_noise = column.c_noise(sigma)
    axes[1, 1].plot(sigma, (c_noise - c_noise[0]) / (c_noise[-1] - c_noise[0]), **look)
    drawn = np.log10(column.draw_sigma(Rng(0), 100_000))
    axes[1, 2].hist(drawn, bins=np.linspace(-3, 3, 90), density=True, histtype="step", **look)
axes[0, 0].set(yscale="log", xlabel="i", xticks=range(0, 18, 4), title=r"noise levels $\sigma(t_i)$, $N = 18$")
axes[0, 1].set(xscale="log", title=r"$c_{skip}$: how much of $x$ is kept")
axes[0, 2].set(xscale="log", yscale="log", title=r"$|c_{out}|$: what errors are multiplied by")
axes[1, 0].set(xscale="log", title=r"$c_{in}$: the network's input is scaled")
axes[1, 1].set(xscale="log", title=r"$c_{noise}$, from 0 to 1: the noise it is told")
axes[1, 2].set(xlabel=r"$\log_{10}\sigma$", title=r"density of the $\sigma$ to train on", yticks=[])
for axis in axes.flat[1:5]:
    axis.set_xlabel("σ")
axes[0, 0].legend(frameon=False)
save(figure, "11_the_table.png")

# %% [markdown]
# ![the table](out/11_the_table.png)
#
# Read it panel by panel. VP, whose time steps are even in $t$, spends half of them above $\sigma = 3$, where little but
# the mean can be seen; iDDPM leaves that range quickly; EDM takes smaller and smaller steps towards the data. In three
# columns an error of the network is multiplied by $\sigma$, in EDM by no more than $\sigma_\text{data}$. And EDM trains
# mostly between 0.03 and 3: with less noise there is hardly anything to gain, with more the answer is near the mean.
# (Our $D$ knows only 500 digits and has its answer at $\sigma = 3$. A network that is to draw new ones has details to
# decide far below.)
#
# ## What the network is asked
#
# With $D(x;\sigma) = c_\text{skip}\,x + c_\text{out}\,F(c_\text{in}\,x;\,c_\text{noise})$ the loss
# $\lambda\,\lVert D(y+n;\sigma) - y\rVert^2$ is a plain squared error of the network $F$:
#
# $$\lambda\,c_\text{out}^2\,\Big\lVert F(c_\text{in}\,x;\,c_\text{noise})
#   - \tfrac{1}{c_\text{out}}\big(y - c_\text{skip}\,x\big)\Big\rVert^2$$
#
# `training_pair` computes these parts. The factor in front is 1 in all four columns; what differs is the question.

# %%
asked = [0.01, 0.1, 0.3, 0.5, 1.0, 3.0, 80.0]
eps = Rng(2).normal_like(five)
targets = {}
for name, column in TABLE.items():
    pairs = [training_pair(five, sigma, eps, column) for sigma in asked]
    targets[name] = [target for _, _, target, _ in pairs]
    assert np.allclose([weight for *_, weight in pairs], 1)
rows = [targets[name] for name in ("VP", "VE", "EDM")]
show("11_targets.png", rows, [f"σ = {sigma:g}" for sigma in asked], ["VP, iDDPM", "VE", "EDM"])

# %% [markdown]
# ![targets](out/11_targets.png)
#
# VP and iDDPM ask for the noise, always; VE for the noise with its sign turned. At $\sigma = 80$ that is a poor
# question: the network sees almost nothing but noise and has to hand it back exactly, since its error is multiplied by
# 80. EDM asks for (minus) the noise where the noise is hard to see, and for the image where the image is. This is the
# thought behind the $v$ of **E15**, too. The formulas follow from three wishes: unit variance into $F$ ($c_\text{in}$),
# unit variance out of it ($c_\text{out}$), and errors multiplied by as little as possible ($c_\text{skip}$):
#
# $$c_\text{out}^2 = (1-c_\text{skip})^2\sigma_\text{data}^2 + c_\text{skip}^2\sigma^2
#   \quad\text{is least at}\quad c_\text{skip} = \frac{\sigma_\text{data}^2}{\sigma^2+\sigma_\text{data}^2}.$$

# %%
y, n = Rng(3).normal((2, 50_000), np.float64) * [[0.5], [1.0]]  # data of standard deviation 0.5
for sigma in asked:
    x, _, target, _ = training_pair(y, sigma, n, TABLE["EDM"])
    assert abs(x.var() - 1) < 0.05 and abs(target.var() - 1) < 0.05
    choices = np.linspace(0, 1, 1001)
    best = choices[np.argmin((1 - choices) ** 2 * 0.25 + choices**2 * sigma**2)]
    assert abs(best - TABLE["EDM"].c_skip(sigma)) < 1e-3

# %% [markdown]
# ## One equation, many clocks
#
# All families follow the same journey from noise to data, the *probability flow*: each $x$ moves straight towards
# where $D$ sees the data,
#
# $$\frac{dx}{dt} = \Big(\frac{\dot\sigma}{\sigma} + \frac{\dot s}{s}\Big)x
#   - \frac{\dot\sigma s}{\sigma}\,D\!\Big(\frac{x}{s};\sigma\Big).$$
#
# They differ in the clock $\sigma(t)$ and the scale $s(t)$. Here are the paths for data that are $-1$ or $+1$.

# %%
two = ideal(np.array([[-1.0], [1.0]]), width=0.02)
starts = np.linspace(-2.2, 2.2, 23)[:, None]
panels = {
    "VP": (Column.vp(beta_d=2.5), r"VP: $\sigma(t) = \sqrt{e^{...}-1}$, $s(t) < 1$"),
    "VE": (Column.ve(sigma_max=2.0), r"VE: $\sigma(t) = \sqrt{t}$"),
    "EDM": (Column.edm(sigma_max=2.0), r"iDDPM and EDM: $\sigma(t) = t$"),
}
figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.7))
for axis, (name, (column, title)) in zip(axes, panels.items(), strict=True):
    times = column.times(60 if QUICK else 400)
    first = float(column.sigma(times[0]) * column.s(times[0])) * starts
    path = [first, *probability_flow(two, starts, column, len(times) - 1, "heun")]
    axis.plot(times, np.stack(path)[:, :, 0], color=COLOURS[name], lw=1)
    axis.set(xlabel="t", title=title, xlim=(0, times[0]))
axes[0].set_ylabel("x")
save(figure, "11_paths.png")

# %% [markdown]
# ![paths](out/11_paths.png)
#
# With $\sigma(t) = t$ the paths are straight but for a short bend: a long step along the tangent stays near the path,
# and one Euler step down to $t = 0$ lands on $D(x;\sigma)$ itself. VE's paths turn sharply just before the data. (Its
# last step, into $t = 0$, takes away only half of the noise that is left: exercise 3.)
#
# ## The order of a solver
#
# Euler's method follows the slope $d$ at the start of the step. Heun's method looks at the slope $d'$ where Euler would
# land, goes back, and follows the average. That costs twice the evaluations of the network, $2N-1$ for $N$ steps, and
# its error falls like $N^{-2}$ instead of $N^{-1}$. Is it so? For Gaussian data the exact path is known: each axis
# keeps its place within the Gaussian as that grows narrower. We compare at $t_{N-1}$, before the last step.

# %%
std = np.array([1.0, 0.2])  # of the two axes
start = Rng(5).normal((50, 2), np.float64)


def gaussian(x, sigma):
    """The ideal denoiser for data N(0, diag(std²))."""
    return std**2 / (std**2 + sigma**2) * x


def error(column, N, solver):
    """The root mean square of what is wrong with x at t_{N-1}."""
    *_, x, _ = probability_flow(gaussian, start, column, N, solver)
    first, *_, end, _ = column.sigmas(N)
    exact = np.sqrt((std**2 + end**2) / (std**2 + first**2)) * first * start
    return np.sqrt(((x / column.s(column.times(N)[-2]) - exact) ** 2).mean())


evaluations = [9, 17, 35, 71, 141, 281] if QUICK else [9, 17, 35, 71, 141, 281, 561, 981]
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
errors = {}
for name, column in TABLE.items():
    for axis, solver in zip(axes, ("euler", "heun"), strict=True):
        steps = evaluations if solver == "euler" else [(e + 1) // 2 for e in evaluations]
        errors[name, solver] = [error(column, N, solver) for N in steps]
        axis.plot(evaluations, errors[name, solver], "o-", ms=4, color=COLOURS[name], label=name)
for axis, solver, power in zip(axes, ("Euler", "Heun"), (1, 2), strict=True):
    guide = errors["EDM", solver.lower()][3] * (np.array(evaluations) / evaluations[3]) ** -float(power)
    axis.plot(evaluations, guide, color=GREY, ls=":", label=f"$N^{{-{power}}}$")
    axis.set(xscale="log", yscale="log", xlabel="evaluations of D", title=solver)
    axis.legend(frameon=False)
axes[0].set(ylabel="error", ylim=(1e-5, 10))
save(figure, "11_order.png")
for name in ("VP", "VE", "EDM"):
    for solver, power in (("euler", 1), ("heun", 2)):
        ratio = errors[name, solver][-3] / errors[name, solver][-1]
        print(
            f"{name:5} {solver:5}: {evaluations[-3]} to {evaluations[-1]} evaluations, the error falls by {ratio:.1f}"
        )
        if not QUICK:
            assert abs(np.log(ratio) / np.log(evaluations[-1] / evaluations[-3]) - power) < 0.2

# %% [markdown]
# ![order](out/11_order.png)
#
# Both orders are there, for every clock. With few evaluations Heun's long steps cost more than they gain; from some 35
# evaluations on it is ahead, and then by ever more. The time steps matter as much: between VE's and VP's lies a factor
# of 30. For these data VP's are the best, since little happens here below $\sigma = 0.2$, where EDM takes half of its
# steps. In images much happens there.
#
# What is wrong with VE? Let $D$ be right, so that $x - D$ is all noise. From $t_i$ to $t_{i+1}$ it should shrink by
# $\sigma(t_{i+1})/\sigma(t_i) = \sqrt{t_{i+1}/t_i}$. Euler's method on the clock $\sigma = \sqrt t$ shrinks it by
# $\frac12(1 + t_{i+1}/t_i)$, which is always more: some noise stays behind, and the next steps are told of less than
# there is. On the clock $\sigma = t$ the two are equal.

# %%
for N in (35, 100, 1000):
    times = TABLE["VE"].times(N)[:-1]
    ratios = times[1:] / times[:-1]
    too_much = ((1 + ratios) / 2 / np.sqrt(ratios)).prod()
    print(f"VE, {N} Euler steps: in the end there is {too_much:.2f} times the noise that D is told of")
    assert 1 < too_much < 3

# %% [markdown]
# ## Churn
#
# The flow adds no noise, so it keeps whatever mistake it made. The paper's stochastic sampler (its Algorithm 2) first
# adds a little noise, then takes a Heun step down from there:
#
# $$\hat\sigma = (1+\gamma)\,\sigma_i,\qquad \hat x = x + \sqrt{\hat\sigma^2-\sigma_i^2}\;S_\text{noise}\,z,
# \qquad \gamma = \min(S_\text{churn}/N, \sqrt2-1)\ \text{ while }\ S_\text{tmin}\le\sigma_i\le S_\text{tmax}.$$
#
# Each round forgets some of the past and draws $x$ towards the distribution that $D$ believes in *now*. Let the data be
# $-1$ three times out of four, else $+1$, and take a $D$ that is exact up to $\sigma = 1$ and errs above, towards $+1$.

# %%
points, truth = np.array([[-1.0], [1.0]]), 0.75
exact = ideal(points, width=0.1, weights=[truth, 1 - truth])


def flawed(x, sigma):
    """Exact where there is little noise; with more noise it leans to the right."""
    return exact(x, sigma) + (0.4 if sigma > 1 else 0.0)


start = Rng(6).normal((2000 if QUICK else 10_000, 1), np.float64)
churns = [0, 5, 10, 20, 30, 40, 60, 80]
figure, axis = plt.subplots(figsize=(7.2, 4))
for name, denoise, colour in (("an exact D", exact, COLOURS["EDM"]), ("a flawed D", flawed, COLOURS["VP"])):
    for N, line in ((18, ":"), (40, "--"), (200, "-")) if not QUICK else ((40, "--"),):
        levels = Column.edm(sigma_max=20.0).sigmas(N)
        ends = [last(churned(denoise, start, levels, Rng(7), S_churn=churn, S_tmax=1.0)) for churn in churns]
        shares = [float((x < 0).mean()) for x in ends]
        axis.plot(churns, shares, line, marker="o", ms=3.5, color=colour, label=f"{name}, {N} steps")
        print(f"{name}, {N} steps: {shares[0]:.3f} of the samples at -1 without churn, {shares[-1]:.3f} with most")
        assert abs(shares[-1] - truth) < abs(shares[0] - truth) + 0.02
axis.axhline(truth, color=GREY, lw=1)
axis.set(xlabel=r"$S_{churn}$", ylabel="share of the samples at −1", title="Three quarters of the data are at −1")
axis.legend(frameon=False, fontsize=9)
save(figure, "11_churn.png")

# %% [markdown]
# ![churn](out/11_churn.png)
#
# Without churn the flawed denoiser sends too many samples to $+1$, however many steps it takes. Churn where it is
# right, below $\sigma = 1$, brings most of them back; but only with many steps, since none may add more than $\gamma =
# \sqrt2-1$. (Even the exact $D$ has something to repair: its samples start as pure noise of $\sigma = 20$, without the
# mean of the data.) A trained network errs at all noise levels, so churn costs detail as well. The paper searches for
# the best four $S$ model by model, and finds that its own network for CIFAR-10, trained better, needs no churn.
#
# ## Trained one way, sampled another
#
# To a sampler, $D$ is a black box. A network that was trained with `simple_loss` at $t = 1..T$ knows the noise levels
# $\sigma_t$, and `from_ddpm` makes a $D$ of it: ask at the nearest $\sigma_t$, with $x_t = x/\sqrt{1+\sigma^2}$. Our
# stand-in for a network is the perfect student of lesson 2, which learned 500 digits by heart; it is called as any
# DDPM network is, with $x_t$ and $t$. All samplers start from the same noise. We count how many samples end at the very
# digit where the flow ends that is solved in many steps.

# %%
schedule = Schedule.linear(1000)
level_of = noise_levels(schedule)


def student(x_t, t):
    """A perfect DDPM network that gives x_0."""
    sigma = level_of[t[0]]
    return D(x_t * np.sqrt(1 + sigma**2), sigma)


denoise = denoiser(student, schedule, "x0", clip=False)
D_student = from_ddpm(denoise, schedule)
sigma_range = {"sigma_min": level_of[1], "sigma_max": level_of[-1]}  # what it was trained on
start = Rng(8).normal((20 if QUICK else 150, 784))


def kind(x):
    """Which of the 500 digits each sample is nearest to."""
    return (2 * x @ few.T - (few**2).sum(axis=1)).argmax(axis=1)


budgets = [9, 17, 35, 71]
end = kind(last(ddim(denoise, start, schedule, Rng(0), steps=200 if QUICK else 500)))
pictures, agree = {}, {"DDIM": [], "EDM, Heun": []}
for budget in budgets:
    pictures["DDIM"] = last(ddim(denoise, start, schedule, Rng(0), steps=budget))
    pictures["EDM, Heun"] = last(probability_flow(D_student, start, Column.edm(**sigma_range), (budget + 1) // 2))
    for name, x in pictures.items():
        agree[name].append(float((kind(x) == end).mean()))
    if budget == 17:
        drawn = {name: x[:24].reshape(-1, 28, 28) for name, x in pictures.items()}
for name, shares in agree.items():
    print(f"{name:9} in {budgets} evaluations: {', '.join(f'{share:.0%}' for share in shares)} end where the flow ends")
if not QUICK:
    assert min(agree["EDM, Heun"][2:]) > 0.95

figure, axes = plt.subplots(2, 1, figsize=(7.6, 3.5))
titles = ("DDIM, 17 evaluations", "EDM's time steps and Heun, 17 evaluations")
for axis, x, title in zip(axes, drawn.values(), titles, strict=True):
    axis.imshow(grid(x.clip(-1, 1), columns=12), cmap="gray")
    axis.set_title(title, fontsize=11, loc="left")
    axis.axis("off")
save(figure, "11_ddpm_sampled_as_edm.png")

# %% [markdown]
# ![a DDPM model sampled as EDM](out/11_ddpm_sampled_as_edm.png)
#
# With 35 evaluations Heun's method ends where it should at least as often as DDIM; with 9 or 17, DDIM, which is Euler's
# method on the same equation with other time steps, does.
#
# Now a network that was really trained: the package's `mnist`, the DDPM way, on a cosine schedule, told which digit to
# draw. Both of the paper's samplers run on it as it is. `levels` lets the stochastic one ask only at noise levels that
# the network knows, as the paper does with iDDPM.

# %%
model = PixelDiffusion.load("mnist")
label = np.arange(5 if QUICK else 20) % 10
trained = from_ddpm(model.denoiser(label), model.schedule)
levels = noise_levels(model.schedule)[1:]
steps = Column.edm(sigma_min=levels[0], sigma_max=80.0).sigmas(5 if QUICK else 18)
start = Rng(10).normal((len(label), 28, 28, 1))
figure, axes = plt.subplots(2, 1, figsize=(11, 2))
for axis, churn, title in zip(axes, (0, 10), ("no churn", r"$S_{churn} = 10$"), strict=True):
    x = last(churned(trained, start, steps, Rng(11), S_churn=churn, levels=levels))
    assert 0.1 < (x > 0).mean() / (images > 0).mean() < 3  # about as much ink as in real digits
    axis.imshow(grid(x.clip(-1, 1), columns=len(label)), cmap="gray")
    axis.set_title(f"a DDPM network in 35 evaluations, {title}", fontsize=10, loc="left")
    axis.axis("off")
save(figure, "11_trained_network.png")

# %% [markdown]
# ![a trained network sampled as EDM](out/11_trained_network.png)
#
# Nothing was trained anew. To see the whole table with networks trained as each column says, run
# `python examples/karras_table.py`. Trained for 1,000 steps each on all of MNIST, they end at these Fréchet distances
# from real digits (300 images; 300 real ones are at 15), as their own column samples, and as EDM's does:
#
# | trained as | 9 evaluations | 35 | 9, sampled as EDM | 35, sampled as EDM |
# |---|---|---|---|---|
# | VP | 190 | 160 | 202 | 148 |
# | VE | 419 | 411 | 301 | 194 |
# | iDDPM + DDIM | 248 | 168 | 198 | 147 |
# | EDM | | | 149 | 138 |
#
# Most of what separates the columns is how they are sampled. What is left is how they were trained: with 9 evaluations
# EDM's network is as near as the others are with 35.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. At which $\sigma$ does EDM's network answer with equal parts of noise and image, $c_\text{skip} = \frac12$, if
#    $\sigma_\text{data} = 0.5$? And how large is $c_\text{out}$ there?
# 2. The paper samples CIFAR-10 in 35 network evaluations. How many steps $N$ of Heun's method are that?
# 3. Work out Euler's step from $t_{N-1}$ to $t_N = 0$ with $\sigma(t) = \sqrt t$ and $s(t) = 1$. If $x = y + n$ and $D$
#    is right, which share of $n$ is left?

# %%
sigma_of_half, c_out_of_half = None, None
N_of_35 = None
share_left = None

if sigma_of_half is not None:
    assert np.isclose(TABLE["EDM"].c_skip(sigma_of_half), 0.5)
    assert np.isclose(TABLE["EDM"].c_out(sigma_of_half), c_out_of_half, rtol=1e-3)
    print("exercise 1 is right")
if N_of_35 is not None:
    calls = []
    last(probability_flow(lambda x, sigma: calls.append(sigma) or 0 * x, np.ones((1, 1)), TABLE["EDM"], N_of_35))
    assert len(calls) == 35
    print("exercise 2 is right")
if share_left is not None:
    *_, before, after = probability_flow(lambda x, sigma: 0 * x, np.ones((1, 1)), TABLE["VE"], 10)
    assert np.isclose(after / before, share_left).all()  # y = 0, so all of x is noise
    print("exercise 3 is right")
