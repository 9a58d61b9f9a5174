"""Each schedule and optimizer that transformers offers starts, saves and resumes, or is refused before anything is
done.
"""

import math
import re
import types

import pytest
import torch
from helpers import QUICK, log_of, same_tensors
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from llama_lite.config import optimizers, schedules
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.config.sft import parse_sft
from llama_lite.errors import Refusal
from llama_lite.training.trainer import VerifiedTraining

pytestmark = pytest.mark.usefixtures("undrawn")

STEPS = 12
NEEDED = {"warmup_stable_decay": ["--lr_scheduler_kwargs", '{"num_decay_steps": 4}']}
REFUSED = {
    name: f"--lr_scheduler_type {name}: its rate depends on evaluation results" for name in schedules.BY_EVALUATIONS
}


def training_of(*argv: str, parse=parse_pretrain):
    warmup = [] if "--warmup_steps" in argv else ["--warmup_steps", "4"]
    return parse(["--output_dir", "runs/x", "--max_steps", str(STEPS), *warmup, *argv])[-1]


def scheduled(training):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    return optimizer, get_scheduler(
        training.lr_scheduler_type, optimizer, training.get_warmup_steps(STEPS), STEPS, training.lr_scheduler_kwargs
    )


@pytest.mark.parametrize("parse", [parse_pretrain, parse_sft])
@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_each_schedule_begins_and_goes_on_or_is_refused(name, parse):
    if name in REFUSED:
        with pytest.raises(Refusal, match=REFUSED[name]):
            training_of("--lr_scheduler_type", name, parse=parse)
        return
    training = training_of("--lr_scheduler_type", name, *NEEDED.get(name, []), parse=parse)
    assert schedules.plan_problems(training, STEPS) == []
    optimizer, schedule = scheduled(training)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step in (1, 4, 7, 11):  # resumed: a schedule of its own, placed at the step
        optimizer, schedule = scheduled(training)
        trainer = types.SimpleNamespace(lr_scheduler=schedule, _raw_optimizer=lambda optimizer=optimizer: optimizer)
        VerifiedTraining._place_on_schedule(trainer, step, None)
        assert optimizer.param_groups[0]["lr"] == rates[step], (name, step)
        schedule.step()
        assert step + 1 == STEPS or optimizer.param_groups[0]["lr"] == rates[step + 1]
    assert all(rate >= 0 for rate in rates) and max(rates) <= training.learning_rate


def test_the_floor_is_the_papers_schedules():
    floors = {
        name: training_of("--lr_scheduler_type", name).lr_scheduler_kwargs
        for name in ("cosine_warmup_with_min_lr", "cosine_with_min_lr", "linear")
    }
    assert floors == {
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "linear": None,
    }
    assert training_of("--lr_scheduler_kwargs", '{"min_lr_rate": 0.2}').lr_scheduler_kwargs == {"min_lr_rate": 0.2}


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["linear", '{"min_lr_rate": 0.1}'],
            (
                r"min_lr_rate: --lr_scheduler_type linear has no such argument; it takes none: --lr_scheduler_kwargs"
                r" '\{\}'"
            ),
        ),
        (["constant", '{"min_lr_rate": 0.1}'], "min_lr_rate: --lr_scheduler_type constant has no such argument"),
        (["cosine", '{"cycles": 2}'], "cycles: --lr_scheduler_type cosine has no such argument; it takes num_cycles"),
        (["cosine_warmup_with_min_lr", '{"nonsense": 1}'], "nonsense: .* it takes num_cycles, min_lr, min_lr_rate"),
        (
            ["cosine_warmup_with_min_lr", '{"min_lr_rate": -3}'],
            "min_lr_rate -3 must be from 0 to 1: a share of the peak rate",
        ),
        (["cosine_warmup_with_min_lr", '{"min_lr_rate": "a"}'], "min_lr_rate a must be from 0 to 1"),
        (["inverse_sqrt", '{"timescale": -1}'], "timescale -1 must be a number from 0 on"),
        (["warmup_stable_decay", "{}"], r"needs --lr_scheduler_kwargs '\{\"num_decay_steps\": N\}'"),
    ],
)
def test_arguments_of_another_schedule_are_refused(argv, message):
    with pytest.raises(Refusal, match=message):
        training_of("--lr_scheduler_type", argv[0], "--lr_scheduler_kwargs", argv[1])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--warmup_steps", "13"], "--warmup_steps 13 is longer than the run of 12 steps"),
        (
            ["--lr_scheduler_kwargs", '{"min_lr": 0.5}'],
            "gives .* of the peak rate at step 5: the rate must stay between 0 and the peak",
        ),
        (
            ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1.0}'],
            "lr_end .* must be smaller than initial lr",
        ),
        (
            ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1, "min_lr": 0.0001}'],
            "over 12 steps of which 4 are warm-up: Only one of min_lr or min_lr_rate",
        ),
    ],
)
def test_a_schedule_is_computed_before_the_run(argv, message):
    problems = schedules.plan_problems(training_of(*argv), STEPS)
    assert len(problems) == 1 and re.search(message, problems[0]), problems


def authors_rate(it: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """The authors' function, written out: `it` counts from 0."""
    if it < warmup_steps:
        return max_lr * (it + 1) / warmup_steps
    if it > max_steps:
        return min_lr
    decay_ratio = (it - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (max_lr - min_lr)


@pytest.mark.parametrize("warmup, steps, run", [(4, 10, 30), (0, 7, 9), (50, 600, 1080), (715, 19_073, 19_300)])
def test_schedule_steps_give_the_authors_rates(warmup, steps, run):
    given = ("--learning_rate", "6e-4", "--warmup_steps", str(warmup), "--schedule_steps", str(steps))
    training = training_of(*given)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    (factor,) = schedules.make_scheduler(training, optimizer, run, steps).lr_lambdas
    rates = [training.learning_rate * factor(it) for it in range(run)]
    expected = [authors_rate(it, 6e-4, 6e-5, warmup, steps) for it in range(run)]
    assert max(abs(a - b) for a, b in zip(rates, expected, strict=True)) <= 1e-12 * 6e-4
    assert rates[steps:] == [training.learning_rate * 0.1] * (run - steps)
    assert schedules.plan_problems(training, run, schedule_steps=steps) == []


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lr_scheduler_type", "linear"], "--schedule_steps 9 belongs to --lr_scheduler_type cosine_warmup_with_min"),
        (["--warmup_steps", "9"], "--schedule_steps 9 ends within the warm-up of 9 steps"),
        (["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1, "num_cycles": 2}'], "num_cycles: the schedule of --schedule_"),
        (["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1, "min_lr": 1e-5}'], "--schedule_steps needs one floor"),
        (["--schedule_steps", "0"], "--schedule_steps 0 must be at least 1"),
    ],
)
def test_schedule_steps_that_cannot_be_are_refused(argv, message):
    with pytest.raises(Refusal, match=message):
        training_of("--schedule_steps", "9", *argv) if "--schedule_steps" not in argv else training_of(*argv)


def test_a_resumed_run_keeps_its_schedule_or_stretches_it(pretrain, tmp_path):
    """The floor from step 6 on; and, resumed as the authors' code does, a cosine to a later step, from a higher rate."""
    asked = {**QUICK, "max_steps": 12, "warmup_steps": 2, "logging_steps": 1, "save_steps": 4, "learning_rate": 1e-3}
    asked = {**asked, "schedule_steps": 6, "eval_steps": 12}
    run = pretrain(tmp_path / "run", **asked)
    checkpoint = {"resume_from_checkpoint": str(run / "checkpoint-4")}
    with pytest.raises(Refusal, match=r"schedule_steps +6 -> 10"):
        pretrain(tmp_path / "stretched", **{**asked, **checkpoint, "schedule_steps": 10})
    stretched = {**checkpoint, "schedule_steps": 10, "allow_changes": "schedule_steps"}
    stretched = pretrain(tmp_path / "stretched", **{**asked, **stretched})
    for folder, first, steps in ((run, 1, 6), (stretched, 5, 10)):
        rates = {row["step"]: row["learning_rate"] for row in log_of(folder) if "loss" in row and row["step"] >= first}
        assert len(rates) == 13 - first
        for step, rate in rates.items():  # the rate of the next step
            assert rate == pytest.approx(authors_rate(step - 1, 1e-3, 1e-4, 2, steps), abs=1e-15), (folder.name, step)


@pytest.mark.parametrize("name", [kind.value for kind in OptimizerNames])
def test_each_optimizer_is_one_that_resumes_or_is_refused(name):
    if name in optimizers.OPTIMIZERS:
        assert training_of("--optim", name).optim.value == name
        return
    with pytest.raises(
        Refusal, match=rf"--optim {name} has not been tested for exact resume\. Supported: adamw_torch, .*rmsprop"
    ):
        training_of("--optim", name)


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("adamw_torch", "betas=x", "--optim adamw_torch does not read betas; leave it out: it takes none"),
        ("sgd", "momentum=fast", "expected NAME=NUMBER"),
        ("sgd", "weight_decay=0.1", "--optim sgd does not read weight_decay; it takes momentum, dampening, nesterov"),
        ("sgd", "nesterov=true", "Nesterov momentum requires a momentum"),
        ("rmsprop", "alpha", "expected NAME=NUMBER"),
    ],
)
def test_arguments_of_another_optimizer_are_refused(name, words, message):
    with pytest.raises(Refusal, match=message):
        training_of("--optim", name, "--optim_args", words)


TRIED = {
    "adamw_torch": {},
    "adafactor": {},
    "sgd": {},
    "sgd with momentum": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
    "adagrad": {},
    "rmsprop": {"optim_args": "momentum=0.5,centered=true"},
}


@pytest.mark.parametrize("name", TRIED)
def test_an_optimizer_resumes_bit_for_bit(name, pretrain, tmp_path):
    asked = {"optim": name, **TRIED[name], **QUICK, "lr_scheduler_type": "linear"}
    whole = pretrain(tmp_path / "whole", **asked)
    again = pretrain(tmp_path / "again", **asked, resume_from_checkpoint=str(whole / "checkpoint-2"))
    assert log_of(again) == log_of(whole) and len({entry["loss"] for entry in log_of(whole) if "loss" in entry}) == 4
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(whole / "checkpoint-4" / name, again / "checkpoint-4" / name)


def test_another_optimizer_begins_without_state_or_is_refused(pretrain, whole_run, tmp_path):
    """Its state is not the other's: neither a KeyError nor silently nothing."""
    asked = {"resume_from_checkpoint": str(whole_run / "checkpoint-10"), "eval_strategy": "no"}
    for other in ("adafactor", "sgd"):
        with pytest.raises(
            Refusal,
            match=f"--optim {other} cannot use the saved state of adamw_torch_fused.* --resume_without optimizer",
        ):
            pretrain(tmp_path / "run", "--allow_changes", "optim", optim=other, **asked)
    assert pretrain(tmp_path / "plain", "--allow_changes", "optim", optim="adamw_torch", **asked)
    assert pretrain(tmp_path / "without", "--allow_changes", "optim", optim="sgd", resume_without="optimizer", **asked)


def test_a_warm_up_that_is_derived_is_no_reason_to_refuse_a_schedule():
    """The default of 715 steps is derived anew for the length of the run."""
    assert parse_pretrain(["--block_size", "64", "--schedule_steps", "500"])[-2].schedule_steps == 500
    problems = schedules.plan_problems(training_of("--warmup_steps", "9"), 20, schedule_steps=9)
    assert problems == ["--schedule_steps 9 ends within the warm-up of 9 steps: give more, or fewer --warmup_steps."]
