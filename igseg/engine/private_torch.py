"""All private parts of PyTorch that the engine uses, and nothing else.

A private part may change or disappear with any release of torch. `requirements.txt` therefore has
an upper bound for torch. These parts were tested with torch 2.14.1. To try a newer torch, install
it and run the tests of the folders `tests/engine` and `tests/network`: they compare every kind of
operation, and whole networks, with what torch itself computes. Where one of these parts is missing,
the network has no graph and runs unchanged (`NotExportable`), or its weights are not packed. Both
are slower and give the same result.

    Operator, and its functions          `torch._ops.OpOverload`, `_schema`, `_overloadname`: which
                                         operator a node of an exported program calls, the names of
                                         its arguments, what it writes and which memory it shares
    expression_of                        `SymInt.node.expr`: how a size follows from the number of
                                         images
    OperatorMode                         `torch.utils._python_dispatch.TorchDispatchMode`, a mode
                                         that sees every operator, and its `_should_skip_dynamo`
    packed_weight, convolve_packed       `torch.ops.mkldnn._reorder_convolution_weight` and
                                         `_convolution_pointwise`: weights in the order of oneDNN

`igseg.network.identity` also reads `Tensor._version`, and the names of the dictionaries in which
modules keep their hooks: no public function gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    import sympy

Operator = torch._ops.OpOverload

WithoutDefault = object()  # marks an argument that has no default


# --------------------------------------------------------------------------- operators


def name_of(operator: Operator) -> str:
    """The name of an operator without its library: `conv2d`."""
    return operator._schema.name.split('::')[1]


def writes_in_place(operator: Operator) -> bool:
    """Whether an operator changes one of its arguments."""
    return bool(operator._schema.is_mutable)


def shares_memory(operator: Operator) -> bool:
    """Whether the first result of an operator may be a view of one of its arguments."""
    returns = operator._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def same_overload(operator: Operator, name: str) -> Operator | None:
    """The operator with another name and the same kinds of arguments; None: there is none."""
    packet = getattr(torch.ops.aten, name, None)
    return getattr(packet, operator._overloadname, None)


def arguments_of(operator: Operator) -> Iterator[tuple[str, object]]:
    """The names of an operator's arguments, in their order, and the default of each."""
    for argument in operator._schema.arguments:
        has_default = argument.has_default_value()
        yield argument.name, argument.default_value if has_default else WithoutDefault


def named_arguments(
    target: Operator, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """All arguments of a call by their names."""
    named = {}
    for number, (name, default) in enumerate(arguments_of(target)):
        if number < len(args):
            named[name] = args[number]
        elif name in kwargs:
            named[name] = kwargs[name]
        elif default is not WithoutDefault:
            named[name] = default
    return named


def expression_of(size: torch.SymInt) -> sympy.Expr:
    """How a size follows from the number of images."""
    return size.node.expr


class OperatorMode(TorchDispatchMode):
    """A mode inside which `__torch_dispatch__` sees every operator."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without this, torch imports its compiler for each such mode, which takes a second."""
        return False


# --------------------------------------------------------------------------- oneDNN


def packed_weight(
    weight: torch.Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shape: Sequence[int],
) -> torch.Tensor:
    """The weights of a convolution in the order that oneDNN uses for maps of this shape.

    Raises AttributeError or RuntimeError where there is no oneDNN, or where oneDNN does not support
    such a convolution."""
    pack: Any = torch.ops.mkldnn._reorder_convolution_weight
    return pack(weight, padding, stride, dilation, groups, list(shape))


def convolve_packed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """A convolution of maps (N, I, h, w) with the weights of `packed_weight`."""
    convolve: Any = torch.ops.mkldnn._convolution_pointwise
    return convolve(x, weight, bias, padding, stride, dilation, groups, 'none', [], '')
