"""F, the number that is explained: what the engine needs of every score (`Score`), and the mean
over a region that users name (`Target`). The kinds of regions are in igseg.method."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from igseg.network.description import NetworkDescription
from igseg.network.outputs import fitted


class Score(Protocol):
    """A target: one number for every image."""

    @property
    def scale(self) -> float:
        """The factor for scores in the backward pass, of the order of the region's size."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, h, w) -> scores (N,)."""


ANY_NETWORK = NetworkDescription()


@dataclass(frozen=True)
class Target:
    """What is explained: F(x) = sum of weights * s(f(x)), one number per image.

    The weights are fixed before gradients along the path are computed. They take, at each pixel of
    the region R, the logit (or probability) of one channel, and average over R. They are also the
    vector of the vector-Jacobian product that gives the gradient.
    """

    name: str
    weights: torch.Tensor  # (K, h, w) float32, sum 1
    score: str = 'logit'  # one of SCORES
    label: int | None = None  # the class that is explained; None: everything but the background
    network: NetworkDescription = field(default=ANY_NETWORK, repr=False)  # what the logits mean

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, h, w) -> scores (N,). Logits of another size than the weights
        are fitted to it."""
        logits = fitted(logits, self.weights.shape[-2:])
        values = logits if self.score == 'logit' else self.network.probabilities(logits)
        return (values * self.weights.to(values)).sum(dim=(1, 2, 3))

    @cached_property
    def scale(self) -> float:
        """The factor that makes the largest weight 1: about the number of pixels in the region."""
        return 1 / (float(self.weights.abs().max()) or 1.0)

    @property
    def region(self) -> torch.Tensor:
        """(h, w) bool: the output pixels that count."""
        return (self.weights != 0).any(dim=0)

    def explained(self, truth: np.ndarray) -> np.ndarray:
        """The numbers (h, w) of a ground-truth mask -> bool: the pixels of the explained class."""
        numbers = torch.as_tensor(truth)
        if self.label is None:
            return self.network.drawn_objects(numbers, self.weights).numpy()
        return self.network.drawn(numbers, self.weights)[self.label].numpy()
