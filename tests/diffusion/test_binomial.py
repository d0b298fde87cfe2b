"""E21: every reference here goes through all chains of bits, one by one, and knows only the betas."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close
from tinydiff import Rng, Tensor, backend
from tinydiff.data.heartbeat import heartbeats
from tinydiff.diffusion import binomial, last
from tinydiff.diffusion.binomial import BinomialSchedule
from tinydiff.gradcheck import gradcheck

from .common import PROPERTY, each_t, within

N = 4000  # draws in a statistical test
BETAS = st.one_of(
    st.lists(st.floats(1e-3, 1), min_size=1, max_size=6).map(BinomialSchedule.from_betas),
    st.integers(1, 6).map(BinomialSchedule.even),
)


def step(x, x_prev, beta):
    """q(x_t | x_{t-1}) of one bit, in words: with probability beta a coin's toss, else what it was."""
    return beta / 2 + (1 - beta) * (x == x_prev)


def chains(schedule, x_0, t):
    """All chains x_0, ..., x_t of one bit, each with its probability given x_0."""
    for rest in itertools.product((0, 1), repeat=t):
        chain = (x_0, *rest)
        yield chain, math.prod(step(chain[i], chain[i - 1], schedule.beta[i]) for i in range(1, t + 1))


@st.composite
def batches(draw, first=1, arrays=2):
    """A schedule, times in first..T, and some arrays of bits of one shape (B, ...), float64."""
    schedule = draw(BETAS)
    shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 3), max_size=2)))
    time = st.integers(first, schedule.T)
    t = draw(st.one_of(time, st.lists(time, min_size=shape[0], max_size=shape[0]).map(np.array)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return schedule, t, *(rng.integers(0, 2, shape).astype(float) for _ in range(arrays))


# ------------------------------------------------------------------------------------ the forward process


@pytest.mark.parametrize("T", [1, 2, 7, 20, 1000])
def test_the_even_schedule_erases_a_T_th_of_the_data_a_step(T):
    schedule = BinomialSchedule.even(T)
    assert schedule.T == T and schedule.beta[0] == 0 and schedule.beta[T] == 1
    np.testing.assert_allclose(schedule.beta[1:], [1 / (T - t + 1) for t in range(1, T + 1)], rtol=1e-15)
    np.testing.assert_allclose(schedule.alpha_bar, 1 - np.arange(T + 1) / T, atol=1e-12)
    assert schedule.alpha_bar[T] == 0  # x_T is pure noise, exactly


@PROPERTY
@given(batches(first=0, arrays=1))
def test_marginal_is_the_sum_over_all_chains(batch):
    schedule, t, x_0 = batch
    p = binomial.forward_marginal(x_0, t, schedule)
    for row, bits, time in zip(p, x_0, each_t(t, len(x_0)), strict=True):
        for i in np.ndindex(bits.shape):
            expected = sum(q for chain, q in chains(schedule, int(bits[i]), time) if chain[-1] == 1)
            np.testing.assert_allclose(row[i], expected, rtol=1e-12)


def test_chains_of_steps_and_jumps_have_the_marginal():
    schedule = BinomialSchedule.from_betas([0.3, 0.05, 0.6, 1.0])
    for bit in (0.0, 1.0):
        x_0 = np.full((N, 1), bit)
        walk = list(binomial.forward_trajectory(x_0, schedule, Rng(0)))
        assert len(walk) == 4
        for t, x_t in enumerate(walk, start=1):
            p = binomial.forward_marginal(x_0, t, schedule)[0, 0]
            for drawn in (x_t, binomial.q_sample(x_0, t, schedule, Rng(1).at(t))):
                assert drawn.shape == x_0.shape and set(np.unique(drawn)) <= {0, 1}
                within(drawn.mean(), p, math.sqrt(p * (1 - p) / N))
        pairs = np.mean((walk[1] == 1) & (walk[0] == 1))  # x_2 depends on x_1 by one step
        p = binomial.forward_marginal(x_0, 1, schedule)[0, 0] * step(1, 1, 0.05)
        within(pairs, p, math.sqrt(p * (1 - p) / N))


# --------------------------------------------------------------------------------------- one step backward


@PROPERTY
@given(batches(arrays=2))
def test_posterior_is_the_share_of_the_chains(batch):
    """Of all chains from x_0 to x_t, weighted by their probability, the share with x_{t-1} = 1."""
    schedule, t, x_0, x_t = batch
    p = binomial.posterior(x_t, x_0, t, schedule)
    for b, time in enumerate(each_t(t, len(x_0))):
        for i in np.ndindex(x_0.shape[1:]):
            through = [0.0, 0.0]
            for chain, q in chains(schedule, int(x_0[b][i]), time):
                through[chain[-2]] += q * (chain[-1] == x_t[b][i])
            np.testing.assert_allclose(p[b][i], through[1] / sum(through), rtol=1e-10, atol=1e-15)
            assert time > 1 or p[b][i] == x_0[b][i]


@PROPERTY
@given(BETAS, st.integers(0, 2**32), st.data())
def test_the_best_reverse_step_is_the_posterior_at_a_guess_from_the_other_bits(schedule, seed, data):
    """For data of two bits with any joint distribution, p(x_{t-1}^i | x_t), summed over all, is the posterior at
    P(x_0^i = 1 | x_t's other bit)."""
    t = data.draw(st.integers(1, schedule.T))
    joint = np.random.default_rng(seed).dirichlet(np.ones(4)).reshape(2, 2)
    kept = math.prod(1 - b for b in schedule.beta[1 : t + 1])
    kept_before = math.prod(1 - b for b in schedule.beta[1:t])

    def far(x, x_0, share):
        return (1 - share) / 2 + share * (x == x_0)

    for x_t in itertools.product((0, 1), repeat=2):
        guess, exact = np.zeros(2), np.zeros(2)
        for i, other in ((0, 1), (1, 0)):
            by_other, by_both = [0.0, 0.0], [0.0, 0.0]
            for x_0 in itertools.product((0, 1), repeat=2):
                weight = joint[x_0] * far(x_t[other], x_0[other], kept)
                by_other[x_0[i]] += weight
                for x_prev in (0, 1):
                    way = far(x_prev, x_0[i], kept_before) * step(x_t[i], x_prev, schedule.beta[t])
                    by_both[x_prev] += weight * way
            guess[i], exact[i] = by_other[1] / sum(by_other), by_both[1] / sum(by_both)
        p = binomial.posterior(np.array([x_t], float), guess[None], t, schedule)
        np.testing.assert_allclose(p[0], exact, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_probability_of_log_odds_is_exact_in_both_tails(dtype, rtol):
    log_odds = np.array([-65, -20, -1, 0, 1, 20, 65], dtype)
    expected = np.array([math.exp(x) / (1 + math.exp(x)) for x in log_odds.tolist()], dtype)
    p = binomial.probability(log_odds)
    assert p.dtype == dtype
    np.testing.assert_allclose(p.numpy(), expected, rtol=rtol)
    surest, none = binomial.probability(np.array([np.inf, -np.inf], dtype)).numpy().tolist()
    assert surest == 1 and 0 < none < 1e-30
    assert gradcheck(binomial.probability, np.array([-30.0, -2.0, 0.0, 0.5, 30.0]), rng=Rng(0)) < 1e-7


# ------------------------------------------------------------------------------------------------ the bound


@PROPERTY
@given(st.floats(0, 1), st.floats(1e-6, 1 - 1e-6))
def test_bernoulli_kl_by_hand(q, p):
    expected = sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)
    kl = binomial.bernoulli_kl(np.array([q]), np.array([p]), np.array([1 - p])).item()
    assert math.isclose(kl, expected, rel_tol=1e-9, abs_tol=1e-12)


@PROPERTY
@given(batches(arrays=2), st.integers(0, 2**32))
def test_reverse_kl_compares_the_two_posteriors(batch, seed):
    schedule, t, x_0, x_t = batch
    log_odds = 3 * np.random.default_rng(seed).normal(size=x_0.shape)
    kl = binomial.reverse_kl(log_odds, x_0, *binomial.evidence(x_t, t, schedule)).numpy()
    q = binomial.posterior(x_t, x_0, t, schedule)
    p = binomial.posterior(x_t, 1 / (1 + np.exp(-log_odds)), t, schedule)
    for b, time in enumerate(each_t(t, len(x_0))):
        for i in np.ndindex(x_0.shape[1:]):
            pairs = ((q[b][i], p[b][i]), (1 - q[b][i], 1 - p[b][i]))
            expected = sum(a * math.log(a / c) for a, c in pairs if a > 0)
            assert math.isclose(kl[b][i], expected, rel_tol=1e-6, abs_tol=1e-12)
            if time == 1:
                assert math.isclose(kl[b][i], -math.log(p[b][i] if x_0[b][i] else 1 - p[b][i]), rel_tol=1e-6)


def test_reverse_kl_has_its_gradient_and_no_blind_spot():
    """Also where the network is sure of the wrong bit, in float32, its error counts in full, with its slope."""
    schedule, t = BinomialSchedule.even(4), np.array([1, 2, 4])
    x_0, x_t = np.random.default_rng(0).integers(0, 2, (2, 3, 5)).astype(float)
    evidence = binomial.evidence(x_t, t, schedule)
    assert gradcheck(lambda a: binomial.reverse_kl(a, x_0, *evidence), 2 * x_t - x_0, rng=Rng(0)) < 1e-7
    wrong = Tensor(np.array([[-60, 60]], np.float32), requires_grad=True)
    bits = np.array([[1, 0]], np.float32)
    loss = binomial.reverse_kl(wrong, bits, *binomial.evidence(bits, 1, BinomialSchedule.even(1)))
    np.testing.assert_allclose(loss.numpy(), [[60, 60]], rtol=1e-6)
    loss.sum().backward()
    np.testing.assert_allclose(wrong.grad, [[-1, 1]], rtol=1e-5)


# A network for two bits, which has learned nothing in particular, and everything about it by enumeration.

SHORT = BinomialSchedule.from_betas([0.2, 0.3, 0.25])  # x_T still shows the data, so that L_T counts


def toy(x_t, t):
    return x_t @ np.array([[0.5, -2.0], [1.5, 0.3]]) + 0.4 * t - 0.9


def p_step(x_prev, x_t, t):
    """p_theta(x_{t-1} | x_t) of two bits."""
    p = binomial.posterior(np.array([x_t], float), 1 / (1 + np.exp(-toy(np.array([x_t], float), t))), t, SHORT)[0]
    return math.prod(p[i] if x_prev[i] else 1 - p[i] for i in range(2))


P_STEP = {
    (t, x_prev, x_t): p_step(x_prev, x_t, t)
    for t in (1, 2, 3)
    for x_prev in itertools.product((0, 1), repeat=2)
    for x_t in itertools.product((0, 1), repeat=2)
}


def trajectories(x_0):
    """All x_1, x_2, x_3: with q(x_{1:T} | x_0) and p_theta(x_{0:T})."""
    for rest in itertools.product(itertools.product((0, 1), repeat=2), repeat=3):
        chain, q, p = (x_0, *rest), 1.0, 0.25
        for t in (1, 2, 3):
            q *= math.prod(step(chain[t][i], chain[t - 1][i], SHORT.beta[t]) for i in range(2))
            p *= P_STEP[t, chain[t - 1], chain[t]]
        yield q, p


@pytest.mark.parametrize("x_0", list(itertools.product((0, 1), repeat=2)))
def test_bound_and_likelihood_against_all_trajectories(x_0):
    """E10 of the whole trajectory is the sum of the terms; eq. 9 averages to p(x_0); and the one bounds the other."""
    every = list(trajectories(x_0))
    e10 = sum(q * (math.log(q) - math.log(p)) for q, p in every)
    likelihood = sum(p for _, p in every)
    many = np.broadcast_to(np.array(x_0, float), (N, 2))
    total = binomial.bound(many, toy, SHORT, Rng(0)).sum(axis=0)
    assert total.shape == (N,)
    within(total.mean(), e10, total.std() / math.sqrt(N))
    assert e10 > -math.log(likelihood)

    weights = np.exp(binomial.log_likelihood(many, toy, SHORT, Rng(1), trajectories=1))
    within(weights.mean(), likelihood, weights.std() / math.sqrt(N))
    estimate = binomial.log_likelihood(many[:1], toy, SHORT, Rng(2), trajectories=500)
    within(estimate, math.log(likelihood), weights.std() / likelihood / math.sqrt(500))


def test_samples_have_the_likelihood():
    x_T = (Rng(0).uniform((N, 2), np.float64) < 0.5).astype(float)
    states = list(binomial.ancestral(toy, x_T, SHORT, Rng(1)))
    assert len(states) == 3
    for x_0 in itertools.product((0, 1), repeat=2):
        likelihood = sum(p for _, p in trajectories(x_0))
        share = np.mean((states[-1] == x_0).all(axis=1))
        within(share, likelihood, math.sqrt(likelihood * (1 - likelihood) / N))
    np.testing.assert_array_equal(states[-1], last(binomial.ancestral(toy, x_T, SHORT, Rng(1))))


@pytest.mark.parametrize("schedule", [SHORT, BinomialSchedule.even(4), BinomialSchedule.even(1)])
def test_the_bound_of_2015_has_a_last_step_that_is_not_trained(schedule):
    """App. B.2: p(x_0 | x_1) = q(x_1 | x_0), which is the reverse step of a network that says nothing at t = 1."""
    x_0 = np.random.default_rng(0).integers(0, 2, (N, 2)).astype(float)
    K = binomial.bound_of_2015(binomial.bound(x_0, toy, schedule, Rng(0)), 2, schedule)
    total = binomial.bound(x_0, lambda x, t: toy(x, t) * (t > 1), schedule, Rng(0)).sum(axis=0)
    assert K.shape == (N,)
    within(K.mean(), -total.mean(), total.std() / math.sqrt(N))


# ------------------------------------------------------------------------------------------- the heartbeat


def ideal(schedule):
    """The network that knows the five heartbeats: the log-odds of each bit, given all the others of x_t."""
    beats = heartbeats().astype(float)

    def denoise(x_t, t):
        share = math.prod(1 - schedule.beta[1 : t + 1])
        with np.errstate(divide="ignore"):
            log_q = np.log((1 - share) / 2 + share * (x_t[:, None] == beats))  # (B, 5, 20)
            log_q = log_q.sum(axis=2, keepdims=True) - log_q
            weight = np.exp(log_q - log_q.max(axis=1, keepdims=True))
            return np.log((weight * beats).sum(axis=1)) - np.log((weight * (1 - beats)).sum(axis=1))

    return denoise


def test_the_bound_of_the_heartbeat_approaches_its_entropy():
    """From above, as T grows: log2 5 = 2.32 bits a sequence, which no model can undercut."""
    x_0 = heartbeats().astype(float)[Rng(0).integers(0, 5, (400,))]
    bits = {}
    for T in (5, 20, 100):
        schedule = BinomialSchedule.even(T)
        total = binomial.bound(x_0, ideal(schedule), schedule, Rng(1)).sum(axis=0) / math.log(2)
        bits[T] = total.mean()
        assert bits[T] > math.log2(5) - 4 * total.std() / 20
    assert bits[5] > bits[20] + 0.5 > bits[100] + 0.6 and bits[100] < math.log2(5) + 0.1


def test_the_ideal_network_draws_heartbeats_each_as_often():
    schedule = BinomialSchedule.even(100)
    x_T = (Rng(0).uniform((500, 20), np.float64) < 0.5).astype(float)
    samples = last(binomial.ancestral(ideal(schedule), x_T, schedule, Rng(1)))
    counts = (samples[:, None] == heartbeats()).all(axis=2).sum(axis=0)
    assert counts.sum() >= 495 and np.abs(counts - 100).max() < 5 * 80**0.5


# -------------------------------------------------------------------------------- kinds of arrays, bad input


FUNCTIONS = {
    "step": lambda a, b, t, s: binomial.step_probability(a, t, s),
    "marginal": lambda a, b, t, s: binomial.forward_marginal(a, t, s),
    "posterior": lambda a, b, t, s: binomial.posterior(a, b, t, s),
    "kl": lambda a, b, t, s: binomial.reverse_kl(a - b, b, *binomial.evidence(a, t, s)).data,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_function_on_a_device(device, name, dtype):
    a, b = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(dtype)
    for t in (3, np.array([1, 2, 5])):
        result = FUNCTIONS[name](backend.to_device(a), backend.to_device(b), t, BinomialSchedule.even(5))
        assert backend.device_of(result) == backend.device()
        assert_close(result, FUNCTIONS[name](a, b, t, BinomialSchedule.even(5)), rtol=1e-5)


def test_sampling_and_bounds_on_a_device(device):
    schedule = BinomialSchedule.even(4)
    x_0 = binomial.draw_bits(Rng(0).uniform((3, 4)), Rng(1))
    runs = [
        lambda: last(binomial.ancestral(lambda x, t: x - 0.5, x_0, schedule, Rng(2))),
        lambda: last(binomial.forward_trajectory(x_0, schedule, Rng(2))),
        lambda: binomial.q_sample(x_0, 2, schedule, Rng(2)),
    ]
    for run in runs:
        x = run()
        assert backend.device_of(x) == backend.device() and x.dtype == np.float32
        assert_close(run(), backend.to_numpy(x))
    for values in (
        binomial.bound(x_0, lambda x, t: x - 0.5, schedule, Rng(2)),
        binomial.log_likelihood(x_0, lambda x, t: x - 0.5, schedule, Rng(2), trajectories=2),
    ):
        assert type(values) is np.ndarray and values.dtype == np.float64 and np.isfinite(values).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BinomialSchedule.even(0), "T >= 1, got 0"),
        (lambda: BinomialSchedule.from_betas([]), r"shape \(1,\)"),
        (lambda: BinomialSchedule.from_betas([0.5, 0.0]), r"\(0, 1\], got beta_2 = 0"),
        (lambda: BinomialSchedule.from_betas([1.5]), r"\(0, 1\], got beta_1 = 1.5"),
        (lambda: BinomialSchedule.from_betas([math.nan]), "got beta_1 = nan"),
        (lambda: BinomialSchedule(np.array([0.1, 0.5])), "beta must be"),
        (lambda: binomial.q_sample(np.array([[-1.0, 1.0]]), 1, SHORT, Rng(0)), "0 or 1, got values from -1 to 1"),
        (lambda: binomial.forward_step(np.array([[0.5]]), 1, SHORT, Rng(0)), "0 or 1, got values from 0.5 to 0.5"),
        (lambda: binomial.bound(np.array([[0.5, 2]]), toy, SHORT, Rng(0)), "0 or 1, got values from 0.5 to 2"),
        (lambda: binomial.posterior(np.ones((1, 2)), np.ones((1, 2)), 4, SHORT), r"1\.\.3 .*got 4"),
        (lambda: binomial.log_likelihood(np.ones((1, 2)), toy, SHORT, Rng(0), trajectories=0), "1 trajectory, got 0"),
    ],
)
def test_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="must hold floats"):
        binomial.q_sample(np.array([[0, 1]]), 1, SHORT, Rng(0))
