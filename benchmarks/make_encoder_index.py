"""Makes `encoder_index.json.gz`, by which the encoder of a checkpoint is recognised.

    python benchmarks/make_encoder_index.py --records records.jsonl --index encoder_index.json.gz

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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from network_description import structure_digest
from network_guess import DEPTHS, VIT, index_key, skeleton, tensor_shapes

LARGEST = 150_000_000  # numbers in an encoder that is run to compare it
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
    network = encoder.model if isinstance(encoder, (TimmUniversalEncoder, TimmViTEncoder)) else (
        encoder)  # fmt: skip
    return {
        'name': name,
        'depth': depth,
        'loose': sorted(loose),
        'key': index_key(shapes, loose),
        'numbers': sum(p.numel() for p in encoder.parameters()),
        'digest': structure_digest(network)[:16],
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


# --------------------------------------------------------------------------- which are the same


def make_index(records: Path, path: Path) -> None:
    """Write the index from the records."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for record in map(json.loads, records.open()):
        if record['depth'] is not None:
            groups[record['key'], str(record['depth'])].append(record)
    loose: list[list[str]] = []
    entries: dict[str, dict[str, list]] = defaultdict(dict)
    for (key, depth), members in tqdm(groups.items()):
        entries[key][depth] = _kinds(members)
        loose += [names for m in members if (names := m['loose']) not in loose]
    versions = {'smp': smp.__version__, 'timm': timm.__version__}
    content = {'versions': versions, 'loose': loose, 'encoders': entries}
    text = json.dumps(content, sort_keys=True, separators=(',', ':')).encode()
    path.write_bytes(gzip.compress(text, mtime=0))


def _kinds(members: list[dict]) -> list[list[str]]:
    """The names of encoders of the same tensors, those that compute the same together; smp's own
    before timm's, the plainest first."""
    kinds: dict[str, list[dict]] = defaultdict(list)
    for record in members:
        kinds[record['digest']].append(record)
    found = list(kinds.values())
    if len(found) > 1:
        found = _merged(found)
    named = [sorted((r['name'] for r in kind), key=_plainness) for kind in found]
    return sorted(named, key=lambda names: _plainness(names[0]))


def _plainness(name: str) -> tuple:
    return name.startswith('tu-'), len(name), name


def _merged(kinds: list[list[dict]]) -> list[list[dict]]:
    """Kinds of unequal structure that compute the same are one."""
    merged: list[tuple[list[torch.Tensor] | None, list[dict]]] = []
    for kind in kinds:
        features = _features(kind[0])
        for other, members in merged:
            if features and other and _agree(features, other):
                members += kind
                break
        else:
            merged.append((features, list(kind)))
    return [members for _, members in merged]


def _agree(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and float((a - b).norm()) <= AGREE * float(a.norm())
        for a, b in zip(one, other, strict=True)
    )


def _features(record: dict) -> list[torch.Tensor] | None:
    """What an encoder with weights that follow from its names gives for noise; None where it
    cannot be run."""
    if record['numbers'] > LARGEST:
        return None
    try:
        encoder = build(record['name'], VIT if record['depth'] == VIT else int(record['depth']))
        encoder = encoder.double().eval()
        for name, tensor in encoder.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(_weights(name, tensor.shape))
        size = getattr(encoder, 'input_size', None) or _fixed_size(encoder) or (64, 64)
        noise = torch.rand(1, 3, *size[-2:], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = encoder(noise.double())
    except Exception as error:
        print(record['name'], record['depth'], repr(error)[:100], file=sys.stderr)
        return None
    features = features[0] if record['depth'] == VIT else features
    finite = [f for f in features if f.numel()]
    return finite if all(f.isfinite().all() for f in finite) else None


def _fixed_size(encoder: torch.nn.Module) -> tuple[int, int] | None:
    """The size that an encoder's attention is made for, where it has one."""
    config = timm.get_pretrained_cfg(getattr(encoder, 'name', ''), allow_unregistered=True)
    return config.input_size if config is not None and config.fixed_input_size else None


def _weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Values that hold activations near 1. Variances are small, so that their epsilon is seen."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'big')
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if name.endswith('running_var'):
        return 1e-3 * (1 + noise.abs())
    if name.endswith('running_mean') or name.endswith('bias'):
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
