"""run_eval.py: nothing is computed twice or mixed, whatever is killed; scores go to the Hub with what they are of."""

import copy
import csv
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forking
import pytest
import torch
import yaml
from helpers import ROOT, config_file, finished_run, launch, launch_ranks
from hub_server import Fault
from huggingface_hub import HfApi, ModelCard
from transformers import AutoTokenizer

from llama_lite.config.eval import parse_eval
from llama_lite.errors import Refusal
from llama_lite.evaluation import analysis as evaluation_analysis
from llama_lite.evaluation import downloads, lm, perturbations, push_scores, resolve, runner, store, summary
from llama_lite.evaluation.sharing import SharedWork
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.formatting import size
from llama_lite.hub.client import Reference, remove_cached
from llama_lite.hub.download import RemoteWeights
from llama_lite.models import references
from model_card.answers import StoredAnswers
from model_card.records import shown_pairs

pytestmark = pytest.mark.usefixtures("undrawn")

FEW = {"tasks": ["embedded_mmlu_cloze", "embedded_docs"], "limit": 6, "cpu_threads": 1}


@pytest.fixture
def evaluate(base, tmp_path):
    """Run run_eval.py's main() in this process: `evaluate(folder, models=[...])` returns the folder."""
    from run_eval import main

    def call(folder, *argv, **changes):
        main(
            [
                "--config",
                str(config_file(tmp_path, {**FEW, "models": [str(base)]}, output_dir=str(folder), **changes)),
                *argv,
            ]
        )
        return folder

    return call


def table(folder, name="scores.csv"):
    return list(csv.DictReader(io.StringIO((folder / name).read_text())))


@pytest.fixture
def second(base, tmp_path):
    """Another model with the same tokenizer."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, tmp_path / "second")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "second")
    return tmp_path / "second"


def test_scores_samples_and_pairs(evaluate, drawn, base, second, tmp_path):
    out = evaluate(tmp_path / "out", models=[str(base), str(second)])
    rows = table(out)
    assert [(row["model"], row["task"], row["metric"]) for row in rows] == [
        (str(model), task, metric)
        for model in (base, second)
        for task, metric in (
            ("embedded_mmlu_cloze", "acc"),
            ("embedded_mmlu_cloze", "acc_norm"),
            ("embedded_docs", "bits_per_byte"),
        )
    ]
    assert all(
        row["n"] == "6" and row["harness"] == "lm-eval 0.4.13" and row["dtype"] == "float32" and row["prefix_id"] == "0"
        for row in rows
    )
    assert json.loads((out / "scores.json").read_text())[0]["limit"] == 6
    record = read_json(next((out / "results").glob("*mmlu*.json")))
    samples = read_jsonl(out / "samples" / f"{record['key']}.jsonl")
    assert len(samples) == 6 and all(len(s["nats"]) == 4 and s["options"] == 4 and s["prompt"] for s in samples)
    assert sum(s["metrics"]["acc"] for s in samples) / 6 == pytest.approx(record["metrics"]["acc"]["value"])
    (pair,) = [row for row in table(out, "comparison.csv") if row["task"] == "embedded_docs"]
    values = [float(row["value"]) for row in rows if row["metric"] == "bits_per_byte"]
    assert float(pair["difference"]) == pytest.approx(values[1] - values[0]) and float(pair["low"]) < float(
        pair["difference"]
    ) < float(pair["high"])
    assert {path.name for path in (out / "figures").iterdir()} == {"trajectory.png", "generalisation.png"}
    assert all((max(s["nats"]) == s["nats"][s["gold"]]) == s["metrics"]["acc"] and s["subject"] for s in samples)
    assert '"embedded_mmlu_cloze"' in (out / "report.html").read_text()
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in (out / "samples").iterdir())


def test_two_processes_make_the_tables_of_one(evaluate, base, second, tmp_path):
    changes = {"models": [str(base), str(second)], "robustness": ["embedded_mmlu_cloze"]}
    one = evaluate(tmp_path / "one", **changes)
    path = config_file(tmp_path, {**FEW, **changes}, output_dir=str(tmp_path / "two"))
    result = launch_ranks(ROOT / "configs/accelerate/cpu2.yaml", "--config", str(path), script="run_eval.py")
    assert result.returncode == 0, result.stderr

    def scores(folder):
        return [{**row, "date": None} for row in table(folder)]

    two = tmp_path / "two"
    assert scores(two) == scores(one) and table(two, "comparison.csv") == table(one, "comparison.csv")
    assert (two / "robustness.json").read_text() == (one / "robustness.json").read_text()
    assert {path.name for path in (two / "samples").iterdir()} == {path.name for path in (one / "samples").iterdir()}
    assert result.stdout.count("embedded_docs  bits_per_byte") == 2 and result.stdout.count("finished  ") == 1


def test_pairs_are_shared_out_once_each_and_none_after_a_failure(monkeypatch):
    from torch.distributed import HashStore

    from llama_lite.evaluation import sharing

    both, pairs, store, computed = [], [[], []], HashStore(), []
    monkeypatch.setattr(sharing, "raise_on_all_ranks", lambda error: None)
    for rank in range(2):
        both.append(sharing.SharedWork())
        both[rank].store = store
    monkeypatch.setattr(sharing, "WORLD_SIZE", 2)
    for rank in (0, 1):
        monkeypatch.setattr(sharing, "RANK", rank)
        assert both[rank].models(4) == [[0, 1, 2, 3], [2, 3, 0, 1]][rank]
    for model, task in itertools.product(range(4), range(3)):
        for rank, shared in enumerate(both):
            pairs[rank] += [(model, task)] if shared.take((model + 2 * rank) % 4, task) else []
    assert len(pairs[0]) == len(pairs[1]) == 6 and both[0].count(1.5) == (1, 1.5) and both[1].count(2.0) == (2, 3.5)
    assert sharing.SharedWork.take(both[0], 9, 9) and not both[1].take(9, 9)
    assert [shared.add("pairs of a model") for shared in both] == [1, 2]

    def fails():
        raise Refusal("no")

    def computes():
        both[1].stop_if_failed()
        computed.append(1)

    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, own, group: found.__setitem__(0, own))
    monkeypatch.setattr("llama_lite.distributed.waiting_group", lambda: None)
    monkeypatch.setattr(sharing, "WORLD_SIZE", 1)
    both[1].run(computes)
    both[0].run(fails)
    assert not both[1].take(10, 10)
    both[1].run(computes)
    assert computed == [1]  # the other stops at its next batch, and `run` ends with the reason of the first


def test_the_time_is_forecast_before_the_first_item(evaluate, base, second, tmp_path, capsys):
    """For what is still to be computed, and what is left is shown behind each result."""
    models, told = [str(base), str(second)], []
    for argv, changes in (((), {"models": models[:1]}), (("--dry_run",), {"models": models}), ((), {"models": models})):
        evaluate(tmp_path / "out", *argv, **changes)
        told.append(capsys.readouterr().out.splitlines())
    times = [[line for line in lines if line.startswith("time ")] for lines in told]
    assert [len(lines) for lines in times] == [1, 1, 1]
    said = re.search(
        r"about (\d+) s: (\d+) s for 2 \(model, task\) pairs \(batches timed here; .*, then (\d+) s for tables, cards",
        times[0][0],
    )
    assert abs(int(said[1]) - int(said[2]) - int(said[3])) <= 1
    assert all("for 2 (model, task) pairs, 2 are kept" in lines[0] for lines in times[1:])
    first, last = (line for line in told[0] if line.startswith(str(base)))
    assert (
        re.search(r", \d+ s left$", first) and "left" not in last and told[0].index(times[0][0]) < told[0].index(first)
    )
    assert not any(line.startswith(str(base)) for line in told[1])
    evaluate(tmp_path / "out", "--dry_run", models=models)
    assert "cards and figures: all 4 (model, task) pairs are kept from before" in capsys.readouterr().out


def test_the_forecast_counts_the_tokens_that_are_computed(base, monkeypatch):
    from llama_lite.evaluation import forecast
    from llama_lite.evaluation.tasks import registry

    model, seen = resolve.resolve_models([str(base)])[0], []
    score, fractions = lm.SharedContextLM._score_rows, []
    monkeypatch.setattr(
        lm.SharedContextLM,
        "_score_rows",
        lambda self, rows: (seen.append(sum(map(lm._num_tokens, rows))), score(self, rows))[1],
    )
    settings = runner.Settings("float32", 1, None, None, False)
    for task in registry.build(["embedded_mmlu_cloze", "embedded_docs"], {}, {}, False):
        loaded = runner._load(model, model.tokenizer(), settings, [task])
        loaded.on_progress = fractions.append
        seen.clear()
        runner._run_task(loaded, task, store.chosen(task, forecast.SAMPLED, 1), settings)
        work = forecast.work_of(task, forecast.SAMPLED, 1, model.tokenizer(), 512)
        assert work.tokens == pytest.approx(sum(seen), rel=0.15) and work.generated == 0
    assert all(0 < fraction <= 1 for fraction in fractions) and fractions[-1] == 1


def test_what_is_left_follows_the_measured_pace(monkeypatch):
    from llama_lite.evaluation import forecast, sharing

    now = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])
    expected = forecast.Forecast({(0, task): 100.0 for task in range(10)}, 11)
    with forecast.Progress(expected, sharing.SharedWork()) as progress:
        assert progress.left() == 1000
        progress.finish(0, 10)  # one that was kept
        now[0] = 200.0
        progress.advance(0, 0, 0.5)
        assert progress.left() == 950 * 250 / 100
        progress.finish(0, 0)
        assert progress.left() == 900 * 250 / 150 and progress.pairs == 2
        for task in range(1, 10):
            progress.finish(0, task)
        assert progress.left() == 0 and progress.left_in_words() == ""
    assert forecast.Forecast({}, 2, problem="KeyError: 'a'").line() == "time      unknown: KeyError: 'a'"


def test_the_pairs_that_are_shown_are_first_and_last_steps_and_bases_with_their_tuned_models():
    def pairs(*names: str) -> list[tuple[str, str]]:
        steps = {name: int(name.partition("@step-")[2].partition("+")[0] or 99) for name in names}
        return shown_pairs({"model": name, "step": steps[name], "adapter": name.partition("+")[2]} for name in names)

    assert pairs("a@step-1", "a@step-2", "a@step-3", "a+x") == [("a@step-1", "a@step-3"), ("a@step-3", "a+x")]
    assert pairs("b", "a", "a+x", "a+y") == [("b", "a"), ("a", "a+x"), ("a", "a+y")]
    assert pairs("a+x", "a") == [("a+x", "a")] and pairs("a") == []
    assert pairs("a@step-2", "b@step-1", "b@step-3") == [("b@step-1", "b@step-3"), ("a@step-2", "b@step-3")]
    of_hub = [
        {"model": "o/a@step-7", "adapter": None},
        {"model": "me/x", "adapter": "me/x", "base_model": "o/a@step-7"},
    ]
    assert shown_pairs(of_hub) == [("o/a@step-7", "me/x")]
    # a base of which this step was not evaluated: its run's last step; another revision is one of its run
    tuned = {"model": "b@step-5+x", "adapter": "x", "base_model": "b@step-5"}
    assert shown_pairs([{"model": "a"}, {"model": "b"}, tuned]) == [("a", "b"), ("b", "b@step-5+x")]
    assert shown_pairs([{"model": "o/a@main", "step": 9}, {"model": "o/a@step-5", "step": 5}]) == [
        ("o/a@main", "o/a@step-5")
    ]


def test_lines_of_changes_name_both_models_and_which_is_better(capsys):
    def row(task: str, first: str, second: str, difference: float, p: float, **changes) -> dict:
        metric = "acc" if task == "quiz" else "bits_per_byte"
        ends = {"low": difference - 0.01, "high": difference + 0.01}
        found = {"task": task, "metric": metric, "filter": "none", "first": first, "second": second, **ends}
        return {**found, "difference": difference, "p_fdr": p, "family": "exploratory", "detectable": 0.02, **changes}

    rows = [row("docs", "a@step-1", "a@step-2", -0.4, 1e-9), row("docs", "a@step-2", "a+x", 0.06, 1e-9)]
    rows += [row("quiz", "a@step-1", "a@step-2", 0.1, 0.01), row("quiz", "a@step-2", "a+x", 0.001, 0.7)]
    rows += [row("docs", "a@step-1", "a+x", -0.3, 0.01)]
    pairs = [("a@step-1", "a@step-2"), ("a@step-2", "a+x")]
    summary.print_changes(pairs, rows)
    assert capsys.readouterr().out.splitlines() == [
        "change    a@step-1 -> a@step-2",
        "          docs: bits_per_byte -0.4000 (-0.4100 to -0.3900), p <0.0001, better",
        "          quiz: acc +0.1000 (+0.0900 to +0.1100), p 0.0100, better",
        "change    a@step-2 -> a+x",
        "          docs: bits_per_byte +0.0600 (+0.0500 to +0.0700), p <0.0001, worse",
        "          quiz: acc +0.0010 (-0.0090 to +0.0110), p 0.7000, not significant (detectable from 0.0200 on)",
        "          p: adjusted for the 5 comparisons in comparison.csv (false discovery rate)",
    ]
    declared = row("docs", "a@step-1", "a+x", -0.3, 0.01, family="primary", p_holm=0.02)
    del declared["p_fdr"]
    summary.print_changes(pairs, [declared])
    assert capsys.readouterr().out.splitlines() == [
        "change    a@step-1 -> a+x",
        "          docs: bits_per_byte -0.3000 (-0.3100 to -0.2900), p 0.0200 (primary, Holm), better",
    ]


def test_variants_of_one_factor_have_one_line(capsys):
    from llama_lite.evaluation import forecast, sharing

    def record(value: float, factor: str | None, variant: str = "", model: str = "a") -> dict:
        metrics = {"acc": {"value": value, "low": None, "high": None, "n": 30}}
        name = f"quiz|{factor}: {variant}" if factor else "quiz"
        return {"model": model, "task": name, "base": "quiz", "factor": factor, "truncated": 2, "metrics": metrics}

    with forecast.Progress(forecast.Forecast({}, 6), sharing.SharedWork()) as progress:
        lines = summary.ScoreLines(progress)
        lines.add(0, 0, record(0.5, None), True)
        for value, variant in ((0.2, "0.1, seed 1"), (0.3, "0.1, seed 2"), (0.25, "0.3, seed 1")):
            lines.add(0, 1, record(value, "swap", variant), True)
        lines.add(0, 2, record(0.4, "drop", "0.1, seed 1"), False)  # kept from before
        lines.add(0, 3, record(0.4, "case", "0.1, seed 1"), True)
        lines.add(1, 0, record(0.6, None, model="b"), False)
        lines.close()
    assert capsys.readouterr().out.splitlines() == [
        "a  quiz  acc 0.5000 (no interval), 30 items, 2 requests longer than the context",
        "a  quiz, swap (3 variants)  acc 0.2000 to 0.3000, 30 items, 6 requests longer than the context",
        "a  quiz, case  acc 0.4000, 30 items, 2 requests longer than the context",
        "b  quiz  acc 0.6000 (no interval), 30 items, 2 requests longer than the context, as before",
    ]


def test_nothing_is_computed_twice_and_nothing_is_mixed(evaluate, base, second, tmp_path, monkeypatch):
    calls = []
    original = lm.run
    monkeypatch.setattr(lm, "run", lambda *args: (calls.append(list(args[1])), original(*args))[1])
    out = evaluate(tmp_path / "out")
    first = (out / "scores.csv").read_text()
    assert len(calls) == 2
    evaluate(out)
    assert len(calls) == 2 and (out / "scores.csv").read_text() == first
    evaluate(out, models=[str(base), str(second)])
    assert len(calls) == 4
    evaluate(out, limit=7)  # other items
    evaluate(out, limit=6, seed=5)  # another sample of them
    assert len(calls) == 8
    evaluate(out, dtype="bfloat16")
    assert len(calls) == 10 and {row["dtype"] for row in table(out)} == {"bfloat16"}
    for module in (store, runner):
        monkeypatch.setattr(module, "harness_version", lambda: "lm-eval 9")
    evaluate(out)
    assert len(calls) == 12
    monkeypatch.undo()
    evaluate(out)
    assert (out / "scores.csv").read_text() == first


DAMAGES = {  # what happens to (result, samples) of a pair, and what is said of it
    "value": (
        lambda result, samples: result.write_text(result.read_text().replace('"value": ', '"value": 1')),
        "its record was altered",
    ),
    "seal": (
        lambda result, samples: write_json(result, {k: v for k, v in read_json(result).items() if k != "digest"}),
        "it has no digests",
    ),
    "json": (lambda result, samples: result.write_text(result.read_text()[:-40]), "not valid JSON"),
    "another": (
        lambda result, samples: shutil.copy(next(p for p in result.parent.iterdir() if p != result), result),
        "its record was altered",
    ),
    "answer": (
        lambda result, samples: samples.write_text(samples.read_text().replace("1.0", "0.0").replace("-", "-1", 1)),
        "its samples were altered",
    ),
    "cut": (
        lambda result, samples: samples.write_text("".join(samples.read_text().splitlines(True)[:-1])),
        "its samples were altered",
    ),
    "gone": (lambda result, samples: samples.unlink(), "its samples are missing"),
}


def test_a_kept_result_that_was_altered_is_computed_again(evaluate, tmp_path, capsys):
    out = evaluate(tmp_path / "out")

    def tables() -> dict[str, str]:  # without dates: midnight may pass
        return {
            name: re.sub(r"\d{4}-\d\d-\d\d", "", (out / name).read_text()) for name in ("scores.csv", "comparison.csv")
        }

    first = tables()
    result = next((out / "results").glob("*docs*.json"))
    samples = out / "samples" / f"{result.stem}.jsonl"
    whole = result.read_text(), samples.read_text()
    for name, (damage, said) in DAMAGES.items():
        damage(result, samples)
        assert not samples.exists() or (result.read_text(), samples.read_text()) != whole, name
        capsys.readouterr()
        evaluate(out)
        messages = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
        assert (
            len(messages) == 1
            and f"results/{result.stem}: " in messages[0]
            and f"{said}" in messages[0]
            and messages[0].endswith("so it is computed again")
        ), name
        assert tables() == first and samples.read_text() == whole[1], name
    evaluate(out)
    assert "computed again" not in capsys.readouterr().out


def test_tables_that_were_altered_are_not_taken_over(evaluate, whole_run, tmp_path):
    """Neither into a study, nor, from a run's folder, into its card."""
    from llama_lite.studies.analysis import _scores
    from model_card.card import CardError
    from model_card.records import read

    shutil.copytree(whole_run, tmp_path / "run")
    out = evaluate(tmp_path / "out", models=[str(tmp_path / "run")], tasks=["embedded_docs"])
    assert _scores(out)[str(tmp_path / "run")] and read(tmp_path / "run").evaluations[0].scores
    for path in (out / "scores.csv", tmp_path / "run/evaluation/out/scores.json"):
        path.write_text(path.read_text().replace("embedded_docs", "embedded_dogs"))
    with pytest.raises(Refusal, match=r"scores\.csv was altered since its evaluation"):
        _scores(out)
    with pytest.raises(CardError, match=r"scores\.json was altered since its evaluation: evaluate again"):
        read(tmp_path / "run")


def test_evaluations_whose_folders_have_one_name_both_stay_in_a_run(evaluate, whole_run, tmp_path, capsys):
    """RUN/evaluation/NAME is of one evaluation; the same one again replaces its own, also an earlier version's."""
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))

    def handed():
        return {
            path.parent.name: {row["task"] for row in read_json(path)}
            for path in (run / "evaluation").glob("*/scores.json")
        }

    def told(word="scores "):
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(word)]

    evaluate(tmp_path / "a/out", models=[str(run)], tasks=["embedded_docs"])
    first = run / "evaluation/out/run.json"
    record = read_json(first)
    assert len(record["of"]["folder"]) == 16
    write_json(
        first, {**record, "of": {name: value for name, value in record["of"].items() if name != "folder"}}
    )  # as earlier versions did
    evaluate(tmp_path / "a/out", models=[str(run)], tasks=["embedded_docs"])
    assert handed() == {"out": {"embedded_docs"}} and told() == [] and read_json(first)["of"] == record["of"]
    evaluate(tmp_path / "b/out", models=[str(run)], tasks=["embedded_web"])
    assert handed() == {"out": {"embedded_docs"}, "out-2": {"embedded_web"}}
    assert [grid["task"] for grid in read_json(run / "evaluation/out-2/items.json")] == ["embedded_web"]
    assert '"embedded_web"' in (run / "report.html").read_text()
    (line,) = told()
    assert "out-2: the folder of another evaluation has the name out, too, and its scores stay" in line
    evaluate(tmp_path / "b/out", models=[str(run)], tasks=["embedded_code"])
    (line,) = told("replaced ")
    assert f"b/out held {run} on embedded_web: the new ones will not. --output_dir OTHER keeps both" in line
    evaluate(tmp_path / "b/out-2", models=[str(run)], tasks=["embedded_science"])
    evaluate(tmp_path / "a/out", models=[str(run)], tasks=["embedded_docs", "embedded_web"])
    assert handed() == {
        "out": {"embedded_docs", "embedded_web"},
        "out-2": {"embedded_code"},
        "out-2-2": {"embedded_science"},
    }
    shutil.rmtree(tmp_path / "a/out")
    evaluate(tmp_path / "a/out", models=[str(run)], tasks=["embedded_docs"])
    assert handed()["out"] == {"embedded_docs"}
    from model_card.records import read

    assert {one.name for one in read(run).evaluations} == {"out", "out-2", "out-2-2"}


def test_an_adapters_row_names_its_own_revision_and_its_bases(tmp_path):
    located = [
        references.Located(f"org/{n}@{r}", tmp_path, f"org/{n}", r, c)
        for n, r, c in (("base", "step-000040", "b0"), ("tuned", "step-000008", "a0"))
    ]
    for adapter, expected in (
        (located[1], ("step-000008", "a0", "org/tuned@step-000008", "org/base@step-000040", "step-000040", "b0")),
        (None, ("step-000040", "b0", None, None, None, None)),
    ):
        record = store.where_from(resolve.Model("m", located[0], adapter)) | {"metrics": {"acc": {"value": 0.5}}}
        (row,) = store.rows_of(record)
        assert (
            tuple(row[name] for name in "revision commit adapter base_model base_revision base_commit".split())
            == expected
        )
    old = "model,revision,commit,adapter,metric,value\nm,r,c,,acc,0.25\n"  # as tables of earlier versions are
    rows = list(csv.DictReader(io.StringIO(push_scores.merged(old, [row, row]))))
    assert [(row["revision"], row["value"], row["base_model"]) for row in rows] == [
        ("r", "0.25", ""),
        ("step-000040", "0.5", ""),
    ]


def test_a_changed_model_under_the_same_name_is_computed_again(evaluate, second, base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    out = evaluate(tmp_path / "out", models=[str(tmp_path / "model")])
    before = table(out)
    shutil.copy(second / "model.safetensors", tmp_path / "model")
    evaluate(out, models=[str(tmp_path / "model")])
    changed = [row["value"] for row in table(out)]
    assert [row["value"] for row in before] != changed
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "rms_norm_eps": 0.5, "transformers_version": "0"})
    )
    evaluate(out, models=[str(tmp_path / "model")])
    assert (
        changed
        != [row["value"] for row in table(out)]
        == [row["value"] for row in table(evaluate(tmp_path / "fresh", models=[str(tmp_path / "model")]))]
    )


def test_a_folder_has_one_name_however_it_is_spelled(base, tmp_path, monkeypatch):
    """Also in arguments that name a model; a name of the Hub stays as it is."""
    from run_eval import check_named_models

    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo-sft"):
        Path("runs", name).mkdir(parents=True)
    shutil.copytree(base, "runs/base")
    (model,) = resolve.resolve_models(["./runs//base/"])
    assert model.name == model.base.name == "runs/base"
    with pytest.raises(Refusal, match="--models runs/base is given twice"):
        resolve.resolve_models(["runs/base", "./runs/base"])
    spellings = {
        "./runs/demo/@step-*": "runs/demo@step-*",
        "runs/demo/+./runs/demo-sft/": "runs/demo+runs/demo-sft",
        "./org/name": "./org/name",  # no folder here, and not the Hub's org/name
        "org/name@refs/pr/1": "org/name@refs/pr/1",
        str(tmp_path / "runs" / "demo") + "/": str(tmp_path / "runs" / "demo"),
    }
    assert {text: resolve.model_name(text) for text in spellings} == spellings
    arguments = SimpleNamespace(
        primary=["t=runs/demo/,./runs/demo-sft", "u"], variant_models=["./runs/demo"], reference_model="runs/demo/"
    )
    check_named_models([SimpleNamespace(name=f"runs/{name}") for name in ("demo", "demo-sft")], arguments)
    assert arguments.primary == ["t=runs/demo,runs/demo-sft", "u"]
    assert (arguments.variant_models, arguments.reference_model) == (["runs/demo"], "runs/demo")


def test_a_kept_result_of_another_spelling_is_of_the_name_asked_for(tmp_path):
    """As earlier versions kept `runs/demo/`; the answers behind it are found by the new name."""
    kept, leaf = store.Store(tmp_path), SimpleNamespace(aggregation=lambda: {"acc": lambda values: sum(values) / 2})
    samples = [
        {"leaf": "t", "doc_id": n, "item": f"{n}", "filter": "none", "cluster": None, "metrics": {"acc": float(n)}}
        for n in range(2)
    ]
    before = {"model": "runs/demo/+runs/demo-sft/", "adapter": "runs/demo-sft/", "base_model": "runs/demo/"}
    kept.save("key", {"key": "key", **before, "task": "t"}, samples)
    base, adapter = (SimpleNamespace(name=name, revision=None, commit=None) for name in ("runs/demo", "runs/demo-sft"))
    model = SimpleNamespace(name="runs/demo+runs/demo-sft", base=base, adapter=adapter)
    record = runner._kept(kept, "key", SimpleNamespace(leaves={"t": leaf}), model)
    now = {"model": model.name, "adapter": "runs/demo-sft", "base_model": "runs/demo"}
    assert record.items() >= now.items() and record["metrics"]["acc"]["value"] == 0.5
    assert kept.result("key").items() >= now.items()
    assert StoredAnswers(tmp_path).of({"model": model.name, "task": "t"}) == samples


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(base, second, tmp_path):
    changes = {**FEW, "models": [str(base), str(second)], "sensitivity": ["embedded_mmlu_cloze"], "limit": 12}
    whole = config_file(tmp_path, changes, output_dir=str(tmp_path / "whole"))
    assert launch("--config", str(whole), script="run_eval.py").returncode == 0
    results = len(list((tmp_path / "whole" / "results").glob("*.json")))
    cut = config_file(tmp_path, changes, output_dir=str(tmp_path / "cut"))
    kept: dict = {}
    for there in (1, results - 1):  # killed when so many are there: a machine's pace decides nothing
        command = [sys.executable, str(ROOT / "run_eval.py"), "--config", str(cut)]
        process = forking.start(command, tmp_path / "output.txt")
        while len(list((tmp_path / "cut" / "results").glob("*.json"))) < there and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for path in (tmp_path / "cut" / "results").glob("*.json"):
            assert (
                kept.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
            )  # what was done was not done again
    assert launch("--config", str(cut), script="run_eval.py").returncode == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items()) and len(kept) >= results - 1 >= 3
    for name in ("scores.csv", "comparison.csv", "sensitivity.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_checkpoints_adapters_and_what_they_are_of(evaluate, whole_run, whole_sft, base, tmp_path):
    models = [
        *resolve.resolve_models([f"{whole_run}@step-*", f"{base}+{whole_sft}"]),
        *resolve.resolve_models([str(whole_sft)]),
    ]
    assert [(model.step, model.tokens) for model in models] == [
        (10, 10240),
        (12, 12288),
        (8, models[2].tokens),
        (8, models[2].tokens),
    ]
    assert models[2].tokens > 1000 and models[2].adapter.folder == whole_sft and models[3].base.folder == base
    with pytest.raises(Refusal, match="is one model, given twice"):
        resolve.resolve_models([f"{base}+{whole_sft}", str(whole_sft)])
    out = evaluate(tmp_path / "out", models=[f"{base}", f"{base}+{whole_sft}"], apply_chat_template=False)
    rows = {row["model"]: row for row in table(out) if row["metric"] == "bits_per_byte"}
    assert rows[str(base)]["value"] != rows[f"{base}+{whole_sft}"]["value"] and rows[f"{base}+{whole_sft}"][
        "adapter"
    ] == str(whole_sft)


def test_a_chat_format_counts_wherever_it_lies_and_another_one_is_another_question(evaluate, base, second, tmp_path):
    """Two models of one tokenizer, each with a template of its own inside tokenizer_config.json, where transformers 4 wrote them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    mine = tmp_path / "mine"
    shutil.copytree(base, mine)

    def give(folder, sign):
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + sign + "{% endfor %}"
        tokenizer.save_pretrained(folder, save_jinja_files=False)

    def asked() -> dict[str, set[str]]:
        out = evaluate(
            tmp_path / "out", models=[str(mine), str(second)], tasks=["embedded_mmlu_cloze"], apply_chat_template=True, limit=2, variant_limit=1,
            sensitivity=["embedded_mmlu_cloze"],
        )  # fmt: skip
        records = [read_json(path) for path in (out / "results").glob("*.json")]
        assert {record["chat_template"] for record in records if record["factor"] == "chat format"} == {False}
        return {
            str(model): {r["key"] for r in records if r["model"] == str(model) and not r["factor"]}
            for model in (mine, second)
        }

    give(mine, "!")
    give(second, "?")
    first = asked()
    give(second, "...")
    then = asked()
    assert len(first[str(mine)]) == 1 and then[str(mine)] == first[str(mine)]
    assert len(first[str(second)]) == 1 and len(then[str(second)]) == 2  # of the other format it is computed again


def test_variants_and_contamination(evaluate, base, settings, whole_run, tmp_path):
    out = evaluate(
        tmp_path / "out",
        tasks=["embedded_next_sentence", "embedded_docs"],
        limit=8,
        sensitivity=["embedded_next_sentence"],
        robustness=["embedded_next_sentence"],
        variant_limit=4,
        contamination=settings["prepared_dir"],
    )
    rows = read_json(out / "sensitivity.json")
    assert (
        rows[0]["factor"] == "all"
        and rows[0]["n"] == 4
        and rows[0]["k"] == 1 + sum(len(row["variants"]) - 1 for row in rows[1:])
    )
    order = next(row for row in rows if row["factor"] == "option order")
    assert order["flips"]["value"] == 0 and all(change["value"] == 0 for change in order["changes"])
    assert {row["factor"] for row in read_json(out / "robustness.json")} >= {"all", "swap", "keyboard", "distractor"}
    found = {row["task"]: row for row in read_json(out / "contamination.json")}
    model = found["embedded_docs"]["models"][str(base)]
    assert (
        found["embedded_docs"]["judged"] == 8
        and model["all"]["n"] == 8 == model["clean"]["n"] + model["contaminated"]["n"] + model["too_short"]["n"]
    )


# ---- one's own tasks ----


QUESTIONS = {
    "facts": [
        {"question": f"Which of these numbers is {n}?", "choices": [f"the {n}", f"the {n + 1}", "none"][: 2 + n % 2],
         "answer": f"the {n}" if n % 3 else 0, "group": f"passage {n // 2}"}
        for n in range(8)
    ],
    "capitals": [{"prompt": f"Question {n}: say the\nAnswer:", "answer": ["the", "The."]} for n in range(6)],
    "notes": [{"text": f"The function number {n} returns a list of values." * 3, "group": n % 3} for n in range(6)],
}  # fmt: skip


def write_questions(folder, name, items):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder / f"{name}.jsonl"


def test_own_questions_are_tasks_with_statistics_variants_and_robustness(evaluate, base, second, tmp_path, monkeypatch):
    """Three files, of each form, and a folder of two files, from the command line."""
    monkeypatch.setattr(perturbations, "OPERATIONS", ("swap", "distractor"))
    paths = {name: write_questions(tmp_path / "own", name, items) for name, items in QUESTIONS.items()}
    for part in ("history", "physics"):
        write_questions(tmp_path / "quiz", part, QUESTIONS["facts"])
    arguments = [f"{name}={path}" for name, path in paths.items()] + [f"quiz={tmp_path / 'quiz'}"]
    varied = ["facts", "capitals"]
    out = evaluate(
        tmp_path / "out", "--questions", *arguments, "--sensitivity", *varied, "--robustness", *varied,
        "--primary", "facts", f"notes={base},{second}", models=[str(base), str(second)], tasks=["embedded_docs"],
        limit=None, variant_limit=4,
    )  # fmt: skip
    rows = {(row["model"], row["task"], row["metric"]): row for row in table(out) if not row["factor"]}
    found = rows[str(base), "facts", "acc"]
    assert (found["n"], found["clusters"]) == ("8", "4") and 0 <= float(found["low"]) < float(found["high"]) <= 1
    assert float(found["chance"]) == pytest.approx((4 / 2 + 4 / 3) / 8)
    assert rows[str(base), "capitals", "exact_match"]["n"] == "6" and rows[str(base), "quiz", "acc"]["n"] == "16"
    notes = rows[str(base), "notes", "bits_per_byte"]
    assert (notes["n"], notes["clusters"]) == ("6", "3") and float(notes["value"]) > 0
    pairs = {row["task"]: row for row in table(out, "comparison.csv")}
    assert {task: row["family"] for task, row in pairs.items()} == {
        "facts": "primary", "notes": "primary", "capitals": "exploratory", "quiz": "exploratory",
        "embedded_docs": "exploratory",
    }  # fmt: skip
    assert all(bool(row["p_holm"]) == (row["family"] == "primary") for row in pairs.values())
    for name, factors in (("sensitivity", {"description", "option order"}), ("robustness", {"swap", "distractor"})):
        variants = {(row["task"], row["factor"]): row for row in read_json(out / f"{name}.json")}
        assert {("facts", factor) for factor in factors} <= variants.keys()
        for task in varied:
            row = variants[task, "all"]
            assert row["n"] == 4 and (row["spread"]["low"] == 0) == (row["spread"]["p"] > 0.05)
        assert variants["capitals", "all"]["flips"]["blind"] is None
    card = (out / "README.md").read_text()
    assert "primary: declared before the evaluation, Holm's correction over 2" in card and "no interval" not in card


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ['{"question": "a"}'],
            "line 1 has question: it needs question, choices, answer; or prompt, answer; or prompt, completion; or prompt, ",
        ),
        (['{"text": "a"}', '{"prompt": "a", "answer": "b"}'], "line 2 has another form than the lines before it"),
        (
            ['{"question": "a", "choices": ["b", "c"], "answer": 2}'],
            "answer is one of the choices, or its index from 0",
        ),
        (['{"text": "a"', ""], "line 1 is no JSON"),
        (['{"text": " "}'], "line 1: question, prompt and text are strings that are not empty"),
        (["", ""], "has no lines"),
    ],
)
def test_questions_that_are_none_are_refused(tmp_path, lines, message):
    from llama_lite.evaluation.tasks import own

    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    with pytest.raises(Refusal, match=re.escape(message)):
        own.load("mine", str(tmp_path / "q.jsonl"))


def test_tasks_of_an_include_path_keep_their_filters_apart(evaluate, base, tmp_path):
    """lm-eval's own definition format; an answer has a row for each filter, and pairs are within one."""
    folder = tmp_path / "tasks"
    rows = [{"question": f"Say {n}", "answer": str(n), "group": "g"} for n in range(6)]
    data = write_questions(folder, "data", rows)
    filters = [
        {
            "name": "strict-match",
            "filter": [{"function": "regex", "regex_pattern": "^never$"}, {"function": "take_first"}],
        },
        {
            "name": "flexible-extract",
            "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}],
        },
    ]
    definition = {
        "task": "my_sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        "filter_list": filters, "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "my_sums.yaml").write_text(yaml.safe_dump(definition))
    out = evaluate(tmp_path / "out", "--include_path", str(folder), tasks=["my_sums"])
    found = [(row["metric"], row["filter"], row["n"]) for row in table(out)]
    assert found == [("exact_match", "strict-match", "6"), ("exact_match", "flexible-extract", "6")]
    (record,) = [read_json(path) for path in (out / "results").iterdir()]
    samples = read_jsonl(out / "samples" / f"{record['key']}.jsonl")
    wrong, right = ([{**s, "metrics": {"exact_match": float(value)}} for s in samples] for value in (0, 1))
    half = [{**s, "metrics": {"exact_match": float(s["filter"] == "flexible-extract")}} for s in samples]
    scores = store.metrics_of(half)
    assert list(scores) == ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert [one["value"] for one in scores.values()] == [0, 1] and {one["n"] for one in scores.values()} == {6}
    records = [{"task": "t", "variant": "", "factor": "", "model": m, "key": m, "metrics": scores} for m in "ab"]
    pairs = evaluation_analysis.compare(records, {"a": wrong, "b": half}.get)
    assert [(row["filter"], row["difference"], row["n"]) for row in pairs] == [
        ("strict-match", 0, 6),
        ("flexible-extract", 1, 6),
    ]
    assert evaluation_analysis.pair(wrong, right, "exact_match,strict-match", ("a", "b"))["difference"] == 1


def write_task(folder, rows: list[dict], **config):
    """A folder for --include_path with the task `mine` of these rows."""
    data = write_questions(folder, "data", rows)
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / "mine.yaml").write_text(
        yaml.safe_dump({"task": "mine", **files, "doc_to_text": "{{question}}", **config})
    )
    return folder


def test_a_metric_of_all_items_together_is_named_and_not_shown(evaluate, tmp_path, capsys):
    rows = [{"question": f"Is {n} even?", "answer": n % 2} for n in range(6)]
    made = {"f1": "f1", "acc": "mean"}
    metrics = [{"metric": name, "aggregation": how, "higher_is_better": True} for name, how in made.items()]
    options = {"output_type": "multiple_choice", "doc_to_choice": ["yes", "no"], "doc_to_target": "answer"}
    folder = write_task(tmp_path / "tasks", rows, metric_list=metrics, **options)
    out = evaluate(tmp_path / "out", "--include_path", str(folder), tasks=["mine"], limit=None)
    assert [(row["metric"], row["chance"]) for row in table(out)] == [("acc", "0.5")]
    assert "not shown mine: f1, which lm-eval computes from all items together" in capsys.readouterr().out
    (sample, *_) = read_jsonl(next((out / "samples").iterdir()))
    assert sample["metrics"].keys() == {"acc"} and sample["pooled"]["f1"][0] == 0


def test_a_metric_of_all_items_that_an_earlier_version_kept_as_a_mean_is_computed_again(
    evaluate, tmp_path, capsys, monkeypatch
):
    rows = [{"question": f"Is {n} even?", "answer": n % 2} for n in range(6)]
    made = {"acc_norm": "median", "acc": "mean"}
    metrics = [{"metric": name, "aggregation": how, "higher_is_better": True} for name, how in made.items()]
    options = {"output_type": "multiple_choice", "doc_to_choice": ["yes", "no"], "doc_to_target": "answer"}
    folder = write_task(tmp_path / "tasks", rows, metric_list=metrics, **options)
    chosen = {"tasks": ["mine", "embedded_docs"], "limit": None}
    out = evaluate(tmp_path / "out", "--include_path", str(folder), **chosen)
    scores = (out / "scores.csv").read_text()
    kept = store.Store(out)
    key = next(path.stem for path in (out / "results").iterdir() if "mine" in path.stem)
    samples = [{**sample, "metrics": {**sample["metrics"], **sample.pop("pooled")}} for sample in kept.samples(key)]
    assert 0 < sum(sample["metrics"]["acc_norm"] for sample in samples) < 6  # so that the median is no mean
    kept.save(key, {**kept.result(key), "metrics": store.metrics_of(samples)}, samples)
    calls, original = [], lm.run
    monkeypatch.setattr(lm, "run", lambda *args: calls.append(list(args[1])) or original(*args))
    line = (
        f"WARNING   results/{key}: acc_norm is no mean of its items, as an earlier version kept it, so it is computed"
    )
    for times in (1, 0):
        capsys.readouterr()
        calls.clear()
        evaluate(out, "--include_path", str(folder), **chosen)
        assert capsys.readouterr().out.count(line) == times and calls == [["mine"]] * times
        assert (out / "scores.csv").read_text() == scores and "acc_norm" not in scores


GENERATED = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


CHOSEN = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def test_tasks_of_an_include_path_are_varied_and_perturbed(evaluate, base, tmp_path, monkeypatch):
    """From the command line. The unchanged variant is the task itself, and no item is an example of itself."""
    monkeypatch.setattr(perturbations, "OPERATIONS", ("swap", "distractor"))
    rows = [{"question": f"Which is number {n}?", "choices": [f"the {n}", "none"], "answer": n % 2} for n in range(6)]
    folder, prompts = write_task(tmp_path / "tasks", rows, gen_prefix="It is", **CHOSEN), []
    original = lm.SharedContextLM.loglikelihood

    def loglikelihood(self, requests, disable_tqdm=False):
        prompts.extend((request.doc["question"], request.args[0]) for request in requests)
        return original(self, requests, disable_tqdm)

    monkeypatch.setattr(lm.SharedContextLM, "loglikelihood", loglikelihood)
    asked = ["--include_path", str(folder), "--sensitivity", "mine", "--robustness", "mine"]
    out = evaluate(tmp_path / "out", *asked, tasks=["mine"], limit=None)
    for name, factors in (("sensitivity", {"description", "examples", "option order"}), ("robustness", {"swap"})):
        found = {row["factor"]: row for row in read_json(out / f"{name}.json") if row["task"] == "mine"}
        assert {"all", *factors} <= found.keys() and found["all"]["n"] == 6
        assert all(change["value"] == 0 for change in found["option order"]["changes"])
    plain, *unchanged = [row for row in table(out) if row["factor"] in ("", "reference")]
    assert plain["metric"] == "acc" and unchanged and {row["value"] for row in unchanged} == {plain["value"]}
    assert any(text.count("Which is number") == 4 for _, text in prompts)
    assert all(text.lower().count(question.lower()) <= 1 and text.endswith("It is") for question, text in prompts)


LETTERED = {
    **CHOSEN,
    "doc_to_choice": list("ABCD"),
    "doc_to_text": "{{question}}\n{% for c in choices %}({{'ABCD'[loop.index0]}}) {{c}}\n{% endfor %}Letter:",
}


@pytest.mark.parametrize(
    "config, message",
    [
        (LETTERED, "mine lists its options in a prompt that is not written as MMLU's"),
        ({**CHOSEN, "doc_to_target": "right"}, "mine has several right options, or a function of its own"),
        ({**GENERATED, "doc_to_target": "question"}, "mine is generated: its prompt cannot"),
    ],
)
def test_tasks_of_an_include_path_that_cannot_be_varied_are_refused(evaluate, tmp_path, config, message):
    rows = [{"question": f"Say {n}", "choices": list("wxyz"), "answer": n, "right": [0, n]} for n in range(4)]
    folder = write_task(tmp_path / "tasks", rows, **config)
    with pytest.raises(Refusal, match=f"--tasks {message}"):
        evaluate(tmp_path / "out", "--include_path", str(folder), "--robustness", "mine", tasks=["mine"])


def test_a_generation_config_that_answers_do_not_follow_is_named(evaluate, base, second, tmp_path, capsys):
    rows = [{"question": f"Say {n}", "answer": str(n)} for n in range(3)]
    settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    folder = write_task(tmp_path / "tasks", rows, generation_kwargs=settings, **GENERATED)
    before = read_json(second / "generation_config.json")
    write_json(
        second / "generation_config.json", {**before, "repetition_penalty": 1.3, "do_sample": False, "top_k": 50}
    )
    chosen = {"tasks": ["mine"], "models": [str(base), str(second)]}
    out = evaluate(tmp_path / "out", "--include_path", str(folder), **chosen)
    said = capsys.readouterr().out
    assert f"{second}: answers follow the task; its generation_config.json is left out (repetition_penalty 1.3)" in said
    assert f"{base}: answers follow" not in said
    shutil.rmtree(out / "results")  # answers of text tasks alone follow nothing, and nothing is said
    evaluate(tmp_path / "out", models=[str(second)], tasks=["embedded_docs"])
    assert "answers follow the task" not in capsys.readouterr().out


def test_answers_longer_than_the_context_are_refused_before_the_first_item(evaluate, tmp_path):
    settings = {"until": ["\n"], "max_gen_toks": 512, "do_sample": False}
    rows = [{"question": "Say one", "answer": "one"}]
    folder = write_task(tmp_path / "tasks", rows, generation_kwargs=settings, **GENERATED)
    with pytest.raises(
        Refusal, match=r"mine generates up to 512 tokens \(max_gen_toks\), .* 512 for prompt and answer"
    ):
        evaluate(tmp_path / "out", "--include_path", str(folder), tasks=["embedded_docs", "mine"])
    assert not (tmp_path / "out/results").exists()


def test_a_description_begins_the_first_turn_of_a_chat_format_without_a_system_message(
    evaluate, second, tmp_path, capsys, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(second)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(second)
    rows = [{"question": f"Say {n}", "answer": str(n)} for n in range(3)]
    settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    described = {"description": "Answer with a number.", "generation_kwargs": settings, **GENERATED}
    folder = write_task(tmp_path / "tasks", rows, **described)
    prompts, original = [], lm.SharedContextLM.generate_until

    def generate_until(self, requests, disable_tqdm=False):
        prompts.extend(request.args[0] for request in requests)
        return original(self, requests, disable_tqdm)

    monkeypatch.setattr(lm.SharedContextLM, "generate_until", generate_until)
    asked = {"tasks": ["mine"], "models": [str(second)], "apply_chat_template": True}
    evaluate(tmp_path / "out", "--include_path", str(folder), **asked)
    assert prompts == [f"<user>Answer with a number.\n\nSay {n}\n" for n in range(3)]
    assert f"{second}: its chat template has no system message" in capsys.readouterr().out


# ---- generalisation ----


def test_the_gap_and_what_likelihood_tells_apart(evaluate, base, second, tmp_path):
    out = evaluate(
        tmp_path / "out",
        models=[str(base), str(second)],
        tasks=["embedded_docs", "embedded_web"],
        limit=20,
        reference_model=str(base),
    )
    rows = {(row["model"], row["task"]): row for row in read_json(out / "generalisation.json")}
    row, own = rows[str(second), "embedded_web"], rows[str(second), "embedded_docs"]
    assert row["gap"] == pytest.approx(row["bits_per_byte"] - own["bits_per_byte"])
    assert (
        0 <= row["auroc"] <= 1
        and 0 <= row["auroc_two_sided"] <= 1
        and 0 <= row["auroc_ratio"] <= 1
        and "auroc_ratio" not in rows[str(base), "embedded_web"]
    )


# ---- refusals ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"models": ["/nowhere"]}, r"--models /nowhere: no folder with a config\.json"),
        ({"models": ["org/nothing"]}, r"org/nothing is neither a folder here nor on the Hub"),
        ({"tasks": ["hellaswg"]}, r"no such task; near:"),
        # in place of a switch that would not help
        ({"tasks": ["embedded_humaneval"]}, r"generates up to 512 tokens .*, and the context of \S+ holds 512 for"),
        ({"tasks": ["embedded_docs", "embedded_docs"]}, r"--tasks embedded_docs: given twice"),
        ({"sensitivity": ["embedded_mmlu"]}, r"vary tasks of --tasks, and embedded_mmlu is not among them"),
        ({"num_fewshot": ["many"]}, r"--num_fewshot many: expected N or TASK=N"),
        ({"apply_chat_template": True}, r"has no chat format"),
        ({"variant_models": ["x"]}, r"--variant_models x is not among the models"),
        ({"primary": ["embedded_docs=x,y"]}, r"--primary x is not among the models"),
        ({"primary": ["embedded_web"]}, r"--primary embedded_web: embedded_web is none of the evaluated tasks"),
        ({"questions": ["embedded_docs=x"]}, r"--tasks embedded_docs names a task of --questions"),
        ({"questions": ["mine=/nowhere"]}, r"--questions mine=/nowhere: a \.jsonl file, or a folder"),
        ({"include_path": "/nowhere"}, r"--include_path /nowhere is no folder"),
        ({"limit": 0}, r"--limit 0 must be at least 1"),
        ({"contamination": "/nowhere"}, r"/nowhere is not a prepared folder"),
        ({"tokenizer_name": "gpt2"}, r"has 512 embeddings and its tokenizer 50,257 ids"),
    ],
)
def test_what_cannot_be_right_is_refused(hub, evaluate, tmp_path, changes, message):
    with pytest.raises(Refusal, match=message):
        evaluate(tmp_path / "out", **changes)


def test_code_is_run_where_that_was_confirmed(hub, evaluate, tmp_path, monkeypatch):
    """Refused before anything is written."""
    monkeypatch.setattr(runner, "context_of", lambda config: 1024)
    with pytest.raises(
        Refusal, match=r"embedded_humaneval runs code that a model wrote: add --confirm_run_unsafe_code"
    ):
        evaluate(tmp_path / "out", tasks=["embedded_humaneval"])
    assert not (tmp_path / "out").exists()


def test_rows_of_tuning_are_questions(tmp_path):
    from llama_lite.evaluation.tasks import own

    for asked, answered in own.GENERATED:
        (tmp_path / "q.jsonl").write_text(json.dumps({asked: "How many?", answered: "Three", "note": 1}))
        (task,) = own.load("mine", str(tmp_path / "q.jsonl")).values()
        (item,) = task.test_docs()
        assert (task.doc_to_text(item), item["answers"]) == ("How many?", ["Three"])


def test_an_adapter_for_another_base_and_a_step_that_is_not_there(
    evaluate, second, whole_sft, whole_run, base, tmp_path
):
    with pytest.raises(Refusal, match="was made for other weights and not for"):
        evaluate(tmp_path / "out", models=[f"{second}+{whole_sft}"])
    with pytest.raises(Refusal, match="is not an adapter"):
        evaluate(tmp_path / "out", models=[f"{base}+{second}"])
    with pytest.raises(Refusal, match="has no steps"):
        evaluate(tmp_path / "out", models=[f"{base}@step-*"])
    with pytest.raises(Refusal, match="no folder with a config"):
        evaluate(tmp_path / "out", models=[f"{whole_run}@step-99"])
    with pytest.raises(Refusal, match="given twice"):
        evaluate(tmp_path / "out", models=[str(base), str(base)])
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(Refusal, match=f"--models {base} {tmp_path}/link is one model, given twice"):
        evaluate(tmp_path / "out", models=[str(base), str(tmp_path / "link")])


def test_an_adapter_of_peft_names_its_base_by_any_path(second, base, tmp_path, monkeypatch):
    """Without our record of the base, base_model_name_or_path tells it: the folder by another path is it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained("./second"), lora).save_pretrained("adapter")
    for name in ("second", str(second), "adapter/../second/"):
        assert [model.base.folder.resolve() for model in resolve.resolve_models([f"{name}+adapter"])] == [
            second.resolve()
        ]
    with pytest.raises(
        Refusal, match=rf"says that its base is \./second, not {base}: give that base, or name this one"
    ):
        resolve.resolve_models([f"{base}+adapter"])


def test_samples_of_other_items_are_not_compared(evaluate, base, tmp_path):
    out = evaluate(tmp_path / "out", tasks=["embedded_mmlu_cloze"])
    samples = read_jsonl(next((out / "samples").iterdir()))
    with pytest.raises(Refusal, match="were not evaluated on the same items"):
        evaluation_analysis.pair(samples, samples[1:], "acc", ("a", "b"))
    other = [{**sample, "item": "x"} for sample in samples]
    with pytest.raises(Refusal, match="were not evaluated on the same items"):
        evaluation_analysis.pair(samples, other, "acc", ("a", "b"))


def test_a_metric_that_lm_eval_did_not_return(evaluate, tmp_path, monkeypatch):
    original = lm.run

    def without(*args):
        found = original(*args)
        for rows in found["samples"].values():
            for row in rows:
                row["metrics"].remove("acc")
        return found

    monkeypatch.setattr(lm, "run", without)
    with pytest.raises(Refusal, match="embedded_mmlu_cloze: lm-eval returned no acc"):
        evaluate(tmp_path / "out", tasks=["embedded_mmlu_cloze"])


def test_two_evaluations_at_once(evaluate, tmp_path):
    code = (
        f"import time; from llama_lite.files import FolderLock; lock = FolderLock({str(tmp_path / 'out')!r}, 'write"
        " to'); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        other.stdout.readline()
        with pytest.raises(Refusal, match=r"is in use by process \d+"):
            evaluate(tmp_path / "out")
    finally:
        other.kill()
        other.wait()


# ---- on the Hub ----


@pytest.fixture(scope="module")
def published_once(settings, tmp_path_factory) -> str:
    """The id of a repository with the three revisions of a run; read only."""
    publishes = {"push_to_hub": True, "hub_model_id": "org/evaluated", "hub_drain_timeout": 600}
    finished_run(tmp_path_factory.mktemp("evaluated") / "run", {**settings, **publishes})
    return publishes["hub_model_id"]


@pytest.fixture
def published(hub, published_once) -> str:
    """A repository of a test's own, as the run published it."""
    name = f"{published_once}-{len(hub.repos)}"
    hub.repos["models", name] = copy.deepcopy(hub.repos["models", published_once])
    return name


def test_scores_on_the_hub_name_what_they_are_of(hub, evaluate, published, tmp_path, capsys):
    tags = dict(hub.repos["models", published].tags)
    out = evaluate(tmp_path / "out", models=[f"{published}@step-*"], push_to_hub=True)
    assert [row["step"] for row in table(out) if row["metric"] == "acc"] == ["5", "10", "12"]
    main = hub.files(published)
    rows = list(csv.DictReader(io.StringIO(main["scores.csv"].decode())))
    assert {(row["revision"], row["commit"]) for row in rows} == set(tags.items()) and hub.repos[
        "models", published
    ].tags == tags
    assert {row["model"] for row in rows} == {published} and len(rows) == 9
    card = ModelCard(main["README.md"].decode())  # the finished model's alone is in the card
    assert {(r.dataset_name, r.metric_type) for r in card.data.eval_results} == {
        ("embedded_mmlu_cloze", "acc_norm"),
        ("embedded_docs", "bits_per_byte"),
    }
    final = {
        row["task"]: row
        for row in rows
        if row["revision"] == "step-000012" and row["metric"] in ("acc_norm", "bits_per_byte")
    }
    assert all(
        r.metric_value == pytest.approx(float(final[r.dataset_name]["value"]), abs=1e-6) for r in card.data.eval_results
    )
    assert "model.safetensors" in main and "checkpoints.csv" in main
    commits = len(hub.repos["models", published].commits)
    evaluate(out, models=[f"{published}@step-*"], push_to_hub=True)  # the same again changes nothing
    assert (
        hub.files(published)["scores.csv"] == main["scores.csv"]
        and len(hub.repos["models", published].commits) == commits
    )


@pytest.fixture
def weights_here(published, hub, monkeypatch):
    """`weights_here()`: the published tags whose weights are in the Hub's cache; `weights_here.at`: those that were, each
    time that a result was stored.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots, save = Path(HF_HUB_CACHE, f"models--{published.replace('/', '--')}", "snapshots"), store.Store.save

    def call() -> list[str]:
        tags = hub.repos["models", published].tags
        return [tag for tag in sorted(tags) if (snapshots / tags[tag] / "model.safetensors").exists()]

    def observed(self, *args):
        call.at.append(call())
        save(self, *args)

    call.at = []
    monkeypatch.setattr(store.Store, "save", observed)
    return call


def test_each_revision_is_downloaded_when_its_turn_comes(
    hub, evaluate, published, weights_here, tmp_path, capsys, monkeypatch
):
    """All were downloaded before the first was evaluated: half a terabyte for the paper's run."""
    tags, changes = sorted(hub.repos["models", published].tags), {"models": [f"{published}@step-*"]}
    changes["tasks"] = ["embedded_docs"]
    num_bytes = len(hub.files(published, tags[0])["model.safetensors"])
    free = SimpleNamespace(total=9 * num_bytes, used=6 * num_bytes, free=3 * num_bytes)
    with monkeypatch.context() as patch:  # for three models exactly: 5 % more must be free
        patch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(Refusal, match=r"no space for the weights of --models in .* Add --remove_downloads, which"):
            evaluate(tmp_path / "none", "--dry_run", **changes)
        out = evaluate(tmp_path / "out", "--remove_downloads", **changes)
    assert weights_here.at == [[tag] for tag in tags] and weights_here() == []
    said = capsys.readouterr().out
    line = f"{size(3 * num_bytes)} of weights of 3 models, each downloaded before its first task and removed after its"
    assert said.index(line) < said.index(f"{published}@{tags[0]}: {size(num_bytes)} of weights, downloaded once")
    assert [row["step"] for row in table(out)] == ["5", "10", "12"]

    hub.requests.clear()
    evaluate(out, **changes)  # what is kept needs no weights
    assert hub.requests and not any("model.safetensors" in request for request in hub.requests)
    weights_here.at.clear()
    evaluate(tmp_path / "stay", **changes)
    assert weights_here.at == [tags[:1], tags[:2], tags]
    evaluate(tmp_path / "again", "--remove_downloads", **changes)
    assert weights_here() == tags  # they were there before


@pytest.fixture
def ahead(monkeypatch):
    """Weights of any size are downloaded ahead, and are here before the model at hand goes on."""
    start = downloads.DownloadAhead.start

    def start_and_wait(self, number):
        start(self, number)
        if self.process:
            self.process.wait()

    monkeypatch.setattr(downloads, "AHEAD", 0)
    monkeypatch.setattr(downloads.DownloadAhead, "start", start_and_wait)


def test_the_next_revision_is_downloaded_while_one_is_evaluated(
    hub, evaluate, published, weights_here, ahead, tmp_path
):
    repo = hub.repos["models", published]
    changes = {"models": [f"{published}@step-*"], "tasks": ["embedded_docs"]}
    hub.requests.clear()
    out = evaluate(tmp_path / "out", "--remove_downloads", **changes)
    first, second, last = sorted(repo.tags)
    assert weights_here.at == [[first, second], [second, last], [last]] and weights_here() == []
    for commit in repo.tags.values():
        path = f"/resolve/{commit}/model.safetensors"
        assert len([one for one in hub.requests if one.startswith("GET") and one.endswith(path)]) == 1
    evaluate(tmp_path / "again", **changes)
    weights_here.at.clear()
    shutil.rmtree(tmp_path / "again")
    evaluate(tmp_path / "again", **changes)  # all are here
    assert weights_here.at == [[first, second, last]] * 3
    assert (tmp_path / "again/scores.csv").read_text() == (out / "scores.csv").read_text()


def test_a_revision_that_cannot_be_downloaded_ahead_is_refused_when_its_turn_comes(
    hub, evaluate, published, ahead, tmp_path
):
    repo, changes = hub.repos["models", published], {"models": [f"{published}@step-*"], "tasks": ["embedded_docs"]}
    _, second, _ = sorted(repo.tags)
    hub.faults.append(Fault(rf"/resolve/{repo.tags[second]}/model.safetensors", 403))
    with pytest.raises(Refusal, match=f"{second}: its weights cannot be downloaded: .* Run the same command again"):
        evaluate(tmp_path / "out", **changes)
    assert len(list((tmp_path / "out/results").iterdir())) == 1
    hub.faults.clear()
    assert len(table(evaluate(tmp_path / "out", **changes))) == 3


def test_a_download_ahead_stops_with_the_evaluation_and_needs_twice_the_space(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "DOWNLOAD", "import time; time.sleep(600)")
    monkeypatch.setattr(downloads, "AHEAD", 8)
    free = SimpleNamespace(total=100, used=0, free=17)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)

    def model(name: str, size: int) -> resolve.Model:
        weights = RemoteWeights({"model.safetensors": {"size": size}}, frozenset({"model.safetensors"}))
        return resolve.Model(name, references.Located("a/b", tmp_path, "a/b", None, name, weights))

    models = [model("one", 8), model("kept", 8), model("two", 8), model("small", 7)]

    def begun(number: int, needed: set[int]) -> subprocess.Popen | None:
        with pytest.raises(Refusal), downloads.DownloadAhead(models, needed) as ahead:
            ahead.start(number)
            if ahead.process:
                assert ahead.process.poll() is None and ahead.process.args[3:] == ["a/b", "two", "model.safetensors"]
            raise Refusal("the model at hand cannot be evaluated")
        return ahead.process

    assert begun(0, {0, 2}).returncode == -signal.SIGTERM
    free.free = 16  # 5 % more must be free
    assert begun(0, {0, 2}) is None
    free.free = 100
    assert begun(0, {0}) is None and begun(2, {0, 2, 3}) is None
    monkeypatch.setattr(downloads, "WORLD_SIZE", 2)
    assert begun(0, {0, 2}) is None


def test_two_processes_remove_what_they_downloaded(hub, published, weights_here, tmp_path):
    changes = {**FEW, "models": [f"{published}@step-*"], "remove_downloads": True}
    path = config_file(tmp_path, changes, output_dir=str(tmp_path / "out"))
    result = launch_ranks(ROOT / "configs/accelerate/cpu2.yaml", "--config", str(path), script="run_eval.py")
    assert result.returncode == 0, result.stderr
    assert len(table(tmp_path / "out")) == 9 and weights_here() == []
    for commit in hub.repos["models", published].tags.values():
        assert any(request.endswith(f"/resolve/{commit}/model.safetensors") for request in hub.requests)


def test_weights_of_a_base_go_after_the_last_adapter_on_it(tmp_path, monkeypatch):
    removed = []
    monkeypatch.setattr(downloads, "remove_cached", lambda ref, commit, names: removed.append((commit, *names)))
    files = {"model.safetensors": {"size": 8, "sha256": "0" * 64}}

    def located(commit: str, missing: set[str]) -> references.Located:
        weights = RemoteWeights(files, frozenset(missing))
        return references.Located("a/b", tmp_path / commit, "a/b", None, commit, weights)

    bases = [located("one", set(files)), located("one", set(files)), located("here", set())]
    models = [resolve.Model(f"m{number}", base) for number, base in enumerate(bases)]
    assert f"{size(8)} of weights of 1 model," in downloads.check_downloads(models, range(3), False)
    assert downloads.check_downloads(models, [2], False) is None
    removal = downloads.WeightRemoval(models, [2, 1, 1], SharedWork())
    for number in (0, 1, 2):
        removal.finish(number)
    assert removed == []
    removal.finish(0)
    assert removed == [("one", "model.safetensors")]


def test_content_that_another_revision_has_stays_in_the_cache(published):
    """The last revision and main have the same weights, and the cache holds them once."""
    (model,), (main,) = (resolve.resolve_models([f"{published}@{name}"]) for name in ("step-000012", "main"))
    remove_cached(Reference(published), model.base.commit, ["model.safetensors", "absent.safetensors"])
    path = main.base.folder / "model.safetensors"
    assert not (model.base.folder / path.name).exists() and (content := path.resolve()).is_file()
    remove_cached(Reference(published), main.base.commit, ["model.safetensors"])
    assert not content.exists()


def test_a_differing_older_value_stays(evaluate, published, hub, tmp_path):
    out = evaluate(tmp_path / "out", models=[f"{published}@step-000005"], push_to_hub=True, tasks=["embedded_docs"])
    record = read_json(next((out / "results").glob("*.json")))
    changed = json.loads(json.dumps(record))
    changed["metrics"]["bits_per_byte"]["value"] += 0.5
    (model,) = resolve.resolve_models([f"{published}@step-000005"])
    push_scores.push_scores([(model, [changed])])
    rows = list(csv.DictReader(io.StringIO(hub.files(published)["scores.csv"].decode())))
    assert [float(row["value"]) for row in rows] == [
        record["metrics"]["bits_per_byte"]["value"],
        changed["metrics"]["bits_per_byte"]["value"],
    ]


def test_scores_of_other_files_are_refused(evaluate, published, tmp_path):
    out = evaluate(tmp_path / "out", models=[f"{published}@step-000005"], tasks=["embedded_docs"])
    record = read_json(next((out / "results").glob("*.json")))
    (model,) = resolve.resolve_models([f"{published}@step-000005"])
    with pytest.raises(Refusal, match=r"are of commit 0123, and .*@step-000005 is"):
        push_scores.push_scores([(model, [{**record, "commit": "0123"}])])


def test_results_in_the_hubs_own_form():
    record = {
        "task": "hellaswag",
        "dataset": "Rowan/hellaswag",
        "n_shot": 0,
        "dtype": "float32",
        "harness": "lm-eval 0.4.13",
        "commit": "c",
        "date": "2026-01-01",
        "model": "m",
    }
    record["metrics"] = {"acc_norm": {"value": 0.5, "stderr": 0.01, "n": 100}}
    ((name, text),) = push_scores.eval_results([record], "org/m").items()
    (entry,) = yaml.safe_load(text)
    assert (
        name == ".eval_results/hellaswag.yaml"
        and entry["dataset"] == {"id": "Rowan/hellaswag", "task_id": "hellaswag"}
        and entry["value"] == 0.5
    )
    assert "commit c" in entry["notes"] and HfApi


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/eval").glob("*.yaml")))
def test_shipped_configs_parse(name):
    which, what, where = parse_eval(["--config", str(ROOT / f"configs/eval/{name}.yaml")])
    assert which.models and what.tasks and where.output_dir.startswith("runs/")
