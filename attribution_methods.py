"""The methods of attribution: Integrated Gradients, its family, and the field's yardsticks.

A method is one class, its options the fields of the class, and one row of METHODS. It declares
what it promises (see `Declared`: completeness, a quadrature, a baseline, …), which is all that
statistics, figures, checks and resume ask of it, and turns `Work` (an image, its targets, its
baselines, an engine) into what it found of each target. Most only name paths: the integral along
them, its error, precision, batches and memory are `Work.walk`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import ClassVar

import numpy as np
import torch

from attribution_path import AttributionPath, StraightPath, UnitVelocity
from errors import InputError
from explanation import NO_BASELINE, Declared
from path_integral import AnyRule, Rule
from path_walk import NOTHING_SEEN, Found, PlainSettings, Work, plain_work
from setting_table import Setting

AT_IMAGE = Rule('at the image', np.ones(1), np.ones(1), degree=0)  # no integral: one gradient


def option(default: object, meaning: str, **known: object):
    """A field of a method that is one of its options; see `Setting`."""
    return field(default=default, metadata={'setting': Setting('option', meaning, **known)})


# --------------------------------------------------------------------------- what a method is


@dataclass(frozen=True)
class Method:
    """A method of attribution; the docstring of each is its line in --help."""

    source: ClassVar[str]  # paper, equation
    declared: ClassVar[Declared]
    layer_of: ClassVar[bool] = False  # whether a layer is named with it, NAME:LAYER

    @property
    def declares(self) -> Declared:
        """What it says of itself, with its options as they are."""
        return self.declared

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.declares.name

    @property
    def option_names(self) -> tuple[str, ...]:
        """Its options."""
        return tuple(options_of(type(self)))

    def rule(self, seed: int) -> AnyRule | None:
        """By which it integrates, if not by the rule of the settings."""
        return None

    def rule_name(self, of_settings: str) -> str:
        """The name of the rule by which it integrates."""
        own = self.rule(0)
        return of_settings if own is None else own.name

    def baseline(self, work: Work) -> tuple[str, torch.Tensor] | None:
        """Name and image (1, C, H, W) of a baseline of its own; None: it has none."""
        return None

    def steps_in_all(self, work: Work) -> int | None:
        """How many steps it will take; None: not known beforehand."""
        return None

    def explain(self, work: Work) -> list[Found]:
        """What it finds of each target."""
        raise NotImplementedError

    def map_for_check(
        self,
        seed: int,
        references: torch.Tensor | None,
        network: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        baseline: torch.Tensor,
        target: Callable[[torch.Tensor], torch.Tensor],
        steps: int,
    ) -> np.ndarray:
        """The map of one target, (C or 1, H, W), of whatever network, image and baseline, in a few
        midpoint steps; the last five arguments are those of `plain_map`. network: may have the
        module that it is, as `module`."""
        module = getattr(network, 'module', network)
        settings = PlainSettings(steps, seed)
        work = plain_work(network, module, x, baseline, target, settings, references)
        return self.explain(work)[0].attributions.cpu().numpy()


@dataclass(frozen=True)
class PathMethod(Method):
    """A method that integrates along paths."""

    def paths(self, work: Work) -> Iterator[AttributionPath]:
        """The paths of which the mean is taken."""
        raise NotImplementedError

    def explain(self, work: Work) -> list[Found]:
        """See `Method`."""
        complete = self.declares.completeness is not None
        return work.walk(self.paths(work), self.rule(work.settings.seed), complete).found()


@dataclass(frozen=True)
class Multiplied(PathMethod):
    """A method whose gradients are multiplied by image minus baseline, unless that is not wanted:
    then they are their mean, and sum to nothing in particular."""

    multiply: bool = True  # set by --no_multiply

    @property
    def declares(self) -> Declared:
        """See `Method`."""
        return self.declared if self.multiply else replace(self.declared, completeness=None)

    def steps_in_all(self, work: Work) -> int | None:
        """See `Method`."""
        if work.settings.tolerance is not None:
            return None
        return work.settings.steps * len(work.baselines) * self._copies

    @property
    def _copies(self) -> int:
        """Of the image that are explained."""
        return 1

    def _along(self, path: AttributionPath) -> AttributionPath:
        return path if self.multiply else UnitVelocity(path)


# --------------------------------------------------------------------------- integrals along paths


@dataclass(frozen=True)
class IntegratedGradientsMethod(Multiplied):
    """gradients along the straight line from the baseline, times image minus baseline"""

    source = 'Sundararajan, Taly, Yan 2017, eq. 1'
    declared = Declared('ig')

    def paths(self, work: Work) -> Iterator[AttributionPath]:
        """One from each baseline."""
        for baseline in work.baselines:
            yield self._along(StraightPath(baseline, work.x))


@dataclass(frozen=True)
class SmoothMethod(Multiplied):
    """ig of noisy copies of the image: their mean, mean square or variance"""

    source = 'Smilkov et al. 2017, section 3, on ig'
    declared = Declared('smooth')

    samples: int = option(8, 'noisy copies, num_steps each', least=1, most=1000)
    noise: float = option(0.1, "standard deviation, by the image's range", above=0)
    kind: str = option('mean', 'what is taken of them', choices=('mean', 'square', 'variance'))

    @property
    def declares(self) -> Declared:
        """Only the mean sums to something: to the mean change of the score."""
        if self.kind == 'mean':
            return super().declares
        return replace(self.declared, completeness=None, signed=False)

    @property
    def _copies(self) -> int:
        return self.samples

    def paths(self, work: Work) -> Iterator[AttributionPath]:
        """From each baseline to each copy."""
        spread = self.noise * float(work.x.max() - work.x.min())
        generator = torch.Generator().manual_seed(work.settings.seed)
        for _ in range(self.samples):
            noise = torch.randn(work.x.shape, generator=generator).to(work.x)
            for baseline in work.baselines:
                yield self._along(StraightPath(baseline, work.x + spread * noise))

    def explain(self, work: Work) -> list[Found]:
        """See `Method`."""
        if self.kind == 'mean':
            return super().explain(work)
        walk = work.walk(self.paths(work), complete=False, second=True)
        found = []
        for number, mean in enumerate(walk.means):
            moment, error = mean.second_moment(about_mean=self.kind == 'variance')
            summed = None if error is None else error.sum(dim=1)  # at most
            found.append(walk.of(number, moment[0], error, summed))
        return found


# --------------------------------------------------------------------------- yardsticks


@dataclass(frozen=True)
class GradientMethod(PathMethod):
    """the gradient at the image"""

    source = 'Simonyan, Vedaldi, Zisserman 2013, section 3'
    declared = Declared('gradient', None, quadrature=False, baseline=NO_BASELINE)

    def rule(self, seed: int) -> AnyRule:
        """A single gradient."""
        return AT_IMAGE

    def paths(self, work: Work) -> Iterator[AttributionPath]:
        """A path that goes nowhere."""
        yield UnitVelocity(StraightPath(work.x, work.x))

    def explain(self, work: Work) -> list[Found]:
        """See `Method`."""
        nowhere = {'trend': NOTHING_SEEN, 'start_score': None, 'end_score': None}
        return [replace(one, **nowhere) for one in super().explain(work)]


@dataclass(frozen=True)
class InputTimesGradient(PathMethod):
    """the gradient at the image, times image minus baseline: ig as if all were linear"""

    source = 'Shrikumar et al. 2016, section 2, from a baseline'
    declared = Declared('input_x_gradient', None, quadrature=False)

    def rule(self, seed: int) -> AnyRule:
        """A single gradient."""
        return AT_IMAGE

    def paths(self, work: Work) -> Iterator[AttributionPath]:
        """One from each baseline, asked at its end alone."""
        for baseline in work.baselines:
            yield StraightPath(baseline, work.x)


# --------------------------------------------------------------------------- the table

METHODS: dict[str, type[Method]] = {
    'ig': IntegratedGradientsMethod,
    'smooth': SmoothMethod,
    'gradient': GradientMethod,
    'input_x_gradient': InputTimesGradient,
}


def form_of(name: str) -> str:
    """How a method is written on the command line."""
    return f'{name}:LAYER' if METHODS[name].layer_of else name


def options_of(method: type[Method]) -> dict[str, Setting]:
    """What is known of each option of a method, by its name."""
    return {f.name: f.metadata['setting'] for f in fields(method) if f.metadata}


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
