"""The small commands, beside the four scripts.

    python -m llama_lite trace runs/mine --step 1234    # the documents that a training step read
    python -m llama_lite chat runs/demo-sft             # talk to a model
    python -m llama_lite export MODEL --to gguf         # a file for llama.cpp, LM Studio and Ollama
    python -m llama_lite report runs/demo               # the page of curves, samples and items
    python -m llama_lite text_kinds data/kinds --tokenizer data/web/tokenizer   # four validation sets

`python -m llama_lite COMMAND --help` lists the arguments of a command.
"""

import difflib
import importlib
import sys

from .errors import Refusal
from .exit import exit_with_status

COMMANDS = ("trace", "chat", "export", "report", "text_kinds")  # modules of llama_lite.commands with a `main(argv)`


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
    elif name in COMMANDS:
        importlib.import_module(f".commands.{name}", __package__).main(rest)
    else:
        closest = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {closest[0]}?" if closest else "."
        raise Refusal(f"{name}: no such command{hint} The commands are {', '.join(COMMANDS)}.")


def run() -> None:
    """The entry point `llama-lite` of an installed package."""
    exit_with_status(main)


if __name__ == "__main__":
    run()
