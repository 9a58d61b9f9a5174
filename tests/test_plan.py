"""The arithmetic of a run, and what it refuses."""

import pytest

from llama_lite.arguments import Refusal, parse_pretrain
from llama_lite.plan import accumulation_steps, count_parameters, load_model_config, make_plan

MANIFEST = {
    "tokenizer": {"vocab_size": 50257},
    "splits": {"train": {"tokens": 20_000_000_000}, "validation": {"tokens": 100_000_000}},
}


def plan_of(*argv, config="1.7b", manifest=MANIFEST):
    paper = {"--block_size": "1024", "--tokens_per_step": "524288", "--per_device_train_batch_size": "8", "--num_train_epochs": "1"}
    *_, run, training = parse_pretrain([*argv, *(word for name, value in paper.items() if name not in argv for word in (name, value))])
    return make_plan(load_model_config(config), manifest, run, training)


@pytest.mark.parametrize(
    "preset, total, embeddings", [("1.7b", 1_716_144_128, 206_045_184), ("124m", 190_532_352, 77_266_944), ("978m", 978_218_240, 128_778_240)]
)
def test_presets_have_the_papers_sizes(preset, total, embeddings):
    found = count_parameters(load_model_config(preset))
    assert found == (total, embeddings)  # by hand: layers x (q, k, v, o, three of the MLP, two norms) + embeddings + norm


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
        (["--max_steps", "38147"], "1.7b", r"38,147 steps need 19,531,264 windows .* --max_steps to 38,146.*--allow_epochs"),
        (["--gradient_accumulation_steps", "3"], "1.7b", r"contradicts --tokens_per_step"),
        (["--eval_windows", "100000"], "1.7b", r"validation slice has 97656 windows .* 100000 are asked"),
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
    plan = plan_of("--tokens_per_step", "8192", "--max_steps", "20", "--allow_epochs", manifest=small)
    assert plan.steps == 20 and plan.steps_per_epoch == 12 and plan.epoch_windows == 96


def test_unknown_model(tmp_path):
    with pytest.raises(Refusal, match=r"neither a preset \(1\.7b, 124m, 1m, 3m, 8m, 978m, demo, tiny\)"):
        load_model_config("7b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refusal, match="is no model configuration"):
        load_model_config(str(tmp_path))
