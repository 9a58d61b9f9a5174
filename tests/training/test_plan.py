"""The arithmetic of a run, and what it refuses."""

import re

import pytest
from helpers import ROOT
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback

from llama_lite.config.pretrain import parse_pretrain
from llama_lite.errors import Refusal
from llama_lite.hub.publish_queue import is_published
from llama_lite.models.presets import count_parameters, load_model_config
from llama_lite.training import timing
from llama_lite.training.decisions import save_interval, whole_interval
from llama_lite.training.plan import accumulation_steps, at_once, check_publish_steps, intervals, make_plan, saved_steps

MANIFEST = {
    "tokenizer": {"vocab_size": 50257},
    "splits": {"train": {"tokens": 20_000_000_000}, "validation": {"tokens": 100_000_000}},
}


def plan_of(*argv, config="1.7b", manifest=MANIFEST):
    paper = {
        "--block_size": "1024",
        "--tokens_per_step": "524288",
        "--per_device_train_batch_size": "8",
        "--num_train_epochs": "1",
    }
    *_, run, training = parse_pretrain(
        [*argv, *(word for name, value in paper.items() if name not in argv for word in (name, value))]
    )
    return make_plan(load_model_config(config), manifest, run, training)


@pytest.mark.parametrize(
    "preset, total, embeddings",
    [("1.7b", 1_716_144_128, 206_045_184), ("124m", 190_532_352, 77_266_944), ("978m", 978_218_240, 128_778_240)],
)
def test_presets_have_the_papers_sizes(preset, total, embeddings):
    found = count_parameters(load_model_config(preset))
    assert found == (
        total,
        embeddings,
    )  # by hand: layers x (q, k, v, o, three of the MLP, two norms) + embeddings + norm


def test_the_papers_run():
    plan = plan_of("--per_device_train_batch_size", "8")
    assert plan.tokens_per_step == 524_288 == 1024 * plan.windows_per_step and plan.accumulation == 64
    assert plan.steps == 38_146 and plan.epoch_windows == plan.steps * 512
    assert plan.flops_per_token == pytest.approx(6 * (plan.parameters - 50304 * 2048) + 12 * 36 * 2048 * 1024, rel=0.1)
    assert any("cut to whole steps" in line for line in plan.lines())


def test_accumulation_for_any_number_of_processes():
    assert [accumulation_steps(524_288, 1024, 8, processes) for processes in (1, 2, 8, 64)] == [64, 32, 8, 1]


@pytest.mark.parametrize(
    "argv, config, message",
    [
        (
            ["--per_device_train_batch_size", "7"],
            "1.7b",
            r"not a whole number of micro-batches of 7,168 tokens .* --per_device_train_batch_size 2 or 4 or 8",
        ),
        (["--tokens_per_step", "500_000"], "1.7b", r"--tokens_per_step 499,712 or 507,904"),
        (["--block_size", "2048"], "1.7b", r"--block_size 2048 is above the model's context of 1024"),
        ([], "demo", r"the tokenizer has 50,257 ids and the model's vocabulary is 4,096"),
        (
            ["--max_steps", "38147"],
            "1.7b",
            r"38,147 steps need 19,531,264 windows .* --max_steps to 38,146.*--allow_epochs",
        ),
        (["--gradient_accumulation_steps", "3"], "1.7b", r"contradicts --tokens_per_step"),
        (["--eval_windows", "100000"], "1.7b", r"^--eval_windows 100000: the validation slice has 97656 windows"),
        (["--probe_windows", "100000"], "1.7b", r"^--probe_windows 100000: the validation slice has 97656 windows"),
        (["--num_train_epochs", "0.00001"], "1.7b", r"less than one step"),
    ],
)
def test_refusals(argv, config, message):
    with pytest.raises(Refusal, match=message):
        plan_of(*argv, config=config)


def test_all_problems_are_told_at_once():
    with pytest.raises(Refusal) as refusal:
        plan_of("--per_device_train_batch_size", "7", config="demo")
    for part in ("the tokenizer has", "--block_size 1024 is above", "not a whole number"):
        assert part in str(refusal.value)


def test_too_little_text_and_epochs():
    small = {**MANIFEST, "splits": {"train": {"tokens": 1024 * 100}, "validation": {"tokens": 100_000_000}}}
    with pytest.raises(Refusal, match=r"99 windows of 1024 tokens and one step takes 512"):
        plan_of(manifest=small)
    few = {**small, "splits": {**small["splits"], "train": {"tokens": 1024 * 5}}}
    for given, way in (
        ([], "lower --per_device_train_batch_size, or"),
        (["--tokens_per_step", "8192", "--per_device_train_batch_size", "1"], "lower --tokens_per_step to 4,096 or"),
        (["--gradient_accumulation_steps", "512", "--per_device_train_batch_size", "1"], "lower --gradient_accum"),
    ):
        with pytest.raises(Refusal, match=f"4 windows of 1024 tokens and one step takes .*: {way}"):
            plan_of(*given, manifest=few)
    plan = plan_of(
        "--tokens_per_step", "8192", "--max_steps", "20", "--warmup_steps", "5", "--allow_epochs", manifest=small
    )
    assert plan.steps == 20 and plan.steps_per_epoch == 12 and plan.epoch_windows == 96


def test_a_trial_that_ends_within_the_warm_up_of_its_file_is_told_so(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("{warmup_steps: 715, max_steps: 800}")
    assert not any("warm-up" in line for line in plan_of("--config", str(path)).lines())
    lines = plan_of("--config", str(path), "--max_steps", "6").lines()
    assert lines[-2] == "WARNING             715 steps of warm-up: the run ends before its peak learning rate"
    with pytest.raises(Refusal, match="--warmup_steps 715 is longer than the run of 6 steps"):
        plan_of("--config", str(path), "--max_steps", "6", "--warmup_steps", "715")


def test_unknown_model(tmp_path):
    with pytest.raises(Refusal, match=r"neither a preset \(1\.7b, 124m, 1m, 3m, 8m, 978m, demo, tiny\)"):
        load_model_config("7b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refusal, match="is not a model configuration"):
        load_model_config(str(tmp_path))


def trained(training, steps: int) -> dict[str, list[int]]:
    """{what: its steps} of a run, as transformers' own callback decides while it trains; this project also saves and
    evaluates at the end.
    """
    state, found = TrainerState(max_steps=steps), {"log": [], "evaluate": [], "save": []}
    state.compute_steps(training, steps)
    for state.global_step in range(1, steps + 1):
        control = DefaultFlowCallback().on_step_end(training, state, TrainerControl())
        for name, at in found.items():
            at += [state.global_step] if getattr(control, f"should_{name}") or state.global_step == steps else []
    return found


@pytest.mark.parametrize(
    "argv, steps, saved",
    [
        (["--save_steps", "0.4"], 6, [3, 6]),  # 2.4, rounded up
        (["--save_steps", "0.34"], 6, [3, 6]),
        (["--save_steps", "0.01"], 6, [1, 2, 3, 4, 5, 6]),
        (["--save_steps", "0.5"], 7, [4, 7]),
        (["--save_steps", "4"], 10, [4, 8, 10]),
        (["--save_steps", "400"], 10, [10]),
        (["--save_steps", "0"], 10, [10]),
        (["--save_strategy", "no"], 6, [6]),
    ],
)
def test_what_is_planned_is_what_transformers_does(argv, steps, saved):
    *_, training = parse_pretrain(["--block_size", "64", *argv, "--eval_steps", "0.3", "--logging_steps", "0.15"])
    assert saved_steps(training, steps) == trained(training, steps)["save"] == saved
    every = intervals(training, steps)
    for name, kind in (("evaluate", "eval"), ("log", "logging")):
        assert sorted({*range(every[kind], steps + 1, every[kind]), steps}) == trained(training, steps)[name]


def test_checkpoints_on_the_disk_at_once():
    argv = ["--max_steps", "10", "--save_steps", "4"]  # 4, 8, 10
    assert [at_once(plan_of(*argv, "--save_total_limit", limit)) for limit in ("none", "1", "2", "9")] == [3, 2, 3, 3]
    assert "2 at most at once" in plan_of(*argv, "--save_total_limit", "1").lines()[-1]


def test_revisions_fall_on_checkpoints():
    *_, training = parse_pretrain(["--block_size", "64", "--save_steps", "0.2"])
    check_publish_steps(training, 20, 8)  # every 4 steps
    assert [step for step in saved_steps(training, 20) if is_published(step, 8, step == 20)] == [8, 16, 20]
    with pytest.raises(
        Refusal, match=r"--publish_steps 6 is not a multiple of the 4 steps between checkpoints \(--save_steps 0.2\)"
    ):
        check_publish_steps(training, 20, 6)
    for state in ("all", "none", "16"):
        check_publish_steps(training, 20, 8, state)
    with pytest.raises(Refusal, match="--publish_training_state 12 is no multiple of the 8 steps between published"):
        check_publish_steps(training, 20, 8, "12")
    assert [whole_interval(every, 95) for every in (0.1, 0.99, 1.0, 250.0)] == [10, 95, 1, 250]
    assert [save_interval(10, every)[0] for every in (None, 50, 25, 7, 1, 14)] == [10, 10, 5, 7, 1, 14]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"save_steps": 0.4, "max_steps": 6}, (2, 2)),
        ({"save_steps": 0.01}, (12, 12)),
        ({"save_strategy": "no"}, (1, 1)),
        ({"save_steps": 5, "publish_training_state": 10, "publish_queue_limit": 3}, (3, 2)),
    ],
)
def test_the_dry_run_tells_the_revisions_that_will_be_made(pretrain, tmp_path, capsys, changes, told):
    pretrain(tmp_path / "run", "--dry_run", "--push_to_hub", "--hub_model_id", "a/b", **changes)
    said = capsys.readouterr().out
    assert f"publishes           {told[0]} revisions of a/b, {told[1]} with training state" in said
    assert " may wait here" in said and ("; 3.00 GiB may" in said) == ("publish_queue_limit" in changes)


def test_the_dry_run_tells_about_how_long_the_steps_take_here(pretrain, tmp_path, capsys, monkeypatch):
    """Of this machine only where it is the planned one; compiled layers are faster, and are compiled first."""

    def told(*argv, **changes) -> list[tuple[str, str]]:
        pretrain(tmp_path / "run", "--dry_run", *argv, max_steps=100, precision="float32", **changes)
        return re.findall(r"\ntime +about (.*) for the steps on .*, at (.*) tokens per second", capsys.readouterr().out)

    monkeypatch.setattr(timing, "pace", lambda *given: timing.Pace(1.0, 0.5, 0.3, 0.1))  # 2 micro-batches, 1,024 tokens
    assert told(compile_layers=False) == [("4.2 min", "410")]
    compiled = 35 + 250 / 1.15
    assert told(compile_layers=True) == [("4.2 min", f"{102_400 / compiled:.0f}")]
    assert told("--plan_launch", str(ROOT / "configs/accelerate/cpu2.yaml"), compile_layers=False) == []


def test_a_share_of_the_run_as_interval_of_evaluations(pretrain, tmp_path, capsys):
    """The number of windows follows from it."""
    pretrain(tmp_path / "run", "--dry_run", eval_steps=0.25, eval_windows=None)
    assert "eval_windows" in capsys.readouterr().out


def test_a_slice_without_a_window_is_told():
    short = {**MANIFEST, "splits": {**MANIFEST["splits"], "validation": {"tokens": 1024}}}
    with pytest.raises(Refusal, match=r"^the validation slice has 1,024 tokens, less than one window of 1024: lower"):
        plan_of(manifest=short)
