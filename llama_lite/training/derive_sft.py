"""Arguments of a tuning run that the user did not give: derived from the run's record, the rows, the base model and
the machine, in this order.
"""

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedConfig

from ..chat_format.packing import Example, count_packs
from ..config.sft import SftArguments
from ..formatting import in_words, seconds_in_words
from ..kernels.probe import context_of
from ..machine.hardware import planning_constant
from ..models.presets import flops_per_token
from ..processes import seconds_since_start
from . import decisions, timing
from .plan import run_steps

EPOCHS = 3  # at most, of a run without a given number of steps or epochs
EVALUATED_SHARE = 0.2  # of that time, at most, in evaluations
EVALUATIONS = 8  # of a run
FINISH = 15.0  # seconds from here to the first step, and from the last step to the end; the answers not counted
HELD_SHARE, MOST_HELD = 0.1, 400
SAMPLED = 5000  # rows that are packed to see how many sequences they make
HELD_OUT = {"probe_rows": 8, "compared_prompts": 8, "sampled_answers": 64}  # numbers of held-out rows, at most
LORA_SHARE = 2 / 3  # fraction of the work of a training step: the frozen weights have no gradients
ANSWERS_AT_ONCE = 16
MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}  # tokens of a micro-batch, at most

RECORDED = (
    "dataset dataset_config dataset_split dataset_revision max_rows skip_held_out test_rows eval_rows max_length"
    " long_rows sequences_per_step per_device_train_batch_size learning_rate max_steps hours logging_steps eval_steps"
    " save_steps save_total_limit probe_rows compared_prompts sampled_answers answer_tokens precision"
).split()


def machine(groups: Sequence, explicit_args: dict, recorded: dict) -> tuple[dict, dict]:
    """({argument: value}, {argument: reason}) of the precision and of the recorded arguments of the run."""
    d = decisions.Decisions(groups, explicit_args)
    decisions.decide_precision(d, recorded.get("precision"), groups[-1].device)
    if "num_train_epochs" in d.fixed:
        recorded.pop("max_steps", None)
    for name, value in recorded.items():
        d.decide(name, value, "")
    return d.values(), d.reasons


def tuning(
    groups: Sequence, explicit_args: dict, earlier: dict, config: PreTrainedConfig, examples: list[Example]
) -> tuple[dict, dict]:
    """({argument: value}, {argument: reason}) of derived arguments of a tuning run over encoded rows (rank 0).

    earlier: what `machine` decided. config: of the base. examples: every usable row, of any length.
    """
    adapter, training = groups[1], groups[-1]
    d = decisions.Decisions(groups, {**explicit_args, **earlier})
    in_order = [len(example.input_ids) for example in examples]
    lengths = sorted(in_order)
    context, processes = context_of(config) or 2**30, training.world_size

    # ---- rows ----
    if not d.settled("max_length"):
        needed = -(-lengths[int(0.98 * (len(lengths) - 1))] // 32) * 32
        length = min(context, max(needed, decisions.TUNED_LENGTH))
        d.decide(
            "max_length",
            length,
            "the base's context" if length == context else f"98 % of the rows have at most {needed} tokens",
        )
    longer = sum(length > d["max_length"] for length in lengths) / len(lengths)
    if longer > 0.2:
        d.decide("long_rows", "truncate", f"{longer:.0%} of the rows are longer than that")
    held = max(1, min(MOST_HELD, round(HELD_SHARE * len(examples)), len(examples) - 1))
    why = f"a tenth of {len(examples):,} rows" if held < MOST_HELD else f"of {len(examples):,} rows"
    mean = sum(min(length, d["max_length"]) for length in lengths) / len(lengths)
    if not d.settled("max_steps") and not d.settled("num_train_epochs"):
        most = _rows_in_time(d, config, mean)
        held, why = (most, "so that evaluations take little time") if most < held else (held, why)
    asked, name = max((d[name] if d.settled(name) else 0, name) for name in HELD_OUT)
    if held < asked < len(examples):
        held, why = asked, f"for --{name} {asked}"
    d.decide("eval_rows", held, why)
    for name, most in HELD_OUT.items():
        d.decide(name, min(most, d["eval_rows"]), "")
    d.decide("answer_tokens", min(96, max(8, context // 2)), "")

    # ---- steps ----
    kept = [length for length in in_order if length <= d["max_length"] or d["long_rows"] != "drop"] or in_order
    used = max(1, len(kept) - d["eval_rows"])
    sequences = max(1, _packs(kept, d["max_length"], used) if training.packing else used)
    _settle_batch(d, sequences, training, processes)
    rate = float(f"{min(3e-3, 2e-4 * (2048 / config.hidden_size) ** 0.97) * (1 if adapter.use_lora else 0.25):.2g}")
    d.decide(
        "learning_rate",
        rate,
        f"for {'LoRA' if adapter.use_lora else 'all weights'} at a width of {config.hidden_size:,}",
    )
    if not d.settled("max_steps") and not d.settled("num_train_epochs"):
        _length(d, config, sequences, adapter.use_lora, mean)
    steps = max(1, run_steps(training, sequences / d["sequences_per_step"]))
    every = d.decide("eval_steps", decisions.nice(steps / EVALUATIONS), f"of {steps:,}")
    between = decisions.whole_interval(every, steps)
    d.decide("save_steps", *decisions.save_interval(between, decisions.revision_interval(d)))
    d.decide("logging_steps", max(1, decisions.nice(steps / 100)), "")
    return d.values(), d.reasons


def _packs(lengths: Sequence[int], max_length: int, rows: int) -> int:
    """The number of sequences of `max_length` tokens that `rows` rows are packed into, by a sample. lengths: of all, in
    their order, for TRL packs them part by part.
    """
    sample = [min(length, max_length) for length in lengths[:: -(-len(lengths) // SAMPLED)]]
    return round(count_packs(sample, max_length) * rows / len(sample))


def _settle_batch(d: decisions.Decisions, sequences: int, training: SftArguments, processes: int) -> None:
    """Sequences per step and per micro-batch, for about `sequences` rows or packs."""
    most = max(1, planning_constant(MICRO_TOKENS, training.device) // d["max_length"])
    accumulation, has_micro = decisions.given_accumulation(d), d.settled("per_device_train_batch_size")
    if not d.settled("sequences_per_step"):
        unit = processes * accumulation * (d["per_device_train_batch_size"] if has_micro else 1)
        wanted = 2 ** max(0, min(5, (max(1, sequences // 40)).bit_length() - 1))
        step = max(unit, wanted // unit * unit)
        if accumulation > 1:  # so many micro-batches, no larger than suits the device
            step = min(step, unit * (1 if has_micro else most))
        d.decide("sequences_per_step", step, f"of about {sequences:,} {'packs' if training.packing else 'rows'}")
    if not has_micro:
        share = max(1, d["sequences_per_step"] // processes)
        d.decide("per_device_train_batch_size", decisions.micro_batch(share, accumulation, most), "")


def _machine(d: decisions.Decisions) -> timing.Machine:
    """This machine, as a tuning run computes on it."""
    training, switches = d.owner["max_length"], {"fused_loss": False, "block_attention": False}
    return timing.Machine(training.device, d["precision"], switches, training.world_size)


def _rows_in_time(d: decisions.Decisions, config, mean: float) -> int:
    """Rows of `mean` tokens whose evaluations take EVALUATED_SHARE of the run, by a guess from FLOPs; at least 8."""
    row = flops_per_token(config, d["max_length"]) / 3 * mean / _machine(d).flops_per_second  # without gradients
    hours = d["hours"] if d.settled("hours") else decisions.DEFAULT_HOURS
    return max(8, int(EVALUATED_SHARE * hours * 3600 / EVALUATIONS / row))


def _length(d: decisions.Decisions, config, sequences: int, lora: bool, mean: float) -> None:
    """Steps: three epochs, or what the time allows. mean: tokens of a row."""
    training, machine = d.owner["max_length"], _machine(d)
    pace = machine.pace(config, d["per_device_train_batch_size"], d["max_length"])
    share = LORA_SHARE if lora else 1
    micro_batches = d["sequences_per_step"] / (d["per_device_train_batch_size"] * training.world_size)
    step = share * micro_batches * pace.micro_batch + pace.optimizer * share
    answers = 2 * d["answer_tokens"] * pace.token * 1.5 * (2 * -(-d["sampled_answers"] // ANSWERS_AT_ONCE) + 1)
    evaluations = (EVALUATIONS + 2) * d["eval_rows"] * pace.window * mean / d["max_length"]
    hours = d["hours"] if d.settled("hours") else decisions.DEFAULT_HOURS
    seconds = max(10.0, hours * 3600 - seconds_since_start() - FINISH - answers - evaluations)
    per_epoch = sequences / d["sequences_per_step"]
    most = EPOCHS * per_epoch
    steps = max(1, int(min(most, seconds / step)))
    if steps >= int(most):
        reason = (
            f"{EPOCHS} epochs, in {seconds_in_words(steps * step)}: with more, a model begins to know the rows by heart"
            " (another length: --num_train_epochs 5)"
        )
    else:
        reason = (
            f"{in_words(hours)} here, {steps / per_epoch:.1f} epochs; another length:"
            " --hours 1, or --num_train_epochs 3"
        )
    d.decide("max_steps", steps, reason)


def fit(groups: Sequence, explicit_args: dict, held: int) -> None:
    """Lower derived numbers of rows to the `held` rows that are held out after rows were dropped."""
    run = groups[-2]
    for name in HELD_OUT:
        if name not in explicit_args:
            setattr(run, name, max(1, min(getattr(run, name), held)))


def settings(groups: Sequence) -> dict:
    """The settled arguments that define a run, for its record."""
    return {
        field.name: getattr(group, field.name)
        for group in groups
        for field in dataclasses.fields(group)
        if field.name in RECORDED
    }
