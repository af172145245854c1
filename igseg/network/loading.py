"""Building a segmentation-models-pytorch network for the weights in a checkpoint, and choosing a
device.

`igseg.network.checkpoint` finds the weights. The user names architecture and encoder; else they are
stored with the weights; else `igseg.network.recognise` recognises them by the names and shapes of
the weights.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from igseg.errors import InputError, one_line
from igseg.network.checkpoint import Checkpoint, adapters_text, read_checkpoint
from igseg.network.description import NetworkDescription, accepted_sizes, input_channels
from igseg.network.factory import build_network, load_weights, tried_channels
from igseg.network.identity import ATTRIBUTE, PREPROCESSING, file_digest, network_digest
from igseg.network.kinds import (
    ARCHITECTURES,
    EXCLUSIVE,
    FOREGROUND,
    LOGITS,
    MULTILABEL,
    OUTPUT_KINDS,
    NetworkSource,
    check_device_name,
)
from igseg.network.recognise import NO_OPTIONS, defaults_of, head_weight, recognise
from igseg.preprocessing import (
    CHANNEL_ORDERS,
    DEFAULT_IMAGE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_IMAGE_SIZE,
    RESIZE_MODES,
    Preprocessing,
    checked_size,
)

MAX_CLASSES = 256  # labels are bytes

OF_THE_FACTORY = 'factory'  # the weights key for weights that a factory has loaded itself


def resolve_device(name: str | torch.device = 'auto') -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU.

    Raises InputError for an unknown device, or a device that this machine lacks.
    """
    check_device_name(str(name))
    if str(name) == 'auto':
        mps = torch.backends.mps.is_available()
        return torch.device('cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu')
    device = torch.device(name)
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise InputError('--device cuda: no CUDA GPU is available (use --device auto or cpu)')
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(f'no device {device}: there are {torch.cuda.device_count()} GPUs')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise InputError('--device mps: not available here (use --device auto or cpu)')
    return device


# A network with its weights, the checkpoint, the origin of the network, and notes.
Built = tuple[torch.nn.Module, Checkpoint, dict[str, object], list[str]]


def _stored_name(stored: Mapping[str, object], key: str) -> str | None:
    """The architecture or the encoder that the stored settings name; None where they name none.
    Raises InputError."""
    name = stored.get(key) or None
    if name is not None and not isinstance(name, str):
        raise InputError(f'"{str(name)[:50]}" is no name of an {key}')
    return name


def _check_options(options: Mapping[str, object], architecture: str, encoder: str) -> None:
    """Raise InputError for options that smp would accept but ignore."""
    names = defaults_of(architecture)
    for name in options:
        if name in NO_OPTIONS:
            raise InputError(f'model option "{name}" is read off the weights (leave it out)')
        if name not in names and not encoder.startswith('tu-'):  # timm's encoders take more options
            close = difflib.get_close_matches(name, names, 1, cutoff=0.4)
            hint = f'; did you mean {close[0]}?' if close else ''
            raise InputError(f'{architecture} has no option "{name}"{hint}')


def _stored_preprocessing(stored: Mapping[str, Any], path: Path) -> Preprocessing:
    """The preprocessing that the stored settings name. path: of the checkpoint. Raises
    InputError."""
    try:
        size = stored.get('image_size') or DEFAULT_IMAGE_SIZE
        mean, std = stored.get('mean') or IMAGENET_MEAN, stored.get('std') or IMAGENET_STD
        mean, std = (tuple(float(value) for value in values) for values in (mean, std))
        bytes_range = stored.get('pixel_range') == '0-255'
        if bytes_range and not stored.get('mean'):
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        if bytes_range or max(map(abs, mean)) > 1:  # for pixels from 0 to 255
            mean, std = (tuple(value / 255 for value in values) for values in (mean, std))
        makes_sense = (
            0 < len(mean) == len(std) and all(map(math.isfinite, mean + std)) and min(std) > 0
        )
        size = checked_size(size)
        resize = stored.get('resize') or 'stretch'
        order = stored.get('channel_order') or 'rgb'
        makes_sense = makes_sense and resize in RESIZE_MODES and order in CHANNEL_ORDERS
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an InputError is a ValueError
        makes_sense = False
    if not makes_sense:
        raise InputError(
            f'{path} holds settings that make no sense (image_size: a whole number up to '
            f'{MAX_IMAGE_SIZE}, or (height, width); mean and std: a number for each channel; '
            'resize: stretch or letterbox; channel_order: rgb or bgr; save it again without them)'
        )
    return Preprocessing(size, resize, mean, std, order)


def create_model(
    architecture: str, encoder: str, classes: int, in_channels: int = 3, **options: object
) -> torch.nn.Module:
    """An untrained smp model by name; no weights are downloaded. Raises InputError."""
    if architecture not in ARCHITECTURES:
        raise InputError(
            f'unknown architecture "{architecture}" (choose from {", ".join(ARCHITECTURES)})'
        )
    if not isinstance(encoder, str) or not re.fullmatch(r'[\w.-]+', encoder):
        # timm would look for "hf-hub:…" on the network
        raise InputError(f'"{str(encoder)[:50]}" is no name of an encoder')
    import segmentation_models_pytorch as smp  # takes seconds

    try:
        return smp.create_model(
            architecture, encoder, None, in_channels=in_channels, classes=classes, **options
        )
    except Exception as error:  # encoders raise any kind of error
        close = difflib.get_close_matches(encoder, smp.encoders.get_encoder_names(), 3)
        hint = f'; did you mean {" or ".join(close)}?' if close and encoder not in close else ''
        reason = one_line(error)
        raise InputError(
            f'cannot build {architecture} with encoder "{encoder}"{hint or ": " + reason}'
        ) from None


def _count_classes(state: dict[str, torch.Tensor], path: Path) -> int:
    """The number of output channels of the last convolution in the segmentation head. Raises
    InputError."""
    head = head_weight(state)
    if head is None:
        raise InputError(
            f'{path} is no segmentation-models-pytorch checkpoint: it has no segmentation_head '
            f'(its first entry is "{next(iter(state), "")[:100]}")'
        )
    classes = head.shape[0]
    if not 1 <= classes <= MAX_CLASSES:
        raise InputError(f'{path} has {classes} classes (1 to {MAX_CLASSES} are possible)')
    return classes


@contextlib.contextmanager
def _explained_mismatch(path: Path) -> Iterator[None]:
    """Turn the long text of a failed load_state_dict into one sentence with the remedy."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f'{path} does not fit the network that its settings and the names of its weights ask '
            f'for: {one_line(error)} (save the model with save_pretrained, which records them)'
        ) from None


class _WithoutInitialValues(TorchFunctionMode):
    """Networks that are made inside this mode get no random initial values, which take long: all of
    them are replaced by those of the checkpoint."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = kwargs or {}
        if getattr(func, '__name__', '') in ('normal_', 'uniform_', 'trunc_normal_'):
            return args[0] if args else arguments.get('tensor')
        return func(*args, **arguments)


def _smp_network(
    path: Path,
    weights_key: str | None,
    architecture: str | None,
    encoder: str | None,
    options: dict[str, object],
) -> Built:
    """The network of segmentation-models-pytorch in a checkpoint. Raises InputError."""
    checkpoint = read_checkpoint(path, weights_key)
    stored, notes = checkpoint.settings, list(checkpoint.notes)
    state = {k: v for k, v in checkpoint.state.items() if not k.startswith('classification_head.')}
    if adapters := adapters_text(state):
        raise InputError(f'{path} is no plain network of smp: {adapters}')
    classes = _count_classes(state, path)
    _stored_preprocessing(stored, path)  # only a check; used when the channels are known
    user_options, options = options, {**checkpoint.options, **options}
    if activation := options.pop('activation', None):
        notes.append('its last activation is left out: what is explained is the logit before it')
        if activation == 'sigmoid' and classes > 1:
            checkpoint = replace(checkpoint, settings={'output_kind': MULTILABEL, **stored})
            notes.append(
                'its activation is a sigmoid of each class, so its labels are independent (say '
                'otherwise with --output_kind exclusive)'
            )
    architecture = architecture or _stored_name(stored, 'architecture')
    encoder = encoder or _stored_name(stored, 'encoder')
    with _explained_mismatch(path), _WithoutInitialValues():
        recognised = recognise(state, path, create_model, architecture, encoder, options)
        _check_options(user_options, recognised.architecture, recognised.encoder)
        model = create_model(recognised.architecture, recognised.encoder, classes,
                             recognised.in_channels, **recognised.options)  # fmt: skip
        model.load_state_dict(recognised.state)
    source: dict[str, object] = {
        'architecture': recognised.architecture, 'encoder': recognised.encoder, 'classes': classes,
        'channels': recognised.in_channels,
    }  # fmt: skip
    return model.float().eval(), checkpoint, source, [*notes, *recognised.notes]


def _network_of_factory(
    path: Path,
    weights_key: str | None,
    factory: str,
    options: dict[str, object],
    allow_unused: bool,
) -> Built:
    """The network that the user's code builds, with weights from a checkpoint. Raises
    InputError."""
    model = build_network(factory, options)
    if weights_key == OF_THE_FACTORY:
        checkpoint = Checkpoint({}, key=weights_key, notes=("the weights are the factory's own",))
        notes = [*checkpoint.notes]
    else:
        checkpoint = read_checkpoint(path, weights_key, model.state_dict().keys())
        notes = [*checkpoint.notes, *load_weights(model, checkpoint, path, allow_unused)]
    file = Path(factory.rpartition(':')[0])  # no file where the factory names a module
    digest = file_digest(file) if file.suffix == '.py' else None
    source: dict[str, object] = {'model_factory': factory, 'model_factory_sha256': digest}
    if weights_key == OF_THE_FACTORY:
        source['weights_key'] = weights_key
    if allow_unused:
        source['allow_unused'] = True
    return model, checkpoint, source, notes


def _number_in(source: Mapping[str, object], name: str) -> int | None:
    """A number in the origin of a network, if it is known."""
    number = source.get(name)
    return number if isinstance(number, int) else None


def _stored_outputs(
    stored: Mapping[str, object], classes: int | None
) -> tuple[NetworkDescription, list[str]]:
    """A description of only the outputs, by the stored settings as far as they make sense; and
    sentences on settings that were left out."""
    usual = classes and (FOREGROUND if classes == 1 else EXCLUSIVE)
    outputs, left_out = NetworkDescription(output_kind=usual or None), []
    kind, background = stored.get('output_kind'), stored.get('background_class', 0)
    if isinstance(kind, str) and kind in OUTPUT_KINDS and classes != 1:
        outputs = replace(outputs, output_kind=kind)
    elif kind is not None:
        left_out.append('output_kind')
    if background is None or (
        isinstance(background, int) and 0 <= background < (classes or MAX_CLASSES)
    ):
        outputs = replace(outputs, background=background)
    else:
        left_out.append('background_class')
    class_names = stored.get('class_names') or ()
    listed = class_names if isinstance(class_names, (list, tuple)) else [class_names]
    names = tuple(name for name in listed if isinstance(name, str))
    if listed is class_names and len(names) == len(listed) in (0, classes or len(listed)):
        outputs = replace(outputs, class_names=names)
    else:
        left_out.append('class_names')
    return outputs, [
        f'the stored {name} {str(stored[name])[:50]!r} makes no sense here and was left out'
        for name in left_out
    ]


def described(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    source: dict[str, object],
    notes: Sequence[str],
    path: Path,
) -> torch.nn.Module:
    """The module with its attributes `network_description` and `preprocessing`, made from the
    settings in the checkpoint and the attributes of the network. Raises InputError."""
    named_channels = _number_in(source, 'channels') or input_channels(model)
    channels = named_channels or tried_channels(model) or 3
    stored, beside = checkpoint.settings, checkpoint.normalisations.get(channels, {})
    preprocessing = _stored_preprocessing({**stored, **beside}, path)
    notes = [*notes]
    if beside:
        listed = ', '.join(f'{name} {values}' for name, values in beside.items())
        notes.append(f'stored beside the weights, so used: {listed}')
    if preprocessing.channels != channels:
        preprocessing = preprocessing.for_channels(channels)
        notes.append(
            f'the network takes {channels} channel{"s" if channels > 1 else ""}, for which there '
            'is no usual mean and std: pixels are given as they are, from 0 to 1 (say otherwise '
            'with --mean and --std)'
        )
    if channels == 1:
        notes.append('the network takes one channel: pictures are read as grey')
    multiple, fixed = accepted_sizes(model)
    if fixed:
        preprocessing = replace(preprocessing, image_size=checked_size(fixed))
    outputs, left_out = _stored_outputs(stored, _number_in(source, 'classes'))
    notes += left_out
    description = replace(
        outputs,
        channels=named_channels,  # channels that only worked in a trial are not certain
        size_multiple=multiple,
        fixed_size=fixed,
        gives=LOGITS if 'architecture' in source else None,  # networks of smp have no activation
        preprocessing=preprocessing,
        weights_sha256=network_digest(model),
        source=source,
        notes=tuple(notes),
    )
    setattr(model, ATTRIBUTE, description)
    setattr(model, PREPROCESSING, preprocessing)
    return model


def load_model(
    model_path: str | Path,
    device: str | torch.device = 'auto',
    encoder: str | None = None,
    architecture: str | None = None,
    weights_key: str | None = None,
    model_options: Mapping[str, object] | None = None,
    model_factory: str | None = None,
    allow_unused: bool = False,
) -> torch.nn.Module:
    """Load a checkpoint of segmentation-models-pytorch, or of a network that the user's own code
    builds, for inference.

    The weights are found wherever they lie in the file, under any prefix, and beside other content.
    `.safetensors` files and folders of `save_pretrained` are read too. No code in the file is run.
    `encoder` and `architecture` take precedence over stored settings. What is said nowhere is read
    off the names and shapes of the weights: encoder, architecture, numbers of input channels and
    classes, settings of the decoder. weights_key: which of several networks in the file.
    model_options: further arguments of the architecture, which leave no trace in the weights
    (`recognise.LEAVES_NO_TRACE`); they take precedence over stored arguments. model_factory:
    FILE.py:FUNCTION or package.module:function, which is called with the model_options and returns
    the network. allow_unused: whether the file may hold weights that the factory's network lacks in
    parts that it has.

    The model is returned in evaluation mode, in float32, on the device. It has two new attributes:
    `network_description` (a NetworkDescription, whose `notes` say what was decided), and
    `preprocessing`, which the description holds too.

    Raises InputError where the file is missing, empty, damaged or unsafe, or where its weights do
    not fit the architecture or the encoder.
    """
    NetworkSource(
        model_path, device, encoder, architecture, weights_key, model_options, model_factory,
        allow_unused,
    ).check()  # fmt: skip
    path, device = Path(model_path), resolve_device(device)
    if model_factory is None:
        built = _smp_network(path, weights_key, architecture, encoder, dict(model_options or {}))
    else:
        built = _network_of_factory(
            path, weights_key, model_factory, dict(model_options or {}), allow_unused
        )
    model, checkpoint, source, notes = built
    source = {
        'model_path': str(path),
        'model_sha256': file_digest(path),
        **source,
        **({'weights_key': checkpoint.key} if checkpoint.others else {}),
        **({'model_options': dict(model_options)} if model_options else {}),
    }
    return described(model, checkpoint, source, notes, path).to(device)
