"""Layers of a user's network by name: what they give, and the network from there on.

A layer is a module that gives one map (N, C, h, w) once in a forward pass. It is named as PyTorch
names it, or, of an encoder that gives a list of features, `encoder.stageK`: the module inside that
feature number K comes from, so that all that follows from it follows, and not the skip connection
alone. The network is the user's own, not a rewritten graph of it: there, layers are folded away.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from igseg.engine.engine import Crops
from igseg.engine.sampler import AtImage
from igseg.errors import InputError
from igseg.method.walk import Task
from igseg.network.outputs import enlarged, explained_network, segmentation_logits

MOST_NAMED = 24  # layers in an error


def layers_of(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module]:
    """The layers of a network by name, stages of encoders first, found by running it on x."""
    given: dict[str, list[weakref.ref[torch.Tensor]]] = defaultdict(list)  # maps of each module
    stages: dict[str, str] = {}  # by the name of the module

    def note(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            given[name].append(weakref.ref(output))
        several = output if isinstance(output, (list, tuple)) else ()
        for number, feature in enumerate(several):
            inside = [n for n, refs in given.items() if n.startswith(f'{name}.') and len(refs) == 1]
            same = [n for n in inside if given[n][0]() is feature]
            if same:  # the last to finish is the outermost
                stages[same[-1]] = f'{name}.stage{number}'  # of lists in lists, the outer one's

    modules = dict(model.named_modules())
    handles = [module.register_forward_hook(partial(note, name)) for name, module in
               modules.items() if name]  # fmt: skip
    try:
        with torch.no_grad(), explained_network(x.shape):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    once = {name: modules[name] for name, refs in given.items() if len(refs) == 1}
    return {**{stage: modules[name] for name, stage in stages.items()}, **once}


def layer_named(model: nn.Module, x: torch.Tensor, name: str) -> nn.Module:
    """A layer of a network. Raises InputError, which names those there are."""
    layers = layers_of(model, x)
    wrapped = [child for child, _ in model.named_children()]
    for place in (name, f'{wrapped[0]}.{name}' if len(wrapped) == 1 else name):
        if place in layers:
            return layers[place]
    stages = [layer for layer in layers if '.stage' in layer]
    shallow = [layer for layer in layers if layer.count('.') <= 2 and layer not in stages]
    names = ', '.join([*stages, *shallow][:MOST_NAMED]) or 'none'
    why = f'unknown layer "{name}"'
    if name in dict(model.named_modules()):
        why = f'layer "{name}" gives no map (N, C, H, W), or several'
    raise InputError(f'{why} (choose from {names}, or another module that gives one map)')


class FromLayer(nn.Module):
    """A network from one of its layers on: what the layer gives (N, c, h, w) -> the logit map at
    the image's size, where everything beside the layer sees the image."""

    def __init__(self, model: nn.Module, layer: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.model, self.layer, self.x = model, layer, x
        self.given: torch.Tensor | None = None  # what the layer is to give; None: what it does
        self.seen: torch.Tensor | None = None  # what it gave

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        self.given = activations
        try:
            return self.logits(self.x.expand(len(activations), *self.x.shape[1:]))
        finally:
            self.given = None

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The whole network's, of images (N, C, H, W)."""
        size = x.shape[-2:]
        return enlarged(segmentation_logits(self.model(x), size), size)

    def see(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of an image (1, C, H, W), and what the layer gives of it."""
        with torch.no_grad(), explained_network(x.shape):
            logits = self.logits(x)
        assert self.seen is not None  # by the hook, which is in place
        return logits, self.seen

    def hook(self, module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        """Stands in for what the layer gives; cloned, since what follows may change it in place."""
        if self.given is None:
            self.seen = output.detach().clone()
            return None
        return self.given.to(output.dtype).clone()


@contextlib.contextmanager
def at_layer(task: Task, name: str, baselines: bool = True) -> Iterator[Task]:
    """The same task at the output of a layer: image and baselines are what the layer gives of
    them. baselines: whether they are needed. The network is left as it was."""
    model, dtype, of_image = task.engine.model, task.engine.dtype, task.x.dtype
    layer = layer_named(model, task.x.to(dtype), name)
    network = FromLayer(model, layer, task.x.to(dtype))
    engine, others = task.engine.for_network(network), task.baselines if baselines else ()
    handle = layer.register_forward_hook(network.hook)
    try:
        logits, activations = network.see(task.x.to(dtype))
        inside = [activations, *(network.see(one.to(dtype))[1] for one in others)]
        engine.passes.forward += len(inside)
        x, *starts = (one.to(of_image) for one in inside)
        targets = tuple(task.at_image.targets)
        here = AtImage(x, logits.to(of_image), targets, None, Crops(targets))
        yield replace(task, engine=engine, at_image=here, baselines=starts,
                      pixels_of_pass=task.pixels)  # fmt: skip
    finally:
        handle.remove()


def enlarged_sum(values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A map (c, h, w) at another size, (c, H, W), bilinear, its sum kept: each value is shared out
    over the pixels that it weighs in, by its weights there."""
    resize = partial(F.interpolate, size=size, mode='bilinear', align_corners=False)
    with torch.enable_grad():
        ones = torch.ones_like(values[None, :1]).requires_grad_()
        (footprint,) = torch.autograd.grad(resize(ones).sum(), ones)  # (1, 1, h, w)
    return resize(values[None] / footprint.clamp(min=1e-6))[0]
