"""Paths from a baseline to an image: the points at which gradients are computed.

For a network f (logit map), a target score F (one number made of f), an image x and a baseline x',

    IG_i(x) = (x_i - x'_i) * integral over alpha in [0, 1] of dF(x' + alpha (x - x')) / dx_i

(Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, eq. 1). The straight
line from x' to x is a *path*. The same theorem holds for any path gamma. The integral is then over
the *density*, gradient times velocity:

    dF(gamma(alpha)) / dx_i * dgamma_i / dalpha

`plain_map`, in the user's module, is the method in ten lines. A path class gives points and the
velocities there. `PathSampler` (in the engine) computes the densities, and `integral` sums them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from igseg.engine.sampler import AttributionPath


@dataclass(frozen=True)
class StraightPath:
    """The straight line from a baseline to an image."""

    baseline: torch.Tensor  # (1, C, H, W)
    image: torch.Tensor  # (1, C, H, W)

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttributionPath`; the velocity is the same everywhere."""
        change = self.image - self.baseline
        return self.baseline + alphas.view(-1, 1, 1, 1) * change, change


@dataclass(frozen=True)
class DrawnPath:
    """A straight line from a baseline that is drawn anew at every alpha, with replacement. The
    same alpha always gives the same baseline."""

    starts: torch.Tensor  # (n, C, H, W): the baselines
    image: torch.Tensor  # (1, C, H, W)
    seed: int

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttributionPath`."""
        bits = alphas.detach().cpu().double().numpy().view(np.uint64).tolist()
        rows = [np.random.default_rng((self.seed, b)).integers(len(self.starts)) for b in bits]
        starts = self.starts[torch.tensor(rows, device=self.starts.device)]  # (steps, C, H, W)
        change = self.image - starts
        return starts + alphas.view(-1, 1, 1, 1) * change, change


def cosines(side: int, like: torch.Tensor) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II) of `side` values, a matrix (side, side)."""
    n = torch.arange(side, device='cpu', dtype=torch.float64)
    basis: torch.Tensor = torch.cos(torch.pi / side * (n + 0.5) * n[:, None]) * (2 / side) ** 0.5
    basis[0] /= 2**0.5
    return basis.to(like)


def _squared_frequencies(image: torch.Tensor) -> torch.Tensor:
    """The squared frequency of each coefficient of an image's cosine transform, (H, W); frequencies
    are in radians per pixel."""
    down, across = (
        torch.arange(side, device=image.device, dtype=image.dtype) * torch.pi / side
        for side in image.shape[-2:]
    )
    squares: torch.Tensor = down[:, None] ** 2 + across**2
    return squares


@dataclass(frozen=True)
class BlurPath:
    """From the most blurred image to the image, through Gaussian scale space (Xu, Venugopalan,
    Sundararajan 2020, eq. 5). The sigma of the blur falls linearly from `sigma` pixels to 0.

    The blur is computed as a product with the cosine transform. This is exactly the convolution of
    the image, reflected at its borders, with a whole Gaussian, and the derivative by sigma is exact
    too. With an infinite sigma only the mean colour remains.
    """

    image: torch.Tensor  # (1, C, H, W)
    sigma: float

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttributionPath`."""
        down, across = (cosines(side, self.image) for side in self.image.shape[-2:])
        spectrum = down @ self.image @ across.T  # (1, C, H, W)
        frequency = _squared_frequencies(self.image)  # (H, W)
        sigma = (self.sigma * (1 - alphas)).view(-1, 1, 1, 1)
        blurred = spectrum * torch.exp(-0.5 * frequency * sigma**2)  # (steps, C, H, W)
        # d(blurred)/d(alpha); sigma falls by self.sigma over the path.
        change = blurred * frequency * sigma * self.sigma
        points = down.T @ blurred @ across
        points[alphas == 1] = self.image  # exactly, without rounding errors
        return points, down.T @ change @ across


@dataclass(frozen=True)
class UnitVelocity:
    """The points of another path with velocity 1 for every input, so that the densities are plain
    gradients."""

    unit: ClassVar[bool] = True  # its densities are not the slopes of F along the path

    path: AttributionPath

    @property
    def image(self) -> torch.Tensor:
        """The end of the path."""
        return self.path.image

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttributionPath`."""
        return self.path.at(alphas)[0], torch.ones_like(self.image)
