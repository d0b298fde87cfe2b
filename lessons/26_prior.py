# %% [markdown]
# # Lesson 26: the prior, or what a caption leaves open
#
# DALL-E 2 draws a picture in two steps: first CLIP's *embedding* of a picture, then a picture of that embedding. This
# lesson is about the first step, the **prior**. CLIP (lesson 19) already gives an embedding for the text. Why is that
# not enough?
#
# You will see
# - **E29**, the two steps as a product of two probabilities;
# - that a caption leaves much open, and that the embedding of a text is not that of any picture;
# - **E30**, the diffusion prior: a transformer that denoises an embedding;
# - that the mean of all right answers is a wrong answer with the best score;
# - **E31**, the autoregressive prior: an embedding spelled as a word of a few letters;
# - **E32**, two candidates and the better one, what it gains, and how to be sure of it;
# - both priors beside each other.
#
# Run it from anywhere: `python lessons/26_prior.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, checkpoint
from tinydiff.data.captioned import Shapes
from tinydiff.data.shape_captions import parse
from tinydiff.data.shapes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Item, Scene, draw
from tinydiff.diffusion import Sampling
from tinydiff.image import to_signed
from tinydiff.metrics import paired_change
from tinydiff.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig, PrincipalComponents
from tinydiff.models.clip import CLIP, CLIPConfig
from tinydiff.models.prior import DiffusionPrior, DiffusionPriorConfig, most_aligned, told_captions, unit_rows
from tinydiff.models.tokenizer import Tokenizer, clean
from tinydiff.nn import TransformerConfig
from tinydiff.optim import Adam

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREEN, GREY, ORANGE = "#1f5fa8", "#c8401f", "#2a8a4a", "#777777", "#e08a1e"
SHIPPED = checkpoint.shipped()


def save(figure, name):
    """Write a figure to the folder of pictures."""
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


def bare(*axes):
    """Take the upper and the right line off some axes."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def cosine(a, b):
    """The cosines of unit vectors, row by row."""
    return (a * b).sum(axis=-1)


towers = TransformerConfig(32, 1, 2, causal=True), TransformerConfig(32, 1, 2)
words = Tokenizer.train(map(clean, Shapes().draw(Rng(0), 200)[1]), 450).merges
clip = CLIP.load("clip") if "clip" in SHIPPED else CLIP(CLIPConfig(words, 28, *towers, embedding=64), Rng(0))

# %% [markdown]
# ## What a caption leaves open
#
# "A red star": small or big, in any of nine places, on any of five backgrounds. We draw many of these pictures, give
# them to CLIP, and look at their embeddings $z_i$ along the two directions in which they differ most (their first two
# *principal components*). The embedding $z_t$ of the text is put on the same map.

# %%
text = "a red star"
n = 40 if QUICK else 400
sizes, backgrounds, places = tuple(SIZES), tuple(BACKGROUNDS), tuple(PLACES.values())
picks = Rng(1).integers(0, 90, (n,)).tolist()
kinds = [(sizes[p % 2], backgrounds[p // 2 % 5], places[p // 10]) for p in picks]
scenes = [Scene((Item("star", "red", size, *place),), background) for size, background, place in kinds]
pictures = np.stack([draw(scene) for scene in scenes])
z_i = clip.image_embedding(to_signed(pictures))
z_t = clip.text_embedding([text])[0]

map_of = PrincipalComponents.of(z_i)
x, y = ((z_i - map_of.mean) @ map_of.directions[:2].T).T
text_x, text_y = (z_t - map_of.mean) @ map_of.directions[:2].T
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1.5, 1))
for name, color in zip(backgrounds, ("#cfc4a0", "#8a8a8a", "#111111", BLUE, GREEN), strict=True):
    for size, dot in (("small", 16), ("big", 60)):
        here = [k[0] == size and k[1] == name for k in kinds]
        left.scatter(x[here], y[here], s=dot, color=color, alpha=0.7, lw=0, label=f"on {name}" if size == "big" else "")
left.plot(text_x, text_y, "*", color=RED, ms=16, label="$z_t$, the text")
left.set(title="'a red star': small and big, on five backgrounds", xlabel="first component", ylabel="second")
left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), labelspacing=0.9)
among = z_i @ z_i.T
right.hist(among[np.triu_indices(n, 1)], 40, density=True, color=GREY, alpha=0.6, label="two pictures of it")
right.hist(z_i @ z_t, 20, density=True, color=RED, alpha=0.7, label="a picture of it, and the text")
right.set(xlabel="cosine", yticks=[], title="how alike?")
right.legend(frameon=False, fontsize=8, loc="upper left")
bare(left, right)
figure.tight_layout()
save(figure, "26_open.png")
print(f"pictures of {text!r}: cosines with each other {among[np.triu_indices(n, 1)].mean():.2f} on average,")
print(f"with their own mean {(z_i @ unit_rows(z_i.mean(axis=0))).mean():.2f}, with the text {(z_i @ z_t).mean():.2f};")
print(f"no picture is nearer to the text than {(z_i @ z_t).max():.2f}")

# %% [markdown]
# ![what is open](out/26_open.png)
#
# The pictures of one caption fall into clusters, of whose sizes and backgrounds the caption says nothing. The text is a
# single point, and on this map it is in the middle of them. But a map shows two directions of 128. The text is farther
# from all pictures than their own mean is; it must lie beside them in a direction that the map does not show. That is
# so for all captions: **no text is where pictures are.** CLIP was only asked to make a caption's own picture nearer
# than others, never to bring both to one place. Is there one direction that tells texts from pictures? We look for it
# among some pairs, by least squares, and try it on others.

# %%
N = 30 if QUICK else 300
held_out, captions = Shapes().draw(Rng(2), N, "test")
images, texts = clip.image_embedding(to_signed(held_out)), told_captions(clip, captions)  # texts.vector: their z_t
both = np.concatenate([texts.vector, images]) - (texts.vector.mean(axis=0) + images.mean(axis=0)) / 2
is_text = np.repeat([1.0, -1.0], N)
learned_from = np.tile(np.arange(N) % 2 == 0, 2)
direction = np.linalg.lstsq(both[learned_from], is_text[learned_from], rcond=None)[0]
apart = np.mean((both[~learned_from] @ direction > 0) == (is_text[~learned_from] > 0))
print(f"one direction tells {apart:.1%} of {N} embeddings as a text's or a picture's")

others, _ = Shapes().draw(Rng(3), 60 if QUICK else 2000)
known = clip.image_embedding(to_signed(others))  # real embeddings, to compare with


def nearest(z):
    """The cosine of each embedding (..., d) with the real one that is nearest to it."""
    return (z @ known.T).max(axis=-1)


print(f"nearest of {len(known)} real embeddings: cosine {nearest(images).mean():.3f} for a picture, ", end="")
print(f"{nearest(texts.vector).mean():.3f} for a text")

# %% [markdown]
# A decoder that learned to draw pictures from $z_i$ has never seen anything like $z_t$. So DALL-E 2 splits the task.
#
# ## Two steps (E29)
#
# $$p(x \mid y) \;=\; p(x \mid z_i, y)\; p(z_i \mid y)$$
#
# for a picture $x$, its embedding $z_i$ and a caption $y$. It holds since $z_i$ is no news: it is computed from $x$, so
# that $p(x \mid y)$ and $p(x, z_i \mid y)$ are the same, and the rest is the chain rule. The second factor is the
# **prior**, the first the **decoder**. In a toy world of 12 pictures, 3 captions and 4 embeddings we can count:

# %%
p_x = Rng(4).uniform((12, 3), np.float64)
p_x /= p_x.sum(axis=0)  # p(x | y), one column for each caption
embedding_of = np.arange(12) % 4  # each picture has one of four embeddings
prior_toy = np.stack([p_x[embedding_of == z].sum(axis=0) for z in range(4)])  # p(z_i | y)
decoder_toy = p_x / prior_toy[embedding_of]  # p(x | z_i, y)
assert np.allclose(decoder_toy * prior_toy[embedding_of], p_x)
assert np.allclose([decoder_toy[embedding_of == z].sum(axis=0) for z in range(4)], 1)
print("decoder times prior gives back p(x | y) for all 36 pairs")

# %% [markdown]
# ## The diffusion prior (E30)
#
# An embedding is 128 numbers in no order, so a U-Net would be the wrong network. The denoiser is a *transformer*, as of
# a language model, and its "text" is
#
# $$\big[\;\text{caption's tokens},\quad z_t,\quad t,\quad z_i^{(t)},\quad \text{query}\;\big]
# \qquad\text{with}\qquad z_i^{(t)} = \sqrt{\bar\alpha_t}\, z_i + \sqrt{1-\bar\alpha_t}\;\varepsilon.$$
#
# Each token sees those before it. The *query* is a learned vector with nothing to say: it only collects, and what comes
# out in its place is the answer. The loss is the squared distance to $z_i$ **itself, not to the noise**:
#
# $$L = \mathbb E\;\lVert f_\theta(z_i^{(t)}, t, y) - z_i \rVert^2 .$$
#
# Embeddings have length 1, so each of their 128 numbers is about $1/\sqrt{128}$, far less than the noise. They are
# multiplied by $\sqrt{128}$ before anything else.

# %%
empty = told_captions(clip, [""])
d = images.shape[1]


def trained_here(prior, steps=2 if QUICK else 150):
    """A prior trained for a moment, in case that none comes with the package."""
    some, said = Shapes().draw(Rng(5), 100 if QUICK else 2000)
    seen, read = clip.image_embedding(to_signed(some)), told_captions(clip, said)
    if isinstance(prior, AutoregressivePrior):
        prior.codebook.fit(seen, read.vector)
    adam = Adam(prior.parameters())
    for step in range(steps):
        rows = Rng(6).at(step).permutation(len(some))[:64]
        prior.loss(seen[rows], Rng(7).at(step), read.taken(rows), empty).backward()
        adam.step(2e-3)
    return prior


small = {"transformer": TransformerConfig(64, 2, 4, causal=True), "context": clip.config.text.width, "embedding": d}
if "prior" in SHIPPED:
    prior = DiffusionPrior.load("prior")
else:
    prior = trained_here(DiffusionPrior(DiffusionPriorConfig(**small), Rng(8)))
print(f"{prior.count_parameters():,} parameters; the paper's has 1.2 billion")
how = Sampling("ddpm", 4 if QUICK else 64)

# %% [markdown]
# We draw eight embeddings for each of five captions. To *look* at an embedding we show the picture, of 2,000, whose
# embedding is nearest to it. On the left, the caption's own picture.

# %%
shown = [i for i in range(N) if len(captions[i]) < 44][:5]
drawn = prior.candidates(texts.taken(np.array(shown)), Rng(9), how, n=8, empty=empty)  # (8, 5, d)
found = (drawn @ known.T).argmax(axis=-1)
figure, axes = plt.subplots(5, 10, figsize=(9.6, 6.3), width_ratios=[1, 0.3, *[1] * 8])
for row, (i, line) in enumerate(zip(shown, axes, strict=True)):
    line[0].imshow(held_out[i])
    line[0].text(0, -4, captions[i], fontsize=10)
    for axis, j in zip(line[2:], found[:, row], strict=True):
        axis.imshow(others[j])
    for axis in line:
        axis.set(xticks=[], yticks=[])
    line[1].axis("off")
figure.subplots_adjust(left=0.01, right=0.99, top=0.96, bottom=0.01, hspace=0.35, wspace=0.08)
save(figure, "26_drawn.png")

# %% [markdown]
# ![drawn for captions](out/26_drawn.png)
#
# Colours, shapes and sizes are those of the captions, and what they do not name varies: that is what a prior is for.
# (Places are often only nearly right. Of 2,000 pictures few have all that a caption says, so the nearest must give in
# somewhere.)
#
# ## The mean of all right answers
#
# The prior does not know the caption's own picture. How near to it does one draw come, on average over many captions?
# And the network's first guess, at $t = T$, where the input is noise and tells nothing? That is the mean of all
# pictures that fit, $\mathbb E[z_i \mid y]$.

# %%
told = texts.taken(slice(0, 20 if QUICK else N))
truth = images[: len(told)]
drawn = prior.candidates(told, Rng(10), how, n=2, empty=empty)  # of two, for later
mean = unit_rows(prior.denoiser(told, 1.0, empty)(Rng(11).normal((len(told), d)), prior.schedule.T).x0)
for name, z in (("the text", told.vector), ("one draw", drawn[0]), ("the mean of all answers", mean)):
    print(f"mean cosine with the true embedding: {cosine(z, truth).mean():.3f} for {name}")
if not QUICK and "prior" in SHIPPED:
    assert cosine(mean, truth).mean() > cosine(drawn[0], truth).mean() > cosine(told.vector, truth).mean() + 0.05

# %% [markdown]
# Both beat the text's embedding by far. But should the mean not be what we want, if it comes nearer than a draw? Look
# at the red star again, of which we have many true pictures. We follow the guesses on the way from noise, and measure
# two cosines: the mean one with all the true pictures, and that with the nearest of them.

# %%
stars = told_captions(clip, [text] * (20 if QUICK else 100))
denoise, guesses = prior.denoiser(stars, 1.0, empty), []


def watched(noised, t):
    """The denoiser, which keeps what it guessed."""
    prediction = denoise(noised, t)
    guesses.append((t, unit_rows(prediction.x0)))
    return prediction


*_, end = how.states(watched, Rng(12).normal((len(stars), d)), prior.schedule, Rng(13))
rows = {
    "the mean of all pictures": unit_rows(known.mean(axis=0, keepdims=True)),
    "the text's $z_t$": stars.vector,
    "$E[z_i | y]$": guesses[0][1],
    "drawn by the prior": unit_rows(end),
    "a true picture": z_i,
}


def to_stars(z):
    """The mean cosine of embeddings with all the true pictures, and with the nearest that is not the same."""
    table = z @ z_i.T
    return table.mean(), np.where(table > 1 - 1e-6, -1, table).max(axis=1).mean()


figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.4), width_ratios=(1, 1.5))
way = np.array([to_stars(z) for _, z in guesses])
for k, color in enumerate((BLUE, ORANGE)):
    left.plot([t for t, _ in guesses], way[:, k], color=color, lw=2)
left.invert_xaxis()
left.set(xlabel="$t$", ylabel="cosine of the guess", title="from noise to a red star")
for row, z in enumerate(rows.values()):
    labels = "with all true pictures, mean", "with the nearest"
    pairs = zip(to_stars(z), (BLUE, ORANGE), labels, (-0.2, 0.2), strict=True)
    for value, color, label, shift in pairs:
        right.barh(row + shift, value, height=0.38, color=color, label=label if row == 0 else "")
        right.text(max(value, 0) + 0.01, row + shift, f"{value:.3f}", va="center", fontsize=8)
right.set(yticks=range(len(rows)), xlim=(0, 1.14), xlabel="cosine", yticklabels=rows)
right.invert_yaxis()
right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
bare(left, right)
figure.tight_layout()
save(figure, "26_cosines.png")

# %% [markdown]
# ![cosines](out/26_cosines.png)
#
# Blue alone would crown $\mathbb E[z_i \mid y]$: nothing is nearer to all pictures than their mean. Orange says what is
# wrong with it: there is no picture just there. A draw commits itself, to *a* size, *a* place, *a* background, and so
# comes nearer to some true picture and farther from the others, just as a true picture does. On the left, that happens
# step by step. A decoder has to draw one picture, and needs an embedding that has made up its mind.
#
# ## The autoregressive prior (E31)
#
# The paper tries a second way: write the embedding as a word, and let a language model spell it. Letters are few and
# embeddings are 128 real numbers, so two things come first.
#
# *Fewer numbers.* The embeddings of pictures vary along few directions only. Principal components find them, and the
# rest is dropped. *Letters.* Each component is rounded to the nearest of 16 levels, its quantiles, so that each level
# is used about equally often. An alphabet of 16 letters has well-known signs, 0 to 9 and A to F.

# %%
if "autoregressive_prior" in SHIPPED:
    speller = AutoregressivePrior.load("autoregressive_prior")
else:
    speller = trained_here(AutoregressivePrior(AutoregressivePriorConfig(**small, components=8), Rng(12)))
components = PrincipalComponents.of(known)
explained = np.cumsum(components.variance) / components.variance.sum()
K, bins = speller.config.components, speller.config.bins
codes = speller.codebook.codes(truth, told.vector)
kept = cosine(speller.codebook.embeddings(codes), truth)
print(f"{K} components explain {explained[K - 1]:.2%} of the variance; with {bins} levels each, an embedding is a")
print(f"word of {K} letters, such as {''.join(f'{c:X}' for c in codes[0, 1:].tolist())}; ", end="")
print(f"read again, it is the embedding with a cosine of {kept.mean():.4f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
left.plot(np.arange(1, d + 1), explained, color=BLUE, lw=2)
left.axvline(K, color=RED, lw=1, ls="--")
left.text(K * 1.1, 0.3, f"{K} of {d}", color=RED)
left.set(xscale="log", xlabel="components", ylabel="variance explained", title="few directions matter", ylim=(0, 1.03))
values = (known - components.mean) @ components.directions[0]
right.hist(values, 60, color=GREY, alpha=0.6)
for level in speller.codebook.levels.data[1] if "autoregressive_prior" in SHIPPED else ():
    right.axvline(level * np.sign(speller.codebook.directions.data[0] @ components.directions[0]), color=RED, lw=0.5)
right.set(xlabel="first component", yticks=[], title=f"its {bins} levels: dense where embeddings are")
bare(left, right)
figure.tight_layout()
save(figure, "26_codes.png")

# %% [markdown]
# ![codes](out/26_codes.png)
#
# Then a causal transformer learns $p(c_k \mid y, c_0, \dots, c_{k-1})$, and draws letter by letter:
#
# $$p(z_i \mid y) = \prod_{k=1}^{K} p(c_k \mid y, c_0, c_1, \dots, c_{k-1}).$$
#
# The letter $c_0$ in front is special: it says how large $z_i \cdot z_t$ is. In training it is the pair's own, so the
# model learns what well fitting pictures look like and what badly fitting ones; when we draw, we *ask* for a good one,
# from the upper half. And there is a **temperature**: the logits are divided by it, and below 1 the likely letters
# become likelier.


# %%
def spread(z):
    """1 − the mean cosine of different draws for one caption, (n, B, d): how much they differ."""
    n = len(z)
    return 1 - np.mean(cosine(z.sum(axis=0), z.sum(axis=0)) - n) / (n * (n - 1))


temperatures = (0.25, 0.5, 1.0, 1.5)
few = told.taken(slice(0, 10 if QUICK else 60))
curve = [speller.candidates(few, Rng(13), t, n=4, empty=empty) for t in temperatures]
for t, z in zip(temperatures, curve, strict=True):
    print(f"temperature {t:4}: cosine with the picture {cosine(z, truth[: len(few)]).mean():.3f}, ", end="")
    print(f"spread of the draws {spread(z):.3f}, nearest real embedding {nearest(z).mean():.3f}")

# %% [markdown]
# Low temperatures play safe: a higher cosine, less spread. At 1 the model draws as it believes the data are.
#
# ## Two candidates, and the better one (E32)
#
# DALL-E 2 draws two embeddings and keeps the one with the larger dot product with $z_t$,
#
# $$z_i = \arg\max_{j=1,2}\; z_i^{(j)} \cdot z_t .$$
#
# Of course that makes $z_i\cdot z_t$ larger: it was chosen so. The question is whether the winner is also nearer to the
# *true* embedding, of which the choice knew nothing. Captions differ far more from each other than two candidates do,
# so we compare **in pairs**: for each caption the difference, and its mean beside its standard error.

# %%
some = told.taken(slice(0, 60))
pool = prior.candidates(some, Rng(14), how, n=2 if QUICK else 8, empty=empty)
counts = [c for c in (1, 2, 4, 8) if c <= len(pool)]
chosen = {c: most_aligned(pool[:c], some.vector) for c in counts}
change = paired_change(cosine(drawn[0], truth), cosine(most_aligned(drawn, told.vector), truth))
print(f"the better of two is nearer to the true embedding by {change.value:+.4f} ± {change.error:.4f}, ", end="")
print(f"p = {change.p:.1e} ({len(told)} captions)")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
first, second = cosine(drawn, told.vector)
left.scatter(first, second, s=12, color=BLUE, alpha=0.6, lw=0)
limits = [min(first.min(), second.min()) - 0.01, max(first.max(), second.max()) + 0.01]
left.plot(limits, limits, color=GREY, lw=1)
left.set(xlabel="first candidate's $z_i · z_t$", ylabel="second's", title="two draws for each caption", aspect="equal")
for values, color, label in (
    ([cosine(z, some.vector).mean() for z in chosen.values()], RED, "with $z_t$, by which it is chosen"),
    ([cosine(z, truth[: len(some)]).mean() for z in chosen.values()], BLUE, "with the true embedding"),
):
    right.plot(counts, np.array(values) - values[0], "o-", color=color, label=label)
right.axhline(0, color=GREY, lw=0.8)
right.set(xscale="log", xlabel="candidates", ylabel="gain in mean cosine", title="what more candidates bring")
right.set_xticks(counts, counts)
right.minorticks_off()
right.legend(frameon=False)
bare(left, right)
figure.tight_layout()
save(figure, "26_candidates.png")

# %% [markdown]
# ![candidates](out/26_candidates.png)
#
# ## Both priors
#
# Last, both on the same captions: how near they come to the truth; whether what they drew is *right*; and whether they
# vary as the data do. To tell what an embedding shows we fit linear readers, by least squares, to pictures of one
# thing: one for its shape, one for its colour, and so on. What they read of an embedding is a scene, and a scene fits a
# caption or does not. To compare how much draws vary we need a caption with many true pictures: the red star again.

# %%
single = Shapes(number=1)
world = single.scenes(Rng(16), 60 if QUICK else 2000)
NAMES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES, "background": BACKGROUNDS}


def for_readers(z):
    """The K components of embeddings (B, d), and a 1 for the bias: along the other directions is nothing to read."""
    return np.column_stack([(z - components.mean) @ components.directions[:K].T, np.ones(len(z))])


def one_hot(scene, kind):
    """Which of its names a scene has: 1 there, 0 elsewhere."""
    has = scene.background if kind == "background" else getattr(scene.items[0], kind)
    return [float(name == has) for name in NAMES[kind]]


pictured = for_readers(clip.image_embedding(to_signed(np.stack([draw(scene) for scene in world]))))
readers = {kind: np.linalg.lstsq(pictured, [one_hot(scene, kind) for scene in world])[0] for kind in NAMES}
asked, said = single.draw(Rng(17), 20 if QUICK else 200, "test")
single_told, single_truth = told_captions(clip, said), clip.image_embedding(to_signed(asked))


def right_share(z):
    """The share of the embeddings (B, d) that show all that the captions say."""
    read = {kind: [[*NAMES[kind]][k] for k in (for_readers(z) @ w).argmax(axis=1)] for kind, w in readers.items()}
    scenes = (
        Scene((Item(shape, colour, size, *PLACES[place]),), background)
        for shape, colour, size, place, background in zip(*read.values(), strict=True)
    )
    return np.mean([parse(caption).fits(scene) for caption, scene in zip(said, scenes, strict=True)])


results: dict[str, list[float]] = {}
ways = {"diffusion": (prior, how), "autoregressive": (speller, 1.0)}
for name, (model, way) in ways.items():
    pairs = drawn if model is prior else model.candidates(told, Rng(15), way, n=2, empty=empty)
    star = model.candidates(stars, Rng(19), way, empty=empty)[0]
    right = right_share(model.sample(single_told, Rng(20), way, empty=empty))
    results[name] = [cosine(most_aligned(pairs, told.vector), truth).mean(), right, spread(star[:, None])]
results["the text's $z_t$"] = [cosine(told.vector, truth).mean(), right_share(single_told.vector), 0.0]
results["the true pictures"] = [1.0, right_share(single_truth), spread(z_i[:, None])]

figure, axes = plt.subplots(1, 3, figsize=(12, 2.9), sharey=True)
titles = ("cosine with the truth", "shows what the caption says", "spread of 'a red star'")
for k, (axis, title) in enumerate(zip(axes, titles, strict=True)):
    values = [r[k] for r in results.values()]
    axis.barh(range(4), values, color=[BLUE, GREEN, RED, GREY])
    for row, value in enumerate(values):
        axis.text(value, row, f" {value:.0%}" if k == 1 else f" {value:.3f}", va="center", fontsize=9)
    axis.set(title=title, yticks=range(4), xlim=(0, 1.2 * max(values) + 1e-3), yticklabels=results)
    axis.invert_yaxis()
bare(*axes)
figure.tight_layout()
save(figure, "26_both.png")

# %% [markdown]
# ![both priors](out/26_both.png)
#
# The text's own embedding shows much of what the caption says, too, but nothing else: it never varies, and it lies
# where no picture is. Both priors draw where pictures are.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. An embedding has `K` letters of an alphabet of `bins`. How many bits does it take? (As 128 float32 it took 4,096.)
#    Write a function of K and bins.
# 2. Two independent candidates whose dot products have the distribution $N(m, s^2)$: what is the mean of the larger
#    one? Write a function of m and s. (The difference of the two is $N(0, 2s^2)$, and the larger one is their mean plus
#    half the absolute difference.)

# %%
bits, larger = None, None

if bits is not None:
    assert np.isclose(bits(13, 64), 13 * 6) and np.isclose(bits(3, 10), np.log2(1000))
    print("exercise 1 is right")
if larger is not None:
    two = Rng(21).normal((2, 1_000_000), np.float64) * 0.03 + 0.8
    assert abs(larger(0.8, 0.03) - two.max(axis=0).mean()) < 2e-4
    print("exercise 2 is right")
