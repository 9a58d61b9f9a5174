"""How each field of transformers' TrainingArguments and TRL's SFTConfig is treated.

A field that changes what is computed is part of a run's identity (HYPERPARAMETERS, ELSEWHERE). A field that changes
nothing that is computed is free (FREE, with the reason). A field that is not supported here is refused (KEPT, here and
in sft.py). A test goes through all fields, so that a field of a later release is noticed; until then it is refused
where it is given.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.trainer_pt_utils import AcceleratorConfig


def names(comma_separated: str) -> list[str]:
    """The names in a comma-separated text: `a, b` -> [a, b]."""
    return [name.strip() for name in comma_separated.split(",") if name.strip()]


HYPERPARAMETERS = {  # {field of the identity: its value where a manifest lacks it}
    **dict.fromkeys(
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2"
        # always recorded; `precision` follows from bf16 and fp16
        " adam_epsilon max_grad_norm optim max_steps precision".split()
    ),
    "optim_args": None,
    "neftune_noise_alpha": None,
    "activation_checkpointing_kwargs": None,
    "tf32": None,
}

SFT_HYPERPARAMETERS = {"loss_type": "nll"}


ELSEWHERE = {  # fields that other parts of the identity hold
    "num_train_epochs": "max_steps",
    "bf16": "precision",
    "fp16": "precision",
    "seed": "data",
    "data_seed": "data",
    "max_length": "data",
    "packing": "data",
    "chat_template_path": "data: the ids of the rows, and the tokenizer",
    "per_device_train_batch_size": "layout",
    "gradient_accumulation_steps": "layout: it follows from the step",
    "use_liger_kernel": "environment: switches",
    "liger_kernel_config": "environment: switches",
    "full_determinism": "environment: switches",
    "use_cpu": "environment: hardware",
}


FREE = {  # fields that change nothing that is computed, so that they may change when a run is resumed
    **dict.fromkeys(("output_dir", "resume_from_checkpoint"), "where the run is, and how it begins"),
    **dict.fromkeys(
        ("do_train", "do_eval"),
        "a run trains (false is refused), and evaluates unless --eval_strategy is no: transformers sets do_eval by it",
    ),
    **dict.fromkeys(
        "logging_strategy logging_steps logging_first_step log_on_each_node include_num_input_tokens_seen log_level"
        " log_level_replica disable_tqdm debug".split(),
        "what is logged and shown",
    ),
    **dict.fromkeys(
        "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id".split(),
        "which dashboards show it",
    ),
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
        "when evaluations run: they draw no random number and change no learning rate",
    ),
    "per_device_eval_batch_size": "how many rows are evaluated at once, not which",
    "prediction_loss_only": "nothing but losses is kept either way",
    **dict.fromkeys(
        ("save_strategy", "save_steps", "save_total_limit"), "when checkpoints are saved, and which are kept"
    ),
    **dict.fromkeys(("push_to_hub", "hub_private_repo", "hub_model_id"), "where the run is published"),
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), "activations are computed again, the same"),
    "gradient_checkpointing_kwargs": "the older name of activation_checkpointing_kwargs, which is recorded",
    "activation_offloading": "where activations are held",
    "torch_empty_cache_steps": "when freed memory is returned",
    **dict.fromkeys(
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context".split(),
        "which processes read rows; their order is a function of seed and step",
    ),
    **dict.fromkeys(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout"
        " local_rank".split(),
        "how processes communicate; their number is in the layout",
    ),
    "accelerator_config": "non_blocking: how batches travel; every other entry is refused unless it is the default",
}


PREDICTIONS = "an evaluation keeps losses, not predictions"

KEPT = {  # {field: (the value that a verified run needs, the reason)}
    "dataloader_drop_last": (True, "an incomplete last batch would give runs on 1 and 2 processes different steps"),
    "dataloader_in_order": (True, "the order of the data is a function of seed and step"),
    "train_sampling_strategy": ("sequential", "the order of the data is a function of seed and step"),
    "length_column_name": (
        "length",
        "rows are not grouped by length: the order of the data is a function of seed and step",
    ),
    "label_names": (None, "this script sets the labels"),
    "label_smoothing_factor": (
        0.0,
        (
            "the loss is that of the tokens themselves, and Trainer's smoothing would shift targets that are shifted"
            " already"
        ),
    ),
    "average_tokens_across_devices": (True, "the loss would depend on the number of processes"),
    "optim_target_modules": (None, "no supported optimizer uses it"),
    "bf16_full_eval": (False, "evaluations are computed in --precision, as training is"),
    "fp16_full_eval": (False, "evaluations are computed in --precision, as training is"),
    "use_cache": (False, "the cache is for generation, and lets packed rows attend to each other"),
    "save_only_model": (False, "a checkpoint without optimizer state cannot be resumed exactly"),
    "save_on_each_node": (False, "only one process writes to the run folder"),
    "ignore_data_skip": (False, "a resumed run would read the first data again; use --resume_without data for that"),
    "load_best_model_at_end": (False, "the last model of the run is published"),
    "metric_for_best_model": (None, "no checkpoint is chosen by a metric: the last model of the run is published"),
    "greater_is_better": (None, "no checkpoint is chosen by a metric: the last model of the run is published"),
    "auto_find_batch_size": (False, "it would silently change the tokens per step"),
    "enable_jit_checkpoint": (False, "signals are handled by this script, on all ranks"),
    "restore_callback_states_from_checkpoint": (False, "it replaces the callbacks of a resumed run"),
    "hub_token": (None, "it would be visible in the list of processes: run `hf auth login`, or set HF_TOKEN"),
    "hub_strategy": ("every_save", "--publish_steps and --publish_training_state say what is published"),
    "hub_revision": (None, "checkpoints go to the branch `checkpoints`, the finished model to main"),
    "hub_always_push": (False, "the queue loses no checkpoint"),
    "torch_compile": (False, "use --compile_layers, which compiles the decoder layers"),
    "torch_compile_backend": (None, "use --compile_layers, which compiles the decoder layers"),
    "torch_compile_mode": (None, "use --compile_layers, which compiles the decoder layers"),
    "fsdp": (None, "the launcher sets the sharding: accelerate launch --config_file configs/accelerate/fsdp2.yaml"),
    "fsdp_config": (
        None,
        "the launcher sets the sharding: accelerate launch --config_file configs/accelerate/fsdp2.yaml",
    ),
    "deepspeed": (
        None,
        "the launcher sets the sharding: accelerate launch --config_file configs/accelerate/deepspeed_zero2.yaml",
    ),
    "parallelism_config": (
        None,
        "the launcher sets the parallel layout, see configs/accelerate",
    ),
    "logging_nan_inf_filter": (False, "it logs NaN as 0 and training goes on"),
    "skip_memory_metrics": (True, "every log entry has the peak memory already"),
    "do_predict": (False, "run_eval.py evaluates a finished model"),
    "eval_do_concat_batches": (True, PREDICTIONS),
    "eval_use_gather_object": (False, PREDICTIONS),
    "eval_accumulation_steps": (None, PREDICTIONS),
    "include_for_metrics": ([], PREDICTIONS),
    "batch_eval_metrics": (False, PREDICTIONS),
}


ACCELERATOR = {  # {entry of accelerator_config that must keep its default: the reason}
    "split_batches": "it divides each batch between the processes, which silently shrinks the step",
    "dispatch_batches": "every process reads its own rows",
    "even_batches": "every step has the same number of rows",
    "use_seedable_sampler": "the order of the data is a function of seed and step",
    "gradient_accumulation_kwargs": "accumulation follows from the size of the step",
    "use_configured_state": "the launcher sets the configuration",
}


def unknown_fields(training: "TrainingArguments", kept: dict) -> list[str]:
    """Fields that are not in these tables (of a later release) and differ from the library's default. kept: as KEPT,
    for the script.
    """
    library = next(kind for kind in type(training).__mro__ if not kind.__module__.startswith(__package__))
    known = {*HYPERPARAMETERS, *SFT_HYPERPARAMETERS, *ELSEWHERE, *FREE, *kept}
    unknown = {
        field.name: field
        for field in dataclasses.fields(library)
        if field.name not in known and field.default is not dataclasses.MISSING
    }
    return [name for name, field in unknown.items() if getattr(training, name) != field.default]


def accelerator_problems(config: "AcceleratorConfig") -> list[str]:
    """What is wrong in `accelerator_config`, as TrainingArguments parsed it."""
    default, found = type(config)().to_dict(), config.to_dict()
    return [
        f"accelerator_config.{name} must stay {default[name]}: {why}."
        for name, why in ACCELERATOR.items()
        if name in found and found[name] != default[name]
    ]


def switches(training: "TrainingArguments") -> dict:
    """The enabled options of transformers that change how it computes. A manifest without an entry was made without
    it.
    """
    on = {}
    if training.use_liger_kernel:
        on["liger"] = training.liger_kernel_config or True
    if training.full_determinism:
        on["full_determinism"] = True
    return on
