"""Arguments of `run_sft.py`: base, rows, adapter, and TRL's SFTConfig with this project's defaults; and their
checks.
"""

import dataclasses
import sys
from typing import Literal

from trl import SFTConfig

from ..paths import ROOT
from ..processes import available_cores
from . import fields
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
from .parser import Parser


@dataclasses.dataclass
class BaseArguments:
    """What is tuned."""

    _argument_group_name = "Model"

    model_name_or_path: str = arg("runs/demo", "Base model: the folder of a run, a Hub id, or owner/name@revision.")
    model_revision: str | None = arg(
        None, "Revision of a base on the Hub, e.g. step-040000; the commit that it resolves to is recorded."
    )
    tokenizer_name: str | None = arg(None, "Tokenizer to use instead of the base's own: gpt2, a folder or a Hub id.")
    publish_dtype: Literal["bfloat16", "float32", "float16"] = arg(
        "bfloat16", "Number format of a merged, or fully tuned, model's weights (an adapter's are float32)."
    )


@dataclasses.dataclass
class AdapterArguments:
    """The adapter, in the names of peft.LoraConfig. The paper's values are not published: these are choices."""

    _argument_group_name = "LoRA (peft.LoraConfig)"

    use_lora: bool = arg(True, "Tune a low-rank adapter; --no_use_lora tunes every weight.")
    r: int = arg(16, "Rank.")
    lora_alpha: int = arg(32, "Scale: the adapter's output is multiplied by lora_alpha / r.")
    lora_dropout: float = arg(
        0.05, "Dropout before the adapter (default: 0 where the experts of a mixture get one, on which PEFT has none)."
    )
    target_modules: list[str] = arg(
        ["all-linear"],
        "Modules that get an adapter: their names, also those of the stacked weights of experts (gate_up_proj), or"
        " all-linear (every linear one but the head; of mixtures of experts such as Mixtral and Qwen3-MoE also experts"
        " and router).",
    )
    use_rslora: bool = arg(False, "Rank-stabilized LoRA: multiply by lora_alpha / sqrt(r).")
    use_dora: bool = arg(False, "DoRA: weights as magnitude and direction.")
    merge_adapter: bool = arg(
        False, "At the end, write base and adapter as one model, in merged/ of the run folder, and publish it too."
    )


@dataclasses.dataclass
class RowArguments:
    """Which conversations are trained on."""

    _argument_group_name = "Data"

    dataset: str = arg(
        "installed-docs",
        "Rows of instruction/input/output, messages, prompt/completion or /response, or question/answer or /response"
        " (system and history are context; weight 0 and train false exclude from training): a Hub dataset id, or json,"
        " jsonl(.gz, .zst) or parquet by path or glob."
        " `installed-docs`: questions about the documentation inside the installed packages, no download.",
    )
    dataset_config: str | None = arg(None, "Configuration of a Hub dataset.")
    dataset_split: str = arg(
        "train",
        "Split of a Hub dataset, or of a folder with separate files or folders for train and test or validation (all:"
        " every split).",
    )
    dataset_revision: str | None = arg(None, "Revision of a Hub dataset; the commit that it resolves to is recorded.")
    max_rows: int | None = arg(
        None, "Number of rows to read, from the first on (default: all; of installed-docs 6,000)."
    )
    eval_rows: int | None = arg(
        None, "Number of rows to hold out, by whole documents, so that none shares its document with training."
    )
    test_rows: int = arg(
        0,
        "Number of rows to set aside, by whole documents, before any are held out: they are neither trained on nor"
        " scored. A later run whose --eval_rows is this number holds out exactly these, so settings that were chosen in"
        " between were not chosen on the rows that it scores.",
    )
    skip_held_out: bool = arg(
        True, "For installed-docs: leave out the modules whose text the embedded evaluation tasks use."
    )
    long_rows: Literal["drop", "truncate"] = arg(
        "drop",
        "Rows longer than max_length: dropped, or cut at max_length (then without end-of-text); counted and named"
        " either way.",
    )
    prepare_workers: int = arg(
        available_cores(), "Number of processes that read the documentation; the rows do not depend on it."
    )
    show_example: bool = arg(False, "Print one row as the model sees it, with the trained tokens in color, and stop.")


@dataclasses.dataclass
class TunedHubArguments(HubArguments):
    """What is published, and which base an adapter names."""

    base_hub_id: str | None = arg(
        None,
        "owner/name@revision under which a base in a local folder is on the Hub (found automatically when the run"
        " published it).",
    )


@dataclasses.dataclass
class TuningArguments(CommonRunArguments):
    """What a verified tuning run needs besides TRL's SFTConfig."""

    sequences_per_step: int = arg(
        16, "Rows, or packs of rows, per optimizer step, on any hardware; accumulation follows from it."
    )
    probe_rows: int = arg(8, "Number of held-out rows used to verify a checkpoint on resume.")
    prompts: list[str] = arg([], "Further prompts that both base and tuned model answer.")
    compared_prompts: int = arg(8, "Held-out prompts that both base and tuned model answer greedily.")
    sampled_answers: int = arg(
        64, "Held-out prompts answered to measure whether answers stop and keep the format (temperature 0.7, top-k 50)."
    )
    answer_tokens: int = arg(96, "Maximum length of a sampled or greedy answer, in tokens.")


@dataclasses.dataclass
class SftArguments(SFTConfig):
    """TRL's SFTConfig with this project's defaults. The paper's values are not published: these are choices."""

    _argument_group_name = "Training (trl.SFTConfig)"

    output_dir: str | None = arg(None, "Folder of the run.")
    resume_from_checkpoint: str | None = arg("auto", RESUME_HELP)
    learning_rate: float = arg(2e-4, "Peak learning rate.")
    lr_scheduler_type: str = arg("cosine_warmup_with_min_lr", "Schedule.")
    lr_scheduler_kwargs: dict | str | None = arg(None, SCHEDULE_HELP)
    warmup_steps: float = arg(0.03, "Steps of linear warm-up (below 1: a share of all steps).")
    weight_decay: float = arg(0.0, "Weight decay.")
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this global norm.")
    num_train_epochs: float = arg(3.0, "Passes over the rows, each cut to whole steps, if max_steps is not given.")
    max_length: int | None = arg(1024, "Ids per row, and per pack of rows.")
    packing: bool = arg(
        True,
        "Several rows in a pack of max_length ids, none of which attends to another; --no_packing: one row per"
        " sequence.",
    )
    bf16: bool | None = arg(True, "--precision bfloat16; --no_bf16: --precision float32.")
    fp16: bool = arg(False, "--precision float16, on a GPU.")
    activation_checkpointing: bool | None = arg(False, "Compute activations twice to save memory.")
    seed: int = arg(1337, "Seed of adapter, order, dropout and sampled answers.")
    logging_steps: float = arg(10, "Steps between logged losses.")
    eval_strategy: str = arg("steps", "When to evaluate.")
    eval_steps: float | None = arg(100, "Steps between evaluations.")
    save_steps: float = arg(100, "Steps between checkpoints (0: one, at the end).")
    save_total_limit: int | None = arg(
        3, "Number of checkpoints to keep (none: all of them); the last verified one is always kept."
    )
    dataloader_drop_last: bool = arg(True, "Kept on: epochs are cut to whole steps.")
    train_sampling_strategy: str = arg("sequential", "Must stay sequential: the seed sets the order of the rows.")
    logging_nan_inf_filter: bool = arg(False, "Kept off: NaN stops the run instead of being logged as 0.")
    ddp_find_unused_parameters: bool | None = arg(False, "Kept off: every parameter is used.")
    disable_tqdm: bool | None = arg(True, "Kept on: the run prints its own progress.")

    def __post_init__(self):
        before_transformers(self)
        super().__post_init__()


KEPT = {
    "dataset_text_field": ("text", "rows are conversations"),
    "dataset_kwargs": (None, "rows are encoded by this script"),
    "truncation_mode": ("keep_start", "--long_rows says what happens to long rows"),
    "shuffle_dataset": (False, "the order is a function of seed and step"),
    "packing_strategy": ("bfd", "the other strategies cut rows, or let packed rows attend to each other"),
    "padding_free": (False, "rows are always batched without padding"),
    "eval_packing": (None, "held-out rows are evaluated one by one"),
    "completion_only_loss": (None, "only answers are trained on"),
    "assistant_only_loss": (False, "only answers are trained on already"),
    "eos_token": (None, "answers end with the tokenizer's end-of-text"),
    "pad_token": (None, "nothing is padded in training"),
    "model_init_kwargs": (None, "the base is loaded, verified, by this script"),
    "trust_remote_code": (False, "a model of the Hub is data, never code"),
    "dataset_num_proc": (None, "rows are encoded by this script; --prepare_workers reads the documentation"),
    "pad_to_multiple_of": ("auto", "nothing is padded in training"),
    "router_aux_loss_coef": (None, "the loss is that of the answers' own tokens"),
    "remove_unused_columns": (True, "rows have no columns but their ids and labels"),
    "use_liger_kernel": (False, "TRL's own fused head computes the loss on a GPU"),
    "liger_kernel_config": (None, "TRL's own fused head computes the loss on a GPU"),
}


SFT_FOLLOWS = {  # derived arguments, and what they follow from (training/derive_sft.py)
    **dict.fromkeys(("max_length", "long_rows"), "derived from the length of the rows, within the base's context"),
    **dict.fromkeys(("eval_rows", "sequences_per_step"), "derived from the number of rows"),
    **dict.fromkeys(("probe_rows", "compared_prompts", "sampled_answers"), "as many as are held out, up to {}"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "logging_steps", "eval_steps", "save_steps"),
        "derived from the length of the run",
    ),
    "learning_rate": "derived from the width of the base",
    "answer_tokens": "96, within the base's context",
    "max_steps": "three epochs, or about ten minutes if that is less",
    "bf16": "as --precision says",
    "output_dir": "runs/BASE-sft",
    "prepare_workers": "one per core that may be used here",
}


SFT_HELP = """Tune a model on instructions with TRL's SFTTrainer and LoRA, stop at any moment, and resume exactly.

examples:
  accelerate launch run_sft.py
      the demo's own model, on any laptop
  accelerate launch run_sft.py --config configs/sft/paper.yaml --model_name_or_path you/name@step-040000
  python run_sft.py --config configs/sft/demo.yaml --show_example
      one row as the model sees it
  python run_sft.py --config configs/sft/demo.yaml --dry_run
      rows, tokens, steps and disk; trains nothing
  accelerate launch run_sft.py --model_name_or_path runs/mytext --dataset mine.jsonl
      your own base and rows: other arguments are derived from them
  accelerate launch run_sft.py --config my.yaml --no_use_lora
      every weight instead of an adapter
  accelerate launch run_sft.py --config my.yaml --merge_adapter --push_to_hub --hub_model_id you/name-chat

Run the same command again after any interruption: it resumes from the newest verified checkpoint.
exit status: 0 finished, 2 refused, 3 unhealthy (NaN), 75 interrupted with a checkpoint; also in status.json."""


def sft_parser() -> Parser:
    groups = (BaseArguments, AdapterArguments, RowArguments, TunedHubArguments, TuningArguments, SftArguments)
    usage = "run_sft.py [--config FILE.yaml] [--dry_run | --show_example | --publish_only] [--field value ...]"
    required = {**fields.KEPT, **KEPT}
    return Parser(groups, SFT_FOLLOWS, required, prog="run_sft.py", usage=usage, description=SFT_HELP)


def parse_sft(argv: list[str] | None = None):
    """(BaseArguments, AdapterArguments, RowArguments, TunedHubArguments, TuningArguments, SftArguments). Raises
    Refusal.
    """
    parsed = sft_parser().parse(sys.argv[1:] if argv is None else argv, ROOT / "configs/sft/demo.yaml")
    check_sft(*parsed)
    return parsed


def check_sft(
    base: BaseArguments,
    adapter: AdapterArguments,
    rows: RowArguments,
    hub: TunedHubArguments,
    run: TuningArguments,
    training: SftArguments,
) -> None:
    """Raise one Refusal that names every argument that cannot be right, whatever the model."""
    problems = check_training(run, hub, training, KEPT)
    for name in ("probe_rows", "compared_prompts", "sampled_answers"):
        count, eval_rows = getattr(run, name), rows.eval_rows
        problems.add_if(
            name in run.explicit_args and eval_rows is not None and count > eval_rows,
            f"--{name} {count} is more than --eval_rows {eval_rows}.",
        )
    problems.add_if(
        any(name.split(".")[-1] == "lm_head" for name in adapter.target_modules),
        "--target_modules lm_head: TRL reads the head's weight directly, so an adapter on it would not be trained."
        " Leave it out.",
    )
    problems.add_if(
        training.activation_offloading and training.device.type == "cpu",
        "--activation_offloading moves activations from a GPU to the CPU, and this run is on the CPU: leave it out.",
    )
    problems.add_if(
        not adapter.use_lora and adapter.merge_adapter,
        "--merge_adapter with --no_use_lora: there is no adapter to merge.",
    )
    problems.add_if(
        hub.base_hub_id and not REPOSITORY.fullmatch(hub.base_hub_id.split("@")[0]),
        f"--base_hub_id {hub.base_hub_id} is not owner/name@revision.",
    )
    problems.end()
