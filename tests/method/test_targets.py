"""Baselines in pixel space, and the table of targets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, noise_image, save_image

from igseg.checks.verdict import accuracy_warning
from igseg.network.description import NetworkDescription
from igseg.preprocessing import Preprocessing
from integrated_gradients import (
    BASELINES,
    TARGETS,
    EmptyTargetError,
    InputError,
    IntegratedGradients,
    Settings,
    TargetContext,
    build_baselines,
    build_target,
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


# ------------------------------------------------------------------ targets

ERRORS = ('false-positive', 'false-negative')


def context(logits, truth=None, placement=None) -> TargetContext:
    logits = torch.tensor(logits, dtype=torch.float32)
    truth = None if truth is None else torch.tensor(truth)
    return TargetContext(logits, NetworkDescription().predicted(logits, 0.5), truth, placement)


BINARY = [[[2.0, -1.0], [4.0, -3.0]]]  # (1, 2, 2)
THREE = [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 1.0]], [[0.0, 0.0], [7.0, 2.0]]]


def score(spec, logits, kind='logit', **options) -> float:
    target = build_target(spec, context(logits, **options), kind)
    assert float(target.weights.sum()) == pytest.approx(1)
    return float(target(torch.tensor(logits)[None]))


@pytest.mark.parametrize(
    'spec, expected',
    [('predicted', 3.0), ('image', 0.5), ('truth', 1.5), ('pixel:1,0', -1.0), ('pixel:0,1', 4.0)],
)
def test_binary_targets_by_hand(spec, expected):
    truth = [[0, 1], [1, 0]]
    assert score(spec, BINARY, truth=truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    'spec, expected',
    [
        ('predicted', (5 + 7 + 2) / 3),  # the winning logit wherever it is not background
        ('image', (3 + 5 + 7 + 2) / 4),
        ('class:2', (7 + 2) / 2),
        ('class:0', 3.0),
        ('truth', (5 + 1) / 2),
        ('pixel:1,1', 2.0),
    ],
)
def test_targets_of_several_classes_by_hand(spec, expected):
    assert score(spec, THREE, truth=[[0, 1], [0, 1]]) == pytest.approx(expected)


ISLANDS = [[[1.0, -1.0, 5.0], [-1.0, 3.0, -1.0], [-1.0, -1.0, -1.0], [7.0, -1.0, -1.0]]]


def test_objects_by_hand():
    """Three pixels that touch at their corners are one object; the largest comes first."""
    assert score('object:1', ISLANDS) == pytest.approx((1 + 5 + 3) / 3)
    assert score('object:2', ISLANDS) == pytest.approx(7)
    with pytest.raises(EmptyTargetError, match='has 2 objects'):
        score('object:3', ISLANDS)
    for wrong in ('object:0', 'object:a', 'object:-1'):
        with pytest.raises(InputError, match='whole number from 1'):
            score(wrong, ISLANDS)


def test_probability_scores():
    assert score('pixel:0,0', BINARY, 'probability') == pytest.approx(1 / (1 + np.exp(-2)))
    expected = np.exp(7) / (np.exp(7) + 2)
    assert score('pixel:0,1', THREE, 'probability') == pytest.approx(expected)


def test_target_is_the_vector_of_the_vector_jacobian_product():
    logits = torch.tensor(THREE)[None].requires_grad_()
    target = build_target('predicted', context(THREE))
    (gradient,) = torch.autograd.grad(target(logits).sum(), logits)
    torch.testing.assert_close(gradient[0], target.weights)


def test_region_does_not_move_with_the_logits():
    target = build_target('predicted', context(BINARY))
    assert target.region.tolist() == [[True, False], [True, False]]
    assert float(target(-torch.tensor(BINARY)[None])) == pytest.approx(-3.0)


def test_pixel_is_given_in_original_coordinates():
    wide = Preprocessing(64, 'letterbox').place((100, 200))  # content: 32 rows from row 16
    logits = torch.zeros(1, 64, 64)
    target = build_target('pixel:199,0', TargetContext(logits, logits > 0, None, wide))
    assert target.region.nonzero().tolist() == [[16, 63]]


@pytest.mark.parametrize(
    'spec, said',
    [
        ('nonsense', 'unknown target "nonsense"'),
        ('pixel:7', 'form pixel:X,Y'),
        ('pixel:a,b', 'form pixel:X,Y'),
        ('pixel', 'form pixel:X,Y'),
        ('predicted:3', 'form predicted'),
        ('pixel:2,0', 'outside the image'),
        ('pixel:-1,0', 'outside the image'),
        ('class:1', 'one class'),
        ('truth', 'needs a ground-truth mask'),
    ],
)
def test_wrong_specs_are_told(spec, said):
    with pytest.raises(InputError, match=said):
        build_target(spec, context(BINARY))


@pytest.mark.parametrize('spec', ['class:3', 'class:-1', 'class:x'])
def test_class_out_of_range(spec):
    with pytest.raises(InputError, match='0 to 2'):
        build_target(spec, context(THREE))


def test_truth_with_more_classes_than_the_model():
    with pytest.raises(InputError, match='class 3'):
        build_target('truth', context(THREE, truth=[[0, 3], [0, 1]]))


@pytest.mark.parametrize(
    'spec, options', [('predicted', {}), ('truth', {'truth': [[0, 0], [0, 0]]})]
)
def test_empty_region_is_its_own_error_with_the_remedy(spec, options):
    with pytest.raises(EmptyTargetError, match='--target image'):
        build_target(spec, context([[[-1.0, -2.0], [-1.0, -2.0]]], **options))


def test_errors_of_the_prediction_by_hand():
    truth = [[0, 2], [1, 1]]
    binary = {spec: build_target(spec, context(BINARY, truth=truth)) for spec in ERRORS}
    # predicted (positive logits): the left column; true: all but the upper left
    assert binary['false-positive'].region.tolist() == [[True, False], [False, False]]
    assert binary['false-negative'].region.tolist() == [[False, True], [False, True]]
    classes = {spec: build_target(spec, context(THREE, truth=truth)) for spec in ERRORS}
    # predicted classes [[0, 1], [2, 2]] against [[0, 2], [1, 1]]: three confusions
    expected = {'false-positive': [1, 2, 2], 'false-negative': [2, 1, 1]}
    for spec, channels in expected.items():
        weights = classes[spec].weights
        assert classes[spec].region.tolist() == [[False, True], [True, True]]
        assert weights.argmax(dim=0)[classes[spec].region].tolist() == channels
        assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize('spec', ERRORS)
def test_errors_need_a_truth_and_a_mistake(spec):
    with pytest.raises(InputError, match=f'"{spec}" needs a ground-truth mask'):
        build_target(spec, context(BINARY))
    with pytest.raises(EmptyTargetError, match=f'"{spec}" is empty'):
        build_target(spec, context(BINARY, truth=[[1, 0], [1, 0]]))


def test_mask_and_target_objects_as_target(ig, brain):
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[20:30, 20:30] = True
    result = ig.explain(brain, mask.numpy(), num_steps=1)
    assert torch.equal(result.region, mask)
    assert result.score == pytest.approx(ig.model(brain)[0, 0][mask].mean().item(), rel=1e-4)
    with pytest.raises(InputError, match='shape'):
        ig.explain(brain, mask[:10], num_steps=1)
    with pytest.raises(EmptyTargetError):
        ig.explain(brain, mask & False, num_steps=1)


def test_the_table_documents_itself():
    for kind in TARGETS.values():
        assert kind.meaning
    for kind in BASELINES.values():
        assert kind.build.__doc__.strip()


# ------------------------------------------------------------------ is the target hidden?


def discs(dark: bool) -> np.ndarray:
    """Two discs on a ground with a little texture, (64, 64, 3) uint8."""
    rows, columns = np.mgrid[:64, :64]
    inside = (np.hypot(rows - 20, columns - 20) < 9) | (np.hypot(rows - 44, columns - 46) < 6)
    texture = np.random.default_rng(0).integers(-15, 16, (64, 64))
    grey = np.where(inside, 40 if dark else 215, 215 if dark else 40) + texture
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)


def finder(dark: bool) -> IntegratedGradients:
    """A network that predicts what is dark, or bright, and answers to its surroundings."""
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
    flags = [[finding['flag'] for finding in one['verdict']] for one in (hidden, chosen)]
    assert flags[0][:2] == ['do not trust', 'baseline hides the target']
    assert not {'good focus', 'background focus'} & set(flags[0]) and 'good focus' in flags[1]
    assert 'hides the target' in accuracy_warning(hidden)
    assert accuracy_warning(chosen) is None


def test_a_target_is_judged_by_its_own_region():
    ig, image = finder(True), discs(True)
    one, other = (
        describe_image(ig, 'a', image, None, Settings(num_steps=4, target=target, baseline='white'))
        for target in ('object:1', 'object:2')
    )
    for statistics, arrays in (one, other):
        maps, region = np.abs(arrays['attributions']).sum(axis=0), arrays['region']
        others = arrays['predicted_mask'] & ~region
        elsewhere = ~(region | others)
        share = maps[region].sum() / maps.sum()
        assert statistics['share_in_target'] == pytest.approx(share, rel=1e-5)
        assert statistics['share_in_other_objects'] == pytest.approx(
            maps[others].sum() / maps.sum(), abs=1e-9)  # fmt: skip
        assert statistics['attribution_ratio_in_target'] == pytest.approx(
            maps[region].mean() / maps[elsewhere].mean(), rel=1e-5)  # fmt: skip
    assert one[0]['target_area'] > other[0]['target_area']
    assert one[0]['share_in_target'] > 0.5


def test_letterbox_padding_counts_in_no_contrast():
    ig = finder(False)
    ig.preprocessing = replace(ig.preprocessing, resize='letterbox')
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
    ig = IntegratedGradients(load_model(ROOT / 'demo' / 'nuclei_model.pth', 'cpu'), 'cpu')
    samples = [one for one in list_samples(ROOT / 'demo' / 'nuclei') if 'histology' in one.name]
    for sample in samples[::4]:
        x = ig.preprocessing.normalise(ig.preprocessing.resize_image(sample.image()))[0]
        assert ig.explain(x, 'predicted', 'auto', num_steps=1, rule='midpoint').baseline != 'zero'
