"""The arithmetic of a run: parameters, tokens, steps, accumulation, FLOPs, disk. Pure; nothing is allocated."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..config import schedules
from ..data.dataset import count_windows
from ..errors import Refusal
from ..formatting import size
from ..kernels.probe import context_of
from ..models.presets import count_parameters, flops_per_token
from .data_plan import cost_lines, set_rows, source_lines, source_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

    from ..chat_format.packing import Example
    from ..config.common import CommonRunArguments
    from ..config.pretrain import RunArguments
    from ..config.sft import TuningArguments

STATE_BYTES = 4 * 2**20  # of a checkpoint beside weights and moments: tokenizer and trainer state


def accumulation_steps(tokens_per_step: int, block_size: int, micro_batch: int, processes: int) -> int:
    """Micro-batches that each process accumulates per step. Raises Refusal with the nearest sizes that divide."""
    micro_tokens = block_size * micro_batch * processes
    if tokens_per_step % micro_tokens == 0:
        return tokens_per_step // micro_tokens
    windows = tokens_per_step / (block_size * processes)
    divisors = [count for count in range(1, 4 * micro_batch + 1) if windows % count == 0]
    nearest = sorted(sorted(divisors, key=lambda count: abs(count - micro_batch))[:3])
    below, above = tokens_per_step // micro_tokens * micro_tokens, (tokens_per_step // micro_tokens + 1) * micro_tokens
    steps = " or ".join(f"{tokens:,}" for tokens in (below, above) if tokens)
    batches = f"--per_device_train_batch_size {' or '.join(map(str, nearest))}, or " if nearest else ""
    raise Refusal(
        f"--tokens_per_step {tokens_per_step:,} is not a whole number of micro-batches of {micro_tokens:,} tokens"
        f" ({processes} process(es) x {micro_batch} windows x {block_size}). Nearest that divide:"
        f" {batches}--tokens_per_step {steps}."
    )


def run_steps(training: TrainingArguments, steps_per_epoch: float) -> int:
    """Optimizer steps of a run: --max_steps, else --num_train_epochs of `steps_per_epoch`, cut to whole ones."""
    return training.max_steps if training.max_steps > 0 else int(training.num_train_epochs * steps_per_epoch)


def intervals(training: TrainingArguments, steps: int) -> dict[str, int]:
    """Steps between logged losses, evaluations and checkpoints (`logging`, `eval`, `save`) of a run of `steps`, as
    Trainer counts them.

    A fraction (below 1) is of all steps, rounded up. What only happens at the end of the run (strategy `no`, or an
    interval of 0) has the interval `steps`.
    """
    from transformers import TrainerState

    state = TrainerState()
    state.compute_steps(training, steps)
    configured = {
        kind: getattr(training, f"{kind}_strategy") == "steps" and getattr(state, f"{kind}_steps")
        for kind in ("logging", "eval", "save")
    }
    return {kind: int(every) if every else steps for kind, every in configured.items()}


def saved_steps(training: TrainingArguments, steps: int) -> list[int]:
    """Steps at which a run of `steps` saves checkpoints: each multiple of the interval, and the last step."""
    return sorted({*range(every := intervals(training, steps)["save"], steps + 1, every), steps})


def check_publish_steps(training: TrainingArguments, steps: int, publish_steps: int | None, state: str = "all") -> None:
    """Raise Refusal for a --publish_steps that is not a multiple of the steps between checkpoints, or a number of steps
    in --publish_training_state (`state`) that is not one of those between revisions.
    """
    save = intervals(training, steps)["save"]
    if publish_steps is not None and publish_steps % save and save < steps:
        raise Refusal(
            f"--publish_steps {publish_steps} is not a multiple of the {save} steps between checkpoints (--save_steps"
            f" {training.save_steps:g}): only saved checkpoints can be published."
        )
    between = publish_steps or save
    if state.isdigit() and int(state) % between and between < steps:
        raise Refusal(
            f"--publish_training_state {state} is no multiple of the {between} steps between published revisions: only"
            " they can carry training state."
        )


def at_once(plan: Plan | TuningPlan) -> int:
    """Most checkpoints of a plan on disk at the same time: those that are kept, and the next one."""
    return plan.saves if plan.checkpoints_kept is None else min(plan.saves, plan.checkpoints_kept + 1)


def plan_warmup(run: CommonRunArguments, training: TrainingArguments, steps: int) -> int:
    """Warm-up steps of a run of `steps`. Raises Refusal for a schedule that does not fit the run.

    A run that --max_steps on the command line cuts shorter than the warm-up of its YAML file is a trial: its plan holds
    a warning.
    """
    if problems := schedules.plan_problems(
        training, steps, "max_steps" in run.typed and "warmup_steps" not in run.typed, run.schedule_steps
    ):
        raise Refusal(" ".join(problems))
    return training.get_warmup_steps(run.schedule_steps or steps)


def warmup_lines(warmup: int, steps: int) -> list[str]:
    """The warning of a plan whose warm-up is longer than the run; else nothing."""
    return (
        [f"WARNING             {warmup:,} steps of warm-up: the run ends before its peak learning rate"]
        if warmup > steps
        else []
    )


@dataclasses.dataclass
class Plan:
    """Every derived number of a run. Sizes in bytes; FLOPs per token for forward and backward (attention included)."""

    parameters: int
    embedding_parameters: int
    flops_per_token: int
    processes: int
    micro_batch: int
    accumulation: int
    windows_per_step: int
    tokens_per_step: int
    windows: int
    epoch_windows: int
    steps: int
    steps_per_epoch: int
    checkpoint_bytes: int
    model_bytes: int
    checkpoints_kept: int | None
    saves: int  # checkpoints that are saved, of which at most `checkpoints_kept` are kept
    warmup: int = 0
    sources: list[dict] = dataclasses.field(default_factory=list)  # of a mixture: name, weight, tokens, epochs
    validation_sets: list[dict] = dataclasses.field(default_factory=list)  # name, windows and probe windows of each set
    block_size: int = 0
    evaluations: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on, repeated ones included."""
        return self.steps * self.tokens_per_step

    def lines(self) -> list[str]:
        """The plan as text, one subject per line."""
        unused = self.windows - self.epoch_windows
        return [
            (
                f"parameters          {self.parameters:,} ({self.parameters - self.embedding_parameters:,} in the"
                f" layers, {self.embedding_parameters:,} in the embeddings)"
            ),
            (
                f"tokens per step     {self.tokens_per_step:,} = {self.processes} process(es) x {self.micro_batch}"
                f" windows x {self.accumulation} accumulated x {self.tokens_per_step // self.windows_per_step} tokens"
            ),
            f"one epoch           {self.steps_per_epoch:,} steps,"
            f" {self.epoch_windows * self.tokens_per_step // self.windows_per_step:,} tokens"
            + (
                " (before any folder is read a second time)"
                if self.sources
                else f" (cut to whole steps: {unused} of {self.windows:,} windows are left out)"
                if unused
                else ""
            ),
            (
                f"the run             {self.steps:,} steps, {self.tokens:,} tokens,"
                f" {self.steps / self.steps_per_epoch:.2f} epochs, {self.tokens / self.parameters:.1f} tokens per"
                " parameter"
            ),
            *source_lines(self.sources),
            *cost_lines(self.validation_sets, self.sources, self.block_size, self.evaluations, self.tokens),
            (
                f"compute             {self.flops_per_token / 1e9:.3f} GFLOP per token,"
                f" {self.flops_per_token * self.tokens:.3e} FLOP in all"
            ),
            *warmup_lines(self.warmup, self.steps),
            (
                f"disk                {size(self.checkpoint_bytes)} per checkpoint, {at_once(self)} at most at once:"
                f" {size(self.checkpoint_bytes * at_once(self))}; finished model {size(self.model_bytes)}"
            ),
        ]


def make_plan(
    config: PreTrainedConfig,
    manifest: dict,
    run: RunArguments,
    training: TrainingArguments,
    publish_bytes: int = 2,
    processes: int | None = None,
) -> Plan:
    """Plan of a pretraining run over a prepared folder. Raises Refusal for what cannot work.

    manifest: the prepared folder's. publish_bytes: per weight of the finished model. processes: those of the planned
    launch; by default those of this one.
    """
    processes = processes or training.world_size
    accumulation = plan_accumulation(config, manifest, run, training, processes)
    windows = count_windows(manifest, "train", run.block_size)
    windows_per_step = run.tokens_per_step // run.block_size
    epoch_windows = windows // windows_per_step * windows_per_step
    if not epoch_windows:
        raise Refusal(
            f"the training text has {windows:,} windows of {run.block_size} tokens and one step takes"
            f" {windows_per_step:,}: {_way_to_a_step(windows, run, training, processes)}, or add more text."
        )
    steps_per_epoch = epoch_windows // windows_per_step
    steps = plan_steps(run, training, steps_per_epoch, windows_per_step, "mixture" in manifest)
    warmup = plan_warmup(run, training, steps)
    check_validation_windows(manifest, run)
    parameters, embeddings = count_parameters(config)
    return Plan(
        parameters=parameters,
        embedding_parameters=embeddings,
        flops_per_token=flops_per_token(config, run.block_size),
        processes=processes,
        micro_batch=training.per_device_train_batch_size,
        accumulation=accumulation,
        windows_per_step=windows_per_step,
        tokens_per_step=run.tokens_per_step,
        windows=windows,
        epoch_windows=epoch_windows,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        checkpoint_bytes=parameters * 12 + STATE_BYTES,  # float32 weights and two moments
        model_bytes=parameters * publish_bytes,
        checkpoints_kept=training.save_total_limit,
        saves=len(saved_steps(training, steps)),
        warmup=warmup,
        sources=source_rows(manifest, run.block_size, steps * windows_per_step),
        validation_sets=set_rows(manifest, run.block_size, run.eval_windows, run.probe_windows),
        block_size=run.block_size,
        evaluations=count_evaluations(training, steps),
    )


def _way_to_a_step(windows: int, run: RunArguments, training: TrainingArguments, processes: int) -> str:
    """What makes a step of a text of so few windows possible."""
    unit = training.per_device_train_batch_size * processes
    if not windows:
        return "lower --block_size or --validation_tokens"
    if windows >= unit and training.gradient_accumulation_steps > 1:
        both = " and --tokens_per_step" if "tokens_per_step" in run.explicit_args else ""
        return f"lower --gradient_accumulation_steps{both}"
    if windows >= unit:
        return f"lower --tokens_per_step to {windows // unit * unit * run.block_size:,} or less"
    if training.per_device_train_batch_size > 1:
        return "lower --per_device_train_batch_size"
    return f"lower --block_size, or use fewer than {processes} processes"


def count_evaluations(training: TrainingArguments, steps: int) -> int:
    """Evaluations of a run of `steps`: at each multiple of the interval, and at the last step."""
    return -(-steps // intervals(training, steps)["eval"])


def plan_accumulation(
    config: PreTrainedConfig, manifest: dict, run: RunArguments, training: TrainingArguments, processes: int
) -> int:
    """Micro-batches that each process accumulates per step. Raises Refusal with every problem of vocabulary, context
    and step size.
    """
    problems = []
    vocab_size = manifest["tokenizer"]["vocab_size"]
    if vocab_size > config.vocab_size:
        problems.append(
            f"the tokenizer has {vocab_size:,} ids and the model's vocabulary is {config.vocab_size:,}: choose a"
            f" model_config with vocab_size of at least {vocab_size:,}, or a smaller tokenizer."
        )
    if (context := context_of(config)) and run.block_size > context:
        problems.append(
            f"--block_size {run.block_size} is above the model's context of {context} (max_position_embeddings): make"
            " it smaller."
        )
    try:
        accumulation = accumulation_steps(
            run.tokens_per_step, run.block_size, training.per_device_train_batch_size, processes
        )
    except Refusal as refusal:
        problems.append(str(refusal))
    if problems:
        raise Refusal(" ".join(problems))
    check_accumulation(training, accumulation, "--tokens_per_step", f"{run.tokens_per_step:,}")
    return accumulation


def check_accumulation(training: TrainingArguments, accumulation: int, flag: str, value: str) -> None:
    """Raise Refusal for a --gradient_accumulation_steps other than the one that follows from `flag` `value`."""
    if training.gradient_accumulation_steps not in (1, accumulation):
        raise Refusal(
            f"--gradient_accumulation_steps {training.gradient_accumulation_steps} contradicts {flag} {value}, which"
            f" gives {accumulation} here: leave it out."
        )


def plan_steps(
    run: RunArguments, training: TrainingArguments, steps_per_epoch: int, windows_per_step: int, is_mixture: bool
) -> int:
    """Optimizer steps of a pretraining run. Raises Refusal for more than one epoch without --allow_epochs, which the
    folders of a mixture are asked for one by one (`mixture.check_epochs`), and for less than one step.
    """
    steps = run_steps(training, steps_per_epoch)
    if steps > steps_per_epoch and not run.allow_epochs and not is_mixture:
        raise Refusal(
            f"{steps:,} steps need {steps * windows_per_step:,} windows and the training text has"
            f" {steps_per_epoch * windows_per_step:,} ({steps_per_epoch:,} whole steps): lower --max_steps to"
            f" {steps_per_epoch:,}, add more text, or read it again with --allow_epochs."
        )
    check_one_step(training, steps, steps_per_epoch)
    return steps


def check_one_step(training: TrainingArguments, steps: int, steps_per_epoch: int) -> None:
    """Raise Refusal for --num_train_epochs of less than one step."""
    if steps < 1:
        raise Refusal(
            f"--num_train_epochs {training.num_train_epochs} is less than one step ({1 / steps_per_epoch:.4f} epochs)."
        )


def check_validation_windows(manifest: dict, run: RunArguments) -> None:
    """Raise Refusal for a validation slice with fewer windows than evaluations or the probe need."""
    for part in manifest.get("mixture", []):
        if not count_windows(part, "validation", run.block_size):
            raise Refusal(
                f"--mixture: {part['name']} holds out {part['splits']['validation']['tokens']:,} tokens, less than one"
                f" window of {run.block_size}: prepare it with more --validation_tokens, or lower --block_size."
            )
    for name, part in manifest.get("validation_sets", {}).items():
        if not count_windows(part, "validation", run.block_size):
            raise Refusal(
                f"--validation {name}: it holds out {part['splits']['validation']['tokens']:,} tokens, less than one"
                f" window of {run.block_size}: prepare it with more --validation_tokens, or lower --block_size."
            )
    windows = count_windows(manifest, "validation", run.block_size)
    if not windows:
        raise Refusal(
            f"the validation slice has {manifest['splits']['validation']['tokens']:,} tokens, less than one window of"
            f" {run.block_size}: lower --block_size, or prepare with more --validation_tokens."
        )
    needed, name = max((getattr(run, name) or 1, name) for name in ("eval_windows", "probe_windows"))
    if windows < needed:
        raise Refusal(
            f"--{name} {needed}: the validation slice has {windows} windows of {run.block_size} tokens, and {needed}"
            " are asked for. Lower it, or prepare with more --validation_tokens."
        )


@dataclasses.dataclass
class TuningPlan:
    """Every derived number of a tuning run. Sizes in bytes; `sequences` are rows, or packs of rows."""

    parameters: int
    trained: int  # parameters that are trained
    rows: int
    tokens: int
    learnt_tokens: int  # tokens that are labels (this name is in run.json)
    held_rows: int  # held-out rows (this name is in run.json)
    sequences: int
    sequences_per_step: int
    processes: int
    micro_batch: int
    accumulation: int
    steps: int
    steps_per_epoch: int
    checkpoint_bytes: int
    checkpoints_kept: int | None
    saves: int
    warmup: int = 0

    def lines(self) -> list[str]:
        """The plan as text, one subject per line."""
        unused = self.sequences - self.steps_per_epoch * self.sequences_per_step
        return [
            (
                f"parameters          {self.parameters:,}, of which {self.trained:,} are tuned"
                f" ({self.trained / self.parameters:.2%})"
            ),
            (
                f"rows                {self.rows:,} in {self.sequences:,} sequences, {self.tokens:,} tokens, of which"
                f" {self.learnt_tokens:,} are trained on; {self.held_rows:,} held out"
            ),
            (
                f"sequences per step  {self.sequences_per_step} = {self.processes} process(es) x {self.micro_batch} x"
                f" {self.accumulation} accumulated"
            ),
            f"the run             {self.steps:,} steps, {self.steps / self.steps_per_epoch:.2f} epochs of"
            f" {self.steps_per_epoch:,} steps"
            + (f" (cut to whole steps: {unused} of {self.sequences:,} sequences are left out)" if unused else ""),
            *warmup_lines(self.warmup, self.steps),
            (
                f"disk                {size(self.checkpoint_bytes)} per checkpoint, {at_once(self)} at most at once:"
                f" {size(self.checkpoint_bytes * at_once(self))}"
            ),
        ]


def plan_tuning(
    model: PreTrainedModel,
    train_rows: list[Example],
    eval_rows: list[Example],
    sequences: int,
    run: TuningArguments,
    training: TrainingArguments,
) -> TuningPlan:
    """Plan of a tuning run over `sequences` rows or packs. Raises Refusal for what cannot work."""
    per_step = run.sequences_per_step
    micro_sequences = training.per_device_train_batch_size * training.world_size
    if per_step % micro_sequences:
        below = per_step // micro_sequences * micro_sequences
        nearest = " or ".join(str(count) for count in (below, below + micro_sequences) if count)
        raise Refusal(
            f"--sequences_per_step {per_step} is not a whole number of micro-batches of {micro_sequences}"
            f" ({training.world_size} process(es) x {training.per_device_train_batch_size}): {nearest} is, or another"
            " --per_device_train_batch_size."
        )
    accumulation = per_step // micro_sequences
    check_accumulation(training, accumulation, "--sequences_per_step", f"{per_step}")
    steps_per_epoch = sequences // per_step
    if not steps_per_epoch:
        name = "sequences_per_step"
        if name not in run.explicit_args and sequences < micro_sequences:
            name = "per_device_train_batch_size"
        elif name not in run.explicit_args and training.gradient_accumulation_steps > 1:
            name = "gradient_accumulation_steps"
        raise Refusal(
            f"{len(train_rows)} rows make {sequences} sequences, and a step takes {per_step}: lower --{name}, or add"
            " more rows."
        )
    steps = run_steps(training, steps_per_epoch)
    check_one_step(training, steps, steps_per_epoch)
    warmup = plan_warmup(run, training, steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TuningPlan(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=trained,
        rows=len(train_rows),
        tokens=sum(len(example.input_ids) for example in train_rows),
        learnt_tokens=sum(example.num_label_tokens for example in train_rows),
        held_rows=len(eval_rows),
        sequences=sequences,
        sequences_per_step=per_step,
        processes=training.world_size,
        micro_batch=training.per_device_train_batch_size,
        accumulation=accumulation,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        checkpoint_bytes=trained * 12 + STATE_BYTES,  # float32 weights and two moments
        checkpoints_kept=training.save_total_limit,
        saves=len(saved_steps(training, steps)),
        warmup=warmup,
    )
