"""What a method of attribution is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from igseg.engine.sampler import AttributionPath
from igseg.explanation import Declared, Found
from igseg.method.paths import UnitVelocity
from igseg.method.rules import ADAPTIVE, AnyRule
from igseg.method.walk import PlainSettings, Work, plain_work
from igseg.setting import Setting


def option(default: object, meaning: str, **known: object):
    """A field of a method that is one of its options; see `Setting`."""
    return field(default=default, metadata={'setting': Setting('option', meaning, **known)})


# --------------------------------------------------------------------------- what a method is


@dataclass(frozen=True)
class Method:
    """A method of attribution; the docstring of each is its line in --help."""

    source: ClassVar[str]  # paper, equation
    declared: ClassVar[Declared]
    layer_of: ClassVar[bool] = False  # whether a layer is named with it
    references: ClassVar[int] = 0  # of other images that it compares with, at most
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
    def option_names(self) -> tuple[str, ...]:
        """Its options."""
        return tuple(options_of(type(self)))

    def rule(self, seed: int) -> AnyRule | None:
        """By which it integrates, if not by the rule of the settings."""
        return None

    def rule_name(self, of_settings: str) -> str:
        """The name of the rule by which it integrates."""
        own = self.rule(0)
        return of_settings if own is None else own.name

    def baseline(self, work: Work) -> tuple[str, torch.Tensor] | None:
        """Name and image (1, C, H, W) of a baseline of its own; None: it has none."""
        return None

    def check_network(self, model: nn.Module, x: torch.Tensor) -> None:
        """Raise InputError where a network can be seen not to suit it before it is prepared for
        images like x (1, C, H, W)."""

    def steps_in_all(self, work: Work) -> int | None:
        """How many steps it will take; None: not known beforehand."""
        return None

    def explain(self, work: Work) -> list[Found]:
        """What it finds of each target."""
        raise NotImplementedError

    def map_for_check(
        self,
        seed: int,
        references: torch.Tensor | None,
        network: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        baseline: torch.Tensor,
        target: Callable[[torch.Tensor], torch.Tensor],
        steps: int,
    ) -> np.ndarray:
        """The map of one target, (C or 1, H, W), of whatever network, image and baseline, in a few
        midpoint steps; the last five arguments are those of `plain_map`. network: may have the
        module that it is, as `module`."""
        module = getattr(network, 'module', network)
        settings = PlainSettings(steps, seed)
        work = plain_work(network, module, x, baseline, target, settings, references)
        return self.explain(work)[0].attributions.cpu().numpy()


@dataclass(frozen=True)
class PathMethod(Method):
    """A method that integrates along paths."""

    def paths(self, work: Work) -> Iterator[AttributionPath]:
        """The paths of which the mean is taken."""
        raise NotImplementedError

    def explain(self, work: Work) -> list[Found]:
        """See `Method`."""
        complete = self.declares.completeness is not None
        return work.walk(self.paths(work), self.rule(work.settings.seed), complete).found()


@dataclass(frozen=True)
class Multiplied(PathMethod):
    """A method whose gradients are multiplied by image minus baseline, unless that is not wanted:
    then they are their mean, and sum to nothing in particular."""

    multiply: bool = True  # set by --no_multiply

    @property
    def declares(self) -> Declared:
        """See `Method`."""
        return self.declared if self.multiply else replace(self.declared, completeness=None)

    def steps_in_all(self, work: Work) -> int | None:
        """See `Method`."""
        own_nodes = len(work.at_image.targets) > 1 and work.settings.rule == ADAPTIVE
        if work.settings.tolerance is not None or own_nodes:  # each target has nodes of its own
            return None
        return work.settings.steps * len(work.baselines) * self._copies

    @property
    def _copies(self) -> int:
        """Of the image that are explained."""
        return 1

    def _along(self, path: AttributionPath) -> AttributionPath:
        return path if self.multiply else UnitVelocity(path)


def options_of(method: type[Method]) -> dict[str, Setting]:
    """What is known of each option of a method, by its name."""
    return {f.name: f.metadata['setting'] for f in fields(method) if f.metadata}
