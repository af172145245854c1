"""Words for kinds of networks, of their origins and of their outputs: plain data without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from igseg.errors import InputError

if TYPE_CHECKING:
    import torch

FOREGROUND = 'foreground'  # one logit map; its sigmoid is the probability of the only class
EXCLUSIVE = 'exclusive'  # several logit maps: a softmax over classes; a class may be background
MULTILABEL = 'multilabel'  # several logit maps: independent labels, with a sigmoid for each
OUTPUT_KINDS = (FOREGROUND, EXCLUSIVE, MULTILABEL)
LOGITS, PROBABILITIES = 'logits', 'probabilities'  # the values that a network gives
ARCHITECTURES = (  # of segmentation-models-pytorch
    'unet', 'unetplusplus', 'manet', 'linknet', 'fpn', 'pspnet', 'deeplabv3', 'deeplabv3plus',
    'pan', 'upernet', 'segformer', 'dpt',
)  # fmt: skip

# Where a map lies in an image: its rows and its columns, from and to, which may lie beside it.
Place = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Meaning:
    """What the outputs of a network mean, as the user says. None or 'auto': what the description of
    the network says counts, else what its outputs show."""

    outputs: str = 'auto'  # LOGITS or PROBABILITIES
    output_kind: str | None = None  # of OUTPUT_KINDS
    background_class: int | str | None = None  # 'none': no class is background
    class_names: tuple[str, ...] | None = None  # of all labels, in order
    output_map: str | None = None  # which of several maps, by name or number; None: by its size


@dataclass(frozen=True)
class NetworkSource:
    """Where a network comes from: the arguments of `load_model`."""

    model_path: str | Path
    device: str | torch.device = 'auto'
    encoder: str | None = None
    architecture: str | None = None
    weights_key: str | None = None
    model_options: Mapping[str, object] | None = None
    model_factory: str | None = None
    allow_unused: bool = False

    def check(self) -> None:
        """Raise InputError for what is wrong, as far as it can be checked without the network."""
        if self.model_factory is not None:
            if self.architecture or self.encoder:
                raise InputError('a model factory goes without --architecture and --encoder')
            place_and_name(self.model_factory)
        elif self.allow_unused:
            raise InputError('--allow_unused goes with --model_factory (leave it out)')
        check_model_path(Path(self.model_path))
        check_device_name(str(self.device))


def check_model_path(path: Path) -> None:
    """Raise InputError where the checkpoint is missing or an empty file."""
    try:
        exists, size = path.exists(), path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # the name is too long or holds a zero byte
        exists, size = False, None
    if not exists:
        raise InputError(f'model file not found: {path} (check --model_path)')
    if size == 0:
        raise InputError(f'model file is empty (0 bytes): {path} (copy or save it again)')


def place_and_name(factory: str) -> tuple[str, str]:
    """The file or the module of a model factory, and the name of its function. Raises
    InputError."""
    place, _, name = factory.rpartition(':')
    if not place or not name:
        raise InputError(
            f'model factory "{factory}" is not of the form FILE.py:FUNCTION or '
            'package.module:function'
        )
    if place.endswith('.py') and not Path(place).is_file():
        raise InputError(f'model factory not found: {place} (check --model_factory)')
    return place, name


def check_device_name(name: str) -> None:
    """Raise InputError for a name that is no device on any machine."""
    if not re.fullmatch(r'auto|cpu|mps|(cpu|mps):0|cuda(:\d+)?', name):
        raise InputError(f'unknown device "{name}" (use auto, cuda, mps or cpu)')


def parse_options(pairs: Sequence[str]) -> dict[str, object]:
    """Arguments of an architecture from texts NAME=VALUE. A value is a Python literal, else text.
    Raises InputError."""
    options: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition('=')
        if not equals or not name.isidentifier():
            raise InputError(f'model option "{pair}" is not of the form NAME=VALUE')
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[name] = value
    return options
