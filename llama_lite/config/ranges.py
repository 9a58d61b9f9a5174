"""The valid range of every numeric argument. NaN and infinity are always refused."""

import math
import os
import re

SEEDS = 2**32  # numpy's, which Trainer sets, too


def _at_least(least: float):
    """A range: (function that checks a value, the rule in words)."""
    return (lambda value: value >= least), f"at least {least}"


ABOVE_0 = (lambda value: value > 0), "above 0"
BELOW_1 = (lambda value: 0 <= value < 1), "at least 0 and below 1"
SEED = (lambda value: 0 <= value < SEEDS), f"from 0 to {SEEDS - 1:,}"

INTERVAL = (
    (lambda value: value > 0 and (value < 1 or value == int(value))),
    "a whole number of steps, or a share of the run between 0 and 1",
)


RANGES = {
    **dict.fromkeys(
        # sizes and counts: data
        "max_bytes shard_tokens validation_tokens max_tokens prepare_workers max_characters "
        # run
        "cpu_threads schedule_steps block_size tokens_per_step eval_windows probe_windows eval_task_limit publish_steps"
        " sequences_per_step probe_rows sampled_answers answer_tokens eval_rows r lora_alpha"
        " stop_after_step audit_random audit_tokens "
        # TrainingArguments
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps torch_empty_cache_steps"
        " dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout "
        # evaluation
        "limit variant_limit batch_tokens".split(),
        _at_least(1),
    ),
    **dict.fromkeys(
        "min_characters sample_tokens compared_prompts hub_drain_timeout step_timeout weight_decay max_grad_norm"
        " eval_delay dataloader_num_workers test_rows".split(),
        _at_least(0),
    ),
    **dict.fromkeys(
        "hours peak_flops publish_queue_limit learning_rate adam_epsilon num_train_epochs neftune_noise_alpha".split(),
        ABOVE_0,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), BELOW_1),
    **dict.fromkeys(("seed", "data_seed", "audit_seed"), SEED),
    **dict.fromkeys(("logging_steps", "eval_steps"), INTERVAL),
    "save_steps": (lambda value: value == 0 or INTERVAL[0](value), f"{INTERVAL[1]} (0: only at the end)"),
    **dict.fromkeys(("min_score", "min_language_score"), (lambda value: True, "a number")),
    "vocab_size": (lambda value: value >= 257, "at least 257 (256 bytes and the end-of-text)"),
    "save_total_limit": (
        (lambda value: value >= 1),
        "at least 1: the last checkpoint always stays (or `none`, to keep all of them)",
    ),
    "max_rows": _at_least(2),
    "max_length": (lambda value: value >= 8, "at least 8 to hold a conversation"),
    "plan_price": (lambda value: value >= 0, "at least 0: dollars per GPU and hour"),
    "plan_mfu": (lambda value: 0 < value <= 100, "above 0 and at most 100: the share of peak FLOPs in percent"),
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1 (or -1: as many as --num_train_epochs make)"),
    "warmup_steps": (
        lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
        "a whole number of steps, or a share of the run below 1",
    ),
}


def range_problems(values: dict) -> list[str]:
    """One sentence for each number outside its range. values: {argument: value}; values that are not numbers are
    skipped.
    """
    problems = []
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        is_valid, rule = RANGES.get(name, (lambda value: True, "a number"))
        if not math.isfinite(value):
            problems.append(f"--{name} {value} is not a number: it must be {rule}.")
        elif not is_valid(value):
            problems.append(f"--{name} {value if isinstance(value, int) else f'{value:g}'} must be {rule}.")
    return problems


LISTS = (
    "models tasks eval_tasks sensitivity robustness variant_models num_fewshot task_data texts target_modules"
    " file_types mixture validation allow_epochs_of"
).split()  # of names and places; texts of a person (prompts) hold commas


def comma_problems(values: dict) -> list[str]:
    """One sentence for each item of a list that is several, separated by commas. values: {argument: value}. A place
    that is there may hold commas.
    """

    def is_several(item: str) -> bool:
        parts = [part for part in re.split("[+=@]", item) if "," in part]
        return bool(parts) and not all(os.path.exists(os.path.expanduser(part)) for part in parts)

    return [
        f"--{name} {item}: separate the items of a list by spaces, not commas: --{name}"
        f" {' '.join(part.strip() for part in item.split(',') if part.strip())} (in YAML"
        f" [{', '.join(part.strip() for part in item.split(',') if part.strip())}])."
        for name in LISTS
        for item in values.get(name) or []
        if is_several(item)
    ]
