"""Exact rewrites of a network's graph that make it faster, and what runs in their place.

Constants are computed once; batch norms and padding are folded into convolutions; stride-1
convolutions get their gradient as a forward convolution; weights are channels_last, and packed.
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

PACKED_PIXELS = 32 * 32  # of a map; beyond, rearranging its weights is nothing
KEPT_PACKED = 2  # orders of the same weights: for one image, and for a step batch


@dataclass(frozen=True)
class Rewrites:
    """How many operations each rewrite has changed."""

    folded: int  # batch norms folded into convolutions
    padded: int  # paddings folded into convolutions
    transposed: int  # convolutions whose gradient is computed as a forward convolution


# --------------------------------------------------------------------------- what runs


class Kernel:
    """A convolution's weights, and the same in the order that oneDNN computes with, so that they
    are not rearranged in every pass. That order depends on the map's shape, batch included."""

    def __init__(self, weight: torch.Tensor, how: Sliding | None = None, shape: Shape = ()) -> None:
        """weight: (O, I / groups, h, w). how, shape: of the whole map that they are used on, where
        packing them pays: where the map is small beside them."""
        self.weight, self.how = weight, how
        sizes = [size for size in shape[1:] if size is not None]
        small = len(sizes) == len(shape[1:]) and math.prod(sizes[1:]) <= PACKED_PIXELS
        runs = weight.device.type == 'cpu' and weight.dtype != torch.float64
        self.shape = tuple(sizes) if how and small and runs and not how.uneven else ()
        self.packed: dict[int, torch.Tensor] = {}  # by the number of maps

    def for_map(self, x: torch.Tensor, how: Sliding) -> torch.Tensor:
        """The weights with which maps (N, I, rows, columns) are convolved. Packed otherwise than
        oneDNN wants them they would be rearranged all the same, up to a hundred times slower."""
        count = len(x)
        # Step batches are powers of two; what is left over comes once.
        if x.shape[1:] != self.shape or count.bit_count() != 1 or how != self.how:
            return self.weight
        if count in self.packed:
            return self.packed[count]

        def reorder() -> torch.Tensor:
            return packed_weight(
                self.weight, how.even, how.stride, how.dilation, how.groups, x.shape
            )

        found, _ = attempt(reorder, AttributeError, RuntimeError)
        while len(self.packed) >= KEPT_PACKED:
            del self.packed[next(iter(self.packed))]
        self.packed[count] = self.weight if found is None else found
        return self.packed[count]


def _convolve(
    x: torch.Tensor, kernel: Kernel, bias: torch.Tensor | None, how: Sliding
) -> torch.Tensor:
    """A convolution with its own padding on each side."""
    weight = kernel.for_map(x, how)
    x = F.pad(x, how.uneven) if how.uneven else x
    if weight.is_mkldnn and x.dtype == weight.dtype:
        return convolve_packed(x, weight, bias, how.even, how.stride, how.dilation, how.groups)
    weight = kernel.weight
    return F.conv2d(x, weight, bias, how.stride, how.even, how.dilation, how.groups)


def _strided_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, shape: Sequence[int], how: Sliding
) -> torch.Tensor:
    """The gradient of `_convolve` with respect to an input of that shape."""
    reduced = gradient.dtype in (torch.bfloat16, torch.float16)
    if reduced and gradient.device.type == 'cpu' and how.groups == shape[1] > 1:
        # oneDNN has no fast kernel for these: 4 to 50 times slower than in single precision.
        wide = _strided_gradient(gradient.float(), weight.float(), shape, how)
        return wide.to(gradient.dtype)
    both = [min(side) for side in how.pads]
    pairs = zip(how.pads, both, strict=True)
    (top, bottom), (left, right) = ((a - p, b - p) for (a, b), p in pairs)
    height, width = shape[2] + top + bottom, shape[3] + left + right
    padded = torch.empty(  # only its shape and layout count
        (*shape[:2], height, width), dtype=gradient.dtype, device=gradient.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    result = aten.convolution_backward(
        gradient, padded, weight, None, how.stride, both, how.dilation, False, [0, 0], how.groups,
        [True, False, False],
    )[0]  # fmt: skip
    return result[:, :, top : height - bottom, left : width - right]


class _Convolution(torch.autograd.Function):
    """A convolution with fixed weights: its input need not be kept, and with stride 1 its gradient
    is a convolution too, since forward kernels are faster than backward ones."""

    @staticmethod
    def forward(ctx, x, kernel, flipped, bias, how):
        ctx.fixed = kernel.weight, flipped, how, x.shape
        return _convolve(x, kernel, bias, how)

    @staticmethod
    def backward(ctx, gradient):
        weight, flipped, how, shape = ctx.fixed
        gradient = gradient.to(weight.dtype)
        if flipped is not None:
            return _convolve(gradient, flipped, None, how.back), None, None, None, None
        return _strided_gradient(gradient, weight, shape, how), None, None, None, None


def convolution(
    input: torch.Tensor,
    weight: Kernel,
    bias: torch.Tensor | None,
    how: Sliding,
    flipped: Kernel | None,
) -> torch.Tensor:
    """A convolution with fixed weights, see `_Convolution`."""
    if torch.is_grad_enabled() and input.requires_grad:
        return _Convolution.apply(input, weight, flipped, bias, how)
    return _convolve(input, weight, bias, how)


def convolution_with_computed_weight(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: Sliding
) -> torch.Tensor:
    """A convolution whose weights follow from the image, with its ordinary gradient."""
    return _convolve(input, Kernel(weight), bias, how)


def pixel_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A convolution of maps of one pixel, (N, I, 1, 1) -> (N, O, 1, 1)."""
    return F.linear(input.flatten(1), weight.flatten(1), bias)[..., None, None]


class _PixelMean(torch.autograd.Function):
    """The mean over rows and columns; its gradient is the same everywhere."""

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
    """What depends on neither the image nor chance is computed once."""
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
    """What `aten.copy` gives: one tensor with the type and the shape of another."""
    return src.to(self.dtype).expand(self.shape)


def _takes_all(operation: Operation) -> bool:
    """Whether a slice leaves nothing out."""
    start, end = operation.arguments['start'], operation.arguments['end']
    size = operation.tensor('self').axes[operation.number('dim')]
    if not isinstance(start or 0, int) or not isinstance(end, int | None):
        return False
    beyond = end is None or end >= (sys.maxsize if size is None else size)
    return not start and beyond and operation.arguments['step'] == 1


def leave_out_identities(graph: Graph) -> None:
    """Dropout does nothing in evaluation, and a copy has no use where nothing writes."""
    for operation in list(graph.operations):
        idle = operation.arguments.get('train') is False and 'dropout' in operation.kind
        idle = idle or (operation.kind == 'slice' and _takes_all(operation))
        if idle or operation.kind in ('clone', 'contiguous', 'lift_fresh_copy', 'alias'):
            graph.replace(operation, inputs_of(operation)[0])
        elif operation.kind == 'copy':  # has no derivative
            operation.target = _copied
        elif operation.kind in ('view', '_unsafe_view'):  # fails where the layout is another
            operation.kind, operation.target = 'reshape', aten.reshape.default
            operation.arguments = dict(
                zip(('self', 'shape'), operation.arguments.values(), strict=True)
            )


def _kernel_of(convolution: Operation) -> tuple[int, int]:
    """Rows and columns of the kernel of a convolution."""
    weight = convolution.tensor('weight')
    return weight.length(2), weight.length(3)


def _pads_of(convolution: Operation) -> Pads:
    """The padding of a convolution before and after the rows, the columns."""
    padding = convolution.arguments['padding']
    if padding == 'same':
        kernel = _kernel_of(convolution)
        reach = [d * (k - 1) for d, k in zip(convolution.pair('dilation'), kernel, strict=True)]
        rows, columns = ((r // 2, r - r // 2) for r in reach)
        return rows, columns
    above, left = (0, 0) if padding == 'valid' else convolution.pair('padding')
    return (above, above), (left, left)


def name_the_sliding(graph: Graph) -> None:
    """How a convolution slides stands in one argument, `how`, with its padding on all four sides
    as numbers."""
    for operation in graph.operations:
        if operation.kind == 'conv2d':
            how = Sliding(
                kernel=_kernel_of(operation),
                stride=operation.pair('stride'),
                pads=_pads_of(operation),
                dilation=operation.pair('dilation'),
                groups=operation.number('groups'),
            )
            for name in ('stride', 'padding', 'dilation', 'groups'):
                del operation.arguments[name]
            operation.arguments['how'] = how


def _scale_and_shift(graph: Graph, norm: Operation) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm as a product and a sum, in double precision on the CPU: MPS has none."""
    values = {
        name: graph.constants[value].cpu().double()
        for name, value in norm.arguments.items()
        if isinstance(value, Operation) and value in graph.constants
    }
    epsilon = norm.arguments['eps']
    assert isinstance(epsilon, float)  # as the schema of a batch norm says
    scale = 1 / (values['running_var'] + epsilon).sqrt()
    shift = -values['running_mean'] * scale
    scale, shift = (v * values['weight'] if 'weight' in values else v for v in (scale, shift))
    return scale, shift + values['bias'] if 'bias' in values else shift


def fold(
    graph: Graph, convolution: Operation, axis: int, scale: torch.Tensor, shift: torch.Tensor
) -> None:
    """Give a convolution weights of its own that scale and shift its result.

    axis: of the weight, that of the output's channels. scale, shift: (channels,) float64, CPU.
    """
    like = graph.constants[convolution.tensor('weight')]
    if convolution.arguments['bias'] is not None:
        bias = graph.constants[convolution.tensor('bias')]
        shift = shift + bias.cpu().double() * scale
    shape = [-1 if number == axis else 1 for number in range(4)]
    weight = like.cpu().double() * scale.view(shape)
    convolution.arguments['weight'] = graph.constant(weight.to(like))
    convolution.arguments['bias'] = graph.constant(shift.to(like))


def fold_batch_norms(graph: Graph) -> int:
    """A batch norm with fixed statistics that alone reads a convolution becomes part of its
    weights; another becomes a product and a sum. Returns how many were folded."""
    folded, readers = 0, graph.readers()
    for norm in [o for o in graph.operations if o.kind == 'batch_norm']:
        given = norm.arguments
        if given['training'] or given['running_mean'] is None or len(norm.axes) != 4:
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
    """The zeros that a padding puts on the left, on the right, above and below a map; None where
    it does something else."""
    given, sides = padding.arguments, padding.arguments['pad']
    zeros = given.get('mode', 'constant') == 'constant' and not (given.get('value') or 0)
    if not zeros or not isinstance(sides, (list, tuple)):
        return None
    amounts = [side for side in sides if isinstance(side, int) and side >= 0]
    if len(amounts) < len(sides) or len(amounts) > 4 or len(padding.axes) != 4:
        return None
    left, right, top, bottom = (*amounts, 0, 0, 0, 0)[:4]
    return left, right, top, bottom


def fold_padding(graph: Graph) -> int:
    """Zeros that are put around a tensor before a convolution become its padding, also where they
    differ from side to side. Returns how many paddings are gone."""
    gone, readers = 0, graph.readers()
    for padding in [o for o in graph.operations if o.kind in ('pad', 'constant_pad_nd')]:
        sides = _zeros_around(padding)
        if sides is None:
            continue
        left, right, top, bottom = sides
        for reader in readers[padding]:
            if reader.kind == 'conv2d':
                how = reader.sliding()
                (a, b), (c, d) = how.pads
                pads = (a + top, b + bottom), (c + left, d + right)
                reader.arguments['how'] = replace(how, pads=pads)
                reader.arguments['input'] = padding.tensor('self')
        if all(reader.kind == 'conv2d' for reader in readers[padding]):
            graph.operations.remove(padding)
            gone += 1
    return gone


def average_to_a_pixel(graph: Graph) -> None:
    """Averages over all of a map get a gradient that is never written out as a map."""
    for operation in graph.operations:
        given, shape = operation.arguments, operation.shape or ()
        if len(shape) != 4 or None in shape[2:]:
            continue
        pooled = operation.kind == 'adaptive_avg_pool2d' and shape[2:] == (1, 1)
        mean = operation.kind == 'mean' and given.get('keepdim') and not given.get('dtype')
        axes = operation.numbers('dim') if mean and given['dim'] is not None else []
        if pooled or sorted(axis % 4 for axis in axes) == [2, 3]:
            operation.kind, operation.target = 'pixel_mean', pixel_mean
            operation.arguments = {'x': given['self']}


def flipped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weights (O, I / groups, h, w) -> (I, O / groups, h, w) with which a stride-1 convolution
    gives the gradient of the one that has these."""
    outputs, inputs, height, width = weight.shape
    grouped = weight.view(groups, outputs // groups, inputs, height, width).transpose(1, 2)
    return grouped.reshape(groups * inputs, outputs // groups, height, width).flip(2, 3)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _use_own(graph: Graph, operation: Operation, how: Sliding) -> bool:
    """Have a convolution with fixed weights run as `convolution`. Returns whether it gets its
    gradient as a forward convolution."""
    weight = graph.constants[operation.tensor('weight')]
    operation.target = convolution
    kernel = graph.constant(_channels_last(weight))
    graph.kernels[kernel] = how, operation.tensor('input').axes
    operation.arguments |= {'weight': kernel, 'flipped': None}
    if how.stride != (1, 1):
        return False
    back = graph.constant(_channels_last(flipped(weight, how.groups)))
    graph.kernels[back] = how.back, operation.axes
    operation.arguments['flipped'] = back
    return True


def _is_of_a_pixel(operation: Operation, how: Sliding) -> bool:
    """Whether a convolution takes a map of one pixel to another, as in squeeze-and-excitation."""
    shapes = (operation.tensor('input').axes[2:], operation.axes[2:], how.kernel)
    return how.groups == 1 and all(shape == (1, 1) for shape in shapes)


def use_own_convolutions(graph: Graph) -> int:
    """Convolutions with fixed weights run as `convolution`, those of a single pixel as products of
    matrices. Returns how many of them get their gradient as a forward convolution."""
    transposed = 0
    for operation in [o for o in graph.operations if o.kind == 'conv2d']:
        how = operation.sliding()
        if operation.tensor('weight') not in graph.constants or len(operation.axes) != 4:
            operation.target = convolution_with_computed_weight
        elif _is_of_a_pixel(operation, how):
            operation.kind, operation.target = 'pixel_linear', pixel_linear
            del operation.arguments['how']
        else:
            transposed += _use_own(graph, operation, how)
    return transposed


def rewrite(graph: Graph) -> Rewrites:
    """All rewrites, in place, one after the other."""
    compute_constants(graph)
    leave_out_identities(graph)
    name_the_sliding(graph)
    folded = fold_batch_norms(graph)
    padded = fold_padding(graph)
    average_to_a_pixel(graph)
    transposed = use_own_convolutions(graph)
    return Rewrites(folded, padded, transposed)
