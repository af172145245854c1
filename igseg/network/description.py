"""What a network is to this toolkit: what it takes, what its outputs mean, and which one it is.

Found out once, at loading or from any module given to `IntegratedGradients`, and asked by
everything else: targets, masks, figures, statistics, and the key by which finished results are
recognised.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch

from igseg.errors import InputError
from igseg.network.identity import ATTRIBUTE, network_digest
from igseg.network.kinds import EXCLUSIVE, FOREGROUND, MULTILABEL
from igseg.preprocessing import SIZE_MULTIPLE, ImageSize, Preprocessing, sides


@dataclass(frozen=True)
class NetworkDescription:
    """A segmentation network: input (N, C, H, W), output logits (N, K, h, w).

    Labels are numbered from 0 in the order of the logit maps. In masks that people draw, a pixel's
    number is its label; of independent labels it is one more, 0 meaning none of them.
    """

    channels: int | None = None  # C; None: not known before an input is seen
    size_multiple: int = 1  # both sides of the input must be multiples of it
    fixed_size: tuple[int, int] | None = None  # the only (height, width) that it takes, if any
    output_kind: str | None = None  # of OUTPUT_KINDS; None: by the number of logit maps
    background: int | None = 0  # of exclusive classes, the one that is no object; None: none is
    gives: str | None = None  # LOGITS or PROBABILITIES; None: to be seen on the first input
    class_names: tuple[str, ...] = ()  # of the labels, in order, where they are known
    preprocessing: Preprocessing = field(default_factory=Preprocessing)  # what it was trained with
    weights_sha256: str = ''  # of the weights and the structure, wherever they came from
    source: dict[str, object] = field(default_factory=dict)  # file, architecture, encoder, classes
    notes: tuple[str, ...] = ()  # what was decided when it was loaded, in sentences

    def kind(self, maps: torch.Tensor) -> str:
        """What logits or masks (…, K, h, w) mean, of OUTPUT_KINDS. Raises InputError for what K
        cannot be."""
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
        """(N, K, h, w) logits -> probabilities: softmax of exclusive classes, else sigmoids."""
        return logits.softmax(dim=1) if self.kind(logits) == EXCLUSIVE else logits.sigmoid()

    def predicted(self, logits: torch.Tensor, threshold: float) -> torch.Tensor:
        """(…, K, h, w) logits -> (…, K, h, w) bool, the pixels of each label: those with the
        highest logit of exclusive classes, else those above the threshold."""
        if self.kind(logits) != EXCLUSIVE:
            return logits.sigmoid() > threshold
        highest = logits.argmax(dim=-3, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-3, highest, True)

    def without_background(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (…, K, h, w) bool of all labels -> those of objects."""
        if self.kind(masks) != EXCLUSIVE or self.background is None:
            return masks
        masks = masks.clone()
        masks[..., self.background, :, :] = False
        return masks

    def foreground(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (…, K, h, w) bool of all labels -> (…, h, w) bool: what is an object."""
        return self.without_background(masks).any(dim=-3)

    def drawn(self, numbers: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The numbers (h, w) of a mask that people drew -> (K, h, w) bool, the pixels of each
        label; negative ones, which do not count, are of none. masks: predicted ones, of that
        shape."""
        if self.kind(masks) == FOREGROUND:  # one class: any number is foreground
            return (numbers > 0)[None]
        first = 1 if self.kind(masks) == MULTILABEL else 0
        labels = torch.arange(first, first + len(masks), device=numbers.device)
        return numbers == labels.view(-1, 1, 1)

    def drawn_objects(self, numbers: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The numbers (h, w) of a mask that people drew -> (h, w) bool: what is an object, also
        one of a label that the network does not have."""
        if self.kind(masks) == EXCLUSIVE:
            background = -1 if self.background is None else self.background
            return (numbers >= 0) & (numbers != background)
        return numbers > 0

    def explained(
        self, logits: torch.Tensor, masks: torch.Tensor, label: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask (h, w) bool and probability (h, w), 0-1, of a label; of any object for None.

        logits: (1, K, h, w). masks: (K, h, w) bool, those predicted.
        """
        chances = self.probabilities(logits)[0].float()
        if label is not None:
            return masks[label], chances[label]
        if self.kind(masks) != EXCLUSIVE:
            return self.foreground(masks), chances.max(dim=0).values
        none = self.background is None
        chance = torch.ones_like(chances[0]) if none else 1 - chances[self.background]
        return self.foreground(masks), chance

    def accepted_size(self, size: ImageSize) -> ImageSize:
        """The smallest size from `size` on that the network takes. Where it could not be asked,
        or takes any, multiples of 32, which encoder-decoders are made for."""
        if self.fixed_size:
            height, width = self.fixed_size
        else:
            height, width = (-(-side // self.step) * self.step for side in sides(size))
        return height if height == width and isinstance(size, int) else (height, width)

    @property
    def step(self) -> int:
        """Sides are rounded up to a multiple of it."""
        return self.size_multiple if self.size_multiple > 1 else SIZE_MULTIPLE

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise InputError for a shape that is not (C, H, W) or (1, C, H, W), or of a size that
        the network does not take."""
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
        """For the statistics file: where the network came from, and which one it is. What was
        done to the input stands there by itself, since settings may override it."""
        own = asdict(self)
        del own['preprocessing'], own['source'], own['notes']
        return {**self.source, **own}


def input_channels(model: torch.nn.Module) -> int | None:
    """The channels that a network says it takes; None where it does not: then any is tried."""
    own = getattr(getattr(model, 'encoder', None), '_in_channels', None)  # of smp's encoders
    return own if isinstance(own, int) and own > 0 else None


def accepted_sizes(model: torch.nn.Module) -> tuple[int, tuple[int, int] | None]:
    """What both sides of an smp model's input must be multiples of (1 where it does not say), and
    the only (height, width) it takes, where there is one."""
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


def known_description(model: torch.nn.Module) -> NetworkDescription:
    """The description of any module but for its digest, which may be none or an earlier one:
    at once, without reading the weights."""
    known = getattr(model, ATTRIBUTE, None)
    if known is None:
        multiple, fixed = accepted_sizes(model)
        known = NetworkDescription(input_channels(model), multiple, fixed)
    own = getattr(model, 'preprocessing', None) or known.preprocessing
    return replace(known, preprocessing=own)


def describe_network(
    model: torch.nn.Module, preprocessing: Preprocessing | None = None
) -> NetworkDescription:
    """The description of any module, as it is now; all its weights are read for it.

    preprocessing: what it was trained with; None: what `load_model` found, else what the user set
    as `model.preprocessing`, else ImageNet's.
    """
    known = known_description(model)
    return replace(
        known,
        preprocessing=preprocessing or known.preprocessing,
        weights_sha256=network_digest(model),
    )


def likely_channels(model: torch.nn.Module) -> int:
    """The channels of the pictures that a network takes: those it says, else those of its first
    convolution, else 3."""
    convolutions = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    first = next((convolution.in_channels for convolution in convolutions), 3)
    known = getattr(model, ATTRIBUTE, None)
    return input_channels(model) or (known.preprocessing.channels if known else first)
