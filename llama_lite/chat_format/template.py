"""The one definition of the chat format: Vicuna 1.1, as a chat template that is saved with the tokenizer.

Training, evaluation, generation and the card all use it. `encode` gives the ids of a conversation and their labels: the
loss covers the answers, from the blank after `ASSISTANT:` to the end-of-text that closes each of them.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Refusal
from ..files import read_json
from .rendering import TRUSTED_TEMPLATES, NotRendered, apply_chat_template, render_jinja_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER_MARKER, ASSISTANT_MARKER = "USER:", "ASSISTANT:"
MARKERS = (USER_MARKER, ASSISTANT_MARKER)  # an answer that contains one continues the conversation by itself

# The system prompt and the order of turns are FastChat's vicuna_v1.1; the end-of-text replaces Vicuna's </s>.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

VICUNA = (
    "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] | trim -}}{%- set turns = messages[1:] -%}"
    f'{{%- else -%}}{{{{- "{SYSTEM}" -}}}}{{%- set turns = messages -%}}{{%- endif -%}}'
    "{{- ' ' -}}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    f"{{{{- '{USER_MARKER} ' + message['content'] | trim + ' {ASSISTANT_MARKER}' -}}}}"
    "{%- else -%}{%- generation -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endgeneration -%}{%-"
    " endif -%}"
    "{%- endfor -%}"
)

BOS = "{{- bos_token -}}"

TRUSTED_TEMPLATES.update((VICUNA, BOS + VICUNA))

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # begins an answer in a template
GENERATION_BLOCK = "{% generation %} ... {% endgeneration %}"


def begins_with_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts a begin-of-text token before a text; false where it equals the end-of-text, as in
    GPT-2.
    """
    ids = tokenizer("a")["input_ids"]
    return (
        tokenizer.bos_token_id is not None
        and tokenizer.bos_token_id != tokenizer.eos_token_id
        and ids[0] == tokenizer.bos_token_id
    )


def vicuna_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template for a tokenizer."""
    return (BOS if begins_with_bos(tokenizer) else "") + VICUNA


def is_vicuna(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer's chat template is this project's, Vicuna 1.1."""
    return tokenizer.chat_template in (VICUNA, BOS + VICUNA)


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", path: str | None = None) -> None:
    """Set the chat template of a tokenizer: Vicuna's, or that of a .jinja file. Raises Refusal for a template that does
    not mark the answers ({% generation %}), whose marked answers do not end with the end-of-text, or whose generation
    prompt differs from the text before an answer.
    """
    if path is None:
        tokenizer.chat_template = vicuna_template(tokenizer)
        return
    try:
        with open(path, encoding="utf-8") as file:
            template = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"--chat_template_path {path} is not a readable .jinja file: {error}.") from None
    if not GENERATION.search(template):
        raise Refusal(
            f"--chat_template_path {path} has no {GENERATION_BLOCK} around the answer, so the script cannot tell what"
            " to train on. Add it, with the end token inside, or leave the argument out (Vicuna 1.1)."
        )
    if "strftime_now" in template:
        raise Refusal(
            f"--chat_template_path {path} uses the current time (strftime_now), so two runs would train on different"
            " text: write a fixed date instead."
        )
    tokenizer.chat_template = template
    try:
        for messages in (PROBE, PROBE[:2]):
            encode(tokenizer, messages)
            _check_generation_prompt(tokenizer, messages)
        if _supports_system(tokenizer):
            _check_generation_prompt(tokenizer, SYSTEM_PROBE)
    except Refusal as error:
        raise Refusal(f"--chat_template_path {path}: {error}") from None


def _supports_system(tokenizer) -> bool:
    """Whether the template renders a system message. One that does not is allowed: `encode` refuses rows with one."""
    try:
        encode(tokenizer, SYSTEM_PROBE)
    except Refusal:
        return False
    return True


def describe_put_aside(own: str | dict[str, str], source: str, folder: Path) -> str:
    """The line for a tokenizer whose own template (or templates by name) is replaced by Vicuna 1.1, and how to keep it.

    source: what the template belongs to, in words; folder: where the tokenizer's files are.
    """
    template = own.get("default", "") if isinstance(own, dict) else own
    markers = "" if GENERATION.search(template) else f", with {GENERATION_BLOCK} around the answer"
    if (file := folder / "chat_template.jinja").is_file():
        remedy = f"a copy of {file}{markers}: --chat_template_path COPY" if markers else f"--chat_template_path {file}"
    else:
        config = folder / "tokenizer_config.json"
        location = f" in {config}" if "chat_template" in (read_json(config) or {}) else ""
        remedy = f"the text of `chat_template`{location} as a file of its own{markers}: --chat_template_path FILE"
    return f"Vicuna 1.1; {source} is not used (to keep it: {remedy})"


def _check_generation_prompt(tokenizer, messages: list[dict]) -> None:
    """Raise Refusal unless the generation prompt equals the text before the last answer of `messages` in training."""
    prompt = apply_chat_template(tokenizer, messages[:-1], add_generation_prompt=True)
    rendered, spans = _render(tokenizer, messages)
    trained = rendered[: spans[-1][0]]
    if prompt != trained:
        index = next(
            (i for i, (a, b) in enumerate(zip(prompt, trained, strict=False)) if a != b),
            min(len(prompt), len(trained)),
        )
        context = " in a conversation with a system turn" if messages[0]["role"] == "system" else ""
        raise Refusal(
            f"the generation prompt{context} ends with {prompt[index:]!r}, but in training the answer follows"
            f" {trained[index:]!r} (both after {prompt[max(0, index - 20) : index]!r}): with add_generation_prompt the"
            " template must write exactly the text between the question and {% generation %}."
        )


def _render(tokenizer, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """(the text of a conversation, [(begin, end)] of its answers)."""
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    texts, spans = render_jinja_template(
        [messages], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **names
    )
    return texts[0], spans[0]


def conversation(instruction: str, input: str = "", output: str | None = None) -> list[dict]:
    """Messages of an alpaca row. An empty `input`, or alpaca's `<noinput>`, adds nothing. output: None for no
    answer.
    """
    extra = "" if input is None or input.strip().lower() in ("", "<noinput>") else f"\n\n{input.strip()}"
    messages = [{"role": "user", "content": instruction.strip() + extra}]
    return messages if output is None else [*messages, {"role": "assistant", "content": output.strip()}]


# a short one of the rows about installed packages
SHORT_ROW = conversation("What does the function `json.dumps` do?", "", "Serialize an object to a JSON string.")

# the conversation that templates are tested with
PROBE = [*conversation("Name a city.", "", "Paris."), *conversation("Another?", "", "Tokyo.")]
SYSTEM_PROBE = [{"role": "system", "content": "Be brief."}, *PROBE]


@dataclasses.dataclass
class Encoded:
    """Ids of a conversation, and labels: the same ids in answers that are trained on, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def encode(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict], learn_from: int = 0, untrained: tuple[int, ...] = ()
) -> Encoded:
    """Ids and labels of a whole conversation. Answers before message `learn_from`, and those with an index in
    `untrained`, have no labels.

    The last label of each other answer is the tokenizer's end-of-text. Raises Refusal where the template does not end
    answers so, and NotRendered where it leaves out a message.
    """
    rendered, spans = _render(tokenizer, messages)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(answers):
        raise Refusal(
            f"the chat template marks {len(spans)} passages for {len(answers)} answers: put {GENERATION_BLOCK}"
            " around each answer, and around nothing else."
        )
    span_of = dict(zip(answers, spans, strict=True))
    for number, message in enumerate(messages):
        begin, end = span_of.get(number, (0, len(rendered)))
        if message["content"].strip() not in rendered[begin:end]:
            raise NotRendered(
                f"the chat template leaves out a turn of the {message['role']}, or a part of it. Make it print"
                " the whole `content`."
            )
    answer_spans = [span for number, span in span_of.items() if number >= learn_from and number not in untrained]
    ids = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels, position, last = [], 0, {}
    for token, (begin, end) in zip(ids["input_ids"], ids["offset_mapping"], strict=True):
        while position < len(answer_spans) and begin >= answer_spans[position][1]:
            position += 1
        labels.append(token if position < len(answer_spans) and end > answer_spans[position][0] else -100)
        if labels[-1] != -100:
            last[position] = token
    for position, (begin, end) in enumerate(answer_spans):
        if last.get(position) != tokenizer.eos_token_id:
            raise Refusal(_no_end(tokenizer.eos_token, rendered[begin:end], rendered[end:]))
    return Encoded(ids["input_ids"], labels)


def least_context(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Tokens of a short question and its answer in Vicuna's format: a model with a shorter context cannot be tuned."""
    text = render_jinja_template([SHORT_ROW], vicuna_template(tokenizer), **tokenizer.special_tokens_map)[0][0]
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _no_end(eos_token: str, answer: str, following: str) -> str:
    """The message for a template whose answers do not end with the end-of-text, with the fix."""
    if following.lstrip().startswith(eos_token):
        remedy = f"it comes after {GENERATION_BLOCK}: move {{{{ eos_token }}}} before {{% endgeneration %}}."
    elif eos_token in answer:
        remedy = f"{answer.rpartition(eos_token)[2]!r} follows it there: move that after {{% endgeneration %}}."
    else:
        remedy = (
            "write {{ eos_token }} before {% endgeneration %}, or name a tokenizer whose end-of-text the template"
            " writes (--tokenizer_name)."
        )
    return (
        f"the chat template does not end each answer with the tokenizer's end-of-text {eos_token!r} inside"
        f" {GENERATION_BLOCK}, so the model would not learn to end an answer: {remedy}"
    )


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: list[dict]) -> list[int]:
    """Ids of the messages and the generation prompt; the ids of the whole conversation begin with them."""
    text = apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def special_text(tokenizer: "PreTrainedTokenizerBase", messages: list[dict]) -> str | None:
    """A special token whose text occurs in a message (it would be encoded as that token), or None."""
    texts = [message["content"] for message in messages]
    declared = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    names = dict.fromkeys([*tokenizer.all_special_tokens, *declared])  # the first list lacks those of tokenizer.json
    return next((token for token in names if any(token in text for text in texts)), None)


def kept_format(answer: str) -> bool:
    """Whether an answer is not empty and contains no marker of a further turn."""
    return bool(answer.strip()) and not any(marker in answer for marker in MARKERS)
