"""What nobody gives follows from record, text and machine, with a reason; what somebody gives wins; what cannot go
together is refused before anything is made.
"""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import launch

from llama_lite.chat_format import packing, template
from llama_lite.config.pretrain import PretrainArguments, parse_pretrain
from llama_lite.data.given_text import Text
from llama_lite.data.tokenizer import train_tokenizer
from llama_lite.errors import Refusal
from llama_lite.files import read_json, write_json
from llama_lite.folder_kinds import check_folder
from llama_lite.kernels import switches
from llama_lite.machine.parallelism import Layout
from llama_lite.models import shapes
from llama_lite.models.presets import count_parameters, model_config_of
from llama_lite.models.references import weights_digest
from llama_lite.training import (
    decisions,
    derive_data,
    derive_model,
    derive_pretrain,
    derive_schedule,
    derive_sft,
    recorded_values,
    suggest,
    timing,
    tuning_folder,
)
from llama_lite.training.decisions import nice
from run_pretrain import what_next

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def fast(monkeypatch):
    """Every model trains at 1e10 FLOP per second, whatever this machine does meanwhile, and a command has just
    begun.
    """

    def pace(config, micro, block, precision, switches, device):
        from trl.trainer.utils import compute_flops_per_token

        seconds = compute_flops_per_token(config, block) * micro * block / 1e10
        return timing.Pace(seconds, 0.02 * seconds, seconds / 3 / micro, 1e-3)

    monkeypatch.setattr(timing, "pace", pace)
    monkeypatch.setattr(timing, "MAX_TIMED", 1e9)
    monkeypatch.setattr(timing.hardware, "peak_flops", lambda precision, device: 3e10)
    monkeypatch.setattr(derive_model, "seconds_since_start", lambda: 10.0)


def settled(*argv, processes=1, recorded=None, only_tokens=False, precision="float32", sharding="none"):
    groups = parse_pretrain(["--precision", precision, *argv])
    derivation = derive_pretrain.Derivation(
        groups, Text(groups[1]), Layout(processes, sharding), groups[-2].explicit_args, recorded or {}
    )
    _, reasons, tokens = derivation.settle(only_tokens)
    return (
        {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)},
        reasons,
        tokens,
    )


def folder_of(tmp_path, text, characters) -> Path:
    """The beginning of a real text, as a folder of files."""
    folder = tmp_path / f"text-{characters}"
    folder.mkdir()
    whole = "\n\n".join(json.loads(line)["text"] for line in text.read_text().splitlines())
    for number in range(4):
        size = characters // 4
        (folder / f"{number}.txt").write_text(
            (whole * (1 + characters // len(whole)))[number * size : (number + 1) * size]
        )
    return folder


@pytest.mark.parametrize("characters", [3_000, 20_000, 200_000, 2_000_000])
def test_a_folder_of_text_needs_nothing_else(fast, text, tmp_path, characters, monkeypatch):
    """For 3 KB as for 2 MB every value fits the others: windows in the context, held-out windows, steps, and a time of
    about ten minutes at most.
    """
    monkeypatch.chdir(tmp_path)
    values, reasons, tokens = settled("--dataset", str(folder_of(tmp_path, text, characters)))
    train, held = (tokens["splits"][name]["tokens"] for name in ("train", "validation"))
    block, per_step = values["block_size"], values["tokens_per_step"]
    config = model_config_of(values["model_config"], values["vocab_size"], block)
    assert per_step % (block * values["per_device_train_batch_size"]) == 0 and train // per_step >= 1
    assert (
        1 <= values["probe_windows"] <= values["eval_windows"] <= (held - 1) // block
        and 0.03 < held / (train + held) < 0.21
    )
    assert (
        values["max_steps"] >= 4
        and values["max_steps"] >= values["eval_steps"]
        and values["save_steps"] == values["eval_steps"]
    )
    last = values["max_steps"] % values["eval_steps"]
    assert last == 0 or 5 * last >= values["eval_steps"]
    assert values["warmup_steps"] < values["max_steps"] and config.vocab_size >= values["vocab_size"]
    epochs = values["max_steps"] * per_step / train
    shape = shapes.parse(values["model_config"])
    most = shapes.PARAMETERS_PER_TOKEN * max(epochs, shapes.most_epochs(train)) * train
    # 3 KB used to derive a model of 1.1B parameters: all sizes read as much of it, and the largest is the best by the fit
    assert shape == shapes.LADDER[0] or shapes.parameters(shape, values["vocab_size"]) <= most
    assert epochs <= shapes.most_epochs(train) + 1 and (epochs <= 1 or values["allow_epochs"])
    for name in (
        "vocab_size",
        "validation_tokens",
        "model_config",
        "block_size",
        "tokens_per_step",
        "max_steps",
        "learning_rate",
    ):
        assert reasons[name], name
    assert values["prepared_dir"].startswith(f"data/text-{characters}-")
    assert derive_pretrain.output_dir(f"some/where/text-{characters}/") == f"runs/text-{characters}"


def test_other_rows_for_the_same_base_have_a_folder_of_their_own(tmp_path, monkeypatch):
    """Else the command takes the number of held-out rows, and the rest, from the record of the run on other rows."""
    monkeypatch.chdir(tmp_path)
    folder, base = "runs/mytext-sft", "runs/mytext"
    own, other = {"dataset": "data/my rows.jsonl"}, {"settings": {"dataset": "installed-docs"}}
    assert tuning_folder.output_dir(base, own) == folder
    Path(folder).mkdir(parents=True)
    write_json(Path(folder) / "run.json", other)
    assert tuning_folder.output_dir(base, own) == f"{folder}-my-rows"
    assert tuning_folder.output_dir(base, other["settings"]) == tuning_folder.output_dir(base) == folder
    # one file in other spellings
    (tmp_path / "rows.jsonl").touch()
    write_json(Path(folder) / "run.json", {"settings": {"dataset": "rows.jsonl"}})
    for spelling in ("rows.jsonl", "./rows.jsonl", str(tmp_path / "rows.jsonl")):
        assert tuning_folder.output_dir(base, {"dataset": spelling}) == folder


def test_a_base_that_was_trained_further_is_tuned_in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The commands that the longer run prints used to be refused: the folder held a run on the earlier weights."""
    monkeypatch.chdir(tmp_path)
    base, folder = Path("runs/mytext"), "runs/mytext-sft"
    for name in (base, f"{folder}", f"{folder}-2"):
        Path(name).mkdir(parents=True)

    def tuned(name: str) -> None:
        write_json(Path(name) / "run.json", {"base": {"sha256": weights_digest(base)}})

    (base / "model.safetensors").write_bytes(b"step 5")
    tuned(folder)
    assert tuning_folder.output_dir(str(base)) == folder
    (base / "model.safetensors").write_bytes(b"step 10")
    assert tuning_folder.output_dir(str(base)) == f"{folder}-2"  # which holds no run
    tuned(f"{folder}-2")
    assert tuning_folder.output_dir(str(base)) == f"{folder}-2"
    (base / "model.safetensors").write_bytes(b"step 15")
    assert tuning_folder.output_dir(str(base)) == f"{folder}-3"


@pytest.mark.parametrize(
    "base, folder",
    [
        ("runs/demo/", "runs/demo-sft"),
        ("runs/a/b", "runs/a/b-sft"),
        ("org/name@step-000180", "runs/name-sft"),
        ("some/where/My model", "runs/My-model-sft"),
        ("runs/demo/checkpoint-180", "runs/demo-checkpoint-180-sft"),  # it was refused inside runs/demo
        ("./runs/demo/checkpoint-180/", "runs/demo-checkpoint-180-sft"),
        ("/some/where/demo/checkpoint-180", "runs/demo-checkpoint-180-sft"),
        ("runs/demo-sft/merged", "runs/demo-sft-merged-sft"),  # it was accepted inside runs/demo-sft
        ("runs/merged", "runs/merged-sft"),
        (".", "runs/here-sft"),
    ],
)
def test_a_tuning_run_lies_in_no_folder_of_another_run(tmp_path, monkeypatch, base, folder):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for run in ("runs/demo", "runs/demo-sft"):
        Path(run).mkdir(parents=True)
        write_json(Path(run, "run.json"), {"kind": "sft"})
    assert tuning_folder.output_dir(base) == folder
    check_folder("output_dir", folder, "sft")


@pytest.mark.parametrize("characters", [12_000, 50_000, 100_000])
def test_a_short_text_gives_a_context_that_can_be_tuned(fast, text, tmp_path, characters):
    """It used to give 32 or 64 tokens, fewer than the system prompt of the chat format takes."""
    folder = str(folder_of(tmp_path, text, characters))
    values, reasons, tokens = settled("--dataset", folder)
    train, held = (tokens["splits"][name]["tokens"] for name in ("train", "validation"))
    assert values["block_size"] == decisions.TUNED_LENGTH and reasons["block_size"]
    assert train // 256 >= 8 and (held - 1) // 256 >= 2 and values["tokens_per_step"] <= train // 4
    earlier, _, _ = settled("--dataset", folder, recorded={"block_size": 64})  # of an earlier version
    assert earlier["block_size"] == 64
    assert settled("--dataset", folder, "--tokens_per_step", "192")[0]["block_size"] == 64


def test_no_tuning_is_proposed_for_a_context_that_it_does_not_fit_into(fast, text, tmp_path):
    values, _, _ = settled("--dataset", str(folder_of(tmp_path, text, 3_000)))
    assert values["block_size"] == 32  # 3 KB hold no two windows of more to evaluate on
    tokenizer = train_tokenizer(iter([text.read_text()[:50_000]]), 1024)
    for context in (32, 64, 256):
        lines = what_next(Path("runs/mine"), tokenizer, model_config_of("2x64", 1024, context))
        assert any("python run_sft.py" in line for line in lines) == (context == 256)
        assert "python run_eval.py --models" in "".join(lines) and ("runs/mine-sft" in "".join(lines)) == (
            context == 256
        )
    needed = template.least_context(tokenizer)
    assert 64 < needed < 256 and tokenizer.chat_template is None
    tokenizer.chat_template = template.vicuna_template(tokenizer)
    assert needed == len(template.encode(tokenizer, template.SHORT_ROW).input_ids)


def test_given_values_win_and_the_rest_follows_from_them(fast, text, tmp_path):
    folder = str(folder_of(tmp_path, text, 200_000))
    values, reasons, _ = settled(
        "--dataset", folder, "--block_size", "128", "--model_config", "2x64", "--max_steps", "50", "--vocab_size", "700"
    )
    assert (values["block_size"], values["model_config"], values["max_steps"], values["vocab_size"]) == (
        128,
        "2x64",
        50,
        700,
    )
    assert not {"block_size", "model_config", "max_steps", "vocab_size"} & set(reasons) and values["warmup_steps"] == 2
    preset, _, _ = settled("--dataset", folder, "--model_config", "tiny")
    assert preset["vocab_size"] <= 512 and preset["block_size"] <= 128  # within the preset's vocabulary and context


def test_a_given_length_chooses_a_model_for_it(fast, text, tmp_path):
    """Four steps of one used to be planned with 1.8B parameters, as many as there were sizes for."""
    folder, sizes = str(folder_of(tmp_path, text, 2_000_000)), []
    for steps in (4, 500, 3000, 1_000_000):
        argv = ["--dataset", folder, "--max_steps", str(steps), "--precision", "float32"]
        groups = parse_pretrain(argv)
        derivation = derive_pretrain.Derivation(groups, Text(groups[1]), Layout(1), groups[-2].explicit_args, {})
        derivation.settle()
        shape, reads = shapes.parse(groups[0].model_config), steps * groups[-2].tokens_per_step
        sizes.append(shapes.parameters(shape, groups[1].vocab_size))
        assert shape == shapes.LADDER[0] or (
            sizes[-1] <= shapes.PARAMETERS_PER_TOKEN * reads and reads / derivation.model.speed() < 600
        )
    assert sizes[0] < sizes[1] > sizes[3], sizes  # too short, and too long, for more than the smallest


def test_no_model_is_derived_that_memory_does_not_hold(fast, text, tmp_path, monkeypatch):
    folder, sizes = str(folder_of(tmp_path, text, 2_000_000)), []
    for memory in (10**12, 10**8):
        monkeypatch.setattr(derive_model, "capacity", lambda device, memory=memory: memory)
        values, _, _ = settled("--dataset", folder, "--hours", "8")
        sizes.append(shapes.parameters(shapes.parse(values["model_config"]), values["vocab_size"]))
    assert sizes[1] <= 0.8 * 10**8 / 16 < sizes[0], sizes


def test_a_dataset_of_the_hub_with_a_given_length_has_a_vocabulary():
    """The bytes of such a text are not known: that of a text without end was asked for."""
    argv = ["--dataset", "owner/name", "--max_tokens", "1_000_000", "--num_train_epochs", "1", "--precision", "float32"]
    groups = parse_pretrain(argv)
    d = decisions.Decisions(groups, groups[-2].explicit_args)
    derive_data.DataDerivation(d, Text(groups[1]), None, torch.device("cpu"), 1).settle_vocabulary()
    assert groups[1].vocab_size == shapes.vocabulary_for(4_000_000)


@pytest.mark.parametrize(
    ("steps", "every", "kept"), [(551, 50, 550), (559, 50, 550), (560, 50, 560), (550, 50, 550), (7, 1, 7), (1, 1, 1)]
)
def test_a_derived_run_does_not_end_shortly_after_an_evaluation(steps, every, kept):
    assert derive_schedule.without_short_interval(steps, every) == kept


@pytest.mark.parametrize("hours", [0.1, 1.0, 8.0])
def test_the_hours_hold_preparing_training_evaluating_and_saving(fast, text, tmp_path, hours):
    """Of a text that is not read up before: the time of the derived run, counted from its parts, is within a tenth of
    what was asked for.
    """
    folder = folder_of(tmp_path, text, 2_000_000)
    groups = parse_pretrain(
        ["--dataset", str(folder), "--hours", str(hours), "--precision", "float32", "--max_tokens", "100_000_000"]
    )
    derivation = derive_pretrain.Derivation(groups, Text(groups[1]), Layout(1), groups[-2].explicit_args, {})
    derivation.text.facts.bytes *= 200  # as if there were 400 MB of it
    derivation.settle()
    found = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    schedule, evaluations = derivation.schedule, found["max_steps"] / found["eval_steps"]
    pace = schedule.step_pace()
    step = pace.step(schedule.accumulation)
    if found["compile_layers"]:
        step /= switches.COMPILED["float32"]
    seconds = 10 + derive_model.READY + derive_model.FINISH + derivation.data.preparing_seconds()
    seconds += found["max_steps"] * step
    seconds += evaluations * found["eval_windows"] * pace.window + switches.COMPILING * found["compile_layers"]
    seconds += (
        found["max_steps"]
        / found["save_steps"]
        * (derive_schedule.SAVE + 12 * count_parameters(derivation.model.config())[0] / derive_schedule.SAVE_BYTES)
    )
    assert 0.85 * hours * 3600 <= seconds <= 1.1 * hours * 3600


def test_more_time_gives_a_larger_model_and_a_lower_rate(fast, text, tmp_path):
    folder = folder_of(tmp_path, text, 2_000_000)
    found = []
    for hours in (0.05, 1, 30):
        groups = parse_pretrain(
            ["--dataset", str(folder), "--hours", str(hours), "--precision", "float32", "--max_tokens", "1_000_000_000"]
        )
        derivation = derive_pretrain.Derivation(groups, Text(groups[1]), Layout(1), groups[-2].explicit_args, {})
        derivation.text.facts.bytes *= 2000
        derivation.settle()
        found.append(
            (
                shapes.layer_parameters(shapes.parse(groups[0].model_config)),
                -groups[-1].learning_rate,
                groups[-2].tokens_per_step,
            )
        )
    assert found == sorted(found) and found[0][0] < found[1][0] < found[2][0]


def test_of_a_text_far_larger_than_the_run_only_the_beginning_is_prepared(fast, text, tmp_path, monkeypatch):
    monkeypatch.setattr(derive_data, "ALL_BELOW", 1e5)
    monkeypatch.setattr(derive_data, "NOMINAL_FLOPS", {"cpu": 1e5, "cuda": 1e5})
    folder = folder_of(tmp_path, text, 2_000_000)
    values, reasons, tokens = settled("--dataset", str(folder))
    assert values["max_bytes"] < 1_000_000 and "2.0 MB: more than a run of this length reads" in reasons["max_bytes"]
    assert sum(split["tokens"] for split in tokens["splits"].values()) < values["max_bytes"]
    assert settled("--dataset", str(folder), "--max_bytes", "1500000")[0]["max_bytes"] == 1_500_000


def test_what_decides_the_prepared_folder_is_the_same_whatever_the_machine_does(fast, text, tmp_path, monkeypatch):
    folder = str(folder_of(tmp_path, text, 200_000))
    monkeypatch.chdir(tmp_path)
    prepared = [settled("--dataset", folder, only_tokens=only)[0]["prepared_dir"] for only in (True, False)]
    monkeypatch.setattr(timing.hardware, "peak_flops", lambda precision, device: 3e8)
    assert {*prepared, settled("--dataset", folder)[0]["prepared_dir"]} == {prepared[0]}


def test_a_device_without_constants_derives_what_is_timed_there(fast, text, tmp_path, monkeypatch):
    """Apple's mps has no peak FLOP/s in a table, and no share of them that was measured."""
    monkeypatch.setattr(PretrainArguments, "device", torch.device("mps"))
    monkeypatch.setattr(timing.hardware, "peak_flops", lambda precision, device: None)
    monkeypatch.setattr(
        timing.hardware,
        "product_seconds",
        lambda device, size, repeats, names: dict.fromkeys(names, 2 * size**3 / 3e10),
    )
    values, reasons, _ = settled("--dataset", str(folder_of(tmp_path, text, 200_000)), precision="auto")
    assert (values["precision"], reasons["precision"]) == ("float32", "bfloat16 has not been tried on mps")
    assert not any(values[name] for name in ("fused_loss", "block_attention", "compile_layers"))
    assert values["max_steps"] > 1 and "tokens per second here" in reasons["model_config"]


def test_a_plan_for_gpus_takes_no_values_from_this_cpu(text, tmp_path):
    values, reasons, _ = settled(
        "--dataset",
        str(text),
        "--dry_run",
        "--plan_launch",
        "configs/accelerate/ddp.yaml",
        processes=8,
        precision="auto",
    )
    assert values["precision"] == "bfloat16" and reasons["precision"] == "planned for GPUs"
    assert values["compile_layers"] is True and reasons["compile_layers"] == "planned for GPUs"
    assert values["fused_loss"] is True and reasons["fused_loss"] == "no logits are held"
    assert values["block_attention"] is False and values["tokens_per_step"] % (8 * values["block_size"]) == 0


def test_float16_is_trained_without_the_fused_loss_whose_gradients_underflow(text, monkeypatch):
    monkeypatch.setattr(PretrainArguments, "device", torch.device("cuda"))
    given = ("--dataset", str(text), "--max_steps", "5", "--model_config", "tiny")
    for recorded in ({}, {"fused_loss": True}):  # of a run of an earlier version
        values, reasons, _ = settled(*given, precision="float16", recorded=recorded)
        assert values["fused_loss"] is False and "underflow in float16" in reasons["fused_loss"]
    assert settled(*given, precision="float32")[0]["fused_loss"] is True
    with pytest.raises(Refusal, match=r"--fused_loss with --precision float16: its gradients .* underflow"):
        settled(*given, "--fused_loss", precision="float16")
    with pytest.raises(Refusal, match=r"--use_liger_kernel with --precision float16: the gradients .* underflow"):
        settled(*given, "--use_liger_kernel", "True", precision="float16")
    with pytest.raises(Refusal, match="--precision float16 under DeepSpeed: a checkpoint would not hold"):
        settled(*given, precision="float16", sharding="zero2")


def test_what_cannot_go_together_is_refused_before_anything_is_prepared_all_at_once(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = ["--model_config", "tiny", "--vocab_size", "700", "--block_size", "256", "--tokens_per_step", "1000"]
    done = launch(
        "--dataset",
        str(text),
        "--output_dir",
        str(tmp_path / "run"),
        "--prepared_dir",
        str(tmp_path / "tokens"),
        *wrong,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in (
        "has 700 ids and the model's vocabulary is 512",
        "--block_size 256 is above the model's context of 128",
        "--tokens_per_step 1,000 is not",
    ):
        assert part in done.stderr
    assert not (tmp_path / "tokens").exists()
    done = launch(
        "--dataset",
        str(text),
        "--output_dir",
        str(tmp_path / "run"),
        "--prepared_dir",
        str(tmp_path / "tokens"),
        "--max_steps",
        "3",
        "--hours",
        "0.01",
    )
    assert "--max_steps and --hours both set the length of the run" in done.stderr
    right = [
        "--model_config",
        "tiny",
        "--vocab_size",
        "500",
        "--max_steps",
        "3",
        "--cpu_threads",
        "1",
        "--sample_tokens",
        "0",
    ]
    done = launch(
        "--dataset",
        str(text),
        "--output_dir",
        str(tmp_path / "run"),
        "--prepared_dir",
        str(tmp_path / "tokens"),
        *right,
    )
    assert done.returncode == 0, done.stderr  # the corrected command, in the same folders


def test_a_resume_takes_what_was_recorded_and_a_folder_that_has_grown_is_refused_for_that_alone(
    text, tmp_path, monkeypatch, pretrain
):
    monkeypatch.chdir(tmp_path)
    folder, run = folder_of(tmp_path, text, 20_000), tmp_path / "run"  # which ends before its hours do
    short = [
        "--dataset",
        str(folder),
        "--output_dir",
        str(run),
        "--cpu_threads",
        "1",
        "--hours",
        "0.006",
        "--sample_tokens",
        "0",
    ]
    assert launch(*short).returncode == 0
    before = read_json(run / "run.json")["settings"]
    again = launch(*short)
    assert again.returncode == 0 and "is finished" in again.stdout and read_json(run / "run.json")["settings"] == before
    other = launch(*short[:-4], "--hours", "0.01", "--sample_tokens", "0")
    assert (
        other.returncode == 2
        and "--hours 0.01: the run in" in other.stderr
        and "was started with --hours 0.006" in other.stderr
    )
    more = before["max_steps"] * 0.01 / 0.006
    assert f"To make it about that long: --max_steps {int(more)} --allow_changes max_steps." in other.stderr
    assert (
        f"--config {run} --hours 0.01 --output_dir OTHER" in other.stderr
        and read_json(run / "run.json")["settings"] == before
    )
    (folder / "more.txt").write_text("One more text that was not there when the run began. " * 400)
    grown = launch(*short)
    assert grown.returncode == 2 and grown.stderr.count("refused") == 1
    assert "4 files of" in grown.stderr and "5 of" in grown.stderr and "has changed since" in grown.stderr
    alone = launch("--output_dir", str(run))  # without the text: the prepared tokens are enough
    assert alone.returncode == 0 and "is finished" in alone.stdout, alone.stderr
    shutil.rmtree(folder)
    assert launch("--output_dir", str(run)).returncode == 0


def test_hours_are_never_passed_over(pretrain, tmp_path):
    """A run that is there keeps its length, and says so; a suggestion, and a plan of other hours, are about a new
    run.
    """
    folder = pretrain(tmp_path / "run", max_steps=3, save_steps=3, eval_steps=3)

    def found(*argv, place=folder):
        *_, run, training = parse_pretrain(["--dataset", "x", "--output_dir", str(place), *argv])
        found = recorded_values.values_to_continue(run, training, None)
        return {name: found[name] for name in derive_pretrain.RECORDED if name in found}

    (folder / "in").mkdir()
    assert found(place=folder / "in") == {}  # a folder in a run's is another run's
    assert found()["max_steps"] == 3 and found("--dry_run")["max_steps"] == 3
    assert found("--suggest", "mine.yaml", "--hours", "1") == found("--dry_run", "--hours", "1") == {}
    with pytest.raises(
        Refusal,
        match=r"--hours 1: the run in .* was started with another length, and its 3 steps stay.*--output_dir OTHER",
    ):
        found("--hours", "1")


def test_intervals_that_nobody_gave_follow_from_the_new_length_of_a_run(pretrain, tmp_path):
    """Twenty steps that became 2,000 were evaluated and saved at every second one."""
    folder = pretrain(tmp_path / "run", max_steps=3, save_steps=3, eval_steps=3, logging_steps=1)
    record = read_json(folder / "run.json")

    def kept(*argv):
        *_, run, training = parse_pretrain(["--dataset", "x", "--output_dir", str(folder), *argv])
        return recorded_values.INTERVALS & recorded_values.values_to_continue(run, training, None).keys()

    assert kept() == kept("--max_steps", "30") == recorded_values.INTERVALS  # all were given
    del record["given"]["eval_steps"], record["given"]["logging_steps"]
    write_json(folder / "run.json", record)
    assert kept() == kept("--max_steps", "3") == recorded_values.INTERVALS
    assert kept("--max_steps", "30") == {"save_steps", "save_total_limit"}
    record["settings"]["max_steps"] = 2  # the run was made longer since: its checkpoint says 3
    write_json(folder / "run.json", record)
    assert kept() == {"save_steps", "save_total_limit"}


def test_what_is_offered_where_the_text_of_a_run_has_grown_works(pretrain, settings, tmp_path, monkeypatch, capsys):
    """It began a run in runs/installed-docs, and another model."""
    from run_pretrain import main

    monkeypatch.chdir(tmp_path)
    shutil.copy(settings["dataset"], "mine.jsonl")
    tokens, steps = str(tmp_path / "tokens"), {"max_steps": 3, "save_steps": 3, "eval_steps": 3}
    run = pretrain(tmp_path / "run", dataset="mine.jsonl", prepared_dir=tokens, **steps)
    with open("mine.jsonl", "a") as file:
        file.write(json.dumps({"text": "One more document. " * 30}) + "\n")
    with pytest.raises(Refusal, match=rf"has changed since .*: --config {run} --output_dir {run} \(in") as refusal:
        pretrain(run, dataset="mine.jsonl", prepared_dir=tokens, **steps)
    assert f"--config {run} --dataset mine.jsonl --output_dir OTHER; it can" in str(refusal.value)
    main(["--config", str(run), "--output_dir", str(run), "--max_steps", "4", "--allow_changes", "max_steps"])
    assert (run / "checkpoint-4").is_dir() and read_json(run / "status.json")["status"] == "finished"
    capsys.readouterr()
    main(["--config", str(run), "--dataset", "mine.jsonl", "--output_dir", str(tmp_path / "other"), "--dry_run"])
    said = capsys.readouterr().out
    assert "not prepared yet" in said and "the run             4 steps" in said
    with pytest.raises(Refusal, match=rf"needs a folder of its own.*: --output_dir {run}\."):
        main(["--config", str(run), "--learning_rate", "1e-3", "--dry_run"])


def test_a_misspelt_text_leaves_no_folder_of_a_run(tmp_path, monkeypatch):
    from run_pretrain import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="no file or folder has that name"):
        main(["--dataset", "./mien"])
    assert list(tmp_path.iterdir()) == []


def test_a_suggestion_is_a_config_that_runs_as_it_stands(text, tmp_path):
    path, folder = tmp_path / "mine.yaml", folder_of(tmp_path, text, 20_000)
    done = launch(
        "--dataset",
        str(folder),
        "--suggest",
        str(path),
        "--hours",
        "0.006",
        "--cpu_threads",
        "1",
        "--sample_tokens",
        "0",
    )
    assert done.returncode == 0 and f"run it with: python run_pretrain.py --config {path}" in done.stdout, done.stderr
    suggested = yaml.safe_load(path.read_text())
    assert re.fullmatch(r"runs/mine(-\d+)?", suggested["output_dir"])  # not that of the text, which may hold a run
    assert {
        "model_config",
        "vocab_size",
        "tokens_per_step",
        "max_steps",
        "learning_rate",
        "precision",
        "eval_steps",
        "save_steps",
    } <= set(suggested)
    assert "hours" not in suggested and all(
        "#" in line for line in path.read_text().splitlines() if ":" in line and not line.startswith("#")
    )
    ran = launch(
        "--config", str(path), "--output_dir", str(tmp_path / "run"), "--prepared_dir", str(tmp_path / "tokens")
    )
    assert ran.returncode == 0, ran.stderr
    identity = read_json(tmp_path / "run" / "run.json")["identity"]
    assert (
        identity["hyperparameters"]["max_steps"] == suggested["max_steps"]
        and identity["data"]["tokens_per_step"] == suggested["tokens_per_step"]
    )
    again = launch("--dataset", str(text), "--suggest", str(path))
    assert again.returncode == 2 and "that file already exists and is not overwritten" in again.stderr


def test_the_number_of_packed_sequences_is_that_of_a_sample(monkeypatch):
    """It was the tokens divided by the length of a sequence, which holds fewer: three epochs were 2.2."""
    monkeypatch.setattr(derive_sft, "SAMPLED", 1500)
    chance = random.Random(0)
    lengths = [chance.choice((40, 70, 130, 150, 200)) for _ in range(6000)]
    packed = packing.count_packs(lengths, 256)
    assert sum(lengths) / 256 < 0.9 * packed
    assert derive_sft._packs(lengths, 256, 6000) == pytest.approx(packed, rel=0.06)
    assert derive_sft._packs(lengths, 256, 600) == pytest.approx(packed / 10, rel=0.06)


def test_a_suggested_run_has_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert suggest._free_folder(Path("runs/mine")) == "runs/mine"
    for name in ("mine", "mine-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert suggest._free_folder(Path("runs/mine")) == "runs/mine-3"


def test_numbers_are_rounded_as_people_do():
    assert [nice(value) for value in (0.2, 1, 1.4, 1.5, 3, 3.2, 7.0, 7.1, 90, 149, 190)] == [
        1,
        1,
        1,
        2,
        2,
        5,
        5,
        10,
        100,
        200,
        200,
    ]


def test_shapes_are_llamas_whose_heads_fit():
    for shape in shapes.LADDER:
        config = shapes.config(shape, 4096, 256)
        assert (
            config.hidden_size % config.num_attention_heads == 0
            and config.hidden_size // config.num_attention_heads in (32, 64)
        )
        layers, width = shape
        with torch.device("meta"):
            assert (
                count_parameters(config)[0] - shapes.layer_parameters(shape) - 2 * 4096 * width
                == (2 * layers + 1) * width
            )  # norms
    with pytest.raises(Refusal, match=r"the width must be a multiple of 32 .* e.g. 6x224 or 6x256"):
        shapes.parse("6x250")


def test_the_rules_expect_what_the_committed_runs_gave():
    """As near as they say: 0.11 bits per byte over new text; and the most epochs are those that were best for a short
    one.
    """
    runs = json.loads((Path(__file__).parents[2] / "benchmarks" / "shapes.json").read_text())["runs"]
    fresh = [run for run in runs if run["rate"] == 1 and run["unique"] == run["millions"]]
    assert len(fresh) >= 12 and {run["shape"] for run in fresh} >= {"2x64", "4x128", "6x256"}
    for run in fresh:
        assert (
            abs(
                shapes.expected_loss(shapes.parse(run["shape"]), run["millions"] * 1e6, run["millions"] * 1e6)
                - run["last"]
            )
            < 0.11
        ), run
    short = {(run["shape"], run["millions"]): run["last"] for run in runs if run["unique"] == 0.1}
    epochs = min((0.2, 0.4, 0.8), key=lambda tokens: short["3x64", tokens] + short["4x128", tokens]) / 0.1
    assert epochs == shapes.most_epochs(1e5) == 4


def test_a_given_kernel_is_used_whatever_the_run_had_before(fast, text, tmp_path):
    folder = str(folder_of(tmp_path, text, 20_000))
    had = {"block_attention": True, "attention": None}
    values, _, _ = settled("--dataset", folder, "--attention", "eager", recorded=had)
    assert (values["attention"], values["block_attention"]) == ("eager", False)
    had = {"block_attention": False, "attention": "eager"}
    values, _, _ = settled("--dataset", folder, "--block_attention", recorded=had)
    assert (values["attention"], values["block_attention"]) == (None, True)
    values, _, _ = settled("--dataset", folder, recorded=had)
    assert (values["attention"], values["block_attention"]) == ("eager", False)


def planned(*argv):
    """(values, Plan) of a command over a text, as the run itself plans it. Raises Refusal."""
    from llama_lite.training.values import plan_of

    groups = parse_pretrain(["--precision", "float32", *argv])
    derivation = derive_pretrain.Derivation(groups, Text(groups[1]), Layout(1), groups[-2].explicit_args, {})
    _, _, tokens = derivation.settle()
    values = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    return values, plan_of(groups, tokens)[1]


@pytest.mark.parametrize(
    "given",
    [
        "--validation_tokens 20",
        "--tokens_per_step 1000",
        "--tokens_per_step 256 --per_device_train_batch_size 8",
        "--gradient_accumulation_steps 3",
        "--gradient_accumulation_steps 3 --per_device_train_batch_size 2",
        "--gradient_accumulation_steps 4 --tokens_per_step 2048",
        "--publish_steps 6 --eval_steps 0.1 --max_steps 100",
        "--publish_training_state 150 --max_steps 1000",
        "--schedule_steps 500",
        "--schedule_steps 5 --max_steps 200",
        "--schedule_steps 1 --max_steps 200",
    ],
)
def test_derived_values_fit_those_that_were_given(fast, text, tmp_path, given):
    values, plan = planned("--dataset", str(folder_of(tmp_path, text, 200_000)), *given.split())
    assert plan.steps == values["max_steps"] and plan.warmup <= plan.steps
    accumulation = values["gradient_accumulation_steps"]
    assert plan.accumulation == accumulation or accumulation == 1


def test_a_derived_length_is_whole_steps_of_the_text(fast, text, tmp_path):
    """The first token of a text has no window of its own: ten steps of ten steps' tokens used to be refused."""
    folder = str(folder_of(tmp_path, text, 200_000))
    sizes = ["--block_size", "64", "--tokens_per_step", "1024", "--vocab_size", "500"]
    _, _, tokens = settled("--dataset", folder, *sizes)
    held = sum(split["tokens"] for split in tokens["splits"].values()) - 10 * 1024
    once = ["--allow_epochs", "false", "--hours", "5", "--validation_tokens", str(held)]
    values, plan = planned("--dataset", folder, *sizes, *once)
    assert values["max_steps"] == plan.steps == plan.steps_per_epoch == 9


def test_a_derived_vocabulary_holds_every_byte(fast, text, tmp_path):
    config = model_config_of("2x64", 128, 64)
    config.vocab_size = 128
    config.save_pretrained(tmp_path / "narrow")
    with pytest.raises(Refusal, match="the tokenizer has 257 ids and the model's vocabulary is 128"):
        planned("--dataset", str(folder_of(tmp_path, text, 20_000)), "--model_config", str(tmp_path / "narrow"))
