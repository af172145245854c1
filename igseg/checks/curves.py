"""Deletion and insertion: the score while what the map names is removed, or put back.

What stands in for removed pixels is a fill, of `FILLS`; the order of removal is that of the map, or
of one of its controls: the map in the wrong place, a random map, the edges of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import cv2
import numpy as np
from tqdm import tqdm

from igseg.checks.effort import Effort
from igseg.checks.subject import Evaluation, Subject, progress_bar
from igseg.maps import known_mean
from igseg.preprocessing import resized

FILL_NOISE = 0.01  # of the pixel range: standard deviation on top of local means
LEAST_CHANGE = 0.01  # of the score by a fill, relative, below which its curve is only noise
BEYOND = 1.0  # ranges beyond 0 and 1 that a curve may leave them by, before its fill is not counted

SUPERPIXELS = 100


# --------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """A deletion or insertion curve: relative score against the share of pixels changed."""

    shares: list[float]  # rising from 0 to 1
    scores: list[float] | None  # 1: as on the image; 0: as on the filled image; None: the scores of
    # the two hardly differ

    @property
    def area(self) -> float | None:
        """Under the curve; None where its scores are unknown."""
        if self.scores is None:
            return None
        from scipy.integrate import trapezoid  # takes a while

        return float(trapezoid(self.scores, self.shares))


def mean_curve(several: Sequence[Curve]) -> Curve:
    """The mean of curves, at the mean of their shares."""
    shares = np.mean([curve.shares for curve in several], axis=0).tolist()
    known = [curve.scores for curve in several if curve.scores is not None]
    return Curve(shares, np.mean(known, axis=0).tolist() if len(known) == len(several) else None)


# --------------------------------------------------------------------------- fills
#
# A fill is an image for the pixels that were removed: (subject, removed (H, W) bool, random
# generator) -> (H, W, C) float32, 0-255, of which only the removed pixels are used.


def fill_with_baseline(
    subject: Subject, removed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The baseline."""
    return subject.baseline_pixels


def fill_with_blur(subject: Subject, removed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image under a strong blur."""
    return subject.blurred


def fill_with_local_mean(
    subject: Subject, removed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The mean of the pixels left nearby, and a little noise, so that the shape of what was
    removed is not itself a signal.

    After ROAD (Rong et al. 2022), which solves one linear system for all removed pixels; here
    each is the mean of its surroundings at the finest scale at which any of them are left.
    """
    pixels = subject.pixels
    if removed.all():
        filled = np.broadcast_to(pixels.mean(axis=(0, 1)), pixels.shape)
    else:
        filled = local_means(pixels, ~removed)
    noise = rng.normal(0, 255 * FILL_NOISE, pixels.shape)
    return np.clip(filled + noise, 0, 255).astype(np.float32)


def local_means(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values (H, W, C) where known, elsewhere interpolated from the means of the known ones at
    half the resolution, and so on. At least one must be known."""
    if known.all():
        return values
    height, width = known.shape
    half = ((width + 1) // 2, (height + 1) // 2)
    weight = cv2.resize(known.astype(np.float32), half, interpolation=cv2.INTER_AREA)
    total = resized(values * known[..., None], half, cv2.INTER_AREA)
    means = total / np.maximum(weight, 1e-6)[..., None]
    coarse = local_means(means, weight > 0)
    smooth = resized(coarse, (width, height), cv2.INTER_LINEAR)
    return np.where(known[..., None], values, smooth)


FILLS: dict[str, Callable[..., np.ndarray]] = {
    'baseline': fill_with_baseline,
    'blur': fill_with_blur,
    'local mean': fill_with_local_mean,
}


def without(
    subject: Subject, fill: str, removed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The image (H, W, C) with the removed pixels (H, W) bool replaced by a fill."""
    return np.where(removed[..., None], FILLS[fill](subject, removed, rng), subject.pixels)


# --------------------------------------------------------------------------- what goes first


def removal_order(
    relevance: np.ndarray, segments: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """When each pixel goes: the share of the image (0 up to, not including, 1) gone before it.

    relevance: (H, W), highest first; ties are broken at random, so that a constant map is no order.
    segments: (H, W) labels of superpixels that go as one, by their mean relevance; None: pixels.
    """
    if segments is None:
        segments = np.arange(relevance.size).reshape(relevance.shape)
    labels, inverse, sizes = np.unique(segments, return_inverse=True, return_counts=True)
    means = np.bincount(inverse.ravel(), relevance.ravel()) / sizes
    order = np.lexsort((rng.random(len(labels)), -means))
    before = np.empty(len(labels))
    before[order] = np.concatenate(([0], np.cumsum(sizes[order])[:-1])) / relevance.size
    return before[inverse].reshape(relevance.shape)


def superpixels(pixels: np.ndarray) -> np.ndarray:
    """SLIC superpixels of an image (H, W, C) 0-255: labels (H, W)."""
    from skimage.segmentation import slic  # takes a while

    return slic(pixels / 255, n_segments=SUPERPIXELS, compactness=10, start_label=0,
                channel_axis=-1)  # fmt: skip


def edge_map(pixels: np.ndarray) -> np.ndarray:
    """Strength of the Sobel gradient (H, W) of an image (H, W, C), on its grey values."""
    grey = pixels.mean(axis=2).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))


def displaced(relevance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A map (H, W) in the wrong place: mirrored and moved around by a quarter to three quarters of
    each side, so that it keeps its texture and loses its meaning."""
    mirrored = relevance[:: rng.choice((-1, 1)), ::-1]
    steps = [int(side * rng.uniform(0.25, 0.75)) for side in relevance.shape]
    return np.roll(mirrored, steps, axis=(0, 1))


# --------------------------------------------------------------------------- deletion, insertion


def is_noise(full: float, empty: float) -> bool:
    """Whether the scores of an image and of the filled image are so near to each other that what
    lies between them is only noise."""
    return abs(full - empty) <= LEAST_CHANGE * max(abs(full), abs(empty), 1e-6)


def _curve(
    subject: Subject,
    kind: str,
    fill: str,
    ends: tuple[float, float],
    points: int,
    rng: np.random.Generator,
    bar: tqdm,
    order: np.ndarray,
) -> Curve:
    """One curve; `ends`: the scores of the image and of the filled image, which are known."""
    full, empty = ends
    touched = [order < point / points for point in range(1, points)]
    removed = touched if kind == 'deletion' else [~gone for gone in touched]
    inner = subject.scores((without(subject, fill, gone, rng) for gone in removed), bar)
    scores = [full, *inner, empty] if kind == 'deletion' else [empty, *inner, full]
    shares = [0.0, *(float(gone.mean()) for gone in touched), 1.0]
    if is_noise(full, empty):
        return Curve(shares, None)
    return Curve(shares, [(score - empty) / (full - empty) for score in scores])


def stays_between(curve: Curve) -> bool:
    """Whether a fill can tell maps apart: whether the score stays about between that of the image
    (1) and of the filled image (0) while random parts are filled. Where it leaves that range by
    far, the fill itself, not what it hides, drives the score."""
    if curve.scores is None:
        return False
    return min(curve.scores) >= -BEYOND and max(curve.scores) <= 1 + BEYOND


def _curve_record(part: object) -> object:
    if not isinstance(part, Curve):
        return part
    scores = [None] * len(part.shares) if part.scores is None else part.scores
    return {'shares': part.shares, 'scores': scores, 'area': part.area}


def curve_metrics(rows: Sequence[dict]) -> dict[str, float | None]:
    """Mean areas of the map over the sane fills and units, and its margins over the controls."""
    metrics: dict[str, float | None] = {}
    for kind in ('deletion', 'insertion'):
        mine = [row for row in rows if row['kind'] == kind and row['sane']]
        known = {
            name: mean
            for name in ('attribution', 'displaced', 'random', 'edges')
            if (mean := known_mean(row[name].area for row in mine)) is not None
        }
        if 'attribution' not in known:
            continue
        sign = -1 if kind == 'deletion' else 1
        metrics[f'{kind}_area'] = known['attribution']
        metrics[f'{kind}_margin'] = sign * (known['attribution'] - known['displaced'])
        others = max(sign * known[name] for name in ('random', 'edges'))
        metrics[f'{kind}_margin_others'] = sign * known['attribution'] - others
    return metrics


def curves(subject: Subject, effort: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """Deletion and insertion of the map and its controls, by every unit and fill.

    Pixels go in the order of |attribution|: what pulls a logit down can carry the mask as well as
    what lifts it, and without it the network answers something else altogether.
    """
    rng = np.random.default_rng(seed)
    pixels = subject.pixels
    maps = {'attribution': [subject.magnitude], 'edges': [edge_map(pixels)]}
    maps['displaced'] = [displaced(subject.magnitude, rng) for _ in range(effort.displaced)]
    maps['random'] = [rng.random(subject.signed.shape) for _ in range(effort.random_maps)]
    segments = {
        unit: superpixels(pixels) if unit == 'superpixel' else None for unit in effort.units
    }
    everything = np.ones(pixels.shape[:2], bool)
    rows = []
    with progress_bar('deletion and insertion', effort.curve_forwards(), progress) as bar:
        (full,) = subject.scores(iter([pixels]), bar)
        empty: dict[str, float] = {}  # the score of the image that is all fill
        for fill, unit in product(effort.fills, effort.units):
            if fill not in empty:
                (empty[fill],) = subject.scores(
                    iter([without(subject, fill, everything, rng)]), bar
                )
            orders = {
                name: [removal_order(relevance, segments[unit], rng) for relevance in several]
                for name, several in maps.items()
            }
            for kind in ('deletion', 'insertion'):
                ends = (full, empty[fill])
                draw = partial(_curve, subject, kind, fill, ends, effort.points, rng, bar)
                row = {name: mean_curve(list(map(draw, several)))
                       for name, several in orders.items()}  # fmt: skip
                sane = stays_between(row['random'])
                rows.append({'kind': kind, 'fill': fill, 'unit': unit, 'sane': sane} | row)
    details = [{name: _curve_record(part) for name, part in row.items()} for row in rows]
    return Evaluation(curve_metrics(rows), {'curves': details})
