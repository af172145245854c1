"""A network as a graph of operations, none of which works in place.

The network is run on tensors of the meta device, which have shapes but no values, and its
operations are recorded (`record`). That takes moments. What cannot be recorded, as a network that
looks at values, is traced by `torch.export` (`export`), which takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from igseg.engine.private_torch import (
    Operator,
    OperatorMode,
    expression_of,
    name_of,
    named_arguments,
    same_overload,
    shares_memory,
    writes_in_place,
)

aten = torch.ops.aten

Pads = tuple[tuple[int, int], tuple[int, int]]  # before and after the rows, and the columns

Shape = tuple[int | None, ...]  # of a tensor; None: the length depends on the number of images

# Computes an operation, or a part of it: the values of its inputs (tensors, or other values that
# operators take) -> its result, of any type.
Compute = Callable[..., Any]


class NotExportable(Exception):
    """A network has no graph; the text says why, in a sentence."""


class GradientOfItsOwn(NotExportable):
    """A graph of the network would have another gradient than the network."""


# --------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class Sliding:
    """How a kernel slides over a map."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: Pads  # negative padding cuts off
    dilation: tuple[int, int]
    groups: int

    @cached_property
    def even(self) -> tuple[int, int]:
        """The padding that both sides have in common, of rows and of columns."""
        rows, columns = self.pads
        return max(0, min(rows)), max(0, min(columns))

    @cached_property
    def uneven(self) -> tuple[int, ...]:
        """The padding beyond `even`, as `F.pad` takes it; empty where there is none."""
        (top, bottom), (left, right) = self.pads
        rows, columns = self.even
        extra = (left - columns, right - columns, top - rows, bottom - rows)
        return extra if any(extra) else ()

    @cached_property
    def back(self) -> Sliding:
        """How the flipped kernel slides over the gradient, for a stride of 1."""
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        (top, bottom), (left, right) = self.pads
        return replace(self, pads=((rows - top, rows - bottom), (columns - left, columns - right)))


@dataclass(eq=False)
class Operation:
    """An operation. As an argument of another operation it stands for its result."""

    kind: str  # the operator's name; 'image', 'constant' or 'size' where nothing is computed
    target: Compute | None  # None: nothing is computed
    arguments: dict[str, object]  # by their names in the operator's schema, with the defaults
    shape: Shape | None  # of the result; None: it is no tensor

    # The methods below give the shape and the arguments with the type that a rule or a rewrite
    # needs. They raise NotExportable for any other type, as for a number computed from the image.

    @property
    def axes(self) -> Shape:
        """The shape of the result, which must be a tensor."""
        if self.shape is None:
            raise NotExportable(f'the result of {self.kind} is no tensor')
        return self.shape

    def length(self, axis: int) -> int:
        """The length of an axis that does not depend on the number of images."""
        length = self.axes[axis]
        if length is None:
            raise NotExportable(f'a size of {self.kind} depends on the number of images')
        return length

    def tensor(self, name: str) -> Operation:
        """The operation whose result is the argument."""
        value = self.arguments[name]
        if not isinstance(value, Operation):
            raise NotExportable(f'{name} of {self.kind} is no tensor')
        return value

    def tensors(self, name: str) -> list[Operation]:
        """The operations whose results are the argument, a list of tensors."""
        values = self.arguments[name]
        if not isinstance(values, (list, tuple)):
            raise NotExportable(f'{name} of {self.kind} is no list')
        operations = [value for value in values if isinstance(value, Operation)]
        if len(operations) < len(values):
            raise NotExportable(f'{name} of {self.kind} holds more than tensors')
        return operations

    def number(self, name: str, default: int | None = None) -> int:
        """An argument that is a whole number. default: its value where it is missing or None."""
        value = self.arguments.get(name)
        value = default if value is None else value
        if not isinstance(value, int):
            raise NotExportable(f'{name} of {self.kind} is no plain number')
        return value

    def numbers(self, name: str) -> list[int]:
        """An argument that is a whole number or several, as a list."""
        argument = self.arguments[name]
        values = list(argument) if isinstance(argument, (list, tuple)) else [argument]
        numbers = [value for value in values if isinstance(value, int)]
        if len(numbers) < len(values):
            raise NotExportable(f'{name} of {self.kind} is not made of plain numbers')
        return numbers

    def pair(self, name: str) -> tuple[int, int]:
        """An argument for rows and for columns; a single number stands for both."""
        values = self.numbers(name)
        rows, columns = values if len(values) == 2 else 2 * values
        return rows, columns

    def sliding(self) -> Sliding:
        """How the kernel of a convolution slides (see `merge_sliding`)."""
        sliding = self.arguments['sliding']
        if not isinstance(sliding, Sliding):
            raise NotExportable(f'{self.kind} does not say how it slides')
        return sliding


def inputs_of(operation: Operation) -> list[Operation]:
    """The operations that are arguments, in the order in which `call_of` takes their results."""
    values: list[object] = []
    for value in operation.arguments.values():
        values += value if isinstance(value, list) else [value]
    return [value for value in values if isinstance(value, Operation)]


@dataclass
class Graph:
    """Operations in an order in which they can run."""

    operations: list[Operation]
    image: Operation
    output: Operation
    constants: dict[Operation, torch.Tensor]
    sizes: dict[Operation, Callable[[int], int]]  # number of images -> size
    # Constants that are the weights of `convolution`: how the kernel slides, and the shape of the
    # maps over which it slides.
    kernels: dict[Operation, tuple[Sliding, Shape]] = field(default_factory=dict)
    not_recorded: str | None = None  # why it comes from `torch.export`; None: it was recorded
    asks_for_gradients: bool = False  # whether the code looks whether a tensor needs a gradient

    def readers(self) -> dict[Operation, list[Operation]]:
        """For each operation those that read it. The output counts as a reader of itself."""
        readers = defaultdict(list)
        for operation in self.operations:
            for source in inputs_of(operation):
                readers[source].append(operation)
        readers[self.output].append(self.output)
        return readers

    def constant(self, value: torch.Tensor) -> Operation:
        """Add a constant."""
        operation = Operation('constant', None, {}, tuple(value.shape))
        self.operations.insert(0, operation)
        self.constants[operation] = value
        return operation

    def replace(self, old: Operation, new: Operation) -> None:
        """Let all readers of the old operation read the new one, and remove the old one."""
        for operation in self.operations:
            operation.arguments = {
                name: [new if part is old else part for part in value]
                if isinstance(value, list)
                else new if value is old else value
                for name, value in operation.arguments.items()
            }  # fmt: skip
        self.output = new if self.output is old else self.output
        self.operations.remove(old)


def call_of(operation: Operation, **changes: object) -> Compute:
    """The operation as a function of the values of its inputs. changes: of its other arguments."""
    arguments, target = operation.arguments | changes, operation.target
    assert target is not None  # the operation is computed
    names = [name for name, value in arguments.items() if isinstance(value, Operation)]
    if not any(isinstance(part, Operation) for value in arguments.values()
               if isinstance(value, list) for part in value):  # fmt: skip
        fixed = {name: value for name, value in arguments.items() if name not in names}
        # A pass calls hundreds of these, so each does as little as possible.
        return lambda *values: target(**fixed, **dict(zip(names, values, strict=True)))

    def compute(*values: object) -> object:
        left = iter(values)
        filled = {
            name: [next(left) if isinstance(part, Operation) else part for part in value]
            if isinstance(value, list)
            else next(left) if isinstance(value, Operation) else value
            for name, value in arguments.items()
        }  # fmt: skip
        return target(**filled)

    return compute


# --------------------------------------------------------------------------- torch.export


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide what torch prints while it traces; where it fails, `NotExportable` says why."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def _item_of(values: Sequence[object], index: int) -> object:
    return values[index]


def _computed(value: object) -> torch.fx.Node:
    """A value in an exported program as the node that computes it."""
    if not isinstance(value, torch.fx.Node):
        raise NotExportable('the network gives what does not depend on its input')
    return value


def _shape_of(node: torch.fx.Node) -> Shape | None:
    value = node.meta['val']
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(None if isinstance(size, torch.SymInt) else size for size in value.shape)


def _operation_of(
    node: torch.fx.Node, kind: str, target: Compute, arguments: dict[str, object]
) -> Operation:
    return Operation(kind, target, arguments, _shape_of(node))


class _Import:
    """Turns an exported program, in which nothing works in place any more, into a Graph."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.operations: dict[torch.fx.Node, Operation] = {}
        self.constants: dict[Operation, torch.Tensor] = {}
        self.sizes: dict[Operation, Callable[[int], int]] = {}
        self.made: list[Operation] = []  # in the order in which they run

    def graph(self) -> Graph:
        signature = self.program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise NotExportable('the network changes its buffers or its input')
        (image,) = signature.user_inputs  # its name
        for node in self.program.graph.nodes:
            if node.op == 'placeholder':
                self._add(node, self._placeholder(node, image))
            elif node.op == 'call_function':
                self._add_call(node)
            elif node.op == 'get_attr':
                raise NotExportable('parts of the network run under no_grad or autocast')
        results = next(n for n in self.program.graph.nodes if n.op == 'output').args[0]
        if not isinstance(results, (list, tuple)) or len(results) != 1:
            raise NotExportable('the network gives more than one result')
        source = next(o for o in self.made if o.kind == 'image')
        output = self.operations[_computed(results[0])]
        return Graph(self.made, source, output, self.constants, self.sizes)

    def _add(self, node: torch.fx.Node, operation: Operation) -> Operation:
        self.operations[node] = operation
        if operation not in self.made:
            self.made.append(operation)
        return operation

    def _placeholder(self, node: torch.fx.Node, image: object) -> Operation:
        """The image, or a constant."""
        if node.name == image:
            operation = Operation('image', None, {}, _shape_of(node))
        else:
            signature = self.program.graph_signature
            tables = (signature.inputs_to_parameters, signature.inputs_to_buffers,
                      signature.inputs_to_lifted_tensor_constants)  # fmt: skip
            name = next(table[node.name] for table in tables if node.name in table)
            parameter = self.program.state_dict.get(name)
            value = self.program.constants[name] if parameter is None else parameter
            operation = Operation('constant', None, {}, tuple(value.shape))
            self.constants[operation] = value.detach()
        return operation

    def _add_call(self, node: torch.fx.Node) -> None:
        value, target = node.meta.get('val'), node.target
        if isinstance(value, torch.SymInt):
            self._add_size(node, value)
        elif value is None or isinstance(value, torch.SymBool):
            return  # an assertion, or its condition
        elif target is operator.getitem:
            self._add_item(node)
        elif isinstance(target, Operator):
            args = [self._argument(value) for value in node.args]
            kwargs = {name: self._argument(value) for name, value in node.kwargs.items()}
            arguments = named_arguments(target, args, kwargs)
            if writes_in_place(target):
                raise NotExportable(f'{name_of(target)} changes a tensor in place')
            self._add(node, _operation_of(node, name_of(target), target, arguments))
        else:
            raise NotExportable(f'the network holds {target}, which is no plain operation')

    def _add_size(self, node: torch.fx.Node, value: torch.SymInt) -> None:
        import sympy  # torch.export has imported it by now

        expression = expression_of(value)
        symbols = sorted(expression.free_symbols, key=str)
        if len(symbols) > 1:
            raise NotExportable('sizes depend on more than the number of images')
        operation = self._add(node, Operation('size', None, {}, None))
        self.sizes[operation] = sympy.lambdify(symbols or [sympy.Symbol('n')], expression)

    def _argument(self, value: object) -> object:
        """An argument of a call, with operations in place of nodes."""
        if isinstance(value, torch.fx.Node):
            if value not in self.operations:
                raise NotExportable(f'{value.target} is no plain value')
            return self.operations[value]
        if isinstance(value, (list, tuple)):
            return [self._argument(part) for part in value]
        if isinstance(value, dict):
            return {name: self._argument(part) for name, part in value.items()}
        return value

    def _add_item(self, node: torch.fx.Node) -> None:
        """One of several results of an operation; the parts of a split tensor become slices."""
        source, index = _computed(node.args[0]), node.args[1]
        assert isinstance(index, int)  # of a tuple
        operation = self.operations[source]
        if operation.kind in ('split', 'split_with_sizes', 'chunk'):
            dim = operation.number('dim', 0)
            sizes = [part.shape[dim] for part in source.meta['val']]
            if any(isinstance(size, torch.SymInt) for size in sizes):
                raise NotExportable('the batch is split')
            start = sum(sizes[:index])
            arguments = {'self': inputs_of(operation)[0], 'dim': dim, 'start': start,
                         'end': start + sizes[index], 'step': 1}  # fmt: skip
            self._add(node, _operation_of(node, 'slice', aten.slice.Tensor, arguments))
        elif operation.kind == '_native_batch_norm_legit_no_training' and index == 0:
            operation.shape = _shape_of(node)
            operation.kind, operation.target = 'batch_norm', aten.batch_norm.default
            operation.arguments |= {'training': False, 'cudnn_enabled': False}
            self._add(node, operation)
        else:
            arguments = {'values': operation, 'index': index}
            self._add(node, _operation_of(node, 'getitem', _item_of, arguments))


def export(network: nn.Module, example: torch.Tensor) -> Graph:
    """The graph of a network as `torch.export` traces it. Arguments and errors: see `trace`."""
    try:
        with _silence(), torch.enable_grad():
            pair = example[:1].detach().repeat(2, 1, 1, 1)  # torch takes a batch of 1 as constant
            batch = {0: torch.export.Dim('batch', min=1)}
            program = torch.export.export(network, (pair,), dynamic_shapes=(batch,), strict=False)
            return _Import(program.run_decompositions({})).graph()  # nothing is in place then
    except NotExportable:
        raise
    except Exception as error:  # any error that the network's code may raise
        first = next(iter(str(error).strip().splitlines()), '')
        raise NotExportable(f'{type(error).__name__}: {first[:200]}') from error


# --------------------------------------------------------------------------- recording

RECORDED = (2, 3, 5)  # numbers of images; a size that is linear in these is so in all
NEEDS_GRADIENT = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
WITHOUT_CHANCE = {'train': False, 'training': False, 'dropout_p': 0.0}  # nothing random is done


def _mapped(value: Any, function: Callable[[torch.Tensor], object]) -> Any:
    """A value of an operator, also a list, with the results of a function in place of tensors."""
    if isinstance(value, (list, tuple)):
        return [_mapped(part, function) for part in value]
    return function(value) if isinstance(value, torch.Tensor) else value


def _on_meta(operator: Operator, arguments: Mapping[str, object]) -> Any:
    """The result of an operator whose tensors are put on the meta device."""
    named = {name: _mapped(value, lambda t: t.to('meta')) for name, value in arguments.items()}
    return operator(**named)


class _Recorder(OperatorMode):
    """Records the operations of a network that runs on meta tensors inside this mode.

    The mode stands inside `torch.inference_mode`, where PyTorch shows it whole operators, such as
    `conv2d`, and not the parts into which autograd takes them. What writes in place is recorded as
    the operator that does not, if no other tensor may share the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.constants: dict[Operation, torch.Tensor] = {}
        self.output: Operation | None = None  # which gives the result of the network
        self._by_tensor: dict[int, Operation] = {}
        self._kept: list[torch.Tensor] = []  # a tensor that is gone would give its identity away
        self._aliased: set[Operation] = set()  # operations that may share memory with others
        self.of_image: set[Operation] = set()  # operations that depend on the image
        self.asked = False  # see `Graph.asks_for_gradients`

    def add(
        self, operation: Operation, tensor: torch.Tensor | None = None, aliased: bool = False
    ) -> Operation:
        """Add an operation. tensor: its result. aliased: whether it may share memory."""
        self.operations.append(operation)
        if operation.kind == 'image' or self.of_image.intersection(inputs_of(operation)):
            if not torch.is_grad_enabled():
                raise GradientOfItsOwn(
                    'parts of the network run under torch.no_grad, or as a torch.autograd.Function'
                )
            self.of_image.add(operation)
        if tensor is not None:
            self._by_tensor[id(tensor)] = operation
            self._kept.append(tensor)
        self._aliased |= {operation} if aliased else set()
        return operation

    def constant(self, value: torch.Tensor, meta: torch.Tensor | None = None) -> Operation:
        """Add a fixed value. meta: the tensor that stands for it."""
        operation = Operation('constant', None, {}, tuple(value.shape))
        self.constants[operation] = value
        return self.add(operation, meta, aliased=True)

    def operation_of(self, tensor: torch.Tensor) -> Operation:
        """The operation that gave a tensor. A tensor with values is a constant."""
        if not tensor.is_meta:
            with torch.inference_mode(False):
                return self.constant(tensor.detach().clone())
        if id(tensor) not in self._by_tensor:
            raise NotExportable('the network holds a tensor that comes from nowhere')
        return self._by_tensor[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = named_arguments(func, args, kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and not any(
            arguments.get(name, True) == value for name, value in WITHOUT_CHANCE.items()
        ):
            raise NotExportable(f'{name_of(func)} draws random numbers')
        given: list[torch.Tensor] = []
        _mapped(list(arguments.values()), given.append)
        if not any(tensor.is_meta for tensor in given):
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor) or not result.is_meta:
                return result  # a value that does not depend on the image
        elif writes_in_place(func):
            return self._in_place(func, arguments)
        else:
            result = _on_meta(func, arguments)
        if name_of(func) == 'to' or not any(result is tensor for tensor in given):
            self._record(func, arguments, result)
        return result

    def _record(self, func: Operator, arguments: dict[str, object], result: object) -> None:
        """Note that an operator gave a result: a tensor, or several in a list."""
        kind = name_of(func)
        arguments = {name: _mapped(value, self.operation_of) for name, value in arguments.items()}
        if isinstance(result, torch.Tensor):
            operation = Operation(kind, func, arguments, tuple(result.shape))
            self.add(operation, result)
            if shares_memory(func) or 'dropout' in kind or kind == 'type_as':
                self._aliased |= {operation, *inputs_of(operation)[:1]}
            return
        operation, start = self.add(Operation(kind, func, arguments, None)), 0
        self._aliased |= {*inputs_of(operation)[:1]}
        parts = enumerate(result) if isinstance(result, (list, tuple)) else ()
        for index, part in parts:
            if not isinstance(part, torch.Tensor):
                continue
            item = Operation('getitem', _item_of, {'values': operation, 'index': index}, ())
            if kind in ('split', 'split_with_sizes', 'chunk'):
                length = part.shape[operation.number('dim', 0)]
                item = Operation('slice', aten.slice.Tensor, {
                    'self': inputs_of(operation)[0], 'dim': operation.number('dim', 0),
                    'start': start, 'end': start + length, 'step': 1}, ())  # fmt: skip
                start += length
            item.shape = tuple(part.shape)
            self.add(item, part, aliased=True)

    def _in_place(self, func: Operator, arguments: dict[str, Any]) -> torch.Tensor:
        """Note an operator that writes into its first argument, which is the result."""
        kind, written = name_of(func), next(iter(arguments.values()))
        same = same_overload(func, kind.removesuffix('_')) if kind.endswith('_') else None
        if same is None or not written.is_meta or self.operation_of(written) in self._aliased:
            raise NotExportable(f'{kind} changes a tensor in place')
        arguments = named_arguments(same, list(arguments.values()), {})
        result = _on_meta(same, arguments)
        if (result.shape, result.dtype) != (written.shape, written.dtype):
            raise NotExportable(f'{kind} changes the shape or the type of a tensor in place')
        recorded = {name: _mapped(value, self.operation_of) for name, value in arguments.items()}
        shape = tuple(result.shape)
        self.add(Operation(kind.removesuffix('_'), same, recorded, shape), written)
        return written


class _Watch(TorchFunctionMode):
    """Refuses functions under autocast, which does nothing to meta tensors, and notes whether the
    code looks for gradients, which meta tensors do not need."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.asked = device, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked |= func == NEEDS_GRADIENT
        if torch.is_autocast_enabled(self.device):
            raise NotExportable('parts of the network run under autocast')
        return func(*args, **(kwargs or {}))


def _recording(network: nn.Module, example: torch.Tensor, count: int) -> _Recorder:
    """The operations of a network for so many images. It runs as a copy, whose weights are meta
    tensors, so that it stays as it was."""
    recorder = _Recorder()
    memo: dict[int, Any] = {}
    for weight in (*network.parameters(), *network.buffers()):
        meta = weight.detach().to('meta')
        meta = nn.Parameter(meta, False) if isinstance(weight, nn.Parameter) else meta
        memo[id(weight)] = meta
        recorder.constant(weight.detach(), meta)
    with torch.inference_mode(), torch.enable_grad():
        meta_network = copy.deepcopy(network, memo)
        x = torch.empty((count, *example.shape[1:]), dtype=example.dtype, device='meta')
        recorder.add(Operation('image', None, {}, tuple(x.shape)), x, aliased=True)
        with recorder, _Watch(example.device.type) as watch:
            result = meta_network(x)
        recorder.asked = watch.asked
        if not isinstance(result, torch.Tensor):
            raise NotExportable('the network gives more than one result')
        recorder.output = recorder.operation_of(result)
        if recorder.output not in recorder.of_image:
            raise NotExportable('the network gives what does not depend on its input')
    return recorder


def _on_line(summand: int, factor: int, count: int) -> int:
    return summand + factor * count


class _Merge:
    """Makes one graph, for any number of images, of recordings for several numbers."""

    def __init__(self, recordings: Sequence[_Recorder], device: torch.device) -> None:
        self.recordings, self.device = recordings, device
        self.numbers = [{o: n for n, o in enumerate(r.operations)} for r in recordings]
        self.sizes: dict[tuple[int, int], Operation] = {}  # (summand, factor) -> size

    def graph(self) -> Graph:
        first = self.recordings[0]
        if len({len(recording.operations) for recording in self.recordings}) > 1:
            raise NotExportable('its operations depend on the number of images')
        for same in zip(*(recording.operations for recording in self.recordings), strict=True):
            if len({(operation.kind, operation.target) for operation in same}) > 1:
                raise NotExportable('its operations depend on the number of images')
            if same[0].kind == 'constant':
                self._check_constant(same)
            arguments = [operation.arguments for operation in same]
            same[0].arguments = {name: self._argument([a[name] for a in arguments])
                                 for name in arguments[0]}  # fmt: skip
            same[0].shape = self._shape([operation.shape for operation in same])
        output = self._argument([recording.output for recording in self.recordings])
        assert isinstance(output, Operation)  # as in every recording
        image = next(operation for operation in first.operations if operation.kind == 'image')
        sizes: dict[Operation, Callable[[int], int]]
        sizes = {o: partial(_on_line, *key) for key, o in self.sizes.items()}
        return Graph([*sizes, *first.operations], image, output, first.constants, sizes,
                     asks_for_gradients=first.asked)  # fmt: skip

    def _check_constant(self, same: Sequence[Operation]) -> None:
        values = [r.constants[o] for r, o in zip(self.recordings, same, strict=True)]
        first = values[0]
        for value in values[1:]:
            alike = value.data_ptr() == first.data_ptr() or torch.equal(value, first)
            if not alike or value.dtype != first.dtype:
                raise NotExportable('a value depends on the number of images')

    def _linear_in_count(self, values: Sequence[int]) -> tuple[int, int]:
        """The summand and the factor with which a number follows from the number of images."""
        if len(set(values)) == 1:
            return values[0], 0
        (a, b, c), (m, n, last) = values, RECORDED
        factor, rest = divmod(b - a, n - m)
        summand = a - m * factor
        if rest or summand + last * factor != c:
            raise NotExportable('a number does not follow from the number of images')
        return summand, factor

    def _shape(self, shapes: Sequence[Shape | None]) -> Shape | None:
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes) or len({len(shape) for shape in known}) > 1:
            return None
        lengths = [self._linear_in_count([size or 0 for size in sizes])
                   for sizes in zip(*known, strict=True)]  # fmt: skip
        return tuple(None if factor else length for length, factor in lengths)

    def _argument(self, values: Sequence[Any]) -> object:
        """An argument of one operation, from its values in all recordings."""
        first = values[0]
        if isinstance(first, Operation):
            places = {n.get(value) for n, value in zip(self.numbers, values, strict=True)}
            if len(places) == 1:
                return first
        elif isinstance(first, (list, tuple)):
            if len({len(value) for value in values}) == 1:
                return [self._argument(parts) for parts in zip(*values, strict=True)]
        elif isinstance(first, torch.device):
            return self.device if first.type == 'meta' else first
        elif all(value == first and type(value) is type(first) for value in values):
            return first
        elif all(type(value) is int for value in values):
            key = self._linear_in_count(values)
            return self.sizes.setdefault(key, Operation('size', None, {}, None))
        raise NotExportable('an argument depends on the number of images')


def record(network: nn.Module, example: torch.Tensor, counts: Sequence[int] = RECORDED) -> Graph:
    """The graph of a network from its operations on meta tensors. counts: the numbers of images for
    which it is recorded: RECORDED, or a single number, for which alone the graph then holds. Other
    arguments, and errors: see `trace`."""
    try:
        with _silence():
            recordings = [_recording(network, example, count) for count in counts]
        return _Merge(recordings, example.device).graph()
    except GradientOfItsOwn:
        raise
    except Exception as error:  # any error that the network's code may raise
        first = next(iter(str(error).strip().splitlines()), '')
        raise NotExportable(first[:200] or type(error).__name__) from error


def trace(network: nn.Module, example: torch.Tensor) -> Graph:
    """The graph of a network whose result is one tensor, for batches of images like the example.

    network: frozen, in evaluation mode. example: (N, C, H, W). Raises NotExportable, with the
    reason.
    """
    try:
        return record(network, example)
    except GradientOfItsOwn:
        raise  # an export would not show it
    except NotExportable as error:
        graph = export(network, example)
        graph.not_recorded = str(error)
        return graph
