"""Values for the templates of a card: rows and sentences, from the records alone."""

import itertools
import re
import statistics
import textwrap

import yaml
from huggingface_hub import EvalResult

from . import goodput
from .private import redact
from .records import Evaluation, Records, metric_key
from .sources import mixture_rows, percentage, read_again, source_in_words, validation_rows

SHOWN = 12  # rows of a long table
WIDTH = 96  # characters of a quoted line
CUT = re.compile(r": (answer|later turns) cut\b")  # a reason in `skipped` of a row that stays
NO_END = "none: no held-out answer ends (all were cut)"

HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
# Fields of a config by the names that its kind gives them: LLaMA's and most, GPT-2's, BLOOM's and MPT's, OPT's.
LAYERS, WIDTHS, HEADS = (
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("hidden_size", "n_embd", "d_model"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
)
SHARED_HEADS, INNER_WIDTHS, CONTEXT = (
    ("num_key_value_heads",),
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    ("max_position_embeddings", "n_positions", "max_seq_len"),
)
OCCASION = (  # arguments that belong to one machine or one launch, not to the run
    "output_dir prepared_dir push_to_hub publish_steps publish_training_state publish_only publish_queue_limit"
    " resume_from_checkpoint"
    " resume_without allow_changes dry_run prepare_only prepare_workers cpu_threads verify_data card_license"
    " card_language report_to run_name init_from hub_model_id hub_private_repo hub_required hub_drain_timeout"
    " prepared_hub_id save_total_limit curated_dir hours suggest step_timeout"
).split()

# events that the history of a card leaves out
UNSHOWN = [*"refused saved trained published hub saturated overfitting trends".split(), "not yet published"]


class Facts:
    """Rows and sentences for the templates, from the records alone."""

    def __init__(self, records: Records, repo: str | None, pictures: dict[str, str]):
        """repo: where on the Hub it is; pictures: {name: what it shows} of the figures that are there."""
        self.r, self.repo, self.pictures = records, repo, pictures
        self.base = records.run.get("base", {})
        self.source = records.data.get("source") or records.run.get("source") or {}
        name = repo.split("/")[-1] if repo else records.folder.resolve().name
        if records.kind == "merged" and not repo:
            name = f"{records.folder.resolve().parent.name}, merged"
        self.title = f"{name}, step {records.step:,}" if records.step is not None else name
        self.config = records.run.get("identity", {}).get("model", {})

    @property
    def finished(self) -> bool:
        """Whether the run is finished; never of a single revision."""
        return self.r.step is None and self.r.status.get("status") == "finished"

    @property
    def text(self) -> str:
        """The source of the text, in words."""
        if parts := self.r.data.get("mixture"):
            shown = (f"{percentage(part['weight'])} {source_in_words(part.get('source', {}))}" for part in parts)
            return f"a mixture of {'; '.join(shown)}"
        return source_in_words(self.source)

    def mixture(self) -> list[list]:
        """`sources.mixture_rows` of these records."""
        return mixture_rows(self.r)

    def validation_sets(self) -> list[list]:
        """`sources.validation_rows` of these records."""
        return validation_rows(self.r)

    def glance(self) -> list[list]:
        """Rows of the table at the head of the card."""
        r, config = self.r, self.config
        if r.kind == "tokens":
            splits = r.data["splits"]
            rows = [[f"{name} tokens", number(part["tokens"])] for name, part in splits.items()]
            rows += [[f"{name} text, bytes", number(part["bytes"])] for name, part in splits.items()]
            return [
                *rows,
                ["documents", number(r.data["documents"])],
                ["vocabulary", number(r.data["tokenizer"]["vocab_size"])],
            ]
        if r.kind == "evaluation":
            rows = r.evaluations[0].shown()
            return [
                [label, number(len(dict.fromkeys(row[key] for row in rows)))]
                for label, key in (("models", "model"), ("tasks", "task"))
            ]
        plan = r.run["plan"]
        rows = [["parameters", number(plan["parameters"])]]
        if "trained" in plan:
            rows += [["of them trained", number(plan["trained"])]]
        rows += [["kind", config["model_type"]]] if config.get("model_type", "llama") != "llama" else []
        rows += [["shape", self.shape()]]
        rows += [["context", f"{number(context)} tokens"]] if (context := first_of(config, CONTEXT)) else []
        rows += [["vocabulary", number(first_of(config, ("vocab_size",)))]]
        rows += [
            ["training tokens", number(r.reached["tokens"])],
            ["step", f"{number(r.reached['step'])} of {number(r.steps)}"],
        ]
        if r.evaluated:
            last = r.evaluated[-1]
            label = "validation loss (mean by the mixture's shares)" if r.data.get("mixture") else "validation loss"
            rows += [[label, f"{last['eval_loss']:.4f} nats per token"]]
            rows += [["validation perplexity", f"{last['eval_perplexity']:.2f}"]] if "eval_perplexity" in last else []
            rows += [["bits per byte", f"{last['eval_bits_per_byte']:.4f}"]] if "eval_bits_per_byte" in last else []
            names = {"bigram": "loss of bigram counts", "unigram": "loss of unigram counts"}
            rows += [
                [label, f"{r.data['baselines'][key]:.4f} nats per token"]
                for key, label in names.items()
                if key in r.data.get("baselines", {})
            ]
        return rows

    def shape(self) -> str:
        """Layers, widths and heads, as far as the config of its kind says."""
        layers, width, heads, shared, inner = (
            first_of(self.config, names) for names in (LAYERS, WIDTHS, HEADS, SHARED_HEADS, INNER_WIDTHS)
        )
        parts = [f"{layers} layers" if layers else "", f"width {number(width)}" if width else ""]
        if heads:
            parts.append(f"{heads} heads" + (f" ({shared} of keys and values)" if isinstance(shared, int) else ""))
        return ", ".join([part for part in parts if part] + ([f"inner width {number(inner)}"] if inner else []))

    # ---- use ----

    @property
    def revision(self) -> str | None:
        """The tag that snippets name; None where main holds the model."""
        last = self.last_published()
        if self.r.step is not None:
            return last["revision"] if last and last["step"] == self.r.step else f"step-{self.r.step:06d}"
        return None if self.finished or last is None else last["revision"]

    def last_published(self) -> dict | None:
        """The last published revision, at most at the step of these records; None where there is none."""
        rows = [
            row
            for row in self.r.published
            if row["repo"] == self.repo and (self.r.step is None or row["step"] <= self.r.step)
        ]
        return max(rows, key=lambda row: row["step"], default=None)

    @property
    def state(self) -> bool:
        """Whether the revision that snippets name carries the training state."""
        return bool((self.last_published() or {}).get("state"))

    @property
    def resumable(self) -> str | None:
        """The tag to resume from; None where a stranger lacks the state, the data or the model's shape."""
        given = self.r.run.get("settings") or self.r.run.get("given", {})
        known = (
            given
            and "mixture" not in self.r.data
            and "files" not in self.source
            and "/" not in str(given.get("model_config", ""))
        )
        if not (self.repo and self.state and known and self.r.kind == "pretrain"):
            return None
        return self.revision or (self.last_published() or {}).get("revision")

    def run_yaml(self) -> str:
        """The run's own arguments, given and derived, without those of its machine."""
        settings = {name: value for name, value in self.r.run.get("settings", {}).items() if value not in (None, [])}
        given = {name: value for name, value in {**settings, **self.r.run["given"]}.items() if name not in OCCASION}
        return yaml.safe_dump(
            {**redact(given), "prepared_dir": f"data/{self.r.settings('data')['data'][:12]}"}, sort_keys=False
        ).strip()

    def prompt(self) -> str:
        """A prompt for the snippet of the card."""
        return (self.r.run.get("given", {}).get("sample_prompts") or ["Once upon a time"])[0]

    def question(self) -> str:
        """A question for the snippet of the card."""
        return self.r.tuning["shown"][0]["prompt"] if self.r.tuning.get("shown") else "What is a language model?"

    def checkpoints(self) -> list[list]:
        """Step, tokens, losses and tag of the published revisions."""
        rows = []
        for row in sorted(self.r.published, key=lambda row: row["step"]) if self.r.step is None else []:
            if row["repo"] == self.repo:
                values = {
                    key: entry[key]
                    for entry in self.r.log
                    if entry["step"] <= row["step"]
                    for key in ("tokens", "loss", "eval_loss")
                    if key in entry
                }
                rows.append(
                    [
                        number(row["step"]),
                        number(values.get("tokens")),
                        *(number(values.get(key), 4) for key in ("loss", "eval_loss")),
                        f"`{row['revision']}`",
                    ]
                )
        return thinned(rows)

    # ---- data and training ----

    def curation(self) -> list[list]:
        """Documents and characters that each curation rule dropped."""
        report = self.r.data.get("curation") or {"rules": []}
        return [
            [rule["rule"], number(rule["documents_dropped"]), number(rule["characters_dropped"])]
            for rule in report["rules"]
        ]

    def skipped(self) -> list[list]:
        """Documents or rows that were left out, by reason; rows that were cut are not."""
        found = {**(self.r.data.get("skipped") or {}), **(self.r.run.get("skipped") or {})}
        return [[reason, number(entry["rows"])] for reason, entry in found.items() if not CUT.search(reason)]

    def tuned_on(self) -> str:
        """The rows that a tuning has read, or packs of them: an epoch is cut to whole steps, and a run may end within
        one.
        """
        plan = self.r.run["plan"]
        read, rows = self.sequences_read(), f"{number(plan['rows'])} rows"
        if read == plan["sequences"]:
            return rows
        if plan["sequences"] == plan["rows"]:
            return f"{number(read)} of {rows}"
        return f"{number(read)} of {number(plan['sequences'])} packs ({rows} in all)"

    def sequences_read(self) -> int:
        """Sequences that a tuning read at least once. Each begin of its order (a run resumed without its data position)
        reads the same ones again.
        """
        plan = self.r.run["plan"]
        resumed = (event.get("data_start", 0) for event in self.r.events if event["event"] == "resumed")
        begins = sorted({0, *resumed})
        longest = max(b - a for a, b in itertools.pairwise([*begins, self.steps_done]))
        return min(longest, plan["steps_per_epoch"]) * plan["sequences_per_step"]

    @property
    def steps_done(self) -> int:
        if self.r.step is not None:
            return self.r.step
        return max(self.r.status.get("step", 0), self.r.reached["step"])

    def rows(self) -> str:
        """What a tuning learnt from and what it did not, in sentences."""
        plan, found = self.r.run["plan"], self.r.run.get("skipped") or {}
        sentences = [
            f"{number(plan['rows'])} rows to learn from ({number(plan['learnt_tokens'])} tokens of answers),"
            f" {number(plan['held_rows'])} rows held out of the tuning by whole documents (the base may have"
            " read them)."
        ]
        if most := self.source.get("max_rows"):
            sentences.append(
                f"No more than {number(most)} rows were taken (`--max_rows`); what comes after them was not read."
            )
        if left := sum(entry["rows"] for reason, entry in found.items() if not CUT.search(reason)):
            sentences.append(f"Rows that were left out, as the table says: {number(left)}.")
        for reason, entry in found.items():
            if CUT.search(reason):
                sentences.append(f"Of the rows, those held out among them, {number(entry['rows'])} are {reason}.")
        all_read = self.sequences_read() == plan["sequences"]
        times = f", {self.steps_done / plan['steps_per_epoch']:.2f} times" if all_read else ""
        return " ".join([*sentences, f"The tuning has read {self.tuned_on()}{times}."])

    def hyperparameters(self) -> list[list]:
        """Adapter, optimizer, data, length and layout of the run."""
        return [
            *self._adapter_rows(),
            *self._optimizer_rows(),
            *self._batch_rows(),
        ]

    def _adapter_rows(self) -> list[list]:
        """Which weights a tuning run trains; nothing of pretraining."""
        adapter = self.config.get("adapter", {})
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
        hardware, trained = self.r.run["hardware"], self.r.trained
        device = ", ".join(
            f"{hardware[key]} threads" if key == "threads" else str(hardware[key])
            for key in ("device", "threads", "capability", "cuda")
            if key in hardware
        )
        switches = self.r.settings("environment").get("switches", {})
        exact = "cuda" not in hardware or any(switches.get(name) for name in ("deterministic", "full_determinism"))
        rows = [
            ["hardware", device],
            [
                "resumed runs equal uninterrupted ones",
                "bit for bit" if exact else "within rounding (no --deterministic)",
            ],
        ]
        if self.r.step is None and (seconds := self.r.wall_seconds()):
            rows.append(["wall time of all sessions", f"{number(round(seconds))} s"])
            if found := goodput.seconds_at(self.r.events):
                spent, total = found[0], number(round(sum(found[0].values())))
                rows.append(["goodput (steps, of the wall time)", f"{goodput.percentage(spent):.1f} % of {total} s"])
                rows.append(["the rest of the wall time", goodput.rest(spent)])
        for key, name, digits in (
            ("tokens_per_second", "tokens per second (median)", 0),
            ("mfu", "model FLOPs utilization (median), %", 1),
        ):
            if values := [entry[key] for entry in trained if key in entry]:
                rows.append([name, number(statistics.median_low(values), digits)])
        if values := [entry["peak_memory_gib"] for entry in trained if "peak_memory_gib" in entry]:
            rows.append(["peak memory, GiB", number(max(values), 2)])
        return rows

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

    # ---- tuning ----

    def before_after(self) -> list[list]:
        """What tuning changed: losses, and shares of answers."""
        rows, tuning = [], self.r.tuning
        for key, name in (
            ("answer_loss", "loss of held-out answers, nats"),
            ("end_of_text_loss", "loss of the end of the answer, nats"),
        ):
            losses = tuning[key]
            if losses is None:
                rows.append([name, NO_END, "", ""])
                continue
            if (ending := losses["difference"]["n"]) < tuning["held_out"]["rows"]:
                name += f" (of {number(ending)} rows that end)"
            rows.append(
                [name, f"{losses['before']:.3f}", f"{losses['after']:.3f}", spread(losses["difference"], 3, "+")]
            )
        for decoding in [name for name in ("greedy", "sampled") if name in tuning]:
            before, after = (tuning[decoding][when] for when in ("before", "after"))
            changes = tuning[decoding].get("difference", {})  # earlier versions had none
            for key, name, form in (
                ("stopped", f"{decoding} answers that stop by themselves", ".0%"),
                ("kept_format", f"{decoding} answers that keep the format", ".0%"),
                ("loops", f"{decoding} answers that end in a loop", ".0%"),
                ("mean_tokens", f"tokens of {decoding} answers (mean)", ".1f"),
            ):
                difference = spread(changes[key], 1 if key == "mean_tokens" else 2, "+") if key in changes else ""
                rows.append([name, *(f"{found[key]:{form}}" for found in (before, after)), difference])
        return rows

    # ---- evaluation ----

    def model(self, row: dict) -> str:
        """The name of a model for readers: its step in this run, its id on the Hub, or the name of its folder."""
        if (
            self.r.kind != "evaluation"
            and row["model"] in self._own_models(row)
            and not row["adapter"]
            and row["step"] is not None
        ):
            return f"step {row['step']:,}"
        if row["commit"]:
            return row["model"]
        return "+".join(part.split("/")[-1] for part in row["model"].split("+"))

    def _own_models(self, row: dict) -> list[str]:
        """Names of the run's own models in the evaluation that `row` belongs to."""
        return [name for evaluation in self.r.evaluations if row in evaluation.scores for name in evaluation.own or []]

    def called(self, evaluation: Evaluation, name: str) -> str:
        """The name of a model of an evaluation for readers."""
        return next((self.model(row) for row in evaluation.scores if row["model"] == name), name)

    def scores(self, evaluation: Evaluation) -> list[list]:
        """One row per task and model: the last model of this run, and the models of others."""
        mine = self.r.mine(evaluation)
        others = {
            row["model"].split("@step-")[0]: row["model"]
            for row in evaluation.shown()
            if row["model"] not in (evaluation.own or ())
        }
        wanted = mine if evaluation.own is None else mine[-1:] + list(others.values())  # of another run its last
        rows = evaluation.shown(wanted)
        return [
            [
                row["task"],
                self.model(row),
                metric_key(row["metric"], row.get("filter")),
                spread(row, 3),
                number(row.get("chance"), 3),
                items_of(row),
                number(row["n_shot"]),
                str(row["version"]),
                "chat" if row["chat_template"] else "plain",
            ]
            for row in sorted(rows, key=lambda row: [one["task"] for one in evaluation.shown()].index(row["task"]))
        ]

    def described(self, evaluation: Evaluation) -> list[str]:
        """Descriptions of the tasks that are this project's own."""
        return [f"`{name}`: {text}" for name, text in evaluation.run.get("descriptions", {}).items()]

    def adjustment(self, evaluation: Evaluation) -> str:
        """What the p-values of `changes` are adjusted for; in tables of earlier versions, for the pairs of a task."""
        rows = evaluation.comparison
        if not any(row.get("family") for row in rows):
            most = max(sum(row["task"] == task for row in rows) for task in {row["task"] for row in rows})
            return (
                "p: McNemar's exact test for accuracies, a normal test for the rest, after Holm's correction over all"
                f" {number(most)} pairs of models of a task."
            )
        sizes = {family: sum(row["family"] == family for row in rows) for family in ("primary", "exploratory")}
        parts = []
        if sizes["primary"]:
            parts.append(f"primary: declared before the evaluation, Holm's correction over {number(sizes['primary'])}")
        if sizes["exploratory"]:
            parts.append(f"exploratory: false discovery rate over {number(sizes['exploratory'])} comparisons")
        return (
            "p: a score test for right and wrong answers, a t test for the rest, both by cluster, adjusted within the"
            f" family of the row ({'; '.join(parts)})."
        )

    def settings_of(self, evaluation: Evaluation) -> str:
        """Harness, number format and seed, which all rows share."""
        return (
            "; ".join(
                ", ".join(dict.fromkeys(str(row[key]) for row in evaluation.scores)) for key in ("harness", "dtype")
            )
            + f"; seed {', '.join(dict.fromkeys(str(row['seed']) for row in evaluation.scores))}"
        )

    def pairs(self, evaluation: Evaluation) -> set[tuple[str, str]]:
        """The pair of models to compare: a run's first and last; a tuned one's base, at its last step, and itself."""
        mine, plain = self.r.mine(evaluation), [row["model"] for row in evaluation.shown() if not row["adapter"]]
        if self.r.tuned:
            return {(plain[-1], mine[-1])} if plain and mine else set()
        return {(mine[0], mine[-1])} if len(mine) > 1 else set()

    def changes(self, evaluation: Evaluation) -> list[list]:
        """Paired differences of that pair."""
        wanted, rows = self.pairs(evaluation), []
        for row in evaluation.comparison:
            if (row["first"], row["second"]) in wanted and not row["variant"]:
                names = [self.called(evaluation, row[key]) for key in ("first", "second")]
                interval = {"value": row["difference"], "low": row["low"], "high": row["high"]}
                rows.append(
                    [
                        row["task"],
                        " → ".join(names),
                        metric_key(row["metric"], row.get("filter")),
                        spread(interval, 4, "+"),
                        probability(row.get("p_fdr") if row.get("family") == "exploratory" else row["p_holm"]),
                        row.get("family") or "",
                        number(row["detectable"], 4),
                    ]
                )
        return rows

    def variants(self, evaluation: Evaluation, kind: str) -> dict[str, list[list]]:
        """{task, metric and model: one row per factor}."""
        found: dict[str, list[list]] = {}
        for row in evaluation.results[kind]:
            if "spread" in row and row["model"] in self.r.mine(evaluation):
                measures = [blind(row[key], 2) for key in ("mean", "spread", "worst_of_k", "flips", "consistency")]
                measures.insert(2, probability(row["spread"].get("p")))
                name = (
                    f"`{row['task']}`, {row['metric']}, {number(row['n'])} items,"
                    f" {self.called(evaluation, row['model'])}"
                )
                found.setdefault(name, []).append([row["factor"], str(row["k"]), *measures])
        return found

    def domains(self, evaluation: Evaluation) -> list[list]:
        """Bits per byte of each kind of text, for the last model of the run or all of an evaluation."""
        mine = self.r.mine(evaluation)
        wanted = mine if evaluation.own is None else mine[-1:]
        return [
            [row["task"], self.called(evaluation, row["model"]), spread({**row, "value": row["bits_per_byte"]}, 4)]
            + [number(row.get(key), digits) for key, digits in (("gap", 4), ("auroc", 3), ("auroc_two_sided", 3))]
            for row in evaluation.results["generalisation"]
            if row["model"] in wanted
        ]

    def contamination(self, evaluation: Evaluation) -> list[list]:
        """Items of each task that share text with the training text."""
        return [
            [row["task"], number(row["judged"]), number(row["contaminated"])]
            for row in evaluation.results["contamination"]
        ]

    def index(self) -> list[EvalResult]:
        """model-index of this run's finished model."""
        found = []
        for evaluation in self.r.evaluations if self.finished else []:
            for row in evaluation.shown(self.r.mine(evaluation)[-1:]):
                found.append(index_entry(row, row["task"]))
        return found

    # ---- limits ----

    def limits(self) -> list[str]:
        """Limits of the model that its records show."""
        r, sentences = self.r, []
        if r.step is None and not self.finished:
            how = r.status.get("status", "it goes on, or ended without a word")
            sentences.append(
                f"The run is not finished: it stands at step {number(r.reached['step'])} of {number(r.steps)} ({how})."
            )
        events = {event["event"]: event for event in reversed(r.events)}
        if found := events.get("saturated"):
            slope = spread({"value": found["slope"], "low": found["low"], "high": found["high"]}, 4, "+")
            sentences.append(
                f"Validation loss was saturated at {number(found['tokens'])} tokens: {slope} nats per doubling of"
                " tokens."
            )
        elif judged := events.get("trends", {}).get("saturation"):
            sentences.append(
                "Validation loss had not saturated when training ended."
                if judged["answer"] == "no"
                else f"Whether validation loss had saturated cannot be told; needed: {judged['needed']}."
            )
        if found := events.get("overfitting"):
            sentences.append(
                f"Validation loss rose while training loss fell, from {found['best_eval_loss']:.4f} to"
                f" {found['eval_loss']:.4f}, at {number(found['tokens'])} tokens."
            )
        if r.kind == "pretrain" and (sentence := read_again(r)):
            sentences.append(sentence)
        for evaluation in r.evaluations:
            rows = evaluation.shown(self.r.mine(evaluation)[-1:])
            level = [
                row["task"]
                for row in rows
                if row.get("chance") and row["low"] is not None and row["low"] <= row["chance"] <= row["high"]
            ]
            if level:
                sentences.append(f"Not distinguished from chance, which the interval includes: {', '.join(level)}.")
            if cut := [f"{row['task']} ({number(row['truncated'])})" for row in rows if row["truncated"]]:
                sentences.append(
                    f"Requests longer than the context, of which the beginning was left out: {', '.join(cut)}."
                )
            worse = [
                row
                for row in evaluation.comparison
                if self.r.tuned and self.pairs(evaluation) == {(row["first"], row["second"])}
            ]
            worse = [
                row for row in worse if row["metric"] == "bits_per_byte" and row["low"] is not None and row["low"] > 0
            ]
            if worse:
                raised = ", ".join(f"{row['task']} by {row['difference']:.4f}" for row in worse)
                sentences.append(f"Tuning raised the bits per byte of {raised}.")
        if found := r.tuning.get("greedy", {}).get("after"):
            sentences.append(
                "Whether answers are right was not measured: only their loss, their form, and whether they stop."
            )
            sentences += [f"{found['loops']:.0%} of greedy answers end in a loop."] if found["loops"] else []
        return sentences

    def packages(self) -> list[list]:
        """Versions of Python and of the packages."""
        table = {"python": self.r.run["python"], **self.r.run["packages"]}
        return [[name, version] for name, version in table.items()]


# ---- how values are written ----


def first_of(config: dict, names: tuple[str, ...]):
    """The first of a config's fields that is there and not None; of its text model's, where it has one inside."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    return next((part[name] for part in (config, inner) for name in names if part.get(name) is not None), None)


def number(value: float | None, digits: int | None = None) -> str:
    """A number with thousands separators, with `digits` decimals where given; "" for None."""
    if value is None:
        return ""
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def probability(value: float | None) -> str:
    """A p-value with four decimals; "" for None."""
    return "<0.0001" if value is not None and value < 1e-4 else number(value, 4)


def interval(row: dict, digits: int, sign: str = "") -> str:
    """A 95 % interval, or that there is none."""
    return (
        "no interval" if row.get("low") is None else f"{row['low']:{sign}.{digits}f} to {row['high']:{sign}.{digits}f}"
    )


def spread(row: dict, digits: int, sign: str = "") -> str:
    """A value with its 95 % interval."""
    return f"{row['value']:{sign}.{digits}f} ({interval(row, digits, sign)})"


def items_of(row: dict) -> str:
    """The number of items behind a score, and whether they are a sample."""
    return number(row["n"]) + (f" (a sample, `--limit {row['limit']}`)" if row.get("limit") else "")


def index_entry(row: dict, dataset: str) -> EvalResult:
    """An entry of a card's model-index; its name says the interval and the items. row: as of `scores.csv`."""
    metric = metric_key(row["metric"], row.get("filter"))
    size = f"{row['n']} items" + (f" (--limit {row['limit']})" if row.get("limit") else "")
    limits = {name: None if row.get(name) is None else round(row[name], 6) for name in ("low", "high")}
    shown = "no 95 % interval" if row.get("low") is None else f"95 % interval {interval(row, 4)}"
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=row["task"],
        metric_type=metric,
        metric_value=round(row["value"], 6),
        metric_name=f"{metric}, {shown}, {size}",
        metric_args={"confidence": 0.95, **limits, "items": row["n"], "limit": row.get("limit")},
        source_name=row["harness"],
        source_url=HARNESS,
    )


def blind(row: dict, digits: int) -> str:
    """A measure of variants with its interval, and what answers drawn blindly would give."""
    return spread(row, digits) + ("" if row.get("blind") is None else f"; blind {row['blind']:.{digits}f}")


def short(value: object) -> str:
    """A value in at most 60 characters; a mixture as shares of its folders."""
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(part, dict) and "weight" in part for part in value.values())
    ):
        return ", ".join(f"{name} {percentage(part['weight'])}" for name, part in value.items())
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def thinned(rows: list) -> list:
    """At most SHOWN rows, evenly, first and last among them."""
    return rows if len(rows) <= SHOWN else [rows[round(i * (len(rows) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def cell(text: object) -> str:
    """A value as a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ").strip()


def table(rows: list[list], *header: str) -> str:
    """A markdown table; columns that are empty in all rows are left out; nothing where there are no rows."""
    if not rows:
        return ""
    kept = [i for i in range(len(header)) if any(str(row[i]).strip() for row in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *[[cell(row[i]) for i in kept] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quote(text: str) -> str:
    """A text as a block that markdown leaves alone, whatever is in it."""
    lines = [
        part
        for line in text.strip().splitlines()
        for part in textwrap.wrap(line, WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]
    ]
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return "\n".join([f"{fence}text", *(line.rstrip() for line in lines), fence])
