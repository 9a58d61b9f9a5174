"""Arguments of a pretraining run that the user did not give: derived from the run's record, the prepared folder, the
text and the machine, in this order.

Each value comes with its reason. Given values always win; values that contradict each other are refused before anything
is prepared.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config.pretrain import PREPARING, CurationArguments
from ..data import shards
from ..data.curation import active
from ..data.dataset import count_windows
from ..data.given_text import Text
from ..data.installed import INSTALLED
from ..data.recipes import TEXT_ARGUMENTS, TOKEN_ARGUMENTS, default_folder, name_of
from ..data.text_facts import TextFacts
from ..distributed import print_main
from ..files import read_json
from ..formatting import amount, in_words
from ..kernels.probe import context_of
from ..kernels.switches import COMPILED, COMPILING, choose_block_attention, choose_compile, choose_fused_loss
from ..machine import precision
from ..machine.parallelism import Layout
from ..models import shapes
from ..models.presets import count_parameters, load_model_config, model_config_of
from ..processes import seconds_since_start
from . import timing
from .data_plan import most_positions
from .decisions import (
    DEFAULT_HOURS,
    TUNED_LENGTH,
    Decisions,
    given_accumulation,
    micro_batch,
    nice,
    revision_interval,
    save_interval,
    whole_interval,
)
from .memory import capacity
from .plan import intervals, run_steps

# seconds: from here to the first step, beside preparing; and from the last step to the end (export, card, figures)
READY, FINISH = (4.0, 10.0)
SAVE_BYTES, SAVE = 100e6, 0.8  # bytes of a checkpoint that are written, flushed and hashed in a second; seconds of any
CURATE = 1e6  # bytes of text per second and core that are curated, near-duplicates included
LEARN_VOCABULARY = 4e6  # bytes of text per second from which a vocabulary is trained

# per core or GPU: a guess that is the same every time, for what decides the prepared folder
NOMINAL_FLOPS = {"cpu": 5e10, "cuda": 3e14}
LEAST_VOCABULARY = 257  # the bytes, and the end-of-text
BYTES_OF_TOKEN = 4  # a guess, before there is a vocabulary
ALL_BELOW = 64e6  # bytes of text that are always prepared whole
TEXT_MARGIN = 4  # times as much text is prepared as the run is guessed to read
EVALUATIONS, EVALUATION_SHARE = 10, 0.08  # of a run, and the most of its time that they may take
SAMPLES = 3  # prompts that are continued at each evaluation, if none are given
VALIDATION_SHARE = 0.05
WINDOWS, TUNED_WINDOWS = (400, 8), (8, 2)  # to train on and held out, at least; of TUNED_LENGTH tokens, fewer will do
MOST_VALIDATION, LEAST_VALIDATION = 100_000_000, 4097  # tokens: the paper's, one shard; 16 windows of 256
STATE_SHARE, BYTES_PER_PARAMETER = 0.8, 16  # of memory: float32 weights, gradients and two moments
UNCERTAIN = 1.5  # factor by which an estimate of tokens from a sample may be too small; beyond it, a run is refused

RUN_ARGUMENTS = (
    "model_config block_size tokens_per_step order allow_epochs eval_windows probe_windows sample_prompts hours"
    " max_steps learning_rate warmup_steps logging_steps eval_steps save_steps save_total_limit"
    " per_device_train_batch_size prepared_dir curated_dir"
).split()

CURATION_ARGUMENTS = [field.name for field in dataclasses.fields(CurationArguments)]
SWITCH_ARGUMENTS = ("precision", "compile_layers", "fused_loss", "block_attention", "attention")
RECALLED = ("mixture", "validation", "allow_epochs_of")  # which decide what there is to derive from: set before
RECORDED = (*RUN_ARGUMENTS, *RECALLED, *TEXT_ARGUMENTS, *TOKEN_ARGUMENTS, *CURATION_ARGUMENTS, *SWITCH_ARGUMENTS)


def initial_weights():
    """The module of that name, whose libraries a plan without --init_from does not need."""
    from . import initial_weights

    return initial_weights


def output_dir(dataset: str, mixture: Sequence[str] = ()) -> str:
    """The default folder of a run: named after the text, or the folders of a mixture."""
    return f"runs/{'-'.join(map(name_of, mixture))[:80] or name_of(dataset)}"


def settings(groups: Sequence) -> dict:
    """The settled arguments that define a run, for its record."""
    values = {name: value for group in groups for name, value in vars(group).items() if name in RECORDED}
    # a mixture is of prepared folders: the arguments that prepare a text are not its own
    others = (*PREPARING, *CURATION_ARGUMENTS) if values["mixture"] else ()
    return {name: values[name] for name in RECORDED if name not in others}


def at_most(tokens: dict) -> dict:
    """An estimate raised to its upper bound, so that no text is refused by mistake; manifests and exact counts stay."""
    if "estimated" not in tokens or tokens["exact"]:
        return tokens
    splits = {name: {**split, "tokens": int(UNCERTAIN * split["tokens"])} for name, split in tokens["splits"].items()}
    return {**tokens, "splits": splits}


class Derivation:
    """Derives the values of a command, each from those before it (rank 0). `settle` may be called again when the text
    is prepared.

    groups: what `parse_pretrain` returned, in which the values are set. planned: the planned layout. recorded: the
    values of RECORDED in the record of the run that is resumed (`resume.recorded_values`). mixture: the manifest of a
    mixture, whose folders are prepared. further_sets: number of validation sets beside that of the text.
    """

    def __init__(
        self,
        groups: Sequence,
        text: Text,
        planned: Layout,
        explicit_args: dict,
        recorded: dict,
        mixture: dict | None = None,
        further_sets: int = 0,
    ):
        run, training = groups[-2:]
        self.groups, self.text, self.mixture = groups, text, mixture
        others = PREPARING if mixture else ()  # of the run's one text, before it became a mixture
        self.recorded = {name: value for name, value in recorded.items() if name not in (*others, *RECALLED)}
        self.sets = len(mixture["mixture"] if mixture else [""]) + further_sets
        self.explicit_args = {
            name: value
            for name, value in explicit_args.items()
            if (name, value) not in (("precision", "auto"), ("max_steps", -1))
        }
        self.device = torch.device("cuda") if run.plan_launch else training.device
        self.processes, self.shards, self.machine, self.vocabulary_size = planned.processes, planned.shards, None, None
        if "num_train_epochs" in self.explicit_args:
            self.recorded.pop("max_steps", None)
        for name, other in (("attention", "block_attention"), ("block_attention", "attention")):
            if self.explicit_args.get(name):  # two names of one choice
                self.recorded.pop(other, None)
        if recorded:
            folder = training.output_dir
            print_main(
                f"record    arguments that the command does not give are taken from the run in {folder}"
                f" ({len([n for n in recorded if n not in explicit_args])} values)"
            )

    def settle(self, only_tokens: bool = False) -> tuple[dict, dict, dict]:
        """({argument: value} of derived arguments, {argument: reason}, tokens of the text). Raises Refusal.

        The tokens are a manifest, or an estimate of one. only_tokens: derive only what preparing needs.
        """
        self.d = Decisions(self.groups, self.explicit_args)
        self.__dict__.pop("seconds", None)  # what is left of the hours
        self.settle_machine()
        for name, value in self.recorded.items():
            self.d.decide(name, value, "")
        self.drop_unfit_micro_batch()
        if self.d["init_from"]:
            self.d.decide("model_config", lambda: initial_weights().config_name(self.d["init_from"]), "of --init_from")
        self.settle_tokens()
        if not only_tokens:
            self.settle_model()
            self.settle_sizes()
            self.settle_length()
            self.settle_intervals()
        return self.d.values(), self.d.reasons, self.manifest or self.estimate()

    def settle_machine(self) -> None:
        """Precision and fused loss, by what computes. Whether layers are compiled, and so how they attend, follows from
        the length.
        """
        d = self.d
        if self.device.type == "cuda" and not torch.cuda.is_available():
            d.decide("precision", self.recorded.get("precision", "bfloat16"), "planned for GPUs")
        else:
            value, why = precision.choose("auto", self.recorded.get("precision"), self.device)
            d.decide("precision", value, why)
            precision.check_device(d["precision"], self.device)
        for name in ("fused_loss", "compile_layers", "block_attention", "attention"):
            if self.recorded.get(name) is not None:
                d.decide(name, self.recorded[name], "as this run began")
        if d["attention"]:
            d.decide("block_attention", False, "")
        d.decide("fused_loss", *choose_fused_loss(self.device, d["use_liger_kernel"]))
        switches = {
            "fused_loss": d["fused_loss"],
            "block_attention": d.settled("block_attention") and d["block_attention"],
        }
        self.machine = self.machine or timing.Machine(
            self.device, d["precision"], switches, self.processes, d["peak_flops"]
        )

    def drop_unfit_micro_batch(self) -> None:
        """Drop a recorded micro-batch that the present number of processes cannot use."""
        d, name = self.d, "per_device_train_batch_size"
        if name in d.reasons and d["tokens_per_step"] % (d["block_size"] * self.processes * d[name]):
            del d.reasons[name]

    # ---- the text, and its tokens ----

    def settle_tokens(self) -> None:
        """Arguments of the prepared folder: how much of the text, which vocabulary, how much is held out."""
        d, self.manifest = self.d, self.mixture
        if self.mixture:
            d.decide("validation_tokens", self.mixture["splits"]["validation"]["tokens"], "")
            return
        self.manifest = self.read_manifest(d["prepared_dir"])
        if d["init_from"] and "vocab_size" not in d.fixed:
            d.decide("tokenizer", lambda: initial_weights().tokenizer_name(d["init_from"]), "of --init_from")
        d.decide("tokenizer", "train", "a vocabulary of this text's own")
        if not self.manifest:
            self.settle_amount()
            if d["tokenizer"] == "train" and not d.settled("vocab_size"):
                self.settle_vocabulary()
            held, share = self.validation_tokens(), self.validation_tokens() / max(1, self.tokens)
            d.decide("validation_tokens", held, f"{min(1.0, share):.0%} of the text")
        if not d["prepared_dir"]:
            skip = d["dry_run"] and not self.text.has_content  # hashing a large text takes long
            rules = dataclasses.asdict(d.owner["min_score"])
            d.decide("prepared_dir", default_folder(d.owner["dataset"], rules, None if skip else self.text.content), "")
            self.manifest = self.read_manifest(d["prepared_dir"])

    def read_manifest(self, folder: str | None) -> dict | None:
        """The manifest of a prepared folder, whose recipe decides its arguments; None where there is none."""
        manifest = shards.read_manifest(Path(folder)) if folder else None
        broken = bool(folder) and not manifest and (Path(folder) / "manifest.json").exists()
        if broken and not self.d["prepare_only"]:
            raise shards.altered(Path(folder))
        found = manifest.get("recipe") if manifest else None
        found = read_json(Path(folder) / "recipe.json") if found is None and (manifest or broken) else found
        recipe = found if isinstance(found, dict) else {}
        for name in (*TEXT_ARGUMENTS, *TOKEN_ARGUMENTS):
            if name in recipe:
                self.d.decide(
                    name,
                    recipe[name],
                    f"as {folder} was prepared" if name in ("tokenizer", "vocab_size", "validation_tokens") else "",
                )
        return manifest

    @property
    def facts(self) -> TextFacts:
        """Size of the text, and what was measured on a sample of it."""
        return self.text.facts

    @property
    def counted(self) -> bool:
        """Whether the text has to be looked at: not where --max_tokens of a dataset of the Hub say how many tokens
        there will be.
        """
        return not self.d["max_tokens"] or self.text.is_local or self.d["dataset"] in INSTALLED

    @property
    def tokens(self) -> int:
        """Of the whole text, validation included: counted where it is prepared, else estimated."""
        if self.manifest:
            return sum(split["tokens"] for split in self.manifest["splits"].values())
        if not self.counted:
            return self.d["max_tokens"]
        found = int(self.facts.bytes * self.facts.tokens_per_byte(self.d["tokenizer"], self.d["vocab_size"]))
        return min(found, self.d["max_tokens"] or found)

    @property
    def reach(self) -> float:
        """Tokens that a run of this length may read, by a guess that is the same every time."""
        d = self.d
        if d.settled("max_steps") and d["max_steps"] > 0:
            return d["max_steps"] * (d["tokens_per_step"] or self.step_for(d["max_steps"]))
        if d.settled("num_train_epochs") or d.settled("max_steps"):
            return math.inf
        units = self.processes * (torch.get_num_threads() if self.device.type == "cpu" else 1)
        return shapes.affordable_tokens(NOMINAL_FLOPS[self.device.type] * units * (d["hours"] or DEFAULT_HOURS) * 3600)

    @staticmethod
    def step_for(steps: int) -> int:
        """Tokens per step of a run of a given number of steps."""
        return shapes.tokens_per_step(steps * 2048)

    def settle_amount(self) -> None:
        """Of a text that is far larger than the run can read, only its beginning is prepared."""
        d = self.d
        if d["max_bytes"] or d["max_tokens"] or d["dataset"] in INSTALLED or not math.isfinite(self.reach):
            return
        kept = 3 if active_rules(d) else 1  # times as much text as curation keeps
        tokens = TEXT_MARGIN * self.reach + (d["validation_tokens"] or 0)
        most, size = 2 ** math.ceil(math.log2(kept * tokens * BYTES_OF_TOKEN)), self.text.source.bytes
        if not size:
            d.decide(
                "max_tokens",
                2 ** math.ceil(math.log2(tokens)),
                "more than a run of this length reads",
            )
        elif size > max(2 * most, ALL_BELOW):
            d.decide("max_bytes", most, f"of {amount(size)}: more than a run of this length reads")
            self.text.cut(most)

    def settle_vocabulary(self) -> None:
        """Size of a vocabulary that is trained on this text."""
        d = self.d
        config = (
            load_model_config(d["model_config"])
            if d.settled("model_config") and not shapes.is_shape(d["model_config"])
            else None
        )
        read = min(self.reach, d["max_tokens"] or math.inf)
        size = min(self.facts.bytes if self.counted else math.inf, BYTES_OF_TOKEN * read)
        within = f", within {d['model_config']}" if config else ""
        d.decide(
            "vocab_size",
            max(LEAST_VOCABULARY, min(shapes.vocabulary_for(size), config.vocab_size if config else 2**20)),
            f"for {amount(size)} of text{within}",
        )

    def validation_tokens(self) -> int:
        """A share of the text, the paper's slice at most, and some windows at least."""
        if self.d.settled("validation_tokens"):
            return self.d["validation_tokens"]
        window = (self.d["block_size"] if self.d.settled("block_size") else 32) + 1
        least = max(min(LEAST_VALIDATION, self.tokens // 5), min(window, self.tokens // 2))
        return max(min(int(VALIDATION_SHARE * self.tokens), MOST_VALIDATION), least)

    @property
    def available(self) -> int:
        """Tokens to train on, once."""
        return max(1, self.tokens - self.d["validation_tokens"])

    @property
    def most_epochs(self) -> float:
        """How often the text is read at most, where the length follows from the time. A folder of a mixture is not read
        again unless that is asked for.
        """
        if self.mixture and not (self.d["allow_epochs"] or self.d["allow_epochs_of"]):
            return 1.0
        return 1.0 if self.explicit_args.get("allow_epochs") is False else shapes.most_epochs(self.available)

    def estimate(self) -> dict:
        """As much of a manifest as can be known before anything is prepared; `estimated`: bytes of disk that preparing
        takes.
        """
        d, held = self.d, self.d["validation_tokens"]
        text = min(self.facts.bytes, 4 * BYTES_OF_TOKEN * (d["max_tokens"] or self.facts.bytes)) if self.counted else 0
        size = 2 * self.tokens + (2 * text if active_rules(d) else 0)
        splits = {"train": {"tokens": max(0, self.tokens - held)}, "validation": {"tokens": min(held, self.tokens)}}
        exact = self.counted and self.facts.exact and not active_rules(d)
        return {"tokenizer": {"vocab_size": self.vocabulary()}, "splits": splits, "estimated": size, "exact": exact}

    # ---- model ----

    def vocabulary(self) -> int:
        """Ids of the tokenizer."""
        if self.manifest:
            return self.manifest["tokenizer"]["vocab_size"]
        if self.d["tokenizer"] == "train":
            return self.d["vocab_size"]
        if self.vocabulary_size is None:
            from ..data.tokenizer import load_tokenizer, vocabulary_size

            self.vocabulary_size = vocabulary_size(load_tokenizer(self.d["tokenizer"]))
        return self.vocabulary_size

    def config(self, block_size: int | None = None):
        """The config of the chosen model, with vocabulary and context as the run will have them."""
        return model_config_of(self.d["model_config"], self.vocabulary(), block_size or self.d["block_size"])

    @functools.cached_property
    def seconds(self) -> float:
        """For training, evaluating and saving: what the hours leave beside starting, preparing and finishing."""
        given = self.reads_given()
        hours = self.d["hours"] or DEFAULT_HOURS if given else self.d.decide("hours", DEFAULT_HOURS, "")
        return max(15.0, hours * 3600 - seconds_since_start() - READY - self.preparing_seconds() - FINISH)

    def preparing_seconds(self) -> float:
        """That curating, learning a vocabulary and tokenizing take; tokenizing at the speed of the sample."""
        if self.manifest or not self.counted:
            return 0.0
        d, size = self.d, min(self.facts.bytes, BYTES_OF_TOKEN * (self.d["max_tokens"] or self.facts.bytes))
        curated = 4 + size / CURATE / d["prepare_workers"] if active_rules(d) else 0
        vocabulary_bytes = min(size, 50e6) / LEARN_VOCABULARY if d["tokenizer"] == "train" else 0
        return 1 + curated + vocabulary_bytes + size / self.facts.bytes_per_second / d["prepare_workers"]

    def settle_model(self) -> None:
        """The model that fits text, time and machine."""
        if not self.d.settled("model_config"):
            self.d.decide("model_config", *self.best_shape())
        if self.d["init_from"] and not self.recorded:
            initial_weights().check_config(self.d["init_from"], self.config(1))

    def best_shape(self) -> tuple[str, str]:
        """The shape that is expected to end with the lowest loss in this time, and why: guessed by FLOPs, then timed,
        until the guess stays.

        Of those that memory holds, and that so many tokens are enough for; where the length is given, of those that
        read it in this time.
        """
        rate, speeds = self.machine.flops_per_second * self.processes, {}
        given = self.reads_given()

        def read_in_time(shape) -> float:
            tokens_per_second = speeds.get(shape) or rate / shapes.flops_per_token(
                shape, self.vocabulary(), shapes.context_of(shape[1])
            )
            return tokens_per_second * (1 - EVALUATION_SHARE) * self.seconds

        def reads(shape) -> float:
            return given or min(read_in_time(shape), self.most_epochs * self.available)

        def fits(shape) -> bool:
            size = shapes.parameters(shape, self.vocabulary())
            enough = size <= min(shapes.PARAMETERS_PER_TOKEN * reads(shape), self.most_parameters())
            return enough and (not given or given <= read_in_time(shape))

        for _ in range(4):
            candidates = [shape for shape in shapes.LADDER if fits(shape)] or shapes.LADDER[:1]
            best = min(candidates, key=lambda shape: shapes.expected_loss(shape, reads(shape), self.available))
            if best in speeds:
                break
            block = self.d["block_size"] or shapes.context_of(best[1])
            speeds[best] = self.machine.tokens_per_second(
                model_config_of(f"{best[0]}x{best[1]}", self.vocabulary(), block), block
            )
            rate = speeds[best] * shapes.flops_per_token(best, self.vocabulary(), shapes.context_of(best[1]))
        size = shapes.parameters(best, self.vocabulary())
        why = (
            f"{size / 1e6:.1f}M parameters: for {reads(best) / 1e6:.1f}M tokens, at {speeds[best]:,.0f} tokens per"
            " second here"
        )
        return f"{best[0]}x{best[1]}", why

    def most_parameters(self) -> float:
        """Of a model whose weights, gradients and moments leave a process some memory for activations."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return math.inf  # planned for GPUs that are not here
        return STATE_SHARE * capacity(self.device) * self.shards / BYTES_PER_PARAMETER

    def reads_given(self) -> float:
        """Tokens that the run reads by --max_steps or --num_train_epochs; 0 where its length follows from the time."""
        d = self.d
        if d.settled("max_steps") and d["max_steps"] > 0:
            return d["max_steps"] * (d["tokens_per_step"] or self.step_for(d["max_steps"]))
        return d["num_train_epochs"] * self.available if d.settled("num_train_epochs") else 0.0

    # ---- sizes ----

    def settle_sizes(self) -> None:
        """Window, step, micro-batch."""
        d = self.d
        if not d.settled("block_size"):
            config = self.config(1)
            wanted, context = shapes.context_of(config.hidden_size), context_of(config)
            limit = 2**30 if shapes.is_shape(d["model_config"]) else context or 2**30
            block = self.fitting_block(min(wanted, limit))
            why = (
                f"for {self.tokens:,} tokens of text"
                if block < min(wanted, limit)
                else "the model's context"
                if block == limit
                else "for its width"
            )
            d.decide("block_size", block, why)
        most = self.machine.micro_windows(d["block_size"])
        if not d.settled("tokens_per_step"):
            reads = self.reads_given() or min(self.seconds * self.speed(), self.most_epochs * self.available)
            unit = d["block_size"] * self.windows_unit()
            steps = d["max_steps"] if d.settled("max_steps") and d["max_steps"] > 0 else None
            wanted = self.step_for(steps) if steps else shapes.tokens_per_step(reads)
            if steps:  # of a short text, no larger than what may be read again
                wanted = min(wanted, self.most_epochs * self.available / steps // unit * unit)
            step = max(unit, round(wanted / unit) * unit)
            while step > unit and self.available < 8 * step:
                step -= unit
            if given_accumulation(d) > 1:  # so many micro-batches, no larger than suits the device
                step = min(step, unit * (1 if d.settled("per_device_train_batch_size") else most))
            d.decide("tokens_per_step", step, f"for a run over {reads / 1e6:.1f}M tokens")
        if not d.settled("per_device_train_batch_size"):
            windows = d["tokens_per_step"] // (d["block_size"] * self.processes) or 1
            micro = micro_batch(windows, given_accumulation(d), most)
            d.decide("per_device_train_batch_size", micro, "windows at once, which the step is a multiple of")

    def windows_unit(self) -> int:
        """Windows that a step is a multiple of, whatever its length: those of all processes in the micro-batches whose
        size and number were given.
        """
        micro = self.d["per_device_train_batch_size"] if self.d.settled("per_device_train_batch_size") else 1
        return self.processes * micro * given_accumulation(self.d)

    def fitting_block(self, most: int) -> int:
        """Predictions per window, at most `most`: some hundred windows of the text and eight that are held out, where
        it is long enough, and one of each in any case; not below what tuning on instructions needs where a short text
        has some windows of that. A given step is a multiple of them, if a size of 32 or more divides it.
        """
        d, block = self.d, most
        least = TUNED_LENGTH if self.has_windows(TUNED_LENGTH, *TUNED_WINDOWS) else 32
        while block > least and not self.has_windows(block, *WINDOWS):
            block //= 2
        block = max(1, min(block, d["validation_tokens"] - 1, self.available - 1))
        if not d.settled("tokens_per_step"):
            return block
        halves = [block // 2**n for n in range(block.bit_length())]
        for size in (*halves, *range(block, 0, -1)):
            if size >= min(32, block) and d["tokens_per_step"] % (size * self.windows_unit()) == 0:
                return size
        return block

    def has_windows(self, block: int, train: int, held: int) -> bool:
        """Whether the text gives so many windows of `block` tokens to train on, and so many that are held out."""
        return self.available >= train * block and self.d["validation_tokens"] >= held * block + 1

    def speed(self) -> float:
        """Tokens per second of the chosen model, training alone."""
        return self.machine.tokens_per_second(self.config(), self.d["block_size"])

    # ---- length ----

    def settle_length(self) -> None:
        """Steps, repeated passes over the text, and the kernels that pay off for that length."""
        d = self.d
        if not d.settled("max_steps") and not d.settled("num_train_epochs"):
            self.settle_steps()
        epochs = self.steps / self.steps_per_epoch
        if not self.mixture and ("num_train_epochs" in self.explicit_args or 1 < epochs <= self.most_epochs + 1):
            d.decide("allow_epochs", True, f"the text is read {epochs:.1f} times" if epochs > 1 else "")
        if not d.settled("compile_layers"):
            seconds = self.steps * self.step_pace().step(self.accumulation) if self.device.type == "cpu" else math.inf
            d.decide("compile_layers", *choose_compile(seconds, d["precision"], self.device))
        d.decide("block_attention", *choose_block_attention(d["precision"], d["compile_layers"], self.device))

    @property
    def accumulation(self) -> float:
        """Micro-batches per process and step."""
        d = self.d
        return d["tokens_per_step"] / (d["block_size"] * self.processes * d["per_device_train_batch_size"])

    def step_pace(self) -> timing.Pace:
        """Speed of the chosen model with its micro-batch."""
        return self.machine.pace(self.config(), self.d["per_device_train_batch_size"], self.d["block_size"])

    def settle_steps(self) -> None:
        """As many as the hours hold, evaluations and saves included; no more passes over the text than teach
        something.
        """
        d, pace = self.d, self.step_pace()
        windows = max(1, (d["validation_tokens"] - 1) // d["block_size"])
        evaluation = (
            d["eval_windows"]
            if d.settled("eval_windows")
            else min(windows, max(8, int(EVALUATION_SHARE * self.seconds / EVALUATIONS / pace.window / self.sets)))
        ) * self.sets
        samples = (len(d["sample_prompts"]) or SAMPLES) * d["sample_tokens"] * pace.token
        saves = SAVE + 12 * count_parameters(self.config())[0] / SAVE_BYTES + 8 * pace.window
        seconds = max(0.5 * self.seconds, self.seconds - EVALUATIONS * (evaluation * pace.window + samples + saves))
        step = pace.step(self.accumulation)
        compiled, _ = (
            (d["compile_layers"], "")
            if d.settled("compile_layers")
            else choose_compile(seconds, d["precision"], self.device)
        )
        if compiled and self.device.type == "cpu":
            seconds, step = seconds - COMPILING, step / COMPILED[d["precision"]]
        allowed = d["allow_epochs"], d["allow_epochs_of"]
        positions = most_positions(self.mixture or {}, d["block_size"], d["mixture"], *allowed)
        most = min(self.most_epochs * self.steps_per_epoch, positions / self.windows_per_step)
        steps = max(1, int(min(seconds / step, most)))
        length = (
            in_words(d["hours"])
            if "hours" in self.explicit_args
            else "about ten minutes, since no length is given (another: --hours 2, or --max_steps N),"
        )
        reason = f"{length} at {d['tokens_per_step'] / step:,.0f} tokens per second, with evaluations and saves"
        if steps >= int(most):
            reason = (
                f"the text is read {self.most_epochs:.0f} times, in {in_words(steps * step / 3600)}; more would teach"
                " next to nothing (or: --max_steps N)"
            )
        d.decide("max_steps", steps, reason)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps of one pass over the text, as the plan counts them; at least 1."""
        tokens = self.manifest or {"splits": {"train": {"tokens": self.available}}}
        return max(1, count_windows(tokens, "train", self.d["block_size"]) // self.windows_per_step)

    @property
    def windows_per_step(self) -> int:
        """Windows of a step, at least 1."""
        return max(1, self.d["tokens_per_step"] // self.d["block_size"])

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, at least 1."""
        return max(1, run_steps(self.d.owner["max_steps"], self.steps_per_epoch))

    # ---- what follows from the length ----

    def settle_intervals(self) -> None:
        """Learning rate, warm-up, and intervals of evaluations, checkpoints and log lines."""
        d, steps = self.d, self.steps
        if not d.settled("learning_rate"):
            width = self.config().hidden_size
            d.decide("learning_rate", shapes.learning_rate(width), f"for a width of {width:,}")
        schedule = min(steps, d["schedule_steps"] or steps)
        warmup = max(1, min(715, round(0.04 * schedule)))
        warmup = min(warmup, d["schedule_steps"] - 1) if d["schedule_steps"] else warmup
        d.decide("warmup_steps", warmup, f"4 % of {schedule:,} steps")
        every = d.decide("eval_steps", nice(steps / EVALUATIONS), "some ten evaluations")
        d.decide("save_steps", *save_interval(whole_interval(every, steps), revision_interval(d)))
        d.decide("logging_steps", nice(steps / 100), "some hundred lines")
        windows = max(1, (d["validation_tokens"] - 1) // d["block_size"])
        if not d.settled("eval_windows"):
            # windows; one that is evaluated is a third of the work
            trained = steps * d["tokens_per_step"] / d["block_size"]
            most = max(
                8,
                int(
                    3
                    * EVALUATION_SHARE
                    * trained
                    / max(1, steps // intervals(d.owner["eval_steps"], steps)["eval"])
                    / self.sets
                ),
            )
            d.decide(
                "eval_windows",
                min(windows, most),
                "all that are held out" if most >= windows else f"of {windows:,}, so that evaluations take little time",
            )
        d.decide("probe_windows", min(8, windows), "")
        if not d.settled("save_total_limit"):
            size = 12 * count_parameters(self.config())[0]
            limit = checkpoints_kept(size)
            d.decide(
                "save_total_limit",
                limit,
                "all of them, for their evaluation" if limit > EVALUATIONS else f"{size * 4 / 1e9:.1f} GB of disk",
            )


def checkpoints_kept(size: int) -> int:
    """Of checkpoints of so many bytes: all of a run with EVALUATIONS of them, where that is little, else three."""
    return EVALUATIONS + 2 if size * (EVALUATIONS + 2) < 2e9 else 3


def active_rules(decisions: Decisions) -> list[str]:
    """Curation rules that are on."""
    return list(active({name: decisions[name] for name in CURATION_ARGUMENTS}))
