"""Arithmetic on attribution maps: how two of them compare, and where one lies.

Arrays are NumPy, at model resolution. A *relevance* or *magnitude* is a map (H, W) of values from 0
up; a mask, a region or a content is (H, W) bool. Nothing here knows a network; a figure that does
not apply is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

# What the definitions of checks say.
STRONGEST = 0.05  # share of the pixels that "top" means
RIM = 0.05  # width of the outer rim, share of the longer side
NEAR = 0.05  # "near the target": within this share of the longer side
FAR = 0.15  # "far from the target": beyond this share of the longer side
NOISE_RADIUS = 0.02  # of the pixel range: of max-sensitivity's perturbations

PROFILE_BINS = 48
ONE_SIGN = 0.02  # of |attribution| that a map of one sign may have of the other


# --------------------------------------------------------------------------- comparing two maps


def linear_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's correlation of two arrays of one shape; None where one is constant."""
    centred = [np.asarray(values, float).ravel() - np.mean(values) for values in (one, other)]
    size = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / size) if size > 0 else None


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's rank correlation of two arrays of one shape; None where one is constant."""
    from scipy.stats import rankdata  # takes a while

    return linear_correlation(rankdata(one, axis=None), rankdata(other, axis=None))


def has_one_sign(signed: np.ndarray) -> bool:
    """Whether a map is of one sign, but for ONE_SIGN of its |attribution|."""
    positive, negative = signed.clip(min=0).sum(), -signed.clip(max=0).sum()
    return bool(min(positive, negative) <= ONE_SIGN * (positive + negative))


def similarity(one: np.ndarray, other: np.ndarray) -> float | None:
    """Structural similarity of two non-negative maps, each scaled to a maximum of 1; None where
    one is all zero or smaller than the window of 7 pixels."""
    from skimage.metrics import structural_similarity  # takes a while

    if not (one.max() > 0 and other.max() > 0) or min(one.shape) < 7:
        return None
    return float(structural_similarity(one / one.max(), other / other.max(), data_range=1.0))


def top_overlap(one: np.ndarray, other: np.ndarray, share: float = STRONGEST) -> float | None:
    """Share that the strongest pixels of two maps have in common; None where one is constant."""
    if one.max() == one.min() or other.max() == other.min():
        return None
    count = max(1, round(share * one.size))
    tops = [set(np.argsort(-m, axis=None, kind='stable')[:count].tolist()) for m in (one, other)]
    return len(tops[0] & tops[1]) / count


def max_sensitivity(reference: np.ndarray, perturbed: Sequence[np.ndarray]) -> float | None:
    """Largest relative L2 change of a map (Yeh et al. 2019); None for an all-zero map."""
    size = np.linalg.norm(reference)
    if not size > 0:
        return None
    return float(max(np.linalg.norm(other - reference) for other in perturbed) / size)


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
    """The mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def known_median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


# --------------------------------------------------------------------------- where a map lies


def _share_of_top(relevance: np.ndarray, mask: np.ndarray, count: int) -> float:
    """The share of the `count` most relevant pixels that lie in a mask; ties in part."""
    least = np.partition(relevance, relevance.size - count, axis=None)[relevance.size - count]
    above, tied = relevance > least, relevance == least
    hits = mask[above].sum() + (count - above.sum()) * mask[tied].mean()
    return float(hits / count)


def localisation(relevance: np.ndarray, mask: np.ndarray) -> dict[str, float | None]:
    """Mass and rank accuracy, pointing game and top-k intersection of a map (H, W) >= 0.

    None for an empty mask or an all-zero map. Where pixels tie, each counts in part, so that a
    constant map gets the mask's share of the area, whatever the order of the pixels.
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
    """How much more attribution than area the outer rim and the padding hold; 1: just as much.

    The rim is that of the image proper (`content`), without the target region, which may touch
    the border with good reason. None where there is no such pixel, or no attribution.
    """
    height, width = magnitude.shape
    content = np.ones_like(region) if content is None else content
    wide = max(1, round(RIM * max(height, width)))
    inner = cv2.erode(
        np.pad(content, 1).astype(np.uint8), np.ones((2 * wide + 1,) * 2, np.uint8)
    )[1:-1, 1:-1].astype(bool)  # fmt: skip
    return {
        'rim_excess': _excess(magnitude, content & ~inner & ~region),
        'padding_excess': _excess(magnitude, ~content),
    }


def signed_distance(region: np.ndarray) -> np.ndarray:
    """Distance (H, W) of every pixel from the border of a region that is not empty, in pixels:
    positive outside, 0 or below inside."""
    from scipy.ndimage import distance_transform_edt  # takes a while

    outside = distance_transform_edt(~region)
    return outside if region.all() else outside - (distance_transform_edt(region) - 1) * region


def holding_radii(
    magnitude: np.ndarray, distance: np.ndarray, shares: Sequence[int]
) -> dict[int, float | None]:
    """The distance from the target within which each share (in per cent) of a map lies."""
    total = magnitude.sum()
    if not total > 0:
        return dict.fromkeys(shares)
    outwards = np.maximum(distance, 0).ravel()
    order = np.argsort(outwards, kind='stable')
    held = np.cumsum(magnitude.ravel()[order])
    rows = [np.searchsorted(held, share / 100 * total * (1 - 1e-12)) for share in shares]
    return {
        share: float(outwards[order[min(row, len(order) - 1)]])
        for share, row in zip(shares, rows, strict=True)
    }


def profile(magnitude: np.ndarray, distance: np.ndarray) -> tuple[list[float], list[float | None]]:
    """Mean of a map over pixels at equal distance: the middle of each bin of distances, and the
    mean there relative to the mean of all pixels (None where the map is all zero)."""
    edges = np.linspace(distance.min() - 0.5, distance.max() + 0.5, PROFILE_BINS + 1)
    pixels = np.histogram(distance, edges)[0]
    held = np.histogram(distance, edges, weights=magnitude)[0]
    mean = magnitude.mean()
    full = pixels > 0
    values: list[float | None] = [None] * int(full.sum())
    if mean > 0:
        values = (held[full] / pixels[full] / mean).tolist()
    return ((edges[:-1] + edges[1:]) / 2)[full].tolist(), values


def mask_scores(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Dice, IoU and pixel accuracy of two bool masks of one shape; two empty masks agree fully;
    None where no pixel counts."""
    overlap, union = (prediction & truth).sum(), (prediction | truth).sum()
    if not prediction.size:  # no pixel counts
        return {'dice': None, 'iou': None, 'pixel_accuracy': None}
    return {
        'dice': float(2 * overlap / (overlap + union)) if union else 1.0,
        'iou': float(overlap / union) if union else 1.0,
        'pixel_accuracy': float((prediction == truth).mean()),
    }


def label_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[int, dict[str, float | None]]:
    """Dice, IoU and accuracy (the share of its true pixels that were found; None without any) of
    each label that is there, predicted or true. Masks of all labels, (K, h, w) bool."""
    scores: dict[int, dict[str, float | None]] = {}
    for label, (mask, true) in enumerate(zip(predicted, truth, strict=True)):
        if mask.any() or true.any():
            both = mask_scores(mask, true)
            found = float(mask[true].mean()) if true.any() else None
            scores[label] = {'dice': both['dice'], 'iou': both['iou'], 'accuracy': found}
    return scores


def mean_of(values: np.ndarray) -> float | None:
    """The mean of an array; None where it holds nothing."""
    return float(values.mean()) if values.size else None


def contrast(values: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float | None:
    """Mean of a map (H, W) inside a mask by its mean in another; None where either holds no pixel,
    or the second only zeros."""
    means = [mean_of(values[mask]) for mask in (inside, outside)]
    return means[0] / means[1] if means[0] is not None and means[1] else None
