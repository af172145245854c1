"""Other images that an image is compared with: images of its dataset, or of a folder.

Methods that draw their baselines from data (expected gradients) take some of these images, evenly
spaced. They never take the explained image or a copy of it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from igseg.data.pixels import Reading, crop_image
from igseg.data.samples import Sample, choose_samples, list_samples
from igseg.errors import InputError, attempt
from igseg.preprocessing import Preprocessing
from igseg.settings import Settings


class ReferenceImages:
    """Samples whose images an image may be compared with; each is read once."""

    def __init__(self, samples: Sequence[Sample], reading: Reading) -> None:
        self.samples, self.reading = list(samples), reading
        self.unreadable: list[str] = []  # the reasons why samples are left out
        self._read: dict[str, np.ndarray | None] = {}  # pixels (H, W, C) by name; None: unreadable

    def chosen(self, count: int) -> list[Sample]:
        """`count` + 1 samples, evenly spaced: the explained image may be among them."""
        return choose_samples(self.samples, count + 1)

    def sha256(self, count: int) -> str:
        """The digest of the image files that may be used; an unreadable file counts as empty."""
        digest = hashlib.sha256()
        for sample in self.chosen(count):
            content, _ = attempt(sample.image_path.read_bytes, OSError)
            digest.update(hashlib.sha256(content or b'').digest())
        return digest.hexdigest()

    def tensors(self, fit: Preprocessing, x: torch.Tensor, count: int) -> torch.Tensor:
        """At most `count` images other than x (1, C, H, W), as inputs of the network (n, C, H, W).
        Raises InputError if there is no such image."""
        tensors: list[torch.Tensor] = []
        for sample in self.chosen(count):
            image = self._pixels(sample, fit.channels)
            if image is None:
                continue
            preprocessing = fit.of_image(image)
            other = preprocessing.normalise(preprocessing.resize_image(image)).to(x)
            if other.shape == x.shape and not torch.equal(other, x):
                tensors.append(other)
        if not tensors:
            problem = (
                f'no other image to compare with can be used: {self.unreadable[0]}'
                if self.unreadable
                else 'there is no other image to compare with'
            )
            raise InputError(f'{problem} (name a folder with --reference_dir)')
        return torch.cat(tensors[:count])

    def _pixels(self, sample: Sample, channels: int) -> np.ndarray | None:
        """The pixels (H, W, C) of a sample, None if it cannot be read. They are cropped like the
        explained image, if they are large enough."""
        if sample.name not in self._read:
            loaded, why = attempt(partial(sample.load, channels, self.reading), InputError, OSError)
            if loaded is None:
                self.unreadable.append(str(why))
                self._read[sample.name] = None
                return None
            pixels = loaded.pixels
            with contextlib.suppress(InputError):
                pixels = crop_image(pixels, self.reading.crop, sample.name)
            pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
            self._read[sample.name] = pixels
        return self._read[sample.name]


def references_of(settings: Settings, samples: Sequence[Sample]) -> ReferenceImages:
    """The images that methods may compare with: images of the folder that the settings name, else
    of `samples`. Raises InputError for an unusable folder."""
    if settings.reference_dir is not None:
        try:
            samples = list_samples(settings.reference_dir)
        except InputError as error:
            raise InputError(f'--reference_dir: {error}') from None
    return ReferenceImages(samples, settings.reading)


def other_images(
    references: ReferenceImages | torch.Tensor | None,
    count: int,
    x: torch.Tensor,
    fit: Preprocessing,
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """The other images (n, C, H, W) that a method compares an input x (1, C, H, W) with, at most
    `count`, and notes about them. None if count is 0: the method needs no other images."""
    if not count:
        return None, ()
    if isinstance(references, torch.Tensor):
        if references.ndim != 4 or references.shape[1:] != x.shape[1:] or not len(references):
            raise InputError(
                f'references must have the shape (n, {", ".join(map(str, x.shape[1:]))}) of '
                f'images like the input, not {tuple(references.shape)}'
            )
        return references.detach().to(x)[:count], ()
    source = ReferenceImages((), Reading()) if references is None else references
    others = source.tensors(fit, x, count)
    return others, tuple(f'left out of the reference images: {why}' for why in source.unreadable)
