"""Chat templates are programs that come with a model or a file: each is rendered in a process of its own, with limits
of time and memory.

A template that loops, or computes `9**(9**9)`, which no alarm stops, is killed and refused. Our own format is rendered
here.
"""

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

from ..errors import Refusal
from ..processes import die_with_parent

SECONDS = 20.0  # for one conversation

MEMORY = 2**30  # bytes beyond those of the process when it begins

LONGEST = 2**26  # bytes of an answer

KNOWN: set[str] = set()  # templates of this project

KEPT = 4  # processes of the templates used last

WAY_OUT = (
    "Mend it, give another one with --chat_template_path (run_sft.py), or leave out --apply_chat_template"
    " (run_eval.py)."
)


class NotRendered(Refusal):
    """A template raised an error for a conversation; it may render others."""


_renderers: dict[str, "_Renderer"] = {}


def render_jinja_template(conversations: list[list[dict]], chat_template: str, **how) -> tuple[list[str], list]:
    """As transformers' function of this name: texts, and where in each the answers stand. Raises Refusal for a template
    that cannot be rendered.
    """
    from transformers.utils import chat_template_utils

    if chat_template in KNOWN:
        return chat_template_utils.render_jinja_template(conversations, chat_template=chat_template, **how)
    renderer = _renderers.pop(chat_template, None) or _Renderer(chat_template)
    try:
        rendered, spans = renderer.answer({"conversations": conversations, **how})
    except BaseException:
        renderer.end()
        raise
    _renderers[chat_template] = renderer
    for oldest in list(_renderers)[:-KEPT]:
        _renderers.pop(oldest).end()
    return rendered, spans


def apply_chat_template(tokenizer, messages: list[dict], **how) -> str:
    """As `tokenizer.apply_chat_template(messages, tokenize=False, **how)`. Raises Refusal for a template that cannot be
    rendered.
    """
    try:
        template = tokenizer.get_chat_template()
    except (
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # several without a default, or something that is no template
        raise Refusal(
            f"the tokenizer has no chat template to render ({' '.join(str(error).split())[:200]}). {WAY_OUT}"
        ) from None
    return render_jinja_template([messages], template, **{**tokenizer.special_tokens_map, **how})[0][0]


class _Renderer:
    """The process of one template."""

    def __init__(self, template: str):
        from transformers.utils import chat_template_utils  # noqa: F401 (here, so that the process need not)

        forked = multiprocessing.get_context("fork")
        self.connection, other = forked.Pipe()
        self.process = forked.Process(target=_serve, args=(self.connection, other, template), daemon=True)
        self.process.start()
        other.close()

    def answer(self, request: dict) -> tuple[list[str], list]:
        """(texts, spans). Raises Refusal, and is of no use any more."""
        try:
            self.connection.send_bytes(json.dumps(request, default=str).encode())
            if not self.connection.poll(SECONDS):
                raise Refusal(f"the chat template takes longer than {SECONDS:g} s for one conversation. {WAY_OUT}")
            found = json.loads(self.connection.recv_bytes(LONGEST))
        except (EOFError, OSError):
            raise Refusal(
                f"the chat template makes a text of more than {LONGEST / 2**20:.0f} MiB of one conversation, or its"
                f" process was killed. {WAY_OUT}"
            ) from None
        if "error" in found:
            raise NotRendered(f"the chat template cannot be rendered ({found['error']}). {WAY_OUT}")
        return found["rendered"], found["spans"]

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(ours, connection, template: str) -> None:
    """Render what is asked for until nobody asks any more."""
    from transformers.utils.chat_template_utils import render_jinja_template as render

    ours.close()
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
            answer = json.dumps({"error": f"it takes more than {MEMORY / 2**30:g} GiB"}).encode()
        except Exception as error:  # a template raises whatever its author wrote
            answer = json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}).encode()
        try:
            connection.send_bytes(answer)
        except OSError:
            return


def _limit_memory() -> None:
    """MEMORY more than there is now; where no such limit exists (macOS), time alone ends a template."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY,) * 2)
