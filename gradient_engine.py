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
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

EQUIVALENCE_TOLERANCE = 1e-4  # relative L2; beyond this the copy is not used
EXACT_TOLERANCE = 1e-9  # the same in double precision, where rounding cannot excuse a difference
_METADATA = {'size', 'dim', 'numel', 'stride', 'is_contiguous', 'is_floating_point', '__len__'}
_METADATA_PROPERTIES = {
    getattr(torch.Tensor, name).__get__
    for name in ('shape', 'dtype', 'device', 'ndim', 'requires_grad', 'is_cuda', 'layout')
}


@dataclass(frozen=True)
class Preparation:
    """What was done to a private copy of a network, and what it changed."""

    network: nn.Module  # the copy, or the user's own where the copy was not good enough
    folded: int  # batch norms folded into convolutions
    transposed: int  # convolutions whose backward runs as a forward convolution
    logit_deviation: float  # relative L2 difference of the logits from the original's
    gradient_deviation: float  # of one gradient
    fell_back: bool  # the original is used, because the copy deviated too much


def prepare(
    model: nn.Module,
    example: torch.Tensor,
    score: Callable[[torch.Tensor], torch.Tensor],
    logits_of: Callable[[object], torch.Tensor],
) -> Preparation:
    """Prepare a private copy of a network in evaluation mode and compare it with the original.

    example: an input (1, 3, H, W) in the network's precision. score: logits -> one number an image.
    logits_of: the network's output -> logits.
    """
    network, folded, transposed = improved_copy(model, example)
    deviations = measure_deviation(model, network, example, score, logits_of)
    fell_back = not max(deviations) <= EQUIVALENCE_TOLERANCE  # also where it is not a number
    if fell_back and example.device.type == 'cpu' and example.dtype == torch.float32:
        # Rounding alone can push a ReLU over its kink, most of all where an image is flat. In
        # double precision it cannot: what still differs there is a real difference.
        double = copy.deepcopy(model).double()
        improved = improved_copy(double, example.double())[0]
        exact = measure_deviation(double, improved, example.double(), score, logits_of)
        fell_back = not max(exact) <= EXACT_TOLERANCE
    return Preparation(
        model if fell_back else network, folded, transposed, *deviations, fell_back=fell_back
    )


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
    """Give a convolution the weights that make it compute norm(convolution(x)), in place."""
    scale = 1 / (norm.running_var.double() + norm.eps).sqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias
    dtype = convolution.weight.dtype
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    weight = convolution.weight.double() * scale.view(-1, 1, 1, 1)
    convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


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
    original: nn.Module,
    network: nn.Module,
    example: torch.Tensor,
    score: Callable[[torch.Tensor], torch.Tensor],
    logits_of: Callable[[object], torch.Tensor],
) -> tuple[float, float]:
    """Relative L2 difference of the logits, and of one gradient, between two networks."""
    results = []
    for one in (original, network):
        x = example.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = logits_of(one(x))
            (gradient,) = torch.autograd.grad(score(logits).sum(), x)
        results.append((logits.detach(), gradient))
    (logits, gradient), (other_logits, other_gradient) = results
    return relative_difference(other_logits, logits), relative_difference(other_gradient, gradient)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference, relative to the expected; 0 where both are zero."""
    difference, size = float((found - expected).norm()), float(expected.norm())
    return difference / size if size else (0.0 if difference == 0 else float('inf'))
