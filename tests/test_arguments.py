"""What is parsed, what wins, and how wrong arguments are told."""

import pytest
from conftest import config_file

from llama_lite.arguments import Refusal, parse_pretrain


def parsed(*argv):
    return parse_pretrain(list(argv))


def test_without_arguments_the_demo(tmp_path):
    model, data, *_, run, training = parsed()
    assert (model.model_config, data.dataset, run.block_size, training.output_dir) == ("1m", "installed-docs", 256, "runs/demo")


def test_yaml_gives_defaults_and_the_command_line_wins(tmp_path):
    path = str(config_file(tmp_path, {"learning_rate": 1e-3, "block_size": 128, "max_steps": "1e3", "bf16": False}))
    *_, run, training = parsed("--config", path, "--learning_rate", "5e-4")
    assert (training.learning_rate, run.block_size, training.max_steps, run.precision) == (5e-4, 128, 1000, "float32")
    assert parsed(f"--config={path}")[-1].learning_rate == 1e-3


def test_the_papers_values_are_the_defaults(tmp_path):
    *_, run, training = parsed("--config", str(config_file(tmp_path, {"model_config": "1.7b"})))
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon, training.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (training.max_grad_norm, run.precision, training.seed, training.lr_scheduler_kwargs) == (1.0, "auto", 1337, {"min_lr_rate": 0.1})


def test_the_papers_config_leaves_nothing_to_be_derived():
    model, data, *_, run, training = parsed("--config", "configs/pretrain/paper.yaml")
    assert (run.block_size, run.tokens_per_step, training.learning_rate, training.warmup_steps) == (1024, 524_288, 6e-4, 715)
    assert (run.order, run.precision, model.model_config, data.tokenizer) == ("sequential", "bfloat16", "1.7b", "gpt2")
    assert {"num_train_epochs", "eval_steps", "save_steps", "logging_steps", "eval_windows", "per_device_train_batch_size"} <= set(run.given)


@pytest.mark.parametrize(
    "argv, precision",
    [
        ([], "auto"),
        (["--bf16"], "bfloat16"),
        (["--no_bf16"], "float32"),
        (["--fp16"], "float16"),
        (["--bf16", "False"], "float32"),
        (["--fp16", "--no_bf16"], "float16"),
        (["--precision", "float32"], "float32"),
        (["--precision", "auto"], "auto"),
    ],
)
def test_precision_has_three_states(argv, precision):
    *_, run, training = parsed("--block_size", "256", *argv)
    assert run.precision == precision and not training.bf16 and not training.fp16  # settled when the device is known


def test_precision_on_the_command_line_wins_over_yaml(tmp_path):
    path = str(config_file(tmp_path, {"bf16": False}))
    assert [parsed("--config", path, *argv)[-2].precision for argv in ([], ["--bf16"], ["--precision", "bfloat16"])] == [
        "float32",
        "bfloat16",
        "bfloat16",
    ]


@pytest.mark.parametrize("argv", [["--precision", "float32", "--bf16"], ["--fp16", "--bf16"], ["--precision", "bfloat16", "--fp16"]])
def test_two_precisions_are_refused(argv):
    with pytest.raises(Refusal, match="contradict each other: give --precision alone"):
        parsed("--block_size", "256", *argv)


def test_the_launchers_precision_counts_and_a_contradiction_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parsed("--block_size", "256")[-2].precision == "bfloat16" == parsed("--block_size", "256", "--bf16")[-2].precision
    with pytest.raises(Refusal, match="the launcher asks for --mixed_precision bf16 and the command for --precision float32"):
        parsed("--block_size", "256", "--no_bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(Refusal, match="--mixed_precision fp8, in which no run of this project trains"):
        parsed("--block_size", "256")


def test_names_of_other_programs_are_known():
    with pytest.raises(Refusal, match=r"`--lr` on the command line is not an argument: did you mean `--learning_rate`\?"):
        parsed("--lr", "1e-3")


def test_misspelt_keys_of_both_are_refused_together(tmp_path):
    path = str(config_file(tmp_path, {"learning_rte": 1e-3, "blok_size": 128}))
    with pytest.raises(Refusal) as refusal:
        parsed("--config", path, "--max_stps", "3")
    for wrong, right in (("learning_rte", "learning_rate"), ("blok_size", "block_size"), ("--max_stps", "--max_steps")):
        assert f"`{wrong}`" in str(refusal.value) and f"did you mean `{right}`?" in str(refusal.value)


@pytest.mark.parametrize(
    "key, value, rule",
    [
        ("max_steps", "many", "could not convert"),
        ("max_steps", 1.5, "a whole number is wanted"),
        ("bf16", "yes please", "true or false is wanted"),
        ("order", "random", "one of sequential, shuffled is wanted"),
        ("learning_rate", True, "a number is wanted"),
        ("prepared_dir", ["a", "b"], "a single value is wanted"),
    ],
)
def test_wrong_values_in_yaml_are_refused_with_the_rule(tmp_path, key, value, rule):
    with pytest.raises(Refusal, match=rf"`{key}: .*{rule}"):
        parsed("--config", str(config_file(tmp_path, {key: value})))


@pytest.mark.parametrize("content, message", [("- a\n- b\n", "must hold `key: value` lines"), ("a: [1", "is not readable YAML")])
def test_a_config_that_is_no_mapping(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(Refusal, match=message):
        parsed("--config", str(tmp_path / "c.yaml"))


def test_a_config_that_is_not_there():
    with pytest.raises(Refusal, match=r"does not exist; the ones shipped are .*configs/pretrain/demo\.yaml"):
        parsed("--config", "nowhere.yaml")
    with pytest.raises(Refusal, match="--config needs a YAML file"):
        parsed("--config")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--block_size", "0"], "--block_size 0 must be at least 1"),
        (["--cpu_threads", "0"], "--cpu_threads 0 must be at least 1"),
        (["--plan_launch", "configs/accelerate/ddp.yaml"], "--plan_launch plans another launch: it goes with --dry_run"),
        (["--plan_mfu", "0"], "--plan_mfu 0 must be above 0"),
        (["--torch_compile"], "--torch_compile must stay False: --compile_layers"),
        (["--fsdp", "full_shard"], "--fsdp must stay None: the launcher shards"),
        (["--validation_tokens", "10"], "--validation_tokens 10 does not fill one window"),
        (["--resume_without", "optimiser"], "--resume_without optimiser: only optimizer, scheduler, rng, data"),
        (["--init_from", "x", "--resume_from_checkpoint", "must"], "--init_from starts a new run and --resume_from_checkpoint continues one"),
        (["--save_only_model"], "--save_only_model must stay False: a checkpoint without its optimiser"),
        (["--ignore_data_skip"], "--ignore_data_skip must stay False"),
        (["--train_sampling_strategy", "random"], "--train_sampling_strategy must stay sequential: the order of the data"),
        (["--accelerator_config", '{"split_batches": true}'], "accelerator_config.split_batches divides each batch .* shrinks the step"),
        (["--save_strategy", "epoch"], "--save_strategy must be steps"),
        (["--logging_nan_inf_filter"], "--logging_nan_inf_filter must stay False"),
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id owner/name"),
        (["--hub_token", "hf_x"], "--hub_token must stay None: it would be read by whoever lists processes"),
        (["--publish_only"], "--publish_only needs --push_to_hub"),
        (["--publish_steps", "300", "--save_steps", "250"], "--publish_steps 300 is no multiple of --save_steps 250"),
        (["--learn", "1"], "`--learn` on the command line is not an argument"),
        (["--order", "random"], "invalid choice"),
        (["--seed", "x"], "invalid int value"),
    ],
)
def test_what_cannot_be_right_is_refused(argv, message):
    with pytest.raises(Refusal, match=message):
        parsed("--block_size", "256", *argv)


@pytest.mark.parametrize(
    "given, mode", [("true", "must"), ("false", "never"), ("auto", "auto"), ("Never", "never"), ("runs/x/checkpoint-5", "runs/x/checkpoint-5")]
)
def test_resume_modes(given, mode):
    assert parsed("--block_size", "256", "--resume_from_checkpoint", given)[-1].resume_from_checkpoint == mode
