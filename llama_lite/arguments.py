"""The scripts' own arguments, how they are parsed, and how wrong ones are refused.

YAML gives the defaults and the command line wins (TRL's `TrlParser`). What TrlParser lets through is refused here:
misspelt keys of both (all at once, each with the nearest right one), values of the wrong type or outside their
choices in YAML, abbreviations. Only `TrlParser` and `TrainingArguments` are imported, so that `--help` answers soon.
"""

import dataclasses
import difflib
import math
import os
import re
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path
from types import UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from model_card.metadata import CardError, check_metadata

from .fields import KEPT, accelerator_problems, unknown_fields
from .ranges import range_problems
from .schedules import default_kwargs, optimizer_problems, schedule_problems

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PRECISIONS = ("float32", "bfloat16", "float16")
LAUNCHER_PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as accelerate names them
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


PATHS = frozenset(  # arguments whose `~` is the home folder, in YAML and on the command line alike; a list's also behind `=`, `+` or at its beginning
    "output_dir prepared_dir curated_dir dataset tokenizer model_config init_from resume_from_checkpoint suggest plan_launch model_name_or_path "
    "tokenizer_name chat_template_path models task_data texts contamination".split()
)
NONE_COUNTS = {
    "save_total_limit",
    "pad_to_multiple_of",
}  # None is a value here (all checkpoints, no padding); elsewhere it is as if nothing was given
BLANKS_COUNT = {"document_separator"}  # blanks and line breaks alone are a value here; elsewhere they are nothing


SWITCHES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}  # words for a switch in YAML


class Refusal(Exception):
    """The user asked for something that cannot be right: one paragraph with the value, the rule and the way out."""


class Loader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error, not the last one's win, and `no`, `off`, `yes` and `on` are words (YAML 1.2): of a language, a strategy.

    `010` and `1:30` are text, not 8 and 90: of a name they stay it, of a number they are 10 and refused.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, re.compile("(?:true|True|TRUE|false|False|FALSE)$") if tag == "tag:yaml.org,2002:bool" else found) for tag, found in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_number(self, node):
        if re.match(r"[-+]?0[0-9_]|.*:", node.value):
            return node.value
        return self.construct_yaml_float(node) if node.tag.endswith("float") else self.construct_yaml_int(node)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [key for at, key in enumerate(keys) if key in keys[:at]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.construct_number)


def read_yaml(path: str):
    """The value of a YAML file. Raises OSError, UnicodeDecodeError, and yaml.YAMLError, also for a key that comes twice."""
    return yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), Loader)


def repeated(argv: list[str], dest_of: dict[str, str]) -> list[str]:
    """What a command line says more than once, one sentence each: argparse would let the last one win. dest_of: {option: argument that it sets}."""
    found: dict[str, list[str]] = {}
    for word in argv:
        if (option := word.split("=")[0]) in dest_of:
            found.setdefault(dest_of[option], []).append(option)
    return [
        f"`{'` and `'.join(dict.fromkeys(options))}`: one argument, given {len(options)} times: give it once (a list: with all its values)."
        for options in found.values()
        if len(options) > 1
    ]


def expand_home(value):
    """A path, or a list of references, with the home folder for `~`; anything else as it is."""
    if isinstance(value, list):
        return [re.sub(r"(?:(?<=[=+])|^)~[^/+]*(?=[/+]|$)", lambda match: os.path.expanduser(match[0]), item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def arg(default, help: str):
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class ModelArguments:
    """Which model is trained."""

    _argument_group_name = "Model"

    model_config: str | None = arg(
        None, "A preset of configs/model (tiny, 1m, demo, 124m, 978m, 1.7b ...), LAYERSxWIDTH (6x256), or a folder that holds a config.json."
    )
    init_from: str | None = arg(
        None, "Model whose weights start a NEW run (no optimiser, no step, no data position): a folder, or owner/name@revision on the Hub."
    )
    publish_dtype: Literal["bfloat16", "float32", "float16"] = arg("bfloat16", "Number format of the finished model's weights.")


@dataclasses.dataclass
class DataArguments:
    """Where text comes from and how it becomes token shards."""

    _argument_group_name = "Data"

    dataset: str = arg(
        "installed-docs",
        "Text: `installed-docs` (English documentation inside the installed packages, no download), `installed-files` (all their text files, raw), "
        "a Hub dataset id, or a file, folder or glob: parquet, jsonl, csv (.gz, .zst ...), and every other file that is text, a document each.",
    )
    dataset_config: str | None = arg(None, "Configuration of a Hub dataset, e.g. sample-100BT.")
    dataset_split: str = arg(
        "train", "Split of a Hub dataset, or of a folder with files or folders for train beside test or validation (all: every one)."
    )
    dataset_revision: str | None = arg(None, "Revision of a Hub dataset; the commit that it means is recorded.")
    text_column: str | None = arg(None, "Column that holds the text of rows (default: `text`, another usual name, or the longest column).")
    encoding: str | None = arg(None, "Encoding of files that are not UTF-8, e.g. cp1252 or gb18030.")
    document_separator: str = arg(
        "auto",
        "What divides a plain text file into documents: auto (the tokenizer's end-of-text, where a file holds it), none (every such file is one document), "
        "or a text, \\n for a line break.",
    )
    file_types: list[str] = arg([], "Endings of the files of a folder that are read, e.g. .md .py (default: whatever is text).")
    max_bytes: int | None = arg(None, "Read only the first files, in their order, of so many bytes in all.")
    prepared_dir: str | None = arg(
        None, "Folder for the prepared token shards; made once, then only read (default: data/NAME-HASH, by what they are made from)."
    )
    curated_dir: str | None = arg(None, "Folder for curated text (default: curated/NAME-HASH beside the prepared folder, by what it is made from).")
    tokenizer: str | None = arg(
        None,
        "`train` (byte-level BPE learnt from the text; the default), `gpt2` (the paper's, from an installed package), a folder or a Hub id.",
    )
    vocab_size: int | None = arg(None, "Size of the vocabulary that `--tokenizer train` learns.")
    shard_tokens: int = arg(100_000_000, "Tokens in a shard (the paper: 100M, 200 MB of uint16).")
    validation_tokens: int | None = arg(None, "The first so many tokens are for validation and never trained on (the paper: one shard of 100M).")
    max_tokens: int | None = arg(None, "Stop preparing after so many tokens, validation included (the paper: 20e9 of 100e9).")
    prepared_hub_id: str | None = arg(
        None,
        "Prepared tokens as a Hub dataset (owner/name, @revision): pulled into an empty --prepared_dir, or pushed by --prepare_only --push_to_hub.",
    )
    prepare_workers: int = arg(os.cpu_count() or 1, "Processes that curate and tokenise; the bytes do not depend on it.")
    prepare_only: bool = arg(False, "Prepare the token shards and stop; run again to continue after an interruption.")
    verify_data: Literal["auto", "sizes", "hashes"] = arg(
        "auto",
        "Check shards before the first step by size, or by sha256 too (auto: sha256 up to 1 GiB). hashes: text above 1 GiB is hashed again, too, instead of "
        "trusting the sizes and times of its files.",
    )


@dataclasses.dataclass
class CurationArguments:
    """Which documents are kept. Every rule is off unless it is set."""

    _argument_group_name = "Curation"

    min_score: float | None = arg(None, "Least educational score (FineWeb-Edu's classifier: 0 to 5; FineWeb-Edu itself keeps 3).")
    score_column: str = arg("score", "Column that holds the educational score.")
    language: str | None = arg(None, "Only documents whose `language` column has this value, e.g. en.")
    min_language_score: float | None = arg(None, "Least value of the `language_score` column (FineWeb: 0.65).")
    min_characters: int | None = arg(None, "Shortest document, in characters.")
    max_characters: int | None = arg(None, "Longest document, in characters.")
    gopher_repetition: bool = arg(False, "Gopher's repetition rules, for raw web text (datatrove).")
    gopher_quality: bool = arg(False, "Gopher's quality rules, for raw web text (datatrove).")
    c4_quality: bool = arg(False, "C4's quality rules, for raw web text (datatrove).")
    fineweb_quality: bool = arg(False, "FineWeb's quality rules, for raw web text (datatrove).")
    exact_dedup: bool = arg(False, "Keep one of several documents with the same text.")
    minhash_dedup: bool = arg(False, "Keep one of several near-duplicates (MinHash, 5-grams of words, 14 x 8 hashes).")


@dataclasses.dataclass
class HubArguments:
    """What is published, beside --push_to_hub, --hub_model_id and --hub_private_repo (transformers' own)."""

    _argument_group_name = "Hub"

    publish_steps: int | None = arg(None, "Publish the checkpoints of every so many steps (default: every one), and always the last.")
    publish_training_state: Literal["all", "final", "none"] = arg(
        "all", "Which revisions carry optimiser and random state, so that anyone can resume from them (6 times the size of the model)."
    )
    publish_only: bool = arg(False, "Publish what waits in the run folder's queue, and stop.")
    hub_required: bool = arg(False, "Refuse to train when the Hub would not take the revisions (default: train, and publish later).")
    hub_drain_timeout: float = arg(600, "Seconds that a finished run, or --publish_only, waits for its last revisions to be published.")
    card_license: str | None = arg(None, "Licence of the model on its card, in the Hub's words (apache-2.0, mit, other ...).")
    card_language: str | None = arg(None, "Language of the model on its card, as ISO 639 (en).")


@dataclasses.dataclass
class CommonRunArguments:
    """What any verified run needs beside transformers' TrainingArguments."""

    _argument_group_name = "Run"

    precision: Literal["auto", *PRECISIONS] = arg(
        "auto",
        "auto: bfloat16 (autocast over float32 weights) where this device computes it natively, and faster than float32, else float32; a resumed "
        "run keeps its own. --bf16, --no_bf16 and --fp16 say the same.",
    )
    hours: float | None = arg(None, "Hours that the whole run may take here, preparing to evaluating; what is not given follows from it.")
    suggest: str | None = arg(None, "Write what the text, the machine and --hours suggest to this YAML file, each value with its reason, and stop.")
    cpu_threads: int | None = arg(
        None,
        "Threads a process computes with on a CPU (default: this machine's cores shared between its processes). OMP_NUM_THREADS is ignored: "
        "accelerate launch sets it to 1.",
    )
    keep_memory: bool = arg(True, "On a CPU, keep freed memory for the next step (a step faults no pages in again; up to an eighth more memory).")
    dry_run: bool = arg(False, "Print the plan and touch nothing: of the run that is in the folder, or with --hours of a new one.")
    allow_changes: str = arg("", "Comma-separated differences from the checkpoint to accept on resume, by their name in the table.")
    resume_without: str = arg("", "Resume without `optimizer`, `scheduler`, `rng` or `data` (position), on purpose; comma-separated.")
    given: dict = dataclasses.field(init=False, default_factory=dict)  # what YAML and command line said, by argument
    typed: frozenset = dataclasses.field(init=False, default=frozenset())  # the arguments of the command line


@dataclasses.dataclass
class RunArguments(CommonRunArguments):
    """What a verified pretraining run needs beside transformers' TrainingArguments."""

    block_size: int | None = arg(None, "Predictions in a window (the model's context at most).")
    tokens_per_step: int | None = arg(None, "Tokens in an optimiser step, on any hardware; gradient accumulation follows from it.")
    order: Literal["sequential", "shuffled"] = arg("shuffled", "Order of the windows: as prepared (the paper's), or a seeded permutation.")
    allow_epochs: bool = arg(False, "Let a run read the training tokens more than once, however often (default: as often as it is known to help).")
    eval_windows: int | None = arg(None, "Validation windows in an evaluation.")
    probe_windows: int = arg(8, "Validation windows whose loss is a checkpoint's proof; resuming computes it again.")
    eval_tasks: list[str] = arg([], "Tasks of run_eval.py that are asked at each evaluation, too (the paper watches hellaswag).")
    eval_task_limit: int = arg(200, "Items of each of them: a seeded sample, always the same.")
    sample_prompts: list[str] = arg([], "Prompts continued at each evaluation (default: how some held-out documents begin; [] in YAML: none).")
    sample_tokens: int = arg(48, "Tokens in a sampled continuation (0: no samples).")
    fused_loss: bool = arg(True, "On a CPU, compute output layer and loss in one, without holding all logits (less memory, the same loss).")
    block_attention: bool = arg(True, "On a CPU, attend in blocks of queries, as large matrix products (the same mathematics).")
    compile_layers: bool = arg(
        True, "Compile the decoder layers (some 25 s more at the first start, then cached; faster steps, less memory). Evaluations are not compiled."
    )
    plan_launch: str | None = arg(None, "For --dry_run: the accelerate config whose processes and sharding are planned, instead of this process's.")
    plan_mfu: float = arg(40.0, "For --dry_run: the share of peak FLOPs (MFU, in percent) at which days on GPUs are counted.")
    strict_plan: bool = arg(False, "Refuse a run that by its plan does not fit in memory or on the disk (default: a warning in --dry_run).")
    peak_flops: float | None = arg(None, "Peak FLOP/s of one device for MFU (default: TRL's table of GPUs; on a CPU, measured).")


@dataclasses.dataclass
class PretrainArguments(TrainingArguments):
    """transformers' TrainingArguments with the paper's values (arXiv 2412.13335 and the authors' code) as defaults."""

    _argument_group_name = "Training (transformers.TrainingArguments)"

    output_dir: str | None = arg(None, "Folder of the run.")
    resume_from_checkpoint: str | None = arg(
        "auto",
        "auto: the newest verified checkpoint here, else of the run's own Hub repository, else a new run. must (true): refused without one. "
        "never (false): refused with one. Or a checkpoint folder, or owner/name@step-N on the Hub.",
    )
    learning_rate: float = arg(6e-4, "Peak learning rate.")
    lr_scheduler_type: str = arg("cosine_warmup_with_min_lr", "Schedule.")
    lr_scheduler_kwargs: dict | str | None = arg(
        None, 'Schedule\'s own arguments (default: {"min_lr_rate": 0.1}, a floor of 0.1 of the peak, for the schedules that have a floor).'
    )
    warmup_steps: float = arg(715, "Steps of linear warm-up (below 1: a share of all steps).")
    adam_beta1: float = arg(0.9, "AdamW's beta1.")
    adam_beta2: float = arg(0.95, "AdamW's beta2.")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon.")
    weight_decay: float = arg(0.1, "Weight decay of matrices and embeddings; norms have none.")
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this global norm.")
    max_steps: int = arg(-1, "Optimiser steps.")
    num_train_epochs: float = arg(1.0, "Passes over the training tokens, cut to whole steps, where max_steps is not given.")
    bf16: bool = arg(True, "--precision bfloat16; --no_bf16: --precision float32.")
    fp16: bool = arg(False, "--precision float16, on a GPU.")
    seed: int = arg(1337, "Seed of the initial weights, the order and the samples.")
    logging_steps: float = arg(10, "Steps between logged losses.")
    eval_strategy: str = arg("steps", "When to evaluate.")
    eval_steps: float | None = arg(250, "Steps between evaluations (the paper: 250).")
    save_steps: float = arg(250, "Steps between checkpoints (0: one, at the end).")
    save_total_limit: int | None = arg(3, "Checkpoints kept (none: all of them); the last verified one always is.")
    dataloader_drop_last: bool = arg(True, "Kept on: epochs are cut to whole steps.")
    train_sampling_strategy: str = arg("sequential", "Kept so: TokenWindows gives the order of the run.")
    remove_unused_columns: bool | None = arg(False, "Kept off: windows have no columns.")
    logging_nan_inf_filter: bool = arg(False, "Kept off: NaN stops the run instead of being logged as 0.")
    ddp_find_unused_parameters: bool | None = arg(False, "Kept off: every parameter is used.")
    disable_tqdm: bool | None = arg(True, "Kept on: the run prints its own progress.")

    def __post_init__(self):
        before_transformers(self)
        super().__post_init__()


def before_transformers(training: TrainingArguments) -> None:
    """What follows from other arguments, before transformers looks at them: the floor of the schedule, the CPU where there is no GPU."""
    if training.lr_scheduler_kwargs is None:
        training.lr_scheduler_kwargs = default_kwargs(training.lr_scheduler_type)
    use_cpu_without_gpu(training)


def use_cpu_without_gpu(training: TrainingArguments) -> None:
    """transformers wants to be told (its bf16 check looks for a GPU otherwise)."""
    import torch

    if not torch.cuda.is_available() and not training.use_cpu:
        training.use_cpu = not torch.backends.mps.is_available()


class HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Examples as they are written, and each argument's default, or what it follows from."""

    def _get_help_string(self, action):
        follows = getattr(action, "follows_from", None)
        return f"{action.help} (default: {follows})" if follows and "(default" not in action.help else super()._get_help_string(action)


class Parser(TrlParser):
    """TrlParser that refuses in one paragraph, and checks YAML values as strictly as the command line's."""

    def __init__(self, dataclass_types, follows_from: dict[str, str], **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.add_argument("--config", help="YAML file whose values become the defaults; the command line wins. One file.")
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
            values |= {"precision": requested_precision(values, [typed & given, set(config) & given]), "bf16": False, "fp16": False}
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
        near = [SHORT_NAMES[plain]] if SHORT_NAMES.get(plain) in names else difflib.get_close_matches(plain, names, 1, 0.5)
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
        """A value of YAML or of the command line, with None for the word. Raises ValueError where it is empty and may not be."""
        optional, default = type(None) in get_args(self.hints[name]), self.preset[name]
        if value is None and not optional:
            raise ValueError("empty; give a value ([] for an empty list), or leave it out for the default")
        if isinstance(value, list) and None in value:
            raise ValueError("an item of the list is empty; leave it out, or put a text into quotes")
        if isinstance(value, str) and not (value if name in BLANKS_COUNT else value.strip()) and default != "":
            raise ValueError("empty; give a value, or leave it out for the default")
        return None if isinstance(value, str) and value.lower() in ("none", "null") and optional and default is None else value


def requested_precision(values: dict, sources: list[set[str]]) -> str:
    """The precision that a command asks for, `auto` where it asks for none. Raises Refusal for two that contradict each other.

    values: `precision`, `bf16` and `fp16` as parsed. sources: which arguments each source gives, the one that wins first. The launcher's own request
    (`accelerate launch --mixed_precision`, or its config file) counts, too: accelerate would follow it in silence.
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
            told = " and ".join(f"{name} ({meant})" for name, meant in words.items())
            raise Refusal(f"the arguments {told} contradict each other: give --precision alone.")
        if words:
            asked = next(iter(words.values()))
            break
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in LAUNCHER_PRECISIONS:
        raise Refusal(f"the launcher asks for --mixed_precision {launcher}, in which no run of this project trains: use no, bf16 or fp16.")
    if launcher != "no" and asked not in ("auto", LAUNCHER_PRECISIONS[launcher]):
        raise Refusal(
            f"the launcher asks for --mixed_precision {launcher} and the command for --precision {asked}: leave it out of the launcher's config (`no`), "
            "or give the same to both."
        )
    return LAUNCHER_PRECISIONS[launcher] if launcher != "no" else asked


def _as_typed(action, hint, value):
    """A YAML value as the command line would have parsed it: 1e4 for an int is 10000, 64.5 is refused. hint: the field's type."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)] if get_origin(hint) in (Union, UnionType) else [hint]
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


PRETRAIN_FOLLOWS = {  # arguments that nobody has to give, and what they follow from (derive.py)
    **dict.fromkeys(("model_config", "max_steps"), "by the text, the time there is, and the speed of this machine"),
    **dict.fromkeys(("vocab_size", "validation_tokens", "block_size"), "by the size of the text"),
    **dict.fromkeys(
        ("tokens_per_step", "per_device_train_batch_size", "warmup_steps", "logging_steps", "eval_steps", "save_steps"), "by the length of the run"
    ),
    **dict.fromkeys(("learning_rate", "save_total_limit"), "by the size of the model"),
    **dict.fromkeys(("fused_loss", "block_attention", "compile_layers"), "by the machine"),
    "eval_windows": "as many as take little time",
    "output_dir": "runs/NAME, after the text",
    "hours": "about ten minutes, where no length is given",
}

PRETRAIN_HELP = """Pretrain a LLaMA with transformers.Trainer, stop at any moment, and go on bit for bit.

examples:
  accelerate launch run_pretrain.py                                             the demo, on any laptop
  accelerate launch run_pretrain.py --dataset mytext/                           your own text: what is not given follows from it and the machine
  python run_pretrain.py --dataset mytext/ --hours 2 --suggest mine.yaml        the same as a file, with reasons, for a run of two hours
  accelerate launch run_pretrain.py --config configs/pretrain/paper.yaml        the paper's 1.7B run
  python run_pretrain.py --config configs/pretrain/demo.yaml --dry_run          every derived number, touching nothing
  python run_pretrain.py --config configs/pretrain/paper.yaml --prepare_only    token shards only, restartable
  accelerate launch run_pretrain.py --config my.yaml --max_steps 4000 --allow_changes max_steps
  accelerate launch run_pretrain.py --config my.yaml --push_to_hub --hub_model_id you/name        a revision a checkpoint
  accelerate launch run_pretrain.py --config my.yaml --resume_from_checkpoint you/name@step-001000

Run the same command again after any interruption: it goes on from the newest verified checkpoint.
exit status: 0 finished, 2 refused, 3 unhealthy (NaN), 75 interrupted with a verified checkpoint (also in status.json)."""


def parse_pretrain(argv: list[str] | None = None):
    """(ModelArguments, DataArguments, CurationArguments, HubArguments, RunArguments, PretrainArguments). Raises Refusal."""
    groups = (ModelArguments, DataArguments, CurationArguments, HubArguments, RunArguments, PretrainArguments)
    usage = "run_pretrain.py [--config FILE.yaml] [--dry_run | --prepare_only | --publish_only] [--field value ...]"
    parser = Parser(groups, PRETRAIN_FOLLOWS, prog="run_pretrain.py", usage=usage, description=PRETRAIN_HELP)
    parsed = parser.parse(sys.argv[1:] if argv is None else argv, ROOT / "configs/pretrain/demo.yaml")[: len(groups)]
    check_pretrain(*parsed)
    return parsed


PRETRAIN_KEPT = {"remove_unused_columns": (False, "windows of tokens have no columns")}
RESUMABLE_PARTS = ("optimizer", "scheduler", "rng", "data")


class Problems(list):
    """Everything that is wrong with a command, to be told at once."""

    def add_if(self, bad, message: str) -> None:
        if bad:
            self.append(message)

    def end(self) -> None:
        if self:
            raise Refusal(" ".join(self))


def check_training(run: CommonRunArguments, hub: HubArguments, training: TrainingArguments, kept: dict, publishes: bool = True) -> Problems:
    """What is wrong in the arguments that every verified run has. Settles `resume_from_checkpoint` (true is must, false never)."""
    resume = str(training.resume_from_checkpoint).lower()
    training.resume_from_checkpoint = {"true": "must", "false": "never", "none": "auto"}.get(
        resume, resume if resume in ("auto", "must", "never") else training.resume_from_checkpoint
    )
    problems = Problems()
    for name in ("dataloader_multiprocessing_context", "dataloader_persistent_workers"):
        value = getattr(training, name)
        problems.add_if(
            value and not training.dataloader_num_workers, f"--{name} {value} needs --dataloader_num_workers of at least 1, or leave it out."
        )
    unknown = [part for part in names(run.resume_without) if part not in RESUMABLE_PARTS]
    problems.add_if(unknown, f"--resume_without {','.join(unknown)}: only {', '.join(RESUMABLE_PARTS)} can be left out.")
    kept = {**KEPT, **kept}
    for name, (value, why) in kept.items():
        problems.add_if(name in run.given and getattr(training, name) != value, f"--{name} must stay {value}: {why}.")
    for name in unknown_fields(training, kept):
        problems.append(f"--{name} is new in the installed transformers or TRL, and what it does to a verified run is not known here: leave it out.")
    problems += accelerator_problems(training.accelerator_config) + schedule_problems(training) + optimizer_problems(training)
    problems.add_if(
        run.given.get("do_train") is False, "--do_train false: this script trains; --dry_run plans, run_eval.py measures a finished model."
    )
    problems.add_if(
        training.push_to_hub and publishes and not REPOSITORY.fullmatch(training.hub_model_id or ""),
        f"--push_to_hub needs --hub_model_id owner/name, not {training.hub_model_id!r}.",
    )
    try:
        check_metadata({"license": hub.card_license, "language": hub.card_language})
    except CardError as error:
        problems.append(str(error))
    problems.add_if(hub.publish_only and not training.push_to_hub, "--publish_only needs --push_to_hub and the --hub_model_id of the run.")
    problems.add_if(
        hub.publish_steps is not None and "save_steps" in run.given and training.save_steps >= 1 and hub.publish_steps % training.save_steps,
        f"--publish_steps {hub.publish_steps} is no multiple of --save_steps {training.save_steps:g}: only saved checkpoints can be published.",
    )
    problems.add_if(
        run.suggest and Path(run.suggest).exists(), f"--suggest {run.suggest}: that file is there already, and is not written over: name another."
    )
    problems.add_if(str(training.save_strategy.value) not in ("steps", "no"), "--save_strategy must be steps (or no): epochs are not whole steps.")
    for name in ("eval_strategy", "logging_strategy"):
        problems.add_if(getattr(training, name).value == "epoch", f"--{name} must be steps (or no): epochs are not whole steps.")
    return problems


def check_pretrain(model: ModelArguments, data: DataArguments, curation, hub: HubArguments, run: RunArguments, training: PretrainArguments) -> None:
    """Raise one Refusal that names every argument that cannot be right, whatever the hardware."""
    problems = check_training(run, hub, training, PRETRAIN_KEPT, publishes=not data.prepare_only)
    lengths = [name for name in ("max_steps", "hours", "num_train_epochs") if name in run.given and (name != "max_steps" or training.max_steps > 0)]
    problems.add_if(
        "hours" in lengths and len(lengths) > 1, f"{' and '.join(f'--{name}' for name in lengths)} are two lengths of one run: give one of them."
    )
    problems.add_if(
        None not in (curation.min_characters, curation.max_characters) and curation.min_characters > curation.max_characters,
        f"--min_characters {curation.min_characters} is above --max_characters {curation.max_characters}: no document is both.",
    )
    problems.add_if(
        None not in (data.validation_tokens, data.max_tokens) and data.validation_tokens >= data.max_tokens,
        f"--validation_tokens {data.validation_tokens} leaves nothing to train on of --max_tokens {data.max_tokens}, which counts them, too.",
    )
    problems.add_if(run.plan_launch and not run.dry_run, "--plan_launch plans another launch: it goes with --dry_run.")
    problems.add_if(
        None not in (data.validation_tokens, run.block_size) and data.validation_tokens < run.block_size + 1,
        f"--validation_tokens {data.validation_tokens} does not fill one window of {run.block_size} predictions.",
    )
    problems.add_if(
        model.init_from and training.resume_from_checkpoint not in ("auto", "never"),
        "--init_from starts a new run and --resume_from_checkpoint continues one: give one of them.",
    )
    problems.add_if(
        data.prepare_only and training.push_to_hub and not REPOSITORY.fullmatch(data.prepared_hub_id or ""),
        f"--prepare_only --push_to_hub needs --prepared_hub_id owner/name, not {data.prepared_hub_id!r}.",
    )
    problems.end()


def names(comma_separated: str) -> list[str]:
    """`a, b` -> [a, b]."""
    return [name.strip() for name in comma_separated.split(",") if name.strip()]
