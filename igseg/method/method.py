"""What a method of attribution is, and what becomes of what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from igseg.engine.sampler import AttributionPath
from igseg.explanation import Declared, MethodResult
from igseg.method.choice import MethodChoice, chosen_methods
from igseg.method.paths import UnitVelocity
from igseg.method.rules import ADAPTIVE, Integration, OwnRule
from igseg.method.walk import Task, in_precision, plain_task
from igseg.network.score import Score
from igseg.setting import resolved

# --------------------------------------------------------------------------- what a method is


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of attribution. Its row in METHODS says what it promises and which options it has;
    those are fields of the class."""

    declared: Declared  # of its row
    counts: ClassVar[str] = 'interpolation steps'  # what its progress is told in

    @property
    def declares(self) -> Declared:
        """What it says of itself, with its options as they are."""
        return self.declared

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.declares.name

    @property
    def most_references(self) -> int:
        """Of other images that it compares with, at most."""
        return 0

    def rule(self, seed: int) -> OwnRule | None:
        """By which it integrates, if not by the rule that was asked for."""
        return None

    def rule_name(self, asked: str) -> str | None:
        """The name of the rule by which it integrates; None where it computes no integral."""
        own = self.rule(0)
        if not self.declares.quadrature:
            return None
        return asked if own is None or isinstance(own, str) else own.name

    def baseline(self, task: Task) -> tuple[str, torch.Tensor] | None:
        """Name and image (1, C, H, W) of a baseline of its own; None: it has none."""
        return None

    def check_network(self, model: nn.Module, x: torch.Tensor) -> None:
        """Raise InputError where a network can be seen not to suit it before it is prepared for
        images like x (1, C, H, W)."""

    def steps_in_all(self, task: Task) -> int | None:
        """How many steps it will take; None: not known beforehand."""
        return None

    def explain(self, task: Task) -> list[MethodResult]:
        """What it finds of each target."""
        raise NotImplementedError

    def map_for_check(
        self,
        seed: int,
        references: torch.Tensor | None,
        network: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        baseline: torch.Tensor,
        target: Score,
        steps: int,
    ) -> np.ndarray:
        """The map of one target, (C or 1, H, W), of whatever network, image and baseline, in a few
        midpoint steps; the last five arguments are those of `plain_map`. network: may have the
        module that it is, as `module`."""
        module: Any = getattr(network, 'module', network)  # what is no module may stand for one
        few = Integration('midpoint', steps, seed=seed)
        task = plain_task(network, module, x, baseline, target, few, references)
        return self.explain(task)[0].attributions.cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class PathMethod(Method):
    """A method that integrates along paths."""

    def paths(self, task: Task) -> Iterator[AttributionPath]:
        """The paths of which the mean is taken."""
        raise NotImplementedError

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`."""
        complete = self.declares.completeness is not None
        return task.walk(self.paths(task), self.rule(task.integration.seed), complete).results()


@dataclass(frozen=True, kw_only=True)
class Multiplied(PathMethod):
    """A method whose gradients are multiplied by image minus baseline, unless that is not wanted:
    then they are their mean, and sum to nothing in particular."""

    multiply: bool = True  # set by --no_multiply

    @property
    def declares(self) -> Declared:
        """See `Method`."""
        return self.declared if self.multiply else replace(self.declared, completeness=None)

    def steps_in_all(self, task: Task) -> int | None:
        """See `Method`."""
        own_nodes = len(task.at_image.targets) > 1 and task.integration.rule == ADAPTIVE
        if task.integration.tolerance is not None or own_nodes:  # each target has nodes of its own
            return None
        return task.integration.steps * len(task.baselines) * self._copies

    @property
    def _copies(self) -> int:
        """Of the image that are explained."""
        return 1

    def _along(self, path: AttributionPath) -> AttributionPath:
        return path if self.multiply else UnitVelocity(path)


def build_method(choice: MethodChoice) -> Method:
    """The method that a user chose, with its options."""
    values = {**dict(choice.options), 'declared': choice.kind.declared}
    if choice.layer:
        values['layer'] = choice.layer
    if choice.kind.multiplies:
        values['multiply'] = choice.multiply
    built: Method = resolved(choice.kind.made_by)(**values)
    return built


def build_methods(
    wanted: Sequence[str], given: Sequence[str] = (), multiply: bool = True
) -> tuple[Method, ...]:
    """The methods of these names, with options NAME=VALUE; see `chosen_methods`."""
    return tuple(map(build_method, chosen_methods(wanted, given, multiply)))


# --------------------------------------------------------------------------- what comes of it


def run_method(method: Method, task: Task, progress: bool) -> tuple[list[MethodResult], str | None]:
    """What a method finds, in the precision that was asked for, or why that was not possible."""
    with tqdm(total=method.steps_in_all(task), unit='', leave=False, disable=not progress,
              desc=f'{method.name}, {method.counts}') as bar:  # fmt: skip

        def explain_in(precision: str) -> list[MethodResult]:
            integration = replace(task.integration, precision=precision)
            return method.explain(replace(task, integration=integration, on_steps=bar.update))

        # Where no error of the map is estimated, reduced precision could not be judged.
        wanted = task.integration.precision if method.declares.quadrature else 'float32'
        return in_precision(explain_in, wanted)
