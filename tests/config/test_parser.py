"""What is parsed, what wins, and how wrong arguments are told."""

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from helpers import config_file

from llama_lite.config.arguments import NONE_COUNTS
from llama_lite.config.common import HubArguments
from llama_lite.config.eval import ModelsArguments, OutputArguments, TasksArguments, parse_eval
from llama_lite.config.pretrain import (
    CurationArguments,
    DataArguments,
    ModelArguments,
    PretrainArguments,
    RunArguments,
    parse_pretrain,
)
from llama_lite.config.sft import (
    AdapterArguments,
    BaseArguments,
    RowArguments,
    SftArguments,
    TunedHubArguments,
    TuningArguments,
    parse_sft,
)
from llama_lite.config.study import parse_study
from llama_lite.errors import Refusal
from llama_lite.files import append_jsonl, read_yaml, write_json
from llama_lite.studies import spec


def parsed(*argv):
    return parse_pretrain(list(argv))


def test_without_arguments_the_demo(tmp_path):
    model, data, *_, run, training = parsed()
    assert (model.model_config, data.dataset, run.block_size, training.output_dir) == (
        "1m",
        "installed-docs",
        256,
        "runs/demo",
    )


def test_yaml_gives_defaults_and_the_command_line_wins(tmp_path):
    path = str(config_file(tmp_path, {"learning_rate": 1e-3, "block_size": 128, "max_steps": "1e3", "bf16": False}))
    *_, run, training = parsed("--config", path, "--learning_rate", "5e-4")
    assert (training.learning_rate, run.block_size, training.max_steps, run.precision) == (5e-4, 128, 1000, "float32")
    assert parsed(f"--config={path}")[-1].learning_rate == 1e-3
    # of two lengths, too: --num_train_epochs was passed over where the file has max_steps
    *_, run, training = parsed("--config", path, "--num_train_epochs", "2")
    assert (training.max_steps, training.num_train_epochs) == (-1, 2) and "max_steps" not in run.explicit_args
    *_, run, training = parsed("--config", path, "--hours", "2")
    assert (training.max_steps, run.hours) == (-1, 2)


def test_the_papers_values_are_the_defaults(tmp_path):
    *_, run, training = parsed("--config", str(config_file(tmp_path, {"model_config": "1.7b"})))
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon, training.weight_decay) == (
        0.9,
        0.95,
        1e-8,
        0.1,
    )
    assert (training.max_grad_norm, run.precision, training.seed, training.lr_scheduler_kwargs) == (
        1.0,
        "auto",
        1337,
        {"min_lr_rate": 0.1},
    )


def test_the_papers_config_leaves_nothing_to_be_derived():
    model, data, *_, run, training = parsed("--config", "configs/pretrain/paper.yaml")
    assert (run.block_size, run.tokens_per_step, training.learning_rate, training.warmup_steps) == (
        1024,
        524_288,
        6e-4,
        715,
    )
    assert (run.order, run.precision, model.model_config, data.tokenizer) == ("sequential", "bfloat16", "1.7b", "gpt2")
    assert {
        "num_train_epochs",
        "eval_steps",
        "save_steps",
        "logging_steps",
        "eval_windows",
        "per_device_train_batch_size",
    } <= set(run.explicit_args)


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
    assert [
        parsed("--config", path, *argv)[-2].precision for argv in ([], ["--bf16"], ["--precision", "bfloat16"])
    ] == [
        "float32",
        "bfloat16",
        "bfloat16",
    ]


@pytest.mark.parametrize(
    "argv", [["--precision", "float32", "--bf16"], ["--fp16", "--bf16"], ["--precision", "bfloat16", "--fp16"]]
)
def test_two_precisions_are_refused(argv):
    with pytest.raises(Refusal, match="contradict each other: give --precision alone"):
        parsed("--block_size", "256", *argv)


def test_the_launchers_precision_counts_and_a_contradiction_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert (
        parsed("--block_size", "256")[-2].precision
        == "bfloat16"
        == parsed("--block_size", "256", "--bf16")[-2].precision
    )
    with pytest.raises(
        Refusal, match="the launcher requests --mixed_precision bf16 and the command --precision float32"
    ):
        parsed("--block_size", "256", "--no_bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(Refusal, match="--mixed_precision fp8, which this project does not support"):
        parsed("--block_size", "256")


def test_names_of_other_programs_are_known():
    with pytest.raises(
        Refusal, match=r"`--lr` on the command line is not an argument: did you mean `--learning_rate`\?"
    ):
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
        ("max_steps", 1.5, "expected a whole number"),
        ("bf16", "yes please", "expected true or false"),
        ("order", "random", "expected one of sequential, shuffled"),
        ("learning_rate", True, "expected a number"),
        ("prepared_dir", ["a", "b"], "expected a single value"),
    ],
)
def test_wrong_values_in_yaml_are_refused_with_the_rule(tmp_path, key, value, rule):
    with pytest.raises(Refusal, match=rf"`{key}: .*{rule}"):
        parsed("--config", str(config_file(tmp_path, {key: value})))


@pytest.mark.parametrize(
    "content, message", [("- a\n- b\n", "must hold `key: value` lines"), ("a: [1", "is not readable YAML")]
)
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
        (["--max_steps", "0"], "--max_steps 0 must be at least 1"),
        (
            ["--save_total_limit", "0"],
            (
                "--save_total_limit 0 must be at least 1: the last checkpoint always stays .or `none`, to keep all of"
                " them."
            ),
        ),
        (["--block_size", "0"], "--block_size 0 must be at least 1"),
        (["--cpu_threads", "0"], "--cpu_threads 0 must be at least 1"),
        (
            ["--plan_launch", "configs/accelerate/ddp.yaml"],
            "--plan_launch only plans another launch: use it with --dry_run",
        ),
        (["--plan_mfu", "0"], "--plan_mfu 0 must be above 0"),
        (["--torch_compile"], "--torch_compile must stay False: use --compile_layers"),
        (["--fsdp", "full_shard"], "--fsdp must stay None: the launcher sets the sharding"),
        (["--validation_tokens", "10"], "--validation_tokens 10 does not fill one window"),
        (["--resume_without", "optimiser"], "--resume_without optimiser: only optimizer, scheduler, rng, data"),
        (
            ["--init_from", "x", "--resume_from_checkpoint", "must"],
            "--init_from starts a new run and --resume_from_checkpoint continues one",
        ),
        (["--save_only_model"], "--save_only_model must stay False: a checkpoint without optimizer state"),
        (["--ignore_data_skip"], "--ignore_data_skip must stay False"),
        (
            ["--train_sampling_strategy", "random"],
            "--train_sampling_strategy must stay sequential: the order of the data",
        ),
        (
            ["--accelerator_config", '{"split_batches": true}'],
            "accelerator_config.split_batches must stay False: it divides each batch .* shrinks the step",
        ),
        (["--save_strategy", "epoch"], "--save_strategy must be steps"),
        (["--logging_nan_inf_filter"], "--logging_nan_inf_filter must stay False"),
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id owner/name"),
        *(
            (["--push_to_hub", "--hub_model_id", name], f"needs --hub_model_id owner/name, not '{name}'")
            for name in (
                "a/b--c",
                "a/-b",
                "a/b.git",
                "a/" + "x" * 97,
                "é/b",
                "a/b.",
            )  # as the Hub's client refuses them
        ),
        (["--hub_token", "hf_x"], "--hub_token must stay None: it would be visible in the list of processes"),
        (["--publish_only"], "--publish_only needs --push_to_hub"),
        (
            ["--publish_steps", "300", "--save_steps", "250"],
            "--publish_steps 300 is not a multiple of --save_steps 250",
        ),
        (
            ["--dataloader_multiprocessing_context", "spawn"],
            "--dataloader_multiprocessing_context spawn needs --dataloader_num_workers of at least 1",
        ),
        (
            ["--dataloader_persistent_workers"],
            "--dataloader_persistent_workers True needs --dataloader_num_workers of at least 1",
        ),
        (["--learn", "1"], "`--learn` on the command line is not an argument"),
        (["--order", "random"], "invalid choice"),
        (["--seed", "x"], "invalid int value"),
        (["--hours", "2h"], r"--hours: '2h' is no number \(such as 2 or 0\.5\)"),
        (["/usr"], r"`/usr` does not belong to any argument \(did you mean --dataset /usr\?\)"),
    ],
)
def test_what_cannot_be_right_is_refused(argv, message):
    with pytest.raises(Refusal, match=message):
        parsed(*(() if "--block_size" in argv else ("--block_size", "256")), *argv)


@pytest.mark.parametrize(
    "given, mode",
    [
        ("true", "must"),
        ("false", "never"),
        ("auto", "auto"),
        ("Never", "never"),
        ("runs/x/checkpoint-5", "runs/x/checkpoint-5"),
    ],
)
def test_resume_modes(given, mode):
    assert parsed("--block_size", "256", "--resume_from_checkpoint", given)[-1].resume_from_checkpoint == mode


# ---- zero, empty and absent ----

PARSERS = (
    (parse_pretrain, (ModelArguments, DataArguments, CurationArguments, HubArguments, RunArguments, PretrainArguments)),
    (parse_sft, (BaseArguments, AdapterArguments, RowArguments, TunedHubArguments, TuningArguments, SftArguments)),
    (parse_eval, (ModelsArguments, TasksArguments, OutputArguments)),
)


@pytest.mark.parametrize("parse, groups", PARSERS, ids=["pretrain", "sft", "eval"])
def test_an_empty_yaml_value_is_as_if_nothing_was_given_or_refused_by_name(tmp_path, parse, groups):
    """Every field of every group: where None is allowed the key counts for nothing, elsewhere it is named."""
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    fields = [
        field for group in groups for field in dataclasses.fields(group) if field.init and field.name not in NONE_COUNTS
    ]
    absent = [field.name for field in fields if type(None) in get_args(hints[field.name])]
    path = tmp_path / "c.yaml"
    path.write_text("seed: 7\n" + "".join(f"{name}:\n" for name in absent))
    values, expected = (
        {name: value for part in parse(argv) for name, value in vars(part).items()}
        for argv in (["--config", str(path)], ["--seed", "7"])
    )
    assert {name: values[name] for name in absent} == {name: expected[name] for name in absent} and len(absent) > 5
    assert set(values.get("explicit_args", {})) == set(expected.get("explicit_args", {}))
    wanted = [field.name for field in fields if field.name not in absent]
    path.write_text("".join(f"{name}:\n" for name in wanted))
    with pytest.raises(Refusal) as refusal:
        parse(["--config", str(path)])
    assert [name for name in wanted if f"`{name}: ` in {path}: empty; give a value" not in str(refusal.value)] == []


def test_an_empty_limit_of_checkpoints_keeps_all_of_them(tmp_path):
    path = str(config_file(tmp_path, {"block_size": 128, "max_steps": 5}))
    Path(path).write_text(Path(path).read_text() + "save_total_limit:\n")
    assert (
        parsed("--config", path)[-1].save_total_limit is None
        and parsed("--config", path)[-2].explicit_args["save_total_limit"] is None
    )
    assert parsed("--block_size", "64", "--save_total_limit", "none")[-1].save_total_limit is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--output_dir", ""], "--output_dir '': empty; give a value"),
        (["--prepared_dir", " "], "--prepared_dir ' ': empty; give a value"),
        (["--dataset", ""], "--dataset '': empty; give a value"),
    ],
)
def test_an_empty_word_is_no_folder(argv, message):
    with pytest.raises(Refusal, match=message):
        parsed("--block_size", "64", *argv)


def test_none_on_the_command_line_is_no_folder_of_that_name():
    _, data, *_, run, _ = parsed(
        "--prepared_dir", "None", "--text_column", "null", "--max_tokens", "none", "--allow_changes", ""
    )
    assert (data.prepared_dir, data.text_column, data.max_tokens, run.explicit_args) == (
        None,
        None,
        None,
        {"allow_changes": ""},
    )


@pytest.mark.parametrize(
    "line, rule",
    [
        ("vocab_size: 64.5", "expected a whole number"),
        ("vocab_size: .inf", "expected a whole number"),
        ("hours: true", "expected a number"),
        ("dataset: {a: b}", "expected a single value, not a mapping"),
        ("sample_prompts: [The, ]\neval_tasks: [null]", "an item of the list is empty"),
        ("output_dir: ''", "empty; give a value"),
    ],
)
def test_values_of_arguments_that_may_be_absent_are_checked_too(tmp_path, line, rule):
    (tmp_path / "c.yaml").write_text(line + "\n")
    with pytest.raises(Refusal, match=rule):
        parsed("--config", str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text(
        "vocab_size: 1e3\nmax_bytes: 9007199254740993\nlr_scheduler_kwargs: {min_lr_rate: 0.2}\n"
    )
    _, data, *_, training = parsed("--config", str(tmp_path / "c.yaml"))
    assert (data.vocab_size, data.max_bytes, training.lr_scheduler_kwargs) == (
        1000,
        9007199254740993,
        {"min_lr_rate": 0.2},
    )


# ---- said twice ----


@pytest.mark.parametrize("parse", [parse_pretrain, parse_sft])
def test_two_lengths_of_a_run_are_refused(parse):
    """run_sft.py used to pass the hours over."""
    for other in ("max_steps", "num_train_epochs"):
        with pytest.raises(Refusal, match=r"--hours\b.* both set the length of the run: give one of them") as refusal:
            parse(["--dataset", "x", "--hours", "1", f"--{other}", "5"])
        assert f"--{other} " in str(refusal.value)
    assert parse(["--dataset", "x", "--hours", "1", "--max_steps", "-1"])[-2].hours == 1  # which is no length


@pytest.mark.parametrize("second", [["--config", "nowhere.yaml"], ["--config=nowhere.yaml"], ["--config"]])
def test_a_second_config_is_refused(tmp_path, second):
    with pytest.raises(Refusal, match="`--config`: one argument, given 2 times: give it once"):
        parsed("--config", str(config_file(tmp_path, {"block_size": 64})), *second)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--max_steps", "3", "--max_steps=5"], "`--max_steps`"),
        (["--bf16", "--no_bf16"], "`--bf16` and `--no_bf16`"),
        (["--eval_tasks", "a", "--seed", "1", "--eval_tasks", "b"], "`--eval_tasks`"),
        (["--max-steps", "3", "--max_steps", "3"], "`--max-steps` and `--max_steps`"),
    ],
)
def test_an_argument_that_comes_twice_is_refused(argv, named):
    with pytest.raises(Refusal, match=f"{named}: one argument, given 2 times"):
        parsed(*argv)


@pytest.mark.parametrize(
    "parse",
    [parse_pretrain, parse_sft, parse_eval, lambda argv: spec.load(argv[1])],
    ids=["pretrain", "sft", "eval", "study"],
)
@pytest.mark.parametrize("content", ["seed: 1\ntitle: a\nseed: 2\n", "title: {a: 1, b: 2, a: 3}\n"])
def test_a_key_that_comes_twice_in_yaml_is_refused(tmp_path, parse, content):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(Refusal, match=r"(seed|a) is given twice"):
        parse(["--config", str(tmp_path / "c.yaml")])


def test_anchors_and_merges_of_yaml_are_no_second_key(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "lr_scheduler_kwargs: &a {min_lr_rate: 0.2}\naccelerator_config: {<<: *a, min_lr_rate: 0.3}\n"
    )
    assert read_yaml(str(tmp_path / "c.yaml"))["accelerator_config"] == {"min_lr_rate": 0.3}


def test_numbers_in_yaml_are_what_they_look_like(tmp_path):
    """YAML 1.1 reads 010 as 8 and 1:30 as 90."""
    (tmp_path / "c.yaml").write_text(
        "max_steps: 010\noutput_dir: 010\nsample_prompts: [No, 010, 1:30]\nseed: 0x10\nvocab_size:"
        " 1_000\nlearning_rate: 00.5\n"
    )
    _, data, *_, run, training = parse_pretrain(["--config", str(tmp_path / "c.yaml"), "--dataset", "x"])
    assert (training.max_steps, training.output_dir, training.seed, data.vocab_size) == (10, "010", 16, 1000)
    assert run.sample_prompts == ["No", "010", "1:30"] and training.learning_rate == 0.5
    (tmp_path / "c.yaml").write_text("max_steps: 1:30\n")
    with pytest.raises(Refusal, match="`max_steps: 1:30` in"):
        parse_pretrain(["--config", str(tmp_path / "c.yaml"), "--dataset", "x"])


@pytest.mark.parametrize("word", ["no", "off", "NO"])
def test_no_in_yaml_is_a_word_where_a_word_is_wanted_and_false_for_a_switch(tmp_path, word):
    """Norwegian text, a strategy, a switch: YAML 1.1 makes false of all of them."""
    (tmp_path / "c.yaml").write_text(
        f"language: {word}\neval_strategy: no\nbf16: {word}\ncompile_layers: {word}\nfused_loss: true\n"
    )
    *_, curation, _, run, training = parse_pretrain(["--config", str(tmp_path / "c.yaml"), "--dataset", "x"])
    assert (curation.language, training.eval_strategy.value) == (word, "no")
    assert (run.precision, run.compile_layers, run.fused_loss) == ("float32", False, True)
    (tmp_path / "c.yaml").write_text(f"compile_layers: {word}pe\n")
    with pytest.raises(Refusal, match=f"`compile_layers: {word}pe` in .*: expected true or false"):
        parse_pretrain(["--config", str(tmp_path / "c.yaml"), "--dataset", "x"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_fewshot", "5", "mmlu=3", "mmlu=1"], "--num_fewshot mmlu: given twice"),
        (["--num_fewshot", "5", "3"], "--num_fewshot a number for all tasks: given twice"),
        (["--texts", "a=x", "a=y"], "--texts a: given twice"),
        (["--models", "runs/a", "runs/a"], "--models runs/a: given twice"),
        (["--cpu_threads", "0"], "--cpu_threads 0 must be at least 1"),
    ],
)
def test_an_evaluation_does_not_choose_between_two_values(argv, message):
    with pytest.raises(Refusal, match=message):
        parse_eval(["--models", "runs/b", *argv] if "--models" not in argv else argv)


# ---- paths ----


def test_the_home_folder_in_yaml_and_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = {
        "output_dir": "~/r",
        "prepared_dir": "~/p",
        "curated_dir": "~",
        "dataset": "~/t.jsonl",
        "init_from": "~/m",
        "sample_prompts": ["~/x is home"],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(lines))
    model, data, *_, run, training = parsed("--config=~/c.yaml")
    home = str(tmp_path)
    assert (training.output_dir, data.prepared_dir, data.curated_dir) == (f"{home}/r", f"{home}/p", home)
    assert (data.dataset, model.init_from, run.sample_prompts) == (f"{home}/t.jsonl", f"{home}/m", ["~/x is home"])
    assert parsed("--prepared_dir", "~/p")[1].prepared_dir == f"{home}/p"
    which, what, where = parse_eval(
        [
            "--models",
            "~/a@step-*",
            "b/c+~/d",
            "x~/y",
            "--task_data",
            "t=~/e",
            "--output_dir",
            "~/o",
            "--contamination",
            "~/p",
        ]
    )
    assert which.models == [f"{home}/a@step-*", f"b/c+{home}/d", "x~/y"]
    assert (what.task_data, where.output_dir, what.contamination) == ([f"t={home}/e"], f"{home}/o", f"{home}/p")
    assert parse_study(["--config", "~/s.yaml", "--output_dir", "~/o"]).output_dir == f"{home}/o"


@pytest.mark.parametrize("separator", ["\n\n\n", "\t", " "])
def test_blanks_and_line_breaks_are_a_document_separator_and_nothing_is_none(tmp_path, separator):
    (tmp_path / "config.yaml").write_text(f"document_separator: {json.dumps(separator)}\n")
    for words in (["--document_separator", separator], ["--config", str(tmp_path / "config.yaml")]):
        _, data, *_ = parsed(*words)
        assert data.document_separator == separator
    with pytest.raises(Refusal, match="--document_separator '': empty; give a value"):
        parsed("--document_separator", "")


@pytest.mark.parametrize(
    "models, folder",
    [
        (["org/name@step-*", "b"], "runs/name-eval"),
        (["runs/demo+runs/demo-sft"], "runs/demo-eval"),
        (["runs/demo/checkpoint-180"], "runs/demo-checkpoint-180-eval"),  # it was that of every run's checkpoint-180
        (["runs/demo-sft/merged"], "runs/demo-sft-merged-eval"),
    ],
)
def test_an_evaluation_is_named_after_its_first_model(models, folder):
    assert parse_eval(["--models", *models, "--tasks", "mmlu"])[-1].output_dir == folder


def test_the_name_of_a_text_is_no_task():
    with pytest.raises(
        Refusal,
        match=(r"^--tasks short names a text of --texts, which is evaluated anyway: leave it out of --tasks"),
    ):
        parse_eval(
            [
                "--models",
                "runs/b",
                "--tasks",
                "short",
                "embedded_arithmetic",
                "--texts",
                "short=a.txt",
                "--output_dir",
                "out",
            ]
        )


@pytest.mark.parametrize("text", ["-1", "-0.001", "-.5", "-1.", "-1e-3", "-1E3", "-1.5e+2", "-.5e1", "-inf", "-nan"])
def test_a_negative_number_is_a_value_and_its_range_is_named(text):
    with pytest.raises(
        Refusal, match=r"^--learning_rate .*it must be above 0|^--learning_rate -[0-9.e+]+ must be above 0"
    ):
        parsed("--learning_rate", text)
    with pytest.raises(Refusal, match=r"`-lr` does not belong to any argument|expected one argument"):
        parsed("--learning_rate", "-lr")


@pytest.mark.parametrize(
    "parse, argv, told",
    [
        (parse_eval, ["--models", "a,b"], "--models a b (in YAML [a, b])"),
        (parse_eval, ["--models", "a", "--tasks", "mmlu,", "arc_easy"], "--tasks mmlu (in YAML [mmlu])"),
        (parse_eval, ["--models", "a", "--tasks", "mmlu", "--sensitivity", "mmlu,x"], "--sensitivity mmlu x"),
        (parse_eval, ["--models", "a", "--tasks", "mmlu", "--robustness", "mmlu,x"], "--robustness mmlu x"),
        (parse_eval, ["--models", "a", "--tasks", "mmlu", "--variant_models", "a,b"], "--variant_models a b"),
        (parse_eval, ["--models", "a", "--tasks", "m", "--num_fewshot", "m=1,n=2"], "--num_fewshot m=1 n=2"),
        (parse_pretrain, ["--eval_tasks", "embedded_mmlu,arc_easy"], "--eval_tasks embedded_mmlu arc_easy"),
        (parse_pretrain, ["--file_types", "md,txt"], "--file_types md txt"),
        (parse_sft, ["--target_modules", "q_proj, v_proj"], "--target_modules q_proj v_proj"),
    ],
)
def test_a_list_with_commas_is_told_that_blanks_separate(parse, argv, told):
    with pytest.raises(Refusal) as refused:
        parse([*argv, *(["--output_dir", "out"] if parse is parse_eval else [])])
    assert "separate the items of a list by spaces, not commas: " + told in str(refused.value)


def test_commas_in_yaml_are_told_too_and_those_of_places_and_prompts_stay(tmp_path):
    (tmp_path / "c.yaml").write_text("eval_tasks: embedded_mmlu,arc_easy\n")
    with pytest.raises(Refusal, match="--eval_tasks embedded_mmlu,arc_easy: separate the items"):
        parsed("--config", str(tmp_path / "c.yaml"))
    place = tmp_path / "a, b"
    place.mkdir()
    models, *_ = parse_eval(["--models", f"x/y+{place}", "--tasks", "mmlu", "--output_dir", "out"])
    assert models.models == [f"x/y+{place}"]
    assert parse_pretrain(["--block_size", "256", "--sample_prompts", "One, two"])[4].sample_prompts == ["One, two"]


def test_a_run_is_a_config_with_what_was_changed_on_the_way_and_without_what_is_its_own(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = {
        "kind": "pretrain",
        "given": {
            "dataset": "text",
            "hours": 0.5,
            "output_dir": str(run),
            "push_to_hub": True,
            "weight_decay": 0.2,
            "save_steps": 25,
        },
        "settings": {
            "max_steps": 500,
            "model_config": "2x64",
            "prepared_dir": "data/text-1",
            "validation": [],
            "of_old": 1,
            "warmup_steps": 20,
            "eval_steps": 50,
            "save_steps": 25,
        },
    }
    write_json(run / "run.json", record)
    # its tokens are read: whether its text has changed since is not asked
    of_run = {"prepared_dir": "data/text-1", "weight_decay": 0.2, "model_config": "2x64", "save_steps": 25}
    of_run["warmup_steps"] = 20
    _, data, *_, options, _ = parsed("--config", str(run), "--output_dir", "other")
    assert data.dataset == "text" and options.explicit_args == {
        **of_run,
        "output_dir": "other",
        "max_steps": 500,
        "eval_steps": 50,
    }
    for kind, fields in (("layout", {"threads": [1, 2]}), ("hyperparameters", {"max_steps": [500, 700]})):
        append_jsonl(run / "events.jsonl", {"event": "changed", "kind": kind, "fields": fields})
    of_run["max_steps"] = 700  # evaluations follow from them
    *_, options, training = parsed("--config", str(run), "--output_dir", "other", "--seed", "3")
    assert options.explicit_args == {**of_run, "output_dir": "other", "seed": 3} and training.output_dir == "other"
    for argv in (["--dataset", "other"], ["--vocab_size", "700"], ["--min_characters", "9"]):
        _, data, *_, options, _ = parsed("--config", str(run), "--output_dir", "other", *argv)
        assert "prepared_dir" not in options.explicit_args
        assert options.explicit_args["dataset"] == data.dataset == ("other" if "--dataset" in argv else "text")
    _, data, *_ = parsed("--config", str(run), "--output_dir", "other", "--mixture", "data/a=0.5", "data/b=0.5")
    assert data.mixture == ["data/a=0.5", "data/b=0.5"] and data.prepared_dir is None
    # another length: what followed from the run's is not taken
    kept = {name: of_run[name] for name in of_run if name not in ("max_steps", "warmup_steps")}
    for argv in (["--hours=2"], ["--max_steps=9000"], ["--num_train_epochs=2"]):
        *_, options, _ = parsed("--config", str(run), "--output_dir", "other", *argv)
        name, value = argv[0].removeprefix("--").split("=")
        assert options.explicit_args == {**kept, "output_dir": "other", name: float(value)}
    own = rf"needs a folder of its own: --output_dir OTHER\. To go on with the run itself: --output_dir {run}\."
    with pytest.raises(Refusal, match=own):
        parsed("--config", str(run), "--learning_rate", "1e-3")
    for parse, folder, told in (
        (
            parse_sft,
            run,
            r"a folder with a run of run_pretrain.py: give a YAML file, or the folder of a run of run_sft",
        ),
        (parse_pretrain, tmp_path, "a folder with no run: give a YAML file, or the folder of a run of run_pretrain.py"),
        (parse_eval, run, r"a folder with a run of run_pretrain.py: give a YAML file\.$"),
    ):
        with pytest.raises(Refusal, match=told):
            parse(["--config", str(folder)])
