"""Placements of interpolation steps from the literature; they are used only for comparison.

NUIG        Bhat and Raychowdhury 2023, arXiv:2302.11107: forward passes at the ends of a few equal
            intervals; each interval gets a share of the steps in proportion to sqrt(|dF|).
RiemannOpt  Swain and Singhi 2024, arXiv:2410.04118: points that are optimised once for a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from igseg.method.rules import Rule

NUIG_INTERVALS = 4


def nuig_rule(steps: int, scores: Sequence[float]) -> Rule:
    """Steps placed by the change of the score over equal intervals, with the midpoint rule in each.

    scores: F at the ends of the intervals, which cost forward passes.
    """
    change = np.sqrt(np.abs(np.diff(scores)))
    count = len(change)
    share = change / change.sum() if change.sum() else np.full(count, 1 / count)
    wanted = 1 + share * (steps - count)  # each interval gets at least a step
    numbers = np.floor(wanted).astype(int)
    for row in np.argsort(numbers - wanted, kind='stable')[: steps - numbers.sum()]:
        numbers[row] += 1
    nodes = [(k + (np.arange(number) + 0.5) / number) / count for k, number in enumerate(numbers)]
    weights = [np.full(number, 1 / (number * count)) for number in numbers]
    return Rule('nuig', np.concatenate(nodes), np.concatenate(weights), degree=1)


def riemannopt_rule(steps: int, roughness: np.ndarray) -> Rule:
    """Right Riemann sum at points that minimise the sum of width^2 * roughness / 2.

    roughness: how much the attribution density changes within each of many equal cells, for an
    image of the model. The authors smooth its logarithm with a Bartlett window of 11 and
    minimise numerically; for many steps the minimum has widths in proportion to
    1 / sqrt(roughness), which is used here.
    """
    window = np.bartlett(13)[1:-1]
    padded = np.pad(np.log(roughness + 1e-12), 5, mode='edge')
    smooth = np.exp(np.convolve(padded, window / window.sum(), mode='valid'))
    reached = np.concatenate([[0.0], np.cumsum(np.sqrt(smooth))])
    ends = np.interp(
        np.arange(steps + 1) / steps, reached / reached[-1], np.linspace(0, 1, len(reached))
    )
    return Rule('riemannopt', ends[1:], np.diff(ends), degree=0)
