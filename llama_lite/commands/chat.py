"""Talk to a model in the terminal. Its answers stream, in the chat format it was tuned with; a base continues texts.

    python -m llama_lite chat runs/demo-sft                            # a conversation
    python -m llama_lite chat runs/demo-sft --prompt "What is numpy?"  # one answer
    python -m llama_lite chat --compare runs/demo runs/demo-sft        # two models side by side
    echo "What is numpy?" | python -m llama_lite chat runs/demo-sft    # each line of a pipe is a message

MODEL is what run_eval.py takes: a run's folder, FOLDER@step-250, owner/name, owner/name@revision, BASE+ADAPTER. Answers
go to stdout, everything else to stderr. In a conversation, Ctrl-C ends an answer, /reset forgets what was said, and
Ctrl-D or /exit ends the program.
"""

import argparse
import contextlib
import itertools
import math
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import Problems, Refusal

if TYPE_CHECKING:
    from ..models.chat import Answer, Conversation

NARROWEST = 30  # characters of a column; in a narrower terminal one answer stands below the other
PROMPT = "you> "
ENDS = {
    "max_new_tokens": "cut after {tokens:,} tokens: --max_new_tokens",
    "context": "cut after {tokens:,} tokens: the context of the model is full",
    "interrupted": "ended by Ctrl-C",
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of the command. Raises Refusal for values out of range."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_lite chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the model to talk to")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, which answer side by side")
    parser.add_argument("--prompt", help="answer this message and end")
    parser.add_argument("--plain", action="store_true", help="continue texts, also where the model has a chat format")
    parser.add_argument(
        "--system",
        help="the system message, in place of the chat format's own; it begins the first message where there is none",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.7, help="0 for greedy answers (default: 0.7)")
    sampling.add_argument(
        "--top_k", type=int, default=50, help="likeliest tokens to choose from; 0 for all (default: 50)"
    )
    sampling.add_argument(
        "--top_p", type=float, default=1.0, help="share of probability of the tokens to choose from (default: 1)"
    )
    sampling.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: against repetitions (default: 1)"
    )
    sampling.add_argument("--max_new_tokens", type=int, default=200, help="tokens of an answer (default: 200)")
    sampling.add_argument("--seed", type=int, help="the same answers each time")
    loading = parser.add_argument_group("loading")
    loading.add_argument("--tokenizer_name", help="a tokenizer other than the model's: gpt2, a folder, or a Hub id")
    loading.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to compute in (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    arguments = parser.parse_args(argv)
    problems = Problems()
    problems.add_if(
        arguments.model and arguments.compare,
        f"MODEL {arguments.model} and --compare {' '.join(arguments.compare or ())}: give one of the two.",
    )
    problems.add_if(
        not arguments.model and not arguments.compare,
        "no model: give one, e.g. runs/demo-sft, or two with --compare A B.",
    )
    for name, right, rule in (
        ("temperature", 0 <= arguments.temperature < float("inf"), "0 (greedy) or more"),
        ("top_k", arguments.top_k >= 0, "0 (all tokens) or more"),
        ("top_p", 0 < arguments.top_p <= 1, "above 0, and 1 at most"),
        ("repetition_penalty", 0 < arguments.repetition_penalty < float("inf"), "above 0 (1 for none)"),
        ("max_new_tokens", arguments.max_new_tokens >= 1, "1 or more"),
        ("prompt", arguments.prompt is None or arguments.prompt.strip(), "a text"),
    ):
        problems.add_if(not right, f"--{name} {getattr(arguments, name)}: it must be {rule}.")
    problems.end()
    return arguments


def main(argv: list[str]) -> None:
    """Answer the prompt, or the messages of the terminal or pipe."""
    arguments = parse(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands with it ignored
    try:
        conversations = load(arguments)
        if arguments.prompt is not None:
            if any(answer.end == "interrupted" for answer in respond(conversations, arguments.prompt)):
                raise SystemExit(130)
            return
        if sys.stdin.isatty():
            note(greeting(conversations))
        for text in messages():
            try:
                respond(conversations, text)
            except Refusal as refusal:  # of this message
                note(str(refusal))
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise SystemExit(130) from None
    except BrokenPipeError:  # its reader has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load(arguments: argparse.Namespace) -> "dict[str, Conversation]":
    """{name of a model: a conversation with it}. Raises Refusal."""
    from transformers.utils import logging

    from ..evaluation.resolve import resolve_models
    from ..models.chat import Conversation, Sampling

    logging.disable_progress_bar()
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    argument = "--compare" if arguments.compare else "MODEL"
    found = {}
    for model in resolve_models(arguments.compare or [arguments.model], argument, one_each=True):
        tokenizer = model.tokenizer(arguments.tokenizer_name)
        loaded = load_model(model, tokenizer, arguments.dtype)
        found[model.name] = Conversation(loaded, tokenizer, sampling, arguments.plain, arguments.system)
        if remark := found[model.name].system_remark():
            note(f"{model.name} {remark}")
    return found


def load_model(model, tokenizer, dtype: str | None):
    """The model of a reference, on the GPU where there is one, in `dtype` (None: by device). Raises Refusal."""
    import torch

    from ..models import loading

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    merged_in = "float32" if model.adapter else dtype  # a sum of base and adapter in bfloat16 would be rounded twice
    loaded = loading.load_merged(model.base, model.adapter, tokenizer, merged_in)
    return loaded.to(device, getattr(torch, dtype))


# ---- the terminal ----


def note(text: str) -> None:
    """A line for the person at the terminal, which is no part of an answer."""
    sys.stderr.write(f"({text})\n")
    sys.stderr.flush()


def write(text: str) -> None:
    """A part of an answer."""
    sys.stdout.write(text)
    sys.stdout.flush()


def greeting(conversations: "dict[str, Conversation]") -> str:
    """The first line of a conversation: the models, how they answer, and how to end."""
    parts = []
    for name, conversation in conversations.items():
        count = sum(parameter.numel() for parameter in conversation.model.parameters())
        way = "continues each message as a text" if conversation.plain else "answers in its chat format"
        context = (
            f"a context of {conversation.context:,} tokens"
            if conversation.context < math.inf
            else "a context without limit"
        )
        parts.append(f"{name}, {count:,} parameters, {context}, {way}")
    return f"{'; '.join(parts)}. Ctrl-C ends an answer, /reset forgets what was said, Ctrl-D or /exit ends"


def messages() -> Iterator[str]:
    """Each message that is typed, or comes out of a pipe, until its end or /exit; /reset and empty ones too."""
    terminal = sys.stdin.isatty()
    if terminal and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for `input`)
    while True:
        try:
            text = read_line() if terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            if terminal:
                sys.stderr.write("\n")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            sys.stderr.write("\n")
            note("Ctrl-D or /exit ends")
            continue
        if text.strip() == "/exit":
            return
        if text.strip():
            yield text.strip()


def read_line() -> str:
    """A line of the terminal. The prompt goes to stderr where answers go into a file."""
    if sys.stdout.isatty():
        return input(PROMPT)
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


def respond(conversations: "dict[str, Conversation]", text: str) -> "list[Answer]":
    """Write the answers to a message, and return them: of one model as a stream, of two side by side."""
    if text == "/reset":
        for conversation in conversations.values():
            conversation.reset()
        note("what was said is forgotten")
        return []
    for name, conversation in conversations.items():
        if forgotten := conversation.ask(text):
            first = textwrap.shorten(forgotten[0], 40, placeholder="...")
            which = f"{name}: " if len(conversations) > 1 else ""
            oldest = "message" if len(forgotten) == 1 else f"{len(forgotten)} messages"
            note(
                f"{which}the context of {conversation.context:,} tokens is full: the oldest {oldest}, from {first!r}"
                " on, and what was answered are left out"
            )
    if len(conversations) == 1:
        (conversation,) = conversations.values()
        answer = conversation.answer(write)
        write("\n")
        if remark := remark_on(answer):
            note(remark)
        return [answer]
    answers = {name: conversation.answer(lambda part: None) for name, conversation in conversations.items()}
    write(columns_of(answers, shutil.get_terminal_size().columns))
    return list(answers.values())


def remark_on(answer: "Answer") -> str | None:
    """What a reader cannot see in an answer: why it is cut, or that it is empty."""
    if answer.end in ENDS:
        return ENDS[answer.end].format(tokens=answer.tokens)
    return None if answer.text.strip() else "an empty answer: the model ended at once"


def columns_of(answers: "dict[str, Answer]", width: int) -> str:
    """Answers by the names of their models, in columns of a terminal of `width` characters; one below the other where
    it is narrow.
    """
    column = (width - 3 * (len(answers) - 1)) // len(answers)
    narrow = column < NARROWEST
    columns = []
    for name, answer in answers.items():
        lines = [name, "-" * min(len(name), width if narrow else column)]
        for line in answer.text.splitlines():
            lines += textwrap.wrap(line, width if narrow else column, break_on_hyphens=False) or [""]
        if remark := remark_on(answer):
            lines.append(f"({remark})")
        columns.append(lines)
    if narrow:
        return "\n\n".join("\n".join(lines) for lines in columns) + "\n"
    wrapped = [
        [part for line in lines for part in textwrap.wrap(line, column, break_on_hyphens=False) or [""]]
        for lines in columns
    ]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return "".join(" | ".join(cell.ljust(column) for cell in row).rstrip() + "\n" for row in rows)
