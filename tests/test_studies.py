"""Studies: what is refused, what is run again, what is compared; and a study that is killed gives the same results."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, config_file

from llama_lite import studies
from llama_lite.arguments import Refusal
from llama_lite.runs import read_json, write_json
from run_study import main

STUDY = {
    "title": "A tiny study",
    "question": "Does it matter?",
    "script": "run_pretrain.py",
    "seeds": [1, 2],
    "reference": "whole",
    "set": {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "save_total_limit": 9, "eval_steps": 4, "sample_tokens": 0},
    "arms": {
        "whole": {"about": "never stopped"},
        "everything": {"from": "whole", "at": [4]},
        "no_optimizer": {"from": "whole", "at": [4], "set": {"resume_without": "optimizer"}},
    },
}


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
    path.write_text(yaml.safe_dump({**STUDY, "config": str(config_file(folder, settings))}, sort_keys=False))
    main(["--config", str(path), "--output_dir", str(folder / "out")])
    return path, folder / "out"


@pytest.mark.slow
def test_a_study_compares_its_arms_in_pairs(made):
    _, out = made
    rows = read_json(out / "comparison.json")
    found = {(row["arm"], row["what"]): row for row in rows}
    same, lost = found["everything", "final eval_loss"], found["no_optimizer", "final eval_loss"]
    assert same["equal"] == 2 and same["seeds"] == [0.0, 0.0] and same["value"] == 0.0
    assert lost["equal"] == 0 and lost["n"] == 2 and lost["low"] < lost["value"] < lost["high"]
    assert found["everything", "tokens until back"]["value"] == 1024.0
    report = (out / "report.md").read_text()
    assert "| everything, at 4 | final eval_loss | +0.0000 nats |" in report and "2 of 2" in report and "resume_without" in report
    assert (out / "figures" / "curves.png").stat().st_size > 10_000 and "/tmp" not in report.replace("/tmp/pytest", "")
    header, *lines = (out / "results.csv").read_text().splitlines()
    assert header == "arm,at,seed,step,tokens,metric,value" and sum(",8," in line and ",eval_loss," in line for line in lines) == 6


@pytest.mark.slow
def test_finished_runs_are_kept_and_changed_arms_are_made_again(made, capsys):
    path, out = made
    before = {folder.name: (folder / "status.json").stat().st_mtime_ns for folder in (out / "runs").glob("*-seed-?")}
    main(["--config", str(path), "--output_dir", str(out)])
    assert {folder.name: (folder / "status.json").stat().st_mtime_ns for folder in (out / "runs").glob("*-seed-?")} == before
    changed = yaml.safe_load(path.read_text())
    changed["arms"]["no_optimizer"]["set"]["resume_without"] = "optimizer,rng"
    other = path.with_name("changed.yaml")
    other.write_text(yaml.safe_dump(changed, sort_keys=False))
    capsys.readouterr()
    main(["--config", str(other), "--output_dir", str(out), "--dry_run"])
    assert capsys.readouterr().out.count("changed since it was run: will be run again") == 2
    main(["--config", str(other), "--output_dir", str(out)])
    after = {folder.name: (folder / "status.json").stat().st_mtime_ns for folder in (out / "runs").glob("*-seed-?")}
    assert {name for name in after if after[name] != before[name]} == {"no_optimizer-at-4-seed-1", "no_optimizer-at-4-seed-2"}
    changed["title"] = "Another one"
    other.write_text(yaml.safe_dump(changed, sort_keys=False))
    with pytest.raises(Refusal, match=r"belongs to another study .title: 'A tiny study', here 'Another one'"):
        main(["--config", str(other), "--output_dir", str(out)])


@pytest.mark.slow
def test_a_killed_study_gives_the_same_results(made, tmp_path):
    path, out = made
    chance = random.Random(5)
    command = [sys.executable, str(ROOT / "run_study.py"), "--config", str(path), "--output_dir", str(tmp_path / "again")]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(chance.uniform(5, 14))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(2)  # its run, told by the parent's death, saves and ends
    assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300).returncode == 0
    assert (tmp_path / "again" / "results.csv").read_bytes() == (out / "results.csv").read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"set": {"learning_rte": 1}}, "`--learning_rte` on the command line is not an argument: did you mean `--learning_rate`"),
        ({"reference": "all"}, "reference all is no arm: whole, everything, no_optimizer"),
        ({"arm": {}}, "`arm` is no field of a study: did you mean `arms`"),
        ({"arms": {"whole": {"sett": {}}}}, "`sett` of arm whole is no field of an arm: did you mean `set`"),
        ({"arms": {"whole": {}, "b": {"from": "none", "at": [1]}}}, "arm b begins from none, which is no arm"),
        ({"seeds": [1, 1]}, "seeds .1, 1.: at least one, each once"),
        ({"seeds": 3}, "`seeds` must be a list, not 3"),
        ({"arms": {"whole": {}, "b": {"from": "whole"}}}, "arm b: `from` .an arm. and `at` .* go together"),
        ({"arms": {"whole": {}, "b": {"from": "whole", "at": 4}}}, "its `at` a list of steps"),
        (
            {"arms": {"whole": {}, "b": {"from": "whole", "at": [4]}, "c": {"from": "b", "at": [8]}}},
            "arm c begins from b, which itself begins from another",
        ),
        ({"script": "run_eval.py"}, "script run_eval.py: one of run_pretrain.py, run_sft.py"),
    ],
)
def test_a_study_that_cannot_be_right_is_refused(study, changes, message):
    with pytest.raises(Refusal, match=message):
        studies.load(str(study(**changes)))


def test_two_arms_of_one_name_are_refused(study):
    path = study()
    path.write_text(path.read_text().replace("  no_optimizer:", "  everything:"))
    with pytest.raises(Refusal, match="everything is there twice"):
        studies.load(str(path))


def test_a_file_that_is_no_study_is_refused(tmp_path):
    for text, message in (("- a", "not a list"), ("", "not a NoneType"), ("a: [", "expected the node content")):
        (tmp_path / "no.yaml").write_text(text)
        with pytest.raises(Refusal, match=message):
            studies.load(str(tmp_path / "no.yaml"))
    with pytest.raises(Refusal, match="no study can be read there"):
        studies.load(str(tmp_path / "none.yaml"))


def test_what_begins_from_a_changed_arm_is_made_again(study, tmp_path):
    before = studies.runs(studies.load(str(study())), tmp_path)
    for one in before:
        one.folder.mkdir(parents=True)
        write_json(one.folder / "status.json", {"status": "finished"})
        write_json(studies._command_file(one), studies._command(one))
    assert all(studies.is_done(one) for one in before)
    changed = {**STUDY["arms"], "whole": {"set": {"learning_rate": 1e-4}}}
    assert all(studies.is_other(one) for one in studies.runs(studies.load(str(study(arms=changed))), tmp_path))


def test_a_measure_that_was_not_logged_is_refused(study, tmp_path):
    loaded = studies.load(str(study(measure="eval_accuracy")))
    rows = [dict(zip(studies.RUN_COLUMNS, (arm.name, arm.at or "", 1, 8, 8, "eval_loss", 1.0), strict=True)) for arm in loaded.arms]
    with pytest.raises(Refusal, match="measure eval_accuracy was not logged by everything and whole, seed 1; there is eval_loss"):
        studies.compare(loaded, [], rows)


def test_an_arm_or_seed_that_is_not_there_is_refused(study, tmp_path):
    with pytest.raises(Refusal, match=r"--arm whole --seed 9: the study has the arms whole, everything, no_optimizer and the seeds \[1, 2\]"):
        main(["--config", str(study()), "--output_dir", str(tmp_path / "out"), "--arm", "whole", "--seed", "9"])


def test_arms_that_differ_in_what_is_not_named_are_refused(study, monkeypatch, tmp_path):
    loaded = studies.load(str(study(seeds=[1])))
    every = studies.runs(loaded, tmp_path)
    same = {
        "model": {},
        "hyperparameters": {"learning_rate": 1},
        "data": {"data": "a"},
        "environment": {"packages": {}, "hardware": {}},
        "layout": {},
    }
    manifests = {one.folder: {"identity": same} for one in every}
    monkeypatch.setattr(studies, "last_manifest", lambda folder: manifests[folder])
    assert studies.held_equal(loaded, every)["data"] == {"data": "a"}
    for kind, fields in (
        ("hyperparameters", {"learning_rate": 2}),
        ("data", {"data": "b"}),
        ("environment", {"packages": {"torch": "1"}, "hardware": {}}),
    ):
        manifests[every[1].folder] = {"identity": {**same, kind: fields}}
        with pytest.raises(
            Refusal, match=r"everything-at-4-seed-1 differs from whole-seed-1 in what the study does not name: (learning_rate|data|packages)"
        ):
            studies.held_equal(loaded, every)


def test_recovery_is_the_step_from_which_the_excess_stays_small():
    excess = {step: 0.1 if step < 30 else 0.0 for step in range(5, 105, 5)}
    assert studies.recovery(excess) == 30
    assert studies.recovery(dict.fromkeys(range(5, 50, 5), 0.1)) is None
    assert studies.recovery(dict.fromkeys(range(5, 50, 5), 0.0)) == 5


def test_one_seed_has_no_interval():
    row = {"arm": "a", "at": None, "what": "final eval_loss", "unit": "nats", "value": 0.5, "low": None, "high": None, "n": 1, "seeds": [0.5]}
    assert studies.line_of(row) == "a: final eval_loss +0.5000 nats (one seed: no interval)"
    assert "no difference found" in studies.line_of({**row, "low": -0.1, "high": 1.1, "n": 3})


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_are_understood(path):
    assert len(studies.load(str(path)).seeds) >= 3
