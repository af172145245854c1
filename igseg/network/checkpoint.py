"""Reading checkpoints: where in a file the weights of a network lie. Code in a file is never run.

Files differ: the state dict is the whole file or lies under any key; names have the prefixes of
wrappers; an optimizer, an average of the weights or pickled objects lie beside it. The weights are
recognised by names that look like those of an encoder-decoder, not by a list of keys.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from igseg.errors import InputError, one_line
from igseg.network.kinds import check_model_path

ENCODER, HEAD = 'encoder.', 'segmentation_head.'  # every network of smp has both
# Averages of weights, which are taken only where there are no other weights.
AVERAGED = re.compile(r'ema|averag|swa|teacher|shadow', re.IGNORECASE)
INFLATION = 4  # a checkpoint may become so many times as large when it is unpacked
# Names of means and deviations that are not those of pixels.
NOT_OF_PIXELS = re.compile(r'target|label|loss|output|metric|(^|[._])y_$', re.IGNORECASE)
# Adapters: small weights beside those of a network, which change its layers.
ADAPTER = re.compile(r'(^|[._])(lora|ia3|hada|oft|vera|dora|adapters?)([._]|$)', re.IGNORECASE)
# Buffers that are no weights: counters, masks, constants, what observers and norms of weights keep.
NO_WEIGHT = re.compile(
    r'num_batches_tracked|total_(ops|params)|(attn_)?mask|inv_freq|mean|std|step|(min|max)_val|'
    r'weight_[uv]|eps|(position|pos)_ids|zero_point|grid|n_averaged'
)
MOST_CHANNELS = 64  # means and deviations of more channels are not those of an image
MOST_OBJECTS = 300  # kinds of pickled objects; reading a file with very many kinds takes long
MOST_PLACES = 100_000  # dictionaries, lists and modules that are searched
WEIGHTS_FILES = ('model.safetensors', 'pytorch_model.bin')  # in a folder
TRANSFORM_FILE = 'albumentations_config_eval.json'  # of a folder that smp's guide saves
FOREIGN = {  # files of other frameworks: ending -> kind of file
    '.onnx': 'an ONNX file', '.h5': 'a Keras file', '.keras': 'a Keras file',
    '.pb': 'a TensorFlow file', '.tflite': 'a TensorFlow Lite file',
    '.engine': 'a TensorRT file', '.mlmodel': 'a Core ML file',
}  # fmt: skip
SAVE_WEIGHTS = 'torch.save(model.state_dict(), path)'


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a network, and what is stored with them."""

    state: dict[str, torch.Tensor]  # by the names in the network, without prefixes
    settings: dict[str, object] = field(default_factory=dict)  # architecture, encoder, mean, …
    key: str = ''  # where in the file the weights lie; empty: the file is the state dict
    others: tuple[str, ...] = ()  # where the weights of other networks lie
    notes: tuple[str, ...] = ()  # what was decided, in sentences
    # mean and std that lie beside the weights, by number of channels; empty if `settings` have them
    normalisations: dict[int, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    # Tensors that the network does not have, if its names are known; without counters and indices.
    unused: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, object]:
        """The stored arguments of the architecture, by name."""
        options = self.settings.get('options', {})
        assert isinstance(options, dict)  # `_stored_settings` takes no other settings
        return options


# --------------------------------------------------------------------------- files


def _check_kind(path: Path) -> None:
    """Raise InputError for files of other frameworks, and for a zip file that becomes much larger
    when it is unpacked; torch.save never writes such files."""
    kind = FOREIGN.get(path.suffix.lower())
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # no zip file, or damaged: torch.load will raise an error
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


# What an unpickler may make: a class or a function; with a text, under that name in the file.
Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]


class StandIn:
    """Takes the place of an object in a file: accepts all arguments, does nothing, and keeps the
    parts of the object."""

    parts: object = None

    def __new__(cls, *arguments: object, **named: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.parts = state


def _stand_in(name: str, of: Callable[..., object] | None = None) -> type:
    """A class that takes the place of the class or function of that name in a file.

    of: makes a dictionary or a list instead of a stand-in, where the unpickler requires one.
    """
    if of is None:
        return type(name, (StandIn,), {'__module__': 'file'})
    return type(name, (), {'__module__': 'file', '__new__': lambda cls, *a, **k: of()})


def _objects_in(path: Path, numbers: Sequence[Allowed]) -> list[str]:
    """The names of the classes and functions in a file that are no plain data. numbers: what
    counts as plain data. Raises InputError where there are too many."""
    try:
        with torch.serialization.safe_globals(list(numbers)):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old or a damaged file: torch.load will raise an error
        return []
    if len(names) > MOST_OBJECTS:
        raise InputError(
            f'{path} was refused: it holds {len(names)} kinds of pickled Python objects '
            f'(save only the weights: {SAVE_WEIGHTS})'
        )
    return sorted(names)


def _refusal(path: Path, reason: str, names: Sequence[str]) -> str:
    """The sentence for a file that the unpickler refuses. reason: the text of its error. names: of
    the classes and functions in the file."""
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
    """torch.load that runs no code: objects in the file become stand-ins that do nothing. Raises
    InputError."""
    scalar = np.float64(0).__reduce__()[0]  # the function that pickled numbers use
    numbers: list[Allowed] = [
        scalar, (scalar, 'numpy.core.multiarray.scalar'), np.dtype, np.dtypes.Float64DType,
        np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType,
    ]  # fmt: skip
    stand_ins = {name: _stand_in(name) for name in _objects_in(path, numbers)}
    for _ in range(len(stand_ins) + 1):
        allowed: list[Allowed] = [
            *numbers,
            *((stand_in, name) for name, stand_in in stand_ins.items()),
        ]
        try:
            # The list of what is allowed is global, so it is set only around this call.
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # about pickle protocols
                return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error)
        except Exception as error:  # damaged files raise any kind of error
            raise InputError(
                f'{path} is no PyTorch checkpoint or is damaged: {one_line(error, 120)} '
                '(copy or save it again)'
            ) from None
        required = re.search(r"(SETITEM|append).* got <class 'file\.(.*)'>", reason)
        if not required or required[2] not in stand_ins:
            break
        kind = OrderedDict if required[1] == 'SETITEM' else list
        stand_ins[required[2]] = _stand_in(required[2], kind)
    raise InputError(_refusal(path, reason, list(stand_ins)))


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the library raises an error class that it does not export
        raise InputError(f'{path} is no safetensors file or is damaged: {error}') from None


def _read_file(path: Path) -> object:
    """The content of a file of weights. Raises InputError."""
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


def is_weight(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor changes what a network gives, unlike a counter or a table of indices."""
    last = name.rpartition('.')[2]
    floating = tensor.is_floating_point() or tensor.is_complex() or last in ('weight', 'bias')
    return floating and tensor.numel() > 0 and not NO_WEIGHT.fullmatch(last)


def adapters_text(names: Collection[str]) -> str:
    """What to do about adapters among the tensors of a file, in words; empty if there are none."""
    adapters = [name for name in names if ADAPTER.search(name)]
    if not adapters:
        return ''
    return (
        f'the file holds adapters (such as LoRA) in tensors like {adapters[0][:100]}, without '
        'which it is another network: merge them into the weights before you save these (in peft: '
        'model = model.merge_and_unload()), or let a --model_factory build the network with them'
    )


# --------------------------------------------------------------------------- settings in files


def _settings_in(hyperparameters: object) -> dict[str, object]:
    """Architecture and encoder, as far as hyperparameters (of Lightning) name existing ones."""
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
    """The settings that this project stores in checkpoints, else those in hyperparameters."""
    if not isinstance(content, dict):
        return {}
    settings = content.get('settings')
    if isinstance(settings, dict):
        options = settings.get('options', {})
        names = (settings.get('architecture'), settings.get('encoder'))
        plain = isinstance(options, dict) and all(isinstance(name, str) for name in options)
        if plain and all(isinstance(name, str | None) for name in names):
            return dict(settings)
    return _settings_in(content.get('hyper_parameters'))


def _normalisations(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, tuple[float, ...]]]:
    """Means and standard deviations that lie as buffers beside the network's weights, for pixels
    from 0 to 1, by number of channels."""
    by_channels: dict[int, dict[str, tuple[float, ...]]] = {}
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
        by_channels.setdefault(mean.numel(), scaled)
    return by_channels


# --------------------------------------------------------------------------- finding the weights


def _may_hold_more(value: object) -> bool:
    return isinstance(value, (dict, list, tuple, StandIn))


def _tensors_of_module(
    parts: dict, prefix: str, above: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of a pickled module, from its parts. above: the identities of the modules that
    hold it, since a content may hold cycles."""
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
    """The places of all dictionaries and modules in a content that hold plain tensors by name, and
    these tensors; the outermost come first. The content may hold cycles."""
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    visited: set[int] = set()
    while waiting and len(visited) < MOST_PLACES:
        place, value = waiting.pop(0)
        if id(value) in visited:
            continue
        visited.add(id(value))
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
    """For each encoder-decoder among the tensors: the prefix to remove from its names, and the
    prefix to add (always empty here; see `_prefixes_of`)."""
    heads = (re.search(rf'(?:^|(?<=\.)){re.escape(HEAD)}', name) for name in tensors)
    prefixes = dict.fromkeys(head.string[: head.start()] for head in heads if head)
    return [(p, '') for p in prefixes if any(name.startswith(p + ENCODER) for name in tensors)]


def _prefixes_of(tensors: Collection[str], expected: Collection[str]) -> list[tuple[str, str]]:
    """For each place where at least half of the expected names are among the names of tensors: the
    prefix to remove from the names of tensors, and the prefix to add. The second is what a wrapper
    puts before all names of the network, where the file was saved without the wrapper."""
    expected = [name for name in expected if not name.endswith('num_batches_tracked')]
    outer = ''
    while expected:
        inner = {name[len(outer) :] for name in expected}
        places: Counter[str] = Counter()
        for name in tensors:
            starts = (0, *(match.end() for match in re.finditer(r'\.', name)))
            places.update(name[:start] for start in starts if name[start:] in inner)
        pairs = [(prefix, outer) for prefix, count in places.items() if 2 * count >= len(inner)]
        first = {name.partition('.')[0] for name in inner}
        if pairs or len(first) > 1 or not all('.' in name for name in inner):
            return pairs
        outer += f'{first.pop()}.'
    return []


def _same_tensors(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same tensors, by their addresses in memory."""
    return state.keys() == other.keys() and all(
        state[name].data_ptr() == other[name].data_ptr() for name in state
    )


def _choose(labels: list[str], weights_key: str | None, path: Path) -> str:
    """The label of the network that is used: `weights_key`, or by default the first that is not an
    average of weights. Raises InputError."""
    if weights_key is None:
        return next((label for label in labels if not AVERAGED.search(label)), labels[0])
    if weights_key not in labels:
        choices = ', '.join(label or '"" (the file itself)' for label in labels)
        raise InputError(f'{path} holds no weights under "{weights_key}" (there are: {choices})')
    return weights_key


def _no_network_text(
    content: object, path: Path, names: Sequence[str], expected: Collection[str]
) -> str:
    """The sentence for a file without a network. names: of tensors in the file. expected: names of
    the network's tensors."""
    begin = ', '.join(name[:60] for name in names[:5])
    if adapters := adapters_text(names):
        return f'{path} does not fit the network: {adapters}'
    if names and expected:
        return (
            f'{path} holds no weights of the network of the model factory: its own begin with '
            f'{", ".join(list(expected)[:5])}, those in the file with {begin} (where the factory '
            'loads its weights itself, give --weights_key factory)'
        )
    if names:
        return (
            f'{path} is no segmentation-models-pytorch checkpoint: no names of its tensors have '
            f'{ENCODER}… and {HEAD}… (they begin with {begin}; for another network give '
            '--model_factory)'
        )
    keys = list(map(str, content))[:10] if isinstance(content, dict) else []
    empty = f'it is a {type(content).__name__}' if content else 'it is empty'
    entries = f'its entries are {", ".join(k[:60] for k in keys)}' if keys else empty
    return f'{path} holds no state dict ({entries}; save it with {SAVE_WEIGHTS})'


def _weights_of(
    content: object, path: Path, weights_key: str | None, expected: Set[str] = frozenset()
) -> Checkpoint:
    """The network's weights, wherever they lie in the content. expected: the names of the network's
    tensors; empty: unknown. Raises InputError."""
    networks: dict[str, dict[str, torch.Tensor]] = {}
    beside: dict[str, dict[str, torch.Tensor]] = {}  # the group of tensors that holds each network
    names: list[str] = []
    for place, tensors in _groups_of_tensors(content):
        names += tensors
        for prefix, outer in _prefixes_of(tensors, expected) if expected else _prefixes(tensors):
            label = '.'.join((*place, prefix)).strip('.')
            state = {
                outer + k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)
            }
            if not any(_same_tensors(state, other) for other in networks.values()):
                networks[label], beside[label] = state, tensors
    if not networks:
        raise InputError(_no_network_text(content, path, names, expected))
    if expected:  # a place that holds all of the network comes before a place that lacks some
        complete = {label: len(expected & state.keys()) for label, state in networks.items()}
        networks = {
            label: networks[label] for label in sorted(networks, key=lambda k: -complete[k])
        }
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
    if expected:
        unused = tuple(k for k, v in state.items() if k not in expected and is_weight(k, v))
        prefixes = [prefix for prefix, _ in _prefixes_of(beside[key], expected)]
        if '' not in prefixes:
            unused += tuple(
                name for name, value in beside[key].items()
                if not name.startswith(tuple(prefixes)) and is_weight(name, value)
            )  # fmt: skip
        state = {name: value for name, value in state.items() if name in expected}
    return Checkpoint(state, settings, key, others, tuple(notes), normalisations, unused)


# --------------------------------------------------------------------------- a checkpoint


def _pretrained_settings(config_path: Path) -> dict[str, object]:
    """The settings in the file that `save_pretrained` of smp writes. Raises InputError."""
    import segmentation_models_pytorch as smp  # takes seconds

    try:
        config = json.loads(config_path.read_text(encoding='utf-8'))
        name = config.pop('_model_class')
        is_smp = isinstance(name, str)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        is_smp = False
    if not is_smp:
        raise InputError(f'{config_path} is not what save_pretrained writes') from None
    names = {cls.__name__: key for key, cls in smp.MODEL_ARCHITECTURES_MAPPING.items()}
    if name not in names:
        raise InputError(f'{config_path} names an unknown architecture "{name}"')
    left_out = ('encoder_name', 'encoder_weights', 'in_channels', 'classes', 'aux_params')
    return {
        'architecture': names[name],
        'encoder': config.get('encoder_name'),
        'options': {k: v for k, v in config.items() if k not in left_out and not k.startswith('_')},
    }


def _saved_transforms(path: Path) -> dict[str, object]:
    """Size, resizing and normalisation in a file that albumentations' `save_pretrained` wrote.
    Raises InputError."""
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
            target = longest if None in size or max(size) != longest else size
            settings |= {'image_size': target, 'resize': 'letterbox'}
        if 'Normalize' in steps:
            step = steps['Normalize']
            scale = step.get('max_pixel_value', 255.0) / 255.0
            settings['mean'] = tuple(float(value) * scale for value in step['mean'])
            settings['std'] = tuple(float(value) * scale for value in step['std'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f'{path} cannot be read: {one_line(error)} (save it again)') from None
    return settings


def _read_folder(folder: Path, weights_key: str | None, expected: Set[str]) -> Checkpoint:
    """The checkpoint in a folder that `model.save_pretrained` wrote, or in another folder with a
    file of weights under a usual name (as accelerate writes). Raises InputError."""
    config_path = folder / 'config.json'
    weights_path = next((folder / n for n in WEIGHTS_FILES if (folder / n).is_file()), None)
    if weights_path is None:
        raise InputError(
            f'{folder} holds neither {" nor ".join(WEIGHTS_FILES)} '
            '(give the checkpoint file, or a folder that model.save_pretrained wrote)'
        )
    of_smp = config_path.is_file() and not expected  # with a factory, `expected` is never empty
    settings = _pretrained_settings(config_path) if of_smp else {}
    checkpoint = _weights_of(_read_file(weights_path), weights_path, weights_key, expected)
    notes, normalisations = checkpoint.notes, checkpoint.normalisations
    if (folder / TRANSFORM_FILE).is_file():
        transforms = _saved_transforms(folder / TRANSFORM_FILE)
        settings |= transforms
        listed = ', '.join(f'{key} {value}' for key, value in transforms.items())
        notes += (f'from {TRANSFORM_FILE}: {listed or "nothing that is known here"}',)
        normalisations = {} if 'mean' in transforms else normalisations
    return replace(checkpoint, settings={**checkpoint.settings, **settings}, notes=notes,
                   normalisations=normalisations)  # fmt: skip


def read_checkpoint(
    path: Path, weights_key: str | None = None, names: Set[str] = frozenset()
) -> Checkpoint:
    """The weights in a checkpoint file or a folder of `save_pretrained`.

    weights_key: which of several networks. names: of the network's tensors, if the network is
    known; else tensors with the names of an encoder-decoder are looked for. Raises InputError.
    """
    if path.is_dir():
        return _read_folder(path, weights_key, names)
    check_model_path(path)
    return _weights_of(_read_file(path), path, weights_key, names)
