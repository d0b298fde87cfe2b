"""DiffWave (E38): the paper's figure 2, Algorithm 1's loss, and conditions that go where they should."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn.reference import linear, part, silu, sinusoidal
from tinydiff import Rng, Tensor, backend, checkpoint
from tinydiff.checkpoint import CheckpointError
from tinydiff.data import audio
from tinydiff.data.spectrum import Mel
from tinydiff.diffusion import Sampling
from tinydiff.models import DiffWave, DiffWaveConfig
from tinydiff.train import Training, TrainSettings, train

PLAIN = DiffWaveConfig(length=48, channels=4, layers=3, cycle=2, patch=2, embedding=6, T=20)
LABELLED = dataclasses.replace(PLAIN, class_names=("a", "b", "c"))
VOCODER = dataclasses.replace(PLAIN, mel=Mel(window=16, hop=8, bands=5))
BOTH = dataclasses.replace(VOCODER, class_names=("a", "b", "c"))


def awake(config, dtype=np.float32):
    """A model with no weights left at the zeros that some start from."""
    model = DiffWave(config, Rng(0))
    for i, p in enumerate(model.parameters().values()):
        p[...] = p.data + backend.to_device(0.1 * np.random.default_rng(i).normal(size=p.shape).astype(np.float32))
    return model.to(dtype)


def stubbed(config, answer=lambda x, t, label, mel: 0.0 * x):
    """A model whose network gives what it is told and remembers what it was asked."""

    class Stub(DiffWave):
        def __call__(self, x_t, t, label=None, mel=None):
            self.asked.append(tuple(None if a is None else backend.to_numpy(a) for a in (x_t, t, label, mel)))
            return Tensor(answer(x_t, t, label, mel))

    model = Stub(config, Rng(0))
    model.asked = []
    return model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def network(x, t, w, config, label=None, mel=None):
    """The network sample by sample: NumPy in float64, loops over places and taps, no tinydiff."""
    C, (B, L) = config.channels, x.shape
    places = L // config.patch
    emb = silu(linear(silu(linear(sinusoidal(t, config.embedding), part(w, "time.inner"))), part(w, "time.outer")))
    h = np.maximum(linear(x.reshape(B, places, config.patch), part(w, "conv_in")), 0)
    if config.class_names:
        y = w["label.weight"][np.asarray(label) + 1]
    if config.mel:
        frames = silu(dilated(mel, part(w, "mel.frames"), 1))
        features = silu(linear(frames, part(w, "mel.spread")).reshape(B, places, C))
    total = 0
    for i in range(config.layers):
        layer = part(w, f"layers.{i}")
        a = dilated(h + linear(emb, part(layer, "time"))[:, None], part(layer, "conv"), 2 ** (i % config.cycle))
        if config.class_names:
            a = a + (y @ layer["label.weight"])[:, None]
        if config.mel:
            a = a + features @ layer["mel.weight"]
        out = linear(np.tanh(a[..., :C]) * sigmoid(a[..., C:]), part(layer, "out"))
        h, total = (h + out[..., :C]) / np.sqrt(2), total + out[..., C:]
    h = np.maximum(linear(total / np.sqrt(config.layers), part(w, "conv_skip")), 0)
    return linear(h, part(w, "conv_out")).reshape(B, L)


def dilated(x, w, dilation):
    """Three taps around each place, zeros outside."""
    y = np.zeros((*x.shape[:2], w["weight"].shape[2])) + w["bias"]
    for i in range(x.shape[1]):
        for tap in (-1, 0, 1):
            if 0 <= i + tap * dilation < x.shape[1]:
                y[:, i] += x[:, i + tap * dilation] @ w["weight"][tap + 1]
    return y


@pytest.mark.parametrize("config", [PLAIN, LABELLED, VOCODER, BOTH], ids=["plain", "labelled", "vocoder", "both"])
@pytest.mark.parametrize("length", [48, 80])
def test_the_network_is_the_papers(config, length, device):
    model, rng = awake(config, np.float64), np.random.default_rng(1)
    x, t = rng.normal(size=(3, length)), np.array([1, 7, 20])
    label = np.array([0, -1, 2]) if config.class_names else None
    mel = rng.normal(size=(3, length // 8, 5)) if config.mel else None
    told = (None if a is None else backend.to_device(a) for a in (label, mel))
    y = model(backend.to_device(x), backend.to_device(t), *told)
    assert_close(y, network(x, t, model.state_dict(), config, label, mel), rtol=1e-12)


def test_it_sees_as_far_as_it_says():
    """An output moves with the inputs of its receptive field, and with no others."""
    config = dataclasses.replace(PLAIN, channels=16, patch=1)
    model, x, t = awake(config, np.float64), np.random.default_rng(0).normal(size=(1, 48)), np.array([5])
    assert config.dilations == [1, 2, 1] and config.receptive_field == 9
    moved = np.repeat(x, 48, axis=0) + np.eye(48)  # each another sample
    change = model(moved, np.repeat(t, 48)).numpy()[:, 24] - model(x, t).numpy()[0, 24]
    assert np.flatnonzero(np.abs(change) > 1e-12).tolist() == list(range(20, 29))
    assert dataclasses.replace(PLAIN, patch=4, layers=4).receptive_field == 4 * (1 + 2 * (1 + 2 + 1 + 2))


def test_it_starts_by_giving_zero():
    assert not DiffWave(BOTH, Rng(0))(np.ones((1, 48), np.float32), np.array([1]), mel=np.ones((1, 6, 5))).data.any()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_loss_is_algorithm_1(schedule, target):
    """Of a network that gives 0 the loss is the mean square of the target, found again from what the network saw."""
    model = stubbed(dataclasses.replace(PLAIN, schedule=schedule, target=target))
    x_0 = Rng(1).uniform((2000, 48)) * 2 - 1
    loss = model.loss(x_0, Rng(2)).item()
    [(x_t, t, label, mel)] = model.asked
    assert label is None and mel is None and t.min() == 1 and t.max() == 20
    assert np.bincount(t)[1:].max() < 100 + 5 * 100**0.5
    if schedule == "linear":
        bar = np.cumprod(1 - np.concatenate([[0], np.linspace(5e-3, 1, 20).clip(max=0.999)]))[t, None]
    else:
        f = np.cos((np.arange(21) / 20 + 0.008) / 1.008 * np.pi / 2) ** 2
        bar = np.cumprod(np.append(1, 1 - (1 - f[1:] / f[:-1]).clip(max=0.999)))[t, None]
    eps = (x_t - bar**0.5 * x_0) / (1 - bar) ** 0.5
    assert abs(eps.std() - 1) < 0.01
    wanted = {"eps": eps, "x0": x_0, "v": bar**0.5 * eps - (1 - bar) ** 0.5 * x_0}[target]
    assert loss == pytest.approx((wanted**2).mean(), rel=1e-3)


def test_what_is_told_in_training(device):
    """Labels, a tenth of them hidden, and the mel spectrograms as they are."""
    model, n = stubbed(BOTH), 3000
    label, mel = np.arange(n) % 3, np.random.default_rng(0).normal(size=(n, 6, 5)).astype(np.float32)
    x_0 = backend.to_device(np.zeros((n, 48), np.float32))
    drawn = model.draw(x_0, Rng(1), label, mel)
    assert {backend.device_of(a) for a in drawn} == {backend.device()}
    assert model.loss_of(*drawn).item() == model.loss(x_0, Rng(1), label, mel).item()
    seen = model.asked[0]
    hidden = seen[2] == -1
    assert abs(hidden.mean() - 0.1) < 0.03 and np.array_equal(seen[2][~hidden], label[~hidden])
    assert np.array_equal(seen[3], mel)


@pytest.mark.filterwarnings("ignore:network runs without a CUDA graph")  # this one looks at t on the host
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", None), ("ddim", 6), ("ddpm", None), ("dpm", 6)])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_a_network_that_knows_the_sound_draws_it(sampler, steps, target, device):
    config = dataclasses.replace(PLAIN, target=target)
    sound = 0.9 * np.sin(np.arange(48))
    bar = DiffWave(config, Rng(0)).schedule.alpha_bar

    def answer(x, t, label, mel):
        x, a = backend.to_numpy(x), bar[backend.to_numpy(t)][:, None]
        eps = (x - a**0.5 * sound) / (1 - a) ** 0.5
        right = {"eps": eps, "x0": sound + 0 * eps, "v": a**0.5 * eps - (1 - a) ** 0.5 * sound}[target]
        return backend.to_device(right.astype(np.float32))

    model = stubbed(config, answer)
    states = list(model.sample(3, Rng(6), Sampling(sampler, steps)))
    assert len(states) == (steps or 20) + 1
    assert backend.to_numpy(states[0]).std() > 0.8
    assert_close(states[-1], np.tile(sound, (3, 1)).astype(np.float32), atol=1e-2 if target == "eps" else 1e-4)


def test_labels_and_spectrograms_asked_for():
    model, mel = stubbed(BOTH), np.random.default_rng(0).normal(size=(4, 9, 5)).astype(np.float32)
    for asked, seen in ((2, [2] * 4), (np.array([0, 1, 2, 1]), [0, 1, 2, 1])):
        *_, x_0 = model.sample(4, Rng(0), Sampling(steps=2), label=asked, mel=mel)
        assert x_0.shape == (4, 72)  # as long as the spectrogram
        assert all(np.array_equal(a[2], seen) and np.array_equal(a[3], mel) for a in model.asked[-2:])
    model = stubbed(LABELLED)
    list(model.sample(3000, Rng(0), Sampling(steps=1)))
    counts = np.bincount(model.asked[0][2], minlength=3)
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5


def test_guidance_moves_from_the_unlabelled_to_the_labelled_answer():
    """E35 in x_0: 0.1 without the label, 0.3 with it, 0.5 at s = 2."""
    config = dataclasses.replace(LABELLED, target="x0")
    model = stubbed(config, lambda x, t, label, mel: x * 0 + np.float32(0.1 if label is None else 0.3))
    for s, expected in ((0.0, 0.1), (1.0, 0.3), (2.0, 0.5)):
        *_, x_0 = model.sample(2, Rng(0), Sampling(steps=4), guidance=s, label=1)
        assert_close(x_0, np.full((2, 48), expected, np.float32), atol=1e-5)


@pytest.mark.parametrize("config", [LABELLED, VOCODER])
def test_conditions_matter_and_one_seed_is_one_sound(config, device):
    def drawn(label, level, sampler="ddim"):
        told = {"label": label} if config.class_names else {"mel": np.full((2, 6, 5), level, np.float32)}
        return backend.to_numpy([*model.sample(2, Rng(2), Sampling(sampler, 3), **told)][-1])

    model = awake(config)
    assert np.array_equal(drawn(0, 0.0), drawn(0, 0.0)) and not np.array_equal(drawn(0, 0.0), drawn(1, 0.5))
    assert not np.array_equal(drawn(0, 0.0), drawn(0, 0.0, sampler="ddpm"))
    start = [next(model.sample(2, Rng(2), label=None, mel=np.zeros((2, 6, 5)) if config.mel else None)) for _ in "ab"]
    assert np.array_equal(*map(backend.to_numpy, start))


@pytest.mark.parametrize(
    ("config", "wrong", "words"),
    [
        (PLAIN, {"how": Sampling(steps=0)}, r"1\.\.20.*got 0"),
        (PLAIN, {"how": Sampling(steps=21)}, r"1\.\.20.*got 21"),
        (PLAIN, {"n": 0}, "got 0"),
        (PLAIN, {"guidance": 2.0}, "without labels"),
        (PLAIN, {"guidance": float("nan")}, "finite number, got nan"),
        (PLAIN, {"label": 1}, "without classes"),
        (PLAIN, {"mel": np.zeros((4, 6, 5))}, r"shape None, got \(4, 6, 5\)"),
        (LABELLED, {"label": 3}, r"0\.\.2, got 3"),
        (LABELLED, {"label": -1}, r"0\.\.2, got -1"),
        (LABELLED, {"label": np.array([0, 1])}, r"4 waves need 4 labels, got \(2,\)"),
        (VOCODER, {}, r"shape \(4, 6, 5\), got None"),
        (VOCODER, {"mel": np.zeros((4, 6, 4))}, r"shape \(4, 6, 5\), got \(4, 6, 4\)"),
        (VOCODER, {"mel": np.zeros((1, 6, 5))}, r"shape \(4, 6, 5\), got \(1, 6, 5\)"),
    ],
)
def test_bad_requests(config, wrong, words):
    with pytest.raises(ValueError, match=words):
        DiffWave(config, Rng(0)).sample(**{"n": 4, "rng": Rng(0)} | wrong)


@pytest.mark.parametrize(
    ("config", "x", "told", "words"),
    [
        (PLAIN, (2, 47), {}, r"multiple of the patch 2.*got \(2, 47\)"),
        (PLAIN, (2, 48, 1), {}, r"got \(2, 48, 1\)"),
        (LABELLED, (2, 48), {}, "2 waves need 2 labels, got None"),
        (LABELLED, (2, 48), {"label": np.array([0, 3])}, r"0\.\.2, got 3"),
        (LABELLED, (2, 48), {"label": np.array([0, -1])}, r"0\.\.2, got -1"),
        (PLAIN, (2, 48), {"label": np.array([0, 1])}, "without classes"),
        (VOCODER, (2, 48), {}, r"2 waves of 48 samples need mel spectrograms of shape \(2, 6, 5\), got None"),
    ],
)
def test_bad_training_data(config, x, told, words):
    with pytest.raises(ValueError, match=words):
        DiffWave(config, Rng(0)).loss(np.zeros(x, np.float32), Rng(0), **told)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"schedule": "steep"}, "linear, cosine,.*got 'steep'"),
        ({"target": "noise"}, "eps, x0, v, got 'noise'"),
        ({"layers": 0}, "layers=0"),
        ({"cycle": 0}, "cycle=0"),
        ({"embedding": 5}, "even embedding.*embedding=5"),
        ({"patch": 5}, "the patch 5 must divide the length 48"),
        ({"label_drop": -0.1}, "got -0.1"),
        ({"mel": Mel(rate=16000, hop=8)}, "the model's rate 8000.*rate=16000"),
        ({"mel": Mel(hop=7)}, "the patch 2 divides.*hop=7"),
        ({"mel": Mel(hop=10)}, "divides the length 48.*hop=10"),
    ],
)
def test_bad_configurations(wrong, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAIN, **wrong)


def test_a_schedule_without_signal_at_its_end_is_refused_before_training():
    config = dataclasses.replace(PLAIN, schedule="scaled-linear-zero", target="eps")
    with pytest.raises(ValueError, match="ends without signal: the target must be v or x0, got eps"):
        DiffWave(config, Rng(0))
    DiffWave(dataclasses.replace(config, target="v"), Rng(0))


@pytest.mark.parametrize("config", [PLAIN, BOTH], ids=["plain", "both"])
def test_configuration_comes_back_from_its_fields(config):
    assert DiffWaveConfig.from_dict(dataclasses.asdict(config)) == config


def test_learns_tones_and_comes_back_from_its_checkpoint(tmp_path):
    """Of two tones, one a class, each is drawn when it is asked for; the same from a rounded, exported checkpoint."""
    config = DiffWaveConfig(
        length=64, channels=8, layers=3, cycle=3, patch=4, embedding=8, T=20, target="x0", class_names=("low", "high")
    )
    periods, label = np.array([2, 9]), np.arange(16) % 2
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, (16, 1))
    x_0 = (0.8 * np.sin(2 * np.pi * np.arange(64) / 64 * periods[label, None] + phases)).astype(np.float32)
    model = DiffWave(config, Rng(0))
    training = Training(model, TrainSettings(150, lr=2e-2, warmup=5, ema_decay=0.9), tmp_path / checkpoint.NAME, {})
    with backend.one_thread():
        train(training, lambda step, rng, share: model.loss(x_0, rng, label), Rng(7), batch_size=16, resume_with="")
    assert training.losses[-10:].mean() < 0.5 * training.losses[:10].mean()

    checkpoint.export(tmp_path, tmp_path / "small.npz")
    loaded, small = DiffWave.load(tmp_path), DiffWave.load(tmp_path / "small.npz")
    assert loaded.config == config and not loaded.training
    with training.ema.applied():
        expected, x, rounded = (
            [*m.sample(16, Rng(8), Sampling(steps=5), label=label)][-1] for m in (model, loaded, small)
        )
    assert_close(x, expected)
    assert_close(rounded, expected, atol=0.05)
    strongest = np.abs(np.fft.rfft(x)).argmax(axis=1)
    assert (np.abs(strongest - periods[label]) <= 1).mean() > 0.8, strongest


def test_load_refuses_other_kinds(tmp_path):
    checkpoint.save(tmp_path / checkpoint.NAME, {}, {"kind": "pixel-diffusion"})
    with pytest.raises(CheckpointError, match="'diffwave', got 'pixel-diffusion'"):
        DiffWave.load(tmp_path)


def test_a_mel_spectrogram_fits_the_model_that_is_told_it():
    clips = audio.notes(1, 512, Rng(0), names=("A4", "B4"))
    config = DiffWaveConfig(length=512, channels=4, layers=2, T=5, mel=Mel())
    *_, x_0 = DiffWave(config, Rng(0)).sample(2, Rng(0), Sampling(steps=2), mel=config.mel(clips.waves))
    assert x_0.shape == (2, 512)
