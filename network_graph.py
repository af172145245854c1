"""A network as a graph of operations, on which everything that makes it faster is an exact rewrite.

    export            the network once, traced by torch.export for any batch of one image size
    rewrite           one after the other (`rewrite`): constants computed, batch norms folded into
                      convolutions, padding folded into convolutions, stride-1 convolutions whose
                      gradient is a forward convolution, channels_last
    crop              for some boxes of the output, what each operation must compute (`Plan`)

*Cropping.* An output pixel depends on a box of every tensor before it. From the output to the
input, each operation says which box of its inputs it needs for a box of its result (`RULES`); one
without a rule asks for its whole inputs. Only these boxes are computed, which is exact: zero
padding stays where the tensor truly ends, and what lies outside the boxes has no gradient.

A *box* has one span for each axis of a tensor: from and to, or None for the whole axis, as always
for the batch. Several boxes of one tensor (of distant objects) stay apart while that is less work
than the one around them.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import operator
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import sympy
import torch
import torch.nn.functional as F
from torch import nn

from errors import attempt

aten = torch.ops.aten

Span = tuple[int, int] | None  # from, to; None: the whole axis
Box = tuple[Span, ...]
Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after the rows, the columns
PACKED_PIXELS = 32 * 32  # of a map; beyond, rearranging its weights is nothing
KEPT_PACKED = 2  # orders of the same weights: for one image, and for a step batch
MERGE_SLACK = 256  # pixels that two boxes may grow by to become one: an operation costs too


class NotExportable(Exception):
    """Why a network has no graph, in a sentence."""


# --------------------------------------------------------------------------- the graph


@dataclass(eq=False)
class Operation:
    """One operation, standing for its result where it is the argument of another."""

    kind: str  # the operator's name; 'image', 'constant' or 'size' for what is not computed
    target: Callable[..., object] | None
    arguments: dict[str, object]  # by the names of its schema, defaults included
    shape: tuple[int | None, ...] | None  # None: no tensor; an axis of None depends on the batch
    module: str = ''  # of the original network, which it comes from


@dataclass
class Graph:
    """Operations in an order in which they can run."""

    operations: list[Operation]
    image: Operation
    output: Operation
    constants: dict[Operation, torch.Tensor]
    sizes: dict[Operation, Callable[[int], int]]  # what follows from the number of images
    # Constants that are weights of `convolution`: how they slide, and over maps of which shape.
    kernels: dict[Operation, tuple[Sliding, tuple[int | None, ...]]] = field(default_factory=dict)

    def readers(self) -> dict[Operation, list[Operation]]:
        """Which operations read each; the output has one more reader, itself."""
        found = defaultdict(list)
        for operation in self.operations:
            for source in inputs_of(operation):
                found[source].append(operation)
        found[self.output].append(self.output)
        return found

    def constant(self, value: torch.Tensor) -> Operation:
        """A new constant."""
        operation = Operation('constant', None, {}, tuple(value.shape))
        self.operations.insert(0, operation)
        self.constants[operation] = value
        return operation

    def replace(self, old: Operation, new: Operation) -> None:
        """Have every reader of one operation read another, and leave the one out."""
        for operation in self.operations:
            operation.arguments = {
                name: [new if one is old else one for one in value]
                if isinstance(value, list)
                else new if value is old else value
                for name, value in operation.arguments.items()
            }  # fmt: skip
        self.output = new if self.output is old else self.output
        self.operations.remove(old)


def inputs_of(operation: Operation) -> list[Operation]:
    """The operations that are arguments, in the order in which `call_of` takes their values."""
    found = []
    for value in operation.arguments.values():
        found += value if isinstance(value, list) else [value]
    return [value for value in found if isinstance(value, Operation)]


def call_of(operation: Operation, **changes: object) -> Callable[..., object]:
    """The operation as a function of the values of its inputs; changes: of its other arguments."""
    arguments, target = operation.arguments | changes, operation.target
    names = [name for name, value in arguments.items() if isinstance(value, Operation)]
    if not any(isinstance(one, Operation) for value in arguments.values()
               if isinstance(value, list) for one in value):  # fmt: skip
        fixed = {name: value for name, value in arguments.items() if name not in names}
        # One of hundreds in a pass: no more is done than must be.
        return lambda *values: target(**fixed, **dict(zip(names, values, strict=True)))

    def compute(*values: object) -> object:
        left = iter(values)
        filled = {
            name: [next(left) if isinstance(one, Operation) else one for one in value]
            if isinstance(value, list)
            else next(left) if isinstance(value, Operation) else value
            for name, value in arguments.items()
        }  # fmt: skip
        return target(**filled)

    return compute


# --------------------------------------------------------------------------- export


def export(network: nn.Module, example: torch.Tensor) -> Graph:
    """The graph of a network whose result is one tensor, for batches of images like the example.

    example: (N, C, H, W). Raises NotExportable, with the reason.
    """
    try:
        with _silence(), torch.enable_grad():
            pair = example[:1].detach().repeat(2, 1, 1, 1)  # a batch of 1 would be taken for fixed
            batch = {0: torch.export.Dim('batch', min=1)}
            program = torch.export.export(network, (pair,), dynamic_shapes=(batch,), strict=False)
            try:
                return _Import(program).graph()
            except _WritesInPlace:
                return _Import(program.run_decompositions({})).graph()
    except (NotExportable, _WritesInPlace) as error:
        raise NotExportable(str(error)) from error
    except Exception as error:  # whatever stands in the network's forward
        first = next(iter(str(error).strip().splitlines()), '')
        raise NotExportable(f'{type(error).__name__}: {first[:200]}') from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What tracing says of a network that it cannot take is said in one sentence instead."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


class _WritesInPlace(Exception):
    """A tensor is changed of which there are views."""


class _Import:
    """Turns an exported program into a Graph, in which nothing is changed in place."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.operations: dict[torch.fx.Node, Operation] = {}
        self.constants: dict[Operation, torch.Tensor] = {}
        self.sizes: dict[Operation, Callable[[int], int]] = {}
        self.viewed: set[Operation] = set()  # of which there is a view, or which are one
        self.made: list[Operation] = []

    def graph(self) -> Graph:
        signature = self.program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise NotExportable('the network changes its buffers or its input')
        (image,) = signature.user_inputs
        for node in self.program.graph.nodes:
            if node.op == 'placeholder':
                self._add(node, self._source(node, image))
            elif node.op == 'call_function':
                self._call(node)
            elif node.op == 'get_attr':
                raise NotExportable('parts of the network run under no_grad or autocast')
        output = next(n for n in self.program.graph.nodes if n.op == 'output').args[0]
        if len(output) != 1:
            raise NotExportable('the network gives more than one result')
        found = next(o for o in self.made if o.kind == 'image')
        return Graph(self.made, found, self.operations[output[0]], self.constants, self.sizes)

    def _add(self, node: torch.fx.Node, operation: Operation) -> Operation:
        self.operations[node] = operation
        if operation not in self.made:
            self.made.append(operation)
        return operation

    def _source(self, node: torch.fx.Node, image: str) -> Operation:
        """The image, or a weight."""
        if node.name == image:
            operation = Operation('image', None, {}, _shape_of(node))
        else:
            signature = self.program.graph_signature
            tables = (signature.inputs_to_parameters, signature.inputs_to_buffers,
                      signature.inputs_to_lifted_tensor_constants)  # fmt: skip
            name = next(table[node.name] for table in tables if node.name in table)
            held = self.program.state_dict.get(name)
            value = self.program.constants[name] if held is None else held
            operation = Operation('constant', None, {}, tuple(value.shape))
            self.constants[operation] = value.detach()
        self.viewed.add(operation)
        return operation

    def _call(self, node: torch.fx.Node) -> None:
        value, target = node.meta.get('val'), node.target
        if isinstance(value, torch.SymInt):
            self._size(node, value)
        elif value is None or isinstance(value, torch.SymBool):
            return  # an assertion, or what it asserts
        elif target is operator.getitem:
            self._item(node)
        elif isinstance(target, torch._ops.OpOverload):
            arguments = _arguments_of(target, *self._operands((node.args, node.kwargs)))
            self._operate(node, target, arguments)
        else:
            raise NotExportable(f'the network holds {target}, which is no plain operation')

    def _size(self, node: torch.fx.Node, value: torch.SymInt) -> None:
        expression = value.node.expr
        symbols = sorted(expression.free_symbols, key=str)
        if len(symbols) > 1:
            raise NotExportable('sizes depend on more than the number of images')
        operation = self._add(node, Operation('size', None, {}, None))
        self.sizes[operation] = sympy.lambdify(symbols or [sympy.Symbol('n')], expression)

    def _operands(self, value: object) -> object:
        if isinstance(value, torch.fx.Node):
            if value not in self.operations:
                raise NotExportable(f'{value.target} is no plain value')
            return self.operations[value]
        if isinstance(value, (list, tuple)):
            return [self._operands(one) for one in value]
        if isinstance(value, dict):
            return {name: self._operands(one) for name, one in value.items()}
        return value

    def _operate(
        self, node: torch.fx.Node, target: torch._ops.OpOverload, arguments: dict[str, object]
    ) -> None:
        kind = target._schema.name.split('::')[1]
        if target._schema.is_mutable:
            kind, target, changed = self._out_of_place(kind, target, arguments)
            for other, operation in list(self.operations.items()):
                if operation is changed:  # from here on, whoever reads it reads the result
                    self.operations[other] = self._add(
                        node, self.operations.get(node) or _made(node, kind, target, arguments)
                    )
            return
        operation = self._add(node, _made(node, kind, target, arguments))
        first = next(iter(inputs_of(operation)), None)
        returns = target._schema.returns
        if (returns and returns[0].alias_info) or 'dropout' in kind or kind == 'type_as':
            self.viewed |= {operation, first}

    def _out_of_place(
        self, kind: str, target: torch._ops.OpOverload, arguments: dict[str, object]
    ) -> tuple[str, torch._ops.OpOverload, Operation]:
        """The operator that gives the result of one which writes it into its first argument."""
        written = next(iter(arguments.values()))
        packet = getattr(aten, kind.removesuffix('_'), None)
        same = getattr(packet, target._overloadname, None)
        plain = kind.endswith('_') and isinstance(written, Operation) and same is not None
        if not plain or written in self.viewed:
            raise _WritesInPlace(f'{kind} changes a tensor in place')
        return kind.removesuffix('_'), same, written

    def _item(self, node: torch.fx.Node) -> None:
        """One of an operation's results; parts of a tensor become slices of it."""
        source, index = node.args
        operation = self.operations[source]
        if operation.kind in ('split', 'split_with_sizes', 'chunk'):
            dim = operation.arguments.get('dim', 0)
            sizes = [one.shape[dim] for one in source.meta['val']]
            if any(isinstance(size, torch.SymInt) for size in sizes):
                raise NotExportable('the batch is split')
            start = sum(sizes[:index])
            arguments = {'self': inputs_of(operation)[0], 'dim': dim, 'start': start,
                         'end': start + sizes[index], 'step': 1}  # fmt: skip
            self._add(node, _made(node, 'slice', aten.slice.Tensor, arguments))
        elif operation.kind == '_native_batch_norm_legit_no_training' and index == 0:
            operation.shape = _shape_of(node)
            operation.kind, operation.target = 'batch_norm', aten.batch_norm.default
            operation.arguments |= {'training': False, 'cudnn_enabled': False}
            self._add(node, operation)
        else:
            self._add(node, _made(node, 'getitem', operator.getitem, [operation, index]))
        self.viewed |= {self.operations[node], operation}


def _made(
    node: torch.fx.Node, kind: str, target: Callable[..., object], arguments: object
) -> Operation:
    if isinstance(arguments, list):
        target, arguments = (lambda values, index: values[index]), dict(
            zip(('values', 'index'), arguments, strict=True)
        )  # fmt: skip
    stack = node.meta.get('nn_module_stack') or {}
    module = next((path for path, _ in reversed(stack.values())), '')
    return Operation(kind, target, arguments, _shape_of(node), module)


def _shape_of(node: torch.fx.Node) -> tuple[int | None, ...] | None:
    value = node.meta['val']
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(None if isinstance(size, torch.SymInt) else size for size in value.shape)


def _arguments_of(
    target: torch._ops.OpOverload, args: Sequence[object], kwargs: dict[str, object]
) -> dict[str, object]:
    """All arguments of a call by their names."""
    found = {}
    for number, argument in enumerate(target._schema.arguments):
        if number < len(args):
            found[argument.name] = args[number]
        elif argument.name in kwargs:
            found[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


# --------------------------------------------------------------------------- exact rewrites


@dataclass(frozen=True)
class Rewrites:
    """How many operations each rewrite has changed."""

    folded: int  # batch norms folded into convolutions
    padded: int  # paddings folded into convolutions
    transposed: int  # convolutions whose gradient is computed as a forward convolution


def rewrite(graph: Graph) -> Rewrites:
    """All rewrites, in place, one after the other."""
    compute_constants(graph)
    leave_out_identities(graph)
    name_the_padding(graph)
    folded = fold_batch_norms(graph)
    padded = fold_padding(graph)
    average_to_a_pixel(graph)
    transposed = use_own_convolutions(graph)
    return Rewrites(folded, padded, transposed)


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


def leave_out_identities(graph: Graph) -> None:
    """Dropout does nothing in evaluation, and a copy has no use where nothing writes."""
    for operation in list(graph.operations):
        idle = operation.arguments.get('train') is False and 'dropout' in operation.kind
        idle = idle or (operation.kind == 'slice' and _takes_all(operation))
        if idle or operation.kind in ('clone', 'contiguous', 'lift_fresh_copy', 'alias'):
            graph.replace(operation, inputs_of(operation)[0])
        elif operation.kind == 'copy':  # has no derivative
            operation.target = lambda self, src, non_blocking: src.to(self.dtype).expand(self.shape)
        elif operation.kind in ('view', '_unsafe_view'):  # fails where the layout is another
            operation.kind, operation.target = 'reshape', aten.reshape.default
            operation.arguments = dict(
                zip(('self', 'shape'), operation.arguments.values(), strict=True)
            )


def _takes_all(operation: Operation) -> bool:
    """Whether a slice leaves nothing out."""
    given = operation.arguments
    size, start, end = given['self'].shape[given['dim']], given['start'], given['end']
    if not isinstance(start or 0, int) or not isinstance(end or 0, int):
        return False
    beyond = end is None or end >= (sys.maxsize if size is None else size)
    return not start and beyond and given['step'] == 1


def name_the_padding(graph: Graph) -> None:
    """Convolutions get their padding on all four sides as numbers, `pads`."""
    for operation in graph.operations:
        if operation.kind == 'conv2d':
            kernel, dilation = operation.arguments['weight'].shape[2:], _pair(operation, 'dilation')
            padding = operation.arguments.pop('padding')
            if padding == 'valid':
                padding = (0, 0)
            if padding == 'same':
                reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
                pads = tuple((r // 2, r - r // 2) for r in reach)
            else:
                rows, columns = padding if len(padding) == 2 else 2 * list(padding)
                pads = ((rows, rows), (columns, columns))
            operation.arguments |= {
                'pads': pads, 'stride': _pair(operation, 'stride'), 'dilation': dilation
            }  # fmt: skip


def fold_batch_norms(graph: Graph) -> int:
    """A batch norm with fixed statistics that alone reads a convolution becomes part of its
    weights; another becomes a product and a sum. Returns how many were folded."""
    folded, readers = 0, graph.readers()
    for norm in [o for o in graph.operations if o.kind == 'batch_norm']:
        given = norm.arguments
        if given['training'] or given['running_mean'] is None or len(norm.shape) != 4:
            continue
        scale, shift = _scale_and_shift(graph, given)
        source = given['input']
        axis = {'conv2d': 0, 'conv_transpose2d': 1}.get(source.kind)
        single = len(readers[source]) == 1 and (axis == 0 or source.arguments.get('groups') == 1)
        if axis is not None and single and source.arguments['weight'] in graph.constants:
            fold(graph, source, axis, scale, shift)
            graph.replace(norm, source)
            readers[source] = readers[norm]
            folded += 1
        else:
            like = graph.constants[given['running_mean']]
            scale, shift = (graph.constant(v.view(1, -1, 1, 1).to(like)) for v in (scale, shift))
            norm.kind, norm.target = 'addcmul', aten.addcmul.default
            norm.arguments = {'self': shift, 'tensor1': source, 'tensor2': scale}
    return folded


def _scale_and_shift(graph: Graph, norm: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm as a product and a sum, in double precision on the CPU: MPS has none."""
    values = {
        name: graph.constants[value].cpu().double()
        for name, value in norm.items()
        if value in graph.constants
    }
    scale = 1 / (values['running_var'] + norm['eps']).sqrt()
    shift = -values['running_mean'] * scale
    scale, shift = (v * values['weight'] if 'weight' in values else v for v in (scale, shift))
    return scale, shift + values['bias'] if 'bias' in values else shift


def fold(
    graph: Graph, convolution: Operation, axis: int, scale: torch.Tensor, shift: torch.Tensor
) -> None:
    """Give a convolution weights of its own that scale and shift its result.

    axis: of the weight, that of the output's channels. scale, shift: (channels,) float64, CPU.
    """
    like = graph.constants[convolution.arguments['weight']]
    bias = convolution.arguments['bias']
    if bias is not None:
        shift = shift + graph.constants[bias].cpu().double() * scale
    shape = [-1 if number == axis else 1 for number in range(4)]
    weight = like.cpu().double() * scale.view(shape)
    convolution.arguments['weight'] = graph.constant(weight.to(like))
    convolution.arguments['bias'] = graph.constant(shift.to(like))


def fold_padding(graph: Graph) -> int:
    """Zeros that are put around a tensor before a convolution become its padding, also where they
    differ from side to side. Returns how many paddings are gone."""
    gone, readers = 0, graph.readers()
    for padding in [o for o in graph.operations if o.kind in ('pad', 'constant_pad_nd')]:
        sides = padding.arguments['pad']
        zeros = padding.arguments.get('mode', 'constant') == 'constant' and not (
            padding.arguments.get('value') or 0
        )
        plain = all(isinstance(side, int) and side >= 0 for side in sides)
        if not zeros or not plain or len(sides) > 4 or len(padding.shape) != 4:
            continue
        left, right, top, bottom = (*sides, 0, 0, 0, 0)[:4]
        for reader in readers[padding]:
            if reader.kind == 'conv2d':
                (a, b), (c, d) = reader.arguments['pads']
                reader.arguments['pads'] = ((a + top, b + bottom), (c + left, d + right))
                reader.arguments['input'] = padding.arguments['self']
        if all(reader.kind == 'conv2d' for reader in readers[padding]):
            graph.operations.remove(padding)
            gone += 1
    return gone


def average_to_a_pixel(graph: Graph) -> None:
    """Averages over all of a map get a gradient that is never written out as a map."""
    for operation in graph.operations:
        given = operation.arguments
        if len(operation.shape or ()) != 4 or None in operation.shape[2:]:
            continue
        pooled = operation.kind == 'adaptive_avg_pool2d' and operation.shape[2:] == (1, 1)
        mean = operation.kind == 'mean' and given.get('keepdim') and not given.get('dtype')
        if pooled or (mean and sorted(axis % 4 for axis in given['dim'] or ()) == [2, 3]):
            operation.kind, operation.target = 'pixel_mean', pixel_mean
            operation.arguments = {'x': given['self']}


def use_own_convolutions(graph: Graph) -> int:
    """Convolutions with fixed weights run as `convolution`, those of a single pixel as products of
    matrices. Returns how many of them get their gradient as a forward convolution."""
    transposed = 0
    for operation in [o for o in graph.operations if o.kind == 'conv2d']:
        given = operation.arguments
        names = ('stride', 'pads', 'dilation', 'groups')
        how = Sliding(given['weight'].shape[2:], *(given.pop(name) for name in names))
        given['how'] = how
        if given['weight'] not in graph.constants or len(operation.shape) != 4:
            operation.target = convolution_with_computed_weight
            continue
        if _is_of_a_pixel(operation, how):
            operation.kind, operation.target = 'pixel_linear', pixel_linear
            del given['how']
            continue
        weight, size = graph.constants[given['weight']], given['input'].shape
        given['weight'] = graph.constant(_channels_last(weight))
        graph.kernels[given['weight']] = how, size
        given['flipped'] = None
        if how.stride == (1, 1):
            given['flipped'] = graph.constant(_channels_last(flipped(weight, how.groups)))
            graph.kernels[given['flipped']] = how.back, operation.shape
            transposed += 1
        operation.target = convolution
    return transposed


def _is_of_a_pixel(operation: Operation, how: Sliding) -> bool:
    """Whether a convolution takes a map of one pixel to another, as in squeeze-and-excitation."""
    shapes = (operation.arguments['input'].shape[2:], operation.shape[2:], how.kernel)
    return how.groups == 1 and all(shape == (1, 1) for shape in shapes)


def flipped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weights (O, I / groups, h, w) -> (I, O / groups, h, w) with which a stride-1 convolution
    gives the gradient of the one that has these."""
    outputs, inputs, height, width = weight.shape
    grouped = weight.view(groups, outputs // groups, inputs, height, width).transpose(1, 2)
    return grouped.reshape(groups * inputs, outputs // groups, height, width).flip(2, 3)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _pair(operation: Operation, name: str) -> tuple[int, int]:
    """An argument for rows and columns, which may be given as one."""
    value = operation.arguments[name]
    value = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(value) if len(value) == 2 else tuple(2 * value)


# --------------------------------------------------------------------------- what runs


@dataclass(frozen=True)
class Sliding:
    """How a kernel slides over a map."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: Pads  # negative ones cut off
    dilation: tuple[int, int]
    groups: int

    @cached_property
    def even(self) -> tuple[int, int]:
        """The padding that both sides have, of rows and columns."""
        return tuple(max(0, min(side)) for side in self.pads)

    @cached_property
    def uneven(self) -> tuple[int, ...]:
        """The rest, as `F.pad` takes it; empty where there is none."""
        (top, bottom), (left, right) = self.pads
        rows, columns = self.even
        extra = (left - columns, right - columns, top - rows, bottom - rows)
        return extra if any(extra) else ()

    @cached_property
    def back(self) -> Sliding:
        """How the flipped kernel slides over the gradient, where the stride is 1."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        pads = tuple((r - a, r - b) for r, (a, b) in zip(reach, self.pads, strict=True))
        return replace(self, pads=pads)


class Kernel:
    """A convolution's weights, and the same in the order that oneDNN computes with, so that they
    are not rearranged in every pass. That order depends on the map's shape, batch included."""

    def __init__(
        self, weight: torch.Tensor, how: Sliding | None = None, shape: Sequence[int | None] = ()
    ) -> None:
        """weight: (O, I / groups, h, w). how, shape: of the whole map that they are used on, where
        packing them pays: where the map is small beside them."""
        self.weight, self.how = weight, how
        small = None not in shape[1:] and math.prod(shape[2:]) <= PACKED_PIXELS
        runs = weight.device.type == 'cpu' and weight.dtype != torch.float64
        self.shape = tuple(shape[1:]) if how and small and runs and not how.uneven else ()
        self.packed: dict[int, torch.Tensor] = {}  # by the number of maps

    def for_map(self, x: torch.Tensor) -> torch.Tensor:
        """The weights with which maps (N, I, rows, columns) are convolved."""
        count = len(x)
        if count in self.packed and x.shape[1:] == self.shape:
            return self.packed[count]
        # Step batches are powers of two; what is left over comes once.
        if x.shape[1:] != self.shape or count.bit_count() != 1:
            return self.weight
        how = self.how

        def reorder() -> torch.Tensor:
            return torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, how.even, how.stride, how.dilation, how.groups, list(x.shape)
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
    weight = kernel.for_map(x)
    x = F.pad(x, how.uneven) if how.uneven else x
    if weight.is_mkldnn and x.dtype == weight.dtype:
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, how.even, how.stride, how.dilation, how.groups, 'none', [], ''
        )
    weight = kernel.weight
    return F.conv2d(x, weight, bias, how.stride, how.even, how.dilation, how.groups)


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


def _strided_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, shape: Sequence[int], how: Sliding
) -> torch.Tensor:
    """The gradient of `_convolve` with respect to an input of that shape."""
    if how.groups == shape[1] > 1 and gradient.dtype in (torch.bfloat16, torch.float16):
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


class _Crops(torch.autograd.Function):
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


def _layout_of(x: torch.Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last or x.ndim == 4 else torch.contiguous_format


def _crops(slices: tuple[tuple[slice, ...], ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Crops.apply(x, slices)
    return tuple(x[one] for one in slices)


# --------------------------------------------------------------------------- boxes


def whole(shape: Sequence[int | None] | None) -> Box:
    """The box of all of a tensor."""
    return () if shape is None else (None,) * len(shape)


def trimmed(box: Box, shape: Sequence[int | None]) -> Box:
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


def merged(boxes: Iterable[Box], shape: Sequence[int | None] | None) -> list[Box]:
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
            volume = [math.prod(_length(box[n], shape[n]) for n in cut) for box in (a, b, one)]
            if volume[2] <= volume[0] + volume[1] + MERGE_SLACK:
                left = [box for box in left if box not in (a, b)] + [one]
                changed = True
                break
    return sorted(set(left), key=repr)


def _length(span: Span, size: int) -> int:
    return size if span is None else span[1] - span[0]


# --------------------------------------------------------------------------- rules of propagation


@dataclass(frozen=True)
class Part:
    """How a box of an operation's result is computed."""

    box: Box  # what comes out: at least what was asked for
    needs: tuple[tuple[Operation, Box], ...]  # one for each of `inputs_of`, or for those needed
    compute: Callable[..., object]  # from their values


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
        (source, trimmed(given[id(source)], source.shape))
        if id(source) in given
        else (source, whole(source.shape))
        for source in inputs_of(operation)
    )


def pointwise(operation: Operation, box: Box) -> Part:
    """Every place of the result from the same place of the inputs; broadcast axes are whole."""
    needs = []
    for source in inputs_of(operation):
        if source.shape is None:
            needs.append((source, ()))
            continue
        spans, sizes = box[len(box) - len(source.shape) :], operation.shape[-len(source.shape) :]
        if not source.shape:
            spans, sizes = (), ()
        same = [None if own != size else span
                for span, size, own in zip(spans, sizes, source.shape, strict=True)]  # fmt: skip
        needs.append((source, trimmed(tuple(same), source.shape)))
    return Part(box, tuple(needs), call_of(operation))


def prelu(operation: Operation, box: Box) -> Part:
    """A slope for each channel, whose axis is whole."""
    box = _with_whole(box, [1])
    return Part(box, _needs(operation, {'self': box}), call_of(operation))


def _with_whole(box: Box, axes: Iterable[int]) -> Box:
    axes = {axis % len(box) for axis in axes}
    return tuple(None if number in axes else span for number, span in enumerate(box))


def _window(
    span: Span, size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int]
) -> tuple[Span, tuple[int, int]]:
    """What a sliding window reads of an axis for a span of its result, and the padding that is
    left: what reaches beyond the tensor's true ends."""
    if span is None:
        return None, pads
    start = span[0] * stride - pads[0]
    stop = (span[1] - 1) * stride - pads[0] + dilation * (kernel - 1) + 1
    read = (max(start, 0), min(stop, size))
    if read[0] >= read[1]:
        raise NoRule  # padding alone
    return read, (max(-start, 0), max(stop - size, 0))


def _windows(
    box: Box, shape: Sequence[int | None], *how: Sequence[object]
) -> tuple[list[Span], Pads]:
    """`_window` of rows and columns. how: kernel, stride, dilation and pads of both."""
    pairs = [_window(box[2 + n], shape[2 + n], *(one[n] for one in how)) for n in range(2)]
    return [read for read, _ in pairs], tuple(pads for _, pads in pairs)


def conv2d(operation: Operation, box: Box) -> Part:
    """All channels of the rows and columns under the kernel."""
    given, how = operation.arguments, operation.arguments['how']
    reads, pads = _windows(box, given['input'].shape, how.kernel, how.stride, how.dilation,
                           how.pads)  # fmt: skip
    needs = _needs(operation, {'input': (None, None, *reads)})
    run = call_of(operation, how=replace(how, pads=pads))
    return Part((None, None, *box[2:]), needs, run)


def conv_transpose2d(operation: Operation, box: Box) -> Part:
    """Input i is spread over the results from i * stride - padding on; what is beside the span
    is cut off afterwards."""
    given, reads, cuts, extra = operation.arguments, [], [], []
    for axis in range(2):
        span, size = box[2 + axis], given['input'].shape[2 + axis]
        stride, padding = _pair(operation, 'stride')[axis], _pair(operation, 'padding')[axis]
        reach = _pair(operation, 'dilation')[axis] * (given['weight'].shape[2 + axis] - 1)
        a, b = span or (0, operation.shape[2 + axis])
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


def _pool(operation: Operation, box: Box) -> tuple[list[Span], Pads, tuple[int, int]]:
    given = operation.arguments
    if len(operation.shape) != 4:
        raise NoRule
    kernel = _pair(operation, 'kernel_size')
    stride = _pair(operation, 'stride') if given.get('stride') else kernel
    dilation = _pair(operation, 'dilation') if 'dilation' in given else (1, 1)
    padding = tuple((p, p) for p in _pair(operation, 'padding'))
    # With ceil_mode the last window may reach further out than the padding: every span is counted.
    ends = zip(box[2:], operation.shape[2:], strict=True)
    box = (*box[:2], *(span or (0, length) for span, length in ends))
    reads, pads = _windows(box, given['self'].shape, kernel, stride, dilation, padding)
    return reads, pads, stride


def max_pool2d(operation: Operation, box: Box) -> Part:
    """The windows' rows and columns; where padding is left, it is minus infinity."""
    reads, ((top, bottom), (left, right)), stride = _pool(operation, box)
    run = call_of(operation, padding=[0, 0], stride=list(stride), ceil_mode=False)
    sides = (left, right, top, bottom)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return run(F.pad(x, sides, value=-math.inf) if any(sides) else x)

    return Part(box, _needs(operation, {'self': (*box[:2], *reads)}), compute)


def avg_pool2d(operation: Operation, box: Box) -> Part:
    """The windows' rows and columns, with the zeros that count."""
    given = operation.arguments
    reads, ((top, bottom), (left, right)), stride = _pool(operation, box)
    sides = (left, right, top, bottom)
    if given['ceil_mode'] or given['divisor_override'] is not None:
        raise NoRule
    if any(sides) and not given['count_include_pad']:
        raise NoRule
    run = call_of(operation, padding=[0, 0], stride=list(stride))

    def compute(x: torch.Tensor) -> torch.Tensor:
        return run(F.pad(x, sides) if any(sides) else x)

    return Part(box, _needs(operation, {'self': (*box[:2], *reads)}), compute)


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
    return Part(box, ((source, trimmed((None, None, *reads), source.shape)),), compute)


def _resizing_matrix(operation: Operation, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights (out, in) of an axis, of rows (0) or columns (1)."""
    given = dict(operation.arguments)
    source, size = inputs_of(operation)[0], operation.shape[2 + axis]
    if len(inputs_of(operation)) > 1:
        raise NoRule  # sizes that are computed
    if given.get('output_size') is not None:
        given['output_size'] = [size, 1]
    if given.get('scale_factors') is not None:
        given['scale_factors'] = [given['scale_factors'][axis], 1.0]
    if 'scales_h' in given:
        given['scales_h'], given['scales_w'] = given[('scales_h', 'scales_w')[axis]], None
    length = source.shape[2 + axis]
    given[next(iter(given))] = torch.eye(length, dtype=dtype).view(1, length, length, 1)
    return operation.target(**given)[0, :, :, 0].T


def _columns_used(matrix: torch.Tensor) -> tuple[int, int]:
    used = (matrix != 0).any(dim=0).nonzero().flatten().tolist()
    return used[0], used[-1] + 1


def upsample_nearest2d(operation: Operation, box: Box) -> Part:
    """By whole numbers: every pixel becomes a block, and whole blocks are computed."""
    source = inputs_of(operation)[0]
    factors = [operation.shape[axis] / source.shape[axis] for axis in (2, 3)]
    if not all(factor.is_integer() for factor in factors):
        return resize(operation, box)
    spans = [_blocks(span, int(factor)) for span, factor in zip(box[2:], factors, strict=True)]
    reads = (*box[:2], *(span and (span[0] // int(factor), span[1] // int(factor))
                         for span, factor in zip(spans, factors, strict=True)))  # fmt: skip
    scales = [float(factor) for factor in factors]

    def compute(x: torch.Tensor) -> torch.Tensor:
        return aten.upsample_nearest2d.vec(x, None, scales)

    return Part((*box[:2], *spans), ((source, trimmed(reads, source.shape)),), compute)


def _blocks(span: Span, size: int) -> Span:
    """A span widened to whole blocks."""
    return span and (span[0] // size * size, -(-span[1] // size) * size)


def pixel_shuffle(operation: Operation, box: Box) -> Part:
    """Channels become blocks of pixels."""
    factor = operation.arguments['upscale_factor']
    spans = [_blocks(span, factor) for span in box[-2:]]
    first = (None,) * (len(box) - 2)
    reads = (*first, *(span and (span[0] // factor, span[1] // factor) for span in spans))
    return Part((*first, *spans), _needs(operation, {'self': reads}), call_of(operation))


def pixel_unshuffle(operation: Operation, box: Box) -> Part:
    """Blocks of pixels become channels."""
    factor = operation.arguments['downscale_factor']
    first = (None,) * (len(box) - 2)
    reads = (*first, *(span and (span[0] * factor, span[1] * factor) for span in box[-2:]))
    return Part((*first, *box[-2:]), _needs(operation, {'self': reads}), call_of(operation))


def cat(operation: Operation, box: Box) -> Part:
    """Those of the tensors that lie in the span, each its part."""
    axis = operation.arguments.get('dim', 0) % len(box)
    span, start, needs = box[axis], 0, []
    for source in operation.arguments['tensors']:
        if len(source.shape) != len(box):
            raise NoRule  # an empty tensor, which cat leaves out
        size = source.shape[axis]
        if size is None:
            raise NoRule
        part = span and (max(span[0] - start, 0), min(span[1] - start, size))
        if part is None or part[0] < part[1]:
            needs.append((source, trimmed((*box[:axis], part, *box[axis + 1 :]), source.shape)))
        start += size
    return Part(box, tuple(needs), lambda *values: torch.cat(values, dim=axis))


def stack(operation: Operation, box: Box) -> Part:
    """The new axis is whole."""
    axis = operation.arguments.get('dim', 0) % len(box)
    inner = box[:axis] + box[axis + 1 :]
    needs = tuple((source, inner) for source in operation.arguments['tensors'])
    return Part(_with_whole(box, [axis]), needs, call_of(operation))


def slice_(operation: Operation, box: Box) -> Part:
    """The same places counted from the slice's start."""
    given, axis = operation.arguments, operation.arguments['dim'] % len(box)
    source, step = given['self'], given['step']
    size, length = source.shape[axis], operation.shape[axis]
    if size is None or length is None or not isinstance(given['start'] or 0, int):
        raise NoRule
    start = given['start'] or 0
    start = max(0, start + size if start < 0 else start)
    a, b = box[axis] or (0, length)
    reads = (*box[:axis], (start + a * step, start + (b - 1) * step + 1), *box[axis + 1 :])
    run = call_of(operation, start=0, end=None)
    return Part(box, _needs(operation, {'self': reads}), run)


def select(operation: Operation, box: Box) -> Part:
    """One place of an axis, which is gone."""
    source, axis = operation.arguments['self'], operation.arguments['dim']
    axis, index = axis % len(source.shape), operation.arguments['index']
    if source.shape[axis] is None or not isinstance(index, int):
        raise NoRule
    index %= source.shape[axis]
    reads = (*box[:axis], (index, index + 1), *box[axis:])
    return Part(box, _needs(operation, {'self': reads}), call_of(operation, index=0))


def pad(operation: Operation, box: Box) -> Part:
    """Only what is left of the padding beyond the tensor's true ends; a mirror needs what it
    shows."""
    given, source = operation.arguments, operation.arguments['self']
    mode = given.get('mode') or 'constant'
    if mode not in ('constant', 'reflect', 'replicate'):
        raise NoRule
    before = [0] * len(box)
    for number, amount in enumerate(given['pad'][::2], start=1):
        before[-number] = amount
    shown = {'constant': lambda beyond: 0, 'reflect': lambda beyond: beyond + 1,
             'replicate': lambda beyond: 1}[mode]  # of the tensor, by so much padding  # fmt: skip
    reads, sides, cuts = [], [], []
    for span, size, first, length in zip(box, source.shape, before, operation.shape, strict=True):
        a, b = span or (0, length)
        if size is None:
            reads.append(None), sides.append((0, 0)), cuts.append(slice(None))
            continue
        left, right = max(first - a, 0), max(b - first - size, 0)
        low, high = max(a - first, 0), min(b - first, size)
        high = max(high, shown(left)) if left else high
        low = min(low, size - shown(right)) if right else low
        if low >= high:
            raise NoRule  # padding alone
        begin = a - first - (low - left)
        reads.append((low, high)), sides.append((left, right))
        cuts.append(slice(begin, begin + b - a))
    amounts = [side for pair in reversed(sides) for side in pair][: len(given['pad'])]
    value, cuts = given.get('value') or 0.0, tuple(cuts)

    def compute(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, amounts, mode, value if mode == 'constant' else None)
        return padded[cuts]

    return Part(box, ((source, trimmed(tuple(reads), source.shape)),), compute)


def permute(operation: Operation, box: Box) -> Part:
    """The axes in another order."""
    order = [dim % len(box) for dim in operation.arguments['dims']]
    reads = tuple(box[order.index(axis)] for axis in range(len(box)))
    return Part(box, _needs(operation, {'self': reads}), call_of(operation))


def transpose(operation: Operation, box: Box) -> Part:
    """Two axes change places."""
    a, b = (operation.arguments[name] % len(box) for name in ('dim0', 'dim1'))
    reads = list(box)
    reads[a], reads[b] = box[b], box[a]
    return Part(box, _needs(operation, {'self': tuple(reads)}), call_of(operation))


def unsqueeze(operation: Operation, box: Box) -> Part:
    """A new axis of length 1."""
    axis = operation.arguments['dim'] % len(box)
    reads = box[:axis] + box[axis + 1 :]
    return Part(_with_whole(box, [axis]), _needs(operation, {'self': reads}), call_of(operation))


def squeeze(operation: Operation, box: Box) -> Part:
    """Without an axis of length 1."""
    source, dims = operation.arguments['self'], operation.arguments.get('dim')
    if dims is None:
        raise NoRule  # might take an axis that is of length 1 only after cropping
    rank = len(source.shape)
    axes = {dim % rank for dim in (dims if isinstance(dims, list) else [dims])}
    gone = {axis for axis in axes if source.shape[axis] == 1}
    if gone != axes:
        raise NoRule
    left = iter(box)
    reads = tuple(None if axis in gone else next(left) for axis in range(rank))
    return Part(box, _needs(operation, {'self': reads}), call_of(operation))


def reduce(operation: Operation, box: Box) -> Part:
    """The axes that are summed up are whole."""
    source, dims = operation.arguments['self'], operation.arguments.get('dim')
    if not isinstance(dims, (list, int)) or dims == []:
        raise NoRule
    rank = len(source.shape)
    axes = {dim % rank for dim in (dims if isinstance(dims, list) else [dims])}
    if operation.arguments.get('keepdim'):
        reads = _with_whole(box, axes)
    else:
        left = iter(box)
        reads = tuple(None if axis in axes else next(left) for axis in range(rank))
    return Part(box, _needs(operation, {'self': reads}), call_of(operation))


def along_axis(operation: Operation, box: Box) -> Part:
    """A softmax: its axis is whole."""
    box = _with_whole(box, [operation.arguments['dim']])
    return Part(box, _needs(operation, {'self': box}), call_of(operation))


def layer_norm(operation: Operation, box: Box) -> Part:
    """The last axes are whole."""
    count = len(operation.arguments['normalized_shape'])
    box = _with_whole(box, range(len(box) - count, len(box)))
    return Part(box, _needs(operation, {'input': box}), call_of(operation))


def linear(operation: Operation, box: Box) -> Part:
    """The last axis is whole."""
    box = _with_whole(box, [-1])
    return Part(box, _needs(operation, {'input': box}), call_of(operation))


def expand(operation: Operation, box: Box) -> Part:
    """A broadcast, to as much as is asked for."""
    source, sizes = operation.arguments['self'], list(operation.arguments['size'])
    if len(source.shape) != len(box):
        raise NoRule
    reads = []
    for axis, (span, own) in enumerate(zip(box, source.shape, strict=True)):
        spread = own == 1 and operation.shape[axis] != 1
        reads.append(None if spread else span)
        if isinstance(sizes[axis], int):
            sizes[axis] = (_length(span, sizes[axis]) if spread else -1)  # fmt: skip
    return Part(box, _needs(operation, {'self': tuple(reads)}), call_of(operation, size=sizes))


# By the operator's name. What is not here and works place by place is `pointwise`; of all others
# the whole result is computed from the whole inputs.
RULES: dict[str, Callable[[Operation, Box], Part]] = {
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
    rule = RULES.get(operation.kind, pointwise if _is_pointwise(operation) else None)
    if rule is None or all(span is None for span in box):
        return whole_part(operation)
    try:
        return rule(operation, box)
    except NoRule:
        return whole_part(operation)


# --------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Instruction:
    """A step of a plan. Slots hold the values."""

    compute: Callable[..., object]
    reads: tuple[int, ...]
    writes: tuple[int, ...]  # one, or one for each of several results
    done: tuple[int, ...]  # read here for the last time


@dataclass(frozen=True)
class Plan:
    """What is computed for some boxes of the output, in order."""

    boxes: tuple[Box, ...]  # of the output: those asked for, some of them joined
    work: float  # floating-point operations of the convolutions for one image, forward
    instructions: tuple[Instruction, ...]
    image: int | None  # its slot; None: the output does not depend on it
    constants: tuple[tuple[int, Operation], ...]
    sizes: tuple[tuple[int, Callable[[int], int]], ...]
    results: tuple[int, ...]  # slots, in the order of the boxes

    def run(
        self, x: torch.Tensor, constants: dict[Operation, torch.Tensor | Kernel]
    ) -> list[torch.Tensor]:
        """Images (N, C, H, W) -> the boxes of the output, one after the other."""
        slots: dict[int, object] = {slot: constants[which] for slot, which in self.constants}
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


def make_plan(graph: Graph, wanted: Sequence[Box]) -> Plan:
    """What must be computed for some boxes of a graph's output."""
    parts = _propagated(graph, wanted)
    return _Planner(graph, parts).plan()


def _propagated(graph: Graph, wanted: Sequence[Box]) -> dict[Operation, list[Part]]:
    """The parts of each operation that are needed, from the output to the input."""
    needed: dict[Operation, list[Box]] = defaultdict(list)
    needed[graph.output] = [trimmed(box, graph.output.shape) for box in wanted]
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


class _Planner:
    """Puts parts in order, and finds for each need the slot that holds it."""

    def __init__(self, graph: Graph, parts: dict[Operation, list[Part]]) -> None:
        self.graph, self.parts = graph, parts
        self.number = itertools.count()
        self.pieces: dict[Operation, list[tuple[Box, int]]] = {}  # what was computed, and where
        self.crops: dict[tuple[int, Box], int] = {}
        self.steps: list[tuple[Callable[..., object], tuple[int, ...], tuple[int, ...]]] = []
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
        work = 0.0
        for operation in graph.operations:
            if operation not in self.parts:
                continue
            computed = []
            for part in self.parts[operation]:
                reads = tuple(self._slot(source, box) for source, box in part.needs)
                slot = next(self.number)
                self.steps.append((part.compute, reads, (slot,)))
                computed.append((part.box, slot))
                work += _work(operation, part.box)
            self._keep(operation, computed)
        slots = {source: self.pieces[source][0][1] for source in sources}
        boxes, results = zip(*self.pieces[graph.output], strict=True)
        return Plan(
            boxes, work, self._released(set(results)), slots.get(graph.image),
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
            cut = partial(_crops, slices)
            if len(writes) == 1:
                cut = partial(_crop, slices)
            self.steps.append((cut, (slot,), writes))

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


def _crop(slices: tuple[tuple[slice, ...], ...], x: torch.Tensor) -> torch.Tensor:
    return _crops(slices, x)[0]


def _work(operation: Operation, box: Box) -> float:
    """Floating-point operations of a convolution for a box of its result, for one image."""
    if operation.kind not in ('conv2d', 'conv_transpose2d'):
        return 0.0
    given = operation.arguments
    if operation.kind == 'conv2d':
        places = math.prod(_length(box[axis], operation.shape[axis]) for axis in (2, 3))
    else:
        places = math.prod(given['input'].shape[2:]) * math.prod(
            _length(box[axis], operation.shape[axis]) / operation.shape[axis] for axis in (2, 3)
        )
    return 2.0 * places * math.prod(given['weight'].shape)


# --------------------------------------------------------------------------- the network


class NetworkGraph:
    """A network for images of one size, rewritten to run fast; computes what the network does.

    Called with images (N, C, H, W) it gives the whole output; `plan` and `run` give boxes of it.
    Raises NotExportable where there is no graph of the network.
    """

    def __init__(self, network: nn.Module, example: torch.Tensor) -> None:
        """network: frozen, in evaluation mode, with one tensor as result. example: (1, C, H, W)."""
        self.graph = export(network, example)
        self.rewrites = rewrite(self.graph)
        self._constants: dict[torch.dtype | None, dict[Operation, torch.Tensor | Kernel]] = {}

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """Of the result: (None, K, h, w)."""
        return self.graph.output.shape

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

    def _in(self, dtype: torch.dtype | None) -> dict[Operation, torch.Tensor | Kernel]:
        """The constants in a type, in the order in which they are computed with."""
        if dtype not in self._constants:
            found = {
                operation: value.to(dtype) if dtype and value.is_floating_point() else value
                for operation, value in self.graph.constants.items()
            }
            kernels = {operation: Kernel(found[operation], *kernel)
                       for operation, kernel in self.graph.kernels.items()}  # fmt: skip
            self._constants[dtype] = found | kernels
        return self._constants[dtype]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.whole)[0]
