"""Code that comes with a model, a tokenizer, a generation config or a metric is never run, and nobody is asked: what
needs it is refused by name.
"""

import ast
import builtins
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from llama_lite.data import tokenizer
from llama_lite.errors import Refusal
from llama_lite.evaluation import metrics
from llama_lite.evaluation.tasks import registry
from llama_lite.models import loading, presets, references

SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if not {"tests", ".venv"} & set(path.relative_to(ROOT).parts)]


def test_every_loading_call_says_that_no_code_is_run():
    """`AutoX.from_pretrained`, `AutoX.from_config`, the plain tokenizer's and `generate` with trust_remote_code=False;
    `torch.load` of weights alone; no metric of the Hub.
    """
    seen, wrong = 0, []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name == "generate" or (
                name in ("from_pretrained", "from_config") and owner.startswith(("Auto", "PreTrainedTokenizerFast"))
            ):
                seen += 1
                fits = given.get("trust_remote_code") == "False"
            elif owner == "torch" and name == "load":
                fits = given.get("weights_only") == "True"
            elif name in ("from_pretrained", "from_config"):
                fits = owner in (
                    "PeftModel",
                    "GenerationConfig",
                )  # read JSON and safetensors, and take no such argument
            else:
                fits = not (owner == "evaluate" and name == "load") and given.get("trust_remote_code") != "True"
            if not fits:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {owner}.{name}")
    assert seen > 15 and not wrong, wrong


@pytest.fixture
def foreign(base, tmp_path, monkeypatch):
    """`foreign(name, file, **fields)`: a copy of a base with code beside it that leaves a mark, and fields changed in
    one of its JSON files.
    """

    def copy(name, file, **fields):
        folder = shutil.copytree(base, tmp_path / name)
        for module in ("configuration_nano", "modeling_nano", "tokenization_nano"):
            (folder / f"{module}.py").write_text(
                f"open({str(tmp_path / 'ran')!r}, 'w').write('code of the model ran')\nraise SystemExit(9)\n"
            )
        (folder / "custom_generate").mkdir()
        shutil.copyfile(folder / "modeling_nano.py", folder / "custom_generate/generate.py")
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))
        return folder

    monkeypatch.setattr(builtins, "input", lambda *asked: pytest.fail(f"somebody is asked: {asked}"))
    yield copy
    assert not (tmp_path / "ran").exists()


OWN = {"AutoConfig": "configuration_nano.NanoConfig", "AutoModelForCausalLM": "modeling_nano.Nano"}
ELSEWHERE = {
    "AutoConfig": "other/repo--configuration_nano.NanoConfig",
    "AutoModelForCausalLM": "other/repo--modeling_nano.Nano",
}


@pytest.mark.parametrize("auto_map", [OWN, ELSEWHERE])
def test_a_model_of_its_own_code_is_refused_everywhere(foreign, auto_map):
    folder = foreign("nano", "config.json", model_type="mynanogpt", auto_map=auto_map)
    expected_message = (
        r"nano needs custom code \(auto_map in its config\.json; mynanogpt is not a class of transformers\)"
    )
    for load in (references.load_config, loading.load_model):
        with pytest.raises(Refusal, match=expected_message):
            load(references.locate(str(folder)))
    with pytest.raises(Refusal, match=expected_message):
        presets.load_model_config(str(folder))


@pytest.mark.parametrize("auto_map", [OWN, ELSEWHERE])
def test_a_native_class_is_used_where_there_is_one(foreign, auto_map):
    folder = foreign("known", "config.json", auto_map=auto_map)
    model = loading.load_model(references.locate(str(folder)))
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert (
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0, trust_remote_code=False).shape[1] >= 3
    )


def test_tokenizers_of_their_own_code_are_refused(foreign):
    folder = foreign(
        "own",
        "tokenizer_config.json",
        tokenizer_class="NanoTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_nano.NanoTokenizer", None]},
    )
    with pytest.raises(
        Refusal, match=r"own needs custom code \(auto_map in its tokenizer_config\.json; NanoTokenizer is"
    ):
        loading.load_tokenizer(references.locate(str(folder)))
    with pytest.raises(Refusal, match=r"--tokenizer .*own"):
        tokenizer.load_tokenizer(str(folder))
    native = foreign(
        "native", "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_nano.NanoTokenizer", None]}
    )
    assert loading.load_tokenizer(references.locate(str(native)))("The")["input_ids"]


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_models_are_refused_by_name(foreign, method):
    folder = foreign(
        method, "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True}
    )
    with pytest.raises(Refusal, match=rf"{method} is quantized \({method}, quantization_config in its config\.json\)"):
        loading.load_model(references.locate(str(folder)))


# ---- metrics ----


def test_metrics_of_the_hub_are_local_equals_or_refused():
    metrics.local_metrics()
    import evaluate

    assert evaluate.load("accuracy").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0]) == {"accuracy": 0.75}
    assert evaluate.load("f1").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0]) == {
        "f1": pytest.approx(2 / 3)
    }
    assert evaluate.load("f1").compute(predictions=[2, 1], references=[2, 0], average="micro") == {"f1": 0.5}
    found = evaluate.load("rouge").compute(
        predictions=["the cat sat"], references=["the cat sat down"], use_aggregator=False
    )
    assert found["rouge1"] == [pytest.approx(6 / 7)] and found["rouge2"] == [pytest.approx(4 / 5)]
    with pytest.raises(Refusal, match=r"the code of its metric bertscore would be downloaded from the Hub and run"):
        evaluate.load("bertscore")


def test_a_task_is_refused_for_the_metrics_that_it_uses_and_for_no_other(tmp_path):
    """meqsum loads its metrics when it is read; kobest's and polemo2's are here."""
    with pytest.raises(
        Refusal,
        match=(
            r"--tasks meqsum: the code of its metric bleu would be downloaded from the Hub and run, which this project"
            r" never does"
        ),
    ):
        registry.build(["meqsum"], {}, {}, False)
    rows = {
        "kobest_boolq": {"paragraph": "a", "question": "b", "label": 1},
        "polemo2_in": {"sentence": "a", "target": "__label__meta_zero"},
    }
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    built = registry.build(
        ["kobest_boolq", "polemo2_in"],
        {name: str(tmp_path / name) for name in ("kobest_boolq", "polemo2_in")},
        {"": 0},
        False,
    )
    leaf = built[1].leaves["polemo2_in"]
    assert leaf._metric_fn_list["f1"](references=["1"], predictions=["1"], average="micro") == {"f1": 1.0}


def test_what_functions_load_is_read_from_their_source():
    """squadv2 loads its metric inside a function; of darija's file only some functions load one."""
    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    assert metrics._loaded_by(str(folder / "squadv2/task.py"), None) == {"squad_v2"}
    assert metrics._loaded_by(str(folder / "scrolls/task.py"), None) == {"of its own"}
    darija = str(folder / "darija_bench/darija_translation/utils.py")
    assert (
        metrics._loaded_by(darija, "darijabert") == {"bertscore"} and metrics._loaded_by(darija, "doc_to_text") == set()
    )
    assert metrics._loaded_by(str(folder / "french_bench/utils.py"), "rouge1_agg") == {"rouge"}
