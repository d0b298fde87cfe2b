# %% [markdown]
# # Lesson 13: inpainting and editing
#
# A diffusion model makes images out of noise. With hardly anything new it also completes an image of which a part is
# missing, and changes an image that is there. This lesson does both with the digits' model that the package ships.
#
# You will see
# - **E36** inpainting in three ways: putting the known pixels back in at every step, which is simple and wrong;
#   RePaint, which goes back and forth until the parts agree; and a model that was *shown* what is known;
# - by how much the simple way is wrong, in an example where the right answer is known;
# - **SDEdit**: half of the way to noise, and back;
# - **DDIM backwards**: the noise that a given image comes from, and a trap that plain backgrounds set;
# - the way from one image to another, along an arc between their noises.
#
# Run it from anywhere: `python lessons/13_inpainting_and_editing.py` takes about a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data import masks, mnist
from tinydiff.diffusion import (
    Sampling,
    Schedule,
    ddim,
    ddim_inverse,
    denoiser,
    last,
    q_sample,
    repaint,
    resampled,
    sdedit,
    slerp,
)
from tinydiff.image import grid, to_signed
from tinydiff.models import PixelDiffusion, PixelInpainting
from tinydiff.models.pixel_inpainting import shown

QUICK = "TINYDIFF_QUICK" in os.environ  # few digits and few steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777"


def save(figure, name):
    """Tidy up a figure and write it."""
    figure.tight_layout()
    figure.savefig(OUT / name, dpi=130, bbox_inches="tight")
    plt.close(figure)


def show(name, columns, rows=None, inch=0.024):
    """Draw a table of digits: for each title a block of them, (rows, columns, 28, 28, 1), `inch` to a pixel."""
    blocks = [np.asarray(block, np.float32).reshape(len(block), -1, 28, 28) for _, block in columns]
    sheets = [grid(block.reshape(-1, 28, 28), columns=block.shape[1]) for block in blocks]
    widths, height = [sheet.shape[1] for sheet in sheets], sheets[0].shape[0]
    figure, axes = plt.subplots(
        1, len(sheets), figsize=(inch * sum(widths), inch * height + 0.3), width_ratios=widths, squeeze=False
    )
    for axis, (title, _), sheet in zip(axes[0], columns, sheets, strict=True):
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    if rows:
        axes[0, 0].set_yticks(30 * np.arange(len(rows)) + 14, rows, fontsize=9)
        axes[0, 0].tick_params(length=0)
    save(figure, name)


# %% [markdown]
# ## Putting the known part back in
#
# Let the mask $m$ be 1 where the image is known. A sampler is at $x_t$ and steps to $x_{t-1}$. The model's step fills
# the whole image; where we know better, we put in what the forward process (E4) would have there:
#
# $$x_{t-1} = m \odot \left(\sqrt{\bar\alpha_{t-1}}\,x_0^{\text{known}} + \sqrt{1-\bar\alpha_{t-1}}\,z\right)
# + (1 - m) \odot x_{t-1}^{\text{model}}.$$
#
# At the end the known pixels are right, exactly. Are the others? Take an "image" of two pixels, drawn from a Gaussian
# with variance 1 and correlation 0.9. For this the best possible network has a formula, so that all error is the
# method's. We know the first pixel, 1.5. Then the second is distributed as $\mathcal N(1.35,\ 0.19)$.
#
# RePaint (Lugmayr et al. 2022) sees the trouble: the part that is put in was drawn with no regard to what the model has
# painted beside it. So it adds noise again, $x_t \sim q(x_t \mid x_{t-1})$, and repeats the step: now the model sees
# both parts in one $x_t$, and moves the painted one towards the known. $r$ is how often each step is walked.

# %%
schedule, correlation = Schedule.cosine(50), 0.9
covariance = np.array([[1, correlation], [correlation, 1]])


def best_network(x_t, t):
    """E[x_0 | x_t] for N(0, covariance): the mean of one Gaussian given another."""
    a = schedule.alpha_bar[t[0]]
    gain = np.sqrt(a) * covariance @ np.linalg.inv(a * covariance + (1 - a) * np.eye(2))
    return (x_t.reshape(-1, 2) @ gain).reshape(x_t.shape)


n = 500 if QUICK else 10000
two_pixels = np.full((n, 1, 2, 1), 1.5)  # (B, H, W, C); the second number is not looked at
first_known = np.array([[True, False]])


def second_pixel(jump, r):
    """n draws of it."""
    denoise = denoiser(best_network, schedule, "x0", clip=False)
    x_T = Rng(0).normal((n, 1, 2, 1), np.float64)
    x_0 = last(repaint(denoise, x_T, schedule, Rng(1), two_pixels, first_known, None, jump, r))
    assert (x_0[:, 0, 0] == 1.5).all()  # what is known comes back exactly
    return x_0[:, 0, 1, 0]


resamplings = (1, 2, 5, 20)
drawn = {r: second_pixel(1, r) for r in resamplings}
long_jumps = second_pixel(10, 10)

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), width_ratios=(1.4, 1))
x = np.linspace(-1, 3.2, 300)
left.plot(x, np.exp(-((x - 1.35) ** 2) / 0.38) / np.sqrt(0.38 * np.pi), color="k", lw=2, label="the right answer")
for r, color in ((1, RED), (5, BLUE)):
    name = "replacement, r = 1" if r == 1 else f"RePaint, r = {r}"
    left.hist(drawn[r], bins=60, range=(-1, 3.2), density=True, color=color, alpha=0.4, label=name)
left.set(xlabel="the second pixel", yticks=[], title="what is painted beside a pixel of 1.5")
left.legend(frameon=False, loc="upper left", fontsize=9)
right.plot(resamplings, [drawn[r].mean() for r in resamplings], "o-", color=BLUE, label="mean")
right.plot(resamplings, [drawn[r].var() for r in resamplings], "o-", color=GREEN, label="variance")
for value, color in ((1.35, BLUE), (0.19, GREEN)):
    right.axhline(value, color=color, lw=1, ls="--")
right.set(xscale="log", xlabel="r", title="dashed: the right answers", ylim=(0, 1.5))
right.set_xticks(resamplings, resamplings)
right.minorticks_off()
right.legend(frameon=False, loc="center right")
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
save(figure, "13_two_pixels.png")
for name, values in [*((f"r = {r}, jump 1", v) for r, v in drawn.items()), ("r = 10, jump 10", long_jumps)]:
    print(f"{name:16} mean {values.mean():.3f}, variance {values.var():.3f}; right: 1.350 and 0.190")
if not QUICK:
    assert abs(drawn[1].mean() - 1.35) > 0.4 > 0.04 > abs(drawn[20].mean() - 1.35)
    assert abs(drawn[1].var() - 0.19) > 0.08 > 0.02 > abs(long_jumps.var() - 0.19)

# %% [markdown]
# ![two pixels](out/13_two_pixels.png)
#
# Replacement believes the known pixel only half: its mean is 0.92 in place of 1.35. Going back and forth mends the
# mean. It does not make the method exact, and with single steps it makes the draws too much alike: a variance of 0.14
# at $r = 20$. Jumps over ten steps (`jump=10`), the paper's choice, leave more freedom: better variance, worse mean.
#
# ## Three ways to complete a digit (E36)
#
# Now digits, of which the lower half is hidden. The model is the one that the package ships. It has seen whole digits
# only (all of MNIST's 60,000 training images, these among them), and was never trained for this. The third way, GLIDE's
# (Nichol et al. 2022), does train: a model takes the masked image and the mask as further channels of its input,
#
# $$\varepsilon_\theta\big([\,x_t,\ m \odot x_0,\ m\,],\ t\big),$$
#
# and is fine-tuned on images of which random parts are hidden. The kernels of the new channels start at zero, so that
# the first step of fine-tuning starts from everything that the model knew: `PixelInpainting.started_from(model)`. The
# package brings along the result of 3,000 such steps, `examples/train_inpainting.py mnist --data full --steps 3000`.

# %%
model, tuned = PixelDiffusion.load("mnist"), PixelInpainting.load("inpainting")
fresh = PixelInpainting.started_from(model)
others = mnist.load("embedded", "test")
few = to_signed(others.images[::25][..., None])
for name, network in (("before", fresh), ("after", tuned)):
    loss = np.mean([network.loss(few, Rng(0).at(i), others.labels[::25]).item() for i in range(1 if QUICK else 10)])
    print(f"mean loss {name} fine-tuning, on images with hidden parts: {loss:.4f}")

# %%
labels = (3, 5) if QUICK else (2, 3, 4, 5, 8, 9)
each = 1 if QUICK else 3
N = 6 if QUICK else 50
x_0 = to_signed(np.stack([others.images[others.labels == label][3] for label in labels])[..., None])
known = np.repeat(x_0, each, axis=0)
mask = masks.without("bottom", (28, 28))


def painted(jump, r):
    """By the shipped model, with nothing told but the known pixels."""
    x_T = model.noise(len(known), Rng(2))
    return last(repaint(model.denoiser(), x_T, model.schedule, Rng(3), known, mask, N, jump, r))


ways = {
    "replacement": (painted(1, 1), N),
    "RePaint, j = 5, r = 6": (painted(5, 6), (np.diff(resampled(N, 5, 6)) < 0).sum()),
    "shown what is known": (last(tuned.inpaint(known, mask, Rng(2), Sampling(steps=N))), N),
}
blocks = [("whole", x_0), ("known", shown(x_0, mask)[..., :1])]
show("13_three_ways.png", blocks + [(name, x.reshape(len(labels), each, 28, 28, 1)) for name, (x, _) in ways.items()])
for name, (x, calls) in ways.items():
    error = np.abs(x - known)[:, ~mask].mean()
    assert (x[:, mask] == known[:, mask]).all()
    print(f"{name:22} {calls:4} calls of the network, mean distance to the hidden pixels {error:.3f}")

# %% [markdown]
# ![three ways](out/13_three_ways.png)
#
# The known halves are the digits' own in each picture. What is painted below them need not be what was hidden, since
# much fits under an arch: what counts is whether the whole is a digit, and whether the strokes meet at the seam.
# Replacement often paints a half that does not belong to the known one. RePaint's digits are better, and it pays for
# them with more than five times the network calls. The third way needs no more calls than sampling does, and its
# strokes meet.
#
# ## SDEdit: part of the way, and back
#
# Noise hides details first and outlines last. So add noise to an image up to $t = \text{strength} \cdot T$ (E4), and
# sample from there (Meng et al. 2022). What the noise has hidden is drawn anew; what shows through stays. Strength 0
# gives the image back and strength 1 forgets it: that is plain sampling. Even a drawing that is no digit turns into
# something like one: the second row starts from three straight bars.

# %%
bars = np.full((28, 28, 1), -1, np.float32)
bars[6:9, 7:20] = bars[6:22, 17:20] = bars[13:16, 11:22] = 1
originals = np.stack([x_0[-1], bars])
strengths = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9)
blocks = [("image", originals)]
for strength in strengths:
    t = round(strength * model.schedule.T)
    how = Sampling(steps=max(2, round(strength * N)))
    two_each = np.repeat(originals, 2, axis=0)
    x = last(sdedit(model.denoiser(), two_each, model.schedule, Rng(5), strength, how.states))
    blocks.append((f"strength {strength}", x.reshape(2, 2, 28, 28, 1)))
show("13_sdedit.png", blocks)
nothing = last(sdedit(model.denoiser(), originals, model.schedule, Rng(5), 0.0, how.states))
assert (nothing == originals).all()

# %% [markdown]
# ![SDEdit](out/13_sdedit.png)
#
# ## DDIM backwards: which noise was this digit?
#
# DDIM draws no noise on the way: it follows a differential equation from $x_T$ to $x_0$, and an equation can be
# followed the other way (Song et al. 2021). Each step denoises, and then puts the noise it found back in, a little
# more of it:
#
# $$x_t = \sqrt{\bar\alpha_t}\,\hat x_0(x_s, s) + \sqrt{1-\bar\alpha_t}\,\hat\varepsilon(x_s, s), \qquad t > s.$$
#
# Back from there by DDIM, the image should return, the closer the more steps.

# %%
pair = x_0[[0, -1]]


def there_and_back(images, steps, start=0):
    """The noise that DDIM finds for images noised up to the time start, and what DDIM makes of it."""
    x_T = last(ddim_inverse(model.denoiser(), images, model.schedule, Rng(0), steps, start=start))
    return x_T, last(ddim(model.denoiser(), x_T, model.schedule, Rng(0), steps))


for steps in (2, 4) if QUICK else (10, 25, 50, 100):
    noise, back = there_and_back(pair, steps)
    error = np.abs(back - pair).mean()
    print(f"{steps:3} steps: pixels off by {error:.4f}, noise of standard deviation {noise.std():.2f}")

# %% [markdown]
# The image returns. But look at the noise: for a draw from $\mathcal N(0, I)$ its standard deviation should be 1.
#
# The trap is the background. It is the same black in all digits, so that at small $t$ every deviation from black is
# noise, which the equation takes away, and which grows backwards. A background of *exactly* black has no deviation to
# grow, and ends as nearly nothing. The round trip does not care, but what else we do with this noise will. The cure is
# to begin with something that the model knows: draw $x_{20}$ by E4, with noise of standard deviation 0.04, and follow
# the equation from there.

# %%
rows, noises = [], {}
for start in (0, 20):
    noisy = q_sample(pair, start, Rng(6).normal_like(pair), model.schedule)
    noises[start], back = there_and_back(noisy, N, start)
    rows.append(np.stack([noisy, noises[start] / 3, back], axis=1))
    error, std = np.abs(back - pair).mean(), noises[start].std()
    print(f"from x_{start}: pixels off by {error:.4f}, noise of standard deviation {std:.2f}")
show(
    "13_backwards.png",
    [("image, its $x_T$ (÷ 3), and back: from $x_0$", rows[0]), ("the same from $x_{20}$", rows[1])],
    inch=0.04,
)
if not QUICK:
    assert abs(noises[20].std() - 1) < 0.1 < abs(noises[0].std() - 1)

# %% [markdown]
# ![backwards](out/13_backwards.png)
#
# ## From one digit to another
#
# Between two images, pixels mixed half and half are a double exposure. Mix the *noises* instead, and let DDIM draw what
# is between. Which mixture? The mean of two independent noises has only half the variance: no draw from
# $\mathcal N(0, I)$, which is what the model was trained to start from. Along the arc (`slerp`) every point is as long
# as the ends:
#
# $$\frac{\sin((1-w)\,\theta)}{\sin\theta}\,a + \frac{\sin(w\,\theta)}{\sin\theta}\,b, \qquad
# \cos\theta = \frac{a \cdot b}{\lVert a\rVert\,\lVert b\rVert}.$$

# %%
a, b = noises[20]
weights = np.linspace(0, 1, 3 if QUICK else 8)
arc = slerp(np.stack([a] * len(weights)), np.stack([b] * len(weights)), weights)
w = weights[:, None, None, None].astype(np.float32)
line = (1 - w) * a + w * b
print(
    f"half-way, standard deviation of the noise: line {line[len(w) // 2].std():.2f}, arc {arc[len(w) // 2].std():.2f}"
)
between = [(1 - w) * pair[0] + w * pair[1]]
between += [last(ddim(model.denoiser(), x_T, model.schedule, Rng(0), N)) for x_T in (line, arc)]
show("13_between.png", [("", between)], ["pixels mixed", "noises, line", "noises, arc"], inch=0.034)
lengths = np.sqrt((arc**2).sum(axis=(1, 2, 3)))
assert (arc[0] == a).all() and (arc[-1] == b).all()
assert lengths.min() > 0.99 * min(lengths[0], lengths[-1])

# %% [markdown]
# ![between](out/13_between.png)
#
# The last two rows hardly differ here: digits are black and white, and this model makes them so from noise that is too
# weak, too. A model of photographs takes weak noise for a picture of little contrast, and paints the middle grey and
# smooth.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. The paper runs RePaint in 250 steps, with jumps over 10 of them and $r = 10$. How often does it call the network?
#    (`resampled` gives the way; only steps down call it.)
# 2. Two independent draws from $\mathcal N(0, I)$, each a number of variance 1 in every pixel: what is the standard
#    deviation of their mean?

# %%
calls_of_the_paper = None
std_of_the_mean = None

if calls_of_the_paper is not None:
    assert calls_of_the_paper == (np.diff(resampled(250, 10, 10)) < 0).sum()
    print("exercise 1 is right")
if std_of_the_mean is not None:
    assert np.isclose(std_of_the_mean, 0.5**0.5)
    print("exercise 2 is right")
