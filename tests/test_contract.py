"""What holds for every question and every module: nothing is missing, nothing is left over, links lead somewhere,
code depends one way, and numbers in answers are true."""

import ast
import doctest
import importlib
import re
import statistics
from functools import cache
from itertools import pairwise
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from markdown_it import MarkdownIt

from minillm.study.answer_file import doctests
from minillm.study.exercise import load_exercise
from minillm.study.paths import ANSWERS, NOTEBOOKS, ROOT
from minillm.study.registry import AREAS, load_questions

TESTS = ROOT / "tests"
PACKAGE = ROOT / "minillm"
LANGUAGES = {"en": ".md", "zh": ".zh.md"}
LABELS = ("Idea", "Cost", "Paper", "Production", "Leaves out")
QUESTIONS = load_questions()
MODULES = sorted(p for area in AREAS for p in (PACKAGE / area).glob("*.py") if p.stem != "__init__")
PAGES = sorted([*ROOT.glob("README*.md"), *ANSWERS.rglob("*.md"), *NOTEBOOKS.rglob("*.ipynb")])


def named(paths):
    """The paths with readable test ids."""
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def files(folder, *patterns):
    """Files below a folder that are content: no caches, no checkpoints."""
    found = {path for pattern in patterns for path in folder.rglob(pattern)}
    return sorted(p for p in found if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts))


@cache
def cells(path):
    """The cells of a notebook."""
    return nbformat.read(path, as_version=4).cells


def code(path):
    """A notebook's code as one text, without lines for IPython."""
    lines = [line for cell in cells(path) if cell.cell_type == "code" for line in cell.source.splitlines()]
    return "\n".join(line for line in lines if not re.match(r"\s*[%!]", line))


def imports(source, inside=""):
    """The modules that a source text imports, `from a import b` as a and a.b; `inside` is its own package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def dotted(path):
    """The import name of a file: minillm.attention.flash."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def module_imports(path):
    """The modules that a file of the repository imports."""
    return imports(path.read_text(encoding="utf-8"), dotted(path.parent))


# The ring: each question has all its parts


@pytest.mark.parametrize("id", QUESTIONS)
def test_a_question_has_all_its_parts(id):
    question = QUESTIONS[id]
    area, topic = id.split("/")
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in [
            *(ANSWERS / f"{id}{end}" for end in LANGUAGES.values()),
            ANSWERS / f"{id}.py",
            NOTEBOOKS / f"{id}.ipynb",
            TESTS / area / f"test_{topic}.py",
            *(PACKAGE / f"{module}.py" for module in question.modules),
        ]
        if not path.is_file()
    ]
    assert not missing
    assert question.modules
    assert set(question.answers) == set(LANGUAGES)


@pytest.mark.parametrize("id", QUESTIONS)
def test_the_notebook_imports_the_module(id):
    wanted = "minillm." + QUESTIONS[id].modules[0].replace("/", ".")
    assert wanted in imports(code(NOTEBOOKS / f"{id}.ipynb"))


@pytest.mark.parametrize("id", QUESTIONS)
def test_the_notebook_names_its_question_in_its_calls(id):
    """begin, card, check, review: a notebook made from another one must not record under the other's name."""
    calls = [n for n in ast.walk(ast.parse(code(NOTEBOOKS / f"{id}.ipynb"))) if isinstance(n, ast.Call)]
    about = {}
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in ("begin", "card", "check", "review") and call.args and isinstance(call.args[0], ast.Constant):
            about[name] = call.args[0].value
    assert about == dict.fromkeys(("begin", "card", "check", "review"), id)


@pytest.mark.parametrize("id", QUESTIONS)
def test_the_exercise_stands_in_the_notebook(id):
    exercise = load_exercise(id)
    stubs = [c.source for c in cells(NOTEBOOKS / f"{id}.ipynb") if "exercise" in c.metadata.get("tags", [])]
    assert [stub.strip() for stub in stubs] == [exercise.stub.strip()]
    assert exercise.question == id
    assert exercise.module in QUESTIONS[id].modules


# Nothing left over


def test_there_are_no_answers_or_notebooks_of_no_question():
    known = {f"{id}{end}" for id in QUESTIONS for end in (*LANGUAGES.values(), ".py")}
    assert {p.relative_to(ANSWERS).as_posix() for p in files(ANSWERS, "*") if p.is_file()} == known
    known = {f"{id}.ipynb" for id in QUESTIONS} | {"start.ipynb"}
    assert {p.relative_to(NOTEBOOKS).as_posix() for p in files(NOTEBOOKS, "*") if p.is_file()} == known


def test_every_module_serves_a_question_or_has_its_own_tests():
    serving = {PACKAGE / f"{module}.py" for question in QUESTIONS.values() for module in question.modules}
    orphans = [p for p in MODULES if p not in serving and not (TESTS / p.parent.name / f"test_{p.stem}.py").exists()]
    assert orphans == []


def test_every_test_file_of_an_area_tests_a_module_of_that_area():
    for area in AREAS:
        for path in files(TESTS / area, "test_*.py"):
            used = module_imports(path)
            assert any(name.startswith(f"minillm.{area}.") for name in used), f"{path} imports nothing of {area}"


def test_folders_are_the_areas():
    assert {p.name for p in ANSWERS.iterdir() if p.is_dir()} <= set(AREAS)
    assert {p.name for p in NOTEBOOKS.iterdir() if p.is_dir()} <= {*AREAS, ".ipynb_checkpoints"}
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir()} <= {*AREAS, "study", "__pycache__"}
    assert {p.name for p in TESTS.iterdir() if p.is_dir()} <= {*AREAS, "study", "browser", "__pycache__"}


# Links


@cache
def links(path):
    """The targets of links and pictures in a page: Markdown, a notebook's Markdown cells, HTML in either."""
    if path.suffix == ".ipynb":
        text = "\n\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")
    else:
        text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        for part in [token, *(token.children or [])]:
            found += [str(part.attrs[name]) for name in ("href", "src") if name in part.attrs]
            if part.type in ("html_inline", "html_block"):
                found += re.findall(r"(?:href|src)=[\"']([^\"']+)", part.content)
    return found


@cache
def anchors(path):
    """The fragments that lead somewhere in a page: as JupyterLab makes them, and in Markdown also as GitHub does."""
    texts = [c.source for c in cells(path) if c.cell_type == "markdown"] if path.suffix == ".ipynb" else None
    found = set()
    for text in texts if texts is not None else [path.read_text(encoding="utf-8")]:
        tokens = MarkdownIt("commonmark").parse(text)
        for token, inline in pairwise(tokens):
            if token.type == "heading_open":
                shown = "".join(part.content for part in inline.children or [])
                found.add(shown.replace(" ", "-"))
                if path.suffix == ".md":
                    found.add(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return found


def broken(page, link):
    """What is wrong with a link of a page, empty if nothing is. Web addresses are checked for form only."""
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        if "." not in parts.netloc or re.search(r"\s", unquote(link)):
            return "no web address"
        if parts.netloc.endswith("arxiv.org") and not re.fullmatch(r"/(abs|pdf)/\d{4}\.\d{4,5}(v\d+)?", parts.path):
            return "no arXiv address"
        return ""
    if parts.scheme or parts.netloc or parts.path.startswith("/"):
        return "neither a web address nor a relative path"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_relative_to(ROOT):
        return "leads out of the repository"
    if not target.exists():
        return "there is no such file"
    fragment = unquote(parts.fragment)
    if not fragment:
        return ""
    if target.suffix in (".md", ".ipynb"):
        return "" if fragment in anchors(target) else "there is no such heading"
    lines = re.fullmatch(r"L(\d+)(?:-L(\d+))?", fragment)
    length = len(target.read_text(encoding="utf-8").splitlines()) if lines and target.is_file() else 0
    return "" if lines and int(lines[2] or lines[1]) <= length else "there is no such line"


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    wrong = {link: broken(page, link) for link in links(page)}
    assert {link: why for link, why in wrong.items() if why} == {}


@pytest.mark.parametrize("id", QUESTIONS)
@pytest.mark.parametrize("end", LANGUAGES.values())
def test_an_answer_links_its_notebook(id, end):
    topic = id.split("/")[1]
    assert any(f"/{topic}.ipynb#" in link for link in links(ANSWERS / f"{id}{end}"))


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("https://arxiv.org/abs/2205.14135", ""),
        ("https://arxiv.org/abs/220514135", "no arXiv address"),
        ("https://nowhere", "no web address"),
        ("page.md#two-words", ""),
        ("page.md#Two-words", ""),
        ("page.md#three-words", "there is no such heading"),
        ("#Two-words", ""),
        ("other.md", "there is no such file"),
        ("/page.md", "neither a web address nor a relative path"),
        ("code.py#L2", ""),
        ("code.py#L3", "there is no such line"),
        ("../../../../../outside.md", "leads out of the repository"),
    ],
)
def test_broken_links_are_found(tmp_path, monkeypatch, link, why):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# Two words\n", encoding="utf-8")
    (tmp_path / "code.py").write_text("a\nb\n", encoding="utf-8")
    assert broken(page, link) == why


# Notebooks


@pytest.mark.parametrize("id", QUESTIONS)
def test_a_notebook_has_the_size_to_be_studied_in_one_sitting(id):
    """The design's 25-35 cells and 600-1,000 words, with room for a topic that needs it; nb.py limits single cells."""
    book = cells(NOTEBOOKS / f"{id}.ipynb")
    words = sum(len(cell.source.split()) for cell in book if cell.cell_type == "markdown")
    lines = [len([x for x in c.source.splitlines() if x.strip()]) for c in book if c.cell_type == "code"]
    assert 20 <= len(book) <= 45
    assert 500 <= words <= 1300
    assert statistics.median(lines) <= 5


@pytest.mark.parametrize("path", named(files(NOTEBOOKS, "*.ipynb")))
def test_a_notebook_defines_no_long_function(path):
    """Teaching code is imported; the exercise's stub is the learner's own."""
    kept = [c for c in cells(path) if c.cell_type == "code" and "exercise" not in c.metadata.get("tags", [])]
    for cell in kept:
        for node in ast.walk(ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", cell.source))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 8, f"{cell.id} defines {node.name} with more than 8 lines"


# Layers


@pytest.mark.parametrize("path", named(p for p in files(PACKAGE, "*.py") if p.stem != "__init__"))
def test_imports_go_down(path):
    """Reference modules know nothing of the app, and an area nothing of the areas after it."""
    place = path.relative_to(PACKAGE).parts
    if place[0] == "study" or place == ("__main__.py",):
        return
    used = {name.split(".")[1] for name in module_imports(path) if name.startswith("minillm.")}
    allowed = AREAS[: AREAS.index(place[0]) + 1] if len(place) > 1 else ()
    assert used & {*AREAS, "study", "__main__"} <= set(allowed)


@pytest.mark.parametrize("path", named(files(PACKAGE, "__init__.py")))
def test_packages_hold_a_docstring_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [p for p in files(ROOT / "minillm", "*.py") if p.stem in drawers] == []


@pytest.mark.parametrize("path", named(MODULES))
def test_a_module_has_the_header(path):
    header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert tuple(re.findall(rf"^({'|'.join(LABELS)}):\s+\S", header, re.MULTILINE)) == LABELS


# Numbers


def run_examples(source, name, path, names):
    """What doctest says of the examples in a text; (failed, tried, report)."""
    test = doctest.DocTestParser().get_doctest(source, names, name, str(path), 0)
    report = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return failed, tried, "".join(report)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("id", QUESTIONS)
def test_the_numbers_of_an_answer_are_true(id, language):
    numbers = QUESTIONS[id].answers[language].numbers
    failed, tried, report = run_examples("\n".join(doctests(numbers)), f"{id} ({language})", ANSWERS / id, {})
    assert tried
    assert not failed, report


@pytest.mark.parametrize("path", named(MODULES))
def test_the_examples_of_a_module_are_true(path):
    if path.stem.endswith("_triton"):
        pytest.importorskip("triton", reason="Triton exists for Linux only")
    module = importlib.import_module(dotted(path))
    tried = 0
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        report = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert not result.failed, "".join(report)
        tried += result.attempted
    assert tried == path.read_text(encoding="utf-8").count(">>> "), "doctest did not find every example"


@pytest.mark.parametrize("id", QUESTIONS)
def test_a_question_shows_an_example_in_a_docstring(id):
    sources = [(PACKAGE / f"{module}.py").read_text(encoding="utf-8") for module in QUESTIONS[id].modules]
    assert any(">>> " in source for source in sources)
