"""How many steps go through the network at once, and how much memory is used."""

import contextlib
import gc
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import DEMO_MODEL, ROOT, explain, relative_error
from torch import nn

from igseg.engine.memory import StepBatch
from igseg.network.outputs import is_out_of_memory
from integrated_gradients import (
    EmptyTargetError,
    Explanation,
    InputError,
    IntegratedGradients,
    Settings,
    explain_image,
)


@pytest.fixture
def x():
    return torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def explained(ig: IntegratedGradients, size: int, *given, **options) -> Explanation:
    """What an explainer gives with another step batch; it need not prepare the network again."""
    usual, ig.engine.step_batch = ig.engine.step_batch, StepBatch(ig.device, size)
    try:
        return ig.explain(*given, **options)
    finally:
        ig.engine.step_batch = usual


@pytest.mark.parametrize('steps, batch', [(8, 4), (9, 4), (11, 4), (1, 4), (8, 8), (8, 9), (7, 1)])
def test_step_batch_changes_nothing(exact_ig, brain, steps, batch):
    single, many = (explained(exact_ig, size, brain, num_steps=steps) for size in (1, batch))
    assert (single.cost.step_batch, many.cost.step_batch) == (1, batch)
    assert single.gradient_evaluations == many.gradient_evaluations == steps
    assert relative_error(many.attributions, single.attributions) < 1e-6


def test_step_batch_in_single_precision_changes_only_what_rounding_does(ig, brain):
    single, many = (explained(ig, size, brain, num_steps=11) for size in (1, 4))
    assert relative_error(many.attributions, single.attributions) < 1e-3


def test_a_batch_of_images_gives_what_each_gives_alone(ig, brain):
    images = torch.cat([brain, brain.flip(3)])
    together = ig.compute_integrated_gradients(images, num_steps=4)
    assert together.shape == images.shape
    for image, attributions in zip(images, together, strict=True):
        alone = ig.compute_integrated_gradients(image, num_steps=4)  # (3, H, W) in and out
        assert alone.shape == image.shape
        torch.testing.assert_close(alone, attributions)


class Hungry(nn.Module):
    """Runs out of memory with more than `room` images at once, and remembers the images."""

    def __init__(self, room, error):
        super().__init__()
        self.room, self.error, self.path = room, error, []

    def __deepcopy__(self, memo):
        raise TypeError('watched as it is')

    def forward(self, x):
        if len(x) > self.room:
            raise self.error
        if torch.is_grad_enabled():
            self.path += x.detach()[:, 0, 0, 0].tolist()
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
    on_path = [value for value in model.path if value < 1]  # not the image itself, which prepares
    nodes = [(i + 0.5) / 13 for i in range(13)]
    # The first and the last image of the first batch are tried together, and the first alone.
    tried = [nodes[0], nodes[-1], nodes[0]]
    assert sorted(on_path) == pytest.approx(sorted(nodes + tried))
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
            if batch.measuring:
                batch.judge(wait)
    assert batch.size == settled
    batch.start(32 * 32)
    assert batch.size == 1  # another size of image is measured on its own
    batch.start(64 * 64)
    assert batch.size == settled and not batch.measuring


def test_the_step_batch_of_large_images_is_not_tried_on_a_cpu():
    batch = StepBatch(torch.device('cpu'))
    batch.start(640 * 640)
    batch.judge(1.0)
    assert batch.size == 1 and not batch.measuring


def test_peak_memory_does_not_grow_with_the_number_of_steps():
    script = (
        'import torch; from integrated_gradients import IntegratedGradients, load_model\n'
        f'm = load_model({str(DEMO_MODEL)!r}, "cpu")\n'
        'ig = IntegratedGradients(m, "cpu", step_batch=4)\n'
        'for steps in (8, 64):\n'
        '    result = ig.explain(torch.zeros(3, 64, 64), "image", "white", steps)\n'
        '    print(result.cost.peak_memory_bytes)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    few, many = map(int, done.stdout.split())  # of the process so far
    assert many < 1.05 * few


@pytest.mark.parametrize('on_empty', ['skip', 'image'])
def test_an_empty_target_leaves_nothing_for_the_garbage_collector(ig, on_empty):
    """An exception that is kept also keeps the frames it went through, with all their tensors."""
    settings = Settings(num_steps=1, threshold=0.999999, on_empty=on_empty)

    def living_tensors() -> int:
        with contextlib.suppress(EmptyTargetError):
            explain_image(ig, np.zeros((64, 64, 3), np.uint8), settings)
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    living_tensors()  # what is prepared once stays
    gc.collect()
    gc.disable()
    try:
        assert living_tensors() == living_tensors()
    finally:
        gc.enable()
