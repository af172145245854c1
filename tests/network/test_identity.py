"""The identity of a network, so that results of another network are never taken for its results."""

from __future__ import annotations

import subprocess
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DEMO_MODEL, ROOT, Scaled, noise_image, save_image
from torch import nn

from igseg.network.identity import network_digest
from integrated_gradients import (
    IntegratedGradients,
    Preprocessing,
    Settings,
    analyse_batch,
    list_samples,
    load_model,
)


class AlsoScaled(Scaled):
    def forward(self, x):
        return self.formula(self.conv(x)) * self.factor + 1


def changed(net: nn.Module) -> nn.Module:
    net.conv.weight.data.mul_(2)
    return net


class Config:
    def __init__(self, gain):
        self.gain = gain


class Helped(Scaled):
    """Its forward calls a method, as most do."""

    def forward(self, x):
        return self.decode(x)

    def decode(self, x):
        return self.conv(x)


def helped(formula) -> nn.Module:
    return type('Helped', (Helped,), {'decode': formula})()


def hooked() -> nn.Module:
    net = Scaled()
    net.conv.register_forward_hook(lambda module, inputs, output: -output)
    return net


def deep(slope: float) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 1), nn.LeakyReLU(0.1), nn.Conv2d(3, 3, 1), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers, nn.Conv2d(3, 1, 1))


PAIRS = [
    (lambda: deep(0.1), lambda: deep(0.9)),
    (lambda: helped(lambda self, x: self.conv(x)), lambda: helped(lambda self, x: -self.conv(x))),
    (lambda: Scaled(Config(1)), lambda: Scaled(Config(2))),
    (lambda: Scaled(types.SimpleNamespace(a=1)), lambda: Scaled(types.SimpleNamespace(a=2))),
    (lambda: Scaled(formula=partial(F.leaky_relu, negative_slope=0.1)),
     lambda: Scaled(formula=partial(F.leaky_relu, negative_slope=0.9))),
    (lambda: Scaled(formula=torch.sigmoid), lambda: Scaled(formula=torch.tanh)),
    (Scaled, hooked),
    (lambda: Scaled(np.float32(1)), lambda: Scaled(np.float32(2))),
    (lambda: Scaled({1, 2}), lambda: Scaled({1, 3})),
    (lambda: Scaled([nn.ReLU()]), lambda: Scaled([nn.GELU()])),
]  # fmt: skip


@pytest.mark.parametrize(('make', 'make_other'), PAIRS)
def test_what_two_networks_compute_shows_in_their_digests(make, make_other):
    assert network_digest(make()) == network_digest(make())
    assert network_digest(make()) != network_digest(make_other())


@pytest.mark.parametrize('odd', [
    lambda: torch.eye(3).to_sparse(), lambda: torch.empty(3, device='meta'),
    lambda: torch.ones(3, dtype=torch.complex64).conj(), lambda: np.array([{}, 1], dtype=object),
])  # fmt: skip
def test_odd_attributes_have_a_digest_that_stays(odd):
    assert network_digest(Scaled(odd())) == network_digest(Scaled(odd()))


OTHERS = [
    lambda: changed(Scaled()),  # weights
    lambda: Scaled(2.0),  # an attribute
    lambda: Scaled(formula=torch.tanh),  # a function
    lambda: Scaled(formula=lambda v: v + 1),  # a formula
    lambda: AlsoScaled(),  # the code of forward
    lambda: Scaled().double(),  # the type of the weights
]


def test_networks_that_differ_have_different_digests():
    digests = [network_digest(make()) for make in (Scaled, *OTHERS)]
    assert len(set(digests[:3] + digests[4:])) == len(digests) - 1
    assert network_digest(Scaled()) == digests[0]
    closed = [network_digest(Scaled(formula=lambda v, k=k: v * k)) for k in (1, 2)]
    assert closed[0] != closed[1]


def test_the_digest_is_the_same_in_another_process():
    script = (
        'from igseg.network.loading import load_model; import sys\n'
        'print(load_model(sys.argv[1], "cpu").network_description.weights_sha256)'
    )
    done = subprocess.run([sys.executable, '-c', script, str(DEMO_MODEL)], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == load_model(DEMO_MODEL, 'cpu').network_description.weights_sha256


def test_a_second_network_in_the_same_folder_is_never_taken_for_the_first(tmp_path):
    save_image(tmp_path / 'data' / 'a.png', noise_image())
    samples = list_samples(tmp_path / 'data')
    settings = Settings(target='image', num_steps=2, image_size=32)

    def score_of(net: nn.Module) -> float:
        ig = IntegratedGradients(net, 'cpu', Preprocessing(32))
        result = analyse_batch(ig, samples, settings, tmp_path / 'out', figures='none')
        return result.images[0]['score']

    first = score_of(Scaled())
    assert score_of(Scaled()) == first
    written = (tmp_path / 'out' / 'a' / 'a_statistics.json').stat().st_mtime_ns
    for make in OTHERS[:2] + OTHERS[3:5]:
        assert score_of(make()) != first
    assert score_of(Scaled()) == first  # computed again: the folder held another's
    assert (tmp_path / 'out' / 'a' / 'a_statistics.json').stat().st_mtime_ns != written


def test_a_network_that_is_trained_on_is_another_network(tmp_path):
    save_image(tmp_path / 'data' / 'a.png', noise_image())
    net = Scaled()
    ig = IntegratedGradients(net, 'cpu', Preprocessing(32))
    settings = Settings(target='image', num_steps=2)
    for _ in range(2):
        before = ig.network.weights_sha256
        result = analyse_batch(ig, list_samples(tmp_path / 'data'), settings, tmp_path / 'out',
                               figures='none')  # fmt: skip
        expected = ig.explain(torch.ones(3, 32, 32), 'image', num_steps=1)
        assert result.images[0]['settings']['weights_sha256'] == before
        changed(net)
        assert ig.network.weights_sha256 != before
        again = ig.explain(torch.ones(3, 32, 32), 'image', num_steps=1)
        assert again.score == pytest.approx(2 * expected.score)


def test_an_attribute_that_changes_is_seen_by_the_same_object():
    net = Scaled()
    ig = IntegratedGradients(net, 'cpu')
    x = torch.rand(3, 8, 8)
    before = ig.explain(x, 'image', num_steps=1).score
    net.factor = 3.0
    assert ig.explain(x, 'image', num_steps=1).score == pytest.approx(3 * before)
    net.conv.weight.data.copy_(torch.arange(3.0).view(1, 3, 1, 1))
    score = ig.explain(x, 'image', num_steps=1).score
    net.conv.weight.data.copy_(net.conv.weight.data.flip(1))  # the same sum
    assert ig.explain(x, 'image', num_steps=1).score != pytest.approx(score)
