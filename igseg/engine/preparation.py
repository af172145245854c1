"""The graph that replaces a network, or else a copy, compared with the original on one input; which
reduced precision pays on which device, and a copy of a network in it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from igseg.engine.crops import Box, place_of
from igseg.engine.graph import NetworkGraph
from igseg.engine.rewrites import Rewrites
from igseg.engine.trace import NotExportable, record
from igseg.errors import InputError, attempt
from igseg.explanation import Preparation
from igseg.network.identity import fingerprint, has_backward_hooks
from igseg.network.kinds import Place
from igseg.network.outputs import fitted, frozen, output_of, segmentation_logits

EQUIVALENCE_TOLERANCE = 1e-4  # relative L2 difference; beyond it the original is used
EXACT_TOLERANCE = 1e-9  # the same in double precision
ROUNDED_GRADIENT = 0.02  # relative difference of a gradient that rounding alone may explain
PART_SIDE = 64  # side of the part of an image that is compared in double precision


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


# The logits of images, and for each image the gradient of the sum of its squared logits, in which
# strong logits weigh most.
Answer = tuple[torch.Tensor, torch.Tensor]


def _answer(network: Network, batches: Iterable[torch.Tensor]) -> Answer:
    """What a network says to images that go through it in these batches (N, C, H, W)."""
    all_logits: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for batch in batches:
        x, size = batch.detach().clone().requires_grad_(), batch.shape[-2:]
        with torch.enable_grad():
            logits = fitted(segmentation_logits(output_of(network, x), size), size)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # squares overflow
            gradients += torch.autograd.grad(wide.square().sum(), x)
        all_logits.append(logits.detach())
    return torch.cat(all_logits), torch.cat(gradients)


def _deviations(answer: Answer, expected: Answer) -> tuple[float, float]:
    """Relative L2 differences of the logits and of the gradients."""
    logits, gradient = map(relative_difference, answer, expected)
    return logits, gradient


def measure_deviation(
    original: Network, other: Network, example: torch.Tensor
) -> tuple[float, float]:
    """Relative L2 difference between two networks: of the logits, and of the gradient."""
    expected = _answer(original, [example])
    return _deviations(_answer(other, [example]), expected)


# --------------------------------------------------------------------------- what runs instead


@dataclass(frozen=True)
class Comparison:
    """How far a network and its graph deviate."""

    deviations: tuple[float, float]  # of logits and gradient
    of_crops: float  # of the gradient through crops of the graph, from that through the whole graph
    same: bool  # whether the graph, and its crops, compute what the network computes
    independent: bool  # whether this holds for several images in a batch


@dataclass(frozen=True)
class Prepared:
    """What runs instead of a network on images of one size."""

    network: Network  # the graph, a copy, or the network itself
    preparation: Preparation
    logits: torch.Tensor | None = None  # of the example, (1, K, h, w), from what runs
    # What was seen on a small part of the example; None: the network takes no small images.
    in_part: Comparison | None = None


def _middle(x: torch.Tensor, side: int) -> torch.Tensor:
    """The middle of images (N, C, H, W), at most `side` pixels high and wide."""
    (top, height), (left, width) = (
        ((size - min(size, side)) // 2, min(size, side)) for size in x.shape[-2:]
    )
    return x[..., top : top + height, left : left + width]


def _images_near(x: torch.Tensor, count: int) -> torch.Tensor:
    """Images (count, C, H, W) near an image, with noise: where an image is flat, a ReLU may stand
    at its kink."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((count, *x.shape[1:]), generator=generator)
    return x + noise.to(x) * (float(x.std()) or 1.0)


def _deviation_of_crops(graph: NetworkGraph, images: torch.Tensor) -> float:
    """How far the gradient of the squared logits in two boxes of the output deviates, where only
    these boxes are computed, from that by the whole graph. images: (N, C, H, W)."""
    height, width = (graph.graph.output.length(axis) for axis in (2, 3))
    boxes: list[Box] = [
        (None, None, (height // 4, height // 2 + 1), (width // 4, width // 2 + 1)),
        (None, None, (height * 3 // 4, height), (width * 3 // 4, width)),
    ]
    counted = images.new_zeros(height, width)
    for box in boxes:
        counted[place_of(box)] = 1
    gradients: list[torch.Tensor] = []
    for plan in (graph.whole, graph.plan(boxes)):
        x = images.clone().requires_grad_()
        with torch.enable_grad():
            maps = zip(plan.boxes, graph.run(x, plan), strict=True)
            squares = [(logits * counted[place_of(box)]).square().sum() for box, logits in maps]
            gradients += torch.autograd.grad(torch.stack(squares).sum(), x)
    return relative_difference(gradients[1], gradients[0])


def _compared_near(
    model: LogitMap, whole: NetworkGraph, x: torch.Tensor, batches: Sequence[int]
) -> Comparison:
    """Compare a network with its graph on images near x (1, C, H, W).

    whole: the graph for the whole image; it must do the same operations. batches: how many images
    the graph sees at once, while the network always sees a single image; a further number is tried
    if with the one before it they differ. Raises any error of a network that needs another size or
    type.
    """
    tolerance = EXACT_TOLERANCE if x.dtype == torch.float64 else EQUIVALENCE_TOLERANCE
    images = _images_near(x, max(batches))
    expected = _answer(model, images.split(1))
    with torch.no_grad():  # of a network that alternates, two calls in a row differ
        steady = relative_difference(model(images[-1:]), expected[0][-1:]) <= tolerance
    for batch in batches:
        # A graph for one number of images is made in a third of the time.
        graph = NetworkGraph(model, x, record(model, x, (batch,)))
        deviations = _deviations(_answer(graph, images.split(batch)), expected)
        of_crops = _deviation_of_crops(graph, images[:batch])
        alike = steady and graph.recorded == whole.recorded
        if alike and within((*deviations, of_crops), tolerance):
            return Comparison(deviations, of_crops, True, batch > 1)
    return Comparison(deviations, of_crops, False, False)


def _compared_in_double(
    model: LogitMap, whole: NetworkGraph, x: torch.Tensor, batches: Sequence[int]
) -> Comparison:
    """`_compared_near` in double precision on the CPU, where rounding hides no difference, and
    pushes no ReLU over its kink. Raises any error of a network that cannot be copied, too."""
    double = copy.deepcopy(model).cpu().double()
    return _compared_near(double, whole, x.detach().cpu().double(), batches)


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


def _compared_in_part(
    model: LogitMap, graph: NetworkGraph, example: torch.Tensor, expected: torch.Tensor
) -> Prepared | None:
    """The graph, if its logits of the example are those expected, and if a small part of the
    example shows that it computes what the network computes, gradient included. None: this does not
    show it, as where the network takes no small images."""
    if model.place is not None:  # it is that of the map of a whole image
        return None
    if graph.graph.asks_for_gradients or any(map(has_backward_hooks, model.modules())):
        return None  # what is done to gradients may depend on their size
    with torch.no_grad():
        logits = graph(example)
    deviation = relative_difference(logits, expected)
    if not within([deviation], EQUIVALENCE_TOLERANCE):
        return None
    part = _middle(example, PART_SIDE)
    for compare in (_compared_near, _compared_in_double):
        compared, _ = attempt(partial(compare, model, graph, part, (2, 1)), Exception)
        if compared is None:
            return None
        if compared.same:
            break
    else:
        return None
    preparation = _preparation(graph, (deviation, compared.deviations[1]))
    return Prepared(graph, preparation, logits, compared)


def _preparation(
    graph: NetworkGraph | None, deviations: tuple[float, float], **others: Any
) -> Preparation:
    rewrites = Rewrites(0, 0, 0) if graph is None else graph.rewrites
    return Preparation(
        rewrites.folded, rewrites.transposed, *deviations,
        **{'fell_back': False, 'padded': rewrites.padded, **others},
    )  # fmt: skip


def prepared_network(
    network: nn.Module,
    example: torch.Tensor,
    place: Place | None = None,
    logits: torch.Tensor | None = None,
) -> Prepared:
    """A network's graph, rewritten and compared with the original. Where there is no graph: a
    private copy of the network. Where graph or copy deviates: the original. All of them give the
    logit map at the size of the input.

    example: an input (1, C, H, W) in the network's precision. place: where the network's map lies
    in the input; None: it shows the whole input. logits: the network's logits of the example, where
    they are known, and where the network stayed as it was when it gave them.
    """
    model, size = LogitMap(network, place), example.shape[-2:]
    with frozen(model):
        graph, reason = attempt(partial(NetworkGraph, model, example), NotExportable)
        with torch.no_grad():
            steady = True
            if logits is None:
                before, expected = fingerprint(network), model(example)
                steady = fingerprint(network) == before  # else it counts its calls, for instance
            else:
                expected = fitted(logits, size, place)
        if not steady:
            _check_answers(model, example)
        if (
            graph is not None
            and steady
            and (prepared := _compared_in_part(model, graph, example, expected))
        ):
            return prepared
        prepared_model = plain_copy(model) if graph is None else graph
        with torch.no_grad():
            model(example)  # so that a network which counts its calls deviates from its graph
        deviations = measure_deviation(model, prepared_model, example)
        fell_back = not within(deviations, EQUIVALENCE_TOLERANCE)
        if fell_back and graph and example.dtype == torch.float32:
            # Rounding alone may push a ReLU over its kink.
            whole, _ = attempt(partial(_compared_in_double, model, graph, example, (1,)), Exception)
            fell_back = whole is None or not whole.same
        if fell_back or not within(deviations[:1], EQUIVALENCE_TOLERANCE):
            _check_answers(model, example)
    preparation = _preparation(graph, deviations, fell_back=fell_back, no_graph=reason, place=place)
    return Prepared(model if fell_back else prepared_model, preparation)


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


def slowdown(precision: str, device: torch.device) -> float:
    """How many times as long as in float32 a convolution takes in a reduced precision that the user
    names. CPUs without instructions for it take hundreds of times as long. 1 on other devices."""
    if device.type != 'cpu' or precision in ('auto', 'float32'):
        return 1.0

    def seconds(dtype: torch.dtype) -> float:
        x, weight = (torch.ones(shape, dtype=dtype) for shape in ((1, 32, 64, 64), (32, 32, 3, 3)))
        F.conv2d(x, weight)  # prepares the kernel
        started = time.perf_counter()
        F.conv2d(x, weight)
        return time.perf_counter() - started

    return seconds(getattr(torch, precision)) / seconds(torch.float32)


def reduced_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy for autocast whose convolutions and linear layers hold their weights in this type,
    so that the weights are not converted in every pass."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return network
