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
from pathlib import Path, PurePath
from types import CodeType, ModuleType, SimpleNamespace

import numpy as np
import torch

from attribution_path import segmentation_logits
from errors import InputError
from segmentation_dataset import SIZE_MULTIPLE, ImageSize, Preprocessing, sides

FOREGROUND = 'foreground'  # one logit map: the probability of the one class is its sigmoid
EXCLUSIVE = 'exclusive'  # several: a softmax over classes, of which one may be background
MULTILABEL = 'multilabel'  # several: labels independent of each other, a sigmoid each
OUTPUT_KINDS = (FOREGROUND, EXCLUSIVE, MULTILABEL)
LOGITS, PROBABILITIES = 'logits', 'probabilities'  # what a network gives
LEAST_PROBABILITY = 1e-7  # below it, and above one minus it, a probability's logit stays the same
ATTRIBUTE = 'network_description'  # of a module that `load_model` made
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
MODULE_PARTS = {*vars(torch.nn.Module()), ATTRIBUTE, 'preprocessing'}  # seen to elsewhere
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.device, PurePath,
         np.generic, slice, range)  # fmt: skip


@dataclass(frozen=True)
class NetworkDescription:
    """A segmentation network: input (N, C, H, W), output logits (N, K, h, w).

    Labels are numbered from 0 in the order of the logit maps. In masks that people draw, a pixel's
    number is its label; of independent labels it is one more, 0 meaning none of them.
    """

    channels: int | None = None  # C; None: not known before an input is seen
    size_multiple: int = 1  # both sides of the input must be multiples of it
    fixed_size: tuple[int, int] | None = None  # the only (height, width) that it takes, if any
    output_kind: str | None = None  # of OUTPUT_KINDS; None: by the number of logit maps
    background: int | None = 0  # of exclusive classes, the one that is no object; None: none is
    gives: str | None = None  # LOGITS or PROBABILITIES; None: to be seen on the first input
    class_names: tuple[str, ...] = ()  # of the labels, in order, where they are known
    preprocessing: Preprocessing = field(default_factory=Preprocessing)  # what it was trained with
    weights_sha256: str = ''  # of the weights and the structure, wherever they came from
    source: dict[str, object] = field(default_factory=dict)  # file, architecture, encoder, classes
    notes: tuple[str, ...] = ()  # what was decided when it was loaded, in sentences

    def kind(self, maps: torch.Tensor) -> str:
        """What logits or masks (…, K, h, w) mean, of OUTPUT_KINDS. Raises InputError for what K
        cannot be."""
        classes = maps.shape[-3]
        kind = self.output_kind or (EXCLUSIVE if classes > 1 else FOREGROUND)
        if kind != MULTILABEL and (kind == FOREGROUND) != (classes == 1):
            raise InputError(
                f'output_kind {kind} does not fit a network with {classes} '
                f'class{"es" if classes > 1 else ""} (leave it out)'
            )
        if kind == EXCLUSIVE and (self.background or 0) >= classes:
            raise InputError(
                f'background class {self.background}: the network has {classes} classes '
                f'(0 to {classes - 1}, or none)'
            )
        return kind

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, K, h, w) logits -> probabilities: softmax of exclusive classes, else sigmoids."""
        return logits.softmax(dim=1) if self.kind(logits) == EXCLUSIVE else logits.sigmoid()

    def predicted(self, logits: torch.Tensor, threshold: float) -> torch.Tensor:
        """(…, K, h, w) logits -> (…, K, h, w) bool, the pixels of each label: those with the
        highest logit of exclusive classes, else those above the threshold."""
        if self.kind(logits) != EXCLUSIVE:
            return logits.sigmoid() > threshold
        highest = logits.argmax(dim=-3, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-3, highest, True)

    def without_background(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (…, K, h, w) bool of all labels -> those of objects."""
        if self.kind(masks) != EXCLUSIVE or self.background is None:
            return masks
        masks = masks.clone()
        masks[..., self.background, :, :] = False
        return masks

    def foreground(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (…, K, h, w) bool of all labels -> (…, h, w) bool: what is an object."""
        return self.without_background(masks).any(dim=-3)

    def drawn(self, numbers: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The numbers (h, w) of a mask that people drew -> (K, h, w) bool, the pixels of each
        label; negative ones, which do not count, are of none. masks: predicted ones, of that
        shape."""
        if self.kind(masks) == FOREGROUND:  # one class: any number is foreground
            return (numbers > 0)[None]
        first = 1 if self.kind(masks) == MULTILABEL else 0
        labels = torch.arange(first, first + len(masks), device=numbers.device)
        return numbers == labels.view(-1, 1, 1)

    def drawn_objects(self, numbers: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The numbers (h, w) of a mask that people drew -> (h, w) bool: what is an object, also
        one of a label that the network does not have."""
        if self.kind(masks) == EXCLUSIVE:
            background = -1 if self.background is None else self.background
            return (numbers >= 0) & (numbers != background)
        return numbers > 0

    def explained(
        self, logits: torch.Tensor, masks: torch.Tensor, label: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask (h, w) bool and probability (h, w), 0-1, of a label; of any object for None.

        logits: (1, K, h, w). masks: (K, h, w) bool, those predicted.
        """
        chances = self.probabilities(logits)[0].float()
        if label is not None:
            return masks[label], chances[label]
        if self.kind(masks) != EXCLUSIVE:
            return self.foreground(masks), chances.max(dim=0).values
        none = self.background is None
        chance = torch.ones_like(chances[0]) if none else 1 - chances[self.background]
        return self.foreground(masks), chance

    def accepted_size(self, size: ImageSize) -> ImageSize:
        """The smallest size from `size` on that the network takes. Where it could not be asked,
        or takes any, multiples of 32, which encoder-decoders are made for."""
        if self.fixed_size:
            height, width = self.fixed_size
        else:
            height, width = (-(-side // self.step) * self.step for side in sides(size))
        return height if height == width and isinstance(size, int) else (height, width)

    @property
    def step(self) -> int:
        """Sides are rounded up to a multiple of it."""
        return self.size_multiple if self.size_multiple > 1 else SIZE_MULTIPLE

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise InputError for a shape that is not (C, H, W) or (1, C, H, W), or of a size that
        the network does not take."""
        fits = len(shape) == 3 or (len(shape) == 4 and shape[0] == 1)
        if not fits or (self.channels and shape[-3] != self.channels):
            c = self.channels or 'C'
            raise InputError(f'input_tensor must be ({c}, H, W) or (1, {c}, H, W), not {shape}')
        height, width = shape[-2:]
        if self.fixed_size and (height, width) != self.fixed_size:
            raise InputError(
                f'the network takes inputs of {self.fixed_size[1]}×{self.fixed_size[0]} only, not '
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
        known = NetworkDescription(input_channels(model), multiple, fixed)
    own = getattr(model, 'preprocessing', None) or known.preprocessing
    return replace(known, preprocessing=own)


def input_channels(model: torch.nn.Module) -> int | None:
    """The channels that a network says it takes; None where it does not: then any is tried."""
    own = getattr(getattr(model, 'encoder', None), '_in_channels', None)  # of smp's encoders
    return own if isinstance(own, int) and own > 0 else None


def likely_channels(model: torch.nn.Module) -> int:
    """The channels of the pictures that a network takes: those it says, else those of its first
    convolution, else 3."""
    convolutions = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    first = next((convolution.in_channels for convolution in convolutions), 3)
    known = getattr(model, ATTRIBUTE, None)
    return input_channels(model) or (known.preprocessing.channels if known else first)


def accepted_sizes(model: torch.nn.Module) -> tuple[int, tuple[int, int] | None]:
    """What both sides of an smp model's input must be multiples of (1 where it does not say), and
    the only (height, width) it takes, where there is one."""
    encoder = getattr(model, 'encoder', None)
    fixed = None
    network = getattr(encoder, 'model', None)
    dynamic = getattr(network, 'dynamic_img_size', False)
    if getattr(encoder, 'is_fixed_input_size', False) is True and not dynamic:
        made_for = getattr(getattr(network, 'patch_embed', None), 'img_size', None)
        size = made_for or getattr(encoder, 'input_size', None)
        fixed = (int(size[-2]), int(size[-1])) if isinstance(size, (tuple, list)) else None
    if not getattr(model, 'requires_divisible_input_shape', False):
        return 1, fixed
    return int(getattr(encoder, 'output_stride', 1)), fixed


# --------------------------------------------------------------------------- probabilities


class LogitsOf(torch.nn.Module):
    """A network that gives probabilities, with the logits they are of: log(p / (1 - p)), or, of
    exclusive classes, log(p), whose softmax is p again."""

    def __init__(self, network: torch.nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.probability_kind = network, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> logits (N, K, h, w)."""
        chances = segmentation_logits(self.network(x), x.shape[-2:])
        if self.probability_kind == EXCLUSIVE:
            return chances.clamp(LEAST_PROBABILITY, 1).log()
        return chances.logit(LEAST_PROBABILITY)


def probability_kind(network: torch.nn.Module, x: torch.Tensor) -> str | None:
    """Of OUTPUT_KINDS, what a network's outputs are where they are probabilities; None where they
    are logits: where an input like x (1, C, H, W), or one far from it, gives values beyond 0-1."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    seen = []
    with torch.no_grad():
        for probe in (x, -x, 10 * x, 10 * noise):
            maps = segmentation_logits(network(probe), x.shape[-2:]).float()
            if not bool(((maps >= -1e-6) & (maps <= 1 + 1e-6)).all()):  # also where not finite
                return None
            seen.append(maps)
    maps = torch.cat(seen)
    if float(maps.max() - maps.min()) < 1e-3:  # constant, which says nothing
        return None
    if maps.shape[1] == 1:
        return FOREGROUND
    to_one = bool(((maps.sum(dim=1) - 1).abs() < 1e-3).all())
    return EXCLUSIVE if to_one else MULTILABEL


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
        for value in (type(module), *_attributes(module)):
            for part in _parts(value, kept):
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


def _attributes(module: torch.nn.Module) -> tuple[dict, dict]:
    """What belongs to a module itself: its attributes, and the hooks that change what it gives."""
    own = {key: value for key, value in vars(module).items() if key not in MODULE_PARTS}
    return own, {key: list(vars(module).get(key, {}).values()) for key in HOOKS}


@dataclass(frozen=True)
class _Inner:
    """A value inside another, whose parts come in its place."""

    value: object


def _parts(value: object, kept: dict[int, object]) -> Iterator[bytes]:
    """All of a value that may decide what is computed, at any depth; nothing that would hold an
    address, since the digest must be the same in the next process."""
    waiting = [iter((_Inner(value),))]  # no recursion: code may lead very deep
    while waiting:
        piece = next(waiting[-1], None)
        if piece is None:
            waiting.pop()
        elif isinstance(piece, _Inner):
            waiting.append(_pieces(piece.value, kept))
        else:
            yield piece


def _pieces(value: object, kept: dict[int, object]) -> Iterator[bytes | _Inner]:
    """The parts of one value, those inside as they are."""
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
        if file and not of_library(value.__name__):  # what is used of it is not known: all of it
            with contextlib.suppress(OSError):
                yield Path(file).read_bytes()
    elif isinstance(value, torch.nn.Module):  # one that is no registered child
        yield _Inner(type(value))
        yield from map(_Inner, _attributes(value))
        yield _Inner([*value.parameters(), *value.buffers(), *value.children()])
    else:  # an object of any other class, or a function in C
        yield getattr(value, '__qualname__', type(value).__qualname__).encode()
        settings = isinstance(value, (SimpleNamespace, Namespace))
        if settings or not of_library(type(value).__module__):
            yield _Inner(type(value))
            yield _Inner(getattr(value, '__dict__', None))


def _unordered(value: object) -> str:
    """What stands for a part of a set, whose order is another in every process."""
    known = isinstance(value, (*PLAIN, tuple)) or value is None
    return repr(value) if known else getattr(value, '__qualname__', type(value).__qualname__)


def _tensor(value: torch.Tensor) -> Iterator[bytes]:
    """A tensor's type, shape and numbers, as far as it has any."""
    try:
        yield f'{value.dtype} {tuple(value.shape)} {value.layout}'.encode()
        dense = value.detach().cpu().to_dense() if value.is_sparse else value.detach().cpu()
        numbers = dense.resolve_conj().resolve_neg().contiguous().flatten()
        yield numbers.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError, ValueError):  # meta, nested, not yet made
        return


def _class(kind: type) -> Iterator[bytes | _Inner]:
    """The name of a class, and, where it is no library's, its code and its attributes."""
    for base in kind.__mro__:
        yield f'{base.__module__}.{base.__qualname__}'.encode()
        if not of_library(base.__module__):
            own = {k: v for k, v in vars(base).items() if not k.startswith('__') or callable(v)}
            for name, value in own.items():
                value = getattr(value, '__func__', getattr(value, 'fget', value))
                if isinstance(value, (*PLAIN, list, tuple, dict)) or hasattr(value, '__code__'):
                    yield name.encode()
                    yield _Inner(value)


@cache
def of_library(module: str) -> bool:
    """Whether a module is of an installed library or of Python: its name stands for its code."""
    package = module.partition('.')[0]
    if package in ('builtins', *sys.stdlib_module_names):
        return package != '__main__'
    file = str(getattr(sys.modules.get(package), '__file__', None) or '')
    return 'site-packages' in file or 'dist-packages' in file


def _function(function: object) -> Iterator[bytes | _Inner]:
    """What a Python function does: its byte code, its constants, and all that it uses by name."""
    bound = getattr(function, '__self__', None)
    function = getattr(function, '__func__', function)
    yield getattr(function, '__qualname__', '').encode()
    code = getattr(function, '__code__', None)
    if not isinstance(code, CodeType) or of_library(str(function.__module__)):
        return
    yield from _byte_code(code)
    yield _Inner((function.__defaults__, function.__kwdefaults__))
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            yield _Inner(cell.cell_contents)
    for name in code.co_names:
        if name in function.__globals__:
            yield _Inner(function.__globals__[name])
    if bound is not None and not isinstance(bound, (torch.nn.Module, type, ModuleType)):
        yield _Inner(bound)


def _byte_code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code + ' '.join(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside
            yield from _byte_code(constant)
        else:
            yield from _parts(constant, {})
