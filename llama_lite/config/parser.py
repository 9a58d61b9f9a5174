"""TRL's `TrlParser`, strict: what it lets through is refused here.

YAML gives the defaults and the command line wins. Refused: misspelt keys of both (all at once, each with the nearest
right one), values of the wrong type or outside their choices in YAML, abbreviations, an argument that is given twice.
`arguments.py` does this from a table; here the table is that of the dataclasses themselves."""

import dataclasses
import inspect
import os
import re
import shlex
from pathlib import Path
from typing import get_type_hints

from trl import TrlParser

from ..errors import Refusal
from ..machine.precision import LAUNCHER_PRECISIONS
from ..paths import expand_home
from .arguments import HELP_ALL, Script, arguments_of, check_command, checked, is_absent, run_of_config
from .common import CommonRunArguments
from .ranges import comma_problems, range_problems
from .run_values import KINDS

# what argparse takes as a value, not an option; its own pattern does not know -1e-3
NEGATIVE_NUMBER = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|infinity|nan)$", re.I)

# arguments whose `~` is the home folder, in YAML and on the command line alike; a list's also behind `=`, `+` or at its
# beginning
PATHS = frozenset(
    "output_dir prepared_dir curated_dir dataset tokenizer model_config init_from resume_from_checkpoint suggest"
    " plan_launch model_name_or_path tokenizer_name chat_template_path models task_data texts questions"
    " include_path contamination mixture validation allow_epochs_of".split()
)


class Parser(TrlParser):
    """TrlParser that refuses in one paragraph, and checks YAML values as strictly as the command line's."""

    def __init__(self, dataclass_types, follows_from: dict[str, str], required_values: dict[str, tuple], **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--help_all", "--help-all", action="help", help=HELP_ALL)
        of_run = " Or a run's folder: another run begins with its values." if self.prog in KINDS else ""
        self.add_argument(
            "--config", help=f"YAML file whose values become the defaults; the command line wins. One file.{of_run}"
        )
        self._negative_number_matcher = NEGATIVE_NUMBER
        self.script = Script(self.prog, self.usage, self.description, [])
        hints = {name: hint for group in dataclass_types for name, hint in get_type_hints(group).items()}
        groups = {field.name: group for group in dataclass_types for field in dataclasses.fields(group)}
        required = {name: f"{value}: {why}" for name, (value, why) in required_values.items()}
        for argument in arguments_of(self, hints):
            name = argument.name
            if name in groups:
                library = _library(groups[name], name)
                argument = dataclasses.replace(
                    argument,
                    group=groups[name]._argument_group_name,
                    follows_from=follows_from.get(name),
                    library=library,
                    required_value=required.get(name) if library else None,
                )
            self.script.arguments.append(argument)

    def error(self, message: str):
        message = re.sub(r"invalid float value: (.*)", r"\1 is no number (such as 2 or 0.5)", message)
        raise Refusal(f"{message.rstrip(chr(46))}. `{self.prog} --help_all` lists every argument.")

    def parse(self, argv: list[str], default_config: Path | None = None):
        """Dataclass instances from a command line. Without arguments `default_config` is used. Raises Refusal."""
        if not argv and default_config:
            argv = ["--config", str(default_config)]
        run = run_of_config(argv)
        argv, config = check_command(self.script, argv)
        known, by_name = self.script.by_flag(), {argument.name: argument for argument in self.script.arguments}
        typed = {known[word].name for word in (word.split("=")[0] for word in argv) if word in known}
        self._set_defaults(config)
        namespace, rest = self.parse_known_args(argv)
        if rest:
            takes = next((name for name in ("dataset", "models") if name in by_name), None)
            hint = f" (did you mean --{takes} {rest[0]}?)" if takes and Path(rest[0]).exists() else ""
            self.error(f"`{' '.join(rest)}` does not belong to any argument{hint}")
        values, explicit_args, problems = vars(namespace), typed | set(config), []
        for name in typed:
            if by_name[name].nargs == "+" and values[name] == ["[]"]:  # an empty list, as in YAML
                values[name] = []
            try:
                values[name] = checked(by_name[name], values[name])
            except ValueError as error:
                problems.append(f"--{name} {shlex.quote(str(values[name]))}: {error}.")
        if run and not {"output_dir", "suggest"} & typed:
            problems.append(
                f"--config {run} gives its values to another run, which needs a folder of its own: --output_dir OTHER."
                f" To go on with the run itself: --output_dir {run}."
            )
        if problems:
            raise Refusal(" ".join(problems))
        explicit_args -= {name for name in explicit_args if is_absent(by_name[name], values[name])}
        if run and "prepared_dir" in config:  # whose tokens are read, also where its text has changed since
            explicit_args -= {"dataset"} - typed
        values |= {name: expand_home(value) for name, value in values.items() if name in PATHS}
        if "precision" in values:
            values |= {
                "precision": requested_precision(values, [typed & explicit_args, set(config) & explicit_args]),
                "bf16": False,
                "fp16": False,
            }
            explicit_args = explicit_args - {"bf16", "fp16"} | (
                {"precision"} if values["precision"] != "auto" else set()
            )
        if problems := range_problems(values) + comma_problems(values):
            raise Refusal(" ".join(problems))
        try:
            parsed = self.parse_dict(values, allow_extra_keys=True)
        except (ValueError, ImportError, TypeError) as error:
            raise Refusal(f"these arguments are invalid: {error}") from error
        for group in parsed:
            if isinstance(group, CommonRunArguments):
                values = {name: value for part in parsed for name, value in vars(part).items() if name in explicit_args}
                group.typed, group.values_of = frozenset(typed), run
                group.explicit_args = {name: getattr(value, "value", value) for name, value in values.items()}
        return parsed

    def _set_defaults(self, config: dict) -> None:
        """Make the values of a YAML file the defaults."""
        for action in self._actions:
            if action.dest not in config:
                continue
            action.default = config[action.dest]
            if action.nargs == "+" and action.default is not None:
                action.default = [action.type(item) for item in action.default]


def _library(group: type, name: str) -> str | None:
    """The library whose dataclass describes a field; None where one of this package does."""
    owner = next(kind for kind in group.__mro__ if name in inspect.get_annotations(kind))
    library = owner.__module__.partition(".")[0]
    return None if library == __package__.partition(".")[0] else library


def requested_precision(values: dict, sources: list[set[str]]) -> str:
    """The precision that a command asks for, `auto` where it asks for none. Raises Refusal for two that contradict each
    other.

    values: `precision`, `bf16` and `fp16` as parsed. sources: which arguments each source gives, the one that wins
    first. The launcher's own request (`accelerate launch --mixed_precision`, or its config file) counts, too:
    accelerate would follow it in silence.
    """
    precision = "auto"
    for named in sources:
        words = {}
        if "precision" in named and values["precision"] != "auto":
            words["precision"] = values["precision"]
        if "fp16" in named and values["fp16"]:
            words["fp16"] = "float16"
        if "bf16" in named and (values["bf16"] or "fp16" not in words):
            words["bf16"] = "bfloat16" if values["bf16"] else "float32"
        if len(set(words.values())) > 1:
            arguments = " and ".join(f"{name} ({precision})" for name, precision in words.items())
            raise Refusal(f"the arguments {arguments} contradict each other: give --precision alone.")
        if words:
            precision = next(iter(words.values()))
            break
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in LAUNCHER_PRECISIONS:
        raise Refusal(
            f"the launcher requests --mixed_precision {launcher}, which this project does not support: use no, bf16"
            " or fp16."
        )
    if launcher != "no" and precision not in ("auto", LAUNCHER_PRECISIONS[launcher]):
        raise Refusal(
            f"the launcher requests --mixed_precision {launcher} and the command --precision {precision}: set"
            " mixed_precision to `no` in the launcher's config, or give the same precision to both."
        )
    return LAUNCHER_PRECISIONS[launcher] if launcher != "no" else precision
