"""Draw maps of dark nuclei and of bright nuclei with each plain baseline.

    python demo/draw_baselines.py

Pixels in which the baseline equals the target get no attribution, whatever the network does. So
black hides dark nuclei, and white makes bright nuclei weigh less than the ground around them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from tqdm import tqdm

from igseg.data.pixels import read_image
from igseg.results.figures import TARGET_COLOUR, clip_level
from igseg.statistics import explanation_statistics, shown
from integrated_gradients import IntegratedGradients, load_model

HERE = Path(__file__).resolve().parent

IMAGES = {'dark nuclei': 'histology_014', 'bright nuclei': 'fluorescence_001'}
KINDS = ('zero', 'white', 'mean', 'blur', 'auto')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=HERE / 'baselines.jpg')
    args = parser.parse_args()
    ig = IntegratedGradients(load_model(HERE / 'nuclei_model.pth', 'cpu'), 'cpu')
    figure = Figure(figsize=(15, 6), dpi=100, layout='constrained')
    rows = figure.subplots(len(IMAGES), 1 + len(KINDS))
    for axes, (description, name) in zip(rows, IMAGES.items(), strict=True):
        image = ig.preprocessing.resize_image(read_image(HERE / 'nuclei' / 'test' / f'{name}.jpg'))
        axes[0].imshow(image)
        axes[0].set_title(description, fontsize=10)
        x = ig.preprocessing.normalise(image)[0]
        for axis, kind in zip(axes[1:], tqdm(KINDS, desc=description, unit='map'), strict=True):
            explanation = ig.explain(x, 'predicted', kind, tolerance=0.1)
            statistics = explanation_statistics(explanation)
            magnitude = explanation.attributions.abs().sum(dim=0).numpy()
            axis.imshow(magnitude, cmap='hot', norm=Normalize(0, clip_level(magnitude)))
            axis.contour(explanation.region.numpy(), [0.5], colors=TARGET_COLOUR, linewidths=0.6)
            chosen = explanation.baseline
            title = kind if kind == chosen else f'{kind}: {chosen}'
            figures = ', '.join(
                f'{word} {shown(key, statistics[key])}'
                for word, key in (('contrast', 'baseline_contrast'),
                                  ('ratio', 'attribution_ratio_in_target'))
            )  # fmt: skip
            axis.set_title(f'{title}\n{figures}', fontsize=10)
        for axis in axes:
            axis.set_axis_off()
    figure.savefig(args.output)
    print(f'saved {args.output}')


if __name__ == '__main__':
    main()
