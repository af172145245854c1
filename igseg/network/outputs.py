"""The outputs of a network: the logit map in them, and logits for a network that gives
probabilities.

And how a user's network is run: afterwards it is unchanged, and errors become one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from igseg.errors import InputError
from igseg.network.kinds import EXCLUSIVE, FOREGROUND, MULTILABEL, Place

LEAST_PROBABILITY = 1e-7  # probabilities are clipped at this value, and at 1 minus it


MAPS = ('out', 'logits')  # where in an output its logit map lies, if it is there
# Names of what stands beside the masks of queries, of boxes, or of prototypes of masks.
OF_DETECTION = re.compile(
    r'(^|\.)((class|masks)_queries_logits|(pred_)?(boxes|bboxes|bbox)|protos?|pred_logits|anchors|'
    r'objectness|iou_(scores|predictions|pred))($|\.)', re.IGNORECASE
)  # fmt: skip
# Names of maps that are no classes, and of harmless tensors beside a map of classes.
OTHER_MAPS = re.compile(
    r'attention|hidden|feature|depth|cent(er|re)|offset|embed|token|boundary|edge', re.IGNORECASE
)
CLASSES = re.compile(r'seg|mask|sem|logit|pred|class', re.IGNORECASE)  # names of maps of classes
MOST_LISTED = 8  # maps that a sentence lists
DEEPEST = 5  # lists in lists that are looked into


def _parts_of(output: object) -> dict[str, object]:
    """The parts of a dictionary, a list or an object, by name."""
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        names = getattr(output, '_fields', range(len(output)))  # those of a named tuple
        return {str(key): value for key, value in zip(names, output, strict=True)}
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return dict(getattr(output, '__dict__', {}))


def named_tensors(output: object, name: str = '', depth: int = 0) -> dict[str, torch.Tensor]:
    """The tensors in a model's output, by names: keys of dictionaries, fields of objects, places in
    lists (from 0), joined by points. A tensor that is the output itself has the name `0`."""
    if isinstance(output, torch.Tensor):
        return {name or '0': output}
    tensors: dict[str, torch.Tensor] = {}
    if depth <= DEEPEST and not isinstance(output, nn.Module):
        for key, value in _parts_of(output).items():
            tensors |= named_tensors(value, f'{name}.{key}' if name else key, depth + 1)
    return tensors


def maps_in(output: object) -> dict[str, torch.Tensor]:
    """The maps (N, K, h, w) in a model's output, by name. If some lie under `out` or `logits`, then
    only those. Maps of whole numbers, as of an argmax, do not count."""
    maps = {
        name: tensor
        for name, tensor in named_tensors(output).items()
        if tensor.ndim == 4 and tensor.is_floating_point()
    }
    for name in MAPS:
        inside = {key: value for key, value in maps.items() if key.partition('.')[0] == name}
        if inside:
            return inside
    return maps


def _listed(tensors: Mapping[str, torch.Tensor]) -> str:
    """Names and shapes, as text."""
    texts = [f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items()]
    return ', '.join(texts[:MOST_LISTED]) + (', …' if len(texts) > MOST_LISTED else '')


def _signs_of_detection(output: object, size: Sequence[int] | None) -> dict[str, torch.Tensor]:
    """What in an output shows that its maps are masks of objects, by name: queries, boxes,
    prototypes, or a tensor (N, objects, numbers) beside maps that no name calls maps of classes."""
    tensors, maps = named_tensors(output), maps_in(output)
    signs = {name: tensor for name, tensor in tensors.items() if OF_DETECTION.search(name)}
    if {'scores', 'labels'} <= tensors.keys():  # of each object
        signs |= {name: tensors[name] for name in ('scores', 'labels')}
    shapes = {tuple(logits.shape[-2:]) for logits in maps.values()} | {tuple(size or ())}
    channels = {logits.shape[1] for logits in maps.values()}
    clear = all(name in MAPS or (CLASSES.search(name) and not name[0].isdecimal()) for name in maps)
    for name, tensor in tensors.items():
        if tensor.ndim != 3 or not tensor.is_floating_point() or OTHER_MAPS.search(name):
            continue
        without_channel = tuple(tensor.shape[-2:]) in shapes
        if not without_channel and (not clear or tensor.shape[1] in channels - {1}):
            signs[name] = tensor
    return signs


def _check_classes(output: object, size: Sequence[int] | None) -> None:
    """Raise InputError if the maps in an output are not of classes but of objects."""
    maps, signs = maps_in(output), _signs_of_detection(output, size)
    if signs and maps:
        raise InputError(
            f'the network gives queries, boxes or prototypes ({_listed(signs)}), so its maps are '
            f'those of objects, not of classes: {_listed(maps)} (wrap it so that it returns a map '
            'of classes (N, K, H, W); if there is one among these, choose it with --output_map '
            'NAME)'
        )


def _likely_maps(output: object) -> dict[str, torch.Tensor]:
    """The maps in an output without those that their names call something else; of these, those
    that their names call maps of classes, if there are such."""
    maps = maps_in(output)
    others = {k: v for k, v in maps.items() if not OTHER_MAPS.search(k)} or maps
    named = {k: v for k, v in others.items() if CLASSES.search(k)}
    return named or others


def segmentation_logits(output: object, size: Sequence[int] | None = None) -> torch.Tensor:
    """The logit map (N, K, h, w) in a model's output.

    The map is the output itself. In a dictionary or an object it lies under `out` or `logits`, else
    under a name like `seg` or `mask`. Of several such maps (deep supervision, auxiliary heads) it
    is the first with the size of the input, else the largest. size: (H, W) of the input; without it
    the first map is taken. Raises InputError where there is no map, or an empty one, or where the
    maps are not of classes but of objects.
    """
    if not isinstance(output, torch.Tensor):
        _check_classes(output, size)
    maps = list(_likely_maps(output).values())
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
    if not largest.numel():
        raise InputError(
            f'the map of the network is empty, {tuple(largest.shape)}, for an input of '
            f'{size[1]}×{size[0]} (use a larger --image_size)'
        )
    return next((logits for logits in maps if tuple(logits.shape[-2:]) == tuple(size)), largest)


def choice_among(output: object, size: Sequence[int]) -> str:
    """A sentence that says which of several maps `segmentation_logits` takes; empty for a single
    map. size: (H, W) of the input."""
    maps = maps_in(output)
    if len(maps) < 2:
        return ''
    taken = segmentation_logits(output, size)
    name = next(name for name, logits in maps.items() if logits is taken)
    return (
        f'the network gives {len(maps)} maps, {_listed(maps)}: {name} is explained (choose another '
        'with --output_map NAME)'
    )


class ChosenMap(torch.nn.Module):
    """Wraps a network that gives several maps, so that it gives the map with a name.

    name: as in `named_tensors`; or a number: of the map among all maps, from 0."""

    def __init__(self, network: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> logits (N, K, h, w). Raises InputError for an unknown name."""
        tensors = named_tensors(self.network(x))
        maps = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 4}
        if self.name in maps:
            return maps[self.name]
        number = int(self.name) if self.name.isdecimal() and self.name not in tensors else len(maps)
        if number < len(maps):
            return list(maps.values())[number]
        raise InputError(
            f'the network gives no map "{self.name}" (choose from {_listed(maps) or "none"})'
        )


def with_chosen_map(network: torch.nn.Module, name: str | None) -> torch.nn.Module:
    """The network, wrapped in `ChosenMap` if a name is given."""
    return network if name is None else ChosenMap(network, name)


def fitted(logits: torch.Tensor, size: Sequence[int], place: Place | None = None) -> torch.Tensor:
    """Logits (N, K, h, w) at the size (H, W) of the image: enlarged (bilinear) or reduced (means)
    to the place where they lie, with zeros beside it. place: None: the whole image. Maps of a
    single pixel, which hold one number for each image, stay as they are."""
    height, width = logits.shape[-2:]
    if height * width == 1:
        return logits
    (top, bottom), (left, right) = place or ((0, size[0]), (0, size[1]))
    extent = (bottom - top, right - left)
    if (height, width) != extent:
        if height >= extent[0] and width >= extent[1]:
            logits = F.adaptive_avg_pool2d(logits, extent)
        else:
            logits = F.interpolate(logits, extent, mode='bilinear', align_corners=False)
    sides = (left, size[1] - right, top, size[0] - bottom)
    return F.pad(logits, sides) if any(sides) else logits


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
