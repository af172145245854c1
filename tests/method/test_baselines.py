"""Baselines in pixel space, and whether a baseline hides the target."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, noise_image, save_image

from igseg.checks.verdict import accuracy_warning
from igseg.preprocessing import Preprocessing
from integrated_gradients import (
    BASELINES,
    InputError,
    IntegratedGradients,
    Settings,
    build_baselines,
    describe_image,
    list_samples,
    load_model,
)

PIXELS = noise_image(32, 32).astype(np.float32)


IMAGENET = Preprocessing(32)


def build(kind, pixels=PIXELS, **options):
    return build_baselines(kind, pixels, IMAGENET, **options)


@pytest.mark.parametrize('kind', BASELINES)
def test_every_baseline_is_an_image_in_pixel_space(kind):
    for image in build(kind):
        assert image.shape == PIXELS.shape and image.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 255


def test_zero_is_black_and_not_a_zero_tensor():
    (black,) = build('zero')
    tensor = IMAGENET.normalise(black)
    assert not black.any()
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-4)
    assert np.abs(IMAGENET.to_pixels(tensor)).max() < 1e-4


def test_white_mean_and_blur_by_hand():
    assert (build('white')[0] == 255).all()
    assert build('mean')[0][5, 6] == pytest.approx(PIXELS.mean(axis=(0, 1)), rel=1e-5)
    (blurred,) = build('blur')
    assert blurred.std() < PIXELS.std() / 3
    assert blurred.mean() == pytest.approx(PIXELS.mean(), rel=0.05)
    flat = np.full((32, 32, 3), 77, np.float32)
    assert build('blur', flat)[0] == pytest.approx(flat)


def test_blur_scales_with_the_image():
    edge = np.zeros((400, 400, 3), np.float32)
    edge[:, 200:] = 255
    for side in (400, 200):
        row = build('blur', edge[:: 400 // side, :: 400 // side])[0][0, :, 0]
        width = np.interp([64, 192], row, np.arange(side))
        assert (width[1] - width[0]) / side == pytest.approx(0.067, abs=0.003)  # 1.35 * 5 %


def test_random_is_seeded_uniform_noise():
    draws = build('random', draws=3, seed=4)
    again = build('random', draws=3, seed=4)
    assert len(draws) == 3 and not (draws[0] == draws[1]).all()
    assert all((a == b).all() for a, b in zip(draws, again, strict=True))
    assert not (draws[0] == build('random', seed=5)[0]).all()
    assert np.mean(draws) == pytest.approx(127.5, abs=5)


def test_an_image_file_as_baseline(tmp_path):
    path = save_image(tmp_path / 'healthy.png', np.full((10, 20, 3), 60, np.uint8))
    assert (build(str(path))[0] == 60).all()
    assert build(str(path), PIXELS[:, :16])[0].shape == (32, 16, 3)


def test_unknown_baseline_lists_what_there_is():
    with pytest.raises(InputError, match='zero, random, blur, mean, white'):
        build('grey')


# ------------------------------------------------------------------ is the target hidden?


def discs(dark: bool) -> np.ndarray:
    """Two discs on a ground with a little texture, (64, 64, 3) uint8."""
    rows, columns = np.mgrid[:64, :64]
    inside = (np.hypot(rows - 20, columns - 20) < 9) | (np.hypot(rows - 44, columns - 46) < 6)
    texture = np.random.default_rng(0).integers(-15, 16, (64, 64))
    grey = np.where(inside, 40 if dark else 215, 215 if dark else 40) + texture
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)


def finder(dark: bool) -> IntegratedGradients:
    """A network that predicts dark pixels, or bright ones, by their surroundings."""
    net = torch.nn.Conv2d(3, 1, 3, padding=1)
    with torch.no_grad():
        net.weight.fill_(-1.0 if dark else 1.0)
        net.bias.fill_(13.5 if dark else -13.5)
    fit = Preprocessing(64, mean=(0.0,) * 3, std=(1.0,) * 3)
    return IntegratedGradients(net, 'cpu', fit, 1)


@pytest.mark.parametrize('dark', [True, False])
def test_auto_takes_no_baseline_that_hides_the_target(dark):
    ig, image = finder(dark), discs(dark)
    hiding = 'zero' if dark else 'white'
    by_kind = {
        kind: describe_image(ig, 'a', image, None, Settings(num_steps=4, baseline=kind))[0]
        for kind in (hiding, 'auto')
    }
    hidden, chosen = by_kind[hiding], by_kind['auto']
    assert hidden['baseline_contrast'] < 0.8 < chosen['baseline_contrast']
    assert chosen['baseline'] != hiding and 'baseline auto' in chosen['notes'][0]
    flags = [
        [finding['flag'] for finding in statistics['verdict']] for statistics in (hidden, chosen)
    ]
    assert flags[0][:2] == ['do not trust', 'baseline hides the target']
    assert not {'good focus', 'background focus'} & set(flags[0]) and 'good focus' in flags[1]
    assert 'hides the target' in accuracy_warning(hidden)
    assert accuracy_warning(chosen) is None


def test_a_target_is_judged_by_its_own_region():
    ig, image = finder(True), discs(True)
    first, second = (
        describe_image(ig, 'a', image, None, Settings(num_steps=4, target=target, baseline='white'))
        for target in ('object:1', 'object:2')
    )
    for statistics, arrays in (first, second):
        maps, region = np.abs(arrays['attributions']).sum(axis=0), arrays['region']
        others = arrays['predicted_mask'] & ~region
        elsewhere = ~(region | others)
        share = maps[region].sum() / maps.sum()
        assert statistics['share_in_target'] == pytest.approx(share, rel=1e-5)
        assert statistics['share_in_other_objects'] == pytest.approx(
            maps[others].sum() / maps.sum(), abs=1e-9)  # fmt: skip
        assert statistics['attribution_ratio_in_target'] == pytest.approx(
            maps[region].mean() / maps[elsewhere].mean(), rel=1e-5)  # fmt: skip
    assert first[0]['target_area'] > second[0]['target_area']
    assert first[0]['share_in_target'] > 0.5


def test_letterbox_padding_counts_in_no_contrast():
    ig = finder(False)
    letterboxed = replace(ig.preprocessing, resize='letterbox')
    ig = IntegratedGradients(ig.model, 'cpu', letterboxed)
    wide = np.concatenate([discs(False), discs(False)[:, ::-1]], axis=1)
    padded = np.zeros((128, 128, 3), np.uint8)
    padded[32:96] = wide
    settings = Settings(num_steps=2)  # black: no difference where it is padded
    square, letterbox, drawn = (
        describe_image(ig, 'a', image, None, settings)[0]['baseline_contrast']
        for image in (discs(False), wide, padded)
    )
    assert letterbox == pytest.approx(square, rel=0.2) and drawn > 1.5 * letterbox


def test_auto_never_takes_the_black_image_for_stained_nuclei():
    model = load_model(ROOT / 'demo' / 'nuclei_model.pth', 'cpu')
    ig = IntegratedGradients(model, 'cpu', replace(model.preprocessing, image_size=128))
    samples = [
        sample for sample in list_samples(ROOT / 'demo' / 'nuclei') if 'histology' in sample.name
    ]
    assert len(samples) == 27
    for sample in samples[::4]:
        x = ig.preprocessing.normalise(ig.preprocessing.resize_image(sample.image()))[0]
        assert ig.explain(x, 'predicted', 'auto', num_steps=1, rule='midpoint').baseline != 'zero'
