"""What a pretraining run reads: one prepared folder or a mixture of several, and its validation sets."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import Problems, Refusal
from ..files import read_json
from ..folder_kinds import kind_of_folder
from .mixture import Schedule
from .shards import altered, describe, read_manifest

RECORDED = ("documents", "baselines", "source", "skipped")  # of each folder's manifest, in the manifest of a mixture


@dataclasses.dataclass(frozen=True)
class PreparedFolder:
    """A prepared folder and its part in a run. weight: its share of the training tokens, 0 of a validation set."""

    name: str
    folder: Path
    manifest: dict
    weight: float = 1.0

    @property
    def bytes_per_token(self) -> float:
        """Of its validation slice."""
        validation = self.manifest["splits"]["validation"]
        return validation["bytes"] / validation["tokens"]


@dataclasses.dataclass(frozen=True)
class PreparedTokens:
    """The folders that a run trains on, and its further validation sets."""

    folders: list[PreparedFolder]
    is_mixture: bool = False
    validation: list[PreparedFolder] = dataclasses.field(default_factory=list)

    @property
    def manifest(self) -> dict:
        """The manifest of the folder, or that of the mixture."""
        return mixture_manifest(self.folders) if self.is_mixture else self.folders[0].manifest

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer, which all folders share."""
        return self.folders[0].folder / "tokenizer"

    @property
    def by_fingerprint(self) -> dict[str, tuple[Path, dict]]:
        """{fingerprint: (folder, manifest)} of the folders that are trained on."""
        return {part.manifest["fingerprint"]: (part.folder, part.manifest) for part in self.folders}

    def identity(self) -> dict:
        """What of a run's identity says which tokens it reads."""
        if not self.is_mixture:
            return {"data": self.folders[0].manifest["fingerprint"]}
        parts = {part.name: {"data": part.manifest["fingerprint"], "weight": part.weight} for part in self.folders}
        return {"mixture": parts}

    def record(self) -> dict:
        """The manifest with the further validation sets."""
        return with_validation(self.manifest, self.validation)


def read_mixture(weights: Mapping[str, float]) -> list[PreparedFolder]:
    """The folders of a mixture, with weights rounded to those of its Schedule. weights: {path: weight}.

    Raises Refusal for weights that are no shares, folders that are not prepared, and folders that cannot be mixed.
    """
    try:
        rounded = Schedule(list(weights.values())).weights
    except Refusal as refusal:
        raise Refusal(f"--mixture: {refusal}") from None
    if gone := [folder for folder, weight in weights.items() if not weight]:
        raise Refusal(f"--mixture {gone[0]}=0: a folder without a share is never read: leave it out.")
    problems, parts = Problems(), []
    for name, folder, weight in zip(_names(list(weights)), weights, rounded, strict=True):
        location = tokens_of_run(folder)  # of which the rest is checked, so that all is said at once
        problems.add_if(location, f"--mixture {folder} is the folder of a run: give that of its tokens, {location}.")
        manifest = _read(location or folder)
        if manifest:
            parts.append(PreparedFolder(name, Path(location or folder), manifest, weight))
        else:
            problems.append(_not_prepared("--mixture", location or folder, parts, folder == next(iter(weights))))
    for part in parts[1:]:
        problems += _other_tokens("--mixture", parts[0], part)
    for one, other in itertools.combinations(parts, 2):
        problems.add_if(
            one.manifest["fingerprint"] == other.manifest["fingerprint"],
            f"--mixture: {one.folder} and {other.folder} hold the same tokens: give one of them both shares.",
        )
    problems.end()
    return parts


def read_validation(sets: Mapping[str, str], folders: list[PreparedFolder], is_mixture: bool) -> list[PreparedFolder]:
    """The further validation sets of a run. sets: {name: path}. folders: those that it trains on, none where they are
    not prepared yet.

    Raises Refusal for folders that are not prepared or have other tokens, and for the name of a folder of the mixture.
    """
    problems, found = Problems(), []
    for name, folder in sets.items():
        manifest = _read(folder)
        if manifest is None:
            problems.append(_not_prepared(f"--validation {name}:", folder, folders))
            continue
        part = PreparedFolder(name, Path(folder), manifest, 0.0)
        if is_mixture and (same := [one for one in folders if one.name == name]):
            if same[0].manifest["fingerprint"] == manifest["fingerprint"]:
                continue  # it is measured anyway
            problems.append(f"--validation {name}: a folder of --mixture has that name: choose another.")
        problems += _other_tokens(f"--validation {name}:", folders[0], part) if folders else []
        problems.add_if(
            not manifest["splits"]["validation"]["tokens"],
            f"--validation {name}: {folder} holds no validation tokens: prepare it with --validation_tokens.",
        )
        found.append(part)
    problems.end()
    return found


def tokens_of_run(folder: str) -> str | None:
    """The prepared folder that a run's folder names as that of its one text; None for any other folder."""
    record = read_json(Path(folder) / "run.json")
    return record.get("settings", {}).get("prepared_dir") if isinstance(record, dict) else None


def _read(folder: str) -> dict | None:
    """The manifest of a prepared folder; None where it is none. Raises Refusal for one that was altered."""
    manifest = read_manifest(Path(folder))
    if manifest is None and (Path(folder) / "manifest.json").exists():
        raise altered(Path(folder))
    return manifest


def _not_prepared(argument: str, folder: str, others: list[PreparedFolder], is_first: bool = True) -> str:
    """That a folder holds no tokens, and the command that prepares them as `others` are, or, where none is prepared and
    this is not the first, as the first will be.
    """
    kind = kind_of_folder(folder)
    text, what = (folder, "a text") if kind == "foreign" else ("TEXT", "no prepared tokens")
    rest = f" --prepared_dir {folder}" if kind in ("empty", "prepared") else ", and give the folder that this makes"
    command = _prepare_command(text, others)
    if not others and not is_first:
        command = command.replace(" --prepare_only", " --tokenizer FIRST/tokenizer --prepare_only")
        rest += " (FIRST: the folder that the first of the mixture has then)"
    return f"{argument} {folder} holds {what}. Prepare it first: {command}{rest}."


def _prepare_command(text: str, others: list[PreparedFolder]) -> str:
    """The command that prepares a text with the tokenizer of the first of `others`, if there is one."""
    tokenizer = f" --tokenizer {others[0].folder}/tokenizer" if others else ""
    return f"run_pretrain.py --dataset {text}{tokenizer} --prepare_only"


def _other_tokens(argument: str, first: PreparedFolder, part: PreparedFolder) -> list[str]:
    """What keeps the tokens of a folder from being read by a run whose first folder is `first`; nothing else."""
    ours, theirs = first.manifest, part.manifest
    if ours["tokenizer"] != theirs["tokenizer"]:
        sizes = [f"{manifest['tokenizer']['vocab_size']:,}" for manifest in (theirs, ours)]
        return [
            f"{argument} {part.folder} has another tokenizer (of {sizes[0]} ids) than {first.folder} (of {sizes[1]}),"
            f" and a model has one: prepare its text again, {_prepare_command('TEXT', [first])}, and give the folder"
            " that this makes."
        ]
    if ours["dtype"] != theirs["dtype"]:
        return [
            f"{argument} {part.folder} holds {theirs['dtype']} ids and {first.folder} {ours['dtype']}: prepare it"
            " again."
        ]
    return []


def _names(folders: list[str]) -> list[str]:
    """A short name of each folder, for log and figures: its last part, with as many before it as tell all apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.-]+", "-", "-".join(one[-length:]), flags=re.ASCII).strip(".-") for one in parts]
        if len(set(names)) == len(names):
            return names
    raise Refusal(f"--mixture {' '.join(folders)}: one folder is given twice.")


def weighted(parts: list[PreparedFolder], value: Callable[[PreparedFolder], float]) -> float:
    """The mean of a value over folders, by their weights."""
    return math.fsum(part.weight * value(part) for part in parts)


def mixture_manifest(parts: list[PreparedFolder]) -> dict:
    """What plans, cards and the derivation of arguments read of a prepared folder, of a mixture.

    Its training tokens are those that can be read before any folder is read a second time; its validation tokens those
    of the folder that has most. Baselines are means by weight, each folder by its own counts. `mixture` has the facts
    of each folder.
    """
    facts = [
        {
            "name": part.name,
            "weight": part.weight,
            "fingerprint": part.manifest["fingerprint"],
            "splits": {
                name: {key: split[key] for key in ("tokens", "bytes")}
                for name, split in part.manifest["splits"].items()
            },
            **{key: part.manifest[key] for key in RECORDED if key in part.manifest},
        }
        for part in parts
    ]
    identity = [[one["fingerprint"], one["weight"]] for one in facts]
    validation = max((one["splits"]["validation"] for one in facts), key=lambda split: split["tokens"])
    train = min(int(one["splits"]["train"]["tokens"] / one["weight"]) for one in facts)
    return {
        "format": "llama_lite.mixture/1",
        "mixture": facts,
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "tokenizer": parts[0].manifest["tokenizer"],
        "dtype": parts[0].manifest["dtype"],
        "documents": sum(one["documents"] for one in facts),
        "splits": {"train": {"tokens": train}, "validation": validation},
        "baselines": {
            name: weighted(parts, lambda part, name=name: part.manifest["baselines"][name])
            for name in ("unigram", "bigram")
        },
    }


def with_validation(manifest: dict, validation: list[PreparedFolder]) -> dict:
    """A manifest, or an estimate of one, with the facts of further validation sets by name."""
    sets = {
        part.name: {
            "fingerprint": part.manifest["fingerprint"],
            "source": part.manifest["source"],
            "splits": {"validation": {key: part.manifest["splits"]["validation"][key] for key in ("tokens", "bytes")}},
        }
        for part in validation
    }
    return {**manifest, "validation_sets": sets} if sets else manifest


def data_lines(manifest: dict, folders: list[PreparedFolder], validation: list[PreparedFolder]) -> list[str]:
    """What a run reads, one line for its text (`manifest`, or an estimate of one), or for each of the `folders` of a
    mixture, and one for each further validation set.
    """
    lines = [] if folders else [describe(manifest)]
    width = max((len(part.name) for part in folders), default=0)
    for part in folders:
        train, held = (part.manifest["splits"][name]["tokens"] for name in ("train", "validation"))
        bases = part.manifest["baselines"]
        lines.append(
            f"{part.name:<{width}}  {part.weight:.4f}  {train:,} training and {held:,} validation tokens, fingerprint"
            f" {part.manifest['fingerprint'][:12]}; baselines: unigram {bases['unigram']:.3f}, bigram"
            f" {bases['bigram']:.3f} nats; {part.bytes_per_token:.2f} bytes per token"
        )
    for part in validation:
        held = part.manifest["splits"]["validation"]["tokens"]
        lines.append(f"validation {part.name}: {held:,} tokens, fingerprint {part.manifest['fingerprint'][:12]}")
    return lines
