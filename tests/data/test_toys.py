"""Points in the plane: each figure's geometry, scale and repetition; the mixture against densities written out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend
from tinydiff.data import toys
from tinydiff.data.toys import TOYS, GaussianMixture

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
MANY = 20_000
CLASSES = {"moons": 2, "spirals": 2, "swiss_roll": 1, "checkerboard": 8, "mixture": 8}


# ------------------------------------------------------------------------------------ the figures


@pytest.mark.parametrize("name", TOYS)
def test_scale_and_labels(name):
    points = toys.draw(name, MANY, Rng(0))
    assert points.x.shape == (MANY, 2) and points.x.dtype == np.float32
    assert points.labels.shape == (MANY,) and points.labels.dtype == np.int64
    assert np.abs(points.x.mean(axis=0)).max() < 0.03
    assert abs(points.x.var(axis=0).mean() - 1) < 0.02 and np.abs(points.x).max() < 3
    counts = np.bincount(points.labels)
    assert len(counts) == points.classes == CLASSES[name] and len(points) == MANY
    assert np.abs(counts - MANY / points.classes).max() < 5 * (MANY / points.classes) ** 0.5


@pytest.mark.parametrize("name", TOYS)
def test_equal_streams_give_equal_points(name, device):
    a, b, c = (toys.draw(name, 10, Rng(seed)) for seed in (1, 1, 2))
    assert type(a.x) is type(a.labels) is np.ndarray
    assert np.array_equal(a.x, b.x) and np.array_equal(a.labels, b.labels) and not np.array_equal(a.x, c.x)


def figure(name):
    """Many points of a figure, in double precision, and their labels."""
    points = toys.draw(name, MANY, Rng(3))
    return points.x.astype(np.float64), points.labels


def test_moons_are_half_circles():
    x, label = figure("moons")
    centre = np.array([[-0.5, -0.25], [0.5, 0.25]])[label]  # of the half circles, in the units before scaling
    off = 0.705 * x - centre
    assert abs(np.linalg.norm(off, axis=1).mean() - 1) < 0.01 and np.linalg.norm(off, axis=1).std() < 0.07
    upwards = off[:, 1] * (1 - 2 * label)
    assert upwards.min() > -0.25 and abs((upwards > 0).mean() - 1) < 0.05


@pytest.mark.parametrize(
    ("name", "turn", "size", "blur", "centre"),
    [("spirals", 2 * math.pi, 0.5, 0.03, (0, 0)), ("swiss_roll", 1.0, 6.79, 0.05, (-2, -0.2))],
)
def test_on_spirals_the_angle_grows_with_the_radius(name, turn, size, blur, centre):
    x, label = figure(name)
    x = size * x - centre
    radius = np.linalg.norm(x, axis=1)
    off = np.arctan2(x[:, 1], x[:, 0]) - math.pi * label - turn * radius
    outwards = np.angle(np.exp(1j * off)) / turn  # how far a point lies from its arm, along the radius
    assert np.quantile(np.abs(outwards), 0.99) < 3 * blur * size
    assert (radius.max() - radius.min()) * turn > 1.9 * math.pi


def test_a_checkerboard_has_eight_even_squares():
    x, label = figure("checkerboard")
    x = x * (4 / 3) ** 0.5 + 2
    cell = np.floor(x).astype(int)
    assert cell.min() == 0 and cell.max() == 3 and (cell.sum(axis=1) % 2 == 0).all()
    for k in range(8):
        [square] = np.unique(cell[label == k], axis=0)
        inside = x[label == k] - square
        assert np.abs(inside.mean(axis=0) - 0.5).max() < 0.03 and np.abs(inside.var(axis=0) - 1 / 12).max() < 0.01


def test_bad_figures():
    with pytest.raises(ValueError, match=r"one of moons, .*got 'sun'"):
        toys.draw("sun", 10, Rng(0))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        toys.draw("moons", 0, Rng(0))


# ------------------------------------------------------------------------------------ the mixture

UNEVEN = GaussianMixture(np.array([[-1.0, 0.5], [1.0, 0.0], [0.0, -2.0]]), std=0.5, weights=np.array([1, 2, 5]))


def density(m, x):
    """p(x) of one point, and its parts w_k N(x; m_k, s² I)."""
    D = m.means.shape[1]
    parts = [
        w * math.exp(-np.sum((x - mean) ** 2) / (2 * m.std**2)) / (2 * math.pi * m.std**2) ** (D / 2)
        for w, mean in zip(m.weights, m.means, strict=True)
    ]
    return sum(parts), np.array(parts)


@st.composite
def mixtures(draw):
    K, D = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return GaussianMixture(rng.normal(size=(K, D)), draw(st.floats(0.3, 2)), rng.uniform(0.1, 1, K)), rng


@PROPERTY
@given(mixtures())
def test_density_classes_and_score(case):
    m, rng = case
    x = rng.normal(size=(3, m.means.shape[1]))
    logits, log_p, score = m.logits(x), m.log_density(x), m.score(x)
    for i, point in enumerate(x):
        p, parts = density(m, point)
        assert math.isclose(log_p[i], math.log(p), rel_tol=1e-9, abs_tol=1e-9)
        posterior = np.exp(logits[i] - logits[i].max())
        np.testing.assert_allclose(posterior / posterior.sum(), parts / p, rtol=1e-9)
        for d, step in enumerate(1e-5 * np.eye(len(point))):
            slope = (math.log(density(m, point + step)[0]) - math.log(density(m, point - step)[0])) / 2e-5
            assert math.isclose(score[i, d], slope, rel_tol=1e-5, abs_tol=1e-6)


@PROPERTY
@given(mixtures(), st.floats(0.01, 0.99))
def test_noised(case, alpha_bar):
    """E4: scaled by sqrt(alpha_bar), and the variance 1 - alpha_bar of the noise added, with the weights kept."""
    m, _ = case
    noised = m.noised(alpha_bar)
    np.testing.assert_allclose(noised.means, alpha_bar**0.5 * m.means)
    np.testing.assert_allclose(noised.weights, m.weights)
    assert math.isclose(noised.std**2, alpha_bar * m.std**2 + 1 - alpha_bar)


def test_no_other_function_predicts_the_noise_better():
    """E17: for many draws the error of E[eps | x_t] is uncorrelated with any function of x_t."""
    n, a = 100_000, 0.4
    x_0, eps = UNEVEN.draw(n, Rng(0)).x.astype(np.float64), Rng(1).normal((n, 2), np.float64)
    x_t = a**0.5 * x_0 + (1 - a) ** 0.5 * eps
    error = eps - UNEVEN.best_eps(x_t, a)
    for function in (np.ones_like, lambda x: x, lambda x: x[:, ::-1], lambda x: x**2, np.sin):
        product = error * function(x_t)
        assert np.abs(product.mean(axis=0) / (product.std(axis=0) / n**0.5)).max() < 4


def test_draws_follow_the_mixture():
    points = UNEVEN.draw(MANY, Rng(5))
    assert points.classes == 3 and points.x.dtype == np.float32 and points.labels.dtype == np.int64
    for k, (w, mean) in enumerate(zip(UNEVEN.weights, UNEVEN.means, strict=True)):
        x = points.x[points.labels == k]
        assert abs(len(x) / MANY - w) < 5 * (w * (1 - w) / MANY) ** 0.5
        assert np.abs(x.mean(axis=0) - mean).max() < 5 * UNEVEN.std / len(x) ** 0.5
        assert np.abs(np.cov(x.T) - UNEVEN.std**2 * np.eye(2)).max() < 5 * UNEVEN.std**2 * (2 / len(x)) ** 0.5
    assert math.isclose(UNEVEN.part(1).log_density(np.zeros((1, 2)))[0], math.log(np.exp(-2) / (math.pi / 2)))


def test_mixture_on_a_device(device):
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    here = backend.to_device(x)
    for function in (UNEVEN.log_density, UNEVEN.score, UNEVEN.logits, lambda x: UNEVEN.best_eps(x, 0.3)):
        assert backend.device_of(function(here)) == backend.device()
        assert_close(function(here), function(x), rtol=1e-5)
    assert_close(UNEVEN.logits(Tensor(here)), UNEVEN.logits(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("means", "std", "weights"),
    [
        (np.zeros(2), 1.0, np.ones(2)),
        (np.zeros((0, 2)), 1.0, np.ones(0)),
        (np.full((1, 2), np.nan), 1.0, np.ones(1)),
        (np.zeros((2, 2)), 0.0, np.ones(2)),
        (np.zeros((2, 2)), math.nan, np.ones(2)),
        (np.zeros((2, 2)), 1.0, np.ones(3)),
        (np.zeros((2, 2)), 1.0, np.array([1.0, 0.0])),
    ],
)
def test_bad_mixtures(means, std, weights):
    with pytest.raises(ValueError, match=r"means must be finite|as many weights > 0 and a std > 0"):
        GaussianMixture(means, std, weights)
