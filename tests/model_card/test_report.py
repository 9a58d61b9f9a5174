"""report.html from records, without a browser: what is in it, and what never is."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from benchmarks.report import synthetic_run
from model_card.metadata import CardError
from model_card.records import read
from model_card.report import items, page
from model_card.report.curves import group_of, run_curves
from model_card.report.evaluations import grids_of
from model_card.report.page import write_report, write_report_or_reason

COMMITTED = ROOT / "tests" / "compatibility"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 300 logged steps with 11 evaluated revisions, 44 items a task."""
    return synthetic_run(tmp_path_factory.mktemp("report") / "run", 300, 11, 44)


def data_of(path: Path) -> dict:
    """What the scripts of a page read."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


# ---- the page ----


def test_the_plotting_library_is_the_one_that_was_vendored():
    folder = page.TEMPLATES / "uplot"
    recorded = json.loads((folder / "source.json").read_text())["sha256"]
    found = {name: hashlib.sha256((folder / name.split("/")[-1]).read_bytes()).hexdigest() for name in recorded}
    assert found == recorded
    assert {path.name for path in folder.iterdir()} == {*(name.split("/")[-1] for name in recorded), "source.json"}


def test_the_same_records_give_the_same_bytes_with_the_license_and_no_address_to_load(run, tmp_path):
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert first == write_report(run, tmp_path / "b.html").read_bytes()
    text = first.decode()
    assert "Copyright (c) 2022 Leon Sorokin" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=\"(?!data:)", text)
    assert "default-src 'none'" in text


def test_a_page_of_20000_log_lines_is_below_3_MB(tmp_path):
    folder = synthetic_run(tmp_path / "long", 20_000, 11, 40)
    path = write_report(folder)
    assert path == folder / "report.html" and path.stat().st_size <= 3_000_000
    assert len(data_of(path)["runs"][0]["grids"][0]["step"]) == 20_000


def test_a_page_that_would_be_too_large_has_fewer_log_lines(run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LINES", 4000)
    monkeypatch.setattr(page, "MOST_BYTES", 1)
    asked = []
    monkeypatch.setattr(page, "render", lambda folders, lines: asked.append(lines) or "text")
    write_report(run, tmp_path / "a.html")
    assert asked == [4000, 2000, 1000]


def test_a_page_holds_no_path_and_no_token_of_this_machine(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")
    monkeypatch.chdir(tmp_path)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log[-1]["samples"] = [f"Returns the {tmp_path}/x very-secret-value </script><script>alert(1)</script>"]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    event = {"event": "resumed", "step": 9, "time": "2026-11-01T12:00:00Z", "checkpoint": f"{tmp_path}/checkpoint-9"}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    text = write_report(folder).read_text()
    assert str(tmp_path) not in text and "very-secret-value" not in text
    assert "<script>alert" not in text
    assert data_of(folder / "report.html")["runs"][0]["samples"][-1]["texts"][0].startswith("Returns the ./x …")


def test_a_badge_is_a_link_with_its_words(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    links = {name: {"url": f"https://{name}.example/x"} for name in ("trackio", "wandb", "mlflow")}
    (folder / "dashboards.json").write_text(json.dumps({"links": links}))
    text = write_report(folder).read_text()
    assert '<a href="https://trackio.example/x">Visualize in Trackio</a>' in text
    assert '<a href="https://wandb.example/x">Visualize in Weights &amp; Biases</a>' in text
    assert '<a href="https://mlflow.example/x">Curves in mlflow</a>' in text and "&lt;img" not in text


def test_a_page_that_cannot_be_made_is_a_reason_and_no_error(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "log.jsonl").write_text('{"step": 1, "loss": "no number", "tokens": 1}\n{"step": "a"}\n')
    reason = write_report_or_reason(folder)
    assert reason.startswith("not written: ") and "\n" not in reason and not (folder / "report.html").exists()
    assert "holds no records" in write_report_or_reason(tmp_path)
    monkeypatch.setitem(sys.modules, "markdown_it", None)  # a package that is not installed
    assert write_report_or_reason(run).startswith("not written: ModuleNotFoundError")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"format": "llama_lite.tokens/2"}')
    with pytest.raises(CardError, match="prepared tokens"):
        write_report(tmp_path / "data")


@pytest.mark.parametrize("version", ["cb29044", "f587f49"])
def test_records_of_earlier_versions_have_a_page(version, tmp_path):
    for name in ("run", "adapter", "evaluation"):
        path = write_report(COMMITTED / version / name, tmp_path / f"{name}.html")
        assert "<table>" in path.read_text()
    grids = data_of(tmp_path / "evaluation.html")["evaluations"][0]["grids"]
    assert {grid["task"]: grid["kind"] for grid in grids} == {
        "embedded_mmlu_cloze": "choice",
        "arc_easy": "choice",
        "notes": "bits",
    }
    adapter = data_of(tmp_path / "adapter.html")["runs"][0]
    assert [sample["title"] for sample in adapter["samples"]] == ["before tuning", "after tuning"]


def test_an_evaluation_beside_its_run_is_shown_once(run, tmp_path):
    answers = run.parent / f"{run.name}-eval"
    data = data_of(write_report([answers, run], tmp_path / "both.html"))
    assert [evaluation["name"] for evaluation in data["evaluations"]] == [answers.name]
    assert len(data["runs"]) == 1


def test_a_merged_model_has_the_items_of_its_run(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["kind"], record["base"] = "sft", {"name": "base", "hub_id": None, "sha256": "0" * 64}
    record["identity"]["model"]["adapter"] = {"use_lora": True}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "merged").mkdir()
    found = read(folder / "merged")
    assert found.kind == "merged"
    assert grids_of(found.folder, found.evaluations[0])[0]["task"] == "embedded_mmlu_cloze"


@pytest.mark.parametrize("study", ["resume", "curation", "shots"])
def test_a_study_has_its_arms_and_every_difference(study, tmp_path):
    folder = ROOT / "benchmarks" / "studies" / study
    data = data_of(write_report(folder, tmp_path / "study.html"))
    assert len(data["differences"]) == len(json.loads((folder / "comparison.json").read_text()))
    for arm in data["runs"]:
        for series in arm["series"]:
            assert len(series["values"]) == len(arm["grids"][series["grid"]]["step"])
            at = re.search(r" at (\d+)$", arm["name"])
            assert not at or arm["grids"][series["grid"]]["step"][0] >= int(at[1])


def test_a_finished_run_has_a_page(whole_run):
    data = data_of(whole_run / "report.html")
    names = {series["name"] for series in data["runs"][0]["series"]}
    logged = {name for line in (whole_run / "log.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert names == logged - {"step", "tokens", "epoch", "samples"}  # the others are positions and texts


# ---- curves ----


def test_everything_logged_is_drawn_and_spikes_name_their_documents(run):
    found = run_curves(read(run), 20_000)
    names = {series["name"] for series in found["series"]}
    assert {"loss", "grad_norm", "eval_loss", "eval_code_loss", "eval_web_loss", "wall_seconds"} <= names
    assert not names & {"step", "tokens", "epoch", "samples"}
    (first, *_) = [mark for mark in found["marks"] if mark["kind"] == "spike"]
    assert (first["step"], first["tokens"], len(first["documents"])) == (75, 75 * 2048, 4)
    assert first["documents"][0].startswith("numpy/lib/part_")
    records = read(run)
    names = [{"name": f"part {index}"} for index in range(20)]
    spike = {"event": "spike", "step": 9, "time": "2026-11-01T12:00:00Z", "loss": 5.0, "sigmas": 8.0}
    records.events = [{**spike, "at_step": 8, "documents": names, "documents_in_step": 31}, spike]
    some, none = run_curves(records, 100)["marks"]
    assert some["documents"] == [*(f"part {index}" for index in range(12)), "and 19 more"] and none["documents"] == []
    assert sum(mark["kind"] == "saved" for mark in found["marks"]) == 11
    assert found["grids"][0]["seconds"][:2] == [20.11, 20.22]


def test_a_thinned_log_keeps_its_extremes_and_its_spikes(run):
    whole, thin = (run_curves(read(run), lines) for lines in (20_000, 100))
    assert whole["thinned"] == 0 and thin["thinned"] == 300
    assert len(thin["grids"][0]["step"]) <= 110

    def values(found, name):
        return next(series["values"] for series in found["series"] if series["name"] == name)

    for name in ("loss", "grad_norm"):
        assert max(values(whole, name)) == max(values(thin, name))
        assert min(values(whole, name)) == min(values(thin, name))
    assert {75, 165, 240} <= set(thin["grids"][0]["step"])


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss", "loss"),
        ("eval_loss", "loss"),
        ("eval_code_loss", "loss"),
        ("eval_bits_per_byte", "bits_per_byte"),
        ("eval_web_bits_per_byte", "bits_per_byte"),
        ("save_seconds", "seconds"),
        ("eval_embedded_mmlu_cloze_acc_norm", "scores"),
        ("mean_token_accuracy", "mean_token_accuracy"),
        ("eval_mean_token_accuracy", "mean_token_accuracy"),
        ("grad_norm", "grad_norm"),
    ],
)
def test_logged_values_are_grouped_by_their_name(name, group):
    assert group_of(name) == group


# ---- items and calibration ----


def answer(number, nats, gold=None, acc=None):
    """A stored answer with two options."""
    right = float(acc if acc is not None else nats.index(max(nats)) == gold)
    stored = {"leaf": "quiz", "doc_id": number, "filter": "none", "cluster": None, "nats": nats, "options": 2}
    return stored | {"metrics": {"acc": right}, **({} if gold is None else {"gold": gold})}


def evaluated(folder: Path, answers: dict[str, list[dict]]) -> list[dict]:
    """An evaluation's folder with the `answers` of each model; returns its rows of scores."""
    rows = []
    for name in ("results", "samples"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for model, samples in answers.items():
        row = {"model": model, "task": "quiz", "factor": "", "metric": "acc", "filter": "none"}
        (folder / "results" / f"{model}.json").write_text(json.dumps({**row, "key": model}))
        (folder / "samples" / f"{model}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
        rows.append(row)
    return rows


def test_a_grid_says_right_or_wrong_and_the_probability_of_the_right_answer(tmp_path):
    rows = evaluated(
        tmp_path,
        {"a": [answer(0, [0.0, 0.0], 1), answer(1, [-1.0, -2.0], 0)], "b": [answer(0, [-3.0, -2.0], 1)]},
    )
    (grid,) = items.grids(tmp_path, rows)
    assert grid["items"] == ["quiz 0", "quiz 1"] and grid["models"] == ["a", "b"]
    assert grid["right"] == {"acc": ["01", "1-"]}
    assert grid["p"] == [[500, 731], [731, None]]  # 1 / (1 + e^-1) = 0.7311


def test_the_right_option_of_earlier_records_is_what_any_model_was_right_with(tmp_path):
    rows = evaluated(
        tmp_path,
        {
            "a": [answer(0, [0.0, 1.0], acc=0), answer(1, [1.0, 0.0], acc=0)],
            "b": [answer(0, [1.0, 0.0], acc=1), answer(1, [1.0, 0.0], acc=0)],
        },
    )
    assert items.grids(tmp_path, rows)[0]["p"] == [[269, 731], [None, None]]


def test_several_right_options_have_no_probability_and_no_calibration(tmp_path):
    """As of truthfulqa_mc2, whose accuracy is the probability of all right options."""
    mass = {**answer(0, [0.0, 1.0], acc=1), "metrics": {"acc": 0.7}, "right": 2}
    both_right = {**answer(1, [0.0, 1.0], acc=1), "right": 2}
    (grid,) = items.grids(tmp_path, evaluated(tmp_path, {"a": [mass], "b": [mass]}))
    assert grid["values"] == [[0.7, 0.7]] and grid["calibration"] == {}
    (grid,) = items.grids(tmp_path, evaluated(tmp_path, {"a": [both_right], "b": [both_right]}))
    assert grid["right"] == {"acc": ["11"]} and grid["p"] == [[None, None]]


def test_a_perplexity_of_an_item_is_the_exponential_of_its_nats(tmp_path):
    samples = [{"leaf": "quiz", "doc_id": 0, "filter": "none", "cluster": None, "metrics": {"perplexity": -2.0}}]
    (grid,) = items.grids(tmp_path, evaluated(tmp_path, {"a": samples}))
    assert grid["kind"] == "bits" and grid["values"] == [[pytest.approx(7.389, abs=1e-3)]]


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error(tmp_path):
    sure = [answer(number, [0.0, -1.3862943611198906], 0 if number < 8 else 1) for number in range(10)]  # 0.8 and 0.2
    rows = evaluated(tmp_path, {"calibrated": sure, "wrong": [answer(number, [0.0, -30.0], 1) for number in range(4)]})
    found = items.grids(tmp_path, rows)[0]["calibration"]
    assert found["calibrated"]["error"] == pytest.approx(0.0, abs=1e-5)
    ((count, confidence, right, low, high),) = found["calibrated"]["bins"]
    assert (count, confidence, right) == (10, 0.8, 0.8)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's interval of 8 of 10
    assert found["wrong"]["error"] == pytest.approx(1.0)


def test_a_large_evaluation_keeps_every_kth_item(tmp_path, monkeypatch):
    rows = evaluated(tmp_path, {"a": [answer(number, [0.0, 1.0], 1) for number in range(100)]})
    monkeypatch.setattr(items, "MOST_CELLS", 30)
    (grid,) = items.grids(tmp_path, rows)
    assert (grid["total"], len(grid["items"])) == (100, 25) and grid["items"][1] == "quiz 4"
    assert grid["calibration"]["a"]["bins"][0][0] == 100


def test_answers_of_another_call_are_not_taken(tmp_path):
    (row,) = evaluated(tmp_path, {"a": [answer(0, [0.0, 1.0], 1)]})
    assert items.grids(tmp_path, [{**row, "limit": 60}]) == []
