"""Prepare the four kinds of text of the demo as validation sets: documentation, project pages, source code, science.

    python -m llama_lite text_kinds data/kinds --tokenizer data/web/tokenizer
    accelerate launch run_pretrain.py --config my.yaml --validation docs=data/kinds/docs code=data/kinds/code

The texts come from the installed packages and are those of the tasks embedded_docs, embedded_web, embedded_code and
embedded_science of run_eval.py. No download.
"""

import argparse
import dataclasses
from pathlib import Path

from ..distributed import print_main
from ..errors import Refusal
from ..files import write_text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        "python -m llama_lite text_kinds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="folder that gets one prepared folder for each kind: docs, web, code, science")
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="the tokenizer of the run: PREPARED/tokenizer of a prepared folder, gpt2, or a Hub id",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Prepare the four folders, and print the argument that names them."""
    args = parse(argv)
    from ..data.held_out import held_out_documents
    from ..data.tokenizer import load_tokenizer
    from ..evaluation.tasks import embedded
    from ..evaluation.tasks.definition import sample_texts

    if args.tokenizer == "train":
        raise Refusal("--tokenizer train: give the tokenizer of the run, as data/web/tokenizer.")
    tokenizer, sets = load_tokenizer(args.tokenizer), []
    kinds = {
        "docs": held_out_documents,
        "web": embedded.web_documents,
        "code": embedded.code_documents,
        "science": embedded.science_documents,
    }
    for name, documents in kinds.items():
        texts = [item["text"] for item in sample_texts(documents(), name)]
        tokens = prepare_kind(Path(args.folder) / name, texts, args.tokenizer, tokenizer)
        print_main(f"prepared  {args.folder}/{name}: {len(texts):,} documents, {tokens:,} validation tokens")
        sets.append(f"{name}={args.folder}/{name}")
    print_main(f"next      accelerate launch run_pretrain.py ... --validation {' '.join(sets)}")


def prepare_kind(folder: Path, texts: list[str], name: str, tokenizer) -> int:
    """Prepare a folder whose validation slice is all texts but the last; returns the tokens of the slice.

    The last one is the training slice, which a prepared folder must have and a validation set does not read. name: of
    the tokenizer.
    """
    import json

    from ..config.pretrain import CurationArguments, DataArguments
    from ..data.given_text import Text
    from ..data.preparation import prepare
    from ..data.tokenizer import Encoder

    _, ends, _ = Encoder(tokenizer).batch(texts)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.jsonl")
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataArguments(
        dataset=str(path), prepared_dir=str(folder), tokenizer=name, validation_tokens=int(ends[-2]), prepare_workers=1
    )
    given = {"dataset", "tokenizer", "validation_tokens"}
    manifest = prepare(data, dataclasses.asdict(CurationArguments()), Text(data), given)
    return manifest["splits"]["validation"]["tokens"]
