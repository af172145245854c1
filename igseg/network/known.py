"""What one network is and gives, asked once for each change of its weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from igseg.errors import InputError, attempt
from igseg.network.description import NetworkDescription, describe_network, likely_channels
from igseg.network.identity import fingerprint
from igseg.network.kinds import LOGITS, PROBABILITIES, Meaning
from igseg.network.outputs import (
    explained_memory,
    explained_network,
    frozen,
    probability_kind,
    segmentation_logits,
    weights_dtype,
)
from igseg.preprocessing import Preprocessing, sides


class Known:
    """A user's network and what is known of it; whoever needs to know asks here.

    preprocessing: how inputs are normalised, where the user says so; else the network's, else
    ImageNet's for three channels and none (pixels from 0 to 1) for others.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, preprocessing: Preprocessing | None = None
    ) -> None:
        self.model, self.device = model, device
        self.state = fingerprint(model)  # of the network as it was asked last
        self.description = describe_network(model)
        self.probabilities: str | None = None  # of OUTPUT_KINDS, where it was seen to give such
        self._seen_of: tuple | None = None  # the weights of which that was seen
        self._maps: tuple[tuple, int | None] | None = None  # weights, and how many logit maps
        own = self.description.preprocessing
        if preprocessing is None and own == Preprocessing():
            own = own.for_channels(likely_channels(model))
        self.preprocessing = preprocessing or own
        self._said = preprocessing is not None  # by the user, who then knows the channels

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        return weights_dtype(self.model)

    @property
    def _weights(self) -> tuple:
        return self.state[1:]  # without plain attributes, which a network may change as it runs

    def look_again(self) -> NetworkDescription:
        """The description of the network as it is now, made again after its weights have changed.
        Sums all weights: once for an image."""
        now = fingerprint(self.model)
        if now != self.state:
            self.description, self.state = describe_network(self.model), now
        return self.description

    def under(self, meaning: Meaning, seen: bool = True) -> NetworkDescription:
        """What the network is to be taken for by what the user says; seen: and by what it gave."""
        known, background = self.description, meaning.background_class
        found = self.probabilities if seen else None
        return replace(
            known,
            output_kind=meaning.output_kind or known.output_kind or found,
            background=known.background if background is None
            else background if isinstance(background, int) else None,  # else it is 'none'
            class_names=meaning.class_names or known.class_names,
        )  # fmt: skip

    def preprocessing_for(self, channels: int) -> Preprocessing:
        """The preprocessing of inputs of C channels; of another number than the usual one only
        where neither the network nor the user has said how many there are."""
        usual = self.preprocessing
        unknown = self.description.channels is None and not self._said
        if not unknown or usual.channels == channels:
            return usual
        return replace(Preprocessing().for_channels(channels), image_size=usual.image_size)

    def checked(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input as (1, C, H, W) on the device, cut off from the caller's graph: float32, in
        which gradients then accumulate, or float64 for a double-precision model. Raises
        InputError."""
        self.description.check_input(tuple(tensor.shape))
        working = torch.float64 if self.dtype == torch.float64 else torch.float32
        tensor = tensor.detach()
        if self.device.type == 'cuda' and tensor.device.type == 'cpu':
            tensor = tensor.pin_memory()  # copied while the GPU still works on what came before
        x = tensor.to(self.device, working, non_blocking=True).reshape(1, *tensor.shape[-3:])
        if not bool(torch.isfinite(x).all()):
            raise InputError('input_tensor holds values that are not finite')
        return x

    def see_outputs(self, x: torch.Tensor, meaning: Meaning) -> tuple[str | None, tuple[str, ...]]:
        """Of what kind the probabilities are that the network gives, None where it gives logits;
        and what is to be said of it, in sentences. x: an input (1, C, H, W). Raises InputError."""
        outputs = self.description.gives if meaning.outputs == 'auto' else meaning.outputs
        if outputs == LOGITS:
            self.probabilities, self._seen_of = None, None
        elif self._seen_of != self._weights:
            # Where the network cannot be run, that is said when it must be.
            self.probabilities, _ = attempt(partial(self._probability_kind, x), InputError)
            self._seen_of = self._weights
        if outputs == PROBABILITIES and self.probabilities is None:
            raise InputError(
                'outputs "probabilities": the network gives values beyond 0-1, or one value '
                'everywhere (leave it out)'
            )
        if self.probabilities is None:
            return None, ()
        kind = self.under(meaning).output_kind
        return kind, (
            f'the network gives probabilities ({kind}), since all its outputs lie in 0-1: what is '
            'explained is the logits they are of (say otherwise with --outputs logits, or take '
            'them as they are with --score probability)',
        )

    def _probability_kind(self, x: torch.Tensor) -> str | None:
        with (
            torch.inference_mode(False),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
            explained_memory(self.device),
        ):
            return probability_kind(self.model, x.to(self.dtype))

    def logit_maps(self) -> int | None:
        """How many logit maps the network gives: what is known of it, else what it gives for a
        blank input; None where it cannot be run."""
        known = self.description.source.get('classes')
        if isinstance(known, int):
            return known
        if self._maps is None or self._maps[0] != self._weights:
            found, _ = attempt(self._count_maps, InputError)
            self._maps = self._weights, found
        return self._maps[1]

    def _count_maps(self) -> int:
        size = sides(self.preprocessing.image_size)
        blank = torch.zeros((1, self.preprocessing.channels, *size), dtype=self.dtype)
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
            explained_memory(self.device),
        ):
            with explained_network(blank.shape):
                output = self.model(blank.to(self.device))
            return segmentation_logits(output, size).shape[1]
