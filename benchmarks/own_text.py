"""Thirty folders of text such as people have, each trained on, tuned and evaluated by what the documentation says and
nothing else.

    python benchmarks/own_text.py --hours 0.015          # about an hour and a half on two cores
    python benchmarks/own_text.py --only markdown,logs   # some of them
    python benchmarks/own_text.py --dry_run              # the plan of each; trains nothing

The folders are made of what the installed packages hold: prose, code, tables, pages, rows, other languages, one file or
thousands, from 0.2 to 50 MB. The first command is `accelerate launch run_pretrain.py --dataset FOLDER`, the next two
are those that it prints in the end. `--hours` is added to the first two, and a lower `--limit` to the third, so that
all of it fits into an afternoon. A refusal of any is a failure.
"""

import argparse
import csv
import gzip
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_lite.data.formats import Skipped
from llama_lite.data.installed import installed_files, package_root
from llama_lite.data.sources import resolve
from llama_lite.files import read_json, write_json

SITE = Path(package_root("transformers")).parent
STDLIB = Path(package_root("python"))


def files(ending: str, most: float, count: int = 10**6, least_size: int = 500) -> list[Path]:
    """Files of an ending in the installed packages, up to `most` bytes in all, in a fixed order."""
    found, total = [], 0
    for path in sorted([*SITE.rglob(f"*{ending}"), *STDLIB.rglob(f"*{ending}")]):
        if path.is_file() and not path.is_symlink() and path.stat().st_size >= least_size and len(found) < count:
            total += path.stat().st_size
            if total > most:
                break
            found.append(path)
    return found


def copied(folder: Path, ending: str, most: float, count: int = 10**6, nested: bool = True) -> None:
    for number, path in enumerate(files(ending, most, count)):
        target = folder / (f"part{number % 7}" if nested else "") / f"{number:05d}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def documents(characters: float) -> Iterator[str]:
    """Real English: docstrings of the installed packages."""
    for document in resolve("installed-docs").documents(Skipped()):
        if characters <= 0:
            return
        characters -= len(document.text)
        yield document.text


def foreign(pattern: str, characters: int) -> str:
    """Lines of the harness's tasks that are written in another script."""
    lines, size = [], 0
    for path in sorted((SITE / "lm_eval/tasks").rglob("*")):
        if path.suffix in (".yaml", ".py", ".json", ".md", ".txt") and size < characters:
            for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
                if re.search(pattern, line):
                    lines.append(line.strip())
                    size += len(line)
    while lines and size < characters:
        lines, size = lines * 2, size * 2
    return "\n".join(lines)[:characters]


def rows(folder: Path, name: str, records: Iterator[dict], opener: Callable = open) -> None:
    with opener(folder / name, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def table(folder: Path, name: str, columns: list[str], values: Iterator[list], delimiter: str = ",") -> None:
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(values)


def parquet(folder: Path, name: str, column: str, characters: float) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = list(documents(characters))
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), folder / name)


def log_lines(folder: Path) -> None:
    chance, modules = random.Random(0), installed_files("installed-docs")[0][:400]
    with open(folder / "server.log", "w") as file:
        for second in range(40_000):
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(1_700_000_000 + 7 * second))
            level, took = chance.choice(("INFO", "INFO", "DEBUG", "WARN")), chance.expovariate(0.01)
            file.write(
                f"{stamp} {level} [worker-{chance.randrange(8)}] GET /{chance.choice(modules)} 200 {took:.1f}ms\n"
            )


def verses(folder: Path) -> None:
    for number, text in enumerate(documents(400_000)):
        words = text.split()
        lines = [" ".join(words[i : i + 6]) for i in range(0, len(words), 6)]
        (folder / f"poem-{number:04d}.txt").write_text(
            "\n\n".join("\n".join(lines[i : i + 4]) for i in range(0, len(lines), 4))
        )


def mixed(folder: Path) -> None:
    for ending, most in ((".md", 3e5), (".py", 4e5), (".html", 2e5), (".csv", 2e5), (".json", 2e5), (".png", 5e5)):
        copied(folder, ending, most)
    (folder / "notes.pdf").write_bytes(b"%PDF-1.7\n" + bytes(range(256)) * 40)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]\n" * 100)
    (folder / "old.txt").write_bytes("Grüße aus Köln, schöne Straße\n".encode("latin-1") * 50)


def pages(folder: Path) -> None:
    for number, text in enumerate(documents(1_500_000)):
        body = "".join(f"<p>{part}</p>" for part in text.replace("&", "&amp;").replace("<", "&lt;").split("\n\n"))
        (folder / f"{number:05d}.html").write_text(
            f"<html><head><title>Page {number}</title></head><body><nav>Home | About</nav><article><h1>Page"
            f" {number}</h1>{body}</article></body></html>"
        )


def mails(folder: Path) -> None:
    for number, text in enumerate(documents(600_000)):
        (folder / f"{number:05d}.eml").write_text(
            f"From: a@example.org\nTo: b@example.org\nSubject: Message {number}\nContent-Type: text/plain;"
            f" charset=utf-8\n\n{text}\n",
            errors="replace",
        )


def notebooks(folder: Path) -> None:
    for number, text in enumerate(documents(500_000)):
        cells = [
            {"cell_type": "markdown", "source": [text]},
            {"cell_type": "code", "source": ["print(1)"], "outputs": [{"text": "1"}]},
        ]
        (folder / f"{number:05d}.ipynb").write_text(json.dumps({"cells": cells}))


def many(folder: Path) -> None:
    for number, text in zip(range(2000), documents(10**9), strict=False):
        target = folder / f"{number % 40:02d}" / f"{number:05d}.txt"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)


FOLDERS: dict[str, Callable[[Path], None]] = {
    "one small text": lambda f: (f / "book.txt").write_text("\n\n".join(documents(200_000))),
    "one text": lambda f: (f / "book.txt").write_text("\n\n".join(documents(3_000_000))),
    "one giant line": lambda f: (f / "line.txt").write_text(" ".join(" ".join(documents(2_000_000)).split())),
    "no blanks": lambda f: (f / "data.txt").write_text("".join("".join(documents(500_000)).split())),
    "2000 texts": many,
    "markdown": lambda f: copied(f, ".md", 2e6),
    "restructured text": lambda f: copied(f, ".rst", 3e6),
    "licences": lambda f: copied(f, ".txt", 1e6),
    "python": lambda f: copied(f, ".py", 5e6),
    "much python": lambda f: copied(f, ".py", 5e7),
    "c": lambda f: copied(f, ".h", 3e6),
    "javascript and css": lambda f: (copied(f, ".js", 3e6), copied(f, ".css", 1e6)),
    "yaml": lambda f: copied(f, ".yaml", 2e6),
    "pages": pages,
    "mails": mails,
    "notebooks": notebooks,
    "tables of numbers": lambda f: copied(f, ".csv", 1e6),
    "a table of text": lambda f: table(
        f, "table.csv", ["id", "title", "body"], ([i, text[:20], text] for i, text in enumerate(documents(1e6)))
    ),
    "a table of tabs": lambda f: table(f, "t.tsv", ["description"], ([text] for text in documents(5e5)), "\t"),
    "rows": lambda f: rows(f, "rows.jsonl", ({"text": text, "source": "x"} for text in documents(2e6))),
    "packed rows": lambda f: rows(f, "rows.jsonl.gz", ({"content": text} for text in documents(2e6)), gzip.open),
    "an array": (
        lambda f: (f / "rows.json").write_text(json.dumps([{"article": text} for text in documents(6e5)], indent=1))
    ),
    "parquet": lambda f: parquet(f, "part-0.parquet", "text", 2e6),
    "parquet of another column": lambda f: parquet(f, "part-0.parquet", "message", 1e6),
    "chinese": lambda f: (f / "zh.txt").write_text(foreign(r"[\u4e00-\u9fff]", 400_000)),
    "arabic": lambda f: (f / "ar.txt").write_text(foreign(r"[\u0600-\u06ff]", 300_000)),
    "poems": verses,
    "logs": log_lines,
    "mixed": mixed,
    "two spaces and (brackets) [1]": lambda f: rows(
        f, "my rows [v2].jsonl", ({"text": text} for text in documents(4e5))
    ),
}


def run(command: list[str], folder: Path) -> tuple[int, str, float]:
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - began


def here(command: str) -> list[str]:
    """A command as it was printed, with this environment's Python and this checkout's scripts."""
    words = shlex.split(command)
    scripts = [str(ROOT / word) if word.startswith("run_") and word.endswith(".py") else word for word in words]
    return (
        [sys.executable, "-m", "accelerate.commands.launch", *scripts[2:]]
        if words[:2] == ["accelerate", "launch"]
        else [sys.executable, *scripts[1:]]
    )


def trial(name: str, work: Path, arguments) -> dict:
    text = work / "texts" / name
    text.mkdir(parents=True)
    FOLDERS[name](text)
    size = sum(path.stat().st_size for path in text.rglob("*") if path.is_file())
    found = {"megabytes": round(size / 1e6, 2), "files": sum(path.is_file() for path in text.rglob("*"))}
    command = ["accelerate", "launch", "run_pretrain.py", "--dataset", f"texts/{name}"]
    more = ["--dry_run"] if arguments.dry_run else ["--hours", str(arguments.hours)] if arguments.hours else []
    code, told, seconds = run(here(shlex.join([*command, *more])), work)
    found |= {"pretrain": code, "seconds": [round(seconds)]}
    if code or arguments.dry_run:
        return found | ({"said": told[-1500:]} if code else {})
    found["bits_per_byte"], found["finished"] = (
        re.search(p, told).group(1) for p in (r"\(([\d.]+) bits", r"finished +(.*)")
    )
    tune, evaluate = (line.removeprefix("next").strip() for line in told.split("\nnext ")[1].splitlines()[:2])
    evaluate = evaluate.replace("--limit 100", "--limit 10")
    for step, line, extra in (
        ("tune", tune, ["--hours", str(arguments.hours)] if arguments.hours else []),
        ("evaluate", evaluate, []),
    ):
        code, told, seconds = run([*here(line), *extra], work)
        found[step] = code
        found["seconds"].append(round(seconds))
        if code:
            return found | {"said": told[-1500:]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, help="of each training and tuning (default: about ten minutes each)")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    result = {} if arguments.dry_run else read_json(arguments.output) or {}
    for name in arguments.only.split(",") if arguments.only else FOLDERS:
        with tempfile.TemporaryDirectory() as folder:
            result[name] = trial(name, Path(folder), arguments)
        print(name, json.dumps(result[name]), flush=True)
        if not arguments.dry_run:
            write_json(arguments.output, result)
    failed = [
        name for name, found in result.items() if any(found.get(step, 0) for step in ("pretrain", "tune", "evaluate"))
    ]
    print(f"{len(result) - len(failed)} of {len(result)} without a refusal{f'; failed: {failed}' if failed else ''}")


if __name__ == "__main__":
    main()
