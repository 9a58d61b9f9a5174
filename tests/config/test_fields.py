"""Every field of transformers' and TRL's arguments is recorded, refused, or free for a reason; what decides a run
cannot change unsaid.
"""

import dataclasses

import pytest
from helpers import QUICK, log_of, same_tensors
from transformers import TrainingArguments
from trl import SFTConfig

from llama_lite.checkpoint import identity as checkpoint_identity
from llama_lite.config import common, fields
from llama_lite.config import pretrain as config_pretrain
from llama_lite.config import sft as config_sft
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.config.sft import parse_sft
from llama_lite.errors import Refusal

pytestmark = pytest.mark.usefixtures("undrawn")

PRETRAIN_KEPT = {**fields.KEPT, **config_pretrain.PRETRAIN_KEPT}
SFT_KEPT = {**fields.KEPT, **config_sft.KEPT}
OTHER = {  # a value that a kept field must not have
    bool: lambda value: not value,
    str: lambda value: f"not {value}",
    float: lambda value: value + 0.5,
    list: lambda value: ["loss"],
    type(None): lambda value: "something",
}


@pytest.mark.parametrize("kind, kept", [(TrainingArguments, PRETRAIN_KEPT), (SFTConfig, SFT_KEPT)])
def test_every_field_is_in_one_table(kind, kept):
    """A field of a later release fails here, until somebody has said what becomes of it."""
    recorded = {*fields.HYPERPARAMETERS, *fields.ELSEWHERE, *(fields.SFT_HYPERPARAMETERS if kind is SFTConfig else ())}
    for field in dataclasses.fields(kind):
        found = [
            name
            for name, table in (("recorded", recorded), ("free", fields.FREE), ("kept", kept))
            if field.name in table
        ]
        assert len(found) == 1 or (found, kind) == (
            ["recorded", "kept"],
            SFTConfig,
        ), f"{field.name} of {kind.__name__} is {found or 'in no table'}"


def test_no_table_names_a_field_that_is_gone():
    there = {field.name for field in dataclasses.fields(SFTConfig)} | {"precision", "schedule_steps"}
    assert {
        *fields.HYPERPARAMETERS,
        *fields.SFT_HYPERPARAMETERS,
        *fields.ELSEWHERE,
        *fields.FREE,
        *PRETRAIN_KEPT,
        *SFT_KEPT,
    } <= there


@pytest.mark.parametrize("parse, kept", [(parse_pretrain, PRETRAIN_KEPT), (parse_sft, SFT_KEPT)])
def test_every_kept_field_is_refused_with_another_value(parse, kept):
    *groups, training = parse(["--output_dir", "runs/x"])
    hub, run = groups[-2:]
    for name, (value, why) in kept.items():
        before = getattr(training, name)
        setattr(training, name, OTHER[type(value)](value))
        run.explicit_args = {name: getattr(training, name)}
        problems = common.check_training(run, hub, training, kept)
        assert f"--{name} must stay {value}: {why}." in problems, name
        setattr(training, name, before)


def test_a_field_of_a_later_release_is_refused_where_it_is_given(monkeypatch):
    monkeypatch.delitem(fields.FREE, "log_on_each_node")
    parse_pretrain(["--output_dir", "runs/x"])
    with pytest.raises(Refusal, match="--log_on_each_node is new in the installed transformers or TRL"):
        parse_pretrain(["--output_dir", "runs/x", "--log_on_each_node", "False"])


@pytest.mark.parametrize(
    "entry, why",
    [
        ('"dispatch_batches": true', "every process reads its own rows"),
        ('"gradient_accumulation_kwargs": {"num_steps": 4}', "accumulation follows from the size of the step"),
        ('"even_batches": false', "every step has the same number of rows"),
    ],
)
def test_entries_of_the_accelerators_config_stay(entry, why):
    with pytest.raises(Refusal, match=rf"accelerator_config\.{entry.split(chr(34))[1]} must stay .*: {why}"):
        parse_pretrain(["--output_dir", "runs/x", "--accelerator_config", f"{{{entry}}}"])
    parse_pretrain(["--output_dir", "runs/x", "--accelerator_config", '{"non_blocking": true}'])


def test_a_run_that_shall_not_train_is_refused():
    with pytest.raises(Refusal, match="--do_train false: this script always trains"):
        parse_pretrain(["--output_dir", "runs/x", "--do_train", "False"])


# ---- the identity ----

HARDWARE = {"device": "a processor", "threads": 2, "capability": "AVX2"}
RECORDED = {  # what a command can ask for, and the row of the table in which a resume is refused
    "--neftune_noise_alpha 5": r"neftune_noise_alpha +None -> 5\.0",
    "--optim sgd --optim_args momentum=0.9": r"optim_args +None -> momentum=0\.9",
    "--lr_scheduler_type linear": r"lr_scheduler_kwargs +\{'min_lr_rate': 0\.1\} -> None",
    '--activation_checkpointing_kwargs {"use_reentrant":true}': (
        r"activation_checkpointing_kwargs +None -> \{'use_reentrant': True\}"
    ),
    "--tf32 False": r"tf32 +None -> False",
    "--adam_beta2 0.9": r"adam_beta2 +0\.95 -> 0\.9",
    "--schedule_steps 800": r"schedule_steps +max_steps -> 800",
}


def identity_of(*argv: str, hardware: dict = HARDWARE) -> dict:
    *_, run, training = parse_pretrain(["--output_dir", "runs/x", *argv])
    return checkpoint_identity.RunIdentity(
        config={"hidden_size": 64},
        training={
            **training.to_dict(),
            "precision": run.precision,
            "schedule_steps": run.schedule_steps or "max_steps",
        },
        data={"data": "f", "tokens_per_step": 1024, "block_size": 64},
        layout={"processes": 1, "micro_batch": 8, "accumulation": 2, "sharding": "none"},
        environment={
            "hardware": hardware,
            "packages": {"torch": "1"},
            "switches": {"fused_loss": True, **fields.switches(training)},
            "code_revision": "a",
        },
    ).record()


def older(identity: dict) -> dict:
    """As a manifest of the time before these fields: without them, threads in the hardware."""
    told = {
        name: value for name, value in identity["hyperparameters"].items() if name in [*fields.HYPERPARAMETERS][:13]
    }
    layout = {name: value for name, value in identity["layout"].items() if name != "threads"}
    return {
        **identity,
        "hyperparameters": told,
        "layout": layout,
        "environment": {**identity["environment"], "hardware": HARDWARE},
    }


@pytest.mark.parametrize("argv", RECORDED)
@pytest.mark.parametrize("age", [dict, older])
def test_what_decides_a_run_is_refused_on_resume(argv, age):
    with pytest.raises(Refusal, match=RECORDED[argv]):
        checkpoint_identity.check_changes(age(identity_of()), identity_of(*argv.split()), 10, "")
    assert not any(
        checkpoint_identity.check_changes(identity_of(*argv.split()), identity_of(*argv.split()), 10, "").values()
    )


def test_fields_that_another_version_of_transformers_writes_do_not_end_a_run():
    saved, current = identity_of(), identity_of()
    saved["model"] = {"hidden_size": 64, "rope": {"theta": 1e4}, "gone": 1}
    current["model"] = {"hidden_size": 64, "rope": {"theta": 1e4, "kind": "default"}, "new": True}
    with pytest.raises(Refusal, match=r"model\.new +None -> True"):
        checkpoint_identity.check_changes(saved, current, 10, "")
    current["environment"]["packages"] = {"torch": "1", "transformers": "6"}
    assert not checkpoint_identity.check_changes(saved, current, 10, "")["data"]
    current["model"]["rope"]["theta"] = 1e5
    with pytest.raises(Refusal, match=r"model\.rope +\{'theta': 10000\.0\} -> \{'theta': 100000\.0\}"):
        checkpoint_identity.check_changes(saved, current, 10, "")


def test_a_run_of_today_goes_on():
    assert set(older(identity_of())["hyperparameters"]) < set(identity_of()["hyperparameters"])
    assert not any(checkpoint_identity.check_changes(older(identity_of()), identity_of(), 10, "").values())
    constant = older(identity_of("--lr_scheduler_type", "constant"))
    constant["hyperparameters"]["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}  # which transformers passed over
    assert not any(
        checkpoint_identity.check_changes(constant, identity_of("--lr_scheduler_type", "constant"), 10, "").values()
    )


def test_what_is_free_may_change():
    free = (
        "--logging_steps 3 --eval_steps 7 --save_steps 9 --per_device_eval_batch_size 3 --dataloader_num_workers 2"
        " --report_to none --ddp_timeout 60"
    )
    assert not any(checkpoint_identity.check_changes(identity_of(), identity_of(*free.split()), 10, "").values())


@pytest.mark.parametrize("age", [dict, older])
def test_another_number_of_threads_is_no_other_hardware(age):
    now = identity_of(hardware={**HARDWARE, "threads": 1})
    changed = checkpoint_identity.check_changes(age(identity_of()), now, 10, "")
    assert changed["environment"] == {} and changed["layout"] == {"threads": (2, 1)}
    assert checkpoint_identity.changed_arithmetic(changed) == [
        "number of threads"
    ]  # the same mathematics, other last bits
    assert (
        now["environment"]["hardware"] == {"device": "a processor", "capability": "AVX2"}
        and now["layout"]["threads"] == 1
    )


def test_another_processor_and_other_kernels_are_told():
    now = identity_of("--full_determinism", hardware={**HARDWARE, "device": "another"})
    changed = checkpoint_identity.check_changes(identity_of(), now, 10, "")
    assert checkpoint_identity.changed_arithmetic(changed) == ["hardware", "switches"] and changed["layout"] == {}


# ---- in runs ----


def test_noise_is_learnt_with_resumes_and_cannot_change_unsaid(pretrain, tmp_path, capsys):
    import torch

    plain = pretrain(tmp_path / "plain", **{**QUICK, "max_steps": 1})
    whole = pretrain(tmp_path / "whole", **QUICK, neftune_noise_alpha=5)
    again = pretrain(
        tmp_path / "again", **QUICK, neftune_noise_alpha=5, resume_from_checkpoint=str(whole / "checkpoint-2")
    )
    assert log_of(again) == log_of(whole) and log_of(whole)[0]["loss"] != log_of(plain)[0]["loss"]
    assert same_tensors(whole / "checkpoint-4" / "model.safetensors", again / "checkpoint-4" / "model.safetensors")
    with pytest.raises(Refusal, match=r"neftune_noise_alpha +5(\.0)? -> None"):
        pretrain(tmp_path / "other", **QUICK, resume_from_checkpoint=str(whole / "checkpoint-2"))
    capsys.readouterr()
    pretrain(
        tmp_path / "threads",
        **QUICK,
        neftune_noise_alpha=5,
        resume_from_checkpoint=str(whole / "checkpoint-2"),
        cpu_threads=2,
    )
    torch.set_num_threads(1)
    told = capsys.readouterr().out
    assert (
        "WARNING   another number of threads than when checkpoint-2 was saved: equal within tolerance, not bit for bit"
        in told
    )
    assert "verified: probe loss" in told and "within 0.0001 of the recorded" in told


def test_another_adapter_is_refused(sft, tmp_path):
    quick = {
        "max_steps": 2,
        "save_steps": 1,
        "eval_strategy": "no",
        "sampled_answers": 1,
        "compared_prompts": 0,
        "save_total_limit": 9,
    }
    whole = sft(tmp_path / "whole", **quick)
    with pytest.raises(Refusal) as refusal:
        changed = {
            "lora_alpha": 64,
            "lora_dropout": 0.0,
            "use_rslora": True,
            "neftune_noise_alpha": 5,
            "loss_type": "dft",
            "optim": "sgd",
        }
        sft(tmp_path / "other", **quick, **changed, resume_from_checkpoint=str(whole / "checkpoint-1"))
    for name in ("model.adapter", "neftune_noise_alpha", "loss_type", "optim"):
        assert f"  {name} " in str(refusal.value)


FREELY = {  # other values of what a run's identity leaves out
    "logging_strategy": "no",
    "logging_first_step": True,
    "include_num_input_tokens_seen": True,
    "log_level": "error",
    "debug": "underflow_overflow",
    "eval_steps": 5,
    "eval_delay": 2,
    "eval_on_start": True,
    "eval_windows": 3,
    "per_device_eval_batch_size": 2,
    "prediction_loss_only": True,
    "save_steps": 0.5,
    "save_total_limit": 9,
    "activation_checkpointing": True,
    "torch_empty_cache_steps": 1,
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "ddp_find_unused_parameters": True,
}


def test_what_is_free_changes_nothing_that_is_computed(pretrain, whole_run, tmp_path):
    assert {name for name in FREELY if name != "eval_windows"} <= fields.FREE.keys()
    run = pretrain(tmp_path / "run", **FREELY)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(run / "checkpoint-12" / name, whole_run / "checkpoint-12" / name)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]
    evaluated = [entry["step"] for entry in log_of(run) if "eval_loss" in entry]
    assert evaluated == [0, 5, 10, 12]


def test_what_is_free_changes_no_adapter_either(sft, whole_sft, tmp_path):
    """Its dropout draws from the random state of the run: an evaluation must leave that alone."""
    other = {name: value for name, value in FREELY.items() if name not in ("eval_windows", "debug", "save_steps")}
    run = sft(tmp_path / "run", **other)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert same_tensors(run / "checkpoint-8" / name, whole_sft / "checkpoint-8" / name)
    assert [entry["step"] for entry in log_of(run) if "eval_loss" in entry] == [0, 5, 8]
