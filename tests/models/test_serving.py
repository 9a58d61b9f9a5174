"""`transformers serve` and `transformers chat` on what this project writes."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from llama_lite.__main__ import main


@pytest.fixture(scope="module")
def address() -> str:
    """A `transformers serve` in this process."""
    from transformers.cli.serve import Serve

    serving = Serve(host="127.0.0.1", port=0, device="cpu", non_blocking=True)
    while not serving.server.started:
        time.sleep(0.02)
    port = serving.server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    serving.kill_server()


def ask(address: str, folder: Path) -> str:
    """The answer of the model in a folder."""
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": "Say red."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def test_a_merged_model_is_served_and_an_adapter_is_not(address, base, whole_sft, tmp_path, capsys):
    """As docs/using-models.md says, with the line that merges."""
    with pytest.raises(urllib.error.HTTPError) as failure:
        ask(address, whole_sft)
    assert failure.value.code == 500
    main(
        [
            "export",
            f"{base}+{whole_sft}",
            "--to",
            "safetensors",
            "--dtype",
            "float32",
            "--output_dir",
            str(tmp_path / "m"),
        ]
    )
    capsys.readouterr()
    main(["chat", f"{base}+{whole_sft}", "--prompt", "Say red.", "--temperature", "0", "--max_new_tokens", "8"])
    assert ask(address, tmp_path / "m").strip() == capsys.readouterr().out.strip()


def test_transformers_chat_talks_to_that_server(address, whole_sft, base, tmp_path):
    main(["export", f"{base}+{whole_sft}", "--to", "safetensors", "--output_dir", str(tmp_path / "m")])
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "chat",
        str(tmp_path / "m"),
        address,
        "max_new_tokens=5",
    ]
    done = subprocess.run(command, input="Say red.\n!exit\n", capture_output=True, text=True, cwd=tmp_path)
    assert f"<{tmp_path / 'm'}>:" in done.stdout.replace("\n", "") and " tokens in " in done.stdout, done.stdout
