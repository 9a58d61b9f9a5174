"""The four kinds of text of the demo as validation sets."""

import numpy as np
import pytest

from llama_lite.commands import text_kinds
from llama_lite.data import held_out
from llama_lite.data.tokenizer import train_tokenizer
from llama_lite.errors import Refusal
from llama_lite.evaluation.tasks import embedded


def test_each_kind_becomes_a_folder_whose_validation_slice_is_its_texts(tmp_path, monkeypatch, capsys):
    texts = {name: [f"{name} text number {i}, as long as it is." for i in range(9)] for name in ("docs", "web", "code")}
    texts["science"] = ["What is the boiling point of water? 100 degrees.", "What is an atom? A part of matter."]
    for module, function, name in (
        (held_out, "held_out_documents", "docs"),
        (embedded, "web_documents", "web"),
        (embedded, "code_documents", "code"),
        (embedded, "science_documents", "science"),
    ):
        documents = [{"text": text} for text in texts[name]]
        monkeypatch.setattr(module, function, lambda documents=documents: documents)
    tokenizer = train_tokenizer(iter([text for kind in texts.values() for text in kind]), 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    argv = [str(tmp_path / "kinds"), "--tokenizer", str(tmp_path / "tokenizer")]
    text_kinds.main(argv)
    said = capsys.readouterr().out
    for name, there in texts.items():
        ids = np.load(tmp_path / f"kinds/{name}/validation-00000.npy")
        documents = tokenizer.decode(ids).split("<|endoftext|>")[1:]
        assert len(documents) == len(there) - 1 and set(documents) < set(there)
        assert f"{name}={tmp_path}/kinds/{name}" in said.splitlines()[-1]
    text_kinds.main(argv)  # again: they are there
    with pytest.raises(Refusal, match="give the tokenizer of the run"):
        text_kinds.main([*argv[:2], "train"])
