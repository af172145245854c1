"""How much work the checks of a map do, as plain data: no torch is needed to choose an effort."""

from __future__ import annotations

from dataclasses import dataclass

SPOT_SIDES = (0.08, 0.16)  # of the longer side: sides of the squares that a spot is looked for in
COMPARED_BASELINES = ('zero', 'blur', 'mean', 'white')
FORWARDS_A_GRADIENT = 3  # a gradient costs about as much as three forward passes


@dataclass(frozen=True)
class Effort:
    """How much work an evaluation does."""

    fills: tuple[str, ...]  # what removed pixels are replaced by, of FILLS
    units: tuple[str, ...]  # what is removed: 'pixel', 'superpixel'
    points: int  # intervals of a curve
    displaced: int  # copies of the map in the wrong place, that this control averages over
    random_maps: int  # that the random control averages over
    patches: int = 0  # removed for infidelity
    stages: int = 0  # of model randomisation
    noisy: int = 0  # noisy images for max-sensitivity
    baselines: int = 0  # whose maps are compared: all of the subject's, if this is not 0
    map_steps: int = 0  # interpolation steps of each map computed for a check

    def forwards(self) -> int:
        """Forward passes of one evaluation."""
        patches = self.patches + 1 if self.patches else 0
        return self.curve_forwards() + patches + 2 + len(SPOT_SIDES)

    def curve_forwards(self) -> int:
        """Those of the deletion and insertion curves: ends once, what lies between for each."""
        maps = 2 + self.displaced + self.random_maps
        inner = len(self.units) * 2 * maps * (self.points - 1)
        return 1 + len(self.fills) * (1 + inner)

    def gradients(self) -> int:
        """Gradient evaluations of one evaluation, at most."""
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
    """What the checks of an effort will cost for each image and target, in words."""
    chosen = EFFORTS[effort]
    steps = chosen.gradients() + chosen.forwards() / FORWARDS_A_GRADIENT
    return (
        f'--evaluate {effort}: {chosen.forwards()} forward passes and '
        f'{chosen.gradients()} gradients for each image and target, about as much work as '
        f'{steps:.0f} more interpolation steps'
    )
