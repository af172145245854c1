"""The graph that replaces a network, or else a copy, compared with the original on one input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from igseg.engine.graph import NetworkGraph
from igseg.engine.rewrites import Rewrites
from igseg.engine.trace import NotExportable
from igseg.errors import InputError, attempt
from igseg.explanation import Preparation
from igseg.network.outputs import enlarged, frozen, output_of, segmentation_logits

EQUIVALENCE_TOLERANCE = 1e-4  # relative L2 difference; beyond it the original is used
EXACT_TOLERANCE = 1e-9  # the same in double precision
ROUNDED_GRADIENT = 0.02  # relative difference of a gradient that rounding alone may explain
ARBITER_SIDE = 128  # side of the part of an image that is tried first in double precision


class LogitMap(nn.Module):
    """A network whose result is the logit map that is explained, enlarged to the size of the input
    if it is smaller (see `segmentation_logits` and `enlarged`)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-2:]
        return enlarged(segmentation_logits(output_of(self.network, x), size), size)


# Images (N, C, H, W) -> a result that contains their logits.
Network = Callable[[torch.Tensor], object]


# --------------------------------------------------------------------------- equivalence


def relative_difference(other: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference, relative to that of `expected`; 0 where both are zero."""
    difference, size = float((other - expected).norm()), float(expected.norm())
    return difference / size if size else (0.0 if difference == 0 else float('inf'))


def within(deviations: Iterable[float], tolerance: float) -> bool:
    """Whether no deviation exceeds the tolerance; NaN does, which `max` might overlook."""
    return all(deviation <= tolerance for deviation in deviations)


def measure_deviation(
    original: Network, other: Network, example: torch.Tensor
) -> tuple[float, float]:
    """Relative L2 difference between two networks: of the logits, and of the gradient of the sum
    of their squares, in which strong logits weigh most."""
    results = []
    for network in (original, other):
        x = example.detach().clone().requires_grad_()
        with torch.enable_grad():
            size = x.shape[-2:]
            logits = enlarged(segmentation_logits(output_of(network, x), size), size)
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), x)
        results.append((logits.detach(), gradient))
    (logits, gradient), (other_logits, other_gradient) = results
    return relative_difference(other_logits, logits), relative_difference(other_gradient, gradient)


# --------------------------------------------------------------------------- what runs instead


def _middle(x: torch.Tensor, side: int) -> torch.Tensor:
    """The middle of images (N, C, H, W), at most `side` pixels high and wide."""
    (top, height), (left, width) = (
        ((size - min(size, side)) // 2, min(size, side)) for size in x.shape[-2:]
    )
    return x[..., top : top + height, left : left + width]


def _same_in_double_precision(
    model: nn.Module, x: torch.Tensor, logits: float, gradient: float
) -> bool:
    """Whether the graph agrees with the original in double precision.

    In single precision, rounding alone may push a ReLU over its kink, above all where an image is
    flat. The logits then agree, and the gradient differs little. In this case the middle of the
    image is compared first, which takes a fraction of the time and memory. logits, gradient: the
    deviations in single precision.
    """
    likely = logits <= EQUIVALENCE_TOLERANCE and gradient <= ROUNDED_GRADIENT
    for part in [_middle(x, ARBITER_SIDE), x] if likely else [x]:
        try:
            double, part = copy.deepcopy(model).double(), part.double()
            deviations = measure_deviation(double, NetworkGraph(LogitMap(double), part), part)
        except Exception:  # the network needs another size or type, or cannot be copied
            continue
        return within(deviations, EXACT_TOLERANCE)
    return False


def plain_copy(model: nn.Module) -> nn.Module:
    """A private copy of the network, channels_last; if it cannot be copied, the network itself."""
    try:
        network = copy.deepcopy(model).eval().requires_grad_(False)
        return network.to(memory_format=torch.channels_last)
    except Exception:  # a module that cannot be copied must run too
        return model


def prepared_copy(model: nn.Module, example: torch.Tensor) -> tuple[Network, Preparation]:
    """A network's graph, rewritten and compared with the original. Where there is no graph: a
    private copy of the network. Where graph or copy deviates: the original.

    example: an input (1, C, H, W) in the network's precision.
    """
    with frozen(model):
        graph, reason = attempt(partial(NetworkGraph, LogitMap(model), example), NotExportable)
        network = plain_copy(model) if graph is None else graph
        with torch.no_grad():
            output_of(
                model, example
            )  # so that a network which counts its calls deviates from its graph
        deviations = measure_deviation(model, network, example)
        fell_back = not within(deviations, EQUIVALENCE_TOLERANCE)
        if fell_back and max(measure_deviation(model, model, example)) > EQUIVALENCE_TOLERANCE:
            raise InputError(
                'the network gives another answer each time it is asked, also in evaluation mode '
                '(dropout that is always on, or a state that changes: there is nothing to '
                'integrate)'
            )
        if fell_back and graph and example.device.type == 'cpu' and example.dtype == torch.float32:
            fell_back = not _same_in_double_precision(model, example, *deviations)
    rewrites = Rewrites(0, 0, 0) if graph is None else graph.rewrites
    preparation = Preparation(
        rewrites.folded, rewrites.transposed, *deviations, fell_back,
        padded=rewrites.padded, no_graph=reason,
    )  # fmt: skip
    return model if fell_back else network, preparation
