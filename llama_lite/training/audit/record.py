"""What a checkpoint records so that others can make its next steps again, and the arguments that follow from it.

A stranger's record chooses nothing but the arithmetic of a run: paths, repositories, dashboards, tasks and samples are
never taken from it.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from model_card.private import redact

from ...config.arguments import REPOSITORY
from ...config.fields import HYPERPARAMETERS
from ...config.pretrain import DataArguments, ModelArguments, RunArguments
from ...data.recipes import TEXT_ARGUMENTS, TOKEN_ARGUMENTS
from ...data.shards import read_manifest
from ...digests import is_digest
from ...errors import Refusal
from ...files import read_json
from ...hub.download import ORIGIN
from ...kernels import block_attention

# arguments of the script's own that say where, when and on what a run is made, or what it shows: no part of its steps
OCCASION = {
    *"model_config init_from prepared_dir curated_dir prepare_workers prepare_only prepared_hub_id verify_data".split(),
    *"hours suggest cpu_threads keep_memory async_save step_timeout dry_run allow_changes resume_without".split(),
    *"plan_launch plan_mfu plan_price strict_plan peak_flops prepare_on add_index without_documents".split(),
    *"shard_checkpoints stop_after_step explicit_args typed".split(),
    *"eval_tasks eval_task_limit sample_prompts sample_tokens".split(),
    *"audit audit_random audit_tokens audit_seed audit_by".split(),
    *TEXT_ARGUMENTS,
    *TOKEN_ARGUMENTS,
}
TRAINING = (  # fields of TrainingArguments that steps, evaluations and logged values depend on
    *(name for name in HYPERPARAMETERS if name not in ("precision", "schedule_steps")),
    *"seed data_seed per_device_train_batch_size per_device_eval_batch_size".split(),
    *"use_liger_kernel liger_kernel_config full_determinism".split(),
    *"activation_checkpointing gradient_checkpointing gradient_checkpointing_kwargs".split(),
    *"logging_strategy logging_steps logging_first_step eval_strategy eval_steps eval_delay eval_on_start".split(),
)


def argument_names() -> list[str]:
    """Names of the arguments that steps, evaluations and logged values depend on."""
    own = [field.name for group in (ModelArguments, DataArguments, RunArguments) for field in dataclasses.fields(group)]
    return [*(name for name in own if name not in OCCASION), *TRAINING]


# ---- what is recorded ----


def rerun_record(groups: Sequence, folders: Iterable[Path]) -> dict:
    """What a checkpoint's manifest holds under `rerun`: {arguments, tokens, init_from}.

    groups: what `parse_pretrain` returned, every argument settled. folders: the prepared folders of the run.
    """
    model_args, data_args = groups[:2]
    values = {name: value for group in groups for name, value in vars(group).items()}
    arguments = {name: getattr(values[name], "value", values[name]) for name in argument_names()}
    record = {
        "arguments": {name: value for name, value in arguments.items() if value not in (None, [])},
        "tokens": [_tokens_record(Path(folder), data_args.prepared_hub_id) for folder in folders],
        "init_from": model_args.init_from,
    }
    return redact(json.loads(json.dumps(record, default=str)))


def _tokens_record(folder: Path, hub_id: str | None) -> dict:
    """Where the tokens of a prepared folder are, and how they were made: {fingerprint, folder, hub, recipe}. folder:
    None for one outside the working folder.
    """
    manifest = read_manifest(folder)
    recipe = manifest.get("recipe") or read_json(folder / "recipe.json")
    is_relative = not folder.is_absolute() and ".." not in folder.parts
    hub = read_json(folder / ORIGIN) or ({"id": hub_id.partition("@")[0], "commit": None} if hub_id else None)
    return {
        "fingerprint": manifest["fingerprint"],
        "folder": str(folder) if is_relative else None,
        "hub": hub,
        "recipe": recipe,
    }


# ---- what follows from it ----


def arguments_of_identity(identity: dict) -> dict:
    """{argument: value} that a run's identity decides."""
    hyperparameters, data, layout = (identity[kind] for kind in ("hyperparameters", "data", "layout"))
    switches = identity["environment"].get("switches", {})
    found = {name: hyperparameters[name] for name in HYPERPARAMETERS if hyperparameters.get(name) is not None}
    if found.get("schedule_steps") == "max_steps":
        del found["schedule_steps"]
    found |= {name: data[name] for name in ("block_size", "tokens_per_step", "order", "seed", "data_seed")}
    found |= {"per_device_train_batch_size": layout["micro_batch"]}
    found |= {"cpu_threads": layout["threads"]} if "threads" in layout else {}
    found |= {name: switches[name] for name in ("compile_layers", "fused_loss") if name in switches}
    if found.get("precision") == "float16":  # earlier versions recorded a fused loss, which is refused now
        found.pop("fused_loss", None)
    found |= {name: True for name in ("deterministic", "full_determinism") if switches.get(name)}
    found |= {"use_liger_kernel": True} if switches.get("liger") else {}
    return found | block_attention.arguments_of(switches.get("attention"))


def is_auditable(identity: dict) -> bool:
    """Whether an identity is that of a pretraining run."""
    return {"block_size", "tokens_per_step", "order", "seed", "data_seed"} <= identity["data"].keys() and {
        "max_steps",
        "precision",
    } <= identity["hyperparameters"].keys()


def recorded_arguments(manifest: dict, source: str) -> dict | None:
    """The arguments in a checkpoint's record; None where an earlier version saved it, without them. Raises Refusal for
    a record that is malformed or of a later version. source: names the checkpoint in messages.
    """
    record = manifest.get("rerun")
    if record is None:
        return None
    arguments = record.get("arguments") if isinstance(record, dict) else None
    if not isinstance(arguments, dict) or not isinstance(record.get("tokens"), list):
        raise Refusal(f"{source}: its record of arguments and tokens is malformed, so its steps cannot be made again.")
    if unknown := sorted(set(arguments) - set(argument_names())):
        raise Refusal(
            f"{source} was saved by a version with arguments that this one does not have"
            f" ({', '.join(map(str, unknown[:6]))}): audit it with that version."
        )
    return {"eval_order": "sequential", **arguments}  # of records from before it was an argument


def arguments_without_record(state: dict, settings: dict) -> tuple[dict, list[str]]:
    """({argument: value} that a checkpoint without a record leaves to its trainer_state.json and to the `settings` of
    its run.json, {} where there is none; what cannot be compared, in words).
    """
    names = ("eval_windows", "eval_order", "probe_windows", "allow_epochs")
    known = {"eval_order": "sequential"} | {name: settings[name] for name in names if name in settings}
    found = {"logging_steps": state.get("logging_steps") or settings.get("logging_steps", 10), **known}
    found |= {"allow_epochs": True} if "allow_epochs" not in settings else {}
    if "eval_windows" not in settings:
        return found | {"eval_strategy": "no"}, ["validation losses and the probe (their settings are not recorded)"]
    return found | {"eval_steps": state.get("eval_steps") or settings.get("eval_steps")}, []


def contradictions(recorded: dict, decided: dict) -> list[str]:
    """How the recorded arguments contradict those that the identity decides, one phrase each."""
    return [
        f"{name} is {recorded[name]} in the recorded arguments and {decided[name]} in the identity"
        for name in sorted(recorded.keys() & decided.keys())
        if recorded[name] != decided[name] and (recorded[name] or decided[name])
    ]


def tokens_of(manifest: dict, source: str) -> list[dict]:
    """The records of the tokens of a checkpoint, {fingerprint, folder, hub, recipe} each; of a checkpoint without a
    record, the fingerprint alone. Raises Refusal where they are malformed.
    """
    if manifest.get("rerun") is None:
        return [{"fingerprint": manifest["identity"]["data"]["data"], "folder": None, "hub": None, "recipe": None}]
    found = manifest["rerun"]["tokens"]
    for record in found:
        hub, recipe = (record.get("hub"), record.get("recipe")) if isinstance(record, dict) else ("", "")
        whole = isinstance(hub, dict | None) and isinstance(recipe, dict | None)
        if not whole or (hub and not _is_repository(hub)) or not isinstance(record.get("fingerprint"), str):
            raise Refusal(f"{source}: its record of tokens is malformed: {str(record)[:200]}.")
        if not isinstance(record.get("folder"), str | None) or not is_digest(record["fingerprint"]):
            raise Refusal(f"{source}: its record of tokens names no folder or fingerprint: {str(record)[:200]}.")
    return found


def _is_repository(hub: dict) -> bool:
    """Whether a record names a repository of the Hub, and a commit or none."""
    commit = hub.get("commit")
    return bool(REPOSITORY.fullmatch(str(hub.get("id")))) and (
        commit is None or bool(re.fullmatch("[0-9a-f]{40}", str(commit)))
    )
