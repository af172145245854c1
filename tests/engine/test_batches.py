"""Images of a step batch are independent, or go through the network one at a time."""

import pytest
import torch
from torch import nn

from integrated_gradients import IntegratedGradients

STEPS = {'target': 'image', 'num_steps': 9, 'rule': 'gauss-legendre'}


def layers(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(4, 1, 1)).eval()


class Changed(nn.Module):
    """A convolution whose input and output are changed by functions."""

    def __init__(self, before=lambda x: x, after=lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 1, 1))
        self.before, self.after = before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.net(self.before(x)))


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(dim=0, keepdim=True) + x.mean()


DEPENDENT = {
    'batch norm without running statistics': lambda: layers(
        nn.BatchNorm2d(4, track_running_stats=False)
    ),
    'mean and deviation of the tensor': lambda: Changed(lambda x: (x - x.mean()) / x.std()),
    'mean over the batch': lambda: Changed(centred),
    'largest value of the tensor': lambda: Changed(after=lambda y: y / y.abs().max()),
    'softmax over the batch': lambda: Changed(after=lambda y: y.flatten(1).softmax(0).view_as(y)),
    'the first image only': lambda: Changed(lambda x: x[0][None]),
    'squeeze(0)': lambda: Changed(after=lambda y: y.squeeze(0)[None]),
    'view(1, ...)': lambda: Changed(lambda x: x.view(1, 3, *x.shape[-2:])),
    'attention between images': lambda: Changed(after=lambda y: y + 0.1 * y.flip(0)),
}
INDEPENDENT = {
    'batch norm': lambda: layers(nn.BatchNorm2d(4)),
    'instance norm': lambda: layers(nn.InstanceNorm2d(4)),
    'group norm': lambda: layers(nn.GroupNorm(2, 4)),
    'mean of each image': lambda: Changed(lambda x: x - x.mean((1, 2, 3), keepdim=True)),
}


@pytest.mark.parametrize('size', [(8, 8), (12, 7)])
@pytest.mark.parametrize('kind', DEPENDENT)
def test_images_that_influence_each_other_go_through_one_at_a_time(kind, size):
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    alone = IntegratedGradients(DEPENDENT[kind](), 'cpu', step_batch=1).explain(x, **STEPS)
    together = IntegratedGradients(DEPENDENT[kind](), 'cpu', step_batch=4).explain(x, **STEPS)
    torch.testing.assert_close(together.attributions, alone.attributions, rtol=1e-4, atol=1e-7)
    assert together.step_batch == 1
    assert [note for note in together.notes if 'one at a time' in note]
    assert set(alone.notes) <= set(together.notes)


@pytest.mark.parametrize('kind', INDEPENDENT)
def test_independent_images_go_through_together(kind):
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    alone = IntegratedGradients(INDEPENDENT[kind](), 'cpu', step_batch=1).explain(x, **STEPS)
    together = IntegratedGradients(INDEPENDENT[kind](), 'cpu', step_batch=4).explain(x, **STEPS)
    torch.testing.assert_close(together.attributions, alone.attributions, rtol=1e-4, atol=1e-7)
    assert together.step_batch == 4 and not together.notes


@pytest.mark.parametrize(
    'method', ['smooth', 'expected', 'guided', 'idgi', 'blur', 'occlusion', 'input_x_gradient']
)
def test_every_method_gets_the_map_of_single_images(method):
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {'target': 'image', 'num_steps': 6, 'method': method}
    if method == 'expected':
        options['references'] = torch.randn(3, 3, 16, 16)
    network = DEPENDENT['mean and deviation of the tensor']
    torch.manual_seed(0)
    alone = IntegratedGradients(network(), 'cpu', step_batch=1).explain(x, **options)
    together = IntegratedGradients(network(), 'cpu', step_batch=3).explain(x, **options)
    torch.testing.assert_close(together.attributions, alone.attributions, rtol=1e-3, atol=1e-6)


def test_independence_is_tried_again_when_the_weights_change():
    network = layers(nn.BatchNorm2d(4, track_running_stats=False))
    ig = IntegratedGradients(network, 'cpu', step_batch=4)
    x = torch.randn(1, 3, 8, 8)
    assert ig.explain(x, **STEPS).step_batch == 1
    network[1] = nn.BatchNorm2d(4).eval()
    explanation = ig.explain(x, **STEPS)
    assert explanation.step_batch == 4 and not explanation.notes


@pytest.mark.parametrize('method', ['ig', 'guided', 'occlusion'])
def test_a_network_may_write_into_its_input(method):
    def scaled(x: torch.Tensor) -> torch.Tensor:
        x -= 0.5
        return x.div_(2).clamp_(-1, 1)

    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    options = {'target': 'image', 'num_steps': 5, 'method': method}
    got = IntegratedGradients(Changed(scaled), 'cpu').explain(x, **options)
    plain = Changed(lambda x: ((x - 0.5) / 2).clamp(-1, 1))
    wanted = IntegratedGradients(plain, 'cpu').explain(x, **options)
    torch.testing.assert_close(got.attributions, wanted.attributions, rtol=1e-4, atol=1e-7)
    assert torch.equal(x, before)
