"""Markdown of answer files as HTML for notebooks."""

import json
import os

import pytest

from minillm.study.markup import anchor, to_html


def inline(text, **more):
    return to_html(text, "attention", inline=True, **more)


@pytest.mark.parametrize(
    "formula", ["$a_i*b_j*c_k$", "$$\\sum_i e^{x_i}\\\\ [1](2)$$", "$x$", "$\\$5 * _y_$", "$[a](b)$"]
)
def test_a_formula_passes_unchanged(formula):
    assert inline(f"is *{formula}* so") == f"is <em>{formula}</em> so"


def test_a_formula_is_escaped_for_html_only():
    assert inline("$a<b & c$") == "$a&lt;b &amp; c$"


@pytest.mark.parametrize("text", ["$5 and $6", "costs \\$5 and 6$", "a $ b", "$$", "$ x $", "$5 for `a$b`", "5$-6$7"])
def test_a_dollar_that_is_money_opens_no_formula(text):
    html = inline(text).replace("<code>a$b</code>", "")
    assert "$" not in html.replace("<span>$</span>", "")


def test_dollars_in_code_stay_code():
    assert inline("`$a_b$ < $c$`") == "<code>$a_b$ &lt; $c$</code>"
    assert "<code" in to_html("```python\nx = '$a$' # *b*\n```", "attention")


def test_html_in_an_answer_is_text():
    assert inline("<script>alert(1)</script>") == "&lt;script&gt;alert(1)&lt;/script&gt;"


@pytest.mark.parametrize(
    ("url", "href"),
    [
        ("../../notebooks/attention/flash.ipynb#Where-it-hurts", "flash.ipynb#Where-it-hurts"),
        ("../../notebooks/position/rope.ipynb", "../position/rope.ipynb"),
        ("gqa.md", "../../answers/attention/gqa.md"),
        ("../position/rope.zh.md", "../../answers/position/rope.zh.md"),
        ("../../minillm/attention/flash.py", "../../minillm/attention/flash.py"),
        ("#here", "#here"),
    ],
)
def test_links_lead_from_the_notebook_of_the_area(url, href):
    assert inline(f"[x]({url})") == f'<a href="{href}">x</a>'


def test_links_to_the_web_open_a_new_tab():
    assert inline("[x](https://a.org/b?c=1&d=2)") == (
        '<a href="https://a.org/b?c=1&amp;d=2" target="_blank" rel="noopener">x</a>'
    )


def test_links_from_the_start_page():
    assert anchor("notebooks/attention/flash.ipynb", "x") == '<a href="attention/flash.ipynb">x</a>'
    assert anchor("answers/a/b.md", "x") == '<a href="../answers/a/b.md">x</a>'


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A Jupyter server whose root is tmp_path/root, and a kernel of it in root/work/attention."""
    here = tmp_path / "root" / "work" / "attention"
    here.mkdir(parents=True)
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    (runtime / "jpserver-77.json").write_text(json.dumps({"root_dir": str(tmp_path / "root")}), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("JPY_PARENT_PID", "77")
    monkeypatch.chdir(here)
    return here


def test_links_in_widgets_name_the_file_on_the_server(served):
    html = inline("[x](../../notebooks/attention/flash.ipynb#Idea)", live=True)
    assert 'data-commandlinker-command="rendermime:handle-local-link"' in html
    assert "{&quot;path&quot;: &quot;work/attention/flash.ipynb&quot;, &quot;id&quot;: &quot;#Idea&quot;}" in html
    assert 'href="flash.ipynb#Idea"' in html


def test_links_that_leave_the_server_stay_plain(served):
    os.chdir(served.parents[2])  # above the root
    assert inline("[x](gqa.md)", live=True) == '<a href="../../answers/attention/gqa.md">x</a>'


def test_links_without_a_server_stay_plain(served, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(served))
    assert inline("[x](gqa.md)", live=True) == '<a href="../../answers/attention/gqa.md">x</a>'


def test_the_kernels_own_server_counts_then_the_newest_that_has_the_file(served, monkeypatch):
    runtime = served.parents[2] / "runtime"
    for number, folder in ((1, served.parent), (2, served)):
        record = runtime / f"jpserver-{number}.json"
        record.write_text(json.dumps({"root_dir": str(folder)}), encoding="utf-8")
        os.utime(record, (2e9 + number, 2e9 + number))  # newer than the kernel's own
    (runtime / "jpserver-9.json").write_text("{ half a file", encoding="utf-8")
    assert "&quot;work/attention/flash.ipynb&quot;" in inline("[x](../../notebooks/attention/flash.ipynb)", live=True)
    monkeypatch.setenv("JPY_PARENT_PID", "78")
    assert "&quot;flash.ipynb&quot;" in inline("[x](../../notebooks/attention/flash.ipynb)", live=True)
    assert "&quot;position/rope.ipynb&quot;" in inline("[x](../../notebooks/position/rope.ipynb)", live=True)


def test_saved_output_never_names_a_server(served):
    assert inline("[x](gqa.md)") == '<a href="../../answers/attention/gqa.md">x</a>'


def test_a_line_break_between_chinese_letters_is_no_space():
    assert inline("分块\n计算，\n合并") == "分块计算，合并"
    assert inline("two\nwords 和\nkey") == "two\nwords 和\nkey"
    assert inline("结束。\n[链接](https://a.org)").startswith("结束。\n<a")
