"""What a network is to this toolkit: what it takes, what its outputs mean, and which one it is.

Found out once, at loading or from any module given to `IntegratedGradients`, and asked by
everything else: targets, masks, figures, statistics, and the key by which finished results are
recognised.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from types import CodeType

import numpy as np
import torch

from errors import InputError
from segmentation_dataset import SIZE_MULTIPLE, Preprocessing

FOREGROUND = 'foreground'  # one logit map: the probability of the one class is its sigmoid
EXCLUSIVE = 'exclusive'  # several: a softmax over classes, of which one is background
ATTRIBUTE = 'network_description'  # of a module that `load_model` made
MODULE_PARTS = {*vars(torch.nn.Module()), ATTRIBUTE, 'preprocessing'}  # attributes looked at apart
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, PurePath)


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
    """The description of any module, as it is now.

    preprocessing: what it was trained with; None: what `load_model` found, else what the user set
    as `model.preprocessing`, else ImageNet's.
    """
    known = getattr(model, ATTRIBUTE, None)
    if known is None:
        multiple, fixed = accepted_sizes(model)
        known = NetworkDescription(size_multiple=multiple, fixed_size=fixed)
    own = preprocessing or getattr(model, 'preprocessing', None) or known.preprocessing
    return replace(known, preprocessing=own, weights_sha256=network_digest(model))


def accepted_sizes(model: torch.nn.Module) -> tuple[int, int | None]:
    """What both sides of an smp model's input must be multiples of (1 where it does not say), and
    the only side it takes, where there is one."""
    encoder = getattr(model, 'encoder', None)
    fixed = None
    dynamic = getattr(getattr(encoder, 'model', None), 'dynamic_img_size', False)
    if getattr(encoder, 'is_fixed_input_size', False) is True and not dynamic:
        sides = getattr(encoder, 'input_size', None)
        fixed = int(sides[-1]) if isinstance(sides, (tuple, list)) else None
    if not getattr(model, 'requires_divisible_input_shape', False):
        return 1, fixed
    return int(getattr(encoder, 'output_stride', 1)), fixed


# --------------------------------------------------------------------------- identity


def network_digest(model: torch.nn.Module) -> str:
    """SHA-256 of that by which two modules compute different things: weights and buffers, the tree
    of modules with their plain attributes, and the code of their forward methods."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        for part in _parts(tensor, set()):
            digest.update(part)
    seen: set[int] = set()
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(f'{name} {kind.__module__}.{kind.__qualname__}'.encode())
        own = {key: value for key, value in vars(module).items() if key not in MODULE_PARTS}
        for part in (*_code(getattr(kind, 'forward', None), seen), *_parts(own, seen)):
            digest.update(part)
    return digest.hexdigest()


def _parts(value: object, seen: set[int]) -> Iterator[bytes]:
    """A value's numbers and texts, at any depth, and the code of its functions; nothing that would
    hold an address, since the digest must be the same in the next process."""
    if value is None or isinstance(value, PLAIN):
        yield f'{type(value).__name__} {value!r}'.encode(errors='backslashreplace')
    elif isinstance(value, torch.Tensor):
        yield f'{value.dtype} {tuple(value.shape)}'.encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f'{value.dtype} {value.shape}'.encode() + value.tobytes()
    elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
        seen.add(id(value))
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from (*_parts(key, seen), *_parts(part, seen))
    elif callable(value) and not isinstance(value, (type, torch.nn.Module)):
        yield from _code(value, seen)


def _code(function: object, seen: set[int]) -> Iterator[bytes]:
    """What a Python function does: its byte code, its constants, and what it closes over."""
    function = getattr(function, '__func__', function)
    code = getattr(function, '__code__', None)
    if code is None or id(function) in seen:
        return
    seen.add(id(function))
    yield from _byte_code(code)
    yield from _parts(function.__defaults__, seen)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            yield from _parts(cell.cell_contents, seen)


def _byte_code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code + ' '.join(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside
            yield from _byte_code(constant)
        else:
            yield from _parts(constant, set())
