"""Cost of a study before it is run: steps, tokens, disk and time of every run. Nothing is trained; one matrix product
is timed.

Steps and tokens of a tuning run are upper bounds (rows that are too long are dropped, others are shorter than
--max_length), and unknown until its base exists.
"""

import dataclasses
import functools
import shutil
from pathlib import Path

from transformers import TrainingArguments

from ..config.common import CommonRunArguments
from ..config.pretrain import parse_pretrain
from ..config.sft import AdapterArguments, parse_sft
from ..data.dataset import count_windows
from ..data.shards import read_manifest
from ..files import read_json
from ..formatting import duration, size
from ..models.presets import count_parameters, flops_per_token, load_model_config
from ..training import derive_schedule, derive_sft
from ..training.decisions import nice
from ..training.plan import run_steps, saved_steps
from .runner import is_done, is_other, seconds_of
from .spec import Study, StudyRun

MFU = 0.4  # fraction of the peak FLOP/s that is assumed while no run is finished


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one run; None where it is not known yet. flops: of training; disk: bytes at the end."""

    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    disk: int | None = None


def cost(study: Study, study_run: StudyRun) -> Cost:
    """Cost of one run, from its arguments."""
    return {"run_pretrain.py": _pretraining, "run_sft.py": _tuning}.get(study.script, lambda _: Cost())(study_run)


def _pretraining(study_run: StudyRun) -> Cost:
    """Cost of a pretraining run."""
    model, data, _, _, run, training = parse_pretrain(study_run.argv)
    steps = training.max_steps
    if None in (model.model_config, run.block_size, run.tokens_per_step):
        return Cost()  # derived when the run begins
    if steps < 0:  # as many as the text has
        manifest = read_manifest(Path(data.prepared_dir)) if data.prepared_dir else None
        if manifest is None or "num_train_epochs" not in run.explicit_args:
            return Cost()
        steps = run_steps(
            training, count_windows(manifest, "train", run.block_size) * run.block_size // run.tokens_per_step
        )
    parameters, flops = _model_cost(model.model_config, run.block_size)
    if "save_total_limit" not in run.explicit_args:
        if "save_steps" not in run.explicit_args:
            training.save_steps = nice(steps / derive_schedule.EVALUATIONS)
        training.save_total_limit = derive_schedule.checkpoints_kept(12 * parameters, len(saved_steps(training, steps)))
    first_step = study_run.arm.at or 0
    kept = _checkpoints_kept(run, training, steps, derive_schedule.EVALUATIONS, first_step)
    own_steps = steps - first_step
    return Cost(
        own_steps,
        own_steps * run.tokens_per_step,
        flops * own_steps * run.tokens_per_step,
        kept * 12 * parameters + 2 * parameters,
    )


def _checkpoints_kept(
    run: CommonRunArguments, training: TrainingArguments, steps: int, evaluations: int, first: int = 0
) -> int:
    """Checkpoints that are kept of a run of `steps` that begins at step `first`; saved as often as evaluated where no
    --save_steps are given.
    """
    if "save_steps" not in run.explicit_args:
        training.save_steps = nice(steps / evaluations)
    saves = sum(step > first for step in saved_steps(training, steps))
    return saves if training.save_total_limit is None else min(training.save_total_limit, saves)


@functools.cache
def _model_cost(name: str, length: int) -> tuple[int, float]:
    """(parameters, FLOPs per token) of a preset or a model's folder, for sequences of `length` tokens."""
    config = load_model_config(name)
    return count_parameters(config)[0], flops_per_token(config, length)


def _tuning(study_run: StudyRun) -> Cost:
    """Cost of a tuning run, at most."""
    base, adapter, rows, _, run, training = parse_sft(study_run.argv)
    is_known = {"max_length", "sequences_per_step"} <= set(run.explicit_args) and (
        "max_steps" in run.explicit_args or {"num_train_epochs", "eval_rows"} <= set(run.explicit_args)
    )
    if rows.max_rows is None or not is_known or not (Path(base.model_name_or_path) / "config.json").is_file():
        return Cost()
    steps = training.max_steps
    if steps < 0:
        steps = run_steps(training, (rows.max_rows - rows.eval_rows) // run.sequences_per_step)
    tokens = steps * run.sequences_per_step * training.max_length
    parameters, flops = _model_cost(base.model_name_or_path, training.max_length)
    trained = _adapter_parameters(base.model_name_or_path, adapter) if adapter.use_lora else parameters
    kept = _checkpoints_kept(run, training, steps, derive_sft.EVALUATIONS)
    fraction = derive_sft.LORA_SHARE if adapter.use_lora else 1
    return Cost(steps, tokens, fraction * flops * tokens, kept * 12 * trained + 2 * trained)


def _adapter_parameters(base: str, adapter: AdapterArguments) -> int:
    """Number of weights that an adapter trains, which its dropout (impossible on experts) does not change."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..training.lora import add_adapter

    with torch.device("meta"):
        model = add_adapter(
            AutoModelForCausalLM.from_config(load_model_config(base), trust_remote_code=False),
            dataclasses.replace(adapter, lora_dropout=0.0),
            base,
        )
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lines(study: Study, every: list[StudyRun], out: Path) -> list[str]:
    """The runs and their total cost, as --dry_run shows them. The time of a finished run was measured; that of another
    (~) is estimated.
    """
    costs = [cost(study, study_run) for study_run in every]
    finished = [is_done(study_run) for study_run in every]
    times = [seconds_of(study_run) if done else None for study_run, done in zip(every, finished, strict=True)]
    per_flop, per_run, source = _speed(study, costs, times, every)
    bound = "<= " if study.script == "run_sft.py" else ""
    table, remaining = [], []
    for study_run, one_cost, done, seconds in zip(every, costs, finished, times, strict=True):
        if not done:
            seconds = one_cost.flops * per_flop if one_cost.flops and per_flop else per_run
            remaining.append(seconds)
        table.append(_run_line(study_run, one_cost, done, seconds, bound))
    free = shutil.disk_usage(next(parent for parent in (out, *out.absolute().parents) if parent.exists())).free
    steps, tokens, disk = (
        sum(value for it in costs if (value := getattr(it, name))) for name in ("steps", "tokens", "disk")
    )
    token_total = f"{bound}{steps:,} steps, {bound}{tokens:,} tokens, " if tokens else ""
    table.append(
        f"in all    {len(every)} runs: {token_total}{size(disk)} of disk ({size(free)} free);"
        f" {_remaining_time(remaining, source)}"
    )
    if study.prepare:
        done_commands = read_json(out / "prepare.json") or []
        table.append(
            f"prepare   {len(study.prepare)} commands before them,"
            f" {sum(a == b for a, b in zip(done_commands, study.prepare, strict=False))} of them done"
        )
    if study.evaluate:
        table.append(
            "evaluate  all of them afterwards, with run_eval.py:"
            f" {', '.join(map(str, study.evaluate.get('tasks', ())))}"
        )
    needed = sum(it.disk or 0 for it, done in zip(costs, finished, strict=True) if not done)
    if needed > free:
        table.append(
            f"WARNING   {size(needed)} of disk are needed and {size(free)} are free at {out}: give an --output_dir on a"
            " larger disk"
        )
    return table


def _run_line(study_run: StudyRun, one_cost: Cost, done: bool, seconds: float | None, bound: str) -> str:
    """One run in the table of --dry_run. bound: the sign before steps and tokens that are upper bounds."""
    state = "finished" if done else "changed since it was run: will be run again" if is_other(study_run) else "to run"
    steps = _or_unknown(one_cost.steps, bound + "{:,} steps")
    tokens = _or_unknown(one_cost.tokens, bound + "{:,} tokens")
    disk = size(one_cost.disk) if one_cost.disk else "?"
    time = "?" if seconds is None else ("" if done else "~") + duration(seconds / 86_400)
    return f"{study_run.folder.name:40} {steps:>12} {tokens:>20} {disk:>10} {time:>12}   {state}"


def _remaining_time(seconds: list[float | None], source: str) -> str:
    """Time of the runs that are not finished, in words. seconds: of each, None where unknown; source: of the
    estimate.
    """
    unknown = sum(value is None for value in seconds)
    total = (
        f"{duration(sum(filter(None, seconds)) / 86_400)} to come ({source})"
        if len(seconds) > unknown
        else "nothing to come"
        if not seconds
        else ""
    )
    unknown_runs = f"of {unknown} runs nothing is known before a first one is finished" if unknown else ""
    return ", ".join(filter(None, (total, unknown_runs)))


def _speed(
    study: Study, costs: list[Cost], times: list[float | None], every: list[StudyRun]
) -> tuple[float | None, float | None, str]:
    """(seconds per FLOP, seconds per run, source of both): from the finished runs, else from the peak FLOP/s of this
    machine. times: seconds of finished runs.
    """
    finished = [(it, seconds) for it, seconds in zip(costs, times, strict=True) if seconds]
    if finished:
        flops = sum(it.flops or 0 for it, _ in finished)
        total = sum(seconds for _, seconds in finished)
        return total / flops if flops else None, total / len(finished), f"by {len(finished)} finished ones"
    if not any(it.flops for it in costs):
        return None, None, ""
    from ..machine import hardware, precision

    run, training = (parse_pretrain if study.script == "run_pretrain.py" else parse_sft)(every[0].argv)[-2:]
    chosen, device = precision.choose(run.precision, None, training.device)[0], training.device
    is_peak = device.type != "cpu" and hardware.peak_flops(chosen, device)
    source = f"by FLOPs, at {MFU:.0%} of {'the peak' if is_peak else 'what a matrix product reaches here'}"
    speed = MFU * hardware.reachable_flops(chosen, device)
    return 1 / speed, None, f"{source}; starts, evaluations and saves come on top"


def _or_unknown(value: int | None, template: str) -> str:
    """A value in a template, "?" for None."""
    return "?" if value is None else template.format(value)
