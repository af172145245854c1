"""What one network is and gives, found out once for each change of its weights."""

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
    with_chosen_map,
)
from igseg.preprocessing import Preprocessing, sides


class NetworkFacts:
    """A user's network, and everything that is known about it.

    preprocessing: how inputs are normalised. None: as the network itself says; where it says
    nothing, as for ImageNet with three channels, and not at all (pixels from 0 to 1) with others.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, preprocessing: Preprocessing | None = None
    ) -> None:
        self.model, self.device = model, device
        self.state = fingerprint(model)  # of the network when it was last looked at
        self.description = describe_network(model)
        # One of OUTPUT_KINDS, where the network was observed to give probabilities; and with which
        # weights, and for which of its maps, that was observed.
        self.probabilities: str | None = None
        self._observed: tuple | None = None
        self._maps: tuple[tuple, int | None] | None = None  # weights, and how many logit maps
        usual = self.description.preprocessing
        if preprocessing is None and usual == Preprocessing():
            usual = usual.for_channels(likely_channels(model))
        self.preprocessing = preprocessing or usual
        # Whether the user gave the preprocessing, and with it the number of channels.
        self._set_by_user = preprocessing is not None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        return weights_dtype(self.model)

    @property
    def _weights(self) -> tuple:
        # Without plain attributes, which a network may change while it runs.
        return self.state[1:]

    def look_again(self) -> NetworkDescription:
        """The description of the network as it is now; made again if the weights have changed.

        This sums all weights, so it is called once for each image."""
        now = fingerprint(self.model)
        if now != self.state:
            self.description, self.state = describe_network(self.model), now
        return self.description

    def description_for(self, meaning: Meaning, observed: bool = True) -> NetworkDescription:
        """The description of the network, changed by what the user says about its outputs.

        observed: whether the outputs that were observed count too, where neither the user nor the
        network says what they are."""
        description, background = self.description, meaning.background_class
        observed_kind = self.probabilities if observed else None
        return replace(
            description,
            output_kind=meaning.output_kind or description.output_kind or observed_kind,
            background=description.background if background is None
            else background if isinstance(background, int) else None,  # 'none': no background
            class_names=meaning.class_names or description.class_names,
        )  # fmt: skip

    def preprocessing_for(self, channels: int) -> Preprocessing:
        """The preprocessing of inputs with C channels. It is made for another number of channels
        than the usual one only where neither the network nor the user says how many there are."""
        usual = self.preprocessing
        unknown = self.description.channels is None and not self._set_by_user
        if not unknown or usual.channels == channels:
            return usual
        return replace(Preprocessing().for_channels(channels), image_size=usual.image_size)

    def checked(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input as (1, C, H, W) on the device, detached from the caller's graph. It is float64
        for a network in double precision, else float32; gradients are summed in this type. Raises
        InputError."""
        self.description.check_input(tuple(tensor.shape))
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        tensor = tensor.detach()
        if self.device.type == 'cuda' and tensor.device.type == 'cpu':
            tensor = tensor.pin_memory()  # copied while the GPU still computes
        x = tensor.to(self.device, dtype, non_blocking=True).reshape(1, *tensor.shape[-3:])
        if not bool(torch.isfinite(x).all()):
            raise InputError('input_tensor holds values that are not finite')
        return x

    def see_outputs(self, x: torch.Tensor, meaning: Meaning) -> tuple[str | None, tuple[str, ...]]:
        """The kind of probabilities that the network gives, None where it gives logits; and notes
        about that, in sentences. x: an input (1, C, H, W). Raises InputError."""
        outputs = self.description.gives if meaning.outputs == 'auto' else meaning.outputs
        if outputs == LOGITS:
            self.probabilities, self._observed = None, None
        elif self._observed != (self._weights, meaning.output_map):
            # A network that cannot be run raises no error here, but later, where it must be run.
            observe = partial(self._probability_kind, x, meaning.output_map)
            self.probabilities, _ = attempt(observe, InputError)
            self._observed = self._weights, meaning.output_map
        if outputs == PROBABILITIES and self.probabilities is None:
            raise InputError(
                'outputs "probabilities": the network gives values beyond 0-1, or one value '
                'everywhere (leave it out)'
            )
        if self.probabilities is None:
            return None, ()
        kind = self.description_for(meaning).output_kind
        return kind, (
            f'the network gives probabilities ({kind}), since all its outputs lie in 0-1: what is '
            'explained is the logits they are of (say otherwise with --outputs logits, or take '
            'them as they are with --score probability)',
        )

    def _probability_kind(self, x: torch.Tensor, output_map: str | None) -> str | None:
        with (
            torch.inference_mode(False),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
            explained_memory(self.device),
        ):
            return probability_kind(with_chosen_map(self.model, output_map), x.to(self.dtype))

    def logit_maps(self, output_map: str | None = None) -> int | None:
        """How many logit maps the network gives, as its description says, else as counted for a
        blank input. None: the network cannot be run. output_map: see `Meaning`."""
        described = self.description.source.get('classes')
        if isinstance(described, int) and output_map is None:
            return described
        if self._maps is None or self._maps[0] != (self._weights, output_map):
            count, _ = attempt(partial(self._count_maps, output_map), InputError)
            self._maps = (self._weights, output_map), count
        return self._maps[1]

    def _count_maps(self, output_map: str | None) -> int:
        size = sides(self.preprocessing.image_size)
        blank = torch.zeros((1, self.preprocessing.channels, *size), dtype=self.dtype)
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            frozen(self.model),
            explained_memory(self.device),
        ):
            with explained_network(blank.shape):
                output = with_chosen_map(self.model, output_map)(blank.to(self.device))
            return segmentation_logits(output, size).shape[1]
