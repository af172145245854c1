"""Arithmetic on attribution maps: how two maps compare, and where a map lies.

Arrays are NumPy, at model resolution. A *relevance* or *magnitude* is a map (H, W) of values from 0
up; a mask, a region or a content is (H, W) bool. No network is needed here. A figure that does not
apply is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

# Numbers in the definitions of checks.
STRONGEST = 0.05  # share of the pixels that are the "top"
RIM = 0.05  # width of the outer rim, relative to the longer side
NEAR = 0.05  # "near the target": within this distance, relative to the longer side
FAR = 0.15  # "far from the target": beyond this distance, relative to the longer side
NOISE_RADIUS = 0.02  # of the noise for max-sensitivity, relative to the pixel range

PROFILE_BINS = 48
ONE_SIGN = 0.02  # share of |attribution| that may have the other sign in a map of one sign


# --------------------------------------------------------------------------- comparing two maps


def linear_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's correlation of two arrays of the same shape; None if one of them is constant."""
    centred = [np.asarray(values, float).ravel() - np.mean(values) for values in (first, second)]
    size = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / size) if size > 0 else None


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation of two arrays of the same shape; None if one is constant."""
    from scipy.stats import rankdata  # slow to import

    return linear_correlation(rankdata(first, axis=None), rankdata(second, axis=None))


def has_one_sign(signed: np.ndarray) -> bool:
    """Whether a map has only one sign, except for the share ONE_SIGN of its |attribution|."""
    positive, negative = signed.clip(min=0).sum(), -signed.clip(max=0).sum()
    return bool(min(positive, negative) <= ONE_SIGN * (positive + negative))


def similarity(first: np.ndarray, second: np.ndarray) -> float | None:
    """Structural similarity of two non-negative maps, each scaled to a maximum of 1; None if one of
    them is all zero, or smaller than the window of 7 pixels."""
    from skimage.metrics import structural_similarity  # slow to import

    if not (first.max() > 0 and second.max() > 0) or min(first.shape) < 7:
        return None
    return float(structural_similarity(first / first.max(), second / second.max(), data_range=1.0))


def top_overlap(first: np.ndarray, second: np.ndarray, share: float = STRONGEST) -> float | None:
    """Share of the strongest pixels that two maps have in common; None if one is constant."""
    if first.max() == first.min() or second.max() == second.min():
        return None
    count = max(1, round(share * first.size))
    tops = [set(np.argsort(-m, axis=None, kind='stable')[:count].tolist()) for m in (first, second)]
    return len(tops[0] & tops[1]) / count


def max_sensitivity(reference: np.ndarray, perturbed: Sequence[np.ndarray]) -> float | None:
    """Largest relative L2 change of a map (Yeh et al. 2019); None for an all-zero map."""
    size = np.linalg.norm(reference)
    if not size > 0:
        return None
    return float(max(np.linalg.norm(changed - reference) for changed in perturbed) / size)


def infidelity(predicted: np.ndarray, actual: np.ndarray) -> float | None:
    """Normalised infidelity (Yeh et al. 2019, with the best scale): 0 is perfect, 1 as bad as an
    all-zero map. predicted, actual: change of the score by each perturbation. None where nothing
    changes the score."""
    size = (actual**2).sum()
    if not size > 0:
        return None
    square = (predicted**2).sum()
    scale = (predicted * actual).sum() / square if square > 0 else 0.0
    return float(((scale * predicted - actual) ** 2).sum() / size)


def known_mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there is no such value."""
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def known_median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are not None; None if there is no such value."""
    numbers = [value for value in values if value is not None]
    return float(np.median(numbers)) if numbers else None


# --------------------------------------------------------------------------- where a map lies


def _share_of_top(relevance: np.ndarray, mask: np.ndarray, count: int) -> float:
    """The share of the `count` most relevant pixels that lies in a mask; ties count in part."""
    least = np.partition(relevance, relevance.size - count, axis=None)[relevance.size - count]
    above, tied = relevance > least, relevance == least
    hits = mask[above].sum() + (count - above.sum()) * mask[tied].mean()
    return float(hits / count)


def localisation(relevance: np.ndarray, mask: np.ndarray) -> dict[str, float | None]:
    """Mass and rank accuracy, pointing game and top-k intersection of a map (H, W) >= 0.

    None for an empty mask or an all-zero map. Tied pixels count in part, so that a constant map
    gets the mask's share of the area, for any order of the pixels.
    """
    total = relevance.sum()
    if not mask.any() or not total > 0:
        return dict.fromkeys(('mass', 'rank', 'pointing', 'top'))
    return {
        'mass': float(relevance[mask].sum() / total),
        'rank': _share_of_top(relevance, mask, int(mask.sum())),
        'pointing': _share_of_top(relevance, mask, 1),
        'top': _share_of_top(relevance, mask, max(1, round(STRONGEST * mask.size))),
    }


def _excess(magnitude: np.ndarray, mask: np.ndarray) -> float | None:
    total = magnitude.sum()
    return float(magnitude[mask].sum() / total / mask.mean()) if total > 0 and mask.any() else None


def edge_excess(
    magnitude: np.ndarray, region: np.ndarray, content: np.ndarray | None = None
) -> dict[str, float | None]:
    """The share of attribution in the outer rim, and in the padding, divided by the share of area.

    The rim is that of the image without padding (`content`). It does not include the target region,
    which may touch the border. None if there is no such pixel, or no attribution.
    """
    height, width = magnitude.shape
    content = np.ones_like(region) if content is None else content
    rim = max(1, round(RIM * max(height, width)))
    inner = cv2.erode(
        np.pad(content, 1).astype(np.uint8), np.ones((2 * rim + 1,) * 2, np.uint8)
    )[1:-1, 1:-1].astype(bool)  # fmt: skip
    return {
        'rim_excess': _excess(magnitude, content & ~inner & ~region),
        'padding_excess': _excess(magnitude, ~content),
    }


def signed_distance(region: np.ndarray) -> np.ndarray:
    """Distance (H, W) of every pixel from the border of a region that is not empty, in pixels:
    positive outside, 0 or below inside."""
    from scipy.ndimage import distance_transform_edt  # slow to import

    outside = distance_transform_edt(~region)
    return outside if region.all() else outside - (distance_transform_edt(region) - 1) * region


def holding_radii(
    magnitude: np.ndarray, distance: np.ndarray, shares: Sequence[int]
) -> dict[int, float | None]:
    """For each share (in per cent): the distance from the target within which this share of a map
    lies."""
    total = magnitude.sum()
    if not total > 0:
        return dict.fromkeys(shares)
    outwards = np.maximum(distance, 0).ravel()
    order = np.argsort(outwards, kind='stable')
    cumulative = np.cumsum(magnitude.ravel()[order])
    rows = [np.searchsorted(cumulative, share / 100 * total * (1 - 1e-12)) for share in shares]
    return {
        share: float(outwards[order[min(row, len(order) - 1)]])
        for share, row in zip(shares, rows, strict=True)
    }


def profile(magnitude: np.ndarray, distance: np.ndarray) -> tuple[list[float], list[float | None]]:
    """The mean of a map over pixels at equal distance: the middle of each bin of distances, and the
    mean there relative to the mean of all pixels (None if the map is all zero)."""
    edges = np.linspace(distance.min() - 0.5, distance.max() + 0.5, PROFILE_BINS + 1)
    pixels = np.histogram(distance, edges)[0]
    sums = np.histogram(distance, edges, weights=magnitude)[0]
    mean = magnitude.mean()
    occupied = pixels > 0
    values: list[float | None] = [None] * int(occupied.sum())
    if mean > 0:
        values = (sums[occupied] / pixels[occupied] / mean).tolist()
    return ((edges[:-1] + edges[1:]) / 2)[occupied].tolist(), values


def mask_scores(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Dice, IoU and pixel accuracy of two bool masks of the same shape. Two empty masks agree
    fully. None if there are no pixels."""
    overlap, union = (prediction & truth).sum(), (prediction | truth).sum()
    if not prediction.size:
        return {'dice': None, 'iou': None, 'pixel_accuracy': None}
    return {
        'dice': float(2 * overlap / (overlap + union)) if union else 1.0,
        'iou': float(overlap / union) if union else 1.0,
        'pixel_accuracy': float((prediction == truth).mean()),
    }


def label_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[int, dict[str, float | None]]:
    """Dice, IoU and accuracy of each label that is predicted or true somewhere. The accuracy is the
    share of its true pixels that are predicted; None without true pixels.

    predicted, truth: masks of all labels, (K, h, w) bool."""
    scores: dict[int, dict[str, float | None]] = {}
    for label, (mask, true) in enumerate(zip(predicted, truth, strict=True)):
        if mask.any() or true.any():
            agreement = mask_scores(mask, true)
            accuracy = float(mask[true].mean()) if true.any() else None
            scores[label] = {
                'dice': agreement['dice'],
                'iou': agreement['iou'],
                'accuracy': accuracy,
            }
    return scores


def mean_of(values: np.ndarray) -> float | None:
    """The mean of an array; None if it is empty."""
    return float(values.mean()) if values.size else None


def contrast(values: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float | None:
    """The mean of a map (H, W) in one mask, divided by its mean in another; None if a mask is
    empty, or the second mean is 0."""
    means = [mean_of(values[mask]) for mask in (inside, outside)]
    return means[0] / means[1] if means[0] is not None and means[1] else None
