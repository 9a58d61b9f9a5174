"""The order in which a run read its data is that of its records, over all of its starts."""

import json
from pathlib import Path

import pytest

from llama_lite.data.dataset import TokenWindows
from llama_lite.data.document_reads import DocumentReads, OrderStretch
from llama_lite.files import read_json
from llama_lite.training.reading_order import order_of_checkpoint, reading_order

DATA = {"order": "shuffled", "block_size": 4, "tokens_per_step": 40, "data_seed": 7, "seed": 1, "data": "w"}
MIXTURE = {"web": {"data": "w", "weight": 0.7}, "code": {"data": "c", "weight": 0.3}}
WHOLE = ({"step": 0},)


def order_of(folder: Path, events: list[dict], log: list[dict] = (), data: dict = DATA):
    for name, records in (("events", events), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return reading_order(folder, {"identity": {"data": data}})


def begins(step: int, data_start: int = 0) -> dict:
    return {"event": "resumed" if step else "started", "step": step, "data_start": data_start}


def changes(**fields) -> dict:
    return {"event": "changed", "kind": "data", "step": 0, "fields": fields}


def test_steps_that_were_made_again_count_once(tmp_path):
    found = order_of(tmp_path, [begins(0), begins(20), begins(10)], [{"step": 9, "loss": 1}, {"step": 14, "loss": 1}])
    assert found.stretches == [OrderStretch(1, 14, DATA, WHOLE)] and found.reached == 14
    assert order_of(tmp_path, []).reached == 0 and order_of(tmp_path, []).stretches == []


def test_a_change_counts_from_its_step_on_and_is_gone_where_the_run_went_back(tmp_path):
    seeded = {**DATA, "data_seed": 8}
    events = [begins(0), changes(data_seed=[7, 8]), begins(20)]
    log = [{"step": 30, "loss": 1}]
    found = order_of(tmp_path, events, log)
    assert found.stretches == [OrderStretch(1, 20, DATA, WHOLE), OrderStretch(21, 30, seeded, WHOLE)]
    assert order_of(tmp_path, [*events, begins(10)], log).stretches == [OrderStretch(1, 30, DATA, WHOLE)]
    again = [*events, changes(data_seed=[7, 8]), begins(20)]
    assert order_of(tmp_path, again, log).stretches == found.stretches
    fresh = order_of(tmp_path, [*events, begins(0)], log)
    assert fresh.stretches == [OrderStretch(1, 30, DATA, WHOLE)]


def test_an_order_that_began_again_counts_from_there(tmp_path):
    found = order_of(tmp_path, [begins(0), begins(20, 20), begins(25, 20)], [{"step": 30}])
    assert found.stretches == [OrderStretch(1, 20, DATA, WHOLE), OrderStretch(21, 30, DATA, ({"step": 20},))]
    taken_over = order_of(tmp_path, [begins(25, 20)], [{"step": 30}])
    assert taken_over.stretches == found.stretches


def test_the_weights_of_a_mixture_and_their_changes_count_from_their_steps_on(tmp_path):
    one = {name: value for name, value in DATA.items() if name != "data"}
    mixed, halves = {**one, "mixture": MIXTURE}, {name: {**part, "weight": 0.5} for name, part in MIXTURE.items()}
    first = {"step": 0, "weights": {"w": 0.7, "c": 0.3}}
    events = [begins(0), changes(mixture=[MIXTURE, halves]), begins(20), begins(30, 30)]
    found = order_of(tmp_path, events, [{"step": 40}], mixed)
    second = {"step": 20, "weights": {"w": 0.5, "c": 0.5}}
    assert [(stretch.first, stretch.last, stretch.history) for stretch in found.stretches] == [
        (1, 20, (first,)),
        (21, 30, (first, second)),
        (31, 40, (first, second, {"step": 30})),
    ]
    became = order_of(
        tmp_path, [begins(0), changes(data=["w", None], mixture=[None, MIXTURE]), begins(20)], [{"step": 21}]
    )
    assert became.stretches[1] == OrderStretch(
        21, 21, mixed, ({"step": 0, "weights": {"w": 1.0}}, {**first, "step": 20})
    )


def test_a_spike_is_of_the_order_of_its_own_start(tmp_path):
    spike = {"event": "spike", "at_step": 25, "step": 24, "loss": 9.0, "sigmas": 7.0}
    found = order_of(tmp_path, [begins(0), changes(data_seed=[7, 8]), begins(20), spike, begins(20)], [{"step": 22}])
    assert found.spikes[0].event == spike and found.spikes[0].stretch.data["data_seed"] == 8
    assert found.stretches == [OrderStretch(1, 22, DATA, WHOLE)]


def test_a_published_checkpoint_has_the_order_of_its_progress():
    assert order_of_checkpoint(DATA, 30, {}).stretches == [OrderStretch(1, 30, DATA, WHOLE)]
    assert order_of_checkpoint(DATA, 30, {"data_start": 20}).stretches == [
        OrderStretch(1, 20, DATA, WHOLE),
        OrderStretch(21, 30, DATA, ({"step": 20},)),
    ]
    history = [{"step": 0, "weights": {"w": 1.0}}, {"step": 4}]
    mixed = {**DATA, "mixture": MIXTURE}
    assert order_of_checkpoint(mixed, 9, {"order_history": history}).stretches == [
        OrderStretch(1, 9, mixed, tuple(history))
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_records_of_a_run_name_the_windows_that_it_read(pretrain, settings, tmp_path, monkeypatch):
    """A run that is stopped, goes on with another seed, and begins its order again."""
    read: list[int] = []
    fetch = TokenWindows.__getitem__

    def recorded(self, position):
        if self.order.kind == "shuffled":
            read.append(self.window_of(position))
        return fetch(self, position)

    monkeypatch.setattr(TokenWindows, "__getitem__", recorded)
    # training alone is shuffled
    changed = {
        "eval_strategy": "no",
        "eval_order": "sequential",
        "save_steps": 2,
        "logging_steps": 1,
        "sample_tokens": 0,
    }
    run, taken = tmp_path / "run", []
    for steps, more in (
        (2, {}),
        (4, {"data_seed": 5, "allow_changes": "data_seed,max_steps"}),
        (6, {"data_seed": 5, "resume_without": "data", "allow_changes": "max_steps"}),
    ):
        read.clear()
        pretrain(run, max_steps=steps, **changed, **more)
        taken.append(read[:32])
    order = reading_order(run, read_json(run / "run.json"))
    manifest = read_json(Path(settings["prepared_dir"]) / "manifest.json")
    reads = DocumentReads({manifest["fingerprint"]: (Path(settings["prepared_dir"]), manifest)}, order.stretches)
    assert order.reached == 6 and len(order.stretches) == 3
    found = [[window.window for window, _ in reads.reads(step)] for step in range(1, 7)]
    assert [found[0] + found[1], found[2] + found[3], found[4] + found[5]] == taken
