"""Pixel values, grids, film strips, GIFs and curves; every file is written whole or not at all."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.figure import Figure
from PIL import Image

from tinydiff import image

# No deadline: a slow machine is no failure.
PROPERTY = settings(deadline=None)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ------------------------------------------------------------------------------- pixel values


@PROPERTY
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=4, max_side=5)))
def test_uint8_survives_the_round_trip(u):
    back = image.to_uint8(image.to_signed(u))
    assert back.dtype == np.uint8 and back.shape == u.shape
    assert (back == u).all()


def test_signed_values_are_float32_from_minus_one_to_one():
    levels = np.arange(256, dtype=np.uint8)
    x = image.to_signed(levels)
    assert x.dtype == np.float32 and x[0] == -1 and x[255] == 1
    np.testing.assert_allclose(x, (2 * levels.astype(float) - 255) / 255, atol=1e-7)
    assert (image.to_uint8(x) == levels).all()


@PROPERTY
@given(st.floats(-3, 3))
def test_to_uint8_takes_the_nearest_level_and_clips(x):
    u = int(image.to_uint8(np.array([x]))[0])
    nearest = np.abs(np.arange(256) / 127.5 - 1 - x).min()
    assert abs(u / 127.5 - 1 - x) <= nearest + 1e-12


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_to_uint8_refuses_values_that_are_not_finite_and_counts_them(bad):
    x = np.zeros((2, 3), np.float32)
    x[1, :2] = bad
    with pytest.raises(ValueError, match="2 of 6"):
        image.to_uint8(x)


def test_values_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=r"expects uint8 pixels, got float32 of shape \(2,\)"):
        image.to_signed(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"expects floats.*got uint8"):
        image.to_uint8(np.zeros(2, np.uint8))


# ------------------------------------------------------------------------------- grid and film strip


@PROPERTY
@given(
    N=st.integers(1, 7),
    H=st.integers(1, 4),
    W=st.integers(1, 4),
    channels=st.sampled_from([(), (1,), (3,)]),
    columns=st.none() | st.integers(1, 9),
    gap=st.integers(0, 3),
)
def test_grid_puts_each_image_in_its_cell_and_white_elsewhere(N, H, W, channels, columns, gap):
    images = np.minimum(pixels(N, H, W, *channels), 254)  # 255 is left to the sheet
    sheet = image.grid(images, columns, gap)
    columns = columns or next(c for c in range(1, 10) if c * c >= N)
    rows = -(-N // columns)
    assert sheet.dtype == np.uint8
    colour = (3,) if channels == (3,) else ()
    assert sheet.shape == (rows * (H + gap) - gap, columns * (W + gap) - gap, *colour)
    for n in range(N):
        y, x = (n // columns) * (H + gap), (n % columns) * (W + gap)
        assert (sheet[y : y + H, x : x + W] == images[n].reshape(H, W, *colour)).all()
        sheet[y : y + H, x : x + W] = 255
    assert (sheet == 255).all()


def test_grid_takes_floats_in_minus_one_to_one():
    images = pixels(4, 3, 3, 1)
    assert (image.grid(image.to_signed(images)) == image.grid(images)).all()


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 2), (1, 2, 2, 2), (1, 1, 2, 2, 3)])
def test_grid_refuses_shapes_that_are_not_images(shape):
    with pytest.raises(ValueError, match=r"expects images \(N, H, W\).*got \(" + str(shape[0])):
        image.grid(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("layout", [{"columns": 0}, {"gap": -1}])
def test_grid_refuses_an_impossible_layout(layout):
    with pytest.raises(ValueError, match="columns >= 1 and gap >= 0"):
        image.grid(pixels(2, 3, 3), **layout)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_film_strip_runs_from_noise_to_image_one_row_a_sample(channels):
    states = [np.full((3, 2, 2, *channels), level, np.float32) for level in np.linspace(-1, 1, 11)]
    for state in states:
        state[1] = -1  # the second sample is black all along
    strip = image.film_strip(states, columns=3, rows=2, gap=0)
    assert strip.shape == (4, 6, *((3,) if channels == (3,) else ()))
    assert (strip[:2, :2] == 0).all() and (strip[:2, 4:] == 255).all()
    assert np.isin(strip[:2, 2:4], (127, 128)).all()
    assert (strip[2:] == 0).all()


def test_film_strip_of_few_states_shows_each_once():
    states = [np.full((1, 2, 2), level, np.float32) for level in (-1, 1)]
    assert image.film_strip(states, columns=10, gap=0).tolist() == [[0, 0, 255, 255]] * 2


def test_film_strip_refuses_nothing_to_show():
    with pytest.raises(ValueError, match="got 0 states"):
        image.film_strip([])
    with pytest.raises(ValueError, match="columns=1"):
        image.film_strip([np.zeros((1, 2, 2))], columns=1)


# ------------------------------------------------------------------------------- files


def loss_curve(path):
    image.loss_curve(path, range(1, 4), [3.0, 2.0, 1.0])


WRITERS = {
    "png": lambda path: image.save_png(path, pixels(4, 4)),
    "gif": lambda path: image.save_gif(path, [pixels(4, 4)]),
    "curve": loss_curve,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_cannot_be_written_is_one_clear_error(write, tmp_path):
    (tmp_path / "file").write_bytes(b"not a folder")
    with pytest.raises(OSError, match=r"cannot write .*file/picture: .*file is not a folder"):
        write(tmp_path / "file" / "picture")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*taken: "):
        write(tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_failed_write_keeps_the_older_file(write, tmp_path, monkeypatch):
    path = tmp_path / "picture"
    path.write_bytes(b"older")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match=r"cannot write .*picture: No space left on device"):
        write(path)
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["picture"]


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3)])
@pytest.mark.parametrize("scale", [1, 3])
def test_png_holds_every_pixel_scaled_to_a_square(shape, scale, tmp_path):
    array = pixels(*shape)
    image.save_png(tmp_path / "a.png", array, scale)
    back = np.asarray(Image.open(tmp_path / "a.png"))
    expected = np.kron(array.reshape(3, 5, -1), np.ones((scale, scale, 1), np.uint8)).squeeze()
    assert back.shape == expected.shape and (back == expected).all()


@pytest.mark.parametrize(
    "array", [np.zeros((3, 3)), np.zeros((2, 3, 3, 3), np.uint8), np.zeros((3, 3, 2), np.uint8), np.uint8(1)]
)
def test_png_refuses_what_is_not_one_picture(array, tmp_path):
    with pytest.raises(ValueError, match="a picture is uint8"):
        image.save_png(tmp_path / "a.png", array)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [0, 1.5])
def test_png_refuses_a_scale_that_is_not_a_whole_number(scale, tmp_path):
    with pytest.raises(ValueError, match=f"whole number >= 1, got {scale}"):
        image.save_png(tmp_path / "a.png", pixels(2, 2), scale)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_comes_back_as_it_was_written(channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    image.save_png(tmp_path / "x.png", pixels)
    read = image.load_png(tmp_path / "x.png", channels)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels)
    assert image.load_png(tmp_path / "x.png", 4 - channels).shape == (5, 7, 4 - channels)


def test_what_is_no_picture_is_not_read(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match=r"text\.png is not a picture"):
        image.load_png(tmp_path / "text.png")
    with pytest.raises(OSError, match="nowhere"):
        image.load_png(tmp_path / "nowhere.png")


@pytest.mark.parametrize("kept", [60, -100])
def test_a_damaged_picture_is_named(kept, tmp_path):
    image.save_png(tmp_path / "whole.png", pixels(28, 28))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:kept])
    with pytest.raises(OSError, match=r"cannot read .*cut\.png: "):
        image.load_png(tmp_path / "cut.png")


def test_a_picture_of_sixteen_bits_is_refused(tmp_path):
    """Pillow would clip nearly all of it to white."""
    Image.fromarray(np.full((4, 4), 20_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match=r"deep\.png has more than 8 bits a channel"):
        image.load_png(tmp_path / "deep.png")


def test_gif_holds_every_frame_and_rests_on_the_last(tmp_path):
    frames = [pixels(6, 5, seed=n) for n in range(3)]
    image.save_gif(tmp_path / "a.gif", frames, ms=40, hold=1500, scale=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        for n, frame in enumerate(frames):
            gif.seek(n)
            assert gif.info["duration"] == (1500 if n == 2 else 40)
            assert (np.asarray(gif.convert("L")) == frame.repeat(2, 0).repeat(2, 1)).all()


def test_gif_takes_colour(tmp_path):
    frames = [np.full((4, 4, 3), rgb, np.uint8) for rgb in ([255, 0, 0], [0, 0, 255])]
    image.save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as gif:
        gif.seek(1)
        assert (np.asarray(gif.convert("RGB")) == frames[1]).all()


@pytest.mark.parametrize("frames", [[], [pixels(2, 2), pixels(2, 3)]])
def test_gif_refuses_no_frames_or_frames_of_two_shapes(frames, tmp_path):
    with pytest.raises(ValueError, match="one or more frames of one shape"):
        image.save_gif(tmp_path / "a.gif", frames)


@PROPERTY
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=12), data=st.data())
def test_running_mean_is_the_mean_of_the_neighbours_that_exist(values, data):
    window = data.draw(st.integers(1, len(values)))
    means = image.running_mean(np.array(values), window)
    for n, mean in enumerate(means):
        first = n - window // 2
        near = values[max(0, first) : max(0, first + window)]
        np.testing.assert_allclose(mean, np.mean(near), atol=1e-9)


def test_loss_curve_is_a_picture_of_a_falling_line(tmp_path):
    steps = np.arange(1, 501)
    image.loss_curve(tmp_path / "loss.png", steps, np.exp(-steps / 100))
    ink = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero(ink[..., 2] - ink[..., 0] > 20)  # both lines are blue, all else is grey
    left, right = columns < np.quantile(columns, 0.1), columns > np.quantile(columns, 0.9)
    assert rows[left].max() < rows[right].max() - 100  # rows count downwards: nothing low on the left
    assert rows[left].size > 0 and rows[right].max() > ink.shape[0] / 2


@pytest.mark.parametrize(("steps", "losses"), [([], []), ([1, 2], [0.5])])
def test_loss_curve_refuses_lengths_that_do_not_fit(steps, losses, tmp_path):
    with pytest.raises(ValueError, match=f"got {len(steps)}, {len(losses)}"):
        image.loss_curve(tmp_path / "loss.png", steps, losses)


def test_importing_image_and_data_loads_no_heavy_library():
    names = "import tinydiff.image, tinydiff.data.mnist, tinydiff.data.loader, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True).stdout
    assert not {"PIL", "matplotlib", "cupy", "tqdm", "urllib.request", "http.client"} & set(loaded.split())


# ------------------------------------------------------------------------------- drawn by matplotlib


def test_rasterise_gives_the_pixels_of_a_figure_as_it_is_now():
    figure = Figure(figsize=(2, 1), dpi=50)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    white = image.rasterise(figure)
    assert white.shape == (50, 100, 3) and white.dtype == np.uint8 and (white == 255).all()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.fill([0, 0.5, 0.5, 0], [0, 0, 1, 1], color=(1, 0, 0), linewidth=0)
    red = image.rasterise(figure)
    assert (red[:, :48] == (255, 0, 0)).all() and (red[:, 52:] == 255).all() and (white == 255).all()


# ------------------------------------------------------------------------------- another size


@pytest.mark.parametrize("last", [(), (1,), (3,)])
def test_fit_keeps_the_middle(last):
    """A wide picture, white with a black middle, loses its sides; one of the size wanted stays as it is."""
    pixels = np.full((4, 12, *last), 255, np.uint8)
    pixels[:, 4:8] = 0
    assert not image.fit(pixels, (4, 4)).any() and image.fit(pixels, (4, 4)).shape == (4, 4, *last)
    assert not image.fit(pixels, (2, 2)).any() and not image.fit(pixels, (9, 9)).any()
    assert image.fit(pixels.swapaxes(0, 1), (4, 8)).shape == (4, 8, *last)
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, *last), dtype=np.uint8)
    np.testing.assert_array_equal(image.fit(noise, (5, 7)), noise)


def test_fit_refuses():
    with pytest.raises(ValueError, match="at least 1, got 0 x 4"):
        image.fit(np.zeros((3, 3), np.uint8), (0, 4))
    with pytest.raises(ValueError, match="a picture is uint8"):
        image.fit(np.zeros((3, 3)), (2, 2))
