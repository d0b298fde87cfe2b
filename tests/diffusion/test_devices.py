"""Every function gives on every device what NumPy gives, in the same dtype, and leaves the result on the device."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend
from tinydiff.diffusion import (
    Column,
    Schedule,
    bound_term,
    bound_terms,
    churned,
    class_gradient,
    classifier_free,
    classifier_guided,
    ddim,
    ddpm,
    denoiser,
    dpm_solver,
    draw_t,
    dynamic_threshold,
    forward_log_density,
    forward_trajectory,
    from_ddpm,
    heun,
    last,
    log_likelihood,
    min_snr_weight,
    posterior,
    preconditioned,
    predict,
    prior_term,
    probability_flow,
    q_sample,
    reverse_log_density,
    reverse_mean,
    simple_loss,
    target_of,
    trajectory_bound,
)
from tinydiff.diffusion.edm import training_pair

SCHEDULE = Schedule.cosine(10)
FUNCTIONS = {
    "q_sample": lambda a, b, t: q_sample(a, t, b, SCHEDULE),
    "posterior": lambda a, b, t: posterior(a, b, t, SCHEDULE)[0],
    "reverse_mean": lambda a, b, t: reverse_mean(a, b, t, SCHEDULE),
    "v": lambda a, b, t: target_of(a, b, t, SCHEDULE, "v"),
    "x_0 from eps": lambda a, b, t: predict(a, b, t, SCHEDULE, "eps").x0,
    "eps from x_0": lambda a, b, t: predict(a, b, t, SCHEDULE, "x0").eps,
    "x_0 from v": lambda a, b, t: predict(a, b, t, SCHEDULE, "v").x0,
    "forward density": lambda a, b, t: forward_log_density([a, b] * 5 + [a], SCHEDULE),
    "reverse density": lambda a, b, t: reverse_log_density([a, b] * 5 + [a], identity(), SCHEDULE),
    "L_3": lambda a, b, t: bound_term(a, b, 4, identity(), SCHEDULE),
    "L_0": lambda a, b, t: bound_term(a, b, 1, identity(), SCHEDULE),
    "L_T": lambda a, b, t: prior_term(a, SCHEDULE),
    "bound": lambda a, b, t: trajectory_bound([a, b] * 5 + [a], identity(), SCHEDULE),
    "ddim": lambda a, b, t: last(ddim(identity(), a, SCHEDULE, Rng(0), steps=5)),
    "heun": lambda a, b, t: last(heun(identity(), a, SCHEDULE, Rng(0), steps=5)),
    "dpm_solver": lambda a, b, t: last(dpm_solver(identity(), a, SCHEDULE, Rng(0), steps=5)),
    "dynamic threshold": lambda a, b, t: dynamic_threshold(3 * a, 80.0),
    "guidance": lambda a, b, t: classifier_free(lambda x, t: a, lambda x, t: b, 3.0)(a, t),
    "D of EDM": lambda a, b, t: preconditioned(lambda x, c: x, Column.edm())(a, 0.1 * t),
    "D of a DDPM model": lambda a, b, t: from_ddpm(identity(), SCHEDULE)(a, 0.5),
    "target of EDM": lambda a, b, t: training_pair(a, 0.1 * t, b, Column.edm())[2],
    "probability flow": lambda a, b, t: last(probability_flow(precondition_vp(), a, Column.vp(), 4, "heun")),
    "no churn": lambda a, b, t: last(churned(precondition_vp(), a, Column.edm().sigmas(4), Rng(0))),
    "classifier guidance": lambda a, b, t: classifier_guided(identity(), by_class, SCHEDULE, 2.0, "beta")(a, 4).eps,
}


def by_class(x_t, t):
    """The gradient of a classifier whose logits are the coordinates."""
    return class_gradient(lambda x, t: x.reshape(len(x), -1), np.array([0, 3]))(x_t, t)


def identity():
    """A denoiser whose network hands back what it is given."""
    return denoiser(lambda x_t, t: x_t, SCHEDULE, "v")


def precondition_vp():
    """VP's denoiser whose network hands back what it is given."""
    return preconditioned(lambda x, c: x, Column.vp())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("t", [4, np.array([1, 10])])
def test_function_on_a_device(device, name, t):
    function = FUNCTIONS[name]
    a, b = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    result = function(backend.to_device(a), backend.to_device(b), t)
    assert backend.device_of(result) == backend.device()
    assert_close(result, function(a, b, t), rtol=1e-5)


def test_t_on_the_device(device):
    a, b = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
    t = np.array([1, 10])
    assert_close(
        q_sample(backend.to_device(a), backend.to_device(t), backend.to_device(b), SCHEDULE),
        q_sample(a, t, b, SCHEDULE),
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match=r"1\.\.10 .*got 11"):
        posterior(backend.to_device(a), backend.to_device(b), backend.to_device(t + 1), SCHEDULE)


def test_loss_on_a_device(device):
    x_0, eps, guess = np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32)
    t = draw_t(Rng(0), 4, 10)
    assert type(t) is np.ndarray
    output = Tensor(backend.to_device(guess), requires_grad=True)
    weight = min_snr_weight(t, SCHEDULE)
    simple_loss(
        lambda x_t, t: output, backend.to_device(x_0), t, backend.to_device(eps), SCHEDULE, weight=weight
    ).backward()
    expected = 2 * weight[:, None] * (guess - eps) / 12
    assert_close(output.grad, expected.astype(np.float32), rtol=1e-5)


def test_random_sampling_on_a_device(device):
    """Streams differ from device to device, so only shape, dtype, bounds and repetition are compared."""
    x_T = Rng(0).normal((2, 4))
    runs = [
        lambda: last(ddpm(identity(), x_T, SCHEDULE, Rng(1))),
        lambda: last(ddim(identity(), x_T, SCHEDULE, Rng(1), steps=5, eta=1.0)),
        lambda: last(forward_trajectory(x_T, SCHEDULE, Rng(1))),
        lambda: sum(bound_terms(x_T, identity(), SCHEDULE, Rng(1))),
        lambda: log_likelihood(x_T, identity(), SCHEDULE, Rng(1), 3),
        lambda: last(churned(precondition_vp(), x_T, Column.edm().sigmas(4), Rng(1), S_churn=2)),
        lambda: sum(training_pair(x_T, Column.iddpm().draw_sigma(Rng(2), 2), x_T, Column.ve())[::2]),
    ]
    for run in runs:
        x = run()
        assert backend.device_of(x) == backend.device() and np.isfinite(backend.to_numpy(x)).all()
        assert_close(run(), backend.to_numpy(x))
