"""Where in the image the logit map of a network lies, where it has another size than the image.

A map that is smaller than the image may show all of it in a lower resolution, or, after
convolutions without padding, only its middle. The operations of the network tell which. Each axis
of a tensor has a scale and an offset: index j lies at `scale * j + offset` of the image's rows or
columns, measured from centre to centre. They are carried from the image through kernels, strides
and paddings to the map, and must agree where several ways meet.

Where a kernel with a stride could as well lie on the blocks of pixels that its stride cuts, it is
taken to do so: within a stride, training decides what a value stands for, and networks are trained
on masks whose edges are those of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from igseg.engine.trace import Graph, NotExportable, Operation, Shape, inputs_of, trace
from igseg.errors import attempt
from igseg.network.kinds import Place
from igseg.network.outputs import output_of, segmentation_logits


@dataclass(frozen=True)
class Axis:
    """Where the indices of an axis lie along the rows, or the columns, of the image."""

    rows: bool  # whether it lies along the rows; else along the columns
    scale: float  # image pixels from an index to the next one
    offset: float  # of index 0
    grain: float  # the largest scale on the way: finer, positions are not known

    def at(self, index: float) -> float:
        """The position of an index."""
        return self.scale * index + self.offset

    def slid(self, stride: float, first: float) -> Axis:
        """After a window that slides by `stride`, and whose first centre is at index `first`."""
        block = stride / 2 - 0.5  # the first centre of blocks of `stride` indices
        if abs(first - block) <= abs(block) + 1e-9:
            first = block
        scale = self.scale * stride
        return Axis(self.rows, scale, self.at(first), max(self.grain, scale))

    def start(self) -> float:
        """The edge of the image's pixels before index 0: 0 is the edge of the image."""
        return self.offset - self.scale / 2 + 0.5


class _Lost:
    """Stands for an axis whose places in the image are not known."""


LOST = _Lost()
AnyAxis = Axis | _Lost | None  # None: the axis does not lie in the image, as that of channels
Axes = tuple[AnyAxis, ...]  # of a tensor


def _joined(axes: Sequence[AnyAxis], length: int) -> AnyAxis:
    """The axis of a result of this length in which axes meet place by place: the finest, if all
    agree to the coarsest grain."""
    if any(axis is LOST for axis in axes):
        return LOST
    placed = [axis for axis in axes if isinstance(axis, Axis)]
    if not placed:
        return None
    if len({axis.rows for axis in placed}) > 1:
        return LOST
    finest = min(placed, key=lambda axis: axis.grain)
    for axis in placed:
        slack = max(finest.grain, axis.grain) + 1e-6
        if any(abs(axis.at(end) - finest.at(end)) > slack for end in (0, length - 1)):
            return LOST
    return finest


def _joined_all(tensors: Sequence[Axes], lengths: Shape) -> list[AnyAxis]:
    """The axes of a result of this shape in which tensors of the same rank meet."""
    columns = zip(*tensors, strict=True)
    return [_joined(axes, length or 1) for axes, length in zip(columns, lengths, strict=True)]


def _of_tensor(places: dict[Operation, Axes], operation: Operation) -> Axes:
    """The axes of a tensor; those of length 1 have no place, since they hold for all places."""
    return tuple(
        None if length == 1 else axis
        for axis, length in zip(places[operation], operation.axes, strict=True)
    )


# --------------------------------------------------------------------------- rules by operation
#
# A rule gives the axes of a result: (operation, axes of its inputs) -> axes.
Places = dict[Operation, Axes]
Rule = Callable[[Operation, Places], Axes]


def _place_by_place(operation: Operation, places: Places) -> Axes:
    """The axes of all inputs, which are broadcast."""
    rank = len(operation.axes)
    inputs = [(None,) * (rank - len(axes)) + axes
              for axes in (_of_tensor(places, source) for source in inputs_of(operation)
                           if source.shape is not None) if len(axes) <= rank]  # fmt: skip
    return tuple(_joined_all(inputs, operation.axes))


def _as_the_first(operation: Operation, places: Places) -> Axes:
    """The axes of the first input, as after a normalisation."""
    return _of_tensor(places, inputs_of(operation)[0])


def _slid(axis: AnyAxis, stride: float, first: float) -> AnyAxis:
    return axis.slid(stride, first) if isinstance(axis, Axis) else axis


def _convolution(operation: Operation, places: Places) -> Axes:
    source, weight = operation.tensor('input'), operation.tensor('weight')
    axes = _of_tensor(places, source)
    strides, dilations = operation.pair('stride'), operation.pair('dilation')
    same = operation.arguments['padding'] == 'same'
    paddings = (
        (0, 0) if operation.arguments['padding'] == 'valid' or same else operation.pair('padding')
    )
    placed = []
    for axis, stride, padding, dilation, kernel in zip(
        axes[2:], strides, paddings, dilations, weight.axes[2:], strict=True
    ):
        reach = dilation * ((kernel or 1) - 1)
        before = reach // 2 if same else padding
        placed.append(_slid(axis, stride, reach / 2 - before))
    return (None, None, *placed)


def _transposed_convolution(operation: Operation, places: Places) -> Axes:
    """Index i of the input lies in the middle of the results from i * stride - padding on."""
    source, weight = operation.tensor('input'), operation.tensor('weight')
    axes, placed = _of_tensor(places, source), []
    for number, axis in enumerate(axes[2:]):
        stride, padding = operation.pair('stride')[number], operation.pair('padding')[number]
        reach = operation.pair('dilation')[number] * (weight.length(2 + number) - 1)
        placed.append(_slid(axis, 1 / stride, (padding - reach / 2) / stride))
    return (None, None, *placed)


def _pooling(operation: Operation, places: Places) -> Axes:
    source = inputs_of(operation)[0]
    axes = _of_tensor(places, source)
    kernel = operation.pair('kernel_size')
    stride = operation.pair('stride') if operation.arguments.get('stride') else kernel
    dilation = operation.pair('dilation') if 'dilation' in operation.arguments else (1, 1)
    padding = operation.pair('padding')
    placed = [_slid(axis, stride[n], dilation[n] * (kernel[n] - 1) / 2 - padding[n])
              for n, axis in enumerate(axes[-2:])]  # fmt: skip
    return (*axes[:-2], *placed)


def _resized(operation: Operation, places: Places) -> Axes:
    """An axis of `before` indices is stretched to `after` indices from edge to edge; with
    `align_corners` too, as well as that can be known."""
    source = inputs_of(operation)[0]
    axes, placed = _of_tensor(places, source), []
    for number in (-2, -1):
        stride = source.length(number) / operation.length(number)
        placed.append(_slid(axes[number], stride, stride / 2 - 0.5))
    return (*axes[:-2], *placed)


def _padded(operation: Operation, places: Places) -> Axes:
    source = inputs_of(operation)[0]
    axes = list(_of_tensor(places, source))
    amounts = operation.numbers('pad' if 'pad' in operation.arguments else 'padding')
    for number, before in enumerate(amounts[::2], start=1):
        axes[-number] = _slid(axes[-number], 1, -before)
    return tuple(axes)


def _sliced(operation: Operation, places: Places) -> Axes:
    source = operation.tensor('self')
    axes = list(_of_tensor(places, source))
    number = operation.number('dim', 0) % len(axes)
    start, step = operation.number('start', 0), operation.number('step', 1)
    if isinstance(axes[number], Axis):
        start = start + source.length(number) if start < 0 else start
        axes[number] = _slid(axes[number], step, max(0, start))
    return tuple(axes)


def _narrowed(operation: Operation, places: Places) -> Axes:
    axes = list(_of_tensor(places, operation.tensor('self')))
    number = operation.number('dim') % len(axes)
    axes[number] = _slid(axes[number], 1, operation.number('start'))
    return tuple(axes)


def _selected(operation: Operation, places: Places) -> Axes:
    axes = _of_tensor(places, operation.tensor('self'))
    number = operation.number('dim') % len(axes)
    return axes[:number] + axes[number + 1 :]


def _catenated(operation: Operation, places: Places) -> Axes:
    sources = [source for source in operation.tensors('tensors')
               if len(source.axes) == len(operation.axes)]  # fmt: skip
    number = operation.number('dim', 0) % len(operation.axes)
    tensors = [_of_tensor(places, source) for source in sources]
    axes = _joined_all(tensors, operation.axes)
    axes[number] = LOST if any(tensor[number] is not None for tensor in tensors) else None
    return tuple(axes)


def _stacked(operation: Operation, places: Places) -> Axes:
    number = operation.number('dim', 0) % len(operation.axes)
    tensors = [_of_tensor(places, source) for source in operation.tensors('tensors')]
    lengths = operation.axes[:number] + operation.axes[number + 1 :]
    axes = _joined_all(tensors, lengths)
    return (*axes[:number], None, *axes[number:])


def _permuted(operation: Operation, places: Places) -> Axes:
    axes = _of_tensor(places, operation.tensor('self'))
    return tuple(axes[dim] for dim in operation.numbers('dims'))


def _transposed(operation: Operation, places: Places) -> Axes:
    axes = list(_of_tensor(places, operation.tensor('self')))
    a, b = operation.number('dim0'), operation.number('dim1')
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _unsqueezed(operation: Operation, places: Places) -> Axes:
    axes = _of_tensor(places, operation.tensor('self'))
    number = operation.number('dim') % len(operation.axes)
    return (*axes[:number], None, *axes[number:])


def _squeezed(operation: Operation, places: Places) -> Axes:
    source = operation.tensor('self')
    axes = _of_tensor(places, source)
    dims = operation.arguments.get('dim')
    chosen = (
        range(len(axes)) if dims is None else [dim % len(axes) for dim in operation.numbers('dim')]
    )
    removed = {dim for dim in chosen if source.axes[dim] == 1}
    return tuple(axis for number, axis in enumerate(axes) if number not in removed)


def _reduced(operation: Operation, places: Places) -> Axes:
    axes = _of_tensor(places, operation.tensor('self'))
    if operation.arguments.get('dim') in (None, []):
        return (None,) * len(operation.axes)
    dims = {dim % len(axes) for dim in operation.numbers('dim')}
    if operation.arguments.get('keepdim'):
        return tuple(None if n in dims else axis for n, axis in enumerate(axes))
    return tuple(axis for n, axis in enumerate(axes) if n not in dims)


def _shuffled(operation: Operation, places: Places) -> Axes:
    """Each index becomes a block of `factor` indices; or each block becomes an index."""
    axes = _of_tensor(places, operation.tensor('self'))
    if operation.kind == 'pixel_shuffle':
        factor = 1 / operation.number('upscale_factor')
    else:
        factor = float(operation.number('downscale_factor'))
    return (*axes[:-2], *(_slid(axis, factor, factor / 2 - 0.5) for axis in axes[-2:]))


def _reshaped(operation: Operation, places: Places) -> Axes:
    """Axes at both ends that stay keep their places; in between they are lost."""
    source = inputs_of(operation)[0]
    before, after, axes = source.axes, operation.axes, _of_tensor(places, source)
    front = 0
    while front < min(len(before), len(after)) and before[front] == after[front]:
        front += 1
    back = 0
    while back < min(len(before), len(after)) - front and before[-1 - back] == after[-1 - back]:
        back += 1
    middle = axes[front : len(axes) - back]
    lost = LOST if any(axis is not None for axis in middle) else None
    kept = axes[len(axes) - back :]
    return (*axes[:front], *(lost,) * (len(after) - front - back), *kept)


def _linear(operation: Operation, places: Places) -> Axes:
    axes = _of_tensor(places, operation.tensor('input'))
    return (*axes[:-1], LOST if axes[-1] is not None else None)


def _item(operation: Operation, places: Places) -> Axes:
    """One of several results, all of which have the places of the operation that gives them."""
    return places[inputs_of(operation)[0]]


def _along(operation: Operation, places: Places) -> Axes:
    """An operation that says along which axes it works, `dim` or `dims`: the others stay."""
    name = 'dims' if 'dims' in operation.arguments else 'dim'
    if operation.arguments.get(name) is None:
        raise NotExportable('it works along all axes')
    axes = _of_tensor(places, inputs_of(operation)[0])
    along = {dim % len(axes) for dim in operation.numbers(name)}
    if operation.shape is not None and len(operation.shape) == len(axes) - len(along):
        return tuple(axis for n, axis in enumerate(axes) if n not in along)
    return tuple((LOST if axis is not None else None) if n in along else axis
                 for n, axis in enumerate(axes))  # fmt: skip


def _unknown(operation: Operation, places: Places) -> Axes:
    """An operation that is not known here: what depends on places has none afterwards."""
    known = [places[source] for source in inputs_of(operation) if source.shape is not None]
    depends = any(axis is not None for axes in known for axis in axes)
    lost = LOST if depends else None
    return tuple(None if length in (1, None) else lost for length in operation.axes)


RULES: dict[str, Rule] = {
    'conv2d': _convolution,
    'conv_transpose2d': _transposed_convolution,
    **dict.fromkeys(('max_pool2d', 'avg_pool2d', 'max_pool2d_with_indices'), _pooling),
    **dict.fromkeys(('upsample_nearest2d', 'upsample_bilinear2d', 'upsample_bicubic2d',
                     'adaptive_avg_pool2d', '_adaptive_avg_pool2d', 'adaptive_max_pool2d',
                     '_upsample_nearest_exact2d', '_upsample_bilinear2d_aa'), _resized),
    **dict.fromkeys(('pad', 'constant_pad_nd', 'reflection_pad2d', 'replication_pad2d'), _padded),
    'slice': _sliced,
    'narrow': _narrowed,
    'select': _selected,
    'cat': _catenated,
    'concat': _catenated,
    'stack': _stacked,
    'permute': _permuted,
    'transpose': _transposed,
    'unsqueeze': _unsqueezed,
    'squeeze': _squeezed,
    **dict.fromkeys(('sum', 'mean', 'amax', 'amin'), _reduced),
    **dict.fromkeys(('pixel_shuffle', 'pixel_unshuffle'), _shuffled),
    **dict.fromkeys(('view', 'reshape', '_unsafe_view', 'flatten', 'unflatten'), _reshaped),
    'linear': _linear,
    'getitem': _item,
    **dict.fromkeys(('batch_norm', 'instance_norm', 'group_norm', 'layer_norm', 'softmax',
                     '_softmax', 'log_softmax', 'prelu', 'dropout', 'feature_dropout', 'clone',
                     'contiguous', 'to', '_to_copy', 'detach', 'native_group_norm',
                     'native_layer_norm', '_native_batch_norm_legit_no_training', 'expand',
                     'hardswish', 'log_sigmoid', 'alias', 'channel_shuffle',
                     'native_channel_shuffle'), _as_the_first),
}  # fmt: skip


def _axes_of(operation: Operation, places: Places) -> Axes:
    """The axes of an operation's result."""
    axes, _ = attempt(partial(_rule_of(operation), operation, places), NotExportable, ValueError)
    if axes is not None and len(axes) == len(operation.axes):
        return axes
    return _unknown(operation, places)


def _rule_of(operation: Operation) -> Rule:
    if operation.kind in RULES:
        return RULES[operation.kind]
    if torch.Tag.pointwise in getattr(operation.target, 'tags', ()):
        return _place_by_place
    tensors = [source for source in inputs_of(operation) if source.shape is not None]
    says_axes = len(tensors) == 1 and {'dim', 'dims'} & operation.arguments.keys()
    return _along if says_axes else _unknown


def axes_of_output(graph: Graph) -> Axes:
    """Where the axes of a graph's output lie."""
    places: Places = {}
    for operation in graph.operations:
        if operation is graph.image:
            places[operation] = (None, None, *(Axis(rows, 1.0, 0.0, 1.0) for rows in (True, False)))
        elif operation.shape is None:  # several results, or a number
            places[operation] = _of_several(operation, places)
        elif operation.target is None:  # a constant
            places[operation] = (None,) * len(operation.axes)
        else:
            places[operation] = _axes_of(operation, places)
    return _of_tensor(places, graph.output)


def _of_several(operation: Operation, places: Places) -> Axes:
    """The axes that all results of an operation share, if it gives several."""
    rule = _rule_of(operation)
    if rule not in (_pooling, _as_the_first, _along):
        return ()
    axes, _ = attempt(partial(rule, operation, places), NotExportable, ValueError)
    return axes or ()


# --------------------------------------------------------------------------- the place of the map


class _RawMap(nn.Module):
    """A network whose result is its logit map, in the map's size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return segmentation_logits(output_of(self.network, x), x.shape[-2:])


def _span(axis: Axis, length: int, size: int) -> tuple[int, int]:
    """From which pixel of the image to which an axis with so many indices reaches, edge to edge;
    (0, size) where that is the whole image, to an index. size: of the image."""
    start, extent = axis.start(), axis.scale * length
    slack = max(axis.scale, 1.0)
    if axis.scale != 1 and abs(start) < slack and abs(start + extent - size) < slack:
        return 0, size
    first = math.floor(start + 0.5)
    return first, first + round(extent)


def place_of_map(
    network: nn.Module, example: torch.Tensor, logits: torch.Tensor
) -> tuple[Place | None, str]:
    """Where the logit map of a network lies in its input: its rows and its columns, None if it
    shows the whole input; and a note on that, empty where nothing was to be decided.

    network: frozen. example: (1, C, H, W). logits: its logit map, (1, K, h, w)."""
    size, own = tuple(example.shape[-2:]), tuple(logits.shape[-2:])
    if own == size or own == (1, 1):
        return None, ''
    begin = f'the map of the network has {own[1]}×{own[0]} pixels, its input {size[1]}×{size[0]}: '
    graph, reason = attempt(partial(trace, _RawMap(network), example), NotExportable)
    axes = (LOST, LOST) if graph is None else axes_of_output(graph)[-2:]
    spans = [_span(axis, length, whole) for axis, length, whole in zip(axes, own, size, strict=True)
             if isinstance(axis, Axis)]  # fmt: skip
    pairs = zip(spans, size, strict=False)
    meets = all(stop > 0 and start < whole for (start, stop), whole in pairs)
    turned = [axis.rows for axis in axes if isinstance(axis, Axis)] == [False, True]
    if len(spans) < 2 or turned or not meets:
        why = f' ({reason})' if reason else ''
        return None, (
            f'{begin}it was fitted to the whole input, since the operations of the network do not '
            f'tell which part of the input it shows{why}; where it shows a part, wrap the network '
            'so that it pads its map'
        )
    rows, columns = spans
    if (rows, columns) == ((0, size[0]), (0, size[1])):
        return None, ''
    beside = min(rows[0], columns[0]) > 0 or rows[1] < size[0] or columns[1] < size[1]
    return (rows, columns), (
        f'{begin}by its kernels, strides and paddings it shows rows {rows[0]} to {rows[1] - 1} and '
        f'columns {columns[0]} to {columns[1] - 1} of the input, and lies there'
        + ('; pixels beside it have no prediction' if beside else '')
    )
