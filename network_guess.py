from __future__ import annotations
import contextlib, hashlib
from collections.abc import Callable, Collection, Mapping
import torch
DEPTHS = (3, 4, 5)


def skeleton(build: Callable[[], torch.nn.Module]) -> torch.nn.Module | None:
    for device in ('meta', 'cpu'):
        try:
            with torch.device(device):
                return build()
        except Exception as error:  # what encoders raise at odd options is theirs
            if 'meta' not in str(error):
                break
    return None


def tensor_shapes(state, prefix=''):
    return {
        name[len(prefix) :]: tuple(value.shape)
        for name, value in state.items()
        if name.startswith(prefix) and not name.endswith('num_batches_tracked')
    }


def index_key(shapes: Mapping[str, tuple[int, ...]], loose: Collection[str]) -> str:
    lines = (f'{name} {shape}' for name, shape in sorted(shapes.items()) if name not in loose)
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:12]
