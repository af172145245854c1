"""Networks that the user's code builds: `--model_factory FILE.py:FUNCTION`.

The command line names the code; it never comes from a checkpoint. The code returns a module, and
the weights in the checkpoint are found by the names of the module's tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from igseg.errors import InputError, one_line
from igseg.network.checkpoint import ADAPTER, Checkpoint, adapters_text, is_weight
from igseg.network.identity import of_library
from igseg.network.kinds import place_and_name

PROBED_SIDES = (64, 224, 256)  # pixels: sides of inputs on which a network is tried
NAMED = 3  # tensors that a sentence names
# Names of parts that networks have for their training only.
TRAINING_ONLY = re.compile(
    r'^aux|_aux|criterion|loss|metric|classif|teacher|discriminator|projector|predictor|queue|'
    r'deep_?supervision|accuracy|^fc$|last_linear', re.IGNORECASE
)  # fmt: skip


@contextlib.contextmanager
def _explained_code(problem: str) -> Iterator[None]:
    """Turn all errors of the user's code into an InputError of one sentence, which begins with
    `problem`."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f'{problem}: {type(error).__name__}: {one_line(error)}') from None


def _file_of(name: str) -> Path:
    """The file of a loaded module; the current folder where it has no file."""
    return Path(getattr(sys.modules.get(name), '__file__', None) or '').resolve()


def _is_hidden(name: str, folder: Path) -> bool:
    """Whether a loaded module hides a module with the same name in a folder. Installed libraries do
    not count: they come first, as they did when the network was trained."""
    top = name.partition('.')[0]
    in_folder = (folder / f'{top}.py').is_file() or (folder / top / '__init__.py').is_file()
    return in_folder and not of_library(top) and folder not in _file_of(top).parents


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Inside, the modules of a folder can be imported, also modules with the name of a module of
    this project, or of a module beside another factory. Afterwards these names stand for the
    earlier modules again."""
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
            del sys.modules[name]  # else later imports would find the user's submodules
        sys.modules.update(hidden)


def _module_of_file(path: Path) -> object:
    path = path.resolve()
    name = f'{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}'  # unique
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # Python has a loader of .py files
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes and pickling look there
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_of_name(name: str) -> object:
    with _importable(Path.cwd().resolve()):
        return importlib.import_module(name)


def build_network(factory: str, options: Mapping[str, object]) -> torch.nn.Module:
    """The network that a factory returns. factory: FILE.py:FUNCTION or package.module:function,
    which names a function or a class. options: its keyword arguments. Raises InputError for all
    errors in it."""
    place, name = place_and_name(factory)
    with _explained_code(f'model factory {factory} cannot be imported'):
        module = _module_of_file(Path(place)) if place.endswith('.py') else _module_of_name(place)
    try:
        function: Any = reduce(getattr, name.split('.'), module)
    except AttributeError:
        raise InputError(f'model factory {factory}: there is no "{name}" in {place}') from None
    with _explained_code(f'model factory {factory} failed'):
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


def _names_text(names: list[str] | tuple[str, ...]) -> str:
    """The first of these names, as text."""
    return ', '.join(names[:NAMED]) + (', …' if len(names) > NAMED else '')


def _branch(names: Collection[str]) -> str:
    """What all names of a network's tensors begin with, up to where the network branches into its
    parts: empty, or the names of wrappers with a point behind."""
    outer = ''
    while True:
        following = {name[len(outer) :].partition('.')[0] for name in names}
        inner = next(iter(following), '')
        # Parts with numbers, as in a Sequential, are no wrappers, also if there is only one.
        if len(following) != 1 or inner != _stem(inner) or outer + inner in names:
            return outer
        outer += f'{inner}.'


def _stem(part: str) -> str:
    """The name of a part without its number: `conv3` and `3` are further parts of their kind."""
    return part.rstrip('0123456789')


def lacking(unused: Collection[str], names: Collection[str]) -> list[str]:
    """The tensors in a file that lie in parts which the network has, though the network lacks the
    tensors: it is another variant than the network in the file. Whole parts that the network lacks,
    and heads for training, do not count. names: of the network's tensors."""
    outer = _branch(names)
    parts = {name[len(outer) :].partition('.')[0] for name in names}
    numbered = {_stem(part) for part in parts if part != _stem(part)}
    wrong = []
    for name in unused:
        part = name[len(outer) :].partition('.')[0]
        inside = name.startswith(outer) and (
            part in parts or (part != _stem(part) and _stem(part) in numbered)
        )
        training = any(TRAINING_ONLY.search(word) for word in name.split('.')[:-1])
        wrong += [name] if ADAPTER.search(name) or (inside and not training) else []
    return wrong


def _check_variant(
    checkpoint: Checkpoint, names: Collection[str], path: Path, allow_unused: bool
) -> None:
    """Raise InputError where the file is of another variant of the network than the factory builds.
    names: of the network's tensors. allow_unused: whether the user allows that."""
    wrong = [] if allow_unused else lacking(checkpoint.unused, names)
    if not wrong:
        return
    count = f'{len(wrong)} tensor{"s" if len(wrong) > 1 else ""}'
    reason = adapters_text(wrong) or (
        f'the network lacks {count} of the file in parts that it has ({_names_text(wrong)}), so it '
        'is another variant than the network that was trained: let the factory build that variant'
    )
    raise InputError(
        f'{path} does not fit the network of the model factory: {reason} (see --model_option; '
        '--allow_unused explains the network as the factory builds it)'
    )


def load_weights(
    network: torch.nn.Module, checkpoint: Checkpoint, path: Path, allow_unused: bool = False
) -> list[str]:
    """Load the weights of a checkpoint, which was read for the names of this network, into the
    network. path: of the checkpoint. allow_unused: whether the file may hold weights that parts of
    the network lack. Returns notes. Raises InputError where the weights do not fit."""
    expected, stored = network.state_dict(), checkpoint.state
    missing = [n for n, value in expected.items() if n not in stored and is_weight(n, value)]
    reshaped = [n for n in expected if n in stored and expected[n].shape != stored[n].shape]
    if missing or reshaped:
        parts = [f'{len(missing)} tensors are missing ({_names_text(missing)})'] if missing else []
        if reshaped:
            name = reshaped[0]
            parts.append(
                f'{len(reshaped)} have another shape ({name}: {tuple(stored[name].shape)}, the '
                f'network has {tuple(expected[name].shape)})'
            )
        reason = adapters_text(checkpoint.unused) or f'{" and ".join(parts)} (check --model_option)'
        raise InputError(f'{path} does not fit the network of the model factory: {reason}')
    _check_variant(checkpoint, expected.keys(), path, allow_unused)
    network.load_state_dict(stored, strict=False)
    if not checkpoint.unused:
        return []
    count, names = len(checkpoint.unused), _names_text(checkpoint.unused)
    verb = 's are' if count > 1 else ' is'
    return [f'{count} tensor{verb} left over beside the weights, not used ({names})']


def runs_at(network: torch.nn.Module, channels: int, size: tuple[int, int]) -> bool:
    """Whether a network runs on an input of (height, width). It is run once to see."""
    device = next((p.device for p in network.parameters()), torch.device('cpu'))
    with contextlib.suppress(Exception), torch.no_grad():
        network(torch.zeros(1, channels, *size, device=device))
        return True
    return False


def tried_channels(network: torch.nn.Module) -> int | None:
    """The number of channels with which a network runs: the first that works of the input channels
    of its first convolution, 3, 1, and the input channels of its other convolutions; None where
    none works."""
    convolutions = [m.in_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    for channels in dict.fromkeys((*convolutions[:1], 3, 1, *convolutions)):
        if any(runs_at(network, channels, (side, side)) for side in PROBED_SIDES):
            return channels
    return None
