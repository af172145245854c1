"""Running a network for many gradient evaluations: the same numbers in less time.

Integrated Gradients evaluates dF/dx tens to hundreds of times on fixed weights. The engine has a
graph of the network made once (`preparation`), whose result is compared with the network's own on
the user's input, and computes of it, for each image, only what the targets can see (`Crops`), which
is compared with the whole too (`GradientEngine.compared_crops`). A network without a graph runs as
it is.

Here: logits and gradients at given points, counted and checked to be finite. `sampler` asks for
them along a path, `memory` says how many points go through the network at once, `precision` in
which types it may be reduced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import EllipsisType

import cv2
import numpy as np
import torch
from torch import nn

from igseg.engine.crops import Box, slices_of
from igseg.engine.graph import NetworkGraph, Plan
from igseg.engine.memory import StepBatch
from igseg.engine.precision import reduced_copy
from igseg.engine.preparation import (
    EQUIVALENCE_TOLERANCE,
    EXACT_TOLERANCE,
    Network,
    prepared_copy,
    relative_difference,
    within,
)
from igseg.errors import NonFiniteError, attempt
from igseg.explanation import Cropping, Preparation
from igseg.network.identity import Fingerprint, fingerprint
from igseg.network.outputs import (
    choice_among,
    explained_memory,
    explained_network,
    frozen,
    segmentation_logits,
    weights_dtype,
)
from igseg.network.score import Score, Target

CHECKED_NODES = (0.25, 0.5)  # evaluated in float32 too, where precision is reduced

WORTHWHILE_CROP = 0.9  # of the whole network's work; a crop that needs more is left alone
MOST_PARTS = 64  # of a region that are cropped apart; of more, the box around all
MOST_GRAPHS = 4  # of image sizes that are kept


class FiniteFlags:
    """Whether values were finite, noted on the device and asked later, once for many: to ask is to
    wait for a GPU until it has computed them."""

    def __init__(self) -> None:
        self._noted: list[tuple[torch.Tensor, str, Sequence[float]]] = []

    def note(self, values: torch.Tensor, what: str, alphas: Sequence[float] = ()) -> None:
        """Look at the samples of a batch, (N, ...). what: they are. alphas: of the samples, where
        they are interpolation steps."""
        self._noted.append((torch.isfinite(values).flatten(1).all(dim=1), what, alphas))

    def check(self) -> None:
        """Raise NonFiniteError, which names the first sample that holds a NaN or an infinity; and
        forget what was noted."""
        noted, self._noted = self._noted, []
        if not noted or bool(torch.cat([fine for fine, _, _ in noted]).all()):
            return
        for fine, what, alphas in noted:
            if not bool(fine.all()):
                first = int((~fine).nonzero()[0])
                raise NonFiniteError(what, alphas[first] if alphas else None)


def check_finite(
    values: torch.Tensor,
    what: str,
    alphas: Sequence[float] = (),
    flags: FiniteFlags | None = None,
) -> None:
    """`FiniteFlags.note`, and `check` at once where there are no flags that are asked later."""
    noted = FiniteFlags() if flags is None else flags
    noted.note(values, what, alphas)
    if flags is None:
        noted.check()


@dataclass
class Passes:
    """How many samples went through a network, for results (not for preparing it)."""

    forward: int = 0
    gradients: int = 0


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


def place_of(box: Box) -> tuple[EllipsisType | slice, ...]:
    """The rows and columns of a box, as an index of a whole map (..., h, w)."""
    return (..., *slices_of((None,) * len(box), box)[-2:])


@dataclass(frozen=True)
class Crops:
    """What of the output is computed for some targets: boxes of it, or all; and how the targets'
    scores are made of it."""

    targets: tuple[Score, ...]
    plan: Plan | None = None  # None: all of the output
    parts: tuple[tuple[Score | None, ...], ...] = ()  # of each target, one in each box of the plan
    cropping: Cropping = field(default_factory=Cropping)

    def scores(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """F of every target, (N,) each. maps: logits (N, K, h, w), one for each box."""
        if self.plan is None:
            return [target(maps[0]) for target in self.targets]
        nothing = maps[0].new_zeros(())
        return [
            sum(
                (
                    part(logits)
                    for part, logits in zip(parts, maps, strict=True)
                    if part is not None  # which then takes no part in its gradient
                ),
                start=nothing,
            )
            for parts in self.parts
        ]


def parts_of(target: Target, boxes: Sequence[Box]) -> tuple[Target | None, ...]:
    """A target's part in each of some boxes, which may overlap: each pixel counts in the first."""
    left = target.weights.clone()
    parts: list[Target | None] = []
    for box in boxes:
        place = place_of(box)
        weights = left[place].clone()
        left[place] = 0
        parts.append(replace(target, weights=weights) if bool(weights.any()) else None)
    return tuple(parts)


def _try_reduced(graph: NetworkGraph, x: torch.Tensor, reduced: torch.dtype) -> None:
    """Run a graph forth and back in a reduced type."""
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        logits = graph.run(point, graph.whole, reduced)[0]
        torch.autograd.grad(logits.float().sum(), point)


class GradientEngine:
    """Logits and gradients of a network, from its graph.

    The graph is made on the first image of a size, and again when the network's weights have
    changed. `passes` counts the samples that went through the network, forth and back, in whole or
    in part.
    """

    def __init__(self, model: nn.Module, device: torch.device, step_batch: int | None) -> None:
        self.model, self.device = model, device
        self.step_batch = StepBatch(device, step_batch)
        self.passes = Passes()
        self.runs_reduced: dict[torch.dtype, bool] = {}  # whether the graph runs whole in a type
        self.network: Network | None = None  # the graph, or what runs instead
        self.preparation: Preparation | None = None
        self.output_note: str | None = None  # which of several maps is taken; None: none was seen
        self._reduced_copies: dict[torch.dtype, nn.Module] = {}  # of what runs instead of a graph
        self._fingerprint: Fingerprint | None = None
        self._prepared: dict[torch.Size, tuple[Network, Preparation]] = {}
        self._compared: dict[torch.Size, float] = {}  # gradients of crops with whole ones

    def for_network(self, network: Network) -> GradientEngine:
        """An engine that runs another network in this one's place, without a graph of it; what it
        does counts as this one's, and the step batch is the same."""
        engine = GradientEngine(self.model, self.device, None)
        engine.network, engine.step_batch, engine.passes = network, self.step_batch, self.passes
        return engine

    @property
    def forward_passes(self) -> int:
        """Samples that went through the network so far."""
        return self.passes.forward

    @property
    def gradient_evaluations(self) -> int:
        """Samples for which gradients went back through it."""
        return self.passes.gradients

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        return weights_dtype(self.model)

    @property
    def waits(self) -> bool:
        """Whether to ask for a value that was computed is to wait for a device: not on a CPU, which
        computes before it goes on."""
        return self.device.type != 'cpu'

    @contextlib.contextmanager
    def running(self, x: torch.Tensor, state: Fingerprint | None = None) -> Iterator[None]:
        """Inside, the network may be run on inputs like x (1, C, H, W), whatever autograd mode or
        autocast the caller is in; the user's network is left as it was. Out of memory is an
        InputError, and so is what the network raises.

        state: the `fingerprint` of the network as it is now, where the caller knows it."""
        with (
            torch.inference_mode(False),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
            explained_memory(self.device),
        ):
            self._prepare(x, fingerprint(self.model) if state is None else state)
            yield

    def _prepare(self, x: torch.Tensor, now: Fingerprint) -> None:
        """Make the graph for inputs like x, unless there is one of the network as it is now."""
        size = x.shape[1:]
        if now != self._fingerprint:
            self._prepared, self._compared = {}, {}
        if size not in self._prepared:
            while len(self._prepared) >= MOST_GRAPHS:
                del self._prepared[next(iter(self._prepared))]
            with explained_network(x.shape):
                self._prepared[size] = self._new_copy(x.to(self.dtype))
        if self._prepared[size][0] is not self.network:
            self.network, self.preparation = self._prepared[size]
            self.runs_reduced, self._reduced_copies = {}, {}
        self._fingerprint = now

    def _new_copy(self, x: torch.Tensor) -> tuple[Network, Preparation]:
        if self.output_note is None:
            with torch.no_grad():
                self.output_note = choice_among(self.model(x), x.shape[-2:])
        return prepared_copy(self.model, x)

    def crops(self, targets: Sequence[Score]) -> Crops:
        """What must be computed of the output for some targets: boxes around their regions, where
        that is less work than all of it."""
        everything, graph = Crops(tuple(targets)), self.network
        own = [target for target in targets if isinstance(target, Target)]
        if not isinstance(graph, NetworkGraph) or len(own) < len(targets):
            return everything
        regions = [target.region for target in own]
        if any(region.shape != graph.output_shape[2:] for region in regions):
            return everything
        plan = graph.plan(boxes_of(torch.stack(regions).any(dim=0)))
        share = plan.flops / graph.whole.flops if graph.whole.flops else 1.0
        if share > WORTHWHILE_CROP:
            return everything
        parts = tuple(parts_of(target, plan.boxes) for target in own)
        return Crops(tuple(targets), plan, parts, Cropping(share, len(plan.boxes)))

    def compared_crops(
        self, x: torch.Tensor, logits: torch.Tensor, targets: Sequence[Score]
    ) -> Crops:
        """`crops`, after their logits on an image x (1, C, H, W) were compared with those of the
        whole map, and, on the first of its size, their gradient too. Crops that deviate are not
        used."""
        crops, graph = self.crops(targets), self.network
        if crops.plan is None or not isinstance(graph, NetworkGraph):
            return crops
        size, gradient = x.shape[1:], None
        deviations = [self._crop_deviation(x, logits, crops.plan)]
        if size not in self._compared:
            gradient = self._compared[size] = self._gradient_deviation(x, crops, graph)
            deviations.append(gradient)
        if not within(deviations, EQUIVALENCE_TOLERANCE):
            whole = Cropping(
                logit_deviation=deviations[0], gradient_deviation=gradient, fell_back=True
            )
            return Crops(crops.targets, cropping=whole)
        cropping = replace(
            crops.cropping, logit_deviation=deviations[0], gradient_deviation=gradient
        )
        return replace(crops, cropping=cropping)

    def _crop_deviation(self, x: torch.Tensor, logits: torch.Tensor, plan: Plan) -> float:
        """Of the logits in the boxes of a plan, from the whole map's."""
        with torch.no_grad():
            maps = self.maps(x, plan)
        expected = [logits[place_of(box)] for box in plan.boxes]
        pairs = zip(maps, expected, strict=True)
        return float(np.max([relative_difference(ours, theirs) for ours, theirs in pairs]))

    def _gradient_deviation(self, x: torch.Tensor, crops: Crops, graph: NetworkGraph) -> float:
        """Of the gradient of all targets' sum, from the whole network's; 0 where only rounding can
        be why, as double precision shows."""

        def compared(dtype: torch.dtype | None) -> float:
            gradients = []
            for one in (Crops(crops.targets), crops):
                point = x.detach().clone().to(dtype or self.dtype).requires_grad_()
                with torch.enable_grad(), explained_network(x.shape):
                    scores = one.scores(graph.run(point, one.plan or graph.whole, dtype))
                    pairs = zip(scores, crops.targets, strict=True)
                    scaled = (score.sum() * target.scale for score, target in pairs)
                    total = sum(scaled, start=scores[0].new_zeros(()))
                    gradients.append(torch.autograd.grad(total, point)[0])
            return relative_difference(gradients[1], gradients[0])

        deviation = compared(None)
        if deviation <= EQUIVALENCE_TOLERANCE or self.dtype != torch.float32:
            return deviation
        exact, _ = attempt(partial(compared, torch.float64), Exception)
        graph.forget(torch.float64)
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
        flags: FiniteFlags | None = None,
    ) -> list[torch.Tensor]:
        """`run`, for the boxes of a plan, one after the other; None: all."""
        self.passes.forward += len(x)
        network = self.network
        assert network is not None  # `running` has made one, or the caller has given one
        with explained_network(x.shape):
            if isinstance(network, NetworkGraph):
                maps = self._run_graph(network, x, plan or network.whole, reduced)
            else:
                maps = [self._run_network(network, x, reduced)]
            maps = [one.to(x.dtype) for one in maps]
        for one in maps:
            check_finite(one, 'the logits', alphas, flags)
        return maps

    def seen(self, x: torch.Tensor, crops: Crops) -> torch.Tensor:
        """`run`, as far as the targets of crops look: zeros beside their boxes."""
        maps, graph = self.maps(x, crops.plan), self.network
        if crops.plan is None or not isinstance(graph, NetworkGraph):
            return maps[0]
        output = graph.graph.output
        logits = maps[0].new_zeros(len(x), *(output.length(axis) for axis in (1, 2, 3)))
        for box, part in zip(crops.plan.boxes, maps, strict=True):
            logits[place_of(box)] = part
        return logits

    def _run_graph(
        self, graph: NetworkGraph, x: torch.Tensor, plan: Plan, reduced: torch.dtype | None
    ) -> list[torch.Tensor]:
        """Reduced precision runs whole, weights and activations, but for networks that mix types,
        which run by autocast."""
        x = x.to(self.dtype)
        if reduced is not None and reduced not in self.runs_reduced:
            trial = partial(_try_reduced, graph, x[:1], reduced)
            _, failure = attempt(trial, RuntimeError, TypeError)
            self.runs_reduced[reduced] = failure is None
        if reduced is None or self.runs_reduced[reduced]:
            return graph.run(x, plan, reduced)
        with torch.autocast(self.device.type, dtype=reduced):
            return graph.run(x, plan)

    def _run_network(
        self, network: Network, x: torch.Tensor, reduced: torch.dtype | None
    ) -> torch.Tensor:
        """What runs where there is no graph, whole; reduced precision by autocast."""
        if reduced is None:
            with torch.autocast(self.device.type, enabled=False):
                output = network(x.to(self.dtype))
        else:
            if reduced not in self._reduced_copies:
                assert isinstance(network, nn.Module)  # a mere function keeps its precision
                self._reduced_copies[reduced] = reduced_copy(network, reduced)
            with torch.autocast(self.device.type, dtype=reduced):
                output = self._reduced_copies[reduced](x)
        return segmentation_logits(output, x.shape[-2:])

    def densities(
        self,
        points: torch.Tensor,
        scores: Sequence[torch.Tensor],
        targets: Sequence[Score],
        velocities: torch.Tensor,
        alphas: Sequence[float] = (),
        flags: FiniteFlags | None = None,
    ) -> torch.Tensor:
        """Gradient times velocity of every target, from one forward pass: (steps, targets, C, H,
        W).

        points: (steps, C, H, W), the leaf of the graph of `scores`, (steps,) for each target.
        velocities: of the same shape or (1, C, H, W). alphas, flags: see `check_finite`. Raises
        NonFiniteError, or notes it in the flags.
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
        self.passes.gradients += len(points)
        densities = torch.stack(by_target, dim=1)
        check_finite(densities, 'the gradients', alphas, flags)
        return densities

    def look(
        self,
        points: torch.Tensor,
        velocities: torch.Tensor,
        crops: Crops,
        reduced: torch.dtype | None = None,
        alphas: Sequence[float] = (),
        flags: FiniteFlags | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """At points (steps, C, H, W): the maps in crops, F of their targets (steps, targets), and
        the densities (steps, targets, C, H, W). alphas, flags: see `check_finite`. Raises
        NonFiniteError, or notes it in the flags."""
        # Marked below, they may be the path's own; of inference mode, they cannot be.
        points = points.clone() if points.is_inference() else points.detach()
        with torch.enable_grad():
            points.requires_grad_()
            maps = self.maps(points, crops.plan, reduced, alphas, flags)
            scores = crops.scores(maps)
            densities = self.densities(points, scores, crops.targets, velocities, alphas, flags)
        seen = torch.stack([score.detach() for score in scores], dim=1)
        return [one.detach() for one in maps], seen, densities
