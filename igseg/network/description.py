"""The description of a network: the inputs that it takes, what its outputs mean, and its digest.

A description is made once, when a network is loaded or given to `IntegratedGradients`. Everything
else uses it: targets, masks, figures, statistics, and the key by which finished results are
recognised.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch

from igseg.errors import InputError
from igseg.network.identity import ATTRIBUTE, network_digest
from igseg.network.kinds import EXCLUSIVE, FOREGROUND, MULTILABEL, Place
from igseg.preprocessing import SIZE_MULTIPLE, ImageSize, Preprocessing, sides


@dataclass(frozen=True)
class NetworkDescription:
    """A segmentation network: input (N, C, H, W), output logits (N, K, h, w).

    Labels are numbered from 0 in the order of the logit maps. In masks that people draw, the number
    of a pixel is its label; but with independent labels it is the label plus 1, and 0 means no
    label.
    """

    channels: int | None = None  # C; None: unknown until the first input
    size_multiple: int = 1  # both sides of the input must be multiples of this number
    fixed_size: tuple[int, int] | None = None  # the only (height, width) that it takes, if any
    output_kind: str | None = None  # of OUTPUT_KINDS; None: the number of logit maps decides
    background: int | None = 0  # the background among exclusive classes; None: no background
    gives: str | None = None  # LOGITS or PROBABILITIES; None: the outputs on the first input decide
    class_names: tuple[str, ...] = ()  # of the labels, in order; empty: unknown
    preprocessing: Preprocessing = field(default_factory=Preprocessing)  # used in its training
    weights_sha256: str = ''  # of the weights and the structure, but not of the file
    source: dict[str, object] = field(default_factory=dict)  # file, architecture, encoder, classes
    notes: tuple[str, ...] = ()  # what was decided when it was loaded, in sentences
    # Rows and columns of the input where the logit map lies; None: everywhere. Pixels beside it
    # have no prediction.
    place: Place | None = None

    def inside(self, masks: torch.Tensor) -> torch.Tensor:
        """The pixels (h, w) bool that have a prediction. masks: any (…, h, w)."""
        inside = torch.ones(masks.shape[-2:], dtype=torch.bool, device=masks.device)
        if self.place is not None:
            inside[:] = False
            rows, columns = (slice(max(0, start), max(0, stop)) for start, stop in self.place)
            inside[rows, columns] = True
        return inside

    def kind(self, maps: torch.Tensor) -> str:
        """The kind (of OUTPUT_KINDS) of logits or masks (…, K, h, w). Raises InputError where K
        does not fit the kind."""
        classes = maps.shape[-3]
        kind = self.output_kind or (EXCLUSIVE if classes > 1 else FOREGROUND)
        if kind != MULTILABEL and (kind == FOREGROUND) != (classes == 1):
            raise InputError(
                f'output_kind {kind} does not fit a network with {classes} '
                f'class{"es" if classes > 1 else ""} (leave it out)'
            )
        if kind == EXCLUSIVE and (self.background or 0) >= classes:
            raise InputError(
                f'background class {self.background}: the network has {classes} classes '
                f'(0 to {classes - 1}, or none)'
            )
        return kind

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, h, w) -> probabilities: a softmax over exclusive classes, else sigmoids."""
        return logits.softmax(dim=1) if self.kind(logits) == EXCLUSIVE else logits.sigmoid()

    def predicted(self, logits: torch.Tensor, threshold: float) -> torch.Tensor:
        """Logits (…, K, h, w) -> masks (…, K, h, w) bool, the pixels of each label. Of exclusive
        classes, a pixel has the label with the highest logit; other labels have the pixels whose
        probability is above the threshold."""
        if self.kind(logits) != EXCLUSIVE:
            return (logits.sigmoid() > threshold) & self.inside(logits)
        highest = logits.argmax(dim=-3, keepdim=True)
        masks = torch.zeros_like(logits, dtype=torch.bool).scatter_(-3, highest, True)
        return masks & self.inside(logits)

    def without_background(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (…, K, h, w) bool of all labels -> the same with an empty mask for the
        background."""
        if self.kind(masks) != EXCLUSIVE or self.background is None:
            return masks
        masks = masks.clone()
        masks[..., self.background, :, :] = False
        return masks

    def foreground(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (…, K, h, w) bool of all labels -> the pixels (…, h, w) bool of all objects."""
        return self.without_background(masks).any(dim=-3)

    def drawn(self, numbers: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The numbers (h, w) of a mask that people drew -> the pixels (K, h, w) bool of each label.
        Pixels with a negative number do not count and have no label. masks: any (K, h, w)."""
        inside = self.inside(numbers)
        if self.kind(masks) == FOREGROUND:  # one class: all numbers above 0 are foreground
            return ((numbers > 0) & inside)[None]
        first = 1 if self.kind(masks) == MULTILABEL else 0
        labels = torch.arange(first, first + len(masks), device=numbers.device)
        return (numbers == labels.view(-1, 1, 1)) & inside

    def drawn_objects(self, numbers: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The numbers (h, w) of a mask that people drew -> the pixels (h, w) bool of all objects,
        also of objects with a label that the network does not have. masks: any (K, h, w)."""
        inside = self.inside(numbers)
        if self.kind(masks) == EXCLUSIVE:
            background = -1 if self.background is None else self.background
            return (numbers >= 0) & (numbers != background) & inside
        return (numbers > 0) & inside

    def explained(
        self, logits: torch.Tensor, masks: torch.Tensor, label: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask (h, w) bool and the probability (h, w), 0-1, of a label; None: of any object.

        logits: (1, K, h, w). masks: (K, h, w) bool, as predicted.
        """
        chances = self.probabilities(logits)[0].float() * self.inside(logits)
        if label is not None:
            return masks[label], chances[label]
        if self.kind(masks) != EXCLUSIVE:
            return self.foreground(masks), chances.max(dim=0).values
        all_objects = self.background is None
        chance = torch.ones_like(chances[0]) if all_objects else 1 - chances[self.background]
        return self.foreground(masks), chance * self.inside(logits)

    def accepted_size(self, size: ImageSize) -> ImageSize:
        """The smallest size that the network takes and that is at least `size`. Where the network
        takes any size, or does not say which, sides become multiples of 32, which suit
        encoder-decoders."""
        if self.fixed_size:
            height, width = self.fixed_size
        else:
            height, width = (-(-side // self.step) * self.step for side in sides(size))
        return height if height == width and isinstance(size, int) else (height, width)

    @property
    def step(self) -> int:
        """Sides are rounded up to a multiple of this number."""
        return self.size_multiple if self.size_multiple > 1 else SIZE_MULTIPLE

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise InputError for a shape that is not (C, H, W) or (1, C, H, W), or whose size the
        network does not take."""
        fits = len(shape) == 3 or (len(shape) == 4 and shape[0] == 1)
        if not fits or (self.channels and shape[-3] != self.channels):
            c = self.channels or 'C'
            raise InputError(f'input_tensor must be ({c}, H, W) or (1, {c}, H, W), not {shape}')
        height, width = shape[-2:]
        if self.fixed_size and (height, width) != self.fixed_size:
            raise InputError(
                f'the network takes inputs of {self.fixed_size[1]}×{self.fixed_size[0]} only, not '
                f'{width}×{height}'
            )
        step = self.size_multiple
        if height % step or width % step:
            raise InputError(
                f'the network takes sides that are multiples of {step}, not {width}×{height} '
                f'(pad it to {-(-width // step) * step}×{-(-height // step) * step})'
            )

    def record(self) -> dict[str, object]:
        """The entries for the statistics file: the origin of the network, and this description. The
        preprocessing is left out: the file has it in another place, since settings may change
        it."""
        fields = asdict(self)
        del fields['preprocessing'], fields['source'], fields['notes'], fields['place']
        return {**self.source, **fields}


def input_channels(model: torch.nn.Module) -> int | None:
    """The number of input channels that a network names; None where it names none."""
    channels = getattr(getattr(model, 'encoder', None), '_in_channels', None)  # of smp's encoders
    return channels if isinstance(channels, int) and channels > 0 else None


def accepted_sizes(model: torch.nn.Module) -> tuple[int, tuple[int, int] | None]:
    """For an smp model: the number of which both sides of its input must be multiples (1 where it
    names none), and the only (height, width) that it takes, if any."""
    encoder = getattr(model, 'encoder', None)
    fixed = None
    network = getattr(encoder, 'model', None)
    dynamic = getattr(network, 'dynamic_img_size', False)
    if getattr(encoder, 'is_fixed_input_size', False) is True and not dynamic:
        made_for = getattr(getattr(network, 'patch_embed', None), 'img_size', None)
        size = made_for or getattr(encoder, 'input_size', None)
        fixed = (int(size[-2]), int(size[-1])) if isinstance(size, (tuple, list)) else None
    if not getattr(model, 'requires_divisible_input_shape', False):
        return 1, fixed
    return int(getattr(encoder, 'output_stride', 1)), fixed


def quick_description(model: torch.nn.Module) -> NetworkDescription:
    """The description of any module, made quickly, without reading the weights. Its digest may be
    missing or out of date."""
    description = getattr(model, ATTRIBUTE, None)
    if description is None:
        multiple, fixed = accepted_sizes(model)
        description = NetworkDescription(input_channels(model), multiple, fixed)
    preprocessing = getattr(model, 'preprocessing', None) or description.preprocessing
    return replace(description, preprocessing=preprocessing)


def describe_network(
    model: torch.nn.Module, preprocessing: Preprocessing | None = None
) -> NetworkDescription:
    """The description of any module in its present state; all its weights are read.

    preprocessing: the preprocessing of its training. None: `model.preprocessing`, as `load_model`
    or the user set it, else the preprocessing of ImageNet.
    """
    description = quick_description(model)
    return replace(
        description,
        preprocessing=preprocessing or description.preprocessing,
        weights_sha256=network_digest(model),
    )


def likely_channels(model: torch.nn.Module) -> int:
    """The number of channels of the pictures that a network takes: the number that it names, else
    that of its first convolution, else 3."""
    convolutions = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    first = next((convolution.in_channels for convolution in convolutions), 3)
    description = getattr(model, ATTRIBUTE, None)
    named = description.preprocessing.channels if description else first
    return input_channels(model) or named
