"""Arguments of `run_pretrain.py`, and their checks."""

import dataclasses
import importlib.util
import sys
from typing import Literal

from transformers import TrainingArguments

from ..errors import Problems
from ..paths import ROOT
from ..processes import available_cores
from .arguments import REPOSITORY
from .common import (
    RESUME_HELP,
    SCHEDULE_HELP,
    CommonRunArguments,
    HubArguments,
    arg,
    before_transformers,
    check_training,
)
from .fields import KEPT
from .pairs import epoch_limits, hub_ids, mixture_weights, validation_folders
from .parser import Parser


@dataclasses.dataclass
class ModelArguments:
    """Which model is trained."""

    _argument_group_name = "Model"

    model_config: str | None = arg(
        None,
        "A preset of configs/model (tiny, 1m, demo, 3m, 8m, 124m, 978m, 1.7b), LAYERSxWIDTH (6x256), a folder that"
        " holds a config.json, or a model on the Hub (owner/name, @revision). With --init_from: that model's.",
    )
    init_from: str | None = arg(
        None,
        "Model whose weights start a NEW run (without optimizer state, step or data position): a folder, or"
        " owner/name@revision on the Hub. Its config and its tokenizer are used too, unless --model_config or"
        " --tokenizer names others.",
    )
    publish_dtype: Literal["bfloat16", "float32", "float16"] = arg(
        "bfloat16", "Number format of the finished model's weights."
    )


@dataclasses.dataclass
class DataArguments:
    """Where text comes from and how it becomes token shards."""

    _argument_group_name = "Data"

    dataset: str = arg(
        "installed-docs",
        "Text: `installed-docs` (English documentation inside the installed packages, no download), `installed-files`"
        " (all their text files, raw), a Hub dataset id, or a file, folder or glob: parquet, jsonl, csv (.gz, .zst"
        " ...), and every other text file, one document each.",
    )
    mixture: list[str] = arg(
        [],
        "Prepared folders and their shares of the training tokens, in place of --dataset: data/web=0.7 data/code=0.3"
        " (YAML: mixture: {data/web: 0.7, data/code: 0.3}). All have one tokenizer: prepare the first with"
        " --prepare_only, and the others with --tokenizer FIRST/tokenizer.",
    )
    validation: list[str] = arg(
        [],
        "Further validation sets, each a name and a prepared folder whose validation slice is measured at each"
        " evaluation: code=data/code science=data/science (YAML: validation: {code: data/code}).",
    )
    dataset_config: str | None = arg(None, "Configuration of a Hub dataset, e.g. sample-100BT.")
    dataset_split: str = arg(
        "train",
        "Split of a Hub dataset, or of a folder with separate files or folders for train and test or validation (all:"
        " every split).",
    )
    dataset_revision: str | None = arg(None, "Revision of a Hub dataset; the commit that it resolves to is recorded.")
    text_column: str | None = arg(
        None, "Column that holds the text of rows (default: `text`, another usual name, or the longest column)."
    )
    encoding: str | None = arg(None, "Encoding of files that are not UTF-8, e.g. cp1252 or gb18030.")
    document_separator: str = arg(
        "auto",
        "Separator of documents in plain text files: auto (the tokenizer's end-of-text token, in files that contain"
        " it), none (each file is one document), or any text (\\n for a line break).",
    )
    file_types: list[str] = arg(
        [], "Extensions of the files to read from a folder, e.g. .md .py (default: all text files)."
    )
    max_bytes: int | None = arg(None, "Read only the first files, in their order, up to this many bytes.")
    prepared_dir: str | None = arg(
        None,
        "Folder for the prepared token shards; written once, then only read (default: data/NAME-HASH, a hash of their"
        " recipe).",
    )
    curated_dir: str | None = arg(
        None,
        "Folder for curated text (default: curated/NAME-HASH next to the prepared folder, a hash of its recipe).",
    )
    tokenizer: str | None = arg(
        None,
        "`train` (byte-level BPE trained on the text, its first 50M characters; the default), `gpt2` (the paper's, from"
        " an installed package), a folder or a Hub id (@revision). With --init_from: that model's, unless --vocab_size"
        " asks for a new one.",
    )
    vocab_size: int | None = arg(None, "Vocabulary size of `--tokenizer train`.")
    shard_tokens: int = arg(100_000_000, "Tokens per shard (the paper: 100M, 200 MB of uint16).")
    validation_tokens: int | None = arg(
        None,
        "Number of tokens at the beginning that are held out for validation (the paper: one shard of 100M).",
    )
    max_tokens: int | None = arg(None, "Number of tokens to prepare, validation included (the paper: 20e9 of 100e9).")
    prepared_hub_id: str | None = arg(
        None,
        "Prepared tokens as a Hub dataset (owner/name, @revision): downloaded into an empty --prepared_dir, or"
        " published by --prepare_only --push_to_hub. Of a mixture, per folder: data/web=you/web,data/code=you/code.",
    )
    prepare_workers: int = arg(
        available_cores(), "Number of processes that curate and tokenize; the result does not depend on it."
    )
    prepare_on: Literal["local", "ray"] = arg(
        "local",
        "Where text is curated and tokenized: in processes of this machine, or on the Ray cluster of RAY_ADDRESS (needs"
        " requirements-extras.txt); the result does not depend on it.",
    )
    prepare_only: bool = arg(False, "Prepare the token shards and stop; run again to continue after an interruption.")
    add_index: bool = arg(
        False,
        "With --prepare_only: add the index of documents to a prepared folder of an earlier version, which has none"
        " (reads the text again; the tokens stay).",
    )
    verify_data: Literal["auto", "sizes", "hashes"] = arg(
        "auto",
        "How shards are checked before the first step: by size, or also by digest (auto: digests up to 1 GiB). hashes:"
        " source text above 1 GiB is hashed again too, instead of trusting the sizes and times of its files.",
    )


@dataclasses.dataclass
class CurationArguments:
    """Which documents are kept. Every rule is off unless it is set."""

    _argument_group_name = "Curation"

    min_score: float | None = arg(
        None, "Minimum educational score (FineWeb-Edu's classifier: 0 to 5; FineWeb-Edu itself keeps 3)."
    )
    score_column: str = arg("score", "Column that holds the educational score.")
    language: str | None = arg(None, "Only documents whose `language` column has this value, e.g. en.")
    min_language_score: float | None = arg(None, "Minimum value of the `language_score` column (FineWeb: 0.65).")
    min_characters: int | None = arg(None, "Minimum length of a document, in characters.")
    max_characters: int | None = arg(None, "Maximum length of a document, in characters.")
    gopher_repetition: bool = arg(False, "Gopher's repetition rules, for raw web text (datatrove).")
    gopher_quality: bool = arg(False, "Gopher's quality rules, for raw web text (datatrove).")
    c4_quality: bool = arg(False, "C4's quality rules, for raw web text (datatrove).")
    fineweb_quality: bool = arg(False, "FineWeb's quality rules, for raw web text (datatrove).")
    exact_dedup: bool = arg(False, "Keep one of several documents with the same text.")
    minhash_dedup: bool = arg(False, "Keep one of several near-duplicates (MinHash, 5-grams of words, 14 x 8 hashes).")


@dataclasses.dataclass
class RunArguments(CommonRunArguments):
    """What a verified pretraining run needs besides transformers' TrainingArguments."""

    block_size: int | None = arg(None, "Predictions per window (at most the model's context).")
    tokens_per_step: int | None = arg(
        None, "Tokens per optimizer step, on any hardware; gradient accumulation follows from it."
    )
    order: Literal["sequential", "shuffled"] = arg(
        "shuffled", "Order of the windows: as prepared (the paper's), or a seeded permutation."
    )
    allow_epochs: bool = arg(
        False,
        "Allow any number of passes over the training tokens (default: as many as are known to help).",
    )
    without_documents: str | None = arg(
        None,
        "File that lists documents, one id, URL or FILE:ROW per line, which the run does not read: another window is"
        " read in place of each that holds one. With --resume_from_checkpoint and a new --output_dir, a run goes on"
        " from a checkpoint before their first use.",
    )
    allow_epochs_of: list[str] = arg(
        [],
        "Folders of a mixture that may be read more than once, with the most passes where a number is given: data/code,"
        " or data/code=4.",
    )
    eval_windows: int | None = arg(None, "Validation windows per evaluation (at most so many of each validation set).")
    eval_order: Literal["sequential", "shuffled"] = arg(
        "shuffled",
        "Which they are: the first ones, which are of few documents, or a seeded sample, the same for every run over"
        " the text.",
    )
    probe_windows: int = arg(8, "Number of validation windows used to verify a checkpoint on resume.")
    eval_tasks: list[str] = arg([], "Tasks of run_eval.py that are scored at each evaluation (the paper: hellaswag).")
    eval_task_limit: int = arg(200, "Items per task of --eval_tasks: a seeded sample, always the same.")
    sample_prompts: list[str] = arg(
        [],
        "Prompts continued at each evaluation (default: the first words of some held-out documents; [] in YAML: none).",
    )
    sample_tokens: int = arg(48, "Tokens in a sampled continuation (0: no samples).")
    fused_loss: bool = arg(True, "Fuse output layer and loss, without holding all logits (less memory, the same loss).")
    block_attention: bool = arg(
        True, "On a CPU, compute attention in blocks of queries, as large matrix products (the same result)."
    )
    attention: str | None = arg(
        None,
        "Attention kernel: eager, sdpa, flex_attention, flash_attention_2, flash_attention_3, or one of the Hub such as"
        " kernels-community/flash-attn3 (default: transformers' choice, sdpa). It is tried on the model first.",
    )
    compile_layers: bool = arg(
        True,
        "Compile the decoder layers (about 25 s at the first start, then cached; faster steps, less memory)."
        " Evaluations are not compiled.",
    )
    shard_checkpoints: bool = arg(
        False,
        "Under FSDP2, every process writes a part of each checkpoint, in files that every layout reads (default: rank 0"
        " writes all of it). For many processes, or where rank 0's machine does not hold a copy of the state.",
    )
    plan_launch: str | None = arg(
        None,
        "For --dry_run: the accelerate config whose processes and sharding are planned, instead of this process's.",
    )
    plan_mfu: float = arg(
        40.0, "For --dry_run: the fraction of peak FLOP/s (MFU, in percent) assumed when estimating days on GPUs."
    )
    plan_price: float | None = arg(
        None,
        "For --dry_run: dollars per GPU and hour, with which the plan says what the run costs (training steps alone).",
    )
    strict_plan: bool = arg(
        False, "Refuse a run whose plan does not fit in memory or on the disk (default: a warning in --dry_run)."
    )
    peak_flops: float | None = arg(
        None,
        "Peak FLOP/s of one device, for MFU and for what is planned by FLOPs (default: TRL's table of GPUs; on a CPU,"
        " measured). Without it, a GPU that the table does not have gets no MFU, and is timed for the plan.",
    )
    audit: str | None = arg(
        None,
        "Make the steps between two revisions again and compare all of it with what was published:"
        " owner/name@step-1000..step-2000, or the folder of a run in place of owner/name (step-0: the beginning).",
    )
    audit_random: int | None = arg(
        None, "For --audit owner/name (or a folder) without steps: so many segments, drawn by --audit_seed."
    )
    audit_tokens: float | None = arg(
        None,
        "Tokens of a drawn segment, at most (default: from one revision to the next). In one that ends between"
        " revisions, logged values alone are compared.",
    )
    audit_seed: int | None = arg(None, "Your own seed of the draw, which the owner of the run cannot know.")
    audit_by: str | None = arg(None, "Your name or organization, for audit.json and the model card.")


@dataclasses.dataclass
class PretrainArguments(TrainingArguments):
    """transformers' TrainingArguments with the paper's values (arXiv 2412.13335 and the authors' code) as defaults."""

    _argument_group_name = "Training (transformers.TrainingArguments)"

    output_dir: str | None = arg(None, "Folder of the run.")
    resume_from_checkpoint: str | None = arg("auto", RESUME_HELP)
    learning_rate: float = arg(6e-4, "Peak learning rate.")
    lr_scheduler_type: str = arg("cosine_warmup_with_min_lr", "Schedule.")
    lr_scheduler_kwargs: dict | str | None = arg(None, SCHEDULE_HELP)
    warmup_steps: float = arg(715, "Steps of linear warm-up (below 1: a share of all steps).")
    adam_beta1: float = arg(0.9, "AdamW's beta1.")
    adam_beta2: float = arg(0.95, "AdamW's beta2.")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon.")
    weight_decay: float = arg(0.1, "Weight decay of matrices and embeddings; norms have none.")
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this global norm.")
    max_steps: int = arg(-1, "Optimizer steps.")
    num_train_epochs: float = arg(
        1.0, "Passes over the training tokens, cut to whole steps, if max_steps is not given."
    )
    bf16: bool = arg(True, "--precision bfloat16; --no_bf16: --precision float32.")
    fp16: bool = arg(False, "--precision float16, on a GPU.")
    seed: int = arg(1337, "Seed of the initial weights, the order and the samples.")
    logging_steps: float = arg(10, "Steps between logged losses.")
    eval_strategy: str = arg("steps", "When to evaluate.")
    eval_steps: float | None = arg(250, "Steps between evaluations (the paper: 250).")
    save_steps: float = arg(250, "Steps between checkpoints (0: one, at the end).")
    save_total_limit: int | None = arg(
        3, "Number of checkpoints to keep (none: all of them); the last verified one is always kept."
    )
    dataloader_drop_last: bool = arg(True, "Kept on: epochs are cut to whole steps.")
    train_sampling_strategy: str = arg(
        "sequential", "Must stay sequential: TokenWindows sets the order of the windows."
    )
    remove_unused_columns: bool | None = arg(False, "Kept off: windows have no columns.")
    logging_nan_inf_filter: bool = arg(False, "Kept off: NaN stops the run instead of being logged as 0.")
    ddp_find_unused_parameters: bool | None = arg(False, "Kept off: every parameter is used.")
    disable_tqdm: bool | None = arg(True, "Kept on: the run prints its own progress.")

    def __post_init__(self):
        before_transformers(self)
        super().__post_init__()


PRETRAIN_FOLLOWS = {  # derived arguments, and what they follow from (training/derive_pretrain.py)
    **dict.fromkeys(
        ("model_config", "max_steps"), "derived from the text, the time limit and the speed of this machine"
    ),
    **dict.fromkeys(("vocab_size", "validation_tokens", "block_size"), "derived from the size of the text"),
    **dict.fromkeys(
        ("tokens_per_step", "per_device_train_batch_size", "warmup_steps", "logging_steps", "eval_steps", "save_steps"),
        "derived from the length of the run",
    ),
    **dict.fromkeys(("learning_rate", "save_total_limit"), "derived from the size of the model"),
    **dict.fromkeys(("fused_loss", "block_attention", "compile_layers"), "chosen for this machine"),
    "eval_windows": "as many as keep evaluations short",
    "prepare_workers": "one per core that may be used here",
    "bf16": "as --precision says",
    "output_dir": "runs/NAME, named after the text",
    "hours": "about ten minutes, if no length is given",
}


PRETRAIN_HELP = """Pretrain a LLaMA with transformers.Trainer, stop at any moment, and resume exactly.

examples:
  accelerate launch run_pretrain.py
      the demo, on any laptop
  accelerate launch run_pretrain.py --dataset mytext/
      your own text: missing arguments are derived from it and the machine
  python run_pretrain.py --dataset mytext/ --hours 2 --suggest mine.yaml
      writes the derived arguments of a two-hour run to a file, with reasons
  accelerate launch run_pretrain.py --config configs/pretrain/paper.yaml
      the paper's 1.7B run
  python run_pretrain.py --config configs/pretrain/demo.yaml --dry_run
      every derived number; writes nothing
  python run_pretrain.py --config configs/pretrain/paper.yaml --prepare_only
      token shards only, restartable
  accelerate launch run_pretrain.py --config my.yaml --max_steps 4000 --allow_changes max_steps
  accelerate launch run_pretrain.py --config my.yaml --push_to_hub --hub_model_id you/name
      a revision per checkpoint
  accelerate launch run_pretrain.py --config my.yaml --resume_from_checkpoint you/name@step-001000
  python run_pretrain.py --audit you/name@step-001000..step-002000
      makes those steps again and compares them with what was published

Run the same command again after any interruption: it resumes from the newest verified checkpoint.
exit status: 0 finished, 2 refused, 3 unhealthy (NaN), 4 differs (an audit), 75 interrupted with a checkpoint; also in
status.json."""


PRETRAIN_KEPT = {"remove_unused_columns": (False, "windows of tokens have no columns")}


def pretrain_parser() -> Parser:
    groups = (ModelArguments, DataArguments, CurationArguments, HubArguments, RunArguments, PretrainArguments)
    usage = "run_pretrain.py [--config FILE.yaml] [--dry_run | --prepare_only | --publish_only] [--field value ...]"
    required = {**KEPT, **PRETRAIN_KEPT}
    return Parser(groups, PRETRAIN_FOLLOWS, required, prog="run_pretrain.py", usage=usage, description=PRETRAIN_HELP)


def parse_pretrain(argv: list[str] | None = None):
    """(ModelArguments, DataArguments, CurationArguments, HubArguments, RunArguments, PretrainArguments). Raises
    Refusal.
    """
    argv = sys.argv[1:] if argv is None else argv
    parsed = pretrain_parser().parse(argv, ROOT / "configs/pretrain/demo.yaml")
    check_pretrain(*parsed)
    return parsed


def audit_problems(run: RunArguments) -> list[str]:
    """What is wrong in the arguments about audits: those of the run come from its records."""
    problems = Problems()
    own = {"audit", "audit_random", "audit_tokens", "audit_seed", "audit_by"}
    given = sorted(own & set(run.explicit_args) - {"audit"})
    if not run.audit:
        problems.add_if(given, f"--{given[0] if given else ''} belongs to --audit: say what is audited.")
        return problems
    allowed = own | {"output_dir", "prepared_dir", "prepared_hub_id", "dataset", "dry_run", "prepare_workers"}
    other = sorted(set(run.explicit_args) - allowed)
    problems.add_if(
        other,
        f"--audit takes {', '.join(other)} from the records of the run: leave"
        f" {'it' if len(other) == 1 else 'them'} out.",
    )
    problems.add_if(
        run.audit_random is not None and run.audit_seed is None,
        "--audit_random needs --audit_seed: a number of yours, so that nobody else chooses the segments.",
    )
    problems.add_if(
        run.audit_random is None and (run.audit_tokens is not None or run.audit_seed is not None),
        "--audit_tokens and --audit_seed belong to --audit_random: say how many segments are drawn.",
    )
    return problems


def check_pretrain(
    model: ModelArguments,
    data: DataArguments,
    curation: CurationArguments,
    hub: HubArguments,
    run: RunArguments,
    training: PretrainArguments,
) -> None:
    """Raise one Refusal that names every argument that cannot be right, whatever the hardware."""
    problems = check_training(run, hub, training, PRETRAIN_KEPT, publishes=not data.prepare_only)
    problems.add_if(
        None not in (curation.min_characters, curation.max_characters)
        and curation.min_characters > curation.max_characters,
        f"--min_characters {curation.min_characters} is above --max_characters {curation.max_characters}: no document"
        " can satisfy both.",
    )
    problems.add_if(
        None not in (data.validation_tokens, data.max_tokens) and data.validation_tokens >= data.max_tokens,
        f"--validation_tokens {data.validation_tokens} leaves nothing to train on: --max_tokens {data.max_tokens}"
        " includes the validation tokens.",
    )
    problems += mixture_problems(data, curation, run)
    plans_only = run.plan_launch and not run.dry_run
    problems.add_if(plans_only, "--plan_launch only plans another launch: use it with --dry_run.")
    problems.add_if(
        None not in (data.validation_tokens, run.block_size) and data.validation_tokens < run.block_size + 1,
        f"--validation_tokens {data.validation_tokens} does not fill one window of {run.block_size} predictions.",
    )
    problems.add_if(
        model.init_from and training.resume_from_checkpoint not in ("auto", "never"),
        "--init_from starts a new run and --resume_from_checkpoint continues one: give one of them.",
    )
    problems.add_if(
        data.prepare_on == "ray" and importlib.util.find_spec("ray") is None,
        "--prepare_on ray needs the package ray, which is not installed here: python -m pip install -r"
        " requirements-extras.txt.",
    )
    problems.add_if(
        data.prepare_only
        and training.push_to_hub
        and not data.mixture
        and not REPOSITORY.fullmatch(data.prepared_hub_id or ""),
        f"--prepare_only --push_to_hub needs --prepared_hub_id owner/name, not {data.prepared_hub_id!r}.",
    )
    problems.add_if(
        run.attention and run.block_attention and "block_attention" in run.explicit_args,
        f"--attention {run.attention} and --block_attention name two kernels: give one of them.",
    )
    problems += audit_problems(run)
    problems.add_if(data.add_index and not data.prepare_only, "--add_index works with --prepare_only: give both.")
    problems.end()


# arguments that prepare one text: they are not those of a mixture, whose folders are prepared already
PREPARING = (
    "dataset dataset_config dataset_split dataset_revision text_column encoding document_separator file_types max_bytes"
    " prepared_dir curated_dir tokenizer vocab_size shard_tokens validation_tokens max_tokens"
).split()


def mixture_problems(data: DataArguments, curation: CurationArguments, run: RunArguments) -> list[str]:
    """What is wrong with the arguments of a mixture and of validation sets, one sentence each. Raises Refusal for items
    that cannot be read.
    """
    problems = Problems()
    validation_folders(data.validation)
    if not data.mixture:
        problems.add_if(run.allow_epochs_of, "--allow_epochs_of is for a --mixture: of one text, give --allow_epochs.")
        return problems
    folders = mixture_weights(data.mixture)
    rules = [field.name for field in dataclasses.fields(curation)]
    if given := [name for name in (*PREPARING, *rules) if name in run.explicit_args]:
        problems.append(
            f"--mixture takes folders that are prepared already, and --{', --'.join(given)} would prepare a text: leave"
            " it out, or prepare each folder first with --prepare_only."
        )
    for argument, named in (
        ("allow_epochs_of", epoch_limits(run.allow_epochs_of)),
        ("prepared_hub_id", hub_ids(data.prepared_hub_id)),
    ):
        if unknown := [folder for folder in named if folder not in folders]:
            problems.append(f"--{argument} {', '.join(unknown)}: not a folder of --mixture ({', '.join(folders)}).")
    return problems
