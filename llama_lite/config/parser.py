"""TRL's `TrlParser`, strict: what it lets through is refused here.

YAML gives the defaults and the command line wins. Refused: misspelt keys of both (all at once, each with the nearest
right one), values of the wrong type or outside their choices in YAML, abbreviations, an argument that is given
twice."""

import dataclasses
import difflib
import math
import os
import shlex
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..errors import Refusal
from ..files import read_yaml
from ..machine.precision import LAUNCHER_PRECISIONS
from ..paths import ROOT, expand_home
from .common import CommonRunArguments
from .ranges import range_problems

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


# arguments whose `~` is the home folder, in YAML and on the command line alike; a list's also behind `=`, `+` or at its
# beginning
PATHS = frozenset(
    "output_dir prepared_dir curated_dir dataset tokenizer model_config init_from resume_from_checkpoint suggest"
    " plan_launch model_name_or_path tokenizer_name chat_template_path models task_data texts contamination".split()
)

NONE_COUNTS = {
    "save_total_limit",
    "pad_to_multiple_of",
}  # None is a value here (all checkpoints, no padding); elsewhere it is as if nothing was given

BLANKS_COUNT = {"document_separator"}  # blanks and line breaks alone are a value here; elsewhere they are nothing


SWITCHES = {
    "yes": True,
    "on": True,
    "true": True,
    "no": False,
    "off": False,
    "false": False,
}  # words for a switch in YAML


def repeated(argv: list[str], dest_of: dict[str, str]) -> list[str]:
    """What a command line says more than once, one sentence each: argparse would let the last one win. dest_of:
    {option: argument that it sets}.
    """
    found: dict[str, list[str]] = {}
    for word in argv:
        if (option := word.split("=")[0]) in dest_of:
            found.setdefault(dest_of[option], []).append(option)
    return [
        f"`{'` and `'.join(dict.fromkeys(options))}`: one argument, given {len(options)} times: give it once (a list:"
        " with all its values)."
        for options in found.values()
        if len(options) > 1
    ]


class HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Examples as they are written, and each argument's default, or what it follows from."""

    def _get_help_string(self, action):
        follows = getattr(action, "follows_from", None)
        return (
            f"{action.help} (default: {follows})"
            if follows and "(default" not in action.help
            else super()._get_help_string(action)
        )


class Parser(TrlParser):
    """TrlParser that refuses in one paragraph, and checks YAML values as strictly as the command line's."""

    def __init__(self, dataclass_types, follows_from: dict[str, str], **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.add_argument(
            "--config", help="YAML file whose values become the defaults; the command line wins. One file."
        )
        self.hints = {name: hint for group in dataclass_types for name, hint in get_type_hints(group).items()}
        self.preset = {field.name: field.default for group in dataclass_types for field in dataclasses.fields(group)}
        for action in self._actions:
            action.follows_from = follows_from.get(action.dest)

    def error(self, message: str):
        raise Refusal(f"{message.rstrip(chr(46))}. `{self.prog} --help` lists every argument.")

    def parse(self, argv: list[str], default_config: Path | None = None):
        """Dataclass instances from a command line. Without arguments `default_config` is used. Raises Refusal."""
        argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if not argv and default_config:
            argv = ["--config", str(default_config)]
        known = {option: action for action in self._actions for option in action.option_strings}
        problems, config = repeated(argv, {option: action.dest for option, action in known.items()}), {}
        if "--config" in argv and not problems:
            at = argv.index("--config")
            if at + 1 == len(argv):
                raise Refusal("--config needs a YAML file, e.g. --config configs/pretrain/demo.yaml.")
            config = self._read_yaml(argv[at + 1])
            problems += self._take_yaml(argv[at + 1], config)
            config = {key: value for key, value in config.items() if not self._is_absent(key, value)}
            argv = argv[:at] + argv[at + 2 :]
        typed = {known[word].dest for word in (word.split("=")[0] for word in argv) if word in known}
        bad = [word for word in argv if word.startswith("--") and word.split("=")[0] not in known]
        problems += [self._unknown(word.split("=")[0], known, "on the command line") for word in bad]
        if problems:
            raise Refusal(" ".join(problems))
        namespace, rest = self.parse_known_args(argv)
        if rest:
            self.error(f"`{' '.join(rest)}` belongs to no argument")
        values, given = vars(namespace), typed | set(config)
        for name in typed:
            try:
                values[name] = self._checked(name, values[name])
            except ValueError as error:
                problems.append(f"--{name} {shlex.quote(str(values[name]))}: {error}.")
        if problems:
            raise Refusal(" ".join(problems))
        given -= {name for name in given if self._is_absent(name, values[name])}
        values |= {name: expand_home(value) for name, value in values.items() if name in PATHS}
        if "precision" in values:
            values |= {
                "precision": requested_precision(values, [typed & given, set(config) & given]),
                "bf16": False,
                "fp16": False,
            }
            given = given - {"bf16", "fp16"} | ({"precision"} if values["precision"] != "auto" else set())
        if problems := range_problems(values):
            raise Refusal(" ".join(problems))
        try:
            parsed = self.parse_dict(values, allow_extra_keys=True)
        except (ValueError, ImportError, TypeError) as error:
            raise Refusal(f"these arguments do not fit: {error}") from error
        for group in parsed:
            if isinstance(group, CommonRunArguments):
                values = {name: value for part in parsed for name, value in vars(part).items() if name in given}
                group.typed = frozenset(typed)
                group.given = {name: getattr(value, "value", value) for name, value in values.items()}
        return parsed

    def _unknown(self, word: str, known, where: str) -> str:
        names = {name.lstrip("-").replace("-", "_"): name.replace("-", "_").replace("__", "--", 1) for name in known}
        plain = word.lstrip("-").replace("-", "_")
        near = (
            [SHORT_NAMES[plain]] if SHORT_NAMES.get(plain) in names else difflib.get_close_matches(plain, names, 1, 0.5)
        )
        hint = f"did you mean `{names[near[0]]}`?" if near else f"`{self.prog} --help` lists what there is."
        return f"`{word}` {where} is not an argument: {hint}"

    def _read_yaml(self, path: str) -> dict:
        try:
            config = read_yaml(path)
        except FileNotFoundError:
            near = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*/*.yaml"))
            raise Refusal(f"config file {path!r} does not exist; the ones shipped are {', '.join(near)}.") from None
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise Refusal(f"config file {path!r} is not readable YAML: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict):
            held = "nothing" if config is None else f"a {type(config).__name__}"
            raise Refusal(f"config file {path!r} must hold `key: value` lines, and holds {held}.")
        return config

    def _take_yaml(self, path: str, config: dict) -> list[str]:
        """Make the values of a YAML file the defaults; what is wrong with them."""
        actions = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)
        problems = []
        for key, value in config.items():
            if key == "config":
                problems.append(f"`config: {value}` in {path}: a config names no other; put its values here.")
                continue
            if key not in actions or key == "help":
                problems.append(self._unknown(str(key), actions, f"in {path}"))
                continue
            if self._is_absent(key, value):
                continue
            try:
                value = _as_typed(actions[key], self.hints[key], self._checked(key, value))
            except ValueError as error:
                problems.append(f"`{key}: {'' if value is None else value}` in {path}: {error}.")
            for action in self._actions:
                if action.dest == key:
                    action.default = value
        return problems

    def _is_absent(self, name: str, value) -> bool:
        """Whether a value says that nothing is given."""
        return value is None and type(None) in get_args(self.hints.get(name)) and name not in NONE_COUNTS

    def _checked(self, name: str, value):
        """A value of YAML or of the command line, with None for the word. Raises ValueError where it is empty and may
        not be.
        """
        optional, default = type(None) in get_args(self.hints[name]), self.preset[name]
        if value is None and not optional:
            raise ValueError("empty; give a value ([] for an empty list), or leave it out for the default")
        if isinstance(value, list) and None in value:
            raise ValueError("an item of the list is empty; leave it out, or put a text into quotes")
        if isinstance(value, str) and not (value if name in BLANKS_COUNT else value.strip()) and default != "":
            raise ValueError("empty; give a value, or leave it out for the default")
        return (
            None
            if isinstance(value, str) and value.lower() in ("none", "null") and optional and default is None
            else value
        )


def requested_precision(values: dict, sources: list[set[str]]) -> str:
    """The precision that a command asks for, `auto` where it asks for none. Raises Refusal for two that contradict each
    other.

    values: `precision`, `bf16` and `fp16` as parsed. sources: which arguments each source gives, the one that wins
    first. The launcher's own request (`accelerate launch --mixed_precision`, or its config file) counts, too:
    accelerate would follow it in silence.
    """
    asked = "auto"
    for given in sources:
        words = {}
        if "precision" in given and values["precision"] != "auto":
            words["precision"] = values["precision"]
        if "fp16" in given and values["fp16"]:
            words["fp16"] = "float16"
        if "bf16" in given and (values["bf16"] or "fp16" not in words):
            words["bf16"] = "bfloat16" if values["bf16"] else "float32"
        if len(set(words.values())) > 1:
            arguments = " and ".join(f"{name} ({precision})" for name, precision in words.items())
            raise Refusal(f"the arguments {arguments} contradict each other: give --precision alone.")
        if words:
            asked = next(iter(words.values()))
            break
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in LAUNCHER_PRECISIONS:
        raise Refusal(
            f"the launcher asks for --mixed_precision {launcher}, in which no run of this project trains: use no, bf16"
            " or fp16."
        )
    if launcher != "no" and asked not in ("auto", LAUNCHER_PRECISIONS[launcher]):
        raise Refusal(
            f"the launcher asks for --mixed_precision {launcher} and the command for --precision {asked}: leave it out"
            " of the launcher's config (`no`), or give the same to both."
        )
    return LAUNCHER_PRECISIONS[launcher] if launcher != "no" else asked


def _as_typed(action, hint, value):
    """A YAML value as the command line would have parsed it: 1e4 for an int is 10000, 64.5 is refused. hint: the
    field's type.
    """
    kinds = (
        [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
        if get_origin(hint) in (Union, UnionType)
        else [hint]
    )
    if isinstance(value, dict):
        if dict not in [get_origin(kind) or kind for kind in kinds]:
            raise ValueError("a single value is wanted, not a mapping")
        return value
    if value is None:
        return value
    if action.nargs == "+":
        return [action.type(item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        if list not in [get_origin(kind) or kind for kind in kinds]:
            raise ValueError("a single value is wanted, not a list")
        return value
    kind = next((kind for kind in kinds if kind in (int, float)), str if action.type is str else action.type)
    if kind is str or (str in kinds and isinstance(value, str)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError("a number is wanted")
        number = value if isinstance(value, int) else float(value)
        if kind is int and not (math.isfinite(number) and number == int(number)):
            raise ValueError("a whole number is wanted")
        return kind(number)
    if isinstance(action.const, bool) or action.nargs == "?":
        value = SWITCHES.get(str(value).lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError("true or false is wanted")
        return value
    if action.choices and value not in action.choices:
        raise ValueError(f"one of {', '.join(map(str, action.choices))} is wanted")
    return value
