# %% [markdown]
# # Lesson 1: autograd, or how a program differentiates itself
#
# Every training step in this course is one line of Algorithm 1 (**E18**): *take a gradient descent step on*
# $\nabla_\theta \lVert \varepsilon - \varepsilon_\theta(x_t, t)\rVert^2$ (**E17**). The network $\varepsilon_\theta$
# has millions of parameters. Where does its gradient come from?
#
# This lesson teaches no equation of the deck by itself; it builds the tool that E17 and E18 take for granted:
# - reverse-mode differentiation in sixteen lines, for single numbers;
# - why *reverse*: one pass backwards costs about as much as two passes forwards, for any number of parameters;
# - the same for arrays, as this package does it: an **op** and its **vector-Jacobian product**;
# - a new op of your own, and how to check that its gradient is right;
# - a small network that learns to tell two spirals apart, and two exercises with answers.
#
# Run it from anywhere: `python lessons/01_autograd.py` takes a few seconds and writes its pictures to `lessons/out/`.

# %%
import itertools
import math
import pathlib
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, Tensor, no_grad, ops
from tinydiff.autograd import op
from tinydiff.backend import array_module
from tinydiff.gradcheck import gradcheck

OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREY = "#1f5fa8", "#c8401f", "#777777"

# %% [markdown]
# ## Sixteen lines
#
# A computation is a chain of small steps, and of each small step we know the derivative. So let a number remember which
# numbers it was made from, and how fast it changes with each of them. The chain rule then says: walk back from the
# result, and hand every number the sum, over all numbers it was used for, of *(their gradient) × (local derivative)*.


# %%
class Scalar:
    """A number that remembers its parents, as pairs (parent, derivative of this number by that parent)."""

    def __init__(self, value, parents=()):
        self.value, self.parents, self.grad = value, parents, 0.0

    def __add__(self, other):
        return Scalar(self.value + other.value, [(self, 1.0), (other, 1.0)])

    def __sub__(self, other):
        return Scalar(self.value - other.value, [(self, 1.0), (other, -1.0)])

    def __mul__(self, other):
        return Scalar(self.value * other.value, [(self, other.value), (other, self.value)])

    def tanh(self):
        y = math.tanh(self.value)
        return Scalar(y, [(self, 1 - y * y)])

    def backward(self, grad=1.0):  # dL/dL = 1
        self.grad += grad
        for parent, derivative in self.parents:
            parent.backward(grad * derivative)  # the chain rule


# %% [markdown]
# One neuron with weight $w$ and bias $b$ sees the input $x$ and should have answered $y$. Its loss is
# $L = (\tanh(w x + b) - y)^2$.

# %%
w, x, b, y = Scalar(0.6), Scalar(1.5), Scalar(-0.2), Scalar(1.0)
u = w * x
v = u + b
h = v.tanh()
e = h - y
L = e * e
L.backward()
print(f"L = {L.value:.4f}   dL/dw = {w.grad:.4f}   dL/db = {b.grad:.4f}")

by_hand = 2 * (math.tanh(0.7) - 1) * (1 - math.tanh(0.7) ** 2)  # dL/dv, so dL/dw is 1.5 times that
assert math.isclose(b.grad, by_hand) and math.isclose(w.grad, 1.5 * by_hand)


# %%
def draw_graph(file):
    """The graph of the neuron's loss: values in blue, computed from left to right; gradients in red, right to left."""
    nodes = {  # place, name, number
        "w": (0, 2.45, "w", w), "x": (0, 0.55, "x", x), "b": (1.7, 0, "b", b), "y": (5.3, 0, "y", y),
        "u": (1.7, 1.5, "u = w x", u), "v": (3.5, 1.5, "v = u + b", v), "h": (5.3, 1.5, "h = tanh v", h),
        "e": (7.1, 1.5, "e = h − y", e), "L": (8.8, 1.5, "L = e²", L),
    }  # fmt: skip
    figure, axis = plt.subplots(figsize=(11, 3.7))
    boxes = {}
    for key, (px, py, name, number) in nodes.items():
        box = {"boxstyle": "round,pad=0.45", "fc": "#f4f6fa", "ec": GREY}
        boxes[key] = axis.text(px, py, name, ha="center", va="center", fontsize=12, bbox=box).get_bbox_patch()
        axis.text(px, py + 0.46, f"{number.value:.3f}", ha="center", va="center", fontsize=11, color=BLUE)
        axis.text(px, py - 0.46, f"{number.grad:.3f}", ha="center", va="center", fontsize=11, color=RED)
    for start, end in ("wu", "xu", "uv", "bv", "vh", "he", "ye", "eL"):
        style = {"arrowstyle": "-|>", "color": GREY, "lw": 1.3, "patchA": boxes[start], "patchB": boxes[end]}
        axis.annotate("", nodes[end][:2], nodes[start][:2], arrowprops=style | {"shrinkA": 3, "shrinkB": 3})
    axis.text(9.2, 2.9, "forward: values  →", color=BLUE, fontsize=12, ha="right")
    axis.text(9.2, -0.4, "←  backward: dL / d(this number)", color=RED, fontsize=12, ha="right")
    axis.set(xlim=(-0.4, 9.4), ylim=(-0.65, 3.15))
    axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(OUT / file, dpi=130)
    plt.close(figure)


draw_graph("01_graph.png")

# %% [markdown]
# ![graph](out/01_graph.png)
#
# Read the red numbers from the right. At $L$ the gradient is 1. Each box passes its own to the left, times the local
# derivative: $e$ gets $2e$, the subtraction passes it on unchanged (and with a minus to $y$), $\tanh$ multiplies by
# $1-h^2$, and the product sends to each factor the *other* factor. That exchange is why a program has to keep the
# values of the forward pass until the backward pass is over: **memory**, more than time, is the price of training.
#
# The sixteen lines are right, but they walk every *path* through the graph. A number that is used twice, whose result
# is used twice, and so on, has two paths, four, eight, ... An engine must visit each number once, after all of those
# made from it. The package's does: the one made last comes first. And it does so in a loop, since a deep network
# outruns Python's limit on recursion.


# %%
def doubled(number, times):
    """number 2^times, by adding it to itself again and again."""
    for _ in range(times):
        number = number + number
    return number


for times in (4, 8, 12, 16):
    root = Scalar(1.0)
    start = time.perf_counter()
    doubled(root, times).backward()
    print(f"Scalar, {times:2} doublings: gradient {root.grad:>9,.0f}, {1e3 * (time.perf_counter() - start):8.2f} ms")
tensor = Tensor(np.float64(1), requires_grad=True)
start = time.perf_counter()
doubled(tensor, 1000).backward()
print(f"Tensor, 1000 doublings: gradient {tensor.grad:.1e}, {1e3 * (time.perf_counter() - start):6.2f} ms")
assert root.grad == 2**16 and tensor.grad == 2.0**1000

# %% [markdown]
# ## Why backwards?
#
# The plain way to a derivative is to nudge each parameter and look what happens: $P$ parameters, $P+1$ evaluations.
# The backward pass does a small, fixed amount of work for each step of the forward pass, whatever $P$ is. Here is a
# layer $\sum \tanh(W x)$ with $P = n^2$ weights.


# %%
def seconds(work, repeats=7):
    """The shortest of a few runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def layer(W, x):
    return ops.tanh(x @ W).sum()


widths = [8, 16, 32, 64, 128, 256, 512]
forward, both = [], []
for n in widths:
    W, x_n = Tensor(Rng(n).normal((n, n)), requires_grad=True), Rng(n).at(1).normal((64, n))
    with no_grad():
        forward.append(seconds(lambda: layer(W, x_n)))  # noqa: B023
    both.append(seconds(lambda: layer(W, x_n).backward()))  # noqa: B023

P = np.array(widths) ** 2
figure, axis = plt.subplots(figsize=(7.2, 4.2))
axis.loglog(P, (P + 1) * forward, "--", color=GREY, label="nudging every weight: (P + 1) × forward")
axis.loglog(P, both, "o-", color=RED, label="forward and backward: all P derivatives")
axis.loglog(P, forward, "o-", color=BLUE, label="forward only")
axis.set(xlabel="number of weights P", ylabel="seconds", title="The gradient of a layer, two ways")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "01_cost.png", dpi=130)
plt.close(figure)
print(f"P = {P[-1]:,}: forward and backward take {both[-1] / forward[-1]:.1f} times as long as forward alone")

# %% [markdown]
# ![cost](out/01_cost.png)
#
# ## From numbers to arrays
#
# A network of a million single numbers would be a million Python objects. The package's unit is therefore an **array**,
# and its steps are **ops** on arrays. If $y = f(x)$ with Jacobian $J = \partial y/\partial x$, and $g = \partial L /
# \partial y$ is known, then what has to be passed on is
#
# $$\frac{\partial L}{\partial x} = J^\top g \qquad\text{(the vector-Jacobian product, vjp)},$$
#
# and for no op do we ever write down $J$. Three that carry most of deep learning:
#
# | op | value | vjp, for each argument |
# |---|---|---|
# | product, element by element | $a\,b$ | $g\,b,\quad g\,a$ |
# | sum | $\sum_i x_i$ | $g$ in every place |
# | matrix product, $A$ (N, K), $B$ (K, M) | $A B$ | $g B^\top$ (N, K), $\quad A^\top g$ (K, M) |
#
# In the package an op is a function that returns both columns. This is `ops.mul`:
#
#     @op
#     def mul(a, b):
#         return a * b, lambda g: (g * b, g * a)
#
# (The real one differs in one point: a gradient that nobody asked for is not computed.) The decorator does the rest,
# once for all ops: it records the graph, adds up the gradients of an array used twice, sums over axes that were
# broadcast, and frees each array as soon as the backward pass is through with it. The neuron again, now as four neurons
# with eight inputs each at once:

# %%
w_, b_ = Tensor(np.full((1, 4), 0.6), requires_grad=True), Tensor(np.float64([[-0.2]]), requires_grad=True)
x_, y_ = np.full((8, 1), 1.5), np.full((8, 4), 1.0)
loss = ((ops.tanh(x_ @ w_ + b_) - y_) ** 2).sum()
loss.backward()
print(loss)
print("dL/dw, shape", w_.grad.shape, "one for each neuron, summed over its inputs:", w_.grad)
print("dL/db, shape", b_.grad.shape, "b was broadcast to (8, 4), so its gradient is a sum of 32:", b_.grad)
assert np.allclose(w_.grad, 8 * w.grad) and np.allclose(b_.grad, 32 * b.grad)

# %% [markdown]
# What the engine cannot do, it says. The graph was freed, so a second backward is refused; and a number that the
# gradient depends on must not be overwritten in between.

# %%
try:
    loss.backward()
except RuntimeError as error:
    print("a second backward:", error)

squares = (w_ * w_).sum()
w_[...] = 0.0
try:
    squares.backward()
except RuntimeError as error:
    print("a write in between:", error)

# %% [markdown]
# ## An op of your own
#
# The package has no softplus, $\log(1 + e^x)$, a smooth relative of $\max(x, 0)$. Written like that it overflows for
# large $x$; $\max(x, 0) + \log(1 + e^{-|x|})$ is the same and does not. Its derivative is the sigmoid,
# $1/(1+e^{-x}) = (1 + \tanh\frac x2)/2$.


# %%
@op
def softplus(x):
    """log(1 + e^x), element by element."""
    xp = array_module(x)  # NumPy, or CuPy if the array lives on a GPU
    y = xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))
    return y, lambda g: g * (0.5 + 0.5 * xp.tanh(0.5 * x))


@op
def wrong_softplus(x):
    """The same with a slip in its derivative: the 1/2 inside the tanh is forgotten."""
    xp = array_module(x)
    y = xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))
    return y, lambda g: g * (0.5 + 0.5 * xp.tanh(x))


# %% [markdown]
# Is it right? A gradient that is a little wrong still trains, only worse, and nobody notices. So every op of the
# package is held against finite differences. Nudging each input would be slow; one *random direction* $v$ is enough,
# since for the right gradient $\nabla f \cdot v$ must equal the slope of $h \mapsto f(x + h v)$ at 0, and a wrong
# one agrees by chance only with probability zero.

# %%
points = Rng(0).normal((50,), np.float64)
print(f"softplus:       relative error {gradcheck(softplus, points, rng=Rng(1)):.1e}")
print(f"wrong_softplus: relative error {gradcheck(wrong_softplus, points, rng=Rng(1)):.1e}")
assert gradcheck(softplus, points, rng=Rng(1)) < 1e-6 < gradcheck(wrong_softplus, points, rng=Rng(1))

# %% [markdown]
# How small should the step $h$ be? Too large, and the function's curvature spoils the slope (the error falls as $h^2$
# for the symmetric difference, as $h^4$ for the better formula the package uses). Too small, and the rounding of
# $f$, about $10^{-16}$ of it, is divided by $h$. `gradcheck` stays a little left of its best step: a small one keeps
# clear of the kinks that ops such as `relu` have. In float32 the valley is far too shallow: checks need float64.


# %%
def slope_error(dtype, order, h, v):
    """The relative error of the finite difference of Σ softplus along v, computed in a precision."""

    def f(s):
        return float(softplus((points + s * v).astype(dtype)).sum().data)

    exact = (1 / (1 + np.exp(-points)) * v).sum()
    second = (f(h) - f(-h)) / (2 * h)
    slope = second if order == 2 else (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
    return abs(slope - exact) / abs(exact)


steps = np.logspace(-10, 0, 41)
directions = [Rng(7).at(i).normal((50,), np.float64) for i in range(20)]
figure, axis = plt.subplots(figsize=(7.2, 4.2))
for dtype, order, colour, name in [
    (np.float32, 2, GREY, "float32, symmetric difference"),
    (np.float64, 2, BLUE, "float64, symmetric difference"),
    (np.float64, 4, RED, "float64, fourth order (gradcheck)"),
]:
    axis.loglog(
        steps,
        [np.median([slope_error(dtype, order, h, v) for v in directions]) for h in steps],
        color=colour,
        label=name,
    )
axis.axvline(1e-5, color=RED, lw=0.8, ls=":")
axis.text(1.2e-5, 3e-1, "gradcheck's step", color=RED, fontsize=10)
axis.axhline(1e-6, color="black", lw=0.8, ls=":")
axis.text(2.5e-9, 1.6e-6, "what the tests demand of every op", fontsize=10)
axis.set(xlabel="step h", ylabel="relative error of the slope", title="A valley between two errors", ylim=(1e-13, 3))
axis.legend(frameon=False, loc="lower left", fontsize=9)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "01_gradcheck.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![the valley](out/01_gradcheck.png)
#
# ## A network that learns
#
# Two spirals, wound around each other: no straight line separates them. Three layers, our own softplus between them,
# and the loss of a classifier, $-\log$ of the probability given to the right class.

# %%
N = 200
rng = Rng(3)
angle = np.sqrt(np.linspace(0.02, 1, N)) * 3 * np.pi
arm = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / (3 * np.pi)
data = np.concatenate([arm, -arm]).astype(np.float32) + 0.015 * rng.at(0).normal((2 * N, 2))  # (400, 2)
labels = np.repeat([0, 1], N)  # (400,)

sizes = [2, 48, 48, 2]
weights = [Tensor(rng.at(1, i).normal(s) * s[0] ** -0.5, True) for i, s in enumerate(itertools.pairwise(sizes))]
biases = [Tensor(rng.at(2, i).normal((n,)), requires_grad=True) for i, n in enumerate(sizes[1:])]


def network(x):
    """Points (B, 2) -> logits (B, 2)."""
    h = 4 * x
    for W, b in zip(weights[:-1], biases[:-1], strict=True):
        h = softplus(ops.linear(h, W, b))
    return ops.linear(h, weights[-1], biases[-1])


# %% [markdown]
# The training loop is the skeleton of Algorithm 1. Only two lines will change in the lessons to come: where the batch
# comes from, and the loss. The update here is gradient descent with momentum: a velocity $u \leftarrow \mu u +
# \nabla L$, and $\theta \leftarrow \theta - \eta\, u$.

# %%
axis_points = np.linspace(-1.25, 1.25, 160, dtype=np.float32)
plane = np.stack(np.meshgrid(axis_points, axis_points), axis=-1).reshape(-1, 2)
parameters = [*weights, *biases]
velocity = [np.zeros_like(p.data) for p in parameters]
losses, pictures = [], {}
for step in range(1501):
    loss = ops.cross_entropy(network(data), labels)  # forward
    loss.backward()  # backward: every p.grad
    losses.append(loss.item())
    if step in (0, 60, 150, 1500):
        with no_grad():
            pictures[step] = ops.softmax(network(plane)).numpy()[:, 1].reshape(160, 160)
    for p, u in zip(parameters, velocity, strict=True):
        u[...] = 0.9 * u + p.grad
        p[...] = p.data - 0.1 * u
        p.grad = None  # the next backward starts from nothing

with no_grad():
    accuracy = float((network(data).numpy().argmax(axis=1) == labels).mean())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}, {accuracy:.1%} of the points on the right side")
assert accuracy > 0.99 and losses[-1] < 0.05

# %%
figure, axes = plt.subplots(1, 5, figsize=(14, 3.1), width_ratios=(1, 1, 1, 1, 1.25))
for axis, (step, p) in zip(axes, pictures.items(), strict=False):
    axis.imshow(p, extent=(-1.25, 1.25, -1.25, 1.25), origin="lower", cmap="RdBu_r", vmin=-0.6, vmax=1.6)
    for label, colour in ((0, BLUE), (1, RED)):
        axis.plot(*data[labels == label].T, "o", color=colour, ms=2.6, mec="white", mew=0.3)
    axis.set(xticks=[], yticks=[], title=f"after {step} steps")
axes[-1].semilogy(losses, color=BLUE)
axes[-1].set(xlabel="step", title="loss")
axes[-1].spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "01_spirals.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![spirals](out/01_spirals.png)
#
# ## What comes next
#
# Put a noised image in place of the points, the time beside it, a U-Net in place of the three layers, and
# `ops.mse_loss(model(x_t, t), eps)` in place of the cross-entropy: that is E17, and the loop is E18. Lesson 2 makes
# the $x_t$.
#
# ## Exercises
#
# **1.** Write the op `normalise(x)` $= x / \lVert x \rVert$ for vectors along the last axis. Show first that its vjp is
# $\left(g - y\,(g\cdot y)\right)/\lVert x\rVert$ with $y = x/\lVert x\rVert$: the part of $g$ along $y$ drops out.
# Why must it? *Check: `gradcheck` below $10^{-6}$.*
#
# **2.** A denoiser with a single parameter. Numbers $x_0 \sim \mathcal N(0, s^2)$ with $s = 2$ are noised as
# $x_t = \sqrt{\bar\alpha}\,x_0 + \sqrt{1-\bar\alpha}\,\varepsilon$ with $\bar\alpha = 0.7$, and the guess for
# $\varepsilon$ is $a\,x_t$. Find the best $a$ by gradient descent on E17's loss, with fresh draws in each step; then
# find it on paper. *Check: the two agree to two digits.*
#
# Solutions follow.


# %%
@op
def normalise(x):
    """x / ‖x‖ along the last axis."""
    norm = (x * x).sum(axis=-1, keepdims=True) ** 0.5
    y = x / norm
    return y, lambda g: (g - y * (g * y).sum(axis=-1, keepdims=True)) / norm


# 1. Scaling x changes nothing in y, so the gradient can have no part along x.
error = gradcheck(normalise, Rng(4).normal((5, 3), np.float64), rng=Rng(5))
print(f"exercise 1: relative error {error:.1e}")
assert error < 1e-6

# 2. d/da E(ε − a x_t)² = 0 gives a = E(ε x_t) / E(x_t²) = √(1 − ᾱ) / (ᾱ s² + 1 − ᾱ).
s, alpha_bar = 2.0, 0.7
a = Tensor(0.0, requires_grad=True)
for step in range(400):
    x_0, eps = s * Rng(6).at(step, 0).normal((256,)), Rng(6).at(step, 1).normal((256,))
    x_t = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps
    ops.mse_loss(a * x_t, eps).backward()
    a[...] = a.data - 0.5 / (10 + step) * a.grad  # ever smaller steps, so that the noise of the draws averages out
    a.grad = None
on_paper = (1 - alpha_bar) ** 0.5 / (alpha_bar * s**2 + 1 - alpha_bar)
print(f"exercise 2: a = {a.item():.4f} by descent, {on_paper:.4f} on paper")
assert abs(a.item() - on_paper) < 0.005
