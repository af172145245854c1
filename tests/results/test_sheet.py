"""The layout of a page of panels: nothing runs into anything else, whatever the image's shape."""

import pytest

from igseg.results.sheet import LINE, TITLE, TREND, SheetLayout, Texts

LONG = 'a long sentence that says what was explained and how exact it is, and goes on ' * 3
SHAPES = [(480, 640), (640, 480), (100, 1000), (1000, 100), (64, 64), (1, 5000)]


def layout_of(
    size: tuple[int, int], panels: int = 6, trend: bool = True, warning: str = ''
) -> SheetLayout:
    return SheetLayout.of(
        size, panels, (1, panels - 1), Texts('a' * 200, [LONG, LONG], warning), trend
    )


@pytest.mark.parametrize('size', SHAPES)
@pytest.mark.parametrize('panels', [1, 2, 4, 6, 12])
def test_panels_have_room_for_title_and_bar_and_stay_on_the_page(size, panels):
    page = layout_of(size, max(panels, 2))
    width, height = page.panel
    for x, y in page.places:
        assert x >= 0 and x + width <= page.width + 1e-9
        assert page.bottom <= y and y + height + TITLE < page.height
    for k, (x, y) in enumerate(page.places):
        for other_x, other_y in page.places[k + 1 :]:
            beside = abs(x - other_x) >= page.cell
            assert beside or abs(y - other_y) >= height + TITLE


def test_panels_have_the_shape_of_the_image():
    width, height = layout_of((480, 640)).panel
    assert width / height == pytest.approx(640 / 480)


@pytest.mark.parametrize(('size', 'columns'), [((100, 200), 2), ((100, 100), 3), ((100, 50), 6)])
def test_wide_images_stand_in_few_columns_and_tall_ones_in_many(size, columns):
    assert len({x for x, _ in layout_of(size).places}) == columns


def test_the_caption_leaves_the_corner_to_the_trend():
    plain, cornered = layout_of((480, 640), trend=False), layout_of((480, 640))
    assert plain.centre == plain.width / 2
    assert cornered.centre == pytest.approx((cornered.width - TREND[0]) / 2)
    lengths = [max(map(len, p.texts.caption.splitlines())) for p in (plain, cornered)]
    assert lengths[0] > lengths[1]
    assert cornered.bottom > TREND[1]


def test_a_warning_makes_room_for_itself():
    plain = layout_of((480, 640), trend=False)
    warned = layout_of((480, 640), trend=False, warning=LONG)
    lines = warned.texts.warning.count('\n') + 1
    assert warned.bottom - plain.bottom == pytest.approx(lines * LINE)
    assert warned.height - plain.height == pytest.approx(lines * LINE)
