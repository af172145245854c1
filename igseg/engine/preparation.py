"""What runs in a network's place: its graph, or a copy, compared with the original on an input."""

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
from igseg.network.outputs import enlarged, frozen, segmentation_logits

EQUIVALENCE_TOLERANCE = 1e-4  # relative L2; beyond this the copy is not used
EXACT_TOLERANCE = 1e-9  # the same in double precision
ROUNDED_GRADIENT = 0.02  # what rounding alone may do to a gradient, at most
ARBITER_SIDE = 128  # of the part of an image on which double precision is asked first


class LogitMap(nn.Module):
    """A network whose result is the one logit map that is explained, at the input's size where it
    is smaller (see `segmentation_logits` and `enlarged`)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-2:]
        return enlarged(segmentation_logits(self.network(x), size), size)


# Images (N, C, H, W) -> whatever holds their logits.
Network = Callable[[torch.Tensor], object]


# --------------------------------------------------------------------------- equivalence


def relative_difference(other: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference, relative to the expected; 0 where both are zero."""
    difference, size = float((other - expected).norm()), float(expected.norm())
    return difference / size if size else (0.0 if difference == 0 else float('inf'))


def within(deviations: Iterable[float], tolerance: float) -> bool:
    """Whether all are; one that is not a number is not, which `max` may pass over."""
    return all(one <= tolerance for one in deviations)


def measure_deviation(
    original: Network, network: Network, example: torch.Tensor
) -> tuple[float, float]:
    """Relative L2 difference between two networks of the logits, and of the gradient of their
    sum of squares, in which strong logits weigh most."""
    results = []
    for one in (original, network):
        x = example.detach().clone().requires_grad_()
        with torch.enable_grad():
            size = x.shape[-2:]
            logits = enlarged(segmentation_logits(one(x), size), size)
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), x)
        results.append((logits.detach(), gradient))
    (logits, gradient), (other_logits, other_gradient) = results
    return relative_difference(other_logits, logits), relative_difference(other_gradient, gradient)


# --------------------------------------------------------------------------- what runs instead


def _middle(x: torch.Tensor, side: int) -> torch.Tensor:
    """The middle of images (N, C, H, W), of at most that side."""
    (top, height), (left, width) = (
        ((size - min(size, side)) // 2, min(size, side)) for size in x.shape[-2:]
    )
    return x[..., top : top + height, left : left + width]


def _same_in_double_precision(
    model: nn.Module, x: torch.Tensor, logits: float, gradient: float
) -> bool:
    """Whether original and graph agree where rounding cannot excuse a difference.

    In single precision it can: it alone may push a ReLU over its kink, most of all where an image
    is flat. Where that explains what was found on an image x, since the logits agree and the
    gradient is not far off, a part of the image shows it, in a fraction of time and memory.
    logits, gradient: how far they deviated in single precision.
    """
    likely = logits <= EQUIVALENCE_TOLERANCE and gradient <= ROUNDED_GRADIENT
    for part in [_middle(x, ARBITER_SIDE), x] if likely else [x]:
        try:
            double, part = copy.deepcopy(model).double(), part.double()
            exact = measure_deviation(double, NetworkGraph(LogitMap(double), part), part)
        except Exception:  # a network that takes no other size, cannot be copied, has its own types
            continue
        return within(exact, EXACT_TOLERANCE)
    return False


def plain_copy(model: nn.Module) -> nn.Module:
    """A private copy that computes what the network does, channels_last; where it cannot be
    copied, the network itself."""
    try:
        network = copy.deepcopy(model).eval().requires_grad_(False)
        return network.to(memory_format=torch.channels_last)
    except Exception:  # any module must run; one that resists is left alone
        return model


def prepared_copy(model: nn.Module, example: torch.Tensor) -> tuple[Network, Preparation]:
    """A network's graph, rewritten and compared with the original. Where there is none, a private
    copy as it is; where that deviates, the original.

    example: an input (1, C, H, W) in the network's precision.
    """
    with frozen(model):
        graph, reason = attempt(partial(NetworkGraph, LogitMap(model), example), NotExportable)
        network = plain_copy(model) if graph is None else graph
        with torch.no_grad():
            model(example)  # one that counts its calls falls out of step with what stands for it
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
