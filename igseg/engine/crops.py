"""Boxes of tensors, and which box of its inputs an operation needs for a box of its result.

A *box* has one span for each axis of a tensor: from and to, or None for the whole axis, as always
for the batch. `CROP_RULES` has a rule for each kind of operation. An operation without a rule needs
its whole inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

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
# Two boxes are joined where this adds at most so many pixels: each box also costs an operation.
MERGE_SLACK = 256


def whole(shape: Shape | None) -> Box:
    """The box that is a whole tensor."""
    return () if shape is None else (None,) * len(shape)


def trimmed(box: Box, shape: Shape) -> Box:
    """A box without the parts outside of its tensor. A span over a whole axis becomes None. An axis
    whose length depends on the batch is always whole."""
    return tuple(
        None
        if span is None or size is None or (span[0] <= 0 and span[1] >= size)
        else (max(span[0], 0), min(span[1], size))
        for span, size in zip(box, shape, strict=True)
    )


def bounding_box(a: Box, b: Box) -> Box:
    """The smallest box that contains two boxes."""
    return tuple(
        None if p is None or q is None else (min(p[0], q[0]), max(p[1], q[1]))
        for p, q in zip(a, b, strict=True)
    )


def contains(outer: Box, inner: Box) -> bool:
    """Whether the outer box contains the inner one."""
    return all(
        o is None or (i is not None and o[0] <= i[0] and i[1] <= o[1])
        for o, i in zip(outer, inner, strict=True)
    )


def slices_of(outer: Box, inner: Box) -> tuple[slice, ...]:
    """The inner box as slices of the outer box, which contains it."""
    return tuple(
        slice(None) if i is None or i == o
        else slice(i[0] - (o[0] if o else 0), i[1] - (o[0] if o else 0))
        for o, i in zip(outer, inner, strict=True)
    )  # fmt: skip


def place_of(box: Box) -> tuple[EllipsisType | slice, ...]:
    """The rows and columns of a box, as an index into a whole map (..., h, w)."""
    return (..., *slices_of((None,) * len(box), box)[-2:])


def length_of(span: Span, size: int | None) -> int:
    """The length of a span; size: the length of its whole axis."""
    if span is not None:
        return span[1] - span[0]
    assert size is not None  # nobody asks for the length of the batch
    return size


def _volume(box: Box, shape: Shape, axes: Sequence[int]) -> int:
    """The number of places in a box, counted along some axes only."""
    return math.prod(length_of(box[axis], shape[axis]) for axis in axes)


def merged(boxes: Iterable[Box], shape: Shape | None) -> list[Box]:
    """Boxes that cover the given ones. Two boxes are joined wherever that is no more work."""
    left = sorted(set(boxes), key=repr)
    if shape is None:
        return left
    changed = True
    while changed:
        changed = False
        for a, b in itertools.combinations(left, 2):
            joined = trimmed(bounding_box(a, b), shape)
            cut = [n for n, (p, q) in enumerate(zip(a, b, strict=True)) if p or q]
            apart, together = (
                _volume(a, shape, cut) + _volume(b, shape, cut),
                _volume(joined, shape, cut),
            )
            if together <= apart + MERGE_SLACK:
                left = [box for box in left if box not in (a, b)] + [joined]
                changed = True
                break
    return sorted(set(left), key=repr)


# --------------------------------------------------------------------------- rules of propagation


@dataclass(frozen=True)
class Part:
    """How a box of an operation's result is computed."""

    box: Box  # the box that is computed, which contains the wanted one
    needs: tuple[tuple[Operation, Box], ...]  # inputs, in the order of `inputs_of`, and their boxes
    compute: Compute  # the values of `needs` -> the value of the box


class NoRule(Exception):
    """A box that can only be computed from the whole inputs."""


def whole_part(operation: Operation) -> Part:
    """The whole result of an operation from its whole inputs."""
    needs = tuple((source, whole(source.shape)) for source in inputs_of(operation))
    return Part(whole(operation.shape), needs, call_of(operation))


def _needs(operation: Operation, boxes: dict[str, Box]) -> tuple[tuple[Operation, Box], ...]:
    """The needs of an operation: the given boxes of the inputs with these names, and the whole of
    all other inputs."""
    box_of = {id(operation.arguments[name]): box for name, box in boxes.items()}
    return tuple(
        (source, trimmed(box_of[id(source)], source.axes))
        if id(source) in box_of
        else (source, whole(source.shape))
        for source in inputs_of(operation)
    )


def _same_place(operation: Operation, box: Box, source: Operation) -> Box:
    """The box of an input that is broadcast to a box of the result."""
    if not source.shape:  # a number
        return ()
    rank = len(source.shape)
    axes = zip(box[len(box) - rank :], operation.axes[-rank:], source.shape, strict=True)
    spans = tuple(None if length != size else span for span, size, length in axes)
    return trimmed(spans, source.shape)


def pointwise(operation: Operation, box: Box) -> Part:
    """Each place of the result needs the same place of the inputs, and broadcast axes whole."""
    needs = tuple((source, _same_place(operation, box, source)) for source in inputs_of(operation))
    return Part(box, needs, call_of(operation))


def _with_whole(box: Box, axes: Iterable[int]) -> Box:
    places = {axis % len(box) for axis in axes}
    return tuple(None if number in places else span for number, span in enumerate(box))


def prelu(operation: Operation, box: Box) -> Part:
    """Each channel has its slope, so the axis of the channels is whole."""
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
    """The span of an axis that a sliding window reads for a span of its result; and the padding
    before and after it, which is left only where the window reaches beyond the tensor's ends."""
    if span is None:
        return None, window.pads
    if size is None:
        raise NoRule
    start = span[0] * window.stride - window.pads[0]
    last = (span[1] - 1) * window.stride - window.pads[0]
    stop = last + window.dilation * (window.kernel - 1) + 1
    read = (max(start, 0), min(stop, size))
    if read[0] >= read[1]:
        raise NoRule  # nothing but padding
    return read, (max(-start, 0), max(stop - size, 0))


def _reads(box: Box, shape: Shape, windows: Sequence[Window]) -> tuple[tuple[Span, Span], Pads]:
    """`_read` for the rows and for the columns of a box, each with its window."""
    rows, above = _read(box[2], shape[2], windows[0])
    columns, left = _read(box[3], shape[3], windows[1])
    return (rows, columns), (above, left)


def conv2d(operation: Operation, box: Box) -> Part:
    """All channels of the rows and columns that the kernel covers."""
    sliding = operation.sliding()
    sides = zip(sliding.kernel, sliding.stride, sliding.dilation, sliding.pads, strict=True)
    reads, pads = _reads(box, operation.tensor('input').axes, [Window(*side) for side in sides])
    needs = _needs(operation, {'input': (None, None, *reads)})
    run = call_of(operation, sliding=replace(sliding, pads=pads))
    return Part((None, None, *box[2:]), needs, run)


def conv_transpose2d(operation: Operation, box: Box) -> Part:
    """Input i is spread over the results from i * stride - padding on. Results outside the span
    are cut off afterwards."""
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
        # Results at the far end that no input reaches; also gaps, if the stride exceeds the kernel.
        extra.append(max(0, b - end))
        if a < begin:
            raise NoRule
    run = call_of(operation, padding=[0, 0], output_padding=extra)
    needs = _needs(operation, {'input': (None, None, *reads)})
    return Part((None, None, *box[2:]), needs, lambda *values: run(*values)[:, :, cuts[0], cuts[1]])


@dataclass(frozen=True)
class Pooling:
    """What a pooling needs for a box of its result."""

    needs: tuple[tuple[Operation, Box], ...]
    sides: tuple[int, int, int, int]  # the remaining padding: left, right, above, below
    stride: list[int]


def _pooling(operation: Operation, box: Box) -> Pooling:
    arguments = operation.arguments
    if len(operation.axes) != 4:
        raise NoRule
    kernel = operation.pair('kernel_size')
    stride = operation.pair('stride') if arguments.get('stride') else kernel
    dilation = operation.pair('dilation') if 'dilation' in arguments else (1, 1)
    sides = zip(kernel, stride, dilation, operation.pair('padding'), strict=True)
    windows = [Window(k, s, d, (p, p)) for k, s, d, p in sides]
    # With ceil_mode the last window may reach beyond the padding, so whole axes are counted too.
    spans = [span or (0, operation.length(2 + axis)) for axis, span in enumerate(box[2:])]
    reads, ((top, bottom), (left, right)) = _reads(
        (*box[:2], *spans), operation.tensor('self').axes, windows
    )
    needs = _needs(operation, {'self': (*box[:2], *reads)})
    return Pooling(needs, (left, right, top, bottom), list(stride))


def max_pool2d(operation: Operation, box: Box) -> Part:
    """The rows and columns of the windows; padding is minus infinity."""
    pooling = _pooling(operation, box)
    run = call_of(operation, padding=[0, 0], stride=pooling.stride, ceil_mode=False)
    sides = pooling.sides

    def compute(x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = run(F.pad(x, sides, value=-math.inf) if any(sides) else x)
        return pooled

    return Part(box, pooling.needs, compute)


def avg_pool2d(operation: Operation, box: Box) -> Part:
    """The rows and columns of the windows, with padding zeros, which count."""
    arguments, pooling = operation.arguments, _pooling(operation, box)
    sides = pooling.sides
    if arguments['ceil_mode'] or arguments['divisor_override'] is not None:
        raise NoRule
    if any(sides) and not arguments['count_include_pad']:
        raise NoRule
    run = call_of(operation, padding=[0, 0], stride=pooling.stride)

    def compute(x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = run(F.pad(x, sides) if any(sides) else x)
        return pooled

    return Part(box, pooling.needs, compute)


def _resizing_matrix(operation: Operation, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (out, in) that resizes an axis: the rows (0) or the columns (1)."""
    arguments, inputs = dict(operation.arguments), inputs_of(operation)
    if len(inputs) > 1:
        raise NoRule  # the size is computed from the image
    if arguments.get('output_size') is not None:
        arguments['output_size'] = [operation.length(2 + axis), 1]
    if isinstance(scales := arguments.get('scale_factors'), list):
        arguments['scale_factors'] = [scales[axis], 1.0]
    if 'scales_h' in arguments:
        scale = arguments[('scales_h', 'scales_w')[axis]]
        arguments['scales_h'], arguments['scales_w'] = scale, None
    length = inputs[0].length(2 + axis)
    arguments[next(iter(arguments))] = torch.eye(length, dtype=dtype, device='cpu').view(
        1, length, length, 1
    )
    assert operation.target is not None  # the operation is computed
    resized: torch.Tensor = operation.target(**arguments)
    return resized[0, :, :, 0].T


def _columns_used(matrix: torch.Tensor) -> tuple[int, int]:
    used = (matrix != 0).any(dim=0).nonzero().flatten().tolist()
    return used[0], used[-1] + 1


def resize(operation: Operation, box: Box) -> Part:
    """Resizing is a product with a matrix along each axis. The matrix is the resized identity, so
    coordinates, clamping at the borders and `align_corners` are those of the whole map."""
    source, cuts = inputs_of(operation)[0], [slice(*(span or (None,))) for span in box[2:]]
    # In both precisions, since each rounds the coordinates differently.
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
    """A span, extended to whole blocks."""
    return span and (span[0] // size * size, -(-span[1] // size) * size)


def upsample_nearest2d(operation: Operation, box: Box) -> Part:
    """With whole factors every pixel becomes a block, and whole blocks are computed."""
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
    """The parts of the tensors that lie in the span."""
    axis = operation.number('dim', 0) % len(box)
    span, start = box[axis], 0
    needs: list[tuple[Operation, Box]] = []
    for source in operation.tensors('tensors'):
        shape = source.axes
        if len(shape) != len(box):
            raise NoRule  # an empty tensor, which torch.cat ignores
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
    """The same places, counted from the start of the slice."""
    axis = operation.number('dim') % len(box)
    size, length = operation.tensor('self').length(axis), operation.length(axis)
    start, step = operation.number('start', 0), operation.number('step')
    start = max(0, start + size if start < 0 else start)
    a, b = box[axis] or (0, length)
    reads = (*box[:axis], (start + a * step, start + (b - 1) * step + 1), *box[axis + 1 :])
    run = call_of(operation, start=0, end=None)
    return Part(box, _needs(operation, {'self': reads}), run)


def select(operation: Operation, box: Box) -> Part:
    """One place of an axis; the result lacks this axis."""
    source = operation.tensor('self')
    axis = operation.number('dim') % len(source.axes)
    index = operation.number('index') % source.length(axis)
    reads = (*box[:axis], (index, index + 1), *box[axis:])
    return Part(box, _needs(operation, {'self': reads}), call_of(operation, index=0))


# By the mode of padding: width of the padding -> how many places of the tensor it repeats.
PADDING_REPEATS: dict[str, Callable[[int], int]] = {
    'constant': lambda beyond: 0,
    'reflect': lambda beyond: beyond + 1,
    'replicate': lambda beyond: 1,
}


@dataclass(frozen=True)
class Padded:
    """How a span of a padded axis is computed."""

    read: Span  # of the axis before it is padded
    sides: tuple[int, int]  # the padding before and after the span that is read
    cut: slice  # the wanted part of the padded span


def _padded(span: tuple[int, int], size: int, first: int, mode: str) -> Padded:
    """How a span of a padded axis is computed. size: of the axis before it is padded. first: the
    number of places that the padding puts before it."""
    (a, b), repeated = span, PADDING_REPEATS[mode]
    before, after = max(first - a, 0), max(b - first - size, 0)
    low, high = max(a - first, 0), min(b - first, size)
    high = max(high, repeated(before)) if before else high
    low = min(low, size - repeated(after)) if after else low
    if low >= high:
        raise NoRule  # nothing but padding
    begin = a - first - (low - before)
    return Padded((low, high), (before, after), slice(begin, begin + b - a))


def pad(operation: Operation, box: Box) -> Part:
    """The padding that lies in the box; padding that mirrors or repeats needs the places that it
    shows."""
    source, shape = operation.tensor('self'), operation.tensor('self').axes
    mode = str(operation.arguments.get('mode') or 'constant')
    fill = operation.arguments.get('value') or 0.0
    if mode not in PADDING_REPEATS or not isinstance(fill, (int, float)):
        raise NoRule
    amounts, before = operation.numbers('pad'), [0] * len(box)
    for number, amount in enumerate(amounts[::2], start=1):
        before[-number] = amount
    axes = [
        _padded(span or (0, length), size, first, mode) if size is not None and length is not None
        else Padded(None, (0, 0), slice(None))
        for span, size, first, length in zip(box, shape, before, operation.axes, strict=True)
    ]  # fmt: skip
    sides = [side for axis in reversed(axes) for side in axis.sides][: len(amounts)]
    cuts = tuple(axis.cut for axis in axes)
    value, reads = fill if mode == 'constant' else None, tuple(axis.read for axis in axes)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, sides, mode, value)[cuts]

    return Part(box, ((source, trimmed(reads, shape)),), compute)


def permute(operation: Operation, box: Box) -> Part:
    """The axes in another order."""
    order = [dim % len(box) for dim in operation.numbers('dims')]
    reads = tuple(box[order.index(axis)] for axis in range(len(box)))
    return Part(box, _needs(operation, {'self': reads}), call_of(operation))


def transpose(operation: Operation, box: Box) -> Part:
    """Two axes swapped."""
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
        raise NoRule  # it might remove an axis that only cropping makes 1 long
    shape = operation.tensor('self').axes
    axes = {dim % len(shape) for dim in operation.numbers('dim')}
    removed = {axis for axis in axes if shape[axis] == 1}
    if removed != axes:
        raise NoRule
    spans = iter(box)
    reads = tuple(None if axis in removed else next(spans) for axis in range(len(shape)))
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
        spans = iter(box)
        reads = tuple(None if axis in axes else next(spans) for axis in range(rank))
    return Part(box, _needs(operation, {'self': reads}), call_of(operation))


def along_axis(operation: Operation, box: Box) -> Part:
    """A softmax, whose axis is whole."""
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
    """A broadcast, to the size of the box."""
    source, whole_sizes = operation.tensor('self'), operation.arguments['size']
    if len(source.axes) != len(box) or not isinstance(whole_sizes, (list, tuple)):
        raise NoRule
    sizes, reads = list(whole_sizes), []
    for axis, (span, length) in enumerate(zip(box, source.axes, strict=True)):
        spread = length == 1 and operation.axes[axis] != 1
        reads.append(None if spread else span)
        if isinstance(sizes[axis], int):
            sizes[axis] = (length_of(span, sizes[axis]) if spread else -1)  # fmt: skip
    return Part(box, _needs(operation, {'self': tuple(reads)}), call_of(operation, size=sizes))


# The rules, by the names of operators. An operator that is not here and works place by place has
# the rule `pointwise`. For all others the whole result is computed from the whole inputs.
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
    """Whether an operation works place by place, without random numbers, as PyTorch says."""
    tags = getattr(operation.target, 'tags', ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def part_of(operation: Operation, box: Box) -> Part:
    """How a box of an operation's result is computed, by the operation's rule if it has one."""
    rule = CROP_RULES.get(operation.kind, pointwise if _is_pointwise(operation) else None)
    if rule is None or all(span is None for span in box):
        return whole_part(operation)
    try:
        return rule(operation, box)
    except (NoRule, NotExportable):  # NotExportable: an argument is no plain number
        return whole_part(operation)
