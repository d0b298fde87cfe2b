# %% [markdown]
# # Lesson 12: guidance, or how to ask for something
#
# A diffusion model draws from everything it has seen. To get a *seven* we must tell it, and there are two ways: a
# classifier that pushes the sampler while it draws, or a network that was told labels in training and exaggerates what
# they change. This lesson shows on points in the plane, where everything is known exactly, that the two are the same
# thing, and what they do to the distribution. Then it does both with digits.
#
# You will see
# - **E35** classifier guidance (Dhariwal & Nichol 2021) and classifier-free guidance (Ho & Salimans 2022), and that
#   Bayes' rule makes one of the other;
# - what the scale $s$ buys and what it costs: sharper samples, fewer kinds of them, measured;
# - three ways to get the sign or the scale wrong;
# - a gradient with respect to the *image*, by the autograd of lesson 1.
#
# Run it from anywhere: `python lessons/12_guidance.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, Tensor, nn, no_grad, ops, optim
from tinydiff.data import mnist
from tinydiff.data.toys import GaussianMixture
from tinydiff.diffusion import (
    Schedule,
    class_gradient,
    classifier_free,
    classifier_guided,
    ddim,
    ddpm,
    denoiser,
    draw_t,
    last,
    q_sample,
)
from tinydiff.image import grid, to_signed
from tinydiff.models import Classifier, PixelDiffusion

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"
COLOURS = (BLUE, RED, GREEN)

n, T = (300, 60) if QUICK else (2000, 300)
schedule = Schedule.cosine(T)

# %% [markdown]
# ## Three classes that overlap
#
# A mixture of three Gaussians; the class of a point is the Gaussian it came from. Three things are known in one line
# each: the noise in a point of any class, $E[\varepsilon \mid x_t]$; the noise in a point of class $y$,
# $E[\varepsilon \mid x_t, y]$; and the class of a noisy point, $p(y \mid x_t)$, a linear classifier with a softmax.

# %%
corners = 1.0 * np.stack([np.cos([0.5, 2.6, 4.7]), np.sin([0.5, 2.6, 4.7])], axis=1)
data = GaussianMixture(corners, std=0.6)
y = 0  # what we will ask for


def noise_of(mixture):
    """E[eps | x_t] of a mixture, as a network would give it."""
    return lambda x_t, t: mixture.best_eps(x_t, schedule.alpha_bar[t[0]])


def classifier(x_t, t):
    """Logits of p(y | x_t), for the class of a noisy point. x_t: a Tensor."""
    return data.noised(schedule.alpha_bar[t[0]]).logits(x_t)


unconditional, conditional = noise_of(data), noise_of(data.part(y))

# %% [markdown]
# ## One rule, two ways (E35)
#
# Bayes' rule for scores has no constant to worry about, since $\nabla \log p(y) = 0$:
#
# $$\nabla \log p(x_t \mid y) = \nabla \log p(x_t) + \nabla_{x_t} \log p(y \mid x_t).$$
#
# Guidance multiplies the last term by $s$. With $\varepsilon = -\sqrt{1-\bar\alpha_t}\,\nabla\log p$ (lesson 7) that is
#
# | | |
# |---|---|
# | classifier guidance | $\hat\varepsilon = \varepsilon_u - s\,\sqrt{1-\bar\alpha_t}\;\nabla_{x_t}\log p(y \mid x_t)$ |
# | classifier-free | $\hat\varepsilon = \varepsilon_u + s\,(\varepsilon_c - \varepsilon_u)$ |
#
# $s = 0$ ignores the class, $s = 1$ is the exact conditional distribution, $s > 1$ exaggerates. The first needs the
# gradient of the classifier with respect to its *input*; `class_gradient` gets it by one backward pass.

# %%
gradient = class_gradient(classifier, np.full(n, y))
everything = denoiser(unconditional, schedule, clip=False)


def by_classifier(s):
    return classifier_guided(everything, gradient, schedule, s, clip=False)


def classifier_free_by(s):
    return denoiser(classifier_free(conditional, unconditional, s), schedule, clip=False)


x_t = Rng(0).normal((n, 2))
for s in (0.0, 1.0, 4.0):
    a, b = by_classifier(s)(x_t, T // 2).eps, classifier_free_by(s)(x_t, T // 2).eps
    print(f"s = {s:.0f}: the two kinds of guidance differ by at most {np.abs(a - b).max():.1e}")
    assert np.allclose(a, b, atol=1e-4)

# %% [markdown]
# They are the same to the last digits, because the classifier and the two networks are exact. Trained ones are not, and
# then they differ in what they get wrong. Now draw with several $s$, from the same noise.

# %%
scales = (0.0, 1.0, 2.0, 4.0, 8.0)
x_T = Rng(1).normal((n, 2))  # noqa: N816
drawn = {s: last(ddim(by_classifier(s), x_T, schedule, Rng(2), steps=T)) for s in scales}
away = last(ddim(by_classifier(-1.0), x_T, schedule, Rng(2), steps=T))


def clean(axis, limit=4):
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")


def save(figure, file):
    figure.tight_layout(pad=0.6)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


def rings(axis):
    """Each class as a circle of two standard deviations."""
    for centre, colour in zip(data.means, COLOURS, strict=True):
        axis.add_patch(plt.Circle(centre, 2 * data.std, fill=False, color=colour, lw=1.2))


figure, axes = plt.subplots(1, 6, figsize=(16, 3))
for axis, (s, x) in zip(axes, [*drawn.items(), (-1.0, away)], strict=True):
    axis.plot(*x.T, ".", ms=1.6, color=GREY if s >= 0 else "black")
    rings(axis)
    axis.set_title(f"s = {s:.0f}" if s >= 0 else "the sign wrong, s = 1", fontsize=11)
    clean(axis)
save(figure, "12_scales.png")

# %% [markdown]
# ![scales](out/12_scales.png)
#
# We asked for the blue class. At $s = 1$ its whole circle is filled. At $s = 2$ and more the samples move to its far
# side, where no other class could be meant, and huddle together. The last panel is the commonest mistake.
#
# **Three ways to go wrong.**
# 1. *The sign.* $\varepsilon$ points away from the data, the gradient of $\log p$ towards them: it must be *subtracted*
#    from $\varepsilon$ (but *added* to a mean, or to a score).
# 2. *The factor* $\sqrt{1-\bar\alpha_t}$. Without it the push at small $t$, where little is left to decide, is far too
#    strong.
# 3. *Whose scale.* Ho & Salimans write $(1+w)\,\varepsilon_c - w\,\varepsilon_u$: their $w$ is our $s - 1$, and $w = 0$
#    is no guidance, where for us that is $s = 1$.
#
# ## What the scale buys and costs
#
# How sure is the classifier of the samples, and how varied are they? Exactly computed beside it: the density
# $p(x)\,p(y \mid x)^s$ (scaled to sum 1), which guidance is often said to sample. It does not, quite: for $s > 1$ the
# score of *its* noised version is not the guided score. Both get narrower; guidance also moves farther out.

# %%
line = np.linspace(-6, 6, 241)
plane = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def log_p_y(x):
    """log p(y | x) for clean points."""
    return ops.log_softmax(Tensor(data.logits(x))).numpy()[:, y]


def moments_of_power(s):
    """Mean along the class's direction and spread of p(x) p(y|x)^s, summed over a lattice."""
    log_w = data.log_density(plane) + s * log_p_y(plane)
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    mean = w @ plane
    return mean @ direction, np.sqrt(w @ ((plane - mean) ** 2).sum(axis=1) / 2)


direction = data.means[y] / np.linalg.norm(data.means[y])
curves = np.array([[np.exp(log_p_y(x)).mean(), (x @ direction).mean(), x.std(axis=0).mean()] for x in drawn.values()])
power = np.array([moments_of_power(s) for s in scales])
print("   s   p(y | x)   how far out   spread   of p(x) p(y|x)^s: how far out, spread")
for s, (sure, out, spread), (out_p, spread_p) in zip(scales, curves, power, strict=True):
    print(f"{s:4.0f} {sure:10.3f} {out:13.2f} {spread:8.2f} {out_p:28.2f} {spread_p:12.2f}")
if not QUICK:
    assert np.abs(curves[1] - [curves[1, 0], 1.0, data.std]).max() < 0.06  # s = 1: exactly the class
    assert (np.diff(curves[1:, 0]) > 0).all() and (np.diff(curves[1:, 2]) < 0).all()

figure, axes = plt.subplots(1, 3, figsize=(12, 3.3))
for axis, column, title in zip(axes, (0, 1, 2), ("how sure: p(y | x)", "how far out", "spread"), strict=True):
    axis.plot(scales, curves[:, column], "o-", color=BLUE, label="guided samples")
    if column:
        axis.plot(scales, power[:, column - 1], "--", color=GREY, label=r"$p(x)\,p(y|x)^s$")
    axis.set(xlabel="s", title=title)
    axis.axvline(1, color=GREY, lw=0.8, ls=":")
    axis.spines[["top", "right"]].set_visible(False)
axes[1].legend(frameon=False)
save(figure, "12_price.png")

# %% [markdown]
# ![the price](out/12_price.png)
#
# ## The form for Algorithm 2
#
# For ancestral sampling Dhariwal & Nichol shift the mean (their Algorithm 1): $\mu_\theta + s\,\sigma_t^2\,\nabla\log
# p(y \mid x_t)$, an approximation that gets exact as $\beta_t \to 0$. `classifier_guided` takes the name of the
# variance for it.

# %%
for variance in ("posterior", "beta"):
    shifted = classifier_guided(everything, gradient, schedule, 1.0, variance, clip=False)
    x = last(ddpm(shifted, x_T, schedule, Rng(3), variance))
    print(f"mean shift, variance {variance:9}: how far out {(x @ direction).mean():.2f} (exact 1.00)", end="")
    print(f", spread {x.std(axis=0).mean():.2f} (exact {data.std})")

# %% [markdown]
# ## Digits
#
# The package brings a digit model along that was told labels in training, and 10 % of the time was not: so it is both
# $\varepsilon_c$ and $\varepsilon_u$. For classifier guidance we need a classifier that reads *noisy* digits: one for
# clean digits would be asked about images it has never seen. Two small convolutions that are told $t$; their training
# is Algorithm 1 with a cross-entropy in place of the squared error.


# %%
class NoisyClassifier(nn.Module):
    """Logits (B, 10) of noisy digits (B, 28, 28, 1) at times t (B,)."""

    def __init__(self, rng):
        self.time, self.emb = nn.TimeEmbedding(32, 32, rng.at(0)), nn.Linear(32, 48, rng.at(1))
        self.conv1, self.norm1 = nn.Conv2d(1, 24, rng.at(2), stride=2), nn.GroupNorm(24, 4, silu=True)
        self.conv2, self.norm2 = nn.Conv2d(24, 48, rng.at(3), stride=2), nn.GroupNorm(48, 4, silu=True)
        self.out = nn.Linear(7 * 7 * 48, 10, rng.at(4))

    def __call__(self, x, t):
        h = self.norm1(self.conv1(x))
        h = self.norm2(self.conv2(h, self.emb(ops.silu(self.time(t)))))
        return self.out(h.reshape(len(h), -1))


model = PixelDiffusion.load("mnist")
digits, held_out = mnist.load("embedded", "train"), mnist.load("embedded", "test")
images, test = (to_signed(d.images[..., None]) for d in (digits, held_out))


def trained(rng, steps):
    """A classifier of digits at all t."""
    network = NoisyClassifier(rng.at(0))
    adam = optim.Adam(network.parameters())
    for step in range(steps):
        some = rng.at(1, step).integers(0, len(images), (128,))
        t = draw_t(rng.at(2, step), 128, model.schedule.T)
        x_t = q_sample(images[some], t, rng.at(3, step).normal((128, 28, 28, 1)), model.schedule)
        ops.cross_entropy(network(Tensor(x_t), t), digits.labels[some]).backward()
        adam.step(lr=optim.warmup_cosine(step + 1, steps, peak=3e-3, warmup=20))
    for p in network.parameters().values():
        p.requires_grad = False  # from now on only the gradient of its input is wanted
    return network


def reads(network, x, t):
    """The class that a classifier sees in each image, taken as x_t."""
    with no_grad():
        return network(Tensor(x), np.full(len(x), t)).numpy().argmax(axis=1)


reader = trained(Rng(4), 30 if QUICK else 700)
noisiness = np.linspace(1, model.schedule.T, 4 if QUICK else 12).astype(int)
noise = Rng(6).normal_like(test)
noisy = [q_sample(test, int(t), noise, model.schedule) for t in noisiness]
right = [(reads(reader, x_t, t) == held_out.labels).mean() for x_t, t in zip(noisy, noisiness, strict=True)]

figure, axis = plt.subplots(figsize=(6.5, 3.6))
axis.plot(noisiness, right, "o-", color=BLUE)
axis.axhline(0.1, color=GREY, ls=":")
axis.set(xlabel="t", title="Noisy digits read correctly (held out)", ylim=(0, 1))
axis.spines[["top", "right"]].set_visible(False)
save(figure, "12_reader.png")

# %% [markdown]
# ![the reader](out/12_reader.png)
#
# It cannot read what is not there: at large $t$ it guesses, its gradient is next to nothing, and there guidance leaves
# the sampler alone. Now both ways, from the same noise, for every digit and several $s$. The judge of the samples is a
# third network, the package's `classifier`, which reads 99.5 % of MNIST's test digits.

# %%
judge = Classifier.load("classifier")
per_class, steps = (2, 4) if QUICK else (8, 20)
shown = min(6, per_class)  # in the pictures
wanted = np.repeat(np.arange(10), per_class)
x_T = Rng(7).normal((len(wanted), 28, 28, 1))  # noqa: N816


def digits_free(s):
    """Classifier-free: the network told the label, and not told it."""
    return model.denoiser(wanted, s)


def digits_by_reader(s):
    """By the classifier: the network is told nothing."""
    return classifier_guided(model.denoiser(), class_gradient(reader, wanted), model.schedule, s)


def drawn_with(denoise):
    return last(ddim(denoise, x_T, model.schedule, Rng(8), steps=steps))


def variety(x):
    """How far two samples of one class lie apart, on average, over what real digits of one class do."""

    def apart(images, labels):
        groups = [images[labels == k].reshape(-1, 784) for k in range(10)]
        return np.mean(
            [((g[:, None] - g[None]) ** 2).sum(axis=-1).sum() / max(1, len(g) * (len(g) - 1)) for g in groups]
        )

    return np.sqrt(apart(x, wanted) / apart(test, held_out.labels))


kinds = {"classifier-free": (digits_free, (0, 1, 2, 4, 8)), "by the reader": (digits_by_reader, (0, 1, 3, 10, 30))}
for kind, (guide, strengths) in kinds.items():
    strengths = strengths[1::3] if QUICK else strengths
    sheets, measured = [], []
    for s in strengths:
        x = drawn_with(guide(float(s))).clip(-1, 1)
        sheets.append(np.stack([x[i : i + shown] for i in range(0, len(x), per_class)]))
        measured.append(((judge.probabilities(x).argmax(axis=1) == wanted).mean(), variety(x)))
        print(f"{kind}, s = {s:2}: {measured[-1][0]:6.1%} are what was asked for, variety {measured[-1][1]:.2f}")
    figure, axes = plt.subplots(1, len(strengths), figsize=(2.6 * len(strengths), 5.2))
    for axis, s, sheet, (asked, varied) in zip(axes, strengths, sheets, measured, strict=True):
        axis.imshow(grid(sheet.reshape(-1, 28, 28), columns=shown), cmap="gray")
        axis.set_title(f"s = {s}: {asked:.0%} as asked\nvariety {varied:.2f}", fontsize=10)
        axis.axis("off")
    save(figure, f"12_digits_{'free' if kind == 'classifier-free' else 'reader'}.png")

# %% [markdown]
# Classifier-free:
#
# ![classifier-free](out/12_digits_free.png)
#
# By the reader of noisy digits, with a network that is told nothing:
#
# ![by the classifier](out/12_digits_reader.png)
#
# Each row is one digit, six samples. Both draw more of what was asked for as $s$ grows. Classifier-free guidance gets
# there with a smaller $s$, since the network knows the classes better than two small convolutions do, and pays with
# some variety: the digits of a row become more alike.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Write Ho & Salimans' form, with their $w$, and show that it is ours: a function of $\varepsilon_c$, $\varepsilon_u$
#    and $w$.
# 2. Which $s$ draws as if the class had never been mentioned?

# %%
ho_salimans = None  # a function (eps_c, eps_u, w) -> array
s_without_class = None  # a number

if ho_salimans is not None:
    eps_c, eps_u = conditional(x_t, np.full(n, 5)), unconditional(x_t, np.full(n, 5))
    for w in (0.0, 0.5, 3.0):
        ours = classifier_free(conditional, unconditional, 1 + w)(x_t, np.full(n, 5))
        assert np.allclose(ho_salimans(eps_c, eps_u, w), ours, atol=1e-4)
    print("exercise 1 is right")
if s_without_class is not None:
    assert np.allclose(by_classifier(s_without_class)(x_t, 5).eps, everything(x_t, 5).eps)
    print("exercise 2 is right")
