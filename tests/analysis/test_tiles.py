"""Large pictures in tiles: who owns a pixel, and the map put together against that of the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import (
    DEMO_IMAGE,
    DEMO_MODEL,
    PLAIN,
    flags_of,
    noise_image,
    save_image,
    square_mask,
    tiny_model,
)

from igseg.analysis.tiles import MOST_TILES, Tiling, starts
from igseg.errors import InputError
from igseg.results.export import at_size
from igseg.settings import reproducing_command
from integrated_gradients import (
    IntegratedGradients,
    Preprocessing,
    Settings,
    analyse_image,
    build_parser,
    explain_image,
    load_view,
    main,
    settings_from,
)


@pytest.mark.parametrize('length', [1, 7, 31, 32, 33, 63, 64, 100, 257])
@pytest.mark.parametrize('tile, overlap', [(32, 0), (32, 1), (32, 8), (32, 16), (32, 31), (1, 0)])
def test_every_pixel_belongs_to_one_tile_that_shows_it(length, tile, overlap):
    begins = starts(length, tile, overlap)
    assert begins[0] == 0 and begins[-1] == max(0, length - tile)
    assert all(first + tile - second >= overlap for first, second in pairwise(begins))
    fewer = len(begins) - 2  # gaps of one tile less could not overlap as much
    assert fewer < 1 or (length - tile) > fewer * (tile - overlap)
    tiling = Tiling((length, 40), (tile, 40), overlap)
    owned = np.zeros(tiling.size, int)
    for placed in tiling.tiles:
        owned[placed.core_rows, placed.core_columns] += 1
        assert (
            placed.rows.start <= placed.core_rows.start < placed.core_rows.stop <= placed.rows.stop
        )
        inner = (placed.rows.start > 0) * (overlap // 2)  # the part that only its neighbour owns
        assert placed.core_rows.start - placed.rows.start >= inner
    assert (owned == 1).all()


def test_regions_of_a_picture_in_tiles_are_ranked_on_the_picture():
    """Two features that had never met: a traceback after all tiles were computed."""
    settings = Settings(num_steps=2, target='image', tile=32, overlap=8, segments='xrai')
    plain = Preprocessing(32, mean=(0.0,) * 3, std=(1.0,) * 3)
    ig = IntegratedGradients(torch.nn.Conv2d(3, 1, 3, padding=1), 'cpu', plain)
    ((statistics, arrays),) = analyse_image(ig, 'a', noise_image(48, 40), None, settings)
    assert arrays['regions'].shape == (48, 40)
    assert 1 <= statistics['regions_50'] <= statistics['regions_95']


def test_tilings_that_cannot_be_are_refused():
    with pytest.raises(InputError, match='less than the tile, 32, not 32'):
        Tiling((50, 50), (32, 64), 32)
    with pytest.raises(InputError, match=f'more than {MOST_TILES:,}'):
        Tiling((5000, 5000), (32, 32), 31)


def test_a_small_picture_is_padded_black():
    tiling = Tiling((5, 70), (32, 32), 0)
    picture = np.full((5, 70, 3), 9, np.uint8)
    for tile in tiling.tiles:
        cut = tiling.cut(picture, tile)
        assert cut.shape == (32, 32, 3)
        assert (cut[tile.shown] == 9).all() and cut.sum() == 9 * 5 * 32 * 3


# ------------------------------------------------------------------ closed form


class PerPixel(torch.nn.Module):
    """A network whose logits at a pixel are a polynomial of that pixel alone."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.classes = classes
        self.weight = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]).view(1, 3, 1, 1))

    def forward(self, x):
        first = (self.weight * x**2).sum(dim=1, keepdim=True) - 0.4
        return torch.cat([first * (1 - 2 * k) + 0.1 * k for k in range(self.classes)], dim=1)


def smooth_picture(height: int, width: int) -> np.ndarray:
    """A picture of which about half is predicted by PerPixel."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 9 + k) + np.cos(columns / (7 + k)) for k in range(3)]
    return np.uint8(127 + 60 * np.stack(waves, axis=2))


def explained(network, picture, truth=None, **options):
    """A picture explained in one piece, and in tiles."""
    size = picture.shape[:2]
    plain = Preprocessing(size, mean=(0.0,) * 3, std=(1.0,) * 3)
    options = {'rule': 'gauss-legendre', 'num_steps': 3, **options}
    tile, overlap = options.pop('tile', 32), options.pop('overlap', None)
    settings = Settings(**options)
    whole = IntegratedGradients(network, 'cpu', plain)
    tiled = IntegratedGradients(network, 'cpu', replace(plain, image_size=tile))
    return (
        explain_image(whole, picture, settings, truth),
        explain_image(tiled, picture, replace(settings, tile=tile, overlap=overlap), truth),
    )


def check_same(whole, tiled) -> None:
    for (one, truth), (other, same_truth) in zip(whole, tiled, strict=True):
        assert torch.allclose(one.attributions, other.attributions, atol=1e-8, rtol=1e-4)
        assert torch.equal(one.region, other.region)
        assert torch.equal(one.predicted_mask, other.predicted_mask)
        assert torch.allclose(one.prediction, other.prediction, atol=1e-6)
        assert other.score == pytest.approx(one.score, abs=1e-5)
        assert other.baseline_score == pytest.approx(one.baseline_score, abs=1e-5)
        assert other.completeness_gap == pytest.approx(0, abs=1e-4)
        assert other.attribution_sum == pytest.approx(other.score - other.baseline_score, abs=1e-4)
        assert np.allclose(one.difference, other.difference, atol=1e-3)
        assert one.target == other.target
        assert (truth is None) == (same_truth is None)
        assert truth is None or np.array_equal(truth, same_truth)
        assert other.trend.alphas == one.trend.alphas
        assert other.trend.scores == pytest.approx(one.trend.scores, abs=1e-5)
        assert other.trend.mask_iou[0] == pytest.approx(one.trend.mask_iou[0])


@pytest.mark.parametrize(
    'size, overlap',
    [((64, 96), 0), ((64, 96), 7), ((70, 101), 0), ((70, 101), 31), ((20, 90), 7), ((90, 31), 0),
     ((17, 17), 31), ((1, 50), 7)],
)  # fmt: skip
def test_the_map_of_tiles_is_that_of_the_whole(size, overlap):
    picture = smooth_picture(*size)
    whole, tiled = explained(PerPixel(), picture, overlap=overlap)
    check_same(whole, tiled)
    assert tiled[0][0].tiles.explained <= tiled[0][0].tiles.count
    assert tiled[0][0].tiles.overlap == overlap


@pytest.mark.parametrize('baseline', ['zero', 'white', 'mean', 'blur', 'random', 'auto'])
def test_a_baseline_is_that_of_the_whole_picture(baseline):
    whole, tiled = explained(PerPixel(), smooth_picture(70, 101), baseline=baseline,
                             baseline_draws=2)  # fmt: skip
    check_same(whole, tiled)
    assert np.allclose(whole[0][0].baseline_pixels, tiled[0][0].baseline_pixels, atol=1e-3)
    assert tiled[0][0].baseline == whole[0][0].baseline != 'auto'
    assert tiled[0][0].draws == whole[0][0].draws == (2 if baseline == 'random' else 1)


@pytest.mark.parametrize(
    'target',
    ['predicted', 'truth', 'false-positive', 'false-negative', 'image', 'pixel:64,3', 'object:2',
     'each-object', 'predicted pixel:90,60'],
)  # fmt: skip
def test_targets_are_of_the_prediction_put_together(target):
    truth = np.zeros((70, 101), np.uint8)
    truth[20:50, 25:80] = 1
    truth[:10] = 255
    whole, tiled = explained(PerPixel(), smooth_picture(70, 101), truth, target=target)
    check_same(whole, tiled)


@pytest.mark.parametrize('target', ['class:2', 'class:0', 'object:1', 'truth', 'image'])
@pytest.mark.parametrize('score', ['logit', 'probability'])
def test_targets_of_several_classes(target, score):
    truth = np.zeros((50, 70), np.uint8)
    truth[20:40, 25:60] = 1
    whole, tiled = explained(PerPixel(3), smooth_picture(50, 70), truth, target=target, score=score,
                             num_steps=16)  # fmt: skip
    check_same(whole, tiled)
    assert tiled[0][0].label_scores == whole[0][0].label_scores


@pytest.mark.parametrize('normalize', ['minmax', 'zscore'])
def test_numbers_of_each_image_are_those_of_the_picture(normalize):
    picture = smooth_picture(70, 101)
    plain = Preprocessing((70, 101), mean=(0.0,) * 3, std=(1.0,) * 3, of_each=normalize)
    settings = Settings(rule='gauss-legendre', num_steps=3, normalize=normalize, target='image')
    whole = explain_image(IntegratedGradients(PerPixel(), 'cpu', plain), picture, settings)
    settings, plain = replace(settings, tile=32), replace(plain, image_size=32)
    ig = IntegratedGradients(PerPixel(), 'cpu', plain)
    check_same(whole, explain_image(ig, picture, settings))
    assert ig.preprocessing == plain  # left as it was


def test_overlap_gives_each_pixel_its_surroundings():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 1, 5, padding=2)
    check_same(*explained(network, smooth_picture(70, 101), overlap=4, target='image'))
    (one, _), (other, _) = (
        found[0] for found in explained(network, smooth_picture(64, 96), overlap=0, target='image')
    )
    assert not torch.allclose(one.attributions, other.attributions, atol=1e-8, rtol=1e-4)
    assert other.completeness_gap == pytest.approx(0, abs=1e-4)


def test_error_and_uncertainty_are_those_of_the_tiles_together():
    (one, _), (other, _) = (
        found[0] for found in explained(PerPixel(), smooth_picture(64, 64), overlap=0,
                                        rule='trapezoid', num_steps=9, score='probability')
    )  # fmt: skip
    assert one.map_error > 0.001
    assert other.map_error == pytest.approx(one.map_error, rel=1e-3)
    assert torch.allclose(one.uncertainty, other.uncertainty, rtol=1e-3, atol=1e-9)
    (found, _) = explained(PerPixel(), smooth_picture(64, 64), rule='midpoint', num_steps=1)[1][0]
    assert found.map_error is None and found.uncertainty is None


def test_tiles_that_are_like_their_baseline_are_no_unknown_error():
    picture = smooth_picture(64, 64)
    picture[:, :32] = 0
    (found, _) = explained(PerPixel(), picture, overlap=0, target='image', rule='trapezoid')[1][0]
    assert found.tiles.explained == 4 and found.map_error is not None
    assert not found.attributions[:, :, :32].any()


def test_a_tolerance_is_that_of_the_picture():
    picture = smooth_picture(70, 101)
    (found, _) = explained(PerPixel(), picture, rule='adaptive', tolerance=0.05)[1][0]
    assert found.within_tolerance and found.map_error <= 0.05


def test_statistics_say_the_tiles_and_fit_json():
    ig = IntegratedGradients(PerPixel(), 'cpu', Preprocessing(32))
    settings = Settings(tile=32, overlap=8, num_steps=3, target='pixel:3,3')
    ((statistics, arrays),) = analyse_image(ig, 'a', smooth_picture(70, 101), None, settings)
    assert statistics['tiles'] == {'count': 12, 'explained': 1, 'size': [32, 32], 'overlap': 8}
    assert arrays['attributions'].shape == (3, 70, 101)
    assert json.loads(json.dumps(statistics, allow_nan=False))['tiles'] == statistics['tiles']
    assert 'no checks' in statistics['verdict'][0]['text']


# ------------------------------------------------------------------ the command line


# Tiles are explained at their own size.
IN_TILES = flags_of({name: value for name, value in PLAIN.items() if name != 'image_size'})


def run(tmp_path, image, *flags: str) -> int:
    return main([*IN_TILES, '--image_path', str(image), '--output_dir', str(tmp_path / 'out'),
                 *flags])  # fmt: skip


@pytest.mark.parametrize('size', [(40, 300), (300, 40), (17, 17), (1, 1), (130, 130)])
def test_pictures_of_any_shape(tmp_path, size, capsys):
    image = save_image(tmp_path / 'a.png', noise_image(*size))
    assert run(tmp_path, image, '--tile', '64', '--export', 'npy', '--figures', 'png') == 0
    told = capsys.readouterr()
    assert 'Tiles explained' in told.out
    assert ('padded black' in told.err) == (min(size) < 64)
    view, statistics = load_view(tmp_path / 'out' / 'a')
    assert view.attributions.shape == (3, *size) and view.original_size == size
    exported = np.load(tmp_path / 'out' / 'a' / 'a_map.npy')
    assert np.allclose(exported, view.attributions.sum(axis=0))
    assert statistics['attribution_sum'] == pytest.approx(float(exported.sum()), abs=1e-4)
    assert statistics['placement'] == {'size': list(size), 'origin': [0, 0]}


def test_tiles_are_part_of_the_resume_identity(tmp_path):
    image = save_image(tmp_path / 'a.png', noise_image(70, 70))
    keys = []
    for flags in (['--tile', '64'], ['--tile', '64', '--overlap', '8'], ['--tile', '32']):
        assert run(tmp_path, image, *flags, '--figures', 'none') == 0
        keys.append(load_view(tmp_path / 'out' / 'a')[1]['resume_key'])
    assert len(set(keys)) == 3
    before = (tmp_path / 'out' / 'a' / 'a_statistics.json').stat().st_mtime_ns
    assert run(tmp_path, image, '--tile', '32', '--figures', 'none') == 0
    assert (tmp_path / 'out' / 'a' / 'a_statistics.json').stat().st_mtime_ns == before


def test_a_batch_in_tiles_with_masks(tmp_path, capsys):
    for name in 'ab':
        save_image(tmp_path / 'images' / f'{name}.png', noise_image(80, 100, ord(name)))
        save_image(tmp_path / 'masks' / f'{name}.png', square_mask(80, 100) * np.uint8(255))
    assert main([*IN_TILES, '--mode', 'batch', '--data_dir', str(tmp_path), '--tile', '64',
                 '--target', 'truth', '--figures', 'none', '--output_dir',
                 str(tmp_path / 'out')]) == 0  # fmt: skip
    statistics = load_view(tmp_path / 'out' / 'b')[1]
    assert statistics['target_area'] == int(square_mask(80, 100).sum())
    assert statistics['dice'] is not None and statistics['tiles']['count'] == 4
    command = reproducing_command(statistics, Settings().record())
    assert '--tile 64' in command and '--image_size' not in command


def test_a_tile_that_the_network_does_not_take_is_enlarged_and_said(tmp_path, capsys):
    image = save_image(tmp_path / 'a.png', noise_image(70, 70))
    flags = [*tiny_model(tmp_path), '--image_path', str(image), '--tile', '50', '--target', 'image']
    flags += ['--device', 'cpu', '--num_steps', '2', '--figures', 'none']
    assert main([*flags, '--output_dir', str(tmp_path / 'out')]) == 0
    told = capsys.readouterr().err
    assert 'tile 50: the network takes multiples of' in told
    assert load_view(tmp_path / 'out' / 'a')[1]['tiles']['size'] == [64, 64]


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--tile', '64', '--crop', '0,0,9,9'], 'not allowed with'),
        (['--tile', '64', '--image_size', '64'], 'at their own size'),
        (['--tile', '64', '--resize', 'letterbox'], 'not resized'),
        (['--tile', '64', '--evaluate', 'quick'], 'check a part of the image with --crop'),
        (['--tile', '64', '--overlap', '64'], 'overlap must be less than the tile, 64, not 64'),
        (['--overlap', '8'], 'goes with --tile'),
        (['--tile', '0'], 'tile must be a whole number'),
        (['--tile', 'big'], 'tile must be a whole number'),
        (['--tile', '64', '--overlap', '-1'], 'overlap must be a whole number'),
    ],
)
def test_what_goes_without_tiles_is_refused_in_one_sentence(flags, said, capsys):
    try:
        status = main(['--model_path', str(DEMO_MODEL), '--image_path', str(DEMO_IMAGE), *flags])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and error.startswith('error: ')
    assert error.count('\n') == 1


def test_crop_and_tile_are_refused_from_python_too():
    with pytest.raises(InputError, match='--crop goes without --tile'):
        Settings(tile=64, crop=(0, 0, 9, 9))
    args = build_parser().parse_args(['--model_path', 'm', '--tile', '64x96'])
    assert settings_from(args).tile == (64, 96)


def test_a_map_of_its_own_size_is_exported_as_it_is():
    values = noise_image()[:, :, 0].astype(np.float32)
    assert at_size(values, values.shape) is values


@pytest.mark.parametrize('other', [{'method': ('gradient',)}, {'no_multiply': True}])
def test_tiles_go_with_integrated_gradients_only(other):
    with pytest.raises(InputError, match='--tile goes with --method ig'):
        Settings(tile=64, **other)
