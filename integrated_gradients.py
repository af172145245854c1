"""Integrated Gradients for segmentation models: which pixels made the network draw this mask?

For a network f (logit map), an image x and a baseline x', Integrated Gradients is

    IG_i(x) = (x_i - x'_i) * integral over alpha in [0, 1] of dF(x' + alpha (x - x')) / dx_i

(Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, eq. 1), where the
*target score* F is one number: the mean of the logit (or the probability) over a fixed set of
output pixels, the *target region*. The attributions sum to F(x) - F(x') (completeness); how far
the computed ones miss that is the *completeness gap*, reported with every explanation.

The way of an image, from the command line to its files:

    main              flags -> Settings                                   here
    list_samples      folders and files -> Sample: image and truth        segmentation_dataset
    load_model        checkpoint -> module and NetworkDescription         model_loading
    analyse_sample    finished already? else explain, then write          here, finished_images
    analyse_image     pixels -> input; explain; statistics; verdict       here, image_statistics
    explain_with      prediction -> targets, paths; their integral        IntegratedGradients, here
    Method.explain    image, targets, baselines -> paths, or else         attribution_methods
    Work.walk         paths -> their integrals; precision, tolerance      path_walk
    StraightPath.at   alphas -> points and velocities                     attribution_path
    PathSampler       nodes -> gradient times velocity, in step batches   gradient_engine
    integrate         densities -> attributions and their error           path_integral
    Mosaic            with --tile: those of many tiles -> one map         tiling
    write_image       arrays and statistics -> figures and files          result_files

Around it stand `analyse_batch` (many samples: batch_job, batch_summary, html_report) and
`evaluate_explanation` (can the map be trusted? faithfulness). Use it as a library (`load_model`,
`IntegratedGradients`, `batch_integrated_gradients_analysis`) or from the command line:
`python integrated_gradients.py --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import math
import operator
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from igseg.analysis.job import (
    FAILED,
    SKIPPED,
    Alone,
    Group,
    Outcome,
    Share,
    StopSignals,
    Writers,
    device_of_rank,
    hold_folder,
    read_ahead,
    started_by_torchrun,
    writer_processes,
)
from igseg.analysis.study import ReferenceImages
from igseg.analysis.summary import BatchResult, Progress, row_of
from igseg.analysis.tiles import DEFAULT_OVERLAP, Mosaic, Tile, Tiling, cost_of
from igseg.checks.checks import evaluate_explanation
from igseg.checks.subject import EFFORTS, evaluation_cost, subject_of
from igseg.checks.verdict import (
    Thresholds,
    accuracy_warning,
    parse_thresholds,
    statistics_text,
    verdict_of,
)
from igseg.data.layouts import DataSource, layouts_text
from igseg.data.medical import Geometry, check_nifti
from igseg.data.pixels import (
    BYTES_A_PIXEL,
    MOST_PIXELS,
    LoadedImage,
    Reading,
    crop_image,
    read_image,
)
from igseg.data.samples import (
    Sample,
    choose_samples,
    fitted_truth,
    list_samples,
    over_image,
    single_sample,
    with_slices,
)
from igseg.data.truth import IGNORED, VOID, LabelMap, TruthReading, read_label_map
from igseg.engine.engine import GradientEngine
from igseg.engine.memory import explained_memory, peak_memory
from igseg.engine.precision import PRECISIONS
from igseg.engine.preparation import frozen
from igseg.engine.sampler import AtImage
from igseg.errors import EmptyTargetError, InputError, OutputError, attempt, check_choice
from igseg.explanation import (
    GIVEN,
    NO_BASELINE,
    Cost,
    Explanation,
    Found,
    LabelScores,
    Preparation,
    Trend,
    completeness_gap,
)
from igseg.maps import contrast, label_scores, mask_scores
from igseg.method.choice import METHODS, build_methods, methods_text, option_texts, options_text
from igseg.method.method import Method
from igseg.method.paths import plain_map
from igseg.method.rules import ADAPTIVE, RULE_NAMES, first_nodes
from igseg.method.targets import (
    TARGETS,
    TargetContext,
    build_target,
    build_targets,
    check_form,
    kind_of,
)
from igseg.method.walk import Work, dtype_name, in_precision, mask_overlap
from igseg.network.description import (
    NetworkDescription,
    describe_network,
    known_description,
    likely_channels,
)
from igseg.network.factory import runs_at
from igseg.network.identity import fingerprint
from igseg.network.loading import ARCHITECTURES, load_model, parse_options, resolve_device
from igseg.network.outputs import (
    EXCLUSIVE,
    LOGITS,
    MULTILABEL,
    OUTPUT_KINDS,
    PROBABILITIES,
    LogitsOf,
    enlarged,
    probability_kind,
    segmentation_logits,
)
from igseg.network.score import Target
from igseg.preprocessing import (
    CHANNEL_ORDERS,
    DEFAULT_IMAGE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NORMALIZE_MODES,
    OF_EACH_IMAGE,
    RESIZE_MODES,
    ImageSize,
    Placement,
    Preprocessing,
    checked_size,
    sides,
    size_text,
    strong_blur,
)
from igseg.program import name_of
from igseg.results.export import EXPORTS, export_maps
from igseg.results.figures import attribution_figure, channels_figure
from igseg.results.files import (
    FIGURES,
    Description,
    display_arrays,
    load_view,
    make_output_folder,
    missing_figures,
    redraw_figures,
    redraw_missing,
    view_of,
    write_image,
)
from igseg.results.finished import Naming, finished_statistics, judged_again, resume_key, versions
from igseg.results.regions import Regions, rank_regions, segments_of
from igseg.setting import Setting, setting
from igseg.statistics import explanation_statistics

__all__ = [  # what users import from here, wherever it stands
    'BASELINES',
    'METHODS',
    'TARGETS',
    'BatchResult',
    'Cost',
    'EmptyTargetError',
    'Explanation',
    'InputError',
    'IntegratedGradients',
    'NetworkDescription',
    'OutputError',
    'Preparation',
    'Preprocessing',
    'Sample',
    'Settings',
    'Target',
    'TargetContext',
    'Trend',
    'analyse_batch',
    'analyse_image',
    'analyse_sample',
    'attribution_figure',
    'batch_integrated_gradients_analysis',
    'build_baselines',
    'build_target',
    'channels_figure',
    'completeness_gap',
    'describe_image',
    'describe_network',
    'describe_targets',
    'evaluate_explanation',
    'explain_image',
    'explanation_statistics',
    'input_preprocessing',
    'list_samples',
    'load_model',
    'load_view',
    'main',
    'mask_scores',
    'plain_map',
    'read_image',
    'redraw_figures',
    'resolve_device',
    'statistics_text',
    'subject_of',
    'view_of',
]

SCORES = ('logit', 'probability')
ON_EMPTY = ('skip', 'image')
MOST_STEPS = 100_000
NEED_TRUTH = ('truth', 'false-positive', 'false-negative')  # of the targets
PIXEL_RANGES = {'0-1': 1.0, '0-255': 255.0}
OUTPUTS = ('auto', LOGITS, PROBABILITIES)
LARGE_IN_TILES = 10_000_000  # pixels, from which on their memory is told
TILED_BYTES_A_PIXEL = 180  # of a picture in tiles, its maps and their figures: 165, measured
AGAINST_TILES = {  # settings, and why they go without --tile
    'crop': 'it explains a part of the image in one piece',
    'image_size': 'tiles go into the network at their own size',
    'resize': 'tiles are not resized',
    'evaluate': 'the checks are of images in one piece (check a part of the image with --crop)',
}


# --------------------------------------------------------------------------- baselines
#
# A baseline is an image in pixel space, built from the image it stands against and then
# normalised like it: (pixels (H, W, C) float32 0-255, generator) -> (H, W, C) float32 0-255. The
# docstring is its line in --help.


def zero_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """a black image (after normalisation that is not a zero tensor)"""
    return np.zeros_like(pixels)


def white_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """a white image"""
    return np.full_like(pixels, 255)


def random_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uniform noise, seeded; the attributions are averaged over several draws"""
    return rng.uniform(0, 255, pixels.shape).astype(np.float32)


def blur_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """the image under a Gaussian blur of 5 % of its longer side"""
    return strong_blur(pixels)


def mean_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """the image's mean colour everywhere"""
    return np.broadcast_to(pixels.mean(axis=(0, 1)), pixels.shape).astype(np.float32)


@dataclass(frozen=True)
class BaselineKind:
    """A row of the table of baselines."""

    build: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    drawn: bool = False  # whether the attributions are averaged over several draws

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.build(pixels, rng)


BASELINES: dict[str, BaselineKind] = {
    'zero': BaselineKind(zero_baseline),
    'random': BaselineKind(random_baseline, drawn=True),
    'blur': BaselineKind(blur_baseline),
    'mean': BaselineKind(mean_baseline),
    'white': BaselineKind(white_baseline),
}


AUTO = 'auto'  # a baseline: chosen for each image from CANDIDATES
CANDIDATES = ('mean', 'blur', 'zero', 'white')
LEAST_CONTRAST = 0.8  # of the best candidate's, that a baseline must have to be chosen
STILL_PREDICTED = 0.1  # share of the target that may still be predicted on it


def check_baseline(kind: str) -> None:
    """Raise InputError for what is neither a key of BASELINES, `auto` nor a file."""
    known = (*BASELINES, AUTO)
    if not isinstance(kind, str) or (kind not in known and not Path(kind).is_file()):
        raise InputError(
            f'unknown baseline "{kind}" (choose from {", ".join(known)}, or give the path '
            'of an image file)'
        )


def build_baselines(
    kind: str,
    pixels: np.ndarray,
    preprocessing: Preprocessing,
    draws: int = 4,
    seed: int = 0,
    reading: Reading | None = None,
) -> list[np.ndarray]:
    """The baselines of that kind for an image: several draws for `random`, one for the others.

    kind: a key of BASELINES, or the path of an image file (fitted to the image).
    pixels: (H, W, C) float32, 0-255. reading: how a file is read (window, frame).
    Returns arrays of the same shape and range. Raises InputError for an unknown kind or an
    unreadable file.
    """
    if kind in BASELINES:
        rng = np.random.default_rng(seed)
        return [BASELINES[kind](pixels, rng) for _ in range(draws if BASELINES[kind].drawn else 1)]
    check_baseline(kind)
    height, width, channels = pixels.shape
    image = read_image(kind, channels, reading or Reading())
    fit = replace(preprocessing, image_size=(height, width))
    return [fit.resize_image(image).astype(np.float32)]


# --------------------------------------------------------------------------- settings

MODEL, PREPROCESSING, ATTRIBUTION, CHECKING = 'model', 'preprocessing', 'attribution', 'checks'


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of an explanation; one object for CLI, API, notebook.

    `target` may be given as text, several separated by spaces. Raises InputError where a value
    makes no sense.
    """

    # fmt: off
    step_batch: int | None = setting(None, MODEL, 'interpolation steps computed at once',
        least=1, metavar='N', default_text='the fastest that fits')
    output_kind: str | None = setting(None, MODEL,
        'what several logit maps mean: exclusive classes (softmax), or independent labels '
        '(multilabel: a sigmoid each, no background)', choices=OUTPUT_KINDS,
        default_text="the checkpoint's, else exclusive")
    background_class: str | int | None = setting(None, MODEL,
        'of exclusive classes, the one that is no object', metavar='K|none',
        default_text="the checkpoint's, else 0")
    outputs: str = setting('auto', MODEL,
        'what the network gives; auto: probabilities where all lie in 0-1 on any input',
        choices=OUTPUTS)
    class_names: tuple[str, ...] | None = setting(None, MODEL,
        'of all labels, in order, for the figures of each class', metavar='NAME',
        default_text="the checkpoint's, else the dataset's")
    image_size: ImageSize | str | None = setting(None, PREPROCESSING,  # noqa: RUF009
        'of the model input, a side or HEIGHTxWIDTH, rounded up to multiples that the network '
        'takes', metavar='PIXELS', default_text=f"the checkpoint's, else {DEFAULT_IMAGE_SIZE}")
    resize: str | None = setting(None, PREPROCESSING,
        'letterbox keeps the aspect ratio, pads black', choices=RESIZE_MODES,
        default_text="the checkpoint's, else stretch")
    normalize: str = setting('auto', PREPROCESSING,
        "auto: the checkpoint's mean and std, else ImageNet's; none: 0-1 as it is; minmax: each "
        'image from its least value, 0, to its largest, 1; zscore: each image minus its mean, by '
        'its standard deviation', choices=NORMALIZE_MODES)
    mean: tuple[float, ...] | None = setting(None, PREPROCESSING,
        'of each channel in training, instead of --normalize', metavar='M',
        default_text='by --normalize')
    std: tuple[float, ...] | None = setting(None, PREPROCESSING,
        'the same: standard deviation', metavar='S', default_text='by --normalize')
    channel_order: str | None = setting(None, PREPROCESSING,
        'of the colours that the network was given; --mean and --std are in this order',
        choices=CHANNEL_ORDERS, default_text="the checkpoint's, else rgb")
    pixel_range: str = setting('0-1', PREPROCESSING,
        'of the pixels that the network was given, and of --mean and --std', choices=PIXEL_RANGES)
    window: str | None = setting(None, PREPROCESSING,
        "values of the image's file that become black and white, LOW:HIGH (with =, where LOW is "
        'negative); auto: the 0.5th and 99.5th percentile of the image; dicom: what the file asks '
        'for', metavar='LOW:HIGH|auto|dicom',
        default_text="0-255, 0-65535 or 0-1, as the file holds; DICOM: the file's")
    frame: int | None = setting(None, PREPROCESSING,
        'of a file with several frames or pages, from 0', least=0, metavar='N',
        default_text='the first')
    slice: str | None = setting(None, PREPROCESSING,
        'of a volume (NIfTI), AXIS:INDEX, from 0; batch: AXIS alone for every slice along it',
        metavar='AXIS[:INDEX]', default_text='the middle of axis 2; batch: every slice along it')
    crop: tuple[int, ...] | str | None = setting(None, PREPROCESSING,
        'explain only this part of the image, in its pixels', metavar='X,Y,WIDTH,HEIGHT',
        default_text='all of it')
    tile: ImageSize | str | None = setting(None, PREPROCESSING,  # noqa: RUF009
        'explain the image in its own pixels, in tiles of this side (or HEIGHTxWIDTH) that the '
        'network takes as they are, and put their maps together', metavar='SIZE',
        default_text='off: the whole image, resized', instead_of='crop')
    overlap: int | None = setting(None, PREPROCESSING,
        'with --tile: pixels that neighbouring tiles share at least', least=0, metavar='N',
        default_text='a quarter of the tile')
    max_pixels: int | None = setting(None, PREPROCESSING,
        'images of more pixels are refused', least=1, metavar='N', default_text='89478485')
    label_map: str | None = setting(None, PREPROCESSING,
        'text file, what the values or colours of masks (or the categories of annotations) stand '
        'for: in each line VALUE = CLASS, NAME; VALUE a number, R,G,B or #rrggbb; CLASS a number '
        'or ignore', metavar='FILE', default_text='by the set of the values')
    ignore_label: int | None = setting(None, PREPROCESSING,
        'value of the masks whose pixels count in no score and no target', metavar='VALUE',
        default_text='255 beside small numbers')
    target: tuple[str, ...] = setting(('predicted',), ATTRIBUTION, 'one or several; '
        + '; '.join(f'{kind.form}: {kind.meaning}' for kind in TARGETS.values()),
        metavar='TARGET', default_text='predicted')  # several share their forward passes
    method: tuple[str, ...] = setting(('ig',), ATTRIBUTION, 'how; one or several; '
        + methods_text(), metavar='METHOD', default_text='ig')
    method_option: tuple[str, ...] = setting((), ATTRIBUTION, 'of the methods: '
        + '; '.join(options_text(kind) for kind in METHODS.values()), metavar='NAME=VALUE',
        default_text='as said')
    segments: str | None = setting(None, ATTRIBUTION,
        'rank regions of the image by the attribution they carry; xrai: by segments of its '
        'colours at several scales', choices=('xrai',), default_text='off')
    reference_dir: str | None = setting(None, ATTRIBUTION,
        'method expected: the folder of the other images', metavar='DIR',
        default_text='the others of the dataset')
    no_multiply: bool = setting(False, ATTRIBUTION,
        'the mean gradient, not multiplied by image minus baseline', default_text='off')
    score: str = setting('logit', ATTRIBUTION, 'what is averaged over the target', choices=SCORES)
    threshold: float = setting(0.5, ATTRIBUTION, 'probability above which a pixel is predicted',
        above=0, below=1)
    min_object_area: int = setting(1, ATTRIBUTION,
        'objects of fewer output pixels are no targets', least=1, metavar='PIXELS')
    on_empty: str = setting('skip', ATTRIBUTION,
        'empty target: skip it, or explain the whole image', choices=ON_EMPTY)
    baseline: str = setting('zero', ATTRIBUTION, 'the image to compare with; '
        + '; '.join(f'{name}: {kind.build.__doc__}' for name, kind in BASELINES.items())
        + '; auto: of '  + ', '.join(CANDIDATES) + ' the one that hides the target least'
        + '; or an image file', metavar='|'.join((*BASELINES, AUTO, 'FILE')))
    baseline_draws: int = setting(4, ATTRIBUTION,
        'of baseline random: averaged, num_steps each', least=1, metavar='N')
    seed: int = setting(0, ATTRIBUTION, 'of baseline random, and of methods that draw', least=0)
    num_steps: int = setting(50, ATTRIBUTION, 'interpolation steps', least=1, most=MOST_STEPS,
        metavar='N')
    tolerance: float | None = setting(None, ATTRIBUTION,
        'instead: as many steps as bring map error and completeness gap below T, for example 0.05',
        above=0, metavar='T', default_text='off', instead_of='num_steps')
    max_steps: int = setting(200, ATTRIBUTION, 'with --tolerance: at most so many', least=1,
        most=MOST_STEPS, metavar='N')
    rule: str = setting(ADAPTIVE, ATTRIBUTION, 'quadrature rule', choices=RULE_NAMES)
    precision: str = setting('float32', ATTRIBUTION,
        'of the gradients; auto: reduced where it is faster here and the map stays within '
        '--precision_tolerance', choices=PRECISIONS)
    precision_tolerance: float = setting(0.03, ATTRIBUTION,
        'relative L2 deviation of the map that auto accepts', above=0)
    gap_tolerance: float = setting(0.05, ATTRIBUTION,
        'completeness gap above which to warn', above=0)
    evaluate: str | None = setting(None, CHECKING,
        'check how far each map can be trusted; the cost is told first',
        choices=tuple(EFFORTS), default_text='off')
    thresholds: Thresholds = setting(  # noqa: RUF009
        Thresholds(), CHECKING, 'of the verdict', metavar='NAME=VALUE',
        default_text=' '.join(f'{k}={v:g}' for k, v in asdict(Thresholds()).items()))
    # fmt: on

    def __post_init__(self) -> None:
        targets = self.target.split() if isinstance(self.target, str) else self.target
        if not isinstance(targets, (list, tuple)) or not all(isinstance(t, str) for t in targets):
            raise InputError(f'target must be text, or several, not {self.target!r}')
        object.__setattr__(self, 'target', tuple(targets))
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:  # None: not said
                value = one.metadata['setting'].checked(one.name, value)
                object.__setattr__(self, one.name, value)
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
        if self.class_names is not None:
            object.__setattr__(self, 'class_names', _checked_names(self.class_names))
        for name in ('mean', 'std'):
            _check_numbers(name, getattr(self, name), least=0.0 if name == 'std' else -math.inf)
        object.__setattr__(self, 'crop', _checked_crop(self.crop))
        object.__setattr__(self, 'ignore_label', _checked_value(self.ignore_label))
        known = None if self.label_map is None else read_label_map(self.label_map)
        object.__setattr__(self, '_known_labels', known)  # once: the file may change meanwhile
        _ = self.reading  # raises where it makes no sense
        if not self.target:
            raise InputError('no target is given (use --target predicted)')
        for target in self.target:
            check_form(target)
        first_nodes(self.rule, self.steps, self.tolerance is not None)  # the rule has them

    def _check_methods(self) -> None:
        """Build the methods, once. Raises InputError: unknown ones, options they do not have, or a
        tolerance or a precision that one of them cannot keep to."""
        names = self.method.split() if isinstance(self.method, str) else self.method
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise InputError(f'method must be text, or several, not {names!r}')
        if not names or len(set(names)) < len(names):
            raise InputError('method must name different methods (use --method ig)')
        object.__setattr__(self, 'method', tuple(names))
        object.__setattr__(self, 'method_option', option_texts(self.method_option))
        built = build_methods(self.method, self.method_option, not self.no_multiply)
        object.__setattr__(self, '_methods', built)
        exact = self.precision in ('auto', 'float32')
        wanted = 'tolerance' if self.tolerance is not None else None if exact else 'precision'
        for one in built:
            if wanted and not one.declares.quadrature:
                raise InputError(
                    f'--{wanted} goes with methods whose error is estimated, which {one.name} has '
                    'no integral for (leave it out)'
                )

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, with their options."""
        return vars(self)['_methods']

    def of_method(self, name: str) -> Settings:
        """These settings for one of their methods, with the options that it has."""
        alone = build_methods([name], [], not self.no_multiply)[0]
        own = tuple(t for t in self.method_option if t.partition('=')[0] in alone.option_names)
        return replace(self, method=(name,), method_option=own)

    def _check_tile(self) -> None:
        """Raise InputError for a tile that makes no sense, or beside what makes none with it."""
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
        """What is known of each setting, by its name."""
        return {f.name: f.metadata['setting'] for f in fields(cls)}

    @property
    def steps(self) -> int:
        """Interpolation steps for each baseline; with a tolerance at most."""
        return self.num_steps if self.tolerance is None else self.max_steps

    @property
    def several_targets(self) -> bool:
        """Whether an image may have several explanations, each in a folder of its own."""
        return len(self.target) > 1 or kind_of(self.target[0]).expand is not None

    @property
    def possible_first_targets(self) -> tuple[str, ...]:
        """The targets of which one is explained first, in whatever image."""
        return (*(kind_of(target).first or target for target in self.target), 'image')

    @property
    def reading(self) -> Reading:
        """How the files of images are read. Raises InputError."""
        return Reading(self.window, self.frame, self.slice, self.crop, self.max_pixels,
                       self.normalize in OF_EACH_IMAGE)  # fmt: skip

    @property
    def known_labels(self) -> LabelMap | None:
        """What the label map says, read when the settings were made."""
        return vars(self)['_known_labels']

    def record(self) -> dict[str, object]:
        """For the statistics file; targets and methods as on the command line."""
        joined = {name: ' '.join(getattr(self, name)) for name in ('target', 'method')}
        return {**asdict(self), **joined}


def _check_numbers(name: str, values: Sequence[float] | None, least: float) -> None:
    """Raise InputError for what is no finite numbers above `least`."""
    if values is None:
        return
    try:
        fine = len(values) > 0 and all(math.isfinite(v) and v > least for v in values)
    except TypeError:
        fine = False
    if not fine:
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
    """A background class: a whole number, 'none', or None where it was not said. Raises
    InputError."""
    if value is None or value == 'none':
        return value
    try:
        number = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or isinstance(value, bool):
        raise InputError(f'background_class must be a class, from 0, or none, not {value!r}')
    return number


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, each of its own. Raises InputError."""
    fine = isinstance(names, (list, tuple)) and all(isinstance(n, str) and n for n in names)
    if not fine or len(set(names)) < len(names):
        raise InputError(f'class_names must be different names, not {names!r}')
    return tuple(names)


# --------------------------------------------------------------------------- IntegratedGradients

# What `explain` takes beside its own arguments.
OPTIONS = {name for name, known in Settings.table().items() if known.group == ATTRIBUTION}
OPTIONS = OPTIONS - {'target', 'baseline'} | {'output_kind', 'background_class', 'outputs'}


class IntegratedGradients:
    """Integrated Gradients of a segmentation network.

    model: any torch.nn.Module mapping (N, C, H, W) to logits (N, K, h, w); it is moved to the
        device and otherwise left as it was found.
    device: 'auto', 'cuda', 'mps', 'cpu' or a torch.device.
    preprocessing: how inputs were normalised; by default the model's own, else ImageNet's for
        three channels, and none (pixels from 0 to 1) for others.
    step_batch: interpolation steps per pass; by default measured.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: str | torch.device = 'auto',
        preprocessing: Preprocessing | None = None,
        step_batch: int | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.model = model.to(self.device)
        self._new_engine = partial(GradientEngine, device=self.device, step_batch=step_batch)
        self.engine = self._new_engine(self.model)
        self._network = describe_network(self.model)
        self._fingerprint = fingerprint(self.model)
        self._maps: tuple[tuple, int | None] | None = None  # when, and what `logit_maps` found
        self._seen: tuple[tuple, str | None] | None = None  # when, and what `probability_kind` gave
        own = self._network.preprocessing
        if preprocessing is None and own == Preprocessing():
            own = own.for_channels(likely_channels(self.model))
        self._given = preprocessing is not None  # by the user, who then knows the channels
        self.reference_images: ReferenceImages | None = None  # for methods that compare with others
        self.preprocessing = preprocessing or own

    @property
    def network(self) -> NetworkDescription:
        """What the network is, as it is now: described again after its weights have changed."""
        now = fingerprint(self.model)
        if now != self._fingerprint:
            self._network, self._fingerprint = describe_network(self.model), now
        return self._network

    def network_under(self, settings: Settings, seen: bool = True) -> NetworkDescription:
        """What the network is to be taken for under these settings; seen: and by what it gave."""
        known, background = self.network, settings.background_class
        found = self._seen[1] if seen and self._seen else None
        return replace(
            known,
            output_kind=settings.output_kind or known.output_kind or found,
            background=known.background if background is None
            else None if background == 'none' else background,
            class_names=settings.class_names or known.class_names,
        )  # fmt: skip

    def compute_integrated_gradients(
        self,
        input_tensor: torch.Tensor,
        baseline_type: str | torch.Tensor = 'zero',
        num_steps: int = Settings.num_steps,
        target: str | Target | torch.Tensor = 'predicted',
        **options: object,
    ) -> torch.Tensor:
        """The attributions alone: same shape and device as the input, (C, H, W) or (N, C, H, W),
        with one channel where the method does not tell channels apart.

        Each image of a batch gets its own target. Options and errors: see `explain`.
        """
        images = input_tensor if input_tensor.ndim == 4 else input_tensor.unsqueeze(0)
        if not len(images):
            raise InputError('input_tensor holds no image')
        results = [
            self.explain(
                image, target=target, baseline_type=baseline_type, num_steps=num_steps, **options
            ).attributions
            for image in images
        ]
        return torch.stack(results).reshape(*input_tensor.shape[:-3], *results[0].shape)

    def explain(
        self,
        input_tensor: torch.Tensor,
        target: str | Target | torch.Tensor = 'predicted',
        baseline_type: str | torch.Tensor = 'zero',
        num_steps: int = Settings.num_steps,
        rule: str = Settings.rule,
        **options: object,
    ) -> Explanation:
        """Explain one image. Arguments, options and errors: see `explain_targets`."""
        return self.explain_targets(
            input_tensor, [target], baseline_type, num_steps, rule, **options
        )[0]

    def explain_targets(
        self,
        input_tensor: torch.Tensor,
        targets: Sequence[str | Target | torch.Tensor],
        baseline_type: str | torch.Tensor = 'zero',
        num_steps: int = Settings.num_steps,
        rule: str = Settings.rule,
        *,
        truth: np.ndarray | None = None,
        placement: Placement | None = None,
        skip_empty: bool = False,
        progress: bool = False,
        references: torch.Tensor | None = None,
        **options: object,
    ) -> list[Explanation]:
        """Explain several targets of one image; they share the forward passes.

        input_tensor: (C, H, W) or (1, C, H, W), normalised as the model expects.
        targets: each a spec (a key of TARGETS, see --help), a Target, or an (h, w) boolean mask
            of output pixels. 'each-object' stands for as many objects as there are.
        baseline_type: a key of BASELINES, an image file, or a tensor of the input's shape in
            the same normalised space.
        num_steps, rule, and as options method (one), method_option, no_multiply, tolerance,
            max_steps, score, threshold, baseline_draws, seed, on_empty, min_object_area,
            output_kind, background_class, outputs, precision, precision_tolerance: see `Settings`
            and --help.
        truth: (h, w) class labels, for target 'truth'. placement: for target 'pixel:X,Y' in
            original image coordinates; without it X,Y are output pixels.
        skip_empty: leave out targets whose region holds no pixel, unless all are empty.
        references: (n, C, H, W), other images, for methods that compare with such; by default those
            of `reference_dir`.

        Raises InputError: wrong shapes or values, not enough memory; EmptyTargetError: a target
        region holds no pixel; NonFiniteError: logits or gradients that are not finite, also when
        computed again in float32 where precision was reduced.
        """
        if unknown := options.keys() - OPTIONS:
            raise TypeError(f'unexpected {", ".join(unknown)} (options: {", ".join(OPTIONS)})')
        settings = Settings(num_steps=num_steps, rule=rule, **options)
        return self.explain_with(settings, input_tensor, targets, baseline_type, truth, placement,
                                 skip_empty, progress, references)  # fmt: skip

    def explain_with(
        self,
        settings: Settings,
        input_tensor: torch.Tensor,
        targets: Sequence[str | Target | torch.Tensor] | None = None,
        baseline: str | torch.Tensor | Sequence[torch.Tensor] | None = None,
        truth: np.ndarray | None = None,
        placement: Placement | None = None,
        skip_empty: bool = False,
        progress: bool = False,
        references: torch.Tensor | None = None,
    ) -> list[Explanation]:
        """`explain_targets` under whole settings, of one method. targets, baseline: instead of
        theirs; of several baselines the mean is taken."""
        started = time.perf_counter()
        if len(settings.methods) > 1:
            raise InputError('an explanation is of one method (take one after the other)')
        (method,) = settings.methods
        x = self.check_input(input_tensor)  # (1, C, H, W)
        self._check_normalised()
        notes = self.see_outputs(x, settings)
        engine, network = self.engine, self.network_under(settings)
        baseline = settings.baseline if baseline is None else baseline
        if engine.network is None:  # later, the method itself finds out
            with frozen(self.model), explained_memory(self.device):
                method.check_network(self.model, x.to(engine.dtype))
        with engine.running(x):
            counts = engine.forward_passes, engine.gradient_evaluations
            forms = settings.target if targets is None else targets
            if not len(forms):
                raise InputError('no target is given (use predicted)')
            numbers = None if truth is None else torch.as_tensor(truth).long().to(x.device)
            build = partial(
                _build_targets, forms, settings, numbers, placement, skip_empty, network
            )
            at_image, masks = self._look(x, settings, network, build)
            if isinstance(baseline, str) and baseline == AUTO:
                baseline, reason = self.best_baseline(
                    self.preprocessing.to_pixels(x), at_image.targets, masks, network, placement,
                    settings, partial(self._on_baseline, x, settings),
                )  # fmt: skip
                notes += (reason,)
            pixels, tensors = self._baselines(baseline, x, settings)
            overlap = partial(mask_overlap, network.foreground(masks), network, settings.threshold)
            others, without = self._references(method, x, references, settings)
            notes += without
            work = Work(engine, at_image, tensors, settings, overlap, others)
            name = baseline if isinstance(baseline, str) else 'tensor'
            if own := method.baseline(work):
                name, pixels = own[0], self.preprocessing.to_pixels(own[1])
            found, retried = _found_by(method, work, settings, progress)
            counts = engine.forward_passes - counts[0], engine.gradient_evaluations - counts[1]
        cost = Cost(
            gradient_evaluations=counts[1],
            forward_passes=counts[0],
            seconds=time.perf_counter() - started,
            step_batch=engine.step_batch.size,
            peak_memory_bytes=peak_memory(self.device),
            precision=dtype_name(found[0].reduced or engine.dtype),
            precision_deviation=found[0].deviation,
            retried=retried,
            preparation=engine.preparation,
            cropping=at_image.crops.cropping,
        )
        explanation = partial(self._explanation, settings, network, at_image, masks, found, cost,
                              others, len(tensors), name, pixels, input_tensor.device)  # fmt: skip
        notes += (engine.output_note,) if engine.output_note else ()
        if numbers is not None:
            notes += unknown_numbers(network, masks, numbers)
        difference = None
        if method.declares.baseline != NO_BASELINE:
            image = self.preprocessing.to_pixels(x)
            difference = np.abs(image - pixels).sum(axis=2)  # (H, W)
            if placement is not None:
                difference[~placement.content(difference.shape)] = np.nan
        common = {**beside_truth(network, masks, numbers), 'notes': notes, 'difference': difference}
        return [replace(explanation(number), **common) for number in range(len(at_image.targets))]

    def _check_normalised(self) -> None:
        """Raise InputError where inputs are normalised with numbers of each image, which a tensor
        does not tell."""
        fit = self.preprocessing
        if fit.of_each == 'zscore' and not any(fit.mean) and set(fit.std) == {1.0}:
            raise InputError(
                'the input was normalised with the mean and deviation of its image, which a tensor '
                'does not tell (use explain_image, or preprocessing.of_image(image))'
            )

    def prepare(self, input_tensor: torch.Tensor, settings: Settings | None = None) -> None:
        """Prepare the network's private copy on this input, (C, H, W) or (1, C, H, W), instead of
        on the first that is explained. Raises InputError as `explain_targets` does."""
        x = self.check_input(input_tensor)
        self.see_outputs(x, settings or Settings())
        with self.engine.running(x):
            pass

    def see_outputs(self, x: torch.Tensor, settings: Settings) -> tuple[str, ...]:
        """Find out whether the network gives logits or probabilities, and have the engine run what
        gives logits. Returns what was found, in sentences. Raises InputError."""
        outputs = self.network.gives if settings.outputs == 'auto' else settings.outputs
        if outputs == LOGITS:
            self._seen = None
        elif self._seen is None or self._seen[0] != self._fingerprint[1:]:  # of its weights
            # Where the network cannot be run, that is said when it must be.
            found, _ = attempt(partial(self._probability_kind, x), Exception)
            self._seen = (self._fingerprint[1:], found)
        found = self._seen[1] if self._seen else None
        if outputs == PROBABILITIES and found is None:
            raise InputError(
                'outputs "probabilities": the network gives values beyond 0-1, or one value '
                'everywhere (leave it out)'
            )
        kind = self.network_under(settings).output_kind if found else None
        if kind != getattr(self.engine.model, 'probability_kind', None):
            self.engine = self._new_engine(LogitsOf(self.model, kind) if kind else self.model)
        if kind is None:
            return ()
        return (
            f'the network gives probabilities ({kind}), since all its outputs lie in 0-1: what is '
            'explained is the logits they are of (say otherwise with --outputs logits, or take '
            'them as they are with --score probability)',
        )

    def _probability_kind(self, x: torch.Tensor) -> str | None:
        with (
            torch.inference_mode(False),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
        ):
            return probability_kind(self.model, x.to(self.engine.dtype))

    def check_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input as (1, C, H, W) on the device, cut off from the caller's graph: float32, in
        which gradients then accumulate, or float64 for a double-precision model. Raises
        InputError."""
        self._network.check_input(tuple(tensor.shape))
        self.take_channels(tensor.shape[-3])
        working = torch.float64 if self.engine.dtype == torch.float64 else torch.float32
        tensor = tensor.detach()
        if self.device.type == 'cuda' and tensor.device.type == 'cpu':
            tensor = tensor.pin_memory()  # copied while the GPU still works on what came before
        x = tensor.to(self.device, working, non_blocking=True).reshape(1, *tensor.shape[-3:])
        if not bool(torch.isfinite(x).all()):
            raise InputError('input_tensor holds values that are not finite')
        return x

    def take_channels(self, channels: int) -> Preprocessing:
        """The preprocessing for inputs of C channels, where neither the network nor the user has
        said how many there are."""
        unknown = self._network.channels is None and not self._given
        if unknown and self.preprocessing.channels != channels:
            size = self.preprocessing.image_size
            self.preprocessing = replace(Preprocessing().for_channels(channels), image_size=size)
        return self.preprocessing

    @property
    def logit_maps(self) -> int | None:
        """How many logit maps the network gives: what is known of it, else what it gives for a
        blank input; None where it cannot be run."""
        known = self._network.source.get('classes')
        if isinstance(known, int):
            return known
        now = self._fingerprint[1:]
        if self._maps is None or self._maps[0] != now:
            found, _ = attempt(self._count_maps, Exception)
            self._maps = now, found
        return self._maps[1]

    def _count_maps(self) -> int:
        size = sides(self.preprocessing.image_size)
        blank = torch.zeros((1, self.preprocessing.channels, *size), dtype=self.engine.dtype)
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
        ):
            return segmentation_logits(self.model(blank.to(self.device)), size).shape[1]

    def baseline_images(
        self,
        kind: str,
        x: torch.Tensor,
        draws: int = 1,
        seed: int = 0,
        reading: Reading | None = None,
    ) -> list[np.ndarray]:
        """The baselines of a kind for an input (1, C, H, W), as images (H, W, C), 0-255."""
        pixels = self.preprocessing.to_pixels(x)
        return build_baselines(kind, pixels, self.preprocessing, draws, seed, reading)

    def _baselines(
        self,
        baseline: str | torch.Tensor | Sequence[torch.Tensor],
        x: torch.Tensor,
        settings: Settings,
    ) -> tuple[np.ndarray, list[torch.Tensor]]:
        """The baselines of an input, each of its shape, and the first as an image."""
        if not isinstance(baseline, str):
            given = [baseline] if isinstance(baseline, torch.Tensor) else baseline
            if any(tuple(b.shape) not in (tuple(x.shape), tuple(x.shape[1:])) for b in given):
                raise InputError(f'the baseline must have the shape {tuple(x.shape)} of the input')
            tensors = [one.detach().to(x).reshape(x.shape) for one in given]
            return self.preprocessing.to_pixels(tensors[0]), tensors
        images = self.baseline_images(
            baseline, x, settings.baseline_draws, settings.seed, settings.reading
        )
        return images[0], [self.preprocessing.normalise(image).to(x) for image in images]

    def _references(
        self,
        method: Method,
        x: torch.Tensor,
        given: torch.Tensor | None,
        settings: Settings,
    ) -> tuple[torch.Tensor | None, tuple[str, ...]]:
        """The other images (n, C, H, W) that a method compares x with; None: it does not. And what
        there is to say of them."""
        if not method.references:
            return None, ()
        if given is not None:
            if given.ndim != 4 or given.shape[1:] != x.shape[1:] or not len(given):
                raise InputError(
                    f'references must have the shape (n, {", ".join(map(str, x.shape[1:]))}) of '
                    f'images like the input, not {tuple(given.shape)}'
                )
            return given.detach().to(x)[: method.references], ()
        source = self.reference_images or references_of(settings, ())
        found = source.tensors(self.preprocessing, x, method.references)
        return found, tuple(f'left out of the reference images: {why}' for why in source.unreadable)

    def best_baseline(
        self,
        image: np.ndarray,
        targets: Sequence[Target],
        masks: torch.Tensor,
        network: NetworkDescription,
        placement: Placement | None,
        settings: Settings,
        on_baseline: Callable[[str], tuple[np.ndarray, torch.Tensor]],
    ) -> tuple[str, str]:
        """Which of CANDIDATES explains these targets of an image (H, W, C) best, and why: where
        they stand out against it, and the network does not see them in it; of those the one with
        the lowest score. on_baseline: of a kind, the baseline (H, W, C) and the logits (1, K, h, w)
        there, a forward pass each."""
        weights = torch.stack([target.weights for target in targets]).amax(dim=0)
        there = masks & (weights > 0)  # (K, h, w): what is predicted of the targets
        inside = (weights != 0).any(dim=0).cpu().numpy()
        outside = ~(inside | network.foreground(masks).cpu().numpy())
        if placement is not None:
            outside &= placement.content(outside.shape)
        found = {}
        for kind in CANDIDATES:
            pixels, logits = on_baseline(kind)
            still = (network.predicted(logits[0], settings.threshold) & there).sum() / there.sum()
            score = np.mean([float(target(logits)) for target in targets])
            stands_out = contrast(np.abs(image - pixels).sum(axis=2), inside, outside)
            stands_out = math.inf if stands_out is None else stands_out
            found[kind] = (stands_out, float(torch.nan_to_num(still)), float(score))
        best = max(row[0] for row in found.values())
        fit = {k: v for k, v in found.items() if v[1] <= STILL_PREDICTED}
        fit = {k: v for k, v in fit.items() if v[0] >= LEAST_CONTRAST * best} or fit or found
        chosen = min(fit, key=lambda kind: fit[kind][2])
        said = ', '.join(f'{k} {v[0]:.2g} ({v[1]:.0%})' for k, v in found.items())
        return chosen, (
            f'baseline auto: {chosen}; contrast of the target against each, and how much of it is '
            f'still predicted there: {said}'
        )

    def _on_baseline(
        self, x: torch.Tensor, settings: Settings, kind: str
    ) -> tuple[np.ndarray, torch.Tensor]:
        """A baseline of an input as an image (H, W, C), and the logits (1, K, h, w) there."""
        pixels, tensors = self._baselines(kind, x, settings)
        with torch.no_grad():
            return pixels, enlarged(self.engine.run(tensors[0]), x.shape[-2:])

    def _look(
        self,
        x: torch.Tensor,
        settings: Settings,
        network: NetworkDescription,
        build: Callable[[torch.Tensor, torch.Tensor], list[Target]],
    ) -> tuple[AtImage, torch.Tensor]:
        """What the network says of the image itself: prediction and targets, from the whole map.
        Also the predicted masks, (K, h, w) bool."""
        with torch.no_grad():
            logits = enlarged(self.engine.run(x), x.shape[-2:])  # (1, K, h, w)
        masks = network.predicted(logits[0], settings.threshold)
        targets = build(logits, masks)
        view = self.engine.compared_crops(x, logits, targets)
        return AtImage(x, logits, targets, None, view), masks

    def _explanation(
        self,
        settings: Settings,
        network: NetworkDescription,
        at_image: AtImage,
        masks: torch.Tensor,
        found: Sequence[Found],
        cost: Cost,
        others: torch.Tensor | None,
        draws: int,
        baseline: str,
        baseline_pixels: np.ndarray,
        device: torch.device,
        number: int,
    ) -> Explanation:
        """The result for one of the targets."""
        target, one, (method,) = at_image.targets[number], found[number], settings.methods
        declared = method.declares
        mask, prediction = network.explained(at_image.logits, masks, target.label)
        total = float(one.attributions.cpu().double().sum()) if one.total is None else one.total
        return Explanation(
            attributions=one.attributions.to(device),
            uncertainty=one.uncertainty,
            prediction=prediction.cpu(),
            predicted_mask=mask.cpu(),
            region=target.region.cpu(),
            baseline_pixels=baseline_pixels,
            target=target.name,
            objective=replace(target, weights=target.weights.cpu()),
            baseline=None if declared.baseline == NO_BASELINE else baseline,
            rule=method.rule_name(settings.rule) if declared.quadrature else None,
            steps=one.evaluations,
            score=float(target(at_image.logits)),
            baseline_score=one.start_score,
            attribution_sum=total,
            map_error=one.map_error,
            tolerance=settings.tolerance,
            trend=one.trend,
            cost=cost,
            draws=draws if declared.baseline == GIVEN else 1,
            method=declared,
            end_score=one.end_score,
            sum_error=one.total_error,
            fine=one.fine,
            again=partial(method.map_for_check, settings.seed, others),
        )


def _found_by(
    method: Method, work: Work, settings: Settings, progress: bool
) -> tuple[list[Found], str | None]:
    """What a method finds, in the precision that was asked for, or why that was not possible."""
    with tqdm(total=method.steps_in_all(work), unit='', leave=False, disable=not progress,
              desc=f'{method.name}, {method.counts}') as bar:  # fmt: skip

        def found_in(precision: str) -> list[Found]:
            own = settings
            if precision != settings.precision:
                own = replace(settings, precision=precision)
            return method.explain(replace(work, settings=own, on_steps=bar.update))

        # Where no error of the map is estimated, reduced precision could not be judged.
        wanted = settings.precision if method.declares.quadrature else 'float32'
        return in_precision(found_in, wanted)


def _build_targets(
    forms: Sequence[str | Target | torch.Tensor],
    settings: Settings,
    truth: torch.Tensor | None,
    placement: Placement | None,
    skip_empty: bool,
    network: NetworkDescription,
    logits: torch.Tensor,
    masks: torch.Tensor,
) -> list[Target]:
    """The target objects of whatever forms of targets the caller gave."""
    if truth is not None and truth.shape != masks.shape[-2:]:
        raise InputError(
            f'truth has shape {tuple(truth.shape)}, the prediction {tuple(masks.shape[-2:])}'
        )
    context = TargetContext(logits[0], masks, truth, placement, network, settings.min_object_area)
    return build_targets(forms, settings.score, context, skip_empty, settings.on_empty)


def unknown_numbers(
    network: NetworkDescription, masks: torch.Tensor, numbers: torch.Tensor
) -> tuple[str, ...]:
    """A sentence on numbers of a ground-truth mask (h, w) for which a network has no class."""
    first = 1 if network.kind(masks) == MULTILABEL else 0
    there = torch.unique(numbers).tolist()
    unknown = [n for n in there if n >= len(masks) + first] if len(masks) > 1 else []
    if not unknown:
        return ()
    return (
        f'the ground truth holds {", ".join(map(str, unknown[:5]))}, for which the network has no '
        f'class ({first} to {len(masks) + first - 1}): such pixels count as wrong',
    )


def beside_truth(
    network: NetworkDescription, masks: torch.Tensor, numbers: torch.Tensor | None
) -> dict[str, object]:
    """What an explanation holds of the ground truth. masks: (K, h, w) bool, those predicted.
    numbers: (h, w), None where it is unknown."""
    if numbers is None:
        return {'label_scores': None, 'counted': None}
    ignored = bool((numbers < 0).any())
    return {
        'label_scores': scores_of_labels(network, masks, numbers),
        'counted': (numbers >= 0).cpu().numpy() if ignored else None,
    }


def scores_of_labels(
    network: NetworkDescription, masks: torch.Tensor, numbers: torch.Tensor
) -> LabelScores | None:
    """How well each label was predicted; None for one class. masks: (K, h, w) bool, those
    predicted. numbers: (h, w), of the ground-truth mask."""
    if len(masks) == 1:
        return None
    kind = network.kind(masks)
    counted = numbers >= 0
    masks, truth = masks[:, counted], network.drawn(numbers, masks)[:, counted]  # (K, pixels)
    if not counted.any():
        return None
    exclusive = kind == EXCLUSIVE
    right = (masks & truth).any(dim=0) if exclusive else masks == truth
    background = network.background if exclusive else None
    scores = label_scores(masks.cpu().numpy(), truth.cpu().numpy())
    return LabelScores(scores, background, float(right.cpu().double().mean()))


# --------------------------------------------------------------------------- one image


def input_preprocessing(model: torch.nn.Module, settings: Settings) -> Preprocessing:
    """How images become input of this model: by the settings, else as stored with the checkpoint,
    else by default (640, stretched, ImageNet's mean and std).

    The image size is rounded up to one that the network takes.
    """
    network = known_description(model)
    channels = network.channels or likely_channels(model)
    own = network.preprocessing.for_channels(channels)  # as it was found at loading
    scale = PIXEL_RANGES[settings.pixel_range]
    as_they_are = (0.0,) * channels, (1.0 / scale,) * channels
    mean, std = own.mean, own.std
    if settings.normalize == 'imagenet':
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif settings.normalize != 'auto' or settings.pixel_range != '0-1':
        mean, std = as_they_are
    of_each = settings.normalize if settings.normalize in OF_EACH_IMAGE else None
    if of_each and (settings.mean or settings.std or settings.pixel_range != '0-1'):
        raise InputError(
            f'--normalize {of_each} takes its numbers from each image, so it goes without --mean, '
            '--std and --pixel_range'
        )
    alone = (settings.mean is None) != (settings.std is None)
    if alone and (mean, std) == (IMAGENET_MEAN, IMAGENET_STD):
        raise InputError("--mean and --std go together (the other would be ImageNet's)")
    mean = mean if settings.mean is None else tuple(value / scale for value in settings.mean)
    std = std if settings.std is None else tuple(value / scale for value in settings.std)
    if settings.mean is not None and max(map(abs, mean)) > 1:
        raise InputError(
            f'mean {settings.mean} cannot be of pixels from 0 to {scale:g} (with --pixel_range '
            '0-255 it is of pixels up to 255)'
        )
    if network.channels is None and settings.mean is not None:  # then the user says it
        channels = len(mean)
    if not len(mean) == len(std) == channels:
        raise InputError(
            f'the network takes {channels} channel{"s" if channels > 1 else ""}, but mean has '
            f'{len(mean)} numbers and std {len(std)} (give {channels} each with --mean and --std)'
        )
    wanted = settings.tile or settings.image_size or own.image_size
    size = size_taken(model, network, channels, wanted)
    resize = 'stretch' if settings.tile else settings.resize or own.resize
    order = settings.channel_order or own.channel_order
    if order != 'rgb' and channels != 3:
        raise InputError(f'channel_order {order} needs 3 channels; the network takes {channels}')
    return Preprocessing(size, resize, mean, std, order, of_each)


def size_taken(
    model: torch.nn.Module, network: NetworkDescription, channels: int, wanted: ImageSize
) -> ImageSize:
    """The input size of a network from `wanted` on."""
    size = network.accepted_size(wanted)
    if size != wanted and 'model_factory' in network.source:  # which says nothing of sizes
        return wanted if runs_at(model, channels, sides(wanted)) else size
    return size


@dataclass(frozen=True)
class ModelInput:
    """An image and its truth as the network takes them."""

    x: torch.Tensor  # (1, C, H, W)
    truth: np.ndarray | None  # (H, W) labels
    placement: Placement

    @classmethod
    def of(
        cls,
        preprocessing: Preprocessing,
        image: np.ndarray,
        truth: np.ndarray | None,
        origin: tuple[int, int] = (0, 0),
        nothing: int = 0,
    ) -> ModelInput:
        """image: (H0, W0, C), or (H0, W0) of one channel. truth: (H0, W0) labels; below 0: pixels
        that do not count. origin: (x, y) of the image in a larger one that it was cut from.
        nothing: the label of letterbox padding."""
        image = image[:, :, None] if image.ndim == 2 else image
        if image.shape[2] != preprocessing.channels:
            raise InputError(
                f'the image has {image.shape[2]} channels, but the network takes '
                f'{preprocessing.channels} (read it with read_image(path, channels))'
            )
        return cls(
            preprocessing.normalise(preprocessing.resize_image(image)),
            None if truth is None else preprocessing.resize_mask(truth, nothing),
            replace(preprocessing.place(image.shape[:2]), origin=origin),
        )

    def example(self, ig: IntegratedGradients) -> torch.Tensor:
        """What the network may be prepared on."""
        return self.x

    def explain(
        self, ig: IntegratedGradients, settings: Settings, progress: bool
    ) -> list[tuple[Explanation, np.ndarray | None]]:
        """For each target, and each method, the explanation, and the pixels (H, W) bool that truly
        are of its class, if known. Of several targets, empty ones are left out."""
        explained = partial(
            ig.explain_with, input_tensor=self.x, truth=self.truth, placement=self.placement,
            skip_empty=True, progress=progress,
        )  # fmt: skip
        by_method = [explained(settings.of_method(name)) for name in settings.method]
        explanations = [one for of_target in zip(*by_method, strict=True) for one in of_target]
        if self.truth is None:
            return [(explanation, None) for explanation in explanations]
        return [(one, one.objective.explained(self.truth)) for one in explanations]


@dataclass(frozen=True)
class TiledInput:
    """A picture and its truth, which the network takes tile by tile, in the picture's pixels."""

    image: np.ndarray  # (H, W, C), 0-255
    truth: np.ndarray | None  # (H, W) labels
    placement: Placement  # in itself
    tiling: Tiling

    @classmethod
    def of(
        cls,
        ig: IntegratedGradients,
        image: np.ndarray,
        truth: np.ndarray | None,
        settings: Settings,
        origin: tuple[int, int] = (0, 0),
    ) -> TiledInput:
        """See `ModelInput.of`."""
        image = image[:, :, None] if image.ndim == 2 else image
        size = image.shape[:2]
        tile = sides(size_taken(ig.model, ig.network, image.shape[2], settings.tile))
        overlap = settings.overlap
        overlap = min(tile) // DEFAULT_OVERLAP if overlap is None else overlap
        truth = None if truth is None else over_image(truth, size)
        return cls(image, truth, Placement(size, 0, 0, *size, origin), Tiling(size, tile, overlap))

    def input_of(self, ig: IntegratedGradients, picture: np.ndarray, tile: Tile) -> torch.Tensor:
        """What the network takes, (1, C, h, w), of a tile of the image or of a baseline."""
        return ig.preprocessing.normalise(self.tiling.cut(picture, tile))

    def example(self, ig: IntegratedGradients) -> torch.Tensor:
        """What the network may be prepared on: a tile that shows something, if any does."""
        return self.input_of(ig, self.image, self.tiling.middle)

    def logits(
        self,
        ig: IntegratedGradients,
        picture: np.ndarray,
        tiles: Sequence[Tile],
        progress: bool = False,
    ) -> torch.Tensor:
        """The network's logits (1, K, H, W) on a picture, put together from tiles; 0 beside them.
        Each pixel's come from the tile that it belongs to."""
        whole, last = None, None
        with ig.engine.running(ig.check_input(self.example(ig))), torch.no_grad():
            for tile in tqdm(tiles, 'prediction', unit='tile', leave=False, disable=not progress):
                x = self.input_of(ig, picture, tile)
                if last is None or not torch.equal(x, last):  # of one colour many are alike
                    found = enlarged(ig.engine.run(ig.check_input(x)), self.tiling.tile).cpu()
                    last = x
                if whole is None:
                    whole = torch.zeros((1, found.shape[1], *self.tiling.size))
                whole[..., tile.own_rows, tile.own_columns] = found[(..., *tile.own)].float()
        return whole

    def explain(
        self, ig: IntegratedGradients, settings: Settings, progress: bool
    ) -> list[tuple[Explanation, np.ndarray | None]]:
        """As `ModelInput.explain`, for the whole picture."""
        started = time.perf_counter()
        notes = ig.see_outputs(ig.check_input(self.example(ig)), settings) + self._padding_note()
        engine, network = ig.engine, ig.network_under(settings)
        counts = engine.forward_passes, engine.gradient_evaluations
        logits = self.logits(ig, self.image, self.tiling.tiles, progress)  # (1, K, H, W)
        masks = network.predicted(logits[0], settings.threshold)
        numbers = None if self.truth is None else torch.as_tensor(self.truth).long()
        targets = _build_targets(settings.target, settings, numbers, self.placement, True, network,
                                 logits, masks)  # fmt: skip
        name = settings.baseline
        if name == AUTO:
            name, reason = ig.best_baseline(
                self.image, targets, masks, network, None, settings,
                partial(self._on_baseline, ig, settings, self._holding(targets)),
            )  # fmt: skip
            notes += (reason,)
        baselines = self._baselines(ig, settings, name)
        mosaics = self._explain_tiles(ig, settings, targets, baselines, progress)
        on_baseline = self.logits(ig, baselines[0], self.tiling.tiles)
        overlap = partial(mask_overlap, network.foreground(masks), network, settings.threshold)
        cost = cost_of(
            [cost for mosaic in mosaics for cost in mosaic.costs],
            engine.gradient_evaluations - counts[1],
            engine.forward_passes - counts[0],
            time.perf_counter() - started,
        )
        notes += (engine.output_note,) if engine.output_note else ()
        if numbers is not None:
            notes += unknown_numbers(network, masks, numbers)
        common = {
            'baseline_pixels': baselines[0], 'baseline': name, 'rule': settings.rule, 'cost': cost,
            'draws': len(baselines), 'tolerance': settings.tolerance, 'notes': notes,
            'difference': np.abs(self.image - baselines[0]).sum(axis=2),
            **beside_truth(network, masks, numbers),
        }  # fmt: skip
        iou = float(overlap(on_baseline)[0])
        found = []
        for target, mosaic in zip(targets, mosaics, strict=True):
            mask, prediction = network.explained(logits, masks, target.label)
            explanation = Explanation(
                attributions=mosaic.attributions, uncertainty=mosaic.uncertainty,
                prediction=prediction, predicted_mask=mask, region=target.region,
                target=target.name, objective=target, steps=mosaic.steps, score=mosaic.score,
                baseline_score=mosaic.baseline_score, attribution_sum=mosaic.attribution_sum,
                map_error=mosaic.map_error, trend=mosaic.trend(iou), tiles=mosaic.tiles, **common,
            )  # fmt: skip
            known = None if self.truth is None else target.explained(self.truth)
            found.append((explanation, known))
        return found

    def _padding_note(self) -> tuple[str, ...]:
        """Whether the picture is smaller than a tile, in words."""
        (height, width), tile = self.tiling.size, self.tiling.tile
        if height >= tile[0] and width >= tile[1]:
            return ()
        return (
            f'the image of {width}×{height} is smaller than a tile of {tile[1]}×{tile[0]}: it was '
            'padded black',
        )

    def _holding(self, targets: Sequence[Target]) -> list[Tile]:
        """The tiles to which pixels of the targets belong."""
        held = torch.stack([target.region for target in targets]).any(dim=0)
        return [t for t in self.tiling.tiles if bool(held[t.own_rows, t.own_columns].any())]

    def _baselines(
        self, ig: IntegratedGradients, settings: Settings, kind: str
    ) -> list[np.ndarray]:
        """The baselines of the whole picture, (H, W, C) float32: each tile gets its part."""
        pixels = self.image.astype(np.float32)
        draws, seed = settings.baseline_draws, settings.seed
        return build_baselines(kind, pixels, ig.preprocessing, draws, seed, settings.reading)

    def _on_baseline(
        self, ig: IntegratedGradients, settings: Settings, tiles: Sequence[Tile], kind: str
    ) -> tuple[np.ndarray, torch.Tensor]:
        """A baseline of the picture, and the logits on it in some tiles."""
        (pixels,) = self._baselines(ig, settings, kind)
        return pixels, self.logits(ig, pixels, tiles)

    def _explain_tiles(
        self,
        ig: IntegratedGradients,
        settings: Settings,
        targets: Sequence[Target],
        baselines: Sequence[np.ndarray],
        progress: bool,
    ) -> list[Mosaic]:
        """The map of each target. Targets that share a tile share its forward passes."""
        mosaics = [Mosaic(self.tiling, self.image.shape[2]) for _ in targets]
        tiles = tqdm(self._holding(targets), 'attributions', unit='tile', leave=False,
                     disable=not progress)  # fmt: skip
        for tile in tiles:
            parts = [self.tiling.part_of(target, tile) for target in targets]
            own = [part for _, part in parts if part is not None]
            found = ig.explain_with(
                settings, self.input_of(ig, self.image, tile),
                [replace(part, weights=part.weights.to(ig.device)) for part in own],
                [self.input_of(ig, one, tile)[0] for one in baselines],
            )  # fmt: skip
            left = iter(found)
            for mosaic, (share, part) in zip(mosaics, parts, strict=True):
                if part is not None:
                    mosaic.add(tile, share, next(left))
        return mosaics


def explain_image(
    ig: IntegratedGradients,
    image: np.ndarray,
    settings: Settings,
    truth: np.ndarray | None = None,
    progress: bool = False,
) -> list[tuple[Explanation, np.ndarray | None]]:
    """Explain an image as it was read: (H0, W0, C), 0-255, with (H0, W0) truth labels if known.

    Returns for each target, and each method, the explanation and the truth of the explained class
    at model resolution, (H, W) bool or None. Of several targets, empty ones are left out. Where all
    are empty and `settings.on_empty` is 'image', the whole image is explained.
    """
    truth = counted_truth(ig, truth, settings)[0]
    with _normalised(ig, ReadImage(image, truth), settings) as given:
        return given.explain(ig, settings, progress)


@contextlib.contextmanager
def _normalised(
    ig: IntegratedGradients, read: ReadImage, settings: Settings
) -> Iterator[ModelInput | TiledInput]:
    """An image as the network takes it; while it is explained, its baselines are normalised with
    its own numbers, where those of each image are wanted."""
    image, background = read.image, ig.network_under(settings).background
    nothing = IGNORED if background is None else background
    common = ig.take_channels(image.shape[2] if image.ndim == 3 else 1)
    try:
        if settings.tile is None:
            ig.preprocessing = common.of_image(image)
            yield ModelInput.of(ig.preprocessing, image, read.truth, read.origin, nothing)
        else:
            given = TiledInput.of(ig, image, read.truth, settings, read.origin)
            whole = replace(common, image_size=given.tiling.size, resize='stretch')
            ig.preprocessing = replace(whole.of_image(image), image_size=given.tiling.tile)
            yield given
    finally:
        ig.preprocessing = common


def counted_truth(
    ig: IntegratedGradients, truth: np.ndarray | None, settings: Settings
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """A truth (H, W) from the caller, its ignore label below 0: that of the settings, else 255
    beside the numbers of classes; and what is to be said of it."""
    if truth is None or truth.dtype.kind not in 'ui':
        return truth, ()
    value, notes = settings.ignore_label, ()
    if value is None:
        values = set(np.unique(truth).tolist())
        known = (VOID in values and truth_reading(ig, settings).numbers) or 0
        if known > VOID:
            return truth, ()
        if max(values - {VOID}, default=0) not in range(1, known):
            return truth, ()
        value, notes = VOID, (
            f'the truth holds {VOID} beside class numbers: taken as "ignore", which counts in no '
            'score and no target',
        )  # fmt: skip
    return np.where(truth == value, np.int16(IGNORED), truth.astype(np.int16)), notes


def truth_reading(ig: IntegratedGradients, settings: Settings) -> TruthReading:
    """What is known when ground truths are read for a network under these settings."""
    said = TruthReading(
        label_map=settings.known_labels,
        ignore_label=settings.ignore_label,
        pixels=settings.reading,
    )
    count, network = ig.logit_maps, ig.network_under(settings)
    if count is None:
        return said
    kind = network.kind(torch.empty(count, 1, 1))
    if kind == EXCLUSIVE:
        return replace(said, numbers=count, background=network.background)
    return replace(said, numbers=count + 1, one_class=count == 1)


def analyse_image(
    ig: IntegratedGradients,
    name: str,
    image: np.ndarray,
    truth: np.ndarray | None,
    settings: Settings,
    progress: bool = False,
    class_names: Mapping[int, str] | None = None,
) -> list[Description]:
    """Explain an image: for each target its statistics, and what its figures are drawn from.

    Arguments and errors as for `explain_image`; the figures are
    `attribution_figure(view_of(arrays), statistics)` and `channels_figure(...)`. class_names: of
    the dataset, by the numbers in its masks, where neither settings nor network name the classes.
    """
    truth, notes = counted_truth(ig, truth, settings)
    read = ReadImage(image, truth, class_names=class_names or {}, notes=notes)
    return describe_read(ig, name, read, settings, progress)


@dataclass(frozen=True)
class ReadImage:
    """An image and its truth, as they were read."""

    image: np.ndarray  # (H, W, C), 0-255
    truth: np.ndarray | None  # (H, W) labels; below 0: pixels that do not count
    origin: tuple[int, int] = (0, 0)  # (x, y) of the image in a larger one that it was cut from
    class_names: Mapping[int, str] = field(default_factory=dict)  # of the dataset
    notes: tuple[str, ...] = ()  # on the reading, in sentences
    value_range: tuple[float, float] | None = None  # of the file's values
    geometry: Geometry | None = None  # of a slice in its volume
    whole_size: tuple[int, int] | None = None  # (height, width), where it was cut out

    def placement(self) -> dict[str, object]:
        """Where it lies, for the statistics file."""
        slice_of = self.geometry and {'axis': self.geometry.axis, 'index': self.geometry.index}
        size = self.whole_size or self.image.shape[:2]
        return {'size': list(size), 'origin': list(self.origin), **(slice_of or {})}


def describe_read(
    ig: IntegratedGradients, name: str, read: ReadImage, settings: Settings, progress: bool
) -> list[Description]:
    """`analyse_image` of what was read."""
    with _normalised(ig, read, settings) as given:
        return _described(ig, name, read, given, settings, progress)


def _described(
    ig: IntegratedGradients,
    name: str,
    read: ReadImage,
    given: ModelInput | TiledInput,
    settings: Settings,
    progress: bool,
) -> list[Description]:
    image, truth = read.image, read.truth
    results = given.explain(ig, settings, progress)
    common = {
        'notes': [
            *ig.network.notes,
            *read.notes,
            *notes_on(image, truth, settings, [one for one, _ in results]),
        ],
        'targets': list(dict.fromkeys(one.target for one, _ in results)),
        'methods': list(settings.method),
        'settings': settings_record(ig, settings),
        'versions': versions(),
        'channel_names': list(ig.preprocessing.channel_names),
        'value_range': read.value_range and list(read.value_range),
        'placement': read.placement(),
    }
    described = []
    for explanation, explained_truth in results:
        statistics = {
            'image': name, **explanation_statistics(explanation, explained_truth), **common
        }  # fmt: skip
        by_class = statistics['class_scores']
        if by_class is not None:
            names = names_of_labels(ig, explanation, settings, read.class_names)
            statistics['class_scores'] = {names[int(k)]: scores for k, scores in by_class.items()}
        if settings.evaluate:
            statistics |= evaluate_explanation(
                ig, given.x, explanation, settings.evaluate, explained_truth, given.placement,
                settings.seed, progress,
            )  # fmt: skip
        statistics['verdict'] = verdict_of(statistics, settings.thresholds)
        arrays = display_arrays(explanation, image, explained_truth, given.placement)
        if settings.segments:
            regions = ranked_regions(explanation, ig.preprocessing.to_pixels(given.x))
            statistics |= regions.statistics()
            arrays['regions'] = regions.ranks
        described.append((statistics, arrays))
    return described


def ranked_regions(explanation: Explanation, pixels: np.ndarray) -> Regions:
    """Regions of the image (H, W, C), 0-255, by the |attribution| they carry."""
    magnitude = explanation.attributions.cpu().abs().sum(dim=0).double().numpy()
    return rank_regions(magnitude, segments_of(pixels))


def names_of_labels(
    ig: IntegratedGradients,
    explanation: Explanation,
    settings: Settings,
    of_dataset: Mapping[int, str],
) -> list[str]:
    """The names of all labels of a network: those of the settings, else of the checkpoint, else of
    the dataset, else their numbers. Raises InputError where there are too few or too many."""
    masks = explanation.objective.weights
    names = ig.network_under(settings).class_names
    if names and len(names) != len(masks):
        raise InputError(
            f'class_names gives {len(names)} names, but the network has {len(masks)} classes '
            '(name all in order, the background too)'
        )
    first = 1 if explanation.objective.network.kind(masks) == MULTILABEL else 0
    if not names and len(set(of_dataset.values())) == len(of_dataset):
        names = [of_dataset.get(k + first, str(k)) for k in range(len(masks))]
    names = list(names or map(str, range(len(masks))))
    of_map = settings.known_labels.names if settings.known_labels else {}
    for number, own in of_map.items():  # which win over all others
        if 0 <= number - first < len(names):
            names[number - first] = own
    if len(set(names)) < len(names):
        raise InputError(
            f'the label map {settings.label_map} gives a class the name of another one '
            '(name all classes in it)'
        )
    return names


describe_targets = analyse_image  # its name in earlier versions


def describe_image(
    ig: IntegratedGradients,
    name: str,
    image: np.ndarray,
    truth: np.ndarray | None,
    settings: Settings,
    progress: bool = False,
) -> Description:
    """The first (with one target: the only) entry of `analyse_image`."""
    return analyse_image(ig, name, image, truth, settings, progress)[0]


def notes_on(
    image: np.ndarray,
    truth: np.ndarray | None,
    settings: Settings,
    explanations: Sequence[Explanation],
) -> list[str]:
    """What was decided or left out, in sentences."""
    notes = []
    if truth is not None and truth.shape != image.shape[:2]:
        notes.append(
            f'the mask is {truth.shape[1]}×{truth.shape[0]}, the image '
            f'{image.shape[1]}×{image.shape[0]}: the mask was resized (nearest neighbour)'
        )
    notes += explanations[0].notes
    targets = list(dict.fromkeys(one.target for one in explanations))
    asked = [target for target in settings.target if kind_of(target).expand is None]
    left_out = [target for target in asked if target not in targets]
    if targets == ['image'] and 'image' not in settings.target:
        wanted = ' '.join(settings.target)
        notes.append(f'target "{wanted}" was empty: the whole image was explained')
    elif left_out:
        notes.append(f'empty, so left out: target {", ".join(left_out)}')
    if explanations[0].cost.retried:
        notes.append(explanations[0].cost.retried)
    if explanations[0].cost.preparation.fell_back:
        notes.append(
            'the faster copy of the network did not compute quite the same: the original was used'
        )
    return notes


def settings_record(ig: IntegratedGradients, settings: Settings) -> dict:
    """All settings as they took effect and the network's identity, for the statistics file."""
    record = {
        **settings.record(),
        **asdict(ig.preprocessing),
        **ig.network_under(settings, seen=False).record(),
        'device': str(ig.device),
    }
    counts = [method.references for method in settings.methods if method.references]
    if counts:
        source = ig.reference_images or references_of(settings, ())
        record['references_sha256'] = source.sha256(max(counts))
    if settings.known_labels is not None:
        record['label_map_sha256'] = settings.known_labels.sha256
    if settings.baseline not in BASELINES and Path(settings.baseline).is_file():
        content = Path(settings.baseline).read_bytes()
        record['baseline_sha256'] = hashlib.sha256(content).hexdigest()
    return record


def references_of(settings: Settings, samples: Sequence[Sample]) -> ReferenceImages:
    """The images that methods may compare with: those of the folder that the settings name, else
    these. Raises InputError for an unusable folder."""
    if settings.reference_dir is not None:
        try:
            samples = list_samples(settings.reference_dir)
        except InputError as error:
            raise InputError(f'--reference_dir: {error}') from None
    return ReferenceImages(samples, settings.reading)


# --------------------------------------------------------------------------- one sample


@dataclass(frozen=True)
class Output:
    """Where results go, and what is written."""

    folder: Path
    figures: str = 'all'  # of each image, a key of FIGURES
    overwrite: bool = False  # compute finished images again
    export: str | None = None  # a key of EXPORTS: maps in the geometry of their images

    def __post_init__(self) -> None:
        check_choice('figures', self.figures, FIGURES)
        if self.export is not None:
            check_choice('export', self.export, EXPORTS)
        if self.export == 'nifti':
            check_nifti()  # before hours are spent
        object.__setattr__(self, 'folder', Path(self.folder))


@dataclass(frozen=True)
class LoadedSample:
    """A sample as it was read."""

    sample: Sample
    read: ReadImage

    @property
    def image(self) -> np.ndarray:
        """(H, W, C), 0-255."""
        return self.read.image

    @property
    def truth(self) -> np.ndarray | None:
        """(H, W) labels; None: unknown."""
        return self.read.truth

    @classmethod
    def of(
        cls,
        sample: Sample,
        channels: int = 3,
        settings: Settings | None = None,
        known: TruthReading | None = None,
    ) -> LoadedSample:
        """Read a sample for a network of so many channels. known: of `truth_reading`. Raises
        InputError where it cannot."""
        settings, known = settings or Settings(), known or TruthReading()
        loaded = sample.load(channels, settings.reading)
        truth, said = _truth_of(sample, loaded, known, settings)
        size, crop, name = loaded.pixels.shape[:2], settings.crop, str(sample.image_path)
        if truth is not None and crop is not None:
            truth = crop_image(over_image(truth, size), crop, name)
        read = ReadImage(
            image=crop_image(loaded.pixels, crop, name),
            truth=truth,
            origin=crop[:2] if crop else (0, 0),
            class_names={} if truth is None else sample.names_of_classes(known),
            notes=(*sample.notes, *loaded.notes, *said, *_memory_note(size, settings)),
            value_range=loaded.value_range,
            geometry=loaded.geometry,
            whole_size=size,
        )
        return cls(sample, read)


def _truth_of(
    sample: Sample, image: LoadedImage, known: TruthReading, settings: Settings
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The truth of a sample as it lies over its image, and what is to be said of it. Raises
    InputError where it is needed and cannot be used."""
    labels = sample.labels(known)
    truth, notes = labels.values, labels.notes
    if truth is not None:
        truth, said = fitted_truth(image, truth)
        notes += said
    needed = [target for target in settings.target if target in NEED_TRUTH]
    if truth is None and sample.read_truth is not None and needed and notes:
        raise InputError(f'target "{needed[0]}" of {sample.image_path}: {notes[-1]}')
    return truth, notes


def _memory_note(size: tuple[int, int], settings: Settings) -> tuple[str, ...]:
    """What a very large image needs, in words."""
    pixels, tiled = size[0] * size[1], settings.tile is not None
    if pixels <= (LARGE_IN_TILES if tiled else MOST_PIXELS):
        return ()
    memory = pixels * (TILED_BYTES_A_PIXEL if tiled else BYTES_A_PIXEL) / 2**30
    return (f'an image of {pixels:,} pixels, which takes about {memory:.1f} GiB',)


@dataclass(frozen=True)
class Pending:
    """A sample, and what an earlier run has left of it."""

    loaded: LoadedSample
    key: str  # see `resume_key`
    finished: list[dict] | None  # of its targets and methods, where it need not be computed

    @classmethod
    def of(cls, loaded: LoadedSample, settings: Settings, record: dict, output: Output) -> Pending:
        """record: of `settings_record`."""
        key = resume_key(record, loaded.image, loaded.truth)
        finished = None
        if not output.overwrite:
            finished = finished_statistics(
                output.folder, naming_of(loaded.sample.name, settings),
                settings.possible_first_targets, key,
            )  # fmt: skip
        return cls(loaded, key, finished)


def naming_of(name: str, settings: Settings) -> Naming:
    """How the folders of an image are named under these settings."""
    return Naming(name, settings.several_targets, settings.method)


def statistics_of(
    ig: IntegratedGradients,
    pending: Pending,
    settings: Settings,
    output: Output,
    progress: bool = False,
) -> tuple[list[dict], Callable[[], object] | None]:
    """The statistics of a sample's targets, explained if need be, and what writes its files: None
    where they are there already."""
    if pending.finished is not None:
        judged = [judged_again(one, settings.thresholds, output.folder) for one in pending.finished]
        if missing_figures(output.folder, judged, output.figures):
            return judged, partial(redraw_missing, output.folder, judged, output.figures)
        return judged, None
    loaded, name = pending.loaded, pending.loaded.sample.name
    described = describe_read(ig, name, loaded.read, settings, progress)
    naming = naming_of(name, settings)
    for statistics, _ in described:
        statistics |= {
            'image_path': str(loaded.sample.image_path),
            'mask_flags': loaded.sample.mask_flags or None,
            'folder': naming.folder(statistics['target'], statistics['method']),
            'resume_key': pending.key,
        }
    by_target = [statistics for statistics, _ in described]
    return by_target, partial(write_image, output.folder, described, output.figures)


def analyse_loaded(
    ig: IntegratedGradients,
    loaded: LoadedSample,
    settings: Settings,
    output: Output,
    progress: bool = False,
) -> list[dict]:
    """`analyse_sample` of a sample that was read already."""
    pending = Pending.of(loaded, settings, settings_record(ig, settings), output)
    by_target, write = statistics_of(ig, pending, settings, output, progress)
    if write is not None:
        write()
    return by_target


def analyse_sample(
    ig: IntegratedGradients,
    sample: Sample,
    settings: Settings,
    output_dir: Path,
    progress: bool = False,
    figures: str = 'all',
    overwrite: bool = False,
) -> list[dict]:
    """Explain one sample and write its files for each target.

    figures: a key of FIGURES. Returns the contents of the statistics files. A sample that was
    finished before under the same settings, image, truth and network is read back instead,
    unless `overwrite`. Raises InputError for an unusable sample, OutputError if writing fails.
    """
    output = Output(output_dir, figures, overwrite)
    known = truth_reading(ig, settings)
    loaded = LoadedSample.of(sample, ig.preprocessing.channels, settings, known)
    return analyse_loaded(ig, loaded, settings, output, progress)


# --------------------------------------------------------------------------- many samples


def batch_integrated_gradients_analysis(
    model_path: str | Path,
    data_dir: str | Path,
    output_dir: str | Path = 'integrated_gradients_results',
    num_samples: int | None = 10,
    baseline_type: str = 'zero',
    num_steps: int = Settings.num_steps,
    *,
    split: str | None = None,
    images_dir: str | Path | None = None,
    masks_dir: str | Path | None = None,
    mask_suffix: str | None = None,
    mask_prefix: str | None = None,
    mask_name: str | None = None,
    encoder: str | None = None,
    architecture: str | None = None,
    weights_key: str | None = None,
    model_options: dict[str, object] | None = None,
    model_factory: str | None = None,
    device: str | torch.device = 'auto',
    figures: str = 'all',
    overwrite: bool = False,
    export: str | None = None,
    before_image: Callable[[], object] = lambda: None,
    share: Share | None = None,
    **options: object,
) -> BatchResult:
    """Explain images of a dataset split, evenly spaced through it, and write a summary.

    num_samples: None for all. images_dir, masks_dir, mask_suffix, mask_prefix, mask_name: for a
    dataset that lies in no known way. figures: what to draw of each image, a key of FIGURES.
    overwrite: compute finished images again. export: a key of EXPORTS, to write maps in the
    geometry of their images too. before_image: called before each; what it raises ends the batch,
    whose summary is still written. share: of a group of processes, which share the images; the
    result is that of all on rank 0, and empty on the others. options: further fields of `Settings`.
    An image that cannot be used or written is listed in the result and does not stop the others.
    Raises InputError for an unusable model, folder or setting, or a folder that another run is
    using; OutputError if nothing can be written there.
    """
    settings = Settings(baseline=baseline_type, num_steps=num_steps, **options)
    source = NetworkSource(model_path, device, encoder, architecture, weights_key, model_options,
                           model_factory)  # fmt: skip
    load = partial(load_explainer, source, settings)
    output = Output(Path(output_dir), figures, overwrite, export)
    folders = [None if folder is None else Path(folder) for folder in (images_dir, masks_dir)]
    data = DataSource(Path(data_dir), split, *folders, mask_suffix, mask_prefix, mask_name)
    return analyse_dataset(load, data, num_samples, settings, output, before_image,
                           share or Alone())  # fmt: skip


def analyse_dataset(
    load: Callable[[], IntegratedGradients],
    source: DataSource,
    num_samples: int | None,
    settings: Settings,
    output: Output,
    before_image: Callable[[], object],
    share: Share,
) -> BatchResult:
    """`batch_integrated_gradients_analysis` under whole settings. load: gives the explainer, once
    data and output folder are known to be usable."""
    every = with_slices(list_samples(source.data_dir, source=source), settings.reading)
    samples = choose_samples(every, num_samples)
    for note in samples[0].notes if share.rank == 0 else ():
        print(f'note: {note}', file=sys.stderr)
    make_output_folder(output.folder)
    with hold_folder(output.folder) if share.rank == 0 else contextlib.nullcontext():
        share.begin()
        ig = load()
        ig.reference_images = references_of(settings, every)
        result = _Batch(ig, samples, settings, output).run(before_image, share)
        if output.export is not None and share.rank == 0:
            export([statistics['folder'] for statistics in result.images], output)
        return result


def export(folders: Sequence[str], output: Output) -> list[Path]:
    """Write the maps of these folders where that is wanted. Raises OutputError, InputError."""
    return [] if output.export is None else export_maps(output.folder, folders, output.export)


def analyse_batch(
    ig: IntegratedGradients,
    samples: Sequence[Sample],
    settings: Settings,
    output_dir: Path,
    before_image: Callable[[], object] = lambda: None,
    figures: str = 'all',
    overwrite: bool = False,
    share: Share | None = None,
) -> BatchResult:
    """Explain the samples that are this process's share; on rank 0, write the summary of all.

    Arguments: see `batch_integrated_gradients_analysis`.
    """
    output = Output(output_dir, figures, overwrite)
    return _Batch(ig, samples, settings, output).run(before_image, share or Alone())


class _Batch:
    """The images of a batch and how they are explained."""

    def __init__(
        self,
        ig: IntegratedGradients,
        samples: Sequence[Sample],
        settings: Settings,
        output: Output,
    ) -> None:
        self.ig, self.samples, self.settings, self.output = ig, samples, settings, output
        self._record = settings_record(ig, settings)
        self._known = truth_reading(ig, settings)
        self._channels = ig.preprocessing.channels
        self._prepared = False

    def run(self, before_image: Callable[[], object], share: Share) -> BatchResult:
        """Explain this process's share; on rank 0, write the summary of all."""
        names = [sample.name for sample in self.samples]
        progress = Progress(share, self.output.folder, names)
        writers = Writers(writer_processes(len(names), self.ig.device.type != 'cpu'))
        try:
            with writers:  # leaving it waits for what is being written
                for number, pending in read_ahead(share, len(names), self._read):
                    before_image()
                    self._explain(number, pending, writers)
                    progress.add(writers.finished())
            progress.add(writers.finished())
            progress.wait_for_others()
        finally:  # an interrupted batch keeps a summary of what it finished
            progress.add(writers.finished())
            result = progress.finish(self.settings.record(), Settings().record())
        return result

    def _read(self, number: int) -> Pending:
        """Read one image; called from another thread."""
        sample = self.samples[number]
        loaded = LoadedSample.of(sample, self._channels, self.settings, self._known)
        return Pending.of(loaded, self.settings, self._record, self.output)

    def _explain(self, number: int, pending: Callable[[], Pending], writers: Writers) -> None:
        """Explain one image, if need be, and have its files written."""
        outcome = Outcome(number, self.samples[number].name)
        try:
            if writers.in_trouble:  # the last image could not be written: can this one?
                make_output_folder(self.output.folder)
            by_target, write = self._statistics_of(pending())
        except EmptyTargetError as error:
            writers.settle(replace(outcome, status=SKIPPED, reason=str(error)))
        except InputError as error:
            writers.settle(replace(outcome, status=FAILED, reason=str(error)))
        else:
            for statistics in by_target:
                say_warnings(statistics, self.samples[number].notes)
            outcome = replace(outcome, rows=tuple(map(row_of, by_target)))
            if write is None:
                writers.settle(outcome)
            else:
                writers.add(outcome, write)

    def _statistics_of(self, pending: Pending) -> tuple[list[dict], Callable[[], object] | None]:
        if pending.finished is None:
            self._prepare_once()
        long = self.settings.evaluate is not None or self.settings.tile is not None
        return statistics_of(self.ig, pending, self.settings, self.output, progress=long)

    def _prepare_once(self) -> None:
        """Prepare the network on the batch's first image, whichever image is this process's first,
        so that every process, and a run that goes on, decides alike."""
        if self._prepared:
            return
        self._prepared = True
        for sample in self.samples:
            with contextlib.suppress(InputError):
                pixels = sample.load(self._channels, self.settings.reading).pixels
                image = crop_image(pixels, self.settings.crop, sample.name)
                with _normalised(self.ig, ReadImage(image, None), self.settings) as given:
                    self.ig.prepare(given.example(self.ig), self.settings)
                return


@dataclass(frozen=True)
class NetworkSource:
    """Where a network comes from: the arguments of `load_model`."""

    model_path: str | Path
    device: str | torch.device = 'auto'
    encoder: str | None = None
    architecture: str | None = None
    weights_key: str | None = None
    model_options: dict[str, object] | None = None
    model_factory: str | None = None


def load_explainer(source: NetworkSource, settings: Settings) -> IntegratedGradients:
    """What explains images by a checkpoint under these settings."""
    device, model = source.device, load_model(**vars(source))
    network = known_description(model)
    for note in network.notes:
        print(f'note: {note}', file=sys.stderr)
    preprocessing = input_preprocessing(model, settings)
    asked, what = settings.tile or settings.image_size, 'tile' if settings.tile else 'image size'
    if asked is not None and sides(asked) != sides(preprocessing.image_size):
        asked, size = size_text(asked), size_text(preprocessing.image_size)
        why = f'takes multiples of {network.step}'
        if network.fixed_size:
            why = f'takes only {size_text(network.fixed_size)}'
        print(f'note: {what} {asked}: the network {why}, using {size}', file=sys.stderr)
    return IntegratedGradients(model, device, preprocessing, settings.step_batch)


def say_warnings(statistics: dict, said: Sequence[str] = ()) -> None:
    """What the user must not miss about one image, on stderr. said: what was told already."""
    for text in (*statistics['notes'], accuracy_warning(statistics)):
        if text and text not in said:
            tqdm.write(f'{statistics["image"]}: {text}', file=sys.stderr)


# --------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, not a page of usage."""

    def error(self, message: str) -> None:
        self.exit(2, f'error: {message} (see {self.prog} --help)\n')


def _whole_number(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of at least 1')
    return int(text)


def _count_or_all(text: str) -> int | None:
    return None if text == 'all' else _whole_number(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line; choices and defaults come from the tables and from Settings."""
    parser = _Parser(
        prog=name_of(),
        description='Integrated Gradients for segmentation models: why did it draw this mask?',
        epilog=f'Datasets that are told apart by looking: {layouts_text()}. '
        'Exit status: 0 done, 1 some images of a batch failed or its summary could not be '
        'written, 2 bad input, 130 Ctrl-C, 143 SIGTERM.',
        allow_abbrev=False,  # --step 50 would silently mean --step_batch 50
    )
    # fmt: off
    add = parser.add_argument_group('what to explain').add_argument
    add('--mode', choices=('single', 'batch'), default='single', help='default: single')
    add('--image_path', type=Path, help='single: the image')
    add('--mask_path', type=Path,
        help='single: its ground-truth mask (default: the one beside it in its dataset)')
    add('--data_dir', type=Path, default=Path('Dataset_no_preprocessing'),
        help='batch: the dataset folder (default: %(default)s)')
    add('--split', help='batch: its subfolder (default: test, else valid, val, the folder itself)')
    add('--images_dir', type=Path, metavar='DIR',
        help='the images, where the dataset lies in no known way (default: by looking)')
    add('--masks_dir', type=Path, metavar='DIR', help='their masks (default: by looking)')
    add('--mask_suffix', metavar='ENDING',
        help="by which a mask's name differs from its image's, for example _lesion "
             '(default: none, or one of the usual ones)')
    add('--mask_prefix', metavar='START',
        help="by which a mask's name begins before its image's, for example seg_ (default: none, "
             'or mask_)')
    add('--mask_name', metavar='IMAGE=MASK',
        help="how masks are named where the image's name changes; * stands for what is the same, "
             "for example '*_training=*_manual1' (default: by --mask_suffix and --mask_prefix)")
    add('--num_samples', type=_count_or_all, default=10, metavar='N|all',
        help='batch: how many images, evenly spaced (default: %(default)s)')
    add('--output_dir', type=Path, default=Path('integrated_gradients_results'),
        help='default: %(default)s')
    add('--figures', choices=tuple(FIGURES), default='all',
        help='of each image; png: the two figures; all: also the pictures that the page shows; '
             'they can be drawn later without computing anything again (default: %(default)s)')
    add('--export', choices=tuple(EXPORTS),
        help="also write each map in the image's own geometry: original resolution, float32, what "
             'was not explained NaN; slices of a volume together (default: off)')
    add('--overwrite', action='store_true',
        help='compute images again that are finished (default: off)')

    group = parser.add_argument_group(MODEL)
    add = group.add_argument
    add('--model_path', type=Path, required=True,
        help='checkpoint: .pth, .safetensors, or a folder of save_pretrained')
    add('--encoder',
        help="an smp encoder (default: the checkpoint's, else read off the weights)")
    add('--architecture', choices=ARCHITECTURES,
        help="default: the checkpoint's, else read off the weights")
    add('--weights_key', metavar='KEY',
        help='which of several networks in the checkpoint; factory: the weights that a '
             '--model_factory has loaded itself (default: the first that is no average)')
    add('--model_option', nargs='+', metavar='NAME=VALUE',
        help='of the architecture, where it leaves no trace in the weights, for example '
             'encoder_output_stride=8; with --model_factory, its arguments (default: the '
             "checkpoint's, else smp's)")
    add('--model_factory', metavar='FILE.py:FUNCTION',
        help='code of your own that builds the network, or package.module:function; called with '
             'the --model_option values (default: a network of smp)')
    add('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    # fmt: on
    _add_settings(group, MODEL)
    for name in (PREPROCESSING, ATTRIBUTION, CHECKING):
        _add_settings(parser.add_argument_group(name), name)
    return parser


def _add_settings(group: argparse._ArgumentGroup, name: str) -> None:
    """The flags of all settings of a group, as their table tells them."""
    own = {f.name: f for f in fields(Settings) if Settings.table()[f.name].group == name}
    rivals = {Settings.table()[key].instead_of: key for key in own}
    either = None
    for key, one in own.items():
        if key in rivals:
            either = group.add_mutually_exclusive_group()
        known = Settings.table()[key]
        alone = key not in rivals and not known.instead_of
        (group if alone else either).add_argument(f'--{key}', **_flag_of(one, known))
        if key == 'target':
            group.add_argument('--each_object', action='store_true',
                               help='the same as --target each-object (default: off)')  # fmt: skip


def _flag_of(one: object, known: Setting) -> dict[str, object]:
    """How argparse reads a setting."""
    meaning = known.meaning.replace('%', '%%')
    flag: dict[str, object] = {'help': f'{meaning} (default: {known.default_text})'}
    if one.type == 'bool':
        return flag | {'action': 'store_true'}
    flag |= {'default': one.default, 'choices': known.choices, 'metavar': known.metavar}
    if one.name in ('mean', 'std'):
        return flag | {'nargs': '+', 'type': float}
    if one.name == 'class_names':
        return flag | {'nargs': '+'}
    if one.name in ('target', 'thresholds', 'method', 'method_option'):
        default = known.default_text if one.name in ('target', 'method') else None
        return flag | {'nargs': '+', 'default': default}
    if known.least == 1:
        return flag | {'type': _whole_number}
    kinds = {'int': int, 'float': float}
    return flag | {'type': kinds.get(one.type.partition(' ')[0], str)}


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings that the parsed flags ask for. Raises InputError where they make no sense."""
    if args.each_object and args.target != 'predicted':
        raise InputError('--each_object goes without --target')
    given = {name: value for name, value in vars(args).items() if name in Settings.table()}
    given['target'] = 'each-object' if args.each_object else args.target
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    given['thresholds'] = parse_thresholds(args.thresholds or ())
    given['method_option'] = given['method_option'] or ()
    return Settings(**given)


def source_from(args: argparse.Namespace, device: str) -> NetworkSource:
    """The network that the parsed flags name."""
    options = parse_options(args.model_option or ())
    return NetworkSource(args.model_path, device, args.encoder, args.architecture,
                         args.weights_key, options or None, args.model_factory)  # fmt: skip


def data_source(args: argparse.Namespace) -> DataSource:
    """The dataset that the parsed flags name."""
    return DataSource(args.data_dir, args.split, args.images_dir, args.masks_dir,
                      args.mask_suffix, args.mask_prefix, args.mask_name)  # fmt: skip


def say_cost(settings: Settings) -> None:
    """Tell what checks will cost, where some are wanted, before anything is computed."""
    if settings.evaluate:
        print(evaluation_cost(settings.evaluate), file=sys.stderr)


def around(sample: Sample) -> list[Sample]:
    """The images in the folder of a sample."""
    found, _ = attempt(partial(list_samples, sample.image_path.parent), InputError)
    return found or [sample]


def run_single(args: argparse.Namespace, settings: Settings) -> int:
    """Explain one image and print its statistics."""
    if args.image_path is None:
        raise InputError('--mode single needs --image_path (or use --mode batch with --data_dir)')
    say_cost(settings)
    # A bad image is told before the model is loaded.
    sample = single_sample(args.image_path, args.mask_path, data_source(args))
    sample.check(settings.reading)
    folder = make_output_folder(args.output_dir)
    output = Output(folder, args.figures, args.overwrite, args.export)
    with hold_folder(output.folder):
        ig = load_explainer(source_from(args, args.device), settings)
        ig.reference_images = references_of(settings, around(sample))
        known = truth_reading(ig, settings)
        loaded = LoadedSample.of(sample, ig.preprocessing.channels, settings, known)
        by_target = analyse_loaded(ig, loaded, settings, output, progress=True)
        exported = export([statistics['folder'] for statistics in by_target], output)
    for statistics in by_target:
        print(statistics_text(statistics))
        for finding in statistics['verdict']:
            print(f'  {finding["flag"]}: {finding["text"]}')
        print(f'Files in {output.folder / statistics["folder"]}')
        for path in exported:
            print(f'Map in {path}')
        say_warnings(statistics)
    return 0


def run_batch(args: argparse.Namespace, settings: Settings, stop: StopSignals) -> int:
    """Explain a dataset split and print its summary; 1 if some image failed.

    Under torchrun, this process takes its share, and rank 0 prints.
    """
    share = Group.of_torchrun() if started_by_torchrun() else Alone()
    if share.rank == 0:
        say_cost(settings)
    device = device_of_rank(args.device, share.size)
    load = partial(load_explainer, source_from(args, device), settings)
    output = Output(args.output_dir, args.figures, args.overwrite, args.export)
    result = analyse_dataset(load, data_source(args), args.num_samples, settings, output,
                             stop.check, share)  # fmt: skip
    if share.rank > 0:
        return 0
    print_summary(result)
    if not result.unwritten:
        print(f'Open {output.folder / "index.html"}')
    return 1 if result.failed or result.unwritten else 0


def print_summary(result: BatchResult) -> None:
    """The summary of a batch; what the user must not miss on stderr."""
    counts = result.summary
    print(
        f'{counts["images"]} images explained, {counts["skipped"]} skipped (empty target), '
        f'{counts["failed"]} failed'
    )
    for key, value in counts.items():
        if key.startswith('median_') and value is not None:
            interval = counts[key.replace('median_', 'interval_')]
            between = ' (95 %: {:.4g} to {:.4g})'.format(*interval) if interval else ''
            print(f'  {key.replace("_", " "):32}{value:.4g}{between}')
    for line in counts['findings']:
        print(f'  {line}')
    if counts['suspicion']:
        print(f'WARNING: {counts["suspicion"]}', file=sys.stderr)
    if result.unwritten:
        print(f'error: {result.unwritten}', file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # a file name that is no valid Unicode can be printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    args = build_parser().parse_args(argv)
    stop = StopSignals()
    try:
        with stop:
            settings = settings_from(args)
            if args.mode == 'single':
                return run_single(args, settings)
            return run_batch(args, settings, stop)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; the same command goes on where this one stopped', file=sys.stderr)
        return stop.exit_status


if __name__ == '__main__':
    sys.exit(main())
