# %% [markdown]
# # Lesson 15: audio, or diffusion on sound
#
# Nothing in the equations says *image*. This lesson runs the same forward process, the same loss and the same samplers
# on sound, with another network: DiffWave (Kong et al. 2021), which works on the bare samples of a wave.
#
# You will see
# - what a **wave** and a **spectrogram** are, on notes that the package plays itself;
# - why the network needs **dilated convolutions**, and how far they see;
# - **E4 and E5** on a wave: what noise does to a note, and a schedule that stops too early;
# - **E38**: samples of a trained DiffWave, told which note to play;
# - **a check that needs no ear**: does a pitch detector hear the note that was asked for? And in how few steps?
#
# Run it from anywhere: `python lessons/15_audio.py` takes less than a minute and writes its pictures to `lessons/out/`.

# %%
import os
import pathlib
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinydiff import Rng, no_grad, optim
from tinydiff.data import audio, spectrum
from tinydiff.diffusion import Sampling, Schedule, last, q_sample
from tinydiff.models import DiffWave, DiffWaveConfig

QUICK = "TINYDIFF_QUICK" in os.environ
OUT = pathlib.Path(__file__).resolve().parent / "out"
OUT.mkdir(exist_ok=True)
BLUE, RED, GREY = "#1f5fa8", "#c8401f", "#777777"
RATE, LENGTH = 8000, 2048  # samples a second, and in a clip: 0.26 s


def save(figure, name):
    figure.savefig(OUT / name, dpi=130)
    plt.close(figure)


# %% [markdown]
# ## A wave and its spectrogram
#
# A sound is the pressure of the air, measured 8,000 times a second: one number a sample, in $[-1, 1]$. A note is a wave
# that repeats, 440 times a second for A4. It is a sum of **harmonics**, sines at $f, 2f, 3f, \dots$; how loud each one
# is makes the instrument.
#
# `audio.notes` plays such notes, out of tune by a few cents, with vibrato and a little noise, on mixtures of four
# instruments. The **spectrogram** below each wave says how strong each frequency is (upwards) at each time (to the
# right). The harmonics are its horizontal lines, as far apart as the pitch is high.

# %%
clips = audio.notes(2 if QUICK else 60, LENGTH, Rng(0), rate=RATE)
print(f"{len(clips)} clips {clips.waves.shape}, {len(clips.class_names)} notes from {clips.class_names[0]}")
shown = ["C4", "F4", "A4"]
examples = [clips.waves[np.flatnonzero(clips.labels == clips.class_names.index(n))[i]] for n in shown for i in (0, 1)]
spectrum.pictures(OUT / "15_notes.png", examples, [n for n in shown for _ in (0, 1)], RATE)

# %% [markdown]
# ![notes](out/15_notes.png)
#
# ## How far a network sees
#
# One period of C4 is 31 samples long, and to tell C4 from C#4, 6 % higher, one has to hear many periods. A convolution
# with three taps sees 3 samples; ten of them, one after the other, see 21. DiffWave spreads the taps of its layers:
#
# $$y_i = \sum_{u=-1}^{1} W_u\, x_{i + d u}, \qquad d = 1, 2, 4, 8, \dots$$
#
# Each layer doubles the **dilation** $d$, so that ten layers see $1 + 2\,(1 + 2 + \dots + 512) = 2047$ samples, for the
# same number of weights. Unlike in a recurrent network, all samples are computed at once; unlike in WaveNet, which
# speaks one sample after the other, the taps look both ways, because the denoiser has the whole noisy wave before it.
#
# Here is the receptive field of one output of a network with four layers: all places that it can be reached from.


# %%
def reached(dilations, width):
    """The places that each layer reads, from the output in the middle down to the input."""
    places = [{width // 2}]
    for d in reversed(dilations):
        places.append({p + d * u for p in places[-1] for u in (-1, 0, 1)})
    return places


figure, axes = plt.subplots(1, 2, figsize=(11, 2.9), sharey=True)
for axis, dilations, name in [(axes[0], [1, 1, 1, 1], "d = 1, 1, 1, 1"), (axes[1], [1, 2, 4, 8], "d = 1, 2, 4, 8")]:
    places = reached(dilations, 35)
    for level, (above, d) in enumerate(zip(places, reversed(dilations), strict=False)):
        for p in above:
            for u in (-1, 0, 1):
                axis.plot([p, p + d * u], [4 - level, 3 - level], color=BLUE, lw=0.6, alpha=0.6)
    for level, row in enumerate(places):
        axis.scatter(range(35), [4 - level] * 35, s=9, color="#dddddd", zorder=2)
        axis.scatter(sorted(row), [4 - level] * len(row), s=11, color=BLUE, zorder=3)
    axis.set(title=f"{name}: sees {len(places[-1])} samples", xticks=[], yticks=[0, 4], yticklabels=["input", "output"])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
figure.tight_layout()
save(figure, "15_receptive_field.png")

config = DiffWaveConfig(length=LENGTH, rate=RATE, class_names=clips.class_names)
print(f"dilations {config.dilations}, on patches of {config.patch} samples: sees {config.receptive_field} samples")
assert config.receptive_field == config.patch * (1 + 2 * sum(config.dilations))

# %% [markdown]
# ![receptive field](out/15_receptive_field.png)
#
# To train within minutes on a CPU, the package's network takes eight samples at a time, as one place with eight
# channels (`patch=8`), and goes through the dilations 1 to 32 twice. `patch=1` is the paper's.
#
# ## Noise on a note (E4, E5)
#
# $$x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon$$
#
# is one line of code for a wave as for an image. White noise is equally strong at all frequencies, so the weak, high
# harmonics drown first and the strong, low ones last. The reverse process will make a sound in the opposite order:
# first the pitch, then the timbre.

# %%
schedule = Schedule.cosine(200)
x_0 = examples[4:5]  # an A4
times = [0, 20, 60, 100, 140, 200]
eps = Rng(1).normal((1, LENGTH))
noisy = [q_sample(np.stack(x_0), t, eps, schedule)[0] for t in times]
spectrum.pictures(OUT / "15_forward.png", noisy, [f"t = {t}" for t in times], RATE)

# %% [markdown]
# ![forward](out/15_forward.png)
#
# DiffWave's own schedule for its vocoder takes $T = 50$ steps with $\beta_t$ up to 0.05. Look at what `Schedule` says
# of it:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    own = Schedule.from_betas(np.linspace(1e-4, 0.05, 50))
print(f"DiffWave's T = 50: alpha_bar_T = {own.alpha_bar[-1]:.2f}. {caught[0].message}")
assert own.alpha_bar[-1] > 0.25 and schedule.alpha_bar[-1] < 1e-4

# %% [markdown]
# Its $x_T$ still holds half of the amplitude of the sound, $\sqrt{0.28} = 0.53$, while sampling starts from pure noise
# (**E5**). A vocoder can afford that, for a spectrogram tells it what to play. A model that is told nothing, or only a
# note, must begin where it was trained to begin, so we use the cosine schedule down to $\bar\alpha_T \approx 0$.
#
# ## The network, trained (E38, E18)
#
# Each residual layer adds what it is told of the time $t$ to its input, convolves, adds what it is told of the note,
# and lets half of the channels gate the other half:
#
# $$z = \tanh(a) \odot \sigma(b), \qquad [a, b] = \mathrm{conv}_d(h + W_t\,\mathrm{emb}(t)) + W_y\,\mathrm{emb}(y)$$
#
# $$h \leftarrow (h + W_r z)/\sqrt2, \qquad \mathrm{output} = f\Big(\tfrac1{\sqrt N}\sum_{\mathrm{layers}} W_s z\Big)$$
#
# Training is Algorithm 1, unchanged: a batch of clips, for each a $t$ and an $\varepsilon$ (drawn inside `loss`), and a
# gradient step. Here are its first steps. The package brings along the weights that `examples/train_diffwave.py`
# reaches after some thousands, and the rest of the lesson uses those.

# %%
beginner, losses = DiffWave(config, Rng(2)), []
adam, steps = optim.Adam(beginner.parameters()), 2 if QUICK else 80
for step in range(steps):
    rng = Rng(3).at(step)
    some = rng.at(0).integers(0, len(clips), (16,))
    loss = beginner.loss(clips.waves[some], rng.at(1), clips.labels[some])
    loss.backward()
    adam.step(lr=optim.warmup_cosine(step + 1, steps, peak=5e-3, warmup=20), max_norm=1.0)
    losses.append(loss.item())
model = DiffWave.load("notes")
names = model.config.class_names
with no_grad():
    many = np.arange(64) % len(clips)
    trained_loss = model.loss(clips.waves[many], Rng(4), clips.labels[many]).item()
print(f"loss: {losses[0]:.3f} at first, {np.mean(losses[-20:]):.3f} after {steps} steps, {trained_loss:.3f} trained")
print(f"{model.count_parameters():,} parameters")
assert trained_loss < np.mean(losses[-20:])

# %% [markdown]
# ## From noise to a note
#
# The same generator that yields the states of an image yields those of a wave. Below is one A4 on its way, by DDIM in
# 50 steps, and then six samples of different notes.

# %%
a4 = names.index("A4")
states = list(model.sample(1, Rng(4), Sampling(steps=10 if QUICK else 50), label=a4))
stops = np.linspace(0, len(states) - 1, 6).astype(int)
spectrum.pictures(OUT / "15_reverse.png", [states[i][0] for i in stops], [f"after {i} steps" for i in stops], RATE)
labels = np.arange(0, len(names), 2)
drawn = last(model.sample(len(labels), Rng(5), Sampling(steps=5 if QUICK else 50), label=labels))
spectrum.pictures(OUT / "15_samples.png", list(drawn), [names[i] for i in labels], RATE)
if not QUICK:
    for note, wave in zip(labels, drawn, strict=True):
        audio.write_wav(OUT / f"15_{names[note].replace('#', 's')}.wav", wave, RATE)

# %% [markdown]
# ![reverse](out/15_reverse.png)
# ![samples](out/15_samples.png)
#
# The samples are also in `lessons/out/15_*.wav`: listen to them.
#
# ## A check without ears
#
# `spectrum.pitch` finds the shortest time after which a wave looks like itself. On real notes it is right, so on
# samples it can be the judge: was the note that we asked for played? And, as one asks of any sampler, in how few steps?

# %%
frequencies = [audio.frequency(name) for name in names]


def share_right(waves, labels):
    """The share of waves whose nearest note is the one that was asked for."""
    return float((spectrum.nearest(spectrum.pitch(waves, RATE), frequencies) == labels).mean())


asked = np.arange(len(names)).repeat(1 if QUICK else 4)
real = audio.notes(2 if QUICK else 10, LENGTH, Rng(6), rate=RATE)
steps_tried = [2, 4] if QUICK else [1, 2, 4, 6, 10, 20, 50]
shares = {
    s: share_right(last(model.sample(len(asked), Rng(7), Sampling(steps=s), label=asked)), asked) for s in steps_tried
}
real_share = share_right(real.waves, real.labels)
print(f"real notes: {real_share:.1%} right;", ", ".join(f"{s} steps: {share:.0%}" for s, share in shares.items()))
assert real_share > 0.99
if not QUICK:
    assert shares[50] > 0.8

figure, axis = plt.subplots(figsize=(6, 3.2))
axis.axhline(100 * real_share, color=GREY, ls="--", lw=1, label="real notes")
axis.axhline(100 / len(names), color=RED, ls=":", lw=1, label="chance")
axis.plot(list(shares), [100 * share for share in shares.values()], "o-", color=BLUE, label=f"{len(asked)} samples")
axis.set(xscale="log", xlabel="steps of DDIM", ylabel="% with the right pitch", ylim=(0, 105))
axis.set_xticks(list(shares), list(shares))
axis.minorticks_off()
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
save(figure, "15_pitch.png")

# %% [markdown]
# ![pitch](out/15_pitch.png)
#
# In a single step the network can only give the mean of all waves of that note. Their phases differ, so they cancel,
# and there is no pitch left to detect.
#
# ## A vocoder
#
# What made DiffWave known is not notes but speech: a text-to-speech system gives a **mel spectrogram**, which is coarse
# and has no phases, and DiffWave gives the wave that belongs to it. The only change is what the layers are told: the
# spectrogram's frames, stretched to the length of the wave, instead of a note. Train one with
#
#     python examples/train_diffwave.py --condition mel
#     python examples/sample_audio.py runs/diffwave --mel-of some.wav
#
# After its 3,000 steps, twenty minutes of one core, all of 24 new notes came back with their pitch, and their mel
# spectrograms were 7.2 dB off on average (in 50 steps of DDIM; 8.5 dB in 10). Those of another note are 11.4 dB off,
# those of noise as loud 23.5 dB.

# %%
mel = spectrum.Mel(RATE)
figure, axes = plt.subplots(1, 2, figsize=(9, 2.9))
spectrum.draw_spectrogram(axes[0], examples[2], RATE)
axes[0].set_title("spectrogram of an F4: 129 frequencies", fontsize=10)
axes[1].imshow(mel(examples[2]).T, origin="lower", aspect="auto", cmap="magma")
axes[1].set(xlabel="frame", ylabel="band")
axes[1].set_title(f"what a vocoder is told: {mel.bands} bands, {LENGTH // mel.hop} frames", fontsize=10)
figure.tight_layout()
save(figure, "15_mel.png")
print(f"{LENGTH} samples become {LENGTH // mel.hop * mel.bands} numbers, without phases")

# %% [markdown]
# ![mel](out/15_mel.png)
#
# ## Exercises
#
# Put your answer in place of `None` and run the lesson again; it checks what you wrote.
#
# 1. How many layers with three taps, dilations 1, 2, 4, ... without repeating, are needed to see one second at 16 kHz,
#    with `patch=1`? And how many without dilation?
# 2. How many periods of B4 (494 Hz), rounded, lie in a clip of this lesson?

# %%
dilated_layers, plain_layers = None, None
periods = None

if dilated_layers is not None:
    assert 1 + 2 * (2**dilated_layers - 1) >= 16000 > 1 + 2 * (2 ** (dilated_layers - 1) - 1)
    assert 1 + 2 * plain_layers >= 16000 > 1 + 2 * (plain_layers - 1)
    print("exercise 1 is right")
if periods is not None:
    assert periods == round(audio.frequency("B4") * LENGTH / RATE)
    print("exercise 2 is right")
