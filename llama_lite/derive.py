"""What a pretraining run takes where nobody said it: from the run's record, the prepared folder, the text and the machine, in this order.

Each value comes with its reason. Given values always win, and those that cannot go together are refused before anything is prepared.
"""

import dataclasses
import functools
from pathlib import Path

import torch
from trl.trainer.utils import compute_flops_per_token

from . import precision, shapes, speed, timing
from .arguments import CurationArguments
from .decisions import Decisions, in_words, nice
from .installed import INSTALLED
from .plan import count_parameters, load_model_config, model_config_of
from .preparing import OF_TEXT, OF_TOKENS, Text, default_folder, name_of
from .runs import read_json, say
from .sources import CACHE_ABOVE, amount
from .text_facts import TextFacts, look
from .windows import count_windows

HOURS = 1 / 6  # of a run that nobody gave a length
START, FINISH = 12.0, 12.0  # seconds: from the command to the first step, and from the last step to the end (imports; export, card, figures)
CURATE, TOKENISE = 1e6, 4e6  # bytes of text a second and core that are curated (near-duplicates too), and tokenised
EVALUATIONS = 10
EVALUATION_SHARE = 0.08  # of the time of training that evaluations may take
VALIDATION_SHARE = 0.05
MOST_VALIDATION = 100_000_000  # the paper's: one shard
MOST_EPOCHS = 16  # beyond, repeated text teaches next to nothing (Muennighoff et al., figure 5)
UNCERTAIN = 1.5  # how far a number of tokens that was counted on a sample may be off before it is believed enough to refuse
OF_RUN = (
    "model_config block_size tokens_per_step order allow_epochs eval_windows probe_windows sample_prompts hours max_steps learning_rate warmup_steps "
    "logging_steps eval_steps save_steps save_total_limit per_device_train_batch_size prepared_dir curated_dir"
).split()
OF_CURATION = [field.name for field in dataclasses.fields(CurationArguments)]
RECORDED = (*OF_RUN, *OF_TEXT, *OF_TOKENS, *OF_CURATION, "precision", "compile_layers", "fused_loss", "block_attention")


def output_dir(dataset: str) -> str:
    """The folder of a run that nobody named."""
    return f"runs/{name_of(dataset)}"


def pretrain(groups, text: Text, planned, given: dict, recorded_of) -> tuple[dict, dict, dict]:
    """({argument: value} that nobody gave, {argument: why}, the tokens that there are or will be) of a pretraining run (rank 0). Raises Refusal.

    groups: what `parse_pretrain` returned, in which the values are set, too. planned: the layout that is planned. recorded_of(names): what the record of
    the run that goes on says of these arguments (`starting.recorded`). The tokens are a manifest, or as much of one as can be estimated.
    """
    run, training = groups[-2:]
    decisions = Decisions(groups, {name: value for name, value in given.items() if (name, value) != ("precision", "auto")})
    settling = Settling(decisions, text, torch.device("cuda") if run.plan_launch else training.device, planned.processes)
    settling.run(recorded_of(RECORDED))
    return decisions.values(), decisions.reasons, settling.manifest or settling.estimate()


def settings(groups) -> dict:
    """The arguments that decide what a run is, as they were settled, for its record."""
    found = {name: value for group in groups for name, value in vars(group).items() if name in RECORDED}
    return {name: found[name] for name in RECORDED}


def at_most(tokens: dict) -> dict:
    """An estimate made so large that no text which fits is refused for it; a manifest as it is."""
    if "estimated" not in tokens:
        return tokens
    splits = {name: {**split, "tokens": int(UNCERTAIN * split["tokens"])} for name, split in tokens["splits"].items()}
    return {**tokens, "splits": splits} if not tokens["exact"] else tokens


def bytes_to_prepare(tokens: dict) -> int:
    """Disk that preparing still takes: tokens, and about as much again as the text where it is curated."""
    return tokens.get("estimated", 0)


def fit(groups, given: dict, manifest: dict) -> None:
    """Bring what was decided by an estimate into what the prepared folder holds."""
    run, training = groups[-2:]
    windows, held = (count_windows(manifest, split, run.block_size) for split in ("train", "validation"))
    for name in ("eval_windows", "probe_windows"):
        if name not in given and getattr(run, name) is not None:
            setattr(run, name, max(1, min(getattr(run, name), held)))
    if "max_steps" not in given and training.max_steps * run.tokens_per_step // run.block_size > windows:
        run.allow_epochs = True


class Settling:
    """One command's decisions, in the order in which they follow from each other."""

    def __init__(self, decisions: Decisions, text: Text, device: torch.device, processes: int):
        self.d, self.text, self.device, self.processes = decisions, text, device, processes
        self.paces: dict[tuple, timing.Pace] = {}

    def run(self, recorded: dict) -> None:
        self.machine(recorded)
        if "num_train_epochs" in self.d.fixed:
            recorded.pop("max_steps", None)
        for name, value in recorded.items():
            self.d.decide(name, value, "")
        self.drop_unfit_micro_batch()
        if recorded:
            say(f"record    what the command does not give is as the run in {self.d['output_dir']} has it ({len(recorded)} values)")
        self.prepared()
        self.vocabulary_and_model()
        self.sizes()
        self.length()
        self.rest()

    def machine(self, recorded: dict) -> None:
        """Number format and switches, by what computes."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            self.d.decide("precision", "bfloat16", "planned for GPUs")
        else:
            value, why = precision.choose("auto", recorded.get("precision"), self.device)
            self.d.decide("precision", value, why)
            precision.check_device(self.d["precision"], self.device)
        for name, (value, why) in speed.choose_switches(self.d["precision"], self.device).items():
            self.d.decide(name, recorded.get(name, value), why if name not in recorded else "as this run began")

    def drop_unfit_micro_batch(self) -> None:
        """A recorded micro-batch that more, or fewer, processes cannot use is none that somebody asked for."""
        d, name = self.d, "per_device_train_batch_size"
        if name in d.reasons and d["tokens_per_step"] % (d["block_size"] * self.processes * d[name]):
            del d.reasons[name]

    # ---- what is there ----

    def prepared(self) -> None:
        """What a prepared folder that somebody named was made with."""
        folder = self.d["prepared_dir"]
        self.manifest = read_json(Path(folder) / "manifest.json") if folder else None
        recipe = (read_json(Path(folder) / "recipe.json") or {}) if self.manifest else {}
        for name in (*OF_TEXT, *OF_TOKENS):
            if name in recipe:
                self.d.decide(name, recipe[name], "" if name not in ("tokenizer", "vocab_size", "validation_tokens") else f"as {folder} was prepared")

    @functools.cached_property
    def facts(self) -> TextFacts:
        return look(self.text.source)

    @functools.cached_property
    def tokens_per_byte(self) -> float:
        return self.facts.tokens_per_byte(self.d["tokenizer"], self.d["vocab_size"])

    @functools.cached_property
    def counted(self) -> bool:
        """Whether the text has to be looked at: not where --max_tokens of a dataset of the Hub say how many tokens there will be."""
        return not self.d["max_tokens"] or self.text.is_local or self.d["dataset"] in INSTALLED

    @property
    def tokens(self) -> int:
        """Of the whole text, validation included: counted where it is prepared, else estimated."""
        if self.manifest:
            return sum(split["tokens"] for split in self.manifest["splits"].values())
        if not self.counted:
            return self.d["max_tokens"]
        found = int(self.facts.bytes * self.tokens_per_byte)
        return min(found, self.d["max_tokens"] or found)

    # ---- model ----

    @functools.cached_property
    def seconds(self) -> float:
        """For training steps: what the hours leave beside starting, preparing and finishing, before evaluations."""
        hours = self.d.decide("hours", HOURS, "about ten minutes, since no length is given; another: --hours 2, or --max_steps 5000")
        return max(20.0, hours * 3600 - START - FINISH - self.preparing_seconds())

    def preparing_seconds(self) -> float:
        """That curating and tokenising take."""
        if self.manifest:
            return 0.0
        size, workers = min(self.facts.bytes, 4 * (self.d["max_tokens"] or self.facts.bytes)), self.d["prepare_workers"]
        return 3 + size / TOKENISE / workers + (size / CURATE / workers if active_rules(self.d) else 0)

    @functools.cached_property
    def flops_per_second(self) -> float:
        """That a small model reaches here while it trains, over all processes; a first guess, before shapes are timed."""
        peak = precision.peak_flops(self.d["precision"], self.device) or 1e13
        return (0.3 if self.device.type == "cpu" else 0.35) * peak * self.processes

    def vocabulary_and_model(self) -> None:
        """Tokenizer, vocabulary and model that fit each other, the text, and the time."""
        d = self.d
        given = load_model_config(d["model_config"]) if d.settled("model_config") and not shapes.is_shape(d["model_config"]) else None
        d.decide("tokenizer", "train", "a vocabulary of this text's own")
        if d["tokenizer"] == "train" and not d.settled("vocab_size"):
            reach = shapes.affordable_tokens(self.flops_per_second * self.seconds) * 4
            size = min(shapes.vocabulary_for(min(self.facts.bytes, reach)), given.vocab_size if given else 2**20)
            within = f", within {d['model_config']}" if given else ""
            d.decide("vocab_size", size, f"for {amount(min(self.facts.bytes, reach))} of text{within}")
        if not d.settled("model_config"):
            shape, reason = self.best_shape()
            d.decide("model_config", shape, reason)

    def config(self, block_size: int | None = None):
        """The config of the chosen model, with vocabulary and context as the run will have them."""
        return model_config_of(self.d["model_config"], self.vocabulary(), block_size or self.d["block_size"] or 1024)

    def vocabulary(self) -> int:
        """Ids of the tokenizer."""
        if self.manifest:
            return self.manifest["tokenizer"]["vocab_size"]
        if self.d["tokenizer"] == "train":
            return self.d["vocab_size"]
        return self.named_vocabulary

    @functools.cached_property
    def named_vocabulary(self) -> int:
        from .tokenizers import load_tokenizer

        return len(load_tokenizer(self.d["tokenizer"]))

    def best_shape(self) -> tuple[str, str]:
        """The shape whose loss is expected to be the lowest after the time there is, and why: guessed by FLOPs, then timed, until the guess stays."""
        available = self.tokens - self.validation_tokens()
        rate, timed = self.flops_per_second, {}
        for _ in range(4):
            best = min(shapes.LADDER, key=lambda shape: self.expected(shape, timed.get(shape, 0) or rate / self.flops(shape), available))
            if best in timed or self.flops(best) > rate / 20:  # a step of which would take too long to time
                break
            timed[best] = self.tokens_per_second(best)
            rate = timed[best] * self.flops(best)
        speed = timed.get(best, rate / self.flops(best))
        reads = min(speed * self.seconds, MOST_EPOCHS * available)
        size = shapes.parameters(best, self.vocabulary())
        return f"{best[0]}x{best[1]}", f"{size / 1e6:.1f}M parameters: for {reads / 1e6:.1f}M tokens, at {speed:,.0f} tokens a second here"

    def expected(self, shape, speed: float, available: int) -> float:
        """Loss that a shape is expected to have in the end, in bits a byte of our own text: only differences mean something."""
        return shapes.expected_loss(shape, min(speed * self.seconds, MOST_EPOCHS * available), available)

    def flops(self, shape) -> float:
        return shapes.flops_per_token(shape, self.vocabulary(), shapes.context_of(shape[1]))

    def tokens_per_second(self, shape) -> float:
        """Timed here, with evaluations and saves taken off."""
        block = self.d["block_size"] or shapes.context_of(shape[1])
        micro = self.micro_windows(block)
        config = model_config_of(f"{shape[0]}x{shape[1]}", self.vocabulary(), block)
        return micro * block / self.pace(config, micro, block).step(1) * self.processes * (1 - EVALUATION_SHARE)

    def pace(self, config, micro: int, block: int) -> timing.Pace:
        key = (str(config.to_dict()), micro, block)
        if key not in self.paces:
            self.paces[key] = timing.pace(config, micro, block, self.d["precision"], self.switches(), self.device)
        return self.paces[key]

    def switches(self) -> dict:
        return {name: self.d[name] for name in ("fused_loss", "block_attention")}

    # ---- sizes ----

    def validation_tokens(self) -> int:
        """A share of the text, the paper's slice at most, and some windows at least."""
        if self.d.settled("validation_tokens"):
            return self.d["validation_tokens"]
        block = self.d["block_size"] or 128
        return max(min(int(VALIDATION_SHARE * self.tokens), MOST_VALIDATION), min(16 * block + 1, self.tokens // 5))

    def micro_windows(self, block: int) -> int:
        """Windows of a micro-batch: some 2,000 tokens on a CPU, whose caches hold no more; on a GPU 8,000."""
        if self.d.settled("per_device_train_batch_size"):
            return self.d["per_device_train_batch_size"]
        return max(1, (2048 if self.device.type == "cpu" else 8192) // block)

    def sizes(self) -> None:
        """Window, validation slice, step."""
        d = self.d
        config = model_config_of(d["model_config"], self.vocabulary(), d["block_size"])
        if not d.settled("block_size"):
            wanted = shapes.context_of(config.hidden_size)
            if not self.manifest or self.tokens < 2**22:  # of a small text at least some hundred windows
                while wanted > 64 and self.tokens < 400 * wanted:
                    wanted //= 2
            block = min(wanted, config.max_position_embeddings or wanted)
            d.decide("block_size", block, "the model's context" if block == config.max_position_embeddings else f"for {self.tokens:,} tokens of text")
        d.decide("validation_tokens", self.validation_tokens, f"{min(1.0, self.validation_tokens() / max(1, self.tokens)):.0%} of the text")
        if not d.settled("tokens_per_step"):
            reads = self.reads()
            step = shapes.tokens_per_step(reads)
            unit = d["block_size"] * self.processes
            if d.settled("per_device_train_batch_size"):
                unit *= d["per_device_train_batch_size"]
            step = max(unit, round(step / unit) * unit)
            while step > unit and (self.tokens - d["validation_tokens"]) < 8 * step:
                step -= unit
            d.decide("tokens_per_step", step, f"for a run over {reads / 1e6:.1f}M tokens")
        if not d.settled("per_device_train_batch_size"):
            windows = d["tokens_per_step"] // (d["block_size"] * self.processes) or 1
            most = self.micro_windows(d["block_size"])
            d.decide(
                "per_device_train_batch_size",
                max(n for n in range(1, most + 1) if windows % n == 0),
                "windows at once, which the step is a multiple of",
            )

    def reads(self) -> float:
        """Tokens that the run is about to read."""
        d, available = self.d, self.tokens - self.d["validation_tokens"]
        if d.settled("max_steps") and d["max_steps"] > 0:
            return d["max_steps"] * (d["tokens_per_step"] or 2048)
        if d.settled("num_train_epochs"):
            return d["num_train_epochs"] * available
        return min(self.speed() * self.seconds, MOST_EPOCHS * available)

    def speed(self) -> float:
        """Tokens a second of the chosen model."""
        block, config = self.d["block_size"], self.config()
        micro = self.micro_windows(block)
        flops = compute_flops_per_token(config, block)
        if flops * micro * block > 3 * self.flops_per_second:  # a micro-batch of more than 3 s is not timed
            return self.flops_per_second / flops
        return micro * block / self.pace(config, micro, block).step(1) * self.processes * (1 - EVALUATION_SHARE)

    def estimate(self) -> dict:
        """As much of a manifest as can be known before anything is prepared."""
        d = self.d
        held = d["validation_tokens"]
        size = 2 * self.tokens + (self.facts.bytes if any(active_rules(d)) and self.counted else 0)
        splits = {"train": {"tokens": max(0, self.tokens - held)}, "validation": {"tokens": min(held, self.tokens)}}
        exact = self.counted and self.facts.exact and not any(active_rules(d))
        return {"tokenizer": {"vocab_size": self.vocabulary()}, "splits": splits, "estimated": size, "exact": exact}

    # ---- length ----

    def length(self) -> None:
        d = self.d
        available = self.tokens - d["validation_tokens"]
        if not d.settled("max_steps") and not d.settled("num_train_epochs"):
            reads = self.speed() * self.seconds
            capped = reads > MOST_EPOCHS * available
            steps = max(1, int(min(reads, MOST_EPOCHS * available) / d["tokens_per_step"]))
            epochs = steps * d["tokens_per_step"] / max(1, available)
            reason = f"{in_words(d['hours'])} at {self.speed():,.0f} tokens a second, evaluations and saves included"
            if capped:
                reason = f"the text is read {MOST_EPOCHS} times, in {in_words((START + FINISH) / 3600 + steps * d['tokens_per_step'] / self.speed() / 3600)}; more would teach next to nothing"
            d.decide("max_steps", steps, reason)
            if epochs > 1:
                d.decide("allow_epochs", True, f"the text is read {epochs:.1f} times")
        elif d.settled("num_train_epochs") and d["num_train_epochs"] > 1:
            d.decide("allow_epochs", True, "--num_train_epochs says so")

    @property
    def steps(self) -> int:
        d = self.d
        if d["max_steps"] > 0:
            return d["max_steps"]
        return max(1, int(d["num_train_epochs"] * (self.tokens - d["validation_tokens"]) / d["tokens_per_step"]))

    def rest(self) -> None:
        """What follows from the length: rate, warm-up, intervals; and where things are kept."""
        d = self.d
        if not all(d.settled(name) for name in ("learning_rate", "warmup_steps", "logging_steps", "eval_steps", "save_steps", "eval_windows")):
            steps, width = self.steps, self.config().hidden_size
            d.decide("learning_rate", shapes.learning_rate(width), f"for a width of {width:,}")
            d.decide("warmup_steps", max(1, min(715, round(0.04 * steps))), f"4 % of {steps:,} steps")
            every = nice(steps / EVALUATIONS)
            d.decide("eval_steps", every, "ten evaluations")
            d.decide("save_steps", every if steps / every <= 40 else nice(steps / 40), "as often as evaluations")
            d.decide("logging_steps", max(1, nice(steps / 100)), "a hundred lines")
        self.evaluation()
        self.checkpoints()
        if not d["prepared_dir"]:
            rules = dataclasses.asdict(d.owner["min_score"])
            content = None if self.d["dry_run"] and self.text.source.bytes > CACHE_ABOVE else self.text.content
            d.decide("prepared_dir", default_folder(d.owner["dataset"], rules, content), "")
        self.manifest = self.manifest or read_json(Path(d["prepared_dir"]) / "manifest.json")

    def evaluation(self) -> None:
        d = self.d
        windows = (d["validation_tokens"] - 1) // d["block_size"]
        if not d.settled("eval_windows"):
            share = (
                EVALUATION_SHARE * self.steps * d["tokens_per_step"] / d["block_size"]
            )  # in windows trained on, of which an evaluation's are a third of the work
            most = max(8, int(2 * share / max(1, self.steps // int(d["eval_steps"] or 1))))
            d.decide(
                "eval_windows",
                min(windows, most),
                "all of the validation slice" if most >= windows else f"of {windows:,}: evaluations take little time then",
            )
        d.decide("probe_windows", min(8, windows), "")

    def checkpoints(self) -> None:
        d = self.d
        if not d.settled("save_total_limit"):
            size = 12 * count_parameters(self.config())[0]
            many = size * (EVALUATIONS + 2) < 2e9
            d.decide(
                "save_total_limit", EVALUATIONS if many else 3, "all of them, for their evaluation" if many else f"{size * 4 / 1e9:.1f} GB of disk"
            )


def active_rules(decisions: Decisions) -> list[str]:
    """Curation rules that are on."""
    return [name for name in OF_CURATION if decisions[name] not in (None, False) and name != "score_column"]
