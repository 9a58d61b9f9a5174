"""`--record` keeps times, processor and output of the demo, and the pages show lines of them."""

import json
import re
import shutil
import signal
import sys

import pytest
from helpers import ROOT

from benchmarks import render_demo
from llama_lite.commands import demo
from llama_lite.provenance import processor

PAGE = """It runs (here on a slow machine):

```text
demo      prepare the text and pretrain, about 9 s, then evaluate, about 1 s; about 10 s on this machine
    ...
chosen    fused_loss       True      as before
step 10/900  loss 9.9999  grad 1.00
    ...
step 900/900  validation 9.9999  9.9999 bits/byte

took      evaluate 9 s; in all 9 s
```

So, in float32, validation ends 9.99 nats below bigram counts.
"""
PRINTED = """chosen    precision        bfloat16  native
chosen    fused_loss       True      faster here
step 10/900  loss 8.2509  grad 1.11
step 900/900  loss 4.0000  grad 1.00
step 900/900  validation 4.2565  1.8931 bits/byte"""


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Run a demo of two small stages in `tmp_path` with --record NAME; its terminal's text and benchmarks/demo.json."""
    (tmp_path / "demo").mkdir()
    stages = [("prepare the text and pretrain", f"print({PRINTED!r})"), ("evaluate", "print('scores')")]
    commands = [(what, [sys.executable, "-c", code]) for what, code in stages]
    for module in (demo, render_demo):
        monkeypatch.setattr(module, "MEASURED", tmp_path / "demo.json")
        monkeypatch.setattr(module, "TERMINAL", tmp_path / "demo/terminal.txt")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "stages", lambda name: commands)
    monkeypatch.setattr(demo, "work_seconds", lambda: 0.1)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(name: str) -> tuple[str, dict]:
        monkeypatch.setattr(sys, "argv", ["demo", "--record", name])
        demo.main()
        return (tmp_path / "demo/terminal.txt").read_text(), json.loads((tmp_path / "demo.json").read_text())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_recorded_demo_keeps_its_processor_and_what_it_showed(record, tmp_path, capsys):
    older = {"stages": [1.0, 2.0], "work_seconds": 0.1, "parts": {}}
    (tmp_path / "demo.json").write_text(json.dumps({"demo": {"older": older}}))
    terminal, measured = record("mine")
    entry = measured["demo"].pop("mine")
    assert measured == {"demo": {"older": older}} and entry["processor"] == processor() and len(entry["stages"]) == 2
    assert entry["shown"]["first"] == (
        "demo      prepare the text and pretrain, about 1 s, then evaluate, about 2 s; about 3 s on this machine, if it"
        " has nothing else to do"
    )
    assert entry["shown"]["took"].startswith("took      prepare the text and pretrain 0 s, evaluate 0 s; in all ")
    printed = capsys.readouterr().out
    assert re.search(r"\nstage     2 of 2: evaluate, about \d+ s \(67% of the demo\)\n", printed)
    assert PRINTED in terminal and "\nscores\n" in terminal and printed == terminal
    assert render_demo.recorded(terminal) == entry


def test_what_an_earlier_demo_left_is_refused_with_record(record, tmp_path, capsys):
    """Its times would be those of a demo that goes on."""
    (tmp_path / "runs/demo-sft").mkdir(parents=True)
    (tmp_path / "data/demo").mkdir(parents=True)
    with pytest.raises(SystemExit):
        record("mine")
    assert "remove data/demo, runs/demo-sft first" in capsys.readouterr().err and not (tmp_path / "demo.json").exists()


def test_pages_show_the_lines_of_the_recorded_demo(record, tmp_path):
    terminal, measured = record("mine")
    for name in ("log.jsonl", "data.json", "before_after.json"):
        shutil.copyfile(ROOT / "benchmarks/demo" / name, tmp_path / "demo" / name)
    page = render_demo.placed(PAGE, tmp_path / "demo")
    entry = measured["demo"]["mine"]
    lines = [line for line in page.split("```")[1].splitlines()[1:] if line.strip(" .")]
    assert set(lines) <= set(terminal.splitlines()) and [lines[0], lines[-1]] == list(entry["shown"].values())
    assert "True      faster here" in page and "step 900/900  validation 4.2565" in page and "9.9999" not in page
    assert page.startswith(f"It runs (here on {render_demo.processor_in_words(entry['processor'])}):")
    assert re.search(r"\nSo, in bfloat16, validation ends 0\.\d\d nats below bigram counts\.\n$", page)
    assert render_demo.placed(page, tmp_path / "demo") == page
    with pytest.raises(ValueError, match="no line like these: \\['step 20/900"):
        render_demo.placed(PAGE.replace("step 10/900", "step 20/900"), tmp_path / "demo")


@pytest.mark.parametrize(
    "recorded, words",
    [
        ("AMD EPYC (AuthenticAMD 26/2/1)", "AMD EPYC, Zen 5"),
        ("AMD EPYC (AuthenticAMD 25/1/1)", "AMD EPYC, Zen 3"),
        ("Intel(R) Xeon(R) Processor (GenuineIntel 6/207/2)", "Intel Xeon, Emerald Rapids"),
        ("a processor (None)", "a processor"),
    ],
)
def test_a_processor_in_words(recorded, words):
    assert render_demo.processor_in_words(recorded) == words
