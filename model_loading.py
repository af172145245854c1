"""Loading segmentation-models-pytorch checkpoints of every common form, and choosing a device.

No code in a checkpoint is ever run: files are read with `weights_only=True`. What does not fit
is explained in one sentence that says which encoder and architecture the file looks like.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import segmentation_models_pytorch as smp
import torch

from errors import InputError, one_line
from network_description import (
    ATTRIBUTE,
    EXCLUSIVE,
    FOREGROUND,
    NetworkDescription,
    network_digest,
    size_multiple,
)
from segmentation_dataset import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

DEFAULT_ARCHITECTURE = 'unetplusplus'
DEFAULT_ENCODER = 'efficientnet-b5'
DEFAULT_IMAGE_SIZE = 640
ARCHITECTURES = tuple(smp.MODEL_ARCHITECTURES_MAPPING)
STATE_DICT_KEYS = ('model_state_dict', 'state_dict', 'model', 'net')
STATE_DICT_PREFIXES = ('module.', '_orig_mod.', 'model.')
MAX_CLASSES = 256  # labels are bytes
MAX_IMAGE_SIZE = 16384
INFLATION = 4  # a checkpoint's model may have so many times the numbers its file holds


def resolve_device(name: str | torch.device = 'auto') -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU.

    Raises InputError for an unknown device or one this machine lacks.
    """
    if str(name) == 'auto':
        mps = torch.backends.mps.is_available()
        return torch.device('cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cuda', 'mps', 'cpu'):
        raise InputError(f'unknown device "{name}" (use auto, cuda, mps or cpu)')
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise InputError('--device cuda: no CUDA GPU is available (use --device auto or cpu)')
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(f'no device {device}: there are {torch.cuda.device_count()} GPUs')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise InputError('--device mps: not available here (use --device auto or cpu)')
    return device


def load_model(
    model_path: str | Path,
    device: str | torch.device = 'auto',
    encoder: str | None = None,
    architecture: str | None = None,
) -> torch.nn.Module:
    """Load a segmentation-models-pytorch checkpoint for inference.

    Reads a state dict, plain or under `model_state_dict`, `state_dict`, `model` or `net`, with
    or without the prefixes of DataParallel, Lightning and torch.compile; `.safetensors`; and
    folders of `save_pretrained`. No code in the file is ever run (`weights_only=True`).
    `encoder` and `architecture` win over settings stored in the checkpoint, which win over the
    defaults (U-Net++, EfficientNet-B5). The number of classes is read from the head.

    The model comes back in evaluation mode, float32, on the device, with one attribute added,
    `network_description` (a NetworkDescription); its preprocessing is also `model.preprocessing`.

    Raises InputError: file missing, empty, damaged or unsafe; other architecture or encoder.
    """
    model_path = Path(model_path)
    device = resolve_device(device)
    state, stored = _read_checkpoint(model_path)
    architecture = architecture or stored.get('architecture') or DEFAULT_ARCHITECTURE
    encoder = encoder or stored.get('encoder') or DEFAULT_ENCODER
    options = stored.get('options', {})
    state = {k: v for k, v in state.items() if not k.startswith('classification_head.')}
    classes = _count_classes(state, model_path)
    preprocessing = _stored_preprocessing(stored, model_path)
    with _explained_mismatch(state, model_path, architecture, encoder):
        _check_size(architecture, encoder, classes, options, state)
        model = create_model(architecture, encoder, classes, **options)
        model.load_state_dict(state)
    model = model.float().eval()
    source = {
        'model_path': str(model_path),
        'model_sha256': file_digest(model_path),
        'architecture': architecture,
        'encoder': encoder,
        'classes': classes,
    }
    description = NetworkDescription(
        size_multiple=size_multiple(model),
        output_kind=FOREGROUND if classes == 1 else EXCLUSIVE,
        preprocessing=preprocessing,
        weights_sha256=network_digest(model),
        source=source,
    )
    setattr(model, ATTRIBUTE, description)
    model.preprocessing = preprocessing
    return model.to(device)


def _check_size(
    architecture: str, encoder: str, classes: int, options: dict, state: dict[str, torch.Tensor]
) -> None:
    """Raise RuntimeError where a checkpoint's settings ask for a model much larger than its file
    holds, before memory is taken for it."""
    # SegFormer's encoders cannot be outlined; what the settings make large is the decoder.
    for name in (encoder, 'resnet18'):
        try:
            with torch.device('meta'):
                outline = create_model(architecture, name, classes, **options)
            break
        except InputError as error:
            if 'meta tensors' not in str(error):
                raise
    if numbers_in(outline.state_dict()) > INFLATION * numbers_in(state):
        raise RuntimeError('the model is too large')


def numbers_in(state: dict[str, torch.Tensor]) -> int:
    """How many numbers a state dict holds; those that a view repeats count once."""
    return sum(
        value.numel()
        if value.device.type == 'meta'
        else min(value.numel(), value.untyped_storage().nbytes() // value.element_size())
        for value in state.values()
    )


def _stored_preprocessing(stored: dict, path: Path) -> Preprocessing:
    """The preprocessing that a checkpoint's settings ask for. Raises InputError."""
    try:
        size = stored.get('image_size') or DEFAULT_IMAGE_SIZE
        mean, std = stored.get('mean') or IMAGENET_MEAN, stored.get('std') or IMAGENET_STD
        mean, std = (tuple(float(value) for value in values) for values in (mean, std))
        fine = len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0
        fine = fine and size == int(size) and 1 <= size <= MAX_IMAGE_SIZE
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fine = False
    if not fine:
        raise InputError(
            f'{path} holds settings that make no sense (image_size: a whole number up to '
            f'{MAX_IMAGE_SIZE}; mean and std: three numbers; save it again without them)'
        )
    return Preprocessing(image_size=int(size), mean=mean, std=std)


def create_model(architecture: str, encoder: str, classes: int, **options: object):
    """An untrained smp model by name; no weights are fetched. Raises InputError: unknown name."""
    if architecture not in ARCHITECTURES:
        raise InputError(
            f'unknown architecture "{architecture}" (choose from {", ".join(ARCHITECTURES)})'
        )
    if not isinstance(encoder, str) or not re.fullmatch(r'[\w.-]+', encoder):
        # timm would look for "hf-hub:…" on the network
        raise InputError(f'"{str(encoder)[:50]}" is no name of an encoder')
    try:
        return smp.create_model(
            architecture, encoder, encoder_weights=None, in_channels=3, classes=classes, **options
        )
    except Exception as error:  # what encoders raise at odd options is theirs
        close = difflib.get_close_matches(encoder, smp.encoders.get_encoder_names(), 3)
        hint = f'; did you mean {" or ".join(close)}?' if close and encoder not in close else ''
        reason = one_line(error)
        raise InputError(
            f'cannot build {architecture} with encoder "{encoder}"{hint or ": " + reason}'
        ) from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with file.open('rb') as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The state dict of a checkpoint, prefixes removed, and the settings stored with it."""
    if path.is_dir():
        return _read_pretrained_folder(path)
    if not path.is_file():
        raise InputError(f'model file not found: {path} (check --model_path)')
    if path.stat().st_size == 0:
        raise InputError(f'model file is empty (0 bytes): {path} (copy or save it again)')
    if path.suffix == '.safetensors':
        return _strip_prefixes(_read_safetensors(path)), {}
    _check_archive(path)
    content = _read_torch_file(path)
    settings = content.get('settings', {}) if isinstance(content, dict) else {}
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(map(_is_plain_tensor, content.values()))
        or not all(isinstance(name, str) for name in content)
    ):
        raise InputError(
            f'{path} holds no state dict (looked under {", ".join(STATE_DICT_KEYS)}; '
            'save it with torch.save(model.state_dict(), path))'
        )
    return _strip_prefixes(content), _plain_settings(settings)


def _is_plain_tensor(value: object) -> bool:
    """Whether a value is a tensor that holds all its numbers."""
    return (
        torch.is_tensor(value)
        and value.layout == torch.strided
        and value.device.type == 'cpu'
        and not value.is_quantized
    )


def _plain_settings(settings: object) -> dict:
    """The settings stored with a checkpoint; none where they are not what we store."""
    if not isinstance(settings, dict):
        return {}
    options = settings.get('options', {})
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        return {}
    names = (settings.get('architecture'), settings.get('encoder'))
    return settings if all(isinstance(name, str | None) for name in names) else {}


def _check_archive(path: Path) -> None:
    """Refuse a zip file that grows when it is unpacked, which torch.save never writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # no zip file, or damaged: torch.load says so
        return
    if unpacked > INFLATION * path.stat().st_size:
        raise InputError(
            f'{path} was refused: it would grow to {unpacked / 2**20:,.0f} MiB when unpacked '
            '(save only the weights: torch.save(model.state_dict(), path))'
        )


def _read_torch_file(path: Path) -> object:
    """torch.load that runs no code. NumPy numbers, common in training logs, are let through."""
    scalar = np._core.multiarray.scalar
    numbers = [scalar, (scalar, 'numpy.core.multiarray.scalar'), np.dtype, np.dtypes.Float64DType]
    numbers += [np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType]
    try:
        with torch.serialization.safe_globals(numbers), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of pickle protocols; the error says enough
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        if (
            zipfile.is_zipfile(path)
            or 'GLOBAL' in str(error)
            or 'weights_only' in str(error).lower()
        ):
            raise InputError(
                f'{path} was refused: it holds pickled Python objects, which could run code '
                '(save only the weights: torch.save(model.state_dict(), path))'
            ) from None
        raise InputError(f'{path} is no PyTorch checkpoint or is damaged (copy it again)') from None
    except Exception as error:  # torch.load and the unpickler raise all kinds on damaged files
        reason = one_line(error, 120)
        raise InputError(
            f'{path} is no PyTorch checkpoint or is damaged: {reason} (copy or save it again)'
        ) from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the library raises its own, unexported error class
        raise InputError(f'{path} is no safetensors file or is damaged: {error}') from None


def _read_pretrained_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A folder of `model.save_pretrained`: config.json beside model.safetensors."""
    config_path, weights_path = folder / 'config.json', folder / 'model.safetensors'
    if not config_path.is_file() or not weights_path.is_file():
        raise InputError(
            f'{folder} is no save_pretrained folder: it lacks config.json or model.safetensors '
            '(give the checkpoint file, or a folder that model.save_pretrained wrote)'
        )
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
    settings = {
        'architecture': names[name],
        'encoder': config.get('encoder_name'),
        'options': {k: v for k, v in config.items() if k not in taken and not k.startswith('_')},
    }
    return _read_safetensors(weights_path), settings


def _strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove what wrappers (DataParallel, torch.compile, Lightning) put before every name."""
    while prefix := next(
        (p for p in STATE_DICT_PREFIXES if state and all(k.startswith(p) for k in state)), None
    ):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _count_classes(state: dict[str, torch.Tensor], path: Path) -> int:
    """The number of output channels, read from the last convolution of the segmentation head."""
    heads = [v for k, v in state.items() if k.startswith('segmentation_head.') and v.ndim == 4]
    if not heads:
        raise InputError(
            f'{path} is no segmentation-models-pytorch checkpoint: it has no segmentation_head '
            f'(its first entry is "{next(iter(state), "")[:100]}")'
        )
    classes = heads[-1].shape[0]
    if not 1 <= classes <= MAX_CLASSES:
        raise InputError(f'{path} has {classes} classes (1 to {MAX_CLASSES} are possible)')
    return classes


@contextlib.contextmanager
def _explained_mismatch(
    state: dict[str, torch.Tensor], path: Path, architecture: str, encoder: str
) -> Iterator[None]:
    """Turn the pages of text of a failed load_state_dict into one sentence with the remedy."""
    try:
        yield
    except RuntimeError:
        said = f'{path} does not fit {architecture} with encoder {encoder}: it '
        like_encoder = guess_encoder(state, encoder)
        like = like_encoder and guess_architecture(state, like_encoder)
        if like_encoder is None:
            remedy = 'has an encoder that was not recognised (give its name with --encoder)'
            if any(k.startswith('encoder.model.') for k in state):
                remedy = 'has a timm encoder (give its name, which starts with tu-, with --encoder)'
        elif like and (like, like_encoder) != (architecture, encoder):
            remedy = (
                f'looks like {like} with encoder {like_encoder} '
                f'(add --architecture {like} --encoder {like_encoder})'
            )
        else:
            remedy = (
                f'has the encoder {like_encoder}, but a decoder with other settings than smp '
                'sets by default (save the model with save_pretrained, which records them)'
            )
        raise InputError(said + remedy) from None


def _shapes(state: dict[str, torch.Tensor], encoder: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict's encoder, or of everything else."""
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if name.startswith('encoder.') == encoder and not name.endswith('num_batches_tracked')
    }


def guess_encoder(state: dict[str, torch.Tensor], near: str = '') -> str | None:
    """The smp encoder whose tensors have exactly these names and shapes; None if there is none.

    Encoders whose names are close to `near` are tried first.
    """
    wanted = _shapes(state, encoder=True)
    known = smp.encoders.get_encoder_names()
    known.sort(key=lambda name: -difflib.SequenceMatcher(None, near, name).ratio())
    for name in dict.fromkeys((near or known[0], *known)):  # `near` may be one of timm's own
        candidate = _skeleton(lambda name=name: smp.encoders.get_encoder(name, weights=None))
        if candidate is None:
            continue
        tensors = {f'encoder.{key}': value for key, value in candidate.state_dict().items()}
        if _shapes(tensors, encoder=True) == wanted:
            return name
    return None


def guess_architecture(state: dict[str, torch.Tensor], encoder: str) -> str | None:
    """The smp architecture that has, with this encoder, exactly these decoder tensors."""
    wanted = _shapes(state, encoder=False)
    classes = _count_classes(state, Path())
    for name in ARCHITECTURES:
        candidate = _skeleton(lambda name=name: create_model(name, encoder, classes))
        if candidate is not None and _shapes(candidate.state_dict(), encoder=False) == wanted:
            return name
    return None


def _skeleton(build: Callable[[], torch.nn.Module]) -> torch.nn.Module | None:
    """A network for its names and shapes only: without memory where that works, which is fast.
    None where it cannot be built: not every name and every pair exists."""
    for device in ('meta', 'cpu'):
        with contextlib.suppress(Exception), torch.device(device):
            return build()
    return None
