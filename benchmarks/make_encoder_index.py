r"""Makes `encoder_index.json.gz`, by which the encoder of a checkpoint is recognised.

    python benchmarks/make_encoder_index.py --records records.jsonl \
        --index igseg/network/encoder_index.json.gz

Every encoder that segmentation-models-pytorch can build, with those of timm, is built without
weights, to record the names and shapes of its tensors. That takes about half an hour; encoders that
are recorded already are not built again. Then encoders with the same names and shapes get the same
weights. If they compute the same from the same noise, they are one kind; other encoders must be
told apart by the user.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders import TimmUniversalEncoder, TimmViTEncoder
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from igseg.network.identity import structure_digest
from igseg.network.recognise import DEPTHS, VIT, index_key, skeleton, tensor_shapes

LARGEST = 150_000_000  # weights of an encoder that is still run for a comparison
ORDER = ('3', '5', '4', VIT)  # of depths: the result at a depth often decides the next
AGREE = 1e-9  # relative; double precision


def build(name: str, depth: int | str, in_channels: int = 3, **options: object):
    """An encoder without pretrained weights, on the present default device of torch."""
    if depth == VIT:
        return TimmViTEncoder(name[3:], pretrained=False, in_channels=in_channels, **options)
    return smp.encoders.get_encoder(name, in_channels=in_channels, depth=depth, weights=None)


def records_of(name: str) -> Iterator[dict[str, object]]:
    """The records of an encoder: one for each depth with which it can be built."""
    loose = None
    for depth in sorted(DEPTHS, reverse=True):
        encoder = skeleton(lambda depth=depth: build(name, depth))
        if encoder is None:
            continue
        if loose is None:
            loose = _differing(encoder, skeleton(lambda depth=depth: build(name, depth, 4)))
        if loose:
            yield _record(name, depth, encoder, loose)
    if name.startswith('tu-'):
        yield from _vit_record(name)


def _vit_record(name: str) -> Iterator[dict[str, object]]:
    """The record of an encoder of DPT. Its classifier and its image size vary too."""
    encoder = skeleton(lambda: build(name, VIT))
    if encoder is None or len(set(encoder.output_strides)) > 1:
        return
    side = int(encoder.input_size[-1]) + 2 * int(encoder.output_stride)
    loose = _differing(encoder, skeleton(lambda: build(name, VIT, 4, num_classes=7)))
    loose |= _differing(encoder, skeleton(lambda: build(name, VIT, img_size=side)))
    if loose:
        yield _record(name, VIT, encoder, loose)


def _differing(network: torch.nn.Module, variant: torch.nn.Module | None) -> set[str]:
    """The names of tensors that have different shapes in a network and in its variant, or that
    only one of the two has."""
    if variant is None:
        return set()
    shapes = [tensor_shapes(module.state_dict()) for module in (network, variant)]
    return {
        name for name in shapes[0].keys() | shapes[1].keys()
        if shapes[0].get(name) != shapes[1].get(name)
    }  # fmt: skip


def _record(name: str, depth: int | str, encoder: torch.nn.Module, loose: set[str]) -> dict:
    shapes = tensor_shapes(encoder.state_dict())
    return {
        'name': name,
        'depth': depth,
        'loose': sorted(loose),
        'key': index_key(shapes, loose),
        'numbers': sum(p.numel() for p in encoder.parameters()),
        'digest': _digest(encoder),
    }


def make_records(path: Path, part: int, parts: int) -> None:
    """Record all encoders that are not recorded yet, or a part of them."""
    recorded = {line['name'] for line in map(json.loads, path.open())} if path.exists() else set()
    names = [*smp.encoders.get_encoder_names(), *(f'tu-{name}' for name in timm.list_models())]
    with path.open('a') as file:
        for name in tqdm(names[part::parts]):
            if name in recorded:
                continue
            records = list(records_of(name)) or [{'name': name, 'depth': None}]
            file.writelines(json.dumps(record) + '\n' for record in records)
            file.flush()


def _digest(encoder: torch.nn.Module) -> str:
    """The digest of an encoder's structure, whatever its name."""
    of_timm = isinstance(encoder, (TimmUniversalEncoder, TimmViTEncoder))
    return structure_digest(encoder.model if of_timm else encoder)[:16]


# --------------------------------------------------------------------------- which are the same


def make_index(records: Path, path: Path) -> None:
    """Write the index from the records."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for record in map(json.loads, records.open()):
        if record['depth'] is not None:
            groups[record['key'], str(record['depth'])].append(record)
    loose: list[list[str]] = []
    entries: dict[str, dict[str, list]] = defaultdict(dict)
    judge = _Judge()
    for key, depth in tqdm(sorted(groups, key=lambda group: ORDER.index(group[1]))):
        members = groups[key, depth]
        entries[key][depth] = _kinds(members, judge)
        loose += [names for m in members if (names := m['loose']) not in loose]
    versions = {'smp': smp.__version__, 'timm': timm.__version__}
    content = {'versions': versions, 'loose': loose, 'encoders': entries}
    text = json.dumps(content, sort_keys=True, separators=(',', ':')).encode()
    path.write_bytes(gzip.compress(text, mtime=0))


def _kinds(members: list[dict], judge: _Judge) -> list[list[str]]:
    """Names of encoders with the same tensors: a list for each group that computes the same. Names
    of smp come before those of timm, and the plainest name comes first."""
    kinds: dict[str, list[dict]] = defaultdict(list)
    for record in members:
        kinds[record['digest']].append(record)
    merged: list[list[dict]] = []
    for kind in kinds.values():
        like = next((other for other in merged if judge.same(other[0], kind[0])), None)
        if like is None:
            merged.append(list(kind))
        else:
            like += kind
    named = [sorted((r['name'] for r in kind), key=_plainness) for kind in merged]
    return sorted(named, key=lambda names: _plainness(names[0]))


def _plainness(name: str) -> tuple:
    return name.startswith('tu-'), len(name), name


class _Judge:
    """Whether encoders compute the same from the same weights; it remembers its results."""

    def __init__(self) -> None:
        # By the names of two encoders, their results by depth.
        self.results: dict[tuple[str, str], dict[str, bool | None]] = defaultdict(dict)

    def same(self, first: dict, second: dict) -> bool:
        """Whether two encoders with the same tensors compute the same."""
        depth, by_depth = str(first['depth']), self.results[first['name'], second['name']]
        if by_depth.get('3') is False and depth in '45':  # the first stages differ already
            by_depth[depth] = False
        elif by_depth.get('5') is True and depth == '4':
            by_depth[depth] = True
        else:
            by_depth[depth] = _compute_the_same(first, second)
        return by_depth[depth] is True


def _compute_the_same(first: dict, second: dict) -> bool | None:
    """Whether two encoders compute the same features of noise, with weights that follow from the
    names of their tensors. None: they are too large, or cannot be run."""
    size = _size(first['name'], first['depth'])
    options: dict[str, object] = {}
    if first['depth'] == VIT:  # built for the same image size they may have the same structure
        options = {'img_size': size[-1], 'num_classes': 7}
        outlines = [skeleton(lambda record=r: _built(record, **options)) for r in (first, second)]
        if None in outlines:
            options = {}
        elif _digest(outlines[0]) == _digest(outlines[1]):
            return True
    if max(first['numbers'], second['numbers']) > LARGEST:
        return None
    features = [_features(record, size, options) for record in (first, second)]
    if None in features:
        return None
    return all(
        a.shape == b.shape and float((a - b).norm()) <= AGREE * float(a.norm())
        for a, b in zip(*features, strict=True)
    )


def _built(record: dict, **options: object) -> torch.nn.Module:
    depth = record['depth']
    return build(record['name'], depth if depth == VIT else int(depth), **options)


def _features(
    record: dict, size: tuple[int, int], options: dict[str, object]
) -> list[torch.Tensor] | None:
    """The features of an encoder for noise; None if it cannot be run at this size."""
    try:
        with _Untouched():
            encoder = _built(record, **options)
        encoder = encoder.double().eval()
        for name, tensor in encoder.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(_weights(name, tensor.shape))
        noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = encoder(noise.double())
    except Exception as error:
        print(record['name'], record['depth'], repr(error)[:100], file=sys.stderr)
        return None
    features = features[0] if record['depth'] == VIT else features
    return features if all(f.isfinite().all() for f in features) else None


class _Untouched(TorchFunctionMode):
    """Leaves the memory of new weights as it is: all weights are set afterwards."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if getattr(function, '__name__', '') in ('normal_', 'uniform_', 'erfinv_', 'trunc_normal_'):
            return arguments[0] if arguments else named['tensor']
        return function(*arguments, **(named or {}))


def _size(name: str, depth: int | str) -> tuple[int, int]:
    """An input size that an encoder takes."""
    config = timm.get_pretrained_cfg(name[3:]) if name.startswith('tu-') else None
    if config is not None and (depth == VIT or config.fixed_input_size):
        return config.input_size[-2:]
    return 64, 64


def _weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Values that keep activations near 1. Variances are small, so that epsilon has an effect."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'big')
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if name.endswith('running_var'):
        return 1e-3 * (1 + noise.abs())
    if name.endswith(('running_mean', 'bias')):
        return 0.01 * noise
    if len(shape) < 2:
        return 0.05 * (1 + 0.1 * noise)
    return noise / max(1, noise[0].numel()) ** 0.5


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--records', type=Path, required=True, help='file of the records; new records are added'
    )
    parser.add_argument(
        '--index', type=Path, help='file of the index, which is made from the records'
    )
    parser.add_argument('--part', type=int, default=0, help='which of --parts to record')
    parser.add_argument('--parts', type=int, default=1)
    arguments = parser.parse_args()
    make_records(arguments.records, arguments.part, arguments.parts)
    if arguments.index:
        make_index(arguments.records, arguments.index)
