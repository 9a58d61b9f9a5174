"""README.md of a folder of records: metadata, sections and figures, each from a record, and gone where there is none.

    python -m model_card runs/demo

Same records, same bytes. What stands between the two marks `YOURS` is a person's, and survives.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData, RepoCard

from .facts import Facts
from .formatting import number, quote, table
from .metadata import CardError, check_metadata
from .records import Records, read
from .sections.data import Data
from .sections.evaluation import Evaluation, is_own_result
from .sections.intended import Intended
from .sections.limits import Limits
from .sections.training import Training
from .sections.tuning import Tuning
from .sections.use import Use
from .sources import set_names

YOURS = ("<!-- yours: begin -->", "<!-- yours: end -->")
OWN_METADATA = (  # only this project's records set these; all else in a card's metadata may be a person's
    "base_model base_model_relation base_model_revision datasets library_name model-index pipeline_tag"
    " source_datasets task_categories".split()
)
SECTIONS = (
    "intended use checkpoints data training history samples tuning evaluation sensitivity generalisation audits limits"
    " license environment citation".split()
)


def write(folder: Path, repo: str | None = None) -> Path:
    """Render README.md and figures/ of a folder from its records; returns the card's path. Raises CardError, and then
    writes nothing.

    repo: the Hub's id of what the card describes; by default where the run was last published.
    """
    records = read(folder)
    path = records.folder / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    renew(render(records, repo), old)  # raises before anything is drawn
    draw(records)
    path.write_text(renew(render(records, repo), old), encoding="utf-8")
    return path


def write_card_or_reason(folder: Path, repo: str | None = None) -> str:
    """Where the card of a folder now is, or why there is none: for scripts whose work is done, card or not."""
    try:
        return str(write(folder, repo))
    except CardError as error:
        return f"not written: {error}"
    except (
        Exception
    ) as error:  # a record of another kind, a full disk, a library of figures: the work itself is done, and stays
        return (
            f"not written: {type(error).__name__}: {' '.join(str(error).split())[:300]}. `python -m model_card"
            f" {folder}` makes it again."
        )


def draw(records: Records) -> None:
    """The figures that the card shows, in figures/ beside it."""
    for name, (_, plot) in pictures(records).items():
        plot(records.folder / "figures" / f"{name}.png")


def pictures(records: Records) -> dict[str, tuple[str, object]]:
    """{name: (caption, function that draws it to a path)} of every figure for which there are records."""
    from . import figures  # matplotlib, which a run needs at its first card, not at its start

    plots = {}
    if records.trained:
        resumed = [event["step"] for event in records.events if event["event"] == "resumed"]
        bases, sets = records.data.get("baselines", {}), set_names(records.data)
        plots["training"] = (
            "training curves",
            lambda path: figures.training_curves(records.log, bases, path, resumed, sets),
        )
    if curated := records.data.get("curation"):
        plots["curation"] = ("what curation dropped and kept", lambda path: figures.curation(curated, path))
    if records.tuning:
        plots["before_after"] = ("what tuning changed", lambda path: figures.before_after(records.tuning, path))
    for evaluation in records.evaluations:
        prefix = "" if records.kind == "evaluation" else f"{evaluation.name}-"
        rows = evaluation.shown()
        if rows:
            plots[f"{prefix}trajectory"] = (
                "scores against training tokens",
                lambda path, rows=rows: figures.trajectory(rows, path),
            )
        for kind, caption in (
            ("sensitivity", "the same items with other prompts"),
            ("robustness", "the same items, perturbed"),
        ):
            if variants := [row for row in evaluation.results[kind] if row["model"] in records.mine(evaluation)]:
                plots[f"{prefix}{kind}"] = (
                    caption,
                    lambda path, rows=variants, kind=kind: figures.variants(rows, kind, path),
                )
        if texts := evaluation.results["generalisation"]:
            plots[f"{prefix}generalisation"] = (
                "bits per byte by kind of text",
                lambda path, rows=texts: figures.generalization(rows, path),
            )
    return plots


def render(records: Records, repo: str | None = None) -> str:
    """The card's text. repo: the Hub's id of what it describes; by default where the run was last published."""
    plots = {} if records.step is not None else pictures(records)
    captions = {
        name: caption for name, (caption, _) in plots.items() if (records.folder / "figures" / f"{name}.png").exists()
    }
    facts = Facts(records, repo or next((row["repo"] for row in reversed(records.published)), None), captions)
    head, *sections = section_texts(facts, ["head", *SECTIONS])
    parts = [f"---\n{metadata(facts).to_yaml()}\n---", head, "\n".join([YOURS[0], YOURS[1]]), *sections]
    text = "\n\n".join(part.strip() for part in parts if part.strip())
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


@functools.cache
def _environment() -> jinja2.Environment:
    """Where the templates of sections are, each compiled once: a run writes a card for every revision."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "table": table, "quote": quote}
    return environment


def section_texts(facts: Facts, names: Sequence[str]) -> list[str]:
    """Sections of a card as Markdown, by the names of their templates: "head" and those of SECTIONS."""
    values = {  # a template finds the values of each section under its name
        "f": facts,
        "r": facts.r,
        "use": Use(facts),
        "data": Data(facts),
        "training": Training(facts),
        "tuning": Tuning(facts),
        "evaluation": Evaluation(facts),
        "intended": Intended(facts),
        "limits": Limits(facts),
    }
    return [_environment().get_template(f"{name}.md.j2").render(values) for name in names]


def renew(text: str, old: str, same_weights: bool = False) -> str:
    """`text` with what a person wrote between the marks of `old`, the scores in its model-index that `text` has none
    of, and further metadata (a licence, tags, gating).

    same_weights: whether both cards are of the same weights. Else this project's scores in `old` go, which are of
    others.
    """
    if not old:
        return text
    if YOURS[0] in old or YOURS[1] in old:
        if old.count(YOURS[0]) != 1 or old.count(YOURS[1]) != 1 or old.index(YOURS[1]) < old.index(YOURS[0]):
            raise CardError(
                f"the existing card must have the marks {YOURS[0]} and {YOURS[1]} once each, in this order: fix them,"
                " so that your text can stay."
            )
        kept = old[old.index(YOURS[0]) : old.index(YOURS[1]) + len(YOURS[1])]
        marker = "\n".join(YOURS)
        # a card that could not be made has no place for it
        text = text.replace(marker, kept) if marker in text else f"{text}\n{kept}\n"
    if not old.lstrip().startswith("---"):
        return text
    try:
        before = ModelCard(old, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):
        return text
    text = _keep_metadata(text, old)
    if before.eval_results:
        card = ModelCard(text)
        ours = {(result.dataset_name, result.metric_type) for result in card.data.eval_results or []}
        stay = [
            result
            for result in before.eval_results
            if (result.dataset_name, result.metric_type) not in ours and (same_weights or not is_own_result(result))
        ]
        if stay:
            card.data.eval_results = [*(card.data.eval_results or []), *stay]
            card.data.model_name = card.data.model_name or before.model_name
            return str(card)
    return text


def _keep_metadata(text: str, old: str) -> str:
    """`text` with the metadata of `old` that it has none of, and the tags and data configurations of both."""
    card, before = (
        RepoCard(text, ignore_metadata_errors=True),
        RepoCard(old, ignore_metadata_errors=True).data.to_dict(),
    )
    own = card.data.to_dict()
    kept = {name: value for name, value in before.items() if name not in own and name not in OWN_METADATA}
    for name in {"tags", "configs"} & set(own):
        own_names = [_config_name(value) for value in own[name]]
        values = before[name] if isinstance(before.get(name), list) else []
        if further := [value for value in values if _config_name(value) not in own_names]:
            kept[name] = [*own[name], *further]
    for name, value in kept.items():
        card.data[name] = value
    return str(card) if kept else text


def _config_name(value: object) -> object:
    """What tells a data configuration of a card's metadata from others; a tag as it is."""
    return value.get("config_name") if isinstance(value, dict) else value


# ---- metadata ----


def metadata(facts: Facts):
    """The card's metadata in the Hub's terms. Raises CardError for what the Hub would reject."""
    records, license = facts.r, "data_license" if facts.r.kind == "tokens" else "license"
    languages = facts.languages  # of one the code alone, as earlier cards had it
    common = {
        "license": facts.declared[license],
        "language": languages[0] if len(languages) == 1 else languages or None,
    }
    of_the_hub = [source["dataset"] for source in facts.sources if source.get("dataset") and "files" not in source]
    datasets = sorted({name for name in of_the_hub if "/" in name}) or None
    if records.kind == "tokens":
        data = DatasetCardData(
            **common, task_categories=["text-generation"], source_datasets=datasets, tags=["tokens", "pretraining"]
        )
    elif records.kind == "evaluation":
        data = ModelCardData(tags=["evaluation", "lm-eval"], **common)
    else:
        extra = (
            {"base_model": facts.base["hub_id"], "base_model_revision": facts.base["revision"]}
            if facts.base.get("hub_id")
            else {}
        )
        if (initial := facts.initial_weights) and "/" in initial and not extra:
            extra = {"base_model": initial.partition("@")[0]}
        if extra:
            extra["base_model_relation"] = "adapter" if records.kind == "adapter" else "finetune"
        results, kind = Evaluation(facts).index(), facts.config.get("model_type", "llama")
        tags = [kind, "pretraining"] if records.kind == "pretrain" else [kind, "sft"]
        tags += ["lora"] if records.kind in ("adapter", "merged") else []
        data = ModelCardData(
            **common,
            library_name="peft" if records.kind == "adapter" else "transformers",
            pipeline_tag="text-generation",
            tags=[*tags, *_tags_of_trackio(facts)],
            datasets=datasets,
            **extra,
            **({"model_name": facts.title, "eval_results": results} if results else {}),
        )
    check_metadata(data.to_dict())
    return data


def _tags_of_trackio(facts: Facts) -> list[str]:
    """The tags by which the Hub shows a trackio Space in the model's page."""
    url = facts.dashboards.get("trackio")
    return ["trackio", f"trackio:{url}"] if url else []
