"""A network as a graph of operations: what `torch.export` traces, with nothing changed in place."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from igseg.engine.private_torch import (
    Operator,
    WithoutDefault,
    arguments_of,
    expression_of,
    name_of,
    same_overload,
    shares_memory,
    writes_in_place,
)

aten = torch.ops.aten

Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after the rows, the columns

Shape = tuple[int | None, ...]  # of a tensor; an axis of None depends on the number of images

# What runs for an operation, or for a part of one: from the values of its inputs (tensors, and what
# else operators take) to its result, of whatever kind.
Compute = Callable[..., Any]


class NotExportable(Exception):
    """Why a network has no graph, in a sentence."""


# --------------------------------------------------------------------------- the graph


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
        rows, columns = self.pads
        return max(0, min(rows)), max(0, min(columns))

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
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        (top, bottom), (left, right) = self.pads
        return replace(self, pads=((rows - top, rows - bottom), (columns - left, columns - right)))


@dataclass(eq=False)
class Operation:
    """One operation, standing for its result where it is the argument of another."""

    kind: str  # the operator's name; 'image', 'constant' or 'size' for what is not computed
    target: Compute | None
    arguments: dict[str, object]  # by the names of its schema, defaults included
    shape: Shape | None  # None: no tensor
    module: str = ''  # of the original network, which it comes from

    # Its shape and its arguments, as what a rule or a rewrite takes them for. All of these raise
    # NotExportable where they are something else, as a number is that follows from the image.

    @property
    def axes(self) -> Shape:
        """The shape of the tensor that it is."""
        if self.shape is None:
            raise NotExportable(f'the result of {self.kind} is no tensor')
        return self.shape

    def length(self, axis: int) -> int:
        """Of an axis that does not depend on the number of images."""
        length = self.axes[axis]
        if length is None:
            raise NotExportable(f'a size of {self.kind} depends on the number of images')
        return length

    def tensor(self, name: str) -> Operation:
        """The operation that an argument is the result of."""
        value = self.arguments[name]
        if not isinstance(value, Operation):
            raise NotExportable(f'{name} of {self.kind} is no tensor')
        return value

    def tensors(self, name: str) -> list[Operation]:
        """The operations that an argument is the results of."""
        values = self.arguments[name]
        if not isinstance(values, (list, tuple)):
            raise NotExportable(f'{name} of {self.kind} is no list')
        found = [value for value in values if isinstance(value, Operation)]
        if len(found) < len(values):
            raise NotExportable(f'{name} of {self.kind} holds more than tensors')
        return found

    def number(self, name: str, default: int | None = None) -> int:
        """An argument that is a whole number; default: where it is missing or None."""
        value = self.arguments.get(name)
        value = default if value is None else value
        if not isinstance(value, int):
            raise NotExportable(f'{name} of {self.kind} is no plain number')
        return value

    def numbers(self, name: str) -> list[int]:
        """An argument that is several whole numbers, or one."""
        value = self.arguments[name]
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        found = [one for one in values if isinstance(one, int)]
        if len(found) < len(values):
            raise NotExportable(f'{name} of {self.kind} is not made of plain numbers')
        return found

    def pair(self, name: str) -> tuple[int, int]:
        """An argument for rows and columns, which may be given as one."""
        values = self.numbers(name)
        rows, columns = values if len(values) == 2 else 2 * values
        return rows, columns

    def sliding(self) -> Sliding:
        """How the kernel of a convolution slides, once that stands in one argument."""
        how = self.arguments['how']
        if not isinstance(how, Sliding):
            raise NotExportable(f'{self.kind} does not say how it slides')
        return how


def inputs_of(operation: Operation) -> list[Operation]:
    """The operations that are arguments, in the order in which `call_of` takes their values."""
    found: list[object] = []
    for value in operation.arguments.values():
        found += value if isinstance(value, list) else [value]
    return [value for value in found if isinstance(value, Operation)]


@dataclass
class Graph:
    """Operations in an order in which they can run."""

    operations: list[Operation]
    image: Operation
    output: Operation
    constants: dict[Operation, torch.Tensor]
    sizes: dict[Operation, Callable[[int], int]]  # what follows from the number of images
    # Constants that are weights of `convolution`: how they slide, and over maps of which shape.
    kernels: dict[Operation, tuple[Sliding, Shape]] = field(default_factory=dict)

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


def call_of(operation: Operation, **changes: object) -> Compute:
    """The operation as a function of the values of its inputs; changes: of its other arguments."""
    arguments, target = operation.arguments | changes, operation.target
    assert target is not None  # it is one that is computed
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


# --------------------------------------------------------------------------- tracing


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


def _item_of(values: Sequence[object], index: int) -> object:
    return values[index]


def _node(value: object) -> torch.fx.Node:
    """A value in an exported program that must be computed."""
    if not isinstance(value, torch.fx.Node):
        raise NotExportable('the network gives what does not depend on its input')
    return value


def _shape_of(node: torch.fx.Node) -> Shape | None:
    value = node.meta['val']
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(None if isinstance(size, torch.SymInt) else size for size in value.shape)


def _made(
    node: torch.fx.Node, kind: str, target: Compute, arguments: dict[str, object]
) -> Operation:
    stack = node.meta.get('nn_module_stack') or {}
    module = next((path for path, _ in reversed(stack.values())), '')
    return Operation(kind, target, arguments, _shape_of(node), module)


def _named(
    target: Operator, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """All arguments of a call by their names."""
    found = {}
    for number, (name, default) in enumerate(arguments_of(target)):
        if number < len(args):
            found[name] = args[number]
        elif name in kwargs:
            found[name] = kwargs[name]
        elif default is not WithoutDefault:
            found[name] = default
    return found


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
        (image,) = signature.user_inputs  # its name
        for node in self.program.graph.nodes:
            if node.op == 'placeholder':
                self._add(node, self._source(node, image))
            elif node.op == 'call_function':
                self._call(node)
            elif node.op == 'get_attr':
                raise NotExportable('parts of the network run under no_grad or autocast')
        results = next(n for n in self.program.graph.nodes if n.op == 'output').args[0]
        if not isinstance(results, (list, tuple)) or len(results) != 1:
            raise NotExportable('the network gives more than one result')
        found = next(o for o in self.made if o.kind == 'image')
        output = self.operations[_node(results[0])]
        return Graph(self.made, found, output, self.constants, self.sizes)

    def _add(self, node: torch.fx.Node, operation: Operation) -> Operation:
        self.operations[node] = operation
        if operation not in self.made:
            self.made.append(operation)
        return operation

    def _source(self, node: torch.fx.Node, image: object) -> Operation:
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
        elif isinstance(target, Operator):
            args = [self._operand(value) for value in node.args]
            kwargs = {name: self._operand(value) for name, value in node.kwargs.items()}
            self._operate(node, target, _named(target, args, kwargs))
        else:
            raise NotExportable(f'the network holds {target}, which is no plain operation')

    def _size(self, node: torch.fx.Node, value: torch.SymInt) -> None:
        import sympy  # which torch.export has imported by now

        expression = expression_of(value)
        symbols = sorted(expression.free_symbols, key=str)
        if len(symbols) > 1:
            raise NotExportable('sizes depend on more than the number of images')
        operation = self._add(node, Operation('size', None, {}, None))
        self.sizes[operation] = sympy.lambdify(symbols or [sympy.Symbol('n')], expression)

    def _operand(self, value: object) -> object:
        """An argument of a call, with operations in place of nodes."""
        if isinstance(value, torch.fx.Node):
            if value not in self.operations:
                raise NotExportable(f'{value.target} is no plain value')
            return self.operations[value]
        if isinstance(value, (list, tuple)):
            return [self._operand(one) for one in value]
        if isinstance(value, dict):
            return {name: self._operand(one) for name, one in value.items()}
        return value

    def _operate(self, node: torch.fx.Node, target: Operator, arguments: dict[str, object]) -> None:
        kind = name_of(target)
        if writes_in_place(target):
            kind, target, changed = self._out_of_place(kind, target, arguments)
            for other, operation in list(self.operations.items()):
                if operation is changed:  # from here on, whoever reads it reads the result
                    self.operations[other] = self._add(
                        node, self.operations.get(node) or _made(node, kind, target, arguments)
                    )
            return
        operation = self._add(node, _made(node, kind, target, arguments))
        if shares_memory(target) or 'dropout' in kind or kind == 'type_as':
            self.viewed |= {operation, *inputs_of(operation)[:1]}

    def _out_of_place(
        self, kind: str, target: Operator, arguments: dict[str, object]
    ) -> tuple[str, Operator, Operation]:
        """The operator that gives the result of one which writes it into its first argument."""
        written = next(iter(arguments.values()))
        same = same_overload(target, kind.removesuffix('_')) if kind.endswith('_') else None
        if not isinstance(written, Operation) or same is None or written in self.viewed:
            raise _WritesInPlace(f'{kind} changes a tensor in place')
        return kind.removesuffix('_'), same, written

    def _item(self, node: torch.fx.Node) -> None:
        """One of an operation's results; parts of a tensor become slices of it."""
        source, index = _node(node.args[0]), node.args[1]
        assert isinstance(index, int)  # of a tuple
        operation = self.operations[source]
        if operation.kind in ('split', 'split_with_sizes', 'chunk'):
            dim = operation.number('dim', 0)
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
            arguments = {'values': operation, 'index': index}
            self._add(node, _made(node, 'getitem', _item_of, arguments))
        self.viewed |= {self.operations[node], operation}


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
