"""A commented config of a run that the text, the machine and the time suggest: `--suggest mine.yaml`."""

import dataclasses
import textwrap
from pathlib import Path

import yaml

from ..distributed import print_main
from ..files import write_text
from ..provenance import cpu_name

OF_THE_CALL = {
    "suggest",
    "config",
    "dry_run",
    "prepare_only",
    "publish_only",
    "plan_launch",
    "plan_mfu",
    "strict_plan",
    "given",
    "hours",
}

WIDTH = 40  # of a value, before its comment


def write_suggestion(
    path: str, script: str, groups, given: dict, reasons: dict[str, str], plan_lines: list[str]
) -> None:
    """Write what was given and what was derived, group by group, each derived value with its reason.

    script: which reads it. reasons: {argument: why} of the derived ones; those without a reason, which follow at the
    start of a run, are left out.
    """
    lines = [
        f"# A run of {script} that this text, this machine ({cpu_name()}) and this time suggest. Change what you like.",
        "#",
    ]
    lines += [f"#   {line}" for line in plan_lines]
    for group in groups:
        yaml_lines = []
        for field in dataclasses.fields(group):
            value = getattr(getattr(group, field.name), "value", getattr(group, field.name))
            why = "given" if field.name in given else reasons.get(field.name)
            if why and field.name not in OF_THE_CALL:
                text = (
                    yaml.safe_dump({field.name: value}, default_flow_style=True, width=10**6)
                    .strip()
                    .removeprefix("{")
                    .removesuffix("}")
                )
                yaml_lines.append(f"{text:<{WIDTH}} # {why}")
        if yaml_lines:
            lines += ["", f"# {group._argument_group_name.partition(' (')[0]}", *yaml_lines]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), "\n".join(lines) + "\n")
    print_main(f"suggested {path}; run it with: accelerate launch {script} --config {path}")
    print_main(textwrap.indent("\n".join(lines), "          "))
