"""The settings of an explanation: a table from which flags, help, checks and records are made.

A setting is a row: a field of `Settings` with its default, its meaning and its check. This file
reads no files, and needs neither torch nor a network. Other parts of the program get only parts of
the settings: the `Question`, the `Integration`, the methods, the `Reading` of image files.
"""

from __future__ import annotations

import math
import operator
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from igseg.checks.effort import EFFORTS
from igseg.checks.verdict import Thresholds
from igseg.data.pixels import Reading, check_file
from igseg.errors import InputError
from igseg.method.choice import (
    AUTO,
    BASELINES,
    CANDIDATES,
    METHODS,
    TARGETS,
    MethodChoice,
    Question,
    check_baseline,
    check_form,
    chosen_methods,
    methods_text,
    option_texts,
    options_text,
)
from igseg.method.rules import ADAPTIVE, PRECISIONS, RULE_NAMES, Integration, first_nodes
from igseg.network.kinds import LOGITS, OUTPUT_KINDS, PROBABILITIES, Meaning
from igseg.preprocessing import (
    CHANNEL_ORDERS,
    DEFAULT_IMAGE_SIZE,
    NORMALIZE_MODES,
    OF_EACH_IMAGE,
    RESIZE_MODES,
    ImageSize,
    checked_size,
    sides,
    size_text,
)
from igseg.program import command_of
from igseg.setting import Setting, setting
from igseg.statistics import Statistics

SCORES = ('logit', 'probability')
ON_EMPTY = ('skip', 'image')
MOST_STEPS = 100_000
PIXEL_RANGES = {'0-1': 1.0, '0-255': 255.0}
OUTPUTS = ('auto', LOGITS, PROBABILITIES)
AGAINST_TILES = {  # settings that cannot be used with --tile, and why
    'crop': 'it explains a part of the image in one piece',
    'image_size': 'tiles go into the network at their own size',
    'resize': 'tiles are not resized',
    'evaluate': 'the checks are of images in one piece (check a part of the image with --crop)',
}

MODEL, PREPROCESSING, ATTRIBUTION, CHECKING = 'model', 'preprocessing', 'attribution', 'checks'


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of an explanation; one object for CLI, API, notebook.

    `target`, `image_size`, `tile` and `crop` may also be given as text, as on the command line;
    several targets are then separated by spaces. The fields have the types of the stored values.
    Raises InputError for values that are not allowed.
    """

    # fmt: off
    step_batch: int | None = setting(None, MODEL, 'interpolation steps computed at once',
        least=1, metavar='N', default_text='the fastest that fits')
    output_kind: str | None = setting(None, MODEL,
        'what several logit maps mean: exclusive classes (softmax), or independent labels '
        '(multilabel: a sigmoid each, no background)', choices=OUTPUT_KINDS,
        default_text="the checkpoint's, else exclusive")
    background_class: str | int | None = setting(None, MODEL,
        'which of several exclusive classes is the background', metavar='K|none',
        default_text="the checkpoint's, else 0")
    outputs: str = setting('auto', MODEL,
        'what the network gives; auto: probabilities if all outputs lie in 0-1 for any input',
        choices=OUTPUTS)
    output_map: str | None = setting(None, MODEL,
        'which of several maps that the network gives: its key, its place, or its number, from 0',
        metavar='NAME|INDEX', default_text='out or logits, else the first of the size of the image')
    class_names: tuple[str, ...] | None = setting(None, MODEL,
        'names of all labels, in order, for the figures of each class', metavar='NAME',
        default_text="the checkpoint's, else the dataset's")
    image_size: ImageSize | None = setting(None, PREPROCESSING,
        'size of the model input: a side or HEIGHTxWIDTH, rounded up to a multiple that the '
        'network takes', metavar='PIXELS',
        default_text=f"the checkpoint's, else {DEFAULT_IMAGE_SIZE}")
    resize: str | None = setting(None, PREPROCESSING,
        'letterbox keeps the aspect ratio and pads with black', choices=RESIZE_MODES,
        default_text="the checkpoint's, else stretch")
    normalize: str = setting('auto', PREPROCESSING,
        "auto: by the checkpoint's mean and std, else by those of ImageNet; none: only scaled to "
        '0-1; minmax: the least value of each image becomes 0, the largest 1; zscore: each image '
        'minus its mean, divided by its standard deviation', choices=NORMALIZE_MODES)
    mean: tuple[float, ...] | None = setting(None, PREPROCESSING,
        'mean of each channel in training, instead of --normalize', metavar='M',
        default_text='by --normalize')
    std: tuple[float, ...] | None = setting(None, PREPROCESSING,
        'standard deviation of each channel in training', metavar='S',
        default_text='by --normalize')
    channel_order: str | None = setting(None, PREPROCESSING,
        "order of the channels in the network's input; --mean and --std are in this order",
        choices=CHANNEL_ORDERS, default_text="the checkpoint's, else rgb")
    pixel_range: str = setting('0-1', PREPROCESSING,
        "range of the pixels in the network's input, and of --mean and --std", choices=PIXEL_RANGES)
    window: str | None = setting(None, PREPROCESSING,
        "values of the image's file that become black and white, LOW:HIGH (with =, if LOW is "
        'negative); auto: the 0.5th and 99.5th percentile of the image; dicom: the window in the '
        'file', metavar='LOW:HIGH|auto|dicom',
        default_text="0-255, 0-65535 or 0-1, as the file holds; DICOM: the file's")
    frame: int | None = setting(None, PREPROCESSING,
        'which frame or page of a file with several, from 0', least=0, metavar='N',
        default_text='the first')
    slice: str | None = setting(None, PREPROCESSING,
        'which slice of a volume (NIfTI), AXIS:INDEX, from 0; batch: AXIS alone for every slice',
        metavar='AXIS[:INDEX]', default_text='the middle of axis 2; batch: every slice along it')
    crop: tuple[int, int, int, int] | None = setting(None, PREPROCESSING,
        'explain only this part of the image, in pixels of the image', metavar='X,Y,WIDTH,HEIGHT',
        default_text='all of it')
    tile: ImageSize | None = setting(None, PREPROCESSING,
        'explain the image without resizing it, in tiles of this side (or HEIGHTxWIDTH), and join '
        'their maps', metavar='SIZE',
        default_text='off: the whole image, resized', instead_of='crop')
    overlap: int | None = setting(None, PREPROCESSING,
        'with --tile: least number of pixels that neighbouring tiles share', least=0, metavar='N',
        default_text='a quarter of the tile')
    max_pixels: int | None = setting(None, PREPROCESSING,
        'images with more pixels are refused', least=1, metavar='N', default_text='89478485')
    label_map: str | None = setting(None, PREPROCESSING,
        'text file with the meaning of the values or colours of masks (or the categories of '
        'annotations): in each line VALUE = CLASS, NAME; VALUE is a number, R,G,B or #rrggbb; '
        'CLASS is a number or ignore', metavar='FILE', default_text='by the set of the values')
    ignore_label: int | None = setting(None, PREPROCESSING,
        'value of masks; pixels with it count in no score and no target', metavar='VALUE',
        default_text='255 beside small numbers')
    target: tuple[str, ...] = setting(('predicted',), ATTRIBUTION,
        'what is explained; one or several; '
        + '; '.join(f'{kind.form}: {kind.meaning}' for kind in TARGETS.values()),
        metavar='TARGET', default_text='predicted')  # several share their forward passes
    method: tuple[str, ...] = setting(('ig',), ATTRIBUTION, 'how it is explained; one or several; '
        + methods_text(), metavar='METHOD', default_text='ig')
    method_option: tuple[str, ...] = setting((), ATTRIBUTION, 'options of the methods: '
        + '; '.join(options_text(kind) for kind in METHODS.values()), metavar='NAME=VALUE',
        default_text='as said')
    segments: str | None = setting(None, ATTRIBUTION,
        'rank regions of the image by their attribution; xrai: regions of similar colour, at '
        'several scales', choices=('xrai',), default_text='off',
        describes=True)
    reference_dir: str | None = setting(None, ATTRIBUTION,
        'folder of the other images for method expected', metavar='DIR',
        default_text='the others of the dataset')
    no_multiply: bool = setting(False, ATTRIBUTION,
        'the map is the mean gradient, not multiplied by image minus baseline', default_text='off')
    score: str = setting('logit', ATTRIBUTION, 'what is averaged over the target', choices=SCORES)
    threshold: float = setting(0.5, ATTRIBUTION, 'probability above which a pixel is predicted',
        above=0, below=1)
    min_object_area: int = setting(1, ATTRIBUTION,
        'objects of fewer output pixels are no targets', least=1, metavar='PIXELS')
    on_empty: str = setting('skip', ATTRIBUTION,
        'if a target is empty: skip it, or explain the whole image', choices=ON_EMPTY)
    baseline: str = setting('zero', ATTRIBUTION, 'the image to compare with; '
        + '; '.join(f'{name}: {kind.meaning}' for name, kind in BASELINES.items())
        + '; auto: the one of '  + ', '.join(CANDIDATES) + ' that hides the target least'
        + '; or an image file', metavar='|'.join((*BASELINES, AUTO, 'FILE')))
    baseline_draws: int = setting(4, ATTRIBUTION,
        'number of draws of baseline random, with num_steps each; their maps are averaged',
        least=1, metavar='N')
    seed: int = setting(0, ATTRIBUTION,
        'of baseline random, and of methods that draw random numbers', least=0)
    num_steps: int = setting(50, ATTRIBUTION, 'interpolation steps', least=1, most=MOST_STEPS,
        metavar='N')
    tolerance: float | None = setting(None, ATTRIBUTION,
        'instead: as many steps as it takes to bring map error and completeness gap below T, for '
        'example 0.05',
        above=0, metavar='T', default_text='off', instead_of='num_steps')
    max_steps: int = setting(200, ATTRIBUTION, 'with --tolerance: largest number of steps', least=1,
        most=MOST_STEPS, metavar='N')
    rule: str = setting(ADAPTIVE, ATTRIBUTION, 'quadrature rule', choices=RULE_NAMES)
    precision: str = setting('float32', ATTRIBUTION,
        'of the gradients; auto: reduced if that is faster on this machine and the map stays '
        'within --precision_tolerance', choices=PRECISIONS)
    precision_tolerance: float = setting(0.03, ATTRIBUTION,
        'relative L2 deviation of the map that precision auto accepts', above=0)
    gap_tolerance: float = setting(0.05, ATTRIBUTION,
        'completeness gap above which to warn', above=0, describes=True)
    evaluate: str | None = setting(None, CHECKING,
        'check how far each map can be trusted; the cost is printed first',
        choices=tuple(EFFORTS), default_text='off')
    thresholds: Thresholds = setting(
        Thresholds(), CHECKING, 'thresholds of the verdict', metavar='NAME=VALUE',
        default_text=' '.join(f'{k}={v:g}' for k, v in asdict(Thresholds()).items()))
    # fmt: on

    def __post_init__(self) -> None:
        targets = self.target.split() if isinstance(self.target, str) else self.target
        if not isinstance(targets, (list, tuple)) or not all(isinstance(t, str) for t in targets):
            raise InputError(f'target must be text, or several, not {self.target!r}')
        object.__setattr__(self, 'target', tuple(targets))
        for row in fields(self):
            value = getattr(self, row.name)
            if value is not None or row.default is not None:  # None: not given
                value = row.metadata['setting'].checked(row.name, value)
                object.__setattr__(self, row.name, value)
        if not isinstance(self.thresholds, Thresholds):
            raise InputError('thresholds must be of class Thresholds')
        if not isinstance(self.no_multiply, bool):
            raise InputError(f'no_multiply must be True or False, not {self.no_multiply!r}')
        self._check_methods()
        check_baseline(self.baseline)
        if self.image_size is not None:
            object.__setattr__(self, 'image_size', checked_size(self.image_size))
        self._check_tile()
        object.__setattr__(self, 'background_class', _checked_class(self.background_class))
        if self.output_map is not None:
            object.__setattr__(self, 'output_map', _checked_map(self.output_map))
        if self.class_names is not None:
            object.__setattr__(self, 'class_names', _checked_names(self.class_names))
        for name in ('mean', 'std'):
            _check_numbers(name, getattr(self, name), least=0.0 if name == 'std' else -math.inf)
        object.__setattr__(self, 'crop', _checked_crop(self.crop))
        object.__setattr__(self, 'ignore_label', _checked_value(self.ignore_label))
        if self.label_map is not None:
            check_file(Path(self.label_map), 'label map')  # it is read when a run begins
        _ = self.reading  # raises InputError
        if not self.target:
            raise InputError('no target is given (use --target predicted)')
        for target in self.target:
            check_form(target)
        first_nodes(self.rule, self.steps, self.tolerance is not None)  # raises InputError

    def _check_methods(self) -> None:
        """Raise InputError for unknown methods, for unknown options, and for a tolerance or a
        precision that a method does not support."""
        names = self.method.split() if isinstance(self.method, str) else self.method
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise InputError(f'method must be text, or several, not {names!r}')
        if not names or len(set(names)) < len(names):
            raise InputError('method must name different methods (use --method ig)')
        object.__setattr__(self, 'method', tuple(names))
        object.__setattr__(self, 'method_option', option_texts(self.method_option))
        full_precision = self.precision in ('auto', 'float32')
        option = (
            'tolerance' if self.tolerance is not None else None if full_precision else 'precision'
        )
        for method in self.methods:
            if option and not method.kind.declared.quadrature:
                raise InputError(
                    f'--{option} goes with methods whose error is estimated, which {method.name} '
                    'has no integral for (leave it out)'
                )

    @property
    def methods(self) -> tuple[MethodChoice, ...]:
        """The methods, with their options."""
        return chosen_methods(self.method, self.method_option, not self.no_multiply)

    def _check_tile(self) -> None:
        """Raise InputError for a tile that is not allowed, or settings that it does not go with."""
        if self.tile is None:
            if self.overlap is not None:
                raise InputError('--overlap goes with --tile (give --tile SIZE)')
            return
        object.__setattr__(self, 'tile', checked_size(self.tile, 'tile'))
        if self.overlap is not None and self.overlap >= min(sides(self.tile)):
            raise InputError(
                f'overlap must be less than the tile, {min(sides(self.tile))}, not {self.overlap}'
            )
        for name, why in AGAINST_TILES.items():
            if getattr(self, name) is not None:
                raise InputError(f'--{name} goes without --tile: {why}')
        if self.method != ('ig',) or self.no_multiply:
            raise InputError(
                '--tile goes with --method ig and without --no_multiply (leave one of them out)'
            )

    @classmethod
    def table(cls) -> dict[str, Setting]:
        """The description of each setting, by its name."""
        return {f.name: f.metadata['setting'] for f in fields(cls)}

    @property
    def steps(self) -> int:
        """Interpolation steps for each baseline; with a tolerance the largest number of them."""
        return self.num_steps if self.tolerance is None else self.max_steps

    @property
    def question(self) -> Question:
        """What is explained, and with which baseline."""
        return Question(
            targets=self.target,
            score=self.score,
            threshold=self.threshold,
            min_object_area=self.min_object_area,
            on_empty=self.on_empty,
            baseline=self.baseline,
            baseline_draws=self.baseline_draws,
            seed=self.seed,
            meaning=Meaning(
                self.outputs,
                self.output_kind,
                self.background_class,
                self.class_names,
                self.output_map,
            ),
        )

    @property
    def integration(self) -> Integration:
        """How the integrals are computed."""
        return Integration(
            self.rule, self.steps, self.tolerance, self.precision, self.precision_tolerance,
            self.seed,
        )  # fmt: skip

    @property
    def reading(self) -> Reading:
        """How the files of images are read. Raises InputError."""
        return Reading(self.window, self.frame, self.slice, self.crop, self.max_pixels,
                       self.normalize in OF_EACH_IMAGE)  # fmt: skip

    def record(self) -> dict[str, object]:
        """The settings for the statistics file, with targets and methods as on the command line."""
        joined = {name: ' '.join(getattr(self, name)) for name in ('target', 'method')}
        return {**asdict(self), **joined}


def _check_numbers(name: str, values: Sequence[float] | None, least: float) -> None:
    """Raise InputError if the values are not finite numbers above `least`."""
    if values is None:
        return
    try:
        valid = len(values) > 0 and all(math.isfinite(v) and v > least for v in values)
    except TypeError:
        valid = False
    if not valid:
        above = ' above 0' if least == 0 else ''
        raise InputError(f'{name} must be numbers{above}, one for each channel, not {values}')


def _checked_crop(value: str | Sequence[int] | None) -> tuple[int, int, int, int] | None:
    """X, Y, width and height of a part of an image. Raises InputError."""
    if value is None:
        return None
    try:
        parts = value.split(',') if isinstance(value, str) else value
        x, y, width, height = (int(part) for part in parts)
    except (TypeError, ValueError, AttributeError):
        x = y = width = height = -1
    if min(x, y) < 0 or min(width, height) < 1:
        raise InputError(f'crop must be X,Y,WIDTH,HEIGHT, whole numbers, not {value!r}')
    return x, y, width, height


def _checked_value(value: int | None) -> int | None:
    """A value of masks. Raises InputError."""
    if value is None:
        return None
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        raise InputError(f'ignore_label must be a whole number, not {value!r}') from None


def _checked_class(value: int | str | None) -> int | str | None:
    """A background class: a whole number, 'none', or None: not given. Raises InputError."""
    if value is None or value == 'none':
        return value
    try:
        number = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or isinstance(value, bool):
        raise InputError(f'background_class must be a class, from 0, or none, not {value!r}')
    return number


def _checked_map(value: str | int) -> str:
    """The name or the number of an output map, as text. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == '':
        raise InputError(f'output_map must be a name or a number from 0, not {value!r}')
    return str(value)


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, which must differ. Raises InputError."""
    valid = isinstance(names, (list, tuple)) and all(isinstance(n, str) and n for n in names)
    if not valid or len(set(names)) < len(names):
        raise InputError(f'class_names must be different names, not {names!r}')
    return tuple(names)


# The names of the options of `explain`, beside targets, baseline, steps and rule.
OF_AN_EXPLANATION = tuple(sorted(
    {name for name, row in Settings.table().items()
     if row.group == ATTRIBUTION and not row.describes}
    - {'target', 'baseline', 'num_steps', 'rule'}
    | {row.name for row in fields(Meaning)} - {'class_names'}
))  # fmt: skip


# --------------------------------------------------------------------------- command lines


def arguments_of(used: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The words of a command line that gives these settings; the inverse of `settings_from`.

    used: the settings as they took effect. defaults: values that are left out."""
    words: list[str] = []
    for name, default in defaults.items():
        value = used[name]
        if value is None or value in (default, []):
            continue
        if name in ('normalize', 'pixel_range') and used.get('mean') and not used.get('of_each'):
            continue  # mean and std, as they took effect, are among the words
        if name == 'output_kind' and value == 'foreground':
            continue  # the network has no other kind
        if name in ('mean', 'std') and used.get('of_each'):
            continue  # they are those of this image
        if name in ('image_size', 'resize') and used.get('tile'):
            continue  # they are those of a tile
        if name in ('image_size', 'tile'):
            words += [f'--{name}', size_text(value)]
        elif name == 'crop':
            words += ['--crop', ','.join(map(str, value))]
        elif name == 'window':
            words += [f'--window={value}']  # the value may begin with a minus
        elif isinstance(value, list | tuple):
            words += [f'--{name}', *map(str, value)]
        elif name == 'target':
            words += ['--each_object'] if value == 'each-object' else ['--target', *value.split()]
        elif name == 'method':
            words += ['--method', *value.split()]
        elif name == 'thresholds':
            changed = {key: limit for key, limit in value.items() if limit != default[key]}
            words += ['--thresholds', *(f'{key}={limit:g}' for key, limit in changed.items())]
        elif name != 'num_steps' or used['tolerance'] is None:
            words += [f'--{name}'] if value is True else [f'--{name}', str(value)]
    return words


def reproducing_command(statistics: Statistics, defaults: dict[str, Any]) -> str:
    """The command that explains an image again with the same settings.

    defaults: values of settings that are left out.
    """
    used = statistics['settings']
    words = [*command_of(), '--model_path', str(used.get('model_path'))]
    words += ['--image_path', str(statistics['image_path'])]
    for name, value in (statistics.get('mask_flags') or {}).items():
        words += [f'--{name}', value]
    place = statistics.get('placement') or {}
    if 'axis' in place and not used.get('slice'):
        words += ['--slice', f'{place["axis"]}:{place["index"]}']
    for name in ('encoder', 'architecture', 'weights_key', 'model_factory'):
        words += [f'--{name}', str(used[name])] if name in used else []
    words += ['--allow_unused'] if used.get('allow_unused') else []
    if used.get('model_options'):
        options = used['model_options'].items()
        words += ['--model_option', *(f'{key}={value!r}' for key, value in options)]
    return shlex.join([*words, *arguments_of(used, defaults)])
