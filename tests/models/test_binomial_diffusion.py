"""BinomialDiffusion: its loss is the bound, its samples are those of the sampler, in all T steps or fewer (E21)."""

import dataclasses
import math

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend, checkpoint, optim
from tinydiff.checkpoint import CheckpointError
from tinydiff.models import BinomialDiffusion, BinomialDiffusionConfig
from tinydiff.nn import Module, UNetConfig
from tinydiff.train import Training, TrainSettings, train

UNET = UNetConfig(base=8, multipliers=(1, 2), blocks=1, attention=(), groups=4)
CONFIG = BinomialDiffusionConfig((4, 6), UNET, T=20)
SEQUENCE = BinomialDiffusionConfig((1, 10), width=8, T=20)


class Stub(Module):
    """Stands for the U-Net: gives what it is told and remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, x, t, rng=None):
        self.asked.append((x.numpy(), backend.to_numpy(t)))
        return Tensor(backend.to_device(self.answer(x.data, t)))


def stubbed(answer=lambda x, t: 0.7 * x):
    model = BinomialDiffusion(CONFIG, Rng(0))
    model.network = Stub(answer)
    return model


def bits(n, seed=1):
    return np.random.default_rng(seed).integers(0, 2, (n, 4, 6, 1)).astype(np.float32)


def test_loss_is_one_draw_of_the_bound():
    """In bits for each bit; the network is shown -1 and 1, and told t on a scale on which T is 1000."""
    model, x_0 = stubbed(), bits(2000)
    loss = model.loss(x_0, Rng(2)).item()
    [(x_t, t)] = model.network.asked
    assert set(np.unique(x_t)) == {-1, 1} and set(np.unique(t)) == {50 * i for i in range(1, 21)}
    kept = ((x_t + 1) / 2 == x_0).mean(
        axis=(1, 2, 3)
    )  # a bit is replaced with probability t/T, half the time by itself
    assert abs(np.polyfit(t / 1000, kept, 1) - [-0.5, 1]).max() < 0.02
    bound = model.bound(x_0, Rng(3))
    assert bound.shape == (21, 2000) and np.abs(bound[-1]).max() < 1e-5  # x_T is a coin's toss, exactly
    assert math.isclose(loss, bound.sum(axis=0).mean() / 24 / math.log(2), rel_tol=0.03)


def test_equal_streams_give_equal_losses():
    model, x_0 = stubbed(), bits(8)
    losses = [model.loss(x_0, Rng(seed)).item() for seed in (2, 2, 3)]
    assert losses[0] == losses[1] != losses[2]


def test_dropout_is_of_training_only():
    unet = dataclasses.replace(UNET, dropout=0.5)
    model = BinomialDiffusion(dataclasses.replace(CONFIG, unet=unet), Rng(0))
    for i, p in enumerate(model.parameters().values()):
        p[...] = p.data + 0.1 * Rng(1).at(i).normal(p.shape)
    first, second = ([*model.sample(2, Rng(4), steps=3)][-1] for _ in range(2))
    assert np.array_equal(first, second)
    assert model.train().loss(first, Rng(1)).item() != model.eval().loss(first, Rng(1)).item()


@pytest.mark.filterwarnings("ignore:network runs without a CUDA graph")  # this one looks at t on the host
@pytest.mark.parametrize("steps", [None, 20, 7, 1])
def test_a_network_that_knows_the_image_draws_it(device, steps):
    """And its bound is nothing: all p(x_0) is on this image."""
    image = bits(1)
    model = stubbed(lambda x, t: np.broadcast_to(60 * image - 30, x.shape).astype(np.float32))
    states = list(model.sample(3, Rng(6), steps=steps))
    assert len(states) == (steps or 20) + 1
    assert all(set(np.unique(backend.to_numpy(x))) <= {0, 1} and x.dtype == np.float32 for x in states)
    assert_close(states[-1], np.broadcast_to(image, (3, 4, 6, 1)))
    assert abs(backend.to_numpy(states[0]).mean() - 0.5) < 0.3
    terms = model.bound(backend.to_device(np.repeat(image, 3, axis=0)), Rng(7), steps=steps)
    assert terms.shape == ((steps or 20) + 1, 3) and abs(terms.sum(axis=0)).max() < 1e-4


def test_fewer_steps_visit_the_times_between():
    """The network is told t/T of the way, whatever the number of steps, and x_t is as noisy as it saw in training."""
    model = stubbed()
    list(model.sample(2, Rng(0), steps=4))
    assert [t.tolist() for _, t in model.network.asked] == [[t, t] for t in (1000, 750, 500, 250)]
    _, coarse = model.coarser(4)
    np.testing.assert_allclose(coarse.alpha_bar, model.schedule.alpha_bar[::5], atol=1e-12)


def test_one_seed_is_one_noise():
    model = stubbed()
    starts = [next(model.sample(2, Rng(seed), steps=n)) for seed, n in ((4, 3), (4, 9), (5, 3))]
    assert np.array_equal(starts[0], starts[1]) and not np.array_equal(starts[0], starts[2])


@pytest.mark.parametrize("config", [CONFIG, SEQUENCE], ids=["images", "sequences"])
def test_loss_on_a_device(device, config):
    model = BinomialDiffusion(config, Rng(0))
    x_0 = np.random.default_rng(1).integers(0, 2, (4, *config.size, 1)).astype(np.float32)
    drawn = model.draw(backend.to_device(x_0), Rng(1))
    assert {backend.device_of(a) for a in drawn} == {backend.device()}
    loss = model.loss_of(*drawn)
    loss.backward()
    assert np.isfinite(loss.item())
    assert math.isclose(loss.item(), model.loss_of(*drawn).item(), rel_tol=1e-6)
    assert all(p.grad is not None for p in model.parameters().values())


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: stubbed().sample(0, Rng(0)), "at least 1, got 0"),
        (lambda: stubbed().sample(1, Rng(0), steps=21), r"1\.\.20.*got 21"),
        (lambda: stubbed().sample(1, Rng(0), steps=0), r"1\.\.20.*got 0"),
        (lambda: stubbed().bound(bits(1), Rng(0), steps=21), r"1\.\.20.*got 21"),
        (lambda: stubbed().loss(2 * bits(2) - 1, Rng(0)), "0 or 1, got values from -1 to 1"),
        (lambda: dataclasses.replace(CONFIG, T=0), "T=0"),
        (lambda: dataclasses.replace(SEQUENCE, width=7), "width even, got .*width=7"),
        (lambda: dataclasses.replace(CONFIG, size=(0, 4)), r"size=\(0, 4\)"),
        (lambda: dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, classes=3)), "told only x_t"),
        (lambda: dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, channels=3)), "of one channel"),
        (lambda: dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, outputs=2)), "gives as many"),
    ],
)
def test_refused(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()


@pytest.mark.parametrize("config", [CONFIG, SEQUENCE], ids=["images", "sequences"])
def test_configuration_survives_a_checkpoint(config, tmp_path):
    checkpoint.save(tmp_path / "a.npz", {}, {"kind": "any", "config": dataclasses.asdict(config)})
    again = BinomialDiffusionConfig.from_dict(checkpoint.load(tmp_path / "a.npz", "any")[1]["config"])
    assert again == config and hash(again) == hash(config)


def test_learns_a_sequence():
    model, x_0 = BinomialDiffusion(SEQUENCE, Rng(0)), np.repeat(np.eye(10, dtype=np.float32)[None, :1], 32, axis=0)
    adam = optim.AdamW(model.parameters())
    losses = []
    for step in range(60):
        loss = model.loss(x_0.reshape(32, 1, 10, 1), Rng(1).at(step))
        loss.backward()
        adam.step(0.03)
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:3])


def test_a_trained_model_is_loaded_with_its_averages(tmp_path):
    model, x_0 = BinomialDiffusion(CONFIG, Rng(0)), bits(16)
    training = Training(model, TrainSettings(3, lr=0.01, ema_decay=0.5), tmp_path / checkpoint.NAME, {})
    train(training, lambda step, rng, share: model.loss(share.of(x_0), rng), Rng(1), batch_size=16, resume_with="")
    loaded = BinomialDiffusion.load(tmp_path)
    assert loaded.config == CONFIG and not loaded.training
    with training.ema.applied():
        averages = model.state_dict()
    for name, weight in loaded.state_dict().items():
        assert_close(weight, averages[name])
    assert [*loaded.sample(2, Rng(0), steps=2)][-1].shape == (2, 4, 6, 1)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        BinomialDiffusion.load(tmp_path / "nowhere")
