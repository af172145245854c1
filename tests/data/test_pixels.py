"""Pictures of every mode and depth become RGB, or an error of one sentence; arrays of channels."""

import numpy as np
import pytest
import tifffile
from helpers import noise_image, save_image
from PIL import Image

from igseg.data.pixels import read_image
from igseg.errors import InputError

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    'mode, suffix',
    [('RGB', 'png'), ('RGBA', 'png'), ('CMYK', 'tif'), ('RGB', 'webp'), ('P', 'gif')],
)
def test_colour_modes_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f'a.{suffix}'
    Image.fromarray(np.full((8, 9, 3), 204, np.uint8)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (8, 9, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - 204).max() <= 2


@pytest.mark.parametrize('mode', ['L', 'P', 'LA'])
def test_grey_pictures_keep_their_levels(tmp_path, mode):
    Image.fromarray(GREY).convert(mode).save(tmp_path / 'a.png')
    assert (read_image(tmp_path / 'a.png') == GREY[:, :, None]).all()


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_sixteen_bit_grey_is_scaled_from_its_full_range(tmp_path, suffix):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / f'a.{suffix}')
    assert (read_image(tmp_path / f'a.{suffix}') == GREY[:, :, None]).all()


def test_float_pictures(tmp_path):
    for scale in (1, 255):
        Image.fromarray((GREY / 255 * scale).astype(np.float32)).save(tmp_path / 'a.tif')
        assert (read_image(tmp_path / 'a.tif') == GREY[:, :, None]).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(noise_image(10, 20)).save(tmp_path / 'a.jpg', exif=exif)
    assert read_image(tmp_path / 'a.jpg').shape == (20, 10, 3)


def test_bad_pictures_are_an_error_of_one_sentence(tmp_path):
    whole = save_image(tmp_path / 'whole.png', noise_image()).read_bytes()
    cases = {
        'missing.jpg': (None, 'not found'),
        'empty.jpg': (b'', 'empty'),
        'text.jpg': (b'this is a letter, not a picture\n' * 20, 'not a picture'),
        'cut.png': (whole[: len(whole) // 2], 'damaged'),
        'flipped.png': (whole[:200] + bytes(200) + whole[400:], 'damaged'),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value) and '\n' not in str(caught.value)


def test_arrays_are_read_whichever_axis_is_first(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 6), dtype=np.uint8)
    np.save(tmp_path / 'last.npy', values)
    np.save(tmp_path / 'first.npy', np.moveaxis(values, 2, 0))
    np.save(tmp_path / 'part.npy', (values / 255).astype(np.float32))
    tifffile.imwrite(tmp_path / 'pages.tif', np.moveaxis(values, 2, 0))
    for name in ('last.npy', 'first.npy', 'part.npy', 'pages.tif'):
        pixels = read_image(tmp_path / name, 6)
        assert pixels.shape == (20, 30, 6) and np.abs(pixels - values.astype(float)).max() < 1e-4
    np.save(tmp_path / 'deep.npy', np.full((8, 8, 2), 65535, np.uint16))
    assert read_image(tmp_path / 'deep.npy', 2).tolist() == np.full((8, 8, 2), 255.0).tolist()
    alpha = np.dstack([noise_image(), np.full((40, 60), 9, np.uint8)])
    save_image(tmp_path / 'a.png', alpha)
    assert np.array_equal(read_image(tmp_path / 'a.png', 4), alpha)
    assert np.array_equal(read_image(tmp_path / 'a.png'), alpha[:, :, :3])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (np.full((8, 8, 2), np.nan, np.float32), 'not finite'),
        (np.full((8, 8, 2), -3.0), 'values from -3 to -3'),
        (np.full((8, 8, 2), 3000.0), 'values from 3000 to 3000'),
        (np.zeros((8, 8, 2), complex), 'complex128'),
        (np.zeros((8, 8, 2, 2)), 'which is no image'),
        (np.zeros((0, 8, 2)), 'which is no image'),
        (np.array([[object()]]), 'cannot be read'),
    ],
)
def test_arrays_that_are_no_image_are_refused(tmp_path, content, message):
    np.save(tmp_path / 'a.npy', content, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        read_image(tmp_path / 'a.npy', 2)
