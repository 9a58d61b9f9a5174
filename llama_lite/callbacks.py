"""What watches a run: signals, health, progress and samples. Nothing here changes what is learnt."""

import os
import signal
import sys
import time
from collections import deque

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from . import trends
from .arguments import Refusal
from .plan import context_of
from .runs import Interrupted, die_with_parent, say

OWN_METRICS = ("eval_loss", "eval_bits_per_byte", "eval_perplexity", "eval_end_loss", "eval_mean_token_accuracy")
SECOND_SIGNAL_AFTER = 2.0  # seconds: one Ctrl-C can arrive twice, from the terminal and from the launcher
SPIKE_SIGMAS, SPIKE_HISTORY = 6.0, 100


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 ask for an orderly end; a second SIGTERM or SIGINT, 2 s or more later, ends at once.

    A launcher that dies sends SIGUSR1 (parent-death signal), which never counts as a second one. While `at_once` is
    true (text is prepared: every moment is safe) the first signal raises Interrupted where it arrives; in training
    the flag `asked` is read after each step, by all ranks together. Processes that this one forks (workers of pools)
    leave the keyboard to it, end at SIGTERM and never outlive it.
    """

    def __init__(self, on_stop):
        self.on_stop, self.asked, self.at_once, self.first = on_stop, None, True, 0.0
        parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=_obey_parent)
        die_with_parent(signal.SIGUSR1)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGUSR1)  # it died before we asked

    def _handle(self, number, frame):
        if self.asked is None:
            self.asked, self.first = signal.Signals(number).name, time.monotonic()
            self.on_stop()
            if self.at_once:
                raise Interrupted(f"{self.asked} before the first step; what is prepared stays. Run the same command again.")
            os.write(2, b"\nstopping: this step is finished and saved first\n")
        elif number != signal.SIGUSR1 and time.monotonic() - self.first >= SECOND_SIGNAL_AFTER:
            os.write(2, b"\nsecond signal: ending at once; the last checkpoint is untouched\n")
            os._exit(128 + number)


def _obey_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


class Progress(TrainerCallback):
    """One bar on a terminal, one plain line a log entry elsewhere."""

    def __init__(self):
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training", disable=not sys.stderr.isatty())
            self.started, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        shown = [f"step {state.global_step}/{state.max_steps}"]
        names = {"loss": "loss {:.4f}", "grad_norm": "grad {:.2f}", "learning_rate": "lr {:.2e}", "tokens_per_second": "{:,.0f} tok/s"}
        names |= {"mfu": "mfu {:.1f}%", "eval_loss": "validation {:.4f}", "eval_bits_per_byte": "{:.4f} bits/byte"}
        shown += [text.format(logs[name]) for name, text in names.items() if name in logs]
        shown += [f"{name.removeprefix('eval_')} {value:.3f}" for name, value in logs.items() if name.startswith("eval_") and name not in OWN_METRICS]
        done = state.global_step - self.first
        if "loss" in logs and done:
            left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
            shown.append(f"{left / 60:.1f} min left" if left >= 90 else f"{left:.0f} s left")
        if len(shown) > 1:
            self.bar.write("  ".join(shown), file=sys.stdout)
        for sample in logs.get("samples", ()):
            self.bar.write(f"    {sample!r}", file=sys.stdout)
        sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class SpikeDetector:
    """Tells a step whose loss lies 6 standard deviations above the last 100 steps' (at least 20 of them)."""

    def __init__(self):
        self.losses: deque = deque(maxlen=SPIKE_HISTORY)

    def __call__(self, loss: float) -> float | None:
        """The excess in standard deviations if `loss` is a spike, else None. Spikes do not enter the history."""
        if len(self.losses) >= 20:
            mean, deviation = float(np.mean(self.losses)), float(np.std(self.losses)) + 1e-3
            if loss > mean + SPIKE_SIGMAS * deviation:
                return (loss - mean) / deviation
        self.losses.append(loss)
        return None


class Health(TrainerCallback):
    """At each evaluation: is the curve saturated, do training and validation loss part? Reported once each."""

    def __init__(self, run):
        self.run, self.told = run, set()

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
        logged = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        tokens, losses = [entry["tokens"] for entry in evaluated], [entry["eval_loss"] for entry in evaluated]
        if "saturated" not in self.told and (found := trends.saturation(tokens, losses)):
            self.told.add("saturated")
            self.run.event("saturated", tokens=tokens[-1], slope=found.slope, low=found.low, high=found.high)
            say(f"validation loss is saturated: {found.slope:+.4f} nats a doubling of tokens ({found.low:+.4f} to {found.high:+.4f})")
        stretches = zip([0, *(entry["step"] for entry in evaluated)], evaluated, strict=False)
        since = [[loss for step, loss in logged if before < step <= entry["step"]] for before, entry in stretches]
        if "overfitting" in self.told or not all(since):
            return
        if found := trends.overfitting(tokens, [float(np.mean(losses)) for losses in since], losses):
            self.told.add("overfitting")
            self.run.event(
                "overfitting", tokens=tokens[-1], eval_loss=losses[-1], best_eval_loss=min(losses), slope=found.slope, low=found.low, high=found.high
            )
            say(
                f"validation loss rises and parts from training loss by {found.slope:.4f} nats a doubling of tokens ({found.low:.4f} to {found.high:.4f}): "
                f"{losses[-1]:.4f}, best {min(losses):.4f}"
            )


class Samples(TrainerCallback):
    """Continuations of fixed prompts at each evaluation (top-k 50, temperature 1, as the paper's), in the log.

    The run's random state is left as it was.
    """

    def __init__(self, trainer, tokenizer, prompts: list[str], tokens: int, seed: int):
        self.trainer, self.tokenizer, self.prompts, self.tokens, self.seed = trainer, tokenizer, prompts, tokens, seed

    def on_evaluate(self, args, state, control, **kwargs):
        import torch

        from .models import without_router_loss

        model = self.trainer.model
        devices = [args.device] if args.device.type == "cuda" else []
        training = model.training
        with torch.random.fork_rng(devices=devices), torch.no_grad(), without_router_loss(model):
            torch.manual_seed(self.seed + state.global_step)
            model.eval()
            texts = []
            for prompt in self.prompts:
                ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(args.device)
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    top_k=50,
                    temperature=1.0,
                    max_new_tokens=min(self.tokens, (context_of(model.config) or 2**30) - ids.shape[1]),
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.eos_token_id,
                    use_cache=True,
                    trust_remote_code=False,
                )
                texts.append(self.tokenizer.decode(output[0], skip_special_tokens=True))
            model.train(training)
        self.trainer.log({"samples": texts})


def check_prompts(prompts: list[str], tokenizer, context: int) -> None:
    """Raise Refusal for prompts that hold no token, or leave no position of the model's `context` for a continuation."""
    for prompt in prompts:
        count = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if not 0 < count < context:
            shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
            raise Refusal(f"--sample_prompts {shown!r}: {count:,} tokens, and a prompt for this model has from 1 to {context - 1:,}.")


def beginnings(held, tokenizer, count: int = 3, tokens: int = 6) -> list[str]:
    """How the first held-out documents begin, as prompts. `held`: TokenWindows of the validation slice."""
    found = []
    for index in range(min(len(held), 200)):
        ids = np.asarray(held[index])
        for begin in np.flatnonzero(ids == tokenizer.eos_token_id) + 1:
            text = tokenizer.decode(ids[begin : begin + tokens]).strip()
            if begin + tokens <= len(ids) and text and text not in found:
                found.append(text)
        if len(found) >= count:
            return found[:count]
    return found or [tokenizer.decode(np.asarray(held[0])[:tokens])]


class TaskScores(TrainerCallback):
    """Scores of a few tasks at each evaluation, in the log as `eval_TASK_METRIC`. Every rank asks all of it, so that any layout can.

    The run's random state is left as it was.
    """

    def __init__(self, trainer, tokenizer, names: list[str], limit: int, seed: int):
        from . import evaluation, tasks

        self.trainer, self.tokenizer, self.seed = trainer, tokenizer, seed
        self.tasks = [(task, evaluation.chosen(task, limit, seed)) for task in tasks.build(names, {}, {}, False)]

    def on_evaluate(self, args, state, control, **kwargs):
        from . import evaluation, harness

        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training, found = model.training, {}
        model.eval()
        lm = harness.SharedContextLM(model, self.tokenizer)
        for task, items in self.tasks:
            samples = evaluation.samples_of(task, harness.run(lm, {leaf: task.leaves[leaf] for leaf in items}, items, self.seed, False, False))
            metrics = evaluation.metrics_of(samples)
            metric = evaluation.shown_metric(metrics)
            found[f"eval_{task.name}_{metric}"] = metrics[metric]["value"]
        model.train(training)
        self.trainer.log(found)
