"""What the trilemma (E39) is measured by, against closed forms, loops, and sets whose answer is plain.

Fréchet and kernel distance, precision and recall, copies.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY, gaussian_data, within
from tinydiff import Rng, metrics
from tinydiff.metrics import (
    copying,
    frechet_distance,
    frechet_of_gaussians,
    kernel_distance,
    nearest,
    paired_change,
    precision_recall,
    psnr,
)

SEEDS = st.integers(0, 2**32)


@pytest.fixture(params=[20, 1 << 23], autouse=True)
def block(request, monkeypatch):
    """Distances in small and in large blocks."""
    monkeypatch.setattr(metrics, "BLOCK", request.param)


def sets(seed, n, m, d=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) + 0.5


def distance(x, y):
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(x, y, strict=True)))


# ----------------------------------------------------------------------------------------------- Fréchet


def test_frechet_of_gaussians_on_the_axes():
    """Of diagonal covariances the root is plain: d² = Σ (m_a - m_b)² + (s_a - s_b)²."""
    m_a, s_a, m_b, s_b = np.random.default_rng(0).uniform(0.1, 2, (4, 6))
    expected = sum((p - q) ** 2 for p, q in zip([*m_a, *s_a], [*m_b, *s_b], strict=True))
    assert np.isclose(frechet_of_gaussians(m_a, np.diag(s_a**2), m_b, np.diag(s_b**2)), expected, rtol=1e-12)


def test_frechet_by_hand():
    """C_a C_b = [[3, 1], [1, 3]] has the eigenvalues 2 and 4: d² = 1 + 4 + (2 + 6) - 2 (√2 + 2)."""
    C_b = np.array([[3.0, 1.0], [1.0, 3.0]])
    d2 = frechet_of_gaussians(np.array([1.0, 0]), np.eye(2), np.array([0, 2.0]), C_b)
    assert np.isclose(d2, 13 - 2 * (2**0.5 + 2), rtol=1e-12)


@PROPERTY
@given(SEEDS, st.integers(1, 6))
def test_frechet_is_that_of_the_root_by_newton(seed, d):
    """tr (C_a C_b)^½ by Denman & Beavers' iteration, which knows nothing of eigenvalues."""
    (m_a, C_a), (m_b, C_b) = gaussian_data(d, seed), gaussian_data(d, seed + 1)
    root, inverse = C_a @ C_b, np.eye(d)
    for _ in range(60):
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    assert np.allclose(root @ root, C_a @ C_b)
    expected = np.sum((m_a - m_b) ** 2) + np.trace(C_a + C_b - 2 * root)
    assert np.isclose(frechet_of_gaussians(m_a, C_a, m_b, C_b), expected, rtol=1e-6, atol=1e-9)
    assert np.isclose(frechet_of_gaussians(m_b, C_b, m_a, C_a), expected, rtol=1e-6, atol=1e-9)


def test_frechet_distance_of_draws():
    """Many draws of two Gaussians are as far apart as the Gaussians; the means and covariances are the sets' own."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(100_000, 2)) * [1, 2], rng.normal(size=(80_000, 2)) * [3, 2] + [0, 1]
    assert abs(frechet_distance(a, b) - (1 + 4)) < 0.1
    expected = frechet_of_gaussians(a.mean(axis=0), np.cov(a.T), b.mean(axis=0), np.cov(b.T))
    assert np.isclose(frechet_distance(a, b), expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_frechet_distance_of_a_set_from_itself_is_zero(dtype):
    """Also where there are fewer rows than features, and the covariance has no inverse."""
    a = np.random.default_rng(2).normal(size=(20, 40)).astype(dtype)
    assert 0 <= frechet_distance(a, a) < 1e-6
    assert np.isclose(frechet_distance(a, a + 2), 4 * 40, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- kernel


def expected_mmd(a, b, scale):
    """Gretton et al. 2012, eq. 3, term by term."""

    def k(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / (len(x) * scale**2) + 1) ** 3

    def pairs(s):
        return sum(k(s[i], s[j]) for i, j in itertools.permutations(range(len(s)), 2)) / (len(s) * (len(s) - 1))

    return pairs(a) + pairs(b) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kernel_distance_against_loops():
    """The mean over disjoint pairs of blocks, which the streams 0 and 1 choose, and its standard error."""
    a, b = sets(0, 12, 18)
    orders = Rng(3).at(0).permutation(12), Rng(3).at(1).permutation(18)
    parts = [(a[orders[0][4 * i : 4 * i + 4]], b[orders[1][6 * i : 6 * i + 6]]) for i in range(3)]
    values = [expected_mmd(*pair, scale=0.7) for pair in parts]
    measured = kernel_distance(a, b, Rng(3), blocks=3, scale=0.7)
    assert np.isclose(measured.value, sum(values) / 3, rtol=1e-12)
    variance = sum((v - sum(values) / 3) ** 2 for v in values) / 2
    assert np.isclose(measured.error, (variance / 3) ** 0.5, rtol=1e-12)


def test_kernel_distance_has_no_bias():
    """For one distribution it is 0 on average, even with few samples, and its errors are as large as it says."""
    found = [kernel_distance(*(s - [[0.0], [0.5]][i] for i, s in enumerate(sets(seed, 16, 16))), Rng(seed), 4)
             for seed in range(400)]  # fmt: skip
    values, errors = np.array(found).T
    within(values.mean(), 0, values.std() / 20, 4)
    assert np.isclose(np.mean(errors**2) ** 0.5, values.std(), rtol=0.2)


def test_kernel_distance_grows_with_the_distance():
    a, b = sets(0, 300, 300)
    near, far = (kernel_distance(a, b + by, Rng(0)).value for by in (0, 1))
    assert 0 < near < far


# ----------------------------------------------------------------------------------------------- precision and recall


@PROPERTY
@given(SEEDS, st.integers(5, 9), st.integers(5, 9), st.integers(1, 4))
def test_precision_and_recall_against_loops(seed, n, m, k):
    real, drawn = (np.round(4 * s) for s in sets(seed, n, m))  # some lie on the surface of a ball

    def share(x, around):
        inside = 0
        for p in x:
            radii = [sorted(distance(q, r) for r in around)[k] for q in around]
            inside += any(distance(p, q) <= radius for q, radius in zip(around, radii, strict=True))
        return inside / len(x)

    assert precision_recall(real, drawn, k) == (share(drawn, real), share(real, drawn))


def test_precision_and_recall_of_plain_sets():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + 50])  # two kinds
    again = np.concatenate([rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + 50])
    one_kind = rng.normal(size=(400, 2)) * 0.5
    half_wrong = np.concatenate([again[::2], rng.normal(size=(200, 2)) + np.array([50, -50])])
    assert min(precision_recall(real, again)) > 0.9
    assert precision_recall(real, real) == (1, 1)
    precision, recall = precision_recall(real, one_kind)
    assert precision > 0.95 and recall <= 0.5
    precision, recall = precision_recall(real, half_wrong)
    assert 0.4 < precision <= 0.5 and recall > 0.8


def test_compare_gives_all_of_them():
    real, drawn = sets(0, 40, 30)
    found = metrics.compare(real, drawn, Rng(1))
    assert found.frechet == frechet_distance(real, drawn)
    assert (found.precision, found.recall) == precision_recall(real, drawn)
    rms = (np.sum(real**2) / real.size) ** 0.5
    assert np.allclose(found.kernel, kernel_distance(real, drawn, Rng(1), scale=rms))
    again = metrics.compare(9 * real, 9 * drawn, Rng(1))
    assert np.allclose(again.kernel, found.kernel)  # whatever the size of the features


# ----------------------------------------------------------------------------------------------- copies


def test_nearest_against_loops():
    x, among = sets(0, 7, 11)
    index, found = nearest(x, among)
    for i, p in enumerate(x):
        distances = [distance(p, q) for q in among]
        assert index[i] == distances.index(min(distances)) and np.isclose(found[i], min(distances), rtol=1e-9)
    assert np.array_equal(nearest(among, among)[0], np.arange(11)) and nearest(among, among)[1].max() < 1e-6


@PROPERTY
@given(SEEDS)
def test_copying_counts_pairs(seed):
    rng = np.random.default_rng(seed)
    drawn, test, training = (rng.integers(0, 5, (n, 1)).astype(float) for n in (6, 7, 2))  # with many ties
    of = [[min(abs(float(p[0] - q[0])) for q in training) for p in s] for s in (drawn, test)]
    wins = sum((d < e) + (d == e) / 2 for d in of[0] for e in of[1])
    assert np.isclose(copying(drawn, test, training).value, wins / 42, rtol=1e-12)


def test_copies_are_found():
    rng = np.random.default_rng(0)
    training, test, fresh = rng.normal(size=(3, 300, 8))
    assert copying(training, test, training).value == 1
    share, error = copying(fresh, test, training)
    assert abs(share - 0.5) < 4 * error
    assert copying(fresh + 9, test, training).value == 0
    spread = np.std([copying(*rng.normal(size=(2, 20, 2)), training[:, :2]).value for _ in range(300)])
    assert np.isclose(copying(test[:20], fresh[:20], training).error, spread, rtol=0.15)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("function", [frechet_distance, lambda a, b: kernel_distance(a, b, Rng(0)), precision_recall])
def test_sets_that_cannot_be_compared(function):
    good, spoilt = np.zeros((30, 3)), np.full((30, 3), np.nan)
    for bad in (np.zeros((30, 2)), np.zeros(30), np.zeros((1, 3))):
        with pytest.raises(ValueError, match=r"at least 2 rows, got \(30, 3\) and"):
            function(good, bad)
    with pytest.raises(ValueError, match="not finite"):
        function(good, spoilt)


def test_bad_numbers():
    with pytest.raises(ValueError, match="at least 1 rows"):
        nearest(np.zeros((0, 3)), np.zeros((4, 3)))
    for blocks in (1, 3):
        with pytest.raises(ValueError, match=f"got {blocks} for 5 and 9 rows"):
            kernel_distance(np.zeros((5, 3)), np.zeros((9, 3)), Rng(0), blocks)
    with pytest.raises(ValueError, match="positive, got 0"):
        kernel_distance(np.zeros((5, 3)), np.zeros((9, 3)), Rng(0), 2, scale=0)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"1..3, fewer than the rows, got {k}"):
            precision_recall(np.zeros((4, 3)), np.zeros((9, 3)), k)


@PROPERTY
@given(st.integers(0, 2**32), st.integers(2, 4), st.integers(2, 4), st.integers(1, 5))
def test_diversity_against_loops(seed, P, K, D):
    x = np.random.default_rng(seed).normal(size=(P, K, D))
    of_each = [
        np.mean([math.sqrt(sum((a - b) ** 2) / D) for a, b in itertools.permutations(of_one, 2)]) for of_one in x
    ]
    found = metrics.diversity(x)
    assert found.value == pytest.approx(np.mean(of_each), rel=1e-5)
    assert found.error == pytest.approx(np.std(of_each, ddof=1) / math.sqrt(P), rel=1e-4, abs=1e-7)


def test_equal_pictures_are_not_diverse():
    assert metrics.diversity(np.ones((2, 3, 50), np.float32)).value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("x", [np.ones((1, 3, 2)), np.ones((2, 1, 2)), np.ones((4, 2)), np.full((2, 2, 2), np.nan)])
def test_pictures_that_have_no_diversity(x):
    with pytest.raises(ValueError, match=r"expected finite pictures \(P, K, D\), of 2 prompts or more"):
        metrics.diversity(x)


def test_psnr():
    """One grey level of 255 apart everywhere: 20 log10(255) = 48.13 dB; half the range apart: 6.02 dB."""
    x = np.random.default_rng(0).uniform(-1, 1, (3, 4, 5, 3)).astype(np.float32)
    apart = np.array([2 / 255, 1, 0], np.float32).reshape(3, 1, 1, 1)
    found = psnr(x + apart, x)
    assert np.allclose(found[:2], [20 * math.log10(255), 20 * math.log10(2)], rtol=1e-5) and found[2] == np.inf
    noise = Rng(1).normal((1, 200, 200, 1), np.float64) * 0.1
    assert np.isclose(psnr(noise, np.zeros_like(noise))[0], 20 * math.log10(2 / 0.1), atol=0.1)


@pytest.mark.parametrize("shapes", [((1, 4, 4, 1), (1, 4, 4, 3)), ((4, 4, 1), (4, 4, 1)), ((0, 4, 4, 1), (0, 4, 4, 1))])
def test_images_that_psnr_cannot_compare(shapes):
    with pytest.raises(ValueError, match=r"images \(N, H, W, C\) of one shape, got"):
        psnr(*map(np.zeros, shapes))


# ------------------------------------------------------------------------------------- before and after


def test_a_paired_change_is_the_formula():
    before, after = np.array([1.0, 2.0, 4.0]), np.array([2.0, 2.5, 5.5])
    mean, s = 1.0, math.sqrt((0.0 + 0.25 + 0.25) / 2)
    change = paired_change(before, after)
    assert change.value == mean and math.isclose(change.error, s / math.sqrt(3))
    z = np.linspace(mean / change.error, 40, 400_001)
    tail = np.trapezoid(np.exp(-(z**2) / 2), z) / math.sqrt(2 * math.pi)
    assert math.isclose(change.p, 2 * tail, rel_tol=1e-6)


def test_pairs_that_do_not_change_are_seldom_found_to():
    """Of 2,000 tests of nothing, about 5 % have p < 0.05."""
    rng = np.random.default_rng(0)
    p = [paired_change(*rng.normal(size=(2, 50)) + rng.normal(size=50) * 9).p for _ in range(2000)]
    within(np.mean(np.array(p) < 0.05), 0.05, math.sqrt(0.05 * 0.95 / 2000))


def test_a_change_without_any_variation():
    assert paired_change(np.ones(4), np.ones(4)) == (0, 0, 1)
    assert paired_change(np.ones(4), np.ones(4) * 2) == (1, 0, 0)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 4)])
def test_what_is_no_pair(n, m):
    with pytest.raises(ValueError, match=rf"two arrays \(n,\), n >= 2, got \({n},\) and \({m},\)"):
        paired_change(np.ones(n), np.ones(m))
