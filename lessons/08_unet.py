# %% [markdown]
# # Lesson 8: the U-Net, or what each part is for
#
# The network of the deck (**E20**) takes a noisy image and a time, $\varepsilon_\theta(x_t, t)$, and gives an image of
# the same size: its guess at the noise. Why that shape, a U? This lesson takes one apart.
#
# You will see
# - every array on the way through, with its shape, and the whole forward pass on one screen;
# - where the parameters are, and where the time goes: not in the same place;
# - what each part is: ResNet block, GroupNorm, time embedding, attention, down, up, skip;
# - what one output pixel can see, measured by differentiating it;
# - what happens without the skips, and what a trained network looks at.
#
# Run it from anywhere: `python lessons/08_unet.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, Tensor, nn, no_grad, ops, optim
from tinydiff.data import mnist
from tinydiff.diffusion import Schedule, draw_t, q_sample
from tinydiff.image import to_signed
from tinydiff.nn.unet import Stage

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer steps, for the test suite
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREY = "#1f5fa8", "#c8401f", "#777777"


def save(figure, file):
    """Save a figure."""
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## Down, across, and up again
#
# Fine detail needs many pixels; knowing that this is a seven needs all pixels at once. The U-Net does both. On the left
# of the U it halves the image again and again while the channels grow; at the bottom every place knows of every other;
# on the right it doubles the image back. And because halving loses the detail, each feature map of the left side is
# handed across to the right: a **skip**.
#
# Here is the whole forward pass, with nothing hidden. (`UNet.__call__` is the same and checks its arguments.)

# %%
config = nn.UNetConfig(base=32, multipliers=(1, 2, 4), blocks=2, attention=(2,))
unet = nn.UNet(config, Rng(0))


def forward(unet, x, t, visit=lambda name, layer, inputs, h: None, skip=True):
    """UNet.__call__; visit(name, layer, shape of its input, its output) sees each part; skip=False hands over zeros."""
    emb = ops.silu(unet.time(t))
    h = unet.conv_in(x)
    visit("conv in", unet.conv_in, x.shape, h)
    handed_over = [h]
    for layer in unet.down:
        before, h = h, layer(h, emb, None, None, None) if isinstance(layer, Stage) else layer(h)
        visit("down", layer, before.shape, h)
        handed_over.append(h)
    for layer in unet.middle:
        before, h = h, layer(h, emb, None, None, None)
        visit("middle", layer, before.shape, h)
    for layer in unet.up:
        before = ops.concat([h, handed_over.pop() * float(skip)]) if isinstance(layer, Stage) else h
        h = layer(before, emb, None, None, None) if isinstance(layer, Stage) else layer(before)
        visit("up", layer, before.shape, h)
    out = unet.conv_out(unet.norm_out(h))
    visit("conv out", unet.conv_out, h.shape, out)
    return out


def multiplications(layer, inputs, outputs):
    """Products that a part takes for one image; GroupNorm, SiLU and the time embedding are small beside them."""
    (_, H, W, C), (_, H_out, W_out, C_out) = inputs, outputs
    if not isinstance(layer, Stage):
        return 9 * C * C_out * H_out * W_out
    block = H * W * C_out * (9 * C + 9 * C_out + (C if layer.block.skip else 0))
    attention = H * W * (4 * C_out**2 + 2 * H * W * C_out) if layer.attention else 0
    return block + attention


table = []


def note(name, layer, inputs, h):
    """Write down one part of the network."""
    if isinstance(layer, Stage):
        kind = "ResBlock" + " + attention" * (layer.attention is not None)
    else:
        kind = {"Downsample": "halve", "Upsample": "double"}.get(type(layer).__name__, "3 × 3 convolution")
    table.append((name, kind, inputs, h.shape, layer.count_parameters(), multiplications(layer, inputs, h.shape)))


x = Rng(1).normal((1, 28, 28, 1))
t = np.array([500])
with no_grad():
    assert np.array_equal(forward(unet, Tensor(x), t, note).data, unet(Tensor(x), t).data)

print(f"{'':9}{'part':22}{'from (H, W, C)':>18}{'to (H, W, C)':>18}{'parameters':>12}{'products':>14}")
for name, kind, inputs, outputs, parameters, products in table:
    print(f"{name:9}{kind:22}{inputs[1:]!s:>18}{outputs[1:]!s:>18}{parameters:12,}{products:14,}")
counted = sum(row[4] for row in table) + unet.time.count_parameters() + unet.norm_out.count_parameters()
assert counted == unet.count_parameters()
print(f"{unet.count_parameters():,} parameters, {sum(row[5] for row in table) / 1e6:.0f} million products an image")

# %% [markdown]
# Read the last two columns against each other. A 3 × 3 convolution from $C$ to $C'$ channels has $9CC'$ weights, and
# uses each of them once *for each pixel*. Halving the image and doubling the channels makes the parameters four times
# as many and leaves the work as it was. So the parameters sit at the bottom, and the work is everywhere.

# %%
sizes = [28, 14, 7]
shares = np.array([[sum(row[k] for row in table if row[3][1] == size) for size in sizes] for k in (4, 5)], float)
shares /= shares.sum(axis=1, keepdims=True)
figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
left = np.zeros(2)
for size, share, color in zip(sizes, shares.T, ("#b9d3ee", "#5b94cf", BLUE), strict=True):
    axis.barh(["parameters", "products"], share, left=left, color=color, label=f"{size} × {size}")
    for row in range(2):
        if share[row] > 0.04:
            text_color = "white" if color == BLUE else "black"
            axis.text(left[row] + share[row] / 2, row, f"{share[row]:.0%}", color=text_color, ha="center", va="center")
    left += share
axis.set(xlim=(0, 1), xticks=[], title="Where the parameters are, and where the work is")
axis.invert_yaxis()
axis.legend(ncol=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0))
axis.spines[:].set_visible(False)
save(figure, "08_shares.png")

# %% [markdown]
# ![shares of parameters and work](out/08_shares.png)
#
# ## The parts
#
# **ResNet block**: $x + \mathrm{conv}(\mathrm{SiLU}(\mathrm{norm}(\mathrm{conv}(\mathrm{SiLU}(\mathrm{norm}(x))) +
# W e_t)))$. The block adds a correction to what it is given. Its second convolution starts at zero, so an untrained
# block does nothing, and the gradient reaches every block undiminished, however many there are.
#
# **GroupNorm** gives each group of channels of *each image* mean 0 and variance 1. Not of the batch: in one batch some
# images are nearly clean and some are nearly all noise, and their statistics have nothing to say about one another.

# %%
block = unet.down[0].block
features = Tensor(3 + 5 * Rng(2).normal((2, 28, 28, 32)))
normed = nn.GroupNorm(32, 8)(features).data.reshape(2, 28 * 28, 8, 4)  # 8 groups of 4 channels
assert np.abs(normed.mean(axis=(1, 3))).max() < 1e-4 and np.abs(normed.std(axis=(1, 3)) - 1).max() < 1e-3
emb = unet.time(np.array([10, 900]))
assert np.allclose(block(features, emb).data, features.data)  # an untrained block is its skip

# %% [markdown]
# **Time embedding** $e_t$. One number $t$ between 1 and 1000 is a poor input: the first layer would have to read $t =
# 499$ and $t = 500$ apart and yet alike. As sines and cosines of $t$ at many frequencies,
#
# $$\big[\sin(\omega_i t),\ \cos(\omega_i t)\big], \qquad \omega_i = 10000^{-i/(C/2)},$$
#
# near times have near vectors (right), and the fast waves still tell neighbours apart. Two small layers follow, and
# each block adds its own linear map of the result to all pixels.

# %%
waves = nn.sinusoidal(np.arange(1, 1001), 64)
figure, (left_axis, right_axis) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", width_ratios=(1.5, 1))
left_axis.imshow(waves.T, aspect="auto", cmap="RdBu_r", extent=(1, 1000, 64, 0), interpolation="nearest")
left_axis.set(xlabel="t", ylabel="channel: sines, then cosines", title="the embedding of every t")
right_axis.plot(np.arange(1, 1001), waves @ waves[499] / 32, color=BLUE)  # each vector has length √32
right_axis.set(xlabel="t", ylim=(0, 1.05), title="its cosine with the embedding of 500")
right_axis.spines[["top", "right"]].set_visible(False)
save(figure, "08_time.png")

# %% [markdown]
# ![time embedding](out/08_time.png)
#
# ## What one pixel sees
#
# Differentiate one output pixel with respect to all input pixels: where the gradient is small, the pixel hardly knows.
# We draw random weights where training starts from zeros, and average the size of the gradient over several networks.


# %%
def sight(multipliers, draws):
    """The mean of |d output[centre] / d input| over networks with random weights, over its maximum: (H, W)."""
    total = np.zeros((28, 28))
    for seed in range(draws):
        net = nn.UNet(nn.UNetConfig(base=16, multipliers=multipliers, blocks=1, attention=(), groups=4), Rng(seed))
        for i, p in enumerate(net.parameters().values()):
            if p.ndim == 4 and not p.data.any():  # a convolution that starts at zero
                p[...] = Rng(seed).at(9, i).normal(p.shape) * (9 * p.shape[2]) ** -0.5
        image = Tensor(Rng(seed).at(7).normal((1, 28, 28, 1)), requires_grad=True)
        net(image, np.array([500]))[0, 14, 14, 0].backward()
        total += np.abs(image.grad[0, :, :, 0])
    return total / total.max()


levels = {"one level": (1,), "two levels": (1, 2), "three levels": (1, 2, 4)}
views = {name: sight(multipliers, 2 if QUICK else 12) for name, multipliers in levels.items()}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
for axis, (name, seen) in zip(axes, views.items(), strict=True):
    axis.imshow(np.log10(seen), cmap="magma", vmin=-3.5, vmax=0)
    axis.set(xticks=[], yticks=[], title=f"{name}: {np.mean(seen > 0.01):.0%}")
figure.suptitle("what the pixel in the centre sees; share of the image above a hundredth of the brightest", fontsize=11)
save(figure, "08_sight.png")
assert np.mean(views["one level"] > 0.01) < 0.5 < np.mean(views["three levels"] > 0.01)

# %% [markdown]
# ![receptive fields](out/08_sight.png)
#
# A 3 × 3 convolution sees one pixel further; at the bottom of the U that is four pixels of the image. (The faint glow
# everywhere is GroupNorm's, whose mean and variance are of the whole image.) For 28 pixels three levels are enough to
# reach nearly everywhere. **Attention** (**E27**) makes distance count for nothing: each place asks all others at once,
# $\mathrm{softmax}(QK^\top/\sqrt d)\,V$. With $N$ places that costs $N^2$, which is why only the small images at the
# bottom have it: 49 places there, 784 at the top, which would be 256 times the work.
#
# ## Without the skips
#
# We train one small U-Net as it is, and its twin with zeros in the place of all that the left side hands over, for the
# same steps on the same digits. The bottom has 7 × 7 places.

# %%
STEPS, BATCH = (6, 16) if QUICK else (150, 32)
schedule = Schedule.cosine(1000)
digits = to_signed(mnist.load("embedded").images[..., None])  # (4500, 28, 28, 1) in [-1, 1]
small = nn.UNetConfig(base=16, multipliers=(1, 2, 2), blocks=1, attention=(2,), groups=4)


def train(skip):
    """Algorithm 1 for a few steps (E18): the network, and its losses."""
    net, losses = nn.UNet(small, Rng(0)), []
    adam = optim.AdamW(net.parameters(), betas=(0.9, 0.99))
    for step in range(1, STEPS + 1):
        rng = Rng(1).at(step)
        x_0 = digits[rng.at(0).integers(0, len(digits), (BATCH,))]
        t, eps = draw_t(rng.at(1), BATCH, 1000, stratified=True), rng.at(2).normal_like(x_0)
        loss = ops.mse_loss(forward(net, Tensor(q_sample(x_0, t, eps, schedule)), t, skip=skip), eps)
        loss.backward()
        adam.step(optim.warmup_cosine(step, STEPS, 3e-3, 20, 0.0), max_norm=1.0)
        losses.append(loss.item())
    return net, np.array(losses)


with_skips, losses_with = train(skip=True)
without, losses_without = train(skip=False)
late = slice(-max(1, STEPS // 5), None)
print(f"mean loss at the end: {losses_with[late].mean():.3f} with skips, {losses_without[late].mean():.3f} without")

x_0, t = digits[[900, 2300]], np.array([200, 200])
eps = Rng(3).normal_like(x_0)
x_t = q_sample(x_0, t, eps, schedule)
signal, noise = schedule.alpha_bar[200] ** 0.5, (1 - schedule.alpha_bar[200]) ** 0.5
rows = [[image[..., 0] for image in (x_0[i], x_t[i])] for i in range(2)]
for net, skip in ((with_skips, True), (without, False)):
    with no_grad():
        guess = (x_t - noise * forward(net, Tensor(x_t), t, skip=skip).data) / signal
    for i in range(2):
        rows[i].append(guess[i, ..., 0])

figure = plt.figure(figsize=(11, 3.7), layout="constrained")
curve, images = figure.subfigures(1, 2, width_ratios=(1, 1.25))
axis = curve.add_subplot()
for losses, color, name in ((losses_without, RED, "without skips"), (losses_with, BLUE, "with skips")):
    axis.plot(np.arange(1, STEPS + 1), losses, color=color, lw=1, label=name)
axis.set(xlabel="training step", title=r"$\|\varepsilon - \varepsilon_\theta\|^2$", ylim=(0, 1.2))
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
axes = images.subplots(2, 4)
for row, line in zip(rows, axes, strict=True):
    for picture, axis in zip(row, line, strict=True):
        axis.imshow(picture, cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
for axis, name in zip(axes[0], ("$x_0$", "$x_{200}$", "guess with skips", "without"), strict=True):
    axis.set_title(name, fontsize=10)
save(figure, "08_skips.png")
if not QUICK:
    assert losses_without[late].mean() > 2 * losses_with[late].mean()

# %% [markdown]
# ![with and without skips](out/08_skips.png)
#
# The noise has a value of its own in each of 784 pixels. The bottom has 7 × 7 × 32 = 1,568 numbers, so that all of it
# could be squeezed through, but first the network must learn how, and it leaves some of the noise behind. The skips
# carry it past the bottom from the first step on; the bottom is left to say what the digit is.
#
# ## Inside a trained network
#
# Three channels of some layers for one noisy digit; and for three places of the 7 × 7 at the bottom, how much attention
# they pay to all others (bright: much).

# %%
seen = []
with no_grad():
    forward(with_skips, Tensor(x_t[:1]), t[:1], lambda name, layer, inputs, h: seen.append((name, layer, h)))
chosen = [0, 1, 5, 6, len(seen) - 4, len(seen) - 2]
titles = []
figure, axes = plt.subplots(3, len(chosen) + 1, figsize=(11, 5.2), layout="constrained")
for line in axes[:, 0]:
    line.imshow(x_t[0, ..., 0], cmap="gray", vmin=-1.5, vmax=1.5)
axes[0, 0].set_title("$x_{200}$", fontsize=10)
for column, index in enumerate(chosen, start=1):
    name, layer, h = seen[index]
    strongest = np.argsort(-h.data[0].std(axis=(0, 1)))[:3]
    for channel, axis in zip(strongest, axes[:, column], strict=True):
        axis.imshow(h.data[0, :, :, channel], cmap="gray")
    axes[0, column].set_title(f"{name}\n{h.shape[1]} × {h.shape[2]} × {h.shape[3]}", fontsize=10)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
save(figure, "08_features.png")

stage = with_skips.middle[0]
with no_grad():
    index = [layer for _, layer, _ in seen].index(stage)
    h = stage.block(seen[index - 1][2], ops.silu(with_skips.time(t[:1])))
    qkv = stage.attention.qkv(stage.attention.norm(h)).data.reshape(49, 3, -1)
q, k = qkv[:, 0], qkv[:, 1]
weights = ops.softmax(q @ k.T / k.shape[1] ** 0.5).data  # (49, 49), each row sums to 1
assert np.allclose(weights.sum(axis=1), 1, atol=1e-5)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.75), layout="constrained")
axes[0].imshow(x_0[0, ..., 0], cmap="gray")
for axis, (row, column) in zip(axes[1:], ((3, 3), (1, 2), (6, 0)), strict=True):
    axis.imshow(weights[7 * row + column].reshape(7, 7), cmap="viridis")
    axis.plot(column, row, "s", ms=22, mfc="none", mec=RED, mew=2)
    axis.set_title(f"seen from ({row}, {column})", fontsize=10)
    axes[0].plot(4 * column + 1.5, 4 * row + 1.5, "s", ms=11, mfc="none", mec=RED, mew=2)
axes[0].set_title("the digit", fontsize=10)
for axis in axes:
    axis.set(xticks=[], yticks=[])
save(figure, "08_attention.png")

# %% [markdown]
# ![feature maps](out/08_features.png)
# ![attention](out/08_attention.png)
#
# On the way down the maps are filtered copies of the image; at the bottom 7 × 7 places say roughly where the ink is; in
# the last column the digit is gone and its noise is left, which is the answer. Attention goes to places far away as
# easily as to the next one, and from each of the three to others. After 150 steps there is no more to be read into it.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. Ho et al. 2020 use base 128 and multipliers (1, 2, 2, 2) for 32 × 32 × 3. What shape (H, W, C) has the middle?
# 2. How many parameters has a ResBlock from 64 to 128 channels with an embedding of 256? Count two GroupNorms, two
#    convolutions, the linear layer of the embedding, and the 1 × 1 skip, with their biases.

# %%
middle = None
parameters = None

if middle is not None:
    shapes = []
    big = nn.UNet(nn.UNetConfig(channels=3, base=128, multipliers=(1, 2, 2, 2), blocks=1, attention=()), Rng(0))
    with no_grad():
        forward(
            big,
            Tensor(np.zeros((1, 32, 32, 3), np.float32)),
            np.array([1]),
            lambda name, layer, inputs, h: shapes.append(h.shape[1:]) if name == "middle" else None,
        )
    assert tuple(middle) == shapes[0]
    print("exercise 1 is right")
if parameters is not None:
    assert parameters == nn.ResBlock(64, 128, 256, Rng(0), groups=8).count_parameters()
    print("exercise 2 is right")
