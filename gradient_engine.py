"""Preparing a network for many gradient evaluations: the same numbers in less time.

Integrated Gradients evaluates dF/dx tens to hundreds of times on fixed weights. On a private copy
of the network, in evaluation mode, that allows what training does not:

- a batch norm that follows a convolution, and is its only reader, is folded into its weights;
- the gradient of a stride-1 convolution with respect to its input is again a convolution, with the
  weights transposed and flipped, and runs as one: forward kernels are faster than backward ones;
- the copy is stored channels_last, the layout that convolution kernels prefer.

Who follows whom is read off one forward pass, never off the order of a module's children. What
cannot be improved runs as it is, and the user's network is not touched. Whether the copy computes
the same is measured on the user's input (`measure_deviation`).

On top of it: reduced precision by autocast, checked against float32 on every image; the number of
interpolation steps that go through the network at once, measured; and `PathSampler`, which turns
nodes of a path into attribution densities of one or several targets that share the forward passes.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from attribution_path import AttributionPath, Score, choice_among, segmentation_logits
from errors import InputError, NonFiniteError, attempt
from network_description import plain_attributes
from path_integral import norms

PRECISIONS = ('auto', 'float32', 'bfloat16', 'float16')
CHECKED_NODES = (0.25, 0.5)  # evaluated in float32 too, where precision is reduced
MAX_STEP_BATCH = 64  # beyond this a GPU gains nothing, and the allocator suffers
CPU_STEP_BATCH_PIXELS = 4 * 256 * 256  # on a CPU batching pays only while images are small
WORTHWHILE = 0.95  # a larger step batch must take at most this share of the time per step
EQUIVALENCE_TOLERANCE = 1e-4  # relative L2; beyond this the copy is not used
EXACT_TOLERANCE = 1e-9  # the same in double precision
EXACT_SIDE = 256  # pixels
_METADATA = {'size', 'dim', 'numel', 'stride', 'is_contiguous', 'is_floating_point', '__len__'}
_METADATA_PROPERTIES = {
    getattr(torch.Tensor, name).__get__
    for name in ('shape', 'dtype', 'device', 'ndim', 'requires_grad', 'is_cuda', 'layout')
}


@dataclass(frozen=True)
class Preparation:
    """What was done to a private copy of a network, and what it changed."""

    folded: int  # batch norms folded into convolutions
    transposed: int  # convolutions whose backward runs as a forward convolution
    logit_deviation: float  # relative L2 difference of the logits from the original's
    gradient_deviation: float  # of one gradient
    fell_back: bool  # the original is used, because the copy deviated too much
    compiled: bool = False  # by torch.compile
    compile_failure: str | None = None  # why it could not be


def prepared_copy(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, Preparation]:
    """A private copy of a network in evaluation mode, compared with the original, which comes back
    where the copy deviates.

    example: an input (1, C, H, W) in the network's precision.
    """
    network, folded, transposed = improved_copy(model, example)
    deviations = measure_deviation(model, network, example)
    fell_back = not max(deviations) <= EQUIVALENCE_TOLERANCE  # also where it is not a number
    if fell_back and example.device.type == 'cpu' and example.dtype == torch.float32:
        fell_back = not _same_in_double_precision(model, example)
    if fell_back and max(measure_deviation(model, model, example)) > EQUIVALENCE_TOLERANCE:
        raise InputError(
            'the network gives another answer each time it is asked, also in evaluation mode '
            '(dropout that is always on, or a state that changes: there is nothing to integrate)'
        )
    preparation = Preparation(folded, transposed, *deviations, fell_back=fell_back)
    return model if fell_back else network, preparation


def _same_in_double_precision(model: nn.Module, example: torch.Tensor) -> bool:
    """Whether original and copy agree where rounding cannot excuse a difference.

    In single precision it can: it alone may push a ReLU over its kink, most of all where an image
    is flat. A part of the image will do, since double precision takes time and memory.
    """
    part = example[..., :EXACT_SIDE, :EXACT_SIDE].double()
    try:
        double = copy.deepcopy(model).double()
        exact = measure_deviation(double, improved_copy(double, part)[0], part)
    except Exception:  # a network that cannot be copied or takes one size only
        return False
    return max(exact) <= EXACT_TOLERANCE


def improved_copy(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, int, int]:
    """A private copy with parameters frozen, norms folded, faster backward, channels_last.

    Returns the copy, and how many norms were folded and convolutions replaced. A network that
    cannot be copied or traced comes back as it is.
    """
    try:
        network = copy.deepcopy(model).eval().requires_grad_(False)
        followers = find_followers(network, example)
    except Exception:  # any module must run; one that resists is left alone
        return model, 0, 0
    places = {module: name for name, module in network.named_modules()}
    for convolution, norm in followers.items():
        fold(convolution, norm)
        network.set_submodule(places[norm], _rest_of(norm))
    transposed = 0
    for name, module in list(network.named_modules()):
        if is_replaceable(module) and name:
            network.set_submodule(name, TransposedBackwardConv2d(module))
            transposed += 1
    return network.to(memory_format=torch.channels_last), len(followers), transposed


# --------------------------------------------------------------------------- batch-norm folding


class _Follow(TorchFunctionMode):
    """Watches a forward pass: which functions read the output of each convolution."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        modules = list(network.modules())
        self.convolutions = {id(m.weight): m for m in modules if isinstance(m, nn.Conv2d)}
        self.norms = {
            id(m.running_mean): m
            for m in modules
            if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None
        }
        self.source: dict[int, nn.Conv2d] = {}  # id of a tensor -> the convolution that made it
        self.readers: dict[nn.Conv2d, list[nn.BatchNorm2d | None]] = {}
        self.runs: Counter[nn.Module] = Counter()
        self._alive: list[torch.Tensor] = []  # so that no id is used twice

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        norm = None
        if function is F.batch_norm:
            mean = args[1] if len(args) > 1 else kwargs.get('running_mean')
            norm = self.norms.get(id(mean))
            self.runs[norm] += 1
        is_metadata = function in _METADATA_PROPERTIES or function.__name__ in _METADATA
        for leaf in () if is_metadata else tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and id(leaf) in self.source:
                self.readers[self.source[id(leaf)]].append(norm)
        result = function(*args, **kwargs)
        if function in (F.conv2d, torch.conv2d):
            weight = args[1] if len(args) > 1 else kwargs.get('weight')
            convolution = self.convolutions.get(id(weight))
            if convolution is not None:
                self.runs[convolution] += 1
                self.readers.setdefault(convolution, [])
                self.source[id(result)] = convolution
                self._alive.append(result)
        return result


def find_followers(network: nn.Module, example: torch.Tensor) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """The convolutions whose output is read by one batch norm and by nothing else.

    Both must run exactly once, and no two convolutions may share a weight: what runs twice has two
    followers or two predecessors, and cannot be folded.
    """
    follow = _Follow(network)
    with torch.no_grad(), follow:
        network(example)
    weights = Counter(
        id(m.weight)
        for m in network.modules()
        if isinstance(getattr(m, 'weight', None), nn.Parameter)
    )
    return {
        convolution: readers[0]
        for convolution, readers in follow.readers.items()
        if len(readers) == 1
        and readers[0] is not None
        and follow.runs[convolution] == follow.runs[readers[0]] == 1
        and weights[id(convolution.weight)] == 1
        and _rest_of(readers[0]) is not None
    }


def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give a convolution the weights that make it compute norm(convolution(x)), in place.

    In double precision, on the CPU: MPS has none.
    """

    def exact(values: torch.Tensor) -> torch.Tensor:
        return values.detach().cpu().double()

    scale = 1 / (exact(norm.running_var) + norm.eps).sqrt()
    shift = -exact(norm.running_mean) * scale
    if norm.affine:
        scale, shift = scale * exact(norm.weight), shift * exact(norm.weight) + exact(norm.bias)
    if convolution.bias is not None:
        shift = shift + exact(convolution.bias) * scale
    weight = exact(convolution.weight) * scale.view(-1, 1, 1, 1)
    like = convolution.weight
    convolution.weight = nn.Parameter(weight.to(like), requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(like), requires_grad=False)


def _rest_of(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What is left of a batch norm once it is folded: nothing, or timm's activation after it.

    None for other subclasses, whose forward may do anything.
    """
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm).__name__ == 'BatchNormAct2d':
        return nn.Sequential(norm.drop, norm.act)
    return None


# --------------------------------------------------------------------------- faster backward


class _TransposedBackward(torch.autograd.Function):
    """A stride-1 convolution whose input gradient is computed as a forward convolution."""

    @staticmethod
    def forward(ctx, x, weight, flipped, bias, padding, dilation):
        ctx.save_for_backward(flipped)
        ctx.padding, ctx.dilation = padding, dilation
        return F.conv2d(x, weight, bias, 1, padding, dilation)

    @staticmethod
    def backward(ctx, gradient):
        (flipped,) = ctx.saved_tensors
        reach = [d * (k - 1) for d, k in zip(ctx.dilation, flipped.shape[2:], strict=True)]
        padding = [r - p for r, p in zip(reach, ctx.padding, strict=True)]
        back = F.conv2d(gradient.to(flipped.dtype), flipped, None, 1, padding, ctx.dilation)
        return back, None, None, None, None, None


class TransposedBackwardConv2d(nn.Module):
    """Takes the place of a frozen convolution for which `is_replaceable` holds."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight.detach()
        self.register_buffer('weight', weight)
        self.register_buffer('flipped', weight.flip(2, 3).transpose(0, 1).contiguous())
        self.register_buffer('bias', convolution.bias)
        self.padding, self.dilation = _padding_of(convolution), convolution.dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _TransposedBackward.apply(
            x, self.weight, self.flipped, self.bias, self.padding, self.dilation
        )


def is_replaceable(module: nn.Module) -> bool:
    """Whether a module is a plain stride-1, ungrouped, zero-padded convolution wider than 1x1.

    Its padding must not exceed the kernel's reach, or the gradient would need cropping.
    """
    if not isinstance(module, nn.Conv2d) or _padding_of(module) is None:
        return False
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return (
        tuple(module.stride) == (1, 1)
        and module.groups == 1
        and all(p <= r for p, r in zip(_padding_of(module), reach, strict=True))
    )


def _padding_of(convolution: nn.Conv2d) -> tuple[int, int] | None:
    """Zero padding in rows and columns, or None where it is of another kind.

    smp's EfficientNets pad in a module of their own, `static_padding`, before the convolution.
    """
    if type(convolution) is nn.Conv2d:
        plain = convolution.padding_mode == 'zeros' and not isinstance(convolution.padding, str)
        return tuple(convolution.padding) if plain else None
    if type(convolution).__name__ != 'Conv2dStaticSamePadding':
        return None
    padding = getattr(convolution.static_padding, 'padding', (0, 0, 0, 0))
    left, right, top, bottom = padding
    return (top, left) if (left, top) == (right, bottom) else None


# --------------------------------------------------------------------------- equivalence


def measure_deviation(
    original: nn.Module, network: nn.Module, example: torch.Tensor
) -> tuple[float, float]:
    """Relative L2 difference between two networks of the logits, and of the gradient of their
    sum of squares, in which strong logits weigh most."""
    results = []
    for one in (original, network):
        x = example.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = segmentation_logits(one(x), x.shape[-2:])
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
        if isinstance(module, (nn.Conv2d, nn.Linear, TransposedBackwardConv2d)):
            module.to(dtype)
    return network


# --------------------------------------------------------------------------- step batch


class StepBatch:
    """How many interpolation steps go through the network at once.

    A fixed size is kept. Without one, each shape of input is measured once, on steps that are
    needed anyway: 1, 2, 4, … at a time while that saves time and fits into memory. Any size is
    halved when memory runs out.
    """

    def __init__(self, device: torch.device, fixed: int | None = None) -> None:
        self.device = device
        self.size = fixed or 1
        self._fixed = fixed is not None
        self._chosen: dict[object, int] = {}  # what was found for a shape
        self._measuring = False
        self._times: list[float] = []  # seconds a step at the current size
        self._best = float('inf')  # at half the size

    def start(self, pixels: int, precision: torch.dtype | None = None) -> None:
        """Prepare for an image of that many pixels."""
        self._key = (pixels, precision)
        if self._fixed:
            return
        self._measuring = self._key not in self._chosen
        self.size = self._chosen.get(self._key, 1)
        self._limit = min(MAX_STEP_BATCH, max(1, CPU_STEP_BATCH_PIXELS // pixels))
        self._times, self._best = [], float('inf')
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
        if self._times[-1] > WORTHWHILE * self._best:
            self.size //= 2
        elif 2 * self.size <= self._limit:
            self._best, self._times = self._times[-1], []
            self.size *= 2
            return
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


class GradientEngine:
    """Logits and gradients of a network, from its prepared copy.

    The copy is made on the first image, and again when the network's weights have changed.
    forward_passes and gradient_evaluations count the samples that went through the network, forth
    and back, for results (not for preparing).
    """

    def __init__(
        self, model: nn.Module, device: torch.device, step_batch: int | None, compiled: bool
    ) -> None:
        self.model, self.device = model, device
        self.step_batch = StepBatch(device, step_batch)
        self.forward_passes = 0
        self.gradient_evaluations = 0
        self.network: nn.Module | None = None  # the prepared copy
        self.preparation: Preparation | None = None
        self.output_note: str | None = None  # which of several maps is taken; None: none was seen
        self._compiled = compiled
        self._reduced: dict[torch.dtype, nn.Module] = {}
        self._fingerprint: tuple | None = None

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
        """Make the private copy, unless there is one of the network as it is now."""
        now = fingerprint(self.model)
        if now == self._fingerprint:
            return
        self._reduced = {}
        with explained_network(x.shape):
            self.network, self.preparation = prepared_copy(self.model, x.to(self.dtype))
        if self._compiled:
            compiled = torch.compile(self.network, dynamic=False)
            _, failure = attempt(partial(measure_deviation, self.network, compiled, x), Exception)
            if failure is None:
                self.network = compiled
            self.preparation = replace(
                self.preparation, compiled=failure is None, compile_failure=failure
            )
        self._fingerprint = now

    def run(
        self, x: torch.Tensor, reduced: torch.dtype | None = None, alphas: Sequence[float] = ()
    ) -> torch.Tensor:
        """Images (N, C, H, W) -> logits (N, K, h, w), both in the working precision, with a graph
        where gradients are enabled. alphas: see `check_finite`. Raises NonFiniteError."""
        self.forward_passes += len(x)
        if reduced is not None and reduced not in self._reduced:
            self._reduced[reduced] = reduced_copy(self.network, reduced)
        network = self.network if reduced is None else self._reduced[reduced]
        casting = {'dtype': reduced} if reduced else {'enabled': False}
        with torch.autocast(self.device.type, **casting), explained_network(x.shape):
            output = network(x.to(self.dtype) if reduced is None else x)
        if self.output_note is None:
            self.output_note = choice_among(output, x.shape[-2:])
        logits = segmentation_logits(output, x.shape[-2:]).to(x.dtype)
        check_finite(logits, 'the logits', alphas)
        return logits

    def densities(
        self,
        points: torch.Tensor,
        logits: torch.Tensor,
        targets: Sequence[Score],
        velocities: torch.Tensor,
        alphas: Sequence[float] = (),
    ) -> torch.Tensor:
        """Gradient times velocity of every target, from one forward pass: (steps, targets, C, H,
        W).

        points: (steps, C, H, W), the leaf of the graph of `logits` (steps, K, h, w). velocities:
        of the same shape or (1, C, H, W). alphas: see `check_finite`. Raises NonFiniteError.
        """
        by_target = []
        for number, target in enumerate(targets, start=1):
            # Samples do not mix in evaluation mode: the gradient of the sum is each one's own.
            # Scaled by the region's size, so that what flows back from each pixel does not
            # underflow.
            scores = target(logits).sum() * target.scale
            with explained_network(points.shape):
                (gradient,) = torch.autograd.grad(
                    scores, points, retain_graph=number < len(targets)
                )
            by_target.append(gradient * (velocities / target.scale))
        self.gradient_evaluations += len(points)
        densities = torch.stack(by_target, dim=1)
        check_finite(densities, 'the gradients', alphas)
        return densities


# --------------------------------------------------------------------------- along a path


@dataclass(frozen=True)
class AtImage:
    """What was found at the image itself, which all paths that end there share."""

    x: torch.Tensor  # (1, C, H, W)
    logits: torch.Tensor  # (1, K, h, w)
    targets: Sequence[Score]
    gradient: torch.Tensor | None  # (targets, C, H, W); None where the rule has no node there


class PathSampler:
    """The attribution densities along a path, and a log of what was seen on it.

    Called with nodes, it gives their densities (targets, C, H, W), one after the other; the nodes
    go through the network in step batches. Densities that were computed before they are asked for
    (at the ends, or to check the precision) wait in `_ready`, and each is given out once.
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
        self.engine, self.path, self.targets = engine, path, at_image.targets
        self.reduced: torch.dtype | None = None  # precision; None: the network's own
        self.scores: dict[float, torch.Tensor] = {}  # of the targets at each node, (targets,)
        self.overlaps: dict[float, torch.Tensor] = {}
        self._overlap, self._on_steps = overlap, on_steps
        self._ready: dict[float, torch.Tensor] = {}
        self._see_the_end(at_image)

    def _see_the_end(self, at_image: AtImage) -> None:
        """Take over what is known where the path ends."""
        if self.path.image is not at_image.x:
            return
        self._log([1.0], at_image.logits)
        if at_image.gradient is not None:
            _, velocity = self.path.at(self._tensor([1.0]))
            self._ready[1.0] = at_image.gradient * velocity

    def see_the_ends(self, density_at_start: bool) -> None:
        """Log the scores at both ends, as far as that was not done; density_at_start: and keep the
        density at alpha = 0, which will be asked for, since it comes from the same pass."""
        if density_at_start:
            self._ready[0.0] = self._evaluate([0.0], None)[0]
        for alpha in (0.0, 1.0):
            if alpha not in self.scores:
                points, _ = self.path.at(self._tensor([alpha]))
                with torch.no_grad():
                    self._log([alpha], self.engine.run(points))

    def __call__(self, alphas: np.ndarray) -> Iterator[torch.Tensor]:
        wanted = [float(alpha) for alpha in alphas]
        missing = [alpha for alpha in wanted if alpha not in self._ready]
        for alpha in wanted:
            while alpha not in self._ready:
                chunk = missing[: self.engine.step_batch.size]
                computed = self._compute(chunk)
                if computed is None:
                    self.engine.step_batch.halve()
                    continue
                self._ready.update(zip(chunk, computed, strict=True))
                missing = missing[len(chunk) :]
            self._on_steps(1)
            yield self._ready.pop(alpha)

    def _compute(self, alphas: list[float]) -> torch.Tensor | None:
        """Densities of a chunk, (steps, targets, C, H, W); None where memory does not suffice."""

        def evaluate() -> torch.Tensor:
            with self.engine.step_batch.timed(len(alphas)), out_of_memory_is_one_error():
                return self._evaluate(alphas, self.reduced)

        return attempt(evaluate, OutOfMemory)[0]

    def _evaluate(
        self, alphas: list[float], reduced: torch.dtype | None, logged: bool = True
    ) -> torch.Tensor:
        """Densities at nodes, (steps, targets, C, H, W). Raises NonFiniteError, naming the node."""
        points, velocities = self.path.at(self._tensor(alphas))  # (steps, C, H, W)
        points = points.detach()  # which are marked below, and may be the path's own
        with torch.enable_grad():
            points.requires_grad_()
            logits = self.engine.run(points, reduced, alphas)  # (steps, K, h, w)
            densities = self.engine.densities(points, logits, self.targets, velocities, alphas)
        if logged:
            self._log(alphas, logits.detach())
        return densities

    def _tensor(self, alphas: list[float]) -> torch.Tensor:
        image = self.path.image
        return torch.tensor(alphas, dtype=image.dtype).to(image.device, non_blocking=True)

    def _log(self, alphas: list[float], logits: torch.Tensor) -> None:
        """Remember the scores and the mask's overlap at nodes, without waiting for a GPU."""
        scores = torch.stack([target(logits) for target in self.targets], dim=1)
        self.scores.update(zip(alphas, scores, strict=True))
        self.overlaps.update(zip(alphas, self._overlap(logits), strict=True))

    def check_precision(self, reduced: torch.dtype, nodes: Sequence[float]) -> float:
        """Relative L2 deviation of the map from float32, over nodes that are evaluated in both.

        The largest of the targets'; infinite where it is not a number. The float32 densities are
        kept for the integral.
        """
        exact = torch.cat([self._evaluate([node], None) for node in nodes])
        self._ready.update(zip(nodes, exact, strict=True))  # (nodes, targets, C, H, W)

        def in_reduced_precision() -> torch.Tensor:
            return torch.cat([self._evaluate([node], reduced, logged=False) for node in nodes])

        rough, _ = attempt(in_reduced_precision, NonFiniteError)
        if rough is None:
            return float('inf')
        off = norms((rough - exact).sum(dim=0)) / norms(exact.sum(dim=0))
        deviation = float(off.max())
        return deviation if deviation >= 0 else float('inf')
