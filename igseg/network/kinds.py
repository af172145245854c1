"""The words for what a network is and gives, as plain data: no torch is needed to know them."""

from __future__ import annotations

from dataclasses import dataclass

FOREGROUND = 'foreground'  # one logit map: the probability of the one class is its sigmoid
EXCLUSIVE = 'exclusive'  # several: a softmax over classes, of which one may be background
MULTILABEL = 'multilabel'  # several: labels independent of each other, a sigmoid each
OUTPUT_KINDS = (FOREGROUND, EXCLUSIVE, MULTILABEL)
LOGITS, PROBABILITIES = 'logits', 'probabilities'  # what a network gives
ARCHITECTURES = (  # of segmentation-models-pytorch
    'unet', 'unetplusplus', 'manet', 'linknet', 'fpn', 'pspnet', 'deeplabv3', 'deeplabv3plus',
    'pan', 'upernet', 'segformer', 'dpt',
)  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """What the user says that a network's outputs mean. None, or 'auto': what is known of the
    network, or seen of it, stands."""

    outputs: str = 'auto'  # LOGITS or PROBABILITIES
    output_kind: str | None = None  # of OUTPUT_KINDS
    background_class: int | str | None = None  # 'none': no class is background
    class_names: tuple[str, ...] | None = None  # of all labels, in order
