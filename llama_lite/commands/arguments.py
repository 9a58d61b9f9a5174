"""Write the table of all arguments of the four scripts, and the arguments reference, from the dataclasses.

    python -m llama_lite.commands.arguments

Writes llama_lite/config/arguments.json (what `--help` is printed from) and docs/arguments.md. Run it after a change to
an argument, its help or its default, and after an upgrade of transformers or TRL.
"""

import dataclasses
import itertools
import json
import re

from ..config.arguments import TABLE, Argument, Script
from ..config.eval import eval_parser
from ..config.pretrain import pretrain_parser
from ..config.sft import sft_parser
from ..config.study import study_parser, study_script
from ..files import write_text
from ..paths import ROOT

REFERENCE = ROOT / "docs" / "arguments.md"
MACHINE_DEFAULTS = {"prepare_workers"}  # defaults that differ from machine to machine are not in the table

INTRODUCTION = """# Arguments

Every argument of the four scripts. `python -m llama_lite.commands.arguments` writes this page from the dataclasses in
`llama_lite/config/`; do not edit it.

`--config FILE.yaml` sets the same names in a YAML file (one file; without the leading `--`). Values on the command line
override it. With no arguments, the scripts use the demo config. A script rejects unknown names, arguments given twice,
and values of the wrong type. Every flag can also be written with hyphens (`--max-steps`). A switch (type `bool`) is
set by its flag alone.

Each section lists the script's own arguments first. The arguments inherited from
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)
and [trl.SFTConfig](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig) follow with one line each, from the
libraries' own help; `--help_all` prints all of it.
"""


def scripts() -> list[Script]:
    """The four scripts with all of their arguments, from the dataclasses."""
    found = [pretrain_parser().script, sft_parser().script, eval_parser().script, study_script(study_parser())]
    for script in found:
        script.arguments[:] = [
            dataclasses.replace(argument, default=None) if argument.name in MACHINE_DEFAULTS else argument
            for argument in script.arguments
        ]
    return found


def table_text() -> str:
    """The content of arguments.json."""
    table = {script.name: dataclasses.asdict(script) for script in scripts()}
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def reference_text() -> str:
    """The content of docs/arguments.md."""
    parts = [INTRODUCTION]
    for script in scripts():
        summary = script.description.partition("\n")[0]
        parts.append(f"\n## {script.name}\n\n{summary}\n")
        ordered = sorted(script.arguments, key=lambda argument: argument.library is not None)
        for (group, library), arguments in itertools.groupby(ordered, lambda one: (one.group, one.library)):
            parts.append(f"\n### {group}{f', inherited from {library}' if library else ''}\n")
            parts.append("\n| argument | type | default | meaning |\n| --- | --- | --- | --- |\n")
            parts.extend(_row(argument) for argument in arguments)
    return "".join(parts)


def _row(argument: Argument) -> str:
    """One argument as a row of a Markdown table; of an inherited one's help the first sentence."""
    flags = " ".join(f"`{flag}`" for flag in argument.shown_flags())
    kind = "bool" if argument.is_switch else "one of " + ", ".join(map(str, argument.choices or []))
    if not argument.is_switch and not argument.choices:
        kind = " or ".join(argument.kinds)
    meaning = argument.help
    if argument.library:
        first = re.match(r".+?[.](?=\s+[A-Z`]|$)", " ".join(meaning.split()))
        meaning = first[0] if first else meaning
    if argument.required_value:
        meaning = f"Must stay {argument.required_value}. {meaning}"
    cells = (flags, kind, argument.default_text() or "", meaning)
    return "".join(f"| {cell.replace('|', chr(92) + '|')} " for cell in cells) + "|\n"


def main() -> None:
    write_text(TABLE, table_text())
    write_text(REFERENCE, reference_text())


if __name__ == "__main__":
    main()
