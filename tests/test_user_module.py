"""The engine: closed forms, the axioms, an independent implementation, and good manners."""

import contextlib
import gc
import re
import subprocess
import sys
import types

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, Function, relative_error
from torch import nn

import integrated_gradients as module
from igseg.engine.graph import Plan
from igseg.engine.memory import StepBatch, is_out_of_memory
from integrated_gradients import (
    BASELINES,
    EmptyTargetError,
    Explanation,
    InputError,
    IntegratedGradients,
    Settings,
    Target,
    explain_image,
    explanation_statistics,
    plain_map,
)


def explain(formula, x, baseline, **options) -> Explanation:
    model = formula if isinstance(formula, nn.Module) else Function(formula)
    ig = IntegratedGradients(model, 'cpu', step_batch=options.pop('step_batch', None))
    return ig.explain(x, target='image', baseline_type=baseline, **options)


@pytest.fixture
def x():
    return torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def baseline():
    return torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights():
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize('rule', ['adaptive', 'midpoint', 'gauss-legendre'])
def test_linear_function_is_exact_with_one_step(x, baseline, weights, rule):
    result = explain(lambda v: (v * weights).sum((1, 2, 3)), x, baseline, num_steps=1, rule=rule)
    torch.testing.assert_close(result.attributions, (weights * (x - baseline))[0])
    assert result.completeness_gap < 1e-5


def test_quadratic_function(x, baseline, weights):
    result = explain(lambda v: (weights * v**2).sum((1, 2, 3)), x, baseline, num_steps=1)
    torch.testing.assert_close(result.attributions, (weights * (x**2 - baseline**2))[0])
    assert result.completeness_gap < 1e-4


def test_product_shares_equally_between_its_factors(x):
    def product(v):
        return v[:, 0, 0, 0] * v[:, 1, 2, 3]

    result = explain(product, x, torch.zeros_like(x), num_steps=1)
    expected = torch.zeros_like(x)
    expected[0, 0, 0, 0] = expected[0, 1, 2, 3] = x[0, 0, 0, 0] * x[0, 1, 2, 3] / 2
    torch.testing.assert_close(result.attributions, expected[0])


def test_cubic_function_is_exact_with_two_gauss_legendre_nodes_only(x, baseline):
    exact = x**3 - baseline**3
    for rule, good in (('gauss-legendre', True), ('midpoint', False)):
        result = explain(lambda v: (v**3).sum((1, 2, 3)), x, baseline, num_steps=2, rule=rule)
        assert torch.allclose(result.attributions, exact[0], atol=1e-4) == good


def test_all_rules_agree_as_steps_grow(x, baseline):
    maps = [
        explain(lambda v: v.sin().sum((1, 2, 3)).tanh(), x, baseline, rule=rule,
                num_steps=63 if rule == 'gauss-kronrod' else 400)
        for rule in module.RULE_NAMES
    ]  # fmt: skip
    for other in maps[1:]:
        torch.testing.assert_close(other.attributions, maps[0].attributions, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------ axioms


def test_completeness_on_a_trained_network(ig, brain):
    few = ig.explain(brain, num_steps=16)
    many = ig.explain(brain, num_steps=128)
    assert many.map_error < few.map_error / 3
    change = many.score - many.baseline_score
    assert abs(float(many.attributions.sum()) - change) / abs(change) < 0.05
    assert many.completeness_gap < few.completeness_gap
    assert many.score > 0 > many.baseline_score  # it found the structure; black holds none


def test_sensitivity_dummy_pixels_get_nothing_and_the_only_difference_gets_all(x):
    baseline = x.clone()
    baseline[0, 1, 2, 2] += 1
    result = explain(lambda v: v[:, :, 2, 2].sum(1).exp(), x, baseline, num_steps=64)
    only = result.attributions[1, 2, 2]
    assert abs(float(only)) == pytest.approx(abs(result.score - result.baseline_score), rel=1e-3)
    assert result.attributions.abs().sum() == only.abs()
    dummy = explain(lambda v: v[:, 0].sum((1, 2)) ** 2, x, torch.zeros_like(x), num_steps=4)
    assert not dummy.attributions[1:].any()


def test_implementation_invariance_batch_norm_folded_or_not():
    torch.manual_seed(3)
    conv, norm, head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    plain = nn.Sequential(conv, norm, nn.ReLU(), head).eval()
    folded = nn.Sequential(
        nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval()), nn.ReLU(), head
    )
    image = torch.randn(1, 3, 16, 16)
    maps = [
        IntegratedGradients(net, 'cpu').compute_integrated_gradients(image, 'mean', 20, 'image')
        for net in (plain, folded)
    ]
    torch.testing.assert_close(maps[0], maps[1], atol=1e-6, rtol=1e-4)


def test_linearity_in_the_target(exact_ig, brain_detail):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1, 64, 64, generator=generator) / 64**2
    one, two, both = (
        exact_ig.explain(brain_detail, Target('t', weights), num_steps=5).attributions
        for weights in (first, second, 2 * first - 3 * second)
    )
    assert relative_error(both, 2 * one - 3 * two) < 1e-5


def test_exchanging_image_and_baseline_changes_the_sign(exact_ig, brain_detail):
    black = torch.full_like(brain_detail, -1.0)
    there = exact_ig.explain(brain_detail, 'image', black, 6).attributions
    back = exact_ig.explain(black, 'image', brain_detail, 6).attributions
    assert relative_error(there, -back) < 1e-5


def test_image_equal_to_baseline_gives_zero_and_no_gap(ig, brain):
    result = ig.explain(brain, baseline_type=brain, num_steps=3)
    assert not result.attributions.any()
    assert result.completeness_gap is None


@pytest.mark.parametrize(
    'total, score, low, gap',
    [(9.0, 10.0, 0.0, 0.1), (-9.0, -10.0, 0.0, 0.1), (1.0, 5.0, 5.0, None), (0.0, 0.0, 0.0, None)],
)
def test_completeness_gap_by_hand(total, score, low, gap):
    found = module.completeness_gap(total, score, low)
    assert found == (None if gap is None else pytest.approx(gap))


# ------------------------------------------------------------------ an independent implementation


@pytest.mark.parametrize(
    ('rule', 'method', 'baseline_type'),
    [('gauss-legendre', 'gausslegendre', 'zero'), ('midpoint', 'riemann_middle', 'blur')],
)
def test_agreement_with_captum(exact_ig, brain_detail, rule, method, baseline_type):
    ours = exact_ig.explain(brain_detail, baseline_type=baseline_type, num_steps=9, rule=rule)
    assert ours.rule == rule
    pixels = BASELINES[baseline_type](exact_ig.preprocessing.to_pixels(brain_detail), None)
    region = ours.region

    def mean_logit(images):
        return exact_ig.model(images)[:, 0][:, region].mean(dim=1)

    theirs = captum.attr.IntegratedGradients(mean_logit).attribute(
        brain_detail.double(),
        exact_ig.preprocessing.normalise(pixels).double(),
        n_steps=9,
        method=method,
        internal_batch_size=3,
    )
    assert relative_error(ours.attributions, theirs) < 1e-4


# ------------------------------------------------------------------ steps, batches, memory


@pytest.mark.parametrize('steps, batch', [(8, 4), (9, 4), (11, 4), (1, 4), (8, 8), (8, 9), (7, 1)])
def test_step_batch_changes_nothing(exact_ig, brain_detail, steps, batch):
    one, many = (
        IntegratedGradients(exact_ig.model, 'cpu', exact_ig.preprocessing, size).explain(
            brain_detail, num_steps=steps
        )
        for size in (1, batch)
    )
    assert one.gradient_evaluations == many.gradient_evaluations == steps
    assert relative_error(many.attributions, one.attributions) < 1e-6


def test_step_batch_in_single_precision_changes_only_what_rounding_does(ig, brain):
    one, many = (
        IntegratedGradients(ig.model, 'cpu', ig.preprocessing, size).explain(brain, num_steps=11)
        for size in (1, 4)
    )
    assert relative_error(many.attributions, one.attributions) < 1e-3


def test_a_batch_of_images_gives_what_each_gives_alone(ig, brain):
    images = torch.cat([brain, brain.flip(3)])
    together = ig.compute_integrated_gradients(images, num_steps=4)
    assert together.shape == images.shape
    for image, attributions in zip(images, together, strict=True):
        alone = ig.compute_integrated_gradients(image, num_steps=4)  # (3, H, W) in and out
        assert alone.shape == image.shape
        torch.testing.assert_close(alone, attributions)


class Hungry(nn.Module):
    """Runs out of memory on more than `room` images at once; remembers the path it was shown."""

    def __init__(self, room, error):
        super().__init__()
        self.room, self.error, self.seen = room, error, []

    def __deepcopy__(self, memo):
        raise TypeError('watched as it is')

    def forward(self, x):
        if len(x) > self.room:
            raise self.error
        if torch.is_grad_enabled():
            self.seen += x.detach()[:, 0, 0, 0].tolist()
        return (x**3).sum((1, 2, 3)).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB'),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError('MPS backend out of memory'),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_loses_nothing(error):
    x, baseline = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    model = Hungry(3, error)
    result = explain(model, x, baseline, num_steps=13, step_batch=16, rule='midpoint')
    assert result.cost.step_batch == 2
    on_path = [value for value in model.seen if value < 1]  # not the image itself, which prepares
    assert sorted(on_path) == pytest.approx([(i + 0.5) / 13 for i in range(13)])
    expected = explain(lambda v: (v**3).sum((1, 2, 3)), x, baseline, num_steps=13, rule='midpoint')
    torch.testing.assert_close(result.attributions, expected.attributions)


def test_out_of_memory_on_one_step_is_one_sentence():
    model = Hungry(1, torch.OutOfMemoryError('CUDA out of memory'))
    model.forward = lambda x: (_ for _ in ()).throw(model.error) if x.requires_grad else x[:, :1]
    with pytest.raises(InputError, match='smaller image size'):
        explain(model, torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))


def test_other_errors_of_a_model_are_one_sentence():
    with pytest.raises(InputError, match=r'shape \(1, 3, 2, 2\): RuntimeError: broken') as caught:
        explain(Hungry(0, RuntimeError('broken\nlayer')), torch.ones(1, 3, 2, 2), 'zero')
    assert isinstance(caught.value.__cause__, RuntimeError) and '\n' not in str(caught.value)
    assert not is_out_of_memory(ValueError('out of memory'))


def test_step_batch_on_a_gpu_is_what_four_fifths_of_its_free_memory_hold(monkeypatch):
    gib = 2**30
    answers = {
        'memory_allocated': 1 * gib,
        'max_memory_allocated': 3 * gib,  # one step took 2 GiB
        'memory_reserved': 4 * gib,  # of which 3 GiB are idle in the allocator's cache
        'mem_get_info': (17 * gib, 24 * gib),
        'reset_peak_memory_stats': None,
        'empty_cache': None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda *_: None)
    batch = StepBatch(torch.device('cuda'))
    batch.start(640 * 640)
    sizes = []
    for _ in range(12):  # every larger batch saves time: only memory limits it
        sizes.append(batch.size)
        batch.judge(1 / batch.size)
    assert sizes[:8] == [1, 1, 2, 2, 4, 4, 8, 8] and batch.size == 8  # 0.8 * (17 + 3) / 2
    batch.halve()
    batch.start(640 * 640)
    assert batch.size == 4  # once it ran out, later images start lower
    fixed = StepBatch(torch.device('cuda'), 5)
    fixed.start(640 * 640)
    with fixed.timed(5):
        pass
    assert fixed.size == 5


@pytest.mark.parametrize(
    'seconds, settled',
    [
        ({1: 1.0, 2: 0.8, 4: 0.7, 8: 0.69}, 4),
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 0.1}, 1),
        ({1: 1.0, 2: 0.5, 4: 0.9}, 2),
        ({1: 1.0, 2: 0.98, 4: 0.8, 8: 0.9}, 4),  # one size that does not pay is passed over
    ],
)
def test_the_step_batch_grows_while_that_saves_time_and_is_remembered(seconds, settled):
    batch = StepBatch(torch.device('cpu'))
    batch.start(64 * 64)
    for _ in range(8):
        slow_start = 10.0  # the first pass of a size is not judged
        for wait in (slow_start, seconds.get(batch.size, 1.0)):
            if batch._measuring:
                batch.judge(wait)
    assert batch.size == settled
    batch.start(32 * 32)
    assert batch.size == 1  # another size of image is measured on its own
    batch.start(64 * 64)
    assert batch.size == settled and not batch._measuring


def test_the_step_batch_of_large_images_is_not_tried_on_a_cpu():
    batch = StepBatch(torch.device('cpu'))
    batch.start(640 * 640)
    batch.judge(1.0)
    assert batch.size == 1 and not batch._measuring


def test_peak_memory_does_not_grow_with_the_number_of_steps():
    script = (
        'import sys, torch; from integrated_gradients import IntegratedGradients, load_model;'
        f'm = load_model({str(ROOT / "demo" / "demo_model.pth")!r}, "cpu");'
        'r = IntegratedGradients(m, "cpu", step_batch=4).explain('
        'torch.zeros(3, 64, 64), "image", "white", int(sys.argv[1]));'
        'print(r.cost.peak_memory_bytes)'
    )
    few, many = (
        int(subprocess.run([sys.executable, '-c', script, steps], capture_output=True,
                           text=True, check=True, cwd=ROOT).stdout)
        for steps in ('8', '128')
    )  # fmt: skip
    assert many < 1.05 * few


@pytest.mark.parametrize('on_empty', ['skip', 'image'])
def test_an_empty_target_leaves_nothing_for_the_garbage_collector(ig, on_empty):
    """An exception that is kept keeps the frames it went through, with the network's graph."""
    settings = Settings(num_steps=1, threshold=0.999999, on_empty=on_empty)

    def living_tensors() -> int:
        with contextlib.suppress(EmptyTargetError):
            explain_image(ig, np.zeros((64, 64, 3), np.uint8), settings)
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    living_tensors()  # what is prepared once stays
    gc.collect()
    gc.disable()
    try:
        assert living_tensors() == living_tensors()
    finally:
        gc.enable()


# ------------------------------------------------------------------ seeds and baselines


def test_random_baseline_same_seed_same_result_other_seed_another(ig, brain):
    def run(seed):
        return ig.compute_integrated_gradients(
            brain, 'random', 3, 'image', seed=seed, baseline_draws=2
        )

    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def test_random_baseline_is_the_mean_over_its_draws(ig, brain):
    result = ig.explain(brain, 'image', 'random', 4, baseline_draws=3, seed=9)
    pixels = ig.preprocessing.to_pixels(brain)
    draws = module.build_baselines('random', pixels, ig.preprocessing, 3, 9)
    alone = [ig.explain(brain, 'image', ig.preprocessing.normalise(d), 4) for d in draws]
    mean = torch.stack([one.attributions for one in alone]).mean(dim=0)
    assert relative_error(result.attributions, mean) < 1e-5
    assert result.baseline_score == pytest.approx(np.mean([one.baseline_score for one in alone]))
    assert result.steps == 4
    assert result.gradient_evaluations == 10  # the gradient at the image is shared by the draws


# ------------------------------------------------------------------ good manners


def test_model_is_left_as_it_was_also_after_a_failure(ig, brain):
    model = ig.model
    model.train()
    model.encoder.eval()  # a mixture must come back as a mixture
    frozen = next(model.decoder.parameters())
    frozen.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    try:
        ig.explain(brain, num_steps=2)
        with pytest.raises(InputError):
            ig.explain(brain, target='pixel:99999,0', num_steps=2)
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == wants
        assert all(p.grad is None for p in model.parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
    finally:
        model.eval()
        frozen.requires_grad_(True)


def test_training_mode_is_not_used_for_the_gradients(ig, brain):
    expected = ig.compute_integrated_gradients(brain, num_steps=2)
    ig.model.train()
    try:
        assert torch.equal(ig.compute_integrated_gradients(brain, num_steps=2), expected)
    finally:
        ig.model.eval()


def test_callers_autograd_mode_and_layout_do_not_matter(ig, brain):
    expected = ig.compute_integrated_gradients(brain, num_steps=2)
    assert not expected.requires_grad and expected.grad_fn is None
    with torch.no_grad():
        assert torch.equal(ig.compute_integrated_gradients(brain, num_steps=2), expected)
    with torch.inference_mode():
        assert torch.equal(ig.compute_integrated_gradients(brain.clone(), num_steps=2), expected)
    strided = brain.to(memory_format=torch.channels_last).requires_grad_()
    again = ig.compute_integrated_gradients(strided, num_steps=2)
    assert relative_error(again, expected) < 1e-3
    assert strided.grad is None


class Shrinking(nn.Module):
    """A map of a quarter of the input's size."""

    def forward(self, v):
        return F.avg_pool2d(v.sum(1, keepdim=True), 4)


def test_a_smaller_map_is_enlarged_to_the_input():
    x = torch.rand(1, 3, 32, 48)
    found = explain(Shrinking(), x, torch.zeros_like(x), num_steps=2)
    assert found.region.shape == found.prediction.shape == (32, 48)
    assert found.completeness_gap < 1e-4
    explanation_statistics(found)
    plain = plain_map(Shrinking(), x, torch.zeros_like(x), found.objective, 3)
    assert relative_error(found.attributions, torch.from_numpy(plain)) < 1e-5


def test_an_outer_autocast_does_not_matter(smooth_network, brain):
    engine = IntegratedGradients(smooth_network, 'cpu')
    expected = engine.compute_integrated_gradients(brain, num_steps=3, target='image')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = engine.compute_integrated_gradients(brain, num_steps=3, target='image')
    assert torch.equal(found, expected)


def test_double_precision_model_agrees_with_single(brain):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 1)).eval()
    single = IntegratedGradients(net, 'cpu').compute_integrated_gradients(brain, 'zero', 9, 'image')
    double = IntegratedGradients(net.double(), 'cpu').compute_integrated_gradients(
        brain, 'zero', 9, 'image'
    )
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert relative_error(single, double) < 1e-5


@pytest.mark.parametrize(
    'wrapping',
    [
        lambda y: (y, 1),
        lambda y: [y],
        lambda y: {'out': y},
        lambda y: {'aux': y[..., :2, :2], 'out': y},
        lambda y: {'logits': y, 'loss': y.sum()},
        lambda y: types.SimpleNamespace(logits=y),
        lambda y: {'mask': y},
        lambda y: [F.avg_pool2d(y, 2), y],  # deep supervision: the full-size map
        lambda y: (y, y[:, :, :1, :1]),
    ],
)
def test_outputs_in_a_tuple_a_dictionary_or_an_object(wrapping, x):
    class Wrapped(nn.Module):
        def forward(self, v):
            return wrapping(v.sum(1, keepdim=True))

    assert explain(Wrapped(), x, torch.zeros_like(x), num_steps=2).completeness_gap < 1e-4


@pytest.mark.parametrize(
    'tensor, said',
    [
        (torch.zeros(2, 3, 8, 8), r'\(C, H, W\)'),
        (torch.zeros(8, 8), r'\(C, H, W\)'),
        (torch.full((3, 8, 8), float('nan')), 'not finite'),
    ],
)
def test_bad_input_tensor(tensor, said):
    with pytest.raises(InputError, match=said):
        explain(lambda v: v.sum((1, 2, 3)), tensor, 'zero')


def test_non_finite_logits_and_odd_outputs_are_told(x):
    with pytest.raises(InputError, match='not finite'):
        explain(lambda v: v.sum((1, 2, 3)) / 0, x, 'zero')
    with pytest.raises(InputError, match='logit map'):
        explain(nn.Flatten(), x, 'zero')
    with pytest.raises(InputError, match='gradients are not finite'):
        explain(lambda v: v.abs().sum((1, 2, 3)).sqrt(), torch.zeros_like(x), torch.zeros_like(x))


@pytest.mark.parametrize('step_batch', [1, 3])
@pytest.mark.parametrize(
    ('what', 'formula'),
    [
        ('logits', lambda v: 1 / (v - 0.625).mean((1, 2, 3))),
        ('gradients', lambda v: (v - 0.625).mean((1, 2, 3)).abs().sqrt()),
    ],
)
def test_the_step_where_something_is_not_finite_is_named(what, formula, step_batch):
    x = torch.ones(3, 8, 8)
    with pytest.raises(InputError, match=rf'the {what} are not finite at alpha = 0\.625 '):
        explain(formula, x, torch.zeros_like(x), num_steps=4, rule='midpoint',
                step_batch=step_batch)  # fmt: skip


class Overflowing(nn.Module):
    """Linear, but the intermediate sum of an all-bright image does not fit into float16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 1, 1, bias=False)
        nn.init.constant_(self.up.weight, 5e4)
        nn.init.constant_(self.down.weight, 1e-6)

    def forward(self, v):
        return self.down(self.up(v))


def test_overflow_in_reduced_precision_is_computed_again_in_float32():
    x = torch.ones(3, 32, 32)
    engine = IntegratedGradients(Overflowing(), 'cpu')
    found = engine.explain(x, 'image', torch.zeros_like(x), num_steps=9, precision='float16')
    assert found.cost.precision == 'float32' and found.cost.precision_deviation is None
    assert re.search(r'float16 the (logits|gradients) are not finite at alpha', found.cost.retried)
    assert found.completeness_gap < 1e-5
    exact = engine.explain(x, 'image', torch.zeros_like(x), num_steps=9)
    assert exact.cost.retried is None
    assert torch.equal(found.attributions, exact.attributions)


@pytest.mark.parametrize('options', [{'num_steps': 0}, {'num_steps': -3}, {'rule': 'simpson'},
                                     {'score': 'softmax'}, {'threshold': 1.5}])  # fmt: skip
def test_bad_options(options, x):
    with pytest.raises(InputError, match=next(iter(options))):
        explain(lambda v: v.sum((1, 2, 3)), x, 'zero', **options)


def test_unknown_device_and_absent_gpu():
    with pytest.raises(InputError, match='unknown device "gpu"'):
        module.resolve_device('gpu')
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match='no CUDA GPU'):
            module.resolve_device('cuda')
    assert module.resolve_device('cpu') == torch.device('cpu')


def test_progress_goes_to_stderr(ig, brain, capsys):
    ig.explain(brain, num_steps=2, progress=True)
    seen = capsys.readouterr()
    assert 'interpolation steps' in seen.err and not seen.out


# ------------------------------------------------------------------ shared work


def test_several_targets_share_the_forward_passes(exact_ig, brain_detail, monkeypatch):
    ig = IntegratedGradients(exact_ig.model, 'cpu', exact_ig.preprocessing, step_batch=2)
    ig.explain(brain_detail, num_steps=2)  # prepares
    rows = torch.arange(64).view(-1, 1).expand(64, 64)
    regions = [rows < 20, rows > 50, torch.ones(64, 64, dtype=torch.bool)]
    spent = {'forwards': 0, 'backwards': 0}

    def count(what, work):
        def counted(plan, x, *rest):
            spent[what] += len(x)
            return work(plan, x, *rest)

        return counted

    gradients = torch.autograd.grad

    def grad(outputs, inputs, **options):
        spent['backwards'] += len(inputs)
        return gradients(outputs, inputs, **options)

    monkeypatch.setattr(Plan, 'run', count('forwards', Plan.run))
    monkeypatch.setattr(torch.autograd, 'grad', grad)
    counted = []
    for targets in (regions[:1], regions):
        spent |= {'forwards': 0, 'backwards': 0}
        together = ig.explain_targets(brain_detail, targets, num_steps=9, rule='midpoint')
        counted.append((spent['forwards'], spent['backwards']))
        assert {one.cost.forward_passes for one in together} == {spent['forwards']}
    # 9 nodes, the prediction, F(x'), and the crop to the first region, which is compared.
    assert counted == [(12, 9), (11, 27)]
    for region, one in zip(regions, together, strict=True):
        alone = ig.explain(brain_detail, region, num_steps=9, rule='midpoint')
        assert relative_error(one.attributions, alone.attributions) < 1e-9
        assert one.score == pytest.approx(alone.score)
        assert one.trend.scores == pytest.approx(alone.trend.scores)


def test_the_same_target_object_may_be_given_twice(ig, brain):
    target = Target('t', torch.rand(1, 128, 128) / 128**2)
    first, second = ig.explain_targets(brain, [target, target], num_steps=3)
    assert relative_error(second.attributions, first.attributions) < 1e-6


def test_open_rules_need_two_more_forward_passes_and_a_crop_one_for_comparison(
    exact_ig, brain_detail
):
    found = exact_ig.explain(brain_detail, num_steps=9, rule='midpoint')
    assert found.cropping.computed_share < 0.9
    assert found.cost.forward_passes == 9 + 2 + 1 and found.gradient_evaluations == 9
    whole = exact_ig.explain(brain_detail, 'image', num_steps=9, rule='midpoint')
    assert whole.cropping.computed_share == 1 and whole.cost.forward_passes == 9 + 2


# ------------------------------------------------------------------ tolerance and precision


@pytest.mark.parametrize('rule', ['adaptive', 'clenshaw-curtis'])
def test_a_tolerance_is_reached_and_is_true(ig, brain_detail, rule):
    found = ig.explain(brain_detail, rule=rule, tolerance=0.15, max_steps=150)
    assert found.within_tolerance and found.map_error <= 0.15 and found.completeness_gap <= 0.15
    assert found.steps == found.gradient_evaluations < 150
    reference = ig.explain(brain_detail, rule='trapezoid', num_steps=129)
    assert relative_error(found.attributions, reference.attributions) < 0.15
    assert found.uncertainty.shape == brain_detail.shape[-2:] and (found.uncertainty >= 0).all()


def test_a_tolerance_out_of_reach_is_told(ig, brain):
    found = ig.explain(brain, tolerance=1e-6, max_steps=9)
    assert found.within_tolerance is False and found.steps == 9
    assert ig.explain(brain, num_steps=2).within_tolerance is None


def test_tolerance_of_image_equal_to_baseline(ig, brain):
    found = ig.explain(brain, baseline_type=brain, tolerance=0.1, max_steps=9)
    assert not found.attributions.any() and found.map_error is None


@pytest.fixture
def smooth_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3)).eval()


@pytest.mark.parametrize('rule', ['adaptive', 'midpoint'])
def test_reduced_precision_is_checked_against_float32(smooth_network, brain, rule):
    engine = IntegratedGradients(smooth_network, 'cpu', step_batch=3)
    options = {'target': 'image', 'num_steps': 11, 'rule': rule}
    exact = engine.explain(brain, **options)
    reduced = engine.explain(brain, precision='bfloat16', **options)
    assert exact.cost.precision == 'float32' and exact.cost.precision_deviation is None
    assert reduced.cost.precision == 'bfloat16'
    assert 1e-4 < reduced.cost.precision_deviation < 0.03
    assert 1e-4 < relative_error(reduced.attributions, exact.attributions) < 0.03
    assert reduced.map_error > exact.map_error
    assert reduced.gradient_evaluations == 13  # two nodes are also computed in float32
    assert reduced.attributions.dtype == torch.float32


def test_auto_takes_reduced_precision_where_it_is_fast_and_accurate(
    monkeypatch, smooth_network, brain
):
    engine = IntegratedGradients(smooth_network, 'cpu')

    def chosen(fast, **options):
        monkeypatch.setattr('igseg.engine.precision.cpu_has_bfloat16', lambda: fast)
        return engine.explain(
            brain, 'image', num_steps=5, precision='auto', **options
        ).cost.precision

    assert chosen(True) == 'bfloat16'
    assert chosen(False) == 'float32'
    assert chosen(True, precision_tolerance=1e-5) == 'float32'
    assert chosen(True, tolerance=1e-3) == 'float32'  # the map is to be more exact than that


def test_reduced_precision_of_a_gpu_follows_its_generation(monkeypatch):
    from igseg.engine.precision import reduced_dtype

    for capability, dtype in (((8, 0), torch.bfloat16), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _, c=capability: c)
        assert reduced_dtype('auto', torch.device('cuda')) == dtype
    assert reduced_dtype('float16', torch.device('cuda')) == torch.float16
    assert reduced_dtype('auto', torch.device('mps')) is None


def test_float16_does_not_underflow(smooth_network, brain):
    """Weights of 1 / (region's size) would vanish in half precision on the way back."""
    engine = IntegratedGradients(smooth_network, 'cpu')
    exact = engine.explain(brain, 'image', num_steps=4)
    half = engine.explain(brain, 'image', num_steps=4, precision='float16')
    assert relative_error(half.attributions, exact.attributions) < 0.01


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


# ------------------------------------------------------------------ the way along the path


@pytest.mark.parametrize('rule', ['adaptive', 'midpoint', 'trapezoid'])
def test_trend_from_the_baseline_to_the_image(ig, brain, rule):
    found = ig.explain(brain, num_steps=7, rule=rule)
    trend = found.trend
    assert len(trend.alphas) == len(trend.scores) == 7 + 2 * (rule == 'midpoint')
    assert trend.alphas[0] == 0 and trend.alphas[-1] == 1
    assert list(trend.alphas) == sorted(trend.alphas)
    assert trend.scores[0] == pytest.approx(found.baseline_score)
    assert trend.scores[-1] == pytest.approx(found.score)
    assert trend.mask_iou[-1] == 1
    assert all(0 <= iou <= 1 for iou in trend.mask_iou if iou is not None)
    assert trend.mask_iou[0] == 0  # black holds no structure
