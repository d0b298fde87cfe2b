# %% [markdown]
# # Lesson 27: the decoder, or a picture of an embedding
#
# Lesson 26 drew embeddings of pictures for a caption. Now the second half of DALL-E 2: a diffusion model that draws a
# picture *of* an embedding. The paper calls the whole *unCLIP*: CLIP turns a picture into an embedding, and the decoder
# turns it back.
#
# You will see
# - **E33**, how the decoder is told an embedding and a caption, and how it learns to do without either;
# - what the embedding says of a picture, and what the caption adds;
# - **E29**, the whole chain in three lines;
# - what the prior is good for: the same decoder told the text's embedding, or the caption alone.
#
# Run it from anywhere: `python lessons/27_decoder.py` takes about a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng
from tinydiff.data.captioned import Shapes
from tinydiff.data.shape_captions import parse
from tinydiff.diffusion import Sampling, last
from tinydiff.image import grid, to_signed
from tinydiff.metrics import diversity
from tinydiff.models import DallE2, SceneReader
from tinydiff.models.scene_reader import agreement

QUICK = "TINYDIFF_QUICK" in os.environ  # fewer pictures and steps, for the tests
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
HOW, CANDIDATES = Sampling("dpm", 2 if QUICK else 12), 1 if QUICK else 2
model, reader = DallE2.load(upsamplers=()), SceneReader.load("scene_reader")  # small pictures will do here


def show(name, rows, titles):
    """Draw rows of pictures, each with a title to its left."""
    sheet = grid(np.concatenate(rows), columns=len(rows[0]))
    figure, axis = plt.subplots(figsize=(0.03 * sheet.shape[1] + 2.6, 0.03 * sheet.shape[0]), layout="constrained")
    axis.imshow(sheet)
    axis.set_yticks(34 * np.arange(len(rows)) + 16, [textwrap.fill(title, 28) for title in titles], fontsize=8)
    axis.set(xticks=[])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## How the decoder is told (E33)
#
# The network is that of lesson 21, a U-Net that attends to a text. The embedding $z_i$ enters twice: added to the
# embedding of the time $t$, where it reaches every layer at every place; and as a few more tokens of context, where
# each place may look for what it needs:
#
# $$\varepsilon_\theta(x_t, t, z_i, y)\,:\qquad
#   \text{time} \leftarrow e(t) + W z_i, \qquad
#   \text{context} \leftarrow [\tau_\theta(y),\; W_1 z_i, \ldots, W_4 z_i].$$
#
# In training $z_i$ is set to 0 in 10 % of the pictures and the caption is left out in 50 %, each by its own throw of a
# coin. So one network is four: told both, one of them, or nothing. The last is what guidance (**E35**) moves away from.
#
# Here are pictures that the training never saw, and what is drawn of what CLIP says of them.

# %%
N, SHOWN = (3, 3) if QUICK else (30, 8)
pixels, captions = Shapes().draw(Rng(1), N, "test")
x = to_signed(pixels)
z_i = model.image_embedding(x)

drawn = {
    "of z_i and the caption": model.pictures(last(model.draw(z_i, captions, Rng(2), HOW))),
    "of z_i alone": model.pictures(last(model.draw(z_i, "", Rng(2), HOW))),
    "of the caption alone": model.pictures(last(model.draw(None, captions, Rng(2), HOW))),
}
show("27_told.png", [x[:SHOWN], *(pictures[:SHOWN] for pictures in drawn.values())], ["pictures", *drawn])

scenes = reader.read(x)
print(f"{'of ' + str(N) + ' pictures, drawn':28}   same things   same places   as the caption says")
fits = {}
for name, pictures in drawn.items():
    read = reader.read(pictures)
    same = agreement(read, scenes)
    fits[name] = np.mean([parse(caption).fits(scene) for caption, scene in zip(captions, read, strict=True)])
    print(f"  {name:26}   {same['things']:11.0%}   {same['place']:11.0%}   {fits[name]:19.0%}")

# %% [markdown]
# ![what is told](out/27_told.png)
#
# $z_i$ alone brings back what the picture shows: 128 numbers say which things there are, in which colours, and, with
# this CLIP, whose captions speak of places, about where. What no caption ever speaks of need not be in $z_i$, and is
# drawn anew: the last pixel of a place, the tilt of a corner, which of two greys is on top. Of two things the small
# network mixes up much: shapes of small things blur, and which of two has which colour CLIP itself does not know well.
#
# The caption alone hardly tells this decoder anything. It was told a caption without an embedding in 5 % of its
# training (half of the 10 %), and with an embedding a caption adds so little that it learned not to listen. The paper's
# decoder saw 650 million pictures, and of these, too, in 5 % no more than a caption.
#
# ## The whole (E29)
#
# $$p(x \mid y) = p(x \mid z_i, y)\; p(z_i \mid y)$$
#
# It holds because $z_i$ is a function of $x$: to name the picture is to name its embedding too. Read from right to left
# it is a program, `DallE2.text_to_image`:

# %%
y = ["a red star", "a big thing"]
embeddings = model.embed(y, Rng(3), CANDIDATES)  # z_i ~ p(z_i | y): the prior, the better of two candidates
states = model.draw(embeddings, y, Rng(4), HOW)  # x ~ p(x | z_i, y): the decoder
pictures = model.pictures(last(states))
assert embeddings.shape == (2, model.clip.config.embedding)

# %% [markdown]
# ## With the prior, and without
#
# Is the prior worth its trouble? The decoder takes anything for $z_i$. The deck shows three ways to ask it for the
# same caption:
#
# - **the prior's** $z_i$, an embedding as pictures have them, another one each time;
# - **the text's** $z_t$, which CLIP was trained to put near that of its picture;
# - **no embedding**, the caption alone, which the decoder has seen in training.

# %%
prompts = ["a red star", "a blue circle", "a big thing", "a small thing on black"][: 2 if QUICK else 4]
K = 2 if QUICK else 8
y = [prompt for prompt in prompts for _ in range(K)]
ways = {
    "the prior's z_i": model.embed(y, Rng(5), CANDIDATES),
    "the text's z_t": model.text_embedding(y),
    "the caption alone": None,
}
rows, titles = [], []
for name, z in ways.items():
    pictures = model.pictures(last(model.draw(z, y, Rng(6), HOW)))
    right = np.mean([parse(prompt).fits(scene) for prompt, scene in zip(y, reader.read(pictures), strict=True)])
    spread = diversity(pictures.reshape(len(prompts), K, -1))
    print(
        f"  {name:18} as the caption says {right:4.0%}, two pictures differ by {spread.value:.3f} ± {spread.error:.3f}"
    )
    rows += [pictures[:K], pictures[K : 2 * K]]
    titles += [f"{prompt}: {name}" for prompt in prompts[:2]]
show("27_prior.png", rows, titles)

# %% [markdown]
# ![with the prior and without](out/27_prior.png)
#
# $z_t$ is one vector for all pictures of a caption, and no picture's (lesson 26): told it, the decoder is told
# something that it never saw in training, and the same thing each time; only the noise is left to make pictures differ.
# `python examples/evaluate_text_to_image.py --model dalle2` measures it on 500 prompts of each kind, and with
# `--no-prior text` and `--no-prior caption` the two other ways.
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. In which share of the training pictures is the decoder told nothing at all?
# 2. CLIP pads a caption to 28 tokens. How many tokens of context does this decoder attend to?

# %%
told_nothing = None
tokens = None

if told_nothing is not None:
    assert abs(told_nothing - 0.1 * 0.5) < 1e-9, "each is left out on its own"
    print("1 is right")
if tokens is not None:
    assert tokens == model.clip.config.length + model.decoder.config.tokens, "those of the embedding come after"
    print("2 is right")
