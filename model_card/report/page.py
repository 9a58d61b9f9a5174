"""`report.html` of folders of records: curves, samples, items, prompts, and the card's tables, in one file that makes
no request. Same records, same bytes.

    python -m llama_lite report runs/demo
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from .. import records as card_records
from ..card import SECTIONS, section_texts
from ..facts import Facts
from ..formatting import number
from ..metadata import CardError
from ..private import redact
from .curves import run_curves
from .evaluations import evaluation_page
from .studies import is_study, read_study

TEMPLATES = Path(__file__).resolve().parent.parent / "templates" / "report"
SCRIPTS = ("page.js", "chart.js", "curves.js", "samples.js", "scores.js", "items.js", "variants.js", "start.js")
NAME = "report.html"
LINES = 20_000  # log lines of all runs on a page
MOST_BYTES = 3_000_000  # of a page: with more, fewer log lines
SHOWN_ABOVE = ("use", "checkpoints", "samples", "citation")  # sections of a card that a page has no use for, or shows
KINDS = {
    "pretrain": "Pretraining run",
    "adapter": "Tuning run (LoRA)",
    "tuned": "Tuning run (all weights)",
    "merged": "Merged model",
    "evaluation": "Evaluation",
    "study": "Study",
}


def write_report(folders: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one or more folders, over each other; returns its path. Raises CardError.

    folders: of runs, evaluations or studies. output: the file; by default report.html in the folder, or beside several.
    """
    folders = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    path = Path(output) if output else (folders[0] if len(folders) == 1 else _beside(folders[0])) / NAME
    lines = LINES
    text = render(folders, lines)
    while len(text.encode()) > MOST_BYTES and lines > 1000:
        lines //= 2
        text = render(folders, lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _beside(folder: Path) -> Path:
    """The nearest folder above one of records that has no records, and so no page, of its own."""
    above = (folder if folder.name else folder.resolve()).parent
    return _beside(above) if any((above / name).exists() for name in ("run.json", "study.json")) else above


def write_report_or_reason(folder: Path) -> str:
    """Where the page of a folder now is, or why there is none: for scripts whose work is done, page or not."""
    try:
        return str(write_report(folder))
    except CardError as error:
        return f"not written: {error}"
    except Exception as error:  # a record of another kind, a full disk: the work itself is done, and stays
        reason = " ".join(str(error).split())[:300]
        return f"not written: {type(error).__name__}: {reason}. `python -m llama_lite report {folder}` makes it again."


def render(folders: list[Path], lines: int = LINES) -> str:
    """The page's text. lines: log lines of all runs that are kept at most. Raises CardError."""
    parts = [_part(folder, max(lines // len(folders), 100)) for folder in folders]
    evaluations = _distinct(parts)
    data = redact(
        {
            "runs": [part["curves"] | {"name": part["name"]} for part in parts if "curves" in part]
            + [arm for part in parts for arm in part.get("arms", [])],
            "evaluations": evaluations,
            "differences": [row for part in parts for row in part.get("differences", [])],
        }
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    return environment.get_template("page.html").render(
        title=redact(", ".join(part["name"] for part in parts)),
        parts=redact([{name: part[name] for name in ("name", "kind", "about", "glance")} for part in parts]),
        tables=[Markup(redact(part["tables"])) for part in parts],
        data=data,
        json=Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")),
        style=Markup(_read("uplot/uPlot.min.css") + _read("page.css")),
        uplot=Markup(_read("uplot/uPlot.iife.min.js")),
        uplot_license=Markup(_read("uplot/LICENSE")),
        script=Markup("\n".join(map(_read, SCRIPTS))),
    )


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _part(folder: Path, lines: int) -> dict:
    """What the page holds of one folder: {name, kind, about, glance, tables} and curves or arms, evaluations,
    differences.
    """
    if is_study(folder):
        study = read_study(folder, lines)
        return {
            "name": study["title"],
            "kind": KINDS["study"],
            "about": _paragraph(study["text"]),
            "glance": [],
            "tables": _html(study["text"], study["title"]),
            "arms": study["arms"],
            "differences": study["differences"],
            "evaluations": [],
        }
    if not (folder / "run.json").exists() and not (folder / "manifest.json").exists() and folder.name != "merged":
        raise CardError(
            f"{folder} holds no records: give the folder of a run, of an evaluation or of a finished study."
        )
    records = card_records.read(folder)
    if records.kind == "tokens":
        raise CardError(f"{folder} holds prepared tokens: give a folder of a run, of an evaluation or of a study.")
    repo = next((row["repo"] for row in reversed(records.published)), None)
    facts = Facts(records, repo, {})
    head, *tables = section_texts(facts, ["head", *(name for name in SECTIONS if name not in SHOWN_ABOVE)])
    part = {
        "name": facts.title,
        "kind": KINDS[records.kind],
        "about": _paragraph(head.partition("\n")[2]),
        "glance": facts.glance(),
        "tables": _html("\n\n".join(tables), facts.title),
        "evaluations": [(evaluation.scores, evaluation_page(facts, evaluation)) for evaluation in records.evaluations],
    }
    return part if records.kind == "evaluation" else part | {"curves": run_curves(records, lines)}


def _distinct(parts: list[dict]) -> list[dict]:
    """The evaluations of all folders: one whose scores another has already is left out (of an evaluation's own folder
    and a run's copy, the first).
    """
    found: list[tuple] = []
    for part in parts:
        found += [pair for pair in part["evaluations"] if pair[0] not in [scores for scores, _ in found]]
    return [page for _, page in found]


def _paragraph(text: str) -> str:
    """The first paragraph of a Markdown text, without its marks."""
    first = next((block for block in text.strip().split("\n\n") if not block.startswith(("#", "|", "!"))), "")
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", first).replace("`", "").replace("\n", " ")


def _html(text: str, name: str) -> str:
    """Markdown as HTML, one level of headings deeper; tables can be scrolled, and a badge, whose image would be loaded
    from elsewhere, is a link of its words. name: what the tables are of.
    """
    from markdown_it import MarkdownIt  # here: where it is missing, the page is not written, and the run is finished

    text = re.sub(r'\[<img [^>]*\balt="([^"]*)"[^>]*>\]\(', r"[\1](", text)
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    html = re.sub(
        r"<p>&lt;details&gt;&lt;summary&gt;(.*?)&lt;/summary&gt;</p>", r"<details><summary>\1</summary>", html
    )
    html = html.replace("<p>&lt;/details&gt;</p>", "</details>")
    html = re.sub(r"<(/?)h([1-4])>", lambda match: f"<{match[1]}h{int(match[2]) + 1}>", html)
    html = html.replace("<th></th>", "<td></td>").replace("</table>", "</table></div>")
    numbers = itertools.count(1)
    scroll = '<div class="scroll" tabindex="0" role="region" aria-label="table {} of {}"><table>'
    return re.sub("<table>", lambda match: scroll.format(next(numbers), escape(name)), html)
