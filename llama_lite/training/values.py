"""The arguments of a pretraining command, each given, recorded by the run that goes on, or derived; and their plan."""

import functools

import torch

from ..config.pairs import mixture_weights
from ..data.prepared import mixture_manifest
from ..data.tokenizer import load_tokenizer, text_vocabulary_size, tokenizer_to_be
from ..distributed import print_main, run_on_main
from ..machine import precision
from ..models.presets import model_config_of
from . import derive_pretrain
from .data_plan import check_epochs
from .decisions import lines, set_values
from .mixture import find_mixture, find_validation
from .plan import check_publish_steps, make_plan


class Values:
    """The derived arguments: from the record of the run, the text and the machine. Each choice is printed once, when
    nothing can refuse it any more.

    planned: the Layout that the run is planned for. folders, validation: of a mixture and of --validation, once they
    are found.
    """

    def __init__(self, session, groups, text, planned):
        self.session, self.groups, self.text, self.planned = session, groups, text, planned
        self.printed, self.waiting = {}, []
        self.folders, self.validation = [], []

    @functools.cached_property
    def derivation(self):
        """The Derivation of this command (rank 0)."""
        # a text is prepared for any run, also with another tokenizer than that of the run in the default folder
        recorded = {} if self.groups[1].prepare_only else self.session.recorded(derive_pretrain.RECORDED)
        mixture = mixture_manifest(self.folders) if self.folders else None
        return derive_pretrain.Derivation(
            self.groups,
            self.text,
            self.planned,
            self.session.run_args.explicit_args,
            recorded,
            mixture,
            len(self.validation),
        )

    def find_folders(self, verify: str) -> None:
        """Find the folders of --mixture and --validation, verified. Raises Refusal."""
        data_args = self.groups[1]
        self.folders = run_on_main(find_mixture, data_args, verify)
        self.validation = run_on_main(find_validation, data_args, self.folders, verify)

    def settle(self, only_tokens: bool = False) -> tuple[dict, dict]:
        """Set every missing argument. Returns ({argument: reason}, the manifest of the tokens or an estimate of it)."""
        values, reasons, tokens = run_on_main(lambda: self.derivation.settle(only_tokens))
        set_values(self.groups, values)
        precision.apply(self.session.training_args, self.session.run_args.precision)
        new = {name: value for name, value in values.items() if self.printed.get(name) != value}
        counted = {
            name: f"now that the text is counted: {reason}" if reason and name in self.printed else reason
            for name, reason in reasons.items()
        }
        self.waiting += lines(new, counted)
        self.printed.update(values)
        return reasons, tokens

    def print_chosen(self) -> None:
        """Print the choices that were not printed yet."""
        for line in self.waiting:
            print_main(f"chosen    {line}")
        self.waiting = []


def plan_of(groups, tokens: dict, processes: int | None = None):
    """(model config, Plan) of a run over `tokens` (a manifest, or an estimate of one). Raises Refusal."""
    model_args, data_args, _, hub_args, run_args, training_args = groups
    ids = tokens["tokenizer"]["vocab_size"]
    config = model_config_of(model_args.model_config, ids, run_args.block_size)
    if ids > config.vocab_size and not ("estimated" in tokens and data_args.tokenizer == "train"):
        ids = text_vocabulary_size(tokenizer_of(data_args, tokens))
        tokens = {**tokens, "tokenizer": {**tokens["tokenizer"], "vocab_size": ids}}
    publish_bytes = getattr(torch, model_args.publish_dtype).itemsize
    plan = make_plan(config, tokens, run_args, training_args, publish_bytes, processes)
    state = str(hub_args.publish_training_state)
    check_publish_steps(training_args, plan.steps, hub_args.publish_steps, state)
    check_epochs(plan.sources, data_args.mixture, run_args.allow_epochs, run_args.allow_epochs_of)
    return config, plan


def tokenizer_of(data_args, tokens: dict):
    """The tokenizer of `tokens`: that of the prepared folder, or of the first one of a mixture; where nothing is
    prepared, as `tokenizer_to_be`.
    """
    if "estimated" in tokens:
        return tokenizer_to_be(data_args.tokenizer)
    folder = next(iter(mixture_weights(data_args.mixture)), data_args.prepared_dir)
    return load_tokenizer(f"{folder}/tokenizer")
