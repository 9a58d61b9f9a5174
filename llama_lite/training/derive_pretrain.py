"""Arguments of a pretraining run that the user did not give: derived from the run's record, the prepared folder, the
text and the machine, in this order: those of the data, then of the model, then of the schedule.

Each value comes with its reason. Given values always win; values that contradict each other are refused before anything
is prepared.
"""

from collections.abc import Sequence

import torch

from ..config.pretrain import PREPARING
from ..data.given_text import Text
from ..data.recipes import TEXT_ARGUMENTS, TOKEN_ARGUMENTS, name_of
from ..distributed import print_main
from ..errors import Refusal
from ..kernels.switches import choose_fused_loss
from ..machine.parallelism import Layout
from . import derive_data, derive_model, derive_schedule, timing
from .decisions import Decisions, decide_precision

UNCERTAIN = 1.5  # factor by which an estimate of tokens from a sample may be too small; beyond it, a run is refused

RUN_ARGUMENTS = (
    "model_config block_size tokens_per_step order allow_epochs eval_windows eval_order probe_windows sample_prompts"
    " hours max_steps learning_rate warmup_steps logging_steps eval_steps save_steps save_total_limit"
    " per_device_train_batch_size prepared_dir curated_dir"
).split()

SWITCH_ARGUMENTS = ("precision", "compile_layers", "fused_loss", "block_attention", "attention")
RECALLED = ("mixture", "validation", "allow_epochs_of")  # which decide what there is to derive from: set before
RECORDED = (
    *RUN_ARGUMENTS,
    *RECALLED,
    *TEXT_ARGUMENTS,
    *TOKEN_ARGUMENTS,
    *derive_data.CURATION_ARGUMENTS,
    *SWITCH_ARGUMENTS,
)


def output_dir(dataset: str, mixture: Sequence[str] = ()) -> str:
    """The default folder of a run: named after the text, or the folders of a mixture."""
    return f"runs/{'-'.join(map(name_of, mixture))[:80] or name_of(dataset)}"


def settings(groups: Sequence) -> dict:
    """The settled arguments that define a run, for its record."""
    values = {name: value for group in groups for name, value in vars(group).items() if name in RECORDED}
    # a mixture is of prepared folders: the arguments that prepare a text are not its own
    others = (*PREPARING, *derive_data.CURATION_ARGUMENTS) if values["mixture"] else ()
    return {name: values[name] for name in RECORDED if name not in others}


def at_most(tokens: dict) -> dict:
    """An estimate raised to its upper bound, so that no text is refused by mistake; manifests and exact counts stay."""
    if "estimated" not in tokens or tokens["exact"]:
        return tokens
    splits = {name: {**split, "tokens": int(UNCERTAIN * split["tokens"])} for name, split in tokens["splits"].items()}
    return {**tokens, "splits": splits}


class Derivation:
    """Derives the values of a command, each from those before it (rank 0). `settle` may be called again when the text
    is prepared.

    groups: what `parse_pretrain` returned, in which the values are set. planned: the planned layout. recorded: the
    values of RECORDED in the record of the run that is resumed. mixture: the manifest of a mixture, whose folders are
    prepared. further_sets: number of validation sets beside that of the text.
    """

    def __init__(
        self,
        groups: Sequence,
        text: Text,
        planned: Layout,
        explicit_args: dict,
        recorded: dict,
        mixture: dict | None = None,
        further_sets: int = 0,
    ):
        run, training = groups[-2:]
        self.groups, self.text, self.mixture = groups, text, mixture
        others = PREPARING if mixture else ()  # of the run's one text, before it became a mixture
        self.recorded = {name: value for name, value in recorded.items() if name not in (*others, *RECALLED)}
        self.sets = len(mixture["mixture"] if mixture else [""]) + further_sets
        self.explicit_args, self.device = explicit_args, torch.device("cuda") if run.plan_launch else training.device
        self.processes, self.shards, self.machine = planned.processes, planned.shards, None
        self.sharding = planned.sharding
        if "num_train_epochs" in self.explicit_args:
            self.recorded.pop("max_steps", None)
        for name, other in (("attention", "block_attention"), ("block_attention", "attention")):
            if self.explicit_args.get(name):  # two names of one choice
                self.recorded.pop(other, None)
        if recorded:
            folder = training.output_dir
            print_main(
                f"record    arguments that the command does not give are taken from the run in {folder}"
                f" ({len([n for n in recorded if n not in explicit_args])} values)"
            )

    def settle(self, only_tokens: bool = False) -> tuple[dict, dict, dict]:
        """({argument: value} of derived arguments, {argument: reason}, tokens of the text). Raises Refusal.

        The tokens are a manifest, or an estimate of one. only_tokens: derive only what preparing needs.
        """
        d = self.d = Decisions(self.groups, self.explicit_args)
        self.settle_machine()
        for name, value in self.recorded.items():
            d.decide(name, value, "")
        self.drop_unfit_micro_batch()
        if d["init_from"]:
            from .initial_weights import config_name  # whose libraries other plans do not need

            d.decide("model_config", lambda: config_name(d["init_from"]), "of --init_from")
        self.data = derive_data.DataDerivation(d, self.text, self.mixture, self.device, self.processes)
        self.data.settle()
        if not only_tokens:
            is_new = not self.recorded
            self.model = derive_model.ModelDerivation(d, self.data, self.machine, self.shards, is_new)
            self.model.settle()
            self.schedule = derive_schedule.ScheduleDerivation(d, self.model, self.sets)
            self.schedule.settle()
        return d.values(), d.reasons, self.data.manifest or self.data.estimate()

    def settle_machine(self) -> None:
        """Precision and fused loss, by what computes. Whether layers are compiled, and so how they attend, follows from
        the length.
        """
        d = self.d
        if self.device.type == "cuda" and not torch.cuda.is_available():
            d.decide("precision", self.recorded.get("precision", "bfloat16"), "planned for GPUs")
        else:
            decide_precision(d, self.recorded.get("precision"), self.device)
        if d["precision"] == "float16":
            self.check_float16()
        for name in ("fused_loss", "compile_layers", "block_attention", "attention"):
            if self.recorded.get(name) is not None:
                d.decide(name, self.recorded[name], "as this run began")
        if d["attention"]:
            d.decide("block_attention", False, "")
        d.decide("fused_loss", *choose_fused_loss(self.device, d["use_liger_kernel"], d["precision"]))
        switches = {
            "fused_loss": d["fused_loss"],
            "block_attention": d.settled("block_attention") and d["block_attention"],
        }
        self.machine = self.machine or timing.Machine(
            self.device, d["precision"], switches, self.processes, d["peak_flops"]
        )

    def check_float16(self) -> None:
        """Raise Refusal for what cannot be trained in float16. A run of an earlier version goes on without the fused
        loss that it began with.
        """
        if "fused_loss" in self.d.fixed and self.d["fused_loss"]:
            raise Refusal(
                "--fused_loss with --precision float16: its gradients are computed before the loss is scaled, and"
                " underflow. Give --no_fused_loss, or another precision."
            )
        if self.d["use_liger_kernel"]:
            raise Refusal(
                "--use_liger_kernel with --precision float16: the gradients of its loss are computed before the loss is"
                " scaled, and underflow. Leave it out, or give another precision."
            )
        if self.sharding == "zero2":
            raise Refusal(
                "--precision float16 under DeepSpeed: a checkpoint would not hold its loss scale. Launch with DDP or"
                " FSDP2 (configs/accelerate/fsdp2.yaml), or give another precision."
            )
        self.recorded.pop("fused_loss", None)

    def drop_unfit_micro_batch(self) -> None:
        """Drop a recorded micro-batch that the present number of processes cannot use."""
        d, name = self.d, "per_device_train_batch_size"
        if name in d.reasons and d["tokens_per_step"] % (d["block_size"] * self.processes * d[name]):
            del d.reasons[name]
