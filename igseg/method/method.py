"""What a method of attribution is, and how it is built and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from igseg.engine.sampler import AttributionPath, PathSampler
from igseg.explanation import Declared, MethodResult
from igseg.method.choice import MethodChoice, chosen_methods
from igseg.method.paths import StraightPath, UnitVelocity
from igseg.method.rules import ADAPTIVE, Integration, MethodRule
from igseg.method.walk import Task, deviations_aside, in_precision, plain_task
from igseg.network.outputs import gradient_stops
from igseg.network.score import Score
from igseg.setting import resolved

# The deviation of the gradient from the score beyond which its cause is looked for.
NOTABLE_DEVIATION = 0.02

# --------------------------------------------------------------------------- what a method is


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of attribution. Its row in METHODS says what it promises and which options it has.
    The options are fields of the class."""

    declared: Declared  # as its row says
    counts: ClassVar[str] = 'interpolation steps'  # the unit of its progress bar
    uses_gradients: ClassVar[bool] = True  # whether its map is made of gradients

    @property
    def declares(self) -> Declared:
        """What the method promises, with its present options."""
        return self.declared

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.declares.name

    @property
    def most_references(self) -> int:
        """The largest number of other images that the method compares with."""
        return 0

    def rule(self, seed: int) -> MethodRule | None:
        """The rule by which the method integrates; None: the rule that the user chose."""
        return None

    def rule_name(self, rule: str) -> str | None:
        """The name of the rule by which the method integrates; None: it computes no integral.

        rule: the rule that the user chose."""
        method_rule = self.rule(0)
        if not self.declares.quadrature:
            return None
        return rule if method_rule is None or isinstance(method_rule, str) else method_rule.name

    def baseline(self, task: Task) -> tuple[str, torch.Tensor] | None:
        """Name and image (1, C, H, W) of a baseline that the method makes; None: it makes none."""
        return None

    def check_network(self, model: nn.Module, x: torch.Tensor) -> None:
        """Raise InputError if the method cannot be used with a network and images like x
        (1, C, H, W); called before the network is prepared."""

    def steps_in_all(self, task: Task) -> int | None:
        """How many steps the method will take; None: not known beforehand."""
        return None

    def explain(self, task: Task) -> list[MethodResult]:
        """The result for each target."""
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
        """The map of one target, (C or 1, H, W), in a few midpoint steps, for any network, image
        and baseline. The last five arguments are those of `plain_map`. A network that is no module
        may have its module as the attribute `module`."""
        module: Any = getattr(network, 'module', network)
        few = Integration('midpoint', steps, seed=seed)
        task = plain_task(network, module, x, baseline, target, few, references)
        return self.explain(task)[0].attributions.cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class PathMethod(Method):
    """A method that integrates along paths."""

    def paths(self, task: Task) -> Iterator[AttributionPath]:
        """The paths; the map is the mean over them."""
        raise NotImplementedError

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`."""
        complete = self.declares.completeness is not None
        return task.walk(self.paths(task), self.rule(task.integration.seed), complete).results()


@dataclass(frozen=True, kw_only=True)
class Multiplied(PathMethod):
    """A method whose gradients are multiplied by image minus baseline, unless the user does not
    want that. The map is then the mean of the gradients, and its sum has no meaning."""

    multiply: bool = True  # set by --no_multiply

    @property
    def declares(self) -> Declared:
        """See `Method`."""
        return self.declared if self.multiply else replace(self.declared, completeness=None)

    def steps_in_all(self, task: Task) -> int | None:
        """See `Method`."""
        nodes_by_target = len(task.at_image.targets) > 1 and task.integration.rule == ADAPTIVE
        if task.integration.tolerance is not None or nodes_by_target:
            return None
        return task.integration.steps * len(task.baselines) * self._copies

    @property
    def _copies(self) -> int:
        """The number of copies of the image that are explained."""
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


# --------------------------------------------------------------------------- running a method


def straight_deviations(task: Task) -> list[float] | None:
    """`gradient_deviations` of each target on the straight path, for methods that walk along no
    path."""
    path = StraightPath(task.baselines[0], task.x)
    sampler = PathSampler(task.engine, path, task.at_image, task.overlap)
    return deviations_aside(sampler, [None] * len(task.at_image.targets))


def with_causes(task: Task, results: Sequence[MethodResult]) -> list[MethodResult]:
    """The results of a method, with the cause, in words, where the network's gradient misses much
    of the change of the score."""
    notable = [(result.gradient_deviation or 0.0) > NOTABLE_DEVIATION for result in results]
    if not any(notable):
        return list(results)
    stops = gradient_stops(task.engine.model, task.x.to(task.engine.dtype))
    cause = 'nothing in the network that stops a gradient is known'
    if stops:
        cause = f'no gradient, or another one, passes through {stops} in the network'
    return [
        replace(result, gradient_cause=cause) if is_notable else result
        for result, is_notable in zip(results, notable, strict=True)
    ]


def run_method(method: Method, task: Task, progress: bool) -> tuple[list[MethodResult], str | None]:
    """The result of a method for each target. They are in the precision that the user wants, or in
    float32 with a sentence that says why."""
    with tqdm(total=method.steps_in_all(task), unit='', leave=False, disable=not progress,
              desc=f'{method.name}, {method.counts}') as bar:  # fmt: skip

        def explain_in(precision: str) -> list[MethodResult]:
            integration = replace(task.integration, precision=precision)
            return method.explain(replace(task, integration=integration, on_steps=bar.update))

        # Without an estimated error of the map, nobody could tell whether reduced precision is
        # accurate enough.
        wanted = task.integration.precision if method.declares.quadrature else 'float32'
        results, retried = in_precision(explain_in, wanted)
    if not (task.checks_gradient and method.uses_gradients):
        return results, retried
    if any(result.gradient_deviation is None for result in results):
        deviations = straight_deviations(task)
        if deviations is None:
            return results, retried
        results = [replace(result, gradient_deviation=deviation)
                   for result, deviation in zip(results, deviations, strict=True)]  # fmt: skip
    return with_causes(task, results), retried
