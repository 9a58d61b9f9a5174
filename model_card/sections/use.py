"""Use and checkpoints: what the snippets of a card name, and the published revisions."""

import itertools

import yaml

from ..facts import Facts
from ..formatting import number, thinned
from ..private import redact

OCCASION = (  # arguments that belong to one machine or one launch, not to the run
    "output_dir prepared_dir push_to_hub publish_steps publish_training_state publish_only publish_queue_limit"
    " resume_from_checkpoint resume_without allow_changes dry_run prepare_only prepare_workers prepare_on cpu_threads"
    " verify_data without_documents card_license card_language card_data_license report_to run_name init_from"
    " hub_model_id hub_private_repo hub_required hub_drain_timeout prepared_hub_id save_total_limit curated_dir"
    " hours suggest step_timeout plan_price project trackio_space_id trackio_bucket_id trackio_static_space_id"
).split()

NO_PROMPT = "The beginning of a text"


class Use:
    """Values of the sections Use and Checkpoints."""

    def __init__(self, facts: Facts):
        self.f, self.r = facts, facts.r

    @property
    def revision(self) -> str | None:
        """The tag that snippets name; None where main holds the model."""
        last = self.last_published()
        if self.r.step is not None:
            return last["revision"] if last and last["step"] == self.r.step else f"step-{self.r.step:06d}"
        return None if self.f.finished or last is None else last["revision"]

    def last_published(self) -> dict | None:
        """The last published revision, at most at the step of these records; None where there is none."""
        rows = [
            row
            for row in self.r.published
            if row["repo"] == self.f.repo and (self.r.step is None or row["step"] <= self.r.step)
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
            and "files" not in self.f.source
            and "/" not in str(given.get("model_config", ""))
        )
        if not (self.f.repo and self.state and known and self.r.kind == "pretrain"):
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
        """A prompt for the snippet of the card: of the run's own, or what its samples begin with, which is text of its
        kind.
        """
        if given := self.r.run.get("given", {}).get("sample_prompts"):
            return given[0]
        samples = [entry["samples"][0] for entry in self.r.log if entry.get("samples")]
        if len(samples) < 2:
            return " ".join("".join(samples).split()[:2]) or NO_PROMPT
        alike = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*samples, strict=False))
        words = "".join(characters[0] for characters in alike).split(" ")
        return " ".join(words[:-1] if len(words) > 2 else words).strip() or NO_PROMPT  # a prompt ends within a word

    def question(self) -> str:
        """A question for the snippet of the card: a held-out one, or one that was given for the tuning."""
        if shown := self.r.tuning.get("shown"):
            return shown[0]["prompt"]
        return next(iter(self.r.run.get("given", {}).get("prompts") or []), "What is a language model?")

    def checkpoints(self) -> list[list]:
        """Step, tokens, losses and tag of the published revisions; a validation loss that was measured at that step."""
        published = {row["step"]: row for row in self.r.published if row["repo"] == self.f.repo}
        rows = []
        for step, row in sorted(published.items()) if self.r.step is None else []:
            values = {
                key: entry[key]
                for entry in self.r.log
                if entry["step"] <= step
                for key in ("tokens", "loss", "eval_loss")
                if key in entry and (key != "eval_loss" or entry["step"] == step)
            }
            losses = (number(values.get(key), 4) for key in ("loss", "eval_loss"))
            rows.append([number(step), number(values.get("tokens")), *losses, f"`{row['revision']}`"])
        return thinned(rows)
