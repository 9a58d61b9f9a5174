"""The README is short, ordered, and links each claim to its evidence; runs stop and continue as it says."""

import re

import pytest
from helpers import ROOT, config_file, launch

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.encode()) <= 10_240


def test_it_says_what_a_newcomer_needs_in_order():
    headings = re.findall(r"^## (.+)$", re.sub(r"```.*?```", "", README, flags=re.S), re.M)
    assert headings == [
        "Install",
        "Two commands to start with",
        "The four scripts",
        "What you can trust",
        "Further reading",
    ]
    first = README.split("\n\n")[1]
    assert first.count(". ") + first.count(".\n") + first.endswith(".") == 2, "what it is, in two sentences"
    assert README.index("(benchmarks/demo/training.png)") < README.index("## Install")


def test_each_script_has_an_example():
    section = README.split("## The four scripts")[1].split("\n## ")[0]
    lines = re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines()
    assert [re.search(r"run_\w+\.py", line)[0] for line in lines] == [
        "run_pretrain.py",
        "run_sft.py",
        "run_eval.py",
        "run_study.py",
    ]


def test_at_most_eight_claims_each_with_its_evidence():
    rows = [line for line in README.split("## What you can trust")[1].splitlines() if line.startswith("| ")][2:]
    assert 5 <= len(rows) <= 8 and all(re.search(r"\(docs/evidence\.md#[\w-]+\) \|$", row) for row in rows)


@pytest.mark.usefixtures("undrawn")
def test_the_stated_way_to_stop_and_go_on_works(settings, whole_run, tmp_path):
    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "run"), max_steps=4)
    short = launch("--config", str(path))
    assert (
        short.returncode == 0 and short.stdout.count("WARNING   that is worse than the counts of single tokens") == 1
    )  # 4 steps
    result = launch("--config", str(path), "--max_steps", "6", "--allow_changes", "max_steps")
    assert result.returncode == 0 and "start     step 4" in result.stdout
