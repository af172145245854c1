r"""Makes `encoder_index.json.gz`, by which the encoder of a checkpoint is recognised.

    python benchmarks/make_encoder_index.py --records records.jsonl \
        --index igseg/network/encoder_index.json.gz

Every encoder that segmentation-models-pytorch can build, its own and timm's, is built without
weights for the names and shapes of its tensors; that takes about half an hour. What was recorded
already is not built again. Then encoders of the same names and shapes are given the same weights:
those that compute the same from the same noise are one, the others must be told apart by the user.
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

LARGEST = 150_000_000  # numbers in an encoder that is run to compare it
ORDER = ('3', '5', '4', VIT)  # of depths: what is found at one often decides the next
AGREE = 1e-9  # relative; double precision


def build(name: str, depth: int | str, in_channels: int = 3, **options: object):
    """An encoder without weights, on torch's device of the moment."""
    if depth == VIT:
        return TimmViTEncoder(name[3:], pretrained=False, in_channels=in_channels, **options)
    return smp.encoders.get_encoder(name, in_channels=in_channels, depth=depth, weights=None)


def records_of(name: str) -> Iterator[dict[str, object]]:
    """What is recorded of an encoder: one entry for each depth that it can be built for."""
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
    """The entry of an encoder of DPT. What else varies is the classifier and the image size."""
    encoder = skeleton(lambda: build(name, VIT))
    if encoder is None or len(set(encoder.output_strides)) > 1:
        return
    side = int(encoder.input_size[-1]) + 2 * int(encoder.output_stride)
    loose = _differing(encoder, skeleton(lambda: build(name, VIT, 4, num_classes=7)))
    loose |= _differing(encoder, skeleton(lambda: build(name, VIT, img_size=side)))
    if loose:
        yield _record(name, VIT, encoder, loose)


def _differing(one: torch.nn.Module, other: torch.nn.Module | None) -> set[str]:
    """The names of tensors that are of another shape in, or are in only one of two networks."""
    if other is None:
        return set()
    shapes = [tensor_shapes(network.state_dict()) for network in (one, other)]
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
    """Record all encoders that are not recorded yet, or one part of them."""
    known = {line['name'] for line in map(json.loads, path.open())} if path.exists() else set()
    names = [*smp.encoders.get_encoder_names(), *(f'tu-{name}' for name in timm.list_models())]
    with path.open('a') as file:
        for name in tqdm(names[part::parts]):
            if name in known:
                continue
            found = list(records_of(name)) or [{'name': name, 'depth': None}]
            file.writelines(json.dumps(record) + '\n' for record in found)
            file.flush()


def _digest(encoder: torch.nn.Module) -> str:
    """The same for encoders of the same structure, whatever their names."""
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
    """The names of encoders of the same tensors, those that compute the same together; smp's own
    before timm's, the plainest first."""
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
    """Whether encoders compute the same from the same weights; remembers what it found."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], dict[str, bool | None]] = defaultdict(dict)

    def same(self, one: dict, other: dict) -> bool:
        """Whether two encoders of the same tensors compute the same."""
        depth, known = str(one['depth']), self.found[one['name'], other['name']]
        if known.get('3') is False and depth in '45':  # the first stages differ already
            known[depth] = False
        elif known.get('5') is True and depth == '4':
            known[depth] = True
        else:
            known[depth] = _compute_the_same(one, other)
        return known[depth] is True


def _compute_the_same(one: dict, other: dict) -> bool | None:
    """Whether two encoders give the same features of noise, with weights that follow from their
    names; None where they are too large or cannot be run."""
    size = _size(one['name'], one['depth'])
    options: dict[str, object] = {}
    if one['depth'] == VIT:  # made for the same image size they may even be the same structure
        options = {'img_size': size[-1], 'num_classes': 7}
        outlines = [skeleton(lambda record=r: _built(record, **options)) for r in (one, other)]
        if None in outlines:
            options = {}
        elif _digest(outlines[0]) == _digest(outlines[1]):
            return True
    if max(one['numbers'], other['numbers']) > LARGEST:
        return None
    features = [_features(record, size, options) for record in (one, other)]
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
    """What an encoder gives for noise; None where it cannot be run at that size."""
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
    """Leaves weights as memory had them: they are all set afterwards."""

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
    """Values that hold activations near 1. Variances are small, so that their epsilon is seen."""
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
    parser.add_argument('--records', type=Path, required=True, help='what was built; added to')
    parser.add_argument('--index', type=Path, help='written from the records')
    parser.add_argument('--part', type=int, default=0, help='only this one of --parts')
    parser.add_argument('--parts', type=int, default=1)
    arguments = parser.parse_args()
    make_records(arguments.records, arguments.part, arguments.parts)
    if arguments.index:
        make_index(arguments.records, arguments.index)
