"""Letters that can be drawn: names in any script stand on a figure as letters, never as boxes.

matplotlib's font has Latin, Greek and Cyrillic letters. For others a second font of this machine is
used where there is one; else a name is transliterated, which `letters_note` tells. Scripts that run
from right to left are always transliterated: matplotlib would draw their letters in reverse.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cache

import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

FROM_RIGHT = ('R', 'AL')  # Unicode's directions of Hebrew, of Arabic
# Beginnings of names of fonts that have boxes or mathematical signs under the codes of letters.
WITHOUT_LETTERS = ('Last Resort', 'LastResort', 'cm', 'STIXNonUnicode', 'STIXSize')
WITHOUT_GLYPH = ('Cc', 'Cf', 'Mn', 'Zs')  # categories of characters that need no glyph


def drawable(text: str) -> str:
    """A text (any Unicode) in letters that can be drawn here."""
    if text.isascii():
        return text
    text = unicodedata.normalize('NFC', text.encode(errors='backslashreplace').decode())
    missing = {letter for letter in text if not _can_be_drawn(letter)}
    return ''.join(transliterated(letter) if letter in missing else letter for letter in text)


def transliterated(letter: str) -> str:
    """A letter in Latin letters; '?' where none are known for it."""
    from anyascii import anyascii

    return anyascii(letter) or '?'


def letters_note(texts: Iterable[str]) -> str:
    """A sentence on the texts that figures write in other letters; empty where they write none."""
    changed = {text: drawable(text) for text in texts if not text.isascii()}
    changed = {
        text: new for text, new in changed.items() if new != unicodedata.normalize('NFC', text)
    }
    if not changed:
        return ''
    text, new = next(iter(changed.items()))
    more = f', and {len(changed) - 1} more in the same way' if len(changed) > 1 else ''
    return (
        f'figures write "{text}" as "{new}"{more}: no font of this machine has these letters, or '
        'they run from right to left, which figures cannot draw (for Chinese, Japanese and Korean '
        'install a font such as Noto Sans CJK)'
    )


def legible(figure: Figure) -> Figure:
    """The same figure, with all its texts in fonts that have their letters; a $ is a $, not the
    beginning of a formula."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        words = text.get_text()
        if words and r'\mathdefault' not in words:  # which matplotlib's own numbers begin with
            text.set_parse_math(False)
            text.set_text(drawable(words))
            text.set_fontfamily(_families(text.get_text()))
    return figure


def _can_be_drawn(letter: str) -> bool:
    if unicodedata.bidirectional(letter) in FROM_RIGHT:
        return False
    return unicodedata.category(letter) in WITHOUT_GLYPH or _font_with(letter) is not None


def _families(text: str) -> list[str]:
    """The usual font, and those that have the letters it lacks."""
    further = (_font_with(letter) for letter in text if not letter.isascii())
    return list(dict.fromkeys([*rcParams['font.family'], *filter(None, further)]))


@cache
def _font_with(letter: str) -> str | None:
    """The family of the first font that has a letter; matplotlib's usual font comes first."""
    for family, codes in _fonts():
        place = np.searchsorted(codes, ord(letter))
        if place < len(codes) and codes[place] == ord(letter):
            return family
    return None


@cache
def _fonts() -> tuple[tuple[str, np.ndarray], ...]:
    """The families of this machine's fonts, and the sorted codes of the letters that each has. The
    usual font is first, then upright ones without serifs."""
    usual = font_manager.findfont(font_manager.FontProperties())
    entries = sorted(
        font_manager.fontManager.ttflist,
        key=lambda font: (font.fname != usual, font.style != 'normal', 'Sans' not in font.name,
                          abs(int(font.weight) - 400) if str(font.weight).isdigit() else 0),
    )  # fmt: skip
    families: dict[str, np.ndarray] = {}
    for entry in entries:
        if entry.name not in families and not entry.name.startswith(WITHOUT_LETTERS):
            try:
                families[entry.name] = np.sort(
                    np.fromiter(FT2Font(entry.fname).get_charmap(), np.uint32)
                )
            except (OSError, RuntimeError):  # a damaged font, or one that was removed
                continue
    return tuple(families.items())
