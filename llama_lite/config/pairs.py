"""Lists of `NAME=VALUE`: the folders of a mixture, validation sets, and what belongs to one folder of several."""

import re
from collections.abc import Iterable

from ..errors import Problems

SET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
RESERVED = {"end"}  # eval_end_loss is a tuning run's


def split_pair(item: str) -> tuple[str, str]:
    """(text before the last `=`, text behind it); the text behind is empty where there is no `=`."""
    name, sign, value = item.rpartition("=")
    return (name, value) if sign else (value, "")


def mixture_weights(items: Iterable[str]) -> dict[str, float]:
    """{prepared folder: weight} of --mixture. Raises Refusal with everything that is wrong."""
    problems, found = Problems(), {}
    for item in items:
        folder, value = split_pair(item)
        try:
            weight = float(value)
        except ValueError:
            problems.append(f"--mixture {item}: give each folder its weight, as data/web=0.7.")
            continue
        problems.add_if(folder in found, f"--mixture {folder}: given twice.")
        found[folder] = weight
    problems.end()
    return found


def validation_folders(items: Iterable[str]) -> dict[str, str]:
    """{name: prepared folder} of --validation. Raises Refusal with everything that is wrong."""
    problems, found = Problems(), {}
    for item in items:
        name, _, folder = item.partition("=")
        if not folder:
            problems.append(f"--validation {item}: give a name and a prepared folder, as code=data/code.")
        elif not SET_NAME.fullmatch(name) or name in RESERVED:
            problems.append(f"--validation {name}: a name has letters, digits, `.`, `_` and `-`, and is not `end`.")
        else:
            problems.add_if(name in found, f"--validation {name}: given twice.")
            found[name] = folder
    problems.end()
    return found


def epoch_limits(items: Iterable[str]) -> dict[str, float]:
    """{prepared folder: most epochs} of --allow_epochs_of, infinite where no number is given. Raises Refusal."""
    problems, found = Problems(), {}
    for item in items:
        folder, value = split_pair(item)
        try:
            limit = float(value or "inf")
        except ValueError:
            limit = 0.0
        problems.add_if(
            not limit > 0, f"--allow_epochs_of {item}: give a folder, or the most epochs of one, as data/code=4."
        )
        found[folder] = limit
    problems.end()
    return found


def hub_ids(text: str | None) -> dict[str, str]:
    """{prepared folder: Hub id} of a --prepared_hub_id of a mixture. Raises Refusal."""
    problems, found = Problems(), {}
    for item in filter(None, map(str.strip, (text or "").split(","))):
        folder, repo = split_pair(item)
        problems.add_if(
            not repo,
            f"--prepared_hub_id {item}: of a mixture, give it per folder: data/web=you/web,data/code=you/code.",
        )
        found[folder] = repo
    problems.end()
    return found
