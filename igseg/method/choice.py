"""The table of methods, and the methods and options that users name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields

from igseg.errors import InputError
from igseg.method.method import Method, options_of
from igseg.method.methods import (
    BlurMethod,
    ExpectedMethod,
    GradCamMethod,
    GradientMethod,
    GuidedMethod,
    IdgiMethod,
    InputTimesGradient,
    IntegratedGradientsMethod,
    LayerMethod,
    OcclusionMethod,
    SmoothMethod,
)
from igseg.setting import Setting

# --------------------------------------------------------------------------- the table

METHODS: dict[str, type[Method]] = {
    'ig': IntegratedGradientsMethod,
    'expected': ExpectedMethod,
    'smooth': SmoothMethod,
    'blur': BlurMethod,
    'guided': GuidedMethod,
    'idgi': IdgiMethod,
    'layer': LayerMethod,
    'gradient': GradientMethod,
    'input_x_gradient': InputTimesGradient,
    'gradcam': GradCamMethod,
    'occlusion': OcclusionMethod,
}


def form_of(name: str) -> str:
    """How a method is written on the command line."""
    return f'{name}:NAME' if METHODS[name].layer_of else name


def build_methods(
    wanted: Sequence[str], given: Sequence[str], multiply: bool = True
) -> tuple[Method, ...]:
    """The methods of these names, with options that were given as NAME=VALUE. An option goes to
    every method that has it. Raises InputError."""
    pairs = [text.partition('=') for text in given]
    kinds = [_kind_of(name) for name in wanted]
    known = set().union(*map(options_of, kinds))
    for name, equals, _ in pairs:
        if name not in known or not equals:
            said = f'unknown option "{name}"' if equals else f'option "{name}" lacks its =VALUE'
            raise InputError(f'{said} ({"; ".join(map(options_text, kinds))})')
    return tuple(_build(name, pairs, multiply) for name in wanted)


def _kind_of(wanted: str) -> type[Method]:
    """The class of a method. Raises InputError for an unknown one, or another form of it."""
    name, colon, layer = wanted.partition(':')
    if name not in METHODS:
        forms = ', '.join(map(form_of, METHODS))
        raise InputError(f'unknown method "{wanted}" (choose from {forms})')
    kind = METHODS[name]
    if kind.layer_of != bool(layer) or bool(colon) != bool(layer):
        raise InputError(f'method "{wanted}" is not of the form {form_of(name)}')
    return kind


def _build(wanted: str, pairs: Sequence[tuple[str, str, str]], multiply: bool) -> Method:
    kind, (name, _, layer) = _kind_of(wanted), wanted.partition(':')
    own = {} if not layer else {'layer': layer}
    if not multiply:
        if 'multiply' not in {f.name for f in fields(kind)}:
            can = [n for n, k in METHODS.items() if 'multiply' in {f.name for f in fields(k)}]
            raise InputError(f'--no_multiply goes with {", ".join(can)}, not with {name}')
        own['multiply'] = False
    for option_name, _, text in pairs:
        if option_name in options_of(kind):
            own[option_name] = _value_of(kind, option_name, text)
    return kind(**own)


def _value_of(kind: type[Method], name: str, text: str) -> object:
    """An option's value from its text. Raises InputError."""
    (one,) = (f for f in fields(kind) if f.name == name)
    readers = {'int': int, 'float': float}
    try:
        value = readers.get(one.type.partition(' ')[0], str)(text)
        return options_of(kind)[name].checked(name, value)
    except ValueError as error:  # an InputError is one
        reason = str(error) if isinstance(error, InputError) else f'{name} is no number: "{text}"'
        raise InputError(f'{reason} ({options_text(kind)})') from None


def options_text(kind: type[Method]) -> str:
    """The options of a method with their defaults, in words."""
    (name,) = (key for key, value in METHODS.items() if value is kind)
    defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    said = ', '.join(f'{key}={default_text(known, defaults[key])}'
                     for key, known in options_of(kind).items())  # fmt: skip
    return f'{name} has {said or "no options"}'


def default_text(known: Setting, default: object) -> str:
    """The default of an option."""
    return known.default_text if default is None else str(default)


def option_texts(given: object) -> tuple[str, ...]:
    """Options as NAME=VALUE, from such texts or from a dictionary. Raises InputError."""
    if isinstance(given, dict):
        given = [f'{name}={value}' for name, value in given.items()]
    if isinstance(given, str):
        given = given.split()
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, str) for one in given):
        raise InputError(f'method_option must be NAME=VALUE, or several, not {given!r}')
    return tuple(given)


def methods_text() -> str:
    """All methods, each with its line, for --help."""
    return '; '.join(f'{form_of(name)}: {kind.__doc__}' for name, kind in METHODS.items())
