"""The figures: one image's attributions, its colour channels, and a batch at a glance.

Drawing only: arrays and a statistics dictionary in, a matplotlib Figure out. No window is
opened and no global plotting state is touched.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame

from igseg.checks.verdict import Thresholds, accuracy_warning, map_verdict
from igseg.statistics import (
    CLIP_PERCENTILE,
    counts_text,
    gap_text,
    how_text,
    names_of_channels,
    shown,
    span_text,
    tiles_text,
)

TARGET_COLOUR, TRUTH_COLOUR = '#00c8ff', '#39d353'

PREDICTION_TINT, TRUTH_TINT = (0.0, 0.78, 1.0), (0.22, 0.83, 0.33)

DOTS_PER_INCH = 150

BOLD = 1.25  # how much wider bold type runs

FONT = {'title': 11, 'label': 9, 'caption': 10, 'heading': 13}

SMOOTHING = 0.006  # of the longer side: sigma of the overlay's blur

SPECK = 1e-4  # a region smaller than this share of the image cannot be seen by its outline

MAP_SIDE = 2048  # pixels, longer side: of maps as they are drawn

PAGE_SIDE, THUMBNAIL_SIDE = 640, 128  # pixels, longer side

WARNING_COLOUR = '#b00020'

UNSETTLED, UNSETTLED_OPACITY = '#a8a8a8', 0.25  # behind pixels of unsettled sign, and theirs

MAX_CHANNELS = 11  # in the figure of the channels

MAX_NAMED_IMAGES = 40  # in the batch figure; beyond that names would overlap


@dataclass(frozen=True)
class View:
    """What there is to see of one explanation; all arrays cover exactly the original image."""

    image: np.ndarray  # (h0, w0, 3) uint8: the original, perhaps shrunk
    original_size: tuple[int, int]  # (height, width) in original pixels: the axes' units
    attributions: np.ndarray  # (C, h, w) float32
    predicted_mask: np.ndarray  # (h, w) bool
    region: np.ndarray  # (h, w) bool: the target region
    truth: np.ndarray | None  # (h, w) bool; None: unknown
    baseline: np.ndarray  # (h, w, 3) uint8
    uncertainty: np.ndarray | None = None  # (h, w) float32, of `summed`; None: unknown
    regions: np.ndarray | None = None  # (h, w) int16: rank of each pixel's region, from 1

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top in original pixels, for imshow."""
        height, width = self.original_size
        return (-0.5, width - 0.5, height - 0.5, -0.5)

    @property
    def magnitude(self) -> np.ndarray:
        """(h, w): sum over the channels of |attribution|."""
        return np.abs(self.attributions).sum(axis=0)

    @property
    def summed(self) -> np.ndarray:
        """(h, w): sum over the channels, with its sign."""
        return self.attributions.sum(axis=0)

    @property
    def settled(self) -> np.ndarray:
        """(h, w) bool: where the sign of the sum is not in doubt, as far as that is known."""
        if self.uncertainty is None:
            return np.ones(self.summed.shape, bool)
        return np.abs(self.summed) >= self.uncertainty

    def shrunk(self) -> View:
        """The same with maps of at most MAP_SIDE, by mean: of the pixels of larger ones a drawing
        would show some and leave out the others, and take much memory."""
        height, width = self.region.shape
        scale = MAP_SIDE / max(height, width)
        if scale >= 1:
            return self
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = partial(cv2.resize, dsize=size, interpolation=cv2.INTER_AREA)

        def small_mask(mask: np.ndarray) -> np.ndarray:
            share = small(mask.astype(np.float32))
            return share >= 0.5 if (share >= 0.5).any() else share > 0  # what is there is seen

        return replace(
            self,
            attributions=np.stack([small(one) for one in self.attributions]),
            predicted_mask=small_mask(self.predicted_mask),
            region=small_mask(self.region),
            truth=None if self.truth is None else small_mask(self.truth),
            baseline=small(self.baseline),
            uncertainty=None if self.uncertainty is None else small(self.uncertainty),
        )


def clip_level(values: np.ndarray) -> float:
    """The 99th percentile of |values|; the maximum where that is zero; 1 for an all-zero map."""
    level = float(np.percentile(np.abs(values), CLIP_PERCENTILE))
    return level or float(np.abs(values).max()) or 1.0


def attribution_figure(view: View, statistics: dict) -> Figure:
    """Original, prediction, truth or baseline, heatmap, overlay and signed map of one image."""
    view = view.shrunk()
    sheet = Sheet(view, statistics, panels=6, bars=(3, 4, 5), trend=True)
    image, prediction, third, heat, overlay, signed = sheet.axes
    sheet.show(image, view.image, 'Image')
    share = shown('prediction_ratio', statistics['prediction_ratio'])
    sheet.show_mask(
        prediction, view.predicted_mask, PREDICTION_TINT, f'Prediction: {share} of the image'
    )
    if view.truth is not None:
        dice = shown('dice', statistics['dice'])
        sheet.show_mask(third, view.truth, TRUTH_TINT, f'Ground truth (Dice {dice})')
    else:
        name = statistics['baseline']
        title = f'Baseline: {name}' if name else 'Baseline of the checks (the map has none)'
        sheet.show(third, view.baseline, title)

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
    legend = {f'target region ({statistics["target"]})': (TARGET_COLOUR, 'solid')}
    if view.truth is not None:
        sheet.outline(overlay, view.truth, TRUTH_COLOUR, 'dashed')
        legend['ground truth'] = (TRUTH_COLOUR, 'dashed')
    sheet.legend(legend)
    return sheet.figure


def smoothed(values: np.ndarray) -> tuple[float, np.ndarray, Normalize, np.ndarray]:
    """The overlay's layer of a map (h, w): sigma of the blur, the map under it, scale, opacity."""
    sigma = SMOOTHING * max(values.shape)
    smooth = cv2.GaussianBlur(values, (0, 0), sigma)
    scale = Normalize(0, clip_level(smooth), clip=True)
    return sigma, smooth, scale, 0.9 * scale(smooth).filled(0) ** 0.75


def in_grey(image: np.ndarray) -> np.ndarray:
    """An RGB image (h, w, 3) uint8 without its colours."""
    return np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)


def page_pictures(view: View) -> dict[str, np.ndarray]:
    """Pictures for the page: image, overlay with the target's outline, a small overlay, and an
    overlay of the map's uncertainty, on its own scale; (h, w, 3) uint8 of at most PAGE_SIDE and
    THUMBNAIL_SIDE pixels. Where the uncertainty is unknown, its picture is the plain grey image."""
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


def _page_overlay(view: View, image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A map (h, w) over the grey image, with the target's outline, at the image's size."""
    size = image.shape[1::-1]
    _, smooth, scale, opacity = smoothed(values)
    heat = colormaps['hot'](scale(cv2.resize(smooth, size)))[..., :3] * 255
    opacity = cv2.resize(opacity, size)[..., None]
    overlay = (in_grey(image) * (1 - opacity) + heat * opacity).astype(np.uint8)
    region = cv2.resize(view.region.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(region, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    colour = tuple(round(255 * part) for part in to_rgb(TARGET_COLOUR))
    return cv2.drawContours(np.ascontiguousarray(overlay), outlines, -1, colour, 2)


def channels_figure(view: View, statistics: dict) -> Figure:
    """The signed attributions of the channels on one colour scale, and their sum. Of more than
    MAX_CHANNELS the strongest; of one channel the sum is all there is."""
    view = view.shrunk()
    names, shares = channels_of(view, statistics)
    shown_ones = sorted(range(len(names)), key=lambda k: -(shares[k] or 0))[:MAX_CHANNELS]
    panels = sorted(shown_ones) if len(names) > 1 else []
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
    return sheet.figure


def regions_figure(view: View, statistics: dict) -> Figure:
    """The image, its regions by rank, and the image where the smallest sets of them that carry 50,
    80 and 95 % of the attribution are."""
    lines = [
        'regions of the image by the |attribution| a pixel that each adds (XRAI), of method '
        f'{statistics["method"]} and target "{statistics["target"]}"',
    ]
    sheet = Sheet(view, statistics, panels=5, bars=(1,), lines=lines)
    sheet.show(sheet.axes[0], view.image, 'Image')
    ranks = np.where(view.regions > 0, view.regions, view.regions.max()).astype(float)
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
    return sheet.figure


def methods_figure(views: Sequence[View], described: Sequence[dict]) -> Figure:
    """One image and target under several methods, side by side: |attribution| over the image, each
    on its own scale. described: the statistics of each."""
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
    return sheet.figure


def _doubtful(described: Sequence[dict]) -> str | None:
    """The sentence for maps that are less exact than was asked for, or not to be trusted."""

    def is_doubtful(one: dict) -> bool:
        first = one['verdict'][0]['flag'] if one.get('verdict') else None
        return first == 'do not trust' or ('settings' in one and accuracy_warning(one) is not None)

    names = [one['method'] for one in described if is_doubtful(one)]
    said = f'not to be relied on as they are (their own results say why): {", ".join(names)}'
    return f'WARNING: {said}.' if names else None


def channels_of(view: View, statistics: dict) -> tuple[list[str], list[float | None]]:
    """Names of the input's channels and their shares of |attribution|."""
    count = len(view.attributions)
    names = names_of_channels(statistics)
    if len(names) != count:
        names = [f'channel {k + 1}' for k in range(count)]
    return names, list(statistics['channel_shares'] or [None] * count)


def summary_figure(
    images: DataFrame,
    gap_tolerance: float,
    correlation: float | None = None,
    limits: Thresholds | None = None,
) -> Figure:
    """A batch at a glance: gap and ratio of every image, where the model looks, ratio and Dice.

    images: one row an explanation, its statistics in the columns. correlation: Spearman's, of
    attribution ratio and Dice. limits: those of the verdicts, by default the usual ones.
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
        f'{ordered["image"].nunique()} images · target {counts_text(ordered["target"])} · '
        f'baseline {counts_text(_texts(ordered, "baseline"))} · '
        f'{counts_text(_texts(ordered, "rule"))} rule, {span_text(ordered["steps"])} steps'
    )
    fig.suptitle(wrap(title, 0.95 * fig.get_figwidth(), FONT['heading']), fontsize=FONT['heading'])
    return fig


def _texts(images: DataFrame, key: str) -> list[str]:
    """A statistic of every image in words."""
    return ['no' if value is None or value != value else value for value in images[key]]


def _values(images: DataFrame, key: str) -> np.ndarray:
    """A statistic of every image; NaN where it does not apply."""
    return images[key].to_numpy(float, na_value=np.nan)


def _per_image(axis: Axes, names: Sequence[str], values: np.ndarray, title: str) -> None:
    """One bar for every image; images where the figure does not apply are left blank."""
    axis.set_title(title, fontsize=FONT['title'])
    if len(names) <= MAX_NAMED_IMAGES:
        axis.bar(range(len(values)), values, color='tab:blue')
        short = [name if len(name) <= 28 else name[:27] + '…' for name in names]
        axis.set_xticks(range(len(names)), short, rotation=60, ha='right', fontsize=8)
    else:  # one outline: thousands of bars would take minutes
        axis.stairs(values, np.arange(len(values) + 1) - 0.5, fill=True, color='tab:blue')
        axis.set_xlabel('image, by name', fontsize=FONT['label'])


def _histogram(axis: Axes, images: DataFrame) -> None:
    """Where the attribution lies: its share inside the prediction and inside the truth."""
    labels = {'share_in_prediction': 'the prediction', 'share_in_truth': 'the ground truth'}
    for key, label in labels.items():
        values = 100 * _values(images, key)
        values = values[np.isfinite(values)]
        if len(values):
            axis.hist(values, bins=np.linspace(0, 100, 21), alpha=0.6, label=f'inside {label}')
    axis.set_title('Share of |attribution| (%)', fontsize=FONT['title'])
    axis.set_ylabel('images', fontsize=FONT['label'])
    axis.yaxis.get_major_locator().set_params(integer=True)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=FONT['label'])


def _ratio_scatter(axis: Axes, images: DataFrame, correlation: float | None) -> None:
    """Attribution ratio against Dice, or against the mask's size where the truth is unknown."""
    known = images['dice'].notna().any()
    key, label = ('dice', 'Dice') if known else ('prediction_ratio', 'prediction ratio')
    across, up = _values(images, key), _values(images, 'attribution_ratio')
    there = np.isfinite(across) & np.isfinite(up)
    rho = f" (Spearman's rho {correlation:.2f})" if known and correlation is not None else ''
    axis.set_title(f'Attribution ratio against {label}{rho}', fontsize=FONT['title'])
    axis.set_xlabel(label, fontsize=FONT['label'])
    axis.set_ylabel('attribution ratio', fontsize=FONT['label'])
    if there.any():
        axis.scatter(across[there], up[there], color='tab:blue')
        axis.set_ylim(bottom=0)


# --------------------------------------------------------------------------- one image's panels


class Sheet:
    """A page of panels that all have the image's shape, under a heading and over a caption.

    Wide images stand in few columns, tall ones in many. Everything is placed in inches, so that
    no text can run into another whatever the shape of the image.
    """

    TITLE, BAR, GAP, LINE = 0.5, 0.85, 0.25, 0.19  # inches; narrow panels' bars need more
    TREND = (3.4, 1.75)  # inches: the corner for what happens along the path

    def __init__(
        self,
        view: View,
        statistics: dict,
        panels: int,
        bars: Sequence[int],
        trend: bool = False,
        lines: Sequence[str] | None = None,
        warning: str | None = None,
    ) -> None:
        """lines, warning: of the caption, by default those of the statistics."""
        self.view = view
        height, width = view.original_size
        aspect = width / height
        columns = 2 if aspect > 1.8 else 7 if aspect < 0.55 else 4 if panels == 4 else 3
        columns = min(columns, panels)
        self.panel_width = min(13 / columns, 6.0, 8.0 * aspect)
        self.panel_height = min(self.panel_width / aspect, 8.0)
        cell = max(self.panel_width, 2.0)
        self.width = max(columns * (cell + self.GAP) + self.GAP, 9.0)

        corner = self.TREND[0] if trend else 0.0  # of the page's foot; the caption has the rest
        self._centre = (self.width - corner) / 2
        heading = wrap(statistics['image'], self.width, FONT['heading'] * BOLD)
        about_one = lines is None
        lines = caption_lines(statistics) if about_one else lines
        in_sentences = [line[0].upper() + line[1:] for line in lines]
        # Beside the corner there is room.
        lines = in_sentences if trend or not about_one else [' · '.join(lines)]
        caption = '\n'.join(wrap(line, self.width - corner, FONT['caption']) for line in lines)
        warning = accuracy_warning(statistics) if about_one else warning
        warning = wrap(warning or '', self.width - corner, FONT['caption'] * BOLD)
        depth = caption.count('\n') + 1 + (warning.count('\n') + 1 if warning else 0)
        top = self.GAP + 1.3 * self.LINE * (heading.count('\n') + 1)
        bottom = self.GAP + max(self.LINE * (depth + 2), self.TREND[1] if trend else 0)
        bar = self.BAR + (self.LINE if cell < 3 else 0)
        starts = range(0, panels, columns)
        rows = [range(first, min(first + columns, panels)) for first in starts]
        depths = [  # each row: titles, panels, and colour bars where one of them has any
            self.TITLE + self.panel_height + (bar if set(row) & set(bars) else 0.1) for row in rows
        ]
        self.height = top + sum(depths) + bottom
        self.figure = Figure(figsize=(self.width, self.height), dpi=DOTS_PER_INCH)

        self.cell = cell
        self.axes: list[Axes] = []
        margin = (self.width - columns * (cell + self.GAP) + self.GAP) / 2
        for number, row in enumerate(rows):
            y = self.height - top - sum(depths[:number]) - self.TITLE - self.panel_height
            for column in range(len(row)):
                x = margin + column * (cell + self.GAP) + (cell - self.panel_width) / 2
                self.axes.append(self._add(x, y, self.panel_width, self.panel_height))
        for axis in self.axes:
            axis.set_xticks([])
            axis.set_yticks([])

        self._write(heading, top - self.GAP / 2, FONT['heading'], from_top=True, weight='bold')
        self._write(caption, bottom - self.LINE * 1.6, FONT['caption'])
        below = bottom - self.LINE * (1.6 + caption.count('\n') + 1)
        self._write(warning, below, FONT['caption'], color=WARNING_COLOUR, weight='bold')
        self._legend_y = bottom
        if trend:
            self._draw_trend(statistics)

    def _add(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes at a place in inches from the lower left corner."""
        across, up = self.width, self.height
        return self.figure.add_axes((x / across, y / up, width / across, height / up))

    def _write(self, text: str, y: float, size: int, from_top: bool = False, **style) -> None:
        """Centred text whose top edge lies y inches above the page's bottom."""
        y = self.height - self.GAP / 2 if from_top else y
        x = 0.5 if from_top else self._centre / self.width
        self.figure.text(x, y / self.height, text, ha='center', va='top', fontsize=size, **style)

    def _draw_trend(self, statistics: dict) -> None:
        """The score and the mask along the path, with a dot at every node, in the corner."""
        trend = statistics['trend']
        width, height = self.TREND
        place = (self.width - width + 0.45, 0.45, width - 1.05, height - 0.75)
        axis = self._add(*place)
        if not trend['alphas']:  # a method without a path
            axis.set_axis_off()
            return
        axis.plot(trend['alphas'], trend['scores'], '.-', color='black', ms=4, lw=0.8)
        axis.set_title('F (black) and IoU of the mask (blue) on the path', fontsize=8)
        axis.set_xlabel('alpha: 0 baseline, 1 image', fontsize=8, labelpad=1)
        other = axis.twinx()
        pairs = zip(trend['alphas'], trend['mask_iou'], strict=True)
        seen = [pair for pair in pairs if pair[1] is not None]  # where there was a whole map
        style = '.-' if len(seen) == len(trend['alphas']) else 's'  # no line where it is not known
        other.plot(*np.array(seen).reshape(-1, 2).T, style, color='tab:blue', ms=3, lw=0.8,
                   clip_on=False)  # fmt: skip
        other.set_ylim(-0.03, 1.03)
        for each in (axis, other):
            each.tick_params(labelsize=7, pad=1)
        axis.set_xlim(0, 1)
        axis.set_xticks([0.2, 0.4, 0.6, 0.8])  # the ends would touch the other labels
        low, high = axis.get_ylim()
        axis.set_yticks([t for t in MaxNLocator(4).tick_values(low, high) if low < t < high])
        other.set_yticks([0.0, 0.5, 1.0])

    def show(
        self, axis: Axes, values: np.ndarray, title: str | None = None, **options
    ) -> AxesImage:
        """Draw an array over the whole image area, in original pixel coordinates."""
        smooth = 'antialiased' if values.ndim == 3 else 'nearest'  # maps are shown as they are
        drawn = axis.imshow(
            values, extent=self.view.extent, interpolation=smooth, aspect='auto', **options
        )
        if title is not None:
            axis.set_title(wrap(title, self.cell, FONT['title']), fontsize=FONT['title'])
        return drawn

    def show_mask(
        self, axis: Axes, mask: np.ndarray, tint: tuple[float, float, float], title: str
    ) -> None:
        """The image with a mask laid over it, half transparent."""
        self.show(axis, self.view.image, title)
        layer = np.zeros((*mask.shape, 4))
        layer[mask] = (*tint, 0.5)
        axis.imshow(layer, extent=self.view.extent, interpolation='nearest', aspect='auto')

    def outline(self, axis: Axes, mask: np.ndarray, colour: str, style: str) -> None:
        """The outline of a mask; a speck too small to see also gets a ring around it."""
        if not mask.any():
            return
        left, right, bottom, top = self.view.extent
        rows, columns = mask.shape
        x = left + (np.arange(columns + 2) - 0.5) * (right - left) / columns
        y = top + (np.arange(rows + 2) - 0.5) * (bottom - top) / rows
        padded = np.pad(mask, 1).astype(float)  # so that a mask at the edge is closed
        axis.contour(x, y, padded, [0.5], colors=colour, linewidths=1.2, linestyles=style)
        if mask.mean() < SPECK:
            row, column = np.argwhere(mask).mean(axis=0).round().astype(int) + 1
            axis.plot(x[column], y[row], 'o', ms=14, mfc='none', mec=colour)
        axis.set_xlim(left, right)
        axis.set_ylim(bottom, top)

    def bar(
        self, axis: Axes, drawn: AxesImage, label: str, extend: str, clipped: bool = True
    ) -> None:
        """A colour bar below a panel that says where the colours are clipped."""
        box = axis.get_position()
        x = (box.x0 + box.x1) / 2 * self.width - self.cell / 2
        place = self._add(x + 0.1, box.y0 * self.height - 0.2, self.cell - 0.2, 0.1)
        bar = self.figure.colorbar(
            drawn, cax=place, orientation='horizontal', extend=extend, format='%.2g'
        )
        low, high = drawn.norm.vmin, drawn.norm.vmax
        ticks = MaxNLocator(4 if self.cell > 3 else 2).tick_values(low, high)
        bar.set_ticks([tick for tick in ticks if low <= tick <= high])
        bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=8)
        text = f'{label} (clipped at the {CLIP_PERCENTILE}th percentile)' if clipped else label
        bar.set_label(wrap(text, self.cell, FONT['label']), fontsize=FONT['label'])

    def legend(self, entries: dict[str, tuple[str, str]]) -> None:
        """The meaning of the outlines: label -> (colour, line style)."""
        lines = [
            Line2D([], [], color=colour, linestyle=style, label=label)
            for label, (colour, style) in entries.items()
        ]
        self.figure.legend(
            handles=lines,
            loc='center',
            bbox_to_anchor=(
                self._centre / self.width,
                (self._legend_y - self.LINE / 2) / self.height,
            ),
            ncols=len(lines),
            frameon=False,
            fontsize=FONT['label'],
        )


def wrap(text: str, inches: float, size: float) -> str:
    """Break text into lines that fit a width; names without spaces are broken too."""
    return textwrap.fill(text, max(8, int(inches * 72 / (size * 0.56))))


def caption_lines(statistics: dict) -> list[str]:
    """What was explained, how, and how exact it is."""

    def show(key: str) -> str:
        return shown(key, statistics[key])

    tiles = tiles_text(statistics)
    share = statistics.get('settled_share')  # older results have none
    settled = 'unknown' if share is None else shown('settled_share', share)
    return [
        f'Target: mean {statistics["score_type"]} over "{statistics["target"]}" '
        f'({statistics["target_area"]:,} px)',
        f'method {statistics.get("method", "ig")}, baseline: {statistics["baseline"] or "none"} · '
        f'{how_text(statistics)}{" · " + tiles if tiles else ""}',
        f'F(x) = {show("score")}, F(baseline) = {show("baseline_score")} · '
        f'completeness gap {gap_text(statistics)}',
        f'map error {show("map_error")} ({map_verdict(statistics["map_error"])})',
        f'share of |attribution| whose sign is settled: {settled}',
        f'attribution ratio {show("attribution_ratio")}',
    ]
