"""Intended use and license: what a run was made for, as its records show, and what a person said of its license."""

from ..facts import CONTEXT, Facts
from ..formatting import first_of, number


class Intended:
    """Values of the sections Intended use and License."""

    def __init__(self, facts: Facts):
        self.f, self.r = facts, facts.r

    def uses(self) -> list[str]:
        """What the model is for, in sentences."""
        if self.r.kind not in ("pretrain", "adapter", "tuned", "merged"):
            return []
        if self.r.kind == "pretrain":
            sentences = ["It continues text like the text that it was trained on."]
            if self.f.initial_weights is None:
                sentences.append("It was not tuned to follow instructions or to hold a conversation.")
        else:
            sentences = [
                "It answers prompts like those that it was tuned on, in the chat format that its tokenizer applies."
            ]
        if context := first_of(self.f.config, CONTEXT):
            sentences.append(f"It takes at most {number(context)} tokens, prompt and continuation together.")
        if languages := self.f.languages:
            several = len(languages) > 1
            sentences.append(f"Language{'s' if several else ''} of its text: {', '.join(languages)}.")
        return sentences

    def licenses(self) -> list[list]:
        """What was said of the licenses of the model and of the text."""
        declared = self.f.declared
        names = [("this model" if self.r.kind != "evaluation" else "these scores", "license")]
        names = [] if self.r.kind == "tokens" else names
        return [
            [what, f"`{declared[key]}`"]
            for what, key in [*names, ("the text that it was made of", "data_license")]
            if declared[key]
        ]
