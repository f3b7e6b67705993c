"""A learner's evening in a real browser: run, explore, answer, reveal, rate, come back; fail, be told why, solve."""

import re

import pytest

from minillm.study.checker import fill
from minillm.study.exercise import load_exercise

pytestmark = pytest.mark.browser
FLASH = "work/attention/flash.ipynb"
SOURCE = "(id) => window.panel.content.widgets.find(cell => cell.model.id === id).model.sharedModel.getSource()"


def test_an_evening_with_flash_attention(page):
    page.open(FLASH)
    page.run_all()
    tab = page.page

    explore = tab.locator(".minillm-explore")
    page.show("explore-tiles")
    picture, caption = explore.locator("img"), explore.locator(".minillm-caption")
    before, words = picture.get_attribute("src"), caption.inner_text()
    explore.locator(".noUi-handle").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("([i, s]) => i.src !== s", arg=[picture.element_handle(), before])
    assert caption.inner_text() != words
    page.shot("explore", explore)
    tab.set_viewport_size({"width": 1280, "height": 960})
    page.show("explore-tiles")
    page.shot("screenshot")  # the picture in the READMEs: copied from artifacts/ to tests/browser/ by hand
    tab.set_viewport_size({"width": 1280, "height": 1900})

    card = tab.locator(".minillm-app", has=tab.locator("textarea")).first
    page.show("card")
    assert "FlashAttention" in card.inner_text()
    card.locator("textarea").fill("Tiles, a running maximum, one division at the end.")
    answer = card.locator(".minillm-answer")
    assert not answer.is_visible()
    card.get_by_role("button", name="Show the answer").click()
    answer.get_by_text("online softmax").first.wait_for()
    card.locator("input[type=checkbox]").nth(1).check()
    page.shot("card-revealed", card)
    card.get_by_role("button", name=re.compile("^中文$")).click()
    answer.get_by_text("详答").wait_for()
    page.shot("card-chinese", card)
    card.get_by_role("button", name=re.compile("^English$")).click()
    card.get_by_role("button", name=re.compile("^Good")).click()
    card.get_by_text(re.compile("[Nn]ext review")).first.wait_for()
    page.shot("card-rated", card)

    page.reload(FLASH)
    page.run_cell("begin")
    page.run_cell("card")
    card = tab.locator(".minillm-app", has=tab.locator("textarea")).first
    card.locator("[role=status]", has_text="Good").wait_for()
    assert re.search("[Nn]ext review", card.inner_text())
    assert card.locator("textarea").input_value().startswith("Tiles, a running maximum")


def test_an_exercise_failed_diagnosed_reset_restored_and_solved(page):
    exercise = load_exercise("attention/flash")
    page.open(FLASH)
    tab = page.page
    wrong = next(w for w in exercise.wrong if w.name == "output not rescaled")
    mine = fill(exercise, wrong)
    stub = page.read("exercise")
    page.write("exercise", f"{stub.splitlines()[0]}\n{mine}")
    page.run_cell("exercise")
    page.run_cell("check")
    verdict = tab.locator(".minillm-app", has=tab.get_by_role("button", name="Reset to the stub"))
    verdict.get_by_text(wrong.diagnosis[:40]).first.wait_for()
    page.show("check")
    page.shot("check-failed", verdict)

    verdict.get_by_role("button", name="Hint").click()
    verdict.get_by_text(exercise.hints[0]).first.wait_for()
    verdict.get_by_role("button", name="Reset to the stub").click()
    tab.wait_for_function("([r, id, s]) => eval(r)(id).trim() === s.trim()", arg=[SOURCE, "exercise", stub])
    verdict.get_by_role("button", name="Restore earlier code").click()
    tab.wait_for_function("([r, id, s]) => eval(r)(id).includes(s)", arg=[SOURCE, "exercise", wrong.replace])

    page.write("exercise", f"{stub.splitlines()[0]}\n{fill(exercise)}")
    page.run_cell("exercise")
    page.run_cell("check")
    tab.get_by_text(re.compile("attention/flash: passed")).first.wait_for()
    page.shot("check-passed", verdict)


def test_the_start_page_knows_what_was_done(page):
    page.open("work/start.ipynb")
    page.run_all()
    overview = page.page.locator(".minillm-app").first
    overview.get_by_text("attention/flash").first.wait_for()
    page.shot("start")
    overview.get_by_role("link", name=re.compile("FlashAttention")).first.click()
    page.page.wait_for_function("document.title.includes('flash')")
