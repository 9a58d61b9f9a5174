"""Every number that a command takes has a range; what is outside is refused before anything is done, all of it at
once.
"""

import dataclasses
import re
from typing import get_type_hints

import pytest
import yaml

from llama_lite.config import eval, fields, ranges
from llama_lite.config import sft as config_sft
from llama_lite.config.eval import parse_eval
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.config.sft import parse_sft
from llama_lite.config.study import parse_study
from llama_lite.errors import Refusal

BASE = ["--output_dir", "runs/x"]


def numbers_of(parse, argv) -> set[str]:
    """Arguments of a command that hold a number or none, but those that are kept at one value."""
    kept = {**fields.KEPT, **config_sft.KEPT}
    hints = {name: str(kind) for group in parse(argv) for name, kind in get_type_hints(type(group)).items()}
    own = {field.name for group in parse(argv) for field in dataclasses.fields(group) if field.init}
    return {
        name
        for name in own - kept.keys()
        if re.search(r"\b(int|float)\b", hints[name]) and not re.search("bool|list|dict|str", hints[name])
    }


@pytest.mark.parametrize("parse, argv", [(parse_pretrain, BASE), (parse_sft, BASE), (parse_eval, ["--models", "x"])])
def test_every_number_has_a_range(parse, argv):
    assert numbers_of(parse, argv) - ranges.RANGES.keys() - {"local_rank"} == set()


def test_no_range_is_of_an_argument_that_is_gone():
    there = numbers_of(parse_pretrain, BASE) | numbers_of(parse_sft, BASE) | numbers_of(parse_eval, ["--models", "x"])
    assert ranges.RANGES.keys() <= there


WRONG = {  # what an argument must not be, by command; the last word of each is the value
    parse_pretrain: (
        "seed -1,seed 5000000000,data_seed -3,data_seed 99999999999999999999999,eval_windows 0,eval_windows"
        " -1,probe_windows 0,sample_tokens -1,per_device_train_batch_size 0,per_device_eval_batch_size 0,learning_rate"
        " nan,learning_rate inf,learning_rate 0,learning_rate -1e-3,adam_beta1 1,adam_beta2 1.0,adam_beta2"
        " -0.1,adam_epsilon 0,weight_decay -0.1,weight_decay nan,max_grad_norm nan,max_grad_norm -1,warmup_steps"
        " -5,warmup_steps 2.5,max_steps 0,max_steps -2,num_train_epochs 0,num_train_epochs inf,logging_steps"
        " 0,save_steps -1,eval_steps 0,eval_steps -1,save_steps 1.5,save_total_limit 0,plan_mfu 101,hours"
        " nan,peak_flops 0,min_score nan,min_characters -1,vocab_size 256,shard_tokens 0,publish_steps"
        " 0,hub_drain_timeout -1,gradient_accumulation_steps 0,dataloader_num_workers -1,eval_delay"
        " -1,neftune_noise_alpha 0,ddp_timeout 0,block_size -64,tokens_per_step 0"
    ),
    parse_sft: (
        "seed -1,r 0,lora_alpha 0,lora_dropout 1.0,lora_dropout nan,eval_rows 0,max_rows 1,max_length"
        " 7,sequences_per_step 0,probe_rows 0,compared_prompts -1,sampled_answers 0,answer_tokens 0,prepare_workers"
        " 0,cpu_threads 0,learning_rate nan,max_steps 0"
    ),
    parse_eval: "seed -1,seed 4294967296,limit 0,variant_limit -1,batch_tokens 0,cpu_threads 0",
    parse_study: "seed -1,seed 4294967296",
}


@pytest.mark.parametrize("parse, words", [(parse, words) for parse, some in WRONG.items() for words in some.split(",")])
def test_a_number_outside_its_range_is_refused_with_the_rule(parse, words):
    name, value = words.split()
    with pytest.raises(Refusal, match=rf"^--{name} \S+ (is not a number: it )?must be [a-z0-9]"):
        parse([f"--{name}={value}"])


def test_all_of_them_are_refused_together_from_yaml_and_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            {"seed": -1, "eval_windows": 0, "learning_rate": float("nan"), "warmup_steps": -2, "logging_steps": 0}
        )
    )
    with pytest.raises(Refusal) as refusal:
        parse_pretrain(["--config", str(path), "--adam_beta2", "1.0"])
    for told in (
        "--seed -1 must be from 0 to 4,294,967,295.",
        "--eval_windows 0 must be at least 1.",
        "--learning_rate nan is not a number: it must be above 0.",
        "--warmup_steps -2 must be a whole number of steps, or a share of the run below 1.",
        "--logging_steps 0 must be a whole number of steps, or a share of the run between 0 and 1.",
        "--adam_beta2 1 must be at least 0 and below 1.",
    ):
        assert told in str(refusal.value), told


@pytest.mark.parametrize(
    "argv",
    [
        (
            "--seed 0 --data_seed 4294967295 --max_steps -1 --warmup_steps 0 --save_total_limit none --max_grad_norm 0"
            " --sample_tokens 0 --save_steps 0.4"
        ),
        (
            "--max_steps 1 --warmup_steps 0.5 --weight_decay 0 --logging_steps 1 --eval_windows 1 --adam_beta1 0"
            " --dataloader_num_workers 0"
        ),
    ],
)
def test_the_ends_of_ranges_are_in_them(argv):
    parse_pretrain([*BASE, *argv.split()])


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--min_characters 9 --max_characters 8", "--min_characters 9 is above --max_characters 8"),
        (
            "--validation_tokens 900 --max_tokens 900",
            "--validation_tokens 900 leaves nothing to train on: --max_tokens 900",
        ),
    ],
)
def test_two_numbers_that_exclude_each_other(argv, message):
    with pytest.raises(Refusal, match=message):
        parse_pretrain([*BASE, *argv.split()])


# ---- as soon as what it depends on is known ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample_prompts": [""]}, r"--sample_prompts '': 0 tokens, but a prompt for this model must have 1 to 127"),
        (
            {"sample_prompts": ["The", "The tokens of a prompt " * 90]},
            r"--sample_prompts 'The tokens of a prompt .*\.\.\.': [\d,]+ tokens",
        ),
        ({"warmup_steps": 13}, "--warmup_steps 13 is longer than the run of 12 steps"),
        ({"eval_windows": 100_000}, "the validation slice has 156 windows of 64 tokens, and 100000 are asked"),
    ],
)
def test_a_pretraining_number_that_does_not_fit_text_or_model(pretrain, tmp_path, changes, message):
    with pytest.raises(Refusal, match=message):
        pretrain(tmp_path / "run", **changes)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": ["Hello", " "]}, r"--prompts ' ': \d+ tokens in the chat format"),
        (
            {"prompts": ["Count " * 600]},
            (
                r"--prompts 'Count .*\.\.\.': .* tokens in the chat format, and with --answer_tokens 8 the base has 512"
                r" positions"
            ),
        ),
        ({"answer_tokens": 512}, "--answer_tokens 512: the base has 512 positions, for prompt and answer together"),
        ({"warmup_steps": 9}, "--warmup_steps 9 is longer than the run of 8 steps"),
    ],
)
def test_a_tuning_number_that_does_not_fit_rows_or_base(sft, tmp_path, changes, message):
    with pytest.raises(Refusal, match=message):
        sft(tmp_path / "run", **changes)


@pytest.mark.parametrize(
    "shots, message",
    [
        (["1000"], r"--num_fewshot 1000: embedded_mmlu\w* has \d+ few-shot examples: \d+ at most"),
        (["embedded_mml=2"], r"--num_fewshot embedded_mml=2: embedded_mml is not among --tasks \(embedded_mmlu\)"),
        (["1", "2"], "--num_fewshot 2: a number for all tasks is given twice"),
        (["embedded_mmlu=1", "embedded_mmlu=2"], "--num_fewshot embedded_mmlu=2: embedded_mmlu is given twice"),
        (["-1"], "--num_fewshot -1: expected N or TASK=N"),
    ],
)
def test_examples_that_are_not_there(shots, message):
    from llama_lite.evaluation.tasks import registry

    with pytest.raises(Refusal, match=message):
        registry.build(["embedded_mmlu"], {}, eval.shots(shots), False)


def test_as_many_examples_as_there_are_can_be_shown():
    from llama_lite.evaluation.tasks import registry

    with pytest.raises(Refusal) as refusal:
        registry.build(["embedded_mmlu"], {}, {"": 1000}, False)
    most = int(re.search(r"(\d+) at most", str(refusal.value))[1])
    (task,) = registry.build(["embedded_mmlu"], {}, {"": most}, False)
    leaf = next(iter(task.leaves.values()))
    leaf.set_fewshot_seed(1)
    document = next(iter(leaf.test_docs()))
    assert len(leaf.sampler.sample(most, document)) == most
