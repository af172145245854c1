"""Facts about a network are found out once for each change of its weights."""

from __future__ import annotations

import pytest
import torch
from helpers import noise_image, save_image

from igseg.checks import checks as checks_module
from igseg.checks.subject import Evaluation
from igseg.data.samples import list_samples
from igseg.engine import engine as engine_module
from igseg.errors import InputError
from igseg.network import facts as facts_module
from igseg.network.facts import NetworkFacts
from igseg.network.kinds import EXCLUSIVE, Meaning
from igseg.preprocessing import Preprocessing
from integrated_gradients import (
    IntegratedGradients,
    Settings,
    analyse_batch,
    evaluate_explanation,
)


@pytest.fixture
def sums(monkeypatch) -> list[int]:
    """Grows by 1 whenever all weights of a network are summed."""
    counted: list[int] = []
    fingerprint = facts_module.fingerprint

    def counting(model):
        counted.append(1)
        return fingerprint(model)

    for module in (facts_module, engine_module):
        monkeypatch.setattr(module, 'fingerprint', counting)
    return counted


def network(channels: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, channels, 3, padding=1))


def test_all_weights_are_summed_once_for_an_image(sums, tmp_path):
    for number in range(3):
        save_image(tmp_path / 'images' / f'{number}.png', noise_image(32, 32, number))
    ig = IntegratedGradients(network(), 'cpu', Preprocessing(32), step_batch=1)
    settings = Settings(num_steps=2, target='image', evaluate='quick')
    samples, before = list_samples(tmp_path / 'images'), len(sums)
    analyse_batch(ig, samples, settings, tmp_path / 'out', figures='none')
    # Beside the images: once for the run, and twice where the network is prepared, which shows
    # whether it changes when it is asked.
    assert len(sums) - before == len(samples) + 3


def test_changed_weights_are_noticed_with_the_next_image():
    model = network()
    ig = IntegratedGradients(model, 'cpu', Preprocessing(32))
    x = torch.ones(3, 32, 32)
    before, digest = ig.explain(x, 'image', num_steps=2).score, ig.network.weights_sha256
    with torch.no_grad():
        model[0].bias += 1
    assert ig.explain(x, 'image', num_steps=2).score == pytest.approx(before + 1, rel=1e-5)
    assert ig.network.weights_sha256 != digest


def test_checks_of_an_explanation_see_weights_that_changed_since(monkeypatch):
    model = torch.nn.Sequential(network(), torch.nn.BatchNorm2d(1))  # which is folded
    ig = IntegratedGradients(model, 'cpu', Preprocessing(32), step_batch=1)
    x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    explanation = ig.explain(x, 'image', num_steps=2)
    scores = []

    def only_the_score(subject, *more):
        with torch.no_grad():
            scores.append(float(subject.target(subject.logits(subject.x))))
        return Evaluation()

    monkeypatch.setattr(checks_module, 'evaluate', only_the_score)
    evaluate_explanation(ig, x, explanation, 'quick')
    with torch.no_grad():
        model[1].bias += 1
    evaluate_explanation(ig, x, explanation, 'quick')
    assert scores == pytest.approx([explanation.score, explanation.score + 1], rel=1e-5)


def test_what_the_user_says_of_the_outputs_wins():
    facts = NetworkFacts(network(3), torch.device('cpu'))
    described = facts.description_for
    assert described(Meaning()).background == 0
    assert described(Meaning(background_class='none')).background is None
    assert described(Meaning(background_class=2, output_kind=EXCLUSIVE)).background == 2
    assert described(Meaning(class_names=('a', 'b', 'c'))).class_names == ('a', 'b', 'c')
    with pytest.raises(InputError, match='outputs "probabilities"'):
        facts.see_outputs(torch.ones(1, 3, 8, 8), Meaning(outputs='probabilities'))


def test_what_cannot_be_run_is_not_counted():
    """A fault of the network is reported later, when the network must be run."""

    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ValueError('no such input')

    facts = NetworkFacts(Broken(), torch.device('cpu'))
    assert facts.logit_maps() is None
    assert facts.see_outputs(torch.ones(1, 3, 8, 8), Meaning()) == (None, ())
