"""A commented config of a run that the text, the machine and the time suggest: `--suggest mine.yaml`."""

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..distributed import LAUNCH_COMMAND, print_main
from ..files import write_text
from ..provenance import cpu_name

NOT_WRITTEN = {  # arguments of one call, not of the run
    "suggest",
    "config",
    "dry_run",
    "prepare_only",
    "add_index",
    "publish_only",
    "plan_launch",
    "plan_mfu",
    "plan_price",
    "strict_plan",
    "explicit_args",
    "hours",
}

WIDTH = 40  # characters of a value, before its comment


def write_suggestion(
    path: str, script: str, groups: Sequence, explicit_args: dict, reasons: dict[str, str], plan_lines: list[str]
) -> None:
    """Write the explicit and the derived arguments to a YAML file, group by group, each derived value with its reason.

    script: the script that reads the file. groups: the dataclasses of arguments. reasons: {argument: reason} of the
    derived ones; those without a reason are derived again when a run starts, and left out. The run has a folder of its
    own: that of the text may hold a run already.
    """
    own = {} if "output_dir" in explicit_args else {"output_dir": _free_folder(Path("runs") / Path(path).stem)}
    plain = own.get("output_dir") == str(Path("runs") / Path(path).stem)
    named = "named after this file" if plain else "named after this file; the folder without the number is there"
    reasons = reasons | dict.fromkeys(own, named)
    lines = [
        f"# A run of {script} that this text, this machine ({cpu_name()}) and this time suggest. Change what you like.",
        "#",
    ]
    lines += [f"#   {line}" for line in plan_lines]
    for group in groups:
        yaml_lines = []
        for field in dataclasses.fields(group):
            value = own.get(field.name, getattr(getattr(group, field.name), "value", getattr(group, field.name)))
            reason = "given" if field.name in explicit_args else reasons.get(field.name)
            if reason and field.name not in NOT_WRITTEN:
                text = (
                    yaml.safe_dump({field.name: value}, default_flow_style=True, width=10**6)
                    .strip()
                    .removeprefix("{")
                    .removesuffix("}")
                )
                yaml_lines.append(f"{text:<{WIDTH}} # {reason}")
        if yaml_lines:
            lines += ["", f"# {group._argument_group_name.partition(' (')[0]}", *yaml_lines]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), "\n".join(lines) + "\n")
    print_main(f"suggested {path}; run it with: {LAUNCH_COMMAND} {script} --config {path}")
    print_main(textwrap.indent("\n".join(lines), "          "))


def _free_folder(path: Path) -> str:
    """A folder that is not there: `path`, `path-2` and so on."""
    return next(
        str(folder)
        for number in itertools.count(1)
        if not (folder := path if number == 1 else path.with_name(f"{path.name}-{number}")).exists()
    )
