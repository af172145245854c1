"""The data from which figures of one explanation are drawn: `View`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np

from igseg.statistics import CLIP_PERCENTILE

MAP_SIDE = 2048  # pixels: the longer side of maps that are drawn


@dataclass(frozen=True)
class View:
    """The data from which figures of one explanation are drawn. All arrays cover exactly the
    original image."""

    image: np.ndarray  # (h0, w0, 3) uint8: the original image, perhaps shrunk
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
        """(h, w) bool: where the sign of the sum is certain; everywhere if the uncertainty is
        unknown."""
        if self.uncertainty is None:
            return np.ones(self.summed.shape, bool)
        return np.abs(self.summed) >= self.uncertainty

    def shrunk(self) -> View:
        """This view with maps of at most MAP_SIDE, shrunk by averaging. A drawing of larger maps
        would leave out some of their pixels and take much memory."""
        height, width = self.region.shape
        scale = MAP_SIDE / max(height, width)
        if scale >= 1:
            return self
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = partial(cv2.resize, dsize=size, interpolation=cv2.INTER_AREA)

        def small_mask(mask: np.ndarray) -> np.ndarray:
            share = small(mask.astype(np.float32))
            # A mask that is small everywhere stays visible.
            return share >= 0.5 if (share >= 0.5).any() else share > 0

        return replace(
            self,
            attributions=np.stack([small(channel) for channel in self.attributions]),
            predicted_mask=small_mask(self.predicted_mask),
            region=small_mask(self.region),
            truth=None if self.truth is None else small_mask(self.truth),
            baseline=small(self.baseline),
            uncertainty=None if self.uncertainty is None else small(self.uncertainty),
        )


def clip_level(values: np.ndarray) -> float:
    """The 99th percentile of |values|; where that is zero, the maximum; where that is zero too,
    1."""
    level = float(np.percentile(np.abs(values), CLIP_PERCENTILE))
    return level or float(np.abs(values).max()) or 1.0
