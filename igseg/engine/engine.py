"""Running a network for many gradient evaluations: the same numbers in less time.

Integrated Gradients evaluates dF/dx tens to hundreds of times on fixed weights. `network_graph`
makes of the network a graph that is rewritten once and cropped, for each image, to what its targets
can see; whether it computes the same is measured on the user's input (`measure_deviation`, and
`GradientEngine.crops` for the crops). A network without a graph runs as it is.

On top of it: reduced precision, checked against float32 on every image; the number of
interpolation steps that go through the network at once, measured; and `PathSampler`, which turns
nodes of a path into attribution densities of one or several targets that share the forward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import cv2
import numpy as np
import torch
from torch import nn

from igseg.engine.crops import Box, slices_of, whole
from igseg.engine.graph import NetworkGraph, Plan
from igseg.engine.memory import StepBatch, explained_memory, explained_network
from igseg.engine.precision import reduced_copy
from igseg.engine.preparation import (
    EQUIVALENCE_TOLERANCE,
    EXACT_TOLERANCE,
    Network,
    frozen,
    prepared_copy,
    relative_difference,
)
from igseg.errors import NonFiniteError, attempt
from igseg.explanation import Cropping, Preparation
from igseg.network.identity import fingerprint
from igseg.network.outputs import choice_among, segmentation_logits
from igseg.network.score import Score, Target

CHECKED_NODES = (0.25, 0.5)  # evaluated in float32 too, where precision is reduced

WORTHWHILE_CROP = 0.9  # of the whole network's work; a crop that needs more is left alone

MOST_PARTS = 64  # of a region that are cropped apart; of more, the box around all

MOST_GRAPHS = 4  # of image sizes that are kept


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

    def crops(self, targets: Sequence[Score]) -> Crops:
        """What must be computed of the output for some targets: boxes around their regions, where
        that is less work than all of it."""
        targets = tuple(targets)
        graph, regions = self.network, [t.region for t in targets if isinstance(t, Target)]
        if not isinstance(graph, NetworkGraph) or len(regions) < len(targets):
            return Crops(targets)
        if any(region.shape != graph.output_shape[2:] for region in regions):
            return Crops(targets)
        plan = graph.plan(boxes_of(torch.stack(regions).any(dim=0)))
        share = plan.work / graph.whole.work if graph.whole.work else 1.0
        if share > WORTHWHILE_CROP:
            return Crops(targets)
        parts = tuple(parts_of(target, plan.boxes) for target in targets)
        return Crops(targets, plan, parts, Cropping(share, len(plan.boxes)))

    def compared_crops(
        self, x: torch.Tensor, logits: torch.Tensor, targets: Sequence[Score]
    ) -> Crops:
        """`crops`, after their logits on an image x (1, C, H, W) were compared with those of the
        whole map, and, on the first of its size, their gradient too. Crops that deviate are not
        used."""
        crops = self.crops(targets)
        if crops.plan is None:
            return crops
        size, deviations = x.shape[1:], self._crop_deviation(x, logits, crops)
        if size not in self._compared:
            deviations = (*deviations, self._gradient_deviation(x, crops))
            self._compared[size] = deviations[-1]
        measured = dict(zip(('logit_deviation', 'gradient_deviation'), deviations, strict=False))
        if not max(deviations) <= EQUIVALENCE_TOLERANCE:
            return Crops(crops.targets, cropping=Cropping(**measured, fell_back=True))
        return replace(crops, cropping=replace(crops.cropping, **measured))

    def _crop_deviation(self, x: torch.Tensor, logits: torch.Tensor, crops: Crops) -> tuple[float]:
        """Of the logits in crops, from the whole map's."""
        with torch.no_grad():
            maps = self.maps(x, crops.plan)
        expected = [logits[place_of(box)] for box in crops.plan.boxes]
        pairs = zip(maps, expected, strict=True)
        return (max(relative_difference(ours, theirs) for ours, theirs in pairs),)

    def _gradient_deviation(self, x: torch.Tensor, crops: Crops) -> float:
        """Of the gradient of all targets' sum, from the whole network's; 0 where only rounding can
        be why, as double precision shows."""

        def compared(dtype: torch.dtype | None) -> float:
            gradients = []
            for one in (Crops(crops.targets), crops):
                point = x.detach().clone().to(dtype or self.dtype).requires_grad_()
                with torch.enable_grad(), explained_network(x.shape):
                    plan = one.plan or self.network.whole
                    scores = one.scores(self.network.run(point, plan, dtype))
                    pairs = zip(scores, crops.targets, strict=True)
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

    def seen(self, x: torch.Tensor, crops: Crops) -> torch.Tensor:
        """`run`, as far as the targets of crops look: zeros beside their boxes."""
        maps = self.maps(x, crops.plan)
        if crops.plan is None:
            return maps[0]
        logits = maps[0].new_zeros(len(x), *self.network.output_shape[1:])
        for box, part in zip(crops.plan.boxes, maps, strict=True):
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
        crops: Crops,
        reduced: torch.dtype | None = None,
        alphas: Sequence[float] = (),
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """At points (steps, C, H, W): the maps in crops, F of their targets (steps, targets), and
        the densities (steps, targets, C, H, W). Raises NonFiniteError."""
        # Marked below, they may be the path's own; of inference mode, they cannot be.
        points = points.clone() if points.is_inference() else points.detach()
        with torch.enable_grad():
            points.requires_grad_()
            maps = self.maps(points, crops.plan, reduced, alphas)
            scores = crops.scores(maps)
            densities = self.densities(points, scores, crops.targets, velocities, alphas)
        scores = torch.stack([score.detach() for score in scores], dim=1)
        return [one.detach() for one in maps], scores, densities
