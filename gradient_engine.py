"""Running a network for many gradient evaluations: the same numbers in less time.

Integrated Gradients evaluates dF/dx tens to hundreds of times on fixed weights. `network_graph`
makes of the network a graph that is rewritten once and cropped, for each image, to what its targets
can see; whether it computes the same is measured on the user's input (`measure_deviation`, and
`GradientEngine.view` for the crops). A network without a graph runs as it is.

On top of it: reduced precision, checked against float32 on every image; the number of
interpolation steps that go through the network at once, measured; and `PathSampler`, which turns
nodes of a path into attribution densities of one or several targets that share the forward passes.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import cv2
import numpy as np
import torch
from torch import nn

from attribution_path import (
    AttributionPath,
    Score,
    choice_among,
    enlarged,
    segmentation_logits,
)
from attribution_target import Target
from crop_rules import Box, slices_of, whole
from errors import InputError, NonFiniteError, attempt
from graph_rewrites import Rewrites
from network_description import plain_attributes
from network_graph import NetworkGraph, Plan
from operation_graph import NotExportable
from path_integral import norms

PRECISIONS = ('auto', 'float32', 'bfloat16', 'float16')
CHECKED_NODES = (0.25, 0.5)  # evaluated in float32 too, where precision is reduced
MAX_STEP_BATCH = 64  # beyond this a GPU gains nothing, and the allocator suffers
CPU_STEP_BATCH_PIXELS = 4 * 256 * 256  # on a CPU batching pays only while images are small
WORTHWHILE = 0.95  # a larger step batch must take at most this share of the time per step
EQUIVALENCE_TOLERANCE = 1e-4  # relative L2; beyond this the copy is not used
EXACT_TOLERANCE = 1e-9  # the same in double precision
ROUNDED_GRADIENT = 0.02  # what rounding alone may do to a gradient, at most
ARBITER_SIDE = 128  # of the part of an image on which double precision is asked first
WORTHWHILE_CROP = 0.9  # of the whole network's work; a crop that needs more is left alone
MOST_PARTS = 64  # of a region that are cropped apart; of more, the box around all
MOST_GRAPHS = 4  # of image sizes that are kept


@dataclass(frozen=True)
class Preparation:
    """What was done to a private copy of a network, and what it changed."""

    folded: int  # batch norms folded into convolutions
    transposed: int  # convolutions whose backward runs as a forward convolution
    logit_deviation: float  # relative L2 difference of the logits from the original's
    gradient_deviation: float  # of one gradient
    fell_back: bool  # the original is used, because the copy deviated too much
    padded: int = 0  # paddings folded into convolutions
    no_graph: str | None = None  # why the network runs as it is, without these and without cropping


class LogitMap(nn.Module):
    """A network whose result is the one logit map that is explained, at the input's size where it
    is smaller (see `segmentation_logits` and `enlarged`)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-2:]
        return enlarged(segmentation_logits(self.network(x), size), size)


# Images (N, C, H, W) -> whatever holds their logits.
Network = Callable[[torch.Tensor], object]


def prepared_copy(model: nn.Module, example: torch.Tensor) -> tuple[Network, Preparation]:
    """A network's graph, rewritten and compared with the original. Where there is none, a private
    copy as it is; where that deviates, the original.

    example: an input (1, C, H, W) in the network's precision.
    """
    with frozen(model):
        graph, reason = attempt(partial(NetworkGraph, LogitMap(model), example), NotExportable)
        network = plain_copy(model) if graph is None else graph
        with torch.no_grad():
            model(example)  # one that counts its calls falls out of step with what stands for it
        deviations = measure_deviation(model, network, example)
        fell_back = not max(deviations) <= EQUIVALENCE_TOLERANCE  # also where it is not a number
        if fell_back and max(measure_deviation(model, model, example)) > EQUIVALENCE_TOLERANCE:
            raise InputError(
                'the network gives another answer each time it is asked, also in evaluation mode '
                '(dropout that is always on, or a state that changes: there is nothing to '
                'integrate)'
            )
        if fell_back and graph and example.device.type == 'cpu' and example.dtype == torch.float32:
            fell_back = not _same_in_double_precision(model, example, *deviations)
    rewrites = Rewrites(0, 0, 0) if graph is None else graph.rewrites
    preparation = Preparation(
        rewrites.folded, rewrites.transposed, *deviations, fell_back,
        padded=rewrites.padded, no_graph=reason,
    )  # fmt: skip
    return model if fell_back else network, preparation


def _same_in_double_precision(
    model: nn.Module, x: torch.Tensor, logits: float, gradient: float
) -> bool:
    """Whether original and graph agree where rounding cannot excuse a difference.

    In single precision it can: it alone may push a ReLU over its kink, most of all where an image
    is flat. Where that explains what was found on an image x, since the logits agree and the
    gradient is not far off, a part of the image shows it, in a fraction of time and memory.
    logits, gradient: how far they deviated in single precision.
    """
    likely = logits <= EQUIVALENCE_TOLERANCE and gradient <= ROUNDED_GRADIENT
    for part in [_middle(x, ARBITER_SIDE), x] if likely else [x]:
        try:
            double, part = copy.deepcopy(model).double(), part.double()
            exact = measure_deviation(double, NetworkGraph(LogitMap(double), part), part)
        except Exception:  # a network that takes no other size, cannot be copied, has its own types
            continue
        return max(exact) <= EXACT_TOLERANCE
    return False


def _middle(x: torch.Tensor, side: int) -> torch.Tensor:
    """The middle of images (N, C, H, W), of at most that side."""
    (top, height), (left, width) = (
        ((size - min(size, side)) // 2, min(size, side)) for size in x.shape[-2:]
    )
    return x[..., top : top + height, left : left + width]


def plain_copy(model: nn.Module) -> nn.Module:
    """A private copy that computes what the network does, channels_last; where it cannot be
    copied, the network itself."""
    try:
        network = copy.deepcopy(model).eval().requires_grad_(False)
        return network.to(memory_format=torch.channels_last)
    except Exception:  # any module must run; one that resists is left alone
        return model


# --------------------------------------------------------------------------- equivalence


def measure_deviation(
    original: Network, network: Network, example: torch.Tensor
) -> tuple[float, float]:
    """Relative L2 difference between two networks of the logits, and of the gradient of their
    sum of squares, in which strong logits weigh most."""
    results = []
    for one in (original, network):
        x = example.detach().clone().requires_grad_()
        with torch.enable_grad():
            size = x.shape[-2:]
            logits = enlarged(segmentation_logits(one(x), size), size)
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), x)
        results.append((logits.detach(), gradient))
    (logits, gradient), (other_logits, other_gradient) = results
    return relative_difference(other_logits, logits), relative_difference(other_gradient, gradient)


def relative_difference(other: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference, relative to the expected; 0 where both are zero."""
    difference, size = float((other - expected).norm()), float(expected.norm())
    return difference / size if size else (0.0 if difference == 0 else float('inf'))


# --------------------------------------------------------------------------- reduced precision


def reduced_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that convolutions run in under a precision setting; None for float32.

    `auto` reduces only where the hardware multiplies in that type: bfloat16 on CPUs that have
    its instructions and on GPUs from Ampere on.
    """
    if precision == 'auto':
        if device.type == 'cuda':
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            native = device.type == 'cpu' and cpu_has_bfloat16()
        return torch.bfloat16 if native else None
    return None if precision == 'float32' else getattr(torch, precision)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (x86: AVX-512 or AMX; ARM)."""
    if not hasattr(torch.cpu, 'get_capabilities'):  # torch before 2.10
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16', 'sve_bf16'))


def reduced_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy for autocast whose convolutions and linear layers hold their weights in that type,
    so that they are not converted again in every pass."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return network


# --------------------------------------------------------------------------- step batch


class StepBatch:
    """How many interpolation steps go through the network at once.

    A fixed size is kept. Without one, each shape of input is measured once, on steps that are
    needed anyway: 1, 2, 4, … at a time while that saves time and fits into memory; one size that
    does not pay is passed over, since the next may. Any size is halved when memory runs out.
    """

    def __init__(self, device: torch.device, fixed: int | None = None) -> None:
        self.device = device
        self.size = fixed or 1
        self._fixed = fixed is not None
        self._chosen: dict[object, int] = {}  # what was found for a shape
        self._measuring = False
        self._times: list[float] = []  # seconds a step at the current size
        self._best, self._best_size = float('inf'), 1

    def start(self, pixels: int, precision: torch.dtype | None = None) -> None:
        """Prepare for an image of that many pixels."""
        self._key = (pixels, precision)
        if self._fixed:
            return
        self._measuring = self._key not in self._chosen
        self.size = self._chosen.get(self._key, 1)
        self._limit = min(MAX_STEP_BATCH, max(1, CPU_STEP_BATCH_PIXELS // pixels))
        self._times, self._best, self._best_size = [], float('inf'), self.size
        if self.device.type == 'cuda' and self._measuring:
            self._limit = MAX_STEP_BATCH
            self._idle_bytes = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def timed(self, count: int) -> Iterator[None]:
        """Around a chunk of `count` steps; a GPU is waited for only while measuring."""
        if not self._measuring or count < self.size:
            yield
            return
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.judge((time.perf_counter() - started) / count)

    def judge(self, seconds: float) -> None:
        """Take note of the seconds a step took, and go on to twice the size or settle."""
        if self.device.type == 'cuda' and self.size == 1:
            self._limit = min(MAX_STEP_BATCH, self._room())
        self._times.append(seconds)
        if len(self._times) == 1 and self._limit > 1:
            return  # the first pass of a size also sets up its kernels
        if self._times[-1] <= WORTHWHILE * self._best:
            self._best, self._best_size = self._times[-1], self.size
        if self.size <= 2 * self._best_size and 2 * self.size <= self._limit:
            self._times = []
            self.size *= 2
            return
        self.size = self._best_size
        self._settle()

    def _room(self) -> int:
        """How many steps fit into four fifths of a GPU's free memory, by what one step took."""
        used = torch.cuda.max_memory_allocated(self.device) - self._idle_bytes
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device)
        free -= torch.cuda.memory_allocated(self.device)
        return max(1, int(0.8 * free / max(1, used)))

    def halve(self) -> None:
        """After running out of memory. Raises MemoryError when a single step does not fit."""
        if self.size == 1:
            raise MemoryError('out of memory for a single step')
        self.size //= 2
        self._settle()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()

    def _settle(self) -> None:
        self._measuring = False
        self._chosen[self._key] = self.size

    def _wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


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


class OutOfMemory(Exception):
    """Memory does not suffice, whichever library noticed."""


@contextlib.contextmanager
def out_of_memory_is_one_error() -> Iterator[None]:
    """Turn every way of running out of memory into OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from None


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


@contextlib.contextmanager
def explained_memory(device: torch.device) -> Iterator[None]:
    """Turn running out of memory into one sentence, an InputError."""
    try:
        with out_of_memory_is_one_error():
            yield
    except OutOfMemory:
        raise InputError(
            f'not enough memory on {device} for the gradient of one image '
            '(use a smaller image size, or device cpu)'
        ) from None


@contextlib.contextmanager
def explained_network(shape: Sequence[int]) -> Iterator[None]:
    """Around the network only: turn whatever it raises on an input of that shape into one
    sentence, an InputError; but for running out of memory, after which less may be tried."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = next(iter(str(error).strip().splitlines()), '')
        if 'does not require grad' in text:
            raise InputError(
                'the network gives no gradient at its input (take torch.no_grad, detach or argmax '
                'out of its forward)'
            ) from error
        raise InputError(
            f'the network cannot be run on an input of shape {tuple(shape)}: '
            f'{type(error).__name__}: {text[:300]} (are size and channels those of its training?)'
        ) from error


# --------------------------------------------------------------------------- the engine


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; everything as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # Parameters made in inference mode take no part in gradients anyway.
    wants = [(p, p.requires_grad) for p in model.parameters() if not p.is_inference()]
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


def fingerprint(model: nn.Module) -> tuple:
    """Changes when the network does: a plain attribute, or a weight, by where it lies, how often
    it was changed in place, and three sums; costs a thousandth of a gradient."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    places = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    known = (plain_attributes(model), *places)
    if not tensors:
        return known
    with torch.no_grad():  # the second and third see values that change places
        sums = [t.sum(dtype=torch.float32) for t in tensors]
        sums += [t.flatten()[::2].sum(dtype=torch.float32) for t in tensors]
        sums += [t.flatten()[: t.numel() // 2].sum(dtype=torch.float32) for t in tensors]
    return (*known, *torch.stack(sums).tolist())


def check_finite(values: torch.Tensor, what: str, alphas: Sequence[float] = ()) -> None:
    """Raise NonFiniteError where one of a batch's samples (N, ...) holds a NaN or an infinity.

    alphas: of the samples, where they are interpolation steps.
    """
    fine = torch.isfinite(values).flatten(1).all(dim=1)
    if not bool(fine.all()):
        first = int((~fine).nonzero()[0])
        raise NonFiniteError(what, alphas[first] if alphas else None)


def boxes_of(region: torch.Tensor) -> list[Box]:
    """The boxes around the connected parts of a region (h, w) bool, as boxes of a map (N, K, h, w);
    of very many, the one around all."""
    pixels = region.cpu().numpy().astype(np.uint8)
    count, _, stats, _ = cv2.connectedComponentsWithStats(pixels, connectivity=8)
    parts = stats[1:, :4] if count - 1 <= MOST_PARTS else [cv2.boundingRect(pixels)]
    return [
        (None, None, (int(y), int(y + height)), (int(x), int(x + width)))
        for x, y, width, height in parts
    ]


def place_of(box: Box) -> tuple[object, ...]:
    """The rows and columns of a box, as an index of a whole map (..., h, w)."""
    return (..., *slices_of(whole(box), box)[-2:])


@dataclass(frozen=True)
class Cropping:
    """What is computed for some targets of an image, and how exact that was measured to be."""

    computed_share: float = 1.0  # of the convolutions' operations of the whole network
    boxes: int = 1  # of the output
    logit_deviation: float | None = None  # in them, from the whole map's; None: nothing is cropped
    gradient_deviation: float | None = None  # None: measured on another image of this size
    fell_back: bool = False  # nothing is cropped, because the crops deviated too much


@dataclass(frozen=True)
class View:
    """What of the output is computed for some targets, and how their scores are made of it."""

    targets: tuple[Score, ...]
    plan: Plan | None = None  # None: all of the output
    parts: tuple[tuple[Score | None, ...], ...] = ()  # of each target, one in each box of the plan
    cropping: Cropping = field(default_factory=Cropping)

    def scores(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """F of every target, (N,) each. maps: logits (N, K, h, w), one for each box."""
        if self.plan is None:
            return [target(maps[0]) for target in self.targets]
        return [
            sum(
                part(logits)
                for part, logits in zip(parts, maps, strict=True)
                if part is not None  # which then takes no part in its gradient
            )
            for parts in self.parts
        ]


def parts_of(target: Target, boxes: Sequence[Box]) -> tuple[Target | None, ...]:
    """A target's part in each of some boxes, which may overlap: each pixel counts in the first."""
    left, parts = target.weights.clone(), []
    for box in boxes:
        place = place_of(box)
        weights = left[place].clone()
        left[place] = 0
        parts.append(replace(target, weights=weights) if bool(weights.any()) else None)
    return tuple(parts)


class GradientEngine:
    """Logits and gradients of a network, from its graph.

    The graph is made on the first image of a size, and again when the network's weights have
    changed. forward_passes and gradient_evaluations count the samples that went through the
    network, forth and back, for results (not for preparing), in whole or in part.
    """

    def __init__(self, model: nn.Module, device: torch.device, step_batch: int | None) -> None:
        self.model, self.device = model, device
        self.step_batch = StepBatch(device, step_batch)
        self.forward_passes = 0
        self.gradient_evaluations = 0
        self.network: Network | None = None  # the graph, or what runs instead
        self.preparation: Preparation | None = None
        self.output_note: str | None = None  # which of several maps is taken; None: none was seen
        self._reduced: dict[torch.dtype, nn.Module | bool] = {}
        self._fingerprint: tuple | None = None
        self._prepared: dict[torch.Size, tuple[Network, Preparation]] = {}
        self._compared: dict[torch.Size, float] = {}  # gradients of crops with whole ones

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    @contextlib.contextmanager
    def running(self, x: torch.Tensor) -> Iterator[None]:
        """Inside, the network may be run on inputs like x (1, C, H, W), whatever autograd mode or
        autocast the caller is in; the user's network is left as it was. Out of memory is an
        InputError, and so is what the network raises."""
        with (
            torch.inference_mode(False),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
            explained_memory(self.device),
        ):
            self._prepare(x)
            yield

    def _prepare(self, x: torch.Tensor) -> None:
        """Make the graph for inputs like x, unless there is one of the network as it is now."""
        now, size = fingerprint(self.model), x.shape[1:]
        if now != self._fingerprint:
            self._prepared, self._compared = {}, {}
        if size not in self._prepared:
            while len(self._prepared) >= MOST_GRAPHS:
                del self._prepared[next(iter(self._prepared))]
            with explained_network(x.shape):
                self._prepared[size] = self._new_copy(x.to(self.dtype))
        if self._prepared[size][0] is not self.network:
            self.network, self.preparation = self._prepared[size]
            self._reduced = {}
        self._fingerprint = now

    def _new_copy(self, x: torch.Tensor) -> tuple[Network, Preparation]:
        if self.output_note is None:
            with torch.no_grad():
                self.output_note = choice_among(self.model(x), x.shape[-2:])
        return prepared_copy(self.model, x)

    def view(self, targets: Sequence[Score]) -> View:
        """What must be computed of the output for some targets: boxes around their regions, where
        that is less work than all of it."""
        targets = tuple(targets)
        graph, regions = self.network, [t.region for t in targets if isinstance(t, Target)]
        if not isinstance(graph, NetworkGraph) or len(regions) < len(targets):
            return View(targets)
        if any(region.shape != graph.output_shape[2:] for region in regions):
            return View(targets)
        plan = graph.plan(boxes_of(torch.stack(regions).any(dim=0)))
        share = plan.work / graph.whole.work if graph.whole.work else 1.0
        if share > WORTHWHILE_CROP:
            return View(targets)
        parts = tuple(parts_of(target, plan.boxes) for target in targets)
        return View(targets, plan, parts, Cropping(share, len(plan.boxes)))

    def compared_view(
        self, x: torch.Tensor, logits: torch.Tensor, targets: Sequence[Score]
    ) -> View:
        """`view`, after its logits on an image x (1, C, H, W) were compared with those of the whole
        map, and, on the first of its size, its gradient too. A view that deviates is not used."""
        view = self.view(targets)
        if view.plan is None:
            return view
        size, deviations = x.shape[1:], self._crop_deviation(x, logits, view)
        if size not in self._compared:
            deviations = (*deviations, self._gradient_deviation(x, view))
            self._compared[size] = deviations[-1]
        measured = dict(zip(('logit_deviation', 'gradient_deviation'), deviations, strict=False))
        if not max(deviations) <= EQUIVALENCE_TOLERANCE:
            return View(view.targets, cropping=Cropping(**measured, fell_back=True))
        return replace(view, cropping=replace(view.cropping, **measured))

    def _crop_deviation(self, x: torch.Tensor, logits: torch.Tensor, view: View) -> tuple[float]:
        """Of a view's logits, from the whole map's."""
        with torch.no_grad():
            maps = self.maps(x, view.plan)
        expected = [logits[place_of(box)] for box in view.plan.boxes]
        pairs = zip(maps, expected, strict=True)
        return (max(relative_difference(ours, theirs) for ours, theirs in pairs),)

    def _gradient_deviation(self, x: torch.Tensor, view: View) -> float:
        """Of the gradient of all targets' sum, from the whole network's; 0 where only rounding can
        be why, as double precision shows."""

        def compared(dtype: torch.dtype | None) -> float:
            gradients = []
            for one in (View(view.targets), view):
                point = x.detach().clone().to(dtype or self.dtype).requires_grad_()
                with torch.enable_grad(), explained_network(x.shape):
                    plan = one.plan or self.network.whole
                    scores = one.scores(self.network.run(point, plan, dtype))
                    pairs = zip(scores, view.targets, strict=True)
                    total = sum(score.sum() * target.scale for score, target in pairs)
                    gradients.append(torch.autograd.grad(total, point)[0])
            return relative_difference(gradients[1], gradients[0])

        deviation = compared(None)
        if deviation <= EQUIVALENCE_TOLERANCE or self.dtype != torch.float32:
            return deviation
        exact, _ = attempt(partial(compared, torch.float64), Exception)
        self.network.forget(torch.float64)
        return deviation if exact is None or exact > EXACT_TOLERANCE else exact

    def run(
        self, x: torch.Tensor, reduced: torch.dtype | None = None, alphas: Sequence[float] = ()
    ) -> torch.Tensor:
        """Images (N, C, H, W) -> logits (N, K, h, w), both in the working precision, with a graph
        where gradients are enabled. alphas: see `check_finite`. Raises NonFiniteError."""
        return self.maps(x, None, reduced, alphas)[0]

    def maps(
        self,
        x: torch.Tensor,
        plan: Plan | None,
        reduced: torch.dtype | None = None,
        alphas: Sequence[float] = (),
    ) -> list[torch.Tensor]:
        """`run`, for the boxes of a plan, one after the other; None: all."""
        self.forward_passes += len(x)
        run = self._run_graph if isinstance(self.network, NetworkGraph) else self._run_network
        with explained_network(x.shape):
            maps = [one.to(x.dtype) for one in run(x, plan, reduced)]
        for one in maps:
            check_finite(one, 'the logits', alphas)
        return maps

    def seen(self, x: torch.Tensor, view: View) -> torch.Tensor:
        """`run`, as far as a view's targets look: zeros beside its boxes."""
        maps = self.maps(x, view.plan)
        if view.plan is None:
            return maps[0]
        logits = maps[0].new_zeros(len(x), *self.network.output_shape[1:])
        for box, part in zip(view.plan.boxes, maps, strict=True):
            logits[place_of(box)] = part
        return logits

    def _run_graph(
        self, x: torch.Tensor, plan: Plan | None, reduced: torch.dtype | None
    ) -> list[torch.Tensor]:
        """Reduced precision runs whole, weights and activations, but for networks that mix types,
        which run by autocast."""
        graph = self.network
        plan, x = plan or graph.whole, x.to(self.dtype)
        if reduced is not None and reduced not in self._reduced:
            trial = partial(self._try_reduced, x[:1], reduced)
            _, failure = attempt(trial, RuntimeError, TypeError)
            self._reduced[reduced] = failure is None
        if reduced is None or self._reduced[reduced]:
            return graph.run(x, plan, reduced)
        with torch.autocast(self.device.type, dtype=reduced):
            return graph.run(x, plan)

    def _try_reduced(self, x: torch.Tensor, reduced: torch.dtype) -> None:
        with torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            logits = self.network.run(point, self.network.whole, reduced)[0]
            torch.autograd.grad(logits.float().sum(), point)

    def _run_network(
        self, x: torch.Tensor, plan: None, reduced: torch.dtype | None
    ) -> list[torch.Tensor]:
        if reduced is not None and reduced not in self._reduced:
            self._reduced[reduced] = reduced_copy(self.network, reduced)
        network = self.network if reduced is None else self._reduced[reduced]
        casting = {'dtype': reduced} if reduced else {'enabled': False}
        with torch.autocast(self.device.type, **casting):
            output = network(x.to(self.dtype) if reduced is None else x)
        return [segmentation_logits(output, x.shape[-2:])]

    def densities(
        self,
        points: torch.Tensor,
        scores: Sequence[torch.Tensor],
        targets: Sequence[Score],
        velocities: torch.Tensor,
        alphas: Sequence[float] = (),
    ) -> torch.Tensor:
        """Gradient times velocity of every target, from one forward pass: (steps, targets, C, H,
        W).

        points: (steps, C, H, W), the leaf of the graph of `scores`, (steps,) for each target.
        velocities: of the same shape or (1, C, H, W). alphas: see `check_finite`. Raises
        NonFiniteError.
        """
        by_target = []
        for number, (score, target) in enumerate(zip(scores, targets, strict=True), start=1):
            # Samples do not mix in evaluation mode: the gradient of the sum is each one's own.
            # Scaled by the region's size, so that what flows back from each pixel does not
            # underflow.
            with explained_network(points.shape):
                (gradient,) = torch.autograd.grad(
                    score.sum() * target.scale, points, retain_graph=number < len(targets)
                )
            by_target.append(gradient * (velocities / target.scale))
        self.gradient_evaluations += len(points)
        densities = torch.stack(by_target, dim=1)
        check_finite(densities, 'the gradients', alphas)
        return densities

    def look(
        self,
        points: torch.Tensor,
        velocities: torch.Tensor,
        view: View,
        reduced: torch.dtype | None = None,
        alphas: Sequence[float] = (),
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """At points (steps, C, H, W): the view's maps, F of its targets (steps, targets), and their
        densities (steps, targets, C, H, W). Raises NonFiniteError."""
        # Marked below, they may be the path's own; of inference mode, they cannot be.
        points = points.clone() if points.is_inference() else points.detach()
        with torch.enable_grad():
            points.requires_grad_()
            maps = self.maps(points, view.plan, reduced, alphas)
            scores = view.scores(maps)
            densities = self.densities(points, scores, view.targets, velocities, alphas)
        scores = torch.stack([score.detach() for score in scores], dim=1)
        return [one.detach() for one in maps], scores, densities


# --------------------------------------------------------------------------- along a path


@dataclass(frozen=True)
class AtImage:
    """What was found at the image itself, which all paths that end there share."""

    x: torch.Tensor  # (1, C, H, W)
    logits: torch.Tensor  # (1, K, h, w)
    targets: Sequence[Score]
    gradient: torch.Tensor | None  # (targets, C, H, W); None where the rule has no node there
    view: View | None = None  # of all targets; None: the whole map


class PathSampler:
    """The attribution densities along a path, and a log of what was seen on it.

    Called with nodes, it gives their densities (targets, C, H, W), one after the other; `some`
    asks at each node for some of the targets. The nodes go through the network in step batches.
    Densities that were computed before they are asked for (at the ends, or to check the precision)
    wait in `_ready`, and each is given out once.
    """

    def __init__(
        self,
        engine: GradientEngine,
        path: AttributionPath,
        at_image: AtImage,
        overlap: Callable[[torch.Tensor], torch.Tensor],
        on_steps: Callable[[int], object] = lambda count: None,
    ) -> None:
        """overlap: logits (N, K, h, w) -> (N,), how much of the mask is there. on_steps: told the
        number of nodes given out."""
        self.engine, self.path, self.targets = engine, path, tuple(at_image.targets)
        self.everyone = tuple(range(len(self.targets)))
        self.reduced: torch.dtype | None = None  # precision; None: the network's own
        self.scores: dict[float, torch.Tensor] = {}  # of the targets at each node, (targets,); NaN
        # where one was not asked
        self.overlaps: dict[float, torch.Tensor] = {}  # where there was a whole map
        self._overlap, self._on_steps = overlap, on_steps
        self._ready: dict[tuple[float, int], torch.Tensor] = {}  # (C, H, W) at a node of a target
        self._views = {self.everyone: at_image.view or View(self.targets)}
        self._see_the_end(at_image)

    def _see_the_end(self, at_image: AtImage) -> None:
        """Take over what is known where the path ends."""
        if self.path.image is not at_image.x:
            return
        self._log([1.0], at_image.logits)
        if at_image.gradient is not None:
            _, velocity = self.path.at(self._tensor([1.0]))
            self._keep([1.0], self.everyone, (at_image.gradient * velocity).unsqueeze(0))

    def see_the_ends(self, density_at_start: bool) -> None:
        """Log the scores and the mask at both ends, as far as that was not done; density_at_start:
        and keep the density at alpha = 0, which will be asked for; of a whole map it comes from
        the same pass."""
        if density_at_start:
            self._keep([0.0], self.everyone, self._evaluate([0.0], self.everyone, None))
        self.see_maps((0.0, 1.0))

    def see_maps(self, alphas: Sequence[float]) -> None:
        """Log the scores and the mask at nodes, from a whole map, as far as that was not done."""
        for alpha in alphas:
            if alpha not in self.overlaps:
                several = getattr(self.path, 'starts', None) if alpha == 0 else None
                points = self.path.at(self._tensor([alpha]))[0] if several is None else several
                with torch.no_grad():
                    self._log_mean(alpha, [self.engine.run(one) for one in points.split(1)])

    def _log_mean(self, alpha: float, all_logits: Sequence[torch.Tensor]) -> None:
        """Remember the mean scores and overlap of the points that a path has at one end."""
        rows = [torch.stack([target(one) for target in self.targets], 1) for one in all_logits]
        self._log_scores([alpha], self.everyone, torch.stack(rows).mean(dim=0))
        self.overlaps[alpha] = torch.cat([self._overlap(one) for one in all_logits]).mean()

    def __call__(self, alphas: np.ndarray) -> Iterator[torch.Tensor]:
        return self.some([(float(alpha), self.everyone) for alpha in alphas])

    def some(self, wanted: Sequence[tuple[float, tuple[int, ...]]]) -> Iterator[torch.Tensor]:
        """The densities at nodes, each of those of the targets that are asked for."""
        for number, (alpha, targets) in enumerate(wanted):
            while missing := self._missing(alpha, targets):
                alike = (a for a, those in wanted[number:] if self._missing(a, those) == missing)
                chunk = list(islice(alike, self.engine.step_batch.size))
                computed = self._compute(chunk, missing)
                if computed is None:
                    self.engine.step_batch.halve()
                    continue
                self._keep(chunk, missing, computed)
            self._on_steps(1)
            yield torch.stack([self._ready.pop((alpha, target)) for target in targets])

    def _missing(self, alpha: float, targets: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(target for target in targets if (alpha, target) not in self._ready)

    def _keep(
        self, alphas: Sequence[float], targets: tuple[int, ...], densities: torch.Tensor
    ) -> None:
        """Densities (nodes, targets, C, H, W) for when they are asked for."""
        for alpha, row in zip(alphas, densities, strict=True):
            self._ready.update(((alpha, t), one) for t, one in zip(targets, row, strict=True))

    def _compute(self, alphas: list[float], targets: tuple[int, ...]) -> torch.Tensor | None:
        """Densities of a chunk, (steps, targets, C, H, W); None where memory does not suffice."""

        def evaluate() -> torch.Tensor:
            with self.engine.step_batch.timed(len(alphas)), out_of_memory_is_one_error():
                return self._evaluate(alphas, targets, self.reduced)

        return attempt(evaluate, OutOfMemory)[0]

    def _evaluate(
        self,
        alphas: list[float],
        targets: tuple[int, ...],
        reduced: torch.dtype | None,
        logged: bool = True,
    ) -> torch.Tensor:
        """Densities at nodes, (steps, targets, C, H, W). Raises NonFiniteError, naming the node."""
        points, velocities = self.path.at(self._tensor(alphas))  # (steps, C, H, W)
        view = self._view(targets)
        maps, scores, densities = self.engine.look(points, velocities, view, reduced, alphas)
        if logged:
            self._log_scores(alphas, targets, scores)
            if view.plan is None:
                self.overlaps.update(zip(alphas, self._overlap(maps[0]), strict=True))
        return densities

    def _view(self, targets: tuple[int, ...]) -> View:
        """What is computed for some of the targets: no more than for all."""
        if targets not in self._views:
            every, some = self._views[self.everyone], [self.targets[t] for t in targets]
            fell_back = every.cropping.fell_back
            self._views[targets] = View(tuple(some)) if fell_back else self.engine.view(some)
        return self._views[targets]

    def _tensor(self, alphas: Sequence[float]) -> torch.Tensor:
        image = self.path.image
        return torch.tensor(alphas, dtype=image.dtype).to(image.device, non_blocking=True)

    def _log(self, alphas: list[float], logits: torch.Tensor) -> None:
        """Remember the scores and the mask's overlap at nodes, without waiting for a GPU."""
        scores = torch.stack([target(logits) for target in self.targets], dim=1)
        self._log_scores(alphas, self.everyone, scores)
        self.overlaps.update(zip(alphas, self._overlap(logits), strict=True))

    def _log_scores(
        self, alphas: Sequence[float], targets: tuple[int, ...], scores: torch.Tensor
    ) -> None:
        """Remember scores (nodes, targets)."""
        for alpha, row in zip(alphas, scores, strict=True):
            known = self.scores.setdefault(alpha, row.new_full((len(self.targets),), torch.nan))
            known[list(targets)] = row

    def check_precision(self, reduced: torch.dtype, nodes: Sequence[float]) -> float:
        """Relative L2 deviation of the map from float32, over nodes that are evaluated in both.

        The largest of the targets'; infinite where it is not a number. The float32 densities are
        kept for the integral.
        """
        exact = torch.cat([self._evaluate([node], self.everyone, None) for node in nodes])
        self._keep(nodes, self.everyone, exact)  # (nodes, targets, C, H, W)

        def in_reduced_precision() -> torch.Tensor:
            return torch.cat(
                [self._evaluate([node], self.everyone, reduced, logged=False) for node in nodes]
            )

        rough, _ = attempt(in_reduced_precision, NonFiniteError)
        if rough is None:
            return float('inf')
        off = norms((rough - exact).sum(dim=0)) / norms(exact.sum(dim=0))
        deviation = float(off.max())
        return deviation if deviation >= 0 else float('inf')
