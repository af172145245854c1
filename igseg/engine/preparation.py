"""The graph that replaces a network, or else a copy, compared with the original on one input; which
reduced precision pays on which device, and a copy of a network in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from igseg.engine.graph import NetworkGraph
from igseg.engine.rewrites import Rewrites
from igseg.engine.trace import NotExportable, record
from igseg.errors import InputError, attempt
from igseg.explanation import Preparation
from igseg.network.kinds import Place
from igseg.network.outputs import fitted, frozen, output_of, segmentation_logits

EQUIVALENCE_TOLERANCE = 1e-4  # relative L2 difference; beyond it the original is used
EXACT_TOLERANCE = 1e-9  # the same in double precision
ROUNDED_GRADIENT = 0.02  # relative difference of a gradient that rounding alone may explain
ARBITER_SIDE = 128  # side of the part of an image that is tried first in double precision


class LogitMap(nn.Module):
    """A network whose result is the logit map that is explained, at the size of the input (see
    `segmentation_logits` and `fitted`)."""

    def __init__(self, network: nn.Module, place: Place | None = None) -> None:
        """place: where the map lies in the input; None: it shows the whole input."""
        super().__init__()
        self.network, self.place = network, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-2:]
        return fitted(segmentation_logits(output_of(self.network, x), size), size, self.place)


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
            logits = fitted(segmentation_logits(output_of(network, x), size), size)
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
    model: LogitMap, x: torch.Tensor, logits: float, gradient: float
) -> bool:
    """Whether the graph agrees with the original in double precision.

    In single precision, rounding alone may push a ReLU over its kink, above all where an image is
    flat. The logits then agree, and the gradient differs little. In this case the middle of the
    image is compared first, which takes a fraction of the time and memory. logits, gradient: the
    deviations in single precision.
    """
    likely = logits <= EQUIVALENCE_TOLERANCE and gradient <= ROUNDED_GRADIENT
    likely = likely and model.place is None  # the place is that of the map of a whole image
    for part in [_middle(x, ARBITER_SIDE), x] if likely else [x]:
        try:
            double, part = copy.deepcopy(model).double(), part.double()
            # A graph for a single image says the same, and is made in a third of the time.
            traced, _ = attempt(partial(record, double, part, (1,)), NotExportable)
            deviations = measure_deviation(double, NetworkGraph(double, part, traced), part)
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


def _check_answers(model: nn.Module, example: torch.Tensor) -> None:
    """Raise InputError if a network gives another answer each time."""
    if max(measure_deviation(model, model, example)) > EQUIVALENCE_TOLERANCE:
        raise InputError(
            'the network gives another answer each time it is asked, also in evaluation mode '
            '(dropout that is always on, or a state that changes: there is nothing to integrate)'
        )


def prepared_copy(
    network: nn.Module, example: torch.Tensor, place: Place | None = None
) -> tuple[Network, Preparation]:
    """A network's graph, rewritten and compared with the original. Where there is no graph: a
    private copy of the network. Where graph or copy deviates: the original. All of them give the
    logit map at the size of the input.

    example: an input (1, C, H, W) in the network's precision. place: where the network's map lies
    in the input; None: it shows the whole input.
    """
    model = LogitMap(network, place)
    with frozen(model):
        graph, reason = attempt(partial(NetworkGraph, model, example), NotExportable)
        prepared = plain_copy(model) if graph is None else graph
        with torch.no_grad():
            model(example)  # so that a network which counts its calls deviates from its graph
        deviations = measure_deviation(model, prepared, example)
        fell_back = not within(deviations, EQUIVALENCE_TOLERANCE)
        if not within(deviations[:1], EQUIVALENCE_TOLERANCE):
            _check_answers(model, example)
        on_cpu = example.device.type == 'cpu' and example.dtype == torch.float32
        if fell_back and graph and on_cpu:
            fell_back = not _same_in_double_precision(model, example, *deviations)
        if fell_back:
            _check_answers(model, example)
    rewrites = Rewrites(0, 0, 0) if graph is None else graph.rewrites
    preparation = Preparation(
        rewrites.folded, rewrites.transposed, *deviations, fell_back,
        padded=rewrites.padded, no_graph=reason, place=place,
    )  # fmt: skip
    return model if fell_back else prepared, preparation


# --------------------------------------------------------------------------- reduced precision


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (x86: AVX-512 or AMX; ARM)."""
    if not hasattr(torch.cpu, 'get_capabilities'):  # torch before 2.10
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16', 'sve_bf16'))


def reduced_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of convolutions for a precision setting; None for float32.

    `auto` reduces precision only where the hardware multiplies in the reduced type: to bfloat16 on
    CPUs that have instructions for it, and on GPUs from Ampere on.
    """
    if precision == 'auto':
        if device.type == 'cuda':
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            native = device.type == 'cpu' and cpu_has_bfloat16()
        return torch.bfloat16 if native else None
    return None if precision == 'float32' else getattr(torch, precision)


def reduced_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy for autocast whose convolutions and linear layers hold their weights in this type,
    so that the weights are not converted in every pass."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return network
