"""The one definition of the chat format: Vicuna 1.1, as a chat template that is saved with the tokenizer.

Training, evaluation, generation and the card all go through it. `encode` gives the ids of a conversation and which of
them are learnt: the answers, from the blank after `ASSISTANT:` to the end-of-text that closes each of them.
"""

import dataclasses
import re
from pathlib import Path

from ..errors import Refusal
from ..files import read_json
from .rendering import KNOWN, NotRendered, apply_chat_template, render_jinja_template

# The system line and the order of turns are FastChat's vicuna_v1.1; the end-of-text stands where Vicuna has </s>.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

VICUNA = (
    "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] | trim -}}{%- set turns = messages[1:] -%}"
    f'{{%- else -%}}{{{{- "{SYSTEM}" -}}}}{{%- set turns = messages -%}}{{%- endif -%}}'
    "{{- ' ' -}}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] | trim + ' ASSISTANT:' -}}"
    "{%- else -%}{%- generation -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endgeneration -%}{%-"
    " endif -%}"
    "{%- endfor -%}"
)

BOS = "{{- bos_token -}}"

KNOWN.update((VICUNA, BOS + VICUNA))

# Where in a template the answer is.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKS = "{% generation %} ... {% endgeneration %}"

MARKERS = ("USER:", "ASSISTANT:")  # an answer that holds one has gone on with the conversation by itself


def begins_with_bos(tokenizer) -> bool:
    """Whether texts begin with a begin token of their own: never where begin and end are one token, as in GPT-2."""
    ids = tokenizer("a")["input_ids"]
    return (
        tokenizer.bos_token_id is not None
        and tokenizer.bos_token_id != tokenizer.eos_token_id
        and ids[0] == tokenizer.bos_token_id
    )


def vicuna_template(tokenizer) -> str:
    """The chat template for a tokenizer."""
    return (BOS if begins_with_bos(tokenizer) else "") + VICUNA


def set_chat_template(tokenizer, path: str | None = None) -> None:
    """Give a tokenizer the chat template: Vicuna's, or that of a .jinja file. Raises Refusal for one that does not say
    what is learnt, for one whose answers do not end with the end-of-text, inside what is learnt, and for one whose
    generation prompt is not what stands before an answer.
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
            f"--chat_template_path {path} has no {MARKS} around the answer, so"
            " nobody can tell what is to be learnt. Put them there, the end token included, or leave the argument out"
            " (Vicuna 1.1)."
        )
    if "strftime_now" in template:
        raise Refusal(
            f"--chat_template_path {path} asks for the time (strftime_now), so no two runs would learn the same text:"
            " write the date there."
        )
    tokenizer.chat_template = template
    try:
        for messages in (PROBE, PROBE[:2]):
            encode(tokenizer, messages)
            _check_generation_prompt(tokenizer, messages)
        if _has_place_for_system(tokenizer):
            _check_generation_prompt(tokenizer, SYSTEM_PROBE)
    except Refusal as error:
        raise Refusal(f"--chat_template_path {path}: {error}") from None


def _has_place_for_system(tokenizer) -> bool:
    """Whether the template takes a system turn. One that does not may be used: `encode` refuses rows that have one."""
    try:
        encode(tokenizer, SYSTEM_PROBE)
    except Refusal:
        return False
    return True


def describe_put_aside(own: str | dict[str, str], source: str, folder: Path) -> str:
    """What a person reads where Vicuna 1.1 takes the place of a tokenizer's own template (or templates by name), and how
    to keep that one.

    source: what it is, in words; folder: where the tokenizer's files are.
    """
    template = own.get("default", "") if isinstance(own, dict) else own
    marks = "" if GENERATION.search(template) else f", with {MARKS} around the answer"
    if (file := folder / "chat_template.jinja").is_file():
        how = f"a copy of {file}{marks}: --chat_template_path COPY" if marks else f"--chat_template_path {file}"
    else:
        inside = folder / "tokenizer_config.json"
        there = f" in {inside}" if "chat_template" in (read_json(inside) or {}) else ""
        how = f"the text of `chat_template`{there} as a file of its own{marks}: --chat_template_path FILE"
    return f"Vicuna 1.1; {source} is put aside (to keep it: {how})"


def _check_generation_prompt(tokenizer, messages: list[dict]) -> None:
    """Raise Refusal unless the last answer of `messages` is asked for with what stands before it in training."""
    asked = apply_chat_template(tokenizer, messages[:-1], add_generation_prompt=True)
    rendered, spans = _rendered(tokenizer, messages)
    trained = rendered[: spans[-1][0]]
    if asked != trained:
        at = next(
            (i for i, (a, b) in enumerate(zip(asked, trained, strict=False)) if a != b), min(len(asked), len(trained))
        )
        where = " in a conversation with a system turn" if messages[0]["role"] == "system" else ""
        raise Refusal(
            f"an answer{where} is asked for behind {asked[at:]!r} and learnt behind {trained[at:]!r} (after the same"
            f" {asked[max(0, at - 20) : at]!r}): with add_generation_prompt the template must write what stands between"
            " the question and {% generation %}, no more and no less."
        )


def _rendered(tokenizer, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where its answers begin and end in it."""
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    texts, spans = render_jinja_template(
        [messages], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **names
    )
    return texts[0], spans[0]


def conversation(instruction: str, input: str = "", output: str | None = None) -> list[dict]:
    """Messages of an alpaca row. An empty `input`, or alpaca's `<noinput>`, adds nothing to the instruction."""
    given = "" if input is None or input.strip().lower() in ("", "<noinput>") else f"\n\n{input.strip()}"
    messages = [{"role": "user", "content": instruction.strip() + given}]
    return messages if output is None else [*messages, {"role": "assistant", "content": output.strip()}]


PROBE = [
    *conversation("Name a city.", "", "Paris."),
    *conversation("Another?", "", "Tokyo."),
]  # with which a template is tried

SYSTEM_PROBE = [{"role": "system", "content": "Be brief."}, *PROBE]


@dataclasses.dataclass
class Encoded:
    """Ids of a conversation, and labels: the same ids where they are learnt, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def encode(tokenizer, messages: list[dict], learn_from: int = 0, unlearnt: tuple[int, ...] = ()) -> Encoded:
    """A whole conversation. Answers before message `learn_from`, and those of the messages `unlearnt`, are context and
    not learnt.

    The last label of an answer that is learnt is the tokenizer's end-of-text. Raises Refusal where the template makes
    it otherwise.
    """
    rendered, spans = _rendered(tokenizer, messages)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(answers):
        raise Refusal(
            f"the chat template marks {len(spans)} passages for {len(answers)} answers: put {MARKS}"
            " around each answer, and around nothing else."
        )
    place_of = dict(zip(answers, spans, strict=True))
    for number, message in enumerate(messages):
        begin, end = place_of.get(number, (0, len(rendered)))
        if message["content"].strip() not in rendered[begin:end]:
            raise NotRendered(
                f"the chat template leaves out what a turn of the {message['role']} says, or a part of it. Let it print"
                " the whole `content`."
            )
    answer_spans = [span for number, span in place_of.items() if number >= learn_from and number not in unlearnt]
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


def _no_end(end: str, answer: str, behind: str) -> str:
    """How to mend a template whose answers do not end with the end-of-text `end`."""
    if behind.lstrip().startswith(end):
        how = f"it stands behind {MARKS}: move {{{{ eos_token }}}} in front of {{% endgeneration %}}."
    elif end in answer:
        how = f"{answer.rpartition(end)[2]!r} follows it there: move that behind {{% endgeneration %}}."
    else:
        how = (
            "write {{ eos_token }} in front of {% endgeneration %}, or name a tokenizer whose end-of-text the template"
            " writes (--tokenizer_name)."
        )
    return (
        f"the chat template does not end each answer with the tokenizer's end-of-text {end!r} inside {MARKS}, so no"
        f" answer would learn to end: {how}"
    )


def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Ids after which the model is to answer; they begin the ids of the whole conversation."""
    text = apply_chat_template(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def special_text(tokenizer, messages: list[dict]) -> str | None:
    """A special token whose literal text stands in a message (it would be read as that token), or None."""
    texts = [message["content"] for message in messages]
    return next((token for token in tokenizer.all_special_tokens if any(token in text for text in texts)), None)


def kept_format(answer: str) -> bool:
    """Whether an answer is one: not empty, and without a turn of its own invention."""
    return bool(answer.strip()) and not any(marker in answer for marker in MARKERS)
