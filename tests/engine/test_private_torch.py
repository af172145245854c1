"""Private parts of torch stand in one file, which names them."""

import ast

import pytest
import torch
from helpers import ROOT

from igseg.engine import private_torch

ENGINE = ROOT / 'igseg' / 'engine'


def private_parts(file) -> list[str]:
    """Attributes that begin with an underscore, except those of `self` and `cls`."""
    attributes = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute))
    return sorted(
        {
            node.attr
            for node in attributes
            if node.attr.startswith('_') and not node.attr.startswith('__')
            and not (isinstance(node.value, ast.Name) and node.value.id in ('self', 'cls'))
        }
    )  # fmt: skip


@pytest.mark.parametrize('file', sorted(ENGINE.glob('*.py')), ids=lambda file: file.name)
def test_no_other_file_of_the_engine_uses_a_private_part_of_torch(file):
    names = private_parts(file)
    if file.name == 'private_torch.py':
        assert all(name in private_torch.__doc__ for name in names), names
    else:
        assert names == []


def test_torch_has_an_upper_bound():
    (line,) = [line for line in (ROOT / 'requirements.txt').read_text().splitlines()
               if line.startswith('torch>')]  # fmt: skip
    assert line.startswith('torch>=2.6,<')


def test_what_is_said_of_an_operator_is_so():
    plain, written = torch.ops.aten.relu.default, torch.ops.aten.relu_.default
    assert private_torch.name_of(plain) == 'relu'
    assert private_torch.writes_in_place(written) and not private_torch.writes_in_place(plain)
    assert private_torch.same_overload(written, 'relu') is plain
    assert private_torch.same_overload(written, 'no such operator') is None
    assert private_torch.shares_memory(torch.ops.aten.view.default)
    assert not private_torch.shares_memory(plain)
    names = dict(private_torch.arguments_of(torch.ops.aten.softmax.int))
    assert names == {'self': private_torch.WithoutDefault, 'dim': private_torch.WithoutDefault,
                     'dtype': None}  # fmt: skip
