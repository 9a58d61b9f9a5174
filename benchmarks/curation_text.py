"""The text of the `curation` study: two kinds of documents in three corpora that begin with the same held-out ones.

    python benchmarks/curation_text.py --curated data/demo-long/curated/kept --raw installed-files --output data/curation
    python benchmarks/curation_text.py --curated HuggingFaceFW/fineweb-edu --raw HuggingFaceFW/fineweb --config sample-10BT --characters 500000000 ...

Writes curated.jsonl, raw.jsonl and half.jsonl (documents of both in turn, the same number of characters of each), and
held-out-curated.jsonl and held-out-raw.jsonl. A document is held out by a hash of where it is from (its id, less a line
number): what both kinds have of one place is held out in both, so that no corpus holds what another is tested on. Every
corpus begins with the same held-out documents, so that the first tokens, a run's validation slice, are the same for
all. Documents are cut at 6,000 characters.
"""

import argparse
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_lite.data import formats, installed, sources

CUT = 6_000
HELD_OUT = (
    2**256 // 32
)  # of hashes; installed text comes in the order of these, so the evaluation's own held-out modules are among them


def documents(dataset: str, config: str | None) -> Iterator[tuple[bool, str, str]]:
    """(held out, text, id) in the source's order."""
    source = sources.resolve(dataset, config)
    columns = () if source.kind in installed.INSTALLED else ("id",)
    for document in source.documents(formats.Skipped(), columns):
        name = document.metadata.get("id") or document.id
        place = re.sub(r":\d+$", "", name)
        yield int.from_bytes(hashlib.sha256(place.encode()).digest()) < HELD_OUT, document.text[:CUT], name


def taken(rows: Iterator[tuple[bool, str, str]], held: bool, characters: int) -> Iterator[dict]:
    """Documents that are held out, or that are not, until there are so many characters. Stops the script where there
    are fewer.
    """
    total = 0
    for is_held, text, name in rows:
        if is_held == held:
            yield {"text": text, "id": name}
            total += len(text)
            if total >= characters:
                return
    raise SystemExit(
        f"there are only {total:,} characters of {'held-out ' if held else ''}text, and {characters:,} are wanted: give"
        " a smaller number."
    )


def in_turn(*kinds: Iterator[dict]) -> Iterator[dict]:
    """Documents of all kinds, always of the one that has had the fewest characters; ends with the first that ends."""
    totals = [0] * len(kinds)
    while True:
        place = totals.index(min(totals))
        row = next(kinds[place], None)
        if row is None:
            return
        totals[place] += len(row["text"])
        yield row


def write(path: Path, rows: Iterator[dict]) -> None:
    count, characters = 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count, characters = count + 1, characters + len(row["text"])
    print(f"{path}: {count:,} documents, {characters:,} characters", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curated", required=True, help="files with `text` and `id`, or a Hub dataset")
    parser.add_argument("--raw", required=True, help="the same, or installed-files")
    parser.add_argument("--config", help="configuration of both on the Hub, such as sample-10BT")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=8_000_000, help="of each corpus, beside what is held out")
    parser.add_argument("--held_out", type=int, default=600_000, help="characters of each kind that are held out")
    arguments = parser.parse_args()
    places = {"curated": arguments.curated, "raw": arguments.raw}
    held = {
        kind: list(taken(documents(place, arguments.config), True, arguments.held_out))
        for kind, place in places.items()
    }
    for kind, rows in held.items():
        write(arguments.output / f"held-out-{kind}.jsonl", iter(rows))

    def learnt(kind: str, share: float = 1.0) -> Iterator[dict]:
        return taken(documents(places[kind], arguments.config), False, int(share * arguments.characters))

    for name, rows in (
        ("curated", learnt("curated")),
        ("raw", learnt("raw")),
        ("half", in_turn(learnt("curated", 0.5), learnt("raw", 0.5))),
    ):
        write(arguments.output / f"{name}.jsonl", itertools.chain(in_turn(*map(iter, held.values())), rows))


if __name__ == "__main__":
    main()
