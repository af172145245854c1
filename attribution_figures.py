"""The figures: one image's attributions, its colour channels, and a batch at a glance.

Drawing only: arrays and a statistics dictionary in, a matplotlib Figure out. No window is
opened and no global plotting state is touched.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

CLIP_PERCENTILE = 99  # a few extreme pixels would leave the rest of a heatmap black
TARGET_COLOUR, TRUTH_COLOUR = '#00c8ff', '#39d353'
PREDICTION_TINT, TRUTH_TINT = (0.0, 0.78, 1.0), (0.22, 0.83, 0.33)
DOTS_PER_INCH = 150
FONT = {'title': 11, 'label': 9, 'caption': 10, 'heading': 13}
MAX_NAMED_IMAGES = 40  # in the batch figure; beyond that names would overlap


@dataclass(frozen=True)
class View:
    """What there is to see of one explanation; all arrays cover exactly the original image."""

    image: np.ndarray  # (h0, w0, 3) uint8: the original, perhaps shrunk
    original_size: tuple[int, int]  # (height, width) in original pixels: the axes' units
    attributions: np.ndarray  # (3, h, w) float32
    predicted_mask: np.ndarray  # (h, w) bool
    region: np.ndarray  # (h, w) bool: the target region
    truth: np.ndarray | None  # (h, w) bool; None: unknown
    baseline: np.ndarray  # (h, w, 3) uint8

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top in original pixels, for imshow."""
        height, width = self.original_size
        return (-0.5, width - 0.5, height - 0.5, -0.5)

    @property
    def magnitude(self) -> np.ndarray:
        """(h, w): sum over the channels of |attribution|."""
        return np.abs(self.attributions).sum(axis=0)


def clip_level(values: np.ndarray) -> float:
    """The 99th percentile of |values|; the maximum where that is zero; 1 for an all-zero map."""
    level = float(np.percentile(np.abs(values), CLIP_PERCENTILE))
    return level or float(np.abs(values).max()) or 1.0


def attribution_figure(view: View, statistics: dict) -> Figure:
    """Original, prediction, truth or baseline, heatmap, overlay and signed map of one image."""
    fig, axes, outline_width = _grid(view, 6)
    image, prediction, third, heat, overlay, signed = axes
    _show(image, view, view.image, 'Image')
    share = _percent(statistics['prediction_ratio'])
    _show_mask(prediction, view, view.predicted_mask, PREDICTION_TINT, f'Prediction: {share} of it')
    if view.truth is not None:
        dice = _number(statistics['dice'])
        _show_mask(third, view, view.truth, TRUTH_TINT, f'Ground truth (Dice {dice})')
    else:
        _show(third, view, view.baseline, f'Baseline: {statistics["baseline"]}')

    scale = Normalize(0, clip_level(view.magnitude))
    drawn = _show(heat, view, view.magnitude, 'Attribution', cmap='hot', norm=scale)
    _colorbar(fig, drawn, heat, '|attribution|, summed over channels', 'max')

    grey = np.repeat(view.image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    _show(overlay, view, grey, 'Attribution over the image')
    strength = scale(np.minimum(view.magnitude, scale.vmax)).filled(0)
    drawn = _show(overlay, view, view.magnitude, None, cmap='hot', norm=scale, alpha=strength**0.5)
    drawn.set_interpolation('nearest')
    _colorbar(fig, drawn, overlay, 'as left; transparent near zero', 'max')

    summed = view.attributions.sum(axis=0)
    norm = CenteredNorm(0, clip_level(summed))
    drawn = _show(signed, view, summed, 'Signed: red raises the score', cmap='RdBu_r', norm=norm)
    _colorbar(fig, drawn, signed, 'attribution, summed over channels', 'both')

    for axis, colour in ((overlay, TARGET_COLOUR), (signed, 'black'), (heat, TARGET_COLOUR)):
        _outline(axis, view, view.region, colour, outline_width, 'solid')
    if view.truth is not None:
        _outline(overlay, view, view.truth, TRUTH_COLOUR, outline_width, 'dashed')
    _finish(fig, statistics, view.truth is not None)
    return fig


def channels_figure(view: View, statistics: dict) -> Figure:
    """The signed attributions of red, green and blue on one colour scale, and their sum."""
    fig, axes, outline_width = _grid(view, 4)
    norm = CenteredNorm(0, clip_level(view.attributions))
    shares = statistics['channel_shares'] or (None, None, None)
    for axis, name, channel, share in zip(
        axes, ('Red', 'Green', 'Blue'), view.attributions, shares, strict=False
    ):
        title = f'{name}: {_percent(share)} of |attribution|'
        drawn = _show(axis, view, channel, title, cmap='RdBu_r', norm=norm)
        _colorbar(fig, drawn, axis, 'attribution, same scale', 'both')
    summed = view.attributions.sum(axis=0)
    norm = CenteredNorm(0, clip_level(summed))
    drawn = _show(axes[3], view, summed, 'All channels', cmap='RdBu_r', norm=norm)
    _colorbar(fig, drawn, axes[3], 'attribution, own scale', 'both')
    for axis in axes:
        _outline(axis, view, view.region, 'black', outline_width, 'solid')
    _finish(fig, statistics, False, 'black')
    return fig


def summary_figure(images: Sequence[dict], gap_tolerance: float) -> Figure:
    """A batch at a glance: gap and ratio of every image, where the model looks, ratio and Dice."""
    fig = Figure(figsize=(13, 9), dpi=DOTS_PER_INCH, layout='constrained')
    gaps, ratios, shares, scatter = fig.subplots(2, 2).flat
    ordered = sorted(images, key=lambda entry: entry['image'])
    _per_image(gaps, ordered, 'completeness_gap', 100, 'Completeness gap (%)')
    gaps.axhline(100 * gap_tolerance, color='tab:red', label=f'tolerance {gap_tolerance:.0%}')
    gaps.legend(fontsize=FONT['label'])
    _per_image(ratios, ordered, 'attribution_ratio', 1, 'Attribution ratio (inside / outside)')
    ratios.axhline(2, color='tab:green', label='above 2: focused on the prediction')
    ratios.axhline(1, color='tab:red', label='below 1: background weighs more')
    ratios.legend(fontsize=FONT['label'])
    _histogram(shares, ordered)
    _ratio_scatter(scatter, ordered)
    first = ordered[0]
    fig.suptitle(
        f'{len(images)} images · target {first["target"]} · baseline {first["baseline"]} · '
        f'{first["rule"]} rule, {first["steps"]} steps',
        fontsize=FONT['heading'],
    )
    return fig


def _per_image(axis: Axes, images: Sequence[dict], key: str, factor: float, title: str) -> None:
    """One bar for every image; images where the figure does not apply are left blank."""
    values = [np.nan if entry[key] is None else factor * entry[key] for entry in images]
    axis.bar(range(len(values)), values, color='tab:blue')
    axis.set_title(title, fontsize=FONT['title'])
    if len(images) <= MAX_NAMED_IMAGES:
        names = [textwrap.shorten(entry['image'], 28, placeholder='…') for entry in images]
        names = [name if len(name) <= 28 else name[:27] + '…' for name in names]
        axis.set_xticks(range(len(names)), names, rotation=60, ha='right', fontsize=8)
    else:
        axis.set_xlabel('image, by name', fontsize=FONT['label'])


def _histogram(axis: Axes, images: Sequence[dict]) -> None:
    """Where the attribution lies: its share inside the prediction and inside the truth."""
    labels = {'share_in_prediction': 'the prediction', 'share_in_truth': 'the ground truth'}
    for key, label in labels.items():
        values = [100 * entry[key] for entry in images if entry[key] is not None]
        if values:
            axis.hist(values, bins=np.linspace(0, 100, 21), alpha=0.6, label=f'inside {label}')
    axis.set_title('Share of |attribution| (%)', fontsize=FONT['title'])
    axis.set_ylabel('images', fontsize=FONT['label'])
    axis.yaxis.get_major_locator().set_params(integer=True)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=FONT['label'])


def _ratio_scatter(axis: Axes, images: Sequence[dict]) -> None:
    """Attribution ratio against Dice, or against the mask's size where the truth is unknown."""
    known = any(entry['dice'] is not None for entry in images)
    key, label = ('dice', 'Dice') if known else ('prediction_ratio', 'prediction ratio')
    points = [
        (entry[key], entry['attribution_ratio'])
        for entry in images
        if entry[key] is not None and entry['attribution_ratio'] is not None
    ]
    axis.set_title(f'Attribution ratio against {label}', fontsize=FONT['title'])
    axis.set_xlabel(label, fontsize=FONT['label'])
    axis.set_ylabel('attribution ratio', fontsize=FONT['label'])
    if points:
        axis.scatter(*zip(*points, strict=True), color='tab:blue')
        axis.set_ylim(bottom=0)


# --------------------------------------------------------------------------- one image's panels


def _grid(view: View, panels: int) -> tuple[Figure, list[Axes], float]:
    """A figure whose panels have the image's shape: wide images in few columns, tall in many."""
    height, width = view.original_size
    aspect = width / height
    columns = 2 if aspect > 1.8 else panels if aspect < 0.55 else panels if panels == 4 else 3
    rows = -(-panels // columns)
    panel_width = min(max(13 / columns, 2.4), 6.5)
    panel_height = min(max(panel_width / aspect, 1.2), 9.0)
    size = (columns * panel_width, rows * (panel_height + 0.95) + 1.6)
    fig = Figure(figsize=size, dpi=DOTS_PER_INCH, layout='constrained')
    axes = list(np.atleast_1d(fig.subplots(rows, columns)).flat)
    return fig, axes, 1.2


def _show(axis: Axes, view: View, values: np.ndarray, title: str | None, **options) -> AxesImage:
    """Draw an array over the whole image area, in original pixel coordinates."""
    interpolation = options.pop('interpolation', 'nearest' if values.ndim == 2 else 'antialiased')
    drawn = axis.imshow(values, extent=view.extent, interpolation=interpolation, **options)
    axis.set_xticks([])
    axis.set_yticks([])
    if title is not None:
        columns = axis.get_figure().get_figwidth() / axis.get_subplotspec().get_gridspec().ncols
        axis.set_title(textwrap.fill(title, int(columns * 9)), fontsize=FONT['title'])
    return drawn


def _show_mask(
    axis: Axes, view: View, mask: np.ndarray, tint: tuple[float, float, float], title: str
) -> None:
    """The image with a mask laid over it, half transparent."""
    _show(axis, view, view.image, title)
    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (*tint, 0.5)
    axis.imshow(layer, extent=view.extent, interpolation='nearest')


def _outline(
    axis: Axes, view: View, mask: np.ndarray, colour: str, width: float, style: str
) -> None:
    """The outline of a mask; a speck too small to see also gets a ring around it."""
    if not mask.any():
        return
    left, right, bottom, top = view.extent
    height, width_px = mask.shape
    padded = np.pad(mask, 1).astype(float)  # so that a mask at the edge is closed
    step_x, step_y = (right - left) / width_px, (bottom - top) / height
    x = left + (np.arange(width_px + 2) - 0.5) * step_x
    y = top + (np.arange(height + 2) - 0.5) * step_y
    axis.contour(x, y, padded, [0.5], colors=colour, linewidths=width, linestyles=style)
    if mask.mean() < 1e-4:
        row, column = np.argwhere(mask).mean(axis=0) + 1
        axis.plot(x[0] + column * step_x, y[0] + row * step_y, 'o', ms=14, mfc='none', mec=colour)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)


def _colorbar(fig: Figure, drawn: AxesImage, axis: Axes, label: str, extend: str) -> None:
    """A colour bar that says where the colours are clipped."""
    bar = fig.colorbar(drawn, ax=axis, location='bottom', extend=extend, pad=0.02, aspect=30)
    drawn_width = fig.get_figwidth() / axis.get_subplotspec().get_gridspec().ncols
    text = f'{label} (clipped at the {CLIP_PERCENTILE}th percentile)'
    bar.set_label(textwrap.fill(text, int(drawn_width * 11)), fontsize=FONT['label'])
    bar.ax.tick_params(labelsize=8)
    bar.ax.locator_params(nbins=4)
    bar.formatter.set_powerlimits((-2, 3))
    bar.solids.set_alpha(1)


def _finish(fig: Figure, statistics: dict, truth: bool, colour: str = TARGET_COLOUR) -> None:
    """Heading, legend and caption; a gap above the tolerance is written in red."""
    width = fig.get_figwidth()
    heading = textwrap.fill(statistics['image'], int(width * 8.5))
    fig.suptitle(heading, fontsize=FONT['heading'], fontweight='bold')
    lines = [Line2D([], [], color=colour, label=f'target region ({statistics["target"]})')]
    if truth:
        lines.append(Line2D([], [], color=TRUTH_COLOUR, linestyle='dashed', label='ground truth'))
    fig.legend(
        handles=lines, loc='outside lower center', ncols=2, frameon=False, fontsize=FONT['label']
    )
    caption = caption_text(statistics)
    warning = gap_warning(statistics)
    text = textwrap.fill(caption, int(width * 10.5))
    if warning:
        text += '\n' + textwrap.fill(warning, int(width * 10))
    fig.supxlabel(text, fontsize=FONT['caption'], color='#b00020' if warning else 'black')


def caption_text(statistics: dict) -> str:
    """What was explained, how, and how exact it is."""
    return (
        f'Target: mean {statistics["score_type"]} over "{statistics["target"]}" '
        f'({statistics["target_area"]:,} px) · baseline: {statistics["baseline"]} · '
        f'{statistics["rule"]} rule, {statistics["steps"]} steps · '
        f'F(x) = {statistics["score"]:.3g}, F(baseline) = {statistics["baseline_score"]:.3g} · '
        f'completeness gap {_percent(statistics["completeness_gap"])} · '
        f'attribution ratio {_number(statistics["attribution_ratio"])}'
    )


def gap_warning(statistics: dict) -> str | None:
    """The sentence for a completeness gap above the tolerance; None where all is well."""
    gap, tolerance = statistics['completeness_gap'], statistics['settings']['gap_tolerance']
    if gap is None or gap <= tolerance:
        return None
    return (
        f'WARNING: the completeness gap of {_percent(gap)} is above the tolerance of '
        f'{_percent(tolerance)}: use more steps (--num_steps) before you rely on this map.'
    )


def _percent(value: float | None) -> str:
    return 'n/a' if value is None else f'{100 * value:.3g} %'


def _number(value: float | None) -> str:
    return 'n/a' if value is None else f'{value:.3g}'
