"""Model references of the command line as models: `path`, `org/name@revision`, `...@step-*`, each `+adapter`."""

import dataclasses
import functools
import re
from pathlib import Path

from ..checkpoint.verify import is_well_formed
from ..errors import Refusal
from ..files import read_json, read_jsonl
from ..hub.client import HubPermissionError, HubUnavailable, Reference, reference, refs_of
from ..models import loading, references

# ---- which models ----


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of an evaluation: base, adapter on it or none, and where in its run it stands, as far as a record says
    so.
    """

    name: str
    base: references.Located
    adapter: references.Located | None = None
    step: int | None = None
    tokens: int | None = None

    def tokenizer(self, other: str | None = None):
        """The adapter's own tokenizer, else the base's; or `other`. Raises Refusal."""
        own = self.adapter if self.adapter and (self.adapter.folder / "tokenizer.json").exists() else self.base
        return loading.load_tokenizer(own, other)

    @functools.cached_property
    def weights(self) -> tuple[str, str | None]:
        """sha256 of the base's weights and config, and of the adapter's; read once."""
        return references.model_digest(self.base.folder), (
            references.model_digest(self.adapter.folder) if self.adapter else None
        )


def resolve_models(asked: list[str]) -> list[Model]:
    """Models of references: `path`, `org/name@revision`, `...@step-*` (all of them, in order), each `+adapter`. Raises
    Refusal.
    """
    found = []
    for text in asked:
        base, plus, adapter = text.partition("+")
        names = _steps(base) if base.endswith("@step-*") else [base]
        for name in names:
            found.append(_model(name, adapter if plus else None))
    if repeated := [model.name for model in found if sum(other.name == model.name for other in found) > 1]:
        raise Refusal(f"--models {repeated[0]} is given twice.")
    name_of: dict[tuple, str] = {}
    for model in found:
        folders = tuple(one and one.folder.resolve() for one in (model.base, model.adapter))
        if folders in name_of:
            raise Refusal(f"--models {name_of[folders]} {model.name} is one model, given twice.")
        name_of[folders] = model.name
    return found


def _steps(text: str) -> list[str]:
    """`place@step-*` as one reference a step, oldest first."""
    name = text.removesuffix("@step-*")
    if Path(name).is_dir():
        steps = sorted(
            int(path.name.removeprefix("checkpoint-"))
            for path in Path(name).glob("checkpoint-*")
            if path.name[11:].isdigit()
        )
        names = [f"{name}@step-{step}" for step in steps]
    else:
        from ..hub.revision import newest_first, step_of

        try:
            tags = refs_of(name)[1]
            steps = {
                step_of(tag)[0]: tag for tag, _ in reversed(newest_first(tags))
            }  # of step-N and step-N-2 the last is the run's
            steps = steps or {
                int(tag[5:]): tag for tag in tags if re.fullmatch("step-[0-9]+", tag)
            }  # of another project
            names = [f"{name}@{steps[step]}" for step in sorted(steps)]
        except (HubUnavailable, HubPermissionError) as error:
            raise Refusal(
                f"--models {text}: no folder here has this name, and the Hub says: {error}. Make it first, give another"
                " name, or run the same command again when the Hub answers."
            ) from None
    if not names:
        raise Refusal(f"--models {text}: {name} has no steps, neither checkpoints in a folder nor tags on the Hub.")
    return names


def _locate(name: str) -> references.Located:
    """As `models.locate`; `folder@step-N` is the folder's checkpoint-N."""
    folder, at, step = name.rpartition("@step-")
    if at and Path(folder).is_dir():
        checkpoint = Path(folder) / f"checkpoint-{int(step) if step.isdigit() else step}"
        return dataclasses.replace(references.locate(str(checkpoint), argument="--models"), name=name)
    return references.locate(name, argument="--models")


def _model(name: str, adapter: str | None) -> Model:
    base, extra = _locate(name), _locate(adapter) if adapter else None
    if base.adapter and extra is None:  # an adapter alone: its own record names its base
        record = read_json(base.folder / "adapter_config.json")
        named, revision = record.get("base_model_name_or_path"), record.get("revision")
        if not named:
            raise Refusal(f"--models {name} is an adapter that does not name its base: give BASE+{name}.")
        base_name = named if reference(named) is None or not revision else str(Reference(named, revision))
        base, extra = _locate(base_name), base
    if extra is not None:
        if not extra.adapter:
            raise Refusal(f"--models {name}+{adapter}: {adapter} is no adapter (it has no adapter_config.json).")
        references.check_base(extra, base)
    last = extra or base
    step, tokens = _place(last.folder)
    return Model(name if not adapter else f"{name}+{adapter}", base, extra, step, tokens)


def _place(folder: Path) -> tuple[int | None, int | None]:
    """(step, training tokens) of a checkpoint, a published revision, or a finished run."""
    for record in ("revision.json", "manifest.json"):
        if is_well_formed(found := read_json(folder / record)):
            return found["step"], found["tokens"]
    log = [entry for entry in read_jsonl(folder / "log.jsonl") if "tokens" in entry]
    return (log[-1]["step"], log[-1]["tokens"]) if log else (None, None)
