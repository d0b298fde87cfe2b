"""The classifier: its network against loops, what it says of images, what it learns from, how it is saved."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import randomised
from tests.nn.reference import part
from tinydiff import Rng, Tensor, backend
from tinydiff.data import mnist
from tinydiff.data.loader import Batches
from tinydiff.image import to_signed
from tinydiff.models import Classifier, ClassifierConfig
from tinydiff.models.classifier import reading_loss
from tinydiff.optim import AdamW
from tinydiff.train import Training, TrainSettings
from tinydiff.workers import Share

SMALL = ClassifierConfig(size=(6, 9), classes=3, width=8, features=5, dropout=0.0)


def images(n, config=SMALL, dtype=np.float32):
    return np.random.default_rng(n).uniform(-1, 1, (n, *config.size, 1)).astype(dtype)


def expected_features(x, weights):
    """The network, of convolutions that are loops."""
    for i, stride in enumerate((1, 2, 1, 2)):
        x = reference.conv(x, part(weights, f"convs.{i}"), stride=stride)
        x = reference.silu(reference.group_norm(x, part(weights, f"norms.{i}"), 8))
    return reference.silu(reference.linear(x.reshape(len(x), -1), part(weights, "hidden")))


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_the_network(device):
    model = randomised(Classifier(SMALL, Rng(0))).to(np.float64)
    x, weights = images(4, dtype=np.float64), model.state_dict()
    h = expected_features(x, weights)
    logits = reference.linear(h, part(weights, "out"))
    on_device = backend.to_device(x)
    assert_close(model(Tensor(on_device)), logits, rtol=1e-12)
    assert_close(model.features(on_device), h, rtol=1e-12)
    assert_close(model.probabilities(on_device), softmax(logits), rtol=1e-12)


def test_what_it_says_of_an_image_does_not_depend_on_the_others():
    model = Classifier(SMALL, Rng(0))
    many = images(300)  # more than it reads at once
    p, h = model.probabilities(many), model.features(many)
    assert p.shape == (300, 3) and h.shape == (300, 5) and p.dtype == h.dtype == np.float32
    assert np.allclose(p.sum(axis=1), 1)
    for i in (0, 249, 250, 299):
        assert_close(model.probabilities(many[i : i + 1]), p[i : i + 1], rtol=1e-5)
        assert_close(model.features(many[i : i + 1]), h[i : i + 1], rtol=1e-5)


def test_dropout_hides_features_in_training_alone():
    model = Classifier(ClassifierConfig(SMALL.size, 3, 8, 50, dropout=0.4), Rng(0))
    x = images(1)
    h = model.features(x)
    model.out.weight[...] = 1.0  # a logit is then the sum of what is not hidden
    kept = Rng(1).uniform((1, 50)) >= 0.4
    assert 10 < kept.sum() < 45
    assert_close(model(Tensor(x), Rng(1)), np.full((1, 3), (h * kept / 0.6).sum(), np.float32), rtol=1e-4)
    assert np.array_equal(model.features(x), h)
    assert_close(model.eval()(Tensor(x), Rng(1)), np.full((1, 3), h.sum()), rtol=1e-4)


def test_its_loss_is_the_cross_entropy_of_a_share():
    model = Classifier(SMALL, Rng(0)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 9), dtype=np.uint8)
    labels = np.arange(20) % 3
    loss_at = reading_loss(model, pixels, labels, 8, Rng(1), shift=0)
    first = Batches(pixels, labels, batch_size=8, rng=Rng(1)).indices(0)
    logs = np.log(model.probabilities(to_signed(pixels[first][..., None]))[np.arange(8), labels[first]])
    for share in (Share(), Share(0, 2), Share(1, 2)):
        assert_close(loss_at(1, Rng(2), share).data, np.float32(-share.of(logs).mean()), rtol=1e-5)


def test_it_sees_images_moved():
    model = Classifier(SMALL, Rng(0)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 9), dtype=np.uint8)
    losses = [
        reading_loss(model, pixels, np.arange(20) % 3, 20, Rng(1), shift)(1, Rng(seed), Share()).item()
        for shift, seed in ((0, 2), (0, 3), (2, 2), (2, 3))
    ]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_it_learns_to_read():
    digits, test = mnist.load("embedded", "train"), mnist.load("embedded", "test")
    model = Classifier(ClassifierConfig(width=8), Rng(0))
    loss_at = reading_loss(model, digits.images, digits.labels, 32, Rng(1))
    adam = AdamW(model.parameters())
    for step in range(1, 61):
        loss_at(step, Rng(2).at(step), Share()).backward()
        adam.step(3e-3)
    p = model.eval().probabilities(to_signed(test.images[..., None]))
    assert np.mean(p.argmax(axis=1) == test.labels) > 0.8


def test_it_is_loaded_with_its_averaged_weights(tmp_path):
    model = Classifier(SMALL, Rng(0))
    training = Training(model, TrainSettings(2), tmp_path / "checkpoint.npz", {})
    training.ema.average[...] = 0.01
    training.save()
    loaded = Classifier.load(tmp_path)
    assert loaded.config == SMALL and not loaded.training
    assert all(np.all(w == np.float32(0.01)) for w in loaded.state_dict().values())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": (0, 28)}, "at least 1"),
        ({"classes": 0}, "at least 1"),
        ({"features": 0}, "at least 1"),
        ({"width": 12}, "a multiple of 8, got 12"),
        ({"width": 0}, "a multiple of 8, got 0"),
        ({"dropout": 1.0}, "in \\[0, 1\\), got 1.0"),
    ],
)
def test_a_classifier_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        ClassifierConfig(**fields)


@pytest.mark.parametrize("shape", [(0, 6, 9, 1), (2, 9, 6, 1), (2, 6, 9), (2, 6, 9, 3)])
def test_images_of_another_shape(shape):
    model = Classifier(SMALL, Rng(0))
    for function in (model.features, model.probabilities):
        with pytest.raises(ValueError, match=r"\(N, 6, 9, 1\), got"):
            function(np.zeros(shape, np.float32))


def test_dropout_needs_randomness():
    with pytest.raises(ValueError, match="needs an Rng"):
        Classifier(ClassifierConfig(SMALL.size), Rng(0))(Tensor(images(1)))
