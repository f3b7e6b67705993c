"""The buttons below a verdict: hint, reset, restore. They change the exercise cell of the open page with one click.

The page is changed by the page: the cell's editor is found by the marker in its first line. What stands there is sent
to the kernel, which keeps it before it answers with the text that takes its place. Where there is no such editor (VS
Code, a cell that is not drawn) the text is shown in a box to copy from.
"""

from typing import Any

import anywidget
import ipywidgets as widgets
import traitlets

from minillm.study import parts, workspace
from minillm.study.checker import hint
from minillm.study.exercise import ExerciseError, load_stub, marker
from minillm.study.store import StoreError

SCRIPT = """
function find(element, marker) {
  const nodes = (element.closest(".jp-Notebook") ?? document).querySelectorAll(".cm-content");
  const views = [...nodes].map((node) => node.cmTile?.view ?? node.cmView?.view);
  const found = views.filter((view) => view && view.state.doc.toString().split("\\n").includes(marker));
  return found.length === 1 ? found[0] : null;
}

function render({ model, el }) {
  const id = Math.random().toString(36).slice(2);
  const row = document.createElement("div");
  const said = document.createElement("div");
  row.className = "minillm-buttons";
  said.setAttribute("role", "status");
  el.setAttribute("data-lm-suppress-shortcuts", "true");
  el.append(row, said);

  const say = (text, kind) => {
    if (kind !== "hint") said.replaceChildren(...said.querySelectorAll(".minillm-hint"));
    else said.querySelectorAll(":not(.minillm-hint)").forEach((node) => node.remove());
    const line = document.createElement("div");
    line.className = `minillm-${kind}`;
    line.textContent = text;
    said.append(line);
  };

  const show = (code) => {
    const box = document.createElement("textarea");
    const copy = document.createElement("button");
    box.readOnly = true;
    box.value = code;
    box.rows = Math.min(24, code.split("\\n").length + 1);
    copy.textContent = "Copy";
    copy.className = "jupyter-button widget-button";
    copy.addEventListener("click", async () => {
      box.select();
      try {
        await navigator.clipboard.writeText(code);
      } catch {
        document.execCommand("copy");  // a page that is not served over https
      }
      copy.textContent = "Copied";
    });
    said.append(box, copy);
  };

  const replace = ({ code, sent, text }) => {
    const view = find(el, model.get("marker"));
    if (!view) {
      say("The exercise cell is not in reach here. Copy this into it:", "quiet");
      show(code);
    } else if (view.state.doc.toString() !== sent) {
      say("The exercise cell has changed meanwhile: nothing was replaced. Press the button again.", "error");
    } else {
      view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: code } });
      say(text, "good");
    }
  };

  const press = (kind) => {
    const view = find(el, model.get("marker"));
    say("Waiting for the kernel ...", "quiet");
    model.send({ kind, id, text: view ? view.state.doc.toString() : null });
  };

  for (const [kind, name] of Object.entries(model.get("buttons"))) {
    const button = document.createElement("button");
    button.textContent = name;
    button.className = "jupyter-button widget-button";
    button.addEventListener("click", () => press(kind));
    row.append(button);
  }

  const receive = (message) => {
    if (message.id !== id) return;
    if (message.code === undefined) say(message.text, message.kind);
    else replace(message);
  };
  model.on("msg:custom", receive);
  return () => model.off("msg:custom", receive);
}

export default { render };
"""

STYLE = """
.minillm-buttons { display: flex; flex-wrap: wrap; gap: 8px; margin: 8px 0 4px; }
.minillm-app .minillm-buttons .jupyter-button { width: auto; }
.minillm-hint { margin: 2px 0; white-space: pre-line; }
.minillm-app textarea[readonly] {
  display: block; box-sizing: border-box; width: 100%; margin: 4px 0; white-space: pre; tab-size: 4;
  font-family: var(--jp-code-font-family, monospace); font-size: var(--jp-code-font-size, 13px);
  color: var(--jp-content-font-color1, #222); background: var(--jp-layout-color2, #eee);
}
"""


class Buttons(anywidget.AnyWidget):
    """Hint, reset and restore for the exercise of one question, in the page that shows it."""

    _esm = SCRIPT
    _css = STYLE
    marker = traitlets.Unicode().tag(sync=True)
    buttons = traitlets.Dict().tag(sync=True)

    def __init__(self, question: str, hints: int) -> None:
        names = {"hint": "Hint", "reset": "Reset to the stub", "restore": "Restore earlier code"}
        if not hints:
            del names["hint"]
        super().__init__(marker=marker(question), buttons=names)
        self.question = question
        self.on_msg(self._receive)

    def answer(self, kind: str, text: str | None) -> dict[str, Any]:
        """What the page does after a press: say `text`, or put `code` in the place of the text it `sent`.

        The text that will be replaced is kept before this returns; StoreError if it could not be.
        """
        if kind == "hint":
            return {"kind": "hint", "text": str(hint(self.question))}
        stub = load_stub(self.question).rstrip("\n")
        codes = workspace.kept(self.question, stub)
        if kind == "restore" and not any(code != (text or "").rstrip() for code in codes):
            return {"kind": "quiet", "text": "There is no earlier code of yours."}
        if text is not None:
            workspace.keep(self.question, text, stub)
        if kind == "reset":
            told = "This is the stub again. Your code is kept: restore brings it back."
            return {"code": stub, "sent": text, "text": told}
        told = "This is your earlier code. Press again for what came before it."
        return {"code": _before(codes, text), "sent": text, "text": told}

    def _receive(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        try:
            answer = self.answer(message["kind"], message["text"])
        except (StoreError, ExerciseError, OSError) as error:
            answer = {"kind": "error", "text": f"Nothing was changed: {error}"}
        self.send(answer | {"id": message["id"]})


def _before(codes: list[str], text: str | None) -> str:
    """The code that is one older than `text`; the last one if that is new or the stub, and behind the oldest."""
    present = (text or "").rstrip()
    return codes[codes.index(present) - 1] if present in codes else codes[-1]


def panel(question: str, plain: str, html: str, hints: int) -> dict[str, Any]:
    """The output of a cell: the verdict with the buttons below it; without a kernel, the verdict alone."""
    return parts.bundle(parts.app(widgets.HTML(html), Buttons(question, hints)), plain, html)
