"""The card of exported GGUF files, from the record of the export (`export.json`) alone."""

from pathlib import Path

import jinja2
from huggingface_hub import ModelCardData

from .metadata import check_metadata


def render(record: dict, repo: str | None, license: str | None, language: str | list[str] | None) -> str:
    """The card's text. record: the content of export.json; repo: where the files are published; license, language: of
    the model's own card. Raises CardError for metadata that the Hub would reject.
    """
    base = record["base_model"]
    extra = {"base_model": base["hub_id"], "base_model_relation": "quantized"} if base else {}
    if base and base["revision"]:
        extra["base_model_revision"] = base["revision"]
    data = ModelCardData(
        license=license, language=language, pipeline_tag="text-generation", tags=["gguf", "llama"], **extra
    )
    check_metadata(data.to_dict())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    title = repo.split("/")[-1] if repo else record["model"]
    text = environment.get_template("gguf.md.j2").render(
        record=record, base=base, repo=repo, title=title, first=min(record["files"])
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"
