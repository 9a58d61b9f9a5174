"""The README's commands are parsed or run, and every path that it names is there."""

import re
import shlex

import pytest
from helpers import ROOT, config_file, launch

from benchmarks import table
from llama_lite.config.eval import parse_eval
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.config.sft import parse_sft
from llama_lite.config.study import parse_study

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]


def test_there_are_commands():
    assert any(command.startswith("make demo") for command in COMMANDS) and len(COMMANDS) >= 5


PARSERS = {
    "run_pretrain.py": parse_pretrain,
    "run_sft.py": parse_sft,
    "run_eval.py": parse_eval,
    "run_study.py": parse_study,
}


@pytest.mark.parametrize("command", [c for c in COMMANDS if any(script in c for script in PARSERS)])
def test_each_command_is_understood(command):
    argv = shlex.split(command)
    script = next(word for word in argv if word in PARSERS)
    argv = argv[argv.index(script) + 1 :]
    if "--help" not in argv:
        PARSERS[script](argv)


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in {command.split()[1] for command in COMMANDS if command.startswith("make ")}:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_path_is_there():
    paths = set(re.findall(r"`((?:configs|benchmarks|llama_lite|tests|model_card|docs)/[\w./-]*)`", README)) | set(
        re.findall(r"\]\((?!http)([^)#]+)\)", README)
    )
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_tables_are_what_was_measured():
    assert table.placed(README) == README, "python -m benchmarks.table"


def test_python_snippets_run(whole_run, whole_sft, base):
    """The snippets that open finished runs, on tiny ones."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        folder = base if "runs/demo-sft" in snippet else whole_run
        exec(snippet.replace("runs/demo-sft", str(whole_sft)).replace("runs/demo", str(folder)), {})


def test_the_stated_way_to_stop_and_go_on_works(settings, whole_run, tmp_path):
    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "run"), max_steps=4)
    short = launch("--config", str(path))
    assert (
        short.returncode == 0 and short.stdout.count("WARNING   that is worse than the counts of single tokens") == 1
    )  # 4 steps
    result = launch("--config", str(path), "--max_steps", "6", "--allow_changes", "max_steps")
    assert result.returncode == 0 and "start     step 4" in result.stdout
