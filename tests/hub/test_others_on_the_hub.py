"""Others write to the repository of a run, too: nothing that they commit, tag or edit keeps a revision back, and what
they put there stays.
"""

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from environment import HUB
from hub_server import Fault
from huggingface_hub import HfApi

from llama_lite.errors import Refusal
from llama_lite.evaluation import push_scores, resolve, store
from llama_lite.files import append_jsonl, read_jsonl, write_text
from llama_lite.hub import publish_queue
from llama_lite.hub.client import HubUnavailable
from llama_lite.hub.publish_queue import Publisher
from llama_lite.hub.repository import Repository
from llama_lite.hub.revision import FORMAT, newest_first, step_of, tag_of
from llama_lite.models import references
from llama_lite.studies import publish as study_report

IDENTITY = {kind: {} for kind in ("model", "hyperparameters", "data", "layout", "environment")}
CARD = "---\nlicense: mit\n---\n\n# A card\n\n<!-- yours: begin -->\n<!-- yours: end -->\n"


def revision(folder: Path, step: int, run: str = "ours", more: dict[str, bytes] | None = None) -> dict[str, Path]:
    """{path in the revision: file} of a small revision, as `write_revision` gives it. more: further files."""
    content = {
        "model.safetensors": b"weights of %d" % step,
        "config.json": b'{"step": %d}' % step,
        "README.md": CARD.encode(),
        **(more or {}),
    }
    record = {"format": FORMAT, "run": run, "step": step, "tokens": 1024 * step, "identity": IDENTITY}
    record["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()
    }
    folder = folder / f"{run}-{step}"
    folder.mkdir(exist_ok=True)
    for name, data in {**content, "revision.json": json.dumps(record).encode()}.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in (*content, "revision.json")}


def publish(repository: Repository, files: dict[str, Path], final: bool = False) -> str:
    """Publish as the queue does; returns the tag."""
    tag = repository.claim(json.loads(files["revision.json"].read_text())["step"])
    repository.publish(files, tag, final, {"loss": 1.0, "eval_loss": ""}, {"README.md": files["README.md"]})
    return tag


@pytest.fixture
def shared_repo(hub) -> tuple[str, object]:
    """(id, the server's side) of a fresh repository."""
    name = f"org/shared-{len(hub.repos)}"
    HfApi().create_repo(name)
    return name, hub.repos["models", name]


def put(name: str, path: str, data: bytes, branch: str = "main") -> None:
    """Somebody's commit of one file, as the server takes it: the client would not send a card that is no text."""
    there = HUB.repos["models", name]
    there.commit(
        branch, {**there.commits[there.branches[branch]]["files"], path: (HUB.store(data), len(data), False)}, "Theirs"
    )


def rows(hub, name: str) -> list[tuple[str, str]]:
    return [
        (row["revision"], row["commit"])
        for row in csv.DictReader(io.StringIO(hub.files(name)["checkpoints.csv"].decode()))
    ]


def ours_at(hub, name: str, tag: str, files: dict[str, Path]) -> bool:
    there = hub.files(name, tag)
    return there.pop(".gitattributes") is not None and there == {
        path: file.read_bytes() for path, file in files.items()
    }


def test_tags_of_our_form_are_ordered_by_their_numbers():
    names = [
        "step-999000",
        "step-1000000",
        "step-000250",
        "step-000250-2",
        "step-000250-10",
        "step-best",
        "step-250",
        "step-000250-1",
        "step-٠٠٠٢٥٠",
    ]
    assert [tag for tag, _ in newest_first(dict.fromkeys(names, "c"))] == [
        "step-1000000", "step-999000", "step-000250-10", "step-000250-2", "step-000250"
    ]  # fmt: skip
    assert step_of(tag_of(7, 3)) == (7, 3) and step_of("step-250") is None


@pytest.mark.parametrize("path", ["notes.txt", "model.safetensors", "revision.json"])
def test_a_commit_between_ours_and_its_tag(hub, shared_repo, tmp_path, path):
    """The head then carries our record (or nobody's): ours is the commit whose tree is ours, and is not made twice."""
    name, there = shared_repo
    repository, first, second = Repository(name, None, "ours"), revision(tmp_path, 5), revision(tmp_path, 10)
    publish(repository, first)
    hub.faults.append(Fault("POST .*/tag/", 503, 1))
    with pytest.raises(HubUnavailable):
        publish(repository, second)
    made = there.branches["checkpoints"]
    put(name, path, b"[]", "checkpoints")
    put(name, "more.txt", b"more", "checkpoints")
    again = Repository(name, None, "ours")  # the process may be another one
    assert (
        publish(again, second) == "step-000010"
        and there.tags["step-000010"] == made
        and ours_at(hub, name, "step-000010", second)
    )
    third = revision(tmp_path, 12)
    publish(again, third, final=True)
    assert ours_at(hub, name, "step-000012", third) and rows(hub, name) == sorted(there.tags.items())


def test_a_writer_that_is_always_faster(hub, shared_repo, tmp_path, monkeypatch):
    """Somebody commits between our look at the branch and our commit, and behind our commit before its tag."""
    name, there = shared_repo
    repository, files, replace, tag = (
        Repository(name, None, "ours"),
        revision(tmp_path, 5),
        Repository._replace,
        Repository._tag,
    )
    acts = iter(range(6))

    def racing(self, branch, *arguments):
        if next(acts, 9) < 3:
            put(name, f"{len(there.commits)}.txt", b"x", branch)
        return replace(self, branch, *arguments)

    def overtaken(self, *arguments):
        put(name, f"{len(there.commits)}.txt", b"x", "checkpoints")
        return tag(self, *arguments)

    monkeypatch.setattr(Repository, "_replace", racing)
    monkeypatch.setattr(Repository, "_tag", overtaken)
    tries = 0
    while "checkpoints.csv" not in hub.files(name):
        tries += 1
        try:
            publish(repository, files)
        except HubUnavailable as error:
            assert tries < 8, error
    assert ours_at(hub, name, "step-000005", files) and rows(hub, name) == [("step-000005", there.tags["step-000005"])]
    assert sum(commit["title"].startswith("Checkpoint of step 5") for commit in there.commits.values()) == 1


def test_a_tag_of_ours_on_other_content_stays(hub, shared_repo, tmp_path):
    """Before we come, on main; on an altered copy of ours; and between our look and our tag."""
    name, there = shared_repo
    repository, files = Repository(name, None, "ours"), {step: revision(tmp_path, step) for step in (5, 10, 12)}
    there.tags["step-000005"] = theirs = there.branches["main"]
    assert publish(repository, files[5]) == "step-000005-2" == publish(Repository(name, None, "ours"), files[5])
    hub.faults.append(Fault("POST .*/tag/", 503, 1))
    with pytest.raises(HubUnavailable):
        publish(repository, files[10])
    put(name, "config.json", b'{"step": 11}', "checkpoints")  # of the same size
    there.tags["step-000010"] = altered = there.branches["checkpoints"]
    assert publish(repository, files[10]) == "step-000010-2"
    tag = repository.claim(12)
    there.tags["step-000012"] = theirs
    with pytest.raises(HubUnavailable, match="somebody else made the tag step-000012 meanwhile"):
        repository.publish(files[12], tag, True, {}, {"README.md": files[12]["README.md"]})
    assert publish(repository, files[12], final=True) == "step-000012-2"
    assert there.tags["step-000005"] == there.tags["step-000012"] == theirs and there.tags["step-000010"] == altered
    assert all(ours_at(hub, name, f"{tag_of(step)}-2", files[step]) for step in files)
    assert rows(hub, name) == [(f"{tag_of(step)}-2", there.tags[f"{tag_of(step)}-2"]) for step in files]
    assert hub.files(name)["model.safetensors"] == b"weights of 12"


OTHERS = {  # what somebody does when the first revision is there
    "record deleted": lambda name, there: HfApi().delete_file("revision.json", name, revision="checkpoints"),
    "record of another run": lambda name, there: put(
        name, "revision.json", json.dumps({"format": FORMAT, "run": "b", "step": 5, "tokens": 5, "identity": IDENTITY, "files": {}}).encode(), "checkpoints"
    ),
    "branch deleted": lambda name, there: there.branches.pop("checkpoints"),
    "branch moved back": lambda name, there: there.branches.update(checkpoints=there.branches["main"]),
    "branches of our names": lambda name, there: there.branches.update({tag_of(step): there.branches["main"] for step in (5, 10, 12)}),
    "tags of the branches' names": lambda name, there: there.tags.update(main=there.tags["step-000005"], checkpoints=there.branches["main"]),
    "no table": lambda name, there: put(name, "checkpoints.csv", b"a,b\n1,2\n"),
    "table deleted": lambda name, there: HfApi().delete_file("checkpoints.csv", name),
    "table of bytes": lambda name, there: put(name, "checkpoints.csv", b"step\0,\xff\n\"1,2\n"),
    "marks of the card": lambda name, there: put(name, "README.md", b"# Mine\n<!-- yours: begin -->\nmy words\n"),
    "a card of bytes": lambda name, there: put(name, "README.md", b"---\nlicense: [\n---\nmy words \xff"),
    "a record of main": lambda name, there: put(name, "revision.json", b'["mine"]'),
    "files of main": lambda name, there: put(name, "notes.txt", b"my words"),
}  # fmt: skip


@pytest.mark.parametrize("act", OTHERS.values(), ids=OTHERS)
def test_no_edit_keeps_a_revision_back(hub, shared_repo, tmp_path, act):
    name, there = shared_repo
    put(name, "mine.md", b"before the first revision")
    files = {step: revision(tmp_path, step) for step in (5, 10, 12)}
    publish(Repository(name, None, "ours"), files[5])
    act(name, there)
    repository = Repository(name, None, "ours")
    publish(repository, files[10])
    publish(repository, files[12], final=True)
    tags = {tag: commit for tag, commit in there.tags.items() if step_of(tag)}
    assert sorted(tags) == ["step-000005", "step-000010", "step-000012"] and rows(hub, name) == sorted(tags.items())
    assert all(ours_at(hub, name, tags[tag_of(step)], files[step]) for step in files)
    main = hub.files(name, there.branches["main"])
    assert (
        main["mine.md"] == b"before the first revision"
        and b"my words" in main["README.md"] + main.get("notes.txt", b"") + main["revision.json"] + b"my words"
    )
    with pytest.raises(Refusal, match=r"belongs to another run \(ours, this is other\)"):
        Repository(name, None, "other").prepare()


def test_what_a_person_put_on_main_stays(hub, shared_repo, tmp_path):
    """Their words go between the marks of the card, and their model is not written over: ours is at its tag, which is
    said.
    """
    name, there = shared_repo
    put(name, "README.md", b"---\nlicense: mit\n---\n# Mine\n\nmy words\n")
    put(name, "model.safetensors", b"their weights")
    put(name, "checkpoints.csv", b"step,tokens,loss,eval_loss,revision,commit\n7,,,,step-best,abc\n")
    repository, files = Repository(name, None, "ours"), revision(tmp_path, 5)
    publish(repository, files, final=True)
    main = hub.files(name)
    assert main["model.safetensors"] == b"their weights" and "revision.json" not in main and "config.json" not in main
    assert b"<!-- yours: begin -->\n# Mine\n\nmy words\n<!-- yours: end -->" in main["README.md"]
    assert rows(hub, name) == [("step-000005", there.tags["step-000005"]), ("step-best", "abc")]
    assert len(repository.reported) == 1
    assert repository.reported.pop().startswith(
        f"model.safetensors on main of {name} is somebody else's and is kept: the finished model is {name}@step-000005"
        " (rev"
    )


@pytest.mark.parametrize("path", ["model.safetensors", "config.json", "README.md", "chat_template.jinja"])
def test_what_a_person_put_on_main_after_a_finish_stays(hub, shared_repo, tmp_path, path):
    """A later finish (of more steps) replaces what is still as this run put it there, and nothing else."""
    name, there = shared_repo
    repository = Repository(name, None, "ours")
    old = revision(
        tmp_path,
        5,
        more={"chat_template.jinja": b"{{ of the earlier finish }}", "merges.txt": b"of the earlier finish"},
    )
    publish(repository, old, final=True)
    theirs = (
        b"# Mine, and nobody else's\n" if path == "README.md" else bytes(reversed(old[path].read_bytes()))
    )  # of the same size
    put(name, path, theirs)
    new = revision(tmp_path, 12)
    publish(Repository(name, None, "ours"), new, final=True)
    publish(repository, new, final=True)  # once more, by another process
    main = hub.files(name)
    assert (
        theirs.strip() in main[path]
        and rows(hub, name) == sorted(there.tags.items())
        and ours_at(hub, name, "step-000012", new)
    )
    if path in ("model.safetensors", "config.json"):  # one of the model's: then the earlier model stays whole
        assert (
            main["merges.txt"] == b"of the earlier finish"
            and main["revision.json"] != new["revision.json"].read_bytes()
        )
        assert [text.partition(" on main")[0] for text in repository.reported] == [path]
        assert (
            "(revision='step-000012'). To have it on main, remove that file and upload the files of the revision"
            in repository.reported.pop()
        )
    else:
        assert main["model.safetensors"] == b"weights of 12" and "merges.txt" not in main and not repository.reported


def test_a_figure_of_a_person_stays_and_is_told(hub, shared_repo, tmp_path):
    name, _ = shared_repo
    repository = Repository(name, None, "ours")
    cover = {
        "README.md": tmp_path / "README.md",
        "figures/loss.png": tmp_path / "loss.png",
        "figures/rate.png": tmp_path / "rate.png",
    }

    def draw(text: bytes) -> None:
        for path in cover.values():
            path.write_bytes(CARD.encode() + text if path.suffix == ".md" else text)

    draw(b"first")
    assert repository.publish_card(cover) and not repository.publish_card(cover)
    put(name, "figures/loss.png", b"theirs")
    draw(b"second")
    assert repository.publish_card(cover) and not repository.publish_card(cover)
    main = hub.files(name)
    assert (
        main["figures/loss.png"] == b"theirs"
        and main["figures/rate.png"] == b"second"
        and main["README.md"].endswith(b"second")
    )
    assert repository.reported == {
        f"figures/loss.png on main of {name} is somebody else's and is kept: move it away, and --publish_only publishes"
        " this run's own"
    }
    HfApi().delete_file("figures/loss.png", name)
    assert repository.publish_card(cover) and hub.files(name)["figures/loss.png"] == b"second"


def test_what_was_published_and_is_not_there_any_more(hub, pretrain, tmp_path, capsys, monkeypatch):
    """`published.jsonl` is held against the repository: a tag deleted, a tag moved, the repository renamed, deleted,
    and deleted for good.
    """
    monkeypatch.setattr("model_card.card.draw", lambda records: None)  # the figures would be most of the time
    name = f"org/changed-{len(hub.repos)}"
    changes = {"push_to_hub": True, "hub_model_id": name, "hub_drain_timeout": 600}
    run = pretrain(tmp_path / "run", **changes)  # checkpoints 10 and 12 stay here
    there = hub.repos["models", name]
    before, branches = dict(there.tags), dict(there.branches)

    def publish_again(**other) -> str:
        capsys.readouterr()
        pretrain(run, "--publish_only", **{**changes, **other})
        return capsys.readouterr().out

    def record() -> list[tuple]:
        return [
            (row["step"], row["repo"], row["revision"], row["commit"]) for row in read_jsonl(run / "published.jsonl")
        ]

    recorded = record()
    assert "is tagged again" not in publish_again() and record() == recorded

    del there.tags["step-000005"], there.tags["step-000012"]
    said = publish_again()
    assert (
        f"hub       {name}@step-000005 was deleted; it is tagged again" in said
        and f"everything in {run} is published\n" in said
    )
    assert there.tags == before and there.branches == branches and record() == recorded

    there.tags["step-000010"] = there.branches["main"]
    said = publish_again()
    assert (
        f"hub       {name}@step-000010 is now somebody else's tag and is kept: this run's revision is step-000010-2"
        in said
    )
    assert there.tags == {**before, "step-000010": branches["main"], "step-000010-2": before["step-000010"]}
    moved = (10, name, "step-000010-2", before["step-000010"])
    assert record() == [recorded[0], moved, recorded[2]] and rows(hub, name) == [one[2:] for one in record()]
    losses = [row["eval_loss"] for row in csv.DictReader(io.StringIO(hub.files(name)["checkpoints.csv"].decode()))]
    assert losses[:2] == ["", ""] and float(losses[2]) > 0  # evaluated at 6 and 12, published at 5, 10 and 12
    assert (
        "`step-000010-2`" in hub.files(name)["README.md"].decode()
        and "`step-000010`" not in hub.files(name)["README.md"].decode()
    )

    renamed = f"{name}-renamed"
    hub.repos["models", renamed] = hub.repos.pop(("models", name))
    tags = dict(there.tags)
    said = publish_again(hub_model_id=renamed)
    assert (
        "gone" not in said
        and there.tags == tags
        and record() == [(step, renamed, tag, commit) for step, _, tag, commit in [recorded[0], moved, recorded[2]]]
    )

    del hub.repos["models", renamed]
    said = publish_again(hub_model_id=renamed)
    assert (
        f"WARNING   step-000005, step-000010, step-000012 of {renamed} was published, but is no longer there (deleted,"
        " or the repository was created again): step-000010, step-000012 will be published again; step-000005 cannot be:"
        " no checkpoint here\n" in said
    )
    assert (
        f"everything in {run} is published, except 1 revisions that are gone from the Hub and from this machine\n"
        in said
    )
    anew = hub.repos["models", renamed]
    assert [(step, tag, commit) for step, _, tag, commit in record()] == [
        (10, "step-000010", anew.tags["step-000010"]),
        (12, "step-000012", anew.tags["step-000012"]),
    ]
    assert rows(hub, renamed) == sorted(anew.tags.items())
    assert hub.files(renamed)["model.safetensors"] == hub.files(renamed, "step-000012")["model.safetensors"]

    shutil.rmtree(run / "checkpoint-10")  # a commit that no branch holds any more, and its tag: gone from both
    anew.branches["checkpoints"] = anew.branches["main"]
    anew.commits.pop(anew.tags.pop("step-000010"))
    assert "step-000010 of" in publish_again(hub_model_id=renamed) and [one[0] for one in record()] == [12]


def test_what_else_people_keep_beside_prepared_tokens_stays(hub, pretrain, tmp_path):
    name = f"org/beside-{len(hub.repos)}"
    HfApi().create_repo(name, repo_type="dataset")
    there = hub.repos["datasets", name]
    theirs = {"notes/plan.txt": b"my plan", "README.md": b"# Mine\n\nmy words\n"}
    there.commit("main", {path: (hub.store(data), len(data), False) for path, data in theirs.items()}, "Theirs")
    pretrain(tmp_path / "run", "--prepare_only", push_to_hub=True, prepared_hub_id=name)
    files = hub.files(name, kind="datasets")
    assert files["notes/plan.txt"] == b"my plan" and "manifest.json" in files
    assert b"<!-- yours: begin -->\n# Mine\n\nmy words\n<!-- yours: end -->" in files["README.md"]
    record = json.loads(files["revision.json"])
    for change in (
        {"files": [1]},
        {"files": {"../../out": {"size": 1, "sha256": "0" * 64}}},
        {"files": {"recipe.json": {"size": "1"}}},
    ):
        data = json.dumps({**record, **change}).encode()
        entries = there.commits[there.branches["main"]]["files"]
        there.commit("main", {**entries, "revision.json": (hub.store(data), len(data), False)}, "Theirs")
        with pytest.raises(Refusal, match=f"revision.json of {name} does not say which files are its own"):
            pretrain(tmp_path / "run", "--prepare_only", prepared_hub_id=name, prepared_dir=str(tmp_path / "pulled"))


def evaluated(
    name: str, files: dict[str, Path], there, tmp_path: Path, value: float = 0.5, tag: str = "step-000005"
) -> tuple:
    """(the Model of a repository's revision, [a record of its score on task t])."""
    folder = tmp_path / "located" / tag
    folder.mkdir(parents=True, exist_ok=True)
    for path, file in files.items():
        (folder / path).write_bytes(file.read_bytes())
    model = resolve.Model("m", references.Located(f"{name}@{tag}", folder, name, tag, there.tags[tag]))
    record = {"model": "m", "task": "t", "metrics": {"acc": {"value": value, "stderr": 0.1, "n": 4}}, "dataset": "o/t"}
    record |= {
        "n_shot": 0,
        "dtype": "float32",
        "harness": "lm-eval 0.4.13",
        "date": "2026-01-01",
        **store.where_from(model),
    }
    return model, [record]


def test_a_card_that_cannot_be_read_keeps_no_scores_back(hub, shared_repo, tmp_path, capsys):
    name, there = shared_repo
    repository, files = Repository(name, None, "ours"), revision(tmp_path, 5)
    publish(repository, files, final=True)
    put(name, "README.md", b"---\nlicense: [\n---\nmy words")
    push_scores.push_scores([evaluated(name, files, there, tmp_path)])
    assert "gets no scores: its metadata cannot be read" in capsys.readouterr().out
    main = hub.files(name)
    assert main["README.md"] == b"---\nlicense: [\n---\nmy words" and b"step-000005" in main["scores.csv"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (
            ["step-999000", "step-1000000", "step-best", "step-000500", "step-000500-2", "v1"],
            ["step-000500-2", "step-999000", "step-1000000"],
        ),
        (["step-1000", "step-200", "step-last"], ["step-200", "step-1000"]),  # of another project
    ],
)
def test_all_steps_are_evaluated_in_the_order_of_their_numbers(hub, shared_repo, tags, expected):
    name, there = shared_repo
    there.tags |= dict.fromkeys(tags, there.branches["main"])
    assert resolve._expand_steps(f"{name}@step-*", "--models") == [f"{name}@{tag}" for tag in expected]


def test_all_steps_are_those_of_the_repositorys_run(hub, shared_repo, tmp_path, capsys):
    name, there = shared_repo
    repository = Repository(name, None, "ours")
    for step in (5, 10):
        publish(repository, revision(tmp_path, step))
    repository.superseded = {"step-000010"}
    publish(repository, revision(tmp_path, 10, more={"notes.txt": b"made again"}))
    there.branches["theirs"] = there.branches["main"]
    for path, file in revision(tmp_path, 20, run="theirs").items():
        put(name, path, file.read_bytes(), "theirs")
    there.tags |= dict.fromkeys(["step-000007", "step-best", "v1"], there.branches["main"])
    there.tags |= {"step-000020": there.branches["theirs"], "step-5": there.tags["step-000005"]}
    assert resolve._expand_steps(f"{name}@step-*", "--models") == [f"{name}@step-000005", f"{name}@step-000010-2"]
    assert f"step-000007, step-000020, step-best of {name}: no checkpoints of the run" in capsys.readouterr().out


def test_scores_that_others_put_there_stay(hub, shared_repo, tmp_path, capsys):
    name, there = shared_repo
    files = revision(tmp_path, 5)
    publish(Repository(name, None, "ours"), files, final=True)
    theirs = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "t", "type": "o/t"},
        "metrics": [{"type": "acc", "value": 0.9}],
        "source": {"url": "https://example.org/ours"},
    }
    head = {"license": "mit", "thumbnail": "me.png", "model-index": [{"name": "M", "results": [theirs]}]}
    put(name, "README.md", f"---\n{yaml.safe_dump(head)}---\nmy words".encode())
    push_scores.push_scores([evaluated(name, files, there, tmp_path)])
    first = hub.files(name)
    put(
        name,
        "scores.csv",
        first["scores.csv"].replace(b",date\n", b",date,remark\n").replace(b"01-01\n", b"01-01,good\n"),
    )
    push_scores.push_scores([evaluated(name, files, there, tmp_path, 0.25)])
    main = hub.files(name)
    header, *values = (
        yaml.safe_load(main["README.md"].decode().split("---")[1]),
        main["README.md"].endswith(b"my words"),
    )
    results = header["model-index"][0]["results"]
    assert values == [True] and header["thumbnail"] == "me.png" and header["model-index"][0]["name"] == "M"
    assert results[0] == theirs and [result["metrics"][0]["value"] for result in results] == [0.9, 0.25]
    table = list(csv.DictReader(io.StringIO(main["scores.csv"].decode())))
    assert [(row["value"], row["remark"]) for row in table] == [("0.5", "good"), ("0.25", "")]
    assert [yaml.safe_load(one[".eval_results/t.yaml"])[0]["value"] for one in (first, main)] == [0.5, 0.25]

    put(name, ".eval_results/t.yaml", b"[]\n")
    push_scores.push_scores([evaluated(name, files, there, tmp_path, 0.75)])
    assert hub.files(name)[".eval_results/t.yaml"] == b"[]\n" and b",0.75," in hub.files(name)["scores.csv"]
    assert f".eval_results/t.yaml on main of {name} is somebody else's and stays" in capsys.readouterr().out
    put(name, "scores.csv", b"player,points\nme,3\n")
    with pytest.raises(Refusal, match=r"scores\.csv on its main is no table of this project, and is not written over"):
        push_scores.push_scores([evaluated(name, files, there, tmp_path, 0.125)])
    assert hub.files(name)["scores.csv"] == b"player,points\nme,3\n"


def test_scores_of_many_revisions_are_one_commit(hub, shared_repo, tmp_path, capsys):
    """Each was a commit of its own, 150 for a run of 150 revisions. A commit of somebody else costs another try."""
    name, there = shared_repo
    repository, scored = Repository(name, None, "ours"), []
    for step in (5, 10, 12):
        files = revision(tmp_path, step)
        publish(repository, files, final=step == 12)
        scored.append(evaluated(name, files, there, tmp_path, step / 100, tag_of(step)))
    folder = resolve.Model("here", references.Located("here", tmp_path))
    commits = len(there.commits)
    hub.faults.append(Fault("POST .*/commit/main", 412, 1))
    push_scores.push_scores([*scored, (folder, [])])
    assert len(there.commits) == commits + 1
    assert there.commits[there.branches["main"]]["title"] == "Scores of 3 revisions"
    main = hub.files(name)
    table = list(csv.DictReader(io.StringIO(main["scores.csv"].decode())))
    assert [(row["revision"], row["value"]) for row in table] == [
        ("step-000005", "0.05"), ("step-000010", "0.1"), ("step-000012", "0.12")
    ]  # fmt: skip
    header = yaml.safe_load(main["README.md"].decode().split("---")[1])
    (result,) = header["model-index"][0]["results"]  # main's own model alone
    assert result["metrics"][0]["value"] == 0.12 == yaml.safe_load(main[".eval_results/t.yaml"])[0]["value"]
    said = capsys.readouterr().out
    assert f"scores of 3 models (m to m) are on main of {name}" in said and "here is a folder" in said
    hub.faults.append(Fault("POST .*/commit/main", 412))
    with pytest.raises(Refusal, match=f"--push_to_hub {name}: main kept changing"):
        push_scores.push_scores([evaluated(name, revision(tmp_path, 5), there, tmp_path, 0.75)])


def test_main_shows_no_scores_of_weights_that_were_replaced(hub, shared_repo, tmp_path):
    name, there = shared_repo
    repository, files = Repository(name, None, "ours"), revision(tmp_path, 5)
    publish(repository, files, final=True)
    push_scores.push_scores([evaluated(name, files, there, tmp_path)])
    put(name, ".eval_results/theirs.yaml", b"[]\n")
    theirs = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "u", "type": "o/u"},
        "metrics": [{"type": "acc", "value": 0.9}],
    }
    card = hub.files(name)["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    header["model-index"][0]["results"].append(theirs)
    put(name, "README.md", f"---\n{yaml.safe_dump(header)}---{card.split('---', 2)[2]}".encode())

    def shown() -> dict[str, float]:
        results = yaml.safe_load(hub.files(name)["README.md"].decode().split("---")[1])["model-index"][0]["results"]
        return {result["dataset"]["name"]: result["metrics"][0]["value"] for result in results}

    publish(repository, files, final=True)  # the same weights: their scores stay
    publish(repository, revision(tmp_path, 10))
    repository.publish_card({"README.md": files["README.md"]})
    assert shown() == {"t": 0.5, "u": 0.9} and ".eval_results/t.yaml" in hub.files(name)
    publish(repository, revision(tmp_path, 12), final=True)
    main = hub.files(name)
    assert main["model.safetensors"] == b"weights of 12" and shown() == {"u": 0.9}
    assert ".eval_results/t.yaml" not in main and ".eval_results/theirs.yaml" in main
    assert b"step-000005" in main["scores.csv"]


def test_what_others_keep_beside_a_studys_report_stays(hub, tmp_path):
    name = f"org/study-{len(hub.repos)}"
    HfApi().create_repo(name, repo_type="dataset")
    there, out = hub.repos["datasets", name], tmp_path / "study"

    def put_theirs(**files: bytes) -> None:
        entries = {path.replace("__", "."): (hub.store(data), len(data), False) for path, data in files.items()}
        there.commit("main", {**there.commits[there.branches["main"]]["files"], **entries}, "Theirs")

    def push(title: str, results: bytes) -> dict[str, bytes]:
        write_text(out / "report.md", f"# {title}\n\n{results.decode()}")
        (out / "results.csv").write_bytes(results)
        study_report.push(out, name)
        return hub.files(name, kind="datasets")

    (out / "figures").mkdir(parents=True)
    write_text(out / "comparison.json", "[]")
    put_theirs(
        README__md=b"---\nlicense: mit\nconfigs:\n- config_name: mine\n  data_files: a.csv\n---\nmy words", a__csv=b"x"
    )
    push("One", b"first")
    files = push("One", b"second")
    header = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert [config["config_name"] for config in header["configs"]] == ["results", "mine"]
    assert header["license"] == "mit" and header["tags"] == ["llama-lite", "study"]
    card = files["README.md"].decode()
    assert card.endswith("# One\n\nsecond\n\n<!-- yours: begin -->\nmy words\n<!-- yours: end -->\n")
    assert (files["a.csv"], files["results.csv"]) == (b"x", b"second")
    commits = len(there.commits)
    assert push("One", b"second") == files and len(there.commits) == commits  # the same again sends nothing

    with pytest.raises(Refusal, match="holds the report of another study \\(# One\\)"):
        push("Two", b"third")
    put_theirs(results__csv=b"theirs")
    with pytest.raises(Refusal, match=r"holds results\.csv of somebody else, which is not written over"):
        push("One", b"third")
    assert hub.files(name, kind="datasets") == {**files, "results.csv": b"theirs"}

    put_theirs(results__csv=b"theirs", README__md=b"")
    earlier = (study_report.REPORT_HEAD + "# One\n\nold").encode()  # as versions without the marks wrote it
    entries = {path: (hub.store(data), len(data), False) for path, data in {**files, "README.md": earlier}.items()}
    there.commit("main", entries, study_report.COMMIT_TITLE)
    assert push("One", b"third")["README.md"].decode().endswith("third\n\n<!-- yours: begin -->\n<!-- yours: end -->\n")


def test_steps_that_a_run_makes_again_are_published_beside_those_before(hub, shared_repo, tmp_path):
    """They used to be refused ("exists with other content"), which kept all later revisions in the queue."""
    name, there = shared_repo
    run = tmp_path / "run"
    for step in (5, 10):
        (run / f"queue/{tag_of(step)}/checkpoint").mkdir(parents=True)
        append_jsonl(run / "published.jsonl", {"step": step, "repo": name, "revision": tag_of(step), "commit": "c"})
    publish_queue.supersede(run, 5)
    assert [path.name for path in (run / "queue").glob("step-*")] == [tag_of(5)]
    assert [row["step"] for row in read_jsonl(run / "published.jsonl")] == [5]
    assert [row["revision"] for row in read_jsonl(run / "superseded.jsonl")] == [tag_of(10)]
    repository = Repository(name, None, "ours")
    assert publish(repository, revision(tmp_path, 10)) == tag_of(10)
    Publisher(SimpleNamespace(path=run), repository, None, "all", None)
    (tmp_path / "again").mkdir()
    again = revision(tmp_path / "again", 10)
    assert publish(repository, again) == f"{tag_of(10)}-2" == publish(repository, again)
    assert tag_of(10) in there.tags
