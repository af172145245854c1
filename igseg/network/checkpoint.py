"""Reading checkpoints: where in a file the weights of a network lie. Nothing in it is ever run.

Files come from many hands: a plain state dict, one under any key, under the prefixes of wrappers,
beside an optimizer, an average of the weights, or pickled objects. What is looked for is what the
names of an encoder-decoder look like, not a list of known keys.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from igseg.errors import InputError, one_line
from igseg.network.kinds import check_model_path

ENCODER, HEAD = 'encoder.', 'segmentation_head.'  # every network of smp has both
AVERAGED = re.compile(r'ema|averag|swa|teacher|shadow', re.IGNORECASE)  # taken where it is alone
INFLATION = 4  # a checkpoint may grow so many times when it is unpacked
NOT_OF_PIXELS = re.compile(r'target|label|loss|output|metric|(^|[._])y_$', re.IGNORECASE)  # means
MOST_CHANNELS = 64  # of an image, whose mean and deviation are looked for
MOST_OBJECTS = 300  # kinds of pickled objects; many of them times many objects takes long
MOST_PLACES = 100_000  # looked into
WEIGHTS_FILES = ('model.safetensors', 'pytorch_model.bin')  # in a folder
TRANSFORM_FILE = 'albumentations_config_eval.json'  # of a folder that smp's guide saves
FOREIGN = {  # files of other frameworks: first bytes or ending -> what they are
    '.onnx': 'an ONNX file', '.h5': 'a Keras file', '.keras': 'a Keras file',
    '.pb': 'a TensorFlow file', '.tflite': 'a TensorFlow Lite file',
    '.engine': 'a TensorRT file', '.mlmodel': 'a Core ML file',
}  # fmt: skip
SAVE_WEIGHTS = 'torch.save(model.state_dict(), path)'


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a network, and what is stored with them."""

    state: dict[str, torch.Tensor]  # by the network's own names, prefixes removed
    settings: dict[str, object] = field(default_factory=dict)  # architecture, encoder, mean, …
    key: str = ''  # where in the file they lay; empty: they are the file
    others: tuple[str, ...] = ()  # where other networks' lie
    notes: tuple[str, ...] = ()  # what was decided, in sentences
    normalisations: dict[int, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    # mean and std that lay beside the weights, by number of channels; none where settings say it
    unused: tuple[str, ...] = ()  # names beside the weights of a network whose names were given

    @property
    def options(self) -> dict[str, object]:
        """The stored arguments of the architecture, by name."""
        options = self.settings.get('options', {})
        assert isinstance(options, dict)  # else the settings would not have been taken
        return options


# --------------------------------------------------------------------------- files


def _check_kind(path: Path) -> None:
    """Refuse files of other frameworks, and a zip file that grows when it is unpacked, which
    torch.save never writes."""
    kind = FOREIGN.get(path.suffix.lower())
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # no zip file, or damaged: torch.load says so
        entries = []
    if any(entry.filename.endswith('constants.pkl') for entry in entries):
        kind = 'a TorchScript file'
    if kind:
        raise InputError(
            f'{path} is {kind} (save the weights of the PyTorch model: {SAVE_WEIGHTS})'
        )
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > INFLATION * path.stat().st_size:
        raise InputError(
            f'{path} was refused: it would grow to {unpacked / 2**20:,.0f} MiB when unpacked '
            f'(save only the weights: {SAVE_WEIGHTS})'
        )


# What an unpickler may make: a class or a function, under its own name or another.
Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]


class StandIn:
    """Takes the place of an object in a file: takes anything, does nothing, keeps its parts."""

    parts: object = None

    def __new__(cls, *arguments: object, **named: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.parts = state


def _stand_in(name: str, of: Callable[..., object] | None = None) -> type:
    """A class that stands for the class or function of that name in a file.

    of: what is made instead of a stand-in, where the unpickler insists on it (dict or list).
    """
    if of is None:
        return type(name, (StandIn,), {'__module__': 'file'})
    return type(name, (), {'__module__': 'file', '__new__': lambda cls, *a, **k: of()})


def _objects_in(path: Path, numbers: Sequence[Allowed]) -> list[str]:
    """The names of the classes and functions in a file that are no plain data. Raises InputError
    for more than can be looked at."""
    try:
        with torch.serialization.safe_globals(list(numbers)):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old file, or a damaged one: what is wrong is said when it is loaded
        return []
    if len(names) > MOST_OBJECTS:
        raise InputError(
            f'{path} was refused: it holds {len(names)} kinds of pickled Python objects '
            f'(save only the weights: {SAVE_WEIGHTS})'
        )
    return sorted(names)


def _refusal(path: Path, reason: str, names: Sequence[str]) -> str:
    """The sentence for a file that the unpickler refuses."""
    blocked = re.search(r'GLOBAL (\S+) whose module \S+ is blocked', reason)
    listed = [blocked[1]] if blocked else list(names)
    objects = zipfile.is_zipfile(path) or 'GLOBAL' in reason or 'weights_only' in reason.lower()
    if not objects:
        return f'{path} is no PyTorch checkpoint or is damaged (copy it again)'
    named = f' ({", ".join(listed[:5])}{", …" if len(listed) > 5 else ""})' if listed else ''
    return (
        f'{path} was refused: it holds pickled Python objects{named}, which could run code. Where '
        'you trust it, save only the weights: c = torch.load(path, weights_only=False); '
        "torch.save(c['state_dict'], new_path)"
    )


def _read_torch_file(path: Path) -> object:
    """torch.load that runs no code: objects in the file become stand-ins that do nothing."""
    scalar = np.float64(0).__reduce__()[0]  # the function that a pickled number names
    numbers: list[Allowed] = [
        scalar, (scalar, 'numpy.core.multiarray.scalar'), np.dtype, np.dtypes.Float64DType,
        np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType,
    ]  # fmt: skip
    stand_ins = {name: _stand_in(name) for name in _objects_in(path, numbers)}
    for _ in range(len(stand_ins) + 1):
        known: list[Allowed] = [
            *numbers,
            *((stand_in, name) for name, stand_in in stand_ins.items()),
        ]
        try:
            # The list of what is allowed holds for the whole process: only around this call.
            with torch.serialization.safe_globals(known), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of pickle protocols; the error says enough
                return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error)
        except Exception as error:  # torch.load and the unpickler raise all kinds on damaged files
            raise InputError(
                f'{path} is no PyTorch checkpoint or is damaged: {one_line(error, 120)} '
                '(copy or save it again)'
            ) from None
        wanted = re.search(r"(SETITEM|append).* got <class 'file\.(.*)'>", reason)
        if not wanted or wanted[2] not in stand_ins:
            break
        kind = OrderedDict if wanted[1] == 'SETITEM' else list
        stand_ins[wanted[2]] = _stand_in(wanted[2], kind)
    raise InputError(_refusal(path, reason, list(stand_ins)))


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the library raises its own, unexported error class
        raise InputError(f'{path} is no safetensors file or is damaged: {error}') from None


def _read_file(path: Path) -> object:
    """The content of a file of weights."""
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    _check_kind(path)
    return _read_torch_file(path)


def is_plain_tensor(value: object) -> bool:
    """Whether a value is a tensor that holds all its numbers."""
    return (
        torch.is_tensor(value)
        and value.layout == torch.strided
        and value.device.type == 'cpu'
        and not value.is_quantized
    )


# --------------------------------------------------------------------------- what is stored beside


def _named_in(hyperparameters: object) -> dict[str, object]:
    """Architecture and encoder, where hyperparameters (of Lightning) name ones that exist."""
    if not isinstance(hyperparameters, dict):
        return {}
    import segmentation_models_pytorch as smp  # takes seconds

    settings: dict[str, object] = {}
    for key, value in hyperparameters.items():
        name = value.lower() if isinstance(value, str) else ''
        if (
            key in ('arch', 'architecture', 'model_name')
            and name in smp.MODEL_ARCHITECTURES_MAPPING
        ):
            settings['architecture'] = name
        elif key in ('encoder', 'encoder_name', 'backbone') and (
            value in smp.encoders.get_encoder_names() or name.startswith('tu-')
        ):
            settings['encoder'] = value
    return settings


def _stored_settings(content: object) -> dict[str, object]:
    """The settings that we store with a checkpoint, else what hyperparameters name."""
    if not isinstance(content, dict):
        return {}
    settings = content.get('settings')
    if isinstance(settings, dict):
        options = settings.get('options', {})
        names = (settings.get('architecture'), settings.get('encoder'))
        plain = isinstance(options, dict) and all(isinstance(name, str) for name in options)
        if plain and all(isinstance(name, str | None) for name in names):
            return dict(settings)
    return _named_in(content.get('hyper_parameters'))


def _normalisations(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, tuple[float, ...]]]:
    """Means and standard deviations that lie as buffers beside the network's weights, for pixels
    from 0 to 1, by how many channels they are for."""
    found: dict[int, dict[str, tuple[float, ...]]] = {}
    for name, std in tensors.items():
        stem = re.fullmatch(r'((?:.*\.)?(?:\w*_)?)std', name)
        mean = tensors.get(f'{stem[1]}mean') if stem else None
        if stem is None or mean is None or NOT_OF_PIXELS.search(stem[1]):
            continue
        if not 1 <= mean.numel() == std.numel() <= MOST_CHANNELS:
            continue
        values = {key: tuple(tensor.detach().double().flatten().tolist())
                  for key, tensor in (('mean', mean), ('std', std))}  # fmt: skip
        if not all(np.isfinite(v).all() for v in values.values()) or min(values['std']) <= 0:
            continue
        scale = 255.0 if max(map(abs, values['mean'] + values['std'])) > 1 else 1.0
        scaled = {key: tuple(round(part / scale, 6) for part in v) for key, v in values.items()}
        found.setdefault(mean.numel(), scaled)
    return found


# --------------------------------------------------------------------------- finding the weights


def _may_hold_more(value: object) -> bool:
    return isinstance(value, (dict, list, tuple, StandIn))


def _tensors_of_module(
    parts: dict, prefix: str, above: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of a pickled module, from what it was made of."""
    for group in ('_parameters', '_buffers'):
        for name, value in (parts.get(group) or {}).items():
            if is_plain_tensor(value):
                yield f'{prefix}{name}', value.detach()
    for name, module in (parts.get('_modules') or {}).items():
        inner = module.parts if isinstance(module, StandIn) else module
        if isinstance(inner, dict) and id(inner) not in above:
            yield from _tensors_of_module(inner, f'{prefix}{name}.', above | {id(inner)})


def _groups_of_tensors(
    content: object,
) -> Iterator[tuple[tuple[str, ...], dict[str, torch.Tensor]]]:
    """Every dictionary and module in a content that holds plain tensors by name, with its place;
    the outermost first. The content may hold cycles."""
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    seen: set[int] = set()
    while waiting and len(seen) < MOST_PLACES:
        place, value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        parts = value.parts if isinstance(value, StandIn) else value
        if isinstance(parts, dict) and '_parameters' in parts and '_modules' in parts:
            yield place, dict(_tensors_of_module(parts, '', set()))
            continue
        if isinstance(parts, dict):
            tensors = {k: v for k, v in parts.items() if isinstance(k, str) and is_plain_tensor(v)}
            if tensors:
                yield place, tensors
            waiting += [((*place, str(k)), v) for k, v in parts.items() if _may_hold_more(v)]
        elif isinstance(parts, (list, tuple)):
            waiting += [((*place, str(k)), v) for k, v in enumerate(parts) if _may_hold_more(v)]


def _prefixes(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """What stands before the names of each encoder-decoder among the names; and nothing, which is
    to be put before them."""
    heads = (re.search(rf'(?:^|(?<=\.)){re.escape(HEAD)}', name) for name in tensors)
    prefixes = dict.fromkeys(head.string[: head.start()] for head in heads if head)
    return [(p, '') for p in prefixes if any(name.startswith(p + ENCODER) for name in tensors)]


def _prefixes_of(tensors: Collection[str], own: Collection[str]) -> list[tuple[str, str]]:
    """What stands before a network's own names among the names of tensors, for each place where at
    least half of them are; and what a wrapper of the network puts before all of its own."""
    own = [name for name in own if not name.endswith('num_batches_tracked')]
    outer = ''
    while own:
        inner = {name[len(outer) :] for name in own}
        places: Counter[str] = Counter()
        for name in tensors:
            starts = (0, *(match.end() for match in re.finditer(r'\.', name)))
            places.update(name[:start] for start in starts if name[start:] in inner)
        found = [(prefix, outer) for prefix, count in places.items() if 2 * count >= len(inner)]
        first = {name.partition('.')[0] for name in inner}
        if found or len(first) > 1 or not all('.' in name for name in inner):
            return found
        outer += f'{first.pop()}.'
    return []


def _same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are the same tensors, by their place in memory."""
    return one.keys() == other.keys() and all(
        one[name].data_ptr() == other[name].data_ptr() for name in one
    )


def _choose(labels: list[str], weights_key: str | None, path: Path) -> str:
    """The one that was asked for, else the first that is no average of others."""
    if weights_key is None:
        return next((label for label in labels if not AVERAGED.search(label)), labels[0])
    if weights_key not in labels:
        there = ', '.join(label or '"" (the file itself)' for label in labels)
        raise InputError(f'{path} holds no weights under "{weights_key}" (there are: {there})')
    return weights_key


def _nothing_found(content: object, path: Path, names: Sequence[str], own: Collection[str]) -> str:
    """The sentence for a file without a network."""
    begin = ', '.join(name[:60] for name in names)
    if names and own:
        return (
            f'{path} holds no weights of the network of the model factory: its own begin with '
            f'{", ".join(list(own)[:5])}, those in the file with {begin} (where the factory loads '
            'its weights itself, give --weights_key factory)'
        )
    if names:
        return (
            f'{path} is no segmentation-models-pytorch checkpoint: no names of its tensors have '
            f'{ENCODER}… and {HEAD}… (they begin with {begin}; for another network give '
            '--model_factory)'
        )
    keys = list(map(str, content))[:10] if isinstance(content, dict) else []
    empty = f'it is a {type(content).__name__}' if content else 'it is empty'
    there = f'its entries are {", ".join(k[:60] for k in keys)}' if keys else empty
    return f'{path} holds no state dict ({there}; save it with {SAVE_WEIGHTS})'


def _weights_of(
    content: object, path: Path, weights_key: str | None, own: Collection[str] = ()
) -> Checkpoint:
    """The network's weights, wherever in the content they lie. own: the names of its tensors,
    where they are known."""
    networks: dict[str, dict[str, torch.Tensor]] = {}
    beside: dict[str, dict[str, torch.Tensor]] = {}  # the tensors that each lay among
    names: list[str] = []
    for place, tensors in _groups_of_tensors(content):
        names = [*names, *tensors][:5]
        for prefix, outer in _prefixes_of(tensors, own) if own else _prefixes(tensors):
            label = '.'.join((*place, prefix)).strip('.')
            state = {
                outer + k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)
            }
            if not any(_same_tensors(state, other) for other in networks.values()):
                networks[label], beside[label] = state, tensors
    if not networks:
        raise InputError(_nothing_found(content, path, names, own))
    key = _choose(list(networks), weights_key, path)
    others = tuple(label for label in networks if label != key)
    settings = _stored_settings(content)
    notes = []
    if others:
        notes.append(
            f'the weights under "{key}" are used; others lie under '
            f'{", ".join(others)} (choose with --weights_key)'
        )
    normalisations = {} if {'mean', 'std'} & settings.keys() else _normalisations(beside[key])
    state = networks[key]
    unused: tuple[str, ...] = ()
    if own:
        unused = tuple(name for name in state if name not in own)
        state = {name: value for name, value in state.items() if name in own}
    return Checkpoint(state, settings, key, others, tuple(notes), normalisations, unused)


# --------------------------------------------------------------------------- a checkpoint


def _pretrained_settings(config_path: Path) -> dict[str, object]:
    """What `save_pretrained` writes of a model."""
    import segmentation_models_pytorch as smp  # takes seconds

    try:
        config = json.loads(config_path.read_text(encoding='utf-8'))
        name = config.pop('_model_class')
        named = isinstance(name, str)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        named = False
    if not named:
        raise InputError(f'{config_path} is not what save_pretrained writes') from None
    names = {cls.__name__: key for key, cls in smp.MODEL_ARCHITECTURES_MAPPING.items()}
    if name not in names:
        raise InputError(f'{config_path} names an unknown architecture "{name}"')
    taken = ('encoder_name', 'encoder_weights', 'in_channels', 'classes', 'aux_params')
    return {
        'architecture': names[name],
        'encoder': config.get('encoder_name'),
        'options': {k: v for k, v in config.items() if k not in taken and not k.startswith('_')},
    }


def _saved_transforms(path: Path) -> dict[str, object]:
    """Size, resizing and normalisation in what albumentations' `save_pretrained` wrote."""
    try:
        transforms = json.loads(path.read_text(encoding='utf-8'))['transform']['transforms']
        steps = {step['__class_fullname__'].rsplit('.', 1)[-1]: step for step in transforms}
        settings: dict[str, object] = {}
        if 'Resize' in steps:
            size = (steps['Resize']['height'], steps['Resize']['width'])
            settings |= {'image_size': size, 'resize': 'stretch'}
        elif 'LongestMaxSize' in steps and 'PadIfNeeded' in steps:
            size = (steps['PadIfNeeded'].get('min_height'), steps['PadIfNeeded'].get('min_width'))
            longest = steps['LongestMaxSize']['max_size']
            whole = longest if None in size or max(size) != longest else size
            settings |= {'image_size': whole, 'resize': 'letterbox'}
        if 'Normalize' in steps:
            step = steps['Normalize']
            scale = step.get('max_pixel_value', 255.0) / 255.0
            settings['mean'] = tuple(float(value) * scale for value in step['mean'])
            settings['std'] = tuple(float(value) * scale for value in step['std'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f'{path} cannot be read: {one_line(error)} (save it again)') from None
    return settings


def _read_folder(folder: Path, weights_key: str | None, own: Collection[str]) -> Checkpoint:
    """A folder of `model.save_pretrained`, or another that holds a file of weights by its usual
    name (accelerate)."""
    config_path = folder / 'config.json'
    weights_path = next((folder / n for n in WEIGHTS_FILES if (folder / n).is_file()), None)
    if weights_path is None:
        raise InputError(
            f'{folder} holds neither {" nor ".join(WEIGHTS_FILES)} '
            '(give the checkpoint file, or a folder that model.save_pretrained wrote)'
        )
    of_smp = config_path.is_file() and not own  # else the factory says what the network is
    settings = _pretrained_settings(config_path) if of_smp else {}
    checkpoint = _weights_of(_read_file(weights_path), weights_path, weights_key, own)
    notes, normalisations = checkpoint.notes, checkpoint.normalisations
    if (folder / TRANSFORM_FILE).is_file():
        transforms = _saved_transforms(folder / TRANSFORM_FILE)
        settings |= transforms
        said = ', '.join(f'{key} {value}' for key, value in transforms.items())
        notes += (f'from {TRANSFORM_FILE}: {said or "nothing that is known here"}',)
        normalisations = {} if 'mean' in transforms else normalisations
    return replace(checkpoint, settings={**checkpoint.settings, **settings}, notes=notes,
                   normalisations=normalisations)  # fmt: skip


def read_checkpoint(
    path: Path, weights_key: str | None = None, names: Collection[str] = ()
) -> Checkpoint:
    """The weights in a checkpoint file or a folder of `save_pretrained`.

    weights_key: which of several. names: of the network's tensors, where it is known; without
    them, what has the names of an encoder-decoder is looked for. Raises InputError.
    """
    if path.is_dir():
        return _read_folder(path, weights_key, names)
    check_model_path(path)
    return _weights_of(_read_file(path), path, weights_key, names)
