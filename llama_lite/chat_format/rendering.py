"""Renders chat templates. A template is a program that comes with a model or a file, so each is rendered in a process
of its own, with limits of time and memory.

A template that loops, or computes `9**(9**9)` (which no alarm interrupts), is killed and refused. This project's own
templates are rendered in this process.
"""

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Refusal
from ..processes import die_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIMEOUT = 20.0  # seconds for one conversation
MEMORY_LIMIT = 2**30  # bytes beyond what the process has when it starts
MAX_REPLY = 2**26  # bytes
TRUSTED_TEMPLATES: set[str] = set()  # templates of this project
MAX_PROCESSES = 4  # of the templates that were used last

REMEDY = (
    "Fix it, give another one with --chat_template_path (run_sft.py), or leave out --apply_chat_template (run_eval.py)."
)


class NotRendered(Refusal):
    """A template raised an error for a conversation; it may render others."""


_renderers: dict[str, "_Renderer"] = {}
_system_roles: dict[str, bool] = {}  # of templates that were tried: whether they write a system message
SYSTEM_TRIAL = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]


def render_jinja_template(conversations: list[list[dict]], chat_template: str, **arguments) -> tuple[list[str], list]:
    """As transformers' function of this name: (texts, [(begin, end)] of the answers in each text). Raises Refusal for a
    template that cannot be rendered.
    """
    from transformers.utils import chat_template_utils

    if chat_template in TRUSTED_TEMPLATES:
        return chat_template_utils.render_jinja_template(conversations, chat_template=chat_template, **arguments)
    renderer = _renderers.pop(chat_template, None) or _Renderer(chat_template)
    try:
        rendered = renderer.render({"conversations": conversations, **arguments})
    except NotRendered:
        _keep(chat_template, renderer)
        raise
    except BaseException:
        renderer.stop()
        raise
    _keep(chat_template, renderer)
    return rendered


def _keep(chat_template: str, renderer: "_Renderer") -> None:
    """Keep the process of a template for its next conversation, and stop those beyond MAX_PROCESSES."""
    _renderers[chat_template] = renderer
    for oldest in list(_renderers)[:-MAX_PROCESSES]:
        _renderers.pop(oldest).stop()


def apply_chat_template(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], **arguments) -> str:
    """As `tokenizer.apply_chat_template(messages, tokenize=False, **how)`, but where the template has no system message
    (Gemma, Mistral) it begins the first message of the user. Raises Refusal for a template that cannot be rendered.
    """
    roles = [message["role"] for message in messages[:2]]
    if roles == ["system", "user"] and not takes_system(tokenizer):
        messages = _begin_with_system(messages)
    return _render(tokenizer, messages, **arguments)


def takes_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer's chat template writes a system message: some raise an error, or leave it out. Raises Refusal
    for a template that cannot be rendered at all.
    """
    template = _template_of(tokenizer)
    if template not in _system_roles:
        try:
            text = _render(tokenizer, SYSTEM_TRIAL, add_generation_prompt=True)
        except NotRendered:
            text = ""
        _system_roles[template] = SYSTEM_TRIAL[0]["content"] in text
    return _system_roles[template]


def _begin_with_system(messages: list[dict]) -> list[dict]:
    """The conversation with its system message at the beginning of the first message of the user."""
    system, first, *others = messages
    return [{**first, "content": f"{system['content'].rstrip()}\n\n{first['content']}"}, *others]


def _template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template of a tokenizer. Raises Refusal where it has none, or several without a default."""
    try:
        return tokenizer.get_chat_template()
    except (ValueError, TypeError, AttributeError) as error:  # several without a default, or not a template
        raise Refusal(
            f"the tokenizer has no chat template to render ({' '.join(str(error).split())[:200]}). {REMEDY}"
        ) from None


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], **arguments) -> str:
    """The text of a conversation by the tokenizer's template."""
    names = {**tokenizer.special_tokens_map, **arguments}
    return render_jinja_template([messages], _template_of(tokenizer), **names)[0][0]


class _Renderer:
    """The process of one template."""

    def __init__(self, template: str):
        from transformers.utils import chat_template_utils  # noqa: F401 (here, so that the process need not)

        forked = multiprocessing.get_context("fork")
        self.connection, child_end = forked.Pipe()
        self.process = forked.Process(target=_serve, args=(self.connection, child_end, template), daemon=True)
        self.process.start()
        child_end.close()

    def render(self, request: dict) -> tuple[list[str], list]:
        """(texts, spans). After a Refusal other than NotRendered the process cannot be used any more."""
        try:
            self.connection.send_bytes(json.dumps(request, default=str).encode())
            if not self.connection.poll(TIMEOUT):
                raise Refusal(f"the chat template takes longer than {TIMEOUT:g} s for one conversation. {REMEDY}")
            found = json.loads(self.connection.recv_bytes(MAX_REPLY))
        except (EOFError, OSError):
            raise Refusal(
                f"the chat template writes more than {MAX_REPLY / 2**20:.0f} MiB for one conversation, or its process"
                f" was killed. {REMEDY}"
            ) from None
        if "error" in found:
            raise NotRendered(f"the chat template cannot be rendered ({found['error']}). {REMEDY}")
        return found["rendered"], found["spans"]

    def stop(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(parent_end, connection, template: str) -> None:
    """Render each request of the connection until it is closed."""
    from transformers.utils.chat_template_utils import render_jinja_template as render

    parent_end.close()
    _close_all_but(connection.fileno())
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _limit_memory()
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            rendered, spans = render(chat_template=template, **request)
            answer = json.dumps({"rendered": rendered, "spans": spans}).encode()
        except MemoryError:
            answer = json.dumps({"error": f"it takes more than {MEMORY_LIMIT / 2**30:g} GiB"}).encode()
        except Exception as error:  # a template raises whatever its author wrote
            answer = json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}).encode()
        try:
            connection.send_bytes(answer)
        except OSError:
            return


def _close_all_but(descriptor: int) -> None:
    """Close what this fork inherited but its standard streams: a pipe or a socket that the parent closes would stay
    open here, and its other end would wait for ever.
    """
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))


def _limit_memory() -> None:
    """Allow MEMORY_LIMIT more than the process has now. Where there is no such limit (macOS), only TIMEOUT applies."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_LIMIT,) * 2)
