"""The outputs of a network: the logit map in them, and logits for a network that gives
probabilities.

And how a user's network is run: afterwards it is unchanged, and errors become one sentence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from igseg.errors import InputError
from igseg.network.kinds import EXCLUSIVE, FOREGROUND, MULTILABEL

LEAST_PROBABILITY = 1e-7  # probabilities are clipped at this value, and at 1 minus it


def maps_in(output: object) -> list[torch.Tensor]:
    """The maps (N, K, h, w) in a model's output: the output itself, or all maps in a list or a
    dictionary. A dictionary or an object with `out` or `logits` counts as what lies there."""
    for name in ('out', 'logits'):
        if isinstance(output, dict) and name in output:
            output = output[name]
        elif not isinstance(output, (torch.Tensor, dict, tuple, list)) and hasattr(output, name):
            output = getattr(output, name)
    if isinstance(output, dict):
        output = list(output.values())
    values = output if isinstance(output, (tuple, list)) else [output]
    return [value for value in values if isinstance(value, torch.Tensor) and value.ndim == 4]


def segmentation_logits(output: object, size: Sequence[int] | None = None) -> torch.Tensor:
    """The logit map (N, K, h, w) in a model's output.

    The map is the output itself. Of several maps (deep supervision, auxiliary heads) it is the
    first with the size of the input, else the largest. In a dictionary or an object it lies under
    `out` or `logits`. size: (H, W) of the input; without it the first map is taken. Raises
    InputError where there is no map.
    """
    maps = maps_in(output)
    if not maps:
        raise InputError('the model must return a logit map (N, C, H, W) (wrap it so that it does)')
    if size is None:
        return maps[0]
    for logits in maps:
        if tuple(logits.shape[1:3]) == tuple(size) != tuple(logits.shape[-2:]):
            raise InputError(
                f'the model returns a map of shape {tuple(logits.shape)}, classes last (wrap it so '
                'that it returns (N, C, H, W))'
            )
    # Of several largest maps, `max` gives the first.
    largest = max(maps, key=lambda logits: logits.shape[-2] * logits.shape[-1])
    return next((logits for logits in maps if tuple(logits.shape[-2:]) == tuple(size)), largest)


def choice_among(output: object, size: Sequence[int]) -> str:
    """A sentence that says which of several maps `segmentation_logits` takes; empty for a single
    map. size: (H, W) of the input."""
    maps = maps_in(output)
    if len(maps) < 2:
        return ''
    taken = segmentation_logits(output, size)
    number = next(k for k, logits in enumerate(maps, start=1) if logits is taken)
    shapes = ', '.join(str(tuple(logits.shape)) for logits in maps[:4])
    return (
        f'the network gives {len(maps)} maps, of shapes {shapes}: '
        f'number {number} is explained (for another, wrap the network so that it returns that)'
    )


def enlarged(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Logits (N, K, h, w), enlarged (bilinear) to (H, W) if they are smaller. Maps of a single
    pixel, which hold one number for each image, stay as they are."""
    (height, width), size = logits.shape[-2:], tuple(size)
    if height * width > 1 and height <= size[0] and width <= size[1] and (height, width) != size:
        return F.interpolate(logits, size, mode='bilinear', align_corners=False)
    return logits


# --------------------------------------------------------------------------- probabilities


class LogitsOf(torch.nn.Module):
    """Wraps a network that gives probabilities p, so that it gives logits: log(p / (1 - p)); for
    exclusive classes log(p), whose softmax is p again."""

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
    """The kind (of OUTPUT_KINDS) of a network's outputs where they are probabilities; None where
    they are logits. They are logits where x (1, C, H, W), or an input that is far from it, gives
    values beyond 0-1."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    outputs = []
    with torch.no_grad():
        for probe in (x, -x, 10 * x, 10 * noise):
            with explained_network(x.shape):
                output = output_of(network, probe)
            maps = segmentation_logits(output, x.shape[-2:]).float()
            if not bool(((maps >= -1e-6) & (maps <= 1 + 1e-6)).all()):  # NaN counts as beyond too
                return None
            outputs.append(maps)
    maps = torch.cat(outputs)
    if float(maps.max() - maps.min()) < 1e-3:  # constant outputs show nothing
        return None
    if maps.shape[1] == 1:
        return FOREGROUND
    sum_to_one = bool(((maps.sum(dim=1) - 1).abs() < 1e-3).all())
    return EXCLUSIVE if sum_to_one else MULTILABEL


# --------------------------------------------------------------------------- running a network


def output_of(network: Callable[[torch.Tensor], object], x: torch.Tensor) -> object:
    """The output of a network for images x, of which it gets a copy: a network may write into its
    input, and the input may belong to the user or be a leaf of an autograd graph."""
    return network(x.clone())


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, and no gradients of parameters. Afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    # Parameters that were made in inference mode have no gradients.
    flags = [(p, p.requires_grad) for p in model.parameters() if not p.is_inference()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of CUDA, MPS or the CPU allocator says that memory ran out."""
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
    """Memory does not suffice; the same error for all libraries."""


@contextlib.contextmanager
def out_of_memory_is_one_error() -> Iterator[None]:
    """Turn all errors that say that memory ran out into OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from None


@contextlib.contextmanager
def explained_memory(device: torch.device) -> Iterator[None]:
    """Turn errors that say that memory ran out into an InputError of one sentence."""
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
    """For use around a network: turn the errors that it raises on an input of this shape into an
    InputError of one sentence. Errors that say that memory ran out pass through: the caller may try
    a smaller batch."""
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


# --------------------------------------------------------------------------- where gradients stop

# Functions whose gradient is zero, or that have none, or another one than their own.
WITHOUT_GRADIENT = ('round', 'floor', 'ceil', 'trunc', 'sign', 'heaviside', 'gt', 'ge', 'lt', 'le',
                    'eq', 'ne', 'argmax', 'bernoulli', 'fake_quantize_per_tensor_affine',
                    'fake_quantize_per_channel_affine', 'detach', 'data')  # fmt: skip


class _GradientStops(TorchFunctionMode):
    """Notes where a network that is run on an image inside this mode passes no gradient on."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.stops: list[str] = []
        self._of_image = {id(x): x}  # the tensors that depend on the image, which keeps them alive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = _tensors_in(result)
        depends = any(id(tensor) in self._of_image for tensor in _tensors_in((args, kwargs)))
        if results and depends:
            words = (resolve_name(func) or '').removesuffix('.__get__').split('.')
            name = words[-1].strip('_')
            if name in WITHOUT_GRADIENT:
                self.stops.append(f'torch.{name}' if name not in ('detach', 'data') else f'.{name}')
            elif not torch.is_grad_enabled():
                self.stops.append('torch.no_grad (or a torch.autograd.Function)')
            self._of_image.update((id(tensor), tensor) for tensor in results)
        return result


def _tensors_in(values: object) -> list[torch.Tensor]:
    """The tensors among arguments or results, in lists and dictionaries too."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors_in(value)]
    return []


def gradient_stops(network: nn.Module, x: torch.Tensor) -> str:
    """What in a network passes no gradient on, or another one than its own, in words that follow
    'no gradient passes through'; empty where nothing is known. x: an image (1, C, H, W)."""
    with torch.enable_grad(), explained_network(x.shape):
        image = x.detach().clone().requires_grad_()
        mode = _GradientStops(image)
        with mode:
            output_of(network, image)
    return ', '.join(dict.fromkeys(mode.stops))


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The precision of a network's weights."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)
