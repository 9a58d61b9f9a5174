"""Rows of every schema, nothing dropped or cut in silence, and a held-out part that shares no document with training."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from llama_lite import instructions, prompts
from llama_lite.arguments import Refusal
from llama_lite.instructions import Row
from llama_lite.tokenizers import gpt2_tokenizer

ALPACA = [{"instruction": f"Count to {i}.", "input": "" if i % 2 else "slowly", "output": f"1 to {i}"} for i in range(1, 9)]
CHAT = [{"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": f"Hello {i}"}]} for i in range(8)]
PAIRS = [{"prompt": f"Hi {i}", "completion": f"Hello {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = gpt2_tokenizer()
    prompts.set_chat_template(tokenizer)
    return tokenizer


def load(path, most=None):
    return instructions.load(str(path), None, "train", None, most, 1)


def encode(rows, tokenizer, max_length, long_rows, skipped):
    return instructions.limit(instructions.encode(rows, tokenizer, skipped), max_length, long_rows, skipped)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("rows", [ALPACA, CHAT, PAIRS], ids=["alpaca", "messages", "prompt and completion"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_each_schema_from_each_format(tmp_path, rows, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        jsonl(path, rows)
    found, record, skipped = load(path)
    assert len(found) == 8 and not skipped and record["files"] == 1 and record["dataset"] == path.name
    assert [message["role"] for message in found[0].messages] == ["user", "assistant"]
    assert len(load(path, 3)[0]) == 3


def test_alpacas_input_follows_the_instruction(tmp_path):
    found = load(jsonl(tmp_path / "rows.jsonl", ALPACA))[0]
    assert found[0].messages[0]["content"] == "Count to 1." and found[1].messages[0]["content"] == "Count to 2.\n\nslowly"


def test_only_a_completion_is_learnt(tmp_path, tokenizer):
    row = {"prompt": [*CHAT[0]["messages"], {"role": "user", "content": "And?"}], "completion": [{"role": "assistant", "content": "Well."}]}
    found = load(jsonl(tmp_path / "rows.jsonl", [row]))[0]
    example = encode(found, tokenizer, 1024, "drop", {})[0]
    assert tokenizer.decode([label for label in example.labels if label != -100]) == " Well.<|endoftext|>"


def test_rows_that_are_none_are_counted_and_named(tmp_path):
    bad = [
        {"instruction": "Say nothing.", "output": " "},
        {"instruction": "", "output": "Why?"},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}]},
    ]
    found, _, skipped = load(jsonl(tmp_path / "rows.jsonl", [*ALPACA, *bad]))
    turns = "turns are not user and assistant in turn, ended by the assistant"
    assert len(found) == 8 and {reason: entry["rows"] for reason, entry in skipped.items()} == {"empty answer": 1, "empty question": 1, turns: 2}
    assert skipped["empty answer"]["first"] == ["rows.jsonl:9"]


@pytest.mark.parametrize("row", [{"text": "plain"}, {"question": "a", "answer": "b"}, {"instruction": "a"}])
def test_another_schema_is_refused_with_what_there_is(tmp_path, row):
    with pytest.raises(Refusal, match=rf"rows.jsonl:1 has the columns {', '.join(sorted(row))}. Rows are needed with `instruction`, `output`"):
        load(jsonl(tmp_path / "rows.jsonl", [row]))


def test_long_rows_are_dropped_or_cut_and_said(tokenizer):
    def row(name, question, answer):
        return Row(name, name, tuple(prompts.conversation(question, "", answer)))

    rows = [row("short", "Hi", "Hello"), row("long answer", "Hi", "very " * 100), row("long question", "why " * 100, "So.")]
    skipped: dict = {}
    assert [e.row.name for e in encode(rows, tokenizer, 64, "drop", skipped)] == ["short"]
    assert {reason: entry["first"] for reason, entry in skipped.items()} == {"longer than 64 tokens: dropped": ["long answer", "long question"]}
    skipped = {}
    short, cut = encode(rows, tokenizer, 64, "truncate", skipped)
    assert not short.cut and short.labels[-1] == tokenizer.eos_token_id
    assert cut.cut and len(cut.input_ids) == 64 and tokenizer.eos_token_id not in cut.input_ids and cut.learnt > 10
    assert skipped["longer than 64 tokens: answer cut, no end-of-text"]["first"] == ["long answer"]
    assert skipped["no answer within 64 tokens: dropped"]["first"] == ["long question"]
    skipped = {}
    assert encode([row("odd", "What is <|endoftext|>?", "A token.")], tokenizer, 64, "drop", skipped) == []
    assert skipped["contains the text <|endoftext|>"]["rows"] == 1


def test_text_without_conversations_is_refused():
    with pytest.raises(Refusal, match="installed-files holds no conversations: installed-docs makes questions"):
        instructions.load("installed-files", None, "train", None, None, 1)


def test_nothing_to_learn_from_is_refused(tokenizer):
    with pytest.raises(Refusal, match=r"no row is left to learn from \(2 longer than 64"):
        instructions.need_rows([], [1], 1, {"longer than 64 tokens: dropped": {"rows": 2, "first": []}})
    with pytest.raises(Refusal, match=r"1 rows are held out and 3 are needed \(none were skipped\)"):
        instructions.need_rows([1], [1], 3, {})


def test_held_out_rows_share_no_document_with_training():
    rows = [Row(str(i), f"document {i % 40}", ()) for i in range(400)]
    held = instructions.held_documents(rows, 55)
    assert 55 <= sum(row.document in held for row in rows) < 65
    assert instructions.held_documents(rows, 55) == held
    assert instructions.held_documents(rows[:200], 55) >= held  # the order is that of a hash


def test_packs_hold_whole_rows(tokenizer):
    rows = [Row(str(i), str(i), tuple(prompts.conversation(f"Count to {i}.", "", "one two three " * (i % 5 + 1)))) for i in range(30)]
    examples = encode(rows, tokenizer, 256, "drop", {})
    packed = instructions.pack(examples, 256, True)
    assert len(packed) < 15 and sum(map(len, packed["seq_lengths"])) == 30
    cut = [
        ids[sum(lengths[:i]) :][:length]
        for ids, lengths in zip(packed["input_ids"], packed["seq_lengths"], strict=True)
        for i, length in enumerate(lengths)
    ]
    assert sorted(cut) == sorted(example.input_ids for example in examples)
    assert len(instructions.pack(examples, 256, False)) == 30


def test_an_example_is_shown_with_what_is_learnt(tokenizer):
    example = encode([Row("a", "a", tuple(prompts.conversation("Hi", "", "Hello there")))], tokenizer, 256, "drop", {})[0]
    assert instructions.show(tokenizer, example, False).endswith("USER: Hi ASSISTANT:» Hello there<|endoftext|>«")
    assert instructions.show(tokenizer, example, True).endswith("ASSISTANT:\x1b[1;32m Hello there<|endoftext|>\x1b[0m")


def test_embedded_rows_are_real_deterministic_and_say_nothing_twice():
    rows, record, _ = instructions.load("installed-docs", None, "train", None, 300, 2)
    assert len(rows) == 300 and rows == instructions.load("installed-docs", None, "train", None, 300, 1)[0]
    assert "torch" in record["packages"] and len({row.document for row in rows}) > 20
    answers = [row.messages[1]["content"] for row in rows]
    assert len({" ".join(answer.lower().split()[:10]) for answer in answers}) == 300
    assert all(answer[-1] in ".!?" and len(answer) in range(25, 322) for answer in answers)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Compute the mean\nof the values", "Compute the mean of the values."),
        ("See :func:`numpy.mean` for the whole story", "See `numpy.mean` for the whole story."),
        ("n_jobs is the number of jobs to run", "n_jobs is the number of jobs to run."),
        ("Too short", None),
        ("Args: x is a number and y is another one", None),
        ("See https://example.org for the whole story", None),
        (None, None),
    ],
)
def test_what_makes_an_answer(text, answer):
    assert instructions._answer(text) == answer
