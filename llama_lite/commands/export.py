"""Write a model for other programs: a GGUF file for llama.cpp, LM Studio and Ollama, or one folder without adapter.

    python -m llama_lite export runs/demo-sft                            # runs/demo-sft-gguf: float16, Modelfile, card
    python -m llama_lite export runs/demo-sft --dtype float32 q8_0       # other formats of the weights
    python -m llama_lite export you/name --push_to_hub you/name-GGUF     # and published
    python -m llama_lite export runs/demo+runs/demo-sft --to safetensors # base and adapter merged, for vLLM, MLX, serve

MODEL is what run_eval.py takes: a run's folder, FOLDER@step-250, owner/name, owner/name@revision, BASE+ADAPTER. An
adapter is merged. The same model gives the same bytes.
"""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..distributed import print_main
from ..errors import Problems, Refusal
from ..files import read_json, write_json, write_text
from ..folder_kinds import kind_of_folder
from ..formatting import size
from ..hub.client import REFERENCE
from ..paths import beside_run

if TYPE_CHECKING:
    from ..evaluation.resolve import Model

FORMAT, RECORD = "llama_lite.export/1", "export.json"
DTYPES = {"gguf": ("float32", "float16", "q8_0"), "safetensors": ("float32", "float16", "bfloat16")}
DEFAULTS = {"gguf": "float16", "safetensors": "bfloat16"}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of the command. Raises Refusal for those that do not fit together."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_lite export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="the model to write")
    parser.add_argument(
        "--to",
        choices=tuple(DTYPES),
        default="gguf",
        help="gguf: one file for llama.cpp, LM Studio and Ollama (default); safetensors: a folder for transformers,"
        " vLLM and MLX",
    )
    every = " ".join(dict.fromkeys(dtype for dtypes in DTYPES.values() for dtype in dtypes))
    parser.add_argument(
        "--dtype",
        nargs="+",
        metavar="DTYPE",
        help=f"of the weights, of {every}: one file for each (default: float16 for gguf, bfloat16 for safetensors)",
    )
    parser.add_argument("--output_dir", help="the folder to write (default: runs/NAME-gguf or runs/NAME-merged)")
    parser.add_argument("--tokenizer_name", help="a tokenizer other than the model's: gpt2, a folder, or a Hub id")
    hub = parser.add_argument_group("publishing (gguf)")
    hub.add_argument("--push_to_hub", metavar="REPO", help="publish the files and their card in this repository")
    hub.add_argument(
        "--base_hub_id", metavar="REPO", help="where the model itself is on the Hub, if its records do not say"
    )
    hub.add_argument("--private", action="store_true", help="a new repository is private")
    arguments = parser.parse_args(argv)
    arguments.dtype = arguments.dtype or [DEFAULTS[arguments.to]]
    problems, known = Problems(), DTYPES[arguments.to]
    unknown = [dtype for dtype in arguments.dtype if dtype not in known]
    problems.add_if(unknown, f"--dtype {' '.join(unknown)}: --to {arguments.to} writes {', '.join(known)}.")
    problems.add_if(
        arguments.to == "safetensors" and (len(arguments.dtype) > 1 or arguments.push_to_hub),
        "--to safetensors writes one folder of one --dtype, and does not publish (run_sft.py --merge_adapter does).",
    )
    for name, form in (("push_to_hub", "owner/name"), ("base_hub_id", "owner/name or owner/name@revision")):
        value = getattr(arguments, name)
        found = REFERENCE.fullmatch(value or "")
        right = value is None or (found and (name == "base_hub_id" or not found["revision"]))
        problems.add_if(not right, f"--{name} {value}: it must be the name of a repository, {form}.")
    problems.end()
    return arguments


def main(argv: list[str]) -> None:
    """Write the files, and publish them where that is asked for."""
    arguments = parse(argv)
    from transformers.utils import logging

    from ..evaluation.resolve import resolve_models

    logging.disable_progress_bar()
    (model,) = resolve_models([arguments.model], "MODEL", one_each=True)
    name = short_name(model)
    folder = Path(arguments.output_dir or Path("runs") / f"{name}-{'gguf' if arguments.to == 'gguf' else 'merged'}")
    check_output(folder, arguments.to)
    if arguments.to == "safetensors":
        write_safetensors(model, arguments, folder)
        print_main(f"finished  {folder}")
        return
    base = find_base(model, arguments)
    write_files(model, name, base, arguments, folder)
    if arguments.push_to_hub:
        publish(arguments.push_to_hub, folder, arguments.private)
    print_main(f"finished  {folder}")


def short_name(model: "Model") -> str:
    """The name of a model without folders: of `runs/demo+runs/demo-sft` demo-sft; a revision follows it."""
    located = model.adapter or model.base
    if located.repo:
        name = located.repo.rpartition("/")[2]
        return f"{name}-{located.revision}" if located.revision else name
    return beside_run(located.folder.resolve()).name


def check_output(folder: Path, to: str) -> None:
    """Raise Refusal unless a folder is empty, new, or an earlier export's of the same kind (--to)."""
    record = read_json(folder / RECORD)
    if kind_of_folder(folder) != "empty" and not (isinstance(record, dict) and record.get("to") == to):
        raise Refusal(f"--output_dir {folder} holds files, and no earlier export --to {to}: choose another one.")


def find_base(model: "Model", arguments: argparse.Namespace) -> dict | None:
    """{hub_id, revision} of the model that is exported; None where it is not on the Hub. Raises Refusal where it must
    be.
    """
    from ..models.references import published_as

    given = REFERENCE.fullmatch(arguments.base_hub_id or "")
    found = (given["repo"], given["revision"]) if given else published_as(model.adapter or model.base)
    if arguments.push_to_hub and found is None:
        raise Refusal(
            f"--push_to_hub {arguments.push_to_hub}: the card names the model that the files were made of, and"
            f" {model.name} is not on the Hub. Publish it first (its own command with --publish_only), or say where it"
            " is: --base_hub_id owner/name@revision."
        )
    return dict(zip(("hub_id", "revision"), found, strict=True)) if found else None


def write_safetensors(model: "Model", arguments: argparse.Namespace, folder: Path) -> None:
    """Write base and adapter as one model that transformers loads. Raises Refusal."""
    import torch

    from ..models import loading

    tokenizer = model.tokenizer(arguments.tokenizer_name)
    merged = loading.load_merged(model.base, model.adapter, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    # first, so that the same command can be run again after a crash
    write_json(folder / RECORD, {"format": FORMAT, "to": "safetensors", "weights": list(model.weights)})
    merged.to(getattr(torch, arguments.dtype[0])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- GGUF ----


def write_files(model: "Model", name: str, base: dict | None, arguments: argparse.Namespace, folder: Path) -> None:
    """Write the GGUF files, the Modelfile of the first, the record and the card. Raises Refusal.

    Files of other formats that an earlier export made of the same weights stay in the record.
    """
    from importlib.metadata import version

    from ..digests import sha256
    from ..kernels.probe import context_of
    from ..models import gguf, loading

    tokenizer = model.tokenizer(arguments.tokenizer_name)
    gguf.check_config(model.name, loading.load_config(model.base))
    gguf.pre_tokenizer_of(model.name, tokenizer)
    loaded = loading.load_merged(model.base, model.adapter, tokenizer)
    weights, files = list(model.weights), {}
    if (earlier := read_json(folder / RECORD)) and earlier.get("weights") == weights:
        files = {file: record for file, record in earlier["files"].items() if (folder / file).is_file()}
    record = {
        "format": FORMAT,
        "to": "gguf",
        "model": name,
        "base_model": base,
        "weights": weights,
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "context": context_of(loaded.config),
        "chat_format": chat_format_of(tokenizer),
        "gguf": version("gguf"),
        "files": files,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, record)  # now, so that the same command can be run again after a crash
    paths = {dtype: folder / f"{name}-{gguf.SUFFIXES[dtype]}.gguf" for dtype in arguments.dtype}
    for dtype, path in paths.items():
        gguf.write_gguf(model.name, loaded, tokenizer, dtype, path)
        files[path.name] = {"dtype": dtype, "size": path.stat().st_size, "sha256": sha256(path)}
        print_main(f"wrote     {path}, {size(path.stat().st_size)}")
    write_text(folder / "Modelfile", gguf.modelfile(paths[arguments.dtype[0]].name, loaded.config, tokenizer))
    write_json(folder / RECORD, record)
    card = folder / "README.md"
    old = card.read_text(encoding="utf-8") if card.exists() else ""
    write_text(card, card_of(model, record, arguments.push_to_hub, old))


def chat_format_of(tokenizer) -> str | None:
    """The name of a tokenizer's chat format; None of a base's."""
    from ..chat_format import template

    return "Vicuna 1.1" if template.is_vicuna(tokenizer) else "the model's own" if tokenizer.chat_template else None


def card_of(model: "Model", record: dict, repo: str | None, old: str = "") -> str:
    """The card of the files, with license and language of the model's own card, and with what a person wrote into the
    card of an earlier export (`old`). Raises Refusal.
    """
    import yaml
    from huggingface_hub import ModelCard

    from model_card import gguf
    from model_card.card import renew
    from model_card.metadata import LICENCES, CardError, is_language

    path, own = (model.adapter or model.base).folder / "README.md", {}
    with contextlib.suppress(ValueError, yaml.YAMLError):  # a card whose metadata cannot be read has nothing to take
        own = ModelCard(path.read_text(encoding="utf-8")).data.to_dict() if path.is_file() else {}
    license, said = own.get("license"), own.get("language")
    languages = [code for code in (said if isinstance(said, list) else [said]) if is_language(code)]
    try:
        text = gguf.render(
            record,
            repo,
            license if license in LICENCES else None,
            languages[0] if len(languages) == 1 else languages or None,
        )
        return renew(text, old)
    except CardError as error:
        raise Refusal(f"no card can be made: {error}") from None


def publish(repo: str, folder: Path, private: bool) -> None:
    """Put the files of an export on the Hub. Raises Refusal."""
    from ..hub.publish_files import publish_files

    names = [*read_json(folder / RECORD)["files"], "Modelfile", "README.md", RECORD]
    files = {name: folder / name for name in names}
    sent = publish_files("--push_to_hub", repo, files, "GGUF files", private or None)
    print_main(f"hub       {repo} {'holds the files' if sent else 'holds these files already'}")
