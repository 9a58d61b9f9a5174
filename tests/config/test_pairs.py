"""Lists of NAME=VALUE, on the command line and as a mapping in YAML."""

import math

import pytest
from helpers import config_file

from llama_lite.config.pairs import epoch_limits, hub_ids, mixture_weights, validation_folders
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.errors import Refusal


def test_a_mapping_in_yaml_is_the_list_of_the_command_line(tmp_path):
    settings = {
        "mixture": {"data/web": 0.7, "data/code": 0.3},
        "validation": {"science": "data/science"},
        "allow_epochs_of": {"data/code": 4, "data/web": None},
        "prepared_hub_id": {"data/web": "you/web@main", "data/code": "you/code"},
    }
    _, data, _, _, run, _ = parse_pretrain(["--config", str(config_file(tmp_path, settings))])
    assert mixture_weights(data.mixture) == settings["mixture"]
    assert validation_folders(data.validation) == settings["validation"]
    assert epoch_limits(run.allow_epochs_of) == {"data/code": 4, "data/web": math.inf}
    assert hub_ids(data.prepared_hub_id) == settings["prepared_hub_id"]
    argv = ["--mixture", "data/web=0.7", "data/code=0.3", "--validation", "science=data/science"]
    _, typed, *_ = parse_pretrain(argv)
    assert sorted(typed.mixture) == sorted(data.mixture) and typed.validation == data.validation


def test_the_home_folder_of_a_pair_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    _, data, *_ = parse_pretrain(["--mixture", "~/web=0.7", "code=0.3", "--validation", "s=~/s"])
    assert data.mixture == ["/home/me/web=0.7", "code=0.3"] and data.validation == ["s=/home/me/s"]


WRONG = [
    (
        ["--mixture", "data/web", "data/code=x"],
        "--mixture data/web: give each folder its weight.*--mixture data/code=x",
    ),
    (["--mixture", "a=0.5", "a=0.5"], "--mixture a: given twice"),
    (["--mixture", "a=0.5,b=0.5"], "separate the items of a list by spaces"),
    (["--mixture", "a=1", "--allow_epochs_of", "b", "a=0"], "allow_epochs_of a=0: give a folder"),
    (["--mixture", "a=1", "--prepared_hub_id", "b=you/b"], "--prepared_hub_id b: not a folder of --mixture"),
    (["--mixture", "a=1", "--min_score", "3"], "--min_score would prepare a text"),
    (["--validation", "data/code"], "--validation data/code: give a name and a prepared folder, as code=data/code"),
    (["--validation", "end=x", "a/b=x"], "--validation end: .*--validation a/b: a name has letters"),
    (["--validation", "a=x", "a=y"], "--validation a: given twice"),
    (["--allow_epochs_of", "a"], "--allow_epochs_of is for a --mixture"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG)
def test_pairs_that_cannot_be_are_refused(argv, message):
    with pytest.raises(Refusal, match=message):
        parse_pretrain(argv)
