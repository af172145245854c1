"""What a person waits for: the whole command, against a script with Captum that does the same.

    pip install -e . -r requirements-dev.txt
    python benchmarks/stopwatch.py --name demo --model_path demo/demo_model.pth \\
        --data_dir demo/Dataset_no_preprocessing --image_size 256

Both run as processes of their own, from Enter to the last file, one after the other, --repeats
times: same image, in which the network predicts a mask, black baseline, mean logit over the mask,
--steps equal nodes, one figure (ours also writes the map, the statistics and the pictures of its
page). With --images N, our batch against the script in a loop. Then, in this process, how long the
preparation of the network takes. Writes benchmarks/results/stopwatch_NAME.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import captum
import torch
from quadrature import benchmark_parser, cpu_name, shown
from tqdm import tqdm

from igseg.data.samples import Sample, list_samples
from integrated_gradients import (
    IntegratedGradients,
    Settings,
    choose_samples,
    input_preprocessing,
    load_model,
)

ROOT = Path(__file__).resolve().parent.parent

# What somebody writes who knows Captum: model, size, steps, output folder and images are arguments.
CAPTUM_SCRIPT = """
import sys
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import segmentation_models_pytorch as smp
import torch
from captum.attr import IntegratedGradients
from PIL import Image

path, architecture, encoder, size, steps, folder, *images = sys.argv[1:]
model = smp.create_model(architecture, encoder, encoder_weights=None, classes=1)
checkpoint = torch.load(path, map_location='cpu', weights_only=True)
state = checkpoint.get('model_state_dict', checkpoint.get('state_dict', checkpoint))
model.load_state_dict(state)
model = model.float().eval()
mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
for image in images:
    picture = Image.open(image).convert('RGB').resize((int(size), int(size)))
    x = ((torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std)[None]
    black = ((torch.zeros(3, 1, 1) - mean) / std).expand_as(x)
    with torch.no_grad():
        mask = model(x) > 0
    score = lambda points: (model(points) * mask).sum((1, 2, 3)) / mask.sum()
    method = IntegratedGradients(score)
    attributions = method.attribute(x, black, n_steps=int(steps), internal_batch_size=1)
    attributions = attributions[0].detach().numpy()
    name = image.rsplit('/', 1)[-1].rsplit('.', 1)[0]
    np.save(f'{folder}/{name}.npy', attributions)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    axes[0].imshow(picture)
    axes[1].imshow(mask[0, 0], cmap='gray')
    axes[2].imshow(np.abs(attributions).sum(0), cmap='hot')
    for axis in axes:
        axis.axis('off')
    figure.savefig(f'{folder}/{name}.png', dpi=150)
    plt.close(figure)
"""


def seconds_of(command: Sequence[str]) -> float:
    """How long a command takes, from its start to its end."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{shown(command)}\n{done.stderr[-2000:]}')
    return time.perf_counter() - started


def commands(arguments, images: Sequence[str], work: Path) -> dict[str, list[str]]:
    """The command of each tool."""
    described = load_model(arguments.model_path, 'cpu').network_description.source
    script = work / 'script.py'
    script.write_text(CAPTUM_SCRIPT)
    size, steps = str(arguments.image_size), str(arguments.steps)
    ours = [sys.executable, 'integrated_gradients.py', '--model_path', arguments.model_path,
            '--image_size', size, '--num_steps', steps, '--rule', 'gauss-legendre', '--device',
            'cpu', '--output_dir', str(work / 'ours'), '--overwrite', '--on_empty',
            'image']  # fmt: skip
    if len(images) > 1:
        folder = work / 'images'
        folder.mkdir()
        for image in images:
            shutil.copy(image, folder)
        ours += ['--mode', 'batch', '--data_dir', str(folder), '--num_samples',
                 str(len(images))]  # fmt: skip
    else:
        ours += ['--image_path', images[0]]
    captum_command = [sys.executable, str(script), arguments.model_path,
                      str(described['architecture']), str(described['encoder']), size, steps,
                      str(work), *images]  # fmt: skip
    return {'captum': captum_command, 'ours': ours}


def with_mask(arguments) -> list[Sample]:
    """--images samples, spread over the dataset, in which the network predicts a mask."""
    model = load_model(arguments.model_path, 'cpu')
    fit = input_preprocessing(model, Settings(image_size=256))
    samples = []
    for sample in choose_samples(list_samples(Path(arguments.data_dir)), 5 * arguments.images):
        with torch.no_grad():
            logits = model(fit.normalise(fit.resize_image(sample.image())))
        if bool((logits > 0).any()):
            samples.append(sample)
    return choose_samples(samples, arguments.images)


def preparation(arguments, sample: Sample) -> float:
    """Seconds until the network is prepared for an input, in this process."""
    settings = Settings(image_size=arguments.image_size)
    model = load_model(arguments.model_path, 'cpu')
    fit = input_preprocessing(model, settings)
    x = fit.normalise(fit.resize_image(sample.image()))
    times = []
    for _ in range(arguments.repeats):
        explainer = IntegratedGradients(model, 'cpu', fit)
        started = time.perf_counter()
        explainer.prepare(x)
        times.append(time.perf_counter() - started)
    return median(times)


def main(command: Sequence[str]) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument('--image_size', type=int, required=True)
    parser.add_argument('--steps', type=int, default=50)
    parser.add_argument('--images', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=3)
    arguments = parser.parse_args(command)
    samples = with_mask(arguments)
    images = [str(Path(sample.image_path).resolve()) for sample in samples]
    seconds: dict[str, list[float]] = {'captum': [], 'ours': []}
    with tempfile.TemporaryDirectory() as work:
        both = commands(arguments, images, Path(work))
        for _ in tqdm(range(arguments.repeats), 'rounds'):
            for tool, words in both.items():
                seconds[tool].append(seconds_of(words))
    theirs, ours = (median(seconds[tool]) for tool in ('captum', 'ours'))
    prepared = preparation(arguments, samples[0])
    count = f'{len(images)} images' if len(images) > 1 else 'one image'
    text = f"""# The whole command and a script with Captum: {arguments.name}

`python benchmarks/stopwatch.py {shown(command)}`

{cpu_name()}, {torch.get_num_threads()} cores, torch {torch.__version__}, captum
{captum.__version__}. From Enter to the last file, {count}, {arguments.steps} Gauss-Legendre nodes,
input {arguments.image_size}×{arguments.image_size}. Processes in turn, medians of
{arguments.repeats}. Ratio: Captum's seconds by ours.

| | Captum's script | our command | ratio |
|---|---|---|---|
| {count} | {theirs:.1f} s | {ours:.1f} s | {theirs / ours:.2f} |

Preparation of the network for this size, warm: {prepared:.1f} s.
"""
    (arguments.results / f'stopwatch_{arguments.name}.md').write_text(text)
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
