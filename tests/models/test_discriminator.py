"""The whole loss of the first stage (E23): the patch discriminator, each term, the adaptive weight, who learns what."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import randomised
from tests.nn.reference import part
from tinydiff import Rng, Tensor, backend
from tinydiff.models import VAE, AdversarialVAE, LossWeights, VAEConfig
from tinydiff.models.discriminator import (
    PatchDiscriminator,
    gradient_of,
    hinge,
    perceptual_distance,
    with_gradient,
)
from tinydiff.ops import downsample_average
from tinydiff.optim import Adam
from tinydiff.train import Training, TrainSettings

SMALL = VAEConfig(base=4, multipliers=(1, 2), latent=3, groups=2, patch=2)
WEIGHTS = LossWeights(perceptual=0.7, regularisation=0.01, adversarial=0.3, start=5)


def images(n=2, size=16, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).uniform(-1, 1, (n, size, size, 3)).astype(dtype)


def features(x):
    """Two feature maps that differ in size and in channels."""
    return [x * 2 + 0.5, downsample_average(x[..., :2] * x[..., 1:])]


def model(weights=WEIGHTS, config=SMALL, seen=features):
    return randomised(AdversarialVAE(config, weights, Rng(0), seen))


# ------------------------------------------------------------------------------------------- the discriminator


@pytest.mark.parametrize("layers", [1, 2])
def test_the_discriminator(layers, device):
    network = randomised(PatchDiscriminator(3, Rng(0), base=8, layers=layers))
    x, w = images(), network.state_dict()
    h = reference.silu(reference.conv(x, part(w, "convs.0"), stride=2))
    for i in range(1, layers + 1):
        h = reference.conv(h, part(w, f"convs.{i}"), stride=2 if i < layers else 1)
        h = reference.silu(reference.group_norm(h, part(w, f"norms.{i - 1}"), 8))
    assert_close(network(Tensor(backend.to_device(x))), reference.conv(h, part(w, "out")), rtol=1e-11)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_each_output_sees_a_patch(layers, patch):
    """The number of rows whose pixels the middle output depends on, without the norms, which see all of an image."""
    network = randomised(PatchDiscriminator(1, Rng(0), base=8, layers=layers))
    network.norms = [lambda h: h] * layers
    x = Tensor(images(1, 2 * patch)[..., :1], requires_grad=True)
    said = network(x)
    middle = said.shape[1] // 2
    said[0, middle, middle, 0].sum().backward()
    assert np.count_nonzero(np.abs(x.grad[0, ..., 0]).max(axis=1)) == patch


def test_hinge():
    real, drawn = np.array([[2.0, 0.5, -1.0]]), np.array([[-3.0, 0.25, 1.0]])
    expected = 0.5 * np.mean([0, 0.5, 2]) + 0.5 * np.mean([0, 1.25, 2])
    assert np.isclose(hinge(Tensor(real), Tensor(drawn)).item(), expected)


# ---------------------------------------------------------------------------------------------------- its terms


def naive_perceptual(a, b):
    total = 0
    for p, q in zip(a, b, strict=True):
        cells = [(u / np.linalg.norm(u) - v / np.linalg.norm(v)) for u, v in zip(flat(p), flat(q), strict=True)]
        total += np.mean([np.sum(d**2) for d in cells])
    return total


def flat(a):
    return a.reshape(-1, a.shape[-1])


def test_perceptual_distance(device):
    a, b = ([np.random.default_rng(i).normal(size=s) for s in ((2, 4, 4, 3), (2, 2, 2, 5))] for i in range(2))
    tensors = [[Tensor(backend.to_device(m)) for m in maps] for maps in (a, b)]
    assert np.isclose(perceptual_distance(*tensors).item(), naive_perceptual(a, b), rtol=1e-6)
    assert perceptual_distance(tensors[0], tensors[0]).item() == 0


def parts(vae, x, rng):
    """L_rec, R, -D(x̂) and L_D of one draw, from the networks alone."""
    z, price = vae.draw(Tensor(x), rng)
    rec, *others = of_drawn(vae, x, vae.decoder(z).numpy())
    return rec, price.item(), *others


def of_drawn(vae, x, drawn):
    """L_rec, -D(x̂) and L_D."""
    maps = [[m.numpy() for m in features(Tensor(a))] for a in (drawn, x)]
    rec = np.mean(np.abs(drawn - x)) + 0.7 * naive_perceptual(*maps)
    said, of_real = (vae.discriminator(Tensor(a)).numpy() for a in (drawn, x))
    judging = 0.5 * np.mean(np.maximum(0, 1 - of_real)) + 0.5 * np.mean(np.maximum(0, 1 + said))
    return rec, -said.mean(), judging


def slopes(function, parameter, size=1e-6):
    """The numerical gradients of the values of function() with respect to a parameter."""
    gradients = []
    for index in np.ndindex(*parameter.shape):
        kept, values = parameter.data[index], []
        for step in (size, -size):
            parameter.data[index] = kept + step
            values.append(np.array(function()))
        parameter.data[index] = kept
        gradients.append((values[0] - values[1]) / (2 * size))
    return np.stack(gradients, axis=1)


def test_the_terms_and_the_adaptive_weight():
    """λ is the ratio of two gradients at the last kernel, which differences find too."""
    vae, x = model(config=dataclasses.replace(SMALL, base=2, groups=1, multipliers=(1,))), images(1, 8)
    loss, terms = vae.loss(x, 6, Rng(3))
    rec, price, fooling, judging = parts(vae, x, Rng(3))
    h, last = vae.decoder.features(vae.draw(Tensor(x), Rng(3))[0]), vae.decoder.conv_out.weight
    found = slopes(lambda: of_drawn(vae, x, vae.decoder.last(h).numpy()), last)
    of_rec, of_fooling, _ = np.linalg.norm(found, axis=1)
    assert np.isclose(terms["balance"], of_rec / (of_fooling + 1e-4), rtol=1e-4)
    expected = rec + 0.01 * price + 0.3 * terms["balance"] * fooling + judging
    assert np.isclose(loss.item(), expected, rtol=1e-5)
    assert np.isclose(terms["pixels"] + 0.7 * terms["perceptual"], rec, rtol=1e-5)
    found = [terms[name] for name in ("regularisation", "generator", "discriminator")]
    assert np.allclose(found, [price, fooling, judging], rtol=1e-6)


def test_each_player_minimises_its_own_loss():
    """Along random directions: the autoencoder's loss with λ held fast, and the discriminator's with x̂ held fast."""
    vae, x = model(), images(2)
    loss, terms = vae.loss(x, 6, Rng(3))
    loss.backward()
    weight = 0.3 * terms["balance"]

    def of_autoencoder():
        rec, price, fooling, _ = parts(vae, x, Rng(3))
        return rec + 0.01 * price + weight * fooling

    critic = vae.discriminator.parameters()
    own = {name: p for name, p in vae.parameters().items() if not name.startswith("discriminator")}
    for players, function in ((own, of_autoencoder), (critic, lambda: parts(vae, x, Rng(3))[3])):
        directions = {name: np.random.default_rng(1).normal(size=p.shape) for name, p in players.items()}
        expected = sum(float((p.grad * directions[name]).sum()) for name, p in players.items())
        values = []
        for step in (1e-6, -2e-6):
            for name, p in players.items():
                p[...] = p.data + step * directions[name]
            values.append(function())
        for name, p in players.items():
            p[...] = p.data + 1e-6 * directions[name]
        assert np.isclose(expected, (values[0] - values[1]) / 2e-6, rtol=1e-4)


def test_before_its_start_the_discriminator_does_not_play():
    vae, x = model(), images(2)
    loss, terms = vae.loss(x, 5, Rng(3))
    rec, price, *_ = parts(vae, x, Rng(3))
    assert set(terms) == {"pixels", "perceptual", "regularisation"}
    assert np.isclose(loss.item(), rec + 0.01 * price, rtol=1e-5)
    loss.backward()
    assert all(p.grad is None for p in vae.discriminator.parameters().values())
    assert all(p.requires_grad for p in vae.parameters().values())


def test_without_features_and_without_a_discriminator():
    vae, x = model(LossWeights("l2", adversarial=0, regularisation=0), seen=None), images(2)
    loss, terms = vae.loss(x, 100, Rng(3))
    drawn = vae.decoder(vae.draw(Tensor(x), Rng(3))[0]).numpy()
    assert vae.discriminator is None and np.isclose(terms["pixels"], np.mean((drawn - x) ** 2))
    assert np.isclose(loss.item(), terms["pixels"]) and set(terms) == {"pixels", "regularisation"}


def test_with_gradient():
    x, gradient = Tensor(images(1), requires_grad=True), images(1, seed=1)
    loss = with_gradient(x, 3.5, gradient)
    assert np.isclose(loss.item(), 3.5)
    assert_close(gradient_of(loss * 2, x), 2 * gradient, rtol=1e-12)


# --------------------------------------------------------------------------------------------------- in training


def test_the_discriminator_learns_to_tell():
    """With a decoder that does not learn, images of stripes and of checks are told apart after a few steps."""
    network = PatchDiscriminator(1, Rng(0), base=8)
    rows = np.where(np.arange(16) % 4 < 2, 1.0, -1.0).astype(np.float32)
    stripes = np.broadcast_to(rows[:, None, None], (4, 16, 16, 1))
    checks = stripes * stripes.transpose(0, 2, 1, 3)
    adam = Adam(network.parameters())
    for _ in range(20):
        hinge(network(Tensor(stripes)), network(Tensor(checks))).backward()
        adam.step(1e-2)
    assert network(Tensor(stripes)).numpy().mean() > 0.5 > -0.5 > network(Tensor(checks)).numpy().mean()


def test_its_checkpoint_is_that_of_a_vae(tmp_path, device):
    vae = AdversarialVAE(SMALL, WEIGHTS, Rng(0), features)
    Training(vae, TrainSettings(2), tmp_path / "checkpoint.npz", {}).save()
    loaded, x = VAE.load(tmp_path), backend.to_device(images(dtype=np.float32))
    assert type(loaded) is VAE and loaded.config == SMALL
    assert not [name for name in loaded.parameters() if "discriminator" in name]
    assert_close(loaded.encode(x), backend.to_numpy(vae.encode(x)), rtol=1e-6)
    assert np.isfinite(vae.loss(x, 6, Rng(1))[0].item())


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pixels": "l3"}, "one of l1, l2, got 'l3'"),
        ({"perceptual": -1.0}, "cannot be negative"),
        ({"adversarial": -0.1}, "cannot be negative"),
        ({"start": -1}, "cannot be negative"),
    ],
)
def test_weights_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        LossWeights(**fields)


@pytest.mark.parametrize("sizes", [{"base": 12}, {"base": 0}, {"layers": 0}])
def test_a_discriminator_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="layers >= 1 and a base that 8 divides"):
        PatchDiscriminator(3, Rng(0), **sizes)


def test_features_of_different_networks_are_refused():
    with pytest.raises(ValueError, match="argument 2"):
        perceptual_distance([Tensor(images())] * 2, [Tensor(images())])


def test_features_that_would_be_trained_are_refused():
    with pytest.raises(TypeError, match="got the module PatchDiscriminator"):
        AdversarialVAE(SMALL, WEIGHTS, Rng(0), PatchDiscriminator(3, Rng(0)))
