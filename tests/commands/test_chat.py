"""`python -m llama_lite chat`: the terminal, pipes, two models side by side."""

import fcntl
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading

import pytest
import torch
from helpers import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama_lite.__main__ import main
from llama_lite.commands import chat
from llama_lite.data.tokenizer import read_tokenizer
from llama_lite.errors import Refusal
from llama_lite.files import write_json
from llama_lite.models.chat import Answer


def test_one_answer_goes_to_stdout_alone(base, capsys):
    main(["chat", str(base), "--prompt", "The end", "--temperature", "0", "--max_new_tokens", "9"])
    out, err = capsys.readouterr()
    tokenizer, model = read_tokenizer(base), AutoModelForCausalLM.from_pretrained(base)
    ids = tokenizer("The end", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert "cut after 9 tokens: --max_new_tokens" in err


def test_an_adapter_answers_in_the_format_it_was_tuned_with(base, whole_sft, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say red.\n\n/reset\nSay blue.\n/exit\nSay no.\n"))
    greedy = ["--temperature", "0", "--max_new_tokens", "5"]
    main(["chat", f"{base}+{whole_sft}", *greedy])
    out, err = capsys.readouterr()
    assert "what was said is forgotten" in err and "you>" not in out + err
    main(["chat", f"{base}+{whole_sft}", *greedy, "--prompt", "Say red."])
    main(["chat", f"{base}+{whole_sft}", *greedy, "--prompt", "Say blue."])
    assert capsys.readouterr().out == out  # after /reset as if it were the first; nothing after /exit


def test_a_system_message_that_a_base_does_not_use_is_named(base, capsys):
    main(["chat", str(base), "--prompt", "The end", "--max_new_tokens", "2", "--system", "Be brief."])
    assert f"({base} continues each message as a text, so --system is not used)" in capsys.readouterr().err


def test_two_models_stand_side_by_side(base, whole_sft, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    tuned = f"{base}+{whole_sft}"
    main(["chat", "--compare", str(base), tuned, "--prompt", "Say red.", "--max_new_tokens", "6", "--seed", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert {row.index(" | ") for row in rows} == {38} and max(map(len, rows)) <= 80
    assert "".join(row[:38].strip() for row in rows).startswith(str(base))


def test_a_narrow_terminal_shows_one_below_the_other():
    answers = {"a": Answer("one two " * 5, 9, "stopped"), "b": Answer("three\nfour", 2, "interrupted")}
    wide, narrow = chat.columns_of(answers, 80).splitlines(), chat.columns_of(answers, 50)
    assert wide[2] == f"{'one two one two one two one two one':38} | three"
    assert wide[4] == f"{'':38} | (ended by Ctrl-C)"
    assert narrow.startswith("a\n-\none two") and narrow.endswith("\n\nb\n-\nthree\nfour\n(ended by Ctrl-C)\n")


@pytest.mark.parametrize(
    "argv, why",
    [
        ([], "no model: give one, e.g. runs/demo-sft"),
        (["a", "--compare", "b", "c"], "MODEL a and --compare b c: give one of the two"),
        (["a", "--temperature", "-1", "--top_p", "0"], r"--temperature -1.0: .* --top_p 0.0: it must be above 0"),
        (["a", "--max_new_tokens", "0"], "--max_new_tokens 0: it must be 1 or more"),
        (["a", "--prompt", " "], "--prompt"),
        (["nowhere"], "MODEL nowhere: no folder with a config.json"),
    ],
)
def test_what_cannot_be_right_is_refused(argv, why):
    with pytest.raises(Refusal, match=why):
        main(["chat", *argv])


def test_a_misspelt_run_is_refused_with_the_nearest_names_before_the_hub_is_asked(tmp_path, monkeypatch):
    """By every command that takes a model: by chat, by all steps of a run, by --init_from, by trace."""
    from llama_lite.evaluation.resolve import resolve_models
    from llama_lite.hub import client, download
    from llama_lite.models.references import locate
    from llama_lite.training import initial_weights, run_records

    class AskedError(Exception):
        """The Hub was asked."""

    def ask(*args, **options):
        raise AskedError

    for module, name in ((client, "commit_of"), (client, "fetch"), (download, "pull_records")):
        monkeypatch.setattr(module, name, ask)
    monkeypatch.setattr("llama_lite.evaluation.resolve.refs_of", ask)
    monkeypatch.chdir(tmp_path)
    for name, file, record in (
        ("runs/notes", "run.json", {"kind": "pretrain"}),
        ("runs/notes-sft", "run.json", {"kind": "sft"}),
        ("runs/note-eval", "run.json", {"kind": "eval"}),
        ("org/model", "config.json", {}),
    ):
        (tmp_path / name).mkdir(parents=True)
        write_json(tmp_path / name / file, record)
    told = r"runs/note(@step-5)?: there is no folder runs/note\. Nearest: runs/notes, runs/notes-sft\. If you mean"
    for call, argument in (
        (lambda: main(["chat", "runs/note"]), "MODEL"),
        (lambda: resolve_models(["runs/note@step-*"]), "--models"),
        (lambda: resolve_models(["runs/note@step-5"]), "--models"),
        (lambda: locate("runs/note"), "--model_name_or_path"),
        (lambda: initial_weights.config_name("runs/note"), "--init_from"),
        (lambda: initial_weights.tokenizer_name("runs/note"), "--init_from"),
        (lambda: run_records.read_run("runs/note"), "RUN"),
    ):
        with pytest.raises(Refusal, match=f"^{argument} {told}"):
            call()
    with pytest.raises(
        Refusal, match=r"there is no folder runs/zzz\. If you mean a repository on the Hub, .*runs/zzz@main"
    ):
        locate("runs/zzz")
    with pytest.raises(Refusal, match=r"no folder with a config.json .* Nearest: .*/runs/notes"):
        locate(str(tmp_path / "runs" / "note"))
    with pytest.raises(Refusal, match=r"on the Hub, give its branch or tag, too: runs/note@step-000005"):
        locate("runs/note@step-5")
    for on_hub in (
        "runs/note@main",
        "runs/note@step-000005",
        "org/modell",
        "other/model",
    ):  # no folder of runs, or a branch
        with pytest.raises(AskedError):
            locate(on_hub)


def test_help_loads_no_torch():
    code = "import sys\nfrom llama_lite.__main__ import main\ntry: main(['chat', '--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--compare A B" in done.stdout, done.stderr


@pytest.fixture
def endless(base, tmp_path):
    """A model that never ends an answer, in a context that takes minutes to fill."""
    tokenizer = read_tokenizer(base)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=100_000, **sizes))
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    return tmp_path / "endless"


def as_background_command() -> None:
    """Give the process the terminal, and ignore SIGINT as a shell does for a command that ends in `&`."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_in_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_program(endless):
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "llama_lite",
        "chat",
        str(endless),
        "--temperature",
        "0",
        "--max_new_tokens",
        "90000",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=as_background_command,
    )
    os.close(slave)
    limit = threading.Timer(600, process.kill)  # after which reading raises OSError
    limit.start()
    shown = ""

    def until(text: str, after: int = 0) -> int:
        """Read until the terminal shows a text; returns the position after it."""
        nonlocal shown
        while text not in shown[after:]:
            shown += os.read(master, 4096).decode(errors="replace")
        return shown.index(text, after) + len(text)

    try:
        place = until("you> ")
        assert "Ctrl-C ends an answer" in shown
        for _ in range(2):
            os.write(master, b"Tell me\n")
            place = until("Tell me\r\n", place)
            while not shown[place:].strip():  # the answer has begun
                shown += os.read(master, 4096).decode(errors="replace")
            os.write(master, b"\x03")
            place = until("ended by Ctrl-C", place)
            place = until("you> ", place)
        while "(Ctrl-D or /exit ends)" not in shown[place:]:  # at the prompt, which loses a Ctrl-C typed as it appears:
            os.write(
                master, b"\x03"
            )  # Python's readline shows the prompt, and then begins to wait for keys and signals
            while select.select([master], [], [], 2)[0]:
                shown += os.read(master, 4096).decode(errors="replace")
        until("you> ", shown.index("(Ctrl-D or /exit ends)", place))
        os.write(master, b"\x04")
        assert process.wait(timeout=600) == 0
    finally:
        limit.cancel()
        process.kill()
        os.close(master)
        shutil.rmtree(endless)
