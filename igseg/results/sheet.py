"""A page of panels: `SheetLayout` says where everything lies, `Sheet` draws."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from igseg.checks.verdict import accuracy_warning, map_verdict
from igseg.results.fonts import drawable
from igseg.results.view import View
from igseg.statistics import CLIP_PERCENTILE, Statistics, gap_text, how_text, shown, tiles_text

DOTS_PER_INCH = 150
BOLD = 1.25  # how much wider bold type is
FONT = {'title': 11, 'label': 9, 'caption': 10, 'heading': 13}

SPECK = 1e-4  # a region smaller than this share of the image cannot be seen by its outline

WARNING_COLOUR = '#b00020'

TITLE, BAR, GAP, LINE = 0.5, 0.85, 0.25, 0.19  # inches; colour bars of narrow panels need more

TREND = (3.4, 1.75)  # inches: the corner with the curves along the path

JOINT = ' · '

LineStyle = Literal['solid', 'dashed']


# --------------------------------------------------------------------------- where things lie


def wrap(text: str, inches: float, size: float) -> str:
    """Break text into lines that fit a width, in letters that can be drawn; names without spaces
    are broken too."""
    text = drawable(text)
    wide = any(unicodedata.east_asian_width(letter) in 'WF' for letter in text)
    return textwrap.fill(text, max(8, int(inches * 72 / (size * (1.0 if wide else 0.56)))))


class Texts(NamedTuple):
    """The texts on a page."""

    heading: str
    lines: Sequence[str]  # of the caption
    warning: str  # empty: no warning


class Wrapped(NamedTuple):
    """The texts on a page, broken into lines that fit."""

    heading: str
    caption: str
    warning: str


@dataclass(frozen=True)
class SheetLayout:
    """Where everything lies on a page: in inches, from the lower left corner.

    The panels all have the image's shape. A heading is above them, a caption below. Wide images
    stand in few columns, tall images in many. Texts never overlap, whatever the shape of the image.
    """

    width: float
    height: float
    panel: tuple[float, float]  # width and height of each panel
    places: tuple[tuple[float, float], ...]  # x and y of each panel
    cell: float  # width that each panel has for its title and its colour bar
    bottom: float  # height of the panels' lower edge: below are legend, caption and the corner
    centre: float  # x of the middle of the caption
    texts: Wrapped

    @classmethod
    def of(
        cls, size: tuple[int, int], panels: int, bars: Sequence[int], texts: Texts, trend: bool
    ) -> SheetLayout:
        """The layout for an image of (height, width). panels: how many. bars: the panels with a
        colour bar. trend: whether the corner shows the curves along the path; the caption has the
        rest of the foot."""
        aspect = size[1] / size[0]
        columns = 2 if aspect > 1.8 else 7 if aspect < 0.55 else 4 if panels == 4 else 3
        columns = min(columns, panels)
        panel_width = min(13 / columns, 6.0, 8.0 * aspect)
        panel_height = min(panel_width / aspect, 8.0)
        cell = max(panel_width, 2.0)
        width = max(columns * (cell + GAP) + GAP, 9.0)
        foot = width - (TREND[0] if trend else 0.0)
        wrapped = _wrapped(texts, width, foot)
        top, bottom = _margins(wrapped, trend)
        bar = BAR + (LINE if cell < 3 else 0)
        rows = [range(k, min(k + columns, panels)) for k in range(0, panels, columns)]
        depths = [  # of each row: titles, panels, and colour bars where a panel has one
            TITLE + panel_height + (bar if set(row) & set(bars) else 0.1) for row in rows
        ]
        height = top + sum(depths) + bottom
        margin = (width - columns * (cell + GAP) + GAP) / 2
        across = [margin + k * (cell + GAP) + (cell - panel_width) / 2 for k in range(columns)]
        up = [height - top - sum(depths[:k]) - TITLE - panel_height for k in range(len(rows))]
        places = tuple((across[k], y) for row, y in zip(rows, up, strict=True)
                       for k in range(len(row)))  # fmt: skip
        return cls(width, height, (panel_width, panel_height), places, cell, bottom, foot / 2,
                   wrapped)  # fmt: skip


def _wrapped(texts: Texts, width: float, foot: float) -> Wrapped:
    """Texts broken into lines: the heading fits the width of the page, the others fit the width of
    the foot."""
    return Wrapped(
        wrap(texts.heading, width, FONT['heading'] * BOLD),
        '\n'.join(wrap(line, foot, FONT['caption']) for line in texts.lines),
        wrap(texts.warning, foot, FONT['caption'] * BOLD),
    )


def _margins(texts: Wrapped, trend: bool) -> tuple[float, float]:
    """The heights of the spaces above and below the panels."""
    lines = texts.caption.count('\n') + 1
    lines += texts.warning.count('\n') + 1 if texts.warning else 0
    top = GAP + 1.3 * LINE * (texts.heading.count('\n') + 1)
    return top, GAP + max(LINE * (lines + 2), TREND[1] if trend else 0)


# --------------------------------------------------------------------------- drawing


def caption_lines(statistics: Statistics) -> list[str]:
    """The lines of the caption: what was explained, how, and how exact the map is."""

    def show(key: str) -> str:
        return shown(key, statistics[key])

    tiles = tiles_text(statistics)
    share = statistics.get('settled_share')  # missing in older results
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


class Sheet:
    """A page of panels with a heading and a caption, laid out by `SheetLayout`."""

    def __init__(
        self,
        view: View,
        statistics: Statistics,
        panels: int,
        bars: Sequence[int],
        trend: bool = False,
        lines: Sequence[str] | None = None,
        warning: str | None = None,
    ) -> None:
        """panels: how many. bars: the panels with a colour bar. trend: whether to draw the curves
        along the path. lines, warning: of the caption; by default made from the statistics."""
        if lines is None:
            lines, warning = caption_lines(statistics), accuracy_warning(statistics)
            lines = lines if trend else [JOINT.join(lines)]  # the corner leaves room for many lines
            lines = [line[0].upper() + line[1:] for line in lines] if trend else lines
        else:
            lines = [line[0].upper() + line[1:] for line in lines]
        texts = Texts(statistics['image'], lines, warning or '')
        self.view = view
        self.layout = SheetLayout.of(view.original_size, panels, bars, texts, trend)
        page = self.layout
        self.figure = Figure(figsize=(page.width, page.height), dpi=DOTS_PER_INCH)
        self.axes = [self._add(x, y, *page.panel) for x, y in page.places]
        for axis in self.axes:
            axis.set_xticks([])
            axis.set_yticks([])
        self._write_texts()
        if trend:
            self._draw_trend(statistics)

    def _write_texts(self) -> None:
        page, (heading, caption, warning) = self.layout, self.layout.texts
        self._write(heading, page.height - GAP / 2, FONT['heading'], 0.5, weight='bold')
        middle = page.centre / page.width
        self._write(caption, page.bottom - LINE * 1.6, FONT['caption'], middle)
        below = page.bottom - LINE * (1.6 + caption.count('\n') + 1)
        self._write(warning, below, FONT['caption'], middle, color=WARNING_COLOUR, weight='bold')

    def _add(self, x: float, y: float, width: float, height: float) -> Axes:
        """New axes; place and size are in inches, from the lower left corner."""
        across, up = self.layout.width, self.layout.height
        return self.figure.add_axes((x / across, y / up, width / across, height / up))

    def _write(self, text: str, y: float, size: int, x: float, **style: Any) -> None:
        """Write a text. x: its centre, as a share of the page's width. y: its top edge, in inches
        above the bottom of the page."""
        self.figure.text(
            x, y / self.layout.height, text, ha='center', va='top', fontsize=size, **style
        )

    def _draw_trend(self, statistics: Statistics) -> None:
        """Draw the curves of the score and of the mask along the path, with a dot at every node."""
        trend = statistics['trend']
        width, height = TREND
        place = (self.layout.width - width + 0.45, 0.45, width - 1.05, height - 0.75)
        axis = self._add(*place)
        if not trend['alphas']:  # a method without a path
            axis.set_axis_off()
            return
        axis.plot(trend['alphas'], trend['scores'], '.-', color='black', ms=4, lw=0.8)
        axis.set_title('F (black) and IoU of the mask (blue) on the path', fontsize=8)
        axis.set_xlabel('alpha: 0 baseline, 1 image', fontsize=8, labelpad=1)
        iou_axis = axis.twinx()
        pairs = zip(trend['alphas'], trend['mask_iou'], strict=True)
        measured = [pair for pair in pairs if pair[1] is not None]  # nodes with a whole map
        style = '.-' if len(measured) == len(trend['alphas']) else 's'  # a line only if all nodes
        iou_axis.plot(*np.array(measured).reshape(-1, 2).T, style, color='tab:blue', ms=3, lw=0.8,
                   clip_on=False)  # fmt: skip
        iou_axis.set_ylim(-0.03, 1.03)
        for curve_axis in (axis, iou_axis):
            curve_axis.tick_params(labelsize=7, pad=1)
        axis.set_xlim(0, 1)
        axis.set_xticks([0.2, 0.4, 0.6, 0.8])  # labels at the ends would touch other labels
        low, high = axis.get_ylim()
        axis.set_yticks([t for t in MaxNLocator(4).tick_values(low, high) if low < t < high])
        iou_axis.set_yticks([0.0, 0.5, 1.0])

    def show(
        self, axis: Axes, values: np.ndarray, title: str | None = None, **options: Any
    ) -> AxesImage:
        """Draw an array over the whole image area, in original pixel coordinates."""
        smooth = 'antialiased' if values.ndim == 3 else 'nearest'  # maps are shown as they are
        drawn = axis.imshow(
            values, extent=self.view.extent, interpolation=smooth, aspect='auto', **options
        )
        if title is not None:
            axis.set_title(wrap(title, self.layout.cell, FONT['title']), fontsize=FONT['title'])
        return drawn

    def show_mask(
        self, axis: Axes, mask: np.ndarray, tint: tuple[float, float, float], title: str
    ) -> None:
        """Draw the image with a half transparent mask over it."""
        self.show(axis, self.view.image, title)
        layer = np.zeros((*mask.shape, 4))
        layer[mask] = (*tint, 0.5)
        axis.imshow(layer, extent=self.view.extent, interpolation='nearest', aspect='auto')

    def outline(self, axis: Axes, mask: np.ndarray, colour: str, style: LineStyle) -> None:
        """Draw the outline of a mask, and a ring around a mask that is too small to see."""
        if not mask.any():
            return
        left, right, bottom, top = self.view.extent
        rows, columns = mask.shape
        x = left + (np.arange(columns + 2) - 0.5) * (right - left) / columns
        y = top + (np.arange(rows + 2) - 0.5) * (bottom - top) / rows
        padded = np.pad(mask, 1).astype(float)  # closes the outline at the edges of the image
        axis.contour(x, y, padded, [0.5], colors=colour, linewidths=1.2, linestyles=style)
        if mask.mean() < SPECK:
            row, column = np.argwhere(mask).mean(axis=0).round().astype(int) + 1
            axis.plot(x[column], y[row], 'o', ms=14, mfc='none', mec=colour)
        axis.set_xlim(left, right)
        axis.set_ylim(bottom, top)

    def bar(
        self, axis: Axes, drawn: AxesImage, label: str, extend: str, clipped: bool = True
    ) -> None:
        """Draw a colour bar below a panel. clipped: whether its label says where colours are
        clipped."""
        box = axis.get_position()
        x = (box.x0 + box.x1) / 2 * self.layout.width - self.layout.cell / 2
        place = self._add(x + 0.1, box.y0 * self.layout.height - 0.2, self.layout.cell - 0.2, 0.1)
        bar = self.figure.colorbar(
            drawn, cax=place, orientation='horizontal', extend=extend, format='%.2g'
        )
        low, high = drawn.get_clim()
        assert low is not None and high is not None  # a map was drawn
        ticks = MaxNLocator(4 if self.layout.cell > 3 else 2).tick_values(low, high)
        bar.set_ticks([tick for tick in ticks if low <= tick <= high])
        if bar.solids is not None:
            bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=8)
        text = f'{label} (clipped at the {CLIP_PERCENTILE}th percentile)' if clipped else label
        bar.set_label(wrap(text, self.layout.cell, FONT['label']), fontsize=FONT['label'])

    def legend(self, entries: dict[str, tuple[str, LineStyle]]) -> None:
        """Draw the legend of the outlines. entries: label -> (colour, line style)."""
        lines = [
            Line2D([], [], color=colour, linestyle=style, label=label)
            for label, (colour, style) in entries.items()
        ]
        self.figure.legend(
            handles=lines,
            loc='center',
            bbox_to_anchor=(
                self.layout.centre / self.layout.width,
                (self.layout.bottom - LINE / 2) / self.layout.height,
            ),
            ncols=len(lines),
            frameon=False,
            fontsize=FONT['label'],
        )
