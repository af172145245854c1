"""Layers of a user's network by name: their outputs, and the network behind them.

A layer is a module that gives one map (N, C, h, w), once in a forward pass. Its name is that in
PyTorch. If an encoder gives a list of features, `encoder.stageK` is the module inside the encoder
that computes feature number K; so the rest of the encoder depends on it too, and not only the skip
connection. The network is the user's network and not its rewritten graph, in which some layers are
folded into others.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from igseg.engine.engine import Crops
from igseg.engine.geometry import place_of_map
from igseg.engine.sampler import AtImage
from igseg.errors import InputError
from igseg.method.walk import Task
from igseg.network.kinds import Place
from igseg.network.outputs import (
    explained_network,
    fitted,
    output_of,
    segmentation_logits,
)

MOST_NAMED = 24  # layers that an error names


def layers_of(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module]:
    """The layers of a network by name, stages of encoders first. The network is run on x."""
    maps: dict[str, list[weakref.ref[torch.Tensor]]] = defaultdict(list)  # module name -> outputs
    stages: dict[str, str] = {}  # module name -> name of the stage

    def note(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            maps[name].append(weakref.ref(output))
        features = output if isinstance(output, (list, tuple)) else ()
        for number, feature in enumerate(features):
            inner = [n for n, refs in maps.items() if n.startswith(f'{name}.') and len(refs) == 1]
            candidates = [n for n in inner if maps[n][0]() is feature]
            if candidates:  # the last of these to finish contains the others
                # Where lists contain lists, the outer list comes last and names the stage.
                stages[candidates[-1]] = f'{name}.stage{number}'

    modules = dict(model.named_modules())
    handles = [module.register_forward_hook(partial(note, name)) for name, module in
               modules.items() if name]  # fmt: skip
    try:
        with torch.no_grad(), explained_network(x.shape):
            output_of(model, x)
    finally:
        for handle in handles:
            handle.remove()
    single = {name: modules[name] for name, refs in maps.items() if len(refs) == 1}
    return {**{stage: modules[name] for name, stage in stages.items()}, **single}


def layer_named(model: nn.Module, x: torch.Tensor, name: str) -> nn.Module:
    """A layer of a network. Raises InputError, which names the existing layers."""
    layers = layers_of(model, x)
    children = [child for child, _ in model.named_children()]
    for full_name in (name, f'{children[0]}.{name}' if len(children) == 1 else name):
        if full_name in layers:
            return layers[full_name]
    stages = [layer for layer in layers if '.stage' in layer]
    shallow = [layer for layer in layers if layer.count('.') <= 2 and layer not in stages]
    names = ', '.join([*stages, *shallow][:MOST_NAMED]) or 'none'
    reason = f'unknown layer "{name}"'
    if name in dict(model.named_modules()):
        reason = f'layer "{name}" gives no map (N, C, H, W), or several'
    raise InputError(f'{reason} (choose from {names}, or another module that gives one map)')


class UpToLayer(nn.Module):
    """The part of a network up to a layer: images (N, C, H, W) -> output of the layer."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        handle = self.layer.register_forward_hook(lambda *given: outputs.append(given[-1].clone()))
        try:
            output_of(self.model, x)
        finally:
            handle.remove()
        return outputs[-1]


class FromLayer(nn.Module):
    """The part of a network behind a layer: output of the layer (N, c, h, w) -> the logit map at
    the image's size. Everything that does not depend on the layer is computed from the image x."""

    def __init__(
        self, model: nn.Module, layer: nn.Module, x: torch.Tensor, place: Place | None = None
    ) -> None:
        """place: where the network's map lies in the image; None: it shows the whole image."""
        super().__init__()
        self.model, self.layer, self.x, self.place = model, layer, x, place
        self.replacement: torch.Tensor | None = None  # for the layer's output; None: not replaced
        self.activations: torch.Tensor | None = None  # the layer's last output

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        self.replacement = activations
        try:
            return self.logits(self.x.expand(len(activations), *self.x.shape[1:]))
        finally:
            self.replacement = None

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of the whole network for images (N, C, H, W)."""
        size = x.shape[-2:]
        return fitted(segmentation_logits(output_of(self.model, x), size), size, self.place)

    def see(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of an image (1, C, H, W), and the layer's output for it."""
        with torch.no_grad(), explained_network(x.shape):
            logits = self.logits(x)
        assert self.activations is not None  # the hook sets it
        return logits, self.activations

    def hook(self, module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        """Replace the layer's output, or note it. It is cloned, since the network may change it in
        place."""
        if self.replacement is None:
            self.activations = output.detach().clone()
            return None
        return self.replacement.to(output.dtype).clone()


@contextlib.contextmanager
def at_layer(task: Task, name: str, baselines: bool = True) -> Iterator[Task]:
    """The same task at a layer: the layer's outputs take the place of image and baselines. Inside
    this context the network has a hook. baselines: whether they are needed."""
    model, dtype, of_image = task.engine.model, task.engine.dtype, task.x.dtype
    layer = layer_named(model, task.x.to(dtype), name)
    network = FromLayer(model, layer, task.x.to(dtype), task.engine.place)
    engine, others = task.engine.for_network(network), task.baselines if baselines else ()
    handle = layer.register_forward_hook(network.hook)
    try:
        logits, activations = network.see(task.x.to(dtype))
        all_activations = [activations, *(network.see(image.to(dtype))[1] for image in others)]
        engine.passes.forward += len(all_activations)
        x, *starts = (image.to(of_image) for image in all_activations)
        place, _ = place_of_map(UpToLayer(model, layer), task.x.to(dtype), activations)
        targets = tuple(task.at_image.targets)
        at_image = AtImage(x, logits.to(of_image), targets, None, Crops(targets))
        yield replace(task, engine=engine, at_image=at_image, baselines=starts,
                      pixels_of_pass=task.pixels, place=place)  # fmt: skip
    finally:
        handle.remove()


def enlarged_sum(
    values: torch.Tensor, size: Sequence[int], place: Place | None = None
) -> torch.Tensor:
    """A map (c, h, w), enlarged bilinearly to (c, H, W) with the same sum: each value is divided
    among the pixels to which it contributes, in proportion to its weights there. place: where the
    map lies in the image; None: it shows the whole image. What lies beside the image is cut off."""
    resize = partial(fitted, size=size, place=place)
    with torch.enable_grad():
        ones = torch.ones_like(values[None, :1]).requires_grad_()
        (footprint,) = torch.autograd.grad(resize(ones).sum(), ones)  # (1, 1, h, w)
    return resize(values[None] / footprint.clamp(min=1e-6))[0]
