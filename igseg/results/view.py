"""What there is to see of one explanation: a `View`, which figures are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np

from igseg.statistics import CLIP_PERCENTILE

MAP_SIDE = 2048  # pixels, longer side: of maps as they are drawn


@dataclass(frozen=True)
class View:
    """What there is to see of one explanation; all arrays cover exactly the original image."""

    image: np.ndarray  # (h0, w0, 3) uint8: the original, perhaps shrunk
    original_size: tuple[int, int]  # (height, width) in original pixels: the axes' units
    attributions: np.ndarray  # (C, h, w) float32
    predicted_mask: np.ndarray  # (h, w) bool
    region: np.ndarray  # (h, w) bool: the target region
    truth: np.ndarray | None  # (h, w) bool; None: unknown
    baseline: np.ndarray  # (h, w, 3) uint8
    uncertainty: np.ndarray | None = None  # (h, w) float32, of `summed`; None: unknown
    regions: np.ndarray | None = None  # (h, w) int16: rank of each pixel's region, from 1

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top in original pixels, for imshow."""
        height, width = self.original_size
        return (-0.5, width - 0.5, height - 0.5, -0.5)

    @property
    def magnitude(self) -> np.ndarray:
        """(h, w): sum over the channels of |attribution|."""
        return np.abs(self.attributions).sum(axis=0)

    @property
    def summed(self) -> np.ndarray:
        """(h, w): sum over the channels, with its sign."""
        return self.attributions.sum(axis=0)

    @property
    def settled(self) -> np.ndarray:
        """(h, w) bool: where the sign of the sum is not in doubt, as far as that is known."""
        if self.uncertainty is None:
            return np.ones(self.summed.shape, bool)
        return np.abs(self.summed) >= self.uncertainty

    def shrunk(self) -> View:
        """The same with maps of at most MAP_SIDE, by mean: of the pixels of larger ones a drawing
        would show some and leave out the others, and take much memory."""
        height, width = self.region.shape
        scale = MAP_SIDE / max(height, width)
        if scale >= 1:
            return self
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = partial(cv2.resize, dsize=size, interpolation=cv2.INTER_AREA)

        def small_mask(mask: np.ndarray) -> np.ndarray:
            share = small(mask.astype(np.float32))
            return share >= 0.5 if (share >= 0.5).any() else share > 0  # what is there is seen

        return replace(
            self,
            attributions=np.stack([small(one) for one in self.attributions]),
            predicted_mask=small_mask(self.predicted_mask),
            region=small_mask(self.region),
            truth=None if self.truth is None else small_mask(self.truth),
            baseline=small(self.baseline),
            uncertainty=None if self.uncertainty is None else small(self.uncertainty),
        )


def clip_level(values: np.ndarray) -> float:
    """The 99th percentile of |values|; the maximum where that is zero; 1 for an all-zero map."""
    level = float(np.percentile(np.abs(values), CLIP_PERCENTILE))
    return level or float(np.abs(values).max()) or 1.0
