"""The training loop learns, resumes to the last bit, and loses no good checkpoint to anything that goes wrong."""

import dataclasses
import signal
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend, checkpoint, ops, train
from tinydiff.checkpoint import CheckpointError
from tinydiff.nn import Linear, Module
from tinydiff.train import Training, TrainSettings, steps_in

SETTINGS = TrainSettings(steps=40, lr=0.2, warmup=5, ema_decay=0.9, weight_decay=0.01)
TRUE_WEIGHT = np.array([[1.0], [-2.0], [0.5]], np.float32)


@dataclass(frozen=True)
class ToyConfig:
    inputs: int = 3


class Toy(Module):
    """A line through noisy points."""

    kind = "toy"

    def __init__(self, config=ToyConfig(), rng=None):
        self.config = config
        self.linear = Linear(config.inputs, 1, rng or Rng(3))

    def loss_at(self, step, rng, share):
        n = len(share.of(range(16)))
        x = rng.at(0).normal((n, 3))
        y = x @ backend.to_device(TRUE_WEIGHT) + 0.01 * rng.at(1).normal((n, 1))
        return ops.mse_loss(self.linear(Tensor(x)), Tensor(y))


def start(tmp_path, settings=SETTINGS):
    return Training(Toy(), settings, tmp_path / checkpoint.NAME, {"note": "hello"})


def go(training, loss_at=None, **options):
    options = {"batch_size": 16, "resume_with": "the command"} | options
    train.train(training, loss_at or training.model.loss_at, Rng(7), **options)


def state_of(path):
    arrays, meta = checkpoint.load(path, "toy")
    return {name: array.tobytes() for name, array in arrays.items()}, meta


def test_learns(tmp_path, device):
    training = start(tmp_path)
    go(training)
    assert training.step == SETTINGS.steps
    assert training.losses[-5:].mean() < 0.1 * training.losses[:5].mean()


def test_checkpoint_tells_everything(tmp_path):
    training = start(tmp_path)
    go(training)
    arrays, meta = checkpoint.load(tmp_path, "toy")
    assert meta["about"] == {"note": "hello"} and meta["config"] == {"inputs": 3}
    assert TrainSettings(**meta["settings"] | {"betas": tuple(meta["settings"]["betas"])}) == SETTINGS
    assert np.array_equal(arrays["losses"], training.losses) and len(arrays["losses"]) == SETTINGS.steps
    for name, weight in training.model.state_dict().items():
        assert np.array_equal(arrays[f"model/{name}"], weight)
    with training.ema.applied():
        averages = training.model.state_dict()
    for name, average in averages.items():
        assert np.array_equal(arrays[f"ema/{name}"], average)
        assert not np.array_equal(arrays[f"ema/{name}"], arrays[f"model/{name}"])


@pytest.mark.parametrize("stop_at", [1, 2, 17, 40])
def test_resumed_equals_uninterrupted_to_the_last_bit(tmp_path, device, stop_at):
    """The process dies in step stop_at; another takes up the checkpoint of the step before."""
    go(start(tmp_path / "whole"))

    def dies(step, rng, share):
        if step == stop_at:
            raise ConnectionError
        return first.model.loss_at(step, rng, share)

    first = start(tmp_path / "broken")
    with pytest.raises(ConnectionError):
        go(first, dies, save_every=0)
    second = start(tmp_path / "broken")
    second.restore(*checkpoint.load(tmp_path / "broken", "toy"))
    assert second.step == stop_at - 1
    go(second)
    assert state_of(tmp_path / "broken") == state_of(tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="work is shared by forking, on Linux only")
def test_a_shared_run_is_resumed_by_as_many_processes(tmp_path, monkeypatch):
    """Whatever the number of cores of the machine that resumes."""
    monkeypatch.setattr(train, "shares_for", lambda batch_size: 2)
    go(start(tmp_path / "whole"))

    def stops(step, rng, share):
        if step == 6 and share.index == 0:
            signal.raise_signal(signal.SIGINT)
        return first.model.loss_at(step, rng, share)

    first = start(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        go(first, stops)
    monkeypatch.setattr(train, "shares_for", lambda batch_size: 1)
    second = start(tmp_path / "broken")
    second.restore(*checkpoint.load(tmp_path / "broken", "toy"))
    go(second)
    assert second.processes == 2
    assert state_of(tmp_path / "broken") == state_of(tmp_path / "whole")
    alone = start(tmp_path / "alone")
    go(alone)
    assert alone.processes == 1 and state_of(tmp_path / "alone") != state_of(tmp_path / "whole")


def test_each_step_draws_from_its_own_stream(tmp_path):
    seen = []
    training = start(tmp_path)

    def loss_at(step, rng, share):
        seen.append((step, rng.normal((2,)).tobytes()))
        return training.model.loss_at(step, rng, share)

    go(training, loss_at)
    assert seen == [(step, Rng(7).at(step, 0).normal((2,)).tobytes()) for step in range(1, 41)]


def test_restoring_another_model_is_refused(tmp_path):
    go(start(tmp_path))
    saved = checkpoint.load(tmp_path, "toy")
    other = Training(Toy(ToyConfig(inputs=4)), SETTINGS, tmp_path / "other.npz", {})
    with pytest.raises(ValueError, match=r"\(4, 1\) here and \(3, 1\) there"):
        other.restore(*saved)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_loss_that_is_not_finite(tmp_path, bad):
    training = start(tmp_path)

    def loss_at(step, rng, share):
        return training.model.loss_at(step, rng, share) * (bad if step == 9 else 1.0)

    with pytest.raises(FloatingPointError) as caught:
        go(training, loss_at, save_every=0)
    message = str(caught.value)
    assert f"the loss is {bad} at step 9" in message and "all weights are finite" in message
    assert str(tmp_path / checkpoint.NAME) in message
    arrays, _ = checkpoint.load(tmp_path, "toy")
    assert len(arrays["losses"]) == 8 and all(np.isfinite(a).all() for a in arrays.values())


def test_gradient_that_is_not_finite_names_the_parameter(tmp_path):
    training = start(tmp_path)

    def loss_at(step, rng, share):
        loss = training.model.loss_at(step, rng, share)
        return loss + ops.sqrt(training.model.linear.bias * 0.0).sum() if step == 9 else loss

    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"gradient of linear\.bias .* at step 9"):
        go(training, loss_at, save_every=0)
    assert len(checkpoint.load(tmp_path, "toy")[0]["losses"]) == 8


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    training = start(tmp_path, dataclasses.replace(SETTINGS, lr=1e39, warmup=0))
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"weights linear\.\w+ are not finite"):
        go(training, save_every=0)
    arrays, _ = checkpoint.load(tmp_path, "toy")
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(tmp_path):
    training = start(tmp_path / "stopped")
    handler = signal.getsignal(signal.SIGINT)

    def loss_at(step, rng, share):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return training.model.loss_at(step, rng, share)

    with pytest.raises(KeyboardInterrupt, match=r"after step 6 of 40.*resume with:\s+the command"):
        go(training, loss_at)
    assert signal.getsignal(signal.SIGINT) is handler
    again = start(tmp_path / "stopped")
    again.restore(*checkpoint.load(tmp_path / "stopped", "toy"))
    assert again.step == 6
    go(again)
    go(start(tmp_path / "whole"))
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")


@pytest.fixture
def usual_ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also in a process that was started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_checkpoint(tmp_path, usual_ctrl_c):
    training = start(tmp_path)

    def loss_at(step, rng, share):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return training.model.loss_at(step, rng, share)

    with pytest.raises(KeyboardInterrupt):
        go(training, loss_at, save_every=0)
    assert len(checkpoint.load(tmp_path, "toy")[0]["losses"]) == 5


def test_previews_see_the_averaged_weights(tmp_path):
    seen = {}
    training = start(tmp_path)

    def preview(step):
        assert not training.model.training
        seen[step] = training.model.linear.weight.numpy().copy()

    go(training, preview=preview, preview_every=15)
    assert list(seen) == [0, 15, 30, 40]
    arrays, _ = checkpoint.load(tmp_path, "toy")
    assert np.array_equal(seen[40], arrays["ema/linear.weight"])
    assert np.array_equal(training.model.linear.weight.numpy(), arrays["model/linear.weight"])


def test_the_average_follows_the_weights(tmp_path):
    training, path = start(tmp_path), []

    def loss_at(step, rng, share):
        path.append(training.model.linear.weight.numpy().copy())
        return training.model.loss_at(step, rng, share)

    go(training, loss_at)
    first, *later = [*path, training.model.linear.weight.numpy()]
    average = first
    for n, weight in enumerate(later, start=1):
        d = min(SETTINGS.ema_decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
    with training.ema.applied():
        assert_close(training.model.linear.weight, average, rtol=1e-5)


def test_large_gradients_are_scaled_down(tmp_path):
    """Adam would not notice a fixed factor, but a bound that only the large gradients meet changes its way."""
    free, bound = (start(tmp_path / str(m), dataclasses.replace(SETTINGS, max_norm=m)) for m in (1e9, 1.0))
    go(free)
    go(bound)
    assert free.losses[0] == bound.losses[0] and not np.allclose(free.losses[5:], bound.losses[5:])


def test_the_model_trains_in_training_mode(tmp_path):
    training = start(tmp_path)

    def loss_at(step, rng, share):
        assert training.model.training
        return training.model.loss_at(step, rng, share)

    go(training, loss_at, preview=lambda step: training.model.eval(), preview_every=2)


def test_folder_that_cannot_be_written_shows_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    training = start(tmp_path / "file")

    def loss_at(step, rng, share):
        raise AssertionError("worked")

    with pytest.raises(OSError, match="cannot write"):
        go(training, loss_at)


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / f".{checkpoint.NAME}.99999.tmp").write_bytes(b"half")
    go(start(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_constant_and_falling_learning_rate(tmp_path):
    """With betas 0 Adam moves a weight by lr each step, whatever the gradient."""
    plain = TrainSettings(steps=20, lr=0.01, final_lr=0.01, warmup=4, max_norm=np.inf, betas=(0.0, 0.0))
    for settings, last in ((plain, 0.01), (dataclasses.replace(plain, final_lr=0.0), 0.0)):
        training, places = start(tmp_path / str(last), settings), []

        def loss_at(step, rng, share, training=training, places=places):
            places.append(float(training.model.linear.bias.data[0]))
            return training.model.linear.bias.sum() + training.model.loss_at(step, rng, share) * 0.0

        go(training, loss_at)
        moves = -np.diff([*places, float(training.model.linear.bias.data[0])])
        assert np.allclose(moves[:4], [0.0025, 0.005, 0.0075, 0.01], rtol=1e-3)
        assert np.isclose(moves[-1], last, atol=1e-6)
        assert (np.diff(moves[4:]) < 1e-8).all()


def test_minutes_become_steps_and_leave_no_trace(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    model = Toy()
    before = model.state_dict()

    def loss_at(step, rng, share):
        clock[0] += 5.0 if step == 1 else 0.5  # the first step is slow: it makes what the others find
        return model.loss_at(step, rng, share)

    assert steps_in(2.0, model, loss_at, SETTINGS, Rng(7), 4) == 240
    assert all(np.array_equal(before[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(ValueError, match="minutes"):
        steps_in(0.0, model, loss_at, SETTINGS, Rng(7), 4)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0.0}, {"lr": -1.0}, {"lr": np.nan}, {"warmup": -1}])
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match="got"):
        dataclasses.replace(SETTINGS, **wrong)


def test_other_kind_is_refused(tmp_path):
    go(start(tmp_path))
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(tmp_path, "pixel-diffusion")
