"""What all sections of a card need: what it is of, where its text is from, and the table at its head.

The values of one section are in `sections/`; how values are written, in `formatting.py`.
"""

from .formatting import first_of, number
from .metadata import languages_of
from .records import Records
from .sources import percentage, source_in_words, windows_counted, windows_measured

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


class Facts:
    """What a card is of, from the records alone."""

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
        return self.r.step is None and self.r.end == "finished"

    @property
    def declared(self) -> dict:
        """What a person said for the card: {license, language, data_license}, each None where it was not said."""
        found = self.r.run.get("card") or self.r.data.get("card") or {}
        return {name: found.get(name) for name in ("license", "language", "data_license")}

    @property
    def languages(self) -> list[str]:
        """ISO 639 codes of the text's languages: as a person said, or English for the text inside the packages."""
        if said := self.declared["language"]:
            return languages_of(said)
        return ["en"] if {source.get("dataset") for source in self.sources} == {"installed-docs"} else []

    @property
    def sources(self) -> list[dict]:
        """Where the text is from: of a mixture the source of each folder."""
        parts = self.r.data.get("mixture")
        return [part.get("source", {}) for part in parts] if parts else [self.source]

    @property
    def dashboards(self) -> dict[str, str]:
        """{name: address} of the dashboards that others can open."""
        links = {name: link.get("url", "") for name, link in self.r.dashboards.items()}
        return {name: url for name, url in links.items() if url.startswith("https://")}

    @property
    def initial_weights(self) -> str | None:
        """Where a run's weights began, where that is no random draw."""
        return next((event["weights"] for event in self.r.events if event["event"] == "initialised"), None)

    @property
    def text(self) -> str:
        """The source of the text, in words."""
        if parts := self.r.data.get("mixture"):
            shown = (f"{percentage(part['weight'])} {source_in_words(part.get('source', {}))}" for part in parts)
            return f"a mixture of {'; '.join(shown)}"
        return source_in_words(self.source)

    @property
    def measured(self) -> str | None:
        """`sources.windows_measured` of these records."""
        return windows_measured(self.r.run, self.r.data)

    @property
    def counted(self) -> str:
        """`sources.windows_counted` of these records."""
        return windows_counted(self.r.data)

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
            of_step = f"at step {number(last['step'])}" if last["step"] != r.reached["step"] else ""
            notes = [
                note for note in ("mean by the mixture's shares" if r.data.get("mixture") else "", of_step) if note
            ]
            label = f"validation loss ({', '.join(notes)})" if notes else "validation loss"
            rows += [[label, f"{last['eval_loss']:.4f} nats per token"]]
            rows += [["validation perplexity", f"{last['eval_perplexity']:.2f}"]] if "eval_perplexity" in last else []
            rows += [["bits per byte", f"{last['eval_bits_per_byte']:.4f}"]] if "eval_bits_per_byte" in last else []
            rows += [["measured on", f"{self.measured} (counts: {self.counted})"]] if self.measured else []
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
