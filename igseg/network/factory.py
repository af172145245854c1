"""Networks that the user's own code builds: `--model_factory FILE.py:FUNCTION`.

The code is named on the command line and never taken from a checkpoint. It gives a module; the
weights are found in the checkpoint by the module's own names.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from igseg.errors import InputError, one_line
from igseg.network.checkpoint import Checkpoint
from igseg.network.identity import of_library
from igseg.network.kinds import place_and_name

PROBED_SIDES = (64, 224, 256)  # pixels, of inputs on which a network is tried
NAMED = 3  # tensors in a sentence


@contextlib.contextmanager
def _own_code(said: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one sentence."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f'{said}: {type(error).__name__}: {one_line(error)}') from None


def _file_of(name: str) -> Path:
    """Where a loaded module comes from; the empty path where it has no file."""
    return Path(getattr(sys.modules.get(name), '__file__', None) or '').resolve()


def _is_hidden(name: str, folder: Path) -> bool:
    """Whether a loaded module stands in the way of one of the same name in a folder. Libraries do
    not: what is installed goes before, as it did when the network was trained."""
    top = name.partition('.')[0]
    there = (folder / f'{top}.py').is_file() or (folder / top / '__init__.py').is_file()
    return there and not of_library(top) and folder not in _file_of(top).parents


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The modules of a folder can be imported inside, also those that are named like one of ours
    or like one beside another factory, which stand under their names again afterwards."""
    hidden = {name: module for name, module in sys.modules.items() if _is_hidden(name, folder)}
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        tops = {name.partition('.')[0] for name in hidden}
        for name in [n for n in sys.modules if n.partition('.')[0] in tops]:
            del sys.modules[name]  # or a part of ours that is imported later would be theirs
        sys.modules.update(hidden)


def _module_of_file(path: Path) -> object:
    path = path.resolve()
    own = f'{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}'
    spec = importlib.util.spec_from_file_location(own, path)
    assert spec is not None and spec.loader is not None  # there is a loader of .py files
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # data classes and pickling look there
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[own]
        raise
    return module


def _module_of_name(name: str) -> object:
    with _importable(Path.cwd().resolve()):
        return importlib.import_module(name)


def build_network(factory: str, options: Mapping[str, object]) -> torch.nn.Module:
    """The module that a factory gives: FILE.py:FUNCTION or package.module:function, a function or a
    class. options: its keyword arguments. Raises InputError for whatever goes wrong in it."""
    place, name = place_and_name(factory)
    with _own_code(f'model factory {factory} cannot be imported'):
        module = _module_of_file(Path(place)) if place.endswith('.py') else _module_of_name(place)
    try:
        function: Any = reduce(getattr, name.split('.'), module)
    except AttributeError:
        raise InputError(f'model factory {factory}: there is no "{name}" in {place}') from None
    with _own_code(f'model factory {factory} failed'):
        network = function(**options)
    if not isinstance(network, torch.nn.Module):
        raise InputError(
            f'model factory {factory} gives {type(network).__name__}, not a torch.nn.Module '
            '(return the network)'
        )
    if any(torch.nn.parameter.is_lazy(weight) for weight in network.parameters()):
        raise InputError(
            f'model factory {factory} gives a network with lazy modules, which have no weights yet '
            '(run it once on an input before returning it)'
        )
    return network.float().eval()


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ', '.join(names[:NAMED]) + (', …' if len(names) > NAMED else '')


def load_weights(network: torch.nn.Module, checkpoint: Checkpoint, path: Path) -> list[str]:
    """Give a network the weights of a checkpoint that was read for its names. Returns what was
    decided, in sentences. Raises InputError where they do not fit."""
    own, found = network.state_dict(), checkpoint.state
    missing = [n for n in own if n not in found and not n.endswith('num_batches_tracked')]
    other = [n for n in own if n in found and own[n].shape != found[n].shape]
    if missing or other:
        parts = [f'{len(missing)} tensors are missing ({_some(missing)})'] if missing else []
        if other:
            name = other[0]
            parts.append(
                f'{len(other)} have another shape ({name}: {tuple(found[name].shape)}, the network '
                f'has {tuple(own[name].shape)})'
            )
        raise InputError(
            f'{path} does not fit the network of the model factory: {" and ".join(parts)} (check '
            '--model_option)'
        )
    network.load_state_dict(found, strict=False)
    if not checkpoint.unused:
        return []
    count = len(checkpoint.unused)
    return [f'{count} tensors beside the weights are not used ({_some(checkpoint.unused)})']


def runs_at(network: torch.nn.Module, channels: int, size: tuple[int, int]) -> bool:
    """Whether a network takes an input of (height, width); tried once."""
    device = next((p.device for p in network.parameters()), torch.device('cpu'))
    with contextlib.suppress(Exception), torch.no_grad():
        network(torch.zeros(1, channels, *size, device=device))
        return True
    return False


def tried_channels(network: torch.nn.Module) -> int | None:
    """How many channels a network takes: the first number of its convolutions' input channels, or
    3 or 1, with which it runs; None where it runs with none of them."""
    convolutions = [m.in_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    for channels in dict.fromkeys((*convolutions[:1], 3, 1, *convolutions)):
        if any(runs_at(network, channels, (side, side)) for side in PROBED_SIDES):
            return channels
    return None
