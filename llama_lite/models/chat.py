"""A conversation with a model: what fits its context, and each answer as a stream of text.

A model with a chat template answers in that format; one without continues a text.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..chat_format import rendering, template
from ..errors import Refusal
from ..formatting import shortened
from ..kernels.probe import context_of, plain_generation, without_router_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer is chosen. temperature 0: greedy. top_k 0, top_p 1, repetition_penalty 1: not limited. seed: None
    for other answers each time; answer n is drawn with seed + n.
    """

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 200
    seed: int | None = None

    def arguments(self) -> dict:
        """The arguments of transformers' `generate`."""
        common = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return {"do_sample": False, **common}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, **common}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote. end: `stopped` (by its end-of-text, or before a further turn), `max_new_tokens`, `context`
    (which is full) or `interrupted` (by Ctrl-C).
    """

    text: str
    tokens: int
    end: str


class Conversation:
    """A model, its tokenizer, and what was said so far.

    plain: continue texts, also where the tokenizer has a chat template. system: the system message, None for the chat
    format's own; `system_remark` says where the format has none.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        sampling: Sampling,
        plain: bool = False,
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.sampling, self.answers = model.eval(), tokenizer, sampling, 0
        self.plain = plain or not tokenizer.chat_template
        self.opening = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[dict] = []
        self.context = context_of(model.config) or math.inf

    def system_remark(self) -> str | None:
        """What becomes of a system message that the chat format has no place for; None for no message, and a format
        that has one. Raises Refusal for a chat template that cannot be rendered.
        """
        if not self.opening:
            return None
        if self.plain:
            return "continues each message as a text, so --system is not used"
        if rendering.takes_system(self.tokenizer):
            return None
        return "has no system message in its chat format: --system begins the first message"

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def ask(self, text: str) -> list[str]:
        """Add a message; returns the earlier messages of the user that no longer fit the context, which are forgotten
        with their answers. Raises Refusal for a message that does not fit alone, or spells a special token.

        Half of the context, or --max_new_tokens if that is less, is kept for the answer.
        """
        message = {"role": "user", "content": text}
        if special := template.special_text(self.tokenizer, [message]):
            raise Refusal(f"the message contains {special}, a special token of this model: leave it out.")
        answered = self.turns[: len(self.turns) // 2 * 2]  # an error may have left the last message without an answer
        earlier, forgotten = [] if self.plain else answered, []
        room = min(self.sampling.max_new_tokens, self.context // 2)
        while (tokens := len(self._encode([*earlier, message]))) + room > self.context and earlier:
            forgotten.append(earlier[0]["content"])
            earlier = earlier[2:]
        if tokens >= self.context:
            raise Refusal(
                f"the message {textwrap.shorten(text, 40, placeholder='...')!r} takes {tokens:,} tokens, and the"
                f" context of this model holds {self.context:,} with the answer: shorten it."
            )
        self.turns = [*earlier, message]
        return forgotten

    def _encode(self, turns: list[dict]) -> list[int]:
        """Ids of the prompt for the next answer."""
        if self.plain:
            return self.tokenizer(turns[-1]["content"], verbose=False)["input_ids"]
        return template.encode_prompt(self.tokenizer, [*self.opening, *turns])

    def answer(self, write: Callable[[str], None]) -> Answer:
        """Answer the last message, and remember the answer. write: gets each part of the text as soon as its words are
        complete. Raises Refusal where the model cannot generate.
        """
        ids = self._encode(self.turns)
        markers = template.MARKERS if not self.plain and template.is_vicuna(self.tokenizer) else ()
        ends = self.model.generation_config.eos_token_id
        ends = frozenset(ends if isinstance(ends, list) else [ends])
        writer = _Writer(self.tokenizer, write, markers, not self.plain, ends)
        room = self.context - len(ids)
        limit = min(self.sampling.max_new_tokens, room)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed + self.answers)
        self.answers += 1
        end = self._generate(ids, limit, writer)
        if not end:
            end = "stopped" if writer.stopped else "context" if limit == room else "max_new_tokens"
        self.turns = [*self.turns, {"role": "assistant", "content": writer.text}]
        return Answer(writer.text, writer.tokens, end)

    def _generate(self, ids: list[int], limit: int, writer: "_Writer") -> str | None:
        """Generate at most `limit` tokens into `writer`; returns `interrupted` after Ctrl-C, else None."""
        input_ids = torch.tensor([ids], device=self.model.device)
        arguments = {**self.sampling.arguments(), "max_new_tokens": limit}
        try:
            with plain_generation(self.model), without_router_loss(self.model):
                self.model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    streamer=writer,
                    stopping_criteria=StoppingCriteriaList([writer.criterion]),
                    trust_remote_code=False,
                    **arguments,
                )
        except KeyboardInterrupt:
            writer.end()
            return "interrupted"
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            kind = self.model.config.model_type
            raise Refusal(f"this model ({kind}) cannot generate text: {shortened(error)}. Give another one.") from None
        return None


class _Writer(TextStreamer):
    """Passes text on as it forms, until a marker of a further turn.

    strip: leave out blanks before the first word. ends: ids of which each ends an answer.
    """

    def __init__(
        self, tokenizer, write: Callable[[str], None], markers: tuple[str, ...], strip: bool, ends: frozenset[int]
    ):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.write, self.markers, self.strip, self.ends = write, markers, strip, ends
        self.text, self.tokens, self.stopped, self.criterion = "", 0, False, _Stopped(self)

    def put(self, value):
        """As TextStreamer's; counts the tokens of the answer."""
        if not self.next_tokens_are_prompt:
            ids = value.reshape(-1).tolist()
            self.stopped = self.stopped or not self.ends.isdisjoint(ids)
            self.tokens += len(ids)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        """Pass on a text, up to a marker."""
        if self.criterion.reached:
            return
        if self.strip and not self.text:
            text = text.lstrip()
        whole = self.text + text
        if found := [position for marker in self.markers if (position := whole.find(marker)) >= 0]:
            self.stopped = self.criterion.reached = True
            text = whole[len(self.text) : min(found)].rstrip()
        if text:
            self.text += text
            self.write(text)


class _Stopped(StoppingCriteria):
    """Ends generation where a writer met a marker."""

    def __init__(self, writer: _Writer):
        self.reached = False

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.reached, dtype=torch.bool, device=input_ids.device)
