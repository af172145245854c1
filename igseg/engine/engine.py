"""Running a network for many gradient evaluations: the same numbers in less time.

Integrated Gradients evaluates dF/dx tens to hundreds of times with fixed weights. The engine makes
a graph of the network once (`preparation`) and compares its results with those of the network on
the user's input. For each image it computes only what the targets depend on (`Crops`), and compares
this with the whole too (`GradientEngine.compared_crops`). A network without a graph runs unchanged.

This file gives logits and gradients at points, counts them, and checks that they are finite.
`sampler` asks for them along a path. `memory` says how many points go through the network at once,
and `preparation` which reduced types may be used.
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

from igseg.engine.crops import Box, place_of
from igseg.engine.geometry import place_of_map
from igseg.engine.graph import NetworkGraph, Plan
from igseg.engine.memory import StepBatch, widest_type
from igseg.engine.preparation import (
    EQUIVALENCE_TOLERANCE,
    EXACT_TOLERANCE,
    ROUNDED_GRADIENT,
    LogitMap,
    Network,
    Prepared,
    prepared_network,
    reduced_copy,
    relative_difference,
    within,
)
from igseg.errors import InputError, NonFiniteError, attempt
from igseg.explanation import Cropping, Preparation
from igseg.network.identity import Fingerprint, fingerprint
from igseg.network.kinds import Place
from igseg.network.outputs import (
    LogitsOf,
    choice_among,
    explained_memory,
    explained_network,
    frozen,
    output_of,
    segmentation_logits,
    weights_dtype,
)
from igseg.network.score import Score, Target

CHECKED_NODES = (0.25, 0.5)  # nodes evaluated in float32 too, to check a reduced precision

WORTHWHILE_CROP = 0.9  # a crop must take at most this share of the whole network's operations
MOST_PARTS = 64  # parts of a region that are cropped apart; more are cropped as one box
MOST_GRAPHS = 4  # graphs that are kept, each for one size of images


class FiniteFlags:
    """Notes on the device whether values are finite. They are read later, for many values at once,
    since a read waits until the GPU has computed the values."""

    def __init__(self) -> None:
        self._notes: list[tuple[torch.Tensor, str, Sequence[float]]] = []

    def note(self, values: torch.Tensor, what: str, alphas: Sequence[float] = ()) -> None:
        """Note for each sample of a batch (N, ...) whether it is finite. what: the name of the
        values. alphas: those of the samples, where they are interpolation steps."""
        self._notes.append((torch.isfinite(values).flatten(1).all(dim=1), what, alphas))

    def check(self) -> None:
        """Raise NonFiniteError if a sample holds a NaN or an infinity; it names the first one. The
        notes are then deleted."""
        notes, self._notes = self._notes, []
        if not notes or bool(torch.cat([finite for finite, _, _ in notes]).all()):
            return
        for finite, what, alphas in notes:
            if not bool(finite.all()):
                first = int((~finite).nonzero()[0])
                raise NonFiniteError(what, alphas[first] if alphas else None)


def check_finite(
    values: torch.Tensor,
    what: str,
    alphas: Sequence[float] = (),
    flags: FiniteFlags | None = None,
) -> None:
    """Note in the flags whether values are finite (see `FiniteFlags.note`). Without flags, raise
    NonFiniteError at once if they are not."""
    collected = FiniteFlags() if flags is None else flags
    collected.note(values, what, alphas)
    if flags is None:
        collected.check()


@dataclass
class Passes:
    """How many samples went through a network, not counting those that only prepare it."""

    forward: int = 0
    gradients: int = 0


def boxes_of(region: torch.Tensor) -> list[Box]:
    """The boxes around the connected parts of a region (h, w) bool, as boxes of a map (N, K, h, w).
    More than MOST_PARTS parts get a single box around all of them."""
    pixels = region.cpu().numpy().astype(np.uint8)
    count, _, stats, _ = cv2.connectedComponentsWithStats(pixels, connectivity=8)
    parts = stats[1:, :4] if count - 1 <= MOST_PARTS else [cv2.boundingRect(pixels)]
    return [
        (None, None, (int(y), int(y + height)), (int(x), int(x + width)))
        for x, y, width, height in parts
    ]


@dataclass(frozen=True)
class Crops:
    """Which boxes of the output are computed for some targets, and how the scores of the targets
    are computed from these boxes."""

    targets: tuple[Score, ...]
    plan: Plan | None = None  # None: the whole output is computed
    parts: tuple[tuple[Score | None, ...], ...] = ()  # for each target its part in each box
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
                    if part is not None  # None: the gradient does not depend on this box
                ),
                start=nothing,
            )
            for parts in self.parts
        ]


def parts_of(target: Target, boxes: Sequence[Box]) -> tuple[Target | None, ...]:
    """The part of a target in each box. Where boxes overlap, a pixel belongs to the first box."""
    remaining = target.weights.clone()
    parts: list[Target | None] = []
    for box in boxes:
        place = place_of(box)
        weights = remaining[place].clone()
        remaining[place] = 0
        parts.append(replace(target, weights=weights) if bool(weights.any()) else None)
    return tuple(parts)


def _try_reduced(graph: NetworkGraph, x: torch.Tensor, reduced: torch.dtype) -> None:
    """Run a graph forward and backward in a reduced type."""
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        logits = graph.run(point, graph.whole, reduced)[0]
        torch.autograd.grad(logits.float().sum(), point)


class GradientEngine:
    """Logits and gradients of a network, from its graph.

    The graph is made on the first image of each size, and again when the network's weights have
    changed. `passes` counts the samples that went through the network, forward and backward, as
    whole maps or in crops.
    """

    def __init__(self, model: nn.Module, device: torch.device, step_batch: int | None) -> None:
        self.model, self.device = model, device
        self.step_batch = StepBatch(device, step_batch)
        self.passes = Passes()
        # By the reduced type: whether the whole graph runs in it.
        self.runs_reduced: dict[torch.dtype, bool] = {}
        self.network: Network | None = None  # the graph, or the network that runs instead of it
        self.preparation: Preparation | None = None
        self.output_note = ''  # which of several logit maps is explained; empty: there is only one
        self._reduced_copies: dict[torch.dtype, nn.Module] = {}  # of a network without a graph
        self._fingerprint: Fingerprint | None = None
        self._prepared: dict[torch.Size, Prepared] = {}
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None  # an image and its logits
        # By the size of images: whether several may go through the network together.
        self._independence: dict[torch.Size, bool] = {}
        self._place_notes: dict[torch.Size, str] = {}  # where the map lies, in a sentence
        # By the size of images: deviation of the gradients of crops from those of the whole map.
        self._gradient_deviations: dict[torch.Size, float] = {}

    def for_network(self, network: Network) -> GradientEngine:
        """An engine that runs another network, without a graph. It shares step batch and counters
        with this engine."""
        engine = GradientEngine(self.model, self.device, None)
        engine.network, engine.step_batch, engine.passes = network, self.step_batch, self.passes
        return engine

    @property
    def forward_passes(self) -> int:
        """Samples that went through the network so far."""
        return self.passes.forward

    @property
    def gradient_evaluations(self) -> int:
        """Samples whose gradients went back through the network so far."""
        return self.passes.gradients

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided about the network, in sentences."""
        notes = [self.output_note] if self.output_note else []
        notes += [self.place_note] if self.place_note else []
        if not all(self._independence.values()):
            notes.append(
                'images in a batch influence each other in this network (batch norm without '
                'running statistics, or a mean over the batch), or it takes a single image only: '
                'they go through it one at a time'
            )
        return tuple(notes)

    @property
    def place(self) -> Place | None:
        """Where the network's map lies in the present input; None: it shows the whole input."""
        return None if self.preparation is None else self.preparation.place

    @property
    def place_note(self) -> str:
        """The same in a sentence; empty where nothing was to be decided."""
        sizes = [size for size, p in self._prepared.items() if p.network is self.network]
        return self._place_notes.get(sizes[0], '') if sizes else ''

    @property
    def original(self) -> nn.Module:
        """The user's network; if its map does not show the whole input, wrapped so that its map
        lies where it belongs."""
        return self.model if self.place is None else LogitMap(self.model, self.place)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        return weights_dtype(self.model)

    @property
    def waits(self) -> bool:
        """Whether reading a computed value waits for the device; a CPU has computed it already."""
        return self.device.type != 'cpu'

    @contextlib.contextmanager
    def running(self, x: torch.Tensor, state: Fingerprint | None = None) -> Iterator[None]:
        """Inside this context the network may be run on inputs like x (1, C, H, W), whatever
        autograd mode or autocast the caller uses. The user's network stays unchanged. Errors of the
        network, and lack of memory, become an InputError.

        state: the present `fingerprint` of the network, where the caller knows it."""
        with (
            torch.inference_mode(False),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
            explained_memory(self.device),
        ):
            self._prepare(x, fingerprint(self.model) if state is None else state)
            yield

    def _prepare(self, x: torch.Tensor, now: Fingerprint) -> None:
        """Make the graph for inputs like x, unless there is one of the present network.

        now: the present fingerprint."""
        size = x.shape[1:]
        if now != self._fingerprint:
            self._prepared, self._gradient_deviations, self._independence = {}, {}, {}
            self.step_batch.single = False
        if size not in self._prepared:
            while len(self._prepared) >= MOST_GRAPHS:
                del self._prepared[next(iter(self._prepared))]
            with explained_network(x.shape):
                prepared = self._new_copy(x.to(self.dtype), now)
            if prepared.logits is not None:
                self._seen = x, prepared.logits.to(x.dtype)
            if prepared.in_part is not None:
                self._note_independence(size, prepared.in_part.independent)
                self._gradient_deviations[size] = prepared.in_part.of_crops
            self._prepared[size] = replace(prepared, logits=None)
        prepared = self._prepared[size]
        if prepared.network is not self.network:
            self.network, self.preparation = prepared.network, prepared.preparation
            self.runs_reduced, self._reduced_copies = {}, {}
        self._fingerprint = now

    def _note_independence(self, size: torch.Size, independent: bool) -> None:
        """Note whether images of a size may go through the network together."""
        self._independence[size] = independent
        if not independent:
            self.step_batch.one_at_a_time()

    def _new_copy(self, x: torch.Tensor, now: Fingerprint) -> Prepared:
        size = x.shape[-2:]
        network = self.model.network if isinstance(self.model, LogitsOf) else self.model
        with torch.no_grad():
            output = output_of(network, x)
        steady = fingerprint(self.model) == now
        self.output_note = choice_among(output, size)
        logits = segmentation_logits(output, size)
        place, self._place_notes[x.shape[1:]] = place_of_map(network, x, logits)
        return prepared_network(self.model, x, place, logits if steady else None)

    def crops(self, targets: Sequence[Score]) -> Crops:
        """Which part of the output is computed for some targets: boxes around their regions, if
        that takes fewer operations than the whole output."""
        everything, graph = Crops(tuple(targets)), self.network
        with_region = [target for target in targets if isinstance(target, Target)]
        if not isinstance(graph, NetworkGraph) or len(with_region) < len(targets):
            return everything
        regions = [target.region for target in with_region]
        if any(region.shape != graph.output_shape[2:] for region in regions):
            return everything
        plan = graph.plan(boxes_of(torch.stack(regions).any(dim=0)))
        share = plan.flops / graph.whole.flops if graph.whole.flops else 1.0
        if share > WORTHWHILE_CROP:
            return everything
        parts = tuple(parts_of(target, plan.boxes) for target in with_region)
        return Crops(tuple(targets), plan, parts, Cropping(share, len(plan.boxes)))

    def compared_crops(
        self, x: torch.Tensor, logits: torch.Tensor, targets: Sequence[Score]
    ) -> Crops:
        """`crops`, compared with the whole map on an image x (1, C, H, W): the logits always, the
        gradient on the first image of a size, unless it was compared on a part of the image as the
        network was prepared. If the crops deviate, the whole map is computed.

        logits: the whole map, (1, K, h, w)."""
        crops, graph = self.crops(targets), self.network
        if crops.plan is None or not isinstance(graph, NetworkGraph):
            return crops
        size, logit = x.shape[1:], self._crop_deviation(x, logits, crops.plan)
        if size not in self._gradient_deviations:
            self._gradient_deviations[size] = self._gradient_deviation(x, crops, graph)
        gradient = self._gradient_deviations[size]
        if not within([logit, gradient], EQUIVALENCE_TOLERANCE):
            cropping = Cropping(logit_deviation=logit, gradient_deviation=gradient, fell_back=True)
            return Crops(crops.targets, cropping=cropping)
        cropping = replace(crops.cropping, logit_deviation=logit, gradient_deviation=gradient)
        return replace(crops, cropping=cropping)

    def _crop_deviation(self, x: torch.Tensor, logits: torch.Tensor, plan: Plan) -> float:
        """The deviation of the logits in the boxes of a plan from those of the whole map."""
        with torch.no_grad():
            maps = self.maps(x, plan)
        expected = [logits[place_of(box)] for box in plan.boxes]
        pairs = zip(maps, expected, strict=True)
        return float(np.max([relative_difference(crop, whole) for crop, whole in pairs]))

    def _gradient_deviation(self, x: torch.Tensor, crops: Crops, graph: NetworkGraph) -> float:
        """The deviation of the gradient of the targets' sum, with crops, from that with the whole
        map. If double precision shows that only rounding is the cause: the deviation in it."""

        def deviation_in(dtype: torch.dtype | None) -> float:
            gradients = []
            for cropped in (Crops(crops.targets), crops):
                point = x.detach().clone().to(dtype or self.dtype).requires_grad_()
                with torch.enable_grad(), explained_network(x.shape):
                    scores = cropped.scores(graph.run(point, cropped.plan or graph.whole, dtype))
                    pairs = zip(scores, crops.targets, strict=True)
                    scaled = (score.sum() * target.scale for score, target in pairs)
                    total = sum(scaled, start=scores[0].new_zeros(()))
                    gradients.append(torch.autograd.grad(total, point)[0])
            return relative_difference(gradients[1], gradients[0])

        deviation = deviation_in(None)
        unknown = self.dtype != torch.float32 or widest_type(self.device) != torch.float64
        if deviation <= EQUIVALENCE_TOLERANCE or unknown:
            return deviation
        double, _ = attempt(partial(deviation_in, torch.float64), Exception)
        graph.forget(torch.float64)
        return deviation if double is None or double > EXACT_TOLERANCE else double

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of an image (1, C, H, W), as by `run` without gradients. Those of the image on
        which the network was prepared are known already."""
        seen, self._seen = self._seen, None
        if seen is not None and seen[0] is x:
            self.passes.forward += 1
            check_finite(seen[1], 'the logits')
            return seen[1]
        with torch.no_grad():
            return self.run(x)

    def run(
        self, x: torch.Tensor, reduced: torch.dtype | None = None, alphas: Sequence[float] = ()
    ) -> torch.Tensor:
        """Images (N, C, H, W) -> logits (N, K, h, w), of the same type, with an autograd graph if
        gradients are enabled. alphas: see `check_finite`. Raises NonFiniteError."""
        return self.maps(x, None, reduced, alphas)[0]

    def maps(
        self,
        x: torch.Tensor,
        plan: Plan | None,
        reduced: torch.dtype | None = None,
        alphas: Sequence[float] = (),
        flags: FiniteFlags | None = None,
    ) -> list[torch.Tensor]:
        """`run` for the boxes of a plan: one map for each box. plan: None: the whole output."""
        self.passes.forward += len(x)
        if len(x) > 1 and not self._independent(x, plan):
            images = [self._maps_at_once(image, plan, reduced) for image in x.split(1)]
            maps = [torch.cat(box) for box in zip(*images, strict=True)]
        else:
            maps = self._maps_at_once(x, plan, reduced)
        for logits in maps:
            check_finite(logits, 'the logits', alphas, flags)
        return maps

    def _maps_at_once(
        self, x: torch.Tensor, plan: Plan | None, reduced: torch.dtype | None
    ) -> list[torch.Tensor]:
        """The maps of images that go through the network together."""
        network = self.network
        assert network is not None  # `running` prepares it, or the caller sets it
        with explained_network(x.shape):
            if isinstance(network, NetworkGraph):
                maps = self._run_graph(network, x, plan or network.whole, reduced)
            else:
                maps = [self._run_network(network, x, reduced)]
        return [logits.to(x.dtype) for logits in maps]

    def _independent(self, x: torch.Tensor, plan: Plan | None) -> bool:
        """Whether images (N, C, H, W), N > 1, may go through the network together: whether each
        then has the logits and the gradient that it has alone.

        This is tried once for each size of images. It does not hold for batch norm without running
        statistics, for a mean over the batch, or for a network that takes only the first image."""
        size = x.shape[1:]
        if size not in self._independence:
            pair = torch.cat([x[:1], x[-1:]]).detach()
            independent, _ = attempt(partial(self._same_alone, pair, plan), InputError)
            self._note_independence(size, bool(independent))  # None: two images cannot be run
        return self._independence[size]

    def _same_alone(self, pair: torch.Tensor, plan: Plan | None) -> bool:
        """Whether the first of two images has the logits and the gradient that it has alone, and
        the second the logits. Raises InputError if the network cannot be run on one of them."""
        (logits, gradient), (alone, alone_gradient) = (
            self._response(images, plan) for images in (pair, pair[:1])
        )
        with torch.no_grad():
            second = torch.cat([box.flatten() for box in self._maps_at_once(pair[1:], plan, None)])
        if len(logits) != 2:  # the network leaves out an image
            return False
        deviations = [relative_difference(logits[0], alone[0]),
                      relative_difference(logits[1], second)]  # fmt: skip
        gradient_deviation = relative_difference(gradient[0], alone_gradient[0])
        if within([*deviations, gradient_deviation], EQUIVALENCE_TOLERANCE):
            return True
        # Rounding alone may push a ReLU over its kink. Logits then agree, gradients differ little.
        return within(deviations, EQUIVALENCE_TOLERANCE) and gradient_deviation <= ROUNDED_GRADIENT

    def _response(
        self, images: torch.Tensor, plan: Plan | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of images (N, C, H, W): their logits, (N, numbers), and the gradient of the first
        image's sum of squared logits, (N, C, H, W)."""
        points = images.clone().requires_grad_()
        with torch.enable_grad():
            boxes = self._maps_at_once(points, plan, None)
            logits = torch.cat([box.flatten(1) for box in boxes], dim=1)
            (gradient,) = torch.autograd.grad(logits[0].float().square().sum(), points)
        return logits.detach(), gradient

    def cropped_logits(self, x: torch.Tensor, crops: Crops) -> torch.Tensor:
        """`run` for the boxes of crops only; zeros outside of the boxes."""
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
        """The boxes of a plan. Under reduced precision, weights and activations are all reduced;
        a network that mixes types runs with autocast instead."""
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
        """The whole output of a network without a graph; reduced precision by autocast."""
        if reduced is None:
            with torch.autocast(self.device.type, enabled=False):
                output = output_of(network, x.to(self.dtype))
        else:
            if reduced not in self._reduced_copies:
                assert isinstance(network, nn.Module)  # the precision of a function is not reduced
                self._reduced_copies[reduced] = reduced_copy(network, reduced)
            with torch.autocast(self.device.type, dtype=reduced):
                output = output_of(self._reduced_copies[reduced], x)
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

        points: (steps, C, H, W), the leaf of the autograd graph of `scores`. scores: (steps,) for
        each target. velocities: (steps, C, H, W) or (1, C, H, W). alphas, flags: see
        `check_finite`. Raises NonFiniteError, or notes it in the flags.
        """
        by_target = []
        for number, (score, target) in enumerate(zip(scores, targets, strict=True), start=1):
            # Samples do not influence each other (see `_independent`), so the gradient of the sum
            # holds the gradient of each sample. The sum is scaled by the size of the region, so
            # that the gradients of single pixels do not underflow.
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
        """At points (steps, C, H, W): the maps of the crops, F of their targets (steps, targets),
        and the densities (steps, targets, C, H, W). alphas, flags: see `check_finite`. Raises
        NonFiniteError, or notes it in the flags."""
        # `requires_grad_` below changes a tensor, so it gets a detached one: the points may belong
        # to the path. A tensor made in inference mode must be copied.
        points = points.clone() if points.is_inference() else points.detach()
        with torch.enable_grad():
            points.requires_grad_()
            maps = self.maps(points, crops.plan, reduced, alphas, flags)
            scores = crops.scores(maps)
            densities = self.densities(points, scores, crops.targets, velocities, alphas, flags)
        target_scores = torch.stack([score.detach() for score in scores], dim=1)
        return [logits.detach() for logits in maps], target_scores, densities
