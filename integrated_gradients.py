"""Integrated Gradients for segmentation models: which pixels made the network draw this mask?

For a network f (logit map), an image x and a baseline x', Integrated Gradients is

    IG_i(x) = (x_i - x'_i) * integral over alpha in [0, 1] of dF(x' + alpha (x - x')) / dx_i

(Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, eq. 1), where the
*target score* F is one number: the mean of the logit (or the probability) over a fixed set of
output pixels, the *target region*. The attributions sum to F(x) - F(x') (completeness); how far
the computed ones miss that is the *completeness gap*, reported with every explanation.

Use it as a library (`load_model`, `IntegratedGradients`, `batch_integrated_gradients_analysis`)
or from the command line: `python integrated_gradients.py --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from attribution_figures import (
    accuracy_warning,
    attribution_figure,
    channels_figure,
    map_verdict,
)
from batch_job import (
    FAILED,
    SKIPPED,
    Alone,
    Group,
    Outcome,
    Writers,
    hold_folder,
    read_ahead,
    started_by_torchrun,
    writer_processes,
)
from batch_summary import BatchResult, Progress, row_of
from faithfulness import (
    COMPARED_BASELINES,
    EFFORTS,
    FORWARDS_A_GRADIENT,
    METRICS,
    Subject,
    evaluate,
    strong_blur,
)
from gradient_engine import (
    CHECKED_NODES,
    PRECISIONS,
    GradientEngine,
    NonFiniteError,
    Preparation,
    check_finite,
    densities,
    explained_memory,
    frozen,
    reduced_dtype,
)
from gradient_engine import (
    Path as GradientPath,
)
from model_loading import (
    ARCHITECTURES,
    DEFAULT_ARCHITECTURE,
    DEFAULT_ENCODER,
    DEFAULT_IMAGE_SIZE,
    MAX_IMAGE_SIZE,
    load_model,
    resolve_device,
)
from path_integral import (
    ADAPTIVE,
    RULE_NAMES,
    PathIntegral,
    first_nodes,
    integrate,
)
from result_files import (
    FIGURES,
    Description,
    OutputError,
    image_files,
    json_writer,
    load_view,
    missing_figures,
    prepare_output,
    read_statistics,
    redraw_figures,
    redraw_missing,
    view_of,
    write_files,
    write_image,
)
from segmentation_dataset import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NORMALIZE_MODES,
    RESIZE_MODES,
    InputError,
    Placement,
    Preprocessing,
    Sample,
    list_samples,
    read_image,
    round_up_size,
    single_sample,
)
from verdict import Thresholds, findings, parse_thresholds

__all__ = [  # what users import from here, wherever it stands
    'BASELINES',
    'TARGETS',
    'BatchResult',
    'EmptyTargetError',
    'Explanation',
    'InputError',
    'IntegratedGradients',
    'OutputError',
    'Preprocessing',
    'Settings',
    'Target',
    'analyse_batch',
    'analyse_sample',
    'attribution_figure',
    'batch_integrated_gradients_analysis',
    'channels_figure',
    'describe_image',
    'describe_targets',
    'evaluate_explanation',
    'explain_image',
    'explanation_statistics',
    'list_samples',
    'load_model',
    'load_view',
    'main',
    'read_image',
    'redraw_figures',
    'resolve_device',
    'statistics_text',
    'view_of',
]  # fmt: skip

# --------------------------------------------------------------------------- constants

SCORES = ('logit', 'probability')
ON_EMPTY = ('skip', 'image')
EACH_OBJECT = 'each-object'  # a target that stands for every object:K there is
# Settings that `explain_targets` takes under the same name.
EXPLAIN_SETTINGS = (
    'num_steps', 'rule', 'tolerance', 'max_steps', 'score', 'threshold', 'baseline_draws', 'seed',
    'precision', 'precision_tolerance',
)  # fmt: skip


class EmptyTargetError(InputError):
    """The target region holds no pixel."""


# --------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of an explanation; one object for CLI, API, notebook.

    Raises InputError where a value makes no sense.
    """

    target: str = 'predicted'  # several, separated by spaces, share their forward passes
    score: str = 'logit'
    threshold: float = 0.5
    on_empty: str = 'skip'
    baseline: str = 'zero'
    baseline_draws: int = 4
    seed: int = 0
    rule: str = ADAPTIVE
    num_steps: int = 50
    tolerance: float | None = None  # refine until map error and gap are below it; no num_steps
    max_steps: int = 200  # with a tolerance
    precision: str = 'float32'
    precision_tolerance: float = 0.03
    gap_tolerance: float = 0.05
    image_size: int | None = None  # None: the checkpoint's own, else 640
    resize: str = 'stretch'
    normalize: str = 'auto'
    step_batch: int | None = None  # None: measured
    compile: bool = False
    evaluate: str | None = None  # checks of faithfulness, a key of EFFORTS
    thresholds: Thresholds = field(default_factory=Thresholds)  # of the verdict

    def __post_init__(self) -> None:
        _check_choice('rule', self.rule, RULE_NAMES)
        _check_choice('precision', self.precision, PRECISIONS)
        _check_choice('score', self.score, SCORES)
        _check_choice('on_empty', self.on_empty, ON_EMPTY)
        _check_choice('resize', self.resize, RESIZE_MODES)
        _check_choice('normalize', self.normalize, NORMALIZE_MODES)
        if self.evaluate is not None:
            _check_choice('evaluate', self.evaluate, EFFORTS)
        if not self.targets:
            raise InputError('no target is given (use --target predicted)')
        for target in self.targets:
            _check_choice('target', target.partition(':')[0], (*TARGETS, EACH_OBJECT))
        for name in ('num_steps', 'max_steps', 'baseline_draws', 'image_size', 'step_batch'):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f'{name} must be a whole number of at least 1, not {value!r}')
        if self.image_size is not None and self.image_size > MAX_IMAGE_SIZE:
            raise InputError(f'image_size must be at most {MAX_IMAGE_SIZE}, not {self.image_size}')
        if not 0 < self.threshold < 1:
            raise InputError(f'threshold must lie between 0 and 1, not {self.threshold!r}')
        for name in ('gap_tolerance', 'precision_tolerance', 'tolerance'):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f'{name} must be above 0, not {value!r}')
        first_nodes(self.rule, self.steps, self.tolerance is not None)  # the rule has them

    @property
    def targets(self) -> list[str]:
        return self.target.split()

    @property
    def steps(self) -> int:
        """Interpolation steps for each baseline; with a tolerance at most."""
        return self.num_steps if self.tolerance is None else self.max_steps


def _check_choice(name: str, value: str, choices: Sequence[str] | dict) -> None:
    if value not in choices:
        raise InputError(f'unknown {name} "{value}" (choose from {", ".join(choices)})')


@dataclass(frozen=True)
class Trend:
    """What happens along the path, at the nodes used, from the baseline to the image."""

    alphas: tuple[float, ...]  # rising
    scores: tuple[float, ...]  # F there
    mask_iou: tuple[float, ...]  # of the predicted mask there with the one on the image


@dataclass(frozen=True)
class Explanation:
    """The attributions of one image and everything needed to judge them.

    Tensors are on the CPU, except `attributions`, which are where the input was.
    """

    attributions: torch.Tensor  # shape and device of the input, in units of the score
    uncertainty: torch.Tensor | None  # estimated error of each, same shape; None: a single step
    prediction: torch.Tensor  # (h, w) float32: probability of what is explained, 0-1
    predicted_mask: torch.Tensor  # (h, w) bool
    region: torch.Tensor  # (h, w) bool: the target region R
    baseline_pixels: np.ndarray  # (H, W, 3) float32, 0-255: the (first) baseline
    target: str
    objective: Target  # F itself: logits -> score
    baseline: str
    rule: str
    steps: int  # interpolation steps per baseline (the most, where draws differ)
    gradient_evaluations: int  # all gradients, those of the precision check included
    forward_passes: int  # images through the network, for the prediction and the gradients
    score: float  # F(x)
    baseline_score: float  # F(x'), mean over the draws
    attribution_sum: float
    seconds: float
    step_batch: int
    seed: int
    peak_memory_bytes: int | None
    precision: str  # what the gradients were computed in; they are summed in float32 or better
    retried: str | None  # why it was computed again in float32; None: it was not
    precision_deviation: float | None  # of the map from float32, relative L2; None: not reduced
    map_error: float | None  # estimated relative L2 error of the map; None: a single step
    tolerance: float | None
    trend: Trend  # on the way from the (first) baseline
    preparation: Preparation

    @property
    def score_type(self) -> str:
        """What is averaged over the region, one of SCORES."""
        return self.objective.score

    @property
    def completeness_gap(self) -> float | None:
        """|sum of attributions - (F(x) - F(x'))| / |F(x) - F(x')|; None where F(x) = F(x')."""
        return completeness_gap(self.attribution_sum, self.score, self.baseline_score)

    @property
    def within_tolerance(self) -> bool | None:
        """Whether map error and completeness gap are below the tolerance; None without one."""
        if self.tolerance is None:
            return None
        reached = self.map_error is not None and self.map_error <= self.tolerance
        return reached and (self.completeness_gap or 0) <= self.tolerance


def completeness_gap(total: float, score: float, baseline_score: float) -> float | None:
    """The relative completeness gap; None where the two scores agree to float32 precision."""
    change = score - baseline_score
    if abs(change) <= 1e-6 * max(abs(score), abs(baseline_score), 1e-6):
        return None
    return abs(total - change) / abs(change)


# --------------------------------------------------------------------------- baselines
#
# A baseline is an image in pixel space, built from the image it stands against and then
# normalised like it: (pixels (H, W, 3) float32 0-255, generator) -> (H, W, 3) float32 0-255.


def zero_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A black image (after normalisation that is not a zero tensor)."""
    return np.zeros_like(pixels)


def white_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A white image."""
    return np.full_like(pixels, 255)


def random_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform noise; seeded, and the attributions are averaged over several draws."""
    return rng.uniform(0, 255, pixels.shape).astype(np.float32)


def blur_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image under a Gaussian blur of 5 % of its longer side."""
    return strong_blur(pixels)


def mean_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image's mean colour everywhere."""
    return np.broadcast_to(pixels.mean(axis=(0, 1)), pixels.shape).astype(np.float32)


BASELINES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    'zero': zero_baseline,
    'random': random_baseline,
    'blur': blur_baseline,
    'mean': mean_baseline,
    'white': white_baseline,
}


def build_baselines(
    kind: str, pixels: np.ndarray, preprocessing: Preprocessing, draws: int = 4, seed: int = 0
) -> list[np.ndarray]:
    """The baselines of that kind for an image: several draws for `random`, one for the others.

    kind: a key of BASELINES, or the path of an image file (fitted to the image).
    pixels: (H, W, 3) float32, 0-255. Returns arrays of the same shape and range.
    Raises InputError for an unknown kind or an unreadable file.
    """
    if kind in BASELINES:
        rng = np.random.default_rng(seed)
        return [BASELINES[kind](pixels, rng) for _ in range(draws if kind == 'random' else 1)]
    if not Path(kind).is_file():
        raise InputError(
            f'unknown baseline "{kind}" (choose from {", ".join(BASELINES)}, or give the path '
            'of an image file)'
        )
    height, width = pixels.shape[:2]
    image = read_image(kind)
    if height == width:
        return [replace(preprocessing, image_size=height).resize_image(image).astype(np.float32)]
    return [cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)]


# --------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """What is explained: F(x) = sum of weights * s(f(x)), one number per image.

    The weights are fixed before the path is walked: the mean over the region R of the logit (or
    probability) of one channel per pixel. Equivalently they are the vector of the
    vector-Jacobian product that gives the gradient.
    """

    name: str
    weights: torch.Tensor  # (C, h, w) float32, sum 1
    score: str = 'logit'  # one of SCORES

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, C, h, w) -> scores (N,)."""
        values = logits if self.score == 'logit' else probabilities(logits)
        return (values * self.weights.to(values)).sum(dim=(1, 2, 3))

    @cached_property
    def scale(self) -> float:
        """The size of the region: what makes the largest weight 1."""
        return 1 / (float(self.weights.abs().max()) or 1.0)

    @property
    def region(self) -> torch.Tensor:
        """(h, w) bool: the output pixels that count."""
        return (self.weights != 0).any(dim=0)


@dataclass(frozen=True)
class TargetContext:
    """What a target may be built from: the network's answer on the original image."""

    logits: torch.Tensor  # (C, h, w)
    labels: torch.Tensor  # (h, w) int64: predicted class of every pixel, 0 background
    truth: torch.Tensor | None = None  # (h, w) int64 labels
    placement: Placement | None = None  # where the original image lies in the input

    @cached_property
    def objects(self) -> list[torch.Tensor]:
        """Connected components (8 neighbours) of the predicted mask, (h, w) bool, largest first."""
        mask = (self.labels > 0).cpu().numpy().astype(np.uint8)
        count, numbers, sizes, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        order = sorted(range(1, count), key=lambda k: -sizes[k, cv2.CC_STAT_AREA])
        return [torch.from_numpy(numbers == k).to(self.labels.device) for k in order]

    def choose(self, region: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Weights (C, h, w): the mean over a region (h, w) of the channel of each label."""
        channels = labels if len(self.logits) > 1 else torch.zeros_like(labels)
        if channels[region].numel() and int(channels[region].max()) >= len(self.logits):
            raise InputError(
                f'the ground truth holds class {int(channels[region].max())}, but the model has '
                f'only {len(self.logits)} classes (0 to {len(self.logits) - 1})'
            )
        weights = torch.zeros_like(self.logits, dtype=torch.float32)
        weights.scatter_(0, channels.clamp(max=len(weights) - 1)[None], region.float()[None])
        return weights / max(1, int(region.sum()))


def predicted_target(context: TargetContext, argument: str) -> torch.Tensor:
    """the predicted mask: pixels above the threshold (several classes: not background)"""
    return context.choose(context.labels > 0, context.labels)


def object_target(context: TargetContext, argument: str) -> torch.Tensor:
    """the K-th largest connected part of the predicted mask, from 1"""
    if not argument.isdecimal() or int(argument) < 1:
        raise InputError(f'target "object:{argument}": K must be a whole number from 1')
    if int(argument) > len(context.objects):
        raise EmptyTargetError(
            f'target "object:{argument}" is empty: the predicted mask has '
            f'{len(context.objects)} objects (use --each_object, or --target predicted)'
        )
    return context.choose(context.objects[int(argument) - 1], context.labels)


def truth_target(context: TargetContext, argument: str) -> torch.Tensor:
    """the ground-truth mask"""
    truth = _needed_truth(context, 'truth')
    return context.choose(truth > 0, truth)


def false_positive_target(context: TargetContext, argument: str) -> torch.Tensor:
    """predicted, but not so in the ground truth: why did it see this?"""
    truth = _needed_truth(context, 'false-positive')
    return context.choose((context.labels > 0) & (context.labels != truth), context.labels)


def false_negative_target(context: TargetContext, argument: str) -> torch.Tensor:
    """in the ground truth, but not so predicted: why did it miss this?"""
    truth = _needed_truth(context, 'false-negative')
    return context.choose((truth > 0) & (context.labels != truth), truth)


def _needed_truth(context: TargetContext, target: str) -> torch.Tensor:
    """The ground-truth labels (h, w). Raises InputError where they are unknown."""
    if context.truth is None:
        raise InputError(
            f'target "{target}" needs a ground-truth mask (give --mask_path, or use '
            '--target predicted)'
        )
    if len(context.logits) == 1:  # one class: any label is foreground
        return (context.truth > 0).long()
    return context.truth


def image_target(context: TargetContext, argument: str) -> torch.Tensor:
    """every pixel"""
    return context.choose(torch.ones_like(context.labels, dtype=torch.bool), context.labels)


def pixel_target(context: TargetContext, argument: str) -> torch.Tensor:
    """one output pixel, X to the right and Y down from 0,0 in the original image"""
    try:
        x, y = (int(part) for part in argument.split(','))
    except ValueError:
        raise InputError(f'target "pixel:{argument}" is not of the form pixel:X,Y') from None
    height, width = context.placement.original_size if context.placement else context.labels.shape
    if not (0 <= x < width and 0 <= y < height):
        raise InputError(
            f'target pixel {x},{y} lies outside the image (X from 0 to {width - 1}, '
            f'Y from 0 to {height - 1})'
        )
    column, row = context.placement.to_model(x, y) if context.placement else (x, y)
    region = torch.zeros_like(context.labels, dtype=torch.bool)
    region[row, column] = True
    return context.choose(region, context.labels)


def class_target(context: TargetContext, argument: str) -> torch.Tensor:
    """pixels won by class K, on the logit of K (models with several classes)"""
    classes = len(context.logits)
    if classes == 1:
        raise InputError(f'target "class:{argument}": the model has one class (use predicted)')
    if not argument.isdecimal() or int(argument) >= classes:
        raise InputError(f'target "class:{argument}": K must be a class from 0 to {classes - 1}')
    return context.choose(context.labels == int(argument), context.labels)


@dataclass(frozen=True)
class TargetKind:
    """A row of the target table; the docstring of `build` is its line in --help."""

    build: Callable[[TargetContext, str], torch.Tensor]
    form: str  # how the user writes it


TARGETS: dict[str, TargetKind] = {
    'predicted': TargetKind(predicted_target, 'predicted'),
    'object': TargetKind(object_target, 'object:K'),
    'truth': TargetKind(truth_target, 'truth'),
    'false-positive': TargetKind(false_positive_target, 'false-positive'),
    'false-negative': TargetKind(false_negative_target, 'false-negative'),
    'image': TargetKind(image_target, 'image'),
    'pixel': TargetKind(pixel_target, 'pixel:X,Y'),
    'class': TargetKind(class_target, 'class:K'),
}


def build_target(spec: str, context: TargetContext, score: str = 'logit') -> Target:
    """The target that a user wrote as `spec`.

    Raises InputError for a wrong spec, EmptyTargetError where its region holds no pixel.
    """
    kind, _, argument = spec.partition(':')
    _check_choice('target', kind, TARGETS)
    if (':' in TARGETS[kind].form) != bool(argument):
        raise InputError(f'target "{spec}" is not of the form {TARGETS[kind].form}')
    weights = TARGETS[kind].build(context, argument)
    if not weights.any():
        raise EmptyTargetError(
            f'target "{spec}" is empty: no such pixel in this image '
            '(use --target image to explain the whole logit map, or a lower --threshold)'
        )
    return Target(spec, weights, score)


def as_target(form: str | Target | torch.Tensor, score: str, context: TargetContext) -> Target:
    """A target given as a spec, a region (h, w) or a target object."""
    if isinstance(form, Target):
        return form
    if isinstance(form, str):
        return build_target(form, context, score)
    region = torch.as_tensor(form, dtype=torch.bool, device=context.logits.device)
    if region.shape != context.labels.shape:
        raise InputError(
            f'the target mask has shape {tuple(region.shape)}, the prediction '
            f'{tuple(context.labels.shape)}'
        )
    if not region.any():
        raise EmptyTargetError('the target mask is empty')
    return Target('mask', context.choose(region, context.labels), score)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) logits -> probabilities: sigmoid for one class, softmax for several."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def predicted_labels(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """(…, C, h, w) logits -> (…, h, w) int64 classes: by threshold for one class, else the
    highest."""
    if logits.shape[-3] == 1:
        return (logits[..., 0, :, :].sigmoid() > threshold).long()
    return logits.argmax(dim=-3)


# --------------------------------------------------------------------------- IntegratedGradients


class IntegratedGradients:
    """Integrated Gradients of a segmentation network.

    model: any torch.nn.Module mapping (N, 3, H, W) to logits (N, C, h, w); it is moved to the
        device and otherwise left as it was found.
    device: 'auto', 'cuda', 'mps', 'cpu' or a torch.device.
    preprocessing: how inputs were normalised; by default the model's own, else ImageNet's.
    step_batch: interpolation steps per pass; by default measured.
    compile: run the network through torch.compile, which pays on a GPU with many images.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: str | torch.device = 'auto',
        preprocessing: Preprocessing | None = None,
        step_batch: int | None = None,
        compile: bool = False,
    ) -> None:
        self.device = resolve_device(device)
        self.model = model.to(self.device)
        self.engine = GradientEngine(self.model, self.device, step_batch, compile)
        self.preprocessing = preprocessing or getattr(model, 'preprocessing', Preprocessing())

    def compute_integrated_gradients(
        self,
        input_tensor: torch.Tensor,
        baseline_type: str | torch.Tensor = 'zero',
        num_steps: int = 50,
        target: str | Target | torch.Tensor = 'predicted',
        **options: object,
    ) -> torch.Tensor:
        """The attributions alone: same shape and device as the input, (3, H, W) or (N, 3, H, W).

        Each image of a batch gets its own target. Options and errors: see `explain`.
        """
        images = input_tensor if input_tensor.ndim == 4 else input_tensor.unsqueeze(0)
        results = [
            self.explain(
                image, target=target, baseline_type=baseline_type, num_steps=num_steps, **options
            ).attributions
            for image in images
        ]
        return torch.stack(results).reshape(input_tensor.shape)

    def explain(
        self,
        input_tensor: torch.Tensor,
        target: str | Target | torch.Tensor = 'predicted',
        baseline_type: str | torch.Tensor = 'zero',
        num_steps: int = 50,
        rule: str = ADAPTIVE,
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
        num_steps: int = 50,
        rule: str = ADAPTIVE,
        *,
        tolerance: float | None = None,
        max_steps: int = 200,
        score: str = 'logit',
        threshold: float = 0.5,
        truth: np.ndarray | None = None,
        placement: Placement | None = None,
        baseline_draws: int = 4,
        seed: int = 0,
        precision: str = 'float32',
        precision_tolerance: float = 0.03,
        skip_empty: bool = False,
        progress: bool = False,
    ) -> list[Explanation]:
        """Explain several targets of one image; they share the forward passes.

        input_tensor: (3, H, W) or (1, 3, H, W), normalised as the model expects.
        targets: each a spec (a key of TARGETS, see --help), a Target, or an (h, w) boolean mask
            of output pixels. EACH_OBJECT stands for `object:1`, `object:2`, … as many as there are.
        baseline_type: a key of BASELINES, an image file, or a tensor of the input's shape in
            the same normalised space.
        num_steps, rule: interpolation steps for each baseline and the quadrature rule, one of
            RULE_NAMES. tolerance: instead of num_steps, refine until the estimated map error and
            the completeness gap are below it, with at most max_steps.
        score: 'logit' or 'probability'. threshold: of the predicted mask, for one-class models.
        truth: (h, w) class labels, for target 'truth'. placement: for target 'pixel:X,Y' in
            original image coordinates; without it X,Y are output pixels.
        baseline_draws, seed: of the baseline 'random'.
        precision: of the gradients, one of PRECISIONS; 'auto' reduces it where the hardware has
            a faster type and the map deviates by at most precision_tolerance (relative L2).
        skip_empty: leave out targets whose region holds no pixel, unless all are empty.

        Raises InputError: wrong shapes or values, not enough memory; EmptyTargetError: a target
        region holds no pixel; NonFiniteError: logits or gradients that are not finite, also when
        computed again in float32 where precision was reduced.
        """
        started = time.perf_counter()
        settings = Settings(
            score=score, threshold=threshold, num_steps=num_steps, rule=rule,
            tolerance=tolerance, max_steps=max_steps, baseline_draws=baseline_draws,
            precision=precision, precision_tolerance=precision_tolerance,
        )  # fmt: skip
        x = self._check_input(input_tensor)  # (1, 3, H, W)
        baselines = self._baselines(x, baseline_type, baseline_draws, seed)
        with (
            torch.inference_mode(False),
            frozen(self.model),
            explained_memory(self.device),
        ):
            self.engine.prepare(x)
            passes = self.engine.forward_passes
            nodes = first_nodes(rule, settings.steps, tolerance is not None)
            at_image = x.clone().requires_grad_(bool(nodes[-1] == 1))
            with torch.set_grad_enabled(at_image.requires_grad):
                graph = self.engine.run(at_image)  # (1, C, h, w)
            logits = graph.detach()
            labels = predicted_labels(logits[0], threshold)
            context = self._context(logits[0], labels, truth, placement)
            built = self._targets(targets, score, context, skip_empty)
            gradient = None  # at the image, which all baselines share
            if at_image.requires_grad:
                gradient = densities(at_image, graph, built, torch.ones_like(x))[0]
                check_finite(gradient[None], 'the gradients', alpha=1.0)
            del graph
            walk = _Walk(self.engine, settings, x, built, logits, labels, gradient, nodes)
            bar = tqdm(total=None if tolerance else num_steps * len(baselines), unit='step',
                       desc='interpolation steps', leave=False, disable=not progress)  # fmt: skip
            retried = None
            with bar:
                try:
                    walk.all(baselines, bar.update)
                except NonFiniteError as error:
                    if walk.reduced is None:
                        raise
                    retried = (
                        f'computed again in float32, since in {dtype_name(walk.reduced)} {error}'
                    )
                if retried:  # outside `except`, whose traceback would keep tensors alive
                    exact = replace(settings, precision='float32')
                    walk = _Walk(self.engine, exact, x, built, logits, labels, gradient, nodes)
                    walk.all(baselines, bar.update)
        common = {
            'baseline_pixels': self.preprocessing.to_pixels(baselines[0]),
            'baseline': baseline_type if isinstance(baseline_type, str) else 'tensor',
            'rule': rule,
            'steps': max(walk.steps),
            'gradient_evaluations': walk.evaluations,
            'forward_passes': self.engine.forward_passes - passes,
            'seed': seed,
            'step_batch': self.engine.step_batch.size,
            'precision': dtype_name(walk.reduced or x.dtype),
            'retried': retried,
            'precision_deviation': walk.deviation if walk.reduced else None,
            'tolerance': tolerance,
            'preparation': self.engine.preparation,
            'seconds': time.perf_counter() - started,
            'peak_memory_bytes': peak_memory(self.device),
        }
        return [
            self._explanation(input_tensor, number, target, walk, common)
            for number, target in enumerate(built)
        ]

    def prepare(self, input_tensor: torch.Tensor) -> None:
        """Prepare the network's private copy on this input, (3, H, W) or (1, 3, H, W), instead of
        on the first that is explained. Raises InputError as `explain_targets` does."""
        x = self._check_input(input_tensor)
        with torch.inference_mode(False), frozen(self.model), explained_memory(self.device):
            self.engine.prepare(x)

    @staticmethod
    def _explanation(
        input_tensor: torch.Tensor, number: int, target: Target, walk: _Walk, common: dict
    ) -> Explanation:
        """The result for one of the targets."""
        count = len(walk.found)
        attributions = sum(found.integral[number] for found in walk.found) / count  # (3, H, W)
        uncertainty, error = None, None
        parts = [found.uncertainty for found in walk.found]
        if all(part is not None for part in parts):
            squares = sum(part[number].square() for part in parts)  # draws are independent
            uncertainty = (squares.sqrt() / count).reshape(input_tensor.shape)
            relative = float(uncertainty.norm() / attributions.norm())
            error = math.hypot(relative, walk.deviation if walk.reduced else 0.0)
        mask, prediction = _explained_class(target.name, walk.logits, walk.labels)
        precise = attributions if attributions.device.type == 'mps' else attributions.double()
        return Explanation(
            attributions=attributions.reshape(input_tensor.shape).to(input_tensor.device),
            uncertainty=None if uncertainty is None else uncertainty.cpu(),
            prediction=prediction.cpu(),
            predicted_mask=mask.cpu(),
            region=target.region.cpu(),
            target=target.name,
            objective=target,
            score=float(target(walk.logits)),
            baseline_score=walk.baseline_score(number),
            attribution_sum=float(precise.sum()),
            map_error=error if error is None or math.isfinite(error) else None,
            trend=_trend(walk.paths[0], number),
            **common,
        )

    def _check_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input as (1, 3, H, W) on the device, cut off from the caller's graph: float32, in
        which gradients then accumulate, or float64 for a double-precision model."""
        shape = tuple(tensor.shape)
        if not (len(shape) == 3 or (len(shape) == 4 and shape[0] == 1)) or shape[-3] != 3:
            raise InputError(f'input_tensor must be (3, H, W) or (1, 3, H, W), not {shape}')
        working = torch.float64 if self.engine.dtype == torch.float64 else torch.float32
        tensor = tensor.detach()
        if self.device.type == 'cuda' and tensor.device.type == 'cpu':
            tensor = tensor.pin_memory()  # copied while the GPU still works on what came before
        x = tensor.to(self.device, working, non_blocking=True).reshape(1, *shape[-3:])
        if not bool(torch.isfinite(x).all()):
            raise InputError('input_tensor holds values that are not finite')
        return x

    def _baselines(
        self, x: torch.Tensor, kind: str | torch.Tensor, draws: int, seed: int
    ) -> list[torch.Tensor]:
        """The baselines of an input (1, 3, H, W), each of its shape."""
        if isinstance(kind, torch.Tensor):
            if kind.numel() != x.numel():
                raise InputError(f'the baseline must have the shape {tuple(x.shape)} of the input')
            return [kind.detach().to(x).reshape(x.shape)]
        pixels = self.preprocessing.to_pixels(x)
        built = build_baselines(kind, pixels, self.preprocessing, draws, seed)
        return [self.preprocessing.normalise(baseline).to(x) for baseline in built]

    @staticmethod
    def _context(
        logits: torch.Tensor,
        labels: torch.Tensor,
        truth: np.ndarray | None,
        placement: Placement | None,
    ) -> TargetContext:
        """What targets are built from."""
        if truth is not None:
            truth = torch.as_tensor(truth, dtype=torch.int64, device=logits.device)
            if truth.shape != labels.shape:
                raise InputError(
                    f'truth has shape {tuple(truth.shape)}, the prediction {tuple(labels.shape)}'
                )
        return TargetContext(logits, labels, truth, placement)

    @staticmethod
    def _targets(
        wanted: Sequence[str | Target | torch.Tensor],
        score: str,
        context: TargetContext,
        skip_empty: bool,
    ) -> list[Target]:
        """The target objects of whatever forms of targets the caller gave."""
        forms = []
        for form in wanted:
            if isinstance(form, str) and form == EACH_OBJECT:
                forms += [f'object:{k + 1}' for k in range(max(1, len(context.objects)))]
            else:
                forms.append(form)
        found, empty = [], ''
        for form in forms:
            try:
                found.append(as_target(form, score, context))
            except EmptyTargetError as error:  # kept, it would keep all tensors of this call alive
                empty = str(error)
        if empty and not (found and skip_empty):
            raise EmptyTargetError(empty)
        return found


class _Walk:
    """The integration of one image's targets along the paths from its baselines."""

    def __init__(
        self,
        engine: GradientEngine,
        settings: Settings,
        x: torch.Tensor,
        targets: list[Target],
        logits: torch.Tensor,
        labels: torch.Tensor,
        gradient: torch.Tensor | None,
        nodes: np.ndarray,
    ) -> None:
        """gradient: at the image, (targets, 3, H, W); None where the rule has no node there.
        nodes: those that are evaluated whatever is found."""
        self.engine, self.settings, self.x, self.targets = engine, settings, x, targets
        self.logits, self.labels, self.gradient, self.nodes = logits, labels, gradient, nodes
        self.reduced: torch.dtype | None = None
        self.deviation = 0.0  # of reduced precision from float32, of the whole map
        self.found: list[PathIntegral] = []
        self.paths: list[GradientPath] = []
        self.steps: list[int] = []

    @property
    def evaluations(self) -> int:
        """Gradients computed; the one at the image counts once."""
        shared = 0 if self.gradient is None else 1
        return shared + sum(path.evaluations for path in self.paths)

    def baseline_score(self, number: int) -> float:
        """F of one target at the baseline, mean over the draws."""
        return float(np.mean([float(path.scores_at(0.0)[number]) for path in self.paths]))

    def all(self, baselines: Sequence[torch.Tensor], on_steps: Callable[[int], object]) -> None:
        """Walk the path from each baseline."""
        for baseline in baselines:
            path = self._path(baseline, on_steps)
            if not self.paths:
                self.reduced = self._choose_precision(path)
                self.engine.step_batch.start(self.x.shape[-2] * self.x.shape[-1], self.reduced)
            path.reduced = self.reduced
            self.paths.append(path)
            self.steps.append(0)
            enough = partial(self._enough, path) if self.settings.tolerance else None
            self.found.append(
                integrate(self._counted(path), self.settings.rule, self.settings.steps, enough)
            )

    def _counted(self, path: GradientPath) -> Callable[[np.ndarray], Iterator[torch.Tensor]]:
        def evaluate(nodes: np.ndarray) -> Iterator[torch.Tensor]:
            self.steps[-1] += len(nodes)
            return path(nodes)

        return evaluate

    def _path(self, baseline: torch.Tensor, on_steps: Callable[[int], object]) -> GradientPath:
        """The path from a baseline, both ends seen: in float32, with as few passes as possible."""
        mask_of = partial(foreground, threshold=self.settings.threshold)
        path = GradientPath(self.engine, self.x, baseline, self.targets, mask_of,
                            self.labels > 0, on_steps=on_steps)  # fmt: skip
        path.note([1.0], self.logits)
        if self.gradient is not None:
            path.known[1.0] = self.gradient * (self.x - baseline)
        if self.nodes[0] == 0:
            path.known[0.0] = path.evaluate([0.0], None)[0]
        else:
            with torch.no_grad():
                path.note([0.0], self.engine.run(baseline))
        return path

    def _choose_precision(self, path: GradientPath) -> torch.dtype | None:
        """The reduced type, where it is wanted and, under `auto`, accurate enough."""
        wanted, automatic = self.settings.precision, self.settings.precision == 'auto'
        reduced = reduced_dtype(wanted, self.x.device)
        if reduced is None or self.engine.dtype != torch.float32:
            return None
        near = {int(np.abs(self.nodes - alpha).argmin()) for alpha in CHECKED_NODES}
        self.deviation = path.check_precision(reduced, [float(self.nodes[k]) for k in sorted(near)])
        limit = min(self.settings.precision_tolerance, (self.settings.tolerance or 1.0) / 2)
        return None if automatic and self.deviation > limit else reduced

    def _enough(self, path: GradientPath, found: PathIntegral) -> bool:
        """Whether map error and completeness gap of every target are below the tolerance."""
        errors = found.errors()
        if errors is None:
            return False
        totals = found.integral.sum(dim=(1, 2, 3))
        rounding = self.deviation if self.reduced else 0.0
        figures = torch.stack([errors, totals, path.scores_at(1.0), path.scores_at(0.0)], dim=1)
        return all(
            math.hypot(error, rounding) <= self.settings.tolerance
            and (completeness_gap(total, high, low) or 0.0) <= self.settings.tolerance
            for error, total, high, low in figures.tolist()
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type, as in PRECISIONS."""
    return str(dtype).removeprefix('torch.')


def foreground(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """(N, C, h, w) logits -> (N, h, w) bool: what is not background."""
    return predicted_labels(logits, threshold) > 0


def _trend(path: GradientPath, number: int) -> Trend:
    """What one target saw along a path."""
    alphas = sorted(path.seen)
    return Trend(
        tuple(alphas),
        tuple(float(path.seen[alpha][0][number]) for alpha in alphas),
        tuple(float(path.seen[alpha][1]) for alpha in alphas),
    )


def _explained_class(
    target: str, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (h, w) bool and probability (h, w) of class K for `class:K`, else of foreground."""
    chances = probabilities(logits)[0].float()
    kind, _, number = target.partition(':')
    if kind == 'class':
        return labels == int(number), chances[int(number)]
    return labels > 0, chances[0] if len(chances) == 1 else 1 - chances[0]


def peak_memory(device: torch.device) -> int | None:
    """Peak memory so far in bytes: of the GPU's tensors, else of this process; None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


# --------------------------------------------------------------------------- statistics


def explanation_statistics(explanation: Explanation, truth: np.ndarray | None = None) -> dict:
    """The figures of one explanation, flat and ready for JSON; None where one does not apply.

    truth: (h, w) bool, the pixels that really are of the explained class; None if unknown.
    The figures of METRICS are None until `evaluate_explanation` has measured them.
    |attribution| is summed over the channels. `attribution_ratio` is its mean inside the
    predicted mask over its mean outside; `attribution_mean`, `_std`, `_min`, `_max` are of the
    signed values of all channels and pixels, in units of the score.
    """
    signed = explanation.attributions.double().cpu().numpy().reshape(3, *_shape(explanation))
    magnitude = np.abs(signed).sum(axis=0)  # (H, W)
    total = magnitude.sum()
    mask = explanation.predicted_mask.numpy()
    inside = _mean(magnitude[mask])
    outside = _mean(magnitude[~mask])
    statistics = {
        'target': explanation.target,
        'target_area': int(explanation.region.sum()),
        'score_type': explanation.score_type,
        'baseline': explanation.baseline,
        'rule': explanation.rule,
        'steps': explanation.steps,
        'gradient_evaluations': explanation.gradient_evaluations,
        'forward_passes': explanation.forward_passes,
        'step_batch': explanation.step_batch,
        'precision': explanation.precision,
        'precision_deviation': explanation.precision_deviation,
        'seconds': explanation.seconds,
        'peak_memory_bytes': explanation.peak_memory_bytes,
        'score': explanation.score,
        'baseline_score': explanation.baseline_score,
        'attribution_sum': explanation.attribution_sum,
        'completeness_gap': explanation.completeness_gap,
        'map_error': explanation.map_error,
        'within_tolerance': explanation.within_tolerance,
        'attribution_mean': signed.mean(),
        'attribution_std': signed.std(),
        'attribution_min': signed.min(),
        'attribution_max': signed.max(),
        'attribution_ratio': inside / outside if inside is not None and outside else None,
        'attribution_in_prediction': inside,
        'attribution_in_background': outside,
        'share_in_prediction': magnitude[mask].sum() / total if total and mask.any() else None,
        'share_in_truth': None,
        'prediction_ratio': mask.mean(),
        'prediction_area': int(mask.sum()),
        'dice': None,
        'iou': None,
        'pixel_accuracy': None,
        'channel_shares': (np.abs(signed).sum(axis=(1, 2)) / total).tolist() if total else None,
        'trend': {name: list(values) for name, values in vars(explanation.trend).items()},
        'preparation': explanation.preparation.record(),
        **dict.fromkeys(METRICS),
        'evaluation': None,
    }
    if truth is not None:
        statistics |= mask_scores(mask, truth)
        if total and truth.any():
            statistics['share_in_truth'] = magnitude[truth].sum() / total
    return {key: _plain(value) for key, value in statistics.items()}


def mask_scores(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice, IoU and pixel accuracy of two (h, w) bool masks; two empty masks agree fully."""
    overlap, union = (prediction & truth).sum(), (prediction | truth).sum()
    return {
        'dice': 2 * overlap / (overlap + union) if union else 1.0,
        'iou': overlap / union if union else 1.0,
        'pixel_accuracy': (prediction == truth).mean(),
    }


def _shape(explanation: Explanation) -> tuple[int, int]:
    return tuple(explanation.attributions.shape[-2:])


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _plain(value: object) -> object:
    """NumPy numbers as Python's; numbers that JSON cannot hold as None."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def statistics_text(statistics: dict) -> str:
    """The statistics of one image as lines to read."""

    def show(key: str, percent: bool = False) -> str:
        value = statistics[key]
        if value is None:
            return 'n/a'
        return f'{100 * value:.2f} %' if percent else f'{value:.4g}'

    shares = statistics['channel_shares']
    channels = ' / '.join(f'{100 * share:.1f} %' for share in shares) if shares else 'n/a'
    lines = [
        f'Attribution mean, std       {show("attribution_mean")}, {show("attribution_std")}',
        f'Attribution min, max        {show("attribution_min")}, {show("attribution_max")}',
        f'Attribution ratio           {show("attribution_ratio")}',
        f'Mean |attribution|          {show("attribution_in_prediction")} in the prediction, '
        f'{show("attribution_in_background")} in the background',
        f'Share of |attribution|      {show("share_in_prediction", True)} in the prediction, '
        f'{show("share_in_truth", True)} in the ground truth',
        f'Red / green / blue share    {channels}',
        f'Prediction ratio            {show("prediction_ratio", True)} '
        f'({statistics["prediction_area"]:,} pixels)',
        f'Dice, IoU, pixel accuracy   {show("dice")}, {show("iou")}, {show("pixel_accuracy")}',
        f'F(x), F(baseline)           {show("score")}, {show("baseline_score")}',
        f'Completeness gap            {show("completeness_gap", True)} '
        f'({statistics["rule"]} rule, {statistics["steps"]} steps)',
        f'Map error (estimate)        {show("map_error", True)}: '
        f'{map_verdict(statistics["map_error"])}',
        f'Time                        {statistics["seconds"]:.1f} s, '
        f'{statistics["gradient_evaluations"]} gradient evaluations in {statistics["precision"]}, '
        f'{statistics["step_batch"]} at once',
    ]
    heading = (
        f'{statistics["image"]} (target {statistics["target"]}, baseline {statistics["baseline"]})'
    )
    return '\n  '.join([heading, *lines])


# --------------------------------------------------------------------------- visualization


def display_arrays(
    explanation: Explanation, image: np.ndarray, truth: np.ndarray | None, placement: Placement
) -> dict[str, np.ndarray]:
    """All that the .npz file holds. Maps are at model resolution, padding included.

    image: (H0, W0, 3) uint8, kept at a long side of at most 1024. truth: (h, w) bool or None.
    """
    scale = min(1.0, 1024 / max(image.shape[:2]))
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    arrays = {
        'attributions': explanation.attributions.cpu().numpy().reshape(3, *_shape(explanation)),
        'prediction': explanation.prediction.numpy(),
        'predicted_mask': explanation.predicted_mask.numpy(),
        'region': explanation.region.numpy(),
        'baseline': np.clip(np.rint(explanation.baseline_pixels), 0, 255).astype(np.uint8),
        'image': cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image,
        'original_size': np.array(placement.original_size),
        'content': np.array([placement.top, placement.left, placement.height, placement.width]),
    }
    return arrays if truth is None else arrays | {'truth': truth}


# --------------------------------------------------------------------------- single and batch


def input_preprocessing(model: torch.nn.Module, settings: Settings) -> Preprocessing:
    """How images become input of this model under these settings; explicit settings win.

    The image size is rounded up to a multiple of 32, which encoder-decoders need.
    """
    own = getattr(model, 'preprocessing', Preprocessing())
    mean, std = {
        'auto': (own.mean, own.std),
        'imagenet': (IMAGENET_MEAN, IMAGENET_STD),
        'none': ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    }[settings.normalize]
    size = round_up_size(settings.image_size or own.image_size)
    return Preprocessing(size, settings.resize, mean, std)


def explain_image(
    ig: IntegratedGradients,
    image: np.ndarray,
    settings: Settings,
    truth: np.ndarray | None = None,
    progress: bool = False,
) -> list[tuple[Explanation, np.ndarray | None]]:
    """Explain an image as it was read: (H, W, 3) uint8, with (H, W) uint8 truth labels if known.

    Returns for each target the explanation and the truth of the explained class at model
    resolution, (S, S) bool or None. Of several targets, empty ones are left out. Where all are
    empty and `settings.on_empty` is 'image', the whole image is explained.
    """
    preprocessing = ig.preprocessing
    if truth is not None:
        truth = preprocessing.resize_mask(truth)

    def explain(targets: list[str]) -> list[Explanation]:
        return ig.explain_targets(
            preprocessing.normalise(preprocessing.resize_image(image)),
            targets,
            baseline_type=settings.baseline,
            truth=truth,
            placement=preprocessing.place(image.shape[:2]),
            skip_empty=True,
            progress=progress,
            **{name: getattr(settings, name) for name in EXPLAIN_SETTINGS},
        )

    try:
        explanations = explain(settings.targets)
    except EmptyTargetError:
        if settings.on_empty != 'image':
            raise
        explanations = []
    if not explanations:  # outside `except`, whose traceback would keep tensors alive
        explanations = explain(['image'])
    return [(found, _explained_truth(found.target, truth)) for found in explanations]


def _explained_truth(target: str, truth: np.ndarray | None) -> np.ndarray | None:
    """The pixels that really are of the explained class, for `class:K`, else of foreground."""
    kind, _, number = target.partition(':')
    if truth is None:
        return None
    return truth == int(number) if kind == 'class' else truth > 0


def describe_targets(
    ig: IntegratedGradients,
    name: str,
    image: np.ndarray,
    truth: np.ndarray | None,
    settings: Settings,
    progress: bool = False,
) -> list[Description]:
    """Explain an image: for each target its statistics, and what its figures are drawn from.

    Arguments and errors as for `explain_image`; the figures are
    `attribution_figure(view_of(arrays), statistics)` and `channels_figure(...)`.
    """
    notes = []
    if truth is not None and truth.shape != image.shape[:2]:
        notes.append(
            f'the mask is {truth.shape[1]}×{truth.shape[0]}, the image '
            f'{image.shape[1]}×{image.shape[0]}: the mask was resized (nearest neighbour)'
        )
    place = ig.preprocessing.place(image.shape[:2])
    found = explain_image(ig, image, settings, truth, progress)
    targets = [explanation.target for explanation, _ in found]
    left_out = [t for t in settings.targets if t not in (*targets, EACH_OBJECT)]
    if targets == ['image'] != settings.targets:
        notes.append(f'target "{settings.target}" was empty: the whole image was explained')
    elif left_out:
        notes.append(f'empty, so left out: target {", ".join(left_out)}')
    if found[0][0].retried:
        notes.append(found[0][0].retried)
    if found[0][0].preparation.fell_back:
        notes.append(
            'the faster copy of the network did not compute quite the same: the original was used'
        )
    described = []
    for explanation, explained_truth in found:
        statistics = {
            'image': name,
            **explanation_statistics(explanation, explained_truth),
            'notes': notes,
            'targets': targets,
            'settings': settings_record(ig, settings),
            'versions': versions(),
        }
        if settings.evaluate:
            statistics |= evaluate_explanation(
                ig, ig.preprocessing.normalise(ig.preprocessing.resize_image(image)), explanation,
                settings.evaluate, explained_truth, place, settings.seed, progress,
            )  # fmt: skip
        statistics['verdict'] = verdict_of(statistics, settings)
        described.append((statistics, display_arrays(explanation, image, explained_truth, place)))
    return described


def verdict_of(statistics: dict, settings: Settings) -> list[dict]:
    """The findings about one image, ready for JSON."""
    return [asdict(finding) for finding in findings(statistics, settings.thresholds)]


def evaluate_explanation(
    ig: IntegratedGradients,
    input_tensor: torch.Tensor,
    explanation: Explanation,
    effort: str = 'full',
    truth: np.ndarray | None = None,
    placement: Placement | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Check how far an explanation can be trusted.

    input_tensor: what was explained. effort: a key of EFFORTS. truth: (h, w) bool, for
    localisation. placement: for the padding check. Returns, ready for the statistics, the figures
    of METRICS (None where one does not apply) and under `evaluation` what they were taken from.
    """
    _check_choice('evaluate', effort, EFFORTS)
    started = time.perf_counter()
    subject = subject_of(ig, input_tensor, explanation, truth, placement, seed)
    with torch.inference_mode(False), frozen(ig.model), explained_memory(ig.device):
        ig.engine.prepare(subject.x)
        found = evaluate(subject, effort, seed, progress)
    details = {'effort': effort, 'seconds': time.perf_counter() - started, **found.details}
    return {**found.metrics, 'evaluation': details}


def subject_of(
    ig: IntegratedGradients,
    input_tensor: torch.Tensor,
    explanation: Explanation,
    truth: np.ndarray | None = None,
    placement: Placement | None = None,
    seed: int = 0,
) -> Subject:
    """What the checks of `faithfulness` look at. Arguments: see `evaluate_explanation`."""
    x = ig._check_input(input_tensor)  # (1, 3, H, W)
    content = None
    if placement is not None:
        content = np.zeros(x.shape[-2:], bool)
        placement.crop(content)[:] = True
    pixels, rng = ig.preprocessing.to_pixels(x), np.random.default_rng(seed)
    return Subject(
        attributions=explanation.attributions.cpu().numpy().reshape(x.shape[1:]),
        network=ig.model,
        target=explanation.objective,
        x=x,
        baseline=ig.preprocessing.normalise(explanation.baseline_pixels).to(x),
        preprocessing=ig.preprocessing,
        region=explanation.region.numpy(),
        prediction=explanation.predicted_mask.numpy(),
        truth=truth,
        content=content,
        others={kind: BASELINES[kind](pixels, rng) for kind in COMPARED_BASELINES},
        batch=ig.engine.step_batch.size,
        run=ig.engine.run,
    )


def evaluation_cost(settings: Settings) -> str:
    """What the checks will cost for each image and target, in words."""
    work = EFFORTS[settings.evaluate]
    steps = work.gradients() + work.forwards() / FORWARDS_A_GRADIENT
    return (
        f'--evaluate {settings.evaluate}: {work.forwards()} forward passes and '
        f'{work.gradients()} gradients for each image and target, about as much work as '
        f'{steps:.0f} more interpolation steps'
    )


def describe_image(
    ig: IntegratedGradients,
    name: str,
    image: np.ndarray,
    truth: np.ndarray | None,
    settings: Settings,
    progress: bool = False,
) -> Description:
    """The first (with one target: the only) entry of `describe_targets`."""
    return describe_targets(ig, name, image, truth, settings, progress)[0]


@dataclass(frozen=True)
class Loaded:
    """A sample as it was read, and what an earlier run has left of it."""

    sample: Sample
    image: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray | None  # (H, W) uint8
    key: str  # see `resume_key`
    finished: list[dict] | None  # the statistics of its targets, where it need not be computed


def load_sample(
    sample: Sample, settings: Settings, record: dict, output_dir: Path, overwrite: bool = False
) -> Loaded:
    """Read a sample. record: of `settings_record`. Raises InputError for an unusable one."""
    image, truth = sample.image(), sample.truth()
    key = resume_key(record, image, truth)
    finished = None
    if not overwrite:
        finished = finished_statistics(output_dir, sample.name, settings, key)
    return Loaded(sample, image, truth, key, finished)


def explain_sample(
    ig: IntegratedGradients,
    loaded: Loaded,
    settings: Settings,
    output_dir: Path,
    figures: str,
    progress: bool = False,
) -> tuple[list[dict], Callable[[], object] | None]:
    """The statistics of a sample's targets, explained if need be, and what writes its files: None
    where they are there already."""
    name = loaded.sample.name
    if loaded.finished is not None:
        judged = [_judge_again(statistics, settings, output_dir) for statistics in loaded.finished]
        folders = [statistics['folder'] for statistics in judged]
        if any(missing_figures(output_dir / folder, figures) for folder in folders):
            return judged, partial(redraw_missing, output_dir, folders, figures)
        return judged, None
    described = describe_targets(ig, name, loaded.image, loaded.truth, settings, progress)
    for statistics, _ in described:
        statistics |= {
            'image_path': str(loaded.sample.image_path),
            'folder': folder_name(name, settings, statistics['target']),
            'resume_key': loaded.key,
        }
    found = [statistics for statistics, _ in described]
    return found, partial(write_image, output_dir, described, figures)


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
    finished before under the same settings, image, truth and checkpoint is read back instead,
    unless `overwrite`. Raises InputError for an unusable sample, OutputError if writing fails.
    """
    record = settings_record(ig, settings)
    loaded = load_sample(sample, settings, record, output_dir, overwrite)
    found, write = explain_sample(ig, loaded, settings, output_dir, figures, progress)
    if write is not None:
        write()
    return found


def _judge_again(statistics: dict, settings: Settings, output_dir: Path) -> dict:
    """Statistics of a finished image under today's thresholds, in the file too."""
    verdict = verdict_of(statistics, settings)
    if verdict != statistics['verdict']:
        statistics = {**statistics, 'verdict': verdict}
        statistics['settings'] |= {'thresholds': asdict(settings.thresholds)}
        path = image_files(output_dir / statistics['folder'])['statistics']
        write_files({path: json_writer(statistics)})
    return statistics


def folder_name(name: str, settings: Settings, target: str) -> str:
    """The folder of an image, or of one of its targets where several may be explained."""
    if len(settings.targets) == 1 and settings.target != EACH_OBJECT:
        return name
    return f'{name}_{target.replace(":", "-").replace(",", "-")}'


def settings_record(ig: IntegratedGradients, settings: Settings) -> dict:
    """All settings as they took effect, for the statistics file."""
    return {
        **asdict(settings),
        **asdict(ig.preprocessing),
        **getattr(ig.model, 'model_settings', {}),
        'device': str(ig.device),
    }


def resume_key(record: dict, image: np.ndarray, truth: np.ndarray | None) -> str:
    """A hash of everything that decides the files of an image."""
    # These do not change what is computed.
    without = ('step_batch', 'compile', 'device', 'model_path', 'thresholds')
    decisive = {name: value for name, value in record.items() if name not in without}
    digest = hashlib.sha256(json.dumps([decisive, versions()], sort_keys=True).encode())
    for array in (image, truth):
        digest.update(repr(None if array is None else array.shape).encode())
        digest.update(b'' if array is None else array.tobytes())
    if record['baseline'] not in BASELINES and Path(record['baseline']).is_file():
        digest.update(Path(record['baseline']).read_bytes())
    return digest.hexdigest()


def finished_statistics(
    output_dir: Path, name: str, settings: Settings, key: str
) -> list[dict] | None:
    """The statistics of an image that was finished with this key; None if it must be computed."""
    # Whichever target was not empty came first: one of those asked for, the largest object, or
    # the whole image in their place.
    possible = (*settings.targets, 'object:1', 'image')
    for folder in dict.fromkeys(folder_name(name, settings, target) for target in possible):
        first = _read_finished(output_dir / folder, key)
        if first is None or first['target'] != first['targets'][0]:
            continue
        others = [
            _read_finished(output_dir / folder_name(name, settings, target), key)
            for target in first['targets'][1:]
        ]
        return None if None in others else [first, *others]
    return None


def _read_finished(folder: Path, key: str) -> dict | None:
    """The statistics in a folder that belong to this key, if the maps are there too, else None."""
    try:
        statistics = read_statistics(folder)
        same = statistics['resume_key'] == key
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return statistics if same and image_files(folder)['arrays'].is_file() else None


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ('torch', 'segmentation-models-pytorch', 'timm', 'numpy', 'opencv-python-headless')
    found = {}
    for package in packages:
        with contextlib.suppress(ImportError):
            found[package] = version(package)
    return {'python': '.'.join(map(str, sys.version_info[:3]))} | found


def choose_samples(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """That many samples evenly spaced through the list; all of them for None."""
    if count is None or count >= len(samples):
        return list(samples)
    rows = np.linspace(0, len(samples) - 1, count).round().astype(int)
    return [samples[row] for row in rows]


def batch_integrated_gradients_analysis(
    model_path: str | Path,
    data_dir: str | Path,
    output_dir: str | Path = 'integrated_gradients_results',
    num_samples: int | None = 10,
    baseline_type: str = 'zero',
    num_steps: int = 50,
    *,
    split: str | None = None,
    encoder: str | None = None,
    architecture: str | None = None,
    device: str | torch.device = 'auto',
    figures: str = 'all',
    overwrite: bool = False,
    before_image: Callable[[], object] = lambda: None,
    share: Alone | Group | None = None,
    **options: object,
) -> BatchResult:
    """Explain images of a dataset split, evenly spaced through it, and write a summary.

    num_samples: None for all. figures: what to draw of each image, a key of FIGURES. overwrite:
    compute finished images again. before_image: called before each; what it raises ends the batch,
    whose summary is still written. share: of a group of processes, which share the images; the
    result is that of all on rank 0, and empty on the others. options: further fields of `Settings`.
    An image that cannot be used or written is listed in the result and does not stop the others.
    Raises InputError for an unusable model, folder or setting, or a folder that another run is
    using; OutputError if nothing can be written there.
    """
    _check_choice('figures', figures, FIGURES)
    settings = Settings(baseline=baseline_type, num_steps=num_steps, **options)
    share = share or Alone()
    samples = choose_samples(list_samples(data_dir, split), num_samples)
    output_dir = prepare_output(output_dir)
    with hold_folder(output_dir) if share.rank == 0 else contextlib.nullcontext():
        share.begin()
        ig = _prepare(model_path, settings, encoder, architecture, device)
        return analyse_batch(
            ig, samples, settings, output_dir, before_image, figures, overwrite, share
        )


def analyse_batch(
    ig: IntegratedGradients,
    samples: Sequence[Sample],
    settings: Settings,
    output_dir: Path,
    before_image: Callable[[], object] = lambda: None,
    figures: str = 'all',
    overwrite: bool = False,
    share: Alone | Group | None = None,
) -> BatchResult:
    """Explain the samples that are this process's share; on rank 0, write the summary of all.

    Arguments: see `batch_integrated_gradients_analysis`.
    """
    share = share or Alone()
    batch = _Batch(ig, samples, settings, output_dir, figures, overwrite)
    progress = Progress(share, output_dir, [sample.name for sample in samples])
    writers = Writers(writer_processes(len(samples), ig.device.type != 'cpu'))
    try:
        with writers:  # leaving it waits for what is being written
            for number, loaded in read_ahead(share, len(samples), batch.read):
                before_image()
                batch.explain(number, loaded, writers)
                progress.add(writers.finished())
        progress.add(writers.finished())
        progress.wait_for_others()
    finally:  # an interrupted batch keeps a summary of what it finished
        progress.add(writers.finished())
        result = progress.finish(asdict(settings), asdict(Settings()))
    return result


class _Batch:
    """The images of a batch and how they are explained."""

    def __init__(
        self,
        ig: IntegratedGradients,
        samples: Sequence[Sample],
        settings: Settings,
        output_dir: Path,
        figures: str,
        overwrite: bool,
    ) -> None:
        self.ig, self.samples, self.settings = ig, samples, settings
        self.output_dir, self.figures, self.overwrite = output_dir, figures, overwrite
        self._record = settings_record(ig, settings)
        self._prepared = False

    def read(self, number: int) -> Loaded:
        """Read one image; called from another thread."""
        sample = self.samples[number]
        return load_sample(sample, self.settings, self._record, self.output_dir, self.overwrite)

    def explain(self, number: int, loaded: Callable[[], Loaded], writers: Writers) -> None:
        """Explain one image, if need be, and have its files written."""
        outcome = Outcome(number, self.samples[number].name)
        try:
            if writers.in_trouble:  # the last image could not be written: can this one?
                prepare_output(self.output_dir)
            self._explain(loaded(), outcome, writers)
        except EmptyTargetError as error:
            writers.settle(replace(outcome, status=SKIPPED, reason=str(error)))
        except InputError as error:
            writers.settle(replace(outcome, status=FAILED, reason=str(error)))

    def _explain(self, loaded: Loaded, outcome: Outcome, writers: Writers) -> None:
        if loaded.finished is None:
            self._prepare_once()
        checks = self.settings.evaluate is not None  # which take long: their bars are shown
        found, write = explain_sample(
            self.ig, loaded, self.settings, self.output_dir, self.figures, checks
        )
        for statistics in found:
            _say_warnings(statistics)
        outcome = replace(outcome, rows=tuple(map(row_of, found)))
        if write is None:
            writers.settle(outcome)
        else:
            writers.add(outcome, write)

    def _prepare_once(self) -> None:
        """Prepare the network on the batch's first image, whichever image is this process's first,
        so that every process, and a run that goes on, decides alike."""
        if self._prepared:
            return
        self._prepared = True
        preprocessing = self.ig.preprocessing
        for sample in self.samples:
            with contextlib.suppress(InputError):
                self.ig.prepare(preprocessing.normalise(preprocessing.resize_image(sample.image())))
                return


def _prepare(
    model_path: str | Path,
    settings: Settings,
    encoder: str | None,
    architecture: str | None,
    device: str | torch.device,
) -> IntegratedGradients:
    """The engine for a checkpoint under these settings."""
    model = load_model(model_path, device, encoder, architecture)
    preprocessing = input_preprocessing(model, settings)
    asked = settings.image_size
    if asked is not None and asked != preprocessing.image_size:
        size = preprocessing.image_size
        print(f'note: image size {asked} is not divisible by 32, using {size}', file=sys.stderr)
    return IntegratedGradients(model, device, preprocessing, settings.step_batch, settings.compile)


def _say_warnings(statistics: dict) -> None:
    """What the user must not miss about one image, on stderr."""
    for text in (*statistics['notes'], accuracy_warning(statistics)):
        if text:
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
    default = Settings()
    parser = _Parser(
        prog='integrated_gradients.py',
        description='Integrated Gradients for segmentation models: why did it draw this mask?',
        epilog='Exit status: 0 done, 1 some images of a batch failed, 2 bad input, 130 Ctrl-C, '
        '143 SIGTERM.',
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
    add('--num_samples', type=_count_or_all, default=10, metavar='N|all',
        help='batch: how many images, evenly spaced (default: %(default)s)')
    add('--output_dir', type=Path, default=Path('integrated_gradients_results'),
        help='default: %(default)s')
    add('--figures', choices=tuple(FIGURES), default='all',
        help='of each image; png: the two figures; all: also the pictures that the page shows; '
             'they can be drawn later without computing anything again (default: %(default)s)')
    add('--overwrite', action='store_true',
        help='compute images again that are finished (default: off)')

    add = parser.add_argument_group('model').add_argument
    add('--model_path', type=Path, required=True,
        help='checkpoint: .pth, .safetensors, or a folder of save_pretrained')
    add('--encoder',
        help=f"an smp encoder (default: the checkpoint's, else {DEFAULT_ENCODER})")
    add('--architecture', choices=ARCHITECTURES,
        help=f"default: the checkpoint's, else {DEFAULT_ARCHITECTURE}")
    add('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    add('--step_batch', type=_whole_number, default=default.step_batch, metavar='N',
        help='interpolation steps computed at once (default: the fastest that fits)')
    add('--compile', action='store_true',
        help='use torch.compile: minutes at first, then faster on a GPU (default: off)')

    add = parser.add_argument_group('preprocessing').add_argument
    add('--image_size', type=_whole_number, default=default.image_size, metavar='PIXELS',
        help="side of the square model input, rounded up to a multiple of 32 (default: the "
             f"checkpoint's, else {DEFAULT_IMAGE_SIZE})")
    add('--resize', choices=RESIZE_MODES, default=default.resize, help='default: %(default)s')
    add('--normalize', choices=NORMALIZE_MODES, default=default.normalize,
        help="auto: the checkpoint's mean and std, else ImageNet's; none: 0-1 as it is "
             '(default: %(default)s)')

    add = parser.add_argument_group('attribution').add_argument
    rows = '; '.join(f'{k.form}: {" ".join(k.build.__doc__.split())}' for k in TARGETS.values())
    add('--target', nargs='+', default=default.target, metavar='TARGET',
        help=f'one or several; {rows} (default: %(default)s)')
    add('--each_object', action='store_true',
        help='explain every connected part of the predicted mask, instead of --target '
             '(default: off)')
    add('--score', choices=SCORES, default=default.score, help='default: %(default)s')
    add('--threshold', type=float, default=default.threshold,
        help='probability above which a pixel is predicted (default: %(default)s)')
    add('--on_empty', choices=ON_EMPTY, default=default.on_empty,
        help='empty target: skip it, or explain the whole image (default: %(default)s)')
    add('--baseline', default=default.baseline, metavar='|'.join((*BASELINES, 'FILE')),
        help='the image to compare with; zero is black (default: %(default)s)')
    add('--baseline_draws', type=_whole_number, default=default.baseline_draws, metavar='N',
        help='of baseline random: averaged, num_steps each (default: %(default)s)')
    add('--seed', type=int, default=default.seed, help='of baseline random (default: %(default)s)')
    how_many = parser._action_groups[-1].add_mutually_exclusive_group()
    how_many.add_argument('--num_steps', type=_whole_number, default=default.num_steps,
        metavar='N', help='interpolation steps (default: %(default)s)')
    how_many.add_argument('--tolerance', type=float, default=default.tolerance, metavar='T',
        help='instead: as many steps as bring map error and completeness gap below T, for '
             'example 0.05 (default: off)')
    add('--max_steps', type=_whole_number, default=default.max_steps, metavar='N',
        help='with --tolerance: at most so many (default: %(default)s)')
    add('--rule', choices=RULE_NAMES, default=default.rule,
        help='quadrature rule (default: %(default)s)')
    add('--precision', choices=PRECISIONS, default=default.precision,
        help='of the gradients; auto: reduced where it is faster here and the map stays within '
             '--precision_tolerance (default: %(default)s)')
    add('--precision_tolerance', type=float, default=default.precision_tolerance,
        help='relative L2 deviation of the map that auto accepts (default: %(default)s)')
    add('--gap_tolerance', type=float, default=default.gap_tolerance,
        help='completeness gap above which to warn (default: %(default)s)')

    add = parser.add_argument_group('checks').add_argument
    add('--evaluate', choices=tuple(EFFORTS), default=default.evaluate,
        help='check how far each map can be trusted; the cost is told first (default: off)')
    add('--thresholds', nargs='+', metavar='NAME=VALUE',
        help='of the verdict; defaults: '
             + ' '.join(f'{k}={v:g}' for k, v in asdict(default.thresholds).items()))
    # fmt: on
    return parser


def say_cost(settings: Settings) -> None:
    """Tell what checks will cost, where some are wanted, before anything is computed."""
    if settings.evaluate:
        print(evaluation_cost(settings), file=sys.stderr)


def run_single(args: argparse.Namespace, settings: Settings) -> int:
    """Explain one image and print its statistics."""
    if args.image_path is None:
        raise InputError('--mode single needs --image_path (or use --mode batch with --data_dir)')
    say_cost(settings)
    sample = single_sample(args.image_path, args.mask_path)
    sample.image()  # a bad image is told before the model is loaded
    output_dir = prepare_output(args.output_dir)
    with hold_folder(output_dir):
        ig = _prepare(args.model_path, settings, args.encoder, args.architecture, args.device)
        found = analyse_sample(ig, sample, settings, output_dir, True, args.figures, args.overwrite)
    for statistics in found:
        print(statistics_text(statistics))
        for finding in statistics['verdict']:
            print(f'  {finding["flag"]}: {finding["text"]}')
        print(f'Files in {output_dir / statistics["folder"]}')
        _say_warnings(statistics)
    return 0


class StopSignals:
    """Turns SIGINT and SIGTERM into a KeyboardInterrupt that cannot get lost.

    Python drops an exception that a signal handler raises while a destructor or a callback runs.
    The signal's number stays here, and `check` raises again. Signals that follow at once are one
    with the first (torchrun passes on the Ctrl-C that its processes have had too), so that they
    do not stop the summary from being written. A signal that is ignored, as shells make background
    jobs ignore Ctrl-C, stays ignored.
    """

    AT_ONCE = 3.0  # seconds

    def __init__(self) -> None:
        self.number: int | None = None
        self._when = -math.inf

    def __enter__(self) -> StopSignals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if time.monotonic() - self._when < self.AT_ONCE:
            return
        self.number, self._when = number, time.monotonic()
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt where a signal has come."""
        if self.number is not None:
            raise KeyboardInterrupt

    @property
    def exit_status(self) -> int:
        """What the shell expects of a process ended by that signal: 130 or 143."""
        return 128 + (self.number or signal.SIGINT)


def run_batch(args: argparse.Namespace, settings: Settings, stop: StopSignals) -> int:
    """Explain a dataset split and print its summary; 1 if some image failed.

    Under torchrun, this process takes its share, and rank 0 prints.
    """
    share = Group.of_torchrun() if started_by_torchrun() else Alone()
    if share.rank == 0:
        say_cost(settings)
    result = batch_integrated_gradients_analysis(
        args.model_path, args.data_dir, args.output_dir, args.num_samples,
        split=args.split, encoder=args.encoder, architecture=args.architecture,
        device=device_of_rank(args.device, share.size), baseline_type=settings.baseline,
        figures=args.figures, overwrite=args.overwrite, before_image=stop.check, share=share,
        **{k: v for k, v in vars(settings).items() if k != 'baseline'},
    )  # fmt: skip
    if share.rank > 0:
        return 0
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
    else:
        print(f'Open {args.output_dir / "index.html"}')
    return 1 if result.failed or result.unwritten else 0


def device_of_rank(device: str, ranks: int) -> str:
    """One GPU for each of several processes on a machine, where GPUs are to be used."""
    if ranks == 1 or device not in ('auto', 'cuda') or not torch.cuda.is_available():
        return device
    own = f'cuda:{os.environ["LOCAL_RANK"]}'
    torch.cuda.set_device(resolve_device(own))
    return own


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


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings that the parsed flags ask for. Raises InputError where they make no sense."""
    if args.each_object and args.target != Settings.target:
        raise InputError('--each_object goes without --target')
    given = [args.target] if isinstance(args.target, str) else args.target
    names = {f.name for f in fields(Settings)} - {'target', 'thresholds'}
    return Settings(
        target=EACH_OBJECT if args.each_object else ' '.join(given),
        thresholds=parse_thresholds(args.thresholds or ()),
        **{name: value for name, value in vars(args).items() if name in names},
    )


if __name__ == '__main__':
    sys.exit(main())
