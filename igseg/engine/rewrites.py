"""Exact rewrites that make a network's graph faster, and the operations that they put into it.

Constants are computed once. Batch norms and padding are folded into convolutions. The gradient of
a convolution with stride 1 is computed as a forward convolution. Weights are stored channels_last,
and packed in the order of oneDNN.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from igseg.engine.private_torch import convolve_packed, packed_weight
from igseg.engine.trace import Graph, Operation, Pads, Shape, Sliding, call_of, inputs_of
from igseg.errors import attempt

aten = torch.ops.aten

# Weights are packed for maps of at most so many pixels. On larger maps the time to rearrange the
# weights does not count.
PACKED_PIXELS = 32 * 32
KEPT_PACKED = 2  # packed copies of the same weights: for a single image, and for a step batch


@dataclass(frozen=True)
class Rewrites:
    """How many operations each rewrite has changed."""

    folded: int  # batch norms folded into convolutions
    padded: int  # paddings folded into convolutions
    transposed: int  # convolutions whose gradient is computed as a forward convolution


# --------------------------------------------------------------------------- what runs


class Kernel:
    """The weights of a convolution, also packed in the order of oneDNN, so that they are not
    rearranged in every pass. This order depends on the shape of the map, batch included."""

    def __init__(
        self, weight: torch.Tensor, sliding: Sliding | None = None, shape: Shape = ()
    ) -> None:
        """weight: (O, I / groups, h, w). sliding: how the kernel slides over the whole map. shape:
        of this map. Weights are packed only where the map is small."""
        self.weight, self.sliding = weight, sliding
        sizes = [size for size in shape[1:] if size is not None]
        small = len(sizes) == len(shape[1:]) and math.prod(sizes[1:]) <= PACKED_PIXELS
        supported = weight.device.type == 'cpu' and weight.dtype != torch.float64
        packs = sliding is not None and small and supported and not sliding.uneven
        self.shape = tuple(sizes) if packs else ()
        self.packed: dict[int, torch.Tensor] = {}  # by the number of maps

    def for_map(self, x: torch.Tensor, sliding: Sliding) -> torch.Tensor:
        """The weights for maps (N, I, rows, columns). Packed weights are used only for the shape
        that they were packed for: oneDNN would rearrange them again, up to 100 times slower."""
        count = len(x)
        # Step batches are powers of two; a batch of another size occurs only once.
        if x.shape[1:] != self.shape or count.bit_count() != 1 or sliding != self.sliding:
            return self.weight
        if count in self.packed:
            return self.packed[count]

        def reorder() -> torch.Tensor:
            return packed_weight(
                self.weight, sliding.even, sliding.stride, sliding.dilation, sliding.groups, x.shape
            )

        packed, _ = attempt(reorder, AttributeError, RuntimeError)
        while len(self.packed) >= KEPT_PACKED:
            del self.packed[next(iter(self.packed))]
        self.packed[count] = self.weight if packed is None else packed
        return self.packed[count]


def _convolve(
    x: torch.Tensor, kernel: Kernel, bias: torch.Tensor | None, sliding: Sliding
) -> torch.Tensor:
    """A convolution whose padding may differ from side to side."""
    weight = kernel.for_map(x, sliding)
    x = F.pad(x, sliding.uneven) if sliding.uneven else x
    if weight.is_mkldnn and x.dtype == weight.dtype:
        return convolve_packed(
            x, weight, bias, sliding.even, sliding.stride, sliding.dilation, sliding.groups
        )
    weight = kernel.weight
    return F.conv2d(x, weight, bias, sliding.stride, sliding.even, sliding.dilation, sliding.groups)


def _strided_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, shape: Sequence[int], sliding: Sliding
) -> torch.Tensor:
    """The gradient of `_convolve` with respect to its input, which has this shape."""
    reduced = gradient.dtype in (torch.bfloat16, torch.float16)
    if reduced and gradient.device.type == 'cpu' and sliding.groups == shape[1] > 1:
        # oneDNN has no fast kernel for depthwise convolutions in reduced precision: they take 4 to
        # 50 times as long as in single precision.
        wide = _strided_gradient(gradient.float(), weight.float(), shape, sliding)
        return wide.to(gradient.dtype)
    common = [min(side) for side in sliding.pads]
    pairs = zip(sliding.pads, common, strict=True)
    (top, bottom), (left, right) = ((a - p, b - p) for (a, b), p in pairs)
    height, width = shape[2] + top + bottom, shape[3] + left + right
    padded = torch.empty(  # only the shape and the layout matter
        (*shape[:2], height, width), dtype=gradient.dtype, device=gradient.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    result = aten.convolution_backward(
        gradient, padded, weight, None, sliding.stride, common, sliding.dilation, False, [0, 0],
        sliding.groups, [True, False, False],
    )[0]  # fmt: skip
    return result[:, :, top : height - bottom, left : width - right]


class _Convolution(torch.autograd.Function):
    """A convolution with fixed weights. Its input is not kept for the backward pass. With stride 1
    its gradient is computed as a convolution, since forward kernels are faster than backward ones.
    """

    @staticmethod
    def forward(ctx, x, kernel, flipped, bias, sliding):
        ctx.fixed = kernel.weight, flipped, sliding, x.shape
        return _convolve(x, kernel, bias, sliding)

    @staticmethod
    def backward(ctx, gradient):
        weight, flipped, sliding, shape = ctx.fixed
        gradient = gradient.to(weight.dtype)
        if flipped is not None:
            return _convolve(gradient, flipped, None, sliding.back), None, None, None, None
        return _strided_gradient(gradient, weight, shape, sliding), None, None, None, None


def convolution(
    input: torch.Tensor,
    weight: Kernel,
    bias: torch.Tensor | None,
    sliding: Sliding,
    flipped: Kernel | None,
) -> torch.Tensor:
    """A convolution with fixed weights, see `_Convolution`."""
    if torch.is_grad_enabled() and input.requires_grad:
        return _Convolution.apply(input, weight, flipped, bias, sliding)
    return _convolve(input, weight, bias, sliding)


def convolution_with_computed_weight(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sliding: Sliding
) -> torch.Tensor:
    """A convolution whose weights are computed from the image, with the gradient of PyTorch."""
    return _convolve(input, Kernel(weight), bias, sliding)


def pixel_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A convolution of maps of one pixel, (N, I, 1, 1) -> (N, O, 1, 1)."""
    return F.linear(input.flatten(1), weight.flatten(1), bias)[..., None, None]


class _PixelMean(torch.autograd.Function):
    """The mean over rows and columns; its gradient is the same at every pixel."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.mean(dim=(2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        return (gradient / math.prod(ctx.shape[2:])).expand(ctx.shape)


def pixel_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over rows and columns, (N, C, h, w) -> (N, C, 1, 1)."""
    return _PixelMean.apply(x)


# --------------------------------------------------------------------------- rewrites


def compute_constants(graph: Graph) -> None:
    """Compute once every operation that depends neither on the image nor on random numbers."""
    for operation in list(graph.operations):
        sources = inputs_of(operation)
        if (
            operation.target is None
            or not all(source in graph.constants for source in sources)
            or torch.Tag.nondeterministic_seeded in getattr(operation.target, 'tags', ())
            or operation.kind.startswith('empty')
        ):
            continue
        value = call_of(operation)(*(graph.constants[source] for source in sources))
        if isinstance(value, torch.Tensor):
            operation.kind, operation.target, operation.arguments = 'constant', None, {}
            graph.constants[operation] = value


def _copied(self: torch.Tensor, src: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    """The result of `aten.copy`: `src` with the type and the shape of `self`."""
    return src.to(self.dtype).expand(self.shape)


def _takes_all(operation: Operation) -> bool:
    """Whether a slice is the whole axis."""
    start, end = operation.arguments['start'], operation.arguments['end']
    size = operation.tensor('self').axes[operation.number('dim')]
    if not isinstance(start or 0, int) or not isinstance(end, int | None):
        return False
    to_the_end = end is None or end >= (sys.maxsize if size is None else size)
    return not start and to_the_end and operation.arguments['step'] == 1


def remove_identities(graph: Graph) -> None:
    """Remove operations that change nothing: dropout in evaluation mode, slices that take
    everything, and copies, since no operation writes in place."""
    for operation in list(graph.operations):
        idle = operation.arguments.get('train') is False and 'dropout' in operation.kind
        idle = idle or (operation.kind == 'slice' and _takes_all(operation))
        if idle or operation.kind in ('clone', 'contiguous', 'lift_fresh_copy', 'alias'):
            graph.replace(operation, inputs_of(operation)[0])
        elif operation.kind == 'copy':  # which has no derivative
            operation.target = _copied
        elif operation.kind in ('view', '_unsafe_view'):  # which fails for another memory layout
            operation.kind, operation.target = 'reshape', aten.reshape.default
            operation.arguments = dict(
                zip(('self', 'shape'), operation.arguments.values(), strict=True)
            )


def _kernel_of(convolution: Operation) -> tuple[int, int]:
    """Rows and columns of the kernel of a convolution."""
    weight = convolution.tensor('weight')
    return weight.length(2), weight.length(3)


def _pads_of(convolution: Operation) -> Pads:
    """The padding of a convolution before and after the rows, and the columns."""
    padding = convolution.arguments['padding']
    if padding == 'same':
        kernel = _kernel_of(convolution)
        totals = [d * (k - 1) for d, k in zip(convolution.pair('dilation'), kernel, strict=True)]
        rows, columns = ((total // 2, total - total // 2) for total in totals)
        return rows, columns
    above, left = (0, 0) if padding == 'valid' else convolution.pair('padding')
    return (above, above), (left, left)


def merge_sliding(graph: Graph) -> None:
    """Replace stride, padding, dilation and groups of each convolution by one argument `sliding`,
    which holds the padding of all four sides as numbers."""
    for operation in graph.operations:
        if operation.kind == 'conv2d':
            sliding = Sliding(
                kernel=_kernel_of(operation),
                stride=operation.pair('stride'),
                pads=_pads_of(operation),
                dilation=operation.pair('dilation'),
                groups=operation.number('groups'),
            )
            for name in ('stride', 'padding', 'dilation', 'groups'):
                del operation.arguments[name]
            operation.arguments['sliding'] = sliding


def _scale_and_shift(graph: Graph, norm: Operation) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm as a factor and a summand, (channels,) float64 each. They are on the CPU, since
    MPS has no double precision."""
    values = {
        name: graph.constants[value].cpu().double()
        for name, value in norm.arguments.items()
        if isinstance(value, Operation) and value in graph.constants
    }
    epsilon = norm.arguments['eps']
    assert isinstance(epsilon, float)  # by the schema of a batch norm
    scale = 1 / (values['running_var'] + epsilon).sqrt()
    shift = -values['running_mean'] * scale
    scale, shift = (v * values['weight'] if 'weight' in values else v for v in (scale, shift))
    return scale, shift + values['bias'] if 'bias' in values else shift


def fold(
    graph: Graph, convolution: Operation, axis: int, scale: torch.Tensor, shift: torch.Tensor
) -> None:
    """Give a convolution new weights that scale and shift its result.

    axis: the axis of the weight with the output's channels. scale, shift: (channels,) float64, CPU.
    """
    weight = graph.constants[convolution.tensor('weight')]
    if convolution.arguments['bias'] is not None:
        bias = graph.constants[convolution.tensor('bias')]
        shift = shift + bias.cpu().double() * scale
    shape = [-1 if number == axis else 1 for number in range(4)]
    scaled = weight.cpu().double() * scale.view(shape)
    convolution.arguments['weight'] = graph.constant(scaled.to(weight))
    convolution.arguments['bias'] = graph.constant(shift.to(weight))


def fold_batch_norms(graph: Graph) -> int:
    """Fold batch norms with fixed statistics into the weights of the convolution before them. A
    batch norm after another operation, or after a convolution that has more readers, becomes a
    product and a sum. Returns how many were folded."""
    folded, readers = 0, graph.readers()
    for norm in [o for o in graph.operations if o.kind == 'batch_norm']:
        fixed = not norm.arguments['training'] and norm.arguments['running_mean'] is not None
        if not fixed or len(norm.axes) != 4:
            continue
        scale, shift = _scale_and_shift(graph, norm)
        source = norm.tensor('input')
        axis = {'conv2d': 0, 'conv_transpose2d': 1}.get(source.kind)
        single = len(readers[source]) == 1 and (axis == 0 or source.arguments.get('groups') == 1)
        if axis is not None and single and source.tensor('weight') in graph.constants:
            fold(graph, source, axis, scale, shift)
            graph.replace(norm, source)
            readers[source] = readers[norm]
            folded += 1
        else:
            like = graph.constants[norm.tensor('running_mean')]
            factor, offset = (graph.constant(v.view(1, -1, 1, 1).to(like)) for v in (scale, shift))
            norm.kind, norm.target = 'addcmul', aten.addcmul.default
            norm.arguments = {'self': offset, 'tensor1': source, 'tensor2': factor}
    return folded


def _zeros_around(padding: Operation) -> tuple[int, int, int, int] | None:
    """How many zeros a padding puts on the left, on the right, above and below a map; None where
    the padding is of another kind."""
    arguments, sides = padding.arguments, padding.arguments['pad']
    zeros = arguments.get('mode', 'constant') == 'constant' and not (arguments.get('value') or 0)
    if not zeros or not isinstance(sides, (list, tuple)):
        return None
    amounts = [side for side in sides if isinstance(side, int) and side >= 0]
    if len(amounts) < len(sides) or len(amounts) > 4 or len(padding.axes) != 4:
        return None
    left, right, top, bottom = (*amounts, 0, 0, 0, 0)[:4]
    return left, right, top, bottom


def fold_padding(graph: Graph) -> int:
    """Fold zeros around a tensor into the padding of the convolution that reads it, also where
    they differ from side to side. Returns how many paddings were removed."""
    removed, readers = 0, graph.readers()
    for padding in [o for o in graph.operations if o.kind in ('pad', 'constant_pad_nd')]:
        sides = _zeros_around(padding)
        if sides is None:
            continue
        left, right, top, bottom = sides
        for reader in readers[padding]:
            if reader.kind == 'conv2d':
                sliding = reader.sliding()
                (a, b), (c, d) = sliding.pads
                pads = (a + top, b + bottom), (c + left, d + right)
                reader.arguments['sliding'] = replace(sliding, pads=pads)
                reader.arguments['input'] = padding.tensor('self')
        if all(reader.kind == 'conv2d' for reader in readers[padding]):
            graph.operations.remove(padding)
            removed += 1
    return removed


def average_to_a_pixel(graph: Graph) -> None:
    """Replace averages over a whole map by `pixel_mean`, whose gradient is not stored as a map."""
    for operation in graph.operations:
        arguments, shape = operation.arguments, operation.shape or ()
        if len(shape) != 4 or None in shape[2:]:
            continue
        pooled = operation.kind == 'adaptive_avg_pool2d' and shape[2:] == (1, 1)
        mean = operation.kind == 'mean' and arguments.get('keepdim') and not arguments.get('dtype')
        axes = operation.numbers('dim') if mean and arguments['dim'] is not None else []
        if pooled or sorted(axis % 4 for axis in axes) == [2, 3]:
            operation.kind, operation.target = 'pixel_mean', pixel_mean
            operation.arguments = {'x': arguments['self']}


def flipped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weights with which a convolution computes the gradient of a stride-1 convolution:
    (O, I / groups, h, w) -> (I, O / groups, h, w)."""
    outputs, inputs, height, width = weight.shape
    grouped = weight.view(groups, outputs // groups, inputs, height, width).transpose(1, 2)
    return grouped.reshape(groups * inputs, outputs // groups, height, width).flip(2, 3)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _use_fixed_convolution(graph: Graph, operation: Operation, sliding: Sliding) -> bool:
    """Let a convolution with fixed weights run as `convolution`. Returns whether its gradient is
    computed as a forward convolution."""
    weight = graph.constants[operation.tensor('weight')]
    operation.target = convolution
    kernel = graph.constant(_channels_last(weight))
    graph.kernels[kernel] = sliding, operation.tensor('input').axes
    operation.arguments |= {'weight': kernel, 'flipped': None}
    if sliding.stride != (1, 1):
        return False
    back = graph.constant(_channels_last(flipped(weight, sliding.groups)))
    graph.kernels[back] = sliding.back, operation.axes
    operation.arguments['flipped'] = back
    return True


def _is_of_a_pixel(operation: Operation, sliding: Sliding) -> bool:
    """Whether a convolution turns a map of one pixel into a map of one pixel, as in
    squeeze-and-excitation."""
    shapes = (operation.tensor('input').axes[2:], operation.axes[2:], sliding.kernel)
    return sliding.groups == 1 and all(shape == (1, 1) for shape in shapes)


def use_fixed_convolutions(graph: Graph) -> int:
    """Let convolutions with fixed weights run as `convolution`, and those on a single pixel as
    products of matrices. Returns how many have a gradient that is a forward convolution."""
    transposed = 0
    for operation in [o for o in graph.operations if o.kind == 'conv2d']:
        sliding = operation.sliding()
        if operation.tensor('weight') not in graph.constants or len(operation.axes) != 4:
            operation.target = convolution_with_computed_weight
        elif _is_of_a_pixel(operation, sliding):
            operation.kind, operation.target = 'pixel_linear', pixel_linear
            del operation.arguments['sliding']
        else:
            transposed += _use_fixed_convolution(graph, operation, sliding)
    return transposed


def rewrite(graph: Graph) -> Rewrites:
    """Apply all rewrites, in place, one after the other."""
    compute_constants(graph)
    remove_identities(graph)
    merge_sliding(graph)
    folded = fold_batch_norms(graph)
    padded = fold_padding(graph)
    average_to_a_pixel(graph)
    transposed = use_fixed_convolutions(graph)
    return Rewrites(folded, padded, transposed)
