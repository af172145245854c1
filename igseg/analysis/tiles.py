"""Large pictures, tile by tile: where tiles lie, and how what was found in them becomes one map.

A network takes inputs of one size; a picture that is larger is cut into tiles of that size, in its
own pixels, which overlap so that no output pixel lacks its surroundings. Every output pixel
*belongs to* one tile: of those that show it the one in whose middle part it lies, the border
between two neighbours being the middle of what both show. The target of the picture is the mean
over a region R, a sum over tiles:

    F = sum over tiles t of (share of R that belongs to t) * (mean over that part of R)

So the map of the picture is the sum of the tiles' maps, each weighted by its tile's share;
where tiles overlap, their attributions add up. Score and baseline score are the same sums, and
completeness holds for them. Nothing here knows a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from igseg.errors import InputError
from igseg.explanation import Cost, Cropping, Explanation, Tiles, Trend
from igseg.network.score import Target

MOST_TILES = 100_000  # of a picture

DEFAULT_OVERLAP = 4  # tiles overlap by this part of their shorter side


# --------------------------------------------------------------------------- where tiles lie


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: as few as overlap by at least `overlap`, spread evenly from
    edge to edge; a single one where the side is no longer than a tile."""
    gaps = -(-max(0, length - tile) // (tile - overlap))
    return [number * (length - tile) // gaps for number in range(gaps + 1)] if gaps else [0]


def own_spans(begins: Sequence[int], length: int, tile: int) -> list[slice]:
    """Along a side, the pixels that belong to each tile: together all, each once."""
    pairs = pairwise(begins)
    borders = [0, *((first + tile + second) // 2 for first, second in pairs), length]
    return [slice(low, high) for low, high in pairwise(borders)]


@dataclass(frozen=True)
class Tile:
    """One tile of a picture; slices are of the picture's pixels."""

    rows: slice  # what it shows
    columns: slice
    own_rows: slice  # what belongs to it
    own_columns: slice

    @property
    def own(self) -> tuple[slice, slice]:
        """Of a map (h, w) of the tile, what belongs to it."""
        top, left = self.rows.start, self.columns.start
        return (
            slice(self.own_rows.start - top, self.own_rows.stop - top),
            slice(self.own_columns.start - left, self.own_columns.stop - left),
        )

    @property
    def shown(self) -> tuple[slice, slice]:
        """Of a map (h, w) of the tile, what is no padding."""
        rows, columns = self.rows, self.columns
        return slice(0, rows.stop - rows.start), slice(0, columns.stop - columns.start)


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut into tiles."""

    size: tuple[int, int]  # (height, width) of the picture
    tile: tuple[int, int]  # of every tile; a picture that is smaller is padded black
    overlap: int  # of neighbours, at least

    def __post_init__(self) -> None:
        if self.overlap >= min(self.tile):
            raise InputError(
                f'overlap must be less than the tile, {min(self.tile)}, not {self.overlap}'
            )
        count = math.prod(
            -(-max(0, length - tile) // (tile - self.overlap)) + 1
            for length, tile in zip(self.size, self.tile, strict=True)
        )
        if count > MOST_TILES:
            raise InputError(
                f'a picture of {self.size[1]}×{self.size[0]} has {count:,} tiles, more than '
                f'{MOST_TILES:,} (take a larger --tile or a smaller --overlap)'
            )

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """All of them, row by row."""
        spans = []
        for length, tile in zip(self.size, self.tile, strict=True):
            begins = starts(length, tile, self.overlap)
            shown = [slice(begin, min(begin + tile, length)) for begin in begins]
            spans.append(list(zip(shown, own_spans(begins, length, tile), strict=True)))
        return tuple(
            Tile(rows, columns, own_rows, own_columns)
            for rows, own_rows in spans[0]
            for columns, own_columns in spans[1]
        )

    @property
    def middle(self) -> Tile:
        """One that shows something, if any does."""
        return self.tiles[len(self.tiles) // 2]

    def cut(self, picture: np.ndarray, tile: Tile) -> np.ndarray:
        """What a tile (h, w, ...) shows of a picture (H, W, ...), padded with zeros, black."""
        shown = picture[tile.rows, tile.columns]
        if shown.shape[:2] == self.tile:
            return shown
        whole = np.zeros((*self.tile, *picture.shape[2:]), picture.dtype)
        whole[tile.shown] = shown
        return whole

    def part_of(self, target: Target, tile: Tile) -> tuple[float, Target | None]:
        """The share of a picture's target that belongs to a tile, and the target of the tile: the
        mean over that part; None where there is none."""
        weights = target.weights[:, tile.own_rows, tile.own_columns]
        share = float(weights.double().sum())
        if not weights.any():
            return 0.0, None
        own = target.weights.new_zeros((len(weights), *self.tile))
        own[(slice(None), *tile.own)] = weights / share
        return share, replace(target, weights=own)


# --------------------------------------------------------------------------- one map of them


class Mosaic:
    """The map of a picture for one target, as it grows tile by tile; memory is that of the map."""

    def __init__(self, tiling: Tiling, channels: int) -> None:
        self._tiling = tiling
        self.attributions = torch.zeros((channels, *tiling.size))  # (C, H, W)
        self._squares = torch.zeros(tiling.size)  # (H, W): of the uncertainties, their sum
        self._error = 0.0  # the same of the tiles' whole errors; NaN where one is unknown
        self._known = True  # whether every tile's uncertainty is
        self.score = self.baseline_score = 0.0
        self.steps = self.explained = 0
        self._scores: dict[float, float] = {}  # F at the nodes that all tiles share
        self.costs: list[Cost] = []

    def add(self, tile: Tile, share: float, part: Explanation) -> None:
        """Take in what was found in a tile. share: of the target. Errors of different tiles are
        taken to be independent."""
        place, shown = (tile.rows, tile.columns), (slice(None), *tile.shown)
        own = part.attributions.cpu().float()
        self.attributions[(slice(None), *place)] += share * own[shown]
        self._error += (share * _error_of(part, float(own.double().norm()))) ** 2
        if part.uncertainty is None:
            self._known = False
        else:
            self._squares[place] += (share * part.uncertainty[tile.shown]).square()
        self.score += share * part.score
        self.baseline_score += share * part.baseline_score
        seen = dict(zip(part.trend.alphas, part.trend.scores, strict=True))
        known = self._scores if self.explained else dict.fromkeys(seen, 0.0)
        self._scores = {a: known[a] + share * seen[a] for a in known if a in seen}
        self.steps = max(self.steps, part.steps)
        self.explained += 1
        self.costs.append(part.cost)

    @property
    def uncertainty(self) -> torch.Tensor | None:
        """(H, W): estimated error of the map summed over its channels; None where unknown."""
        return self._squares.sqrt() if self._known else None

    @property
    def map_error(self) -> float | None:
        """Estimated relative L2 error of the map; None where unknown."""
        size = float(self.attributions.double().norm())
        error = math.sqrt(self._error) / size if size else math.nan
        return error if math.isfinite(error) else None

    @property
    def attribution_sum(self) -> float:
        return float(self.attributions.double().sum())

    def trend(self, on_baseline: float) -> Trend:
        """F along the path, where every tile has a node. on_baseline: the overlap of the
        prediction on the baseline with that on the image; between the ends it is not known."""
        alphas = tuple(sorted(self._scores))
        ends = {0.0: on_baseline, 1.0: 1.0}
        return Trend(alphas, tuple(self._scores[a] for a in alphas), tuple(map(ends.get, alphas)))

    @property
    def tiles(self) -> Tiles:
        """Which tiles there are, for the statistics."""
        height, width = self._tiling.tile
        return Tiles(len(self._tiling.tiles), self.explained, (height, width),
                     self._tiling.overlap)  # fmt: skip


def _error_of(part: Explanation, size: float) -> float:
    """The estimated L2 error of a tile's map, of L2 norm `size`; NaN where it is unknown."""
    if part.map_error is not None:
        return part.map_error * size
    known = part.uncertainty is not None and not size  # a tile that is like its baseline
    return float(part.uncertainty.double().norm()) if known else math.nan


def cost_of(parts: Sequence[Cost], gradients: int, passes: int, seconds: float) -> Cost:
    """The cost of a picture. parts: of all its tiles; the rest: of the whole."""
    known = [cost.precision_deviation for cost in parts if cost.precision_deviation is not None]
    return Cost(
        gradient_evaluations=gradients,
        forward_passes=passes,
        seconds=seconds,
        step_batch=max(cost.step_batch for cost in parts),
        peak_memory_bytes=parts[-1].peak_memory_bytes,
        precision=' and '.join(sorted({cost.precision for cost in parts})),
        precision_deviation=max(known, default=None),
        retried=next((cost.retried for cost in parts if cost.retried), None),
        preparation=parts[0].preparation,
        cropping=_cropping_of([cost.cropping for cost in parts]),
    )


def _cropping_of(parts: Sequence[Cropping]) -> Cropping:
    logits = [one.logit_deviation for one in parts if one.logit_deviation is not None]
    gradients = [one.gradient_deviation for one in parts if one.gradient_deviation is not None]
    return Cropping(
        computed_share=sum(one.computed_share for one in parts) / len(parts),
        boxes=sum(one.boxes for one in parts),
        logit_deviation=max(logits, default=None),
        gradient_deviation=max(gradients, default=None),
        fell_back=any(one.fell_back for one in parts),
    )
