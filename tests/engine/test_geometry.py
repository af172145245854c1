"""Where the map of a network lies in the image, where it has another size."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn

from igseg.checks.subject import subject_of
from igseg.engine.geometry import place_of_map
from igseg.errors import InputError
from igseg.network.outputs import fitted
from igseg.preprocessing import Preprocessing
from integrated_gradients import IntegratedGradients, Settings, explain_image

QUICK = {'num_steps': 4, 'rule': 'gauss-legendre'}


def same_place(before: int, after: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    """A convolution that keeps the values in place: only the middle of its kernel is not zero."""
    layer = nn.Conv2d(before, after, kernel, **options)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[0, 0, kernel // 2, kernel // 2] = 1
    return layer


class Valid(nn.Module):
    """The U-Net of Ronneberger, Fischer, Brox (2015): convolutions without padding, skips that are
    cropped to their middle. With these weights the map is bright where the image is."""

    def __init__(self, depth: int = 2, resize: bool = False, cut: bool = False) -> None:
        super().__init__()
        self.downs = nn.ModuleList([self.pair(3 if n == 0 else 2) for n in range(depth + 1)])
        self.ups = nn.ModuleList([nn.ConvTranspose2d(2, 2, 2, 2) for _ in range(depth)])
        self.convs = nn.ModuleList([self.pair(4) for _ in range(depth)])
        self.last, self.resize, self.cut = same_place(2, 1, 1), resize, cut
        with torch.no_grad():
            for up in self.ups:
                up.weight.fill_(0.5)
            self.last.bias.fill_(-0.5)

    @staticmethod
    def pair(before: int) -> nn.Sequential:
        return nn.Sequential(same_place(before, 2), nn.ReLU(), same_place(2, 2), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.downs[0](x)]
        for down in self.downs[1:]:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for up, conv, skip in zip(self.ups, self.convs, reversed(skips), strict=True):
            x = F.interpolate(x, scale_factor=2) if self.resize else up(x)
            top, left = ((a - b) // 2 for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
            rows, columns = x.shape[2:]
            if self.cut:  # by padding with negative numbers
                sides = (-left, columns + left - skip.shape[3], -top, rows + top - skip.shape[2])
                skip = F.pad(skip, sides)
            else:
                skip = skip[:, :, top : top + rows, left : left + columns]
            x = conv(torch.cat([skip, x], dim=1))
        return self.last(x)


def bright(size: tuple[int, int], rows: slice, columns: slice) -> torch.Tensor:
    image = torch.zeros(1, 3, *size)
    image[:, :, rows, columns] = 1
    return image


def place(network: nn.Module, size: tuple[int, int]) -> tuple[object, str]:
    x = torch.zeros(1, 3, *size)
    with torch.no_grad():
        return place_of_map(network.eval(), x, network(x))


PLACED = {
    'two convolutions': (lambda: nn.Sequential(same_place(3, 2, 9), same_place(2, 1, 5)), 64, 6),
    'the paper': (lambda: Valid(4), 188, 92),
    'U-Net': (Valid, 60, 20),
    'resized': (lambda: Valid(resize=True), 60, 20),
    'cut by padding': (lambda: Valid(cut=True), 60, 20),
    'stride': (lambda: nn.Sequential(nn.Conv2d(3, 2, 5), nn.Conv2d(2, 2, 4, 2), nn.Conv2d(2, 1, 5)),
               64, 7),
    'dilated': (lambda: same_place(3, 1, 3, dilation=4), 32, 4),
    'strides without skips': (lambda: nn.Sequential(
        *(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(4)),
        *(nn.ConvTranspose2d(3, 3, 4, 2, 1) for _ in range(4)), nn.Conv2d(3, 1, 3)), 64, 1),
    'FCN-16s': (lambda: nn.Sequential(
        *(nn.MaxPool2d(2) for _ in range(4)), nn.ConvTranspose2d(3, 1, 32, 16)), 64, -8),
    'gated': (lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.GLU(1), nn.Conv2d(2, 1, 1)), 32, 2),
    'larger': (lambda: same_place(3, 1, 3, padding=5), 32, -4),
}  # fmt: skip


@pytest.mark.parametrize('kind', PLACED)
def test_convolutions_without_padding_show_the_middle(kind):
    build, size, rim = PLACED[kind]
    rows, note = place(build(), (size, size + 16))
    assert rows == ((rim, size - rim), (rim, size + 16 - rim))
    assert f'rows {rim} to {size - rim - 1}' in note


def test_sides_that_no_stride_divides_begin_at_the_edge():
    down = [nn.Conv2d(3, 3, 3, 2, 1) for _ in range(4)]
    up = [nn.ConvTranspose2d(3, 3, 4, 2, 1) for _ in range(4)]
    assert place(nn.Sequential(*down, *up), (56, 56))[0] == ((0, 64), (0, 64))


def test_an_even_kernel_keeps_the_resolution():
    where, _ = place(nn.Sequential(*(nn.Conv2d(3, 3, 2) for _ in range(3))), (32, 32))
    assert where == ((2, 31), (2, 31))


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1].transpose(2, 3)


class Beside(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :1], (60, 0, 0, 0))[..., :50]


@pytest.mark.parametrize('build', [Turned, Beside])
def test_a_map_that_is_turned_or_beside_the_image_is_not_placed(build):
    where, note = place(build(), (32, 48))
    assert where is None and 'do not tell' in note


def test_each_axis_has_its_own_place():
    assert place(nn.Conv2d(3, 1, (9, 1)), (40, 48))[0] == ((4, 36), (0, 48))


STRETCHED = {
    **{f'{kind} of smp': partial for kind, partial in (
        (kind, lambda kind=kind: getattr(smp, kind)('resnet18', encoder_weights=None, upsampling=1))
        for kind in ('FPN', 'DeepLabV3', 'DeepLabV3Plus', 'PSPNet', 'PAN', 'UPerNet'))},
    'strides': lambda: nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.Conv2d(2, 1, 3, 2, 1)),
    'pooling': lambda: nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.AvgPool2d(4)),
    'twice the size': lambda: nn.ConvTranspose2d(3, 1, 2, 2),
    'blocks': lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.PixelShuffle(2)),
}  # fmt: skip


@pytest.mark.parametrize('kind', STRETCHED)
def test_lower_and_higher_resolutions_show_the_whole_image(kind):
    assert place(STRETCHED[kind](), (128, 160)) == (None, '')


def test_a_map_of_the_size_of_the_image_is_not_looked_at():
    assert place(nn.Conv2d(3, 1, 3, padding=1), (16, 16)) == (None, '')


class Tokens(nn.Module):
    """Patches of 4 pixels that all see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        tokens = y.flatten(2).transpose(1, 2)
        tokens = tokens + (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return self.head(tokens).transpose(1, 2).reshape(len(x), 1, *y.shape[-2:])


class Branches(nn.Module):
    """A map whose values depend on the image: it has no graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1, ::2, ::2] * (2.0 if float(x.sum()) > 1e9 else 1.0)


def segformer() -> nn.Module:
    return smp.Segformer('mit_b0', encoder_weights=None, upsampling=1)


@pytest.mark.parametrize('build', [Tokens, Branches, segformer])
def test_what_the_operations_do_not_tell_is_said(build):
    where, note = place(build(), (32, 32))
    assert where is None and 'fitted to the whole input' in note


def test_ways_that_disagree_are_told():
    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1, :20, :20] + x[:, 1:2, 12:, 12:]

    where, note = place(Shifted(), (32, 32))
    assert where is None and 'do not tell' in note


def test_the_mask_lies_where_the_object_is_and_the_map_explains_it():
    x = bright((60, 60), slice(26, 32), slice(30, 38))
    ig = IntegratedGradients(Valid(), 'cpu')
    black = torch.zeros_like(x)
    explanation = ig.explain(x, 'predicted', black, **QUICK)
    assert np.array_equal(explanation.predicted_mask, x[0, 0].numpy() > 0)
    outside = np.ones((60, 60), bool)
    outside[20:40, 20:40] = False
    assert not explanation.prediction[outside].any() and explanation.completeness_gap < 1e-4
    assert any('rows 20 to 39' in note for note in explanation.notes)
    alone = ig.explain(x, 'pixel:33,28', black, **QUICK).attributions
    assert alone[0, 28, 33] != 0 and np.isclose(alone.sum(), alone[:, 27:30, 32:35].sum())


def test_targets_and_truth_count_only_where_the_map_lies():
    x = bright((60, 60), slice(0, 32), slice(0, 38))
    truth = (x[0, 0] > 0).numpy().astype(np.uint8)
    ig = IntegratedGradients(Valid(), 'cpu')
    explanation = ig.explain(x, 'truth', truth=truth, **QUICK)
    assert int(explanation.region.sum()) == 12 * 18 and explanation.counted.sum() == 400
    assert int(ig.explain(x, 'image', **QUICK).region.sum()) == 400
    for outside in (
        'pixel:3,3',
        torch.eye(60, dtype=torch.bool)[:, :, None][..., 0] & (x[0, 0] > 9),
    ):
        with pytest.raises(InputError, match=r'beside the map|is empty'):
            ig.explain(x, outside, **QUICK)


@pytest.mark.parametrize('method', ['layer:downs.0', 'gradcam:convs.1', 'layer:last'])
def test_the_map_of_a_layer_lies_where_the_layer_sees_the_image(method):
    x = bright((60, 76), slice(26, 32), slice(44, 52))
    explanation = IntegratedGradients(Valid(), 'cpu').explain(x, method=method, num_steps=4)
    magnitude = explanation.attributions.abs().sum(dim=0)
    on_object = magnitude[26:32, 44:52].sum() / magnitude.sum()
    assert on_object > 0.9


@pytest.mark.parametrize('method', ['guided', 'gradcam:last', 'layer:last', 'occlusion', 'blur'])
def test_every_method_explains_the_placed_map(method):
    x = bright((60, 60), slice(26, 32), slice(30, 38))
    x = x + 0.01 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    network = Valid()
    explanation = IntegratedGradients(network, 'cpu').explain(x, method=method, num_steps=4)
    logits = network(x)[0, 0].detach()
    inner = explanation.region[20:40, 20:40]
    assert explanation.score == pytest.approx(float(logits[inner].mean()), abs=1e-5)
    assert np.array_equal(inner, logits > 0)


def test_the_checks_see_the_placed_map():
    x = bright((60, 60), slice(26, 32), slice(30, 38))
    ig = IntegratedGradients(Valid(), 'cpu')
    explanation = ig.explain(x, 'predicted', **QUICK)
    subject = subject_of(ig, x, explanation)
    score = float(subject.target(subject.network(subject.x)).detach())
    assert score == pytest.approx(explanation.score, abs=1e-5)


def test_a_larger_map_is_cut_or_reduced_to_the_image():
    settings = Settings(num_steps=2, target='image')
    plain = Preprocessing(32, 'stretch', (0.0,) * 3, (1.0,) * 3)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for network in (same_place(3, 1, 3, padding=5), nn.ConvTranspose2d(3, 1, 2, 2)):
        ig = IntegratedGradients(network, 'cpu', plain)
        ((explanation, _),) = explain_image(ig, image, settings)
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        logits = network(x)
        expected = logits[..., 4:-4, 4:-4] if logits.shape[-1] == 40 else F.avg_pool2d(logits, 2)
        torch.testing.assert_close(explanation.prediction, expected[0, 0].sigmoid().detach())


def test_tiles_need_maps_of_the_whole_tile():
    settings = Settings(tile=60, num_steps=2, target='image', normalize='none')
    image = np.zeros((90, 90, 3), np.uint8)
    with pytest.raises(
        InputError, match='--tile goes with networks whose map shows the whole tile'
    ):
        explain_image(IntegratedGradients(Valid(), 'cpu'), image, settings)


@pytest.mark.parametrize(
    'shape, place',
    [
        ((5, 7), ((2, 7), (1, 8))),
        ((5, 7), None),
        ((20, 24), ((-4, 16), (-6, 18))),
        ((20, 24), None),
        ((5, 24), None),
        ((4, 4), ((0, 8), (2, 10))),
    ],
)
def test_a_fitted_map_has_the_size_of_the_image_and_zeros_beside_its_place(shape, place):
    logits = torch.rand(2, 3, *shape) + 1
    result = fitted(logits, (12, 12), place)
    assert result.shape == (2, 3, 12, 12)
    inside = torch.ones(12, 12, dtype=torch.bool)
    if place:
        inside[:] = False
        inside[slice(*(max(0, n) for n in place[0])), slice(*(max(0, n) for n in place[1]))] = True
    assert (result[..., inside] >= 1).all() and (result[..., ~inside] == 0).all()
