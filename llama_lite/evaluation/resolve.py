"""Model references of the command line as models: `path`, `org/name@revision`, `...@step-*`, each `+adapter`."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.verify import is_well_formed
from ..distributed import print_main
from ..errors import Refusal
from ..files import read_json, read_jsonl
from ..hub import download
from ..hub.client import HubPermissionError, HubUnavailable, Reference, reference, refs_of
from ..hub.local_names import check_misspelt
from ..hub.revision import STEP_PREFIX, newest_first, step_in, step_of
from ..models import loading, references

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---- which models ----


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of an evaluation: its base, its adapter or None, and the step and training tokens that its records
    state.
    """

    name: str
    base: references.Located
    adapter: references.Located | None = None
    step: int | None = None
    tokens: int | None = None

    def tokenizer(self, tokenizer_name: str | None = None) -> "PreTrainedTokenizerBase":
        """The tokenizer called `tokenizer_name`; by default the adapter's own, else the base's. Raises Refusal."""
        own = self.adapter if self.adapter and (self.adapter.folder / "tokenizer.json").exists() else self.base
        return loading.load_tokenizer(own, tokenizer_name)

    @functools.cached_property
    def weights(self) -> tuple[str, str | None]:
        """(digest of the base, digest of the adapter or None) over weights and config; computed once."""
        return references.model_digest(self.base.folder, self.base.remote_weights), (
            references.model_digest(self.adapter.folder) if self.adapter else None
        )


def model_name(text: str) -> str:
    """A model reference with one spelling for each folder: without `./`, and without a `/` at the end."""
    base, plus, adapter = text.partition("+")
    return f"{_folder_name(base)}{plus}{_folder_name(adapter)}"


def _folder_name(text: str) -> str:
    text = os.path.expanduser(text)
    folder, separator, step = text.rpartition(f"@{STEP_PREFIX}")
    if not separator:
        folder, step = text, ""
    return f"{Path(folder)}{separator}{step}" if folder and Path(folder).is_dir() else text


def resolve_models(
    texts: list[str], argument: str = "--models", with_weights: bool = True, one_each: bool = False
) -> list[Model]:
    """The models of --models: `path`, `org/name@revision` or `...@step-*` (all steps, in order), each with an optional
    `+adapter`. argument: the flag that messages name. with_weights: as `references.locate`. one_each: a text may mean
    one model only. Raises Refusal.
    """
    models = []
    for text in map(model_name, texts):
        base, plus, adapter = text.partition("+")
        names = _expand_steps(base, argument) if base.endswith(f"@{STEP_PREFIX}*") else [base]
        if one_each and len(names) > 1:
            raise Refusal(
                f"{argument} {text}: these are {len(names)} models, and one is wanted: {names[-1]}{plus}{adapter}, for"
                " example."
            )
        for name in names:
            models.append(_resolve_model(name, adapter if plus else None, argument, with_weights))
    if repeated := [model.name for model in models if sum(second.name == model.name for second in models) > 1]:
        raise Refusal(f"{argument} {repeated[0]} is given twice.")
    name_of: dict[tuple, str] = {}
    for model in models:
        folders = tuple(located and located.folder.resolve() for located in (model.base, model.adapter))
        if folders in name_of:
            raise Refusal(f"{argument} {name_of[folders]} {model.name} is one model, given twice.")
        name_of[folders] = model.name
    return models


def _expand_steps(text: str, argument: str) -> list[str]:
    """`name@step-*` as one reference per step, oldest first."""
    name = text.removesuffix(f"@{STEP_PREFIX}*")
    if Path(name).is_dir():
        steps = sorted(
            int(path.name.removeprefix("checkpoint-"))
            for path in Path(name).glob("checkpoint-*")
            if path.name[11:].isdigit()
        )
        names = [f"{name}@{STEP_PREFIX}{step}" for step in steps]
    else:
        check_misspelt(argument, name)
        try:
            names = [f"{name}@{tag}" for tag in _step_tags(name)]
            print_main(f"hub       {name}: {len(names)} revisions, whose records are read first")
        except (HubUnavailable, HubPermissionError) as error:
            raise Refusal(
                f"{argument} {text}: no folder here has this name, and the Hub says: {error}. Make it first, give"
                " another name, or run the same command again when the Hub answers."
            ) from None
    if not names:
        raise Refusal(f"{argument} {text}: {name} has no steps, neither checkpoints in a folder nor tags on the Hub.")
    return names


def _step_tags(repo: str) -> list[str]:
    """The tag of each step of a repository, oldest first: of the run that publishes there, whose `revision.json` they
    hold; a line names the others, which are skipped. Where no run of this project publishes, all tags `step-N`. Raises
    HubPermissionError or HubUnavailable.
    """
    tags = refs_of(repo)[1]
    own = [ref.revision for ref, _ in download.own_revisions(repo)]
    commits = {tags.get(tag) for tag in own}  # a person's tag of one of them is no other revision
    others = [tag for tag in tags if tag.startswith(STEP_PREFIX) and tags[tag] not in commits]
    if own and others:
        shown = ", ".join(sorted(others)[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        print_main(f"hub       {shown} of {repo}: no checkpoints of the run that publishes there, so they are skipped")
    # of step-N and step-N-2, the last is the run's
    steps = {step_of(tag)[0]: tag for tag in reversed(own or [tag for tag, _ in newest_first(tags)])}
    if not steps:  # tags of another project
        steps = {step_in(tag): tag for tag in tags if step_in(tag) is not None}
    return [steps[step] for step in sorted(steps)]


def _locate(name: str, argument: str, with_weights: bool) -> references.Located:
    """As `references.locate`; `folder@step-N` is the folder's checkpoint-N."""
    folder, separator, step = name.rpartition(f"@{STEP_PREFIX}")
    if separator and Path(folder).is_dir():
        checkpoint = Path(folder) / f"checkpoint-{int(step) if step.isdigit() else step}"
        return dataclasses.replace(references.locate(str(checkpoint), argument=argument), name=name)
    return references.locate(name, argument=argument, with_weights=with_weights)


def _resolve_model(name: str, adapter: str | None, argument: str, with_weights: bool) -> Model:
    base = _locate(name, argument, with_weights)
    extra = _locate(adapter, argument, with_weights) if adapter else None
    if base.adapter and extra is None:  # an adapter alone: its own record names its base
        record = read_json(base.folder / "adapter_config.json")
        named, revision = record.get("base_model_name_or_path"), record.get("revision")
        if not named:
            raise Refusal(f"{argument} {name} is an adapter that does not name its base: give BASE+{name}.")
        base_name = model_name(named) if reference(named) is None or not revision else str(Reference(named, revision))
        base, extra = _locate(base_name, argument, with_weights), base
    if extra is not None:
        if not extra.adapter:
            raise Refusal(f"{argument} {name}+{adapter}: {adapter} is not an adapter (it has no adapter_config.json).")
        references.check_base(extra, base)
    last = extra or base
    step, tokens = _read_position(last.folder)
    return Model(name if not adapter else f"{name}+{adapter}", base, extra, step, tokens)


def _read_position(folder: Path) -> tuple[int | None, int | None]:
    """(step, training tokens) of a checkpoint, a published revision or a finished run; (None, None) of other
    folders.
    """
    for file_name in ("revision.json", "manifest.json"):
        if is_well_formed(record := read_json(folder / file_name)):
            return record["step"], record["tokens"]
    log = [entry for entry in read_jsonl(folder / "log.jsonl") if "tokens" in entry]
    return (log[-1]["step"], log[-1]["tokens"]) if log else (None, None)
