"""The arithmetic of a run: parameters, tokens, steps, accumulation, FLOPs, disk. Pure; nothing is allocated."""

import dataclasses

from ..config import schedules
from ..data.dataset import count_windows
from ..errors import Refusal
from ..formatting import size
from ..models.presets import context_of, count_parameters, flops_per_token


def accumulation_steps(tokens_per_step: int, block_size: int, micro_batch: int, processes: int) -> int:
    """Micro-batches a process accumulates in a step. Raises Refusal with the nearest sizes that divide."""
    micro_tokens = block_size * micro_batch * processes
    if tokens_per_step % micro_tokens == 0:
        return tokens_per_step // micro_tokens
    windows = tokens_per_step / (block_size * processes)
    fitting = [size for size in range(1, 4 * micro_batch + 1) if windows % size == 0]
    nearest = sorted(sorted(fitting, key=lambda size: abs(size - micro_batch))[:3])
    below, above = tokens_per_step // micro_tokens * micro_tokens, (tokens_per_step // micro_tokens + 1) * micro_tokens
    steps = " or ".join(f"{size:,}" for size in (below, above) if size)
    batches = f"--per_device_train_batch_size {' or '.join(map(str, nearest))}, or " if nearest else ""
    raise Refusal(
        f"--tokens_per_step {tokens_per_step:,} is not a whole number of micro-batches of {micro_tokens:,} tokens"
        f" ({processes} process(es) x {micro_batch} windows x {block_size}). Nearest that divide:"
        f" {batches}--tokens_per_step {steps}."
    )


def run_steps(training, per_epoch: int) -> int:
    """Optimiser steps of a run: --max_steps, else --num_train_epochs of `per_epoch` steps, cut to whole ones."""
    return training.max_steps if training.max_steps > 0 else int(training.num_train_epochs * per_epoch)


def intervals(training, steps: int) -> dict[str, int]:
    """Steps between logged losses, evaluations and checkpoints (`logging`, `eval`, `save`) of a run of `steps`, as
    Trainer counts them.

    A share (below 1) is of all steps, rounded up. What only comes at the run's end (strategy `no`, or an interval of 0)
    has `steps`.
    """
    from transformers import TrainerState

    state = TrainerState()
    state.compute_steps(training, steps)
    asked = {
        kind: getattr(training, f"{kind}_strategy") == "steps" and getattr(state, f"{kind}_steps")
        for kind in ("logging", "eval", "save")
    }
    return {kind: int(every) if every else steps for kind, every in asked.items()}


def saved_steps(training, steps: int) -> list[int]:
    """The steps of which a run of `steps` makes checkpoints: every so many, and the last."""
    return sorted({*range(every := intervals(training, steps)["save"], steps + 1, every), steps})


def check_publish_steps(training, steps: int, every: int | None) -> None:
    """Raise Refusal for a --publish_steps between which no checkpoint falls."""
    save = intervals(training, steps)["save"]
    if every is not None and every % save and save < steps:
        raise Refusal(
            f"--publish_steps {every} is no multiple of the {save} steps between checkpoints (--save_steps"
            f" {training.save_steps:g}): only saved checkpoints can be published."
        )


def at_once(plan) -> int:
    """Checkpoints of a Plan or TuningPlan on the disk at once, at most: those that stay, and the next."""
    return plan.saves if plan.checkpoints_kept is None else min(plan.saves, plan.checkpoints_kept + 1)


def plan_warmup(run, training, steps: int) -> int:
    """Steps of warm-up of a run of so many steps, whose schedule is computed. Raises Refusal for one that cannot be
    right.

    A run that --max_steps on the command line cuts shorter than the warm-up of its YAML file is a trial: its plan tells
    so.
    """
    if problems := schedules.plan_problems(
        training, steps, "max_steps" in run.typed and "warmup_steps" not in run.typed
    ):
        raise Refusal(" ".join(problems))
    return training.get_warmup_steps(steps)


def warmup_lines(warmup: int, steps: int) -> list[str]:
    """The line of a plan whose warm-up is longer than the run."""
    return (
        [f"WARNING             {warmup:,} steps of warm-up: the run ends before its peak learning rate"]
        if warmup > steps
        else []
    )


@dataclasses.dataclass
class Plan:
    """Every derived number of a run. Sizes in bytes, FLOPs a token for forward and backward (attention included)."""

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
    saves: int  # checkpoints that are made, beside which at most `checkpoints_kept` stay
    warmup: int = 0

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        unused = self.windows - self.epoch_windows
        return [
            (
                f"parameters          {self.parameters:,} ({self.parameters - self.embedding_parameters:,} in the"
                f" layers, {self.embedding_parameters:,} in the embeddings)"
            ),
            (
                f"tokens a step       {self.tokens_per_step:,} = {self.processes} process(es) x {self.micro_batch}"
                f" windows x {self.accumulation} accumulated x {self.tokens_per_step // self.windows_per_step} tokens"
            ),
            f"one epoch           {self.steps_per_epoch:,} steps,"
            f" {self.epoch_windows * self.tokens_per_step // self.windows_per_step:,} tokens"
            + (f" (cut to whole steps: {unused} of {self.windows:,} windows are left out)" if unused else ""),
            (
                f"the run             {self.steps:,} steps, {self.tokens:,} tokens,"
                f" {self.steps / self.steps_per_epoch:.2f} epochs, {self.tokens / self.parameters:.1f} tokens a"
                " parameter"
            ),
            (
                f"compute             {self.flops_per_token / 1e9:.3f} GFLOP a token,"
                f" {self.flops_per_token * self.tokens:.3e} FLOP in all"
            ),
            *warmup_lines(self.warmup, self.steps),
            (
                f"disk                {size(self.checkpoint_bytes)} a checkpoint, {at_once(self)} at most at once:"
                f" {size(self.checkpoint_bytes * at_once(self))}; finished model {size(self.model_bytes)}"
            ),
        ]


def make_plan(config, manifest: dict, run, training, publish_bytes: int = 2, processes: int | None = None) -> Plan:
    """Plan of a pretraining run over a prepared folder, by as many processes as run now, or by `processes`. Raises
    Refusal for what cannot work.
    """
    problems, processes = [], processes or training.world_size
    vocab = manifest["tokenizer"]["vocab_size"]
    if vocab > config.vocab_size:
        problems.append(
            f"the tokenizer has {vocab:,} ids and the model's vocabulary is {config.vocab_size:,}: choose a"
            f" model_config with vocab_size of at least {vocab:,}, or a smaller tokenizer."
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
    if training.gradient_accumulation_steps not in (1, accumulation):
        raise Refusal(
            f"--gradient_accumulation_steps {training.gradient_accumulation_steps} contradicts --tokens_per_step"
            f" {run.tokens_per_step:,}, which gives {accumulation} here: leave it out."
        )
    windows = count_windows(manifest, "train", run.block_size)
    per_step = run.tokens_per_step // run.block_size
    epoch_windows = windows // per_step * per_step
    if not epoch_windows:
        raise Refusal(
            f"the training text has {windows:,} windows of {run.block_size} tokens and one step takes {per_step:,}:"
            f" lower --tokens_per_step to {windows * run.block_size:,} or less, or bring more text."
        )
    per_epoch = epoch_windows // per_step
    steps = run_steps(training, per_epoch)
    if steps > per_epoch and not run.allow_epochs:
        raise Refusal(
            f"{steps:,} steps need {steps * per_step:,} windows and the training text has {epoch_windows:,}"
            f" ({per_epoch:,} whole steps): lower --max_steps to {per_epoch:,}, bring more text, or read it again with"
            " --allow_epochs."
        )
    if steps < 1:
        raise Refusal(
            f"--num_train_epochs {training.num_train_epochs} is less than one step ({1 / per_epoch:.4f} epochs)."
        )
    warmup = plan_warmup(run, training, steps)
    held = count_windows(manifest, "validation", run.block_size)
    wanted = max(run.probe_windows, 1 if run.eval_windows is None else run.eval_windows)
    if held < wanted:
        raise Refusal(
            f"the validation slice has {held} windows of {run.block_size} tokens, and {wanted} are asked "
            "for: lower --eval_windows or --probe_windows, or prepare with more --validation_tokens."
        )
    parameters, embeddings = count_parameters(config)
    return Plan(
        parameters=parameters,
        embedding_parameters=embeddings,
        flops_per_token=flops_per_token(config, run.block_size),
        processes=processes,
        micro_batch=training.per_device_train_batch_size,
        accumulation=accumulation,
        windows_per_step=per_step,
        tokens_per_step=run.tokens_per_step,
        windows=windows,
        epoch_windows=epoch_windows,
        steps=steps,
        steps_per_epoch=per_epoch,
        checkpoint_bytes=parameters * 12 + 4 * 2**20,  # float32 weights and two moments, tokenizer and state
        model_bytes=parameters * publish_bytes,
        checkpoints_kept=training.save_total_limit,
        saves=len(saved_steps(training, steps)),
        warmup=warmup,
    )


@dataclasses.dataclass
class TuningPlan:
    """Every derived number of a tuning run. Sizes in bytes; `sequences` are rows, or packs of rows."""

    parameters: int
    trained: int
    rows: int
    tokens: int
    learnt_tokens: int
    held_rows: int
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
        """The plan as a person reads it."""
        unused = self.sequences - self.steps_per_epoch * self.sequences_per_step
        return [
            (
                f"parameters          {self.parameters:,}, of which {self.trained:,} are tuned"
                f" ({self.trained / self.parameters:.2%})"
            ),
            (
                f"rows                {self.rows:,} in {self.sequences:,} sequences, {self.tokens:,} tokens, of which"
                f" {self.learnt_tokens:,} are learnt; {self.held_rows:,} held out"
            ),
            (
                f"sequences a step    {self.sequences_per_step} = {self.processes} process(es) x {self.micro_batch} x"
                f" {self.accumulation} accumulated"
            ),
            f"the run             {self.steps:,} steps, {self.steps / self.steps_per_epoch:.2f} epochs of"
            f" {self.steps_per_epoch:,} steps"
            + (f" (cut to whole steps: {unused} of {self.sequences:,} sequences are left out)" if unused else ""),
            *warmup_lines(self.warmup, self.steps),
            (
                f"disk                {size(self.checkpoint_bytes)} a checkpoint, {at_once(self)} at most at once:"
                f" {size(self.checkpoint_bytes * at_once(self))}"
            ),
        ]


def plan_tuning(model, train_rows: list, eval_rows: list, sequences: int, run, training) -> TuningPlan:
    """Plan of a tuning run over `sequences` rows or packs. Raises Refusal for what cannot work."""
    per_step = run.sequences_per_step
    micro = training.per_device_train_batch_size * training.world_size
    if per_step % micro:
        below, above = per_step // micro * micro, (per_step // micro + 1) * micro
        raise Refusal(
            f"--sequences_per_step {per_step} is not a whole number of micro-batches of {micro} ({training.world_size}"
            f" process(es) x {training.per_device_train_batch_size}):"
            f" {' or '.join(str(n) for n in (below, above) if n)} is, or another --per_device_train_batch_size."
        )
    if training.gradient_accumulation_steps not in (1, per_step // micro):
        raise Refusal(
            f"--gradient_accumulation_steps {training.gradient_accumulation_steps} contradicts --sequences_per_step"
            f" {per_step}, which gives {per_step // micro} here: leave it out."
        )
    per_epoch = sequences // per_step
    if not per_epoch:
        raise Refusal(
            f"{len(train_rows)} rows make {sequences} sequences, and a step takes {per_step}: lower"
            " --sequences_per_step, or bring more rows."
        )
    steps = run_steps(training, per_epoch)
    if steps < 1:
        raise Refusal(
            f"--num_train_epochs {training.num_train_epochs} is less than one step ({1 / per_epoch:.4f} epochs)."
        )
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
        accumulation=per_step // micro,
        steps=steps,
        steps_per_epoch=per_epoch,
        checkpoint_bytes=trained * 12 + 4 * 2**20,  # float32 weights and two moments, tokenizer and state
        checkpoints_kept=training.save_total_limit,
        saves=len(saved_steps(training, steps)),
        warmup=warmup,
    )
