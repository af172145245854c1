"""The figures: the attributions of an image, its channels, its regions, methods beside each other,
and a batch at a glance.

The functions take arrays and statistics, and return a matplotlib Figure. They open no window and
change no global state of matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from igseg.checks.verdict import Thresholds, accuracy_warning
from igseg.results.fonts import drawable, legible
from igseg.results.sheet import DOTS_PER_INCH, FONT, LineStyle, Sheet, wrap
from igseg.results.view import View, clip_level
from igseg.statistics import (
    Statistics,
    counts_text,
    gap_text,
    names_of_channels,
    shown,
    span_text,
)

if TYPE_CHECKING:
    from pandas import DataFrame

TARGET_COLOUR, TRUTH_COLOUR = '#00c8ff', '#39d353'
PREDICTION_TINT, TRUTH_TINT = (0.0, 0.78, 1.0), (0.22, 0.83, 0.33)

SMOOTHING = 0.006  # sigma of the overlay's blur, as a share of the longer side

PAGE_SIDE, THUMBNAIL_SIDE = 640, 128  # pixels, longer side

UNSETTLED, UNSETTLED_OPACITY = '#a8a8a8', 0.25  # background and opacity where signs are unsettled
MAX_CHANNELS = 11  # in the figure of the channels
MAX_NAMED_IMAGES = 40  # in the batch figure; beyond that names would overlap


def smoothed(values: np.ndarray) -> tuple[float, np.ndarray, Normalize, np.ndarray]:
    """A map (h, w) as a layer over an image: sigma of the blur, the blurred map, colour scale, and
    opacity (h, w)."""
    sigma = SMOOTHING * max(values.shape)
    smooth = cv2.GaussianBlur(values, (0, 0), sigma)
    scale = Normalize(0, clip_level(smooth), clip=True)
    return sigma, smooth, scale, 0.9 * scale(smooth).filled(0) ** 0.75


def in_grey(image: np.ndarray) -> np.ndarray:
    """An RGB image (h, w, 3) uint8 in grey."""
    return np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)


def attribution_figure(view: View, statistics: Statistics) -> Figure:
    """Original, prediction, truth or baseline, heatmap, overlay and signed map of one image."""
    view = view.shrunk()
    sheet = Sheet(view, statistics, panels=6, bars=(3, 4, 5), trend=True)
    image, prediction, truth_or_baseline, heat, overlay, signed = sheet.axes
    sheet.show(image, view.image, 'Image')
    share = shown('prediction_ratio', statistics['prediction_ratio'])
    sheet.show_mask(
        prediction, view.predicted_mask, PREDICTION_TINT, f'Prediction: {share} of the image'
    )
    if view.truth is not None:
        dice = shown('dice', statistics['dice'])
        sheet.show_mask(truth_or_baseline, view.truth, TRUTH_TINT, f'Ground truth (Dice {dice})')
    else:
        name = statistics['baseline']
        title = f'Baseline: {name}' if name else 'Baseline of the checks (the map has none)'
        sheet.show(truth_or_baseline, view.baseline, title)

    level = clip_level(view.magnitude)
    drawn = sheet.show(heat, view.magnitude, 'Attribution', cmap='hot', norm=Normalize(0, level))
    sheet.bar(heat, drawn, '|attribution|, sum over channels', 'max')

    sigma, smooth, scale, opacity = smoothed(view.magnitude)
    sheet.show(overlay, in_grey(view.image), 'Attribution over the image')
    drawn = sheet.show(overlay, smooth, cmap='hot', norm=scale, alpha=opacity)
    sheet.bar(
        overlay, drawn, f'|attribution|, smoothed (sigma {sigma:.1f} px), transparent near 0', 'max'
    )

    norm = CenteredNorm(0, clip_level(view.summed))
    doubtful = not view.settled.all()
    title = 'Signed: red raises the score'
    if statistics.get('signed') is False:
        title = 'The same, its sign says nothing'
    title += ', grey is not settled' if doubtful else ''
    opacity = np.where(view.settled, 1.0, UNSETTLED_OPACITY)
    signed.set_facecolor(UNSETTLED)
    drawn = sheet.show(signed, view.summed, title, cmap='RdBu_r', norm=norm, alpha=opacity)
    sheet.bar(signed, drawn, 'attribution, sum over channels', 'both')

    for axis, colour in ((heat, TARGET_COLOUR), (overlay, TARGET_COLOUR), (signed, 'black')):
        sheet.outline(axis, view.region, colour, 'solid')
    legend: dict[str, tuple[str, LineStyle]] = {
        f'target region ({statistics["target"]})': (TARGET_COLOUR, 'solid')
    }
    if view.truth is not None:
        sheet.outline(overlay, view.truth, TRUTH_COLOUR, 'dashed')
        legend['ground truth'] = (TRUTH_COLOUR, 'dashed')
    sheet.legend(legend)
    return legible(sheet.figure)


def _page_overlay(view: View, image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A map (h, w) over the grey image, with the outline of the target, at the size of the
    image."""
    size = image.shape[1::-1]
    _, smooth, scale, opacity = smoothed(values)
    heat = colormaps['hot'](scale(cv2.resize(smooth, size)))[..., :3] * 255
    opacity = cv2.resize(opacity, size)[..., None]
    overlay = (in_grey(image) * (1 - opacity) + heat * opacity).astype(np.uint8)
    region = cv2.resize(view.region.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(region, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    colour = tuple(round(255 * part) for part in to_rgb(TARGET_COLOUR))
    return cv2.drawContours(np.ascontiguousarray(overlay), outlines, -1, colour, 2)


def page_pictures(view: View) -> dict[str, np.ndarray]:
    """Pictures for the page, (h, w, 3) uint8: the image, an overlay with the outline of the target,
    a small overlay, and an overlay of the uncertainty on a separate scale. The longer side has
    PAGE_SIDE pixels, in the small overlay THUMBNAIL_SIDE. An unknown uncertainty is drawn as 0."""
    view = view.shrunk()
    height, width = view.original_size
    factor = PAGE_SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = cv2.resize(view.image, size, interpolation=cv2.INTER_AREA)
    overlay = _page_overlay(view, image, view.magnitude)
    uncertainty = np.zeros_like(view.magnitude) if view.uncertainty is None else view.uncertainty
    small = [max(1, side * THUMBNAIL_SIDE // PAGE_SIDE) for side in size]
    return {
        'image': image,
        'overlay': overlay,
        'thumbnail': cv2.resize(overlay, small, interpolation=cv2.INTER_AREA),
        'uncertainty': _page_overlay(view, image, uncertainty),
    }


def channels_of(view: View, statistics: Statistics) -> tuple[list[str], list[float | None]]:
    """The names of the input's channels, and their shares of |attribution| (None: unknown)."""
    count = len(view.attributions)
    names = names_of_channels(statistics)
    if len(names) != count:
        names = [f'channel {k + 1}' for k in range(count)]
    return names, list(statistics['channel_shares'] or [None] * count)


def channels_figure(view: View, statistics: Statistics) -> Figure:
    """The signed attributions of the channels on one colour scale, and their sum. Of many channels
    only the strongest MAX_CHANNELS are drawn; for a single channel only the sum is drawn."""
    view = view.shrunk()
    names, shares = channels_of(view, statistics)
    strongest = sorted(range(len(names)), key=lambda k: -(shares[k] or 0))[:MAX_CHANNELS]
    panels = sorted(strongest) if len(names) > 1 else []
    sheet = Sheet(view, statistics, panels=len(panels) + 1, bars=range(len(panels) + 1))
    norm = CenteredNorm(0, clip_level(view.attributions))
    for axis, number in zip(sheet.axes, panels, strict=False):
        share = shown('channel_shares', shares[number])
        title = f'{names[number].capitalize()}: {share} of |attribution|'
        drawn = sheet.show(axis, view.attributions[number], title, cmap='RdBu_r', norm=norm)
        sheet.bar(axis, drawn, 'attribution, one scale for all channels', 'both')
    norm = CenteredNorm(0, clip_level(view.summed))
    left_out = len(names) - len(panels) if panels else 0
    title = f'Sum of all {len(names)} channels' if left_out else 'Sum of the channels'
    title = title if panels else f'The only channel ({names[0]})'
    drawn = sheet.show(sheet.axes[-1], view.summed, title, cmap='RdBu_r', norm=norm)
    sheet.bar(sheet.axes[-1], drawn, 'attribution, own scale', 'both')
    for axis in sheet.axes:
        sheet.outline(axis, view.region, 'black', 'solid')
    sheet.legend({f'target region ({statistics["target"]})': ('black', 'solid')})
    return legible(sheet.figure)


def regions_figure(view: View, statistics: Statistics) -> Figure:
    """The image, its regions by rank, and three pictures of only the first regions of the image: as
    many regions as carry 50, 80 and 95 % of the attribution."""
    lines = [
        'regions of the image by the |attribution| a pixel that each adds (XRAI), of method '
        f'{statistics["method"]} and target "{statistics["target"]}"',
    ]
    sheet = Sheet(view, statistics, panels=5, bars=(1,), lines=lines)
    sheet.show(sheet.axes[0], view.image, 'Image')
    assert view.regions is not None  # the caller asks for this figure where there are regions
    ranks = view.regions.astype(float)
    ranks[view.regions == 0] = view.regions.max()
    drawn = sheet.show(sheet.axes[1], ranks, 'Regions by rank', cmap='magma_r')
    sheet.bar(
        sheet.axes[1], drawn, 'rank, the first carries most a pixel', 'neither', clipped=False
    )
    for axis, part in zip(sheet.axes[2:], (50, 80, 95), strict=True):
        count, area = statistics[f'regions_{part}'] or 0, statistics[f'regions_{part}_area']
        sheet.show(axis, in_grey(view.image) // 4)
        inside = (view.regions > 0) & (view.regions <= count)
        size = view.image.shape[1::-1]
        mask = cv2.resize(inside.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        layer = np.dstack([view.image, 255 * mask])
        share = shown(f'regions_{part}_area', area)
        regions = f'{count} region{"" if count == 1 else "s"}'
        sheet.show(axis, layer, f'{part} %: {regions}, {share} of the image')
    for axis in sheet.axes:
        sheet.outline(axis, view.region, TARGET_COLOUR, 'solid')
    sheet.legend({f'target region ({statistics["target"]})': (TARGET_COLOUR, 'solid')})
    return legible(sheet.figure)


def _doubtful(described: Sequence[Statistics]) -> str | None:
    """A warning that names the methods whose maps are less exact than wanted, or not to be trusted;
    None where there is no such map."""

    def is_doubtful(statistics: Statistics) -> bool:
        first = statistics['verdict'][0]['flag'] if statistics.get('verdict') else None
        inexact = 'settings' in statistics and accuracy_warning(statistics) is not None
        return first == 'do not trust' or inexact

    names = [statistics['method'] for statistics in described if is_doubtful(statistics)]
    text = f'not to be relied on as they are (their own results say why): {", ".join(names)}'
    return f'WARNING: {text}.' if names else None


def methods_figure(views: Sequence[View], described: Sequence[Statistics]) -> Figure:
    """The maps of several methods for one image and target, side by side: |attribution| over the
    image, with a separate colour scale for each method. described: the statistics of each map."""
    first = described[0]
    lines = [
        f'target: mean {first["score_type"]} over "{first["target"]}" '
        f'({first["target_area"]:,} px) · F(x) = {shown("score", first["score"])}',
        'every map on its own scale, smoothed, transparent near 0; gap: completeness gap, n/a '
        'where the method promises none; ratio: of the target',
    ]
    sheet = Sheet(views[0], first, panels=len(views) + 1, bars=(), lines=lines,
                  warning=_doubtful(described))  # fmt: skip
    sheet.show(sheet.axes[0], views[0].image, f'Image: {first["image"]}')
    sheet.outline(sheet.axes[0], views[0].region, TARGET_COLOUR, 'solid')
    for axis, view, statistics in zip(sheet.axes[1:], views, described, strict=True):
        ratio = shown('attribution_ratio_in_target', statistics['attribution_ratio_in_target'])
        gap = gap_text(statistics)
        sheet.show(axis, in_grey(view.image), f'{statistics["method"]}: gap {gap}, ratio {ratio}')
        _, smooth, scale, opacity = smoothed(view.magnitude)
        sheet.show(axis, smooth, cmap='hot', norm=scale, alpha=opacity)
        sheet.outline(axis, view.region, TARGET_COLOUR, 'solid')
    sheet.legend({f'target region ({first["target"]})': (TARGET_COLOUR, 'solid')})
    return legible(sheet.figure)


def _texts(images: DataFrame, key: str) -> list[str]:
    """A statistic of every image as text; "no" where it is missing."""
    return ['no' if value is None or value != value else value for value in images[key]]


def _values(images: DataFrame, key: str) -> np.ndarray:
    """A statistic of every image; NaN where it does not apply."""
    return images[key].to_numpy(float, na_value=np.nan)


def _per_image(axis: Axes, names: Sequence[str], values: np.ndarray, title: str) -> None:
    """A bar for every image, and no bar where the statistic does not apply."""
    axis.set_title(title, fontsize=FONT['title'])
    if len(names) <= MAX_NAMED_IMAGES:
        axis.bar(range(len(values)), values, color='tab:blue')
        drawn = [drawable(name) for name in names]
        short = [name if len(name) <= 28 else name[:27] + '…' for name in drawn]
        axis.set_xticks(range(len(names)), short, rotation=60, ha='right', fontsize=8)
    else:  # a single outline, since drawing thousands of bars takes minutes
        axis.stairs(values, np.arange(len(values) + 1) - 0.5, fill=True, color='tab:blue')
        axis.set_xlabel('image, by name', fontsize=FONT['label'])


def _histogram(axis: Axes, images: DataFrame) -> None:
    """Where the attribution lies: its share inside the prediction and inside the truth."""
    labels = {'share_in_prediction': 'the prediction', 'share_in_truth': 'the ground truth'}
    for key, label in labels.items():
        values = 100 * _values(images, key)
        values = values[np.isfinite(values)]
        if len(values):
            axis.hist(
                values, bins=np.linspace(0, 100, 21).tolist(), alpha=0.6, label=f'inside {label}'
            )
    axis.set_title('Share of |attribution| (%)', fontsize=FONT['title'])
    axis.set_ylabel('images', fontsize=FONT['label'])
    locator = axis.yaxis.get_major_locator()
    if isinstance(locator, MaxNLocator):
        locator.set_params(integer=True)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=FONT['label'])


def _ratio_scatter(axis: Axes, images: DataFrame, correlation: float | None) -> None:
    """Attribution ratio against Dice; against the size of the mask where the truth is unknown."""
    has_dice = images['dice'].notna().any()
    key, label = ('dice', 'Dice') if has_dice else ('prediction_ratio', 'prediction ratio')
    across, up = _values(images, key), _values(images, 'attribution_ratio')
    finite = np.isfinite(across) & np.isfinite(up)
    rho = f" (Spearman's rho {correlation:.2f})" if has_dice and correlation is not None else ''
    axis.set_title(f'Attribution ratio against {label}{rho}', fontsize=FONT['title'])
    axis.set_xlabel(label, fontsize=FONT['label'])
    axis.set_ylabel('attribution ratio', fontsize=FONT['label'])
    if finite.any():
        axis.scatter(across[finite], up[finite], color='tab:blue')
        axis.set_ylim(bottom=0)


def summary_figure(
    images: DataFrame,
    gap_tolerance: float,
    correlation: float | None = None,
    limits: Thresholds | None = None,
) -> Figure:
    """A batch at a glance: the gap and the attribution ratio of every image, where the attribution
    lies, and the ratio against Dice.

    images: a row for each explanation, with its statistics in the columns. correlation: Spearman's
    rho of attribution ratio and Dice. limits: the thresholds of the verdicts.
    """
    limits = limits or Thresholds()
    fig = Figure(figsize=(13, 9), dpi=DOTS_PER_INCH, layout='constrained')
    gaps, ratios, shares, scatter = fig.subplots(2, 2).flat
    ordered = images.sort_values('image', kind='stable')
    names = list(ordered['image'])
    _per_image(gaps, names, 100 * _values(ordered, 'completeness_gap'), 'Completeness gap (%)')
    gaps.axhline(100 * gap_tolerance, color='tab:red', label=f'tolerance {gap_tolerance:.0%}')
    gaps.legend(fontsize=FONT['label'])
    ratio = _values(ordered, 'attribution_ratio_in_target')
    _per_image(ratios, names, ratio, 'Attribution ratio of the target')
    good, bad = limits.focus_ratio, limits.background_ratio
    ratios.axhline(good, color='tab:green', label=f'above {good:g}: focused on the target')
    ratios.axhline(bad, color='tab:red', label=f'below {bad:g}: it hardly weighs more')
    ratios.legend(fontsize=FONT['label'])
    _histogram(shares, ordered)
    _ratio_scatter(scatter, ordered, correlation)
    title = (
        f'{ordered["image"].nunique()} images · target {counts_text(list(ordered["target"]))} · '
        f'baseline {counts_text(_texts(ordered, "baseline"))} · '
        f'{counts_text(_texts(ordered, "rule"))} rule, {span_text(list(ordered["steps"]))} steps'
    )
    fig.suptitle(wrap(title, 0.95 * fig.get_figwidth(), FONT['heading']), fontsize=FONT['heading'])
    return legible(fig)
