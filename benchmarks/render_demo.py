"""The committed records and figures of the demo, and what README and docs show of them.

    python -m llama_lite.commands.demo --record NAME    # the demo, from its beginning
    python -m benchmarks.render_demo                    # then this
    python -m benchmarks.table                          # and the tables of docs/

Copies logs and figures from runs/ to benchmarks/demo/, and writes into the pages: the lines of the terminal that they
show, the processor and the date, how far the validation loss ends below the bigram counts in which precision, and what
tuning changed.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from llama_lite.commands.demo import MEASURED, TERMINAL

ROOT = Path(__file__).resolve().parent.parent
RECORDS = {  # in benchmarks/demo: where the demo leaves it, in runs/
    "log.jsonl": "demo/log.jsonl",
    "data.json": "demo/data.json",
    "before_after.json": "demo-sft/before_after.json",
    "training.png": "demo/figures/training.png",
    "curation.png": "demo/figures/curation.png",
    "before_after.png": "demo-sft/figures/before_after.png",
    "trajectory.png": "demo-eval/figures/trajectory.png",
}
PAGES = ("README.md", "docs/getting-started.md", "docs/evidence.md", "docs/instruction-tuning.md")
GENERATIONS = {
    "AuthenticAMD 25/1/": "Zen 3",
    "AuthenticAMD 26/": "Zen 5",
    "GenuineIntel 6/143/": "Sapphire Rapids",
    "GenuineIntel 6/207/": "Emerald Rapids",
}
FIRST_SCREEN = re.compile(r"(?<=```text\n)demo {6}.*?(?=```)", re.DOTALL)
TUNED = re.compile(r"(?<=```text\n) +before +after\n.*?(?=```)", re.DOTALL)


def copy_records(runs: Path, folder: Path) -> None:
    """Copy the records of a finished demo. Raises FileNotFoundError."""
    for name, source in RECORDS.items():
        shutil.copyfile(runs / source, folder / name)


def recorded(terminal: str) -> dict:
    """The entry of benchmarks/demo.json that a terminal's text belongs to. Raises StopIteration where there is none."""
    machines, lines = json.loads(MEASURED.read_text(encoding="utf-8"))["demo"].values(), terminal.splitlines()
    return next(one for one in machines if "shown" in one and set(one["shown"].values()) <= set(lines))


def processor_in_words(processor: str) -> str:
    """`AMD EPYC (AuthenticAMD 26/2/1)` -> `AMD EPYC, Zen 5`; without the generation where it is not listed above."""
    name, generation = re.fullmatch(r"(.*) \((.*)\)", processor).groups()
    known = [word for begin, word in GENERATIONS.items() if generation.startswith(begin)]
    return ", ".join([name.replace("(R)", "").removesuffix(" Processor"), *known])


def kind_of(line: str) -> tuple[str, ...]:
    """What tells the lines of the terminal apart: `chosen precision`, `step 900/900 validation`, `data`."""
    words = line.split()
    if words[0] not in ("chosen", "stage", "step"):
        return tuple(words[:1])
    return tuple(words[:2]) + (("validation",) if words[2:3] == ["validation"] else ())


def screen(shown: str, terminal: str) -> str:
    """Lines that a page shows, as the terminal has them now. Raises ValueError for a line that it does not have."""
    found = {}
    for line in terminal.splitlines():
        if line.strip():
            found.setdefault(kind_of(line), line)
    lines = shown.splitlines()
    left = [line for line in lines if line.strip(" .") and kind_of(line) not in found]
    if left:
        raise ValueError(f"{TERMINAL} has no line like these: {left}")
    return "".join(f"{found[kind_of(line)] if line.strip(' .') else line}\n" for line in lines)


def below_bigram(log: list[dict], data: dict) -> float:
    """Nats between the last validation loss and that of the bigram counts."""
    return data["baselines"]["bigram"] - [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]


def placed(page: str, folder: Path = TERMINAL.parent) -> str:
    """A page's text with what it shows of the demo as the records in `folder` have it."""
    from llama_lite.evaluation.before_after import table

    terminal = (folder / TERMINAL.name).read_text(encoding="utf-8")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    data, tuned = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("data", "before_after")
    )
    entry = recorded(terminal)
    words, below = processor_in_words(entry["processor"]), below_bigram(log, data)
    precision = screen("chosen precision\n", terminal).split()[2]
    page = FIRST_SCREEN.sub(lambda match: screen(match[0], terminal), page)
    page = TUNED.sub(lambda match: f"{table(tuned)}\n", page)
    page = re.sub(r"\(here on [^)]*\)", f"(here on {words})", page)
    page = re.sub(
        r"(The output is shortened here\.).*?:\n",
        rf"\1 Its lines are those of `benchmarks/demo/terminal.txt` ({words}, {entry['date']}):\n",
        page,
        count=1,
        flags=re.DOTALL,
    )
    below = f"in {precision}, validation ends {below:.2f} nats below"
    return re.sub(r"in \w+, validation ends [\d.]+ nats below", below, page)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    copy_records(ROOT / "runs", TERMINAL.parent)
    pages = {ROOT / name: placed((ROOT / name).read_text(encoding="utf-8")) for name in PAGES}
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
