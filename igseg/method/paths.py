"""Paths from a baseline to an image: where the gradient is asked, and what is summed.

For a network f (logit map), a target score F (one number made of f), an image x and a baseline x',

    IG_i(x) = (x_i - x'_i) * integral over alpha in [0, 1] of dF(x' + alpha (x - x')) / dx_i

(Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, eq. 1). The straight
line from x' to x is one *path*; for any path gamma the same theorem holds, and what is integrated
is the *density*, gradient times velocity:

    dF(gamma(alpha)) / dx_i * dgamma_i / dalpha

`plain_map`, in the user's module, is the method in ten lines. Here a path class says where to ask
(points, and velocities there), `integral` how to sum; between them stands `PathSampler` (engine).
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """A straight line from a baseline that is drawn anew at every alpha, with replacement; the
    same alpha always draws the same one."""

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
    """The orthonormal cosine transform (DCT-II) of that many values, a matrix (side, side)."""
    n = torch.arange(side, device=like.device, dtype=torch.float64)
    basis: torch.Tensor = torch.cos(torch.pi / side * (n + 0.5) * n[:, None]) * (2 / side) ** 0.5
    basis[0] /= 2**0.5
    return basis.to(like.dtype)


def _squared_frequencies(image: torch.Tensor) -> torch.Tensor:
    """Of each coefficient of an image's cosine transform, (H, W), in radians a pixel."""
    down, across = (
        torch.arange(side, device=image.device, dtype=image.dtype) * torch.pi / side
        for side in image.shape[-2:]
    )
    squares: torch.Tensor = down[:, None] ** 2 + across**2
    return squares


@dataclass(frozen=True)
class BlurPath:
    """From the most blurred image to the image, through Gaussian scale space (Xu, Venugopalan,
    Sundararajan 2020, eq. 5): the blur's sigma falls evenly from `sigma` pixels to 0.

    Blurring is done on the cosine transform, where it is a product: that is the convolution with a
    Gaussian of the image reflected at its borders, nothing cut off, and its derivative by sigma is
    as exact. Of an infinite sigma the mean colour is left.
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
        # d(blurred)/d(alpha): sigma falls by self.sigma over the path.
        change = blurred * frequency * sigma * self.sigma
        points = down.T @ blurred @ across
        points[alphas == 1] = self.image  # exactly, not to rounding
        return points, down.T @ change @ across


@dataclass(frozen=True)
class UnitVelocity:
    """Another path's points, where a change of 1 counts in every input: its densities are plain
    gradients."""

    path: AttributionPath

    @property
    def image(self) -> torch.Tensor:
        """Where it ends."""
        return self.path.image

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttributionPath`."""
        return self.path.at(alphas)[0], torch.ones_like(self.image)
