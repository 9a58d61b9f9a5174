"""Rows of every schema, nothing dropped or cut in silence, and a held-out part that shares no document with
training.
"""

import json

import pyarrow
import pyarrow.parquet
import pytest

from llama_lite.chat_format import docs_questions, instruction_rows, packing, template
from llama_lite.chat_format.conversation import Row
from llama_lite.data.formats import skipped_record
from llama_lite.data.tokenizer import gpt2_tokenizer
from llama_lite.errors import Refusal

ALPACA = [
    {"instruction": f"Count to {i}.", "input": "" if i % 2 else "slowly", "output": f"1 to {i}"} for i in range(1, 9)
]
CHAT = [
    {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": f"Hello {i}"}]}
    for i in range(8)
]
PAIRS = [{"prompt": f"Hi {i}", "completion": f"Hello {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = gpt2_tokenizer()
    template.set_chat_template(tokenizer)
    return tokenizer


def load(path, most=None):
    return instruction_rows.load(str(path), None, "train", None, most, 1)


def encode(rows, tokenizer, max_length, long_rows, skipped):
    return packing.limit(packing.encode(rows, tokenizer, skipped), max_length, long_rows, skipped)


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
    assert (
        found[0].messages[0]["content"] == "Count to 1." and found[1].messages[0]["content"] == "Count to 2.\n\nslowly"
    )


def test_only_a_completion_is_learnt(tmp_path, tokenizer):
    row = {
        "prompt": [*CHAT[0]["messages"], {"role": "user", "content": "And?"}],
        "completion": [{"role": "assistant", "content": "Well."}],
    }
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
    turns = "turns do not alternate between user and assistant, ending with the assistant"
    assert len(found) == 8 and {reason: entry["rows"] for reason, entry in skipped.items()} == {
        "empty answer": 1,
        "empty question": 1,
        turns: 2,
    }
    assert skipped["empty answer"]["first"] == ["rows.jsonl:9"]


def ask(text, **more):
    return {"role": "user", "content": text, **more}


def say(text, **more):
    return {"role": "assistant", "content": text, **more}


PIRATE = {"role": "system", "content": "You answer like a pirate."}


@pytest.mark.parametrize(
    "row, messages, learnt",
    [
        (
            {"instruction": "And now?", "output": "Yes.", "system": PIRATE["content"], "history": [["What?", "That."]]},
            [PIRATE, ask("What?"), say("That."), ask("And now?"), say("Yes.")],
            ["Yes."],
        ),
        (
            {
                "prompt": "And now?",
                "completion": "Yes.",
                "system": PIRATE["content"],
                "history": [ask("What?"), say("That.")],
            },
            [PIRATE, ask("What?"), say("That."), ask("And now?"), say("Yes.")],
            ["Yes."],
        ),
        (
            {"prompt": [PIRATE, ask("And now?")], "completion": "Yes.", "history": [["What?", "That."]]},
            [PIRATE, ask("What?"), say("That."), ask("And now?"), say("Yes.")],
            ["Yes."],
        ),
        ({"messages": [ask("Hi"), say("Arr")], "system": PIRATE["content"]}, [PIRATE, ask("Hi"), say("Arr")], ["Arr"]),
        (
            {"messages": [ask("Hi"), say("No", weight=0), ask("So?"), say("Yes", weight=1)]},
            [ask("Hi"), say("No"), ask("So?"), say("Yes")],
            ["Yes"],
        ),
        (
            {"messages": [ask("Hi"), say("Yes", train=True), ask("So?"), say("No", train=False)]},
            [ask("Hi"), say("Yes"), ask("So?"), say("No")],
            ["Yes"],
        ),
        ({"messages": None, "instruction": "Hi", "output": "Yes"}, [ask("Hi"), say("Yes")], ["Yes"]),
        (
            {"messages": [ask([{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]), say("Yes")]},
            [ask("Hi you"), say("Yes")],
            ["Yes"],
        ),
        (
            {"instruction": "Hi", "output": "Yes", "weight": 1, "train": True, "system": None, "history": []},
            [ask("Hi"), say("Yes")],
            ["Yes"],
        ),
    ],
)
def test_fields_with_a_meaning_are_used(tmp_path, tokenizer, row, messages, learnt):
    (found,), record, skipped = load(jsonl(tmp_path / "rows.jsonl", [row]))
    assert list(found.messages) == messages and not skipped and "columns_not_read" not in record
    assert (
        found.document == next(m["content"] for m in reversed(messages) if m["role"] == "user").lower()
        or "messages" in row
    )
    (example,) = encode([found], tokenizer, 1024, "drop", {})
    assert tokenizer.decode([label for label in example.labels if label != -100]) == "".join(
        f" {text}<|endoftext|>" for text in learnt
    )
    assert PIRATE not in messages or tokenizer.decode(example.input_ids).startswith("You answer like a pirate. USER:")


def test_columns_without_a_meaning_are_counted_by_name(tmp_path):
    rows = [
        {"instruction": "Hi", "output": "Yes", "context": "The number is odd.", "id": "", "rejected": None},
        {"prompt": "Hi", "completion": "Yes", "label": False, "rejected": "No", "input": "more"},
        {
            "messages": [ask("Hi"), say("Yes", tool_calls=[{"id": 1}], reasoning_content="Hm", name=None)],
            "tools": [{}],
            "history": [["a", "b"]],
        },
        {"messages": [PIRATE, ask("Hi"), say("Yes", weight=0.5)], "system": "Be brief.", "weight": 3, "train": "later"},
    ]
    found, record, skipped = load(jsonl(tmp_path / "rows.jsonl", rows))
    assert len(found) == 4 and not skipped and found[3].messages[0] == PIRATE
    assert record["columns_not_read"] == dict.fromkeys(
        [
            "context",
            "label",
            "rejected",
            "input",
            "tools",
            "history",
            "tool_calls of messages",
            "reasoning_content of messages",
            "system",
            "a message's weight other than 0 and 1",
            "the row's weight other than 0 and 1",
            "the row's train other than False and True",
        ],
        1,
    )
    assert instruction_rows.unread_lines({"columns_not_read": {"a": 1200, "b": 1}}) == [
        "columns not read: a (of 1,200 rows), b (of 1 rows)"
    ]
    assert instruction_rows.unread_lines({}) == []


def test_odd_rows_are_counted_and_named_and_end_nothing(tmp_path):
    odd = {
        "output is int instead of text": {"instruction": "Is it?", "output": 1},
        "input is int instead of text": {"instruction": "Is it?", "input": 5, "output": "Yes"},
        "output is list instead of text": {"instruction": "List", "output": ["a"]},
        "content is int instead of text": {"messages": [ask("1+1"), say(2)]},
        "content with a part of the type 'image'": {
            "messages": [ask([{"type": "image"}, {"type": "text", "text": "What?"}]), say("A cat.")]
        },
        "messages are not a list of {role, content}": {"messages": [{"from": "human", "value": "Hi"}]},
        "a turn with the role 'tool'": {
            "messages": [ask("Hi"), say("I look."), {"role": "tool", "content": "rain"}, say("Rain.")]
        },
        "weight 0 or train false": {"instruction": "Hi", "output": "Bad", "weight": 0},
        "columns of no schema": {"question": "Hi", "choices": "Yes"},
        "empty answer": {"messages": [ask("Weather?"), say(None, tool_calls=[{"id": 1}])]},
    }
    strange = {"instruction": "Hi", "output": "Yes", "history": "before"}
    path = jsonl(
        tmp_path / "rows.jsonl",
        [ALPACA[0], *odd.values(), {"messages": [ask("Hi"), say("Bad", weight=0)]}, strange, ALPACA[1]],
    )
    path.write_bytes(
        path.read_bytes()
        + b'{"instruction": "Say", "output": "a smile \\ud83d"}\n{"instruction": "Say", "output": "caf\xe9"}\n'
    )
    found, _record, skipped = load(path)
    assert [row.name for row in found] == ["rows.jsonl:1", "rows.jsonl:14"]
    expected = {reason: [f"rows.jsonl:{number}"] for number, reason in enumerate(odd, 2)} | {
        "not UTF-8": ["rows.jsonl:15", "rows.jsonl:16"]
    }
    expected["weight 0 or train false"].append("rows.jsonl:12")
    expected["history is not a list of {role, content} or of pairs"] = ["rows.jsonl:13"]
    assert {reason: entry["first"] for reason, entry in skipped.items()} == expected
    with pytest.raises(
        Refusal,
        match=(
            r"no row is a conversation to learn from: 2 output is int instead of text \(none.jsonl:1,"
            r" none.jsonl:2\)"
        ),
    ):
        load(jsonl(tmp_path / "none.jsonl", [{"instruction": "Is it?", "output": 1}] * 2))


def test_parquet_rows_whose_text_or_dates_cannot_be_read(tmp_path):
    def raw(values):
        return pyarrow.Array.from_buffers(
            pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers()
        )

    given = pyarrow.array([f"Say {i}" for i in range(4)])
    dates = pyarrow.array([316516204800] * 4, pyarrow.timestamp("s"))  # the year 12000
    table = pyarrow.table(
        {"instruction": given, "output": raw([b"one", b"caf\xe9", b"three", b"four"]), "created": dates}
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found, record, skipped = load(tmp_path / "rows.parquet")
    assert [row.messages[1]["content"] for row in found] == ["one", "three", "four"] and record["columns_not_read"] == {
        "created": 4
    }
    assert skipped == {"not UTF-8": {"rows": 1, "first": ["rows.parquet:2"]}}
    inner = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["user", "assistant"] * 3), raw([b"a", b"b", b"c", b"caf\xe9", b"e", b"f"])], ["role", "content"]
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": pyarrow.ListArray.from_arrays(pyarrow.array([0, 2, 4, 6], pyarrow.int32()), inner)}),
        tmp_path / "m.parquet",
    )
    found, _, skipped = load(tmp_path / "m.parquet")
    assert [row.messages[1]["content"] for row in found] == ["b", "f"] and skipped == {
        "not UTF-8": {"rows": 1, "first": ["m.parquet:2"]}
    }


def test_weights_of_a_csv_file_are_text(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output,weight,train\na,yes,1,true\nb,no,0,\nc,no,,False\nd,yes,,\n")
    found, _, skipped = load(tmp_path / "rows.csv")
    assert [row.messages[0]["content"] for row in found] == ["a", "d"] and skipped["weight 0 or train false"][
        "rows"
    ] == 2


@pytest.mark.parametrize("names", [("prompt", "completion"), *instruction_rows.PAIRS])
def test_questions_and_answers_under_other_names_are_the_same_rows(tmp_path, names):
    rows = [dict(zip(names, pair, strict=True)) for pair in (("What is it?", "A test."), ("Why?", "To see."))]
    found, _, skipped = load(jsonl(tmp_path / "rows.jsonl", rows))
    assert not skipped and [[message["content"] for message in row.messages] for row in found] == [
        ["What is it?", "A test."],
        ["Why?", "To see."],
    ]


@pytest.mark.parametrize("row", [{"text": "plain"}, {"question": "a", "choices": "b"}, {"instruction": "a"}])
def test_another_schema_is_refused_with_what_there_is(tmp_path, row):
    with pytest.raises(
        Refusal,
        match=rf"rows.jsonl:1 has the columns {', '.join(sorted(row))}. Rows are needed with `instruction`, `output`",
    ):
        load(jsonl(tmp_path / "rows.jsonl", [row]))


def test_long_rows_are_dropped_or_cut_and_said(tokenizer):
    def row(name, question, answer):
        return Row(name, name, tuple(template.conversation(question, "", answer)))

    rows = [
        row("short", "Hi", "Hello"),
        row("long answer", "Hi", "very " * 100),
        row("long question", "why " * 100, "So."),
    ]
    skipped: dict = {}
    assert [e.row.name for e in encode(rows, tokenizer, 64, "drop", skipped)] == ["short"]
    assert {str(reason): entry["first"] for reason, entry in skipped.items()} == {
        "longer than 64 tokens: dropped": ["long answer", "long question"]
    }
    skipped = {}
    short, cut = encode(rows, tokenizer, 64, "truncate", skipped)
    assert not short.cut and short.labels[-1] == tokenizer.eos_token_id
    assert (
        cut.cut
        and len(cut.input_ids) == 64
        and tokenizer.eos_token_id not in cut.input_ids
        and cut.num_label_tokens > 10
    )
    assert {str(reason): entry["first"] for reason, entry in skipped.items()} == {
        "longer than 64 tokens: answer cut, no end-of-text": ["long answer"],
        "no answer within 64 tokens: dropped": ["long question"],
    }
    skipped = {}
    assert encode([row("odd", "What is <|endoftext|>?", "A token.")], tokenizer, 64, "drop", skipped) == []
    assert skipped["contains the text <|endoftext|>"]["rows"] == 1


def test_a_row_cut_between_two_answers_keeps_the_end_of_the_first(tokenizer):
    talk = tuple([*template.conversation("Hi", "", "Hello."), *template.conversation("Why? " * 100, "", "So.")])
    skipped: dict = {}
    (found,) = encode([Row("talk", "talk", talk)], tokenizer, 64, "truncate", skipped)
    assert not found.cut and [label for label in found.labels if label != -100][-1] == tokenizer.eos_token_id
    assert skipped_record(skipped) == {"longer than 64 tokens: later turns cut": {"rows": 1, "first": ["talk"]}}


def test_a_row_that_the_template_refuses_is_counted(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if 'Hi' in m['content'] %}{{ raise_exception('no greetings') }}{% elif m['role'] =="
        " 'user' %}Q {{ m['content'] }} A{% else %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration"
        " %}{% endif %}{% endfor %}"
    )
    tokenizer, skipped = gpt2_tokenizer(), {}
    template.set_chat_template(tokenizer, str(path))
    rows = [
        Row(str(i), str(i), tuple(template.conversation(question, "", "Yes.")))
        for i, question in enumerate(("One?", "Hi", "Two?"))
    ]
    assert [example.row.name for example in packing.encode(rows, tokenizer, skipped)] == ["0", "2"]
    ((reason, entry),) = skipped.items()
    assert "no greetings" in reason and entry == {"rows": 1, "first": ["1"]}


def test_text_without_conversations_is_refused():
    with pytest.raises(
        Refusal, match=r"installed-files holds no conversations\. Use installed-docs, which makes questions"
    ):
        instruction_rows.load("installed-files", None, "train", None, None, 1)


def test_nothing_to_learn_from_is_refused(tokenizer):
    with pytest.raises(Refusal, match=r"no row is left to train on \(2 longer than 64"):
        packing.need_rows([], [1], 1, {packing.LongRows("dropped", 64): {"rows": 2, "first": []}})
    with pytest.raises(Refusal, match=r"1 rows are held out and 3 are needed \(none were skipped\)"):
        packing.need_rows([1], [1], 3, {})
    with pytest.raises(
        Refusal,
        match=(
            r"\(none were skipped\): all 2 rows are held out. They form one document .*whole: add rows with other"
            r" questions\.$"
        ),
    ) as refusal:
        packing.need_rows([], [1, 2], 1, {}, 1)
    assert "max_length" not in str(refusal.value)
    with pytest.raises(Refusal, match=r"They form 5 documents .*whole: lower --eval_rows, or add more rows\.$"):
        packing.need_rows([], [1] * 9, 1, {}, 5)


@pytest.mark.parametrize(
    "reason, at_context, fixes",
    [
        (packing.LongRows("dropped", 64), False, "raise --max_length, or choose --long_rows truncate"),
        (packing.LongRows("dropped without an answer", 64), False, "raise --max_length"),
        (
            packing.LongRows("dropped", 64),
            True,
            "choose --long_rows truncate, shorten the rows, or tune a base with a longer context (--max_length is all"
            " of this one's)",
        ),
        (
            packing.LongRows("dropped without an answer", 64),
            True,
            "shorten the rows, or tune a base with a longer context (--max_length is all of this one's)",
        ),
        (packing.LongRows("turns cut", 64), True, "add more rows"),
        ("longer than 64 tokens: dropped", True, "add more rows"),  # the words of a chat template that refuses rows
    ],
)
def test_rows_that_are_too_long_are_refused_with_what_helps(reason, at_context, fixes):
    """--max_length was to be raised above the base's context, which is refused, and --long_rows truncate to be chosen
    where it was.
    """
    with pytest.raises(Refusal) as refusal:
        packing.need_rows([], [], 1, {reason: {"rows": 2, "first": []}}, 2, "", at_context)
    assert str(refusal.value) == f"no row is left to train on (2 {reason}): {fixes}."


def test_held_out_rows_share_no_document_with_training():
    rows = [Row(str(i), f"document {i % 40}", ()) for i in range(400)]
    held = instruction_rows.held_documents(rows, 55)
    assert 55 <= sum(row.document in held for row in rows) < 65
    assert instruction_rows.held_documents(rows, 55) == held
    assert instruction_rows.held_documents(rows[:200], 55) >= held  # the order is that of a hash


def test_rows_that_are_set_aside_are_the_held_out_rows_of_a_later_run(tmp_path):
    lines = [json.dumps({"prompt": f"Question {i}?", "completion": f"Answer {i}."}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))

    def load(**options):
        return instruction_rows.load(str(tmp_path / "rows.jsonl"), None, "train", None, None, 1, **options)

    everything, _, _ = load()
    chosen_on, _, skipped = load(test_rows=12)
    held = instruction_rows.held_documents(everything, 12)
    assert {row.document for row in everything} - {row.document for row in chosen_on} == held and len(held) == 12
    assert not instruction_rows.held_documents(chosen_on, 12) & held
    assert skipped["set aside for a test (--test_rows)"]["rows"] == 12
    with pytest.raises(Refusal, match=r"^--test_rows 40 sets all 40 rows aside \(by whole documents\): lower it"):
        load(test_rows=40)


def test_packs_hold_whole_rows(tokenizer):
    rows = [
        Row(str(i), str(i), tuple(template.conversation(f"Count to {i}.", "", "one two three " * (i % 5 + 1))))
        for i in range(30)
    ]
    examples = encode(rows, tokenizer, 256, "drop", {})
    packed = packing.pack(examples, 256, True)
    assert len(packed) < 15 and sum(map(len, packed["seq_lengths"])) == 30
    cut = [
        ids[sum(lengths[:i]) :][:length]
        for ids, lengths in zip(packed["input_ids"], packed["seq_lengths"], strict=True)
        for i, length in enumerate(lengths)
    ]
    assert sorted(cut) == sorted(example.input_ids for example in examples)
    assert len(packing.pack(examples, 256, False)) == 30


def test_an_example_is_shown_with_what_is_learnt(tokenizer):
    example = encode(
        [Row("a", "a", tuple(template.conversation("Hi", "", "Hello there")))], tokenizer, 256, "drop", {}
    )[0]
    assert packing.show(tokenizer, example, False).endswith("USER: Hi ASSISTANT:» Hello there<|endoftext|>«")
    assert packing.show(tokenizer, example, True).endswith("ASSISTANT:\x1b[1;32m Hello there<|endoftext|>\x1b[0m")


def test_embedded_rows_are_real_deterministic_and_say_nothing_twice():
    rows, record, _ = instruction_rows.load("installed-docs", None, "train", None, 300, 2)
    assert len(rows) == 300 and rows == instruction_rows.load("installed-docs", None, "train", None, 300, 1)[0]
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
    assert docs_questions._answer(text) == answer
