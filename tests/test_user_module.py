"""The user's module: seeds and baselines, good manners, and what it says of inputs and outputs."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import explain, relative_error
from torch import nn

import integrated_gradients as module
from integrated_gradients import InputError, explanation_statistics, plain_map


@pytest.fixture
def x():
    return torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))


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
        with pytest.raises(InputError, match='outside the image'):
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


# ------------------------------------------------------------------ what users import from here

# All that was ever importable from here and documented, or that the notebook, README, docs and
# published examples take from any module of earlier versions.
NAMES = [
    'ARCHITECTURES', 'BASELINES', 'BatchResult', 'CANDIDATES', 'Cost', 'EmptyTargetError',
    'Explanation', 'InputError', 'IntegratedGradients', 'LoadedImage', 'METHODS', 'METRICS',
    'ModelInput', 'NetworkDescription', 'NonFiniteError', 'OutputError', 'Preparation',
    'Preprocessing', 'RULE_NAMES', 'Reading', 'STATISTICS', 'Sample', 'Score', 'Settings',
    'Subject', 'TARGETS', 'Target', 'TargetContext', 'Thresholds', 'Trend', 'TruthReading',
    'analyse_batch', 'analyse_image', 'analyse_sample', 'as_picture', 'attribution_figure',
    'batch_integrated_gradients_analysis', 'build_baselines', 'build_methods', 'build_parser',
    'build_target', 'channels_figure', 'choose_samples', 'completeness_gap', 'describe_image',
    'describe_network', 'describe_targets', 'evaluate', 'evaluate_explanation', 'explain_image',
    'explanation_statistics', 'form_of', 'input_preprocessing', 'list_samples', 'load_explainer',
    'load_image', 'load_model', 'load_view', 'main', 'mask_scores', 'methods_figure', 'plain_map',
    'read_image', 'read_label_map', 'read_mask', 'redraw_figures', 'references_of',
    'resolve_device', 'run_batch', 'run_single', 'segmentation_logits', 'settings_from',
    'single_sample', 'statistics_text', 'subject_of', 'superpixels', 'verdict_of', 'view_of',
]  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_a_name_that_users_write_can_be_imported(name):
    assert getattr(module, name) is not None
    assert name in dir(module)


def test_a_star_import_gives_the_names_that_users_write():
    given: dict[str, object] = {}
    exec('from integrated_gradients import *', given)
    assert not {'io', 'sys', 'time', 'fit', 'explain', 'replace'} & given.keys()
    assert {'BASELINES', 'IntegratedGradients', 'Settings', 'load_model', 'view_of'} <= given.keys()
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize('kind', [None, 'zero'])
def test_no_baseline_is_the_usual_one(ig, brain, kind):
    ours = ig.explain(brain, 'image', kind, num_steps=2)
    assert ours.baseline == 'zero'


def test_a_row_may_hold_the_function_itself(ig, brain, monkeypatch):
    """As in a notebook, where a function has no module to be named by."""

    def grey(pixels, rng):
        return np.full_like(pixels, 127.5)

    monkeypatch.setitem(module.BASELINES, 'grey', module.BaselineKind('a grey image', grey))
    found = ig.explain(brain, 'image', 'grey', num_steps=2)
    assert found.baseline == 'grey' and (found.baseline_pixels == 127.5).all()


def test_a_name_that_is_none_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_every_name_that_is_handed_on_stands_once():
    handed_on = ' '.join(module.HANDED_ON.values()).split()
    assert len(set(handed_on)) == len(handed_on)
    assert not set(handed_on) & vars(module).keys()
