"""The arguments of the scripts as a table, and what can be answered from it without torch, transformers and TRL:
`--help`, `--help_all`, misspelt names, an argument that is given twice, and a YAML file that cannot be used.

`arguments.json` is that table, written from the dataclasses by `python -m llama_lite.commands.arguments`; a test keeps
it equal to them. Everything else is decided by `parser.Parser`, which applies the same checks to the dataclasses.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import re
import sys
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import yaml

from ..distributed import print_main
from ..errors import Refusal
from ..files import read_json, read_yaml
from ..paths import ROOT
from .run_values import LENGTH, values_of_run

TABLE = Path(__file__).with_name("arguments.json")
# owner/name, as the Hub takes them: no `--`, `..` or `.git`, no `-` or `.` at an end, 96 characters each
REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))(?!.*\.git$)\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)

SHORT_NAMES = {  # what other programs call an argument
    "lr": "learning_rate",
    "bs": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "wd": "weight_decay",
    "warmup": "warmup_steps",
    "seq_len": "block_size",
    "seq_length": "block_size",
    "context_length": "block_size",
    "max_seq_length": "max_length",
    "model": "model_config",
    "data": "dataset",
    "data_path": "dataset",
    "train_file": "dataset",
    "out_dir": "output_dir",
    "output": "output_dir",
    "dtype": "precision",
    "mixed_precision": "precision",
    "threads": "cpu_threads",
    "time": "hours",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "resume": "resume_from_checkpoint",
}

# None is a value here (all checkpoints, no padding); elsewhere it is as if nothing was given
NONE_COUNTS = {"save_total_limit", "pad_to_multiple_of"}
BLANKS_COUNT = {"document_separator"}  # blanks and line breaks alone are a value here; elsewhere they are nothing

PAIRS = {"mixture", "validation", "allow_epochs_of", "prepared_hub_id"}  # of `NAME=VALUE`; in YAML also a mapping

# words for a switch in YAML
SWITCHES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
HELP_FLAGS = ("-h", "--help")
HELP_ALL_FLAGS = ("--help_all", "--help-all")
NAMED_INHERITED = ("push_to_hub", "hub_model_id", "per_device_train_batch_size", "report_to")  # in the short help
HELP_ALL = "show every argument, also those inherited from libraries, and exit"
LONG_CHOICES = 60  # characters; longer lists of choices stand in the help text, not behind the flag
METAVARS = {"int": "INT", "float": "FLOAT", "dict": "JSON", "bool": "BOOL"}  # TEXT for any other type


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of a script.

    kinds: names of the types that a value may have, without None. optional: whether None is a value. is_text: whether
    the command line takes any text. nargs: argparse's. follows_from: what the value follows from where nobody gives one
    (`{}`: the default). library: what the argument is inherited from (transformers or trl), None for the script's own.
    required_value: the only value that is accepted, and why.
    """

    name: str
    flags: list[str]
    group: str
    kinds: list[str]
    optional: bool
    is_text: bool
    nargs: str | None
    choices: list | None
    default: object
    help: str
    follows_from: str | None = None
    library: str | None = None
    required_value: str | None = None

    @property
    def is_switch(self) -> bool:
        """Whether the flag alone is a value."""
        return self.nargs in ("?", "0")

    def shown_flags(self) -> list[str]:
        """Its flags with underscores alone: `--x`, and `--no_x` where there is one."""
        return [flag for flag in self.flags if "-" not in flag.removeprefix("--") or flag == "-h"]

    def metavar(self) -> str:
        """What stands behind the flag."""
        if self.choices and len(str(self.choices)) <= LONG_CHOICES:
            return f"{{{','.join(map(str, self.choices))}}}"
        return next((METAVARS[kind] for kind in self.kinds if kind in METAVARS), "TEXT")

    def default_text(self) -> str | None:
        """The default as the help shows it; None where the help text has it, or where it is empty."""
        if "(default" in self.help:
            return None
        if self.follows_from:
            return self.follows_from.format(self.default)
        if self.default in (None, "", []):
            return None
        return " ".join(map(str, self.default)) if isinstance(self.default, list) else str(self.default)

    def help_text(self) -> str:
        """The help with the value that is required, the choices that are too many for the flag, and the default."""
        parts = [f"Must stay {self.required_value}."] if self.required_value else []
        parts.append(self.help)
        if self.choices and len(str(self.choices)) > LONG_CHOICES:
            parts.append(f"One of {', '.join(map(str, self.choices))}.")
        if default := self.default_text():
            parts.append(f"(default: {default})")
        return " ".join(parts)


@dataclasses.dataclass(frozen=True)
class Script:
    """A script's name, the texts of its help, and all of its arguments (`help`, `help_all` and `config` included)."""

    name: str
    usage: str | None
    description: str
    arguments: list[Argument]

    def by_flag(self) -> dict[str, Argument]:
        """{flag: its argument}."""
        return {flag: argument for argument in self.arguments for flag in argument.flags}


def load_script(name: str) -> Script:
    """A script's entry in the table."""
    entry = read_json(TABLE)[name]
    return Script(**{**entry, "arguments": [Argument(**argument) for argument in entry["arguments"]]})


def answer_early(name: str, argv: list[str] | None) -> list[str]:
    """The arguments of the command line (argv, or the process's own). Print the help and end the process, or raise
    Refusal, where the table is enough to do so.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv:
        check_command(load_script(name), argv)
    return argv


def arguments_of(parser: argparse.ArgumentParser, hints: dict) -> list[Argument]:
    """An argparse parser's arguments, one for each name: `--no_x` belongs to `x`.

    hints: {name: type} of their values; what has none is text.
    """
    found = {}
    for action in parser._actions:
        name, default = action.dest, action.default
        if name in found:
            found[name].flags.extend(action.option_strings)
            continue
        choices = [item.value for item in action.type] if isinstance(action.type, type(Enum)) else action.choices
        hint = hints.get(name, str)
        is_union = get_origin(hint) in (Union, UnionType)
        types = [kind for kind in (get_args(hint) if is_union else [hint]) if kind is not type(None)]
        found[name] = Argument(
            name=name,
            flags=list(action.option_strings),
            group="General",
            kinds=[(get_origin(kind) or kind).__name__ for kind in types],
            optional=type(None) in get_args(hint),
            is_text=action.type in (None, str),
            nargs=None if action.nargs is None else str(action.nargs),
            choices=None if choices is None else list(choices),
            default=None if default == argparse.SUPPRESS else getattr(default, "value", default),
            help=action.help.replace("%%", "%"),
        )
    general = {"help", "help_all", "config"}
    return sorted(found.values(), key=lambda argument: argument.name not in general)


# ---- Help ----


def help_text(script: Script, everything: bool) -> str:
    """The text of `--help`, or with `everything` that of `--help_all`."""
    inherited = [argument for argument in script.arguments if argument.library]
    libraries = " and ".join(sorted({argument.library for argument in inherited}))
    named = ", ".join(f"--{argument.name}" for argument in inherited if argument.name in NAMED_INHERITED)
    last = (
        f"`{script.name} --help_all` also lists the {len(inherited)} arguments inherited from {libraries} ({named},"
        " ...)."
    )
    parser = argparse.ArgumentParser(
        script.name,
        script.usage,
        script.description,
        epilog=None if everything or not inherited else last,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    groups = {}
    for argument in sorted(script.arguments, key=lambda argument: argument.library is not None):
        if argument.library and not everything:
            continue
        title = f"{argument.group}, inherited from {argument.library}" if argument.library else argument.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = {"action": "store_true"}
        if not argument.is_switch:
            kind = {"metavar": argument.metavar(), "nargs": argument.nargs}
        groups[title].add_argument(*argument.shown_flags(), help=argument.help_text().replace("%", "%%"), **kind)
    return parser.format_help()


def show_help(script: Script, argv: list[str]) -> None:
    """Print the help that a command line asks for and end the process; nothing where it asks for none."""
    everything = any(word in HELP_ALL_FLAGS for word in argv)
    if everything or any(word in HELP_FLAGS for word in argv):
        print_main(help_text(script, everything).rstrip())
        raise SystemExit(0)


# ---- Names, and values of YAML ----


def check_command(script: Script, argv: list[str]) -> tuple[list[str], dict]:
    """(the command line without `--config`, {argument: value} of its YAML file). Prints the help where it is asked for.

    Raises Refusal with everything that is wrong in the names of both, and in the values of the YAML file.
    """
    show_help(script, argv)
    argv = split_config(argv)
    problems, config = repeated(argv, script), {}
    if "--config" in argv and not problems:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise Refusal("--config needs a YAML file, e.g. --config configs/pretrain/demo.yaml.")
        known = script.by_flag()
        typed = {known[flag].name for word in argv if (flag := word.split("=")[0]) in known}
        config, wrong = _typed_config(script, argv[at + 1], _read_config(script, argv[at + 1], typed))
        if typed & LENGTH:  # of two lengths the one on the command line wins, too
            config = {name: config[name] for name in config if name not in LENGTH - typed}
        problems += wrong
        argv = argv[:at] + argv[at + 2 :]
    problems += unknown_flags(script, argv)
    if problems:
        raise Refusal(" ".join(problems))
    return argv, config


def split_config(argv: list[str]) -> list[str]:
    """A command line with `--config=PATH` as two words."""
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def run_of_config(argv: list[str]) -> str | None:
    """The folder that a command line gives as --config, which is that of a run; None for a file, or none."""
    pairs = itertools.pairwise(split_config(argv))
    return next((path for flag, path in pairs if flag == "--config" and Path(path).is_dir()), None)


def repeated(argv: list[str], script: Script) -> list[str]:
    """What a command line says more than once, one sentence each: argparse would let the last one win."""
    known, found = script.by_flag(), {}
    for word in argv:
        if (flag := word.split("=")[0]) in known:
            found.setdefault(known[flag].name, []).append(flag)
    return [
        f"`{'` and `'.join(dict.fromkeys(flags))}`: one argument, given {len(flags)} times: give it once (a list:"
        " with all its values)."
        for flags in found.values()
        if len(flags) > 1
    ]


def unknown_flags(script: Script, argv: list[str]) -> list[str]:
    """One sentence for each flag of a command line that the script does not have."""
    known = script.by_flag()
    bad = [word for word in argv if word.startswith("--") and word.split("=")[0] not in known]
    return [_unknown(script, word.split("=")[0], known, "on the command line") for word in bad]


def _unknown(script: Script, word: str, known, where: str) -> str:
    names = {name.lstrip("-").replace("-", "_"): name.replace("-", "_").replace("__", "--", 1) for name in known}
    plain = word.lstrip("-").replace("-", "_")
    near = [SHORT_NAMES[plain]] if SHORT_NAMES.get(plain) in names else difflib.get_close_matches(plain, names, 1, 0.5)
    hint = f"did you mean `{names[near[0]]}`?" if near else f"`{script.name} --help_all` lists what there is."
    return f"`{word}` {where} is not an argument: {hint}"


def _read_config(script: Script, path: str, typed: set[str]) -> dict:
    """The values of a YAML file, or of a run's folder. typed: the arguments of the command line."""
    if Path(path).is_dir():
        names = {argument.name for argument in script.arguments}
        of_tokens = {argument.name for argument in script.arguments if argument.group in ("Data", "Curation")}
        return values_of_run(script.name, Path(path), names, of_tokens, typed)
    try:
        config = read_yaml(path)
    except FileNotFoundError:
        near = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*/*.yaml"))
        raise Refusal(f"config file {path!r} does not exist; the ones shipped are {', '.join(near)}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise Refusal(f"config file {path!r} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        held = "nothing" if config is None else f"a {type(config).__name__}"
        raise Refusal(f"config file {path!r} must hold `key: value` lines, not {held}.")
    return config


def _typed_config(script: Script, path: str, config: dict) -> tuple[dict, list[str]]:
    """The values of a YAML file as the command line would have parsed them, without those that give nothing; what is
    wrong with them.
    """
    known, values, problems = {argument.name: argument for argument in script.arguments}, {}, []
    for key, value in config.items():
        if key == "config":
            problems.append(f"`config: {value}` in {path}: a config cannot include another one; put its values here.")
        elif key not in known or key in ("help", "help_all"):
            problems.append(_unknown(script, str(key), known, f"in {path}"))
        elif not is_absent(known[key], value):
            try:
                values[key] = _as_typed(known[key], checked(known[key], value))
            except ValueError as error:
                problems.append(f"`{key}: {'' if value is None else value}` in {path}: {error}.")
    return values, problems


def is_absent(argument: Argument, value) -> bool:
    """Whether a value says that nothing is given."""
    return value is None and argument.optional and argument.name not in NONE_COUNTS


def checked(argument: Argument, value):
    """A value of YAML or of the command line, with None for the word. Raises ValueError where it is empty and may not
    be.
    """
    if value is None and not argument.optional:
        raise ValueError("empty; give a value ([] for an empty list), or leave it out for the default")
    if isinstance(value, list) and None in value:
        raise ValueError("an item of the list is empty; leave it out, or put a text into quotes")
    blank = isinstance(value, str) and not (value if argument.name in BLANKS_COUNT else value.strip())
    if blank and argument.default != "":
        raise ValueError("empty; give a value, or leave it out for the default")
    is_none = isinstance(value, str) and value.lower() in ("none", "null") and argument.optional
    return None if is_none and argument.default is None else value


def _as_typed(argument: Argument, value):
    """A YAML value as the command line would have parsed it: 1e4 for an int is 10000, 64.5 is refused."""
    kinds = argument.kinds
    if isinstance(value, dict) and argument.name in PAIRS:
        items = [name if part is None else f"{name}={part}" for name, part in value.items()]
        return items if argument.nargs == "+" else ",".join(items)
    if isinstance(value, dict):
        if "dict" not in kinds:
            raise ValueError("expected a single value, not a mapping")
        return value
    if value is None:
        return value
    if argument.nargs == "+":
        items = [str(item) for item in (value if isinstance(value, list) else [value])]
        if argument.choices and not set(items) <= set(argument.choices):
            raise ValueError(f"expected a list of {', '.join(argument.choices)}")
        return items
    if isinstance(value, list):
        if "list" not in kinds:
            raise ValueError("expected a single value, not a list")
        return value
    kind = next((kind for kind in kinds if kind in ("int", "float")), None)
    if (kind is None and argument.is_text) or ("str" in kinds and isinstance(value, str)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if kind:
        if isinstance(value, bool):
            raise ValueError("expected a number")
        number = value if isinstance(value, int) else float(value)
        if kind == "int" and not (math.isfinite(number) and number == int(number)):
            raise ValueError("expected a whole number")
        return int(number) if kind == "int" else float(number)
    if argument.is_switch:
        value = SWITCHES.get(str(value).lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if argument.choices and value not in argument.choices:
        raise ValueError(f"expected one of {', '.join(map(str, argument.choices))}")
    return value
