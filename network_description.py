"""What a network is to this toolkit: what it takes, what its outputs mean, and which one it is.

Found out once, at loading or from any module given to `IntegratedGradients`, and asked by
everything else: targets, masks, figures, statistics, and the key by which finished results are
recognised.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import PurePath
from types import CodeType, ModuleType, SimpleNamespace

import numpy as np
import torch

from errors import InputError
from segmentation_dataset import SIZE_MULTIPLE, Preprocessing

FOREGROUND = 'foreground'  # one logit map: the probability of the one class is its sigmoid
EXCLUSIVE = 'exclusive'  # several: a softmax over classes, of which one is background
ATTRIBUTE = 'network_description'  # of a module that `load_model` made
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
MODULE_PARTS = {*vars(torch.nn.Module()), ATTRIBUTE, 'preprocessing'}  # seen to elsewhere
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.device, PurePath,
         np.generic, slice, range)  # fmt: skip


@dataclass(frozen=True)
class NetworkDescription:
    """A segmentation network: input (N, C, H, W), output logits (N, K, h, w)."""

    channels: int = 3  # C
    size_multiple: int = 1  # both sides of the input must be multiples of it
    fixed_size: int | None = None  # the only side that it takes, where there is one
    output_kind: str | None = None  # FOREGROUND or EXCLUSIVE; None: by the number of logit maps
    background: int = 0  # the label that is no object
    preprocessing: Preprocessing = field(default_factory=Preprocessing)  # what it was trained with
    weights_sha256: str = ''  # of the weights and the structure, wherever they came from
    source: dict[str, object] = field(default_factory=dict)  # file, architecture, encoder, classes
    notes: tuple[str, ...] = ()  # what was decided when it was loaded, in sentences

    def kind(self, logits: torch.Tensor) -> str:
        """What logits (…, K, h, w) mean."""
        return self.output_kind or (FOREGROUND if logits.shape[-3] == 1 else EXCLUSIVE)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, K, h, w) logits -> probabilities: sigmoid for one class, softmax for several."""
        return logits.sigmoid() if self.kind(logits) == FOREGROUND else logits.softmax(dim=1)

    def labels(self, logits: torch.Tensor, threshold: float) -> torch.Tensor:
        """(…, K, h, w) logits -> (…, h, w) int64 classes: by threshold for one class, else the
        highest."""
        if self.kind(logits) == FOREGROUND:
            return (logits[..., 0, :, :].sigmoid() > threshold).long()
        return logits.argmax(dim=-3)

    def foreground(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels of any shape -> bool: what is not background."""
        return labels != self.background

    def explained(
        self, logits: torch.Tensor, labels: torch.Tensor, label: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask (h, w) bool and probability (h, w), 0-1, of a class; of the foreground for None.

        logits: (1, K, h, w). labels: (h, w), those predicted.
        """
        chances = self.probabilities(logits)[0].float()
        if label is not None:
            return labels == label, chances[label]
        if self.kind(logits) == FOREGROUND:
            return self.foreground(labels), chances[0]
        return self.foreground(labels), 1 - chances[self.background]

    def accepted_size(self, size: int) -> int:
        """The smallest side from `size` on that the network takes. Where it could not be asked,
        or takes any, a multiple of 32, which encoder-decoders are made for."""
        return self.fixed_size or -(-size // self.step) * self.step

    @property
    def step(self) -> int:
        """Sides are rounded up to a multiple of it."""
        return self.fixed_size or (self.size_multiple if self.size_multiple > 1 else SIZE_MULTIPLE)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise InputError for a shape that is not (C, H, W) or (1, C, H, W), or of a size that
        the network does not take."""
        fits = len(shape) == 3 or (len(shape) == 4 and shape[0] == 1)
        if not fits or shape[-3] != self.channels:
            c = self.channels
            raise InputError(f'input_tensor must be ({c}, H, W) or (1, {c}, H, W), not {shape}')
        height, width = shape[-2:]
        if self.fixed_size and (height, width) != (self.fixed_size,) * 2:
            raise InputError(
                f'the network takes inputs of {self.fixed_size}×{self.fixed_size} only, not '
                f'{width}×{height}'
            )
        step = self.size_multiple
        if height % step or width % step:
            raise InputError(
                f'the network takes sides that are multiples of {step}, not {width}×{height} '
                f'(pad it to {-(-width // step) * step}×{-(-height // step) * step})'
            )

    def record(self) -> dict[str, object]:
        """For the statistics file: where the network came from, and which one it is. What was
        done to the input stands there by itself, since settings may override it."""
        own = asdict(self)
        del own['preprocessing'], own['source'], own['notes']
        return {**self.source, **own}


def describe_network(
    model: torch.nn.Module, preprocessing: Preprocessing | None = None
) -> NetworkDescription:
    """The description of any module, as it is now; all its weights are read for it.

    preprocessing: what it was trained with; None: what `load_model` found, else what the user set
    as `model.preprocessing`, else ImageNet's.
    """
    known = known_description(model)
    return replace(
        known,
        preprocessing=preprocessing or known.preprocessing,
        weights_sha256=network_digest(model),
    )


def known_description(model: torch.nn.Module) -> NetworkDescription:
    """The description of any module but for its digest, which may be none or an earlier one:
    at once, without reading the weights."""
    known = getattr(model, ATTRIBUTE, None)
    if known is None:
        multiple, fixed = accepted_sizes(model)
        known = NetworkDescription(size_multiple=multiple, fixed_size=fixed)
    own = getattr(model, 'preprocessing', None) or known.preprocessing
    return replace(known, preprocessing=own)


def accepted_sizes(model: torch.nn.Module) -> tuple[int, int | None]:
    """What both sides of an smp model's input must be multiples of (1 where it does not say), and
    the only side it takes, where there is one."""
    encoder = getattr(model, 'encoder', None)
    fixed = None
    network = getattr(encoder, 'model', None)
    dynamic = getattr(network, 'dynamic_img_size', False)
    if getattr(encoder, 'is_fixed_input_size', False) is True and not dynamic:
        made_for = getattr(getattr(network, 'patch_embed', None), 'img_size', None)
        sides = made_for or getattr(encoder, 'input_size', None)
        fixed = int(sides[-1]) if isinstance(sides, (tuple, list)) else None
    if not getattr(model, 'requires_divisible_input_shape', False):
        return 1, fixed
    return int(getattr(encoder, 'output_stride', 1)), fixed


# --------------------------------------------------------------------------- identity


def network_digest(model: torch.nn.Module) -> str:
    """SHA-256 of that by which two modules compute different things, as far as it can be seen:
    weights and buffers, and all of `structure_digest`."""
    digest = hashlib.sha256(structure_digest(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        for part in _tensor(tensor):
            digest.update(part)
    return digest.hexdigest()


def structure_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a network without its weights: the tree of modules, their attributes and hooks,
    and the code of their classes and of what that code uses, but for what libraries hold."""
    digest = hashlib.sha256()
    kept: dict[int, object] = {}  # what was seen; kept, so that no id is used twice
    for name, module in model.named_modules():
        digest.update(name.encode())
        for part in (*_parts(type(module), kept), *_attributes(module, kept)):
            digest.update(part)
    return digest.hexdigest()


def plain_attributes(model: torch.nn.Module) -> tuple:
    """The numbers and texts among the attributes of a network's modules; quickly."""
    return tuple(
        value
        for module in model.modules()
        for key, value in vars(module).items()
        if isinstance(value, PLAIN) and key not in MODULE_PARTS
    )


def _attributes(module: torch.nn.Module, kept: dict[int, object]) -> Iterator[bytes]:
    """What belongs to a module itself: its attributes, and the hooks that change what it gives."""
    own = {key: value for key, value in vars(module).items() if key not in MODULE_PARTS}
    hooks = {key: list(vars(module).get(key, {}).values()) for key in HOOKS}
    for value in (own, hooks):
        yield from _parts(value, kept)


def _parts(value: object, kept: dict[int, object]) -> Iterator[bytes]:
    """All of a value that may decide what is computed, at any depth; nothing that would hold an
    address, since the digest must be the same in the next process."""
    if value is None or isinstance(value, PLAIN):
        yield f'{type(value).__name__} {value!r}'.encode(errors='backslashreplace')
        return
    if id(value) in kept:
        return
    kept[id(value)] = value
    if isinstance(value, torch.Tensor):
        yield from _tensor(value)
    elif isinstance(value, np.ndarray):
        yield f'{value.dtype} {value.shape}'.encode()
        if value.dtype.hasobject:
            yield from _parts(value.tolist(), kept)
        else:
            yield value.tobytes()
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from (*_parts(key, kept), *_parts(part, kept))
    elif isinstance(value, (set, frozenset)):
        yield b' '.join(sorted(b''.join(_parts(part, {})) for part in value))
    elif isinstance(value, partial):
        yield from _parts((value.func, value.args, value.keywords), kept)
    elif isinstance(value, type):
        yield from _class(value, kept)
    elif hasattr(value, '__code__') or hasattr(value, '__func__'):
        yield from _function(value, kept)
    elif isinstance(value, ModuleType):
        yield value.__name__.encode()
    elif isinstance(value, torch.nn.Module):  # one that is no registered child
        yield from (*_parts(type(value), kept), *_attributes(value, kept))
        yield from _parts([*value.parameters(), *value.buffers(), *value.children()], kept)
    else:  # an object of any other class, or a function in C
        yield getattr(value, '__qualname__', type(value).__qualname__).encode()
        settings = isinstance(value, (SimpleNamespace, Namespace))
        if settings or not _of_library(type(value).__module__):
            yield from _parts(type(value), kept)
            yield from _parts(getattr(value, '__dict__', None), kept)


def _tensor(value: torch.Tensor) -> Iterator[bytes]:
    """A tensor's type, shape and numbers, as far as it has any."""
    try:
        yield f'{value.dtype} {tuple(value.shape)} {value.layout}'.encode()
        dense = value.detach().cpu().to_dense() if value.is_sparse else value.detach().cpu()
        numbers = dense.resolve_conj().resolve_neg().contiguous().flatten()
        yield numbers.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError, ValueError):  # meta, nested, not yet made
        return


def _class(kind: type, kept: dict[int, object]) -> Iterator[bytes]:
    """The name of a class, and, where it is no library's, its code and its attributes."""
    for base in kind.__mro__:
        yield f'{base.__module__}.{base.__qualname__}'.encode()
        if not _of_library(base.__module__):
            own = {k: v for k, v in vars(base).items() if not k.startswith('__') or callable(v)}
            for name, value in own.items():
                value = getattr(value, '__func__', getattr(value, 'fget', value))
                if isinstance(value, (*PLAIN, list, tuple, dict)) or hasattr(value, '__code__'):
                    yield from (name.encode(), *_parts(value, kept))


@cache
def _of_library(module: str) -> bool:
    """Whether a module is of an installed library or of Python: its name stands for its code."""
    package = module.partition('.')[0]
    if package in ('builtins', *sys.stdlib_module_names):
        return package != '__main__'
    file = str(getattr(sys.modules.get(package), '__file__', None) or '')
    return 'site-packages' in file or 'dist-packages' in file


def _function(function: object, kept: dict[int, object]) -> Iterator[bytes]:
    """What a Python function does: its byte code, its constants, and all that it uses by name."""
    bound = getattr(function, '__self__', None)
    function = getattr(function, '__func__', function)
    yield getattr(function, '__qualname__', '').encode()
    code = getattr(function, '__code__', None)
    if not isinstance(code, CodeType) or _of_library(str(function.__module__)):
        return
    yield from _byte_code(code)
    yield from _parts((function.__defaults__, function.__kwdefaults__), kept)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            yield from _parts(cell.cell_contents, kept)
    for name in code.co_names:
        if name in function.__globals__:
            yield from _parts(function.__globals__[name], kept)
    if bound is not None and not isinstance(bound, (torch.nn.Module, type, ModuleType)):
        yield from _parts(bound, kept)


def _byte_code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code + ' '.join(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside
            yield from _byte_code(constant)
        else:
            yield from _parts(constant, {})
