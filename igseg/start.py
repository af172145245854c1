"""Where the programs start. Before torch is imported, they answer all that needs no torch.

These are missing packages, `--help` and errors of usage. Answers to them take a moment, and the
import of torch takes seconds. So this module itself imports next to nothing.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType

from igseg.program import MAIN, RUNNER, check_packages, print_any_name


def answer_first(argv: Sequence[str] | None = None) -> None:
    """End the program if a package is missing, or if argv asks for help or holds an error of usage.
    Otherwise return; from then on Ctrl-C ends the program without a traceback, until `run` Python
    does not look for garbage, which imports do not leave, and no compiler is imported unasked."""
    print_any_name()
    check_packages()
    signal.signal(signal.SIGINT, _interrupted)
    command_line = import_module('igseg.command_line')  # imports numpy, which is installed
    command_line.answer(argv)
    gc.disable()
    _leave_out_compiler()


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C while libraries are imported. Later `StopSignals` takes its place."""
    print('interrupted: nothing was started', file=sys.stderr, flush=True)
    os._exit(130)


# --------------------------------------------------------------------------- the compiler

COMPILER = ('torch._dynamo', 'torch._dynamo.utils')


class _Compiler(ModuleType):
    """Stands for PyTorch's compiler, or its module of helpers, until more of it is used than this.

    The compiler takes a second to import. This program compiles nothing, but timm, torchvision and
    PyTorch itself ask for these functions."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # for those who ask whether there is a compiler

    @staticmethod
    def disable(fn: object = None, *_: object, **__: object) -> object:
        """Mark a function that must not be compiled: nothing is. Without a function, as a decorator
        with arguments, it gives what marks one."""
        return (lambda function: function) if fn is None else fn

    @staticmethod
    def is_compile_supported(device_type: str) -> object:
        """As the function of the compiler, which is imported when this is called."""
        return _real(COMPILER[1]).is_compile_supported(device_type)

    def __getattr__(self, name: str) -> object:
        # A search through all modules asks for such names; an import of a part, for the path.
        if name.startswith('__') and (self.__name__, name) != (COMPILER[0], '__path__'):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    """A module of the compiler itself, which takes the place of what stands for it."""
    for stand_in in COMPILER:
        if isinstance(sys.modules.get(stand_in), _Compiler):
            del sys.modules[stand_in]
    return import_module(name)


class _Again(Loader):
    """Gives a module of the compiler that is there already. Python, which asked what stands for the
    compiler where to look for it, would load it a second time."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """This object as the loader of a module that has been loaded meanwhile."""
        known = name.startswith(f'{COMPILER[0]}.') and name in sys.modules
        return ModuleSpec(name, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, with its own specification kept for `exec_module`."""
        module = sys.modules[spec.name]
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing more is to be done."""
        assert module.__spec__ is not None  # it is that of `find_spec`
        module.__spec__ = module.__spec__.loader_state


def _leave_out_compiler() -> None:
    """Import PyTorch's compiler only where it is used."""
    if 'torch' not in sys.modules:
        sys.modules.update((name, _Compiler(name)) for name in COMPILER)
        sys.meta_path.insert(0, _Again())


def run(main: Callable[[], int]) -> int:
    """The exit status of a program whose libraries are imported. Python looks for garbage only
    among what the program makes, and at its end among nothing: this saves more than a second."""
    gc.freeze()
    gc.enable()
    try:
        return main()
    finally:
        gc.freeze()


# The installed scripts. They import the user's module late, and by its name: it stands above the
# package, whose modules may not import it.


def integrated_gradients() -> int:
    """The script `integrated-gradients`."""
    answer_first()
    return _run(MAIN)


def run_integrated_gradients() -> int:
    """The script `run-integrated-gradients`."""
    check_packages()
    _leave_out_compiler()
    return _run(RUNNER)


def _run(script: str) -> int:
    return run(import_module(script.replace('-', '_')).main)
