"""What a network gives: the logit map in its output, and the logits that probabilities are of.

And how a user's network is asked: unchanged afterwards, and with one sentence where it cannot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from igseg.errors import InputError
from igseg.network.kinds import EXCLUSIVE, FOREGROUND, MULTILABEL

LEAST_PROBABILITY = 1e-7  # below it, and above one minus it, a probability's logit stays the same


def maps_in(output: object) -> list[torch.Tensor]:
    """The maps (N, K, h, w) in a model's output: itself, those of a list or a dictionary, or, in a
    dictionary or an object, what lies under `out` or `logits`."""
    for name in ('out', 'logits'):
        if isinstance(output, dict) and name in output:
            output = output[name]
        elif not isinstance(output, (torch.Tensor, dict, tuple, list)) and hasattr(output, name):
            output = getattr(output, name)
    if isinstance(output, dict):
        output = list(output.values())
    several = output if isinstance(output, (tuple, list)) else [output]
    return [one for one in several if isinstance(one, torch.Tensor) and one.ndim == 4]


def segmentation_logits(output: object, size: Sequence[int] | None = None) -> torch.Tensor:
    """The logit map (N, K, h, w) in a model's output.

    The output itself; of several maps (deep supervision, auxiliary heads) the first that has the
    input's size, else the largest; in a dictionary or an object what lies under `out` or `logits`.
    size: (H, W) of the input; without it the first map is taken. Raises InputError where there is
    no map.
    """
    maps = maps_in(output)
    if not maps:
        raise InputError('the model must return a logit map (N, C, H, W) (wrap it so that it does)')
    if size is None:
        return maps[0]
    for one in maps:
        if tuple(one.shape[1:3]) == tuple(size) != tuple(one.shape[-2:]):
            raise InputError(
                f'the model returns a map of shape {tuple(one.shape)}, classes last (wrap it so '
                'that it returns (N, C, H, W))'
            )
    largest = max(maps, key=lambda one: one.shape[-2] * one.shape[-1])  # the first of these
    return next((one for one in maps if tuple(one.shape[-2:]) == tuple(size)), largest)


def choice_among(output: object, size: Sequence[int]) -> str:
    """What `segmentation_logits` takes of several maps, in a sentence; empty where there is one."""
    maps = maps_in(output)
    if len(maps) < 2:
        return ''
    taken = segmentation_logits(output, size)
    number = next(k for k, one in enumerate(maps, start=1) if one is taken)
    shapes = ', '.join(str(tuple(one.shape)) for one in maps[:4])
    return (
        f'the network gives {len(maps)} maps, of shapes {shapes}: '
        f'number {number} is explained (for another, wrap the network so that it returns that)'
    )


def enlarged(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Logits (N, K, h, w) that are smaller than (H, W) at that size (bilinear); others as they
    are, and a map of a single pixel, one number an image, too."""
    (height, width), size = logits.shape[-2:], tuple(size)
    if height * width > 1 and height <= size[0] and width <= size[1] and (height, width) != size:
        return F.interpolate(logits, size, mode='bilinear', align_corners=False)
    return logits


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
            with explained_network(x.shape):
                output = network(probe)
            maps = segmentation_logits(output, x.shape[-2:]).float()
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


# --------------------------------------------------------------------------- asking a network


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; everything as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # Parameters made in inference mode take no part in gradients anyway.
    wants = [(p, p.requires_grad) for p in model.parameters() if not p.is_inference()]
    try:
        model.eval()
        for parameter, _ in wants:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wants:
            parameter.requires_grad_(requires_grad)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA's, MPS's, or the CPU allocator's."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and (
            'out of memory' in text
            or "can't allocate memory" in text
            or 'not enough memory' in text
        )
    )


class OutOfMemory(Exception):
    """Memory does not suffice, whichever library noticed."""


@contextlib.contextmanager
def out_of_memory_is_one_error() -> Iterator[None]:
    """Turn every way of running out of memory into OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from None


@contextlib.contextmanager
def explained_memory(device: torch.device) -> Iterator[None]:
    """Turn running out of memory into one sentence, an InputError."""
    try:
        with out_of_memory_is_one_error():
            yield
    except OutOfMemory:
        raise InputError(
            f'not enough memory on {device} for the gradient of one image '
            '(use a smaller image size, or device cpu)'
        ) from None


@contextlib.contextmanager
def explained_network(shape: Sequence[int]) -> Iterator[None]:
    """Around the network only: turn whatever it raises on an input of that shape into one
    sentence, an InputError; but for running out of memory, after which less may be tried."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = next(iter(str(error).strip().splitlines()), '')
        if 'does not require grad' in text:
            raise InputError(
                'the network gives no gradient at its input (take torch.no_grad, detach or argmax '
                'out of its forward)'
            ) from error
        raise InputError(
            f'the network cannot be run on an input of shape {tuple(shape)}: '
            f'{type(error).__name__}: {text[:300]} (are size and channels those of its training?)'
        ) from error


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The precision of a network's weights."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)
