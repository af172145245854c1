"""The page in a real browser. Skipped where there is none, unless REQUIRE_BROWSER is set."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

import pytest
from helpers import EVIL, PATIENCE, images_of

from igseg.analysis import summary
from igseg.analysis.summary import read_table
from igseg.results.page import report_html
from integrated_gradients import Settings


@pytest.fixture(scope='module')
def browser() -> Iterator:
    """Headless Chromium; where there is none the tests are skipped, unless REQUIRE_BROWSER."""
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as driver:
        flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
                 '--disable-background-networking', '--disable-component-update',
                 '--disable-sync']  # fmt: skip
        try:
            started = driver.chromium.launch(
                executable_path=chromium, args=flags, timeout=1000 * PATIENCE
            )
        except playwright.Error:
            if os.environ.get('REQUIRE_BROWSER'):
                raise
            pytest.skip('needs Chromium')
        yield started
        started.close()


def new_page(browser, **how: object):
    """A page that is waited for however busy the machine is."""
    opened = browser.new_page(**how)
    opened.set_default_timeout(1000 * PATIENCE)
    return opened


@pytest.fixture
def page(browser, batch) -> Iterator:
    """The opened page. All errors of the browser fail the test, and so does every address that is
    not that of a file."""
    opened = new_page(browser, viewport={'width': 1100, 'height': 800})
    trouble: list[str] = []
    opened.on('console', lambda message: trouble.append(message.text))
    opened.on('pageerror', lambda error: trouble.append(str(error)))
    opened.on('requestfailed', lambda request: trouble.append(request.url))
    opened.on('request', lambda r: trouble.append(r.url) if r.url[:5] not in ('file:', 'data:')
              else None)  # fmt: skip
    opened.goto((batch / 'index.html').as_uri())
    yield opened
    assert trouble == []
    assert opened.title().startswith('Attributions of 3')  # no name ran as code
    opened.close()


def names(page) -> list[str]:
    return page.locator('#images tbody tr:visible .open').all_inner_texts()


def test_sorting(page):
    heading = page.locator('th[data-key="name"]')
    heading.locator('button').click()
    assert heading.get_attribute('aria-sort') == 'ascending'
    assert names(page)[1:] == ['first', 'second']
    heading.locator('button').click()
    assert heading.get_attribute('aria-sort') == 'descending'
    assert names(page)[:2] == ['second', 'first']
    page.locator('th[data-key="1"] button').click()
    ratios = [float(text) for text in page.locator('tbody td[data-value]:nth-child(4)')
              .all_inner_texts() if text != 'n/a']  # fmt: skip
    assert ratios == sorted(ratios)
    assert heading.get_attribute('aria-sort') is None


def test_filtering(page):
    chip = page.locator('.chip[data-flag="poor mask"]')
    chip.click()
    assert chip.get_attribute('aria-pressed') == 'true'
    shown = names(page)
    assert page.locator('#shown').inner_text() == f'{len(shown)} shown'
    rows = page.locator('#images tbody tr:visible').all()
    assert rows and all('poor mask' in row.get_attribute('data-flags').split('|') for row in rows)
    page.locator('.chip[data-flag=""]').click()
    assert len(names(page)) == 3


def test_detail_view_with_the_keyboard_alone(page):
    page.locator('#images .open').first.focus()
    page.keyboard.press('Enter')
    assert page.locator('#detail').is_visible()
    first = page.locator('#detail-name').inner_text()
    assert page.evaluate('document.activeElement.id') == 'detail-name'
    page.keyboard.press('Tab')
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.id') == 'after'
    page.keyboard.press('Enter')
    assert page.locator('#detail-name').inner_text() != first
    page.keyboard.press('Escape')
    assert not page.locator('#detail').is_visible()


def test_detail_view_shows_pictures_curves_and_figures(page):
    page.locator('.open', has_text='second').click()
    page.wait_for_function(
        "[...document.querySelectorAll('#detail img:not([hidden])')]"
        '.every(i => i.complete && i.naturalWidth)'
    )
    assert page.locator('#detail img:not([hidden])').count() >= 4  # no figure of several methods
    assert page.locator('#detail svg[role=img]').count() == 13  # twelve curves, one profile
    assert page.locator('#detail-figures tr').count() > 30
    assert 'poor mask' in page.locator('#detail-verdict').inner_text()
    assert '--target truth' in page.locator('#detail-command').inner_text()


def test_the_slider_moves_the_overlay(page):
    page.locator('.open').first.click()
    clip = "getComputedStyle(document.getElementById('slide-overlay')).clipPath"
    before = page.evaluate(clip)
    page.locator('#slide').focus()
    page.keyboard.press('End')
    assert page.evaluate(clip) != before and '100%' not in page.evaluate(clip)
    page.keyboard.press('Home')
    assert '100%' in page.evaluate(clip)


def test_the_overlay_can_be_switched_to_its_uncertainty(page):
    page.locator('.open', has_text='second').click()
    overlay = page.locator('#slide-overlay')
    assert overlay.get_attribute('src').endswith('second_overlay.png')
    page.get_by_label('its uncertainty').check()
    assert overlay.get_attribute('src').endswith('second_uncertainty.png')
    assert overlay.get_attribute('alt').startswith('The uncertainty')
    text = page.locator('#detail-layer').inner_text()
    assert text.count('%') == 2 and 'null' not in text
    page.locator('#before').click()  # another image starts with its attribution again
    assert overlay.get_attribute('src').endswith('_overlay.png')
    assert page.get_by_label('attribution', exact=True).is_checked()


def test_an_evil_name_is_text(browser, batch, tmp_path):
    """Names are cleaned when a dataset is read; the page does not rely on that."""
    content, images = json.loads((batch / 'summary.json').read_text()), images_of(batch)
    for entry in images:
        entry |= {'image': EVIL, 'target': EVIL, 'notes': [EVIL], 'folder': EVIL}
        entry['verdict'][0] |= {'flag': EVIL, 'text': EVIL}
    failed = [{'image': EVIL, 'reason': EVIL}]
    text = report_html(
        images, {**content['summary'], 'figures': {}}, failed, failed, [EVIL] * len(images)
    )
    (tmp_path / 'index.html').write_text(text, encoding='utf-8')
    opened = new_page(browser)
    opened.goto((tmp_path / 'index.html').as_uri())
    opened.locator('.open').first.click()
    for place in ('#detail-name', '#detail-verdict', '#detail-command'):
        assert EVIL in opened.locator(place).inner_text()
    assert opened.locator('img[onerror]').count() == 0
    assert opened.title() != '1'
    opened.close()


def test_a_thousand_images(browser, batch, tmp_path):
    content, images = json.loads((batch / 'summary.json').read_text()), images_of(batch)
    entries = [
        {**images[k % 3], 'image': f'image_{k}', 'attribution_ratio': (37 * k) % 1000}
        for k in range(1000)
    ]
    text = report_html(entries, {**content['summary'], 'figures': {}}, [], [], ['python'] * 1000)
    assert len(text) < 20e6
    (tmp_path / 'index.html').write_text(text, encoding='utf-8')
    opened = new_page(browser)
    opened.goto((tmp_path / 'index.html').as_uri(), wait_until='domcontentloaded')
    opened.locator('th[data-key="1"] button').click()
    assert opened.locator('#images .open').first.inner_text() == 'image_0'
    opened.locator('th[data-key="name"] button').click()
    assert opened.locator('#images .open').nth(10).inner_text() == 'image_10'  # not image_108
    lazy = opened.evaluate("document.querySelectorAll('#images img[loading=lazy]').length")
    assert lazy == 1000
    opened.close()


def test_pages_and_pictures_that_were_left_out(browser, batch, tmp_path, monkeypatch):
    results = tmp_path / 'results'
    shutil.copytree(batch, results)
    for path in results.glob('*/*.png'):
        path.unlink()
    monkeypatch.setattr(summary, 'PAGE_LENGTH', 2)
    table, defaults = read_table(results / 'summary.csv'), Settings().record()
    result = summary.result_of(table, results)
    summary.write_summary(table, result, defaults, defaults, results)
    opened = new_page(browser)
    opened.goto((results / 'index.html').as_uri())
    assert opened.locator('#images .open').count() == 2 and opened.locator('h2').count() > 1
    opened.locator('nav a').first.click()
    assert opened.url.endswith('index_2.html') and opened.locator('#images .open').count() == 1
    assert opened.locator('[aria-current=page]').first.inner_text() == '2'
    opened.locator('.open').first.click()
    for place in ('#detail-slider', '#detail-attribution', '#detail-channels'):
        assert not opened.locator(place).is_visible()
    assert opened.locator('#detail-figures tr').count() > 10
    opened.close()
    monkeypatch.setattr(summary, 'PAGE_LENGTH', 500)
    summary.write_summary(table, result, defaults, defaults, results)
    assert not (results / 'index_2.html').exists()


@pytest.mark.parametrize('width', [360, 1100])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_fits_the_window_in_both_schemes(page, width, scheme):
    page.set_viewport_size({'width': width, 'height': 700})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.locator('.open').first.click()
    assert page.evaluate("document.getElementById('detail').scrollWidth") <= width
    background = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (background == 'rgb(255, 255, 255)') == (scheme == 'light')
