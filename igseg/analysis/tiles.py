"""Large pictures, tile by tile: where tiles lie, and how what was found in them becomes one map.

A network takes inputs of one size; a picture that is larger is cut into tiles of that size, in its
own pixels, which overlap so that no output pixel lacks its surroundings. Every output pixel
*belongs to* one tile: of those that show it the one in whose middle part it lies, the border
between two neighbours being the middle of what both show. The target of the picture is the mean
over a region R, a sum over tiles:

    F = sum over tiles t of (share of R that belongs to t) * (mean over that part of R)

So the map of the picture is the sum of the tiles' maps, each weighted by its tile's share;
where tiles overlap, their attributions add up. Score and baseline score are the same sums, and
completeness holds for them.
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
from igseg.network.outputs import enlarged
from igseg.network.score import Target
from igseg.preprocessing import Placement, Preprocessing

if TYPE_CHECKING:
    from igseg.method.method import Method

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
        place = (slice(None), *tile.own)
        own[place] = weights / share
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
        every_channel = (slice(None), *place)
        own = part.attributions.cpu().float()
        self.attributions[every_channel] += share * own[shown]
        self._error += (share * _error_of(part, float(own.double().norm()))) ** 2
        if part.uncertainty is None:
            self._known = False
        else:
            self._squares[place] += (share * part.uncertainty[tile.shown]).square()
        self.score += share * part.score
        assert part.baseline_score is not None  # tiles go with a method that has a baseline
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

    def trend(self, on_baseline: float) -> Trend:
        """F along the path, where every tile has a node. on_baseline: the overlap of the
        prediction on the baseline with that on the image; between the ends it is not known."""
        alphas = tuple(sorted(self._scores))
        ends = {0.0: on_baseline, 1.0: 1.0}
        return Trend(alphas, tuple(self._scores[a] for a in alphas), tuple(map(ends.get, alphas)))

    def result(self, on_baseline: float) -> MethodResult:
        """The result of all tiles together. on_baseline: see `trend`."""
        height, width = self._tiling.tile
        every, overlap = len(self._tiling.tiles), self._tiling.overlap
        return MethodResult(
            self.attributions,
            self.steps,
            self.trend(on_baseline),
            start_score=self.baseline_score,
            map_error=self.map_error,
            uncertainty=self.uncertainty,
            total=float(self.attributions.double().sum()),
            score=self.score,
            tiles=Tiles(every, self.explained, (height, width), overlap),
        )


def _error_of(part: Explanation, size: float) -> float:
    """The estimated L2 error of a tile's map, of L2 norm `size`; NaN where it is unknown."""
    if part.map_error is not None:
        return part.map_error * size
    if part.uncertainty is not None and not size:  # a tile that is like its baseline
        return float(part.uncertainty.double().norm())
    return math.nan


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


# --------------------------------------------------------------------------- a picture in tiles


@dataclass(frozen=True)
class TiledInput:
    """A picture and its truth, which the network takes tile by tile, in the picture's pixels."""

    image: np.ndarray  # (H, W, C), 0-255
    preprocessing: Preprocessing  # of each tile
    truth: np.ndarray | None  # (H, W) labels
    placement: Placement  # in itself
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
        """See `ModelInput.of`. tile: (height, width). overlap: None: a quarter of the tile."""
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
        """What the network takes, (1, C, h, w), of a tile of the image or of a baseline."""
        return self.preprocessing.normalise(self.tiling.cut(picture, tile))

    @property
    def example(self) -> torch.Tensor:
        """What the network may be prepared on: a tile that shows something, if any does."""
        return self.input_of(self.image, self.tiling.middle)

    def padding_note(self) -> tuple[str, ...]:
        """Whether the picture is smaller than a tile, in words."""
        (height, width), tile = self.tiling.size, self.tiling.tile
        if height >= tile[0] and width >= tile[1]:
            return ()
        return (
            f'the image of {width}×{height} is smaller than a tile of {tile[1]}×{tile[0]}: it was '
            'padded black',
        )

    def holding(self, targets: Sequence[Target]) -> list[Tile]:
        """The tiles to which pixels of the targets belong."""
        held = torch.stack([target.region for target in targets]).any(dim=0)
        return [t for t in self.tiling.tiles if bool(held[t.own_rows, t.own_columns].any())]


def explain_tiles(
    explainer: Explainer,
    given: TiledInput,
    question: Question,
    integration: Integration,
    method: Method,
    progress: bool = False,
) -> list[Explained]:
    """For each target the explanation of the whole picture, and the truth of its class."""
    started = time.perf_counter()
    _, notes = explainer.see(given.example, question.meaning)
    notes += given.padding_note()
    engine, network = explainer.engine, explainer.facts.description_for(question.meaning)
    before = engine.forward_passes, engine.gradient_evaluations
    logits = picture_logits(explainer, given, given.image, given.tiling.tiles, progress)
    prediction = Prediction.of(network, logits, question, given.truth, given.placement)
    baseline = _choose_baseline(explainer, given, prediction, question)
    mosaics = _mosaics(
        explainer, given, prediction, question, integration, method, baseline, progress
    )
    on_baseline = picture_logits(explainer, given, baseline.pixels, given.tiling.tiles)
    predicted = network.foreground(prediction.masks)
    overlap = mask_overlap(predicted, network, question.threshold, on_baseline)
    cost = cost_of(
        [cost for mosaic in mosaics for cost in mosaic.costs],
        engine.gradient_evaluations - before[1],
        engine.forward_passes - before[0],
        time.perf_counter() - started,
    )
    output_note = (engine.output_note,) if engine.output_note else ()
    common = {
        'notes': (*notes, *baseline.notes, *output_note, *prediction.notes()),
        'difference': baseline.difference(None),
        'rule': method.rule_name(integration.rule),
        'tolerance': integration.tolerance,
    }
    results = [mosaic.result(float(overlap[0])) for mosaic in mosaics]
    explanations = explanations_of(method.declares, prediction, baseline, results, cost, common)
    return with_truth(explanations, given.truth)


def picture_logits(
    explainer: Explainer,
    given: TiledInput,
    picture: np.ndarray,
    tiles: Sequence[Tile],
    progress: bool = False,
) -> torch.Tensor:
    """The network's logits (1, K, H, W) on a picture, put together from tiles; 0 beside them. Each
    pixel's come from the tile that it belongs to."""
    engine, facts, tiling = explainer.engine, explainer.facts, given.tiling
    whole: torch.Tensor | None = None
    last: torch.Tensor | None = None
    with engine.running(facts.checked(given.example), facts.state), torch.no_grad():
        for tile in tqdm(tiles, 'prediction', unit='tile', leave=False, disable=not progress):
            x = given.input_of(picture, tile)
            if last is None or not torch.equal(x, last):  # of one colour many are alike
                logits, last = enlarged(engine.run(facts.checked(x)), tiling.tile).cpu(), x
            if whole is None:
                whole = torch.zeros((1, logits.shape[1], *tiling.size))
            own = (..., *tile.own)
            whole[..., tile.own_rows, tile.own_columns] = logits[own].float()
    assert whole is not None  # a picture has a tile
    return whole


def _choose_baseline(
    explainer: Explainer, given: TiledInput, prediction: Prediction, question: Question
) -> ChosenBaseline:
    """The baselines of the whole picture: each tile gets its part. Their tensors are left out."""
    image, kind = given.image.astype(np.float32), question.baseline
    notes: list[str] = []
    fit = given.preprocessing

    def on_baseline(kind: str) -> tuple[np.ndarray, torch.Tensor]:
        (pixels,) = baseline_pictures(question, kind, image, fit)
        return pixels, picture_logits(explainer, given, pixels, given.holding(prediction.targets))

    if kind == AUTO:
        kind, *notes = best_baseline(image, prediction, question.threshold, None, on_baseline)
    pictures = baseline_pictures(question, kind, image, fit)
    return ChosenBaseline(kind, image, pictures, (*notes,))


def _mosaics(
    explainer: Explainer,
    given: TiledInput,
    prediction: Prediction,
    question: Question,
    integration: Integration,
    method: Method,
    baseline: ChosenBaseline,
    progress: bool,
) -> list[Mosaic]:
    """The map of each target. Targets that share a tile share its forward passes."""
    mosaics = [Mosaic(given.tiling, given.image.shape[2]) for _ in prediction.targets]
    tiles = tqdm(given.holding(prediction.targets), 'attributions', unit='tile', leave=False,
                 disable=not progress)  # fmt: skip
    for tile in tiles:
        parts = [given.tiling.part_of(target, tile) for target in prediction.targets]
        own = [part for _, part in parts if part is not None]
        asked = replace(
            question,
            targets=[replace(one, weights=one.weights.to(explainer.device)) for one in own],
            baseline='tensor',
            baselines=[given.input_of(one, tile)[0] for one in baseline.pictures],
        )
        here = ModelInput(given.input_of(given.image, tile), given.preprocessing)
        left = iter(explainer.explain_with(here, asked, integration, method))
        for mosaic, (share, part) in zip(mosaics, parts, strict=True):
            if part is not None:
                mosaic.add(tile, share, next(left))
    return mosaics
