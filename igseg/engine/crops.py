"""Boxes of tensors, and which box of its inputs an operation needs for a box of its result.

A *box* has one span for each axis of a tensor: from and to, or None for the whole axis, as always
for the batch. `CROP_RULES` has one rule for each kind of operation; one without a rule asks for its
whole inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from igseg.engine.trace import (
    Compute,
    NotExportable,
    Operation,
    Pads,
    Shape,
    call_of,
    inputs_of,
)

aten = torch.ops.aten

Span = tuple[int, int] | None  # from, to; None: the whole axis
Box = tuple[Span, ...]
MERGE_SLACK = 256  # pixels that two boxes may grow by to become one: an operation costs too


def whole(shape: Shape | None) -> Box:
    """The box of all of a tensor."""
    return () if shape is None else (None,) * len(shape)


def trimmed(box: Box, shape: Shape) -> Box:
    """A box cut to a tensor; a span over all of an axis becomes None. An axis whose length depends
    on the batch is never cut."""
    return tuple(
        None
        if span is None or size is None or (span[0] <= 0 and span[1] >= size)
        else (max(span[0], 0), min(span[1], size))
        for span, size in zip(box, shape, strict=True)
    )


def around(a: Box, b: Box) -> Box:
    """The smallest box around two."""
    return tuple(
        None if p is None or q is None else (min(p[0], q[0]), max(p[1], q[1]))
        for p, q in zip(a, b, strict=True)
    )


def holds(outer: Box, inner: Box) -> bool:
    """Whether a box lies within another."""
    return all(
        o is None or (i is not None and o[0] <= i[0] and i[1] <= o[1])
        for o, i in zip(outer, inner, strict=True)
    )


def slices_of(outer: Box, inner: Box) -> tuple[slice, ...]:
    """Where a box lies within another that holds it."""
    return tuple(
        slice(None) if i is None or i == o
        else slice(i[0] - (o[0] if o else 0), i[1] - (o[0] if o else 0))
        for o, i in zip(outer, inner, strict=True)
    )  # fmt: skip


def length_of(span: Span, size: int | None) -> int:
    """Of a span of an axis of that size, which is known where the span is all of it."""
    if span is not None:
        return span[1] - span[0]
    assert size is not None  # an axis whose length depends on the batch is never cut
    return size


def _volume(box: Box, shape: Shape, axes: Sequence[int]) -> int:
    """The places in a box, along some axes."""
    return math.prod(length_of(box[axis], shape[axis]) for axis in axes)


def merged(boxes: Iterable[Box], shape: Shape | None) -> list[Box]:
    """Boxes that cover the same, of which no two are better computed as one."""
    left = sorted(set(boxes), key=repr)
    if shape is None:
        return left
    changed = True
    while changed:
        changed = False
        for a, b in itertools.combinations(left, 2):
            one = trimmed(around(a, b), shape)
            cut = [n for n, (p, q) in enumerate(zip(a, b, strict=True)) if p or q]
            apart, together = (
                _volume(a, shape, cut) + _volume(b, shape, cut),
                _volume(one, shape, cut),
            )
            if together <= apart + MERGE_SLACK:
                left = [box for box in left if box not in (a, b)] + [one]
                changed = True
                break
    return sorted(set(left), key=repr)


# --------------------------------------------------------------------------- rules of propagation


@dataclass(frozen=True)
class Part:
    """How a box of an operation's result is computed."""

    box: Box  # what comes out: at least what was asked for
    needs: tuple[tuple[Operation, Box], ...]  # one for each of `inputs_of`, or for those needed
    compute: Compute  # from their values


class NoRule(Exception):
    """This box cannot be had from less than the whole inputs."""


def whole_part(operation: Operation) -> Part:
    """All of an operation's result from all of its inputs."""
    needs = tuple((source, whole(source.shape)) for source in inputs_of(operation))
    return Part(whole(operation.shape), needs, call_of(operation))


def _needs(operation: Operation, boxes: dict[str, Box]) -> tuple[tuple[Operation, Box], ...]:
    """The needs of an operation with these boxes of the inputs so named, all of the others."""
    given = {id(operation.arguments[name]): box for name, box in boxes.items()}
    return tuple(
        (source, trimmed(given[id(source)], source.axes))
        if id(source) in given
        else (source, whole(source.shape))
        for source in inputs_of(operation)
    )


def _same_place(operation: Operation, box: Box, source: Operation) -> Box:
    """The box of an input that broadcasts to a box of the result."""
    if not source.shape:  # a number
        return ()
    rank = len(source.shape)
    axes = zip(box[len(box) - rank :], operation.axes[-rank:], source.shape, strict=True)
    same = tuple(None if own != size else span for span, size, own in axes)
    return trimmed(same, source.shape)


def pointwise(operation: Operation, box: Box) -> Part:
    """Every place of the result from the same place of the inputs; broadcast axes are whole."""
    needs = tuple((source, _same_place(operation, box, source)) for source in inputs_of(operation))
    return Part(box, needs, call_of(operation))


def _with_whole(box: Box, axes: Iterable[int]) -> Box:
    places = {axis % len(box) for axis in axes}
    return tuple(None if number in places else span for number, span in enumerate(box))


def prelu(operation: Operation, box: Box) -> Part:
    """A slope for each channel, whose axis is whole."""
    box = _with_whole(box, [1])
    return Part(box, _needs(operation, {'self': box}), call_of(operation))


@dataclass(frozen=True)
class Window:
    """A window that slides along an axis."""

    kernel: int
    stride: int
    dilation: int
    pads: tuple[int, int]  # before and after the axis


def _read(span: Span, size: int | None, window: Window) -> tuple[Span, tuple[int, int]]:
    """What a sliding window reads of an axis for a span of its result, and the padding that is
    left: what reaches beyond the tensor's true ends."""
    if span is None:
        return None, window.pads
    if size is None:
        raise NoRule
    start = span[0] * window.stride - window.pads[0]
    last = (span[1] - 1) * window.stride - window.pads[0]
    stop = last + window.dilation * (window.kernel - 1) + 1
    read = (max(start, 0), min(stop, size))
    if read[0] >= read[1]:
        raise NoRule  # padding alone
    return read, (max(-start, 0), max(stop - size, 0))


def _reads(box: Box, shape: Shape, windows: Sequence[Window]) -> tuple[tuple[Span, Span], Pads]:
    """`_read` of the rows and the columns of a box, by the window of each."""
    rows, above = _read(box[2], shape[2], windows[0])
    columns, left = _read(box[3], shape[3], windows[1])
    return (rows, columns), (above, left)


def conv2d(operation: Operation, box: Box) -> Part:
    """All channels of the rows and columns under the kernel."""
    how = operation.sliding()
    sides = zip(how.kernel, how.stride, how.dilation, how.pads, strict=True)
    reads, pads = _reads(box, operation.tensor('input').axes, [Window(*side) for side in sides])
    needs = _needs(operation, {'input': (None, None, *reads)})
    run = call_of(operation, how=replace(how, pads=pads))
    return Part((None, None, *box[2:]), needs, run)


def conv_transpose2d(operation: Operation, box: Box) -> Part:
    """Input i is spread over the results from i * stride - padding on; what is beside the span
    is cut off afterwards."""
    source, weight = operation.tensor('input'), operation.tensor('weight')
    reads: list[Span] = []
    cuts, extra = [], []
    for axis in range(2):
        span, size = box[2 + axis], source.length(2 + axis)
        stride, padding = operation.pair('stride')[axis], operation.pair('padding')[axis]
        reach = operation.pair('dilation')[axis] * (weight.length(2 + axis) - 1)
        a, b = span or (0, operation.length(2 + axis))
        first = max(0, math.ceil((a + padding - reach) / stride))
        last = min(size - 1, (b - 1 + padding) // stride)
        if first > last:
            raise NoRule
        begin = first * stride - padding
        end = last * stride - padding + reach + 1
        reads.append((first, last + 1))
        cuts.append(slice(a - begin, b - begin))
        extra.append(max(0, b - end))  # at the far end, and in gaps of a stride beyond the kernel
        if a < begin:
            raise NoRule
    run = call_of(operation, padding=[0, 0], output_padding=extra)
    needs = _needs(operation, {'input': (None, None, *reads)})
    return Part((None, None, *box[2:]), needs, lambda *values: run(*values)[:, :, cuts[0], cuts[1]])


@dataclass(frozen=True)
class Pooling:
    """What a pooling needs for a box of its result."""

    needs: tuple[tuple[Operation, Box], ...]
    sides: tuple[int, int, int, int]  # the padding that is left: left, right, above, below
    stride: list[int]


def _pooling(operation: Operation, box: Box) -> Pooling:
    given = operation.arguments
    if len(operation.axes) != 4:
        raise NoRule
    kernel = operation.pair('kernel_size')
    stride = operation.pair('stride') if given.get('stride') else kernel
    dilation = operation.pair('dilation') if 'dilation' in given else (1, 1)
    sides = zip(kernel, stride, dilation, operation.pair('padding'), strict=True)
    windows = [Window(k, s, d, (p, p)) for k, s, d, p in sides]
    # With ceil_mode the last window may reach further out than the padding: every span is counted.
    spans = [span or (0, operation.length(2 + axis)) for axis, span in enumerate(box[2:])]
    reads, ((top, bottom), (left, right)) = _reads(
        (*box[:2], *spans), operation.tensor('self').axes, windows
    )
    needs = _needs(operation, {'self': (*box[:2], *reads)})
    return Pooling(needs, (left, right, top, bottom), list(stride))


def max_pool2d(operation: Operation, box: Box) -> Part:
    """The windows' rows and columns; where padding is left, it is minus infinity."""
    pooling = _pooling(operation, box)
    run = call_of(operation, padding=[0, 0], stride=pooling.stride, ceil_mode=False)
    sides = pooling.sides

    def compute(x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = run(F.pad(x, sides, value=-math.inf) if any(sides) else x)
        return pooled

    return Part(box, pooling.needs, compute)


def avg_pool2d(operation: Operation, box: Box) -> Part:
    """The windows' rows and columns, with the zeros that count."""
    given, pooling = operation.arguments, _pooling(operation, box)
    sides = pooling.sides
    if given['ceil_mode'] or given['divisor_override'] is not None:
        raise NoRule
    if any(sides) and not given['count_include_pad']:
        raise NoRule
    run = call_of(operation, padding=[0, 0], stride=pooling.stride)

    def compute(x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = run(F.pad(x, sides) if any(sides) else x)
        return pooled

    return Part(box, pooling.needs, compute)


def _resizing_matrix(operation: Operation, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights (out, in) of an axis, of rows (0) or columns (1)."""
    given, inputs = dict(operation.arguments), inputs_of(operation)
    if len(inputs) > 1:
        raise NoRule  # sizes that are computed
    if given.get('output_size') is not None:
        given['output_size'] = [operation.length(2 + axis), 1]
    if isinstance(scales := given.get('scale_factors'), list):
        given['scale_factors'] = [scales[axis], 1.0]
    if 'scales_h' in given:
        given['scales_h'], given['scales_w'] = given[('scales_h', 'scales_w')[axis]], None
    length = inputs[0].length(2 + axis)
    given[next(iter(given))] = torch.eye(length, dtype=dtype).view(1, length, length, 1)
    assert operation.target is not None  # it is one that is computed
    resized: torch.Tensor = operation.target(**given)
    return resized[0, :, :, 0].T


def _columns_used(matrix: torch.Tensor) -> tuple[int, int]:
    used = (matrix != 0).any(dim=0).nonzero().flatten().tolist()
    return used[0], used[-1] + 1


def resize(operation: Operation, box: Box) -> Part:
    """Resizing is linear along each axis: a matrix, read off the resized identity, so that
    coordinates, clamping at the borders and `align_corners` are those of the whole map."""
    source, cuts = inputs_of(operation)[0], [slice(*(span or (None,))) for span in box[2:]]
    # In both precisions, since coordinates are rounded differently in them.
    double, single = (
        [_resizing_matrix(operation, axis, dtype)[cut] for axis, cut in enumerate(cuts)]
        for dtype in (torch.float64, torch.float32)
    )
    reads = [_columns_used(matrix) for matrix in single]

    def compute(x: torch.Tensor) -> torch.Tensor:
        matrices = double if x.dtype == torch.float64 else single
        rows, columns = (matrix[:, slice(*read)].to(x)
                         for matrix, read in zip(matrices, reads, strict=True))  # fmt: skip
        count, channels, height, width = x.shape
        x = x.permute(0, 2, 3, 1).reshape(count, height, width * channels)
        x = torch.matmul(rows, x).view(count, -1, width, channels)
        return torch.matmul(columns, x).permute(0, 3, 1, 2)

    box = (None, None, *box[2:])
    return Part(box, ((source, trimmed((None, None, *reads), source.axes)),), compute)


def _blocks(span: Span, size: int) -> Span:
    """A span widened to whole blocks."""
    return span and (span[0] // size * size, -(-span[1] // size) * size)


def upsample_nearest2d(operation: Operation, box: Box) -> Part:
    """By whole numbers: every pixel becomes a block, and whole blocks are computed."""
    source = inputs_of(operation)[0]
    factors = [operation.length(axis) / source.length(axis) for axis in (2, 3)]
    if not all(factor.is_integer() for factor in factors):
        return resize(operation, box)
    spans = [_blocks(span, int(factor)) for span, factor in zip(box[2:], factors, strict=True)]
    reads = (*box[:2], *(span and (span[0] // int(factor), span[1] // int(factor))
                         for span, factor in zip(spans, factors, strict=True)))  # fmt: skip
    scales = [float(factor) for factor in factors]

    def compute(x: torch.Tensor) -> torch.Tensor:
        return aten.upsample_nearest2d.vec(x, None, scales)

    return Part((*box[:2], *spans), ((source, trimmed(reads, source.axes)),), compute)


def pixel_shuffle(operation: Operation, box: Box) -> Part:
    """Channels become blocks of pixels."""
    factor = operation.number('upscale_factor')
    spans = [_blocks(span, factor) for span in box[-2:]]
    first = (None,) * (len(box) - 2)
    reads = (*first, *(span and (span[0] // factor, span[1] // factor) for span in spans))
    return Part((*first, *spans), _needs(operation, {'self': reads}), call_of(operation))


def pixel_unshuffle(operation: Operation, box: Box) -> Part:
    """Blocks of pixels become channels."""
    factor = operation.number('downscale_factor')
    first = (None,) * (len(box) - 2)
    reads = (*first, *(span and (span[0] * factor, span[1] * factor) for span in box[-2:]))
    return Part((*first, *box[-2:]), _needs(operation, {'self': reads}), call_of(operation))


def cat(operation: Operation, box: Box) -> Part:
    """Those of the tensors that lie in the span, each its part."""
    axis = operation.number('dim', 0) % len(box)
    span, start = box[axis], 0
    needs: list[tuple[Operation, Box]] = []
    for source in operation.tensors('tensors'):
        shape = source.axes
        if len(shape) != len(box):
            raise NoRule  # an empty tensor, which cat leaves out
        size = source.length(axis)
        part = span and (max(span[0] - start, 0), min(span[1] - start, size))
        if part is None or part[0] < part[1]:
            needs.append((source, trimmed((*box[:axis], part, *box[axis + 1 :]), shape)))
        start += size
    return Part(box, tuple(needs), lambda *values: torch.cat(values, dim=axis))


def stack(operation: Operation, box: Box) -> Part:
    """The new axis is whole."""
    axis = operation.number('dim', 0) % len(box)
    inner = box[:axis] + box[axis + 1 :]
    needs = tuple((source, inner) for source in operation.tensors('tensors'))
    return Part(_with_whole(box, [axis]), needs, call_of(operation))


def slice_(operation: Operation, box: Box) -> Part:
    """The same places counted from the slice's start."""
    axis = operation.number('dim') % len(box)
    size, length = operation.tensor('self').length(axis), operation.length(axis)
    start, step = operation.number('start', 0), operation.number('step')
    start = max(0, start + size if start < 0 else start)
    a, b = box[axis] or (0, length)
    reads = (*box[:axis], (start + a * step, start + (b - 1) * step + 1), *box[axis + 1 :])
    run = call_of(operation, start=0, end=None)
    return Part(box, _needs(operation, {'self': reads}), run)


def select(operation: Operation, box: Box) -> Part:
    """One place of an axis, which is gone."""
    source = operation.tensor('self')
    axis = operation.number('dim') % len(source.axes)
    index = operation.number('index') % source.length(axis)
    reads = (*box[:axis], (index, index + 1), *box[axis:])
    return Part(box, _needs(operation, {'self': reads}), call_of(operation, index=0))


# How much of a tensor is shown by so much padding, by its mode.
PADDING_SHOWS: dict[str, Callable[[int], int]] = {
    'constant': lambda beyond: 0,
    'reflect': lambda beyond: beyond + 1,
    'replicate': lambda beyond: 1,
}


@dataclass(frozen=True)
class Padded:
    """How a span of a padded axis is computed."""

    read: Span  # of the axis before it is padded
    left: tuple[int, int]  # the padding that is left, before and after it
    cut: slice  # what is wanted of the result


def _padded(span: tuple[int, int], size: int, first: int, mode: str) -> Padded:
    """A span of an axis of that size, before which `first` places were put."""
    (a, b), shown = span, PADDING_SHOWS[mode]
    left, right = max(first - a, 0), max(b - first - size, 0)
    low, high = max(a - first, 0), min(b - first, size)
    high = max(high, shown(left)) if left else high
    low = min(low, size - shown(right)) if right else low
    if low >= high:
        raise NoRule  # padding alone
    begin = a - first - (low - left)
    return Padded((low, high), (left, right), slice(begin, begin + b - a))


def pad(operation: Operation, box: Box) -> Part:
    """Only what is left of the padding beyond the tensor's true ends; a mirror needs what it
    shows."""
    source, shape = operation.tensor('self'), operation.tensor('self').axes
    mode = str(operation.arguments.get('mode') or 'constant')
    filled = operation.arguments.get('value') or 0.0
    if mode not in PADDING_SHOWS or not isinstance(filled, (int, float)):
        raise NoRule
    amounts, before = operation.numbers('pad'), [0] * len(box)
    for number, amount in enumerate(amounts[::2], start=1):
        before[-number] = amount
    axes = [
        _padded(span or (0, length), size, first, mode) if size is not None and length is not None
        else Padded(None, (0, 0), slice(None))
        for span, size, first, length in zip(box, shape, before, operation.axes, strict=True)
    ]  # fmt: skip
    sides = [side for axis in reversed(axes) for side in axis.left][: len(amounts)]
    cuts = tuple(axis.cut for axis in axes)
    value, reads = filled if mode == 'constant' else None, tuple(axis.read for axis in axes)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, sides, mode, value)[cuts]

    return Part(box, ((source, trimmed(reads, shape)),), compute)


def permute(operation: Operation, box: Box) -> Part:
    """The axes in another order."""
    order = [dim % len(box) for dim in operation.numbers('dims')]
    reads = tuple(box[order.index(axis)] for axis in range(len(box)))
    return Part(box, _needs(operation, {'self': reads}), call_of(operation))


def transpose(operation: Operation, box: Box) -> Part:
    """Two axes change places."""
    a, b = (operation.number(name) % len(box) for name in ('dim0', 'dim1'))
    reads = list(box)
    reads[a], reads[b] = box[b], box[a]
    return Part(box, _needs(operation, {'self': tuple(reads)}), call_of(operation))


def unsqueeze(operation: Operation, box: Box) -> Part:
    """A new axis of length 1."""
    axis = operation.number('dim') % len(box)
    reads = box[:axis] + box[axis + 1 :]
    return Part(_with_whole(box, [axis]), _needs(operation, {'self': reads}), call_of(operation))


def squeeze(operation: Operation, box: Box) -> Part:
    """Without an axis of length 1."""
    if operation.arguments.get('dim') is None:
        raise NoRule  # might take an axis that is of length 1 only after cropping
    shape = operation.tensor('self').axes
    axes = {dim % len(shape) for dim in operation.numbers('dim')}
    gone = {axis for axis in axes if shape[axis] == 1}
    if gone != axes:
        raise NoRule
    left = iter(box)
    reads = tuple(None if axis in gone else next(left) for axis in range(len(shape)))
    return Part(box, _needs(operation, {'self': reads}), call_of(operation))


def reduce(operation: Operation, box: Box) -> Part:
    """The axes that are summed up are whole."""
    if operation.arguments.get('dim') in (None, []):
        raise NoRule
    rank = len(operation.tensor('self').axes)
    axes = {dim % rank for dim in operation.numbers('dim')}
    if operation.arguments.get('keepdim'):
        reads = _with_whole(box, axes)
    else:
        left = iter(box)
        reads = tuple(None if axis in axes else next(left) for axis in range(rank))
    return Part(box, _needs(operation, {'self': reads}), call_of(operation))


def along_axis(operation: Operation, box: Box) -> Part:
    """A softmax: its axis is whole."""
    box = _with_whole(box, [operation.number('dim')])
    return Part(box, _needs(operation, {'self': box}), call_of(operation))


def layer_norm(operation: Operation, box: Box) -> Part:
    """The last axes are whole."""
    count = len(operation.numbers('normalized_shape'))
    box = _with_whole(box, range(len(box) - count, len(box)))
    return Part(box, _needs(operation, {'input': box}), call_of(operation))


def linear(operation: Operation, box: Box) -> Part:
    """The last axis is whole."""
    box = _with_whole(box, [-1])
    return Part(box, _needs(operation, {'input': box}), call_of(operation))


def expand(operation: Operation, box: Box) -> Part:
    """A broadcast, to as much as is asked for."""
    source, asked = operation.tensor('self'), operation.arguments['size']
    if len(source.axes) != len(box) or not isinstance(asked, (list, tuple)):
        raise NoRule
    sizes, reads = list(asked), []
    for axis, (span, own) in enumerate(zip(box, source.axes, strict=True)):
        spread = own == 1 and operation.axes[axis] != 1
        reads.append(None if spread else span)
        if isinstance(sizes[axis], int):
            sizes[axis] = (length_of(span, sizes[axis]) if spread else -1)  # fmt: skip
    return Part(box, _needs(operation, {'self': tuple(reads)}), call_of(operation, size=sizes))


# By the operator's name. What is not here and works place by place is `pointwise`; of all others
# the whole result is computed from the whole inputs.
CROP_RULES: dict[str, Callable[[Operation, Box], Part]] = {
    'conv2d': conv2d,
    'conv_transpose2d': conv_transpose2d,
    'max_pool2d': max_pool2d,
    'avg_pool2d': avg_pool2d,
    'upsample_nearest2d': upsample_nearest2d,
    'upsample_bilinear2d': resize,
    'pixel_shuffle': pixel_shuffle,
    'pixel_unshuffle': pixel_unshuffle,
    'cat': cat,
    'stack': stack,
    'slice': slice_,
    'select': select,
    'pad': pad,
    'constant_pad_nd': pad,
    'permute': permute,
    'transpose': transpose,
    'unsqueeze': unsqueeze,
    'squeeze': squeeze,
    'expand': expand,
    'sum': reduce,
    'mean': reduce,
    'amax': reduce,
    'softmax': along_axis,
    '_softmax': along_axis,
    'log_softmax': along_axis,
    'layer_norm': layer_norm,
    'linear': linear,
    'prelu': prelu,
    **dict.fromkeys(('hardswish', 'to', '_to_copy', 'detach', 'log_sigmoid'), pointwise),
}


def _is_pointwise(operation: Operation) -> bool:
    """Whether PyTorch knows an operation as one that works place by place, without chance."""
    tags = getattr(operation.target, 'tags', ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def part_of(operation: Operation, box: Box) -> Part:
    """How a box of an operation's result is computed, by its rule where it has one."""
    rule = CROP_RULES.get(operation.kind, pointwise if _is_pointwise(operation) else None)
    if rule is None or all(span is None for span in box):
        return whole_part(operation)
    try:
        return rule(operation, box)
    except (NoRule, NotExportable):  # or an argument that is no plain number
        return whole_part(operation)
