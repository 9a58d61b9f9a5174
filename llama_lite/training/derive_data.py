"""The derived values of the data: how much of a text is prepared, with which vocabulary, and how much is held out."""

import dataclasses
import math
from pathlib import Path

import torch

from ..config.pretrain import CurationArguments
from ..data import shards
from ..data.curation import active
from ..data.given_text import Text
from ..data.installed import INSTALLED
from ..data.recipes import TEXT_ARGUMENTS, TOKEN_ARGUMENTS, default_folder
from ..data.text_facts import TextFacts
from ..files import read_json
from ..formatting import amount
from ..machine.hardware import planning_constant
from ..models import shapes
from ..models.presets import load_model_config
from .decisions import DEFAULT_HOURS, Decisions

CURATE = 1e6  # bytes of text per second and core that are curated, near-duplicates included
LEARN_VOCABULARY = 4e6  # bytes of text per second from which a vocabulary is trained

# per core or GPU: a guess that is the same every time, for what decides the prepared folder
NOMINAL_FLOPS = {"cpu": 5e10, "cuda": 3e14}
LEAST_VOCABULARY = 257  # the bytes, and the end-of-text
BYTES_OF_TOKEN = 4  # a guess, before there is a vocabulary
ALL_BELOW = 64e6  # bytes of text that are always prepared whole
TEXT_MARGIN = 4  # times as much text is prepared as the run is guessed to read
VALIDATION_SHARE = 0.05
MOST_VALIDATION, LEAST_VALIDATION = 100_000_000, 4097  # tokens: the paper's, one shard; 16 windows of 256

CURATION_ARGUMENTS = [field.name for field in dataclasses.fields(CurationArguments)]


def step_for(steps: int) -> int:
    """Tokens per step of a run of a given number of steps."""
    return shapes.tokens_per_step(steps * 2048)


def active_rules(decisions: Decisions) -> list[str]:
    """Curation rules that are on."""
    return list(active({name: decisions[name] for name in CURATION_ARGUMENTS}))


class DataDerivation:
    """Derives what the prepared folder of a text holds; of a folder that is there, its manifest decides.

    mixture: the manifest of a mixture, whose folders are prepared. device, processes: that train.
    """

    def __init__(self, d: Decisions, text: Text, mixture: dict | None, device: torch.device, processes: int):
        self.d, self.text, self.mixture, self.device, self.processes = d, text, mixture, device, processes
        self.manifest, self.vocabulary_size = mixture, None

    def settle(self) -> None:
        """Arguments of the prepared folder: how much of the text, which vocabulary, how much is held out."""
        d = self.d
        if self.mixture:
            d.decide("validation_tokens", self.mixture["splits"]["validation"]["tokens"], "")
            return
        self.manifest = self.read_manifest(d["prepared_dir"])
        if d["init_from"] and "vocab_size" not in d.fixed:
            from .initial_weights import tokenizer_name  # whose libraries other plans do not need

            d.decide("tokenizer", lambda: tokenizer_name(d["init_from"]), "of --init_from")
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
            return d["max_steps"] * (d["tokens_per_step"] or step_for(d["max_steps"]))
        if d.settled("num_train_epochs") or d.settled("max_steps"):
            return math.inf
        units = self.processes * (1 if self.device.type == "cuda" else torch.get_num_threads())
        flops = planning_constant(NOMINAL_FLOPS, self.device) * units * (d["hours"] or DEFAULT_HOURS) * 3600
        return shapes.affordable_tokens(flops)

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
        is_forbidden = "allow_epochs" in self.d.fixed and not self.d["allow_epochs"]
        return 1.0 if is_forbidden else shapes.most_epochs(self.available)

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

    def preparing_seconds(self) -> float:
        """That curating, learning a vocabulary and tokenizing take; tokenizing at the speed of the sample."""
        if self.manifest or not self.counted:
            return 0.0
        d, size = self.d, min(self.facts.bytes, BYTES_OF_TOKEN * (self.d["max_tokens"] or self.facts.bytes))
        curated = 4 + size / CURATE / d["prepare_workers"] if active_rules(d) else 0
        vocabulary_bytes = min(size, 50e6) / LEARN_VOCABULARY if d["tokenizer"] == "train" else 0
        return 1 + curated + vocabulary_bytes + size / self.facts.bytes_per_second / d["prepare_workers"]
