"""The tokens of a run: found, downloaded or prepared, and verified, before anything is trained on them."""

from pathlib import Path

from transformers import AutoTokenizer

from ..config.pretrain import PREPARING
from ..data.document_reads import document_reads
from ..data.preparation import prepare
from ..data.prepared import PreparedFolder, PreparedTokens, data_lines, with_validation
from ..data.shards import describe, verify_prepared
from ..data.sources import check_there
from ..data.tokenizer import check_stock, tokenizer_record
from ..distributed import print_main, run_on_main
from ..errors import Refusal
from ..files import read_json
from ..folder_kinds import check_apart, check_folder
from ..hub import client, download
from . import derive_pretrain
from .data_plan import check_epochs
from .memory import check_memory
from .mixture import (
    check_before_preparing,
    find_validation,
    order_history,
    pull_folders,
    push_folders,
    rows_at_end,
    training_windows,
)
from .preflight import check_folders
from .values import Values, plan_of, tokenizer_of


def check_paths(data_args, output_dir: str) -> None:
    """Raise Refusal for folders that cannot be written to, hold something else, or lie in each other."""
    folders = {"prepared_dir": data_args.prepared_dir, "curated_dir": data_args.curated_dir}
    run_on_main(check_folders, folders if data_args.prepare_only else {**folders, "output_dir": output_dir})
    run_on_main(check_folder, "prepared_dir", data_args.prepared_dir, "prepared")
    if not (data_args.mixture or data_args.prepared_dir or Path(output_dir).exists()):
        run_on_main(check_there, data_args.dataset)  # before the folder of the run is made
    if not data_args.prepare_only:
        run_on_main(check_folder, "output_dir", output_dir, "pretrain")
        check_apart(output_dir, folders)


def recall_mixture(session, data_args, run_args) -> None:
    """Take mixture and validation sets from the record of the run that goes on, where the command does not give them,
    nor a text.
    """
    recorded = run_on_main(session.recorded, derive_pretrain.RECALLED)
    if any(name in run_args.explicit_args for name in PREPARING):
        recorded.pop("mixture", None)
    for name, value in recorded.items():
        if name not in run_args.explicit_args:
            setattr(run_args if name == "allow_epochs_of" else data_args, name, value)


def prepare_only(session, data_args, rules: dict, values: Values) -> None:
    """--prepare_only: the token shards, repaired where they are damaged; with --push_to_hub, as a Hub dataset."""
    if data_args.mixture:
        prepare_only_mixture(session, data_args, values)
        return
    explicit_args = set(session.run_args.explicit_args)
    if not session.publishes:
        pull_prepared(data_args, rules, explicit_args)
    _, tokens = values.settle(only_tokens=True)
    folder, size = data_args.prepared_dir, tokens.get("estimated", 0)
    run_on_main(check_folders, {"prepared_dir": folder}, {"prepared_dir": size})
    values.print_chosen()
    print_main(describe(run_on_main(prepare, data_args, rules, values.text, explicit_args, True)))
    print_main(f"prepared  {folder}")
    if session.publishes:
        private = session.training_args.hub_private_repo
        run_on_main(download.push_prepared, Path(folder), data_args.prepared_hub_id, private, session.hub_args.card)


def prepare_only_mixture(session, data_args, values: Values) -> None:
    """--prepare_only of a mixture: its folders, downloaded where --prepared_hub_id names them and verified by their
    digests; with --push_to_hub, each as a Hub dataset.
    """
    if not session.publishes:
        run_on_main(pull_folders, data_args)
    values.find_folders("hashes")
    print_main("\n".join(data_lines({}, values.folders, values.validation)))
    if session.publishes:
        run_on_main(push_folders, data_args, session.training_args.hub_private_repo, session.hub_args.card)


def pull_prepared(data_args, rules: dict, explicit_args: set[str]) -> None:
    """Download the tokens that --prepared_hub_id names, if it names some."""
    if data_args.mixture:
        run_on_main(pull_folders, data_args)
    elif hub := data_args.prepared_hub_id and client.reference(data_args.prepared_hub_id):
        data_args.prepared_dir = run_on_main(download.pull_prepared, hub, data_args, rules, explicit_args)


def prepare_text(groups, rules: dict, values: Values):
    """(PreparedTokens, tokenizer) of the run: the prepared folder, which is made where it is not there, or those of the
    mixture, and the validation sets, all verified; every argument is settled. Raises Refusal, as far as can be before
    a long preparation.
    """
    _, data_args, _, _, run_args, training_args = groups
    pull_prepared(data_args, rules, set(run_args.explicit_args))
    values.find_folders(data_args.verify_data)
    _, tokens = values.settle()
    check_before_preparing(data_args, tokens, values.validation)
    config, plan = plan_of(groups, with_validation(derive_pretrain.at_most(tokens), values.validation))
    run_on_main(check_memory, config, plan, values.planned, training_args, run_args)
    is_estimate = "estimated" in tokens
    if is_estimate:
        run_on_main(check_tokenizer, groups, values, config, tokens)
    folders = {"prepared_dir": data_args.prepared_dir, "output_dir": training_args.output_dir}
    needed = {"prepared_dir": tokens.get("estimated", 0), "output_dir": 2 * plan.checkpoint_bytes}
    run_on_main(check_folders, folders, needed)
    if is_estimate:
        values.print_chosen()  # preparing takes its time
    parts = values.folders
    if not parts:
        manifest = prepare_folder(data_args, rules, values, set(run_args.explicit_args))
        parts = [PreparedFolder("", Path(data_args.prepared_dir), manifest)]
        values.validation = run_on_main(find_validation, data_args, parts, "sizes")
    found = PreparedTokens(parts, bool(values.folders), values.validation)
    for line in data_lines(found.manifest, values.folders, found.validation):
        print_main(f"data      {line}")
    tokenizer = AutoTokenizer.from_pretrained(found.tokenizer, trust_remote_code=False)
    if tokenizer_record(tokenizer) != found.manifest["tokenizer"]:
        raise Refusal(
            f"{found.tokenizer} is not the one the tokens were made with. Run the same command with --prepare_only"
            " in a new --prepared_dir."
        )
    if is_estimate:
        values.settle()  # now that they are counted
    return found, tokenizer


def prepare_folder(data_args, rules: dict, values: Values, explicit_args: set[str]) -> dict:
    """The manifest of the prepared folder of one text, which is made where it is not there, and verified."""
    manifest = run_on_main(prepare, data_args, rules, values.text, explicit_args)
    run_on_main(verify_prepared, Path(data_args.prepared_dir), manifest, data_args.verify_data)
    return manifest


def check_tokenizer(groups, values: Values, config, tokens: dict) -> None:
    """Raise Refusal where others who load the model would not get its tokenizer (rank 0)."""
    model_args, data_args = groups[:2]
    begins = not values.derivation.recorded
    check_stock(f"--model_config {model_args.model_config}", config, tokenizer_of(data_args, tokens), begins=begins)


def check_epochs_left(groups, tokens, train) -> None:
    """Raise Refusal where a folder of a mixture would be read too often, by what the run has read of it already."""
    _, data_args, _, _, run_args, _ = groups
    if tokens.is_mixture:
        rows = rows_at_end(tokens, train)
        check_epochs(rows, data_args.mixture, run_args.allow_epochs, run_args.allow_epochs_of)


def data_record(tokens) -> dict:
    """`data.json` of a run: what its PreparedTokens are, with what curation dropped."""
    curation = None if tokens.is_mixture else read_json(tokens.folders[0].folder / "curation.json")
    return {**tokens.record(), "curation": curation}


def training_data(groups, tokens, removal, data: dict, plan, start):
    """(windows of the run, names of the folders of a mixture, which documents it reads). removal: a RemovalOfRun. data:
    `identity["data"]` of the run. Raises Refusal.
    """
    train, sources = training_windows(tokens, data, plan, start)
    removal.apply(train)
    check_epochs_left(groups, tokens, train)
    history = order_history(start, data)
    return train, sources, document_reads(tokens.by_fingerprint, data, plan.steps, history, removal.removal)
