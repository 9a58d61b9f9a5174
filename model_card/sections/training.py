"""Training: hyperparameters, cost, history and samples of a run, and the versions that it was made with."""

import statistics

from .. import goodput
from ..facts import Facts
from ..formatting import number, short
from ..private import redact

# events that the history of a card leaves out
UNSHOWN = [*"refused saved trained published hub saturated overfitting trends".split(), "not yet published"]

# as the services give them, for cards
BADGES = {
    "trackio": (
        '<img src="https://raw.githubusercontent.com/gradio-app/trackio/refs/heads/main/trackio/assets/badge.png"'
        ' alt="Visualize in Trackio" style="height: 40px;"/>'
    ),
    "wandb": (
        '<img src="https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg"'
        ' alt="Visualize in Weights & Biases" width="150" height="24"/>'
    ),
}


class Training:
    """Values of the sections Training, Run history, Samples and Environment."""

    def __init__(self, facts: Facts):
        self.f, self.r = facts, facts.r

    def hyperparameters(self) -> list[list]:
        """Adapter, optimizer, data, length and layout of the run."""
        return [
            *self._adapter_rows(),
            *self._optimizer_rows(),
            *self._batch_rows(),
        ]

    def _adapter_rows(self) -> list[list]:
        """Which weights a tuning run trains; nothing of pretraining."""
        adapter = self.f.config.get("adapter", {})
        if not adapter:
            return []
        if not adapter["use_lora"]:
            return [["trained", "all weights"]]
        kinds = [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if adapter[key]]
        shape = (
            f"rank {adapter['r']}, alpha {adapter['lora_alpha']:g}, dropout {adapter['lora_dropout']:g},"
            f" targets {', '.join(adapter['target_modules'])}"
        )
        return [["LoRA", ", ".join([shape, *kinds])]]

    def _optimizer_rows(self) -> list[list]:
        """Optimizer, schedule, regularization and precision."""
        settings = self.r.settings("hyperparameters")
        floor = (settings.get("lr_scheduler_kwargs") or {}).get("min_lr_rate")
        adam = f"betas {settings['adam_beta1']} and {settings['adam_beta2']}, epsilon {settings['adam_epsilon']:g}"
        arguments = adam if "adam" in settings["optim"] else settings.get("optim_args") or "defaults"
        warmup_unit = "steps" if settings["warmup_steps"] >= 1 or not settings["warmup_steps"] else "of the steps"
        autocast = " autocast over float32 weights" if settings["precision"] != "float32" else ""
        rows = [
            ["optimizer", f"{settings['optim']}, {arguments}"],
            ["learning rate", f"{settings['learning_rate']:g}"],
            [
                "schedule",
                settings["lr_scheduler_type"]
                + (f", floor {floor:g} of the peak" if floor is not None else "")
                + (
                    f" from step {number(horizon)} on"
                    if (horizon := settings.get("schedule_steps", "max_steps")) != "max_steps"
                    else ""
                ),
            ],
            ["warm-up", f"{settings['warmup_steps']:g} {warmup_unit}"],
            ["weight decay", f"{settings['weight_decay']:g}"],
            ["gradient clipping", f"norm {settings['max_grad_norm']:g}"],
            ["precision", f"{settings['precision']}{autocast}"],
        ]
        if alpha := settings.get("neftune_noise_alpha"):
            rows.append(["noise on the embeddings (NEFTune)", f"alpha {alpha:g}"])
        return rows

    def _batch_rows(self) -> list[list]:
        """Size of a step, number of steps, seed and layout."""
        settings, data, layout = (self.r.settings(kind) for kind in ("hyperparameters", "data", "layout"))
        if "tokens_per_step" in data:
            rows = [
                ["tokens per step", number(data["tokens_per_step"])],
                ["window", f"{number(data['block_size'])} tokens, {data['order']}"],
            ]
        else:
            rows = [
                ["sequences per step", number(data["sequences_per_step"])],
                ["longest sequence", f"{number(data['max_length'])} tokens"],
            ]
        batch = (
            f"{layout['processes']} process{'es' if layout['processes'] > 1 else ''}, micro-batch"
            f" {layout['micro_batch']}, accumulation {layout['accumulation']}"
        )
        return [*rows, ["steps", number(settings["max_steps"])], ["seed", str(data["seed"])], ["layout", batch]]

    def cost(self) -> list[list]:
        """Hardware, wall time and throughput."""
        moved = [
            name
            for event in self.r.events
            if event["event"] == "changed" and event["kind"] in ("environment", "layout")
            for name in event["fields"]
            if event["kind"] == "layout" or name in ("hardware", "packages", "switches")
        ]
        hardware, trained = self.r.run["hardware"], self.r.trained
        if "hardware" in moved:
            hardware = self.r.settings("environment")["hardware"]
        device = ", ".join(
            f"{hardware[key]} threads" if key == "threads" else str(hardware[key])
            for key in ("device", "accelerator", "threads", "capability", "cuda")
            if key in hardware
        )
        switches = self.r.settings("environment").get("switches", {})
        asked = any(switches.get(name) for name in ("deterministic", "full_determinism"))
        other = hardware.get("accelerator")  # neither a CPU nor a GPU of CUDA
        rows = [
            ["hardware", device],
            [
                "resumed runs equal uninterrupted ones",
                "no: it was resumed without the random state of every process, so dropout drew other masks"
                if "random_state" in moved
                else f"within rounding: it was resumed with other {', '.join(dict.fromkeys(moved))}"
                if moved
                else "bit for bit"
                if not other and ("cuda" not in hardware or asked)
                else f"within rounding ({f'on {other}' if other else 'no --deterministic'})",
            ],
        ]
        if self.r.step is None:
            if found := goodput.seconds_at(self.r.events):
                spent = found[0]
                rows += [
                    ["wall time, starts and waiting included", f"{number(round(sum(spent.values())))} s"],
                    ["of it training steps whose result is kept (goodput)", f"{goodput.percentage(spent):.1f} %"],
                    ["of it the rest", goodput.rest(spent)],
                ]
            elif seconds := self.r.wall_seconds():  # of an earlier version
                rows.append(["wall time of all sessions", f"{number(round(seconds))} s"])
        for key, name, digits in (
            ("tokens_per_second", "tokens per second (median)", 0),
            ("mfu", "model FLOPs utilization (median), %", 1),
        ):
            if values := [entry[key] for entry in trained if key in entry]:
                rows.append([name, number(statistics.median_low(values), digits)])
        if values := [entry["peak_memory_gib"] for entry in trained if "peak_memory_gib" in entry]:
            rows.append(["peak memory, GiB", number(max(values), 2)])
        return rows

    def dashboards(self) -> list[str]:
        """Badges, or links, of the dashboards that others can open."""
        return [f"[{BADGES.get(name, f'Curves in {name}')}]({url})" for name, url in sorted(self.f.dashboards.items())]

    def history(self) -> list[list]:
        """Starts, stops and unusual events. Refused attempts are not part of the run."""
        rows = []
        for event in self.r.events:
            kind, detail = event["event"], event.get("reason") or ""
            if kind in UNSHOWN:
                continue
            if kind == "resumed":
                detail = (
                    f"from {event['checkpoint']}: every file by its digest, then its loss on fixed windows computed"
                    " again"
                )
            elif kind == "changed":
                detail = "; ".join(
                    f"{name}: {short(old)} → {short(new)}" for name, (old, new) in event["fields"].items()
                )
                kind = f"changed: {event['kind']}"
            elif kind == "set aside":
                detail = f"{event['checkpoint']}: {'; '.join(event['problems'])}"
            elif kind == "spike":
                detail = f"loss {event['loss']:.4f}, {event['sigmas']} standard deviations"
            elif kind == "not finite":
                detail = f"loss {event['loss']}, gradient norm {event['grad_norm']}"
            elif kind == "not published":
                detail = f"{event['revision']}: {'; '.join(event['problems'])}"
            elif kind in ("training state dropped", "not queued"):
                detail = f"{event['revision']}: {detail}"
            elif kind == "evaluation failed":
                detail = f"{event['part']}: {detail}"
            elif kind == "initialised":
                detail = f"from the weights of {event['weights']}"
            rows.append(
                [
                    number(event.get("at_step", event["step"])),
                    event["time"].replace("T", " ").rstrip("Z"),
                    kind,
                    redact(detail),
                ]
            )
        return rows

    @property
    def saves(self) -> int:
        """Number of checkpoints that were saved."""
        return sum(event["event"] == "saved" for event in self.r.events)

    def samples(self) -> list[tuple]:
        """(step, tokens, validation loss, text) at up to five points."""
        found = []
        for entry in self.r.log:
            if entry.get("samples"):
                loss = next((one["eval_loss"] for one in self.r.evaluated if one["step"] == entry["step"]), None)
                found.append((entry["step"], entry["tokens"], loss, entry["samples"][0]))
        return [found[round(i * (len(found) - 1) / 4)] for i in range(5)] if len(found) > 5 else found

    def packages(self) -> list[list]:
        """Versions of Python and of the packages."""
        table = {"python": self.r.run["python"], **self.r.run["packages"]}
        return [[name, version] for name, version in table.items()]
