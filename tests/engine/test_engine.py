"""A prepared network computes the same, and a network that cannot be prepared runs unchanged. The
rewrites themselves are tested in test_graph."""

import math

import numpy as np
import pytest
import torch
from helpers import prepared_copy, relative_error
from torch import nn

from igseg.engine import preparation, rewrites
from igseg.engine.engine import Crops, GradientEngine, boxes_of, parts_of
from igseg.engine.graph import NetworkGraph
from igseg.method.walk import mask_nodes
from igseg.network.identity import fingerprint
from igseg.network.score import Target
from integrated_gradients import IntegratedGradients

CPU = torch.device('cpu')


def engine_of(network: nn.Module) -> GradientEngine:
    return GradientEngine(network.eval().requires_grad_(False), CPU, 2)


def decoder() -> nn.Module:
    """A network whose output depends on three pixels around each pixel."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1),
    ).double()  # fmt: skip


def square(top: int, left: int, side: int, size: int = 64) -> Target:
    weights = torch.zeros(1, size, size)
    weights[:, top : top + side, left : left + side] = 1 / side**2
    return Target(f'{top},{left}', weights)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, 64, 64, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------ preparing


def test_demo_model_in_single_precision(demo_model, brain):
    before = {name: value.clone() for name, value in demo_model.state_dict().items()}
    network, prepared = prepared_copy(demo_model, brain)
    assert isinstance(network, NetworkGraph) and not prepared.fell_back
    assert prepared.no_graph is None
    assert prepared.folded == 70 and prepared.transposed > 30 and prepared.padded == 5
    assert prepared.logit_deviation < 1e-5
    for name, value in demo_model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in demo_model.parameters())


def test_a_graph_that_deviates_is_not_used(monkeypatch, demo_model, brain):
    fold = rewrites.fold

    def wrong(graph, convolution, axis, scale, shift):
        fold(graph, convolution, axis, scale, shift + 0.01)

    monkeypatch.setattr(rewrites, 'fold', wrong)
    network, prepared = prepared_copy(demo_model, brain)
    assert prepared.fell_back and network.network is demo_model
    assert prepared.logit_deviation > 1e-4


@pytest.mark.parametrize('deviations', [(0.0, math.nan), (math.nan, 0.0)])
def test_a_deviation_that_is_not_a_number_is_one(monkeypatch, x, deviations):
    monkeypatch.setattr(preparation, '_deviations', lambda answer, expected: deviations)
    monkeypatch.setattr(preparation, '_check_answers', lambda model, example: None)
    for network, example in ((decoder(), x), (decoder().float(), x.float())):
        copied, prepared = prepared_copy(network, example)
        assert prepared.fell_back and copied.network is network


def compared(monkeypatch, deviations) -> list[tuple[torch.dtype, int]]:
    """The types and sides of images on which networks are compared from now on. deviations: of the
    graph in single precision; in double precision they are measured."""
    tried, answer, deviate = [], preparation._answer, preparation._deviations

    def noted(network, batches):
        batches = list(batches)
        tried.append((batches[0].dtype, batches[0].shape[-1]))
        return answer(network, batches)

    def rounded(given, expected):
        single = given[0].dtype == torch.float32 and given is not expected
        return deviations if single else deviate(given, expected)

    monkeypatch.setattr(preparation, '_answer', noted)
    monkeypatch.setattr(preparation, '_deviations', rounded)
    monkeypatch.setattr(preparation, '_check_answers', lambda model, example: None)
    return tried


def test_a_kink_that_rounding_moved_is_no_reason_to_fall_back(monkeypatch, brain):
    """Single precision may differ by more than the tolerance; double precision decides."""
    tried = compared(monkeypatch, (1e-3, 1e-3))
    _, prepared = prepared_copy(decoder().float(), brain)
    assert list(dict.fromkeys(tried)) == [(torch.float32, 64), (torch.float64, 64)]
    assert not prepared.fell_back and prepared.gradient_deviation < 1e-9


@pytest.mark.parametrize(
    'off, least, expected',
    [
        (0.0, 1, [(torch.float32, 64)]),
        (1e-3, 1, [(torch.float32, 64), (torch.float64, 64)]),
        (0.0, 160, [(torch.float32, 64), (torch.float32, 160)]),
        (1e-3, 160, [(torch.float32, 64), (torch.float32, 160), (torch.float64, 160)]),
    ],
)
def test_networks_are_compared_on_a_part_where_they_take_it(monkeypatch, off, least, expected):
    """off: deviation of the gradient in single precision. least: side of images that the network
    accepts."""

    class Picky(nn.Conv2d):
        def forward(self, x):
            if x.shape[-1] < least:
                raise ValueError('too small')
            return super().forward(x)

    tried = compared(monkeypatch, (1e-7, off))
    _, prepared = prepared_copy(Picky(3, 1, 3).eval(), torch.rand(1, 3, 160, 160))
    assert list(dict.fromkeys(tried)) == expected and not prepared.fell_back


class Branching(nn.Conv2d):
    """Its code depends on a computed value, so that it has no graph."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(2 * x)


def test_a_network_without_a_graph_runs_as_it_is_and_says_why(brain):
    network = Branching(3, 1, 3).eval()
    copied, prepared = prepared_copy(network, brain)
    assert type(copied.network) is Branching and copied.network is not network
    assert prepared.folded == prepared.transposed == 0 and prepared.no_graph
    assert prepared.logit_deviation < 1e-6 and not prepared.fell_back


def test_what_cannot_be_copied_either_is_run_itself(brain):
    class Stubborn(Branching):
        def __deepcopy__(self, memo):
            raise TypeError('no copies')

    network = Stubborn(3, 1, 3).eval()
    copied, prepared = prepared_copy(network, brain)
    assert copied.network is network and prepared.no_graph


def test_a_network_in_training_mode_is_prepared_for_evaluation_and_stays_in_training():
    network = decoder().train()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    prepared, _ = prepared_copy(network, x)
    assert network.training
    assert relative_error(prepared(x), network.eval()(x)) < 1e-12


def test_a_size_has_a_graph_of_its_own_and_finds_it_again(x):
    engine = engine_of(decoder())
    graphs = []
    for part in (x, x[..., :32, :48], x):
        with engine.running(part):
            assert engine.run(part).shape[-2:] == part.shape[-2:]
            graphs.append(engine.network)
    assert graphs[0] is graphs[2] is not graphs[1]


# ------------------------------------------------------------------ cropping to the targets


def test_parts_of_a_region_have_boxes_of_their_own():
    region = torch.zeros(50, 60, dtype=torch.bool)
    region[3:5, 7:10] = True
    region[40:, 59] = True
    assert boxes_of(region) == [
        (None, None, (3, 5), (7, 10)), (None, None, (40, 50), (59, 60)),
    ]  # fmt: skip
    speckled = torch.zeros(50, 60, dtype=torch.bool)
    speckled[1:49:2, 2:59:2] = True
    assert boxes_of(speckled) == [(None, None, (1, 48), (2, 59))]


def test_a_pixel_in_two_boxes_counts_once():
    target = square(10, 10, 20)
    boxes = [(None, None, (0, 22), (0, 22)), (None, None, (12, 40), None)]
    first, second = parts_of(target, boxes)
    assert first.weights.shape == (1, 22, 22) and second.weights.shape == (1, 28, 64)
    both = float(first.weights.sum() + second.weights.sum())
    assert both == pytest.approx(float(target.weights[:, :22, :22].sum()) + 8 * 20 / 400
                                 + 10 * 8 / 400)  # fmt: skip
    assert parts_of(target, [(None, None, (0, 5), (0, 5))]) == (None,)


@pytest.mark.parametrize('score', ['logit', 'probability'])
def test_what_is_seen_of_some_targets_is_what_the_whole_map_gives(x, score):
    """For single targets and several, at corners and edges, a pixel and overlapping regions."""
    engine = engine_of(decoder())
    targets = [square(0, 0, 5), square(30, 59, 5), square(40, 20, 1), square(41, 18, 8)]
    targets = [Target(t.name, t.weights, score) for t in targets]
    points = torch.cat([x, 0.3 * x])
    with engine.running(x):
        whole = engine.look(points, x, Crops(tuple(targets)))
        for some in (targets, targets[:1], targets[2:]):
            crops = engine.crops(some)
            assert crops.plan is not None and crops.cropping.computed_share < 0.6
            _, scores, densities = engine.look(points, x, crops)
            rows = [targets.index(target) for target in some]
            torch.testing.assert_close(scores, whole[1][:, rows])
            torch.testing.assert_close(densities, whole[2][:, rows])
        assert engine.crops([square(0, 0, 64)]).plan is None  # nothing to crop


def test_logits_are_whole_where_a_target_looks_and_zero_elsewhere(x):
    engine = engine_of(decoder())
    target = square(30, 59, 5)
    points = torch.cat([x, 0.3 * x]).requires_grad_()
    with engine.running(x):
        crops = engine.crops([target])
        cropped, whole = engine.cropped_logits(points, crops), engine.run(points)
        assert torch.equal(engine.cropped_logits(points, Crops((target,))), whole)
    torch.testing.assert_close(cropped[..., 30:35, 59:64], whole[..., 30:35, 59:64])
    assert cropped.shape == whole.shape and not cropped[..., :20, :20].any()
    gradients = [torch.autograd.grad(target(maps).sum(), points)[0] for maps in (cropped, whole)]
    torch.testing.assert_close(*gradients)


def test_crops_that_deviate_are_not_used(monkeypatch, x):
    engine = engine_of(decoder())
    with engine.running(x):
        logits = engine.run(x)
        good = engine.compared_crops(x, logits, [square(5, 5, 5)])
        assert good.plan is not None and good.cropping.logit_deviation < 1e-12
        assert good.cropping.gradient_deviation < 1e-12
        again = engine.compared_crops(x, logits, [square(8, 5, 5)])
        assert again.cropping.gradient_deviation == good.cropping.gradient_deviation
        bad = engine.compared_crops(x, logits + 0.01, [square(5, 5, 5)])
        assert bad.plan is None and bad.cropping.fell_back


def test_crops_whose_deviation_is_not_a_number_are_not_used(monkeypatch, x):
    targets = [square(5, 5, 5), square(50, 50, 5)]
    for spoilt in ('_gradient_deviation', 'logits'):
        engine = engine_of(decoder())
        with engine.running(x), monkeypatch.context() as patch:
            logits = engine.run(x)
            if spoilt == 'logits':
                logits[..., 50:55, 50:55] = math.nan  # in the second of two boxes
            else:
                engine._gradient_deviations.clear()  # as if no part could be compared
                patch.setattr(GradientEngine, spoilt, lambda *args: math.nan)
            crops = engine.compared_crops(x, logits, targets)
        assert crops.plan is None and crops.cropping.fell_back


def test_a_target_is_explained_alike_alone_and_in_company(x):
    """Also where nodes are chosen on the way, and where a target needs fewer steps than others."""
    ig = IntegratedGradients(decoder().eval(), 'cpu', step_batch=2)
    targets = [square(0, 0, 5), square(30, 50, 9), square(40, 20, 1)]
    options = {'baseline_type': torch.zeros_like(x), 'tolerance': 0.002, 'max_steps': 40}
    together = ig.explain_targets(x, targets, **options)
    for target, explanation in zip(targets, together, strict=True):
        alone = ig.explain(x, target, **options)
        assert relative_error(explanation.attributions, alone.attributions) < 1e-9
        assert (explanation.steps, explanation.trend.alphas) == (alone.steps, alone.trend.alphas)
        assert explanation.within_tolerance and explanation.cropping.computed_share < 0.9
    assert len({explanation.steps for explanation in together}) > 1


def test_the_mask_is_followed_where_a_whole_map_is_there(x):
    ig = IntegratedGradients(decoder().eval(), 'cpu')
    explanation = ig.explain(x, square(0, 0, 5), torch.zeros_like(x), 6, 'midpoint')
    trend = dict(zip(explanation.trend.alphas, explanation.trend.mask_iou, strict=True))
    assert trend[0.0] is not None and trend[1.0] == 1 and None in trend.values()
    assert not any(np.isnan(explanation.trend.scores))


def test_the_mask_is_followed_at_few_nodes_that_cost_less_than_a_twentieth(x):
    nodes = np.linspace(0, 1, 101)
    assert mask_nodes(nodes, 101, 0.2) == [0.33, 0.67]  # 2 * 0.4 of 101 * 0.2
    assert mask_nodes(nodes, 1000, 0.9) == [0.25, 0.5, 0.75]
    assert mask_nodes(nodes[::25], 5, 0.5) == mask_nodes(nodes, 101, 1) == []
    ig = IntegratedGradients(decoder().eval(), 'cpu')
    explanation = ig.explain(x, square(0, 0, 30), torch.zeros_like(x), 101, 'trapezoid')
    trend = zip(explanation.trend.alphas, explanation.trend.mask_iou, strict=True)
    nodes_with_mask = [alpha for alpha, iou in trend if iou is not None]
    between = mask_nodes(nodes, 101, explanation.cropping.computed_share)
    assert between and nodes_with_mask == pytest.approx([0, *between, 1])


class MixedTypes(nn.Module):
    """Computes a part always in float32, which does not work with weights in bfloat16."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.last(self.first(x).float().exp())


@pytest.mark.parametrize('kind', [decoder, MixedTypes])
def test_reduced_precision_runs_whole_where_types_are_not_mixed(x, kind):
    torch.manual_seed(0)
    engine, x = engine_of(kind().float()), x.float()
    with engine.running(x), torch.no_grad():
        exact, reduced = engine.run(x), engine.run(x, torch.bfloat16)
        assert reduced.dtype == torch.float32
        assert 1e-4 < relative_error(reduced, exact) < 0.03
        assert engine.runs_reduced[torch.bfloat16] == (kind is decoder)


def test_a_network_that_changed_is_prepared_again(brain):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)).eval()
    engine = IntegratedGradients(network, 'cpu')
    before = engine.explain(brain, 'image', num_steps=2)
    assert before.cost.preparation.folded == 1
    copy = engine.engine.network
    engine.explain(brain, 'image', num_steps=2)
    assert engine.engine.network is copy
    network[2].weight.data.mul_(2)  # in place, and past autograd's version counter
    after = engine.explain(brain, 'image', num_steps=2)
    assert relative_error(after.attributions, 2 * before.attributions) < 1e-4


def test_the_fingerprint_is_not_computed_again_where_the_caller_knows_it(monkeypatch, x):
    network = decoder()
    engine, state = engine_of(network), fingerprint(network)
    function = 'igseg.engine.engine.fingerprint'
    with engine.running(x, state):
        graph = engine.network
    with monkeypatch.context() as patch:
        patch.setattr(function, lambda model: pytest.fail('computed again'))
        with engine.running(x, state):
            assert engine.network is graph
    with engine.running(x, (*state, 'changed')):
        assert engine.network is not graph


def test_an_engine_for_another_network_counts_into_its_own(x):
    engine = engine_of(decoder())
    with engine.running(x):
        graph, before = engine.network, engine.forward_passes
        other = engine.for_network(nn.Conv2d(3, 1, 1).double().requires_grad_(False))
        assert other.step_batch is engine.step_batch
        target = square(0, 0, 64)
        other.look(torch.cat([x, x]), x, other.crops([target]))
        assert engine.network is graph
        assert engine.forward_passes - before == 2 and engine.gradient_evaluations == 2
        assert engine.run(x).shape == (1, 1, 64, 64)
    assert other.forward_passes == engine.forward_passes == before + 3
