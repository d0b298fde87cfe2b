"""How good samples are: is each one real enough, are all kinds there, are any copied from the training data?

The distances compare two sets of feature vectors, (N, D) and (M, D), such as `Classifier.features` gives of real and
of drawn images. All is NumPy in float64 on the host; large tables of distances are made block by block.

A value alone says little: each depends on the features, on N and on M. Measure real test images in place of the
samples, with the same N, and see how far the samples are from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tinydiff.rng import Rng

BLOCK = 1 << 23
"""Entries of a table of distances that are held at once."""

# ------------------------------------------------------------------------------- distances of two sets


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance of the Gaussians with the means and covariances of two sets of features (FID).

        d² = |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½)

    a: (N, D), b: (M, D), any floats. Returns d² >= 0, as the literature does. It is biased: small sets seem further
    apart than they are. Raises ValueError for fewer than two rows, different D, or values that are not finite.
    Heusel et al. 2017, eq. 6; Dowson & Landau 1982.
    """
    a, b = _checked(a, b, least=2)
    return frechet_of_gaussians(a.mean(axis=0), _covariance(a), b.mean(axis=0), _covariance(b))


def frechet_of_gaussians(m_a: np.ndarray, C_a: np.ndarray, m_b: np.ndarray, C_b: np.ndarray) -> float:
    """d² of `frechet_distance` for Gaussians of means (D,) and covariances (D, D).

    C_a C_b has the eigenvalues of the symmetric C_a^½ C_b C_a^½, none of them negative, so its root needs no complex
    numbers, and a singular covariance does no harm.
    """
    root = _square_root(C_a)
    eigenvalues = np.linalg.eigvalsh(root @ C_b @ root)
    overlap = np.sqrt(eigenvalues.clip(0)).sum()
    return max(0.0, float((m_a - m_b) @ (m_a - m_b) + np.trace(C_a) + np.trace(C_b) - 2 * overlap))


def _covariance(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=0)
    return centred.T @ centred / (len(x) - 1)


def _square_root(C: np.ndarray) -> np.ndarray:
    """The symmetric R with R R = C, for a symmetric C without negative eigenvalues but for rounding."""
    eigenvalues, vectors = np.linalg.eigh(C)
    return (vectors * np.sqrt(eigenvalues.clip(0))) @ vectors.T


class Estimate(NamedTuple):
    """A measured value and its standard error."""

    value: float
    error: float


def kernel_distance(a: np.ndarray, b: np.ndarray, rng: Rng, blocks: int = 5, scale: float = 1.0) -> Estimate:
    """The kernel distance of two sets of features (KID): the squared maximum mean discrepancy, without bias.

        MMD² = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)
        k(x, y) = (x·y / (D scale²) + 1)³

    a: (N, D), b: (M, D), any floats. scale: the size of a feature; 1 in the literature, whose features are about as
    large. rng: how both are cut into `blocks` pairs of disjoint sets. MMD² is measured on
    each pair; the value is the mean, its error the standard deviation over √blocks, honest since the pairs are
    independent. It is 0 on average for two draws of one distribution, so it may be below 0.
    Raises ValueError as `frechet_distance`, unless there are two blocks or more, each with two rows of both, and for a
    scale that is not positive.
    Bińkowski et al. 2018, sec. 4; Gretton et al. 2012, eq. 3.
    """
    a, b = _checked(a, b, least=2)
    if not 2 <= blocks <= min(len(a), len(b)) // 2:
        raise ValueError(f"the number of blocks must be in 2..N/2, got {blocks} for {len(a)} and {len(b)} rows")
    if not scale > 0:
        raise ValueError(f"the scale must be positive, got {scale}")
    a, b = a / scale, b / scale
    parts_a = np.array_split(a[rng.at(0).permutation(len(a))], blocks)
    parts_b = np.array_split(b[rng.at(1).permutation(len(b))], blocks)
    values = [_squared_mmd(x, y) for x, y in zip(parts_a, parts_b, strict=True)]
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / blocks**0.5))


def _squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    return _mean_of_pairs(_kernel(a, a)) + _mean_of_pairs(_kernel(b, b)) - 2 * float(_kernel(a, b).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(k: np.ndarray) -> float:
    """The mean of k_ij over i != j."""
    n = len(k)
    return float(k.sum() - np.trace(k)) / (n * (n - 1))


# ------------------------------------------------------------------------------- quality and diversity


class PrecisionRecall(NamedTuple):
    """The share of samples that look real, and the share of what is real that samples reach, each in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: np.ndarray, drawn: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Quality and diversity apart: how many samples lie among the real features, and the other way round.

        f(x, Φ) = 1 if |x - y| <= |y - NN_k(y, Φ)| for some y in Φ, else 0
        precision = mean over drawn of f(x, real),  recall = mean over real of f(x, drawn)

    The balls around the points of a set, out to the k-th neighbour in that set, stand for all that is like it.
    real: (N, D), drawn: (M, D), any floats; fair comparisons keep N, M and k. Raises ValueError as `frechet_distance`,
    and unless 1 <= k < N, M. Kynkäänniemi et al. 2019, eq. 1-2.
    """
    real, drawn = _checked(real, drawn, least=2)
    if not 1 <= k < min(len(real), len(drawn)):
        raise ValueError(f"k must be in 1..{min(len(real), len(drawn)) - 1}, fewer than the rows, got {k}")
    return PrecisionRecall(_share_inside(drawn, real, k), _share_inside(real, drawn, k))


def _share_inside(x: np.ndarray, around: np.ndarray, k: int) -> float:
    """The share of x that lies in a ball around a point out to its k-th neighbour."""
    # The smallest entry of a row is the point's distance to itself.
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _squared_distances(around, around)])
    return float(np.concatenate([(d <= radii).any(axis=1) for d in _squared_distances(x, around)]).mean())


class Scores(NamedTuple):
    """How far drawn features are from real ones, and what is missing: `compare`."""

    frechet: float
    kernel: Estimate
    precision: float
    recall: float


def compare(real: np.ndarray, drawn: np.ndarray, rng: Rng) -> Scores:
    """All that compares two sets of features, (N, D) and (M, D): see each function, which raises as it says there.

    The scale of the kernel distance is the root mean square of the real features.
    """
    scale = float(np.mean(real.astype(np.float64) ** 2) ** 0.5) or 1.0
    kernel = kernel_distance(real, drawn, rng, scale=scale)
    return Scores(frechet_distance(real, drawn), kernel, *precision_recall(real, drawn))


def diversity(x: np.ndarray) -> Estimate:
    """How far apart K pictures of one prompt are: the mean over P prompts, and its standard error.

        mean over prompts and i != j of |x_i - x_j| / √D

    It is the root mean square difference of two pictures' pixels, or features. x: (P, K, D), any floats.
    Raises ValueError for another shape, fewer than two prompts or pictures, or values that are not finite.
    """
    if x.ndim != 3 or min(x.shape[:2]) < 2 or not np.isfinite(x).all():
        raise ValueError(f"expected finite pictures (P, K, D), of 2 prompts or more, 2 or more of each, got {x.shape}")
    P, K, D = x.shape
    squared = [np.concatenate([*_squared_distances(of_one, of_one)]) for of_one in x.astype(np.float64)]
    of_each = np.sqrt(squared).sum(axis=(1, 2)) / (K * (K - 1) * D**0.5)
    return Estimate(float(of_each.mean()), float(of_each.std(ddof=1) / P**0.5))


# ------------------------------------------------------------------------------- before and after


class Change(NamedTuple):
    """By how much something differs on average, the standard error of that, and how likely chance does as much."""

    value: float
    error: float
    p: float


def paired_change(before: np.ndarray, after: np.ndarray) -> Change:
    """Whether n items, each measured twice, have changed: the mean of after - before, and a paired test of it.

        t = mean(d)/(s/√n),   d = after - before,   s² = Σ (d - mean(d))²/(n - 1),   p = 2 (1 - Φ(|t|))

    Pairs need far fewer items than two groups would, since what makes items differ from each other falls out. Φ is the
    normal distribution, so p is a little too small below some 30 items. before, after: (n,), any floats.
    Raises ValueError for other shapes or fewer than two items.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        raise ValueError(f"a paired test takes two arrays (n,), n >= 2, got {before.shape} and {after.shape}")
    d = after.astype(np.float64) - before
    value, error = float(d.mean()), float(d.std(ddof=1) / math.sqrt(len(d)))
    if error == 0:
        return Change(value, 0.0, float(value == 0))
    return Change(value, error, math.erfc(abs(value) / error / math.sqrt(2)))


# ------------------------------------------------------------------------------- nearness to an original


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of each image, in decibels: 10 log10(2² / mean (x̂ - x)²).

    images, originals: (N, H, W, C), floats in [-1, 1], whose range is 2. Returns (N,), infinite for an image that is
    its original. Raises ValueError for different shapes or no images.
    """
    if images.shape != originals.shape or images.ndim != 4 or not images.size:
        raise ValueError(f"expected images (N, H, W, C) of one shape, got {images.shape} and {originals.shape}")
    squared = (images.astype(np.float64) - originals) ** 2
    with np.errstate(divide="ignore"):
        return 10 * np.log10(4 / squared.mean(axis=(1, 2, 3)))


# ------------------------------------------------------------------------------- copies of the training data


def nearest(x: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest neighbour of each row: which row of `among` it is, int64 (N,), and how far away, float64 (N,).

    x: (N, D), among: (M, D), any floats. Raises ValueError for empty sets, different D, or values that are not finite.
    """
    x, among = _checked(x, among, least=1)
    found = [(d.argmin(axis=1), d.min(axis=1)) for d in _squared_distances(x, among)]
    index, squared = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return index, np.sqrt(squared)


def copying(drawn: np.ndarray, test: np.ndarray, training: np.ndarray) -> Estimate:
    """Whether samples copy the training data: the chance that one lies nearer to it than a test image does.

        P(d(x) < d(y)) + ½ P(d(x) = d(y)),  d the distance to the nearest training image, x drawn, y from the test set

    0.5 where nothing is copied, 1 where all is; below 0.5 the samples stay further away than real images do. The error
    is the one of no copying, √((N + M + 1) / 12 N M).
    drawn: (N, D), test: (M, D), training: (K, D), any floats. Raises ValueError as `nearest`.
    Meehan et al. 2020, sec. 3 (their U statistic, Mann & Whitney 1947, over N M).
    """
    of_drawn, of_test = nearest(drawn, training)[1], np.sort(nearest(test, training)[1])
    N, M = len(of_drawn), len(of_test)
    further = M - np.searchsorted(of_test, of_drawn, side="right")
    not_nearer = M - np.searchsorted(of_test, of_drawn, side="left")
    return Estimate(float(np.mean(further + not_nearer) / (2 * M)), ((N + M + 1) / (12 * N * M)) ** 0.5)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """|x_i - y_j|² for some rows i after others and all j, (rows, M) each."""
    of_y, height = (y * y).sum(axis=1), max(1, BLOCK // len(y))
    for start in range(0, len(x), height):
        rows = x[start : start + height]
        squared = rows @ y.T
        squared *= -2
        squared += of_y
        squared += (rows * rows).sum(axis=1, keepdims=True)
        yield squared.clip(0, out=squared)  # rounding may leave a distance of zero below it


def _checked(a: np.ndarray, b: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in float64, after a check of their shapes and values."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(f"expected sets (N, D) and (M, D) of at least {least} rows, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the sets hold values that are not finite")
    return a.astype(np.float64), b.astype(np.float64)
