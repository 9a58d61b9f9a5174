"""Cards: every number is in a record, same records give same bytes, snippets run, contradictions are named, and a
person's words stay.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from datetime import datetime

import forking
import pytest
from helpers import ROOT, config_file
from huggingface_hub import HfApi, ModelCard

from llama_lite.data.ngram_baselines import BASELINE_TOKENS
from llama_lite.errors import Refusal
from llama_lite.files import read_json, read_jsonl, write_json
from model_card import card, facts, records
from model_card.metadata import CardError
from model_card.sections.data import Data
from model_card.sections.use import Use
from model_card.sources import COUNTED, windows_counted, windows_measured


@pytest.fixture(scope="session")
def documented(whole_run, whole_sft, settings, tmp_path_factory):
    """{kind: folder} of a run, a tuning run, an evaluation of both and the prepared tokens, each with what makes a
    card.
    """
    from run_eval import main

    place = tmp_path_factory.mktemp("documented")
    for source, name in ((whole_run, "run"), (whole_sft, "tuned"), (settings["prepared_dir"], "tokens")):
        shutil.copytree(source, place / name)
    few = {
        "tasks": ["embedded_mmlu_cloze", "embedded_next_sentence", "embedded_docs", "embedded_code"],
        "limit": 12,
        "variant_limit": 5,
        "cpu_threads": 1,
    }
    varied = {
        "sensitivity": ["embedded_mmlu_cloze"],
        "robustness": ["embedded_next_sentence"],
        "contamination": str(place / "tokens"),
    }
    path = config_file(
        place, {**few, **varied, "models": [f"{place}/run@step-*", f"{place}/run"], "output_dir": str(place / "scores")}
    )
    main(["--config", str(path)])
    main(
        [
            "--config",
            str(config_file(place, {**few, "models": [f"{place}/tuned"], "output_dir": str(place / "of-tuned")})),
        ]
    )
    return {name: place / name for name in ("run", "tuned", "tokens", "scores")}


def values_of(value):
    """Every number in JSON."""
    if isinstance(value, dict):
        for one in value.values():
            yield from values_of(one)
    elif isinstance(value, list):
        for one in value:
            yield from values_of(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def recorded(folder) -> list[float]:
    """Every number in the records of a folder, and the three that a card derives from several."""
    found = []
    for path in folder.rglob("*.json"):
        found += values_of(read_json(path))
    for path in folder.rglob("*.jsonl"):
        found += values_of(read_jsonl(path))
    for path in folder.rglob("*.csv"):
        found += [
            float(cell)
            for line in path.read_text().splitlines()
            for cell in line.split(",")
            if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", cell)
        ]
    found += [read_json(path)["n_shot"] for path in folder.rglob("results/*.json")]
    if (folder / "events.jsonl").exists():
        times = [
            datetime.fromisoformat(one["time"])
            for one in read_jsonl(folder / "events.jsonl")
            if one["event"] in ("started", "saved", "finished")
        ]
        found.append((max(times) - min(times)).total_seconds())  # one session
        found.append(sum(one["event"] == "saved" for one in read_jsonl(folder / "events.jsonl")))
    for path in folder.rglob("scores.json"):
        found += [len({row[key] for row in read_json(path)}) for key in ("model", "task")]
    return found


def told(text: str) -> list[tuple[str, str]]:
    """(number, its line) of the tables and the limits of a card; names, versions, hashes and dates left out."""
    found = []
    body = re.sub(r"```.*?```|<details>.*?</details>|`[^`]*`|^---.*?^---", "", text, flags=re.S | re.M)
    for line in body.splitlines():
        if line.startswith(("| ", "- ")) and not line.startswith("- :"):  # a task's description is a record's own words
            line = re.sub(
                r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|checkpoint-\d+|sha256|float32|bfloat16|AVX\d+|95 %", "", line
            )
            found += [
                (word, line) for word in re.findall(r"(?<![\w.<-])[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?%?(?!\w)", line)
            ]
    return found


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kind", ["run", "tuned", "tokens", "scores"])
def test_every_number_is_in_a_record(documented, kind):
    folder = documented[kind]
    numbers, text = recorded(folder), card.write(folder).read_text()
    words = told(text)
    assert len(words) > {"run": 100, "tuned": 40, "tokens": 5, "scores": 60}[kind]
    for word, line in words:
        plain = word.replace(",", "").removesuffix("%").lstrip("+")
        digits, scale = len(plain.partition(".")[2].partition("e")[0]), 100 if word.endswith("%") else 1
        wanted = float(plain)
        near = 0.5000001 * 10**-digits if "e" not in plain else abs(wanted) * 1e-6
        assert any(abs(value * scale - wanted) <= near for value in numbers), (word, line)


@pytest.mark.parametrize("kind", ["run", "tuned", "tokens", "scores"])
def test_same_records_same_bytes_and_nothing_that_should_not_be_there(documented, kind, tmp_path):
    first, second = (
        {path.name: path.read_bytes() for path in rendered(documented[kind], tmp_path / name)} for name in ("a", "b")
    )
    assert first == second and len(first) > {"run": 4, "tuned": 2, "tokens": 1, "scores": 4}[kind] - 1
    text = first["README.md"].decode()
    assert (
        "None" not in text
        and "nan" not in text.split()
        and str(documented[kind].parent) not in text
        and "/tmp" not in text
    )
    headings = [match.start() for match in re.finditer(r"^#+ ", text, re.M)]
    for begin, end in zip(headings, [*headings[1:], len(text)], strict=True):
        assert len(text[begin:end].strip().splitlines()) > 1, text[begin:end]
    assert set(re.findall(r"\(figures/([\w.-]+)\)", text)) == {name for name in first if name.endswith(".png")}


def rendered(folder, place):
    shutil.copytree(folder, place / folder.name)
    shutil.rmtree(place / folder.name / "figures", ignore_errors=True)
    (place / folder.name / "README.md").unlink(missing_ok=True)
    path = card.write(place / folder.name)
    return [path, *(path.parent / "figures").glob("*.png")]


@pytest.mark.usefixtures("undrawn")
def test_sections_are_there_with_their_records_and_gone_without(documented, whole_run, tmp_path):
    text = card.write(documented["run"]).read_text()
    for heading in ("Use", "Data", "Training", "Evaluation", "Limits", "Environment", "Citation"):
        assert f"\n## {heading}\n" in text, heading
    for heading in ("Prompt sensitivity", "Robustness", "Other kinds of text", "Run history"):
        assert f"\n### {heading}\n" in text, heading
    assert "share 13 words" in text and "; random 0." in text and "[At" not in text
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/evaluation", ignore_errors=True)
    for name in ("data.json", "README.md"):
        (tmp_path / "run" / name).unlink()  # a run of before there were any
    bare = card.write(tmp_path / "run").read_text()
    assert (
        not re.search(r"^#+ (Evaluation|Prompt|Robustness|Other|Data|Checkpoints)", bare, re.M)
        and "## Training" in bare
    )


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_tells_its_stops(pretrain, tmp_path):
    folder = tmp_path / "run"
    pretrain(folder, max_steps=6)
    pretrain(folder, "--allow_changes", "max_steps,learning_rate", max_steps=12, learning_rate=2e-3)
    text = (folder / "README.md").read_text()
    assert "| resumed | from checkpoint-6: every file by its digest" in text and "learning_rate: 0.001 → 0.002" in text
    assert "| learning rate | 0.002 |" in text and "| step | 12 of 12 |" in text


@pytest.mark.parametrize(
    "plan, restarts, step, read",
    [
        ({"rows": 40, "sequences": 40, "steps_per_epoch": 10}, [], 10, "40 rows, 1.00 times"),
        ({"rows": 40, "sequences": 40, "steps_per_epoch": 10}, [], 25, "40 rows, 2.50 times"),
        ({"rows": 40, "sequences": 40, "steps_per_epoch": 10}, [], 6, "24 of 40 rows"),
        ({"rows": 43, "sequences": 43, "steps_per_epoch": 10}, [], 25, "40 of 43 rows"),  # an epoch is whole steps
        ({"rows": 90, "sequences": 40, "steps_per_epoch": 10}, [], 6, "24 of 40 packs (90 rows in all)"),
        ({"rows": 90, "sequences": 40, "steps_per_epoch": 10}, [], 20, "90 rows, 2.00 times"),
        (
            {"rows": 40, "sequences": 40, "steps_per_epoch": 10},
            [4],
            9,
            "20 of 40 rows",
        ),  # from step 4 on the order began again
        ({"rows": 40, "sequences": 40, "steps_per_epoch": 10}, [4, 4, 9], 10, "20 of 40 rows"),
    ],
)
def test_a_card_says_which_part_of_the_rows_a_tuning_has_read(whole_sft, plan, restarts, step, read):
    found = records.read(whole_sft)
    events = [{"event": "resumed", "data_start": start} for start in restarts]
    run = {
        **found.run,
        "plan": {**found.run["plan"], "sequences_per_step": 4, "held_rows": 5, "learnt_tokens": 1234, **plan},
    }
    told = Data(facts.Facts(dataclasses.replace(found, run=run, events=events, step=step), None, {}))
    assert told.rows() == (
        f"{plan['rows']} rows to learn from (1,234 tokens of answers), 5 rows held out of the tuning by whole documents (the base may have read them). "
        f"The tuning has read {read}."
    )
    assert told.tuned_on() == read.partition(",")[0]


# ---- refused ----


def test_what_is_no_run_and_what_contradicts_itself_is_refused(documented, tmp_path):
    def broken(name, change):
        place = tmp_path / name
        shutil.copytree(documented["run"], place)
        (place / "README.md").write_text("as it was")
        change(place)
        with pytest.raises(CardError) as error:
            card.write(place)
        assert (place / "README.md").read_text() == "as it was"
        return str(error.value)

    def data(place):
        write_json(place / "data.json", {**read_json(place / "data.json"), "fingerprint": "f" * 64})

    def log(place):
        lines = (place / "log.jsonl").read_text().splitlines()
        (place / "log.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")

    def altered(place):
        path = place / "evaluation/scores/scores.json"
        write_json(path, [{**row, "tokens": row["tokens"] + 1} for row in read_json(path)])

    def scores(place):
        altered(place)
        path = place / "evaluation/scores/run.json"  # as earlier versions handed scores over: without their sha256
        write_json(
            path,
            {
                **read_json(path),
                "of": {name: value for name, value in read_json(path)["of"].items() if name != "files"},
            },
        )

    def other(place):
        path = place / "evaluation/scores/run.json"
        write_json(path, {**read_json(path), "of": {"id": "abc", "models": []}})

    (tmp_path / "empty").mkdir()
    with pytest.raises(CardError, match=r"empty is not a run: give the folder of a run \(runs/demo\)"):
        card.write(tmp_path / "empty")
    assert "status.json says finished at step 10, and log.jsonl ends at step 12" in broken(
        "status", lambda place: write_json(place / "status.json", {**read_json(place / "status.json"), "step": 10})
    )
    assert "log.jsonl contradicts itself: step 3 comes after step 12" in broken("log", log)
    assert "data.json is of the data ffffffffffff, but run.json says that it was trained on" in broken("data", data)
    assert "these are scores of another revision; evaluate again" in broken("scores", scores)
    assert "scores.json was altered since its evaluation: evaluate again" in broken("altered", altered)
    assert "has the scores of another run (abc, this is" in broken("other", other)
    result = subprocess.run(
        [sys.executable, "-m", "model_card", str(tmp_path / "empty")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.startswith("refused: ") and "Traceback" not in result.stderr


def test_metadata_that_the_hub_would_reject_is_refused_before_training(pretrain, tmp_path):
    with pytest.raises(
        Refusal, match=r"--card_license apache2 is not a license that the Hub knows: use one of apache-2.0, mit"
    ):
        pretrain(tmp_path / "run", card_license="apache2")
    with pytest.raises(Refusal, match=r"--card_language English is not an ISO 639 code"):
        pretrain(tmp_path / "run", card_language="English")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "status, how", [({"status": "interrupted"}, "interrupted"), (None, "it goes on, or ended without a word")]
)
def test_a_run_that_is_not_finished_says_so(documented, tmp_path, status, how):
    place = tmp_path / "run"
    shutil.copytree(documented["run"], place)
    assert "not finished" not in card.render(card.read(place), None)
    (place / "status.json").unlink()
    if status:
        write_json(place / "status.json", status)
    assert f"The run is not finished: it stands at step 12 of 12 ({how})." in card.render(card.read(place), None)


# ---- use, limits, and what only a person knows ----


def changed(folder, **fields):
    """The records of a run with other fields; `run` is merged into its run.json."""
    found = records.read(folder)
    return dataclasses.replace(found, **{**fields, "run": {**found.run, **fields.get("run", {})}})


def test_a_card_says_what_the_model_is_for_and_what_was_not_measured(documented, whole_run):
    of_run, of_tuned = (card.render(records.read(documented[name])) for name in ("run", "tuned"))
    assert "continues text like the text that it was trained on. It was not tuned to follow instructions" in of_run
    assert "no step taught it to be truthful" in of_run and "- Only what is under Evaluation was measured." in of_run
    assert "answers prompts like those that it was tuned on, in the chat format" in of_tuned
    assert "not tuned to follow" not in of_tuned and "no step taught it" not in of_tuned
    assert "- No task was evaluated: only losses are known." in card.render(changed(whole_run, evaluations=[]))
    assert "No task was evaluated" not in card.render(changed(whole_run, evaluations=[], step=12))  # of a revision
    scored = [*records.read(whole_run).log, {"step": 12, "tokens": 1, "eval_hellaswag_acc": 0.5}]
    assert "No task was evaluated" not in card.render(changed(whole_run, evaluations=[], log=scored))
    worse = {**records.read(whole_run).data, "baselines": {"bigram": 0.5}}
    assert "- Validation loss is above that of bigram counts" in card.render(changed(whole_run, data=worse))
    assert "that of bigram counts," not in card.render(
        changed(whole_run, data={**worse, "baselines": {"bigram": 99.0}})
    )
    begun = [{"event": "initialised", "step": 0, "time": "2026-01-01T00:00:00Z", "weights": "you/base@step-000010"}]
    tuned_on = card.render(changed(whole_run, events=begun))
    assert "not tuned to follow" not in tuned_on and ModelCard(tuned_on).data.base_model == "you/base"


@pytest.mark.parametrize(
    "settings, tokens, words",
    [
        ({"eval_windows": 16, "eval_order": "shuffled"}, [10_000], "a sample of 16 of 156 held-out windows"),
        ({"eval_windows": 16, "eval_order": "sequential"}, [10_000], "the first 16 of 156 held-out windows"),
        ({"eval_windows": 16}, [10_000], "the first 16 of 156 held-out windows"),  # of earlier versions
        ({"eval_windows": 16, "eval_order": "shuffled"}, [1_025], None),  # which are all
        ({"eval_windows": 17, "eval_order": "shuffled"}, [1_025], None),
        ({"eval_windows": None, "eval_order": "shuffled"}, [10_000], None),
        (
            {"eval_windows": 16, "eval_order": "shuffled"},
            [10_000, 500],
            "a sample of 16 held-out windows of each set (all, where it has fewer)",
        ),
    ],
)
def test_of_which_windows_a_validation_loss_is(settings, tokens, words):
    parts = [{"name": str(number), "splits": {"validation": {"tokens": count}}} for number, count in enumerate(tokens)]
    data = parts[0] if len(parts) == 1 else {"mixture": parts}
    run = {"identity": {"data": {"block_size": 64}}, "settings": settings}
    assert windows_measured(run, data) == words
    assert windows_measured({"identity": {"data": {}}}, {}) is None  # of a tuning run
    assert windows_counted(data) == "all" and COUNTED == BASELINE_TOKENS
    parts[0]["splits"]["validation"]["tokens"] = COUNTED + 1
    assert windows_counted(data) == "all, up to 50,000,000 tokens"


def test_a_card_says_of_which_windows_its_losses_are(whole_run):
    found = records.read(whole_run)
    row = "| measured on | {} of 156 held-out windows (counts: all) |"
    assert row.format("a sample of 16") in card.render(found)
    for name in ("eval_order", "eval_windows"):
        earlier = {key: value for key, value in found.run["settings"].items() if key != name}
        text = card.render(changed(whole_run, run={"settings": earlier}))
        assert (row.format("the first 16") in text) == (name == "eval_order") and "a sample of 16" not in text
    worse = card.render(changed(whole_run, data={**found.data, "baselines": {"bigram": 0.5}}))
    assert "(it is of a sample of 16 of 156 held-out windows, that of counts of all)." in worse


def test_no_license_and_no_language_is_invented(documented):
    """The text is a file here, of which the run knows neither; of the text in the packages it knows the language."""
    for name in ("run", "tuned", "tokens"):
        text = card.render(records.read(documented[name]))
        told = ModelCard(text, ignore_metadata_errors=True).data
        assert told.license is None and told.language is None and "## License" not in text, name
    docs = {**records.read(documented["run"]).data, "source": {"dataset": "installed-docs"}}
    assert ModelCard(card.render(changed(documented["run"], data=docs))).data.language == "en"


def test_text_of_the_installed_packages_is_no_dataset_of_the_hub(documented):
    source = {"dataset": "installed-files", "packages": {"numpy": "2.4.0"}}
    text = card.render(changed(documented["run"], data={**records.read(documented["run"]).data, "source": source}))
    told = ModelCard(text, ignore_metadata_errors=True).data
    assert "of all text files inside installed Python packages" in text and "| numpy | 2.4.0 |" in text
    assert "huggingface.co/datasets" not in text and told.datasets is None and told.language is None


def test_what_a_person_names_is_on_the_card(documented, tmp_path):
    said = {"license": "mit", "language": "en, de", "data_license": "odc-by"}
    text = card.render(changed(documented["run"], run={"card": said}))
    told = ModelCard(text).data
    assert told.license == "mit" and told.language == ["en", "de"]
    assert "| this model | `mit` |" in text and "| the text that it was made of | `odc-by` |" in text
    shutil.copytree(documented["tokens"], tmp_path / "tokens")
    write_json(tmp_path / "tokens/card.json", said)
    assert "license: odc-by\n" in card.render(records.read(tmp_path / "tokens"))


@pytest.mark.usefixtures("undrawn")
def test_a_refused_command_after_the_end_changes_nothing_on_the_card(documented, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(documented["run"], place)
    before = card.write(place).read_bytes()
    refused = {"event": "refused", "step": 12, "time": "2026-01-01T00:00:00Z", "reason": "--learning_rte: no argument"}
    with open(place / "events.jsonl", "a") as file:
        file.write(f"{json.dumps(refused)}\n")
    write_json(place / "status.json", {"status": "refused", "code": 2, "step": 12, "reason": refused["reason"]})
    assert card.write(place).read_bytes() == before


def test_the_snippets_prompt_is_of_the_runs_own_text(whole_run):
    """What the samples of all evaluations begin with, where no prompts were given."""
    log = [{"step": step, "tokens": 1, "samples": [f"# Ein Titel{text}"]} for step, text in ((6, " ist"), (12, " in"))]
    given = {name: value for name, value in records.read(whole_run).run["given"].items() if name != "sample_prompts"}
    assert Use(facts.Facts(changed(whole_run, log=log, run={"given": given}), None, {})).prompt() == "# Ein Titel"
    assert Use(facts.Facts(changed(whole_run, log=log[:1], run={"given": given}), None, {})).prompt() == "# Ein"
    assert Use(facts.Facts(records.read(whole_run), None, {})).prompt() == "The"


def test_the_snippets_question_is_of_the_tunings_own(documented):
    found = records.read(documented["tuned"])
    assert Use(facts.Facts(found, None, {})).question() == found.tuning["shown"][0]["prompt"]
    given = {**found.run["given"], "prompts": ["Was ist ein Brot?"]}
    of_a_step = dataclasses.replace(found, tuning={}, run={**found.run, "given": given})
    assert Use(facts.Facts(of_a_step, None, {})).question() == "Was ist ein Brot?"


def test_a_card_links_the_dashboards_that_others_can_open(whole_run):
    space, local = "https://huggingface.co/spaces/you/curves", "http://10.0.0.7:5000/#/experiments/1/runs/2"
    text = card.render(changed(whole_run, dashboards={"trackio": {"url": space}, "mlflow": {"url": local}}))
    assert f"]({space})" in text and 'alt="Visualize in Trackio"' in text and "10.0.0.7" not in text
    assert ModelCard(text).data.tags[-2:] == ["trackio", f"trackio:{space}"]
    assert "rackio" not in card.render(changed(whole_run, dashboards={"trackio": {"project": "p", "name": "n"}}))


# ---- what is kept ----


@pytest.mark.usefixtures("undrawn")
def test_a_persons_words_and_scores_of_others_stay(documented, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(documented["run"], place)
    path = card.write(place)
    text = path.read_text().replace(
        "\n".join(card.YOURS), f"{card.YOURS[0]}\nMine: {{{{ braces }}}} stay.\n{card.YOURS[1]}"
    )
    index = (
        "model-index:\n- name: x\n  results:\n  - task: {type: text-generation}\n    dataset: {name: other, type:"
        " other}\n    metrics: [{type: acc, value: 0.5}]\n"
    )
    ours = card.metadata(facts.Facts(records.read(place), None, {})).eval_results
    path.write_text(re.sub(r"model-index:\n(?:- name.*\n| .*\n)+", index, text))
    again = card.write(place).read_text()
    assert "Mine: {{ braces }} stay." in again and card.write(place).read_text() == again
    kept = {(r.dataset_name, r.metric_value) for r in ModelCard(again).data.eval_results}
    assert ("other", 0.5) in kept and len(kept) == len(ours) + 1
    shutil.rmtree(place / "evaluation")  # what is no longer in the records was of other weights
    (stays,) = ModelCard(card.write(place).read_text()).data.eval_results
    assert stays.dataset_name == "other"
    path.write_text(again.replace(card.YOURS[1], ""))
    with pytest.raises(CardError, match="once each, in this order: fix them"):
        card.write(place)


def test_without_torch():
    code = "import sys, model_card.card, model_card.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- snippets ----


def run_blocks(text: str, place, launch_forks: bool = False) -> list[str]:
    """Every code block of a card as it stands, in one folder that has the project's scripts; their outputs.

    launch_forks: what `accelerate launch` in the last line of a block starts is a fork.
    """
    place.mkdir(exist_ok=True)
    for name in ("run_pretrain.py", "run_sft.py", "configs"):
        if not (place / name).exists():
            (place / name).symlink_to(ROOT / name)
    outputs, blocks = [], re.findall(r"^```(python|bash)\n(.*?)^```", text, re.S | re.M)
    for language, code in blocks:
        if language == "python":
            (place / "block.py").write_text(code)
            result = forking.run([sys.executable, str(place / "block.py")], timeout=900, cwd=place)
        else:
            path = f"{sys.prefix}/bin:/usr/bin:/bin"
            code, launch, words = code.partition("accelerate launch ") if launch_forks else (code, "", "")
            result = subprocess.run(
                ["bash", "-ec", code],
                cwd=place,
                capture_output=True,
                text=True,
                timeout=900,
                env={**os.environ, "PATH": path},
            )
            if launch and not result.returncode:
                result = forking.run([sys.executable, *shlex.split(words)], timeout=900, cwd=place)
        assert result.returncode == 0, f"{code}\n{result.stderr[-3000:]}"
        outputs.append(result.stdout)
    return outputs


@pytest.mark.slow
def test_every_snippet_runs_as_it_stands(hub, text, base, pretrain, sft, tmp_path):
    repo, tokens, chat = (f"org/{name}-{len(hub.repos)}" for name in ("card", "tokens", "chat"))
    source, chatty = f"org/text-{len(hub.repos)}", f"org/base-{len(hub.repos)}"
    HfApi().create_repo(source, repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=text, path_in_repo="train.jsonl", repo_id=source, repo_type="dataset")
    HfApi().create_repo(chatty)
    HfApi().upload_folder(folder_path=base, repo_id=chatty)
    HfApi().create_tag(chatty, tag="v1")
    data = {"dataset": source, "prepared_dir": str(tmp_path / "tokens")}
    pretrain(tmp_path / "tokens-run", prepare_only=True, push_to_hub=True, prepared_hub_id=tokens, **data)
    run = pretrain(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id=repo,
        hub_drain_timeout=600,
        card_license="mit",
        card_language="en",
        **data,
    )
    main = hub.files(repo)["README.md"].decode()
    assert (
        main == (run / "README.md").read_text()
        and {"figures/training.png", "checkpoints.csv"} <= hub.files(repo).keys()
    )
    assert ModelCard(main).data.license == "mit" and "`step-000010`" in main
    assert len(run_blocks(main, tmp_path / "of-main")) == 3
    early = hub.files(repo, "step-000005")["README.md"].decode()
    assert "step 5" in early and len(run_blocks(early, tmp_path / "of-step", launch_forks=True)) == 3
    resumed = read_jsonl(tmp_path / "of-step/runs/resumed/log.jsonl")
    assert resumed[-1]["step"] == 12 and resumed[-1].get("eval_loss") == read_jsonl(run / "log.jsonl")[-1].get(
        "eval_loss"
    )
    data_card = hub.files(tokens, kind="datasets")["README.md"].decode()
    assert len(run_blocks(data_card, tmp_path / "of-tokens")) == 2
    pushed = {"push_to_hub": True, "hub_model_id": chat, "hub_drain_timeout": 600}
    sft(tmp_path / "chat", model_name_or_path=chatty, model_revision="v1", merge_adapter=True, **pushed)
    adapter, merged = (hub.files(name)["README.md"].decode() for name in (chat, f"{chat}-merged"))
    told = ModelCard(adapter).data
    assert (
        told.base_model == chatty
        and told.to_dict()["base_model_revision"] == "v1"
        and told.to_dict()["base_model_relation"] == "adapter"
    )
    assert ModelCard(main).data.datasets == [source]
    assert ModelCard(merged).data.to_dict()["base_model_relation"] == "finetune" and f"{chat}-merged" in merged
    assert (
        len(run_blocks(adapter, tmp_path / "of-adapter")) == 2 and len(run_blocks(merged, tmp_path / "of-merged")) >= 1
    )


def test_what_a_person_wrote_outlives_a_card_that_cannot_be_made():
    """Where records contradict each other it says only what is wrong with them."""
    written = f"# A card\n\n{card.YOURS[0]}\nMine.\n{card.YOURS[1]}\n"
    between = card.renew("No card can be made: why\n", written)
    assert "No card can be made" in between and "Mine." in card.renew("\n".join(["# Another", *card.YOURS]), between)


def test_a_card_with_scores_keeps_them_when_the_run_publishes_again(hub, pretrain, tmp_path):
    repo = f"org/kept-{len(hub.repos)}"
    run = pretrain(tmp_path / "run", push_to_hub=True, hub_model_id=repo, hub_drain_timeout=600)
    old = hub.files(repo)["README.md"].decode()
    marked = old.replace(card.YOURS[0], f"{card.YOURS[0]}\nWritten on the Hub.")
    HfApi().upload_file(path_or_fileobj=marked.encode(), path_in_repo="README.md", repo_id=repo)
    pretrain(
        run, "--allow_changes", "max_steps", max_steps=14, push_to_hub=True, hub_model_id=repo, hub_drain_timeout=600
    )
    new = hub.files(repo)["README.md"].decode()
    assert "Written on the Hub." in new and "| step | 14 of 14 |" in new and "figures/training.png" in hub.files(repo)
