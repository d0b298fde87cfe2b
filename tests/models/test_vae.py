"""The autoencoder of latent diffusion (E23): its networks, its two regularisations, its scale (E24), its full size."""

import dataclasses

import numpy as np
import pytest

from tests.diffusion.common import within
from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import randomised
from tests.nn.reference import part
from tinydiff import Rng, Tensor, backend, checkpoint
from tinydiff.autograd import no_grad
from tinydiff.checkpoint import CheckpointError
from tinydiff.models import VAE, VAEConfig
from tinydiff.models.vae import CONFIGS, Codebook, Encoder
from tinydiff.nn import Downsample, Upsample
from tinydiff.ops import mse_loss
from tinydiff.optim import Adam
from tinydiff.rng import Blank
from tinydiff.train import Training, TrainSettings

SMALL = VAEConfig(base=4, multipliers=(1, 2), latent=3, groups=2, patch=2)
VQ = dataclasses.replace(SMALL, regularisation="vq", codes=7)


def images(n=2, size=8, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).uniform(-1, 1, (n, size, size, 3)).astype(dtype)


# ------------------------------------------------------------------------------------------- the two networks


def to_depth(x, f):
    B, H, W, C = x.shape
    return x.reshape(B, H // f, f, W // f, f, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, H // f, W // f, f * f * C)


def to_space(x, f):
    B, H, W, C = x.shape
    return x.reshape(B, H, W, f, f, C // f**2).transpose(0, 1, 3, 2, 4, 5).reshape(B, H * f, W * f, C // f**2)


def layers(x, w, names, config):
    """The layers of these names one after the other, each told by the names of its weights."""
    for name in names:
        own = part(w, name)
        if "norm1.gamma" in own:
            x = reference.res_block(x, None, own, config.groups)
        elif "qkv.weight" in own:
            x = reference.self_attention(x, own, 1, config.groups)
        else:
            x = (reference.downsample if name.startswith("down") else reference.upsample)(x, own)
    return x


def ended(h, w, config):
    return reference.conv(
        reference.silu(reference.group_norm(h, part(w, "norm_out"), config.groups)), part(w, "conv_out")
    )


def numbered(name, w):
    return [f"{name}.{i}" for i in range(1 + max(int(key.split(".")[1]) for key in w if key.startswith(f"{name}.")))]


def expected_moments(x, weights, config):
    w = part(weights, "encoder")
    h = reference.conv(to_depth(x, config.patch), part(w, "conv_in"))
    h = layers(h, w, [*numbered("down", w), *numbered("middle", w)], config)
    return reference.conv(ended(h, w, config), part(weights, "conv_moments"))


def expected_images(z, weights, config):
    w = part(weights, "decoder")
    h = reference.conv(reference.conv(z, part(weights, "conv_z")), part(w, "conv_in"))
    h = layers(h, w, [*numbered("middle", w), *numbered("up", w)], config)
    return to_space(ended(h, w, config), config.patch)


@pytest.mark.parametrize(
    "changes", [{}, {"patch": 1, "blocks": 2, "attention": False}, {"multipliers": (1,), "patch": 4}, {"channels": 1}]
)
def test_the_networks(changes, device):
    config = dataclasses.replace(SMALL, **changes)
    vae, x = randomised(VAE(config, Rng(0))), images()[..., : config.channels]
    weights, f = vae.state_dict(), config.factor
    assert ("encoder.middle.1.qkv.weight" in weights) == ("decoder.middle.1.qkv.weight" in weights) == config.attention
    mean, log_variance = vae.posterior(Tensor(backend.to_device(x)))
    moments = expected_moments(x, weights, config)
    assert mean.shape == (2, 8 // f, 8 // f, 3)
    assert_close(mean, moments[..., :3], rtol=1e-11)
    assert_close(log_variance, np.clip(moments[..., 3:], -30, 20), rtol=1e-11)
    z = np.random.default_rng(1).normal(size=mean.shape)
    drawn = vae.decoder(vae.conv_z(Tensor(backend.to_device(z))))
    assert_close(drawn, expected_images(z, weights, config), rtol=1e-11)
    assert_close(vae.decode(backend.to_device(z)), np.clip(expected_images(z, weights, config), -1, 1), rtol=1e-11)


def test_a_log_variance_stays_where_its_exponential_is_finite():
    vae = VAE(SMALL, Rng(0))
    vae.conv_moments.bias[...] = np.repeat([5.0, -100, 100], 2).astype(np.float32)
    mean, log_variance = (t.numpy() for t in vae.posterior(Tensor(images(dtype=np.float32))))
    assert (log_variance[..., :1] == -30).all() and (log_variance[..., 1:] == 20).all() and mean.min() < -90


def test_many_images_go_through_in_pieces():
    vae, x = VAE(SMALL, Rng(0)), images(130, dtype=np.float32)
    z = vae.encode(x)
    assert z.shape == (130, 2, 2, 3) and z.dtype == np.float32
    assert_close(z[70:73], vae.encode(x[70:73]), rtol=1e-5)
    assert vae.decode(z).shape == x.shape


# ----------------------------------------------------------------------------------------- its published size

PUBLISHED = CONFIGS["stable-diffusion"]


def shapes_after(layers, h, kind):
    """The shape at the end of each level: before each change of resolution, and at the end."""
    shapes = []
    for layer in layers:
        if isinstance(layer, kind):
            shapes.append(h.shape[1:])
        h = layer(h)
    return h, [*shapes, h.shape[1:]]


def test_stable_diffusions_autoencoder():
    """83,653,863 parameters, 512 x 512 x 3 -> 64 x 64 x 4: 48 times fewer numbers. Shapes from an image of 32 x 32."""
    vae = VAE(PUBLISHED, Blank())
    assert vae.count_parameters() == 83_653_863 and vae.factor == 8
    assert vae.encoder.count_parameters() + vae.conv_moments.count_parameters() == 34_163_592 + 72
    assert 512 * 512 * 3 == 48 * (512 // vae.factor) ** 2 * PUBLISHED.latent
    with no_grad():
        h = vae.encoder.conv_in(Tensor(np.zeros((1, 32, 32, 3), np.float32)))
        h, down = shapes_after(vae.encoder.down, h, Downsample)
        assert down == [(32, 32, 128), (16, 16, 256), (8, 8, 512), (4, 4, 512)]
        z = vae.conv_moments(vae.encoder.conv_out(vae.encoder.norm_out(h)))
        assert z.shape == (1, 4, 4, 8)
        h = vae.decoder.conv_in(vae.conv_z(z[..., :4]))
        h, up = shapes_after(vae.decoder.up, h, Upsample)
        assert up == [(4, 4, 512), (8, 8, 512), (16, 16, 256), (32, 32, 128)]
        assert vae.decoder.last(vae.decoder.norm_out(h)).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(("name", "factor", "least"), [("f4", 4, 12), ("f8", 8, 48)])
def test_the_small_configurations(name, factor, least):
    vae = VAE(CONFIGS[name], Rng(0))
    x = images(1, 32, dtype=np.float32)
    z = vae.encode(x)
    assert vae.factor == factor and z.shape == (1, 32 // factor, 32 // factor, 4) and x.size == least * z.size
    assert vae.decode(z).shape == x.shape


# ------------------------------------------------------------------------------------------- regularisations


def draws_of_one_image(n=600):
    """A VAE, the mean and standard deviation of z of an image, n draws of z, and their price."""
    vae, x = randomised(VAE(SMALL, Rng(0))), images(1)
    mean, log_variance = (t.numpy() for t in vae.posterior(Tensor(x)))
    vae.conv_z = lambda z: z
    z, price = vae.draw(Tensor(x.repeat(n, axis=0)), Rng(1))
    return x, mean, np.exp(log_variance / 2), z.numpy(), price.item()


def test_what_is_drawn_has_the_mean_and_the_variance():
    _, mean, std, z, _ = draws_of_one_image()
    within(z.mean(axis=0), mean[0], std[0] / 600**0.5)
    within(z.std(axis=0), std[0], std[0] / 1200**0.5)


def test_kl_is_the_divergence_that_monte_carlo_finds():
    """E_q[log q(z) - log p(z)], over draws of z as the decoder is shown them."""
    x, mean, std, z, price = draws_of_one_image()
    log_q = -0.5 * ((z - mean) / std) ** 2 - np.log(std)
    gaps = (log_q + 0.5 * z**2).reshape(600, -1).sum(axis=1)
    within(np.mean(gaps), price * x.size, np.std(gaps) / 600**0.5)


def test_the_price_is_a_mean_over_images_in_nats_a_dimension():
    vae, x = randomised(VAE(SMALL, Rng(0))), images(3)
    m, s = (t.numpy() for t in vae.posterior(Tensor(x)))
    kl = 0.5 * (m**2 + np.exp(s) - s - 1).reshape(3, -1).sum(axis=1)
    assert np.isclose(vae.draw(Tensor(x), Rng(1))[1].item(), kl.mean() / (8 * 8 * 3), rtol=1e-12)


def test_the_nearest_vector(device):
    book = randomised(Codebook(7, 3, Rng(0)))
    z, e = np.random.default_rng(1).normal(size=(2, 4, 5, 3)), book.state_dict()["weight"]
    expected = np.array([[[min(range(7), key=lambda k: np.sum((v - e[k]) ** 2)) for v in row] for row in i] for i in z])
    z_e = Tensor(backend.to_device(z))
    assert_close(book.nearest(z_e.data), expected)
    quantised, loss = book(z_e)
    assert_close(quantised, e[expected], rtol=1e-12)
    assert np.isclose(loss.item(), 1.25 * np.mean((z - e[expected]) ** 2), rtol=1e-12)


def test_gradients_of_a_codebook():
    """Straight through to z; the loss moves z to its vector, a quarter as strongly as the vector to it."""
    book, g = randomised(Codebook(5, 2, Rng(0))), np.random.default_rng(2).normal(size=(2, 3, 3, 2))
    z = Tensor(np.random.default_rng(1).normal(size=(2, 3, 3, 2)), requires_grad=True)
    (book(z)[0] * g).sum().backward()
    assert_close(z.grad, g)
    assert book.weight.grad is None
    z.grad = None
    book(z)[1].backward()
    chosen, n = book.nearest(z.data), z.size
    apart = z.data - book.weight.data[chosen]
    assert_close(z.grad, 0.25 * 2 * apart / n, rtol=1e-12)
    expected = [(-2 * apart[chosen == k] / n).sum(axis=0) for k in range(5)]
    assert_close(book.weight.grad, np.stack(expected), rtol=1e-12)


def test_a_decoder_sees_only_vectors_of_the_codebook():
    vae = randomised(VAE(VQ, Rng(0)))
    z = vae.encode(images())
    assert_close(z, expected_moments(images(), vae.state_dict(), VQ), rtol=1e-11)
    codes = vae.codebook.state_dict()["weight"][vae.codebook.nearest(z)]
    assert_close(vae.decode(z), vae.decode(codes), rtol=1e-12)
    assert np.abs(z - codes).max() > 0.01
    shown, price = vae.draw(Tensor(images()), Rng(1))
    assert_close(shown, vae.conv_z(Tensor(codes)).numpy(), rtol=1e-11)
    assert np.isclose(price.item(), 1.25 * np.mean((z - codes) ** 2))


@pytest.mark.parametrize(("regularisation", "weight"), [("kl", 1e-3), ("vq", 1.0)])
def test_it_learns_to_draw_what_it_saw(regularisation, weight):
    """Images of four colours each, which begin to come back after a few steps."""
    vae = VAE(dataclasses.replace(SMALL, base=8, regularisation=regularisation, codes=64), Rng(0))
    adam = Adam(vae.parameters())

    def squares(n, seed):
        return images(n, 2, seed, np.float32).repeat(4, axis=1).repeat(4, axis=2)

    for step in range(60):
        x = squares(16, step)
        z, price = vae.draw(Tensor(x), Rng(1).at(step))
        (mse_loss(vae.decoder(z), x) + weight * price).backward()
        adam.step(1e-2)
    x = squares(50, 1000)
    assert np.mean((vae.decode(vae.encode(x)) - x) ** 2) < 0.85 * x.var()


# --------------------------------------------------------------------------------------------------- the scale


def test_the_scale_gives_unit_variance_and_changes_no_image(tmp_path):
    vae, x = VAE(SMALL, Rng(0)), images(20, dtype=np.float32)
    before, z = vae.decode(vae.encode(x)), vae.encode(x)
    scale = vae.measure_scale(x)
    assert np.isclose(scale, 1 / z.std(), rtol=1e-5) and vae.config.scale == scale
    assert np.isclose(vae.encode(x).std(), 1, rtol=1e-5)
    assert_close(vae.decode(vae.encode(x)), before, atol=1e-5)
    assert np.isclose(vae.measure_scale(x), scale, rtol=1e-5)  # whatever scale there was


def test_the_scale_is_in_the_checkpoint_and_in_what_is_exported(tmp_path):
    vae = VAE(SMALL, Rng(0))
    training = Training(vae, TrainSettings(2), tmp_path / "checkpoint.npz", {})
    scale = vae.measure_scale(images(20, dtype=np.float32))
    training.save()
    checkpoint.export(tmp_path, tmp_path / "small.npz")
    for path in (tmp_path, tmp_path / "small.npz"):
        loaded = VAE.load(path)
        assert loaded.config == vae.config and loaded.config.scale == scale and not loaded.training
    assert_close(VAE.load(tmp_path).encode(images(2)), vae.encode(images(2)))


def test_a_discriminator_in_the_checkpoint_is_left_there(tmp_path):
    vae = VAE(SMALL, Rng(0))
    weights = vae.state_dict() | {"discriminator.out.bias": np.zeros(1, np.float32)}
    meta = {"kind": "vae", "config": dataclasses.asdict(SMALL)}
    checkpoint.save(tmp_path / "a.npz", checkpoint.prefixed("ema", weights), meta)
    assert VAE.load(tmp_path / "a.npz").count_parameters() == vae.count_parameters()
    weights["other.bias"] = np.zeros(1, np.float32)
    checkpoint.save(tmp_path / "a.npz", checkpoint.prefixed("ema", weights), meta)
    with pytest.raises(CheckpointError, match=r"unknown other\.bias"):
        VAE.load(tmp_path / "a.npz")


def test_latents_that_are_all_alike():
    with pytest.raises(ValueError, match="all alike"):
        VAE(SMALL, Blank()).measure_scale(images(2))


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"multipliers": ()}, "at least one level"),
        ({"latent": 0}, "sizes of at least 1"),
        ({"patch": 0}, "sizes of at least 1"),
        ({"multipliers": (1, 0)}, "sizes of at least 1"),
        ({"base": 20}, r"groups \(8\) must divide base \(20\)"),
        ({"regularisation": "gan"}, "must be one of kl, vq, got 'gan'"),
        ({"scale": 0.0}, "must be positive, got 0.0"),
        ({"scale": float("inf")}, "must be positive, got inf"),
    ],
)
def test_a_vae_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        VAEConfig(**fields)


@pytest.mark.parametrize("shape", [(1, 8, 6, 3), (1, 6, 8, 3), (1, 8, 8, 1), (8, 8, 3), (1, 0, 8, 3), (0, 8, 8, 3)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"images \(B, H, W, 3\) with H and W divisible by 4, got"):
        VAE(SMALL, Rng(0)).encode(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(1, 2, 2, 4), (2, 2, 3), (0, 2, 2, 3)])
def test_latents_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"takes latents \(B, h, w, 3\), got"):
        VAE(SMALL, Rng(0)).decode(np.zeros(shape, np.float32))


def test_a_codebook_has_no_posterior():
    with pytest.raises(ValueError, match="no posterior"):
        VAE(VQ, Rng(0)).posterior(Tensor(images()))


def test_the_encoder_alone():
    """Its outputs are what it was asked for: twice the latent's channels, or as many."""
    assert Encoder(SMALL, 5, Rng(0))(Tensor(images(dtype=np.float32))).shape == (2, 2, 2, 5)
