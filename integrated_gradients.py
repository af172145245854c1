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
import csv
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from tqdm import tqdm

from attribution_figures import (
    View,
    attribution_figure,
    channels_figure,
    gap_warning,
    summary_figure,
)
from model_loading import (
    ARCHITECTURES,
    DEFAULT_ARCHITECTURE,
    DEFAULT_ENCODER,
    DEFAULT_IMAGE_SIZE,
    load_model,
    resolve_device,
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

# --------------------------------------------------------------------------- constants

SCORES = ('logit', 'probability')
ON_EMPTY = ('skip', 'image')
BLUR_SIGMA = 0.05  # of the longer image side
MAX_STEP_BATCH = 64  # beyond this a GPU gains nothing, and the allocator suffers
CPU_STEP_BATCH_PIXELS = 256 * 256  # on a CPU batching pays only while images are small
DEGENERATE_RATIO = 0.95  # a mask covering more than this looks like wrong preprocessing


class EmptyTargetError(InputError):
    """The target region holds no pixel."""


# --------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of an explanation; one object for CLI, API, notebook.

    Raises InputError where a value makes no sense.
    """

    target: str = 'predicted'
    score: str = 'logit'
    threshold: float = 0.5
    on_empty: str = 'skip'
    baseline: str = 'zero'
    baseline_draws: int = 4
    seed: int = 0
    rule: str = 'midpoint'
    num_steps: int = 50
    gap_tolerance: float = 0.05
    image_size: int | None = None  # None: the checkpoint's own, else 640
    resize: str = 'stretch'
    normalize: str = 'auto'
    step_batch: int | None = None  # None: chosen for the device

    def __post_init__(self) -> None:
        _check_choice('rule', self.rule, RULES)
        _check_choice('score', self.score, SCORES)
        _check_choice('on_empty', self.on_empty, ON_EMPTY)
        _check_choice('resize', self.resize, RESIZE_MODES)
        _check_choice('normalize', self.normalize, NORMALIZE_MODES)
        _check_choice('target', self.target.partition(':')[0], TARGETS)
        for name in ('num_steps', 'baseline_draws', 'image_size', 'step_batch'):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f'{name} must be a whole number of at least 1, not {value!r}')
        if not 0 < self.threshold < 1:
            raise InputError(f'threshold must lie between 0 and 1, not {self.threshold!r}')
        if not self.gap_tolerance > 0:
            raise InputError(f'gap_tolerance must be above 0, not {self.gap_tolerance!r}')


def _check_choice(name: str, value: str, choices: Sequence[str] | dict) -> None:
    if value not in choices:
        raise InputError(f'unknown {name} "{value}" (choose from {", ".join(choices)})')


@dataclass(frozen=True)
class Explanation:
    """The attributions of one image and everything needed to judge them.

    Tensors are on the CPU, except `attributions`, which are where the input was.
    """

    attributions: torch.Tensor  # shape and device of the input, in units of the score
    prediction: torch.Tensor  # (h, w) float32: probability of what is explained, 0-1
    predicted_mask: torch.Tensor  # (h, w) bool
    region: torch.Tensor  # (h, w) bool: the target region R
    baseline_pixels: np.ndarray  # (H, W, 3) float32, 0-255: the (first) baseline
    target: str
    score_type: str
    baseline: str
    rule: str
    steps: int  # interpolation steps per baseline
    gradient_evaluations: int  # steps times baseline draws
    score: float  # F(x)
    baseline_score: float  # F(x'), mean over the draws
    attribution_sum: float
    seconds: float
    step_batch: int
    seed: int
    peak_memory_bytes: int | None
    precision: str  # what gradients were computed and accumulated in

    @property
    def completeness_gap(self) -> float | None:
        """|sum of attributions - (F(x) - F(x'))| / |F(x) - F(x')|; None where F(x) = F(x')."""
        return completeness_gap(self.attribution_sum, self.score, self.baseline_score)


def completeness_gap(total: float, score: float, baseline_score: float) -> float | None:
    """The relative completeness gap; None where the two scores agree to float32 precision."""
    change = score - baseline_score
    if abs(change) <= 1e-6 * max(abs(score), abs(baseline_score), 1e-6):
        return None
    return abs(total - change) / abs(change)


@dataclass(frozen=True)
class BatchResult:
    """What a batch analysis did. Each image is the dictionary of its statistics file."""

    images: list[dict]
    skipped: list[dict] = field(default_factory=list)  # {'image', 'reason'}: empty target
    failed: list[dict] = field(default_factory=list)  # {'image', 'reason'}: unusable input
    summary: dict = field(default_factory=dict)


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
    return cv2.GaussianBlur(pixels, (0, 0), BLUR_SIGMA * max(pixels.shape[:2]))


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


def truth_target(context: TargetContext, argument: str) -> torch.Tensor:
    """the ground-truth mask"""
    if context.truth is None:
        raise InputError(
            'target "truth" needs a ground-truth mask (give --mask_path, or use --target predicted)'
        )
    return context.choose(context.truth > 0, context.truth)


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
    'truth': TargetKind(truth_target, 'truth'),
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


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) logits -> probabilities: sigmoid for one class, softmax for several."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def predicted_labels(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """(C, h, w) logits -> (h, w) int64 classes: by threshold for one class, else the highest."""
    if len(logits) == 1:
        return (logits[0].sigmoid() > threshold).long()
    return logits.argmax(dim=0)


# --------------------------------------------------------------------------- quadrature rules


@dataclass(frozen=True)
class Rule:
    """A quadrature rule on [0, 1]: integral of g ~ sum of weights * g(nodes)."""

    name: str
    nodes: np.ndarray  # (steps,) float64 in [0, 1], rising
    weights: np.ndarray  # (steps,) float64, sum 1
    degree: int  # polynomials up to this degree are integrated exactly


def midpoint_rule(steps: int) -> Rule:
    """Equal cells, evaluated at their centres."""
    nodes = (np.arange(steps) + 0.5) / steps
    return Rule('midpoint', nodes, np.full(steps, 1 / steps), degree=1)


def trapezoid_rule(steps: int) -> Rule:
    """Equal cells, evaluated at their ends; the two outermost nodes count half."""
    if steps < 2:
        raise InputError('the trapezoid rule needs at least 2 steps (use --num_steps 2 or more)')
    weights = np.full(steps, 1 / (steps - 1))
    weights[[0, -1]] /= 2
    return Rule('trapezoid', np.linspace(0, 1, steps), weights, degree=1)


def gauss_legendre_rule(steps: int) -> Rule:
    """Gauss-Legendre nodes, best for smooth integrands."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return Rule('gauss-legendre', (nodes + 1) / 2, weights / 2, degree=2 * steps - 1)


RULES: dict[str, Callable[[int], Rule]] = {
    'midpoint': midpoint_rule,
    'gauss-legendre': gauss_legendre_rule,
    'trapezoid': trapezoid_rule,
}


# --------------------------------------------------------------------------- IntegratedGradients


class StepBatch:
    """How many interpolation steps go through the network at once.

    A fixed size is kept; without one, small images are batched on a CPU, and a GPU is measured:
    what one step took decides how many fit. Either is halved when memory runs out.
    """

    def __init__(self, device: torch.device, fixed: int | None = None) -> None:
        self.device = device
        self.size = fixed or 1
        self._open = fixed is None

    def start(self, pixels: int) -> None:
        """Prepare for an image of that many pixels."""
        if self._open and self.device.type == 'cpu':
            self.size = min(MAX_STEP_BATCH, max(1, CPU_STEP_BATCH_PIXELS // pixels))
        elif self._open and self.device.type == 'cuda':
            self.size = 1
            self._idle_bytes = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def adapt(self) -> None:
        """After the first step on a GPU: as many steps as fit into four fifths of what is free."""
        if self._open and self.device.type == 'cuda' and self.size == 1:
            used = torch.cuda.max_memory_allocated(self.device) - self._idle_bytes
            free = torch.cuda.mem_get_info(self.device)[0]
            free += torch.cuda.memory_reserved(self.device)
            free -= torch.cuda.memory_allocated(self.device)
            self.size = min(MAX_STEP_BATCH, max(1, int(0.8 * free / max(1, used))))

    def halve(self) -> None:
        """After running out of memory. Raises InputError when a single step does not fit."""
        if self.size == 1:
            raise InputError(
                f'not enough memory on {self.device} for one interpolation step '
                '(use a smaller --image_size, or --device cpu)'
            )
        self.size //= 2
        self._open = False
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA's, MPS's, or the CPU allocator's."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and (
            'out of memory' in text
            or "can't allocate memory" in text
            or 'not enough memory' in text
        )
    )


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; everything as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wants = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wants:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wants:
            parameter.requires_grad_(requires_grad)


class IntegratedGradients:
    """Integrated Gradients of a segmentation network.

    model: any torch.nn.Module mapping (N, 3, H, W) to logits (N, C, h, w); it is moved to the
        device and otherwise left as it was found.
    device: 'auto', 'cuda', 'mps', 'cpu' or a torch.device.
    preprocessing: how inputs were normalised; by default the model's own, else ImageNet's.
    step_batch: interpolation steps per pass; by default chosen for the device.
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
        self.dtype = next(
            (p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32
        )
        self.preprocessing = preprocessing or getattr(model, 'preprocessing', Preprocessing())
        self.step_batch = StepBatch(self.device, step_batch)

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
        rule: str = 'midpoint',
        *,
        score: str = 'logit',
        threshold: float = 0.5,
        truth: np.ndarray | None = None,
        placement: Placement | None = None,
        baseline_draws: int = 4,
        seed: int = 0,
        progress: bool = False,
    ) -> Explanation:
        """Explain one image.

        input_tensor: (3, H, W) or (1, 3, H, W), normalised as the model expects.
        target: a spec (a key of TARGETS, see --help), a Target, or an (h, w) boolean mask of
            output pixels.
        baseline_type: a key of BASELINES, an image file, or a tensor of the input's shape in
            the same normalised space.
        num_steps, rule: interpolation steps and the quadrature rule, a key of RULES.
        score: 'logit' or 'probability'. threshold: of the predicted mask, for one-class models.
        truth: (h, w) class labels, for target 'truth'. placement: for target 'pixel:X,Y' in
            original image coordinates; without it X,Y are output pixels.
        baseline_draws, seed: of the baseline 'random'.

        Raises InputError: wrong shapes or values, non-finite output, not enough memory;
        EmptyTargetError: the target region holds no pixel.
        """
        started = time.perf_counter()
        Settings(
            score=score,
            threshold=threshold,
            num_steps=num_steps,
            rule=rule,
            baseline_draws=baseline_draws,
        )  # validates
        quadrature = RULES[rule](num_steps)
        x = self._check_input(input_tensor)  # (1, 3, H, W)
        baselines = self._baselines(x, baseline_type, baseline_draws, seed)
        with torch.inference_mode(False), frozen(self.model):
            logits = self._logits(x)  # (1, C, h, w)
            labels = predicted_labels(logits[0], threshold)
            target = self._target(target, score, logits[0], labels, truth, placement)
            total = torch.zeros_like(x)
            baseline_scores = []
            self.step_batch.start(x.shape[-2] * x.shape[-1])
            steps = tqdm(total=num_steps * len(baselines), desc='interpolation steps',
                         unit='step', leave=False, disable=not progress)  # fmt: skip
            with steps:
                for baseline in baselines:
                    baseline_scores.append(float(target(self._logits(baseline))))
                    gradient = self._path_gradient(x, baseline, target, quadrature, steps.update)
                    total += (x - baseline) * gradient / len(baselines)
        if not bool(torch.isfinite(total).all()):
            raise InputError('the gradients are not finite (is the checkpoint damaged?)')
        mask, prediction = _explained_class(target.name, logits, labels)
        return Explanation(
            attributions=total.reshape(input_tensor.shape).to(input_tensor.device),
            prediction=prediction.cpu(),
            predicted_mask=mask.cpu(),
            region=target.region.cpu(),
            baseline_pixels=self.preprocessing.to_pixels(baselines[0]),
            target=target.name,
            score_type=target.score,
            baseline=baseline_type if isinstance(baseline_type, str) else 'tensor',
            rule=quadrature.name,
            steps=num_steps,
            gradient_evaluations=num_steps * len(baselines),
            score=float(target(logits)),
            baseline_score=float(np.mean(baseline_scores)),
            attribution_sum=float(total.double().sum() if x.device.type != 'mps' else total.sum()),
            seconds=time.perf_counter() - started,
            step_batch=self.step_batch.size,
            seed=seed,
            peak_memory_bytes=peak_memory(self.device),
            precision=str(x.dtype).removeprefix('torch.'),
        )

    def _path_gradient(
        self,
        x: torch.Tensor,
        baseline: torch.Tensor,
        target: Callable[[torch.Tensor], torch.Tensor],
        rule: Rule,
        on_steps: Callable[[int], object],
    ) -> torch.Tensor:
        """The integral of dF/dx along the straight path, (1, 3, H, W).

        One accumulator image, whatever the number of steps. A chunk that does not fit into
        memory is tried again in halves; what was accumulated before stays.
        """
        nodes = torch.as_tensor(rule.nodes, dtype=x.dtype, device=x.device)
        weights = torch.as_tensor(rule.weights, dtype=x.dtype, device=x.device)
        total = torch.zeros_like(x)
        done = 0
        while done < len(nodes):
            chunk = slice(done, done + self.step_batch.size)
            try:
                gradients = self._gradients(x, baseline, nodes[chunk], target)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                gradients = None
            if gradients is None:  # outside `except`, whose traceback would keep tensors alive
                self.step_batch.halve()
                continue
            total += torch.einsum('s,schw->chw', weights[chunk], gradients)
            done += len(gradients)
            on_steps(len(gradients))
            if done == len(gradients):
                self.step_batch.adapt()
        return total

    def _gradients(
        self,
        x: torch.Tensor,
        baseline: torch.Tensor,
        alphas: torch.Tensor,
        target: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """dF/dx at the path points of these alphas, (steps, 3, H, W)."""
        points = baseline + alphas.view(-1, 1, 1, 1) * (x - baseline)  # (steps, 3, H, W)
        with torch.enable_grad():
            points.requires_grad_()
            scores = target(segmentation_logits(self.model(points.to(self.dtype))))  # (steps,)
            # samples do not mix in evaluation mode: the gradient of the sum is each one's own
            return torch.autograd.grad(scores.sum(), points)[0]

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (1, C, h, w) without a graph. Raises InputError where they are not finite."""
        try:
            with torch.no_grad():
                logits = segmentation_logits(self.model(x.to(self.dtype)))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise InputError(
                    f'not enough memory on {self.device} for one forward pass '
                    '(use a smaller --image_size, or --device cpu)'
                ) from None
            raise
        if not bool(torch.isfinite(logits).all()):
            raise InputError('the model gives logits that are not finite (damaged checkpoint?)')
        return logits

    def _check_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input as (1, 3, H, W) on the device, cut off from the caller's graph: float32, in
        which gradients then accumulate, or float64 for a double-precision model."""
        shape = tuple(tensor.shape)
        if not (len(shape) == 3 or (len(shape) == 4 and shape[0] == 1)) or shape[-3] != 3:
            raise InputError(f'input_tensor must be (3, H, W) or (1, 3, H, W), not {shape}')
        working = torch.float64 if self.dtype == torch.float64 else torch.float32
        x = tensor.detach().to(self.device, working).reshape(1, *shape[-3:])
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

    def _target(
        self,
        target: str | Target | torch.Tensor,
        score: str,
        logits: torch.Tensor,
        labels: torch.Tensor,
        truth: np.ndarray | None,
        placement: Placement | None,
    ) -> Target:
        """The target object of whatever form of target the caller gave."""
        if isinstance(target, Target):
            return target
        if truth is not None:
            truth = torch.as_tensor(truth, dtype=torch.int64, device=logits.device)
            if truth.shape != labels.shape:
                raise InputError(
                    f'truth has shape {tuple(truth.shape)}, the prediction {tuple(labels.shape)}'
                )
        context = TargetContext(logits, labels, truth, placement)
        if isinstance(target, str):
            return build_target(target, context, score)
        region = torch.as_tensor(target, dtype=torch.bool, device=logits.device)
        if region.shape != labels.shape:
            raise InputError(
                f'the target mask has shape {tuple(region.shape)}, the prediction '
                f'{tuple(labels.shape)}'
            )
        if not region.any():
            raise EmptyTargetError('the target mask is empty')
        return Target('mask', context.choose(region, labels), score)


def segmentation_logits(output: object) -> torch.Tensor:
    """The logit map (N, C, h, w) in a model's output: itself, the first of a tuple (smp with an
    auxiliary head), or under `out` (torchvision). Raises InputError for anything else."""
    if isinstance(output, dict):
        output = output.get('out')
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor) or output.ndim != 4:
        raise InputError('the model must return a logit map (N, C, H, W) (wrap it so that it does)')
    return output


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
        'precision': explanation.precision,
        'seconds': explanation.seconds,
        'peak_memory_bytes': explanation.peak_memory_bytes,
        'score': explanation.score,
        'baseline_score': explanation.baseline_score,
        'attribution_sum': explanation.attribution_sum,
        'completeness_gap': explanation.completeness_gap,
        'map_error': None,  # the estimate of the map's own error is not computed yet
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
        f'Time                        {statistics["seconds"]:.1f} s, '
        f'{statistics["gradient_evaluations"]} gradient evaluations',
    ]
    heading = (
        f'{statistics["image"]} (target {statistics["target"]}, baseline {statistics["baseline"]})'
    )
    return '\n  '.join([heading, *lines])


# --------------------------------------------------------------------------- files


class OutputError(InputError):
    """A result cannot be written."""


@contextlib.contextmanager
def _explained_writing(path: Path) -> Iterator[None]:
    """Turn an operating-system error into one sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f'cannot write {path}: {error.strerror or error} '
            '(free some space, or choose another --output_dir)'
        ) from None


def prepare_output(folder: str | Path) -> Path:
    """Make the output folder and try whether it can be written, before hours are spent."""
    folder = Path(folder)
    with _explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def write_files(writers: dict[Path, Callable[[Path], object]]) -> None:
    """Write files so that each is there whole or not at all, and the last only with the others.

    All are first written under temporary names; only when every one is complete are they
    renamed. The last file marks the set as finished: its old version goes before the renaming.
    Raises OutputError; the old files are then still there.
    """
    temporary = {path: path.with_name(f'.tmp{os.getpid()}_{path.name}') for path in writers}
    try:
        for path, write in writers.items():
            with _explained_writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(temporary[path])
        with _explained_writing(path):
            path.unlink(missing_ok=True)
            for path, whole in temporary.items():
                os.replace(whole, path)
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)


def _json_writer(content: object) -> Callable[[Path], object]:
    text = json.dumps(content, indent=2, allow_nan=False) + '\n'
    return lambda path: path.write_text(text, encoding='utf-8')


def _figure_writer(figure) -> Callable[[Path], object]:
    return lambda path: figure.savefig(path, format='png')


def _arrays_writer(arrays: dict[str, np.ndarray]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with path.open('wb') as stream:  # a path would get .npz added to its name
            np.savez_compressed(stream, **arrays)

    return write


def _csv_writer(rows: Sequence[dict]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with path.open('w', newline='', encoding='utf-8') as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    return write


def image_files(folder: Path) -> dict[str, Path]:
    """The files of one image's folder by what they hold; the statistics mark it as finished."""
    return {
        'attribution': folder / f'{folder.name}_attribution.png',
        'channels': folder / f'{folder.name}_channels.png',
        'arrays': folder / f'{folder.name}_attributions.npz',
        'statistics': folder / f'{folder.name}_statistics.json',
    }


def load_view(folder: str | Path) -> tuple[View, dict]:
    """What the figures of an image folder show, read back from its files, and its statistics."""
    files = image_files(Path(folder))
    statistics = json.loads(files['statistics'].read_text(encoding='utf-8'))
    with np.load(files['arrays'], allow_pickle=False) as arrays:
        return view_of(dict(arrays)), statistics


def redraw_figures(folder: str | Path) -> None:
    """Draw the two figures of an image folder again from its files, without the model."""
    view, statistics = load_view(folder)
    files = image_files(Path(folder))
    write_files(
        {
            files['attribution']: _figure_writer(attribution_figure(view, statistics)),
            files['channels']: _figure_writer(channels_figure(view, statistics)),
        }
    )


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


def view_of(arrays: dict[str, np.ndarray]) -> View:
    """The figures' view of such arrays, letterbox padding cut away."""
    size = tuple(int(side) for side in arrays['original_size'])
    crop = Placement(size, *(int(side) for side in arrays['content'])).crop
    return View(
        image=arrays['image'],
        original_size=size,
        attributions=np.moveaxis(crop(np.moveaxis(arrays['attributions'], 0, 2)), 2, 0),
        predicted_mask=crop(arrays['predicted_mask']),
        region=crop(arrays['region']),
        truth=crop(arrays['truth']) if 'truth' in arrays else None,
        baseline=crop(arrays['baseline']),
    )


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
) -> tuple[Explanation, np.ndarray | None]:
    """Explain an image as it was read: (H, W, 3) uint8, with (H, W) uint8 truth labels if known.

    Returns the explanation and the truth of the explained class at model resolution, (S, S)
    bool or None. Where `settings.on_empty` is 'image', an empty target becomes the whole image.
    """
    preprocessing = ig.preprocessing
    if truth is not None:
        truth = preprocessing.resize_mask(truth)

    def explain(target: str) -> Explanation:
        return ig.explain(
            preprocessing.normalise(preprocessing.resize_image(image)),
            target=target,
            baseline_type=settings.baseline,
            num_steps=settings.num_steps,
            rule=settings.rule,
            score=settings.score,
            threshold=settings.threshold,
            truth=truth,
            placement=preprocessing.place(image.shape[:2]),
            baseline_draws=settings.baseline_draws,
            seed=settings.seed,
            progress=progress,
        )

    try:
        explanation = explain(settings.target)
    except EmptyTargetError:
        if settings.on_empty != 'image':
            raise
        explanation = explain('image')
    if truth is None:
        return explanation, None
    kind, _, number = explanation.target.partition(':')
    return explanation, truth == int(number) if kind == 'class' else truth > 0


def describe_image(
    ig: IntegratedGradients,
    name: str,
    image: np.ndarray,
    truth: np.ndarray | None,
    settings: Settings,
    progress: bool = False,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Explain an image: its statistics, and the arrays that its figures are drawn from.

    Arguments and errors as for `explain_image`; the figures are
    `attribution_figure(view_of(arrays), statistics)` and `channels_figure(...)`.
    """
    notes = []
    if truth is not None and truth.shape != image.shape[:2]:
        notes.append(
            f'the mask is {truth.shape[1]}×{truth.shape[0]}, the image '
            f'{image.shape[1]}×{image.shape[0]}: the mask was resized (nearest neighbour)'
        )
    explanation, truth = explain_image(ig, image, settings, truth, progress)
    if explanation.target != settings.target:
        notes.append(f'target "{settings.target}" was empty: the whole image was explained')
    statistics = {
        'image': name,
        **explanation_statistics(explanation, truth),
        'notes': notes,
        'settings': settings_record(ig, settings),
        'versions': versions(),
    }
    place = ig.preprocessing.place(image.shape[:2])
    return statistics, display_arrays(explanation, image, truth, place)


def analyse_sample(
    ig: IntegratedGradients,
    sample: Sample,
    settings: Settings,
    output_dir: Path,
    progress: bool = False,
) -> dict:
    """Explain one sample and write its four files; returns the content of its statistics file.

    A sample that was finished before under the same settings, image, truth and checkpoint is
    read back instead. Raises InputError for an unusable sample, OutputError if writing fails.
    """
    image, truth = sample.image(), sample.truth()
    key = resume_key(settings_record(ig, settings), image, truth)
    files = image_files(output_dir / sample.name)
    done = finished_statistics(files, key)
    if done is not None:
        return done
    statistics, arrays = describe_image(ig, sample.name, image, truth, settings, progress)
    statistics |= {'image_path': str(sample.image_path), 'resume_key': key}
    view = view_of(arrays)
    write_files(
        {
            files['attribution']: _figure_writer(attribution_figure(view, statistics)),
            files['channels']: _figure_writer(channels_figure(view, statistics)),
            files['arrays']: _arrays_writer(arrays),
            files['statistics']: _json_writer(statistics),
        }
    )
    return statistics


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
    without = ('step_batch', 'device', 'model_path')  # these do not change what is computed
    decisive = {name: value for name, value in record.items() if name not in without}
    digest = hashlib.sha256(json.dumps([decisive, versions()], sort_keys=True).encode())
    for array in (image, truth):
        digest.update(repr(None if array is None else array.shape).encode())
        digest.update(b'' if array is None else array.tobytes())
    if record['baseline'] not in BASELINES and Path(record['baseline']).is_file():
        digest.update(Path(record['baseline']).read_bytes())
    return digest.hexdigest()


def finished_statistics(files: dict[str, Path], key: str) -> dict | None:
    """The statistics of an image that was finished with this key; None if it must be computed."""
    try:
        statistics = json.loads(files['statistics'].read_text(encoding='utf-8'))
        same = statistics['resume_key'] == key
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return statistics if same and all(path.is_file() for path in files.values()) else None


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
    **options: object,
) -> BatchResult:
    """Explain images of a dataset split, evenly spaced through it, and write a summary.

    num_samples: None for all. options: further fields of `Settings`. An image that cannot be
    used is listed in the result and does not stop the others.
    Raises InputError for an unusable model, folder or setting, OutputError if writing fails.
    """
    settings = Settings(baseline=baseline_type, num_steps=num_steps, **options)
    samples = choose_samples(list_samples(data_dir, split), num_samples)
    output_dir = prepare_output(output_dir)
    ig = _prepare(model_path, settings, encoder, architecture, device)
    return analyse_batch(ig, samples, settings, output_dir)


def analyse_batch(
    ig: IntegratedGradients, samples: Sequence[Sample], settings: Settings, output_dir: Path
) -> BatchResult:
    """Explain the samples one after the other and write summary.csv, .json and .png."""
    images, skipped, failed = [], [], []
    try:
        for sample in tqdm(samples, desc='images', unit='image'):
            try:
                statistics = analyse_sample(ig, sample, settings, output_dir)
                images.append(statistics)
                _say_warnings(statistics)
            except OutputError:
                raise
            except EmptyTargetError as error:
                skipped.append({'image': sample.name, 'reason': str(error)})
            except InputError as error:
                failed.append({'image': sample.name, 'reason': str(error)})
                tqdm.write(f'failed: {sample.name}: {error}', file=sys.stderr)
    finally:  # an interrupted batch keeps a summary of what it finished
        result = BatchResult(images, skipped, failed, batch_summary(images, skipped, failed))
        write_summary(result, settings, output_dir)
    return result


def batch_summary(images: list[dict], skipped: list[dict], failed: list[dict]) -> dict:
    """Counts, the median of every figure, and what looks wrong about the predictions."""
    medians = {}
    for key in (
        'completeness_gap', 'attribution_ratio', 'share_in_prediction', 'share_in_truth',
        'prediction_ratio', 'dice', 'iou', 'pixel_accuracy', 'seconds',
    ):  # fmt: skip
        values = [entry[key] for entry in images if entry[key] is not None]
        medians[f'median_{key}'] = median(values) if values else None
    full = sum(entry['prediction_ratio'] > DEGENERATE_RATIO for entry in images)
    empty = len(skipped) + sum(entry['prediction_area'] == 0 for entry in images)
    suspicion = None
    if 2 * (full + empty) > len(images) + len(skipped):
        suspicion = (
            f'the prediction is empty on {empty} and all foreground on {full} of '
            f'{len(images) + len(skipped)} images: the preprocessing may not be what the model '
            'was trained with (try --normalize none, another --image_size or --resize letterbox)'
        )
    counts = {'images': len(images), 'skipped': len(skipped), 'failed': len(failed)}
    return {**counts, **medians, 'suspicion': suspicion}


def write_summary(result: BatchResult, settings: Settings, output_dir: Path) -> None:
    """summary.csv (one row an image), summary.json (everything) and summary.png."""
    content = {
        'summary': result.summary,
        'settings': asdict(settings),
        'skipped': result.skipped,
        'failed': result.failed,
        'images': result.images,
    }
    rows = [_summary_row(entry) for entry in result.images]
    columns = list(rows[0]) if rows else ['image', 'status', 'reason']
    for status, entries in (('skipped', result.skipped), ('failed', result.failed)):
        rows += [dict.fromkeys(columns, '') | entry | {'status': status} for entry in entries]
    writers = {output_dir / 'summary.csv': _csv_writer(rows)} if rows else {}
    if not result.images:  # an earlier run's picture would not belong to this summary
        (output_dir / 'summary.png').unlink(missing_ok=True)
    else:
        figure = summary_figure(result.images, settings.gap_tolerance)
        writers[output_dir / 'summary.png'] = _figure_writer(figure)
    write_files(writers | {output_dir / 'summary.json': _json_writer(content)})


def _summary_row(statistics: dict) -> dict:
    """A row of summary.csv: the flat figures of one image."""
    shares = statistics['channel_shares'] or (None, None, None)
    flat = {k: v for k, v in statistics.items() if not isinstance(v, (dict, list))}
    flat |= dict(zip(('share_red', 'share_green', 'share_blue'), shares, strict=True))
    return {'image': flat.pop('image'), 'status': 'done', 'reason': '', **flat}


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
    return IntegratedGradients(model, device, preprocessing, settings.step_batch)


def _say_warnings(statistics: dict) -> None:
    """What the user must not miss about one image, on stderr."""
    for text in (*statistics['notes'], gap_warning(statistics)):
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
        epilog='Exit status: 0 done, 1 some images of a batch failed, 2 bad input, 130 Ctrl-C.',
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

    add = parser.add_argument_group('model').add_argument
    add('--model_path', type=Path, required=True,
        help='checkpoint: .pth, .safetensors, or a folder of save_pretrained')
    add('--encoder',
        help=f"an smp encoder (default: the checkpoint's, else {DEFAULT_ENCODER})")
    add('--architecture', choices=ARCHITECTURES,
        help=f"default: the checkpoint's, else {DEFAULT_ARCHITECTURE}")
    add('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    add('--step_batch', type=_whole_number, default=default.step_batch, metavar='N',
        help='interpolation steps computed at once (default: chosen for the device)')

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
    add('--target', default=default.target, help=f'{rows} (default: %(default)s)')
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
    add('--num_steps', type=_whole_number, default=default.num_steps, metavar='N',
        help='interpolation steps (default: %(default)s)')
    add('--rule', choices=tuple(RULES), default=default.rule,
        help='quadrature rule (default: %(default)s)')
    add('--gap_tolerance', type=float, default=default.gap_tolerance,
        help='completeness gap above which to warn (default: %(default)s)')
    # fmt: on
    return parser


def run_single(args: argparse.Namespace, settings: Settings) -> int:
    """Explain one image and print its statistics."""
    if args.image_path is None:
        raise InputError('--mode single needs --image_path (or use --mode batch with --data_dir)')
    sample = single_sample(args.image_path, args.mask_path)
    sample.image()  # a bad image is told before the model is loaded
    output_dir = prepare_output(args.output_dir)
    ig = _prepare(args.model_path, settings, args.encoder, args.architecture, args.device)
    statistics = analyse_sample(ig, sample, settings, output_dir, progress=True)
    print(statistics_text(statistics))
    print(f'Files in {output_dir / sample.name}')
    _say_warnings(statistics)
    return 0


def run_batch(args: argparse.Namespace, settings: Settings) -> int:
    """Explain a dataset split and print its summary; 1 if some image failed."""
    result = batch_integrated_gradients_analysis(
        args.model_path, args.data_dir, args.output_dir, args.num_samples,
        split=args.split, encoder=args.encoder, architecture=args.architecture,
        device=args.device, baseline_type=settings.baseline,
        **{k: v for k, v in asdict(settings).items() if k != 'baseline'},
    )  # fmt: skip
    counts = result.summary
    print(
        f'{counts["images"]} images explained, {counts["skipped"]} skipped (empty target), '
        f'{counts["failed"]} failed'
    )
    for key, value in counts.items():
        if key.startswith('median_') and value is not None:
            print(f'  {key.replace("_", " "):28}{value:.4g}')
    print(f'Files in {args.output_dir}')
    if counts['suspicion']:
        print(f'WARNING: {counts["suspicion"]}', file=sys.stderr)
    return 1 if result.failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    names = {f.name for f in fields(Settings)}
    try:
        settings = Settings(**{k: v for k, v in vars(args).items() if k in names})
        return run_single(args, settings) if args.mode == 'single' else run_batch(args, settings)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; the same command goes on where this one stopped', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
