"""The identity of a network: digests of its weights, its structure and its code, and of files; and
a fingerprint, which shows quickly whether a network has changed within one process."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePath
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

# Attributes of a module that `load_model` made; users may set the second on their modules.
ATTRIBUTE, PREPROCESSING = 'network_description', 'preprocessing'

HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')

MODULE_PARTS = {*vars(torch.nn.Module()), ATTRIBUTE, PREPROCESSING}  # no settings of the user

# What `fingerprint` gives: equal while a network stays as it is.
Fingerprint = tuple[object, ...]

# Types of values that enter digests and fingerprints as they are.
VALUE_TYPES = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.device,
               PurePath, np.generic, slice, range)  # fmt: skip


def has_backward_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks of a module see, and may change, its gradients."""
    return any(getattr(module, name, None) for name in HOOKS if 'backward' in name)


def _attributes(module: torch.nn.Module) -> tuple[dict, dict]:
    """The attributes of a module that the user's code has set, and its hooks, which can change its
    output."""
    attributes = {key: value for key, value in vars(module).items() if key not in MODULE_PARTS}
    return attributes, {key: list(vars(module).get(key, {}).values()) for key in HOOKS}


@dataclass(frozen=True)
class _Inner:
    """A value inside another value. `_parts` replaces it with its parts."""

    value: object


def _unordered(value: object) -> str:
    """A text for an element of a set, which can be sorted: the order of a set changes from process
    to process."""
    plain = isinstance(value, (*VALUE_TYPES, tuple)) or value is None
    return repr(value) if plain else getattr(value, '__qualname__', type(value).__qualname__)


def _tensor(value: torch.Tensor) -> Iterator[bytes]:
    """The type, the shape and the numbers of a tensor; only the first two where there are no
    numbers."""
    try:
        yield f'{value.dtype} {tuple(value.shape)} {value.layout}'.encode()
        dense = value.detach().cpu().to_dense() if value.is_sparse else value.detach().cpu()
        numbers = dense.resolve_conj().resolve_neg().contiguous().flatten()
        yield numbers.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError, ValueError):  # meta, nested, or lazy
        return


@cache
def of_library(module: str) -> bool:
    """Whether a module belongs to an installed library or to Python. Then its name is enough for a
    digest, and its code is not read."""
    package = module.partition('.')[0]
    if package in ('builtins', *sys.stdlib_module_names):
        return package != '__main__'
    file = str(getattr(sys.modules.get(package), '__file__', None) or '')
    return 'site-packages' in file or 'dist-packages' in file


def _class(kind: type) -> Iterator[bytes | _Inner]:
    """The names of a class and its bases; also the code and the attributes of those that belong to
    no library."""
    for base in kind.__mro__:
        yield f'{base.__module__}.{base.__qualname__}'.encode()
        if not of_library(base.__module__):
            attributes = {
                k: v for k, v in vars(base).items() if not k.startswith('__') or callable(v)
            }
            for name, value in attributes.items():
                value = getattr(value, '__func__', getattr(value, 'fget', value))
                holds_value = isinstance(value, (*VALUE_TYPES, list, tuple, dict))
                if holds_value or hasattr(value, '__code__'):
                    yield name.encode()
                    yield _Inner(value)


def _byte_code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code + ' '.join(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside
            yield from _byte_code(constant)
        else:
            yield from _parts(constant, {})


def _function(function: Any) -> Iterator[bytes | _Inner]:
    """The byte code of a function, its constants, and everything that it uses by name."""
    bound = getattr(function, '__self__', None)
    function = getattr(function, '__func__', function)
    yield getattr(function, '__qualname__', '').encode()
    code = getattr(function, '__code__', None)
    if not isinstance(code, CodeType) or of_library(str(function.__module__)):
        return
    yield from _byte_code(code)
    yield _Inner((function.__defaults__, function.__kwdefaults__))
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the cell is still empty
            yield _Inner(cell.cell_contents)
    for name in code.co_names:
        if name in function.__globals__:
            yield _Inner(function.__globals__[name])
    if bound is not None and not isinstance(bound, (torch.nn.Module, type, ModuleType)):
        yield _Inner(bound)


def _pieces(value: object, visited: dict[int, object]) -> Iterator[bytes | _Inner]:
    """The parts of one value. Values inside it are returned as `_Inner`. visited: see
    `structure_digest`."""
    if value is None or isinstance(value, VALUE_TYPES):
        yield f'{type(value).__name__} {value!r}'.encode(errors='backslashreplace')
        return
    if id(value) in visited:
        return
    visited[id(value)] = value
    if isinstance(value, torch.Tensor):
        yield from _tensor(value)
    elif isinstance(value, np.ndarray):
        yield f'{value.dtype} {value.shape}'.encode()
        yield _Inner(value.tolist()) if value.dtype.hasobject else value.tobytes()
    elif isinstance(value, (dict, list, tuple)):
        for pair in value.items() if isinstance(value, dict) else enumerate(value):
            yield from map(_Inner, pair)
    elif isinstance(value, (set, frozenset)):
        yield ' '.join(sorted(map(_unordered, value))).encode(errors='backslashreplace')
    elif isinstance(value, partial):
        yield _Inner((value.func, value.args, value.keywords))
    elif isinstance(value, type):
        yield from _class(value)
    elif hasattr(value, '__code__') or hasattr(value, '__func__'):
        yield from _function(value)
    elif isinstance(value, ModuleType):
        yield value.__name__.encode()
        file = getattr(value, '__file__', None)
        if file and not of_library(value.__name__):  # all of it: the parts in use are unknown
            with contextlib.suppress(OSError):
                yield Path(file).read_bytes()
    elif isinstance(value, torch.nn.Module):  # a module that is no registered child
        yield _Inner(type(value))
        yield from map(_Inner, _attributes(value))
        yield _Inner([*value.parameters(), *value.buffers(), *value.children()])
    else:  # an object of any other class, or a function in C
        yield getattr(value, '__qualname__', type(value).__qualname__).encode()
        settings = isinstance(value, (SimpleNamespace, Namespace))
        if settings or not of_library(type(value).__module__):
            yield _Inner(type(value))
            yield _Inner(getattr(value, '__dict__', None))


def _parts(value: object, visited: dict[int, object]) -> Iterator[bytes]:
    """Everything in a value, at any depth, that may decide what is computed. Addresses in memory
    are left out, since the digest must be the same in other processes. visited: see
    `structure_digest`."""
    # A list instead of recursion, since code may be nested very deep.
    waiting: list[Iterator[bytes | _Inner]] = [iter((_Inner(value),))]
    while waiting:
        piece = next(waiting[-1], None)
        if piece is None:
            waiting.pop()
        elif isinstance(piece, _Inner):
            waiting.append(_pieces(piece.value, visited))
        else:
            yield piece


def structure_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a network without its weights: of the tree of modules, their attributes and hooks,
    and the code of their classes and of everything that this code uses, except code of
    libraries."""
    digest = hashlib.sha256()
    visited: dict[int, object] = {}  # by id; keeping the objects alive keeps their ids unique
    for name, module in model.named_modules():
        digest.update(name.encode())
        for value in (type(module), *_attributes(module)):
            for part in _parts(value, visited):
                digest.update(part)
    return digest.hexdigest()


def plain_attributes(model: torch.nn.Module) -> tuple:
    """The numbers, texts and other plain values among the attributes of a network's modules."""
    return tuple(
        value
        for module in model.modules()
        for key, value in vars(module).items()
        if isinstance(value, VALUE_TYPES) and key not in MODULE_PARTS
    )


def network_digest(model: torch.nn.Module) -> str:
    """SHA-256 of everything that can be read and that decides what a module computes: weights,
    buffers, and everything in `structure_digest`."""
    digest = hashlib.sha256(structure_digest(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        for part in _tensor(tensor):
            digest.update(part)
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> Fingerprint:
    """A value that changes when the network changes: its plain attributes; and of its weights the
    addresses, how often each was changed in place, and three sums. Computing it takes about a
    thousandth of the time of a gradient."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    places = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    parts = (plain_attributes(model), *places)
    if not tensors:
        return parts
    with torch.no_grad():  # the second and the third sum change where values are swapped
        sums = [t.sum(dtype=torch.float32) for t in tensors]
        sums += [t.flatten()[::2].sum(dtype=torch.float32) for t in tensors]
        sums += [t.flatten()[: t.numel() // 2].sum(dtype=torch.float32) for t in tensors]
    return (*parts, *torch.stack(sums).tolist())


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with file.open('rb') as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
