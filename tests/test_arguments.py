"""What is parsed, what wins, and how wrong arguments are told."""

import pytest
from conftest import config_file

from llama_lite.arguments import Refusal, parse_pretrain


def parsed(*argv):
    return parse_pretrain(list(argv))


def test_without_arguments_the_demo(tmp_path):
    model, data, *_, run, training = parsed()
    assert (model.model_config, data.dataset, run.block_size, training.output_dir) == ("demo", "installed-docs", 256, "runs/demo")


def test_yaml_gives_defaults_and_the_command_line_wins(tmp_path):
    path = str(config_file(tmp_path, {"learning_rate": 1e-3, "block_size": 128, "max_steps": "1e3", "bf16": False}))
    *_, run, training = parsed("--config", path, "--learning_rate", "5e-4")
    assert (training.learning_rate, run.block_size, training.max_steps, training.bf16) == (5e-4, 128, 1000, False)
    assert parsed(f"--config={path}")[-1].learning_rate == 1e-3


def test_the_papers_values_are_the_defaults(tmp_path):
    *_, run, training = parsed("--config", str(config_file(tmp_path, {"model_config": "1.7b"})))
    assert (run.block_size, run.tokens_per_step, training.learning_rate, training.warmup_steps) == (1024, 524_288, 6e-4, 715)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon, training.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (training.max_grad_norm, training.bf16, training.seed, training.lr_scheduler_kwargs) == (1.0, True, 1337, {"min_lr_rate": 0.1})


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
        (["--publish_steps", "300"], "--publish_steps 300 is no multiple of --save_steps 250"),
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
