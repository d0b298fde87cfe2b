"""The autoregressive prior (E31): its codes, the order in which it draws them, and with which probabilities."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.diffusion.common import PROPERTY, within
from tests.helpers import assert_close
from tests.models.prior_common import SIZES, captions, embeddings, prefix, told, unit
from tests.nn import reference
from tests.nn.common import layer_gradcheck, randomised
from tinydiff import Rng, backend
from tinydiff.models import AutoregressivePrior, AutoregressivePriorConfig, Condition
from tinydiff.models.autoregressive_prior import Codebook, PrincipalComponents, categorical
from tinydiff.nn import TransformerConfig
from tinydiff.optim import Adam
from tinydiff.train import Training, TrainSettings

CONFIG = AutoregressivePriorConfig(**SIZES, components=3, bins=4)


def made(dtype=np.float32, **fields):
    """A model with random weights, and codes that were fitted."""
    model = randomised(AutoregressivePrior(dataclasses.replace(CONFIG, **fields), Rng(0)), dtype=dtype)
    model.codebook.fit(embeddings(50, 2), embeddings(50, 3))
    return model


# ------------------------------------------------------------------------------------ embeddings as codes


@PROPERTY
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 2**32))
def test_principal_components_are_those_of_the_singular_value_decomposition(n, d, seed):
    rows = np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1)
    found = PrincipalComponents.of(rows)
    _, s, v = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    k = len(s)
    np.testing.assert_allclose(found.variance[:k], s**2 / n, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.directions @ found.directions.T, np.eye(d), atol=1e-9)
    for variance, ours, theirs in zip(found.variance[:k], found.directions, v, strict=False):
        if np.sum(abs(found.variance - variance) < 0.05 * found.variance[0]) == 1:  # else any mixture is as good
            assert abs(ours @ theirs) > 1 - 1e-6


@PROPERTY
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 1))
def test_as_many_components_as_explain_the_share(variance, share):
    variance = np.sort(variance)[::-1]
    found = PrincipalComponents(np.zeros(len(variance)), np.eye(len(variance)), variance)
    k, exact = found.needed(share), 1e-9 * variance.sum()
    assert sum(variance[:k]) >= share * sum(variance) - exact
    assert k == 1 or sum(variance[: k - 1]) < share * sum(variance) + exact


@PROPERTY
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**32))
def test_codes_are_the_nearest_levels(K, bins, seed):
    """E31, by a loop; the levels are quantiles, so that no code is rare."""
    rng = np.random.default_rng(seed)
    z_i, z_t = (unit(rng.normal(size=(60, 4)) * [1, 2, 3, 4]) for _ in range(2))
    book = Codebook(dataclasses.replace(CONFIG, components=K, embedding=4, bins=bins), "cpu").to(np.float64)
    book.fit(z_i, z_t)
    codes, levels, found = book.codes(z_i, z_t), book.levels.data, PrincipalComponents.of(z_i)
    for n, k in itertools.product(range(60), range(1 + K)):
        value = z_i[n] @ z_t[n] if k == 0 else (z_i[n] - found.mean) @ found.directions[k - 1]
        distances = [abs(value - level) for level in levels[k]]
        assert distances[codes[n, k]] <= min(distances) + 1e-9
    for column in codes.T:
        assert np.bincount(column, minlength=bins).min() >= 60 / bins / 5
    y = np.array([[levels[k, codes[n, k]] for k in range(1, 1 + K)] for n in range(60)])
    np.testing.assert_allclose(book.embeddings(codes), unit(found.mean + y @ found.directions[:K]), atol=1e-9)


def test_with_all_components_and_fine_levels_little_is_lost(device):
    """The more levels, the nearer an embedding comes back to itself."""
    z_i, z_t, losses = embeddings(400, 2, np.float32), embeddings(400, 3, np.float32), []
    for bins in (4, 16, 64):
        book = Codebook(dataclasses.replace(CONFIG, components=5, bins=bins), backend.device())
        book.fit(z_i, z_t)
        codes = book.codes(backend.to_device(z_i), backend.to_device(z_t))
        losses.append(1 - np.mean((backend.to_numpy(book.embeddings(codes)) * z_i).sum(axis=1)))
    assert losses[0] > 5 * losses[1] > 25 * losses[2] and losses[2] < 1e-3


# ------------------------------------------------------------------------------------ against formulas


def slow_logits(weights, codes, text):
    """The logits of c_1, ..., c_n, caption by caption and without padding."""
    rows = []
    for c, (states, z_t) in zip(codes, told(text), strict=True):
        own = [weights["tokens.weight"][code] + weights["places"][k] for k, code in enumerate(c)]
        tokens = np.array([*prefix(weights, states, z_t), *own])
        h = reference.transformer(tokens[None], reference.part(weights, "transformer"), CONFIG.transformer)[0]
        rows.append(reference.linear(h[-len(c) :], reference.part(weights, "out")))
    return np.array(rows)


@pytest.mark.parametrize("n", [1, 3])
def test_the_output_is_the_formula(n, device):
    model, text = made(np.float64), captions(5)
    codes = np.random.default_rng(0).integers(0, 4, (5, n))
    assert_close(model(backend.to_device(codes), text), slow_logits(model.state_dict(), codes, text), rtol=1e-10)


def test_a_code_is_told_only_those_before_it(device):
    """The chain rule of E31 needs that: p(c_k | y, c_0, ..., c_{k-1})."""
    model, text = made(np.float64), captions(2)
    codes = np.array([[0, 1, 2], [3, 0, 1]])
    logits = backend.to_numpy(model(backend.to_device(codes), text).data)
    for k in range(3):
        other = codes.copy()
        other[:, k] = (other[:, k] + 1) % 4
        changed = abs(backend.to_numpy(model(backend.to_device(other), text).data) - logits).max(axis=(0, 2))
        assert (changed[:k] == 0).all() and (changed[k:] > 1e-6).all()


def test_the_loss_is_the_formula(device):
    """−log p of the codes after the first, from the logits, averaged over captions and codes."""
    model, z_i, text = made(np.float64, text_drop=0.0), embeddings(6), captions(6)
    codes = backend.to_numpy(model.codebook.codes(backend.to_device(z_i), text.vector))
    logits, total = slow_logits(model.state_dict(), codes[:, :3], text), 0.0
    for row, wanted in zip(logits.reshape(18, 4), codes[:, 1:].reshape(18), strict=True):
        total -= math.log(math.exp(row[wanted]) / sum(map(math.exp, row)))
    loss = model.loss(backend.to_device(z_i), Rng(5), text, captions(1, 9))
    assert loss.item() == pytest.approx(total / 18, rel=1e-9)


def test_some_captions_are_hidden():
    model, z_i, text, empty = made(text_drop=1.0), embeddings(6, dtype=np.float32), captions(6), captions(1, 9)
    codes, *told_ = model.draw(z_i, Rng(0), text, empty)
    np.testing.assert_array_equal(codes, model.codebook.codes(z_i, text.vector))  # the pair's own z_t decides c_0
    for got, expected in zip(told_, vars(empty.repeated(6)).values(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_gradients(device):
    """All but the codebook's numbers have one, which are fitted."""
    model, text = made(np.float64), captions(3)
    drawn = model.draw(backend.to_device(embeddings(3)), Rng(0), text, captions(1, 9))
    model.loss_of(*drawn).backward()
    without = {name for name, p in model.parameters().items() if p.grad is None}
    assert without == {"codebook.mean", "codebook.directions", "codebook.levels"}
    model.zero_grad()
    assert layer_gradcheck(model, call=lambda: model.loss_of(*drawn)) <= 1e-6


# ------------------------------------------------------------------------------------------------ drawing


def test_rows_are_drawn_with_the_probabilities_of_softmax(device):
    logits = np.array([[0.0, 1.0, -1.0], [3.0, 0.0, 0.0]], np.float32)
    n = 4000
    drawn = backend.to_numpy(categorical(backend.to_device(np.repeat(logits, n, axis=0)), Rng(1))).reshape(2, n)
    p = np.exp(logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    counts = np.array([[np.mean(row == k) for k in range(3)] for row in drawn])
    within(counts, p, np.sqrt(p * (1 - p) / n))


@pytest.mark.parametrize(("temperature", "guidance"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_embeddings_are_drawn_by_the_chain_rule(temperature, guidance):
    """How often each embedding comes, against ∏ p(c_k | y, c_0, ..., c_{k-1}) summed over the upper c_0 (E31, E35)."""
    model, text, empty = made(components=2, bins=2), captions(1, dtype=np.float32), captions(1, 9, np.float32)
    expected = {}
    for first, second in itertools.product(range(2), repeat=2):
        codes = np.array([[1, first]])  # of two codes the upper half is 1
        c, u = (model(codes, said).data[0].astype(float) for said in (text, empty))
        p = np.exp((u + guidance * (c - u)) / temperature)
        p /= p.sum(axis=1, keepdims=True)
        expected[first, second] = p[0, first] * p[1, second]
    n = 4000
    drawn = model.candidates(text.repeated(n), Rng(2), temperature, guidance=guidance, empty=empty)[0]
    assert sum(expected.values()) == pytest.approx(1)
    for codes, p in expected.items():
        z = model.codebook.embeddings(np.array([[1, *codes]]))
        within(np.mean(abs(drawn - z).max(axis=1) < 1e-6), p, max((p * (1 - p) / n) ** 0.5, 1 / n))


def test_sampling(device):
    """Unit vectors; the first candidates of equal rng are equal; the most aligned of them stays (E32)."""
    model, text, empty = made(), captions(3, dtype=np.float32), captions(1, 9, np.float32)
    three = model.candidates(text, Rng(3), n=3, guidance=2.0, empty=empty)
    assert three.shape == (3, 3, 5) and three.dtype == np.float32
    assert_close((three * three).sum(axis=-1), np.ones((3, 3), np.float32), atol=1e-5)
    two = model.candidates(text, Rng(3), n=2, guidance=2.0, empty=empty)
    assert_close(two, backend.to_numpy(three[:2]))
    best, aligned = model.sample(text, Rng(3), guidance=2.0, empty=empty), (two * text.vector).sum(axis=-1)
    assert_close((best * text.vector).sum(axis=-1), backend.to_numpy(aligned).max(axis=0), atol=1e-6)


def test_it_learns_what_a_caption_leaves_open():
    """One caption with one image, and one that fits two: after training it draws both of these, and not their mean."""
    x, y, z = np.eye(4, dtype=np.float32)[:3]
    two = Condition(Rng(0).normal((2, 1, 6)), np.ones((2, 1), bool), embeddings(2, dtype=np.float32, d=4))
    text, z_i = two.taken(np.array([0, 0, 1, 1] * 8)), np.stack([x, x, y, z] * 8)
    empty, sizes = Condition(two.states[:1] * 0, two.mask[:1], two.vector[:1]), SIZES | {"embedding": 4}
    model = AutoregressivePrior(AutoregressivePriorConfig(**sizes, text_drop=0.0, components=2, bins=8), Rng(1))
    model.codebook.fit(z_i, text.vector)
    adam = Adam(model.parameters())
    for step in range(60):
        model.loss(z_i, Rng(2).at(step), text, empty).backward()
        adam.step(2e-2 * (1 - step / 60))
    drawn = model.candidates(two.taken(np.repeat([0, 1], 40)), Rng(3), empty=empty)[0]
    own, either = drawn[:40] @ x, np.stack([drawn[40:] @ y, drawn[40:] @ z])
    assert own.mean() > 0.9 and np.median(either.max(axis=0)) > 0.9
    assert 0.2 < np.mean(either[0] > either[1]) < 0.8


def test_it_is_loaded_with_its_codes(tmp_path):
    """Training moves all but the codebook; the averaged weights hold it too."""
    model = made()
    before = model.codebook.state_dict()
    training = Training(model, TrainSettings(2), tmp_path / "checkpoint.npz", {})
    model.loss(embeddings(6, dtype=np.float32), Rng(0), captions(6, dtype=np.float32), captions(1, 9)).backward()
    training.optimiser.gather()
    training.advance(1.0)
    training.save()
    loaded = AutoregressivePrior.load(tmp_path)
    assert loaded.config == CONFIG and not loaded.training
    for name, array in loaded.codebook.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert np.abs(loaded.out.weight.data - made().out.weight.data).max() > 0


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"transformer": TransformerConfig(8, 1, 1)}, "a causal transformer"),
        ({"components": 0}, "1 to 5 components and 2 bins, got 0 and 4"),
        ({"components": 6}, "1 to 5 components and 2 bins, got 6 and 4"),
        ({"bins": 1}, "2 bins, got 3 and 1"),
    ],
)
def test_bad_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **fields)


def test_bad_calls_are_refused():
    model, text, empty = made(), captions(2, dtype=np.float32), captions(1, 9, np.float32)
    for temperature in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be a finite number above 0, got {temperature}"):
            model.sample(text, Rng(0), temperature, empty=empty)
    with pytest.raises(ValueError, match="guidance must be a finite number, got nan"):
        model.sample(text, Rng(0), guidance=math.nan, empty=empty)
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        model.sample(text, Rng(0), candidates=0, empty=empty)
    for share in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"explained must be in \(0, 1\], got {share}"):
            PrincipalComponents.of(embeddings(9)).needed(share)
    with pytest.raises(ValueError, match=r"two rows \(N, d\) or more, got \(1, 5\)"):
        PrincipalComponents.of(embeddings(1))
