"""From pixels to what the network gets, and back."""

import numpy as np
import pytest
import torch
from helpers import noise_image

from igseg.errors import InputError
from igseg.preprocessing import Preprocessing
from integrated_gradients import Settings


def test_normalise_and_back():
    pixels = noise_image(32, 32)
    for preprocessing in (Preprocessing(32), Preprocessing(32, mean=(0,) * 3, std=(1,) * 3)):
        tensor = preprocessing.normalise(pixels)
        assert tensor.shape == (1, 3, 32, 32) and tensor.dtype == torch.float32
        assert preprocessing.to_pixels(tensor) == pytest.approx(pixels, abs=1e-3)
    assert preprocessing.normalise(pixels)[0, 1, 2, 3].item() == pytest.approx(
        pixels[2, 3, 1] / 255
    )


def test_letterbox_keeps_the_shape_and_pads_black():
    preprocessing = Preprocessing(64, 'letterbox')
    fitted = preprocessing.resize_image(np.full((50, 100, 3), 200, np.uint8))
    place = preprocessing.place((50, 100))
    assert (place.top, place.left, place.height, place.width) == (16, 0, 32, 64)
    assert (place.crop(fitted) == 200).all() and fitted.sum() == 200 * 3 * 32 * 64
    assert preprocessing.resize_mask(np.ones((50, 100), np.uint8)).sum() == 32 * 64


def test_stretch_fills_the_square():
    fitted = Preprocessing(64).resize_image(np.full((50, 100, 3), 200, np.uint8))
    assert fitted.shape == (64, 64, 3) and (fitted == 200).all()


@pytest.mark.parametrize('resize', ['stretch', 'letterbox'])
@pytest.mark.parametrize('size', [(50, 100), (300, 100), (7, 7)])
def test_pixel_coordinates_follow_the_resizing(resize, size):
    preprocessing = Preprocessing(96, resize)
    place = preprocessing.place(size)
    for x, y in ((0, 0), (size[1] - 1, size[0] - 1), (size[1] // 2, size[0] // 3)):
        mask = np.zeros(size, np.uint8)
        mask[y, x] = 1
        fitted = preprocessing.resize_mask(mask)
        column, row = place.to_model(x, y)
        assert place.top <= row < place.top + place.height
        if min(place.height / size[0], place.width / size[1]) >= 1:
            assert fitted[row, column] == 1


# ------------------------------------------------------------------ normalisation of each image


@pytest.mark.parametrize('kind', ['minmax', 'zscore'])
def test_images_are_normalised_with_their_own_numbers(kind):
    image = noise_image(32, 48).astype(np.float32) / 2 + 30
    fit = Preprocessing(64, 'letterbox', (0.0,) * 3, (1.0,) * 3, of_each=kind).of_image(image)
    x = fit.normalise(fit.resize_image(image))
    inside = fit.place((32, 48)).content((64, 64))
    values = x[0].numpy()[:, inside]
    ends = (values.min(), values.max()) if kind == 'minmax' else (values.mean(), values.std())
    assert ends == pytest.approx((0, 1), abs=1e-4)
    constant = fit.normalise(np.full((64, 64, 3), 50, np.float32))  # a baseline of one shade
    assert np.isfinite(constant.numpy()).all()
    assert fit.to_pixels(x)[inside] == pytest.approx(fit.resize_image(image)[inside], abs=1e-2)
    flat = Preprocessing(32, mean=(0.0,), std=(1.0,), of_each=kind).of_image(np.full((9, 9, 1), 7))
    assert flat.std == (1.0,)


def test_the_normalisation_of_each_image_goes_alone():
    from torch import nn

    from integrated_gradients import input_preprocessing

    net = nn.Conv2d(3, 1, 1)
    assert input_preprocessing(net, Settings(normalize='zscore')).of_each == 'zscore'
    for other in ({'mean': (0.5,) * 3, 'std': (0.5,) * 3}, {'pixel_range': '0-255'}):
        with pytest.raises(InputError, match='numbers from each image'):
            input_preprocessing(net, Settings(normalize='zscore', **other))
