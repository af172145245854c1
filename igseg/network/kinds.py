"""The words for what a network is, where it comes from and what it gives: plain data, no torch."""

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

FOREGROUND = 'foreground'  # one logit map: the probability of the one class is its sigmoid
EXCLUSIVE = 'exclusive'  # several: a softmax over classes, of which one may be background
MULTILABEL = 'multilabel'  # several: labels independent of each other, a sigmoid each
OUTPUT_KINDS = (FOREGROUND, EXCLUSIVE, MULTILABEL)
LOGITS, PROBABILITIES = 'logits', 'probabilities'  # what a network gives
ARCHITECTURES = (  # of segmentation-models-pytorch
    'unet', 'unetplusplus', 'manet', 'linknet', 'fpn', 'pspnet', 'deeplabv3', 'deeplabv3plus',
    'pan', 'upernet', 'segformer', 'dpt',
)  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """What the user says that a network's outputs mean. None, or 'auto': what is known of the
    network, or seen of it, stands."""

    outputs: str = 'auto'  # LOGITS or PROBABILITIES
    output_kind: str | None = None  # of OUTPUT_KINDS
    background_class: int | str | None = None  # 'none': no class is background
    class_names: tuple[str, ...] | None = None  # of all labels, in order


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

    def check(self) -> None:
        """Raise InputError for what can be told before a network is built."""
        check_model_path(Path(self.model_path))
        if self.model_factory is not None:
            place_and_name(self.model_factory)
            if self.architecture or self.encoder:
                raise InputError('a model factory goes without --architecture and --encoder')
        check_device_name(str(self.device))


def check_model_path(path: Path) -> None:
    """Raise InputError where there is no checkpoint, or an empty file."""
    try:
        there, size = path.exists(), path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        there, size = False, None
    if not there:
        raise InputError(f'model file not found: {path} (check --model_path)')
    if size == 0:
        raise InputError(f'model file is empty (0 bytes): {path} (copy or save it again)')


def place_and_name(factory: str) -> tuple[str, str]:
    """Where the function of a model factory stands, and its name there. Raises InputError."""
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
    """Raise InputError for what is no device that a network can run on, on whatever machine."""
    if not re.fullmatch(r'auto|cpu|mps|(cpu|mps):0|cuda(:\d+)?', name):
        raise InputError(f'unknown device "{name}" (use auto, cuda, mps or cpu)')


def parse_options(pairs: Sequence[str]) -> dict[str, object]:
    """Arguments of an architecture, each given as NAME=VALUE; values as Python writes them, or
    text. Raises InputError."""
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
