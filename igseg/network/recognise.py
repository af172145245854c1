"""Recognising the network that weights belong to by the names and shapes of the weights: encoder,
architecture, number of input channels and classes, and the settings of the decoder.

The names of the decoder's tensors show the architecture, and their shapes show its settings. The
encoder is looked up in `encoder_index.json.gz`, which holds a key for the names and shapes of every
encoder of segmentation-models-pytorch, including those of timm (`benchmarks/make_encoder_index.py`
makes this file). Each result is checked: the network is built without memory, and its names and
shapes are compared with those of the weights. LEAVES_NO_TRACE lists settings that no shape shows.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from igseg.errors import InputError, check_choice
from igseg.network.checkpoint import ENCODER, HEAD, INFLATION
from igseg.network.kinds import ARCHITECTURES

DECODER = 'decoder.'

INDEX = resources.files('igseg.network') / 'encoder_index.json.gz'

DEPTHS = (5, 4, 3)  # of encoders, in stages
VIT = 'vit'  # takes the place of a depth in the index: encoders of DPT are equal at any depth
NAMED = 8  # encoders that a sentence lists
NO_OPTIONS = (  # arguments that are read off the weights, have flags, or are not needed
    'architecture', 'encoder', 'encoder_name', 'encoder_weights', 'in_channels', 'classes',
    'aux_params',
)  # fmt: skip

# Arguments that change what is computed, but that no name or shape of a tensor shows. Where they
# differ from smp's defaults, the user must say so (--model_option). Other settings that are not
# shown: `activation` (left out, since the logit is explained), the settings of a norm (its epsilon;
# a norm in place looks like a batch norm), and settings of timm's encoders without weights
# (activations, strides).
LEAVES_NO_TRACE = {
    'unet': ('decoder_interpolation',),
    'unetplusplus': ('decoder_interpolation',),
    'manet': ('decoder_interpolation',),
    'linknet': (),
    'fpn': ('decoder_interpolation', 'upsampling'),
    'pspnet': ('upsampling',),
    'deeplabv3': ('encoder_output_stride', 'decoder_atrous_rates', 'upsampling'),
    'deeplabv3plus': ('encoder_output_stride', 'decoder_atrous_rates', 'upsampling'),
    'pan': ('encoder_output_stride', 'decoder_interpolation', 'upsampling'),
    'upernet': ('upsampling',),
    'segformer': ('upsampling',),
    'dpt': ('encoder_output_indices', 'decoder_readout', 'dynamic_img_size'),
}
MARKS = {  # a tensor of the decoder that shows the architecture; the first in this order counts
    'manet': 'center.top_conv.weight',
    'unet': 'blocks.0.conv1.0.weight',
    'unetplusplus': 'blocks.x_0_0.conv1.0.weight',
    'linknet': 'blocks.0.block.0.0.weight',
    'fpn': 'p5.weight',
    'pspnet': 'psp.blocks.0.pool.1.0.weight',
    'deeplabv3': 'aspp.convs.0.0.weight',
    'deeplabv3plus': 'aspp.0.convs.0.0.weight',
    'pan': 'fpa.branch1.1.conv.weight',
    'upernet': 'fusion_block.0.weight',
    'segformer': 'mlp_stage.0.linear.weight',
    'dpt': 'reassemble_blocks.0.project_to_out_channel.weight',
}

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by name
Build = Callable[..., torch.nn.Module]  # create_model(architecture, encoder, classes, in_channels)


@dataclass(frozen=True)
class Recognised:
    """A network that has exactly the tensors of a state dict."""

    architecture: str
    encoder: str
    in_channels: int
    classes: int
    options: dict[str, object]  # other arguments: from the caller, and as the shapes show them
    state: dict[str, torch.Tensor]  # the weights, with the names of the installed version of smp
    notes: tuple[str, ...] = ()  # what was guessed, in sentences


@dataclass(frozen=True)
class _Decoder:
    """What the tensors of a decoder show."""

    architecture: str
    options: dict[str, object]
    depths: tuple[int, ...]  # that the encoder may have, the most likely first


# --------------------------------------------------------------------------- names and shapes


def tensor_shapes(state: Mapping[str, torch.Tensor], prefix: str = '') -> dict[str, tuple]:
    """The shapes of the tensors whose names begin with a prefix, by name without the prefix.
    Counters of batches are left out, since old files do not have them."""
    return {
        name[len(prefix) :]: tuple(value.shape)
        for name, value in state.items()
        if name.startswith(prefix) and not name.endswith('num_batches_tracked')
    }


def index_key(shapes: Shapes, loose: Collection[str]) -> str:
    """A short digest of names and shapes. loose: names that are left out, since their shapes depend
    on the number of input channels."""
    lines = (f'{name} {shape}' for name, shape in sorted(shapes.items()) if name not in loose)
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:12]


def head_weight(state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The weight of the last convolution, (classes, channels, k, k), whatever the order of tensors
    in the file; None where there is none."""
    names = [name for name, v in state.items() if name.startswith(HEAD) and v.ndim == 4]
    return state[max(names)] if names else None


def numbers_in(state: Mapping[str, torch.Tensor]) -> int:
    """How many numbers a state dict holds; numbers that a view repeats count once."""
    return sum(
        value.numel()
        if value.device.type == 'meta'
        else min(value.numel(), value.untyped_storage().nbytes() // value.element_size())
        for value in state.values()
    )


def _spellings(state: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The state dict with the names in the file, then with the names that the installed version of
    segmentation-models-pytorch would use if an earlier version wrote the file. Until 0.4, the
    decoder of DeepLabV3 was a list, and names in encoders of timm had no `model.`."""
    yield state
    modern = state
    if f'{DECODER}0.convs.0.0.weight' in state:
        parts = {'0': 'aspp', '1': 'conv', '2': 'bn'}
        modern = {re.sub(rf'^{DECODER}([012])\.', lambda m: f'{DECODER}{parts[m[1]]}.', k): v
                  for k, v in state.items()}  # fmt: skip
        yield modern
    if not any(name.startswith(f'{ENCODER}model.') for name in state):
        within = {re.sub(rf'^{ENCODER}', f'{ENCODER}model.', k): v for k, v in modern.items()}
        yield within
        if any(name.startswith(f'{ENCODER}stages.') for name in state):  # GENet
            yield {k.replace(f'{ENCODER}model.stages.', f'{ENCODER}model.stages_'): v
                   for k, v in within.items()}  # fmt: skip


# --------------------------------------------------------------------------- decoders


def _firsts(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """The output channels of the tensors whose names are the pattern with 0, 1, 2, …"""
    channels: list[int] = []
    while (name := pattern.format(len(channels))) in shapes:
        channels.append(shapes[name][0])
    return tuple(channels)


def _norm(shapes: Shapes, block: str) -> object:
    """The normalisation after a convolution, as an argument of smp."""
    if f'{block}.1.running_mean' in shapes:
        return 'batchnorm'
    if f'{block}.1.weight' in shapes:  # a layer norm has it too, but takes no images in smp
        return {'type': 'instancenorm', 'affine': True}
    return 'identity'


def _read_unet(shapes: Shapes, _: int) -> dict[str, object]:
    channels = _firsts(shapes, 'blocks.{}.conv1.0.weight')
    attention = 'blocks.0.attention1.attention.cSE.1.weight' in shapes
    return {
        'decoder_channels': channels,
        'encoder_depth': len(channels),
        'decoder_attention_type': 'scse' if attention else None,
        'decoder_use_norm': _norm(shapes, 'blocks.0.conv1'),
    }


def _read_unetplusplus(shapes: Shapes, _: int) -> dict[str, object]:
    blocks = {k.replace('.x_0_', '.'): v for k, v in shapes.items() if k.startswith('blocks.x_0_')}
    return _read_unet(blocks, 0)


def _read_manet(shapes: Shapes, _: int) -> dict[str, object]:
    options = _read_unet(shapes, 0)
    del options['decoder_attention_type']
    return {**options, 'decoder_pab_channels': shapes['center.top_conv.weight'][0]}


def _read_linknet(shapes: Shapes, _: int) -> dict[str, object]:
    depth = len(_firsts(shapes, 'blocks.{}.block.0.0.weight'))
    return {'encoder_depth': depth, 'decoder_use_norm': _norm(shapes, 'blocks.0.block.0')}


def _read_fpn(shapes: Shapes, last: int) -> dict[str, object]:
    segmentation = shapes['seg_blocks.0.block.0.block.0.weight'][0]
    return {
        'decoder_pyramid_channels': shapes['p5.weight'][0],
        'decoder_segmentation_channels': segmentation,
        'decoder_merge_policy': 'cat' if last == 4 * segmentation else 'add',
    }


def _read_pspnet(shapes: Shapes, _: int) -> dict[str, object]:
    return {'psp_out_channels': shapes['conv.0.weight'][0],
            'decoder_use_norm': _norm(shapes, 'conv')}  # fmt: skip


def _read_deeplab(shapes: Shapes, _: int) -> dict[str, object]:
    aspp = 'aspp.0.convs' if 'aspp.0.convs.0.0.weight' in shapes else 'aspp.convs'
    return {
        'decoder_channels': shapes[f'{aspp}.0.0.weight'][0],
        'decoder_aspp_separable': f'{aspp}.1.0.0.weight' in shapes,
    }


def _read_pan(shapes: Shapes, _: int) -> dict[str, object]:
    depth = 2 + sum(f'gau{stage}.conv2.conv.weight' in shapes for stage in (1, 2, 3))
    return {'decoder_channels': shapes[MARKS['pan']][0], 'encoder_depth': depth}


def _read_upernet(shapes: Shapes, _: int) -> dict[str, object]:
    return {
        'decoder_channels': shapes['fusion_block.0.weight'][0],
        'decoder_use_norm': _norm(shapes, 'fusion_block'),
        'encoder_depth': 1 + len(_firsts(shapes, 'feature_norms.{}.weight')),
    }


def _read_segformer(shapes: Shapes, _: int) -> dict[str, object]:
    channels = _firsts(shapes, 'mlp_stage.{}.linear.weight')
    # Encoders that begin at a quarter of the size have one stage less.
    depths = (len(channels), len(channels) + 1)
    return {'decoder_segmentation_channels': channels[0], 'encoder_depth': depths}


def _read_dpt(shapes: Shapes, _: int) -> dict[str, object]:
    channels = _firsts(shapes, 'reassemble_blocks.{}.project_to_out_channel.weight')
    readout = 'cat' if 'projection_blocks.0.project.0.weight' in shapes else 'ignore'
    return {
        'encoder_depth': len(channels),
        'decoder_intermediate_channels': channels,
        'decoder_fusion_channels': shapes['reassemble_blocks.0.project_to_feature_dim.weight'][0],
        'decoder_readout': readout,
    }


_READERS: dict[str, Callable[[Shapes, int], dict[str, object]]] = {
    'unet': _read_unet, 'unetplusplus': _read_unetplusplus, 'manet': _read_manet,
    'linknet': _read_linknet, 'fpn': _read_fpn, 'pspnet': _read_pspnet,
    'deeplabv3': _read_deeplab, 'deeplabv3plus': _read_deeplab, 'pan': _read_pan,
    'upernet': _read_upernet, 'segformer': _read_segformer, 'dpt': _read_dpt,
}  # fmt: skip


@cache
def defaults_of(architecture: str) -> dict[str, object]:
    """The arguments of an architecture, with their defaults."""
    import segmentation_models_pytorch as smp  # takes seconds

    parameters = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[architecture]).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _same(value: object, other: object) -> bool:
    """Whether two values of an argument are equal; a list may equal a tuple."""
    values = [tuple(v) if isinstance(v, (list, tuple)) else v for v in (value, other)]
    return values[0] == values[1]


def read_decoder(state: Mapping[str, torch.Tensor]) -> _Decoder | None:
    """The architecture whose decoder has such names, with its settings as the shapes show them;
    None where no architecture of smp has such a decoder."""
    shapes, head = tensor_shapes(state, DECODER), head_weight(state)
    architecture = next((name for name, mark in MARKS.items() if mark in shapes), None)
    if architecture is None or head is None:
        return None
    try:
        options = _READERS[architecture](shapes, head.shape[1])
    except (KeyError, IndexError):  # a tensor is missing, or has too few dimensions
        return None
    depths = options.pop('encoder_depth', DEPTHS)
    depths = depths if isinstance(depths, tuple) else (depths,)
    defaults = defaults_of(architecture)
    depths = tuple(sorted(depths, key=lambda depth: depth != defaults['encoder_depth']))
    # Only options that the installed version has.
    options = {name: value for name, value in options.items() if name in defaults}
    shown = {name: value for name, value in options.items() if not _same(value, defaults[name])}
    return _Decoder(architecture, shown, depths)


# --------------------------------------------------------------------------- encoders


@cache
def encoder_index() -> dict[str, Any]:
    """The index. `loose`: sets of names that do not count. `encoders`: by key and depth, lists of
    names of encoders; encoders that compute the same are in one list. Empty where the file is
    missing."""
    try:
        index: dict[str, Any] = json.loads(gzip.decompress(INDEX.read_bytes()))
        return index
    except (OSError, ValueError, EOFError):
        return {'versions': {}, 'loose': [], 'encoders': {}}


def index_is_current() -> bool:
    """Whether the index was made with the installed libraries."""
    import segmentation_models_pytorch as smp  # takes seconds
    import timm

    return encoder_index()['versions'] == {'smp': smp.__version__, 'timm': timm.__version__}


def _needs_memory(error: Exception) -> bool:
    """Whether a network could not be built on the device `meta`, because its code reads numbers of
    tensors, which do not exist there."""
    return re.search(r'\bmeta\b', str(error)) is not None


def skeleton(build: Callable[[], torch.nn.Module]) -> torch.nn.Module | None:
    """A network of which only names and shapes are needed. It is built without memory where that
    works, which is fast. None where it cannot be built."""
    for device in ('meta', 'cpu'):
        try:
            with torch.device(device):
                return build()
        except Exception as error:  # encoders raise any kind of error
            if not _needs_memory(error):
                break
    return None


def _alike(name: str, shapes: Shapes) -> bool:
    """Whether the encoder of smp with this name has such tensors, whatever the number of input
    channels."""
    import segmentation_models_pytorch as smp  # takes seconds

    encoder = skeleton(lambda: smp.encoders.get_encoder(name, weights=None))
    expected = tensor_shapes(encoder.state_dict()) if encoder is not None else {}
    return expected.keys() == shapes.keys() and all(
        expected[k][:1] + expected[k][2:] == shapes[k][:1] + shapes[k][2:] and (
            expected[k] == shapes[k] or expected[k][1] == 3)
        for k in expected
    )  # fmt: skip


def _encoders_like(state: Mapping[str, torch.Tensor], decoder: _Decoder) -> list[tuple[str, ...]]:
    """The names of encoders that have the tensors of a state dict; encoders that compute the same
    are in one tuple."""
    shapes = tensor_shapes(state, ENCODER)
    depths = [VIT] if decoder.architecture == 'dpt' else [str(d) for d in decoder.depths]
    encoders: dict[tuple[str, ...], None] = {}
    for loose in encoder_index()['loose']:
        if any(name in shapes for name in loose):
            entry = encoder_index()['encoders'].get(index_key(shapes, loose), {})
            encoders |= {tuple(names): None for depth in depths for names in entry.get(depth, ())}
    if not encoders and not index_is_current():
        import segmentation_models_pytorch as smp  # takes seconds

        names_in_smp = smp.encoders.get_encoder_names()
        encoders = {(name,): None for name in names_in_smp if _alike(name, shapes)}
    return list(encoders)


# --------------------------------------------------------------------------- outlines


def _vit_options(outline: torch.nn.Module, usual: Shapes, shapes: Shapes) -> dict[str, object]:
    """The image size and the number of classes of a vision transformer, as far as they differ from
    the usual ones: the shapes of its table of positions and of its classifier depend on them.
    usual: the shapes of the outline. shapes: of the weights."""
    options: dict[str, object] = {}
    heads = [k for k in {*usual, *shapes} if re.fullmatch(r'encoder\.model\.head\S*\.weight', k)]
    heads = [k for k in heads if len(usual.get(k, shapes.get(k, ()))) == 2]
    for name in heads:
        if shapes.get(name) != usual.get(name):
            options['num_classes'] = shapes[name][0] if name in shapes else 0
    table = f'{ENCODER}model.pos_embed'
    if len(shapes.get(table, ())) == 3 and shapes[table] != usual.get(table):
        tokens = shapes[table][1]
        encoder: Any = outline.encoder  # of smp; it holds a vision transformer of timm
        prefix = getattr(encoder, '_num_prefix_tokens', 0)
        side = next((math.isqrt(n) for n in (tokens - prefix, tokens)
                     if n > 0 and math.isqrt(n) ** 2 == n), 0)  # fmt: skip
        if side:
            options['img_size'] = side * int(encoder.output_stride)
    return options


class _Outlines:
    """Networks that are built without memory and compared with the weights."""

    def __init__(
        self,
        state: dict[str, torch.Tensor],
        build: Build,
        decoder: _Decoder,
        options: dict[str, object],
    ) -> None:
        self.state, self.build, self.decoder, self.options = state, build, decoder, options
        self.shapes, self.numbers = tensor_shapes(state), numbers_in(state)
        head = head_weight(state)
        assert head is not None  # `read_decoder` has found it
        self.classes = int(head.shape[0])

    def fit(self, names: Collection[str], named: bool) -> Recognised | None:
        """The network with an encoder that fits the weights; None where it does not fit. names: of
        the encoder; the first that fits counts. named: whether the user or the checkpoint names it;
        then InputError is raised where it cannot be built."""
        problems: list[InputError] = []
        depths: Sequence[object] = self.decoder.depths
        if 'encoder_depth' in self.options:
            depths = (self.options['encoder_depth'],)
        changed: list[Recognised] = []  # networks with an unusual image size
        for encoder in names:
            for depth in depths:
                try:
                    network = self._at_depth(encoder, depth)
                except InputError as error:
                    problems.append(error)
                    continue
                if network and network.options.keys() - self.options.keys() & {'img_size'}:
                    changed.append(network)
                elif network:
                    return network
        if changed:
            return changed[0]
        if named and len(problems) == len(depths):
            raise problems[0]
        return None

    def _at_depth(self, encoder: str, depth: object) -> Recognised | None:
        """The network with this encoder and depth; None where it does not fit the weights. Raises
        InputError where it cannot be built."""
        options = {**self.decoder.options, **self.options}
        if depth != defaults_of(self.decoder.architecture)['encoder_depth']:
            options['encoder_depth'] = depth
        channels, outline = 3, self._outline(encoder, 3, options)
        outline_shapes = tensor_shapes(outline.state_dict())
        if outline_shapes != self.shapes:
            if self.decoder.architecture == 'dpt':
                options = {**options, **_vit_options(outline, outline_shapes, self.shapes)}
            elif outline_shapes.keys() != self.shapes.keys():
                return None
            count = self._channels(encoder, options)
            if count is None:
                return None
            channels = count
            outline = self._outline(encoder, channels, options)
            if tensor_shapes(outline.state_dict()) != self.shapes:
                return None
        self._check_size(outline)
        return Recognised(
            self.decoder.architecture, encoder, channels, self.classes, options, self.state
        )

    def _channels(self, encoder: str, options: dict[str, object]) -> int | None:
        """The number of input channels, from the tensors whose shapes depend on it; None where no
        number fits."""
        three, four = (
            tensor_shapes(self._outline(encoder, n, options).state_dict()) for n in (3, 4)
        )
        for name, shape in three.items():
            if shape != four[name] and len(self.shapes.get(name, ())) == len(shape):
                sizes = zip(shape, four[name], self.shapes[name], strict=True)
                steps = [(c - a) / (b - a) for a, b, c in sizes if a != b]
                if len(steps) == 1 and steps[0] == int(steps[0]) and steps[0] > -3:
                    return 3 + int(steps[0])
        return None

    def _outline(self, encoder: str, channels: int, options: dict[str, object]) -> torch.nn.Module:
        """The network with this encoder and number of channels, built without memory where that
        works. Raises InputError where it cannot be built, or is too large for memory."""
        architecture = self.decoder.architecture

        def build(name: str) -> torch.nn.Module:
            return self.build(architecture, name, self.classes, in_channels=channels, **options)

        try:
            with torch.device('meta'):
                return build(encoder)
        except InputError as error:
            if not _needs_memory(error):
                raise
        # SegFormer's encoders can only be built in memory. Settings can make only the decoder too
        # large, so its size is checked with a small encoder first.
        with torch.device('meta'):
            self._check_size(build('resnet18'))
        with torch.device('cpu'):
            return build(encoder)

    def _check_size(self, outline: torch.nn.Module) -> None:
        """Raise InputError where a model is much larger than its checkpoint; no memory has been
        reserved for it yet."""
        if numbers_in(outline.state_dict()) > INFLATION * self.numbers:
            raise InputError('the model that the checkpoint asks for is much larger than its file')


# --------------------------------------------------------------------------- sentences


def _notes(
    fit: Recognised,
    decoder: _Decoder,
    architecture: str | None,
    encoder: str | None,
    passed: Mapping[str, object],
) -> tuple[str, ...]:
    """Sentences on what was guessed, and on how to override it. passed: the options from the
    caller."""
    shown = {k: v for k, v in fit.options.items() if k not in passed}
    if fit.in_channels != 3:
        shown = {'in_channels': fit.in_channels, **shown}
    settings = ', '.join(f'{name}={value}' for name, value in shown.items())
    guessed = [f'--{k}' for k, v in (('architecture', architecture), ('encoder', encoder)) if not v]
    notes = []
    if guessed:
        notes.append(
            f'by the names and shapes of its weights this is {fit.architecture} with encoder '
            f'{fit.encoder}{f" and {settings}" if settings else ""} '
            f'(say otherwise with {" and ".join(guessed)})'
        )
    elif settings:
        notes.append(f'read off the shapes of its weights: {settings}')
    if decoder.options.get('decoder_readout') == 'ignore' and 'decoder_readout' not in passed:
        notes.append(
            'decoder_readout is "ignore" or "add", which no weight shows: "ignore" is taken '
            '(say otherwise with --model_option)'
        )
    return tuple(notes)


def _ambiguous(path: Path, encoders: list[str]) -> str:
    """The sentence for several encoders that fit, of which the user must choose."""
    more = f' and {len(encoders) - NAMED} more' if len(encoders) > NAMED else ''
    return (
        f'{path} fits encoders whose weights have the same names and shapes but which compute '
        f'different features: {", ".join(encoders[:NAMED])}{more} (choose one with --encoder)'
    )


def _setting(name: str, value: object) -> str:
    """An argument as it is written on the command line."""
    return f'{name}={" ".join(repr(value).split())[:60]}'


def _unrecognised_text(state: dict[str, torch.Tensor]) -> str:
    """What the weights of a network that was not recognised show, and what the user can do."""
    decoder = next(filter(None, map(read_decoder, _spellings(state))), None)
    if decoder is None:
        first = next((name for name in state if name.startswith(DECODER)), 'none')
        return (
            'no architecture of segmentation-models-pytorch has such a decoder (its first tensor: '
            f'{first[:60]}; make the network with code of your own and --model_factory)'
        )
    return (
        f'it has the decoder of {decoder.architecture}, but an encoder that was not recognised, or '
        'settings that no shape shows (name it with --encoder, them with --model_option, or make '
        'the network with code of your own and --model_factory)'
    )


# --------------------------------------------------------------------------- recognising


def _recognise(
    state: dict[str, torch.Tensor],
    path: Path,
    build: Build,
    architecture: str | None,
    encoder: str | None,
    options: dict[str, object],
) -> Recognised | None:
    """The network whose tensors have exactly these names and shapes; None where there is none.
    Raises InputError."""
    decoder = read_decoder(state)
    if decoder is None or architecture not in (None, decoder.architecture):
        return None
    outlines = _Outlines(state, build, decoder, options)
    kinds = [(encoder,)] if encoder else _encoders_like(state, decoder)
    fits = [fit for names in kinds if (fit := outlines.fit(names, encoder is not None))]
    fits = [fit for fit in fits if 'img_size' not in fit.options] or fits
    if len(fits) > 1:
        raise InputError(_ambiguous(path, [fit.encoder for fit in fits]))
    if not fits:
        return None
    return replace(fits[0], notes=_notes(fits[0], decoder, architecture, encoder, options))


def _lookalike_text(
    state: dict[str, torch.Tensor], path: Path, build: Build, options: dict[str, object]
) -> str:
    """What the weights look like where no architecture, encoder or option is required; empty where
    they look like no network."""
    for spelling in _spellings(state):
        try:
            network = _recognise(spelling, path, build, None, None, {})
        except InputError as error:
            return f'it{str(error).removeprefix(str(path))}'
        if network:
            right = {**defaults_of(network.architecture), **network.options}
            wrong = [name for name, value in options.items() if not _same(right.get(name), value)]
            listed = ''.join(f', {_setting(*option)}' for option in network.options.items())
            flags = f'--architecture {network.architecture} --encoder {network.encoder}'
            if wrong:
                settings = (_setting(name, right.get(name)) for name in wrong)
                flags += f' --model_option {" ".join(settings)}'
            return (
                f'it looks like {network.architecture} with encoder {network.encoder}{listed} '
                f'(add {flags})'
            )
    return ''


def _no_fit_text(
    state: dict[str, torch.Tensor],
    path: Path,
    build: Build,
    architecture: str | None,
    encoder: str | None,
    options: dict[str, object],
) -> str:
    """The sentence for weights that do not fit the required architecture, encoder and options, or
    that fit no network."""
    parts = [architecture or 'any architecture', *([f'encoder {encoder}'] if encoder else [])]
    parts += [_setting(name, value) for name, value in options.items()]
    required = bool(architecture or encoder or options)
    lookalike = _lookalike_text(state, path, build, options) if required else ''
    problem = f'does not fit {" with ".join(parts)}' if required else 'was not recognised'
    return f'{path} {problem}: {lookalike or _unrecognised_text(state)}'


def recognise(
    state: dict[str, torch.Tensor],
    path: Path,
    build: Build,
    architecture: str | None = None,
    encoder: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Recognised:
    """The network that a state dict (prefix removed, no classification head) belongs to.

    build: `create_model`. architecture, encoder, options: required of the result, where passed.
    Raises InputError where no network fits, where the encoder cannot be built, or where several
    encoders fit that compute different things.
    """
    options = {k: v for k, v in (options or {}).items() if k not in NO_OPTIONS}
    if architecture is not None:
        check_choice('architecture', architecture, ARCHITECTURES)
    for spelling in _spellings(state):
        network = _recognise(spelling, path, build, architecture, encoder, options)
        if network:
            return network
    raise InputError(_no_fit_text(state, path, build, architecture, encoder, options))
