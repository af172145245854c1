"""The gradients along a path: nodes -> densities (gradient times velocity), in step batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

    A class with these two is all that a new kind of path needs. It may bend (through a scale
    space), end elsewhere than at the image explained (at a noisy copy of it), or jump between
    alphas (to another baseline at every node). Of several paths the mean is taken. One that starts
    at many places also has `starts`, (n, C, H, W): F at its start is the mean over them.
    """

    @property
    def image(self) -> torch.Tensor:
        """Where it ends, (1, C, H, W)."""

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alphas (steps,) -> points (steps, C, H, W), and the velocities there, of that shape or
        (1, C, H, W)."""


# --------------------------------------------------------------------------- along a path


@dataclass(frozen=True)
class AtImage:
    """What was found at the image itself, which all paths that end there share."""

    x: torch.Tensor  # (1, C, H, W)
    logits: torch.Tensor  # (1, K, h, w)
    targets: Sequence[Score]
    gradient: torch.Tensor | None  # (targets, C, H, W); None where the rule has no node there
    crops: Crops | None = None  # of all targets; None: the whole map


class PathSampler:
    """The attribution densities along a path, and a log of what was seen on it.

    Called with nodes, it gives their densities (targets, C, H, W), one after the other; `some`
    asks at each node for some of the targets. The nodes go through the network in step batches.
    Densities that were computed before they are asked for (at the ends, or to check the precision)
    wait in `_ready`, and each is given out once.

    Whether all is finite is seen at once on a CPU. A GPU would have to be waited for in every step
    batch; there it is noted, and seen before the last density of a round is given out (a round is
    one call): who has all densities of a round has finite ones, and NonFiniteError names the first
    node that has not.
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
        self._flags = FiniteFlags() if engine.waits else None
        self._ready: dict[tuple[float, int], torch.Tensor] = {}  # (C, H, W) at a node of a target
        self._crops = {self.everyone: at_image.crops or Crops(self.targets)}
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
            self._check()
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
            if number == len(wanted) - 1:
                self._check()
            self._on_steps(1)
            yield torch.stack([self._ready.pop((alpha, target)) for target in targets])

    def _check(self) -> None:
        """Raise NonFiniteError for what was noted since it was last asked."""
        if self._flags is not None:
            self._flags.check()

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
        """Densities at nodes, (steps, targets, C, H, W). Raises NonFiniteError, which names the
        node, or notes it for `_check`."""
        points, velocities = self.path.at(self._tensor(alphas))  # (steps, C, H, W)
        crops = self._crops_of(targets)
        maps, scores, densities = self.engine.look(
            points, velocities, crops, reduced, alphas, self._flags
        )
        if logged:
            self._log_scores(alphas, targets, scores)
            if crops.plan is None:
                self.overlaps.update(zip(alphas, self._overlap(maps[0]), strict=True))
        return densities

    def _crops_of(self, targets: tuple[int, ...]) -> Crops:
        """What is computed for some of the targets: no more than for all."""
        if targets not in self._crops:
            every, some = self._crops[self.everyone], [self.targets[t] for t in targets]
            fell_back = every.cropping.fell_back
            self._crops[targets] = Crops(tuple(some)) if fell_back else self.engine.crops(some)
        return self._crops[targets]

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
            for target, score in zip(targets, row, strict=True):  # a GPU waits for a list as index
                known[target] = score

    def check_precision(self, reduced: torch.dtype, nodes: Sequence[float]) -> float:
        """Relative L2 deviation of the map from float32, over nodes that are evaluated in both.

        The largest of the targets'; infinite where it is not a number. The float32 densities are
        kept for the integral.
        """
        exact = torch.cat([self._evaluate([node], self.everyone, None) for node in nodes])
        self._check()
        self._keep(nodes, self.everyone, exact)  # (nodes, targets, C, H, W)

        def in_reduced_precision() -> torch.Tensor:
            densities = torch.cat(
                [self._evaluate([node], self.everyone, reduced, logged=False) for node in nodes]
            )
            self._check()
            return densities

        rough, _ = attempt(in_reduced_precision, NonFiniteError)
        if rough is None:
            return float('inf')
        off = (rough - exact).sum(dim=0).flatten(1).norm(dim=1)
        size = exact.sum(dim=0).flatten(1).norm(dim=1)
        deviation = float(torch.where(off == 0, 0.0, off / size).max())  # a map may be all zero
        return deviation if deviation >= 0 else float('inf')
