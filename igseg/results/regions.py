"""XRAI: which regions of the image carry an attribution, ranked (Kapishnikov et al. 2019).

The image is cut into segments at several scales, by its colours alone; each segment is widened a
little, so that edges, which the attribution likes, belong to what they bound. Then, again and
again, the segment is taken that adds most |attribution| a pixel to what was taken before (algorithm
1).
The result is a partition of the image into ranked regions, and the smallest sets of them, in that
order, that carry half, four fifths and nearly all of the attribution. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SCALES = (50, 100, 150, 250, 500, 1200)  # of Felzenszwalb's segments, on an image of SIDE pixels
SIDE = 224
SIGMA = 0.8  # of the blur before them
LEAST_SEGMENT = 150 / SIDE**2  # share of the image
LEAST_GAIN = 50 / SIDE**2  # share of the image that a region must add
WIDENED = 5 / SIDE  # share of the longer side
CARRIED = (50, 80, 95)  # per cent of |attribution|


@dataclass(frozen=True)
class Regions:
    """A partition of an image into regions by how much attribution they carry."""

    ranks: np.ndarray  # (H, W) int16: of the region of each pixel, from 1; 0: of none
    shares: tuple[float, ...]  # of |attribution| that each carries, in the order of the ranks

    def needed(self, per_cent: float) -> int:
        """How many of the first regions carry so much of the attribution."""
        reached = np.cumsum(self.shares) >= per_cent / 100 - 1e-9
        return int(reached.argmax()) + 1 if reached.any() else len(self.shares)

    def mask(self, count: int) -> np.ndarray:
        """The first so many regions, (H, W) bool."""
        return (self.ranks > 0) & (self.ranks <= count)

    def statistics(self) -> dict[str, float | int | None]:
        """How many regions carry how much, and how much of the image they cover."""
        figures: dict[str, float | int | None] = {}
        for part in CARRIED:
            count = self.needed(part) if self.shares else None
            area = None if count is None else float(self.mask(count).mean())
            figures |= {f'regions_{part}': count, f'regions_{part}_area': area}
        return figures


def segments_of(pixels: np.ndarray) -> list[np.ndarray]:
    """Segments of an image (H, W, C), 0-255, at every scale: masks (H, W) bool, which overlap."""
    from skimage.segmentation import felzenszwalb  # takes a while to import

    height, width = pixels.shape[:2]
    size = (SIDE, SIDE)
    small = cv2.resize(pixels.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    small = small.reshape(*size, -1) / 255
    radius = round(WIDENED * max(height, width))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    masks = []
    for scale in SCALES:
        labels = felzenszwalb(small, scale=scale, sigma=SIGMA, channel_axis=-1,
                              min_size=round(LEAST_SEGMENT * SIDE**2))  # fmt: skip
        labels = cv2.resize(labels.astype(np.int32), (width, height),
                            interpolation=cv2.INTER_NEAREST)  # fmt: skip
        for label in np.unique(labels):
            masks.append(cv2.dilate((labels == label).astype(np.uint8), disc).astype(bool))
    return masks


def rank_regions(relevance: np.ndarray, masks: Sequence[np.ndarray]) -> Regions:
    """The segments (H, W) bool in the order in which they add most relevance (H, W), from 0 up, a
    pixel; a region is what a segment adds. What no segment holds comes last, as one region."""
    total, ranks = relevance.sum(), np.zeros(relevance.shape, np.int16)
    if not total > 0:
        return Regions(ranks, ())
    shares: list[float] = []
    for added in _gains(relevance, masks):
        shares.append(float(relevance[added].sum() / total))
        ranks[added] = len(shares)
    rest = ranks == 0
    if rest.any():
        shares.append(float(relevance[rest].sum() / total))
        ranks[rest] = len(shares)
    return Regions(ranks, tuple(shares))


def _gains(relevance: np.ndarray, masks: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """What each segment adds, (H, W) bool, the densest first."""
    least = max(1.0, LEAST_GAIN * relevance.size)
    left = {k: mask.copy() for k, mask in enumerate(masks)}  # what each would add
    areas = {k: int(mask.sum()) for k, mask in left.items()}
    sums = {k: float(relevance[mask].sum()) for k, mask in left.items()}
    while left := {k: mask for k, mask in left.items() if areas[k] >= least}:
        best = max(left, key=lambda k: sums[k] / areas[k])
        added = left.pop(best)
        yield added
        for k, mask in left.items():
            if (mask & added).any():
                mask &= ~added
                areas[k], sums[k] = int(mask.sum()), float(relevance[mask].sum())
