"""A network that computes what the original does, in whole or for some boxes of its output.

    trace       the network once, as torch.export sees it, for any batch of one image size
    rewrites    everything that makes it faster, as exact rewrites of the graph
    crops       which box of its inputs each operation needs for a box of its result
    this file   what is computed for some boxes of the output, in order (`Plan`)

*Cropping.* An output pixel depends on a box of every tensor before it. From the output to the
input, each operation says which box of its inputs it needs. Only these boxes are computed, which is
exact: zero padding stays where the tensor truly ends, and what lies outside the boxes has no
gradient. Several boxes of one tensor (of distant objects) stay apart while that is less work than
the one around them.
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
    holds,
    length_of,
    merged,
    part_of,
    slices_of,
    trimmed,
    whole,
)
from igseg.engine.rewrites import Kernel, rewrite
from igseg.engine.trace import Compute, Graph, Operation, Shape, trace

# --------------------------------------------------------------------------- crops


def _layout_of(x: torch.Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last or x.ndim == 4 else torch.contiguous_format


class _CutOut(torch.autograd.Function):
    """All crops of a tensor that are read; their gradients are added into one map, in place."""

    @staticmethod
    def forward(ctx, x, slices):
        ctx.set_materialize_grads(False)
        ctx.slices, ctx.like = slices, (x.shape, x.dtype, x.device)
        ctx.format = _layout_of(x)
        return tuple(x[one] for one in slices)

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
    return tuple(x[one] for one in slices)


def _cut_out_one(slices: tuple[tuple[slice, ...], ...], x: torch.Tensor) -> torch.Tensor:
    return _cut_out(slices, x)[0]


# --------------------------------------------------------------------------- plans


# What constants are while a plan runs: tensors, and weights of convolutions.
Constants = Mapping[Operation, torch.Tensor | Kernel]


@dataclass(frozen=True)
class Instruction:
    """A step of a plan. Slots hold the values."""

    compute: Compute
    reads: tuple[int, ...]
    writes: tuple[int, ...]  # one, or one for each of several results
    done: tuple[int, ...]  # read here for the last time


@dataclass(frozen=True)
class Plan:
    """What is computed for some boxes of the output, in order."""

    boxes: tuple[Box, ...]  # of the output: those asked for, some of them joined
    flops: float  # floating-point operations of the convolutions in a forward pass of one image
    instructions: tuple[Instruction, ...]
    image: int | None  # its slot; None: the output does not depend on it
    constants: tuple[tuple[int, Operation], ...]
    sizes: tuple[tuple[int, Callable[[int], int]], ...]
    results: tuple[int, ...]  # slots, in the order of the boxes

    def run(self, x: torch.Tensor, constants: Constants) -> list[torch.Tensor]:
        """Images (N, C, H, W) -> the boxes of the output, one after the other."""
        # Values of any kind: what one operator gives another takes, as the network was traced.
        slots: dict[int, Any] = {slot: constants[which] for slot, which in self.constants}
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


def _propagated(graph: Graph, wanted: Sequence[Box]) -> dict[Operation, list[Part]]:
    """The parts of each operation that are needed, from the output to the input."""
    needed: dict[Operation, list[Box]] = defaultdict(list)
    needed[graph.output] = [trimmed(box, graph.output.axes) for box in wanted]
    parts = {}
    for operation in reversed(graph.operations):
        if operation.target is None or operation not in needed:
            continue
        boxes = merged(needed[operation], operation.shape)
        while True:  # what is delivered may be more, and then better be one
            found = [part_of(operation, box) for box in boxes]
            delivered = merged([part.box for part in found], operation.shape)
            if delivered == boxes:
                break
            boxes = delivered
        parts[operation] = found
        for part in found:
            for source, box in part.needs:
                needed[source].append(box)
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
    weights = (size or 1 for size in operation.tensor('weight').axes)  # those of one image
    return 2.0 * places * math.prod(weights)


class _Planner:
    """Puts parts in order, and finds for each need the slot that holds it."""

    def __init__(self, graph: Graph, parts: dict[Operation, list[Part]]) -> None:
        self.graph, self.parts = graph, parts
        self.number = itertools.count()
        self.pieces: dict[Operation, list[tuple[Box, int]]] = {}  # what was computed, and where
        self.crops: dict[tuple[int, Box], int] = {}
        self.steps: list[tuple[Compute, tuple[int, ...], tuple[int, ...]]] = []
        self.read_of: dict[Operation, list[Box]] = defaultdict(list)  # boxes that are read
        for found in parts.values():
            for part in found:
                for source, box in part.needs:
                    if box not in self.read_of[source]:
                        self.read_of[source].append(box)

    def plan(self) -> Plan:
        graph = self.graph
        sources = [o for o in graph.operations if o.target is None
                   and (o in self.read_of or o is graph.output)]  # fmt: skip
        for source in sources:
            self._keep(source, [(whole(source.shape), next(self.number))])
        flops = 0.0
        for operation in graph.operations:
            if operation not in self.parts:
                continue
            computed = []
            for part in self.parts[operation]:
                reads = tuple(self._slot(source, box) for source, box in part.needs)
                slot = next(self.number)
                self.steps.append((part.compute, reads, (slot,)))
                computed.append((part.box, slot))
                flops += _flops(operation, part.box)
            self._keep(operation, computed)
        slots = {source: self.pieces[source][0][1] for source in sources}
        boxes, results = zip(*self.pieces[graph.output], strict=True)
        return Plan(
            boxes, flops, self._released(set(results)), slots.get(graph.image),
            tuple((slot, o) for o, slot in slots.items() if o in graph.constants),
            tuple((slot, graph.sizes[o]) for o, slot in slots.items() if o in graph.sizes),
            results,
        )  # fmt: skip

    def _keep(self, operation: Operation, pieces: list[tuple[Box, int]]) -> None:
        """Note where pieces are, and cut what is read of them: all crops of one in one step."""
        self.pieces[operation] = pieces
        for outer, slot in pieces:
            read = self.read_of[operation]
            inner = [box for box in read if self._piece(operation, box)[1] == slot]
            if all(box == outer for box in inner):
                continue
            writes = tuple(next(self.number) for _ in inner)
            slices = tuple(slices_of(outer, box) for box in inner)
            self.crops.update(((slot, box), at) for box, at in zip(inner, writes, strict=True))
            cut: Compute = _cut_out_one if len(writes) == 1 else _cut_out
            self.steps.append((partial(cut, slices), (slot,), writes))

    def _piece(self, operation: Operation, box: Box) -> tuple[Box, int]:
        return next(piece for piece in self.pieces[operation] if holds(piece[0], box))

    def _slot(self, source: Operation, box: Box) -> int:
        _, slot = self._piece(source, box)
        return self.crops.get((slot, box), slot)

    def _released(self, kept: set[int]) -> tuple[Instruction, ...]:
        """The steps, each with the values that nobody needs afterwards."""
        last: dict[int, int] = {}
        for number, (_, reads, writes) in enumerate(self.steps):
            last.update(dict.fromkeys((*reads, *writes), number))
        done: dict[int, list[int]] = defaultdict(list)
        for slot, number in last.items():
            if slot not in kept:
                done[number].append(slot)
        return tuple(
            Instruction(compute, reads, writes, tuple(done[number]))
            for number, (compute, reads, writes) in enumerate(self.steps)
        )


def make_plan(graph: Graph, wanted: Sequence[Box]) -> Plan:
    """What must be computed for some boxes of a graph's output."""
    parts = _propagated(graph, wanted)
    return _Planner(graph, parts).plan()


# --------------------------------------------------------------------------- the network


class NetworkGraph:
    """A network for images of one size, rewritten to run fast; computes what the network does.

    Called with images (N, C, H, W) it gives the whole output; `plan` and `run` give boxes of it.
    Raises NotExportable where there is no graph of the network.
    """

    def __init__(self, network: nn.Module, example: torch.Tensor) -> None:
        """network: frozen, in evaluation mode, with one tensor as result. example: (1, C, H, W)."""
        self.graph = trace(network, example)
        self.rewrites = rewrite(self.graph)
        self._constants: dict[torch.dtype | None, Constants] = {}

    @property
    def output_shape(self) -> Shape:
        """Of the result: (None, K, h, w)."""
        return self.graph.output.axes

    @cached_property
    def whole(self) -> Plan:
        """The plan of all of the output."""
        return self.plan([whole(self.output_shape)])

    def plan(self, boxes: Sequence[Box]) -> Plan:
        """What must be computed for some boxes of the output."""
        return make_plan(self.graph, boxes)

    def run(
        self, x: torch.Tensor, plan: Plan, dtype: torch.dtype | None = None
    ) -> list[torch.Tensor]:
        """The boxes of a plan; dtype: that of weights and activations, if it is not their own."""
        return plan.run(x if dtype is None else x.to(dtype), self._in(dtype))

    def forget(self, dtype: torch.dtype) -> None:
        """Free the weights of a type."""
        self._constants.pop(dtype, None)

    def _in(self, dtype: torch.dtype | None) -> Constants:
        """The constants in a type, in the order in which they are computed with."""
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
