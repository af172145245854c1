"""XRAI: regions of the image, ranked by the attribution that they carry (Kapishnikov et al. 2019).

The image is cut into segments at several scales, only by its colours. Each segment is widened a
little, so that it holds its edges, which often carry attribution. Then segments are taken in turn:
always the segment whose pixels that were not taken yet carry most |attribution| per pixel
(algorithm 1).
The result is a partition of the image into ranked regions. The first regions, just as many as are
needed, carry 50, 80 or 95 % of the attribution. This module works without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SCALES = (50, 100, 150, 250, 500, 1200)  # of Felzenszwalb's segments, on an image of SIDE pixels
SIDE = 224
SIGMA = 0.8  # of the blur before the segmentation, in pixels
LEAST_SEGMENT = 150 / SIDE**2  # share of the image
LEAST_GAIN = 50 / SIDE**2  # share of the image that a region must add
WIDENED = 5 / SIDE  # by how much segments are widened, as a share of the longer side
CARRIED = (50, 80, 95)  # per cent of |attribution|


@dataclass(frozen=True)
class Regions:
    """A partition of an image into regions, ranked by the attribution that they carry."""

    ranks: np.ndarray  # (H, W) int16: the rank of each pixel's region, from 1; 0: in no region
    shares: tuple[float, ...]  # of |attribution| in each region, in the order of the ranks

    def needed(self, per_cent: float) -> int:
        """How many regions, from the first on, carry this share of the attribution."""
        reached = np.cumsum(self.shares) >= per_cent / 100 - 1e-9
        return int(reached.argmax()) + 1 if reached.any() else len(self.shares)

    def mask(self, count: int) -> np.ndarray:
        """The pixels (H, W) bool of the first `count` regions."""
        return (self.ranks > 0) & (self.ranks <= count)

    def statistics(self) -> dict[str, float | int | None]:
        """For each share in CARRIED: how many regions carry it, and the area of these regions as a
        share of the image."""
        figures: dict[str, float | int | None] = {}
        for part in CARRIED:
            count = self.needed(part) if self.shares else None
            area = None if count is None else float(self.mask(count).mean())
            figures |= {f'regions_{part}': count, f'regions_{part}_area': area}
        return figures


def segments_of(pixels: np.ndarray) -> list[np.ndarray]:
    """Segments of an image (H, W, C), 0-255, at every scale: masks (H, W) bool, which overlap."""
    from skimage.segmentation import felzenszwalb  # slow to import

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
    """Regions of an image, from segments (H, W) bool and a relevance (H, W), none below 0. A region
    is the part of a segment that no earlier region holds; the region with most relevance per pixel
    comes next. The pixels outside of all segments are the last region."""
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
    """The parts (H, W) bool that segments add, always the part with most relevance per pixel
    next."""
    least = max(1.0, LEAST_GAIN * relevance.size)
    left = {k: mask.copy() for k, mask in enumerate(masks)}  # the part that each segment would add
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
