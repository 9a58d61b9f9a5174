"""The arguments of run_study.py."""

import argparse
import sys

import yaml

from ..errors import Refusal
from ..files import read_yaml
from ..paths import expand_home
from .arguments import HELP_ALL, REPOSITORY, Script, arguments_of, repeated, show_help, unknown_flags
from .ranges import range_problems

STUDY_HELP = """Run a controlled experiment: arms with controlled differences, several seeds, paired results.

examples:
  python run_study.py --config configs/studies/resume.yaml
      everything, one run after the other, and the report
  python run_study.py --config configs/studies/resume.yaml --dry_run
      every run: steps, tokens, disk and time, and which runs are finished
  python run_study.py --config configs/studies/resume.yaml --seed 1
      the runs of one seed: on another device, or as a Slurm array task
  python run_study.py --config configs/studies/resume.yaml --arm whole --seed 1
      one run

Stop it at any moment and run the same command again. exit status: 0 finished, 2 refused, 75 interrupted."""


class StudyParser(argparse.ArgumentParser):
    """A parser that raises Refusal instead of exiting."""

    def error(self, message: str):
        """Raise Refusal."""
        raise Refusal(f"{message}. `{self.prog} --help` lists every argument.")


def study_parser() -> StudyParser:
    parser = StudyParser("run_study.py", description=STUDY_HELP, allow_abbrev=False)
    parser.add_argument("--help_all", "--help-all", action="help", help=HELP_ALL)
    parser.add_argument("--config", default="configs/studies/resume.yaml", help="The study's YAML file.")
    parser.add_argument("--output_dir", help="Folder of the study (default: runs/NAME-study).")
    parser.add_argument("--arm", help="Only this arm.")
    parser.add_argument("--seed", type=int, help="Only this seed.")
    parser.add_argument(
        "--prepare_only",
        action="store_true",
        help="Prepare what all runs need, before several tasks divide them; run nothing.",
    )
    parser.add_argument(
        "--push_to_hub", action="store_true", help="Publish report, results and figures as a dataset repository."
    )
    parser.add_argument("--hub_model_id", help="owner/name of that repository.")
    parser.add_argument("--dry_run", action="store_true", help="Print what would be run; run nothing.")
    return parser


def study_script(parser: StudyParser) -> Script:
    """The script's entry in the table of arguments."""
    return Script(parser.prog, parser.usage, parser.description, arguments_of(parser, {"seed": int}))


def parse_study(argv: list[str] | None = None) -> argparse.Namespace:
    """config, output_dir, arm, seed, prepare_only, dry_run, push_to_hub, hub_model_id. Raises Refusal."""
    parser, argv = study_parser(), sys.argv[1:] if argv is None else argv
    script = study_script(parser)
    show_help(script, argv)
    if problems := repeated(argv, script) + unknown_flags(script, argv):
        raise Refusal(" ".join(problems))
    parsed = parser.parse_args(argv)
    if empty_arguments := [name for name, value in vars(parsed).items() if value == ""]:
        raise Refusal(f"--{empty_arguments[0]} is empty: give a value, or leave it out.")
    parsed.config, parsed.output_dir = expand_home(parsed.config), expand_home(parsed.output_dir)
    if parsed.push_to_hub and not REPOSITORY.fullmatch(parsed.hub_model_id or ""):
        raise Refusal(f"--push_to_hub needs --hub_model_id owner/name, not {parsed.hub_model_id!r}.")
    if problems := range_problems(vars(parsed)):
        raise Refusal(" ".join(problems))
    return parsed


def read_study(path: str) -> dict:
    """The fields of a study file, unchecked. Raises Refusal where there is no mapping to be read."""
    try:
        raw = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"--config {path}: no study can be read from it ({error}).") from None
    except yaml.YAMLError as error:
        raise Refusal(f"--config {path}: {' '.join(str(error).split())}.") from None
    if not isinstance(raw, dict):
        raise Refusal(f"--config {path} must hold `key: value` lines, not a {type(raw).__name__}.")
    return raw
