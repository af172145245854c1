"""Deletion and insertion: the score while the pixels that a map names are removed, or put back.

Removed pixels are replaced by a fill, one of `FILLS`. They are removed in the order of the map, or
of a control: the map in the wrong place, a random map, the edges of the image.
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

FILL_NOISE = 0.01  # standard deviation of noise that is added to local means, of the pixel range
LEAST_CHANGE = 0.01  # relative change of the score by a fill; a smaller change is only noise
BEYOND = 1.0  # how far below 0 or above 1 a curve may lie; if it lies farther, its fill is ignored

SUPERPIXELS = 100


# --------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """A deletion or insertion curve: relative score against the share of pixels changed."""

    shares: list[float]  # rising from 0 to 1
    # 1: the score of the image; 0: that of the filled image. None: these two hardly differ.
    scores: list[float] | None

    @property
    def area(self) -> float | None:
        """The area under the curve; None where the scores are None."""
        if self.scores is None:
            return None
        from scipy.integrate import trapezoid  # slow to import

        return float(trapezoid(self.scores, self.shares))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of curves, at the means of their shares."""
    shares = np.mean([curve.shares for curve in curves], axis=0).tolist()
    scores = [curve.scores for curve in curves if curve.scores is not None]
    return Curve(shares, np.mean(scores, axis=0).tolist() if len(scores) == len(curves) else None)


# --------------------------------------------------------------------------- fills
#
# A fill makes an image that replaces the removed pixels: (subject, removed (H, W) bool, random
# generator) -> (H, W, C) float32, 0-255. Only the removed pixels of this image are used.


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
    """The mean of the remaining pixels nearby, with a little noise, so that the network does not
    recognise the shape of the removed region.

    This is similar to ROAD (Rong et al. 2022), which solves one linear system for all removed
    pixels. Here each removed pixel is the mean of its surroundings, at the finest scale at which
    pixels remain there.
    """
    pixels = subject.pixels
    if removed.all():
        means = np.broadcast_to(pixels.mean(axis=(0, 1)), pixels.shape)
    else:
        means = local_means(pixels, ~removed)
    noise = rng.normal(0, 255 * FILL_NOISE, pixels.shape)
    return np.clip(means + noise, 0, 255).astype(np.float32)


def local_means(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values (H, W, C) with unknown values interpolated from the means of the known values at half
    the resolution, and so on. known: (H, W) bool; at least one value must be known."""
    if known.all():
        return values
    height, width = known.shape
    half = ((width + 1) // 2, (height + 1) // 2)
    weight = cv2.resize(known.astype(np.float32), half, interpolation=cv2.INTER_AREA)
    total = resized(values * known[..., None], half, cv2.INTER_AREA)
    half_values = total / np.maximum(weight, 1e-6)[..., None]
    coarse = local_means(half_values, weight > 0)
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


# --------------------------------------------------------------------------- order of removal


def removal_order(
    relevance: np.ndarray, segments: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """For each pixel the share of the image that is removed before it, from 0 to below 1; (H, W).

    relevance: (H, W); the highest is removed first, and ties are broken at random, so that a
    constant map gives a random order. segments: (H, W) labels of superpixels, each of which is
    removed at once, by its mean relevance; None: single pixels.
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
    from skimage.segmentation import slic  # slow to import

    return slic(pixels / 255, n_segments=SUPERPIXELS, compactness=10, start_label=0,
                channel_axis=-1)  # fmt: skip


def edge_map(pixels: np.ndarray) -> np.ndarray:
    """Strength of the Sobel gradient (H, W) of an image (H, W, C), on its grey values."""
    grey = pixels.mean(axis=2).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))


def displaced(relevance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A map (H, W) in the wrong place: mirrored, and shifted by a quarter to three quarters of each
    side, around the border. It keeps its texture and loses its meaning."""
    mirrored = relevance[:: rng.choice((-1, 1)), ::-1]
    steps = [int(side * rng.uniform(0.25, 0.75)) for side in relevance.shape]
    return np.roll(mirrored, steps, axis=(0, 1))


# --------------------------------------------------------------------------- deletion, insertion


def is_noise(full: float, empty: float) -> bool:
    """Whether the scores of an image and of the filled image are so close that differences between
    them are only noise."""
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
    """A curve. ends: the scores of image and filled image. order: see `removal_order`."""
    full, empty = ends
    changed = [order < point / points for point in range(1, points)]
    removed = changed if kind == 'deletion' else [~mask for mask in changed]
    inner = subject.scores((without(subject, fill, mask, rng) for mask in removed), bar)
    scores = [full, *inner, empty] if kind == 'deletion' else [empty, *inner, full]
    shares = [0.0, *(float(mask.mean()) for mask in changed), 1.0]
    if is_noise(full, empty):
        return Curve(shares, None)
    return Curve(shares, [(score - empty) / (full - empty) for score in scores])


def stays_between(curve: Curve) -> bool:
    """Whether a fill is suitable to compare maps, as its curve for a random map shows. The score
    must stay roughly between that of the image (1) and of the filled image (0). If it leaves this
    range by far, the score depends on the fill itself, and not on the pixels that the fill hides.
    """
    if curve.scores is None:
        return False
    return min(curve.scores) >= -BEYOND and max(curve.scores) <= 1 + BEYOND


def _curve_record(part: object) -> object:
    if not isinstance(part, Curve):
        return part
    scores = [None] * len(part.shares) if part.scores is None else part.scores
    return {'shares': part.shares, 'scores': scores, 'area': part.area}


def curve_metrics(rows: Sequence[dict]) -> dict[str, float | None]:
    """Mean areas of the map over suitable fills and units, and its margins over the controls."""
    metrics: dict[str, float | None] = {}
    for kind in ('deletion', 'insertion'):
        kind_rows = [row for row in rows if row['kind'] == kind and row['sane']]
        means = {
            name: mean
            for name in ('attribution', 'displaced', 'random', 'edges')
            if (mean := known_mean(row[name].area for row in kind_rows)) is not None
        }
        if 'attribution' not in means:
            continue
        sign = -1 if kind == 'deletion' else 1
        metrics[f'{kind}_area'] = means['attribution']
        metrics[f'{kind}_margin'] = sign * (means['attribution'] - means['displaced'])
        best_control = max(sign * means[name] for name in ('random', 'edges'))
        metrics[f'{kind}_margin_others'] = sign * means['attribution'] - best_control
    return metrics


def curves(subject: Subject, effort: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """Deletion and insertion of the map and its controls, for every unit and fill.

    Pixels are removed in the order of |attribution|: pixels that lower a logit can be as important
    for the mask as pixels that raise it, and without them the network's answer changes completely.
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
        empty: dict[str, float] = {}  # fill -> score of the image that is completely filled
        for fill, unit in product(effort.fills, effort.units):
            if fill not in empty:
                (empty[fill],) = subject.scores(
                    iter([without(subject, fill, everything, rng)]), bar
                )
            orders = {
                name: [removal_order(relevance, segments[unit], rng) for relevance in relevances]
                for name, relevances in maps.items()
            }
            for kind in ('deletion', 'insertion'):
                ends = (full, empty[fill])
                draw = partial(_curve, subject, kind, fill, ends, effort.points, rng, bar)
                row = {name: mean_curve(list(map(draw, map_orders)))
                       for name, map_orders in orders.items()}  # fmt: skip
                sane = stays_between(row['random'])
                rows.append({'kind': kind, 'fill': fill, 'unit': unit, 'sane': sane} | row)
    details = [{name: _curve_record(part) for name, part in row.items()} for row in rows]
    return Evaluation(curve_metrics(rows), {'curves': details})
