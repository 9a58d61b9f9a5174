"""README, docs/ and CONTRIBUTING: commands are parsed, snippets run, paths, links and anchors exist, figures are the
measured ones."""

import importlib.util
import itertools
import json
import re
import shlex
import statistics
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from benchmarks import table
from llama_lite.commands import chat, export
from llama_lite.config.eval import parse_eval
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.config.sft import parse_sft
from llama_lite.config.study import parse_study
from llama_lite.errors import Refusal

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
TODAY = {name: text for name, text in PAGES.items() if name != "CHANGELOG.md"}  # whose names are those of today
COMMANDS = [
    (name, line.split("  #")[0].strip())
    for name, text in TODAY.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in block.splitlines()
    if line.strip()
]
PARSERS = {
    "run_pretrain.py": parse_pretrain,
    "run_sft.py": parse_sft,
    "run_eval.py": parse_eval,
    "run_study.py": parse_study,
}
SMALL_COMMANDS = {"chat": chat.parse, "export": export.parse}  # of `python -m llama_lite`
SNIPPETS = [
    (name, snippet) for name, text in TODAY.items() for snippet in re.findall(r"```python\n(.*?)```", text, re.S)
]
PROGRAMS = {"hf", "pip", "pre-commit", "ray", "ruff", "transformers"}  # commands of packages: not checked further
ROOTS = ("configs/", "benchmarks/", "llama_lite/", "tests/", "model_card/", "docs/")
OLD_UNITS = re.compile(r"\b(nats|tokens|bytes|items|FLOPs?|seconds) a (token|second|byte|step)\b")


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def without_code(text: str) -> str:
    """A page without any code: blocks and spans."""
    return re.sub(r"(`+).+?\1", "", prose(text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", prose(text), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(
            next(name for number in itertools.count() if (name := f"{slug}-{number}" if number else slug) not in found)
        )
    return found


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(script, its arguments) of a command that runs one of the four scripts, also by Slurm; else None."""
    if "sbatch" in words:
        job = next(index for index, word in enumerate(words) if word.endswith(".sbatch"))
        chosen = [word.removeprefix("SCRIPT=") for word in words if word.startswith("SCRIPT=")]
        lines = [line for line in (ROOT / words[job]).read_text().splitlines() if not line.startswith("#")]
        return (chosen or re.findall(r"run_\w+\.py", "\n".join(lines)))[0], words[job + 1 :]
    for index, word in enumerate(words):
        if word in PARSERS:
            return word, words[index + 1 :]
    return None


def is_there(module: str) -> bool:
    """Whether Python finds a module on its path.

    `importlib.util.find_spec("pip")` would ask setuptools' finder first, which replaces distutils for whoever looks for
    pip (Python 3.11), and torch compiles nothing in that process from then on.
    """
    return bool(importlib.util.find_spec(module) if "." in module else PathFinder.find_spec(module))


def check_command(command: str, suggested: Path) -> None:
    """Raise if a command names a script, argument, target, module or path that does not exist.

    suggested: the file that replaces mine.yaml.
    """
    words = shlex.split(command)
    for word in words:
        if word.startswith(ROOTS) or re.fullmatch(r"requirements[\w-]*\.txt", word):
            assert (ROOT / word).exists(), word
    if found := script_of(words):
        script, argv = found
        if argv[:2] == ["--config", "mine.yaml"]:
            argv = ["--config", str(suggested)]
        if "--help" not in argv:
            PARSERS[script](argv)
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert targets and all(
            re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets
        ), targets
    elif re.fullmatch(r"(\.venv/bin/)?python3?", words[0]) and words[1] == "-m":
        assert is_there(words[2]), words[2]
        if words[2] == "llama_lite" and words[3] in SMALL_COMMANDS:
            SMALL_COMMANDS[words[3]](words[4:])
    else:
        assert words[0] in PROGRAMS, f"unknown command: {words[0]}"


@pytest.mark.parametrize("page, command", COMMANDS)
def test_each_command_is_understood(page, command, tmp_path):
    suggested = tmp_path / "mine.yaml"
    suggested.write_text("dataset: mytext/\nhours: 2\n")
    check_command(command, suggested)


def test_pages_show_commands():
    assert {name for name, _ in COMMANDS} >= {
        "README.md",
        "CONTRIBUTING.md",
        "docs/getting-started.md",
        "docs/hub.md",
    } and len(COMMANDS) > 50
    assert {"make demo", "make test"} <= {command for _, command in COMMANDS}


@pytest.mark.parametrize(
    "command, word",
    [
        ("python run_pretrain.py --max_step 3", "max_step"),
        ("accelerate launch --config_file configs/accelerate/ddp2.yaml run_sft.py", "ddp2"),
        ("RUN=runs/a sbatch configs/slurm/pretrain.sbatch --max_step 3", "max_step"),
        ("make dmo", "dmo"),
        ("python -m model_kard runs/demo", "model_kard"),
        ("python -m pytest tests/test_no.py", "test_no"),
        ("python -m llama_lite export runs/demo --dtype q4", "q4"),
        ("lama run", "lama"),
    ],
)
def test_a_wrong_command_is_found(command, word, tmp_path):
    with pytest.raises((AssertionError, Refusal), match=word):
        check_command(command, tmp_path)


def test_looking_for_pip_replaces_no_module(tmp_path):
    importlib.import_module("setuptools")  # brings its distutils
    before = dict(sys.modules)
    check_command("python -m pip install torch", tmp_path)
    assert [name for name, module in before.items() if sys.modules.get(name) is not module] == []


@pytest.mark.parametrize("page", TODAY)
def test_every_path_is_there(page):
    named = re.findall(r"`([\w.-]+(?:/[\w.*-]*)*)`", prose(TODAY[page]))
    paths = {path for path in named if path.startswith(ROOTS)}
    assert sorted(path for path in paths if not any(ROOT.glob(path.rstrip("/")))) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_anchor_resolves(page):
    for link in links(PAGES[page]):
        if re.match(r"https://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_in_the_index():
    index = {link.partition("#")[0] for link in links(PAGES["docs/README.md"])}
    assert {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")} - {"README.md"} <= index


def test_anchors_are_those_of_github():
    text = "# A `b_c`, (d)\n\n## On\n\n```bash\n# not one\n```\n\n## On\n\n## The [Hub](x.md), and more\n"
    assert anchors(text) == {"a-b_c-d", "on", "on-1", "the-hub-and-more"}
    assert links("[a](b.md#c) `[x](no.md)` ![d](e.png)\n```text\n[y](no.md)\n```\n") == ["b.md#c", "e.png"]


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_its_columns(page):
    """GitHub divides a row at every bar, also inside code, unless a backslash precedes it."""
    for rows in re.findall(r"(?:^\|.*\|\n)+", prose(PAGES[page]), re.M):
        counts = [len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()]
        assert [row for row, count in zip(rows.splitlines(), counts, strict=True) if count != counts[0]] == []


@pytest.mark.parametrize("page", PAGES)
def test_units_say_per(page):
    assert [match[0] for match in OLD_UNITS.finditer(PAGES[page])] == []


def test_the_tables_are_what_was_measured():
    for name, text in TODAY.items():
        assert table.placed(text) == text, f"{name}: python -m benchmarks.table"
    for mark in table.PARTS:
        assert sum(text.count(mark) for text in TODAY.values()) == 1, mark


def test_the_figures_are_what_was_measured():
    names = "kill outage resume prepare evaluate suggest demo audit removal trace llama_cpp prepare_on_ray".split()
    kill, outage, resume, prepare, evaluate, suggest, demo, *counted = map(table.read, names)
    audit, removal, trace, llama_cpp, on_ray = counted
    mixture, page, chat = table.read("mixture"), table.read("report")["made_up"], table.read("chat")["merged"]
    minutes = {name: sum(machine["stages"]) / 60 for name, machine in demo["demo"].items()}
    processors = {name: table.processor_in_words(machine["processor"]) for name, machine in demo["demo"].items()}
    hours = [run["of_the_hours"] for run in suggest["time"]]
    late, revisions, ids = resume["late"], evaluate["many_revisions"], prepare["ids"]
    one_gb, small = resume["save_1_gb"], resume["save_100_mb"]
    slow_disk, indexed, traced = one_gb["background"]["slow_disk"], prepare["index"], trace["scale"]
    asked = (evaluate["choices_demo"], evaluate["choices_smollm2_135m"])
    choices = [measured["times_faster_than_the_best_batch_size"] for measured in asked]
    opened, seconds = prepare["scale"]["opened"], prepare["seconds"]
    to_map = statistics.median(seconds["datasets_map"]) / statistics.median(seconds["ours"])
    evaluations = (json.loads(line) for line in (ROOT / "benchmarks/demo/log.jsonl").read_text().splitlines())
    last = [entry for entry in evaluations if "eval_loss" in entry][-1]
    shown = f"step {last['step']}/900 validation {last['eval_loss']:.4f} {last['eval_bits_per_byte']:.4f} bits/byte"
    tuned = json.loads((ROOT / "benchmarks/demo/before_after.json").read_text())
    both = [
        f"{kill['equal']} of {kill['runs']}, bit for bit",
        f"{outage['runs'] - len(outage['wrong'])} of {outage['runs']} runs",
        f"{audit['honest']['verdicts']['equal, bit for bit']} of {audit['honest']['segments']} honest segments equal bit",
        f"{audit['forged']['found']} of {audit['forged']['forgeries']} forgeries found",
        f"{removal['equal']} of {removal['lists']} ",
    ]
    bigram = json.loads((ROOT / "benchmarks/demo/data.json").read_text())["baselines"]["bigram"]
    evidence = [
        f"{kill['writing']['equal']} of {kill['writing']['runs']} end bit for bit",
        f"{prepare['speed_a_core_to_plain_on_all_cores']:.2f}x with two workers",
        f"{prepare['speed_of_one_worker_to_plain']:.2f}x with one",
        f"{revisions['times_faster_than_commands']:.0f}x",
        "{equal} of {prompts} greedy texts".format(**llama_cpp["demo"]["formats"]["float32"]["greedy"]),
        f"{ids['equal_gpt2']:,} of {ids['documents']:,} documents",
        f"{to_map:.1f}x `datasets.map`",
        f"{opened['seconds']:.2f} s, {opened['peak_mib']} MiB",
        f"{prepare['peak_memory_mib_at_1000_mb']} MiB at 1 GB of text",
        f"{prepare['peak_memory_mib_at_50_mb']} MiB at 50 MB",
        f"first batch after {late['step 39000']['seconds']:.1f} s; a start at step 0, which times the machine, takes"
        f" {late['step 0']['seconds']:.1f} s and {-late['later_by']['mib']:.0f} MiB more",
        f"{_than_trainer(one_gb['seconds'])} at 1 GB of state",
        f"{_than_trainer(small['seconds'])} at 100 MB",
        f"{one_gb['probe_seconds']:.2f} s and {small['probe_seconds']:.2f} s",
        f"{one_gb['background']['blocked_over_copy_and_probe']:.2f} times as long as for the copy",
        f"{small['background']['blocked_over_copy_and_probe']:.2f} times at 100 MB",
        f"{one_gb['background']['blocked_and_slowdown_over_waiting']:.2f} times as long as a save that training waits for",
        f"{small['background']['blocked_and_slowdown_over_waiting']:.2f} times at 100 MB, on two cores",
        f"{slow_disk['step_seconds']:.3f} s beside {one_gb['background']['step_alone_seconds']:.3f} s",
        f"an audit took {audit['cost']['ratio']:.2f} times as long",
        f"{indexed['workers_1']['slower_percent']} % longer with one worker",
        f"{indexed['workers_2']['slower_percent']} % with two",
        f"{on_ray['speed']['ratio_to_here']:.2f} times as long as two processes here",
        f"{evaluate['processes']['times_faster']:.2f}x faster than with one",
        f"after {chat['first_answer_to_transformers']:.2f} times the time",
        f"within {traced['step']['seconds']:.2f} s and {traced['document']['seconds']:.2f} s",
        f"{revisions['times_faster_than_simple_evaluate']:.0f}x faster than ten documented",
        f"{revisions['times_faster_than_shared_task_objects']:.1f}x faster than ten with shared",
        f"{choices[0]:.2f}x the items per second",
        f"{choices[1]:.2f}x for SmolLM2-135M",
        f"{min(hours):.2f} to {max(hours):.2f} of the requested time",
        f"of {trace['passages']['planted']:,} passages",
        f"{trace['passages']['right_reads']:,} were found",
        f"{on_ray['small']['equal']} of {on_ray['small']['texts']} texts",
        f"at most {max(row['more'] for row in mixture['microseconds_per_window']):.2f} µs more",
        f"{trace['scan']['median_megabytes_per_second'] / 1000:.1f} GB of tokens per second",
        f"the slowest {trace['scan']['slowest_megabytes_per_second'] / 1000:.1f} ",
        f"made in {page['made_seconds']:.2f} s, drawn in headless Chromium in {page['drawn_seconds']:.2f} s",
        f"the longest task while zooming and hovering took {page['longest_task_ms']} ms",
        f"{minutes['AVX2']:.1f} minutes with AVX2 ({processors['AVX2']}), {minutes['AVX512']:.1f} with AVX512"
        f" ({processors['AVX512']}), both in float32",
        f"{bigram - last['eval_loss']:.2f} nats below bigram counts",
    ]
    starting = [
        shown,
        f"{minutes['AVX2']:.0f} minutes on two cores with AVX2 ({processors['AVX2']}), and {minutes['AVX512']:.0f} minutes"
        f" with AVX512 ({processors['AVX512']};",
    ]
    stated = {
        "README.md": [*both, *starting, "{right_reads:,} of {planted:,} planted".format(**trace["passages"])],
        "docs/evidence.md": both + evidence,
        "docs/getting-started.md": starting,
        "docs/instruction-tuning.md": [
            f"{row['before']:.3f} {row['after']:.3f} {row['difference']['value']:+.3f}"
            for row in (tuned["answer_loss"], tuned["end_of_text_loss"])
        ],
        "docs/hub.md": [f"a step took {outage['step_time_publishing_to_not']:.2f}x the time"],
    }
    words = {page: " ".join(PAGES[page].split()) for page in stated}
    missing = [(page, figure) for page, figures in stated.items() for figure in figures if figure not in words[page]]
    assert missing == []


def _than_trainer(seconds: dict[str, list[float]]) -> str:
    """The median difference of pairs in words: how much less or more time ours took."""
    pairs = zip(seconds["ours"], seconds["trainer_and_fsync"], strict=True)
    difference = statistics.median(ours - theirs for ours, theirs in pairs)
    return f"{abs(difference):.2f} s {'less' if difference < 0 else 'more'}"


@pytest.mark.parametrize("page, snippet", SNIPPETS)
def test_python_snippets_run(page, snippet, whole_run, whole_sft, base):
    """The snippets that open finished runs, on tiny ones."""
    folder = base if "runs/demo-sft" in snippet else whole_run
    exec(snippet.replace("runs/demo-sft", str(whole_sft)).replace("runs/demo", str(folder)), {})


def test_pages_show_snippets():
    assert {name for name, _ in SNIPPETS} == {
        "README.md",
        "docs/getting-started.md",
        "docs/pretraining.md",
        "docs/instruction-tuning.md",
    }


def test_the_changelog_names_modules_that_are_there():
    tables = PAGES["CHANGELOG.md"].split("## Module names")[1]
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| `")]
    new = {path for row in rows for cell in row[1:] for path in re.findall(r"`(llama_lite/[\w/]+\.py)`", cell)}
    assert len(rows) > 80 and sorted(path for path in new if not (ROOT / path).is_file()) == []


def test_an_installation_takes_the_pinned_requirements_and_every_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setup = project["tool"]["setuptools"]
    assert project["project"]["dynamic"] == ["dependencies"] and setup["dynamic"]["dependencies"]["file"] == [
        "requirements.txt"
    ]
    assert setup["packages"]["find"] == {"include": ["llama_lite*", "model_card*"], "namespaces": False}
    sources = [
        path
        for name in ("llama_lite", "model_card")
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    data = {
        path
        for name, patterns in setup["package-data"].items()
        for pattern in patterns
        for path in (ROOT / name).glob(pattern)
    }
    assert {path for path in sources if path.suffix != ".py"} == data
    assert [path for path in sources if path.suffix == ".py" and not (path.parent / "__init__.py").exists()] == []


def test_the_citation_and_the_hooks_are_read():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert citation["version"] == version and citation["references"][0]["url"] == "https://arxiv.org/abs/2412.13335"
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [(repo["repo"], [hook["language"] for hook in repo["hooks"]]) for repo in hooks] == [
        ("local", ["system", "system"])
    ]
    assert all(hook["entry"].startswith("ruff ") for repo in hooks for hook in repo["hooks"]), json.dumps(hooks)
