"""Before and after: what a tuning changed on held-out rows."""

from ..facts import Facts
from ..formatting import number, spread

NO_END = "none: no held-out answer ends (all were cut)"


class Tuning:
    """Values of the section Before and after."""

    def __init__(self, facts: Facts):
        self.f, self.r = facts, facts.r

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
