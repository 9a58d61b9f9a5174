"""Studies: what is refused, what is run again, what is compared; and a study that is killed gives the same results."""

import csv
import dataclasses
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forking
import pytest
import torch
import yaml
from helpers import ROOT, config_file, without_figures

import run_study
from llama_lite.config.pretrain import PretrainArguments
from llama_lite.errors import Refusal
from llama_lite.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from llama_lite.machine import hardware
from llama_lite.studies import analysis, cost, items, runner, spec
from model_card import study as report
from model_card.study import line_of
from run_study import main

STUDY = {
    "title": "A tiny study",
    "question": "Does it matter?",
    "script": "run_pretrain.py",
    "seeds": [1, 2],
    "prepare": ["run_study.py --help"],
    "reference": "whole",
    "measure": ["eval_loss", "embedded_science bits_per_byte"],
    "evaluate": {"tasks": ["embedded_science"], "limit": 8},
    "set": {
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
        "save_total_limit": 9,
        "eval_steps": 4,
        "sample_tokens": 0,
    },
    "arms": {
        "whole": {"about": "never stopped"},
        "everything": {"from": "whole", "at": [4]},
        "no_optimizer": {"from": "whole", "at": [4], "set": {"resume_without": "optimizer"}},
    },
}


PLANNED = {
    "margin": {"eval_loss": 5.0},
    "outcomes": {
        "first losses": {"metric": "loss", "take": "first", "steps": 2},
        "final loss": {"metric": "eval_loss", "margin": 0.5},
        "area": {"metric": "loss", "take": "area"},
    },
    "contrasts": {
        "moments": {"no_optimizer": 1, "everything": -1},
        "nothing": {"everything": 1, "whole": -1},
    },
    "primary": {"outcomes": ["first losses", "final loss"], "contrasts": ["moments"]},
}


@pytest.fixture(scope="module", autouse=True)
def forked():
    """The runs of a study are forks, whose cards have no figures."""
    with pytest.MonkeyPatch.context() as patch, without_figures():
        patch.setattr(runner, "run_logged", forking.run_logged)
        yield


@pytest.fixture
def study(settings, tmp_path):
    """Write a study file: `study(seeds=[1])` returns its path."""

    def write(name: str = "study", **changes) -> Path:
        path = tmp_path / f"{name}.yaml"
        base = config_file(tmp_path, settings)
        path.write_text(yaml.safe_dump({**STUDY, "config": str(base), **changes}, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="module")
def made(settings, tmp_path_factory) -> tuple[Path, Path]:
    """(study file, its folder) of the whole study."""
    folder = tmp_path_factory.mktemp("study")
    path = folder / "study.yaml"
    planned = {**STUDY, **PLANNED, "config": str(config_file(folder, settings))}
    path.write_text(yaml.safe_dump(planned, sort_keys=False))
    main(["--config", str(path), "--output_dir", str(folder / "out")])
    return path, folder / "out"


@pytest.mark.slow
def test_a_study_compares_its_arms_in_pairs(made):
    _, out = made
    rows = read_json(out / "comparison.json")
    found = {(row["arm"], row["what"]): row for row in rows}
    for measure, unit in (("eval_loss", "nats"), ("embedded_science bits_per_byte", "bits per byte")):
        same, lost = found["everything", measure], found["no_optimizer", measure]
        assert same["equal"] == 2 and same["seeds"] == [0.0, 0.0] and same["value"] == 0.0 and same["unit"] == unit
        assert (
            lost["equal"] == 0
            and lost["n"] == 2
            and lost["low"] < lost["value"] < lost["high"]
            and lost["against"] == "whole"
        )
    assert found["everything", "tokens until back"]["value"] == 0.0
    assert (
        f"<title>{read_json(out / 'study.json')['study']['title']}: report</title>" in (out / "report.html").read_text()
    )
    report = (out / "report.md").read_text()
    assert (
        "| everything at 4 | whole | eval_loss | +0.0000 nats |" in report
        and "everything at 4 and whole in 2 of 2 seeds" in report
    )
    assert (
        "## Health" not in report  # two evaluations show no trend
        and "resume_without" in report
        and "python run_study.py --help" in report
        and "/tmp" not in report.replace("/tmp/pytest", "")
    )
    assert all((out / "figures" / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "differences"))
    science = found["no_optimizer", "embedded_science bits_per_byte"]
    assert science["items"] >= 2 and found["no_optimizer", "eval_loss"]["items"] is None
    header, *lines = (out / "results.csv").read_text().splitlines()
    assert (
        header == "arm,at,seed,step,tokens,metric,value"
        and sum(",8," in line and ",eval_loss," in line for line in lines) == 6
    )
    assert sum("embedded_science bits_per_byte" in line for line in lines) == 6


@pytest.mark.slow
def test_a_planned_contrast_is_what_the_table_gives(made):
    """Of every seed, from results.csv; the primary ones are one family, and the others exploratory."""
    _, out = made
    with open(out / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def value(arm, seed, metric, steps):
        found = [
            r for r in rows if (r["arm"], r["seed"], r["metric"]) == (arm, seed, metric) and int(r["step"]) in steps
        ]
        return [float(r["value"]) for r in found]

    contrasts = {(row["outcome"], row["contrast"]): row for row in read_json(out / "contrasts.json")}
    assert len(contrasts) == 6 and sum(row["primary"] for row in contrasts.values()) == 2
    for seed in ("1", "2"):
        first, final, area = (contrasts[name, "moments"]["seeds"][seed] for name in PLANNED["outcomes"])
        lost, kept = (value(arm, seed, "loss", range(5, 9)) for arm in ("no_optimizer", "everything"))
        assert first == pytest.approx((sum(lost[:2]) - sum(kept[:2])) / 2)
        assert area == pytest.approx((sum(lost) - sum(kept)) * 1024 / 1e6)
        ends = [value(arm, seed, "eval_loss", [8]) for arm in ("no_optimizer", "everything")]
        assert final == pytest.approx(ends[0][0] - ends[1][0])
    assert contrasts["first losses", "moments"]["p_holm"] >= contrasts["first losses", "moments"]["p"]
    assert contrasts["final loss", "nothing"]["verdict"] == "the same for every seed"
    report = (out / "report.md").read_text()
    assert "## Primary contrasts" in report and "| final loss | moments |" in report.partition("## Exploratory")[0]


@pytest.mark.slow
def test_a_report_is_published(made, hub, capsys):
    from datasets import load_dataset
    from huggingface_hub import HfApi, hf_hub_download

    path, out = made
    for argv, message in (
        ([], "needs --hub_model_id owner/name, not None"),
        (["--hub_model_id", "a b/c"], "not 'a b/c'"),
    ):
        with pytest.raises(Refusal, match=message):
            main(["--config", str(path), "--output_dir", str(out), "--push_to_hub", *argv])
    main(["--config", str(path), "--output_dir", str(out), "--push_to_hub", "--hub_model_id", "org/study"])
    there = HfApi().list_repo_files("org/study", repo_type="dataset")
    assert {"README.md", "results.csv", "comparison.json", "figures/curves.png", "figures/differences.png"} <= set(
        there
    )
    card = Path(hf_hub_download("org/study", "README.md", repo_type="dataset")).read_text()
    assert card.startswith("---\ntags: [llama-lite, study]") and (out / "report.md").read_text() in card
    assert (
        load_dataset("org/study", "results", split="train").num_rows
        == len((out / "results.csv").read_text().splitlines()) - 1
    )
    with pytest.raises(Refusal, match=r"--hub_model_id nobody/study: .*The report is kept"):
        main(["--config", str(path), "--output_dir", str(out), "--push_to_hub", "--hub_model_id", "nobody/study"])


@pytest.mark.slow
def test_finished_runs_are_kept_and_changed_arms_are_made_again(made, capsys):
    path, out = made
    before = {folder.name: (folder / "status.json").stat().st_mtime_ns for folder in (out / "runs").glob("*-seed-?")}
    main(["--config", str(path), "--output_dir", str(out)])
    assert {
        folder.name: (folder / "status.json").stat().st_mtime_ns for folder in (out / "runs").glob("*-seed-?")
    } == before
    changed = yaml.safe_load(path.read_text())
    changed["arms"]["no_optimizer"]["set"]["resume_without"] = "optimizer,rng"
    other = path.with_name("changed.yaml")
    other.write_text(yaml.safe_dump(changed, sort_keys=False))
    capsys.readouterr()
    main(["--config", str(other), "--output_dir", str(out), "--dry_run"])
    told = capsys.readouterr().out
    assert told.count("changed since it was run: will be run again") == 2 and told.count(" min   finished") == 4
    assert "whole-seed-1                                  8 steps         8,192 tokens" in told
    assert "no_optimizer-at-4-seed-1                      4 steps         4,096 tokens" in told
    assert "in all    6 runs: 32 steps, 32,768 tokens, " in told and " min to come (by 4 finished ones)" in told
    assert "prepare   1 commands before them, 1 of them done" in told and told.endswith(
        "with run_eval.py: embedded_science\n"
    )
    main(["--config", str(other), "--output_dir", str(out)])
    after = {folder.name: (folder / "status.json").stat().st_mtime_ns for folder in (out / "runs").glob("*-seed-?")}
    assert {name for name in after if after[name] != before[name]} == {
        "no_optimizer-at-4-seed-1",
        "no_optimizer-at-4-seed-2",
    }
    changed["title"] = "Another one"
    other.write_text(yaml.safe_dump(changed, sort_keys=False))
    with pytest.raises(Refusal, match=r"belongs to another study .title: 'A tiny study', here 'Another one'"):
        main(["--config", str(other), "--output_dir", str(out)])


STARTS = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from llama_lite.studies import runner
import run_study

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, run_study.stop)
saves_slowly = '''
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.2)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
print("begun", flush=True)
time.sleep(60)
'''
saved, log = Path(sys.argv[1]), Path(sys.argv[2])
try:
    runner.run_logged([sys.executable, "-c", saves_slowly, str(saved)], log)
finally:
    print(saved.exists(), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_study_runs_is_told_to_end_when_the_study_ends(tmp_path, number):
    """After SIGTERM the study waits until its run has saved; after SIGKILL there is nobody who waits."""
    script, saved, log, output = (tmp_path / name for name in ("starts.py", "saved", "log", "output"))
    script.write_text(STARTS)
    process = forking.start([sys.executable, str(script), str(saved), str(log)], output)
    while not (log.exists() and log.read_text() == "begun\n"):
        assert process.poll() is None, output.read_text()
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 1)
    assert ("True" in output.read_text()) == (number == signal.SIGTERM)
    deadline = time.monotonic() + 60
    while not saved.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


KILLED = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
import forking, run_study
from llama_lite.exit import exit_with_status
from llama_lite.studies import runner

runner.run_logged = forking.run_child
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, run_study.stop)
exit_with_status(run_study.main)
"""


@pytest.mark.slow
def test_a_killed_study_gives_the_same_results(made, tmp_path):
    """SIGKILL and SIGTERM, each while a run trains: the runs of one seed, the evaluation and the table are made again,
    as they were. The study that is killed is a fork, and its runs are its own forks.
    """
    path, out = made
    (tmp_path / "killed.py").write_text(KILLED)

    def logs() -> list[Path]:
        return list((out / "runs").glob("*-seed-2/log.jsonl"))

    def logged() -> int:
        return sum(len(read_jsonl(log)) for log in logs())

    expected = (out / "results.csv").read_bytes()
    for gone in (*(out / "runs").glob("*-seed-2*"), out / "evaluation", out / "results.csv", out / "evaluation.json"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    argv = ["--config", str(path), "--output_dir", str(out)]
    for number, ends in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        before = logged()
        process = forking.start([sys.executable, str(tmp_path / "killed.py"), *argv], tmp_path / "output.txt")
        while logged() <= before and process.poll() is None:  # a machine's pace decides nothing
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == ends, (tmp_path / "output.txt").read_text()
        while not all((log.parent / "status.json").exists() for log in logs()):
            time.sleep(0.02)  # the run of a killed one, told by its parent's death, saves and ends
    assert logged() > 0 and not (out / "results.csv").exists()
    main(argv)
    assert (out / "results.csv").read_bytes() == expected


def test_what_runs_need_is_made_once_and_again_when_it_changes(study, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(runner, "launch", lambda script, argv, log: ran.append((script, argv)))
    first = ["run_pretrain.py --prepare_only", "benchmarks/curation_text.py --output 'a b'"]
    for commands in (first, first, [first[0], "run_eval.py"]):
        runner.prepare(spec.load(str(study(prepare=commands))), tmp_path / "out")
    assert ran == [
        ("run_pretrain.py", ["--prepare_only"]),
        ("benchmarks/curation_text.py", ["--output", "a b"]),
        ("run_eval.py", []),
    ]
    one, other = (spec.runs(spec.load(str(study(prepare=commands))), tmp_path)[0] for commands in (first, first[:1]))
    one.folder.mkdir(parents=True)
    write_json(runner._command_file(one), runner._command(one))
    assert runner.is_other(other) and not runner.is_other(one)


def test_a_command_that_fails_is_named_with_its_last_line(study, tmp_path):
    loaded = spec.load(str(study(prepare=["run_study.py --config none.yaml"])))
    with pytest.raises(
        Refusal, match=r"1 ended with status 2: refused: --config none.yaml: no study can be read from it.*1\.log"
    ):
        runner.prepare(loaded, tmp_path / "out")


def test_tuning_is_compared_with_its_base_and_with_its_own_reference(study, sft_settings, tmp_path, monkeypatch):
    base = sft_settings["model_name_or_path"]
    arms = {
        "full": {"set": {"use_lora": False}},
        "lora": {"set": {"r": 2}},
        "wider": {"set": {"r": 8}, "against": "lora"},
    }
    changes = {
        "script": "run_sft.py",
        "arms": arms,
        "reference": "full",
        "set": {},
        "measure": ["answer_loss", "embedded_docs bits_per_byte"],
    }
    path = study(**changes, evaluate={"tasks": ["embedded_docs"]})
    text = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**text, "config": str(config_file(tmp_path, sft_settings))}, sort_keys=False))
    loaded = spec.load(str(path))
    every = spec.runs(loaded, tmp_path / "out")
    lines = ["model,task,variant,metric,value", f"{base},embedded_docs,,bits_per_byte,4.0"]
    for place, one in enumerate(every):
        one.folder.mkdir(parents=True)
        write_json(one.folder / "before_after.json", {"answer_loss": {"before": 5.0, "after": 3.0 + place / 10}})
        append_jsonl(one.folder / "log.jsonl", {"step": 8, "tokens": 80, "eval_loss": 3.0})
        lines += [
            f"{one.folder},embedded_docs,,bits_per_byte,{4.5 + place / 10}",
            f"{one.folder},embedded_docs,typos,bits_per_byte,9.0",
        ]
    (tmp_path / "out" / "evaluation").mkdir()
    write_text(tmp_path / "out" / "evaluation" / "scores.csv", "\n".join(lines))
    monkeypatch.setattr(analysis, "launch", lambda *command: None)
    files = {"adapter_model.safetensors": {"sha256": "a"}}
    monkeypatch.setattr(analysis, "last_manifest", lambda folder: {"step": 8, "tokens": 80, "files": files})
    rows = analysis.collect(loaded, every) + analysis.evaluate(loaded, every, tmp_path / "out")
    equal = analysis.equal_weights(loaded, every)
    assert equal == {"lora": 2, "wider": 2}
    found = {(row["arm"], row["against"], row["what"]): row for row in analysis.compare(loaded, rows, equal, [])}
    assert set(found) == {
        (arm, against, measure)
        for arm, against in (
            ("full", "its base"),
            ("lora", "its base"),
            ("lora", "full"),
            ("wider", "its base"),
            ("wider", "lora"),
        )
        for measure in changes["measure"]
    }
    assert found["full", "its base", "answer_loss"]["seeds"] == pytest.approx([-2.0, -1.7])
    assert found["wider", "lora", "answer_loss"]["seeds"] == pytest.approx([0.1, 0.1])
    assert found["lora", "its base", "embedded_docs bits_per_byte"]["seeds"] == pytest.approx([0.6, 0.9])


def _begins(at: list[int], own: dict | None = None, **shared) -> dict:
    """Changes of a study: an arm that begins from `whole` at some steps, with arguments of its own; `shared` ones of
    both, None to leave out.
    """
    values = {**STUDY["set"], **shared}
    values = {name: value for name, value in values.items() if value is not None}
    return {"set": values, "arms": {"whole": {}, "b": {"from": "whole", "at": at, "set": own or {}}}}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"set": {"learning_rte": 1}},
            "`--learning_rte` on the command line is not an argument: did you mean `--learning_rate`",
        ),
        ({"reference": "all"}, "reference all is not an arm: whole, everything, no_optimizer"),
        ({"arm": {}}, "`arm` is not a field of a study: did you mean `arms`"),
        ({"arms": {"whole": {"sett": {}}}}, "`sett` of arm whole is not a field of an arm: did you mean `set`"),
        ({"arms": {"whole": {}, "b": {"from": "none", "at": [1]}}}, "arm b begins from none, which is not an arm"),
        ({"seeds": [1, 1]}, "seeds .1, 1.: give at least one, and each only once"),
        ({"seeds": [1, -1]}, "--seed -1 must be from 0 to 4,294,967,295"),
        ({"seeds": [True]}, "seeds True: expected a whole number"),
        ({"seeds": [[1]]}, "seeds .1.: expected a whole number"),
        ({"seeds": 3}, "`seeds` must be a list, not 3"),
        ({"arms": {"whole": {}, "b": {"from": "whole"}}}, "arm b: `from` .an arm. and `at` .* go together"),
        ({"arms": {"whole": {}, "b": {"from": "whole", "at": 4}}}, "its `at` a list of steps"),
        (
            {"arms": {"whole": {}, "b": {"from": "whole", "at": [4]}, "c": {"from": "b", "at": [8]}}},
            "arm c begins from b, which has a `from` of its own",
        ),
        (
            {"arms": {"whole": {}, "b": {"against": "c"}}},
            "arm b is to be compared with c, which is not an arm: whole, b",
        ),
        (
            {"arms": {"whole": {}, "a": {"from": "whole", "at": [2, 4]}, "b": {"against": "a"}}},
            "arm b is to be compared with a, which begins at 2, 4: give both the same steps in `at`",
        ),
        (
            {"arms": {"whole": {"from": "b", "at": [4]}, "b": {}}},
            "reference whole has a `from`: use an arm without `from`",
        ),
        ({"arms": {"whole": {}, "b": {"from": "whole", "at": ["x"]}}}, "arm b: at 'x' is not a step"),
        ({"arms": {"whole": {}, "b": {"from": "whole", "at": [0]}}}, "arm b: at 0 is not a step"),
        (
            _begins(save_steps=2, at=[3, 4]),
            "arm b: at 3: arm whole saves none at step 3; checkpoints to begin from: 2, 4, 6\\.$",
        ),
        (
            _begins(save_steps=0.3, at=[2]),
            "arm b: at 2: arm whole saves none at step 2; checkpoints to begin from: 3, 6\\.$",
        ),  # as Trainer rounds shares
        (
            _begins(save_strategy="no", at=[4]),
            "arm b: at 4: arm whole saves none at step 4; checkpoints to begin from: none",
        ),
        (
            _begins(save_steps=2, save_total_limit=2, at=[4]),
            "arm whole keeps none of step 4 .save_total_limit 2.; checkpoints to begin from: 6\\.$",
        ),
        (_begins(at=[8]), "arm b: at 8 is not before its own end .max_steps 8., so it would train nothing"),
        (
            _begins(at=[12]),
            (
                "arm b: at 12 is not before its own end .* arm b: at 12: arm whole saves none at step 12; checkpoints"
                " to begin from: 4\\.$"
            ),
        ),
        (
            _begins(at=[12], own={"max_steps": 16}),
            "arm b: at 12: arm whole saves none at step 12; checkpoints to begin from: 4, 8\\.$",
        ),
        (
            _begins(save_steps=None, at=[12], own={"max_steps": 16}),
            "arm b: at 12: arm whole saves none at step 12; .* begin from: 5, 8\\.$",
        ),  # of the config
        ({"prepare": [""]}, "`prepare` '': a command begins with a script of this repository"),
        ({"prepare": ["run_all.py --x"]}, "`prepare` 'run_all.py --x': a command begins with a script"),
        ({"prepare": "run_pretrain.py"}, "`prepare` must be a list"),
        ({"evaluate": {"task": ["a"]}}, "`--task` on the command line is not an argument: did you mean `--tasks`"),
        ({"script": "run_all.py"}, "script run_all.py: expected one of run_pretrain.py, run_sft.py, run_eval.py"),
        (
            {"script": "run_eval.py"},
            "arms of run_eval.py are evaluations: they take neither `evaluate` nor `from`",
        ),
        ({"title": None}, "`title` is empty: give a value"),
        ({"registered": 1}, "`registered` 1: true or false is wanted"),
        ({"stop_early": True}, "`stop_early` needs `outcomes`, `contrasts` and `primary`"),
        (
            {
                "stop_early": True,
                "outcomes": {"end": {"metric": "eval_loss"}},
                "contrasts": {"c": {"everything": 1, "whole": -1}},
                "primary": {"outcomes": ["end"], "contrasts": ["c"]},
            },
            "`stop_early` with 1 primary tests can decide nothing before 4 seeds",
        ),
        ({"margin": {"eval_loss": 0}}, "`margin` of eval_loss: 0: a number above 0"),
        ({"margin": 0.01}, "`margin` must be a mapping"),
        ({"arms": {"whole": {}, "b": {"seeds": [3]}}}, "arm b: `seeds` .3. must be some of the study's .1, 2."),
        (
            {"arms": {"whole": {"seeds": [1]}, "b": {"from": "whole", "at": [4]}}},
            "arm b begins from whole, which does not have all of its seeds",
        ),
        (
            {"arms": {"whole": {}, "b": {"set": {"seed": 7}}}},
            "`set` of arm b: `seed` is set by the study: the seeds are `seeds`",
        ),
        ({"set": {"output_dir": "x"}}, "`set`: `output_dir` is set by the study"),
        ({"arms": {"whole": {}, "../b": {}}}, "arm '../b': a name has letters"),
        ({"arms": {"whole": {}, "Whole": {}}}, "arm 'Whole': a name has letters"),
        ({"evaluate": None}, "`evaluate` is empty: give a value, or leave it out"),
        ({"measure": None}, "`measure` is empty"),
        ({"set": {"prepared_dir": None}}, "`set`: `prepared_dir` is empty: give a value, or leave it out"),
        ({"evaluate": {"tasks": ["embedded_science"], "limit": None}}, "`evaluate`: `limit` is empty"),
        ({"arms": {"whole": {}, "b": {"set": {"seed": None}}}}, "`set` of arm b: `seed` is empty"),
        ({"arms": {"whole": {}, "b": {"from": "whole", "at": [0]}}}, "arm b: at 0 is not a step"),
        (
            {"measure": ["embedded_sciense bits_per_byte"]},
            "`evaluate` does not list embedded_sciense: did you mean `embedded_science`",
        ),
    ],
)
def test_a_study_that_cannot_be_right_is_refused(study, changes, message):
    with pytest.raises(Refusal, match=message):
        spec.load(str(study(**changes)))


def test_an_arm_named_zero_is_an_arm(study):
    arms = {0: None, "b": {"from": 0, "at": [4]}}
    found = spec.load(str(study(arms=arms, reference=0, measure="eval_loss")))
    assert [(arm.name, arm.source, arm.against) for arm in found.arms] == [
        ("0", None, "0"),
        ("b", "0", "0"),
    ] and found.reference == "0"
    assert spec.runs(found, Path("out"))[1].argv[-1] == "out/runs/0-seed-1/checkpoint-4"


def test_two_arms_of_one_name_are_refused(study):
    path = study()
    path.write_text(path.read_text().replace("  no_optimizer:", "  everything:"))
    with pytest.raises(Refusal, match="everything is given twice"):
        spec.load(str(path))


def test_a_file_that_is_no_study_is_refused(tmp_path):
    for text, message in (("- a", "not a list"), ("", "not a NoneType"), ("a: [", "expected the node content")):
        (tmp_path / "no.yaml").write_text(text)
        with pytest.raises(Refusal, match=message):
            spec.load(str(tmp_path / "no.yaml"))
    with pytest.raises(Refusal, match="no study can be read from it"):
        spec.load(str(tmp_path / "none.yaml"))


def test_what_begins_from_a_changed_arm_is_made_again(study, tmp_path):
    before = spec.runs(spec.load(str(study())), tmp_path)
    for one in before:
        one.folder.mkdir(parents=True)
        write_json(one.folder / "status.json", {"status": "finished"})
        write_json(runner._command_file(one), runner._command(one))
    assert all(runner.is_done(one) for one in before)
    changed = {**STUDY["arms"], "whole": {"set": {"learning_rate": 1e-4}}}
    assert all(runner.is_other(one) for one in spec.runs(spec.load(str(study(arms=changed))), tmp_path))


def test_a_measure_that_was_not_logged_is_refused(study, tmp_path):
    loaded = spec.load(str(study(measure="eval_accuracy")))
    rows = [
        dict(zip(analysis.RUN_COLUMNS, (arm.name, arm.at or "", 1, 8, 8, "eval_loss", 1.0), strict=True))
        for arm in loaded.arms
    ]
    with pytest.raises(Refusal, match="measure eval_accuracy was not logged by whole, seed 1; available: eval_loss"):
        analysis.compare(loaded, rows, {}, [])


def test_a_measure_that_no_run_logs_is_refused_after_the_first_one(study, settings, tmp_path, monkeypatch):
    path, made = study(measure=["eval_loss", "eval_los"], evaluate={}, prepare=[]), []

    def make(study, one):
        made.append(one)
        one.folder.mkdir(parents=True)
        append_jsonl(one.folder / "log.jsonl", {"step": 8, "tokens": 80, "loss": 3.0, "eval_loss": 3.0})

    monkeypatch.setattr(runner, "make", make)
    with pytest.raises(
        Refusal,
        match=r"measure eval_los was not logged by whole-seed-1; logged: eval_loss, loss\. Finished runs are kept",
    ):
        main(["--config", str(path), "--output_dir", str(tmp_path / "out")])
    assert len(made) == 1


@pytest.mark.parametrize("bf16", [True, False])
def test_what_a_study_takes_is_told_before_it_is_run(study, base, sft_settings, tmp_path, capsys, monkeypatch, bf16):
    """By the peak of the machine while nothing is finished; of tuning when its base is there."""
    monkeypatch.setattr(hardware, "peak_flops", lambda precision, device: {"bfloat16": 2e9, "float32": 1e9}[precision])
    main(
        ["--config", str(study(set={**STUDY["set"], "bf16": bf16})), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    )
    flops = cost._model_cost("tiny", 64)[1] * 32_768
    expected = flops / (0.4 * (2e9 if bf16 else 1e9)) / 60
    told = capsys.readouterr().out
    assert f"{expected:.1f} min to come (by FLOPs, at 40% of what a matrix product reaches here; starts" in told
    parameters = cost._model_cost("tiny", 64)[0]
    assert (
        f"{(2 * 12 + 2) * parameters / 2**20:.1f} MiB" in told.splitlines()[1]
    )  # two checkpoints of whole, and the model
    arms = {
        "full": {"set": {"use_lora": False}},
        "lora": {"set": {"r": 2}},
        "absent": {"set": {"model_name_or_path": "runs/none"}},
    }
    config = config_file(tmp_path, sft_settings, max_rows=60, max_steps=None, num_train_epochs=3, bf16=bf16)
    path = study(
        script="run_sft.py", arms=arms, reference="full", set={}, measure="eval_loss", evaluate={}, config=str(config)
    )
    main(["--config", str(path), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    full, lora, absent, *_, total, _ = capsys.readouterr().out.splitlines()[1:]
    assert (
        "<= 33 steps     <= 25,344 tokens" in full and "<= 33 steps     <= 25,344 tokens" in lora
    )  # 3 x (60 - 16) // 4 steps of 4 x 192
    assert absent.split()[1:5] == ["?"] * 4 and full.split()[7] != lora.split()[7]  # disk
    assert (
        "6 runs: <= 132 steps, <= 101,376 tokens, " in total
        and "of 2 runs nothing is known before a first one is finished" in total
    )
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    main(["--config", str(path), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    assert "of disk are needed and 1.0 MiB are free at " in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_study_on_a_device_without_constants_is_planned_by_a_matrix_product(study, tmp_path, capsys, monkeypatch):
    """On Apple's mps, whose peak no table has."""
    monkeypatch.setattr(PretrainArguments, "device", torch.device("mps"))
    monkeypatch.setattr(
        hardware, "product_seconds", lambda device, size, repeats, names: dict.fromkeys(names, 2 * size**3 / 1e9)
    )
    main(["--config", str(study()), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    expected = cost._model_cost("tiny", 64)[1] * 32_768 / (0.4 * 1e9) / 60
    said = capsys.readouterr().out
    assert f"{expected:.1f} min to come (by FLOPs, at 40% of what a matrix product reaches here; starts" in said


@pytest.mark.slow
def test_a_study_of_evaluations(base, tmp_path, capsys):
    """Arms are ways of asking; seeds draw other items and examples. What differs without being named is refused, and
    there is nothing to begin from.
    """
    few = {"models": [str(base)], "tasks": ["embedded_mmlu_cloze"], "limit": 8, "cpu_threads": 1}
    raw = {
        "title": "Examples",
        "script": "run_eval.py",
        "config": str(config_file(tmp_path, few)),
        "seeds": [1, 2],
        "reference": "none",
        "measure": ["embedded_mmlu_cloze acc_norm"],
        "arms": {"none": {}, "two": {"set": {"num_fewshot": [2]}}, "same": {"set": {"num_fewshot": [0]}}},
    }
    path, out = tmp_path / "shots.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    main(["--config", str(path), "--output_dir", str(out)])
    rows = {row["arm"]: row for row in read_json(out / "comparison.json")}
    assert (
        set(rows) == {"two", "same"}
        and rows["same"]["seeds"] == [0.0] * 2
        and rows["two"]["n"] == 2
        and rows["two"]["equal"] is None
    )
    report = (out / "report.md").read_text()
    assert (
        "| two | none | embedded_mmlu_cloze acc_norm |" in report
        and "curves.png" not in report
        and "Health" not in report
    )
    assert (
        "`weights` {" in report
        and "`limit` 8" in report
        and "`num_fewshot`" not in report.split("## Controlled variables")[1]
    )
    assert (out / "figures" / "differences.png").exists() and not (out / "figures" / "curves.png").exists()
    before = (out / "results.csv").read_bytes()
    assert before.count(b"embedded_mmlu_cloze") == 12  # acc and acc_norm, 6 runs
    for gone in (out / "runs").glob("two-seed-2*"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    capsys.readouterr()
    main(["--config", str(path), "--output_dir", str(out), "--dry_run"])
    assert (
        "two-seed-2                                          ?" in (told := capsys.readouterr().out)
        and "(by 5 finished ones)" in told
    )
    main(["--config", str(path), "--output_dir", str(out)])
    assert (out / "results.csv").read_bytes() == before
    other = read_json(out / "runs" / "same-seed-2" / "run.json")
    write_json(out / "runs" / "same-seed-2" / "run.json", {**other, "weights": {str(base): ["0", None]}})
    with pytest.raises(
        Refusal, match="same-seed-2 differs from none-seed-2 in settings that the study does not vary: weights"
    ):
        main(["--config", str(path), "--output_dir", str(out)])
    path.write_text(yaml.safe_dump({**raw, "measure": ["acc"]}))
    with pytest.raises(
        Refusal,
        match=(
            "measure acc was not logged by none, seed 1; available: embedded_mmlu_cloze acc, embedded_mmlu_cloze acc_norm"
        ),
    ):
        write_json(out / "runs" / "same-seed-2" / "run.json", other)
        main(["--config", str(path), "--output_dir", str(out)])


def test_spike_and_recovery_are_of_the_same_windows(study, tmp_path, monkeypatch):
    """An arm that lost its data position reads others, so that its training loss says nothing of the resume."""
    arms = {
        "whole": {},
        **{
            name: {"from": "whole", "at": [4], "set": {"resume_without": lost}}
            for name, lost in (("a", "rng"), ("b", "rng, data"))
        },
    }
    loaded = spec.load(str(study(seeds=[1], arms=arms, measure="eval_loss", evaluate={})))
    every = spec.runs(loaded, tmp_path)
    rows = [
        analysis._row(one, step, step * 10, "loss", 3.0 + (one.arm.name != "whole" and step == 5))
        for one in every
        for step in range(1, 9)
    ]
    rows += [analysis._row(one, 8, 80, "eval_loss", 3.0) for one in every]
    monkeypatch.setattr(analysis, "AFTER", 3)  # of the four losses after the resume
    found = {(row["arm"], row["what"]): row["value"] for row in analysis.compare(loaded, rows, {}, [])}
    spike = "highest excess of the training loss after the stop"
    assert found == {
        ("a", "eval_loss"): 0.0,
        ("a", spike): 1.0,
        ("a", "tokens until back"): 20.0,
        ("b", "eval_loss"): 0.0,
    }


def test_arms_of_several_steps_are_compared_at_the_same_step(study, tmp_path, monkeypatch):
    """In the differences, the equal weights, the items of the evaluation and the curves."""
    resumed = {"from": "whole", "at": [4, 6]}
    arms = {"whole": {}, "a": resumed, "b": {**resumed, "against": "a"}, "c": {"from": "whole", "at": [4]}}
    arms["d"] = {"from": "whole", "at": [6], "against": "c"}  # c begins at one step
    loaded = spec.load(str(study(arms=arms, set={**STUDY["set"], "save_steps": 2})))
    pairs = {
        ("a at 4", "whole"),
        ("a at 6", "whole"),
        ("b at 4", "a at 4"),
        ("b at 6", "a at 6"),
        ("c at 4", "whole"),
        ("d at 6", "c at 4"),
    }
    assert {(arm.label, loaded.against_of(arm).label) for arm in loaded.arms[1:]} == pairs
    every = spec.runs(loaded, tmp_path)
    values = {"whole": 3.0, "a at 4": 3.1, "a at 6": 3.2, "b at 4": 3.4, "b at 6": 3.7, "c at 4": 3.0, "d at 6": 3.0}
    rows = []
    for run in every:
        rows += [analysis._row(run, step, step * 10, "loss", values[run.arm.label]) for step in range(1, 9)]
        for metric in loaded.measures:
            rows.append(analysis._row(run, 8, 80, metric, values[run.arm.label]))
    comparison = analysis.compare(loaded, rows, {}, [])
    found = {(report.name_of(row), row["against"]): row["value"] for row in comparison if row["what"] == "eval_loss"}
    assert set(found) == pairs
    assert found["b at 4", "a at 4"] == pytest.approx(0.3) and found["b at 6", "a at 6"] == pytest.approx(0.5)

    monkeypatch.setattr(analysis, "weights_of", lambda run: f"{run.arm.at}")
    equal = analysis.equal_weights(loaded, every)
    assert (equal["b at 4"], equal["b at 6"], equal["d at 6"]) == (2, 2, 0)

    answers = {(str(run.folder), loaded.measures[1]): {"x": (1.0, 2.0), "y": (2.0, 2.0)} for run in every}
    monkeypatch.setattr(items, "item_values", lambda folder: answers)
    assert {(one["arm"], one["against"]) for one in items.squares_of(loaded, every, tmp_path)} == pairs

    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure))
    report.curves(dataclasses.asdict(loaded), rows, comparison, tmp_path)
    levels = [line.get_ydata()[-1] for line in drawn[0].axes[1].lines[:-1]]  # the last is zero
    assert levels == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.0, 0.0])


def test_a_registered_study_that_is_not_committed_is_refused_before_the_first_run(study, tmp_path):
    with pytest.raises(
        Refusal, match=r"study\.yaml is in no commit, and a registered study's file is committed, alone"
    ):
        main(["--config", str(study(registered=True)), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    loaded, begun = spec.load(str(study())), tmp_path / "begun"
    begun.mkdir()
    definition = {name: getattr(loaded, name) for name in ("title", "script", "config", "reference")}
    write_json(begun / "study.json", {"study": definition})
    with pytest.raises(Refusal, match="was begun before the study was registered: choose another one"):
        main(["--config", str(study(registered=True)), "--output_dir", str(begun)])


def test_an_arm_or_seed_that_is_not_there_is_refused(study, tmp_path):
    with pytest.raises(
        Refusal,
        match=r"--arm whole --seed 9: the study has the arms whole, everything, no_optimizer and the seeds \[1, 2\]",
    ):
        main(["--config", str(study()), "--output_dir", str(tmp_path / "out"), "--arm", "whole", "--seed", "9"])


def test_arms_that_differ_in_what_is_not_named_are_refused(study, monkeypatch, tmp_path):
    loaded = spec.load(str(study(seeds=[1])))
    every = spec.runs(loaded, tmp_path)
    same = {
        "model": {},
        "hyperparameters": {"learning_rate": 1},
        "data": {"data": "a"},
        "environment": {"packages": {}, "hardware": {}},
        "layout": {},
    }
    manifests = {one.folder: {"identity": same, "tokens": 8} for one in every}
    monkeypatch.setattr(analysis, "last_manifest", lambda folder: manifests[folder])
    assert analysis.check_controlled_variables(loaded, every)["data"] == {"data": "a", "tokens": 8}
    for kind, fields in (
        ("hyperparameters", {"learning_rate": 2}),
        ("data", {"data": "b"}),
        ("environment", {"packages": {"torch": "1"}, "hardware": {}}),
    ):
        manifests[every[1].folder] = {"identity": {**same, kind: fields}, "tokens": 8}
        with pytest.raises(
            Refusal,
            match=(
                r"everything-at-4-seed-1 differs from whole-seed-1 in settings that the study does not vary:"
                r" (learning_rate|data|packages)"
            ),
        ):
            analysis.check_controlled_variables(loaded, every)


def test_arms_that_measure_other_windows_are_refused(study, monkeypatch, tmp_path):
    """As when a study goes on with a version that measures others."""
    loaded = spec.load(str(study(seeds=[1])))
    every = spec.runs(loaded, tmp_path)
    same = {
        "model": {},
        "hyperparameters": {},
        "data": {},
        "layout": {},
        "environment": {"packages": {}, "hardware": {}},
    }
    monkeypatch.setattr(analysis, "last_manifest", lambda folder: {"identity": same, "tokens": 8})

    def measure(*settings: dict) -> dict:
        for run, measured in zip(every, [*settings, *[settings[-1]] * len(every)], strict=False):
            run.folder.mkdir(parents=True, exist_ok=True)
            write_json(run.folder / "run.json", {"settings": {"eval_windows": 16, **measured}})
        return analysis.check_controlled_variables(loaded, every)["data"]

    first = {"tokens": 8, "eval_windows": 16, "eval_order": "sequential"}
    assert measure({}) == measure({}, {"eval_order": "sequential"}) == first  # earlier versions do not record it
    assert measure({"eval_order": "shuffled"}) == {**first, "eval_order": "shuffled"}
    for other, named in (
        ({"eval_order": "shuffled"}, "eval_order sequential -> shuffled"),
        ({"eval_windows": 8}, "16 -> 8"),
    ):
        with pytest.raises(Refusal, match=f"in settings that the study does not vary: .*{named}"):
            measure({}, other)


def test_curves_of_seeds_meet_at_steps(monkeypatch):
    """Seeds of a tuning have read other numbers of tokens at a step: it is drawn at their mean."""
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure))
    arms = [{"name": name, "at": None, "source": None, "against": "a"} for name in "ab"]
    rows = [
        dict(
            zip(
                analysis.RUN_COLUMNS,
                (name, "", seed, step, 1e6 * (step + seed), "eval_loss", 3.0 + (name == "b")),
                strict=True,
            )
        )
        for name in "ab"
        for seed in (1, 2)
        for step in (10, 20)
    ]
    comparison = [{"arm": "b", "at": None, "against": "a", "unit": "nats"}]
    report.curves({"arms": arms}, rows, comparison, Path("unused"))
    top, bottom = drawn[0].axes
    assert [list(line.get_xdata()) for line in top.lines] == [[11.5, 21.5]] * 2
    assert list(bottom.lines[0].get_ydata()) == [1.0, 1.0]


def test_a_study_of_one_arm_has_a_report(study, tmp_path, monkeypatch):
    """Of its curves, without differences and their figure."""
    path, out = study(arms={"whole": {}}, measure="eval_loss", evaluate={}, prepare=[]), tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    write_text(out / "figures" / "differences.png", "of arms that it had before")
    write_json(out / "study.json", {"study": {}})
    loaded = spec.load(str(path))
    every = spec.runs(loaded, out)
    equal = {"data": {}, "hyperparameters": {}, "layout": {}, "environment": {}}
    rows = [analysis._row(run, step, step * 10, "eval_loss", 3.0) for run in every for step in (4, 8)]
    records = {"equal_weights": {}, "squares": [], "health": {}}
    records["cost"] = {"runs": 2, "minutes": 1.0, "not_counted": 0}
    for name, value in (("check_controlled_variables", equal), ("collect", rows), ("records_of", records)):
        monkeypatch.setattr(analysis, name, lambda *_, value=value: value)
    run_study.report(loaded, path, every, out)
    text, nothing = (out / "report.md").read_text(), "None: no arm is compared with another one."
    assert f"## Differences\n\n{nothing}" in text and "(figures/curves.png)" in text
    assert "differences.png" not in text and "Below: each arm minus" not in text
    assert [path.name for path in (out / "figures").iterdir()] == ["curves.png"]
    assert read_json(out / "comparison.json") == [] and nothing in (out / "report.html").read_text()


def test_a_value_can_hold_the_seed(study):
    """As the base of a tuning run, where each seed has a pretrained model of its own."""
    values = {"run_name": "runs/base-{seed}", "sample_prompts": ["{seed}", "{x}"]}
    found = spec.load(str(study(seeds=[3, 4], set={**STUDY["set"], **values})))
    for run in spec.runs(found, Path("out")):
        words = run.argv[run.argv.index("--run_name") :]
        assert words[1] == f"runs/base-{run.seed}"
        assert words[words.index("--sample_prompts") + 1 :][:2] == [str(run.seed), "{x}"]


def test_an_empty_list_is_an_empty_list(study):
    """As in YAML: where the config has values, and where the argument may have none."""
    found = spec.load(str(study(set={**STUDY["set"], "sample_prompts": [], "eval_tasks": ["embedded_docs"]})))
    (*_, run, _) = spec.PARSERS[found.script](spec.runs(found, Path("out"))[0].argv)
    assert run.sample_prompts == [] and run.explicit_args["sample_prompts"] == []
    assert run.eval_tasks == ["embedded_docs"]
    with pytest.raises(Refusal, match="--models: at least one is needed"):
        spec.PARSERS["run_eval.py"](spec._argument_words("models", []))
    with pytest.raises(Refusal, match=r"hours.*'\[\]'"):
        spec.load(str(study(set={**STUDY["set"], "hours": []})))


def test_recovery_is_the_step_from_which_the_excess_stays_small():
    excess = {step: 0.1 if step < 30 else 0.0 for step in range(5, 105, 5)}
    assert analysis.recovery(excess, 0) == 30
    assert analysis.recovery(dict.fromkeys(range(5, 60, 5), 0.1), 0) is None
    assert analysis.recovery(dict.fromkeys(range(5, 60, 5), 0.0), 0) == 0
    assert analysis.recovery(dict.fromkeys(range(5, 50, 5), 0.0), 0) == 0  # the same run
    assert analysis.recovery(dict.fromkeys(range(5, 50, 5), 1e-4), 0) is None  # fewer losses than are averaged
    late = {step: 0.1 if step < 70 else 0.0 for step in range(5, 105, 5)}  # the last seven losses are no ten
    assert analysis.recovery(late, 0) is None


def test_one_seed_has_no_interval():
    row = {
        "arm": "a",
        "at": None,
        "against": "b",
        "what": "eval_loss",
        "unit": "nats",
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 1,
        "seeds": [0.5],
        "margin": None,
        "verdict": "one seed: no interval",
    }
    assert line_of(row) == "a compared with b: eval_loss +0.5000 nats; one seed: no interval"
    wide = {**row, "low": -0.1, "high": 1.1, "n": 3, "margin": 2.0, "verdict": "equal within the margin"}
    assert (
        line_of(wide)
        == "a compared with b: eval_loss +0.5000 nats (-0.1000 nats to +1.1000 nats), 3 seeds; equal within 2"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_are_understood(path):
    least = 1 if path.stem == "lora_rates" else 3  # which chooses rates, and concludes nothing
    assert len(spec.load(str(path)).seeds) >= least


def test_a_report_of_one_seed_explains_no_interval():
    row = {"items": None, "margin": None}
    one, several = (report._what_a_row_is([{**row, "n": n}]) for n in (1, 3))
    assert "There was one seed, so there is no interval" in one and "Student's t" not in one
    assert "mean over 3 seeds and its 95 % and 90 % intervals (Student's t)" in several
