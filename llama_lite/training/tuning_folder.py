"""The default folder of a tuning run: named after its base, its rows, and, where these had a run already, a number."""

import itertools
import os
from pathlib import Path

from ..data.recipes import name_of
from ..distributed import print_main
from ..files import read_json
from ..models.references import weights_digest
from ..paths import beside_run


def output_dir(base: str, explicit_args: dict | None = None) -> str:
    """The default folder of a tuning run of `base`: next to it, where that is a run, or next to the run that it is of.

    Named after the rows of `explicit_args`, too, where that folder holds a run on other ones. With a number where it
    holds a run on other weights of the base, which was trained further since.
    """
    folder = beside_run(Path(base))
    near = str(folder).startswith("runs/")
    name = f"{folder}-sft" if near else f"runs/{name_of(str(folder).partition('@')[0])}-sft"
    return _of_weights(_of_rows(name, explicit_args or {}), Path(base))


def _of_rows(folder: str, explicit_args: dict) -> str:
    """The folder, or one that is named after the given rows too, where it holds a run on other ones."""
    dataset, record = explicit_args.get("dataset"), read_json(Path(folder) / "run.json") or {}
    there = record.get("settings", record.get("given", {})).get("dataset", dataset)
    if dataset in (None, there) or (Path(dataset).exists() and os.path.realpath(dataset) == os.path.realpath(there)):
        return folder
    return f"{folder}-{name_of(dataset)}"


def _of_weights(folder: str, base: Path) -> str:
    """The folder, or the first of `folder-2` ... that holds no run on other weights than those in `base`."""
    digest = None
    for number in itertools.count(1):
        name = folder if number == 1 else f"{folder}-{number}"
        tuned = (read_json(Path(name) / "run.json") or {}).get("base", {}).get("sha256")
        if tuned is None or not any(base.glob("model*.safetensors")):
            break
        digest = digest or weights_digest(base)
        if digest == tuned:
            break
    if number > 1:
        print_main(f"folder    {name}: the runs before it are of {base} as it was before it was trained further")
    return name
