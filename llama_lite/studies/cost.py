"""What a study takes, before it is run: steps, tokens, disk and time of every run. Pure but for one matrix product;
nothing is trained.

Of a tuning run steps and tokens are at most that (rows that are too long are left out, others are shorter than
--max_length), and nothing is known of it before its base is there.
"""

import dataclasses
import functools
import shutil
from pathlib import Path

from ..config.pretrain import parse_pretrain
from ..config.sft import parse_sft
from ..data.dataset import count_windows
from ..data.shards import read_manifest
from ..files import read_json
from ..formatting import duration, size
from ..models.presets import count_parameters, flops_per_token, load_model_config
from ..training import derive_pretrain, derive_sft
from ..training.decisions import nice
from ..training.plan import run_steps, saved_steps
from .runner import is_done, is_other, seconds_of
from .spec import Study, StudyRun

MFU = 0.4  # share of the peak at which time is counted while no run is finished


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run; None where it cannot be known yet. flops: of its training; disk: bytes in the end."""

    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    disk: int | None = None


def cost(study: Study, one: StudyRun) -> Cost:
    """What one run takes, by its arguments."""
    return {"run_pretrain.py": _pretraining, "run_sft.py": _tuning}.get(study.script, lambda one: Cost())(one)


def _pretraining(one: StudyRun) -> Cost:
    model, data, _, _, run, training = parse_pretrain(one.argv)
    steps = training.max_steps
    if None in (model.model_config, run.block_size, run.tokens_per_step):
        return Cost()  # derived when the run begins
    if steps < 0:  # as many as the text has
        manifest = read_manifest(Path(data.prepared_dir)) if data.prepared_dir else None
        if manifest is None or "num_train_epochs" not in run.given:
            return Cost()
        steps = run_steps(
            training, count_windows(manifest, "train", run.block_size) * run.block_size // run.tokens_per_step
        )
    parameters, flops = _of_preset(model.model_config, run.block_size)
    if "save_total_limit" not in run.given:
        training.save_total_limit = derive_pretrain.checkpoints_kept(12 * parameters)
    kept = _kept(run, training, steps, derive_pretrain.EVALUATIONS, one.arm.at or 0)
    made = steps - (one.arm.at or 0)
    return Cost(
        made, made * run.tokens_per_step, flops * made * run.tokens_per_step, kept * 12 * parameters + 2 * parameters
    )


def _kept(run, training, steps: int, evaluations: int, first: int = 0) -> int:
    """Checkpoints that stay of a run of `steps` that begins at step `first`; saved as often as evaluated where no
    --save_steps are given.
    """
    if "save_steps" not in run.given:
        training.save_steps = nice(steps / evaluations)
    saves = sum(step > first for step in saved_steps(training, steps))
    return saves if training.save_total_limit is None else min(training.save_total_limit, saves)


@functools.cache
def _of_preset(name: str, length: int) -> tuple[int, float]:
    """(parameters, FLOPs a token) of a preset."""
    config = load_model_config(name)
    return count_parameters(config)[0], flops_per_token(config, length)


def _tuning(one: StudyRun) -> Cost:
    base, adapter, rows, _, run, training = parse_sft(one.argv)
    given = {"max_length", "sequences_per_step"} <= set(run.given) and (
        "max_steps" in run.given or {"num_train_epochs", "eval_rows"} <= set(run.given)
    )
    if rows.max_rows is None or not given or not (Path(base.model_name_or_path) / "config.json").is_file():
        return Cost()
    steps = training.max_steps
    if steps < 0:
        steps = run_steps(training, (rows.max_rows - rows.eval_rows) // run.sequences_per_step)
    tokens = steps * run.sequences_per_step * training.max_length
    parameters, flops = _of_preset(base.model_name_or_path, training.max_length)
    trained = _adapted(base.model_name_or_path, adapter) if adapter.use_lora else parameters
    kept = _kept(run, training, steps, derive_sft.EVALUATIONS)
    share = 2 / 3 if adapter.use_lora else 1  # no gradients of the frozen weights
    return Cost(steps, tokens, share * flops * tokens, kept * 12 * trained + 2 * trained)


def _adapted(base: str, adapter) -> int:
    """Weights that an adapter trains."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..training.lora import add_adapter

    with torch.device("meta"):
        model = add_adapter(
            AutoModelForCausalLM.from_config(load_model_config(base), trust_remote_code=False), adapter, base
        )
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lines(study: Study, every: list[StudyRun], out: Path) -> list[str]:
    """The runs, and what they take in all, as --dry_run shows them; a finished run's time is what it took, another's
    (~) follows from those.
    """
    costs = [cost(study, one) for one in every]
    took = [seconds_of(one) if is_done(one) else None for one in every]
    per_flop, per_run, source = _speed(study, costs, took, every)
    found, left, most = [], [], "<= " if study.script == "run_sft.py" else ""
    for one, it, seconds in zip(every, costs, took, strict=True):
        about = ""
        if not is_done(one):
            about, seconds = "~", it.flops * per_flop if it.flops and per_flop else per_run
            left.append(seconds)
        state = (
            "finished" if is_done(one) else "changed since it was run: will be run again" if is_other(one) else "to run"
        )
        steps, tokens = _or_unknown(it.steps, most + "{:,} steps"), _or_unknown(it.tokens, most + "{:,} tokens")
        disk, time = size(it.disk) if it.disk else "?", "?" if seconds is None else about + duration(seconds / 86_400)
        found.append(f"{one.folder.name:40} {steps:>12} {tokens:>20} {disk:>10} {time:>12}   {state}")
    tokens, disk = (sum(value for it in costs if (value := getattr(it, name))) for name in ("tokens", "disk"))
    unknown = sum(seconds is None for seconds in left)
    todo = (
        f"{duration(sum(filter(None, left)) / 86_400)} to come ({source})"
        if len(left) > unknown
        else "nothing to come"
        if not left
        else ""
    )
    more = f"of {unknown} runs nothing is known before a first one is finished" if unknown else ""
    free = shutil.disk_usage(next(parent for parent in (out, *out.absolute().parents) if parent.exists())).free
    of_tokens = f"{most}{tokens:,} tokens, " if tokens else ""
    found.append(
        f"in all    {len(every)} runs: {of_tokens}{size(disk)} of disk ({size(free)} free);"
        f" {', '.join(filter(None, (todo, more)))}"
    )
    if study.prepare:
        done = read_json(out / "prepare.json") or []
        found.append(
            f"prepare   {len(study.prepare)} commands before them,"
            f" {sum(a == b for a, b in zip(done, study.prepare, strict=False))} of them done"
        )
    if study.evaluate:
        found.append(
            "evaluate  all of them afterwards, with run_eval.py:"
            f" {', '.join(map(str, study.evaluate.get('tasks', ())))}"
        )
    needed = sum(it.disk or 0 for one, it in zip(every, costs, strict=True) if not is_done(one))
    if needed > free:
        found.append(
            f"WARNING   {size(needed)} of disk are needed and {size(free)} are free at {out}: give an --output_dir on a"
            " larger disk"
        )
    return found


def _speed(
    study: Study, costs: list[Cost], took: list, every: list[StudyRun]
) -> tuple[float | None, float | None, str]:
    """(seconds a FLOP, seconds a run, where both are from): of the finished runs, else of the peak of this machine."""
    finished = [(it, seconds) for it, seconds in zip(costs, took, strict=True) if seconds]
    if finished:
        flops = sum(it.flops or 0 for it, _ in finished)
        total = sum(seconds for _, seconds in finished)
        return total / flops if flops else None, total / len(finished), f"by {len(finished)} finished ones"
    if not any(it.flops for it in costs):
        return None, None, ""
    import torch

    from ..machine import hardware, precision

    run, training = (parse_pretrain if study.script == "run_pretrain.py" else parse_sft)(every[0].argv)[-2:]
    peak = hardware.peak_flops(precision.choose(run.precision, None, training.device)[0], training.device)
    source = (
        f"by FLOPs, at {MFU:.0%} of"
        f" {'what a matrix product reaches here' if training.device == torch.device('cpu') else 'the peak'}"
    )
    return (1 / (MFU * peak) if peak else None), None, f"{source}; starts, evaluations and saves come on top"


def _or_unknown(value, shape: str) -> str:
    return "?" if value is None else shape.format(value)
