"""Large pictures, tile by tile: where tiles lie, and how their maps become the map of the picture.

A network takes inputs of one size. A larger picture is cut into tiles of that size, without
resizing it. The tiles overlap, so that no output pixel lacks its surroundings. Each output pixel
belongs to the *core* of exactly one tile: the cores of two neighbours meet in the middle of their
overlap. The target of the picture is the mean over a region R, which is a sum over tiles:

    F = sum over tiles t of (share of R in the core of t) * (mean over that part of R)

So the map of the picture is the sum of the maps of the tiles, each weighted by the share of its
tile; where tiles overlap, their attributions add up. The score and the baseline score are sums of
the same kind, and completeness holds for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from igseg.analysis.image import Explained, Explainer, ModelInput, with_truth
from igseg.data.samples import over_image
from igseg.errors import InputError
from igseg.explanation import Cost, Cropping, Explanation, MethodResult, Tiles, Trend
from igseg.method.baselines import baseline_pictures, best_baseline
from igseg.method.choice import AUTO, Question
from igseg.method.rules import Integration
from igseg.method.targets import ChosenBaseline, Prediction, explanations_of
from igseg.method.walk import mask_overlap
from igseg.network.score import Target
from igseg.preprocessing import Placement, Preprocessing

if TYPE_CHECKING:
    from igseg.method.method import Method

MOST_TILES = 100_000  # of a picture
DEFAULT_OVERLAP = 4  # tiles overlap by this part of their shorter side


# --------------------------------------------------------------------------- where tiles lie


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: as few tiles as overlap by at least `overlap`, spread evenly
    from edge to edge. A side that is no longer than a tile has a single tile."""
    gaps = -(-max(0, length - tile) // (tile - overlap))
    return [number * (length - tile) // gaps for number in range(gaps + 1)] if gaps else [0]


def core_spans(begins: Sequence[int], length: int, tile: int) -> list[slice]:
    """The pixels of each tile's core along a side: together all pixels, each in one core."""
    pairs = pairwise(begins)
    borders = [0, *((first + tile + second) // 2 for first, second in pairs), length]
    return [slice(low, high) for low, high in pairwise(borders)]


@dataclass(frozen=True)
class Tile:
    """A tile of a picture. Its fields are slices of the picture's pixels."""

    rows: slice  # what the tile shows
    columns: slice
    core_rows: slice  # the tile's core
    core_columns: slice

    @property
    def core(self) -> tuple[slice, slice]:
        """The place of the core in a map (h, w) of the tile."""
        top, left = self.rows.start, self.columns.start
        return (
            slice(self.core_rows.start - top, self.core_rows.stop - top),
            slice(self.core_columns.start - left, self.core_columns.stop - left),
        )

    @property
    def shown(self) -> tuple[slice, slice]:
        """The part of a map (h, w) of the tile that is no padding."""
        rows, columns = self.rows, self.columns
        return slice(0, rows.stop - rows.start), slice(0, columns.stop - columns.start)


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut into tiles."""

    size: tuple[int, int]  # (height, width) of the picture
    tile: tuple[int, int]  # (height, width) of a tile; a smaller picture is padded black
    overlap: int  # of neighbouring tiles, at least

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
        """All tiles, row by row."""
        spans = []
        for length, tile in zip(self.size, self.tile, strict=True):
            begins = starts(length, tile, self.overlap)
            shown = [slice(begin, min(begin + tile, length)) for begin in begins]
            spans.append(list(zip(shown, core_spans(begins, length, tile), strict=True)))
        return tuple(
            Tile(rows, columns, core_rows, core_columns)
            for rows, core_rows in spans[0]
            for columns, core_columns in spans[1]
        )

    @property
    def middle(self) -> Tile:
        """A tile in the middle, which most likely shows something."""
        return self.tiles[len(self.tiles) // 2]

    def cut(self, picture: np.ndarray, tile: Tile) -> np.ndarray:
        """The part of a picture (H, W, ...) in a tile (h, w, ...), padded with zeros (black)."""
        shown = picture[tile.rows, tile.columns]
        if shown.shape[:2] == self.tile:
            return shown
        whole = np.zeros((*self.tile, *picture.shape[2:]), picture.dtype)
        whole[tile.shown] = shown
        return whole

    def part_of(self, target: Target, tile: Tile) -> tuple[float, Target | None]:
        """The share of a picture's target in the core of a tile, and the target of the tile: the
        mean over that part. None if the core has no part of the target."""
        weights = target.weights[:, tile.core_rows, tile.core_columns]
        share = float(weights.cpu().double().sum())
        if not weights.any():
            return 0.0, None
        tile_weights = target.weights.new_zeros((len(weights), *self.tile))
        place = (slice(None), *tile.core)
        tile_weights[place] = weights / share
        return share, replace(target, weights=tile_weights)


# --------------------------------------------------------------------------- one map of all tiles


class Mosaic:
    """The map of a picture for one target, which grows tile by tile in the memory of one map."""

    def __init__(self, tiling: Tiling, channels: int) -> None:
        self._tiling = tiling
        self.attributions = torch.zeros((channels, *tiling.size))  # (C, H, W)
        self._squares = torch.zeros(tiling.size)  # (H, W): sum of the squared uncertainties
        self._squared_error = 0.0  # sum of the tiles' squared L2 errors; NaN: not all are known
        self._uncertainty_known = True  # whether the uncertainty of each tile is known
        self.score = self.baseline_score = 0.0
        self.steps = self.explained = 0
        self._scores: dict[float, float] = {}  # F at the nodes (alphas) that all tiles share
        self.costs: list[Cost] = []
        # How far the gradient misses the score: the mean over the tiles, weighted by their shares.
        self.gradient_deviation: float | None = None
        self.gradient_cause: str | None = None

    def add(self, tile: Tile, share: float, part: Explanation) -> None:
        """Add the explanation of a tile. share: the tile's share of the target. Errors of different
        tiles are assumed to be independent."""
        place, shown = (tile.rows, tile.columns), (slice(None), *tile.shown)
        all_channels = (slice(None), *place)
        attributions = part.attributions.cpu().float()
        self.attributions[all_channels] += share * attributions[shown]
        self._squared_error += (share * _error_of(part, float(attributions.double().norm()))) ** 2
        if part.uncertainty is None:
            self._uncertainty_known = False
        else:
            self._squares[place] += (share * part.uncertainty[tile.shown]).square()
        self.score += share * part.score
        assert part.baseline_score is not None  # tiles need a method with a baseline
        self.baseline_score += share * part.baseline_score
        scores = dict(zip(part.trend.alphas, part.trend.scores, strict=True))
        sums = self._scores if self.explained else dict.fromkeys(scores, 0.0)
        self._scores = {a: sums[a] + share * scores[a] for a in sums if a in scores}
        self.steps = max(self.steps, part.steps)
        self.explained += 1
        if part.gradient_deviation is not None:
            self.gradient_deviation = (
                self.gradient_deviation or 0.0
            ) + share * part.gradient_deviation
            self.gradient_cause = self.gradient_cause or part.gradient_cause
        self.costs.append(part.cost)

    @property
    def uncertainty(self) -> torch.Tensor | None:
        """(H, W): estimated error of the map summed over its channels; None: unknown."""
        return self._squares.sqrt() if self._uncertainty_known else None

    @property
    def map_error(self) -> float | None:
        """Estimated relative L2 error of the map; None: unknown."""
        size = float(self.attributions.cpu().double().norm())
        error = math.sqrt(self._squared_error) / size if size else math.nan
        return error if math.isfinite(error) else None

    def trend(self, on_baseline: float) -> Trend:
        """F at the nodes of the path that all tiles share. on_baseline: the overlap of the
        prediction on the baseline with the prediction on the image. Between the ends of the path
        the overlap is unknown."""
        alphas = tuple(sorted(self._scores))
        ends = {0.0: on_baseline, 1.0: 1.0}
        return Trend(alphas, tuple(self._scores[a] for a in alphas), tuple(map(ends.get, alphas)))

    def result(self, on_baseline: float) -> MethodResult:
        """The result of all tiles together. on_baseline: see `trend`."""
        height, width = self._tiling.tile
        count, overlap = len(self._tiling.tiles), self._tiling.overlap
        return MethodResult(
            self.attributions,
            self.steps,
            self.trend(on_baseline),
            start_score=self.baseline_score,
            map_error=self.map_error,
            uncertainty=self.uncertainty,
            total=float(self.attributions.cpu().double().sum()),
            score=self.score,
            gradient_deviation=self.gradient_deviation,
            gradient_cause=self.gradient_cause,
            tiles=Tiles(count, self.explained, (height, width), overlap),
        )


def _error_of(part: Explanation, size: float) -> float:
    """The estimated L2 error of a tile's map, which has the L2 norm `size`; NaN: unknown."""
    if part.map_error is not None:
        return part.map_error * size
    if part.uncertainty is not None and not size:  # a tile that equals its baseline
        return float(part.uncertainty.cpu().double().norm())
    return math.nan


def cost_of(parts: Sequence[Cost], gradients: int, passes: int, seconds: float) -> Cost:
    """The cost of a picture. parts: of its tiles. The other arguments are of the whole picture."""
    deviations = [
        cost.precision_deviation for cost in parts if cost.precision_deviation is not None
    ]
    return Cost(
        gradient_evaluations=gradients,
        forward_passes=passes,
        seconds=seconds,
        step_batch=max(cost.step_batch for cost in parts),
        peak_memory_bytes=parts[-1].peak_memory_bytes,
        precision=' and '.join(sorted({cost.precision for cost in parts})),
        precision_deviation=max(deviations, default=None),
        retried=next((cost.retried for cost in parts if cost.retried), None),
        preparation=parts[0].preparation,
        cropping=_cropping_of([cost.cropping for cost in parts]),
    )


def _cropping_of(parts: Sequence[Cropping]) -> Cropping:
    logits = [part.logit_deviation for part in parts if part.logit_deviation is not None]
    gradients = [part.gradient_deviation for part in parts if part.gradient_deviation is not None]
    return Cropping(
        computed_share=sum(part.computed_share for part in parts) / len(parts),
        boxes=sum(part.boxes for part in parts),
        logit_deviation=max(logits, default=None),
        gradient_deviation=max(gradients, default=None),
        fell_back=any(part.fell_back for part in parts),
    )


# --------------------------------------------------------------------------- a picture in tiles


@dataclass(frozen=True)
class TiledInput:
    """A picture and its truth, in the pixels of the picture; the network takes it tile by tile."""

    image: np.ndarray  # (H, W, C), 0-255
    preprocessing: Preprocessing  # of each tile
    truth: np.ndarray | None  # (H, W) labels
    placement: Placement  # of the picture in itself
    tiling: Tiling

    @classmethod
    def of(
        cls,
        preprocessing: Preprocessing,
        image: np.ndarray,
        truth: np.ndarray | None,
        tile: tuple[int, int],
        overlap: int | None,
        origin: tuple[int, int] = (0, 0),
    ) -> TiledInput:
        """See `ModelInput.of`. tile: (height, width). overlap: None for a quarter of the tile."""
        image = image[:, :, None] if image.ndim == 2 else image
        size = (image.shape[0], image.shape[1])
        overlap = min(tile) // DEFAULT_OVERLAP if overlap is None else overlap
        whole = replace(preprocessing, image_size=size, resize='stretch').of_image(image)
        return cls(
            image,
            replace(whole, image_size=tile),
            None if truth is None else over_image(truth, size),
            Placement(size, 0, 0, *size, origin),
            Tiling(size, tile, overlap),
        )

    def input_of(self, picture: np.ndarray, tile: Tile) -> torch.Tensor:
        """A tile of the image or of a baseline as the network takes it, (1, C, h, w)."""
        return self.preprocessing.normalise(self.tiling.cut(picture, tile))

    @property
    def example(self) -> torch.Tensor:
        """An input on which the network may be prepared: the tile in the middle."""
        return self.input_of(self.image, self.tiling.middle)

    def padding_note(self) -> tuple[str, ...]:
        """A note if the picture is smaller than a tile, else empty."""
        (height, width), tile = self.tiling.size, self.tiling.tile
        if height >= tile[0] and width >= tile[1]:
            return ()
        return (
            f'the image of {width}×{height} is smaller than a tile of {tile[1]}×{tile[0]}: it was '
            'padded black',
        )

    def holding(self, targets: Sequence[Target]) -> list[Tile]:
        """The tiles whose cores hold pixels of the targets."""
        region = torch.stack([target.region for target in targets]).any(dim=0)
        return [t for t in self.tiling.tiles if bool(region[t.core_rows, t.core_columns].any())]


def explain_tiles(
    explainer: Explainer,
    tiled_input: TiledInput,
    question: Question,
    integration: Integration,
    method: Method,
    progress: bool = False,
) -> list[Explained]:
    """For each target the explanation of the whole picture, and the truth of its class."""
    started = time.perf_counter()
    _, notes = explainer.see(tiled_input.example, question.meaning)
    notes += tiled_input.padding_note()
    engine, network = explainer.engine, explainer.facts.description_for(question.meaning)
    before = engine.forward_passes, engine.gradient_evaluations
    tiles = tiled_input.tiling.tiles
    logits = picture_logits(explainer, tiled_input, tiled_input.image, tiles, progress)
    prediction = Prediction.of(network, logits, question, tiled_input.truth, tiled_input.placement)
    baseline = _choose_baseline(explainer, tiled_input, prediction, question)
    mosaics = _mosaics(
        explainer, tiled_input, prediction, question, integration, method, baseline, progress
    )
    on_baseline = picture_logits(explainer, tiled_input, baseline.pixels, tiles)
    predicted = network.foreground(prediction.masks)
    overlap = mask_overlap(predicted, network, question.threshold, on_baseline)
    cost = cost_of(
        [cost for mosaic in mosaics for cost in mosaic.costs],
        engine.gradient_evaluations - before[1],
        engine.forward_passes - before[0],
        time.perf_counter() - started,
    )
    common = {
        'notes': (*notes, *baseline.notes, *engine.notes, *prediction.notes()),
        'difference': baseline.difference(None),
        'rule': method.rule_name(integration.rule),
        'tolerance': integration.tolerance,
    }
    results = [mosaic.result(float(overlap[0])) for mosaic in mosaics]
    explanations = explanations_of(method.declares, prediction, baseline, results, cost, common)
    return with_truth(explanations, tiled_input.truth)


def picture_logits(
    explainer: Explainer,
    tiled_input: TiledInput,
    picture: np.ndarray,
    tiles: Sequence[Tile],
    progress: bool = False,
) -> torch.Tensor:
    """The network's logits (1, K, H, W) on a picture, put together from the cores of `tiles`. The
    logits are 0 beside these cores."""
    engine, facts, tiling = explainer.engine, explainer.facts, tiled_input.tiling
    whole: torch.Tensor | None = None
    last: torch.Tensor | None = None
    with engine.running(facts.checked(tiled_input.example), facts.state), torch.no_grad():
        if engine.place is not None:
            raise InputError(
                '--tile goes with networks whose map shows the whole tile, which is not so here: '
                f'{engine.place_note} (explain a part of the image with --crop)'
            )
        for tile in tqdm(tiles, 'prediction', unit='tile', leave=False, disable=not progress):
            x = tiled_input.input_of(picture, tile)
            if last is None or not torch.equal(x, last):  # tiles of one colour are alike
                logits, last = engine.run(facts.checked(x)).cpu(), x
            if whole is None:
                whole = torch.zeros((1, logits.shape[1], *tiling.size))
            core = (..., *tile.core)
            whole[..., tile.core_rows, tile.core_columns] = logits[core].float()
    assert whole is not None  # a picture has at least one tile
    return whole


def _choose_baseline(
    explainer: Explainer, tiled_input: TiledInput, prediction: Prediction, question: Question
) -> ChosenBaseline:
    """The baseline of the whole picture, without tensors: each tile gets a part of it."""
    image, kind = tiled_input.image.astype(np.float32), question.baseline
    notes: list[str] = []
    fit = tiled_input.preprocessing

    def on_baseline(kind: str) -> tuple[np.ndarray, torch.Tensor]:
        (pixels,) = baseline_pictures(question, kind, image, fit)
        tiles = tiled_input.holding(prediction.targets)
        return pixels, picture_logits(explainer, tiled_input, pixels, tiles)

    if kind == AUTO:
        kind, *notes = best_baseline(image, prediction, question.threshold, None, on_baseline)
    pictures = baseline_pictures(question, kind, image, fit)
    return ChosenBaseline(kind, image, pictures, (*notes,))


def _mosaics(
    explainer: Explainer,
    tiled_input: TiledInput,
    prediction: Prediction,
    question: Question,
    integration: Integration,
    method: Method,
    baseline: ChosenBaseline,
    progress: bool,
) -> list[Mosaic]:
    """The map of each target. Targets that share a tile share its forward passes."""
    mosaics = [Mosaic(tiled_input.tiling, tiled_input.image.shape[2]) for _ in prediction.targets]
    tiles = tqdm(tiled_input.holding(prediction.targets), 'attributions', unit='tile', leave=False,
                 disable=not progress)  # fmt: skip
    for tile in tiles:
        parts = [tiled_input.tiling.part_of(target, tile) for target in prediction.targets]
        targets = [target for _, target in parts if target is not None]
        tile_question = replace(
            question,
            targets=[replace(t, weights=t.weights.to(explainer.device)) for t in targets],
            baseline='tensor',
            baselines=[tiled_input.input_of(picture, tile)[0] for picture in baseline.pictures],
        )
        x = tiled_input.input_of(tiled_input.image, tile)
        model_input = ModelInput(x, tiled_input.preprocessing)
        explained = iter(explainer.explain_with(model_input, tile_question, integration, method))
        for mosaic, (share, target) in zip(mosaics, parts, strict=True):
            if target is not None:
                mosaic.add(tile, share, next(explained))
    return mosaics
