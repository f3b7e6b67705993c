"""Interactive figures, without a browser: controls are moved through `set` or as the browser moves them."""

from io import BytesIO

import ipywidgets as widgets
import pytest
from matplotlib.figure import Figure
from PIL import Image

from minillm.study import explore
from minillm.study.explore import Explore


def plot(height, *, width=3.0, color="C0"):
    figure = Figure(figsize=(width, 2))
    figure.subplots().plot([0, height], color=color)
    return figure


def draw(size=4, causal=False):
    return plot(size, color="C1" if causal else "C0"), f"size {size}, causal {causal}"


def pixels(shown):
    return Image.open(BytesIO(shown.png)).convert("RGB").tobytes()


def test_moving_a_control_draws_the_new_picture():
    shown = Explore(draw, size=(1, 9), causal=False)
    before = pixels(shown)
    shown.controls["causal"].value = True  # as the browser does
    assert shown.caption == "size 4, causal True"
    assert pixels(shown) != before
    shown.controls["causal"].value = False
    assert pixels(shown) == before


def test_set_moves_several_controls_and_draws_once():
    shown = Explore(draw, size=(1, 9), causal=False)
    count = shown.drawings
    shown.set(size=7, causal=True)
    assert shown.drawings == count + 1
    assert shown.values == {"size": 7, "causal": True}
    assert shown.caption == "size 7, causal True"


def test_set_of_what_is_shown_draws_nothing():
    shown = Explore(draw, size=(1, 9), causal=False)
    count = shown.drawings
    shown.set(size=4)
    assert shown.drawings == count


def test_set_refuses_a_name_that_is_no_control_and_moves_nothing():
    shown = Explore(draw, size=(1, 9))
    with pytest.raises(KeyError, match="depth"):
        shown.set(size=5, depth=3)
    assert shown.values == {"size": 4}


def test_changes_during_a_drawing_end_in_one_more_of_the_newest_values():
    drawn = []

    def slow(size=1):
        drawn.append(size)
        if size == 2:  # three more changes arrive while this one is drawn
            for newer in (3, 4, 5):
                shown.controls["size"].value = newer
        return plot(size), f"size {size}"

    shown = Explore(slow, size=(1, 9))
    drawn.clear()
    shown.controls["size"].value = 2
    assert drawn == [2, 5]
    assert shown.caption == "size 5"


def test_an_error_in_the_first_drawing_is_the_cells_error():
    with pytest.raises(ZeroDivisionError):
        Explore(lambda size: plot(1 / size), size=(0, 9))


def test_a_later_error_is_one_line_and_the_last_good_picture_stays():
    def picky(size=1):
        if size > 5:
            raise ValueError(f"size must be at most 5, got {size}\nsecond line")
        return plot(size), f"size {size}"

    shown = Explore(picky, size=(1, 9))
    good = shown.png
    shown.set(size=8)
    assert shown.error == "ValueError: size must be at most 5, got 8"
    assert "size must be at most 5, got 8" in shown._error.value
    assert (shown.png, shown.caption) == (good, "size 1")
    shown.set(size=2)
    assert (shown.error, shown._error.value, shown.caption) == ("", "", "size 2")


def test_the_error_line_shows_markup_as_text():
    def rude(size=1):
        if size == 2:
            raise ValueError("<img src=x>")
        return plot(size), "<b>"

    shown = Explore(rude, size=(1, 9))
    shown.set(size=2)
    assert "<img" not in shown._error.value
    assert "<b>" not in shown._caption.value


@pytest.mark.parametrize(
    ("kind", "widget", "start"),
    [
        ((2, 8), widgets.IntSlider, 2),
        ((2, 8, 3), widgets.IntSlider, 2),
        ((0.0, 1.0, 0.25), widgets.FloatSlider, 0.0),
        ((0, 1.5), widgets.FloatSlider, 0),
        ([16, 64, 256], widgets.SelectionSlider, 16),
        (["naive", "tiled"], widgets.Dropdown, "naive"),
        (True, widgets.Checkbox, True),
    ],
)
def test_controls_by_kind_and_where_they_start(kind, widget, start):
    shown = Explore(lambda value: plot(1), value=kind)
    assert type(shown.controls["value"]) is widget
    assert shown.values == {"value": start}


@pytest.mark.parametrize(("kind", "start"), [((1, 9), 4), ([1, 4, 9], 4), (widgets.IntSlider(value=5), 5)])
def test_a_control_starts_at_the_default_of_draw_unless_it_is_a_widget(kind, start):
    assert Explore(draw, size=kind).values == {"size": start}


@pytest.mark.parametrize("kind", [[], (1,), (1, 2, 3, 4), "abc", ("a", "b"), None, 3])
def test_other_controls_are_refused(kind):
    with pytest.raises(ValueError, match="control value must be"):
        Explore(lambda value: plot(1), value=kind)


def test_labels_are_the_names_in_words_unless_given():
    shown = Explore(lambda block_size, depth: plot(1), labels={"depth": "层数"}, block_size=(1, 9), depth=(1, 9))
    assert [control.description for control in shown.controls.values()] == ["block size", "层数"]


def test_the_description_of_a_widget_is_kept():
    shown = Explore(draw, size=widgets.IntSlider(value=2, description="size of it"))
    assert shown.controls["size"].description == "size of it"


def test_labels_for_no_control_are_refused():
    with pytest.raises(ValueError, match=r"labels must name controls \(size\), got sise"):
        Explore(draw, labels={"sise": "size"}, size=(1, 9))


@pytest.mark.parametrize(("seconds", "continuous"), [(0.01, True), (10.0, False)])
def test_a_slow_drawing_waits_until_the_slider_is_let_go(monkeypatch, seconds, continuous):
    clock = iter(range(100))
    monkeypatch.setattr(explore, "perf_counter", lambda: next(clock) * seconds)
    shown = Explore(draw, size=(1, 9), causal=False)
    assert shown.controls["size"].continuous_update is continuous


def test_one_slow_first_drawing_does_not_make_the_slider_slow(monkeypatch):
    clock = iter([0.0, 5.0, 5.0, 5.01])  # fonts are loaded in the first
    monkeypatch.setattr(explore, "perf_counter", lambda: next(clock))
    assert Explore(draw, size=(1, 9)).controls["size"].continuous_update


def test_saved_output_is_text_picture_and_view():
    shown = Explore(draw, size=(1, 9), causal=False)
    data, metadata = shown._repr_mimebundle_()
    assert data["text/plain"] == "size 4, causal False\nsize = 4, causal = False"
    assert data.keys() == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}
    assert metadata == {"image/png": {"width": 300}}  # 3 inches at 100 CSS pixels
    assert Explore(draw, size=(1, 9), causal=False)._repr_mimebundle_()[0]["image/png"] == data["image/png"]


def test_the_picture_is_sharp_small_and_of_fixed_width():
    shown = Explore(lambda size: plot(size, width=7.0), size=(1, 9))
    picture = Image.open(BytesIO(shown.png))
    assert picture.size == (1400, 400)
    assert shown._image.layout.width == "700px"
    assert picture.mode == "P"  # a palette, so 128 colours at most
    assert len(picture.getcolors()) <= explore.COLOURS
    shown.set(size=9)
    assert shown._image.layout.width == "700px"


def test_draw_may_return_a_figure_alone():
    assert Explore(lambda size: plot(size), size=(1, 9)).caption == ""


def test_something_else_than_a_figure_is_refused():
    with pytest.raises(TypeError, match="must return a matplotlib Figure, got list"):
        Explore(lambda size: [size], size=(1, 9))
