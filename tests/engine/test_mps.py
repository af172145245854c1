"""MPS has no float64: sums in double belong on the CPU. A stand-in for the device, since it is
missing here: a tensor lies on it unless `.cpu()` or `device='cpu'` gave it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from igseg.engine import engine as engines
from igseg.method import methods
from igseg.method.choice import METHODS
from integrated_gradients import IntegratedGradients, Settings, explain_image


class WithoutDouble(TorchFunctionMode):
    """Refuses tensors in float64 on the device."""

    def __init__(self, *tensors):
        super().__init__()
        self.on_device = {id(tensor): tensor for tensor in tensors}
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name == 'cpu' or kwargs.get('device') == 'cpu':
            return func(*args, **kwargs).clone()
        result = func(*args, **kwargs)
        given = [part for value in (*args, *kwargs.values())
                 for part in (value if isinstance(value, (list, tuple)) else [value])]  # fmt: skip
        named = any(isinstance(part, torch.device) for part in given)
        if named or any(id(part) in self.on_device for part in given):
            for part in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(part, torch.Tensor):
                    self.seen += 1
                    if part.dtype == torch.float64:
                        raise TypeError('the device has no float64')
                    self.on_device[id(part)] = part
        return result


X = torch.randn(1, 3, 48, 40, generator=torch.Generator().manual_seed(0))
WAYS = {
    'adaptive': {'tolerance': 0.05},
    'fixed': {'rule': 'gauss-legendre', 'num_steps': 4},
    'blur': {'baseline_type': 'blur', 'num_steps': 4},
    **{
        name: {'method': f'{name}:1' if kind.layer_of else name, 'num_steps': 4}
        for name, kind in METHODS.items()
    },
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))


@pytest.mark.parametrize('way', WAYS)
def test_no_way_needs_float64_on_the_device(way, monkeypatch):
    for module in (engines, methods):
        monkeypatch.setattr(module, 'widest_type', lambda device: torch.float32)
    ig = IntegratedGradients(network(), 'cpu')
    x = X.clone()
    with WithoutDouble(x, *ig.model.parameters()) as device:
        ig.explain(x, 'image', references=X.flip(0, 2), **WAYS[way])
    assert device.seen > 100


def test_tiles_need_no_float64_on_the_device(monkeypatch):
    monkeypatch.setattr(engines, 'widest_type', lambda device: torch.float32)
    ig = IntegratedGradients(network(), 'cpu')
    image = np.random.default_rng(0).integers(0, 255, (96, 80, 3), np.uint8)
    settings = Settings(tile=64, target='image', num_steps=4, rule='midpoint')
    with WithoutDouble(*ig.model.parameters()) as device:
        ((explanation, _),) = explain_image(ig, image, settings)
    assert device.seen > 100 and explanation.tiles.count > 1
