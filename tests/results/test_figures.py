"""Figures of every shape: what they hold, and that no text is cut off."""

from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hand_made import statistics_for_figures
from helpers import noise_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from igseg.checks.verdict import Thresholds
from igseg.results.figures import (
    View,
    attribution_figure,
    channels_figure,
    clip_level,
    in_grey,
    page_pictures,
    summary_figure,
)
from igseg.results.files import FIGURES


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


@pytest.mark.parametrize('count', [1, 10, 200])
@pytest.mark.parametrize('has_dice', [True, False])
def test_summary_figure(count, has_dice):
    entries = [
        statistics_for_figures(image=f'{LONG}_{i}', dice=0.5 if has_dice else None,
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
    with Image.open(path) as picture:
        assert picture.info['dpi'][0] >= 149
        assert 1500 < picture.width < 3000 and picture.height < 3000


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
    for share, text_of_share in ((0.876, '87.6 %'), (None, 'unknown')):
        figure = attribution_figure(view(64, 64), statistics_for_figures(settled_share=share))
        texts = ' '.join(text.get_text() for text in figure.texts).replace('\n', ' ')
        assert f'whose sign is settled: {text_of_share}' in texts


@pytest.mark.parametrize('size', [(40, 60), (20, 200), (200, 20), (3, 3)])
@pytest.mark.parametrize('has_uncertainty', [True, False])
def test_pictures_of_the_page(size, has_uncertainty):
    doubt = (
        np.random.default_rng(0).random((64, 64)).astype(np.float32) if has_uncertainty else None
    )
    pictures = page_pictures(view(*size, uncertainty=doubt))
    shapes = {picture.shape for name, picture in pictures.items() if name != 'thumbnail'}
    figures = {'attribution', 'channels', 'regions'}
    assert set(pictures) | figures == set(FIGURES['all'])
    assert len(shapes) == 1 and max(shapes.pop()) == 640
    outline = (pictures['uncertainty'] != in_grey(pictures['image'])).any(axis=2).mean()
    assert (outline > 0.3) == has_uncertainty  # nothing but the outline where it is unknown


def test_the_summary_figure_draws_the_thresholds_of_the_verdict():
    entries = pd.DataFrame([statistics_for_figures(image='a')])
    figure = summary_figure(entries, 0.05, limits=Thresholds(focus_ratio=3.5, background_ratio=0.5))
    lines = [line.get_ydata()[0] for line in figure.axes[1].lines]
    assert lines == [3.5, 0.5]
    assert 'above 3.5: focused' in figure.axes[1].get_legend().get_texts()[0].get_text()
