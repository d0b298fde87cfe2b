"""PixelDiffusion: its loss is Algorithm 1's, its samples are those of the samplers, and labels go where they should."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend, checkpoint
from tinydiff.checkpoint import CheckpointError
from tinydiff.diffusion import Sampling, variance_bound
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig
from tinydiff.models.pixel_diffusion import SCHEDULES, USUAL_GUIDANCE
from tinydiff.nn import Module, UNetConfig
from tinydiff.train import Training, TrainSettings, train

UNET = UNetConfig(base=8, multipliers=(1, 2), blocks=1, attention=(), groups=4)
PLAIN = PixelDiffusionConfig(UNET, size=(4, 8), T=50, target="eps")
LABELLED = dataclasses.replace(PLAIN, unet=dataclasses.replace(UNET, classes=3), class_names=("a", "b", "c"))


class Stub(Module):
    """Stands for the U-Net: gives what it is told and remembers what it was asked."""

    def __init__(self, answer=lambda x, t, label: x * 0.0):
        self.answer, self.asked = answer, []

    def __call__(self, x, t, label=None, rng=None):
        self.asked.append((x.numpy(), backend.to_numpy(t), None if label is None else backend.to_numpy(label)))
        return Tensor(backend.to_device(self.answer(x.data, t, label)))


def stubbed(config, *answer):
    model = PixelDiffusion(config, Rng(0))
    model.unet = Stub(*answer)
    return model


def awake(config):
    """A model with no weights left at the zeros that many start from."""
    model = PixelDiffusion(config, Rng(0))
    for i, p in enumerate(model.parameters().values()):
        p[...] = p.data + 0.1 * Rng(1).at(i).normal(p.shape)
    return model


def alpha_bar(config):
    """E6 and E7, written once more."""
    steps = np.arange(config.T + 1)
    if config.schedule == "linear":
        scale = 1000 / config.T
        return np.cumprod(1 - np.concatenate([[0], np.linspace(1e-4 * scale, 0.02 * scale, config.T)]))
    f = np.cos((steps / config.T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(np.concatenate([[1], 1 - np.clip(1 - f[1:] / f[:-1], None, 0.999)]))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["plain", "min-snr"])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_loss_is_algorithm_1(schedule, weighting, target):
    """Of a network that gives 0 the loss is the mean square of the target, found again from what the network saw."""
    config = dataclasses.replace(PLAIN, schedule=schedule, target=target, weighting=weighting)
    model = stubbed(config)
    x_0 = Rng(1).uniform((4000, 4, 8, 1)) * 2 - 1
    loss = model.loss(x_0, Rng(2)).item()
    [(x_t, t, label)] = model.unet.asked
    assert label is None and t.shape == (4000,) and t.min() == 1 and t.max() == config.T
    assert np.bincount(t)[1:].max() < 80 + 5 * 80**0.5  # 4000 draws over 50 times

    a = alpha_bar(config)[t].reshape(-1, 1, 1, 1)
    eps = (x_t - a**0.5 * x_0) / (1 - a) ** 0.5
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    wanted = {"eps": eps, "x0": x_0, "v": a**0.5 * eps - (1 - a) ** 0.5 * x_0}[target]
    snr = a / (1 - a)
    weight = {"x0": np.minimum(snr, 5), "eps": np.minimum(snr, 5) / snr, "v": np.minimum(snr, 5) / (snr + 1)}[target]
    assert np.isclose(loss, np.mean(wanted**2 * (weight if weighting == "min-snr" else 1)), rtol=1e-3)


def test_equal_streams_give_equal_losses():
    model, x_0 = PixelDiffusion(PLAIN, Rng(0)), Rng(1).normal((8, 4, 8, 1))
    losses = [model.loss(x_0, Rng(seed)).item() for seed in (2, 2, 3)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("n", [1, 7, 50, 64])
def test_stratified_times(n):
    """One t from each of n equal parts of 1..T, and every t equally often over many batches."""
    model = stubbed(dataclasses.replace(PLAIN, stratified=True))
    counts = np.zeros(PLAIN.T + 1)
    for seed in range(600):
        model.unet.asked.clear()
        model.loss(np.zeros((n, 4, 8, 1), np.float32), Rng(seed))
        t = model.unet.asked[0][1]
        part = PLAIN.T / n * np.arange(n + 1)
        assert t.dtype == np.int64 and (t - 1 < part[1:]).all() and (t > part[:-1]).all()
        counts += np.bincount(t, minlength=PLAIN.T + 1)
    expected = 600 * n / PLAIN.T
    assert counts[0] == 0 and np.abs(counts[1:] - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_times_drawn_as_the_bound_weighs_them(target, stratified):
    """E16: beta_t/(2 alpha_t (1 - alpha_bar_t)) for eps, with sigma² = beta; times (d eps/d output)² for the others."""
    model = stubbed(dataclasses.replace(PLAIN, target=target, stratified=stratified, weighting="vlb"))
    bar = alpha_bar(PLAIN)
    alpha = bar[1:] / bar[:-1]
    weight = (1 - alpha) / (2 * alpha * (1 - bar[1:])) * {"eps": 1, "v": bar[1:], "x0": bar[1:] / (1 - bar[1:])}[target]
    counts, n = np.zeros(PLAIN.T + 1), 64
    for seed in range(300):
        model.unet.asked.clear()
        model.loss(np.zeros((n, 4, 8, 1), np.float32), Rng(seed))
        counts += np.bincount(model.unet.asked[0][1], minlength=PLAIN.T + 1)
    expected = 300 * n * weight / weight.sum()
    assert counts[0] == 0 and (np.abs(counts[1:] - expected) < 5 * expected**0.5 + 1).all()


def test_a_share_of_the_labels_is_hidden():
    model = stubbed(LABELLED)
    label = np.arange(6000) % 3
    model.loss(np.zeros((6000, 4, 8, 1), np.float32), Rng(1), label)
    seen = model.unet.asked[0][2]
    hidden = seen == -1
    assert abs(hidden.mean() - 0.1) < 0.02 and np.array_equal(seen[~hidden], label[~hidden])


@pytest.mark.parametrize(("target", "weighting"), [("eps", "plain"), ("x0", "min-snr"), ("v", "min-snr")])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_drawn_for_the_loss(target, weighting, dtype, device):
    """E18 and E17 from the same streams: what the network sees, what it should output, and how much that counts."""
    config = dataclasses.replace(LABELLED, target=target, weighting=weighting, label_drop=0.5)
    model, rng = stubbed(config), Rng(5)  # one whose output is 0
    host = np.tanh(np.random.default_rng(1).normal(size=(40, 4, 8, 1))).astype(dtype)
    x_0, label = backend.to_device(host), np.arange(40) % 3
    drawn = model.draw(x_0, rng, label)
    assert {backend.device_of(a) for a in drawn if a is not None} == {backend.device()}
    x_t, t, wanted, seen, weight = (None if a is None else backend.to_numpy(a) for a in drawn)

    eps, bar = backend.to_numpy(rng.at(1).normal_like(x_0)), alpha_bar(config)[t][:, None, None, None]
    assert_close(x_t, (bar**0.5 * host + (1 - bar) ** 0.5 * eps).astype(dtype), rtol=1e-6)
    v = bar**0.5 * eps - (1 - bar) ** 0.5 * host
    assert_close(wanted, {"eps": eps, "x0": host, "v": v}[target].astype(dtype), rtol=1e-6)
    assert set(seen[seen != label]) == {-1} and 0.2 < (seen == -1).mean() < 0.8
    snr = bar / (1 - bar)
    factor = np.minimum(snr, 5) / {"x0": 1, "v": snr + 1, "eps": snr}[target]
    if weighting == "min-snr":
        assert_close(weight, factor.astype(dtype), rtol=1e-5)
    error = wanted**2 * (1 if weighting == "plain" else weight)
    assert model.loss_of(*drawn).item() == pytest.approx(error.mean(), rel=1e-5)
    assert model.loss(x_0, rng, label).item() == model.loss_of(*drawn).item()


@pytest.mark.parametrize(("target", "weighting"), [("eps", "plain"), ("x0", "min-snr"), ("v", "plain")])
def test_the_loss_with_a_learned_variance(target, weighting, device):
    """E13: L_simple + 0.001 L_vlb, T times the mean term, which gives the first half of the outputs no gradient."""
    config = dataclasses.replace(LABELLED, target=target, weighting=weighting, learned_variance=True)
    plain = stubbed(dataclasses.replace(config, learned_variance=False), lambda x, t, label: 0.1 * x)
    model = stubbed(config, lambda x, t, label: 0.1 * backend.array_module(x).concatenate([x, -3 * x], axis=-1))
    x_0 = backend.to_device((np.random.default_rng(1).integers(0, 256, (40, 4, 8, 1)) / 127.5 - 1).astype(np.float32))
    label, rng = np.arange(40) % 3, Rng(5)
    drawn = model.draw(x_0, rng, label)
    x_t, t, wanted = drawn[:3]
    terms = variance_bound(0.1 * x_t - wanted, (1 - 0.3 * x_t) / 2, t, *drawn[5:])
    expected = plain.loss(x_0, rng, label).item() + 0.001 * config.T * terms.item()
    assert model.loss(x_0, rng, label).item() == pytest.approx(expected, rel=1e-5)
    assert {backend.device_of(a) for a in drawn if a is not None} == {backend.device()}

    outputs = Tensor(model.unet.answer(x_t, t, None), requires_grad=True)
    model.unet = lambda *conditions, rng: outputs
    model.loss_of(*drawn).backward()
    gradient = backend.to_numpy(outputs.grad)
    other = Tensor(0.1 * x_t, requires_grad=True)
    plain.unet = lambda *conditions, rng: other
    plain.loss_of(*drawn[:5]).backward()
    assert_close(gradient[..., :1], backend.to_numpy(other.grad), rtol=1e-5)
    assert np.abs(gradient[..., 1:]).max() > 0


def test_a_learned_variance_is_sampled_with():
    """Ancestral sampling adds the noise that the network asks for: next to none, at v = -20."""
    config = dataclasses.replace(PLAIN, learned_variance=True)
    quiet = stubbed(config, lambda x, t, label: np.concatenate([0.1 * x, 0 * x - 41], axis=-1))
    usual = stubbed(config, lambda x, t, label: np.concatenate([0.1 * x, 0 * x - 1], axis=-1))
    plain = stubbed(PLAIN, lambda x, t, label: 0.1 * x)
    ends = [[*model.sample(2, Rng(4), Sampling("ddpm"))][-2] for model in (quiet, usual, plain)]
    assert_close(ends[1], ends[2], rtol=1e-4)
    assert np.abs(ends[0] - ends[1]).max() > 0.001


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_with_a_learned_variance(sampler):
    model = awake(dataclasses.replace(LABELLED, learned_variance=True))
    *_, x_0 = model.sample(2, Rng(0), Sampling(sampler, 3), label=1, guidance=2.0)
    assert x_0.shape == (2, 4, 8, 1) and np.isfinite(x_0).all()


@pytest.mark.filterwarnings("ignore:network runs without a CUDA graph")  # this one looks at t on the host
@pytest.mark.parametrize(
    ("how", "steps"),
    [
        (Sampling(), 50),
        (Sampling("ddim", 7, eta=0.5), 7),
        (Sampling("ddpm"), 50),
        (Sampling("ddpm", 9, variance="beta", spacing="linspace"), 9),
        (Sampling("heun"), 25),
        (Sampling("dpm", 8, "leading", clip=False), 8),
    ],
)
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_a_network_that_knows_the_image_draws_it(device, how, steps, target):
    """The data are one image: the network's right answer follows from x_t, and every sampler ends at the image."""
    config = dataclasses.replace(PLAIN, target=target)
    image = Rng(5, "cpu").uniform((4, 8, 1)) * 1.8 - 0.9
    table = alpha_bar(config)

    def answer(x, t, label):
        x, a = backend.to_numpy(x), table[backend.to_numpy(t)].reshape(-1, 1, 1, 1)
        eps = (x - a**0.5 * image) / (1 - a) ** 0.5
        right = {"eps": eps, "x0": image + 0 * eps, "v": a**0.5 * eps - (1 - a) ** 0.5 * image}[target]
        return right.astype(np.float32)

    model = stubbed(config, answer)
    states = list(model.sample(3, Rng(6), how))
    assert len(states) == how.steps_of(model.schedule.T) + 1 == steps + 1
    assert backend.to_numpy(states[0]).std() > 0.8
    assert_close(states[-1], np.broadcast_to(image, (3, 4, 8, 1)), atol=1e-2 if target == "eps" else 1e-4)


def test_one_seed_is_one_noise_for_all_samplers():
    model = PixelDiffusion(PLAIN, Rng(0))
    starts = [next(model.sample(2, Rng(4), Sampling(s, n))) for s in SAMPLERS for n in (3, None)]
    assert all(np.array_equal(starts[0], x_T) for x_T in starts)
    assert not np.array_equal(starts[0], next(model.sample(2, Rng(5))))


def test_sampling_records_nothing_and_leaves_dropout_out():
    config = dataclasses.replace(PLAIN, unet=dataclasses.replace(UNET, dropout=0.9))
    model = awake(config)
    first, second = ([*model.sample(2, Rng(4), Sampling(steps=3))][-1] for _ in range(2))
    assert np.array_equal(first, second)
    model.train()
    assert model.loss(first, Rng(1)).item() != model.eval().loss(first, Rng(1)).item()


@pytest.mark.parametrize(("config", "usual"), [(PLAIN, 1.0), (LABELLED, USUAL_GUIDANCE)])
def test_usual_guidance(config, usual):
    model = awake(config)
    assert np.array_equal(*([*model.sample(2, Rng(4), Sampling(steps=3), guidance=s)][-1] for s in (None, usual)))


def test_labels_asked_for_and_drawn():
    model = stubbed(LABELLED)
    for asked, seen in ((2, [2] * 5), (np.array([0, 1, 2, 1, 0]), [0, 1, 2, 1, 0])):
        model.unet.asked.clear()
        list(model.sample(5, Rng(0), Sampling(steps=2), label=asked, guidance=1))
        assert [label.tolist() for _, _, label in model.unet.asked] == [seen, seen]
    model.unet.asked.clear()
    list(model.sample(3000, Rng(0), Sampling(steps=1), guidance=1))
    counts = np.bincount(model.unet.asked[0][2], minlength=3)
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5


def test_guidance_moves_from_the_unlabelled_to_the_labelled_answer():
    """E35 in x_0: 0.1 without the label, 0.1 + 0.2 = 0.3 with it, 0.1 + 2 * 0.2 = 0.5 at s = 2."""

    def answer(x, t, label):
        return x * 0 + (0.1 if label is None else 0.3)

    model = stubbed(dataclasses.replace(LABELLED, target="x0"), answer)
    for s, expected in ((0.0, 0.1), (1.0, 0.3), (2.0, 0.5)):
        *_, x_0 = model.sample(2, Rng(0), Sampling(steps=4), guidance=s, label=1)
        assert_close(x_0, np.full((2, 4, 8, 1), expected, np.float32), atol=1e-5)


def test_the_class_matters(device):
    """A real U-Net draws each class another image."""
    model = awake(LABELLED)
    finals = [backend.to_numpy([*model.sample(1, Rng(2), Sampling(steps=2), label=k)][-1]) for k in (0, 1, 1)]
    assert not np.array_equal(finals[0], finals[1]) and np.array_equal(finals[1], finals[2])


@pytest.mark.parametrize(
    ("config", "wrong", "words"),
    [
        (PLAIN, {"how": Sampling(steps=0)}, r"1\.\.50.*got 0"),
        (PLAIN, {"how": Sampling(steps=51)}, r"1\.\.50.*got 51"),
        (PLAIN, {"n": 0}, "got 0"),
        (PLAIN, {"guidance": 2.0}, "without labels"),
        (PLAIN, {"guidance": float("nan")}, "finite number, got nan"),
        (PLAIN, {"label": 1}, "without classes"),
        (LABELLED, {"label": 3}, r"0\.\.2, got 3"),
        (LABELLED, {"label": -1}, r"0\.\.2, got -1"),
        (LABELLED, {"label": np.array([0, 1])}, r"4 images need 4 labels, got \(2,\)"),
    ],
)
def test_bad_requests(config, wrong, words):
    model = PixelDiffusion(config, Rng(0))
    with pytest.raises(ValueError, match=words):
        model.sample(**{"n": 4, "rng": Rng(0)} | wrong)


@pytest.mark.parametrize(
    ("config", "label", "words"),
    [
        (PLAIN, np.array([0, 1]), "without classes"),
        (LABELLED, None, "2 images need 2 labels, got None"),
        (LABELLED, np.array([0, 3]), r"0\.\.2, got 3"),
        (LABELLED, np.array([0, -1]), r"0\.\.2, got -1"),
    ],
)
def test_bad_training_labels(config, label, words):
    with pytest.raises(ValueError, match=words):
        PixelDiffusion(config, Rng(0)).loss(np.zeros((2, 4, 8, 1), np.float32), Rng(0), label)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"schedule": "square"}, "linear, cosine, .*, got 'square'"),
        ({"target": "noise"}, "eps, x0, v, got 'noise'"),
        ({"weighting": "none"}, "plain, min-snr, vlb, got 'none'"),
        ({"label_drop": 1.5}, "got 1.5"),
        ({"class_names": ("a",)}, "0 classes need as many names"),
        ({"size": (4, 7)}, "2 divides, got 4 x 7"),
    ],
)
def test_bad_configurations(wrong, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAIN, **wrong)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("weighting", ["plain", "min-snr"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_and_samples(schedule, weighting, learned_variance):
    """One whose alpha_bar_T is 0 among them, where a division by it would be a warning, and so an error here."""
    config = dataclasses.replace(
        PLAIN, schedule=schedule, target="v", weighting=weighting, learned_variance=learned_variance, stratified=True
    )
    model = awake(config)
    with np.errstate(all="raise", under="ignore"):
        loss = model.loss(np.zeros((config.T, 4, 8, 1), np.float32), Rng(1))  # every t once
        loss.backward()
        *_, x_0 = model.sample(2, Rng(0), Sampling(steps=3))
    assert np.isfinite(loss.item()) and np.isfinite(x_0).all()


def test_eps_needs_a_schedule_that_ends_with_signal():
    with pytest.raises(ValueError, match=r"'scaled-linear-zero' ends without signal.* v or x0, got eps"):
        PixelDiffusion(dataclasses.replace(PLAIN, schedule="scaled-linear-zero"), Rng(0))


def test_a_learned_variance_asked_of_a_model_without():
    with pytest.raises(ValueError, match="a network that learned one"):
        list(PixelDiffusion(PLAIN, Rng(0)).sample(2, Rng(0), Sampling("ddpm", variance="learned")))


def test_too_few_steps():
    with pytest.raises(ValueError, match="T >= 1"):
        PixelDiffusion(dataclasses.replace(PLAIN, T=0), Rng(0))


@pytest.mark.parametrize("config", [PLAIN, LABELLED], ids=["plain", "labelled"])
def test_configuration_survives_a_checkpoint(config, tmp_path):
    checkpoint.save(tmp_path / "a.npz", {}, {"kind": "any", "config": dataclasses.asdict(config)})
    _, meta = checkpoint.load(tmp_path / "a.npz", "any")
    assert PixelDiffusionConfig.from_dict(meta["config"]) == config


def test_learns_one_image_and_comes_back_from_its_checkpoint(tmp_path, device):
    unet = UNetConfig(base=4, multipliers=(1,), blocks=1, attention=(), groups=2, classes=3)
    config = dataclasses.replace(LABELLED, unet=unet, target="x0", size=(4, 4), T=20, schedule="linear")
    model = PixelDiffusion(config, Rng(0))
    image = np.sign(Rng(5, "cpu").normal((4, 4, 1)))
    x_0 = backend.to_device(np.repeat(image[None], 4, axis=0))
    label = np.zeros(4, int)
    settings = TrainSettings(steps=50, lr=3e-2, warmup=1, ema_decay=0.5)
    training = Training(model, settings, tmp_path / checkpoint.NAME, {})
    train(training, lambda step, rng, share: model.loss(x_0, rng, label), Rng(7), batch_size=4, resume_with="")
    assert training.losses[-5:].mean() < 0.1 * training.losses[:5].mean()

    loaded = PixelDiffusion.load(tmp_path)
    assert loaded.config == config and not loaded.training
    with training.ema.applied():
        expected = [*model.sample(2, Rng(8), Sampling(steps=5), label=0)][-1]
    assert_close([*loaded.sample(2, Rng(8), Sampling(steps=5), label=0)][-1], backend.to_numpy(expected))
    assert np.abs(backend.to_numpy(expected) - image).mean() < 0.2


def test_load_refuses_other_kinds(tmp_path):
    checkpoint.save(tmp_path / checkpoint.NAME, {}, {"kind": "mnist-classifier"})
    with pytest.raises(CheckpointError, match="'pixel-diffusion', got 'mnist-classifier'"):
        PixelDiffusion.load(tmp_path)
