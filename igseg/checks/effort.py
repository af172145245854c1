"""How much the checks of a map compute, as plain data: choosing an effort needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

SPOT_SIDES = (0.08, 0.16)  # sides of the squares that may be a spot, relative to the longer side
COMPARED_BASELINES = ('zero', 'blur', 'mean', 'white')
FORWARDS_A_GRADIENT = 3  # a gradient costs about as much as three forward passes


@dataclass(frozen=True)
class Effort:
    """How much an evaluation computes."""

    fills: tuple[str, ...]  # keys of FILLS: they replace removed pixels
    units: tuple[str, ...]  # 'pixel' or 'superpixel': what is removed at once
    points: int  # intervals of a curve
    displaced: int  # copies of the map in the wrong place, over which this control is averaged
    random_maps: int  # over which the random control is averaged
    patches: int = 0  # patches removed for infidelity
    stages: int = 0  # stages of model randomisation
    noisy: int = 0  # noisy images for max-sensitivity
    baselines: int = 0  # maps of other baselines that are compared, at most; 0: no comparison
    map_steps: int = 0  # interpolation steps of each map that is computed for a check

    def forwards(self) -> int:
        """The number of forward passes of an evaluation."""
        patches = self.patches + 1 if self.patches else 0
        return self.curve_forwards() + patches + 2 + len(SPOT_SIDES)

    def curve_forwards(self) -> int:
        """The forward passes of the deletion and insertion curves. The images at the ends of curves
        are computed once, the images between them for each curve."""
        maps = 2 + self.displaced + self.random_maps
        inner = len(self.units) * 2 * maps * (self.points - 1)
        return 1 + len(self.fills) * (1 + inner)

    def gradients(self) -> int:
        """The largest number of gradients of an evaluation."""
        maps = self.baselines
        maps += self.stages + 1 if self.stages else 0
        maps += self.noisy + 1 if self.noisy else 0
        return 1 + maps * self.map_steps


EFFORTS: dict[str, Effort] = {
    'quick': Effort(
        fills=('local mean',),
        units=('superpixel',),
        points=4,
        displaced=2,
        random_maps=1,
        patches=16,
        stages=1,
        map_steps=4,
    ),
    'full': Effort(
        fills=('baseline', 'blur', 'local mean'),
        units=('pixel', 'superpixel'),
        points=6,
        displaced=3,
        random_maps=2,
        patches=50,
        stages=5,
        noisy=4,
        baselines=len(COMPARED_BASELINES),
        map_steps=8,
    ),
}


def evaluation_cost(effort: str) -> str:
    """The cost of the checks of an effort, for each image and target, in words."""
    chosen = EFFORTS[effort]
    steps = chosen.gradients() + chosen.forwards() / FORWARDS_A_GRADIENT
    return (
        f'--evaluate {effort}: {chosen.forwards()} forward passes and '
        f'{chosen.gradients()} gradients for each image and target, about as much work as '
        f'{steps:.0f} more interpolation steps'
    )
