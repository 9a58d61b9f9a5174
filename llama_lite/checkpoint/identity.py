"""What makes two runs the same run, what may change on resume, and what a change costs."""

import dataclasses
import difflib
import json
from collections.abc import Iterable
from pathlib import Path

from ..config.fields import HYPERPARAMETERS, SFT_HYPERPARAMETERS, names
from ..config.schedules import CONSTANT
from ..errors import Refusal

# ---- identity ----

IDENTITY = ("model", "hyperparameters", "data", "layout", "environment")
LATER_HARDWARE = ("generation", "instructions", "libraries")  # older manifests lack them
VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What makes two stretches of training one run.

    config: the model's, as its `to_dict()` gives it, with what else belongs to the model. training: TrainingArguments
    as a dict, and `precision`; of these, HYPERPARAMETERS and `further_hyperparameters` count. data: fingerprints, seeds
    and sizes. layout: how the run is shared between processes. environment: hardware, packages, switches, code
    revision.
    """

    config: dict
    training: dict
    data: dict
    layout: dict
    environment: dict
    further_hyperparameters: Iterable[str] = ()

    def record(self) -> dict:
        """JSON of the kinds IDENTITY, as a manifest and `run.json` hold it."""
        model = {name: value for name, value in self.config.items() if name not in VOLATILE_CONFIG}
        return _comparable(
            {
                "model": json.loads(json.dumps(model, default=str)),
                "hyperparameters": {
                    name: self.training[name] for name in (*HYPERPARAMETERS, *self.further_hyperparameters)
                },
                "data": self.data,
                "layout": self.layout,
                "environment": self.environment,
            }
        )


def _comparable(identity: dict) -> dict:
    """An identity in today's form: fields that older manifests lack get their default, and the number of threads
    belongs to the layout, not to the hardware.
    """
    threads = identity["environment"].get("hardware", {}).get("threads")
    hardware = {name: value for name, value in identity["environment"].get("hardware", {}).items() if name != "threads"}
    hyperparameters = {**HYPERPARAMETERS, **identity["hyperparameters"]}
    if not hyperparameters["lr_scheduler_kwargs"] or hyperparameters["lr_scheduler_type"] in CONSTANT:
        hyperparameters["lr_scheduler_kwargs"] = None
    return {
        **identity,
        "hyperparameters": hyperparameters,
        "layout": identity["layout"] | ({} if threads is None else {"threads": threads}),
        "environment": identity["environment"] | ({"hardware": hardware} if hardware else {}),
    }


def _as_far_as_both(hardware: dict, other: dict) -> dict:
    """A description of hardware without the fields of LATER_HARDWARE that another one lacks."""
    return {name: value for name, value in hardware.items() if name in other or name not in LATER_HARDWARE}


def _common_fields(value: object, other: object) -> object:
    """A value without the fields that another one lacks, at every level of nested fields."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return value
    return {name: _common_fields(value[name], other[name]) for name in value if name in other}


def model_differences(saved: dict, current: dict) -> dict[str, tuple]:
    """{field: (saved value, current value)} of the models of two identities. Of two versions of transformers, which can
    write other fields for the same model, only the fields that both write count.
    """
    models = saved["model"], current["model"]
    versions = [identity["environment"].get("packages", {}).get("transformers") for identity in (saved, current)]
    if versions[0] != versions[1]:
        models = _common_fields(*models), _common_fields(*reversed(models))
    both = {name: tuple(model.get(name) for model in models) for name in sorted({*models[0], *models[1]})}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def differences(saved: dict, current: dict) -> dict[str, dict[str, tuple]]:
    """{kind: {name: (saved value, current value)}} for the kinds hyperparameters, data, layout and environment.

    Model fields (`model_differences`) are named `model.field` and count as data: they cannot change within one run.
    """
    saved, current = _comparable(saved), _comparable(current)
    changes: dict[str, dict[str, tuple]] = {"hyperparameters": {}, "data": {}, "layout": {}, "environment": {}}
    for kind in changes:
        for name in sorted({*saved[kind], *current[kind]}):
            old, new = (identity[kind].get(name, SFT_HYPERPARAMETERS.get(name)) for identity in (saved, current))
            if (kind, name) == ("environment", "hardware") and old and new:
                old, new = _as_far_as_both(old, new), _as_far_as_both(new, old)
            if old != new:
                changes[kind][name] = (old, new)
    changes["data"] |= {f"model.{name}": values for name, values in model_differences(saved, current).items()}
    return changes


def changed_arithmetic(changed: dict[str, dict[str, tuple]]) -> list[str]:
    """Names of the `differences` that can change the rounding of a forward pass; empty where the probe must be bitwise
    identical.

    One process and DDP compute with whole float32 weights under autocast; FSDP2 and ZeRO-2 each compute otherwise.
    Processes, micro-batch and accumulation do not count: the probe is one window at a time.
    """
    layout = changed["layout"]
    found = [name for name in ("hardware", "packages", "switches") if name in changed["environment"]]
    found += ["number of threads"] if "threads" in layout else []
    forwards = {"whole" if sharding in ("none", "ddp") else sharding for sharding in layout.get("sharding", ())}
    return found + (["sharding"] if len(forwards) > 1 or "output_dtype" in layout else [])


def is_deterministic(identity: dict) -> bool:
    """Whether the same steps give the same bits every time: on a CPU always, on a GPU with --deterministic or
    --full_determinism, on another accelerator (Apple's mps) never, for torch promises it of no kernel there.
    """
    environment = identity["environment"]
    switches, hardware = environment.get("switches", {}), environment.get("hardware", {})
    if "accelerator" in hardware:
        return False
    return "cuda" not in hardware or any(switches.get(name) for name in ("deterministic", "full_determinism"))


def check_changes(
    saved: dict, current: dict, step: int, allow: str, run: Path | None = None, problem: str = ""
) -> dict[str, dict[str, tuple]]:
    """The differences from a checkpoint at `step`. Raises Refusal with one table of those that `allow` does not name
    (--allow_changes, comma-separated). run: its folder, where it is here. problem: why the checkpoint's weights cannot
    be those of the current model; then no name is enough.
    """
    allowed = names(allow)
    possible = {
        *current["hyperparameters"],
        *current["data"],
        *saved["data"],
        *(f"model.{name}" for name in {*current["model"], *saved["model"]}),
    }
    for name in allowed:
        if name not in possible:
            closest = difflib.get_close_matches(name, possible, 1, 0.4)
            raise Refusal(
                f"--allow_changes {name}: no such field of a run's"
                f" identity{f'; did you mean {closest[0]}?' if closest else '.'}"
            )
    changes = differences(saved, current)
    rows = {**changes["hyperparameters"], **changes["data"]}
    if problem or any(name not in allowed for name in rows):
        width = max(len(name) for name in rows)
        table = "\n".join(
            f"  {name:<{width}}  {_short(old)} -> {_short(new)}{'  (allowed)' if name in allowed else ''}"
            + (f"; {cost}" if (cost := position_cost(name, saved, current, step)) else "")
            for name, (old, new) in rows.items()
        )
        apply = f", or apply the new ones from step {step + 1} on: --allow_changes {','.join(rows)}"
        if problem:
            apply = f"; the new ones cannot be applied to this run: {problem}"
        elif step >= current["hyperparameters"].get("max_steps", step + 1):  # it is finished
            changed = ",".join(dict.fromkeys([*rows, "max_steps"]))
            apply = (
                ", or train longer with the new ones: --max_steps N (in place of --hours or --num_train_epochs)"
                f" --allow_changes {changed}"
            )
        raise Refusal(
            f"this is not the run of the checkpoint at step {step}:\n{table}\nRestore the old values, choose another"
            f" --output_dir{f' (--config {run} keeps the other values of this run)' if run else ''}{apply}"
        )
    return changes


def _short(value) -> str:
    """A value of the table of changes."""
    if isinstance(value, dict) and all(isinstance(part, dict) and "weight" in part for part in value.values()):
        return ", ".join(f"{name} {part['weight']:g} ({part['data'][:8]})" for name, part in value.items())
    text = str(value)
    return text[:12] + "…" if len(text) > 40 and " " not in text else text


def position_cost(name: str, saved: dict, current: dict, step: int) -> str:
    """What a change of data, order or step size repeats or skips, in tokens; "" where nothing is."""
    if "tokens_per_step" not in saved["data"]:
        if name in ("data", "held_out"):
            return "other rows" if name == "data" else "other held-out rows"
        order = name in ("data_seed", "packing", "max_length", "sequences_per_step")
        return "rows come in another order" if order else ""
    tokens_read = step * saved["data"]["tokens_per_step"]
    if name in ("tokens_per_step", "block_size"):
        position = step * current["data"]["tokens_per_step"]
        if position > tokens_read:
            return f"{position - tokens_read:,} tokens are skipped"
        return (
            f"{tokens_read - position:,} tokens are read again"
            if position < tokens_read
            else "windows have other boundaries"
        )
    if name == "mixture":
        return "each folder goes on where it stopped"
    if name == "data" and "mixture" in {**saved["data"], **current["data"]}:
        goes_on = any(part["data"] == saved["data"].get("data") for part in current["data"].get("mixture", {}).values())
        return "the folder goes on where it stopped" if goes_on else f"{tokens_read:,} tokens of other data were read"
    if name == "data":
        return f"the first {step * current['data']['tokens_per_step']:,} tokens of the new data are skipped"
    if name in ("order", "data_seed", "epoch_windows"):
        return (
            f"another order: any of the {tokens_read:,} tokens read so far may be repeated, and as many unread ones"
            " skipped"
        )
    return ""
