"""A learner's evening in a real browser: run, explore, answer, reveal, rate, come back; fail, be told why, solve."""

import re

import pytest

from minillm.study.checker import fill
from minillm.study.exercise import load_exercise
from minillm.study.store import Store

pytestmark = pytest.mark.browser
FLASH = "work/attention/flash.ipynb"


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
    stub = page.read("exercise")
    mine = f"{stub.splitlines()[0]}\n{fill(exercise, wrong)}"
    page.write("exercise", mine)
    page.run_cell("exercise")
    page.run_cell("check")
    verdict = tab.locator(".minillm-app", has=tab.get_by_role("button", name="Reset to the stub"))
    verdict.get_by_text(wrong.diagnosis[:40]).first.wait_for()
    page.show("check")
    page.shot("check-failed", verdict)

    for hint in exercise.hints[:2]:  # one a press, and the earlier ones stay
        verdict.get_by_role("button", name="Hint").click()
        verdict.get_by_text(hint).wait_for()
    assert verdict.get_by_text(exercise.hints[0]).is_visible()
    verdict.get_by_role("button", name="Reset to the stub").click()
    verdict.get_by_text("This is the stub again.").wait_for()
    assert page.read("exercise").strip() == stub.strip()
    verdict.get_by_role("button", name="Restore earlier code").click()
    verdict.get_by_text("This is your earlier code.").wait_for()
    assert page.read("exercise").strip() == mine.strip()

    page.write("exercise", "gone = 1")  # without the line that marks the cell
    verdict.get_by_role("button", name="Reset to the stub").click()
    verdict.get_by_text("The exercise cell is not in reach here.").wait_for()
    assert verdict.locator("textarea").input_value().strip() == stub.strip()
    assert page.read("exercise") == "gone = 1"

    page.write("exercise", f"{stub.splitlines()[0]}\n{fill(exercise)}")
    page.run_cell("exercise")
    page.run_cell("check")
    tab.get_by_text(re.compile("attention/flash: passed")).first.wait_for()
    page.shot("check-passed", verdict)
    with Store(page.home / "study.db") as store:
        verdicts = [event.data["verdict"] for event in store.events("attempt", "attention/flash")]
    assert verdicts[0] == "failed"
    assert verdicts[-1] == "passed"


def test_the_start_page_knows_what_was_done(page):
    page.open("work/start.ipynb")
    page.run_all()
    overview = page.page.locator(".minillm-app").first
    overview.get_by_text("attention/flash").first.wait_for()
    page.shot("start")
    overview.get_by_role("link", name=re.compile("FlashAttention")).first.click()
    page.page.wait_for_function("document.title.includes('flash')")
