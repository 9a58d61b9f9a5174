"""What makes two runs the same run, what may change on resume, and what a change costs."""

import dataclasses
import difflib
import json
from collections.abc import Iterable

from ..config.fields import HYPERPARAMETERS, SFT_HYPERPARAMETERS, names
from ..config.schedules import CONSTANT
from ..errors import Refusal

# ---- identity ----

IDENTITY = ("model", "hyperparameters", "data", "layout", "environment")

VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What makes two stretches of training one run.

    config: the model's, as its `to_dict()` gives it, with what else belongs to the model. training: TrainingArguments as
    a dict, and `precision`; of these, HYPERPARAMETERS and `further_hyperparameters` count. data: fingerprints, seeds and
    sizes. layout: how the run is shared between processes. environment: hardware, packages, switches, code revision.
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
    """The record of an identity as it is written today: what older manifests lack is as the default that it was, and
    threads are in the layout, not in the hardware.
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


def differences(saved: dict, now: dict) -> dict[str, dict[str, tuple]]:
    """{kind: {name: (then, now)}} of two records, for the kinds hyperparameters, data, layout and environment.

    Model fields are named `model.field` and count as data: they cannot change within one run.
    """
    saved, now = _comparable(saved), _comparable(now)
    found: dict[str, dict[str, tuple]] = {"hyperparameters": {}, "data": {}, "layout": {}, "environment": {}}
    for kind in found:
        for name in sorted({*saved[kind], *now[kind]}):
            then, new = (identity[kind].get(name, SFT_HYPERPARAMETERS.get(name)) for identity in (saved, now))
            if then != new:
                found[kind][name] = (then, new)
    for name in sorted({*saved["model"], *now["model"]}):
        if saved["model"].get(name) != now["model"].get(name):
            found["data"][f"model.{name}"] = (saved["model"].get(name), now["model"].get(name))
    return found


def changed_arithmetic(changed: dict[str, dict[str, tuple]]) -> list[str]:
    """What of `differences` lets the same mathematics end in other last bits; empty where a result must be the same bit
    for bit.
    """
    threads = ["number of threads"] if "threads" in changed["layout"] else []
    return [*(name for name in ("hardware", "packages", "switches") if name in changed["environment"]), *threads]


def check_changes(saved: dict, now: dict, step: int, allow: str) -> dict[str, dict[str, tuple]]:
    """The differences from a checkpoint, or a Refusal with all that were not allowed, in one table."""
    allowed = names(allow)
    possible = {*now["hyperparameters"], *now["data"], *(f"model.{name}" for name in {*now["model"], *saved["model"]})}
    for name in allowed:
        if name not in possible:
            near = difflib.get_close_matches(name, possible, 1, 0.4)
            raise Refusal(
                f"--allow_changes {name}: no such field of a run's"
                f" identity{f'; did you mean {near[0]}?' if near else '.'}"
            )
    found = differences(saved, now)
    rows = {**found["hyperparameters"], **found["data"]}
    refused = [name for name in rows if name not in allowed]
    if refused:
        width = max(len(name) for name in rows)
        table = "\n".join(
            f"  {name:<{width}}  {_short(then)} -> {_short(new)}{'  (allowed)' if name in allowed else ''}"
            + (f"; {cost}" if (cost := position_cost(name, saved, now, step)) else "")
            for name, (then, new) in rows.items()
        )
        raise Refusal(
            f"this is not the run of the checkpoint at step {step}:\n{table}\nGive back the old values, choose another"
            f" --output_dir, or accept them, really applied from step {step + 1} on: --allow_changes {','.join(rows)}"
        )
    return found


def _short(value) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) > 40 and " " not in text else text


def position_cost(name: str, saved: dict, now: dict, step: int) -> str:
    """What a change of data, order or step size repeats or skips, in tokens."""
    if "tokens_per_step" not in saved["data"]:
        return (
            "rows come in another order"
            if name in ("data", "data_seed", "packing", "max_length", "sequences_per_step")
            else ""
        )
    done = step * saved["data"]["tokens_per_step"]
    if name in ("tokens_per_step", "block_size"):
        position = step * now["data"]["tokens_per_step"]
        if position > done:
            return f"{position - done:,} tokens are skipped"
        return f"{done - position:,} tokens are read again" if position < done else "windows are cut elsewhere"
    if name == "data":
        return f"the first {step * now['data']['tokens_per_step']:,} tokens of the new data are skipped"
    if name in ("order", "data_seed", "epoch_windows"):
        return f"another order: of the {done:,} tokens read so far, any may come again, and as many unread ones never"
    return ""
