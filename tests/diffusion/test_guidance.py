"""E35: classifier-free guidance, and guidance by a classifier on a mixture of Gaussians, where all is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Rng, Tensor, backend, nn
from tinydiff.data.toys import GaussianMixture
from tinydiff.diffusion import (
    Prediction,
    Schedule,
    class_gradient,
    classifier_free,
    classifier_guided,
    ddim,
    ddpm,
    denoiser,
    guided,
    last,
    predict,
    reverse_mean,
)

from .common import PROPERTY, schedules


@PROPERTY
@given(st.floats(-3, 10), st.integers(0, 1000))
def test_guided_moves_from_the_unconditional_output(scale, seed):
    c, u = np.random.default_rng(seed).normal(size=(2, 3, 4))
    np.testing.assert_allclose(guided(c, u, scale), scale * c + (1 - scale) * u, atol=1e-12)


def test_scale_0_and_1():
    c, u = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(guided(c, u, 0.0), u)
    np.testing.assert_allclose(guided(c, u, 1.0), c, atol=1e-6)
    assert guided(c, u, 2.5).dtype == np.float32
    np.testing.assert_array_equal(guided(Tensor(c), Tensor(u), 2.5).data, guided(c, u, 2.5))


def test_classifier_free_calls_only_what_counts():
    calls = []

    def network(name, value):
        def output(x_t, t):
            calls.append((name, t))
            return value * x_t

        return output

    c, u = network("c", 3.0), network("u", 1.0)
    x = np.ones((2, 2))
    for scale, expected, called in [(1, 3.0, "c"), (0, 1.0, "u"), (2.0, 5.0, "cu"), (0.5, 2.0, "cu")]:
        calls.clear()
        np.testing.assert_allclose(classifier_free(c, u, scale)(x, 9), expected)
        assert "".join(name for name, _ in calls) == called and {t for _, t in calls} == {9}


def test_both_outputs_at_once_where_both_count():
    """In place of one after the other, and only then."""
    c, u, both = (lambda x, t: 3 * x), (lambda x, t: x), (lambda x, t: (3.5 * x, 1.5 * x))
    x = np.ones((2, 2))
    for scale, expected in [(1, 3.0), (0, 1.0), (2.0, 5.5)]:
        np.testing.assert_allclose(classifier_free(c, u, scale, both=both)(x, 9), expected)


def test_a_learned_variance_is_the_conditional_one():
    c, u = np.random.default_rng(0).normal(size=(2, 3, 4, 6))
    network = classifier_free(lambda x, t: Tensor(c), lambda x, t: Tensor(u), 3.0, learned_variance=True)
    guided_part, variance = np.split(network(None, 1).data, 2, axis=-1)
    np.testing.assert_allclose(guided_part, 3 * c[..., :3] - 2 * u[..., :3])
    np.testing.assert_array_equal(variance, c[..., 3:])


@pytest.mark.parametrize("target", ["x0", "v"])
def test_guiding_any_target_is_guiding_eps(target):
    """eps, x_0 and v are affine in one another, with the same x_t: the guided outputs stand for one prediction."""
    schedule, t = Schedule.linear(100), np.array([1, 40, 100])
    c, u, x_t = np.random.default_rng(0).normal(size=(3, 3, 5))
    whole = predict(guided(c, u, 4.0), x_t, t, schedule, target).eps
    parts = (predict(output, x_t, t, schedule, target).eps for output in (c, u))
    np.testing.assert_allclose(whole, guided(*parts, 4.0), rtol=1e-9, atol=1e-9)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(1, 3\)"):
        guided(np.zeros((2, 3)), np.zeros((1, 3)), 2.0)


# ------------------------------------------------------------------------------ guided by a classifier

THREE = GaussianMixture(np.array([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.5]]), std=0.4, weights=np.array([0.2, 0.5, 0.3]))


def exact_denoise(mixture, schedule):
    """E[eps | x_t] of data from a mixture."""
    return denoiser(lambda x, t: mixture.best_eps(x, schedule.alpha_bar[t[0]]), schedule, clip=False)


def exact_classifier(mixture, schedule):
    """Logits of p(y | x_t)."""
    return lambda x, t: mixture.noised(schedule.alpha_bar[t[0]]).logits(x)


def log_p(x, y, t, schedule):
    """log p(y | x_t) of one point by Bayes' rule, from densities written out."""
    a = np.prod(1 - schedule.beta[1 : t + 1])
    variance = a * THREE.std**2 + 1 - a
    joint = [
        w * np.exp(-np.sum((x - a**0.5 * m) ** 2) / (2 * variance))
        for w, m in zip(THREE.weights, THREE.means, strict=True)
    ]
    return np.log(joint[y] / sum(joint))


@PROPERTY
@given(st.integers(1, 50), st.integers(0, 2), st.integers(0, 1000))
def test_class_gradient_is_the_slope_of_log_p(t, y, seed):
    schedule, rng = Schedule.linear(50), np.random.default_rng(seed)
    x, direction = rng.normal(size=(2, 4, 2))
    labels = np.array([y, 0, 1, 2])
    found = class_gradient(exact_classifier(THREE, schedule), labels)(x, t)
    assert found.shape == x.shape and found.dtype == x.dtype
    for point, along, label, g in zip(x, direction, labels, found, strict=True):
        up, down = (log_p(point + h * along, label, t, schedule) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(g @ along, (up - down) / 2e-5, rtol=1e-5, atol=1e-6)


def test_class_gradient_of_a_network_takes_each_sample_alone(device):
    network = nn.Linear(3, 4, Rng(0))
    x, label = Rng(1).normal((5, 3)), np.array([0, 3, 1, 1, 2])

    def gradients(x, label):
        return class_gradient(lambda x, t: network(x) * float(t[0]), label)(x, 7)

    whole = backend.to_numpy(gradients(x, label))
    for i in range(5):
        alone = backend.to_numpy(gradients(x[i : i + 1], label[i : i + 1]))
        np.testing.assert_allclose(alone[0], whole[i], rtol=1e-5, atol=1e-6)


@PROPERTY
@given(schedules(), st.integers(0, 2), st.integers(0, 1000))
def test_guided_by_the_exact_classifier_it_denoises_the_class(schedule, y, seed):
    """At s = 1 Bayes' rule holds: the guided eps is E[eps | x_t, y], for every class, schedule and time."""
    rng = np.random.default_rng(seed)
    x, t = rng.normal(size=(3, 2)), int(rng.integers(1, schedule.T + 1))
    gradient = class_gradient(exact_classifier(THREE, schedule), np.full(3, y))
    everything = exact_denoise(THREE, schedule)
    found = classifier_guided(everything, gradient, schedule, 1.0, clip=False)(x, t)
    expected = exact_denoise(THREE.part(y), schedule)(x, t)
    np.testing.assert_allclose(found.eps, expected.eps, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.x0, expected.x0, rtol=1e-4, atol=1e-4)
    unguided = classifier_guided(everything, gradient, schedule, 0.0, clip=False)(x, t)
    np.testing.assert_allclose(unguided.eps, everything(x, t).eps)


@PROPERTY
@given(schedules(), st.sampled_from(["posterior", "beta", "learned"]), st.floats(-2, 10), st.integers(0, 1000))
def test_the_second_form_shifts_the_mean(schedule, variance, scale, seed):
    """mu_hat = mu + s sigma_t² g (Algorithm 1), whatever the network and the gradient."""
    rng = np.random.default_rng(seed)
    x, eps, g, v = rng.normal(size=(4, 3, 2))
    v = np.abs(v)
    t = int(rng.integers(1, schedule.T + 1))
    first = Prediction(*predict(eps, x, t, schedule)[:2], v)
    found = classifier_guided(lambda x, t: first, lambda x, t: g, schedule, scale, variance, clip=False)(x, t)
    beta, beta_tilde = schedule.beta[t], schedule.posterior_variance[t]
    tiny = np.exp(schedule.posterior_log_variance[t])
    sigma_squared = {"posterior": beta_tilde, "beta": beta, "learned": beta**v * tiny ** (1 - v)}[variance]
    mean = reverse_mean(x, eps, t, schedule)
    np.testing.assert_allclose(
        reverse_mean(x, found.eps, t, schedule), mean + scale * sigma_squared * g, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(found.v, v)


@pytest.mark.parametrize(
    ("sampler", "variance"),
    [
        (lambda d, x, s: ddim(d, x, s, Rng(1), steps=100), None),
        (lambda d, x, s: ddpm(d, x, s, Rng(1), "beta"), None),
        (lambda d, x, s: ddpm(d, x, s, Rng(1), "beta"), "beta"),
        (lambda d, x, s: ddpm(d, x, s, Rng(1), "posterior"), "posterior"),
    ],
    ids=["ddim", "ddpm", "ddpm-shift-beta", "ddpm-shift-posterior"],
)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_samples_have_the_distribution_of_the_class(sampler, variance, scale):
    """Mean and covariance at s = 1 are those of p(x | y), at s = 0 those of p(x); 0.05 is for the 200 steps."""
    n, schedule, y = 2000, Schedule.cosine(200), 1
    gradient = class_gradient(exact_classifier(THREE, schedule), np.full(n, y))
    denoise = classifier_guided(exact_denoise(THREE, schedule), gradient, schedule, scale, variance, clip=False)
    x = last(sampler(denoise, Rng(0).normal((n, 2), np.float64), schedule))
    of = THREE.part(y) if scale else THREE
    mean = of.weights @ of.means
    covariance = (of.weights * (of.means - mean).T) @ (of.means - mean) + of.std**2 * np.eye(2)
    assert np.abs(x.mean(axis=0) - mean).max() < 0.05 + 4 * (covariance.max() / n) ** 0.5
    assert np.abs(np.cov(x.T) - covariance).max() < 0.05 + 6 * covariance.max() / n**0.5


def test_the_push_may_leave_the_range_of_images_and_is_clipped():
    schedule = Schedule.linear(10)
    x = np.random.default_rng(0).normal(size=(3, 2))
    denoise = denoiser(lambda x, t: 0.5 * x, schedule)
    push = np.full_like(x, 50.0)
    loose = classifier_guided(denoise, lambda x, t: push, schedule, 1.0, clip=False)(x, 8)
    kept = classifier_guided(denoise, lambda x, t: push, schedule, 1.0)(x, 8)
    assert loose.x0.min() > 1 and (kept.x0 == 1).all()
    for prediction in (loose, kept):  # both still make up x_t
        a = schedule.alpha_bar[8]
        np.testing.assert_allclose(a**0.5 * prediction.x0 + (1 - a) ** 0.5 * prediction.eps, x)


def test_pure_noise_is_not_guided():
    """At t = T of a schedule with alpha_bar_T = 0 a classifier has nothing to read; the steps after it are guided."""
    schedule = Schedule.scaled_linear(10).zero_terminal_snr()
    denoise, x = denoiser(lambda x, t: 0.5 * x, schedule, "v", clip=False), np.ones((2, 3), np.float32)
    guide = classifier_guided(denoise, lambda x, t: 1 + 0 * x, schedule, 2.0, clip=False)
    np.testing.assert_array_equal(guide(x, 10).x0, denoise(x, 10).x0)
    assert (guide(x, 9).x0 > denoise(x, 9).x0).all()
    assert np.isfinite(last(ddim(guide, x, schedule, Rng(0), 5))).all()


def test_bad_guidance():
    schedule, x = Schedule.linear(10), np.zeros((2, 2))
    denoise = denoiser(lambda x, t: x, schedule)
    with pytest.raises(ValueError, match=r"shaped as x_t, \(2, 2\), got \(1, 2\)"):
        classifier_guided(denoise, lambda x, t: x[:1], schedule, 1.0)(x, 5)
    with pytest.raises(ValueError, match="'posterior' or 'beta', got 'fixed'"):
        classifier_guided(denoise, lambda x, t: x, schedule, 1.0, "fixed")(x, 5)
    with pytest.raises(ValueError, match="needs a network that learned one"):
        classifier_guided(denoise, lambda x, t: x, schedule, 1.0, "learned")(x, 5)
    for label, words in [(np.array([0]), "logits"), (np.array([0, 3]), r"must be in 0\.\.2")]:
        with pytest.raises(ValueError, match=words):
            class_gradient(exact_classifier(THREE, schedule), label)(x, 5)
