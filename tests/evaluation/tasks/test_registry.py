"""Tasks: real items, known answers, local data, and what is not there is refused with what to do."""

import json

import pytest
import yaml

from llama_lite.chat_format import instruction_rows
from llama_lite.config.sft import parse_sft
from llama_lite.errors import Refusal
from llama_lite.evaluation.tasks import definition, embedded, registry
from llama_lite.training import derive_sft


def test_embedded_multiple_choice_is_whole():
    items = embedded.mmlu_items()
    assert len(items) > 270 and len({item["subject"] for item in items}) == 57
    assert all(len(item["choices"]) == 4 and all(item["choices"]) and item["answer"] in range(4) for item in items)
    pituitary = next(item for item in items if "pituitary" in item["question"])
    assert pituitary["choices"][pituitary["answer"]] == "Cranial"
    sentences = embedded.next_sentence_items()
    assert len(sentences) > 100 and all(len(set(item["choices"])) == 4 for item in sentences)
    answers = [item["answer"] for item in sentences]
    assert all(0.15 < answers.count(i) / len(answers) < 0.35 for i in range(4))


def test_embedded_texts_are_of_four_kinds_and_deterministic():
    found = {name: embedded.EMBEDDED[f"embedded_{name}"]().eval_docs for name in ("docs", "code", "web", "science")}
    assert all(len(texts) >= 70 and len({item["text"] for item in texts}) == len(texts) for texts in found.values())
    assert all(len(item["text"]) <= definition.DOCUMENT_CHARACTERS for texts in found.values() for item in texts)
    code = [item["text"] for item in found["code"]]
    assert sum(text.lstrip().startswith(("def ", "@", "async")) for text in code) == len(code) and not any(
        '"""' in text[:200] for text in code[:20]
    )
    assert list(embedded.EMBEDDED["embedded_code"]().eval_docs) == list(found["code"])


def test_held_out_instructions_are_held_out_of_every_default_tuning_run():
    held = {item["document"] for item in embedded.instruction_items()}
    demo = parse_sft([])[2]
    for most, count in ((demo.max_rows, demo.eval_rows), (5000, 400), (None, derive_sft.MOST_HELD)):
        rows, _, _ = instruction_rows.load(demo.dataset, None, "train", None, most, 2, demo.skip_held_out)
        train_documents = {row.document for row in rows} - instruction_rows.held_documents(rows, count)
        assert len(train_documents) > 200 and not held & train_documents


@pytest.mark.parametrize(
    "asked, message",
    [
        (
            (["hellaswg"], {}, {}, False),
            r"--tasks hellaswg: no such task; near: .*hellaswag.*Embedded, without network: embedded_mmlu",
        ),
        (
            (["hellaswag"], {}, {}, False),
            r"--tasks hellaswag: its data cannot be read .*: give a local copy of it: --task_data hellaswag=FOLDER",
        ),
        ((["hellaswag"], {"hellaswag": "/nowhere"}, {}, False), r"its data cannot be read \(/nowhere is no folder\)"),
        ((["humaneval"], {}, {}, False), r"use embedded_humaneval, the same 164 problems, in a sandbox"),
        (
            (["embedded_mmlu"], {"hellaswag": "x"}, {}, False),
            r"--task_data hellaswag=...: hellaswag is not among --tasks",
        ),
    ],
)
def test_what_is_not_there_is_refused(hub, asked, message):
    with pytest.raises(Refusal, match=message):
        registry.build(*asked)


def test_a_group_on_local_data(tmp_path):
    """MMLU with a local copy of its data, one folder a subject as `dataset_name`."""
    folder = tmp_path / "mmlu"
    folder.mkdir()
    subjects = sorted(path.stem.removeprefix("mmlu_") for path in _mmlu_yamls())
    configs = []
    for subject in subjects:
        for split in ("test", "dev"):
            rows = [
                {
                    "question": f"{subject} {split} {i}?",
                    "choices": ["a", "b", "c", "d"],
                    "answer": i % 4,
                    "subject": subject,
                }
                for i in range(3)
            ]
            (folder / f"{subject}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = "".join(f"      - split: {split}\n        path: {subject}-{split}.jsonl\n" for split in ("test", "dev"))
        configs.append(f"  - config_name: {subject}\n    data_files:\n{files}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    (task,) = registry.build(["mmlu"], {"mmlu": str(folder)}, {"mmlu": 2}, False)
    assert len(task.leaves) == 57 and task.n_shot == 2 and task.dataset is None
    leaf = task.leaves["mmlu_anatomy"]
    text = leaf.fewshot_context(leaf.eval_docs[0], 2)
    assert (
        "anatomy dev 0?" in text
        and "anatomy dev 1?" in text
        and text.endswith("anatomy test 0?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    )


def question(number: int) -> dict:
    """A row of hellaswag."""
    words = {"ctx_a": "He", "ctx_b": "sat", "ctx": "He sat", "activity_label": f"Q{number}"}
    return {**words, "endings": list("abcd"), "source_id": "s", "label": "0"}


def questions_of(folder) -> list[str]:
    (task,) = registry.build(["hellaswag"], {"hellaswag": str(folder)}, {}, False)
    return [item["query"][:2] for item in task.items("hellaswag")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_split_in_shards_is_all_of_its_shards(tmp_path, kind):
    from datasets import Dataset

    def write(name: str, numbers) -> None:
        data = Dataset.from_list([question(number) for number in numbers])
        data.to_json(tmp_path / name) if name.endswith("jsonl") else data.to_parquet(tmp_path / name)

    (tmp_path / "dataset_infos.json").write_text("{}")
    write(f"train.{kind}", [9])
    for shard in range(2):
        write(f"validation-0000{shard}-of-00002.{kind}", [2 * shard, 2 * shard + 1])
    (tmp_path / f"validation-00000-of-00002.{kind}").rename(tmp_path / "0123")  # as in the Hub's cache
    (tmp_path / f"validation-00000-of-00002.{kind}").symlink_to("0123")
    assert questions_of(tmp_path) == ["Q0", "Q1", "Q2", "Q3"]
    other = {"jsonl": "parquet", "parquet": "jsonl"}[kind]
    write(f"train.{other}", [9])
    with pytest.raises(
        Refusal, match=r"its data cannot be read \(train.jsonl, train.parquet are one split in files of"
    ):
        questions_of(tmp_path)
    (tmp_path / f"train.{kind}").unlink()
    with pytest.raises(Refusal, match=r"some of its splits are parquet and others JSON\): the folder must hold"):
        questions_of(tmp_path)


def test_what_save_to_disk_wrote_is_local_data(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([question(number) for number in range(5)])
    saved = DatasetDict(train=rows, validation=rows.select([3, 1, 0]))
    saved.save_to_disk(tmp_path / "data [v2]", num_shards={"train": 1, "validation": 2})
    assert questions_of(tmp_path / "data [v2]") == ["Q3", "Q1", "Q0"]
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(
        Refusal, match=r"wrote one Dataset there: save a DatasetDict, which names its splits\): the fold"
    ):
        questions_of(tmp_path / "one")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_odd_rows_of_local_data_are_counted_and_the_rest_is_asked(tmp_path, capsys, kind):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "data [v2]"  # `datasets` would take it for a glob
    folder.mkdir()
    rows = [question(i) for i in range(4)]
    for split in ("train", "validation"):
        path = folder / f"{split}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    if kind == "jsonl":
        path.write_bytes(path.read_bytes().replace(b"Q1", b"caf\xe9").replace(b"Q3", b"\\ud83d"))
    else:
        names = [b"Q0", b"caf\xe9", b"Q2", b"\xff"]
        raw = pyarrow.Array.from_buffers(pyarrow.string(), 4, pyarrow.array(names, pyarrow.binary()).buffers())
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(
            table.set_column(table.schema.get_field_index("activity_label"), "activity_label", raw), path
        )
    assert questions_of(folder) == ["Q0", "Q2"]
    assert f"not read  2 not UTF-8 (validation.{kind}:2, validation.{kind}:4)" in capsys.readouterr().out
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(
        Refusal,
        match=rf"--tasks hellaswag: its data cannot be read \(validation.{kind} is a pointer to a file that Git LFS",
    ):
        questions_of(folder)


def test_local_data_that_datasets_cannot_read_is_refused(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text("{")
    with pytest.raises(Refusal, match=r"--tasks hellaswag: its data cannot be read"):
        registry.build(["hellaswag"], {"hellaswag": str(tmp_path)}, {}, False)


def _mmlu_yamls():
    import importlib.util
    from pathlib import Path

    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks/mmlu/default"
    return [path for path in folder.glob("mmlu_*.yaml")]


def test_examples_never_hold_the_item_itself():
    (task,) = registry.build(["embedded_mmlu"], {}, {"": 3}, False)
    leaf = task.leaves["embedded_mmlu"]
    leaf.set_fewshot_seed(1)
    for item in list(leaf.eval_docs)[:60]:
        text = leaf.fewshot_context(item, 3)
        assert text.count(item["question"].strip()) == 1 and text.count("Answer:") == 4


SPLITS = [
    {"validation_split": "validation", "fewshot_split": "validation"},  # as french_bench_orangesum_title
    {"validation_split": "validation", "training_split": "validation"},
    {"test_split": "validation", "training_split": "validation"},
    {"test_split": "validation", "fewshot_split": "validation"},
]


def local_task(folder, rows: int, **config) -> dict:
    """Arguments of `registry.build` for a task of one's own, with the splits train and validation of `rows` items."""
    files = {}
    for split in ("train", "validation"):
        files[split] = str(folder / f"{split}.jsonl")
        items = [{"question": f"{split} {n}?", "answer": f"yes {n}"} for n in range(rows)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    content = {
        **{"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "doc_to_text": "question"},
        **{"doc_to_target": "answer", "output_type": "generate_until"},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **config,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return {"names": ["mine"], "task_data": {}, "chat": False, "include_path": str(folder)}


@pytest.mark.parametrize("splits", SPLITS)
def test_an_item_is_no_example_of_itself_whatever_its_split_is_called(tmp_path, splits):
    """lm-eval leaves the item out only where `fewshot_split` is `test_split`."""
    asked = local_task(tmp_path, 5, **splits)
    (task,) = registry.build(**asked, n_shots={"": 4})
    leaf = task.leaves["mine"]
    assert len(leaf.eval_docs) == 5
    for seed in range(5):
        leaf.set_fewshot_seed(seed)
        for item in leaf.eval_docs:
            text = leaf.fewshot_context(item, 4)
            assert text.count(item["question"]) == 1 and text.count("yes") == 4
    with pytest.raises(Refusal, match=r"--num_fewshot 5: mine has 4 few-shot examples: 4 at most"):
        registry.build(**asked, n_shots={"": 5})


def test_examples_of_another_split_are_drawn_as_lm_eval_draws_them(tmp_path):
    """It draws one more than it uses where a task names neither `fewshot_split` nor `test_split`."""
    asked = local_task(tmp_path, 5, validation_split="validation", training_split="train")
    (task,) = registry.build(**asked, n_shots={"": 4})
    leaf = task.leaves["mine"]
    assert leaf.fewshot_cfg.split is None and leaf.config.test_split is None
    assert leaf.fewshot_context(leaf.eval_docs[0], 4).count("train") == 4
    with pytest.raises(Refusal, match=r"--num_fewshot 5: mine has 4 few-shot examples: 4 at most"):
        registry.build(**asked, n_shots={"": 5})


def test_items_that_share_a_source_are_known():
    assert definition.clusters_of({"source_id": "activity~1"}) == "source_id activity~1"
    assert (
        definition.clusters_of({"question": "x"}) is None
        and definition.clusters_of({"document": "torch/nn.py"}) == "document torch/nn.py"
    )


@pytest.mark.parametrize(
    "answer, reference, score",
    [("the mean of x", "The mean of X.", 1.0), ("nothing", "else", 0.0), ("a b", "a c d e", 1 / 3)],
)
def test_word_overlap(answer, reference, score):
    assert embedded.word_f1(answer, reference) == pytest.approx(score)


def test_text_of_ones_own(tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(10)))
    task = registry.text_task("own", str(path))
    assert len(task.items("own")) == 10 and task.version == "1.0"
    with pytest.raises(Refusal, match="choose another name"):
        registry.text_task("embedded_docs", str(path))
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(f"Story {i}." for i in range(10)))
    assert {item["text"] for item in registry.text_task("own", str(tmp_path / "stories.txt")).items("own")} == {
        f"Story {i}." for i in range(10)
    }
    path.write_bytes(path.read_bytes() + b'{"text": "\\ud83d"}\n{"text": null}\n')
    assert len(registry.text_task("own", str(path)).items("own")) == 10
    assert (
        "not read  own: 1 not UTF-8 (own.jsonl:11)\nnot read  own: 1 null text (own.jsonl:12)\n"
        in capsys.readouterr().out
    )
    begins = [" " * (definition.DOCUMENT_CHARACTERS + missing) + "Words." for missing in (0, -1)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in begins))
    (item,) = registry.text_task("own", str(path)).items("own")
    assert item["text"].strip() == "W" and definition.sample_texts([{"text": begins[0]}], "own") == []
    assert "not read  own: 1 blank in the first 1,500 characters (own.jsonl:1)\n" in capsys.readouterr().out
    path.write_text('{"text": null}\n')
    with pytest.raises(Refusal, match=r"holds no text: 1 null text \(own.jsonl:1\)"):
        registry.text_task("own", str(path))


def test_humaneval_passes_what_is_right_and_nothing_else():
    (task,) = registry.build(["embedded_humaneval"], {}, {}, False)
    leaf = task.leaves["embedded_humaneval"]
    items = task.items("embedded_humaneval")
    assert task.unsafe and len(items) == 164
    for item in items[::20]:
        assert leaf.process_results(item, [item["canonical_solution"]]) == {"pass@1": 1.0}
        assert leaf.process_results(item, ["    return 'wrong'\n"]) == {"pass@1": 0.0}


def test_text_has_no_examples(capsys):
    [text, other] = registry.build(["embedded_docs", "embedded_next_sentence"], {}, {"": 2}, False)
    assert (text.n_shot, other.n_shot) == (
        0,
        2,
    ) and "examples  embedded_docs is text and has none" in capsys.readouterr().out
    with pytest.raises(Refusal, match="--num_fewshot embedded_docs=2: embedded_docs is text, which has no examples"):
        registry.build(["embedded_docs"], {}, {"embedded_docs": 2}, False)


def test_a_text_says_what_of_it_is_read(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/rows.jsonl").write_text(json.dumps({"id": "a", "content": "Words in another column."}))
    (tmp_path / "texts/picture.png").write_bytes(b"\x89PNG\0")
    task = registry.text_task("mine", str(tmp_path / "texts"))
    assert [item["text"] for item in task.items("mine")] == ["Words in another column."]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "text      mine: 1 file, 50 bytes: 1 .jsonl, the text of rows from column 'content'; not read: 1 .png ("
    )
    assert "--" not in line
    (tmp_path / "void").mkdir()
    with pytest.raises(Refusal, match=f"^--texts mine={tmp_path}/void: that folder holds no file that is not hidden"):
        registry.text_task("mine", str(tmp_path / "void"))
