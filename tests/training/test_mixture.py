"""Runs over a mixture of prepared folders, and runs with several validation sets."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT, config_file, launch_ranks, log_of, prepare, same_tensors, without_figures
from transformers import TrainerCallback

from llama_lite.commands import trace
from llama_lite.config.pretrain import PREPARING
from llama_lite.data.dataset import MixedWindows
from llama_lite.data.document_reads import DocumentReads
from llama_lite.data.mixture import Schedule
from llama_lite.errors import Interrupted, Refusal
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.training.data_plan import (
    check_epochs,
    cost_lines,
    most_positions,
    probe_counts,
    set_rows,
    source_rows,
)
from llama_lite.training.mixture import order_history
from llama_lite.training.reading_order import reading_order

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def folders(text, tmp_path_factory) -> dict[str, str]:
    """Prepared folders: web, code and science with one tokenizer, and `other` with its own."""
    root, rows = tmp_path_factory.mktemp("mixture"), text.read_text(encoding="utf-8").splitlines()
    begins, tokenizer = (0, len(rows) // 2, 3 * len(rows) // 4), "train"
    for name, begin in zip(("web", "code", "science"), begins, strict=True):
        (root / f"{name}.jsonl").write_text("\n".join(rows[begin : begin + len(rows) // 4]) + "\n", encoding="utf-8")
        prepare(root, dataset=str(root / f"{name}.jsonl"), prepared_dir=str(root / name), tokenizer=tokenizer)
        tokenizer = str(root / "web/tokenizer")
    prepare(root, dataset=str(root / "code.jsonl"), prepared_dir=str(root / "other"), vocab_size=300)
    return {name: str(root / name) for name in ("web", "code", "science", "other")}


@pytest.fixture(scope="module")
def mixed(folders, settings) -> dict:
    """Settings of a tiny run over 0.7 web and 0.3 code, with science as a further validation set."""
    return {
        **{name: value for name, value in settings.items() if name not in PREPARING},
        "mixture": pairs({folders["web"]: 0.7, folders["code"]: 0.3}),
        "validation": {"science": folders["science"]},
        "precision": "float32",
        "tokens_per_step": 512,
        "eval_windows": 5,
        "sample_tokens": 0,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "save_total_limit": 9,
        "warmup_steps": 2,
    }


def pairs(values: dict) -> list[str]:
    """A mapping as the command line has it; in YAML, tests would sort it."""
    return [f"{name}={value}" for name, value in values.items()]


def run(folder, settings: dict, *argv: str, **changes):
    """run_pretrain.py in this process."""
    from run_pretrain import main

    main(["--config", str(config_file(folder.parent, settings, output_dir=str(folder), **changes)), *argv])
    return folder


@pytest.fixture(scope="module")
def whole(mixed, tmp_path_factory):
    """The run that never stopped."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with without_figures():
        folder = run(tmp_path_factory.mktemp("whole") / "run", mixed)
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder


def test_tokens_of_each_folder_are_logged_and_keep_its_share(whole):
    rows = [row for row in read_jsonl(whole / "log.jsonl") if "loss" in row]
    assert len(rows) == 6
    for row in rows:
        assert row["tokens_web"] + row["tokens_code"] == row["tokens"]
        assert abs(row["tokens_web"] - 0.7 * row["tokens"]) < 64
    assert read_json(whole / "run.json")["plan"]["sources"][0]["tokens"] == rows[-1]["tokens_web"]


def test_every_validation_set_is_measured_and_their_mean_goes_by_the_shares(whole, folders):
    row = [row for row in read_jsonl(whole / "log.jsonl") if "eval_loss" in row][-1]
    expected = 0.7 * row["eval_web_loss"] + 0.3 * row["eval_code_loss"]
    assert row["eval_loss"] == pytest.approx(expected, rel=1e-12)
    sizes = {}
    for name in ("web", "code", "science"):
        validation = read_json(f"{folders[name]}/manifest.json")["splits"]["validation"]
        sizes[name] = validation["bytes"] / validation["tokens"]
        assert row[f"eval_{name}_perplexity"] == pytest.approx(math.exp(row[f"eval_{name}_loss"]))
        bits = row[f"eval_{name}_loss"] / math.log(2) / sizes[name]
        assert row[f"eval_{name}_bits_per_byte"] == pytest.approx(bits)
    bits = row["eval_loss"] / math.log(2) / (0.7 * sizes["web"] + 0.3 * sizes["code"])
    assert row["eval_bits_per_byte"] == pytest.approx(bits)


def test_record_and_card_tell_the_folders(whole, folders):
    identity = read_json(whole / "run.json")["identity"]["data"]
    assert "data" not in identity and identity["order_version"] == 2
    assert {name: part["weight"] for name, part in identity["mixture"].items()} == {"web": 0.7, "code": 0.3}
    card, row = (whole / "README.md").read_text(encoding="utf-8"), read_jsonl(whole / "log.jsonl")[-1]
    assert (
        f"| science |  | {row['eval_science_loss']:.4f} |" in card and "mean over the folders by their shares" in card
    )
    assert "| web | local files (web.jsonl) | 70 % |" in card and "| code | 30 % |" in card
    weighted = read_json(whole / "data.json")["baselines"]["bigram"]
    own = [read_json(f"{folders[name]}/manifest.json")["baselines"]["bigram"] for name in ("web", "code")]
    assert weighted == pytest.approx(0.7 * own[0] + 0.3 * own[1])


def test_a_step_and_a_document_of_a_mixture_are_traced(whole, folders, capsys):
    capsys.readouterr()
    trace.main([str(whole), "--step", "2", "--json"])
    [step] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    windows = {folder: [w for w in step["windows"] if w["folder"] == folder] for folder in folders.values()}
    assert abs(len(windows[folders["web"]]) - 0.7 * 8) < 1 and len(step["windows"]) == 8
    window = windows[folders["code"]][0]
    trace.main([str(whole), "--document", window["documents"][0]["name"], "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"step": 2, **{name: window[name] for name in ("position", "window", "tokens")}} in answers[0]["reads"]
    assert [answer["folder"] for answer in answers] == [folders["code"]]


class Stop(TrainerCallback):
    """Asks a run to stop in a step."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            (self.folder / "stop").touch()


def test_a_stopped_mixture_ends_bit_for_bit_as_the_one_that_was_not(whole, mixed, tmp_path, monkeypatch, handlers):
    """Also where the command names the folders in another order."""
    from llama_lite.training.trainer import PretrainTrainer

    original = PretrainTrainer.train

    def train(self, *args, **kwargs):
        self.add_callback(Stop(tmp_path / "run", 4))
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "train", train)
        with pytest.raises(Interrupted, match="at step 4 of 6"):
            run(tmp_path / "run", mixed)
    run(tmp_path / "run", mixed, mixture=mixed["mixture"][::-1])
    for name in ("model.safetensors", "checkpoint-6/optimizer.safetensors"):
        assert same_tensors(tmp_path / "run" / name, whole / name)
    assert log_of(tmp_path / "run") == log_of(whole)


def test_another_mixture_is_refused_or_goes_on_in_each_folder(whole, mixed, folders, tmp_path, monkeypatch, handlers):
    shutil.copytree(whole, tmp_path / "run")
    changed = {
        **mixed,
        "max_steps": 8,
        "eval_strategy": "no",
        "mixture": {folders["web"]: 0.5, folders["science"]: 0.5},
        "validation": None,  # so that of the record counts, which is a folder of the mixture now
    }
    message = r"mixture +.*code 0\.3.*web 0\.7.*-> .*science 0\.5.*; each folder goes on where it stopped"
    with pytest.raises(Refusal, match=message):
        run(tmp_path / "run", changed, "--allow_changes", "max_steps")
    read, original = [], MixedWindows.__getitem__

    def spy(self, position):
        read.append((position, self.fingerprints[self.locate(position)[0]], self._position_in_folder(position)[1]))
        return original(self, position)

    monkeypatch.setattr(MixedWindows, "__getitem__", spy)
    run(tmp_path / "run", changed, "--allow_changes", "max_steps,mixture")
    web, science = (read_json(f"{folders[name]}/manifest.json")["fingerprint"] for name in ("web", "science"))
    before = read_jsonl(whole / "log.jsonl")[-2]["tokens_web"] // 64
    steps = sorted(read)[:16]  # windows of steps 7 and 8; the loader may have read on
    assert [position for position, *_ in steps] == list(range(48, 64))
    assert [n for _, name, n in steps if name == web] == list(range(before, before + 8))
    assert [n for _, name, n in steps if name == science] == list(range(8))
    history = read_json(tmp_path / "run/checkpoint-8/progress.json")["order_history"]
    assert [entry["step"] for entry in history] == [0, 6] and history[1]["weights"] == {web: 0.5, science: 0.5}
    order = reading_order(tmp_path / "run", read_json(tmp_path / "run/run.json"))
    manifests = {name: read_json(f"{folders[name]}/manifest.json") for name in ("web", "code", "science")}
    prepared = {manifest["fingerprint"]: (Path(folders[name]), manifest) for name, manifest in manifests.items()}
    traced = [read for step in (7, 8) for read, _ in DocumentReads(prepared, order.stretches).reads(step)]
    assert [(read.position, read.fingerprint) for read in traced] == [entry[:2] for entry in steps]
    last = [row for row in read_jsonl(tmp_path / "run/log.jsonl") if "loss" in row][-1]
    assert last["tokens_code"] + last["tokens_web"] + last["tokens_science"] == last["tokens"] == 8 * 512


def start_of(saved: dict | None, progress: dict, step: int = 6, without: tuple = ()):
    """As much of a ResumePoint as the history of an order needs."""
    manifest = {"identity": {"data": saved}, "step": step}
    checkpoint = None if saved is None else "checkpoint"
    return SimpleNamespace(
        checkpoint=checkpoint, manifest=manifest, progress=progress, step=step, without=without, data_start=0
    )


def test_the_history_of_an_order_grows_with_what_happens_to_it():
    one = {"data": "w"}
    two = {"mixture": {"web": {"data": "w", "weight": 0.7}, "code": {"data": "c", "weight": 0.3}}}
    names = {"w": "web", "c": "code"}
    assert order_history(start_of(None, {}), one) == [{"step": 0}]
    began = order_history(start_of(None, {}), two)
    assert began == [{"step": 0, "weights": {"w": 0.7, "c": 0.3}, "names": names}]
    progress = {"data_start": 0, "order_history": began}
    assert order_history(start_of(two, progress), two) == began
    assert order_history(start_of(two, progress, 6, ("data",)), two) == [*began, {"step": 6}]
    grown = order_history(start_of(one, {"data_start": 2}), two)
    assert grown == [{"step": 0, "weights": {"w": 1.0}}, {"step": 2}, {**began[0], "step": 6}]


REFUSED = [
    ({"web": 0.7, "other": 0.3}, [], r"other has another tokenizer \(of 300 ids\).*--tokenizer \S+web/tokenizer"),
    ({"web": 7, "code": 3}, [], r"--mixture: the weights 7, 3 sum to 10, and shares sum to 1: give 0\.7, 0\.3"),
    (
        {"web": 0.1, "code": 0.9},
        ["--max_steps", "400"],
        r"code would be read \d\.\d\d times .*--allow_epochs_of \S+code",
    ),
    ({"web": 0.7, "code": 0.3}, ["--dataset", "x.txt"], "--mixture takes folders that are prepared already"),
    ({"web": 0.7, "code": 0.3}, ["--allow_epochs_of", "x=2"], "--allow_epochs_of x: not a folder of --mixture"),
    ({"web": 0.7, "code": 0.3}, ["--validation", "web=x"], "--validation web: a folder of --mixture has that name"),
    ({"web": 1.0, "gone": 0.0}, [], "gone=0: a folder without a share is never read"),
    (
        {"web": 0.5, "gone": 0.5},
        [],
        r"gone holds no prepared tokens.*--tokenizer \S+web/tokenizer --prepare_only --prepared_dir \S+gone\.",
    ),
]


@pytest.mark.parametrize(("weights", "argv", "message"), REFUSED)
def test_mixtures_that_cannot_be_are_refused(mixed, folders, tmp_path, weights, argv, message):
    there = {folders.get(name, str(tmp_path / name)): weight for name, weight in weights.items()}
    argv = [word.replace("web=x", f"web={folders['science']}") for word in argv]
    with pytest.raises(Refusal, match=message):
        run(tmp_path / "run", mixed, "--dry_run", *argv, mixture=pairs(there))


def test_runs_and_texts_in_place_of_their_tokens_are_told_all_at_once(mixed, folders, tmp_path):
    """One was told per command, and to prepare a text into itself."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("words")
    for name in ("web", "other"):
        (tmp_path / f"run-{name}").mkdir()
        write_json(tmp_path / f"run-{name}/run.json", {"kind": "pretrain", "settings": {"prepared_dir": folders[name]}})
    with pytest.raises(Refusal) as refusal:
        weights = {str(tmp_path / "run-web"): 0.5, str(tmp_path / "run-other"): 0.3, str(tmp_path / "text"): 0.2}
        run(tmp_path / "run", mixed, "--dry_run", mixture=pairs(weights))
    said, tokenizer = str(refusal.value), f"--tokenizer {folders['web']}/tokenizer --prepare_only"
    assert f"run-web is the folder of a run: give that of its tokens, {folders['web']}." in said
    assert f"run-other is the folder of a run: give that of its tokens, {folders['other']}." in said
    assert f"{folders['other']} has another tokenizer" in said
    assert f"prepare its text again, run_pretrain.py --dataset TEXT {tokenizer}, and give the folder" in said
    assert f"text holds a text. Prepare it first: run_pretrain.py --dataset {tmp_path}/text {tokenizer}, and" in said
    shutil.copytree(tmp_path / "text", tmp_path / "text-2")
    with pytest.raises(Refusal) as refusal:  # the second with the tokenizer of the first, which is to be prepared, too
        texts = {str(tmp_path / "text"): 0.5, str(tmp_path / "text-2"): 0.5}
        run(tmp_path / "run", mixed, "--dry_run", mixture=pairs(texts))
    assert f"--dataset {tmp_path}/text --prepare_only" in str(refusal.value)
    assert f"--dataset {tmp_path}/text-2 --tokenizer FIRST/tokenizer --prepare_only" in str(refusal.value)


def test_a_text_is_prepared_with_the_tokenizer_of_another_also_where_a_run_was_trained_on_it(
    pretrain, folders, tmp_path, capsys, monkeypatch, settings
):
    """The way to a mixture that a refusal offers: it was refused, for the run's record gave its folder."""
    from run_pretrain import main

    monkeypatch.chdir(tmp_path)
    shutil.copy(settings["dataset"], "mine.jsonl")
    given = {"dataset": "mine.jsonl", "tokenizer": "train", "vocab_size": 400, "max_steps": 2, "save_steps": 2}
    run = pretrain(tmp_path / "runs/mine", prepared_dir=None, **given)
    first = read_json(run / "run.json")["settings"]["prepared_dir"]
    capsys.readouterr()
    main(["--dataset", "mine.jsonl", "--tokenizer", f"{folders['web']}/tokenizer", "--prepare_only"])
    made = capsys.readouterr().out.splitlines()[-1].removeprefix("prepared  ")
    assert made != first and read_json(f"{made}/manifest.json")["tokenizer"] == _tokenizer(folders["web"])
    assert read_json(f"{first}/manifest.json")["tokenizer"]["vocab_size"] == 400  # the run's are as they were


def _tokenizer(folder: str) -> dict:
    return read_json(f"{folder}/manifest.json")["tokenizer"]


def test_a_validation_set_cannot_have_a_tokenizer_that_is_not_trained_yet(mixed, folders, tmp_path):
    changes = {"mixture": None, "dataset": str(tmp_path / "text.jsonl"), "validation": {"s": folders["science"]}}
    shutil.copy(f"{folders['science']}.jsonl", tmp_path / "text.jsonl")
    message = r"--validation s: \S+ has another tokenizer .*; or give --tokenizer \S+science/tokenizer"
    with pytest.raises(Refusal, match=message):
        run(tmp_path / "run", mixed, "--dry_run", **changes)


def test_the_dry_run_tells_tokens_epochs_and_what_evaluations_cost(mixed, folders, tmp_path, capsys):
    weights = pairs({folders["web"]: 0.1, folders["code"]: 0.9})
    argv = ("--dry_run", "--max_steps", "100", "--allow_epochs_of", f"{folders['code']}=3")
    run(tmp_path / "run", mixed, *argv, mixture=weights)
    said = capsys.readouterr().out
    tokens = Schedule([0.1, 0.9]).count(1, 800) * 64
    windows = (read_json(f"{folders['code']}/manifest.json")["splits"]["train"]["tokens"] - 1) // 64
    assert f"code  0.9000  {tokens:,} tokens, {tokens / 64 / windows:.2f} epochs" in said
    assert "validation          3 sets, 960 tokens per evaluation (web 5, code 5, science 5 windows), 34 eval" in said
    assert "eval_loss is the mean of web, code by their shares; probe windows: web 1, code 4" in said


def test_a_further_validation_set_changes_nothing_of_a_run(pretrain, whole_run, settings, tmp_path):
    folder = pretrain(tmp_path / "run", validation=[f"again={settings['prepared_dir']}"])
    assert same_tensors(folder / "model.safetensors", whole_run / "model.safetensors")
    rows = [row for row in read_jsonl(folder / "log.jsonl") if "eval_loss" in row]
    assert rows and all(row["eval_again_loss"] == row["eval_loss"] for row in rows)
    assert "| again |" in (folder / "README.md").read_text(encoding="utf-8")


def test_folders_of_a_mixture_are_shared_one_by_one(mixed, folders, tmp_path, hub, handlers, capsys):
    ids = ",".join(f"{folders[name]}=org/{name}-tokens" for name in ("web", "code"))
    run(tmp_path / "run", mixed, "--prepare_only", "--push_to_hub", "--prepared_hub_id", ids)
    pulled = {str(tmp_path / name): weight for name, weight in (("web", 0.7), ("code", 0.3))}
    ids = ",".join(f"{tmp_path / name}=org/{name}-tokens" for name in ("web", "code"))
    run(tmp_path / "run", mixed, "--prepare_only", mixture=pulled, prepared_hub_id=ids)
    for name in ("web", "code"):
        there, here = (read_json(f"{place}/manifest.json") for place in (folders[name], tmp_path / name))
        assert there["fingerprint"] == here["fingerprint"]
    with pytest.raises(Refusal, match="--prepared_hub_id nowhere: of a mixture, give it per folder"):
        run(tmp_path / "run", mixed, "--dry_run", "--prepared_hub_id", "nowhere")


@pytest.mark.slow
def test_two_processes_read_the_same_windows_of_a_mixture(whole, mixed, tmp_path):
    """By the losses of every step, and those of every validation set."""
    ddp = yaml.safe_load((ROOT / "configs/accelerate/ddp.yaml").read_text()) | {
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": 0,
        "use_cpu": True,
    }
    (tmp_path / "ddp.yaml").write_text(yaml.safe_dump(ddp))
    path = config_file(tmp_path, mixed, output_dir=str(tmp_path / "run"), per_device_train_batch_size=4)
    done = launch_ranks(tmp_path / "ddp.yaml", "--config", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for found, there in zip(log_of(tmp_path / "run"), log_of(whole), strict=True):
        names = [name for name in there if name.endswith("loss") or name.startswith("tokens")]
        assert names and all(found[name] == pytest.approx(there[name], abs=1e-5) for name in names)


MANIFEST = {
    "mixture": [
        {
            "name": name,
            "fingerprint": name,
            "weight": weight,
            "splits": {"train": {"tokens": 6401}, "validation": {"tokens": 641}},
        }
        for name, weight in (("web", 0.7), ("code", 0.3))
    ]
}


def test_a_plan_counts_what_each_folder_is_read():
    rows = source_rows(MANIFEST, 64, 200)
    assert [(row["name"], row["tokens"], row["epochs"]) for row in rows] == [
        ("web", 140 * 64, 1.4),
        ("code", 60 * 64, 0.6),
    ]
    assert source_rows({"splits": {}}, 64, 200) == []
    mixture = ["data/web=0.7", "data/code=0.3"]
    check_epochs(rows, mixture, True, [])
    check_epochs(rows, mixture, False, ["data/web"])
    for limits in ([], ["data/code"], ["data/web=1.3"]):
        with pytest.raises(Refusal, match=r"data/web would be read 1\.40 times"):
            check_epochs(rows, mixture, False, limits)


def test_evaluations_of_several_sets_cost_a_third_of_training_per_token():
    sets = set_rows({**MANIFEST, "validation_sets": {"s": MANIFEST["mixture"][0]}}, 64, 5, 8)
    assert [(row["name"], row["windows"], row["probe"]) for row in sets] == [("web", 5, 6), ("code", 5, 2), ("s", 5, 0)]
    held_out = [(part["splits"]["validation"]["tokens"] - 1) // 64 for part in MANIFEST["mixture"]]
    assert [row["held_out"] for row in sets] == [*held_out, held_out[0]]
    assert "3 sets, 960 tokens per evaluation" in cost_lines(sets, [], 64, 10, 32_000)[0]
    assert "10 evaluations: 10.0 % of the computation" in cost_lines(sets, [], 64, 10, 32_000)[0]
    assert cost_lines(sets[:1], [], 64, 10, 32_000) == []
    assert probe_counts([0.999, 0.001], 8) == [8, 1]


@pytest.mark.parametrize(
    "limits, allow_epochs, expected",
    [
        ([], False, True),
        (["code=4"], False, True),
        (["web", "code=2.5"], False, True),
        (["web", "code"], False, False),
        (["code=3"], True, True),
        ([], True, False),
    ],
)
def test_a_derived_length_reads_no_folder_more_often_than_is_allowed(limits, allow_epochs, expected):
    """The most windows are allowed, and one more is not."""
    splits = {"web": 64 * 100 + 1, "code": 64 * 30 + 1}
    parts = [
        {"name": name, "weight": weight, "fingerprint": name, "splits": {"train": {"tokens": splits[name]}}}
        for name, weight in (("web", 0.7), ("code", 0.3))
    ]
    manifest, mixture = {"mixture": parts}, ["web=0.7", "code=0.3"]
    most = most_positions(manifest, 64, mixture, allow_epochs, limits)
    assert math.isfinite(most) == expected
    if expected:
        check_epochs(source_rows(manifest, 64, most), mixture, allow_epochs, limits)
        with pytest.raises(Refusal, match="would be read"):
            check_epochs(source_rows(manifest, 64, most + 1), mixture, allow_epochs, limits)
    assert most_positions({}, 64, [], False, []) == math.inf
