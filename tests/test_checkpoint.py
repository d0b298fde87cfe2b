"""Checkpoints: what is saved comes back, and every file that is not a good checkpoint gets its own clear refusal."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from tinydiff import Rng, checkpoint
from tinydiff.checkpoint import CheckpointError
from tinydiff.nn import Linear

ARRAYS = {"model/a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "losses": np.zeros(0, np.float64)}
META = {"kind": "toy", "config": {"size": (2, 3), "name": "ü"}}


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.npz", ARRAYS, META)
    return tmp_path / "checkpoint.npz"


def test_round_trip(saved):
    for path in (saved, saved.parent, str(saved)):
        arrays, meta = checkpoint.load(path, "toy")
        assert meta == META | {"format": checkpoint.FORMAT}
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)


def test_parts():
    arrays = checkpoint.prefixed("model", {"a": np.ones(1)}) | checkpoint.prefixed("ema", {"a": np.zeros(1)})
    assert list(arrays) == ["model/a", "ema/a"]
    assert checkpoint.part("ema", arrays) == {"a": 0} and checkpoint.part("other", arrays) == {}


def refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, "toy")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(path), *words)), message


def test_missing(tmp_path):
    refused(tmp_path / "no.npz", "there is no checkpoint")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*checkpoint\.npz"):
        checkpoint.load(tmp_path, "toy")


@pytest.mark.parametrize("kept", [0, 1, 2, 30, 0.5, -1])
def test_cut_short(saved, kept):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(saved, "damaged or was cut short")


def test_flipped_bit_in_an_array(saved):
    content = bytearray(saved.read_bytes())
    content[content.index(ARRAYS["model/a.weight"].tobytes()) + 9] ^= 1
    saved.write_bytes(content)
    refused(saved, "damaged")


def test_other_kind(saved):
    checkpoint.save(saved, ARRAYS, META | {"kind": "classifier"})
    refused(saved, "'toy'", "'classifier'")


def test_newer_format(saved):
    newer = checkpoint.FORMAT + 1
    text = json.dumps(META | {"format": newer}).encode()
    np.savez(saved, meta=np.frombuffer(text, np.uint8))
    refused(saved, f"format {newer}", "update tinydiff")


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_never_loaded(tmp_path, protocol):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Trap(), protocol))
    refused(path, "is a pickle" if protocol else "not a checkpoint")
    assert not os.environ.get("TINYDIFF_TRAP")


def test_object_arrays_are_never_loaded(tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, meta=np.array([Trap()], dtype=object), allow_pickle=True)
    refused(path, "pickl")
    assert not os.environ.get("TINYDIFF_TRAP")


def test_a_checkpoint_of_pytorch(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:  # as torch.save lays it out
        archive.writestr("model/data.pkl", pickle.dumps(Trap()))
        archive.writestr("model/version", "3\n")
    refused(path, "PyTorch", "never loaded")
    assert not os.environ.get("TINYDIFF_TRAP")


class Trap:
    """Unpickling this runs code: it sets an environment variable."""

    def __reduce__(self):
        return _spring, ()


def _spring():
    os.environ["TINYDIFF_TRAP"] = "sprung"


@pytest.mark.parametrize(
    "arrays",
    [{"a": np.ones(3)}, {"meta": np.ones(3)}, {"meta": np.frombuffer(b"[1, 2]", np.uint8)}],
    ids=["no description", "no text", "no object"],
)
def test_an_npz_of_something_else(tmp_path, arrays):
    np.savez(tmp_path / "other.npz", **arrays)
    refused(tmp_path / "other.npz", "not a checkpoint of tinydiff")


def test_some_other_file(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n")
    refused(path, "not a checkpoint of tinydiff")


def test_failed_save_keeps_the_old_file(saved):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match="Object arrays"):
        checkpoint.save(saved, ARRAYS | {"z": np.array([None])}, META)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "checkpoint.npz"
    with pytest.raises(OSError, match="cannot write") as caught:
        checkpoint.save(path, ARRAYS, META)
    assert str(path) in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_leftovers_of_a_killed_process_are_removed(saved):
    leftover, other = saved.with_name(".checkpoint.npz.123.tmp"), saved.with_name(".samples.png.123.tmp")
    leftover.write_bytes(b"half")
    other.write_bytes(b"half")
    checkpoint.remove_leftovers(saved)
    assert saved.exists() and other.exists() and not leftover.exists()


# ------------------------------------------------------------------------------------------ exported and shipped


@pytest.fixture
def run(tmp_path):
    """The folder of a run of a model with one weight."""
    meta = META | {"about": {"data": "/somewhere"}}
    weight = np.linspace(-3, 3, 7, dtype=np.float32)
    arrays = {"model/w": weight, "ema/w": weight + 1, "optimiser/m": weight, "losses": np.ones(3)}
    checkpoint.save(tmp_path / "run" / checkpoint.NAME, arrays, meta)
    return tmp_path / "run"


def test_an_export_keeps_the_averaged_weights_alone(run, tmp_path):
    checkpoint.export(run, tmp_path / "small.npz")
    arrays, meta = checkpoint.load(tmp_path / "small.npz", "toy")
    assert arrays.keys() == {"ema/w"} and arrays["ema/w"].dtype == np.float16
    np.testing.assert_allclose(arrays["ema/w"], np.linspace(-2, 4, 7), rtol=1 / 2048)
    assert meta == META | {"format": checkpoint.FORMAT}
    checkpoint.load(run, "toy", resume=True)
    with pytest.raises(CheckpointError, match="was exported"):
        checkpoint.load(tmp_path / "small.npz", "toy", resume=True)


def test_an_export_does_not_replace_the_run(tmp_path):
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, {"ema/w": np.ones(2), "losses": np.ones(1)}, {"kind": "toy", "config": {}})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="the run's own checkpoint"):
        checkpoint.export(tmp_path, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("weight", [65504.0, -1e5, np.inf, np.nan])
def test_weights_beyond_half_precision_are_not_exported(tmp_path, weight):
    checkpoint.save(tmp_path / "run.npz", {"ema/w": np.array([1, weight])}, META)
    with pytest.raises(CheckpointError, match="half precision's 65504 in ema/w"):
        checkpoint.export(tmp_path / "run.npz", tmp_path / "small.npz")
    assert not (tmp_path / "small.npz").exists()


def test_a_shipped_model_is_found_by_its_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.shipped() == []
    with pytest.raises(CheckpointError, match="no checkpoint toy"):
        checkpoint.load("toy", "toy")
    checkpoint.export(run, tmp_path / "shipped" / "toy.npz")
    assert checkpoint.shipped() == ["toy"]
    assert checkpoint.find("toy") == tmp_path / "shipped" / "toy.npz"
    assert checkpoint.load("toy", "toy")[0].keys() == {"ema/w"}
    with pytest.raises(CheckpointError, match="no checkpoint tou; trained models here: toy"):
        checkpoint.load("tou", "toy")


def test_a_fingerprint_tells_models_apart_but_not_a_model_from_its_export():
    one, same, other = (Linear(3, 4, Rng(seed)) for seed in (0, 0, 1))
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(same) != checkpoint.fingerprint(other)
    for p in same.parameters().values():
        p[...] = p.data.astype(np.float16)
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(same) and len(checkpoint.fingerprint(one)) == 64


def test_a_run_goes_before_a_shipped_model_of_its_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    checkpoint.export(run, tmp_path / "shipped" / "run.npz")
    with pytest.warns(UserWarning, match="run is the run in this folder, not the model of that name"):
        assert checkpoint.find("run").resolve() == (run / checkpoint.NAME).resolve()
    (run / checkpoint.NAME).unlink()  # a folder that happens to have this name
    assert checkpoint.find("run") == tmp_path / "shipped" / "run.npz"


def test_every_shipped_model_has_its_card_and_fits_in_a_few_megabytes():
    for name in checkpoint.shipped():
        assert (checkpoint.SHIPPED / f"{name}.md").read_text(encoding="utf-8").startswith("# ")
        assert (checkpoint.SHIPPED / f"{name}.npz").stat().st_size < 8e6
