"""From an image in pixel space to the input of a network, and all that is needed to go back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from igseg.data.pixels import Reading, read_image
from igseg.engine.engine import GradientEngine
from igseg.errors import InputError
from igseg.explanation import Explanation
from igseg.method.baselines import baseline_pictures
from igseg.method.choice import AUTO, BASELINES, Question, check_baseline
from igseg.method.rules import Integration
from igseg.network.description import NetworkDescription, likely_channels, quick_description
from igseg.network.factory import runs_at
from igseg.network.facts import NetworkFacts
from igseg.network.kinds import Meaning, NetworkSource
from igseg.network.loading import load_model
from igseg.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OF_EACH_IMAGE,
    ImageSize,
    Placement,
    Preprocessing,
    sides,
    size_text,
)
from igseg.settings import PIXEL_RANGES, Settings

if TYPE_CHECKING:
    from igseg.analysis.references import ReferenceImages
    from igseg.method.method import Method


@dataclass(frozen=True)
class ModelInput:
    """An image and its truth as the network takes them, with the preprocessing that made them."""

    x: torch.Tensor  # (1, C, H, W)
    preprocessing: Preprocessing
    truth: np.ndarray | None = None  # (H, W) labels; below 0: pixels that do not count
    placement: Placement | None = None  # of the image in the input; None: the image is the input

    @classmethod
    def of(
        cls,
        preprocessing: Preprocessing,
        image: np.ndarray,
        truth: np.ndarray | None,
        origin: tuple[int, int] = (0, 0),
        nothing: int = 0,
    ) -> ModelInput:
        """image: (H0, W0, C), or (H0, W0) of one channel. truth: (H0, W0) labels; below 0: pixels
        that do not count. origin: (x, y) in the larger image that it was cut from.
        nothing: the label of letterbox padding."""
        image = image[:, :, None] if image.ndim == 2 else image
        if image.shape[2] != preprocessing.channels:
            raise InputError(
                f'the image has {image.shape[2]} channels, but the network takes '
                f'{preprocessing.channels} (read it with read_image(path, channels))'
            )
        return cls(
            preprocessing.normalise(preprocessing.resize_image(image)),
            preprocessing,
            None if truth is None else preprocessing.resize_mask(truth, nothing),
            replace(preprocessing.place(image.shape[:2]), origin=origin),
        )

    @property
    def example(self) -> torch.Tensor:
        """An input on which the network may be prepared."""
        return self.x


class Explainer(Protocol):
    """The part of the user's `IntegratedGradients` that is used in this folder."""

    device: torch.device
    facts: NetworkFacts

    @property
    def engine(self) -> GradientEngine:
        """The engine that computes gradients of the network."""

    def see(
        self, input_tensor: torch.Tensor, meaning: Meaning
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Look again at the network, and at its output for an input (1, C, H, W)."""

    def prepare(self, input_tensor: torch.Tensor, meaning: Meaning) -> None:
        """Prepare the network on an input (1, C, H, W)."""

    def explain_with(
        self,
        given: ModelInput,
        question: Question,
        integration: Integration,
        method: Method,
        references: ReferenceImages | torch.Tensor | None = None,
        progress: bool = False,
    ) -> list[Explanation]:
        """The explanation of each target."""


# An explanation, and the true pixels (H, W) bool of the explained class, if known.
Explained = tuple[Explanation, np.ndarray | None]


def with_truth(explanations: Sequence[Explanation], truth: np.ndarray | None) -> list[Explained]:
    """Explanations, each with the truth of its class. truth: (H, W) labels, if known."""
    return [
        (explanation, None if truth is None else explanation.objective.explained(truth))
        for explanation in explanations
    ]


def explain_by_all(
    explainer: Explainer,
    model_input: ModelInput,
    question: Question,
    integration: Integration,
    methods: Sequence[Method],
    references: ReferenceImages | torch.Tensor | None = None,
    progress: bool = False,
) -> list[Explained]:
    """For each target, and each method, the explanation and the truth of its class."""
    by_method = [
        explainer.explain_with(model_input, question, integration, method, references, progress)
        for method in methods
    ]
    by_target = zip(*by_method, strict=True)
    explanations = [explanation for group in by_target for explanation in group]
    return with_truth(explanations, model_input.truth)


# --------------------------------------------------------------------------- preprocessing


def input_preprocessing(model: torch.nn.Module, settings: Settings) -> Preprocessing:
    """How images become the input of this model. The settings decide; what they leave open is
    taken from the checkpoint, or else from the defaults (640, stretched, ImageNet's mean and std).

    The image size is rounded up to a size that the network takes.
    """
    network = quick_description(model)
    channels = network.channels or likely_channels(model)
    stored = network.preprocessing.for_channels(channels)  # the checkpoint's, or the defaults
    scale = PIXEL_RANGES[settings.pixel_range]
    unchanged = (0.0,) * channels, (1.0 / scale,) * channels  # mean and std
    mean, std = stored.mean, stored.std
    if settings.normalize == 'imagenet':
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif settings.normalize != 'auto' or settings.pixel_range != '0-1':
        mean, std = unchanged
    of_each = settings.normalize if settings.normalize in OF_EACH_IMAGE else None
    if of_each and (settings.mean or settings.std or settings.pixel_range != '0-1'):
        raise InputError(
            f'--normalize {of_each} takes its numbers from each image, so it goes without --mean, '
            '--std and --pixel_range'
        )
    only_one = (settings.mean is None) != (settings.std is None)
    if only_one and (mean, std) == (IMAGENET_MEAN, IMAGENET_STD):
        raise InputError("--mean and --std go together (the other would be ImageNet's)")
    mean = mean if settings.mean is None else tuple(value / scale for value in settings.mean)
    std = std if settings.std is None else tuple(value / scale for value in settings.std)
    if settings.mean is not None and max(map(abs, mean)) > 1:
        raise InputError(
            f'mean {settings.mean} cannot be of pixels from 0 to {scale:g} (with --pixel_range '
            '0-255 it is of pixels up to 255)'
        )
    if network.channels is None and settings.mean is not None:  # then the mean tells it
        channels = len(mean)
    if not len(mean) == len(std) == channels:
        raise InputError(
            f'the network takes {channels} channel{"s" if channels > 1 else ""}, but mean has '
            f'{len(mean)} numbers and std {len(std)} (give {channels} each with --mean and --std)'
        )
    wanted = settings.tile or settings.image_size or stored.image_size
    size = size_taken(model, network, channels, wanted)
    resize = 'stretch' if settings.tile else settings.resize or stored.resize
    order = settings.channel_order or stored.channel_order
    if order != 'rgb' and channels != 3:
        raise InputError(f'channel_order {order} needs 3 channels; the network takes {channels}')
    return Preprocessing(size, resize, mean, std, order, of_each)


def size_taken(
    model: torch.nn.Module, network: NetworkDescription, channels: int, wanted: ImageSize
) -> ImageSize:
    """The input size that the network takes where the user wants the size `wanted`."""
    size = network.accepted_size(wanted)
    if size != wanted and 'model_factory' in network.source:  # such a network tells no sizes
        return wanted if runs_at(model, channels, sides(wanted)) else size
    return size


def open_network(
    source: NetworkSource, settings: Settings
) -> tuple[torch.nn.Module, Preprocessing]:
    """The network of a checkpoint, and how images become its input under these settings. Prints
    notes on what was decided. Raises InputError."""
    model = load_model(**vars(source))
    network = quick_description(model)
    for note in network.notes:
        print(f'note: {note}', file=sys.stderr)
    preprocessing = input_preprocessing(model, settings)
    size_setting = settings.tile or settings.image_size
    if size_setting is not None and sides(size_setting) != sides(preprocessing.image_size):
        what = 'tile' if settings.tile else 'image size'
        wanted, size = size_text(size_setting), size_text(preprocessing.image_size)
        why = f'takes multiples of {network.step}'
        if network.fixed_size:
            why = f'takes only {size_text(network.fixed_size)}'
        print(f'note: {what} {wanted}: the network {why}, using {size}', file=sys.stderr)
    return model, preprocessing


# --------------------------------------------------------------------------- baselines


def read_baseline(kind: str, channels: int, reading: Reading) -> np.ndarray | None:
    """The picture (h, w, C) of a baseline's file; None for a kind of baseline that needs no file.
    Raises InputError for an unknown kind or an unreadable file."""
    check_baseline(kind)
    without_file = kind in BASELINES or kind == AUTO
    return None if without_file else read_image(kind, channels, reading)


def build_baselines(
    kind: str,
    pixels: np.ndarray,
    preprocessing: Preprocessing,
    draws: int = 4,
    seed: int = 0,
    reading: Reading | None = None,
) -> list[np.ndarray]:
    """The baselines of a kind for an image: several draws for `random`, a single one otherwise.

    kind: a key of BASELINES, or the path of an image file (fitted to the image).
    pixels: (H, W, C) float32, 0-255. reading: how a file is read (window, frame).
    Returns arrays of the same shape and range. Raises InputError for an unknown kind or an
    unreadable file.
    """
    image = read_baseline(kind, pixels.shape[2], reading or Reading())
    question = Question(baseline=kind, baseline_image=image, baseline_draws=draws, seed=seed)
    return baseline_pictures(question, kind, pixels, preprocessing)
