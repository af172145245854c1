"""Names in any script are drawn as letters, never as boxes."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from igseg.command_line import say_letters
from igseg.data.samples import Sample
from igseg.results import fonts
from igseg.results.export import Output
from igseg.results.sheet import wrap

LUNG, BRAIN = '肺部', 'مخ'


@pytest.fixture
def usual_font_only(monkeypatch):
    """A machine that has no font but matplotlib's usual one."""
    usual = fonts._fonts()[0]
    assert usual[0] == 'DejaVu Sans'
    monkeypatch.setattr(fonts, '_fonts', lambda: (usual,))
    fonts._font_with.cache_clear()
    yield
    fonts._font_with.cache_clear()


@pytest.fixture
def chinese_font(monkeypatch):
    """A machine with a font that has the letters of LUNG."""
    further = ('Some Font', np.array(sorted(map(ord, LUNG)), np.uint32))
    both = (fonts._fonts()[0], further)
    monkeypatch.setattr(fonts, '_fonts', lambda: both)
    fonts._font_with.cache_clear()
    yield further[0]
    fonts._font_with.cache_clear()


@pytest.mark.parametrize('text', ['slice_79', 'Łąka ß é', 'Срез 79', 'αβ ± · × …', ''])
def test_letters_of_the_usual_font_stay(text, usual_font_only):
    assert fonts.drawable(text) == text


@pytest.mark.parametrize(
    'text, drawn',
    [(LUNG, 'FeiBu'), (f'CT_{LUNG}_79', 'CT_FeiBu_79'), ('スライス', 'suraisu'), (BRAIN, 'mkh'),
     ('מוח', 'mvh'), ('e\u0301', 'é'), ('\udce9', r'\udce9'), ('\U0010fffd', '?')],
)  # fmt: skip
def test_other_letters_are_transliterated(text, drawn, usual_font_only):
    assert fonts.drawable(text) == drawn


def test_a_second_font_that_has_the_letters_is_used(chinese_font):
    figure = Figure()
    text = figure.text(0.5, 0.5, f'{LUNG} 79')
    assert fonts.drawable(LUNG) == LUNG
    fonts.legible(figure)
    assert text.get_text() == f'{LUNG} 79'
    assert text.get_fontfamily()[-1] == chinese_font


def test_what_runs_from_right_to_left_is_transliterated_though_the_font_has_its_letters():
    assert fonts._font_with(BRAIN[0]) == 'DejaVu Sans'
    assert fonts.drawable(BRAIN) == 'mkh'


def test_a_figure_is_drawn_without_boxes_and_without_formulas(usual_font_only, tmp_path):
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(LUNG)
    axes.set_xlabel(r'a$_b$ \alpha')
    axes.set_xticks([0, 1], ['a$b$', fonts.drawable(LUNG)])
    axes.set_yscale('log')
    axes.set_ylim(1e-9, 1e9)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # matplotlib warns of each letter it has no glyph for
        fonts.legible(figure).savefig(tmp_path / 'figure.png')
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    written = {text.get_text(): text.get_parse_math() for text in texts}
    assert {'FeiBu': False, r'a$_b$ \alpha': False, 'a$b$': False}.items() <= written.items()
    assert [math for words, math in written.items() if 'mathdefault' in words][:1] == [True]


def test_lines_of_wide_letters_are_broken_sooner(chinese_font):
    narrow, wide = wrap('ab' * 40, 4, 11), wrap(LUNG * 40, 4, 11)
    assert wide.count('\n') > 1.5 * narrow.count('\n')


def test_that_names_are_transliterated_is_told_once(usual_font_only, tmp_path, capsys):
    samples = [Sample(name, tmp_path / f'{name}.png') for name in ('plain', 'é', LUNG, BRAIN)]
    say_letters(Output(tmp_path, figures='none'), samples)
    say_letters(Output(tmp_path), samples[:2])
    assert capsys.readouterr().err == ''
    say_letters(Output(tmp_path), samples)
    said = capsys.readouterr().err
    assert said.startswith(f'note: figures write "{LUNG}" as "FeiBu", and 1 more in the same way:')
    assert said.count('\n') == 1
