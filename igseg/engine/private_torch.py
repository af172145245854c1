"""The private parts of PyTorch that the engine uses, all of them, and nothing else.

A private part may change or go with any release of torch. `requirements.txt` therefore has an
upper bound for torch. Tried with torch 2.14.1. To try a newer torch, install it and run the tests
of the folders `tests/engine` and `tests/network`: they compare every kind of operation and whole
networks with what torch itself computes. Where one of these parts is gone, a network has no graph
and runs as it is (`NotExportable`), or its weights are not packed: slower, with the same result.

    Operator, and the functions of one   `torch._ops.OpOverload`, `_schema`, `_overloadname`: which
                                         operator a node of an exported program calls, what its
                                         arguments are called, what it writes and what it shares
    expression_of                        `SymInt.node.expr`: how a size follows from the number of
                                         images
    packed_weight, convolve_packed       `torch.ops.mkldnn._reorder_convolution_weight` and
                                         `_convolution_pointwise`: weights in oneDNN's own order

Beside these, `igseg.network.identity` reads `Tensor._version` and the names of the dictionaries in
which modules keep their hooks, since no public function tells either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import sympy

Operator = torch._ops.OpOverload

WithoutDefault = object()  # stands for the default of an argument that has none


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
    """The operator of another name that takes the same kinds of arguments; None: there is none."""
    packet = getattr(torch.ops.aten, name, None)
    return getattr(packet, operator._overloadname, None)


def arguments_of(operator: Operator) -> Iterator[tuple[str, object]]:
    """The names of the arguments of an operator in their order, and their defaults."""
    for argument in operator._schema.arguments:
        known = argument.has_default_value()
        yield argument.name, argument.default_value if known else WithoutDefault


def expression_of(size: torch.SymInt) -> sympy.Expr:
    """How a size follows from the number of images."""
    return size.node.expr


# --------------------------------------------------------------------------- oneDNN


def packed_weight(
    weight: torch.Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shape: Sequence[int],
) -> torch.Tensor:
    """The weights of a convolution in the order in which oneDNN computes with them on maps of that
    shape. Raises AttributeError or RuntimeError where there is no oneDNN, or it takes no such."""
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
