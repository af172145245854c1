"""Statistics worked out by hand, files, and figures of every shape."""

import json
import math
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import noise_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from igseg.analysis import summary as batch_summary
from igseg.checks.verdict import Thresholds, accuracy_warning, map_verdict
from igseg.results import files as result_files
from igseg.results.figures import (
    View,
    attribution_figure,
    channels_figure,
    clip_level,
    in_grey,
    page_pictures,
    summary_figure,
)
from igseg.results.files import write_files
from igseg.statistics import COMPOUND, METRICS, NUMBER, RECORD, STATISTICS, TEXT, TRUTH, WHOLE
from integrated_gradients import (
    Cost,
    Explanation,
    OutputError,
    Preparation,
    Target,
    Trend,
    explanation_statistics,
    mask_scores,
    statistics_text,
)

MASK = torch.tensor([[True, False], [False, False]])


def explanation(
    attributions, mask=MASK, score=10.0, baseline_score=0.0, uncertainty=None
) -> Explanation:
    attributions = torch.as_tensor(attributions, dtype=torch.float32)
    return Explanation(
        attributions=attributions,
        prediction=mask.float(),
        predicted_mask=mask,
        region=mask,
        baseline_pixels=np.zeros((2, 2, 3), np.float32),
        target='predicted',
        objective=Target('predicted', mask[None].float()),
        baseline='zero',
        rule='midpoint',
        steps=4,
        score=score,
        baseline_score=baseline_score,
        attribution_sum=float(attributions.sum()),
        uncertainty=uncertainty,
        map_error=0.05,
        tolerance=None,
        trend=Trend((0.0, 0.5, 1.0), (baseline_score, 4.0, score), (0.0, 0.5, 1.0)),
        cost=Cost(
            gradient_evaluations=4,
            forward_passes=5,
            seconds=1.0,
            step_batch=1,
            peak_memory_bytes=None,
            precision='float32',
            precision_deviation=None,
            retried=None,
            preparation=Preparation(2, 1, 1e-7, 1e-6, False),
        ),
    )


HAND = [[[4.0, -1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]], [[-1.0, 0.0], [2.0, 0.0]]]


def test_statistics_by_hand():
    truth = np.array([[True, True], [False, False]])
    found = explanation_statistics(explanation(HAND), truth)
    expected = {
        'attribution_mean': 7 / 12,
        'attribution_min': -1.0,
        'attribution_max': 4.0,
        'attribution_std': math.sqrt((16 + 1 + 1 + 4 + 1 + 4) / 12 - (7 / 12) ** 2),
        'attribution_in_prediction': 7.0,
        'attribution_in_background': 4 / 3,
        'attribution_ratio': 21 / 4,
        'share_in_prediction': 7 / 11,
        'share_in_truth': 8 / 11,
        'prediction_ratio': 0.25,
        'prediction_area': 1,
        'dice': 2 / 3,
        'iou': 0.5,
        'pixel_accuracy': 0.75,
        'channel_shares': [6 / 11, 2 / 11, 3 / 11],
        'completeness_gap': 0.3,
        'attribution_sum': 7.0,
        'score': 10.0,
        'baseline_score': 0.0,
        'target_area': 1,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key


@pytest.mark.parametrize(
    'attributions, mask, none',
    [
        (HAND, torch.zeros(2, 2, dtype=torch.bool), ('attribution_ratio', 'share_in_prediction')),
        (HAND, torch.ones(2, 2, dtype=torch.bool), ('attribution_ratio',)),
        (np.zeros((3, 2, 2)), MASK, ('attribution_ratio', 'share_in_prediction', 'channel_shares')),
    ],
)
def test_figures_that_do_not_apply_are_none_never_nan(attributions, mask, none):
    found = explanation_statistics(
        explanation(attributions, mask, score=0.0), np.zeros((2, 2), bool)
    )
    for key in (*none, 'completeness_gap', 'share_in_truth'):
        assert found[key] is None, key
    json.dumps(found, allow_nan=False)
    assert 'n/a' in statistics_text({'image': 'x', **found})


def test_background_without_attribution_gives_no_infinite_ratio():
    inside_only = np.zeros((3, 2, 2))
    inside_only[:, 0, 0] = 1
    found = explanation_statistics(explanation(inside_only))
    assert found['attribution_ratio'] is None and found['share_in_prediction'] == 1
    assert found['dice'] is None


def test_scores_of_empty_masks():
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert mask_scores(empty, empty) == {'dice': 1.0, 'iou': 1.0, 'pixel_accuracy': 1.0}
    assert mask_scores(empty, full) == {'dice': 0.0, 'iou': 0.0, 'pixel_accuracy': 0.0}


# ------------------------------------------------------------------ files


def test_a_set_of_files_is_written_whole_or_not_at_all(tmp_path):
    marker, data = tmp_path / 'done.json', tmp_path / 'data.bin'
    write_files({data: lambda p: p.write_text('old'), marker: lambda p: p.write_text('old')})

    def disk_full(path):
        path.write_text('half')
        raise OSError(28, 'No space left on device')

    with pytest.raises(OutputError, match=r'done\.json: No space left on device'):
        write_files({data: lambda p: p.write_text('new'), marker: disk_full})
    assert data.read_text() == marker.read_text() == 'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['data.bin', 'done.json']


def test_an_interruption_between_renames_leaves_no_marker(tmp_path, monkeypatch):
    marker, data = tmp_path / 'done.json', tmp_path / 'data.bin'
    write_files({data: lambda p: p.write_text('old'), marker: lambda p: p.write_text('old')})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(result_files.os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        write_files({data: lambda p: p.write_text('new'), marker: lambda p: p.write_text('new')})
    assert not marker.exists()


# ------------------------------------------------------------------ figures


def statistics_for_figures(**changes) -> dict:
    found = explanation_statistics(explanation(HAND))
    return {'image': 'scan', **found, 'settings': {'gap_tolerance': 0.05}, **changes}


def view(height, width, side=64, truth=True, **changes) -> View:
    rng = np.random.default_rng(0)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    content = {
        'image': noise_image(height, width),
        'original_size': (height, width),
        'attributions': rng.normal(size=(3, side, side)).astype(np.float32) ** 3,
        'predicted_mask': mask,
        'region': mask,
        'truth': np.roll(mask, 3) if truth else None,
        'baseline': np.zeros((side, side, 3), np.uint8),
    }
    return View(**content | changes)


def texts_inside(figure, ticks_aside=False) -> list[tuple[str, object]]:
    """Every text of a figure with its box in pixels; none may reach beyond the page.

    ticks_aside: leave out numbers (plots keep, but do not draw, ticks beyond their range).
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox
    boxes = []
    for text in figure.findobj(matplotlib.text.Text):
        number = text.get_text().lstrip('−').replace('.', '').isdecimal()
        if text.get_visible() and text.get_text().strip() and not (ticks_aside and number):
            box = text.get_window_extent(renderer)
            assert box.x0 >= page.x0 and box.x1 <= page.x1, text.get_text()
            assert box.y0 >= page.y0 and box.y1 <= page.y1, text.get_text()
            boxes.append((text.get_text(), box))
    return boxes


SHAPES = [(64, 64), (200, 800), (800, 200), (90, 1000), (1000, 90)]
LONG = 'a_very_long_file_name_as_exported_by_annotation_tools_png.rf.' + '0123456789abcdef' * 6


@pytest.mark.parametrize('draw', [attribution_figure, channels_figure])
@pytest.mark.parametrize(
    ('size', 'name'), [*zip(SHAPES, ['scan', LONG, LONG, 'scan', LONG], strict=True)]
)
def test_no_text_is_cut_off_or_overlaps_another(draw, size, name):
    statistics = statistics_for_figures(image=name, target='pixel:100,200', dice=0.5)
    boxes = texts_inside(draw(view(*size), statistics))
    assert any('WARNING' in text for text, _ in boxes)  # the gap of 30 % must be seen
    for number, (text, box) in enumerate(boxes):
        for other, beside in boxes[number + 1 :]:
            assert not box.padded(-1).overlaps(beside.padded(-1)), (text, other)


@pytest.mark.parametrize('size', [(200, 800), (800, 200), (320, 320)])
def test_panels_keep_the_shape_of_the_image(size):
    figure = attribution_figure(view(*size), statistics_for_figures())
    figure.canvas.draw()
    for axis in figure.axes[:6]:
        box = axis.get_window_extent()
        assert box.width / box.height == pytest.approx(size[1] / size[0], rel=0.01)
        assert axis.get_xlim() == (-0.5, size[1] - 0.5)


@pytest.mark.parametrize('attributions', [np.zeros((3, 64, 64)), np.full((3, 64, 64), -1e-9)])
@pytest.mark.parametrize('mask', [np.zeros((64, 64), bool), np.ones((64, 64), bool)])
def test_constant_maps_and_extreme_masks_are_drawn(attributions, mask):
    odd = view(64, 64, truth=False, attributions=attributions, predicted_mask=mask, region=mask)
    statistics = statistics_for_figures(channel_shares=None, attribution_ratio=None)
    for draw in (attribution_figure, channels_figure):
        with np.errstate(all='raise'):
            texts_inside(draw(odd, statistics))


def test_heatmap_clips_at_the_99th_percentile_and_says_so():
    values = np.arange(1001.0)
    assert clip_level(values) == pytest.approx(990)
    assert clip_level(-values) == pytest.approx(990)
    single = np.zeros(1000)
    single[3] = 7
    assert clip_level(single) == 7 and clip_level(np.zeros(4)) == 1
    shown = view(64, 64)
    figure = attribution_figure(shown, statistics_for_figures())
    heat, signed = figure.axes[3].images[0], figure.axes[5].images[0]
    assert heat.norm.vmin == 0 and heat.norm.vmax == pytest.approx(clip_level(shown.magnitude))
    assert signed.norm.vmin == pytest.approx(-signed.norm.vmax)
    bars = [axis.get_xlabel().replace('\n', ' ') for axis in figure.axes[6:]]
    bars = [label for label in bars if 'attribution' in label]
    assert len(bars) == 3 and all('99th percentile' in label for label in bars)


def test_channels_share_one_scale():
    figure = channels_figure(view(64, 64), statistics_for_figures())
    limits = {axis.images[0].norm.vmax for axis in figure.axes[:3]}
    assert len(limits) == 1


@pytest.mark.parametrize('gap, warned', [(None, False), (0.05, False), (0.051, True)])
def test_gap_warning(gap, warned):
    assert bool(accuracy_warning(statistics_for_figures(completeness_gap=gap))) == warned


def test_a_tolerance_that_was_not_reached_is_told():
    settings = {'gap_tolerance': 0.05, 'tolerance': 0.01}
    missed = statistics_for_figures(settings=settings, within_tolerance=False)
    assert 'tolerance of 1 % was not reached in 4 steps' in accuracy_warning(missed)
    assert accuracy_warning(missed | {'within_tolerance': True, 'completeness_gap': 0}) is None


def test_map_error_in_words():
    words = [map_verdict(error) for error in (None, 0.01, 0.05, 0.5)]
    assert words[0] == 'unknown' and len(set(words)) == 4


@pytest.mark.parametrize('count', [1, 10, 200])
@pytest.mark.parametrize('known', [True, False])
def test_summary_figure(count, known):
    entries = [
        statistics_for_figures(image=f'{LONG}_{i}', dice=0.5 if known else None,
                               attribution_ratio=None if i % 3 == 2 else i,
                               attribution_ratio_in_target=None if i % 3 == 2 else i)
        for i in range(count)
    ]  # fmt: skip
    assert len(texts_inside(summary_figure(pd.DataFrame(entries), 0.05), ticks_aside=True)) > 10


def test_the_summary_figure_says_what_was_explained():
    entries = [
        statistics_for_figures(image=image, target=target, steps=steps)
        for image, target, steps in [('a', 'image', 20), ('b', 'object:1', 50), ('b', 'image', 9)]
    ]
    title = summary_figure(pd.DataFrame(entries), 0.05).get_suptitle()
    assert title.startswith('2 images · target image (2), object:1 (1) · ')
    assert title.endswith(' 9 to 50 steps')


def test_a_long_title_of_the_summary_figure_stays_on_the_page():
    entries = [
        statistics_for_figures(image='a', target=target, baseline=f'/data/{LONG}.png')
        for target in ('false-negative', 'false-positive', 'pixel:1234,5678', 'truth')
    ]
    figure = summary_figure(pd.DataFrame(entries), 0.05)
    assert f'/data/{LONG}.png' in ''.join(figure.get_suptitle().split())
    texts_inside(figure, ticks_aside=True)


def test_pictures_are_legible_when_printed(tmp_path):
    path = tmp_path / 'a.png'
    attribution_figure(view(320, 320), statistics_for_figures()).savefig(path)
    picture = Image.open(path)
    assert picture.info['dpi'][0] >= 149
    assert 1500 < picture.width < 3000 and picture.height < 3000


# ------------------------------------------------------------------ a batch in numbers


def test_bootstrap_interval_of_the_median():
    values = np.random.default_rng(0).normal(10, 2, 60).tolist()
    low, high = batch_summary.median_interval(values)
    assert low < np.median(values) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.253 * 2 / math.sqrt(60), rel=0.4)
    assert batch_summary.median_interval(values) == [low, high]  # seeded
    assert batch_summary.median_interval([1.0, 2.0]) is None
    assert batch_summary.median_interval([3.0] * 5) == [3.0, 3.0]


def test_ratio_and_dice_go_together():
    rising = [(1.0, 0.1), (2.0, 0.5), (9.0, 0.6)]
    assert batch_summary.spearman(rising) == pytest.approx(1)
    assert batch_summary.spearman([(-x, y) for x, y in rising]) == pytest.approx(-1)
    assert batch_summary.spearman(rising[:2]) is None
    assert batch_summary.spearman([(1.0, 0.1), (1.0, 0.2), (1.0, 0.3)]) is None


# ------------------------------------------------------------------ uncertainty


def test_settled_share_by_hand():
    """Summed over channels the map is [[5, -1], [2, 1]]."""
    doubt = torch.tensor([[1.0, 2.0], [2.0, 0.5]])
    found = explanation_statistics(explanation(HAND, uncertainty=doubt))
    assert found['settled_share'] == pytest.approx(8 / 9)  # all but the -1
    assert found['uncertainty_level'] == pytest.approx(
        np.percentile(doubt.numpy(), 99) / np.percentile([5, 1, 2, 1], 99)
    )
    unknown = explanation_statistics(explanation(HAND))
    assert unknown['settled_share'] is None and unknown['uncertainty_level'] is None
    nothing = explanation_statistics(explanation(np.zeros((3, 2, 2)), uncertainty=doubt * 0))
    assert nothing['settled_share'] is None and nothing['uncertainty_level'] is None


@pytest.mark.parametrize('size', [1.0, 1e-9, 1e30, 0.0])
def test_uncertainties_survive_half_precision(size):
    values = (size * np.random.default_rng(0).random((8, 8))).astype(np.float32)
    arrays = result_files.packed(values)
    assert arrays['uncertainty'].dtype == np.float16
    assert result_files.unpacked(arrays) == pytest.approx(values, rel=1e-3, abs=1e-7 * size)


def test_pixels_whose_sign_is_not_settled_are_dimmed():
    plain = view(64, 64)
    doubt = np.zeros((64, 64), np.float32)
    doubt[:32] = 1e6
    for shown_view, expected in ((plain, 1.0), (replace(plain, uncertainty=doubt), 0.25)):
        signed = attribution_figure(shown_view, statistics_for_figures()).axes[5]
        opacity = signed.images[0].get_alpha()
        assert (opacity[:32] == expected).all() and (opacity[32:] == 1).all()
        assert ('not settled' in signed.get_title()) == (expected < 1)


def test_the_caption_says_what_share_is_settled():
    for share, said in ((0.876, '87.6 %'), (None, 'unknown')):
        figure = attribution_figure(view(64, 64), statistics_for_figures(settled_share=share))
        texts = ' '.join(text.get_text() for text in figure.texts).replace('\n', ' ')
        assert f'whose sign is settled: {said}' in texts


@pytest.mark.parametrize('size', [(40, 60), (20, 200), (200, 20), (3, 3)])
@pytest.mark.parametrize('known', [True, False])
def test_pictures_of_the_page(size, known):
    doubt = np.random.default_rng(0).random((64, 64)).astype(np.float32) if known else None
    pictures = page_pictures(view(*size, uncertainty=doubt))
    shapes = {picture.shape for name, picture in pictures.items() if name != 'thumbnail'}
    figures = {'attribution', 'channels', 'regions'}
    assert set(pictures) | figures == set(result_files.FIGURES['all'])
    assert len(shapes) == 1 and max(shapes.pop()) == 640
    outline = (pictures['uncertainty'] != in_grey(pictures['image'])).any(axis=2).mean()
    assert (outline > 0.3) == known  # nothing but the outline where it is unknown


def test_the_summary_figure_draws_the_thresholds_of_the_verdict():
    entries = pd.DataFrame([statistics_for_figures(image='a')])
    figure = summary_figure(entries, 0.05, limits=Thresholds(focus_ratio=3.5, background_ratio=0.5))
    lines = [line.get_ydata()[0] for line in figure.axes[1].lines]
    assert lines == [3.5, 0.5]
    assert 'above 3.5: focused' in figure.axes[1].get_legend().get_texts()[0].get_text()


# ------------------------------------------------------------------ the table


def test_every_statistic_says_what_it_is():
    for key, row in STATISTICS.items():
        assert row.meaning and row.kind in (TEXT, WHOLE, NUMBER, TRUTH, COMPOUND), key
        assert (row.group == RECORD) == (row.of is None and key not in METRICS), key
        assert row.page is None or row.label, key
    places = [row.page for row in STATISTICS.values() if row.page is not None]
    assert len(set(places)) == len(places)


def test_an_explanation_keeps_no_network_alive(ig, brain):
    found = ig.explain(brain, num_steps=2)
    waiting, seen = [found], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        assert not isinstance(part, torch.nn.Module)
        if isinstance(part, torch.Tensor):
            assert part.grad_fn is None
        elif isinstance(part, (dict, list, tuple)):
            waiting += part.values() if isinstance(part, dict) else part
        elif hasattr(part, '__dataclass_fields__'):
            waiting += vars(part).values()


def test_what_an_explanation_cost_may_be_asked_of_itself():
    found = explanation(HAND)
    for name, value in vars(found.cost).items():
        assert getattr(found, name) == value
