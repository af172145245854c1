"""The graph of a network, which computes the whole output or only some boxes of it.

    trace       the network as it was recorded, for any batch of images of one size
    rewrites    exact rewrites of the graph, which make it faster
    crops       which box of its inputs each operation needs for a box of its result
    this file   the order of what is computed for some boxes of the output (`Plan`)

*Cropping.* An output pixel depends on a box of every tensor before it. From the output to the
input, each operation says which box of its inputs it needs. Only these boxes are computed. This is
exact: zero padding stays only where the tensor really ends, and values outside the boxes have no
gradient. Several boxes of one tensor (of distant objects) stay apart as long as this is less work
than the box around all of them.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from igseg.engine.crops import (
    Box,
    Part,
    contains,
    length_of,
    merged,
    part_of,
    slices_of,
    trimmed,
    whole,
)
from igseg.engine.rewrites import Kernel, rewrite
from igseg.engine.trace import Compute, Graph, Operation, Shape, trace
from igseg.network.outputs import WITHOUT_GRADIENT

# --------------------------------------------------------------------------- crops


def _layout_of(x: torch.Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last or x.ndim == 4 else torch.contiguous_format


class _CutOut(torch.autograd.Function):
    """All crops of a tensor at once; their gradients are added in place into one tensor."""

    @staticmethod
    def forward(ctx, x, slices):
        ctx.set_materialize_grads(False)
        ctx.slices, ctx.like = slices, (x.shape, x.dtype, x.device)
        ctx.format = _layout_of(x)
        return tuple(x[crop] for crop in slices)

    @staticmethod
    def backward(ctx, *gradients):
        total = None
        pairs = [p for p in zip(ctx.slices, gradients, strict=True) if p[1] is not None]
        pairs.sort(key=lambda pair: -pair[1].numel())
        for where, gradient in pairs:
            if total is not None:
                total[where] += gradient
                continue
            shape, dtype, device = ctx.like
            total = torch.empty(shape, dtype=dtype, device=device, memory_format=ctx.format)
            if gradient.shape != shape:
                total.zero_()
            total[where] = gradient
        return total, None


def _cut_out(slices: tuple[tuple[slice, ...], ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if torch.is_grad_enabled() and x.requires_grad:
        return _CutOut.apply(x, slices)
    return tuple(x[crop] for crop in slices)


def _cut_out_single(slices: tuple[tuple[slice, ...], ...], x: torch.Tensor) -> torch.Tensor:
    return _cut_out(slices, x)[0]


# --------------------------------------------------------------------------- plans


# The constants that a running plan uses: tensors, and weights of convolutions.
Constants = Mapping[Operation, torch.Tensor | Kernel]


@dataclass(frozen=True)
class Instruction:
    """A step of a plan. Values are kept in numbered slots."""

    compute: Compute
    reads: tuple[int, ...]  # slots
    writes: tuple[int, ...]  # slots, one for each result
    done: tuple[int, ...]  # slots that no later step reads


@dataclass(frozen=True)
class Plan:
    """The steps that compute some boxes of the output, in order."""

    boxes: tuple[Box, ...]  # of the output: the wanted boxes, some of them joined
    flops: float  # floating-point operations of the convolutions in a forward pass of one image
    instructions: tuple[Instruction, ...]
    image: int | None  # slot of the image; None: the boxes do not depend on it
    constants: tuple[tuple[int, Operation], ...]  # slots and constants
    sizes: tuple[tuple[int, Callable[[int], int]], ...]  # slots, and number of images -> size
    results: tuple[int, ...]  # slots, in the order of the boxes

    def run(self, x: torch.Tensor, constants: Constants) -> list[torch.Tensor]:
        """Images (N, C, H, W) -> the boxes of the output, one after the other."""
        # Values of any type: each operator takes what the operators before it give.
        slots: dict[int, Any] = {slot: constants[operation] for slot, operation in self.constants}
        slots.update((slot, int(size(len(x)))) for slot, size in self.sizes)
        if self.image is not None:
            slots[self.image] = x.contiguous(memory_format=torch.channels_last)
        for step in self.instructions:
            value = step.compute(*[slots[slot] for slot in step.reads])
            if len(step.writes) == 1:
                slots[step.writes[0]] = value
            else:
                slots.update(zip(step.writes, value, strict=True))
            del value
            for slot in step.done:
                del slots[slot]
        return [slots[slot] for slot in self.results]


def _needed_parts(graph: Graph, wanted: Sequence[Box]) -> dict[Operation, list[Part]]:
    """The parts of each operation that the wanted boxes need, from the output to the input."""
    needed_boxes: dict[Operation, list[Box]] = defaultdict(list)
    needed_boxes[graph.output] = [trimmed(box, graph.output.axes) for box in wanted]
    parts = {}
    for operation in reversed(graph.operations):
        if operation.target is None or operation not in needed_boxes:
            continue
        boxes = merged(needed_boxes[operation], operation.shape)
        while True:  # parts may be larger than the boxes, and may then be joined
            candidates = [part_of(operation, box) for box in boxes]
            delivered = merged([part.box for part in candidates], operation.shape)
            if delivered == boxes:
                break
            boxes = delivered
        parts[operation] = candidates
        for part in candidates:
            for source, box in part.needs:
                needed_boxes[source].append(box)
    return parts


def _flops(operation: Operation, box: Box) -> float:
    """Floating-point operations of a convolution for a box of its result, for one image."""
    if operation.kind not in ('conv2d', 'conv_transpose2d'):
        return 0.0
    lengths = [length_of(box[axis], operation.length(axis)) for axis in (2, 3)]
    if operation.kind == 'conv2d':
        places = float(math.prod(lengths))
    else:
        source = operation.tensor('input')
        shares = [length / operation.length(2 + axis) for axis, length in enumerate(lengths)]
        places = source.length(2) * source.length(3) * math.prod(shares)
    weights = (size or 1 for size in operation.tensor('weight').axes)  # for one image
    return 2.0 * places * math.prod(weights)


class _Planner:
    """Puts parts in order, and finds the slot of every box that a part needs."""

    def __init__(self, graph: Graph, parts: dict[Operation, list[Part]]) -> None:
        self.graph, self.parts = graph, parts
        self.slot_numbers = itertools.count()
        self.pieces: dict[Operation, list[tuple[Box, int]]] = {}  # computed boxes and their slots
        self.crops: dict[tuple[int, Box], int] = {}  # slot and box of it -> slot of the crop
        self.steps: list[tuple[Compute, tuple[int, ...], tuple[int, ...]]] = []  # reads, writes
        self.boxes_read: dict[Operation, list[Box]] = defaultdict(list)
        for parts_of_operation in parts.values():
            for part in parts_of_operation:
                for source, box in part.needs:
                    if box not in self.boxes_read[source]:
                        self.boxes_read[source].append(box)

    def plan(self) -> Plan:
        graph = self.graph
        sources = [o for o in graph.operations if o.target is None
                   and (o in self.boxes_read or o is graph.output)]  # fmt: skip
        for source in sources:
            self._add_pieces(source, [(whole(source.shape), next(self.slot_numbers))])
        flops = 0.0
        for operation in graph.operations:
            if operation not in self.parts:
                continue
            computed = []
            for part in self.parts[operation]:
                reads = tuple(self._slot(source, box) for source, box in part.needs)
                slot = next(self.slot_numbers)
                self.steps.append((part.compute, reads, (slot,)))
                computed.append((part.box, slot))
                flops += _flops(operation, part.box)
            self._add_pieces(operation, computed)
        slots = {source: self.pieces[source][0][1] for source in sources}
        boxes, results = zip(*self.pieces[graph.output], strict=True)
        return Plan(
            boxes, flops, self._released(set(results)), slots.get(graph.image),
            tuple((slot, o) for o, slot in slots.items() if o in graph.constants),
            tuple((slot, graph.sizes[o]) for o, slot in slots.items() if o in graph.sizes),
            results,
        )  # fmt: skip

    def _add_pieces(self, operation: Operation, pieces: list[tuple[Box, int]]) -> None:
        """Note the slots of an operation's pieces, and add a step for each piece that cuts out all
        boxes that are read of it."""
        self.pieces[operation] = pieces
        for outer, slot in pieces:
            read = self.boxes_read[operation]
            inner = [box for box in read if self._piece(operation, box)[1] == slot]
            if all(box == outer for box in inner):
                continue
            writes = tuple(next(self.slot_numbers) for _ in inner)
            slices = tuple(slices_of(outer, box) for box in inner)
            self.crops.update(((slot, box), at) for box, at in zip(inner, writes, strict=True))
            cut: Compute = _cut_out_single if len(writes) == 1 else _cut_out
            self.steps.append((partial(cut, slices), (slot,), writes))

    def _piece(self, operation: Operation, box: Box) -> tuple[Box, int]:
        return next(piece for piece in self.pieces[operation] if contains(piece[0], box))

    def _slot(self, source: Operation, box: Box) -> int:
        _, slot = self._piece(source, box)
        return self.crops.get((slot, box), slot)

    def _released(self, results: set[int]) -> tuple[Instruction, ...]:
        """The steps as instructions, each with the slots that no later step reads. results: slots
        that are kept to the end."""
        last: dict[int, int] = {}
        for number, (_, reads, writes) in enumerate(self.steps):
            last.update(dict.fromkeys((*reads, *writes), number))
        done: dict[int, list[int]] = defaultdict(list)
        for slot, number in last.items():
            if slot not in results:
                done[number].append(slot)
        return tuple(
            Instruction(compute, reads, writes, tuple(done[number]))
            for number, (compute, reads, writes) in enumerate(self.steps)
        )


def make_plan(graph: Graph, wanted: Sequence[Box]) -> Plan:
    """The plan that computes some boxes of a graph's output."""
    parts = _needed_parts(graph, wanted)
    return _Planner(graph, parts).plan()


# --------------------------------------------------------------------------- the network


class NetworkGraph:
    """The graph of a network for images of one size, rewritten to run fast. It gives the same
    results as the network.

    Called with images (N, C, H, W) it gives the whole output; `plan` and `run` give boxes of it.
    Raises NotExportable where the network has no graph.
    """

    def __init__(
        self, network: nn.Module, example: torch.Tensor, traced: Graph | None = None
    ) -> None:
        """network: frozen, in evaluation mode, with one tensor as result. example: (1, C, H, W).
        traced: the network's graph, where it is known."""
        self.graph = trace(network, example) if traced is None else traced
        # The operators in their order, before the rewrites.
        self.recorded = tuple(o.target for o in self.graph.operations if o.target is not None)
        self.rewrites = rewrite(self.graph)
        self._constants: dict[torch.dtype | None, Constants] = {}

    @property
    def output_shape(self) -> Shape:
        """The shape of the output, (None, K, h, w)."""
        return self.graph.output.axes

    @cached_property
    def whole(self) -> Plan:
        """The plan that computes the whole output."""
        return self.plan([whole(self.output_shape)])

    @cached_property
    def stops_gradients(self) -> bool:
        """Whether an operation may pass no gradient on, or another one than its own."""
        return any(operation.kind in WITHOUT_GRADIENT for operation in self.graph.operations)

    def plan(self, boxes: Sequence[Box]) -> Plan:
        """The plan that computes some boxes of the output."""
        return make_plan(self.graph, boxes)

    def run(
        self, x: torch.Tensor, plan: Plan, dtype: torch.dtype | None = None
    ) -> list[torch.Tensor]:
        """The boxes of a plan. dtype: the type of weights and activations; None: the network's."""
        return plan.run(x if dtype is None else x.to(dtype), self._constants_in(dtype))

    def forget(self, dtype: torch.dtype) -> None:
        """Free the copy of the weights in this type."""
        self._constants.pop(dtype, None)

    def _constants_in(self, dtype: torch.dtype | None) -> Constants:
        """The constants in this type."""
        if dtype not in self._constants:
            tensors = {
                operation: value.to(dtype) if dtype and value.is_floating_point() else value
                for operation, value in self.graph.constants.items()
            }
            kernels = {operation: Kernel(tensors[operation], *kernel)
                       for operation, kernel in self.graph.kernels.items()}  # fmt: skip
            self._constants[dtype] = {**tensors, **kernels}
        return self._constants[dtype]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.whole)[0]
