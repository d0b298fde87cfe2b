# %% [markdown]
# # Lesson 21: cross-attention, or how a picture listens to a text
#
# A U-Net that draws what a text says must be told the text. Stable Diffusion lets every place of the image *look at*
# every word, and take from each what concerns it (**E27**):
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt d}\right) V,\qquad
# Q = W_Q\,\varphi(z_t),\quad K = W_K\,\tau_\theta(y),\quad V = W_V\,\tau_\theta(y).$$
#
# $\varphi(z_t)$ are the U-Net's features, one row a place; $\tau_\theta(y)$ are the states of the text's tokens, from
# CLIP's text tower. The softmax runs over the tokens: each place spreads one unit of attention over the words.
#
# You will see
# - the formula on one screen, and that it is what the layer computes;
# - which word each part of a picture listens to, as the picture is made;
# - what changes when one word of the prompt does.
#
# Run it from anywhere: `python lessons/21_cross_attention.py` takes half a minute and writes its pictures to
# `lessons/out/`.

# %%
import os
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, Tensor, no_grad
from tinydiff.diffusion import Sampling
from tinydiff.image import to_uint8
from tinydiff.models import StableDiffusion
from tinydiff.nn import CrossAttention
from tinydiff.nn.attention import watched

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)


def save(figure, name):
    """Write a figure."""
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## The formula
#
# Six places, four tokens, one head. The keys and values come from the text, the queries from the image; that is all
# that tells cross-attention from self-attention. A mask keeps padding out: its score is $-\infty$, its weight 0.

# %%
layer = CrossAttention(8, 5, Rng(0), heads=1)
places, tokens = Rng(1).normal((1, 6, 8)), Rng(2).normal((1, 4, 5))
mask = np.array([[True, True, True, False]])

Q, K, V = places @ layer.q.weight.data, tokens @ layer.k.weight.data, tokens @ layer.v.weight.data
scores = np.where(mask[:, None, :], Q @ K.transpose(0, 2, 1) / np.sqrt(8), -np.inf)
weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
by_hand = weights @ V @ layer.out.weight.data + layer.out.bias.data

with no_grad():
    by_layer = layer(Tensor(places), Tensor(tokens), mask).data
assert np.allclose(by_hand, by_layer, atol=1e-5)
print("how much each of six places listens to each of three tokens, and to the padding:")
print(weights[0].round(2))

# %% [markdown]
# ## Which word each place listens to
#
# The shipped model draws a prompt, and every layer's weights are kept as it runs. There are 64 latents, 8 x 8, in the
# finest level. For each token, the mean over the layers there, the heads and the second half of the steps is an 8 x 8
# picture: who listened to it.

# %%
model = StableDiffusion.load()
STEPS = 4 if QUICK else 30
PROMPT = "a big red circle above a small green star on a white background"


def drawn(prompt, seed=0):
    """A picture of a prompt, without guidance, and how much each place listened to each token, (8, 8, M)."""
    height, width = model.unet.config.size
    with watched(model.unet) as seen:
        *_, z_0 = model.text_to_image([prompt], Rng(seed), Sampling(steps=STEPS), guidance=1.0)
    finest = [w for w in seen if w.shape[2] == height * width]
    late = np.stack(finest[len(finest) // 2 :])  # (layers and steps, 1, heads, places, tokens)
    return model.decode(z_0)[0], late.mean(axis=(0, 1, 2)).reshape(height, width, -1)


def words_of(prompt):
    """The tokens of a prompt as text."""
    return [model.clip.tokenizer.decode([token]).strip() for token in model.clip.tokenizer.encode(prompt)]


picture, maps = drawn(PROMPT)
words = words_of(PROMPT)
figure, axes = plt.subplots(3, 6, figsize=(9.5, 5.2), layout="constrained")
for axis in axes.flat:
    axis.axis("off")
axes.flat[0].imshow(to_uint8(picture))
axes.flat[0].set_title("drawn", fontsize=9)
for axis, word, i in zip(axes.flat[1:], words, range(1, 1 + len(words)), strict=False):  # token 0 is the start
    axis.imshow(to_uint8(picture).mean(axis=2), cmap="gray", alpha=0.35, extent=(0, 8, 8, 0))
    axis.imshow(maps[..., i], cmap="magma", alpha=0.75, interpolation="bicubic", extent=(0, 8, 8, 0))
    axis.set_title(word, fontsize=9)
save(figure, "21_words.png")

# %% [markdown]
# ![maps of each word](out/21_words.png)
#
# Bright places listen to the word. Do not expect every map to be the outline of its thing: the text tower is causal, so
# that the state of *star* has heard *small green* as well, and the relation before it. What a word says may have been
# carried on to a later token, and the last one has heard everything.
#
# ## One word changed
#
# The same noise, one word different. What does not depend on the word stays where it was.

# %%
prompts = [PROMPT, PROMPT.replace("red", "blue"), PROMPT.replace("star", "cross"), PROMPT.replace("above", "below")]
results = [drawn(prompt)[0] for prompt in prompts]
figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.8), layout="constrained")
for axis, prompt, result in zip(axes, prompts, results, strict=True):
    axis.imshow(to_uint8(result))
    before, after = prompt.split(" a small ")
    axis.set_title(f"{before}\na small {after}", fontsize=7)
    axis.axis("off")
save(figure, "21_one_word.png")
assert all((results[0] != other).any() for other in results[1:])

# %% [markdown]
# ![one word changed](out/21_one_word.png)
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. A place of the image spreads one unit of attention over the tokens that are not padding. If all scores are equal
#    and there are 14 such tokens, what is each weight?
# 2. The U-Net looks at M tokens from 8 x 8 places with 4 heads. How many weights has one layer, for one picture and
#    M = 32?

# %%
each_weight = None
number_of_weights = None

if each_weight is not None:
    assert abs(each_weight - 1 / 14) < 1e-9, "the weights of a place sum to 1, and are all alike"
    print("1 is right")
if number_of_weights is not None:
    assert number_of_weights == 4 * 64 * 32, "one for each head, place and token"
    print("2 is right")
