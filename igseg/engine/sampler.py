"""Gradients along a path: nodes -> densities (gradient times velocity), in step batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch

from igseg.engine.engine import Crops, FiniteFlags, GradientEngine
from igseg.errors import NonFiniteError, attempt
from igseg.network.outputs import OutOfMemory, out_of_memory_is_one_error
from igseg.network.score import Score


class AttributionPath(Protocol):
    """A way from a baseline (alpha = 0) to an image (alpha = 1).

    A new kind of path is a class with `image` and `at`. A path may bend (through a scale space),
    end at another image than the explained one (at a noisy copy of it), or jump between alphas (to
    another baseline at every node). The map is the mean over all paths of a method. A path that
    starts at many points also has `starts`, (n, C, H, W); F at its start is the mean over them.
    """

    @property
    def image(self) -> torch.Tensor:
        """The end of the path, (1, C, H, W)."""

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alphas (steps,) -> points (steps, C, H, W), and the velocities there, (steps, C, H, W) or
        (1, C, H, W)."""


# --------------------------------------------------------------------------- along a path


@dataclass(frozen=True)
class AtImage:
    """Results at the image itself, which all paths that end there share."""

    x: torch.Tensor  # (1, C, H, W)
    logits: torch.Tensor  # (1, K, h, w)
    targets: Sequence[Score]
    gradient: torch.Tensor | None  # (targets, C, H, W); None: the rule has no node at the image
    crops: Crops | None = None  # of all targets; None: the whole map is computed


class PathSampler:
    """The attribution densities along a path, with a log of scores and masks.

    Called with nodes, it yields their densities (targets, C, H, W), one after the other; `some`
    yields at each node those of some targets. The nodes go through the network in step batches.
    Densities that were computed earlier (at the ends, or to check the precision) wait in `_ready`;
    each is yielded once.

    On a CPU every step batch is checked at once for values that are not finite. On a GPU this would
    wait for the device after every step batch. Instead it is noted there, and checked before the
    last density of a call is yielded. So the densities of a complete call are finite, and
    NonFiniteError names the first node where they are not.
    """

    def __init__(
        self,
        engine: GradientEngine,
        path: AttributionPath,
        at_image: AtImage,
        overlap: Callable[[torch.Tensor], torch.Tensor],
        on_steps: Callable[[int], object] = lambda count: None,
    ) -> None:
        """overlap: logits (N, K, h, w) -> (N,), their overlap with the predicted mask. on_steps:
        called with the number of nodes that were yielded."""
        self.engine, self.path, self.targets = engine, path, tuple(at_image.targets)
        self.all_targets = tuple(range(len(self.targets)))
        self.reduced: torch.dtype | None = None  # reduced precision; None: that of the network
        # F of the targets at each node, (targets,); NaN for targets that were not evaluated there.
        self.scores: dict[float, torch.Tensor] = {}
        # dF/dalpha of the targets by the gradient, at nodes where it was computed; NaN as above.
        self.slopes: dict[float, torch.Tensor] = {}
        self.overlaps: dict[float, torch.Tensor] = {}  # at nodes where the whole map was computed
        self._overlap, self._on_steps = overlap, on_steps
        self._flags = FiniteFlags() if engine.waits else None
        self._ready: dict[tuple[float, int], torch.Tensor] = {}  # (node, target) -> (C, H, W)
        self._crops = {self.all_targets: at_image.crops or Crops(self.targets)}
        self._see_the_end(at_image)

    def _see_the_end(self, at_image: AtImage) -> None:
        """If the path ends at the image itself, take over the results there."""
        if self.path.image is not at_image.x:
            return
        self._log([1.0], at_image.logits)
        if at_image.gradient is not None:
            _, velocity = self.path.at(self._tensor([1.0]))
            self._keep([1.0], self.all_targets, (at_image.gradient * velocity).unsqueeze(0))

    def see_the_ends(self, density_at_start: bool) -> None:
        """Log the scores and the mask at both ends, unless that is done already.

        density_at_start: whether the density at alpha = 0 is needed too. It is then computed and
        kept, in the same pass if the whole map is computed."""
        if density_at_start:
            self._keep([0.0], self.all_targets, self._evaluate([0.0], self.all_targets, None))
            self._check()
        self.see_maps((0.0, 1.0))

    def see_maps(self, alphas: Sequence[float]) -> None:
        """Log the scores and the mask at nodes, from whole maps, unless that is done already."""
        for alpha in alphas:
            if alpha not in self.overlaps:
                starts = getattr(self.path, 'starts', None) if alpha == 0 else None
                points = self.path.at(self._tensor([alpha]))[0] if starts is None else starts
                with torch.no_grad():
                    self._log_mean(alpha, [self.engine.run(point) for point in points.split(1)])

    def _log_mean(self, alpha: float, all_logits: Sequence[torch.Tensor]) -> None:
        """Log the scores and the overlap of a node with several points: their means."""
        rows = [
            torch.stack([target(logits) for target in self.targets], 1) for logits in all_logits
        ]
        self._log_scores([alpha], self.all_targets, torch.stack(rows).mean(dim=0))
        self.overlaps[alpha] = torch.cat([self._overlap(logits) for logits in all_logits]).mean()

    def __call__(self, alphas: np.ndarray) -> Iterator[torch.Tensor]:
        return self.some([(float(alpha), self.all_targets) for alpha in alphas])

    def some(self, wanted: Sequence[tuple[float, tuple[int, ...]]]) -> Iterator[torch.Tensor]:
        """The densities at nodes. wanted: each node with the numbers of the targets there."""
        for number, (alpha, targets) in enumerate(wanted):
            while missing := self._missing(alpha, targets):
                alike = (a for a, others in wanted[number:] if self._missing(a, others) == missing)
                chunk = list(islice(alike, self.engine.step_batch.size))
                computed = self._compute(chunk, missing)
                if computed is None:
                    self.engine.step_batch.halve()
                    continue
                self._keep(chunk, missing, computed)
            if number == len(wanted) - 1:
                self._check()
            self._on_steps(1)
            yield torch.stack([self._ready.pop((alpha, target)) for target in targets])

    def _check(self) -> None:
        """Raise NonFiniteError if values were not finite since the last check."""
        if self._flags is not None:
            self._flags.check()

    def _missing(self, alpha: float, targets: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(target for target in targets if (alpha, target) not in self._ready)

    def _keep(
        self, alphas: Sequence[float], targets: tuple[int, ...], densities: torch.Tensor
    ) -> None:
        """Keep densities (nodes, targets, C, H, W) until they are asked for."""
        self._log_rows(self.slopes, alphas, targets, densities.flatten(2).sum(dim=2))
        for alpha, row in zip(alphas, densities, strict=True):
            self._ready.update(
                ((alpha, t), density) for t, density in zip(targets, row, strict=True)
            )

    def _compute(self, alphas: list[float], targets: tuple[int, ...]) -> torch.Tensor | None:
        """Densities of a chunk, (steps, targets, C, H, W); None: there is too little memory."""

        def evaluate() -> torch.Tensor:
            with self.engine.step_batch.timed(len(alphas)), out_of_memory_is_one_error():
                return self._evaluate(alphas, targets, self.reduced)

        return attempt(evaluate, OutOfMemory)[0]

    def _evaluate(
        self,
        alphas: list[float],
        targets: tuple[int, ...],
        reduced: torch.dtype | None,
        log: bool = True,
    ) -> torch.Tensor:
        """Densities at nodes, (steps, targets, C, H, W). Raises NonFiniteError, which names the
        node, or notes the error for `_check`."""
        points, velocities = self.path.at(self._tensor(alphas))  # (steps, C, H, W)
        crops = self._crops_of(targets)
        maps, scores, densities = self.engine.look(
            points, velocities, crops, reduced, alphas, self._flags
        )
        if log:
            self._log_scores(alphas, targets, scores)
            if crops.plan is None:
                self.overlaps.update(zip(alphas, self._overlap(maps[0]), strict=True))
        return densities

    def _crops_of(self, targets: tuple[int, ...]) -> Crops:
        """The crops of some targets. If the crops of all targets fell back to the whole map, these
        do too."""
        if targets not in self._crops:
            all_crops, wanted = self._crops[self.all_targets], [self.targets[t] for t in targets]
            fell_back = all_crops.cropping.fell_back
            self._crops[targets] = Crops(tuple(wanted)) if fell_back else self.engine.crops(wanted)
        return self._crops[targets]

    def _tensor(self, alphas: Sequence[float]) -> torch.Tensor:
        image = self.path.image
        return torch.tensor(alphas, dtype=image.dtype).to(image.device, non_blocking=True)

    def _log(self, alphas: list[float], logits: torch.Tensor) -> None:
        """Log the scores and the overlap of the mask at nodes, without waiting for a GPU."""
        scores = torch.stack([target(logits) for target in self.targets], dim=1)
        self._log_scores(alphas, self.all_targets, scores)
        self.overlaps.update(zip(alphas, self._overlap(logits), strict=True))

    def _log_scores(
        self, alphas: Sequence[float], targets: tuple[int, ...], scores: torch.Tensor
    ) -> None:
        """Log scores (nodes, targets)."""
        self._log_rows(self.scores, alphas, targets, scores)

    def _log_rows(
        self,
        log: dict[float, torch.Tensor],
        alphas: Sequence[float],
        targets: tuple[int, ...],
        rows: torch.Tensor,
    ) -> None:
        """Log a number of each target at each node, (nodes, targets)."""
        for alpha, row in zip(alphas, rows, strict=True):
            logged = log.setdefault(alpha, row.new_full((len(self.targets),), torch.nan))
            for target, number in zip(targets, row, strict=True):  # a list as index waits for a GPU
                logged[target] = number

    def look_between(self, alpha: float) -> None:
        """Log the scores and the slopes of all targets at a node that the rule did not ask for."""
        densities = self._evaluate([alpha], self.all_targets, None)
        self._check()
        self._log_rows(self.slopes, [alpha], self.all_targets, densities.flatten(2).sum(dim=2))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside this context the logs are used and added to. Afterwards they are as before, and
        the passes do not count."""
        logs = dict(self.scores), dict(self.slopes), dict(self.overlaps)
        passes, before = self.engine.passes, replace(self.engine.passes)
        try:
            yield
        finally:
            self.scores, self.slopes, self.overlaps = logs
            passes.forward, passes.gradients = before.forward, before.gradients

    def measured_slopes(self, alphas: Sequence[float], step: float) -> torch.Tensor:
        """dF/dalpha by central differences, (nodes, targets): the change of F between two points
        that lie `step` before and after each node in the direction of the path's velocity."""
        points, velocities = self.path.at(self._tensor(alphas))
        probes = torch.cat([points + step * velocities, points - step * velocities])
        crops, rows = self._crops_of(self.all_targets), []
        with torch.no_grad():
            for chunk in probes.split(self.engine.step_batch.size):
                rows.append(torch.stack(crops.scores(self.engine.maps(chunk, crops.plan)), dim=1))
        after, before = torch.cat(rows).cpu().double().split(len(points))  # MPS has no float64
        return (after - before) / (2 * step)

    def check_precision(self, reduced: torch.dtype, nodes: Sequence[float]) -> float:
        """Relative L2 deviation of the map from float32, over nodes that are evaluated in both.

        It is the largest deviation of all targets; infinite instead of NaN. The float32 densities
        are kept for the integral.
        """
        exact = torch.cat([self._evaluate([node], self.all_targets, None) for node in nodes])
        self._check()
        self._keep(nodes, self.all_targets, exact)  # (nodes, targets, C, H, W)

        def in_reduced_precision() -> torch.Tensor:
            densities = torch.cat(
                [self._evaluate([node], self.all_targets, reduced, log=False) for node in nodes]
            )
            self._check()
            return densities

        reduced_densities, _ = attempt(in_reduced_precision, NonFiniteError)
        if reduced_densities is None:
            return float('inf')
        difference = (reduced_densities - exact).sum(dim=0).flatten(1).norm(dim=1)
        size = exact.sum(dim=0).flatten(1).norm(dim=1)
        # Where a map is all zero, the quotient is not a number.
        deviation = float(torch.where(difference == 0, 0.0, difference / size).max())
        return deviation if deviation >= 0 else float('inf')
