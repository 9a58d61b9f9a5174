"""The table of arguments: equal to the dataclasses, and enough to answer at once without torch and transformers."""

import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from llama_lite.commands import arguments as command
from llama_lite.config.arguments import TABLE, answer_early, help_text, load_script
from llama_lite.config.eval import parse_eval
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.config.sft import parse_sft
from llama_lite.errors import Refusal

PARSERS = {"run_pretrain.py": parse_pretrain, "run_sft.py": parse_sft, "run_eval.py": parse_eval}
SCRIPTS = [*PARSERS, "run_study.py"]
HEAVY = ["torch", "transformers", "trl", "peft", "datatrove", "datasets", "accelerate", "lm_eval"]

RUN_ALL = f"""
import contextlib, io, json, runpy, sys
answers = []
for argv in json.loads(sys.argv[2]):
    code, out, err, arguments = None, io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [arguments[1], *argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(arguments[1], run_name="__main__")
        except SystemExit as end:
            code = end.code
    sys.argv = arguments
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps([answers, sorted(set({HEAVY}) & set(sys.modules))]))
"""


@pytest.fixture(autouse=True)
def width(monkeypatch):
    """Help is as wide as the terminal."""
    monkeypatch.setenv("COLUMNS", "80")


def answers(script: str, *command_lines: list[str]) -> list[list]:
    """[exit status, standard output, standard error] of a script for each command line, all in one process that must
    not load the libraries.
    """
    argv = [sys.executable, "-c", RUN_ALL, str(ROOT / script), json.dumps(command_lines)]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    found, loaded = json.loads(result.stdout)
    assert loaded == []
    return found


def test_the_table_and_the_reference_are_those_of_the_dataclasses():
    again = "python -m llama_lite.commands.arguments"
    assert TABLE.read_text(encoding="utf-8") == command.table_text(), again
    assert command.REFERENCE.read_text(encoding="utf-8") == command.reference_text(), again


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_table_can_answer_loads_no_library(script, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("a: [1")
    help, everything, misspelt, twice, missing, unreadable = answers(
        script,
        ["--help"],
        ["--help_all"],
        ["--sed", "1", "--outputdir=x"],
        ["--seed", "1", "--seed=2"],
        ["--config", "nowhere.yaml"],
        ["--config", str(wrong)],
    )
    assert help == [0, help_text(load_script(script), False).rstrip() + "\n", ""]
    assert everything == [0, help_text(load_script(script), True).rstrip() + "\n", ""]
    assert [answer[:2] for answer in (misspelt, twice, missing, unreadable)] == [[2, ""]] * 4
    assert misspelt[2] == (
        "\nrefused: `--sed` on the command line is not an argument: did you mean `--seed`? `--outputdir` on the command"
        " line is not an argument: did you mean `--output_dir`?\n"
    )
    assert twice[2] == (
        "\nrefused: `--seed`: one argument, given 2 times: give it once (a list: with all its values).\n"
    )
    if script == "run_study.py":
        assert missing[2].startswith("\nrefused: --config nowhere.yaml: no study can be read from it (")
        assert unreadable[2].startswith(f"\nrefused: --config {wrong}: while parsing a flow sequence")
    else:
        assert missing[2].startswith("\nrefused: config file 'nowhere.yaml' does not exist; the ones shipped are ")
        assert unreadable[2].startswith(f"\nrefused: config file '{wrong}' is not readable YAML: while parsing")


@pytest.mark.parametrize("script", PARSERS)
@pytest.mark.parametrize(
    "argv, content",
    [
        (["--lr", "1e-3", "--max-stps=3"], "seed: 7\n"),
        (["--zzzzzzzzzz"], "learning_rte: 1\nblok_size: 2\nseed: many\nconfig: x\n5: 1\n"),
        (["--seed", "1", "--seed", "2"], "unknown: 1\n"),
        ([], "seed: [1]\noutput_dir: {a: b}\ndtype: float\nreport_to: 5\ndebug: [x]\n"),
        ([], "seed: 1\nseed: 2\n"),
        ([], "- a\n"),
        (["--config=b.yaml"], "seed: 1\n"),
    ],
)
def test_the_table_refuses_in_the_words_of_the_dataclasses(script, argv, content, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    argv = ["--config", str(tmp_path / "c.yaml"), *argv]
    if (script, content) == ("run_eval.py", "seed: 7\n"):
        argv += ["--no_limt"]
    with pytest.raises(Refusal) as early:
        answer_early(script, argv)
    with pytest.raises(Refusal) as late:
        PARSERS[script](argv)
    assert str(early.value) == str(late.value) and str(early.value)


@pytest.mark.parametrize("script", PARSERS)
def test_what_is_right_goes_on(script, tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1e2\noutput_dir: 010\n")
    assert answer_early(script, []) == []
    argv = [f"--config={tmp_path}/c.yaml", "--dry-run", "--output_dir", "x"]
    assert answer_early(script, argv) == argv


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_each_flag_once_and_own_arguments_first(script):
    table = load_script(script)
    own = [argument for argument in table.arguments if not argument.library]
    short, long = help_text(table, False), help_text(table, True)
    for text, arguments in ((short, own), (long, table.arguments)):
        entries = re.findall(r"^  (-{1,2}\w.*?)(?:  |$)", text.split("General:")[1], re.M)
        flags = [flag for entry in entries for flag in re.findall(r"(?<!\S)--?\w+", entry)]
        expected = [flag for argument in arguments for flag in argument.flags if "-" not in flag[2:]]
        assert sorted(flags) == sorted(expected)
    assert short.index("examples:") < short.index("General:")
    inherited = len(table.arguments) - len(own)
    assert inherited == {"run_pretrain.py": 87, "run_sft.py": 110}.get(script, 0)
    last = short.rstrip().splitlines()[-1]
    assert last.startswith(f"`{script} --help_all` also lists the {inherited} arguments inherited from ") == bool(
        inherited
    )
    assert long.index("--seed") < (long.index("--optim ") if inherited else len(long))


def test_help_shows_a_switch_beside_its_opposite_and_what_a_default_follows_from():
    text = help_text(load_script("run_pretrain.py"), False)
    assert "  --keep_memory, --no_keep_memory\n" in text and "--keep-memory" not in text
    words = " ".join(text.split())
    assert "--adam_beta2 FLOAT AdamW's beta2. (default: 0.95)" in words
    assert "--vocab_size INT" in text and "`--tokenizer train`. (default: derived from the size of the text)" in words
    assert "(default: None)" not in words
    tuned = " ".join(help_text(load_script("run_sft.py"), False).split())
    assert "(default: as many as are held out, up to 8)" in tuned
    everything = " ".join(help_text(load_script("run_pretrain.py"), True).split())
    assert (
        "--save_only_model Must stay False: a checkpoint without optimizer state cannot be resumed exactly."
        in everything
    )


def test_help_names_every_preset():
    presets = {path.parent.name for path in (ROOT / "configs/model").glob("*/config.json")}
    text = next(a.help for a in load_script("run_pretrain.py").arguments if a.name == "model_config")
    assert set(re.search(r"configs/model \((.*?)\)", text)[1].split(", ")) == presets


def test_the_parsers_themselves_print_the_same_help(capsys):
    for script, parse in PARSERS.items():
        with pytest.raises(SystemExit) as end:
            parse(["--max_steps", "3", "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out == help_text(load_script(script), False).rstrip() + "\n"
