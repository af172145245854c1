"""A network as a graph of operations: what `torch.export` traces, with nothing changed in place."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import sympy
import torch
from torch import nn

aten = torch.ops.aten

Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after the rows, the columns


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


def pair_of(operation: Operation, name: str) -> tuple[int, int]:
    """An argument for rows and columns, which may be given as one."""
    value = operation.arguments[name]
    value = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(value) if len(value) == 2 else tuple(2 * value)


# --------------------------------------------------------------------------- tracing


def trace(network: nn.Module, example: torch.Tensor) -> Graph:
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
