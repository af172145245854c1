"""The tables of targets, baselines and methods that users may choose from, as plain data.

A row says how users write the target, baseline or method, what it means, which options it has,
and, as text, which function or class makes it. So `--help` and the checks of settings need neither
torch nor a network. A new target, baseline or method is a row here, and the function or class that
the row names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igseg.errors import InputError, check_choice
from igseg.explanation import (
    BY_CONSTRUCTION,
    IN_EXPECTATION,
    METHOD_BASELINE,
    NO_BASELINE,
    Declared,
)
from igseg.network.kinds import Meaning
from igseg.setting import Setting, resolved

if TYPE_CHECKING:
    import numpy as np
    import torch

Factory = str | Callable[..., Any]  # 'package.module:name', or the function or class itself

# --------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class TargetKind:
    """A row of the table of targets: one target, or a name that stands for several."""

    form: str  # how the user writes it
    meaning: str  # in --help
    # (TargetContext, the text behind the colon) -> Target. For a name that stands for several
    # targets: (TargetContext) -> their names.
    made_by: Factory
    argument: str = ''  # a regular expression for the text behind the colon
    first: str = ''  # for a name that stands for several: the target that every image has

    @property
    def several(self) -> bool:
        """Whether the name stands for several targets."""
        return bool(self.first)


TARGETS: dict[str, TargetKind] = {
    'predicted': TargetKind(
        'predicted',
        'the predicted mask: pixels above the threshold (several classes: not background)',
        'igseg.method.targets:predicted_target'),
    'object': TargetKind(
        'object:K', 'the K-th largest connected part of the predicted mask of a class, from 1',
        'igseg.method.targets:object_target', argument=r'0*[1-9]\d*'),
    'each-object': TargetKind(
        'each-object', 'every connected part of the predicted mask: object:1, object:2, …',
        'igseg.method.targets:each_object', first='object:1'),
    'truth': TargetKind('truth', 'the ground-truth mask', 'igseg.method.targets:truth_target'),
    'false-positive': TargetKind(
        'false-positive', 'predicted, but not so in the ground truth: why did it see this?',
        'igseg.method.targets:false_positive_target'),
    'false-negative': TargetKind(
        'false-negative', 'in the ground truth, but not so predicted: why did it miss this?',
        'igseg.method.targets:false_negative_target'),
    'image': TargetKind(
        'image', 'every pixel (independent labels: of every label)',
        'igseg.method.targets:image_target'),
    'pixel': TargetKind(
        'pixel:X,Y', 'one output pixel, X to the right and Y down from 0,0 in the original image',
        'igseg.method.targets:pixel_target', argument=r'-?\d+,-?\d+'),
    'class': TargetKind(
        'class:K', 'pixels of class K, on the logit of K (models with several classes)',
        'igseg.method.targets:class_target', argument=r'\d+'),
}  # fmt: skip


def kind_of(spec: str) -> TargetKind:
    """The row of TARGETS of a target as the user wrote it. Raises InputError."""
    kind, _, argument = spec.partition(':')
    check_choice('target', kind, TARGETS)
    if (':' in TARGETS[kind].form) != bool(argument):
        raise InputError(f'target "{spec}" is not of the form {TARGETS[kind].form}')
    return TARGETS[kind]


def check_form(spec: str) -> None:
    """Raise InputError for a target that no image can have, without computing anything."""
    kind, argument = kind_of(spec), spec.partition(':')[2]
    if argument and not re.fullmatch(kind.argument, argument):
        raise InputError(f'target "{spec}" is not of the form {kind.form} ({kind.meaning})')


# --------------------------------------------------------------------------- baselines


@dataclass(frozen=True)
class BaselineKind:
    """A row of the table of baselines."""

    meaning: str  # in --help
    made_by: Factory  # (pixels (H, W, C) float32 0-255, generator) -> the same shape and range
    drawn: bool = False  # whether it is random; the attributions are averaged over several draws

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The baseline of an image, (H, W, C) float32, 0-255."""
        baseline: np.ndarray = resolved(self.made_by)(pixels, rng)
        return baseline


BASELINES: dict[str, BaselineKind] = {
    'zero': BaselineKind(
        'a black image (after normalisation that is not a zero tensor)',
        'igseg.method.baselines:zero_baseline'),
    'random': BaselineKind(
        'uniform noise, seeded; the attributions are averaged over several draws',
        'igseg.method.baselines:random_baseline', drawn=True),
    'blur': BaselineKind(
        'the image under a Gaussian blur of 5 % of its longer side',
        'igseg.method.baselines:blur_baseline'),
    'mean': BaselineKind(
        "the image's mean colour everywhere", 'igseg.method.baselines:mean_baseline'),
    'white': BaselineKind('a white image', 'igseg.method.baselines:white_baseline'),
}  # fmt: skip

AUTO = 'auto'  # the baseline is chosen from CANDIDATES, for each image
CANDIDATES = ('mean', 'blur', 'zero', 'white')


def check_baseline(kind: str) -> None:
    """Raise InputError for a name that is no key of BASELINES, not `auto` and no file."""
    kinds = (*BASELINES, AUTO)
    if not isinstance(kind, str) or (kind not in kinds and not Path(kind).is_file()):
        raise InputError(
            f'unknown baseline "{kind}" (choose from {", ".join(kinds)}, or give the path '
            'of an image file)'
        )


# --------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Option:
    """An option of a method."""

    default: float | str | None
    reads: type  # the type to which its text is converted
    setting: Setting


def option(
    default: float | str | None, meaning: str, reads: type | None = None, **limits: Any
) -> Option:
    """An option. reads: the type of its values; by default the type of the default. limits: see
    `Setting`."""
    return Option(default, reads or type(default), Setting('option', meaning, **limits))


@dataclass(frozen=True)
class MethodKind:
    """A row of the table of methods."""

    declared: Declared  # what the method promises; its options may withdraw some of it
    meaning: str  # in --help
    source: str  # paper and equation
    made_by: Factory  # a class derived from `Method`
    options: Mapping[str, Option] = field(default_factory=dict)
    layer_of: bool = False  # whether users name a layer with the method
    multiplies: bool = False  # whether --no_multiply applies to the method


METHODS: dict[str, MethodKind] = {
    'ig': MethodKind(
        Declared('ig'),
        'gradients along the straight line from the baseline, times image minus baseline',
        'Sundararajan, Taly, Yan 2017, eq. 1',
        'igseg.method.methods:IntegratedGradientsMethod', multiplies=True),
    'expected': MethodKind(
        Declared('expected', IN_EXPECTATION, baseline=METHOD_BASELINE, settles_early=False),
        'ig from other images, drawn anew for every step: shows how this image differs from them',
        'Erion et al. 2021, eq. 3',
        'igseg.method.methods:ExpectedMethod',
        {'references': option(16, 'largest number of other images, evenly spaced', least=1,
                              most=1000)}),
    'smooth': MethodKind(
        Declared('smooth'),
        'ig of noisy copies of the image: their mean, mean square or variance',
        'Smilkov et al. 2017, section 3, on ig',
        'igseg.method.methods:SmoothMethod',
        {'samples': option(8, 'noisy copies, num_steps each', least=1, most=1000),
         'noise': option(0.1, "standard deviation, relative to the image's range", above=0),
         'kind': option('mean', 'what is computed of the copies',
                         choices=('mean', 'square', 'variance'))},
        multiplies=True),
    'blur': MethodKind(
        Declared('blur', baseline=METHOD_BASELINE, settles_early=False),
        'gradients while the image comes into focus, from a strong blur of it to itself',
        'Xu, Venugopalan, Sundararajan 2020, eq. 5',
        'igseg.method.methods:BlurMethod',
        {'sigma': option(0.2, 'of the strongest blur, relative to the longer side', above=0)}),
    'guided': MethodKind(
        Declared('guided', quadrature=False, sequential=True),
        'ig on a path that moves the inputs with the least gradient first, near the straight line',
        'Kapishnikov et al. 2021, alg. 1',
        'igseg.method.methods:GuidedMethod',
        {'fraction': option(0.25, 'share of the inputs that move together', above=0, below=1),
         'max_dist': option(0.02, 'largest distance from the straight line, in alpha', above=0)}),
    'idgi': MethodKind(
        Declared('idgi', BY_CONSTRUCTION, quadrature=False),
        'the change of the score in each step, divided among the inputs by their squared gradients',
        'Yang, Wang, Bilgic 2023, alg. 1',
        'igseg.method.methods:IdgiMethod'),
    'layer': MethodKind(
        Declared('layer', channels=False),
        'ig at the output of a layer: its values go from those of the baseline to those of the '
        'image, while everything beside the layer gets the image; the map is enlarged to the image '
        'with the same sum',
        'Sundararajan, Taly, Yan 2017, at a layer',
        'igseg.method.methods:LayerMethod', layer_of=True),
    'gradient': MethodKind(
        Declared('gradient', None, quadrature=False, baseline=NO_BASELINE),
        'the gradient at the image',
        'Simonyan, Vedaldi, Zisserman 2013, section 3',
        'igseg.method.methods:GradientMethod'),
    'input_x_gradient': MethodKind(
        Declared('input_x_gradient', None, quadrature=False),
        'the gradient at the image, times image minus baseline: equal to ig for a linear network',
        'Shrikumar et al. 2016, section 2, from a baseline',
        'igseg.method.methods:InputTimesGradient'),
    'gradcam': MethodKind(
        Declared('gradcam', None, quadrature=False, baseline=NO_BASELINE, channels=False,
                 signed=False),
        "the channels of a layer's output, weighted by their mean gradients and summed; negative "
        'sums count as 0',
        'Selvaraju et al. 2017, eq. 1 and 2; of a region: Vinogradova et al. 2020, eq. 1',
        'igseg.method.methods:GradCamMethod', layer_of=True),
    'occlusion': MethodKind(
        Declared('occlusion', None, quadrature=False, channels=False),
        'how much the score falls when a square of the baseline covers a part of the image; a '
        'pixel gets the mean over all squares that cover it',
        'Zeiler, Fergus 2014, section 4.2',
        'igseg.method.methods:OcclusionMethod',
        {'window': option(None, 'side of the square, in pixels of the model input', int, least=1,
                          default_text='an eighth of the longer side'),
         'stride': option(None, 'pixels from one square to the next', int, least=1,
                          default_text='half the window')}),
}  # fmt: skip


@dataclass(frozen=True)
class MethodChoice:
    """A method as the user chose it."""

    name: str  # as on the command line
    kind: MethodKind
    layer: str  # empty: no layer is named with the method
    options: tuple[tuple[str, Any], ...]  # names and values of all its options
    multiply: bool = True  # whether gradients are multiplied by image minus baseline


def form_of(name: str) -> str:
    """How a method is written on the command line."""
    return f'{name}:NAME' if METHODS[name].layer_of else name


def chosen_methods(
    wanted: Sequence[str], assignments: Sequence[str], multiply: bool = True
) -> tuple[MethodChoice, ...]:
    """The methods with the wanted names, and their options.

    assignments: NAME=VALUE each; an option is given to every method that has it. Raises
    InputError."""
    pairs = [text.partition('=') for text in assignments]
    kinds = {name: _kind_of(name) for name in wanted}
    names = {name for kind in kinds.values() for name in kind.options}
    for name, equals, _ in pairs:
        if name not in names or not equals:
            problem = f'unknown option "{name}"' if equals else f'option "{name}" lacks its =VALUE'
            raise InputError(f'{problem} ({"; ".join(map(options_text, kinds.values()))})')
    if not multiply:
        for name, kind in kinds.items():
            if not kind.multiplies:
                multiplying = ', '.join(n for n, k in METHODS.items() if k.multiplies)
                raise InputError(
                    f'--no_multiply goes with {multiplying}, not with {name.split(":")[0]}'
                )
    texts = {name: text for name, _, text in pairs}
    return tuple(
        MethodChoice(name, kind, name.partition(':')[2], _values(kind, texts), multiply)
        for name, kind in kinds.items()
    )


def _kind_of(wanted: str) -> MethodKind:
    """The row of a method. Raises InputError for an unknown method or a wrong form."""
    name, colon, layer = wanted.partition(':')
    if name not in METHODS:
        forms = ', '.join(map(form_of, METHODS))
        raise InputError(f'unknown method "{wanted}" (choose from {forms})')
    kind = METHODS[name]
    if kind.layer_of != bool(layer) or bool(colon) != bool(layer):
        raise InputError(f'method "{wanted}" is not of the form {form_of(name)}')
    return kind


def _values(kind: MethodKind, texts: Mapping[str, str]) -> tuple[tuple[str, Any], ...]:
    """The values of all options of a method: from the user's texts, else the defaults. Raises
    InputError."""
    values: dict[str, Any] = {name: option.default for name, option in kind.options.items()}
    for name, option in kind.options.items():
        if name not in texts:
            continue
        try:
            values[name] = option.setting.checked(name, option.reads(texts[name]))
        except ValueError as error:  # InputError is derived from ValueError
            no_number = f'{name} is no number: "{texts[name]}"'
            reason = str(error) if isinstance(error, InputError) else no_number
            raise InputError(f'{reason} ({options_text(kind)})') from None
    return tuple(values.items())


def options_text(kind: MethodKind) -> str:
    """The options of a method with their defaults, in words."""
    defaults = ', '.join(f'{name}={default_text(option)}' for name, option in kind.options.items())
    return f'{kind.declared.name} has {defaults or "no options"}'


def default_text(option: Option) -> str:
    """The default of an option."""
    return option.setting.default_text if option.default is None else str(option.default)


def option_texts(options: object) -> tuple[str, ...]:
    """Options as texts NAME=VALUE, from such texts or from a dictionary. Raises InputError."""
    if isinstance(options, dict):
        options = [f'{name}={value}' for name, value in options.items()]
    if isinstance(options, str):
        options = options.split()
    if not isinstance(options, (list, tuple)) or not all(isinstance(text, str) for text in options):
        raise InputError(f'method_option must be NAME=VALUE, or several, not {options!r}')
    return tuple(options)


def methods_text() -> str:
    """All methods, each with its line, for --help."""
    return '; '.join(f'{form_of(name)}: {kind.meaning}' for name, kind in METHODS.items())


# --------------------------------------------------------------------------- the question


@dataclass(frozen=True)
class Question:
    """What is explained: the score F, and the baseline that the image is compared with.

    Texts are as users write them. `ig.explain_targets` also takes targets as `Target` objects or
    masks (h, w) bool, and baselines as tensors (1, C, H, W). The map is the mean over baselines.
    """

    targets: Sequence[Any] = ('predicted',)  # texts, Target objects or masks
    score: str = 'logit'  # averaged over the target: 'logit' or 'probability'
    threshold: float = 0.5  # probability above which a pixel is predicted
    min_object_area: int = 1  # output pixels; smaller objects are no targets
    skip_empty: bool = False  # leave out empty targets, unless all are empty
    on_empty: str = 'skip'  # 'image': explain the whole image where all targets are empty
    baseline: str = 'zero'  # a key of BASELINES, AUTO, a file, or a name for `baselines`
    baselines: Sequence[torch.Tensor] = ()  # the user's tensors, (1, C, H, W) each
    baseline_image: np.ndarray | None = None  # (H, W, C): the picture in the file `baseline`
    baseline_draws: int = 4  # number of draws of a random baseline
    seed: int = 0  # of random baselines, and of methods that draw random numbers
    meaning: Meaning = field(default_factory=Meaning)  # what the user says about the outputs

    @property
    def several_targets(self) -> bool:
        """Whether an image may have several explanations; each then has a separate folder."""
        return len(self.targets) > 1 or kind_of(self.targets[0]).several

    @property
    def possible_first_targets(self) -> tuple[str, ...]:
        """All targets that may be the first explained target of an image."""
        return (*(kind_of(target).first or target for target in self.targets), 'image')
