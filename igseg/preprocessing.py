"""Turning an image into the input of a network, and back: sizes, resizing, normalising.

An image is (H, W, C) in *pixel space* (0-255). C is the number of channels that the network takes:
3 for RGB, 1 for grey. Its type is uint8, or float32 if the file holds finer values. Model input is
(1, C, H, W) float32, normalised. This file reads no image files, and imports torch only where a
model input is made or read.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from igseg.errors import InputError

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ('stretch', 'letterbox')
NORMALIZE_MODES = ('auto', 'imagenet', 'none', 'minmax', 'zscore')
OF_EACH_IMAGE = ('minmax', 'zscore')  # modes that normalise by the values of the image itself
CHANNEL_ORDERS = ('rgb', 'bgr')

DEFAULT_IMAGE_SIZE, MAX_IMAGE_SIZE = 640, 16384

SIZE_MULTIPLE = 32  # the deepest encoder stage halves the image five times

BLUR_SIGMA = 0.05  # sigma of `strong_blur`, relative to the longer side


# --------------------------------------------------------------------------- sizes

ImageSize = int | tuple[int, int]  # the side of a square, or (height, width)


def sides(size: ImageSize) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def size_text(size: ImageSize) -> str:
    """A size as on the command line: 640, or HEIGHTxWIDTH."""
    height, width = sides(size)
    return str(height) if height == width else f'{height}x{width}'


def checked_size(size: object, name: str = 'image_size') -> ImageSize:
    """A size from a number, from (height, width), or from text such as 640 or 384x640. The size of
    a square is a single number. Raises InputError."""
    value: Any = size.lower().replace('×', 'x').split('x') if isinstance(size, str) else size
    try:
        parts: list[Any] = [value] if isinstance(value, numbers.Real) else list(value)
        lengths = [int(part) for part in parts]
        valid = all(isinstance(part, str) or part == int(part) for part in parts)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        lengths, valid = [], False
    if not valid or len(lengths) not in (1, 2) or min(lengths) < 1 or isinstance(size, bool):
        raise InputError(
            f'{name} must be a whole number of at least 1, or HEIGHTxWIDTH, not {size!r}'
        )
    if max(lengths) > MAX_IMAGE_SIZE:
        raise InputError(f'{name} must be at most {MAX_IMAGE_SIZE}, not {size}')
    return lengths[0] if lengths[0] == lengths[-1] else (lengths[0], lengths[1])


def by_channels(function: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """The result of a function of OpenCV for an image (H, W, C) with any number of channels. Such a
    function takes at most four channels, and drops the axis of a single channel."""
    groups = [image[..., first : first + 4] for first in range(0, image.shape[2], 4)]
    results = [function(np.ascontiguousarray(group)) for group in groups]
    results = [result if result.ndim == 3 else result[:, :, None] for result in results]
    return results[0] if len(results) == 1 else np.concatenate(results, axis=2)


def resized(array: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """An image (H, W, C) or a map (H, W) at a size, (width, height)."""

    def resize(values: np.ndarray) -> np.ndarray:
        return cv2.resize(values, size, interpolation=interpolation)

    return resize(array) if array.ndim == 2 else by_channels(resize, array)


@dataclass(frozen=True)
class Placement:
    """Where the original image lies in the model input."""

    original_size: tuple[int, int]  # (height, width) in original pixels
    top: int
    left: int
    height: int
    width: int
    origin: tuple[int, int] = (0, 0)  # (x, y) of the image in the larger image it was cut from

    def to_model(self, x: int, y: int) -> tuple[int, int]:
        """Original pixel (x, y) -> pixel (column, row) of the model input that holds its centre."""
        height, width = self.original_size
        x, y = x - self.origin[0], y - self.origin[1]
        column = self.left + int((x + 0.5) * self.width / width)
        row = self.top + int((y + 0.5) * self.height / height)
        return column, row

    def crop(self, array: np.ndarray) -> np.ndarray:
        """The part of an (H, W, ...) array that shows the image, without letterbox padding."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]

    def content(self, shape: Sequence[int]) -> np.ndarray:
        """(H, W) bool: the pixels of an input of this shape that are not letterbox padding."""
        content = np.zeros(shape, bool)
        self.crop(content)[:] = True
        return content


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes model input: it is resized and scaled to 0-1, its channels are put into
    the network's order, and it is normalised."""

    image_size: ImageSize = DEFAULT_IMAGE_SIZE
    resize: str = 'stretch'  # one of RESIZE_MODES
    mean: tuple[float, ...] = IMAGENET_MEAN  # of each channel, in the network's order
    std: tuple[float, ...] = IMAGENET_STD
    channel_order: str = 'rgb'  # one of CHANNEL_ORDERS: the order of the network's channels
    of_each: str | None = None  # one of OF_EACH_IMAGE: mean and std come from each image

    @property
    def channels(self) -> int:
        """The number of channels C, of image and input."""
        return len(self.mean)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """The names of the input's channels, in the network's order."""
        if self.channels == 1:
            return ('grey',)
        if self.channels == 3:
            return ('red', 'green', 'blue')[:: self._step]
        return tuple(f'channel {number + 1}' for number in range(self.channels))

    @property
    def _step(self) -> int:
        """The step of the slice that puts an image's channels into the network's order, or back."""
        return -1 if self.channel_order == 'bgr' else 1

    def of_image(self, image: np.ndarray) -> Preprocessing:
        """The same preprocessing; if `of_each` is set, with mean and std of an image (H, W, C): of
        all its channels together, at the input's size, without padding. The image's baselines are
        normalised with these numbers too."""
        if self.of_each is None:
            return self
        image = image[:, :, None] if image.ndim == 2 else image
        image = image if image.dtype == np.uint8 else image.astype(np.float32)
        place = self.place(image.shape[:2])
        fit = replace(self, resize='stretch', image_size=(place.height, place.width))
        pixels = fit.resize_image(image).astype(np.float64) / 255
        if self.of_each == 'minmax':
            mean, std = float(pixels.min()), float(pixels.max() - pixels.min())
        else:
            mean, std = float(pixels.mean()), float(pixels.std())
        std = std if std > 1e-9 else 1.0  # the image is constant
        return replace(self, mean=(mean,) * self.channels, std=(std,) * self.channels)

    def for_channels(self, channels: int) -> Preprocessing:
        """The same preprocessing for images with C channels. ImageNet's mean and deviation are for
        three channels, so other images are only scaled to 0-1. Raises InputError."""
        if channels == self.channels:
            return self
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            raise InputError(
                f'mean and std are of {self.channels} channels, but the network takes {channels} '
                '(give --mean and --std with a number for each)'
            )
        return replace(self, mean=(0.0,) * channels, std=(1.0,) * channels)

    def place(self, size: tuple[int, int]) -> Placement:
        """The placement of an image of (height, width) in the input."""
        rows, columns = sides(self.image_size)
        if self.resize == 'stretch':
            return Placement(size, 0, 0, rows, columns)
        scale = min(rows / size[0], columns / size[1])
        height, width = (max(1, round(length * scale)) for length in size)
        return Placement(size, (rows - height) // 2, (columns - width) // 2, height, width)

    def resize_image(self, image: np.ndarray) -> np.ndarray:
        """An image (H, W, C) at the input's size, of the same type. It is shrunk by area averages
        or enlarged linearly, and padded with black."""
        place = self.place(image.shape[:2])
        shrinks = place.height * place.width < image.shape[0] * image.shape[1]
        return self._fit(image, place, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    def resize_mask(self, mask: np.ndarray, nothing: int = 0) -> np.ndarray:
        """Labels (H, W) at the input's size, by nearest neighbours. nothing: label of padding."""
        mask = mask.astype(np.int16) if nothing < 0 and mask.dtype == np.uint8 else mask
        return self._fit(mask, self.place(mask.shape[:2]), cv2.INTER_NEAREST_EXACT, nothing)

    def _fit(
        self, array: np.ndarray, place: Placement, interpolation: int, padding: int = 0
    ) -> np.ndarray:
        canvas = np.full((*sides(self.image_size), *array.shape[2:]), padding, array.dtype)
        place.crop(canvas)[:] = resized(array, (place.width, place.height), interpolation)
        return canvas

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """(H, W, C) pixels, 0-255 -> (1, C, H, W) float32 model input."""
        import torch

        pixels = np.asarray(pixels, dtype=np.float32)
        if self._step < 0:
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        scaled = torch.from_numpy(pixels / 255.0)  # (H, W, C)
        scaled = (scaled - torch.tensor(self.mean)) / torch.tensor(self.std)
        return scaled.permute(2, 0, 1).unsqueeze(0).contiguous()

    def to_pixels(self, tensor: torch.Tensor) -> np.ndarray:
        """(C, H, W) or (1, C, H, W) model input -> (H, W, C) float32 pixels, 0-255."""
        import torch

        image = tensor.detach().float().cpu().reshape(-1, *tensor.shape[-2:]).permute(1, 2, 0)
        pixels = ((image * torch.tensor(self.std) + torch.tensor(self.mean)) * 255.0).numpy()
        return np.ascontiguousarray(pixels[..., ::-1]) if self._step < 0 else pixels


def as_picture(image: np.ndarray) -> np.ndarray:
    """An image (H, W, C), 0-255, for display: (H, W, 3) uint8. Grey stays grey. Of more than three
    channels the first three are shown, and of two channels the first."""
    shown = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    return shown if shown.dtype == np.uint8 else np.clip(np.rint(shown), 0, 255).astype(np.uint8)


def strong_blur(pixels: np.ndarray) -> np.ndarray:
    """An image (H, W, C) under a Gaussian blur of 5 % of its longer side."""
    sigma = BLUR_SIGMA * max(pixels.shape[:2])
    return by_channels(lambda part: cv2.GaussianBlur(part, (0, 0), sigma), pixels)
