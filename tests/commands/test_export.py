"""`python -m llama_lite export`: GGUF files of runs and adapters, merged folders, and what is published."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub_server import Fault
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llama_cpp import LlamaServer
from llama_lite.__main__ import main
from llama_lite.commands.export import card_of
from llama_lite.errors import Refusal
from model_card.card import YOURS


def log_probabilities(model, ids: list[int]) -> list[float]:
    """Of each id after the first, in nats."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(found[i - 1, ids[i]]) for i in range(1, len(ids))]


@pytest.fixture(scope="module")
def exported(base, whole_sft, tmp_path_factory):
    """The folder of an adapter's export in two formats."""
    folder = tmp_path_factory.mktemp("export") / "out"
    main(["export", f"{base}+{whole_sft}", "--dtype", "float32", "q8_0", "--output_dir", str(folder)])
    return folder


def test_an_adapter_is_merged_into_the_file(exported, base, whole_sft):
    names = {path.name for path in exported.iterdir()}
    assert names == {"whole-F32.gguf", "whole-Q8_0.gguf", "Modelfile", "README.md", "export.json"}
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole_sft).eval()
    ids = AutoTokenizer.from_pretrained(base)("Say one word, as you like.")["input_ids"][:8]
    server = LlamaServer(exported / "whole-F32.gguf", 64)
    theirs = [server.log_probability(ids[:end], ids[end]) for end in range(1, len(ids))]
    assert theirs == pytest.approx(log_probabilities(tuned, ids), abs=1e-4)
    plain = log_probabilities(AutoModelForCausalLM.from_pretrained(base).eval(), ids)
    assert theirs != pytest.approx(plain, abs=1e-3)


def test_the_record_and_the_card_say_what_the_files_are(exported, whole_sft):
    record = json.loads((exported / "export.json").read_text())
    assert (record["chat_format"], record["context"], record["base_model"]) == ("Vicuna 1.1", 512, None)
    assert {file["dtype"] for file in record["files"].values()} == {"float32", "q8_0"}
    card = (exported / "README.md").read_text()
    for name, file in record["files"].items():
        assert f"| `{name}` | {file['dtype']} | {file['size']:,} | `{file['sha256'][:12]}` |" in card
    assert "FROM ./whole-F32.gguf" in (exported / "Modelfile").read_text()
    assert str(whole_sft) not in card + json.dumps(record)


@pytest.mark.parametrize(
    "said, kept",
    [
        ("de", "de"),
        (["en", "de"], ["en", "de"]),
        (["en", "code"], "en"),  # of the words that the Hub takes beside codes, the card names none
        ("multilingual", None),
        (None, None),
    ],
)
def test_the_card_takes_license_and_languages_from_the_models_own(exported, tmp_path, said, kept):
    metadata = {"license": "mit", "tags": ["x"], **({"language": said} if said else {})}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# Mine\n")
    model = SimpleNamespace(adapter=None, base=SimpleNamespace(folder=tmp_path))
    text = card_of(model, json.loads((exported / "export.json").read_text()), "you/mine-GGUF")
    told = yaml.safe_load(text.split("---")[1])
    assert told["license"] == "mit" and told.get("language") == kept


def test_an_export_again_adds_a_format_and_gives_the_same_bytes(exported, base, whole_sft, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "again")
    before = {path.name: path.read_bytes() for path in folder.glob("*.gguf")}
    card = folder / "README.md"
    card.write_text(card.read_text().replace(YOURS[0], f"{YOURS[0]}\nMine."))
    main(["export", f"{base}+{whole_sft}", "--dtype", "q8_0", "float16", "--output_dir", str(folder)])
    assert "\nMine.\n" in card.read_text() and "whole-F16.gguf" in card.read_text()
    after = {path.name: path.read_bytes() for path in folder.glob("*.gguf")}
    assert set(after) - set(before) == {"whole-F16.gguf"} and before.items() <= after.items()
    assert set(json.loads((folder / "export.json").read_text())["files"]) == set(after)


def test_a_checkpoint_is_cut_to_the_vocabulary_as_its_run_is(whole_run, tmp_path):
    for name, reference in (("run", f"{whole_run}"), ("step", f"{whole_run}@step-12")):
        main(["export", reference, "--output_dir", str(tmp_path / name)])
    (run,), (step,) = ((tmp_path / name).glob("*.gguf") for name in ("run", "step"))
    assert step.name == "whole-checkpoint-12-F16.gguf" and run.name == "whole-F16.gguf"
    assert run.stat().st_size == step.stat().st_size
    assert "A base model" in (tmp_path / "run" / "README.md").read_text()


def test_a_merged_folder_is_a_model_of_transformers(base, whole_sft, tmp_path):
    folder = tmp_path / "merged"
    argv = ["export", f"{base}+{whole_sft}", "--to", "safetensors", "--dtype", "float32", "--output_dir", str(folder)]
    main(argv)
    main(argv)  # again
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole_sft).eval()
    ids = list(range(40, 52))
    assert log_probabilities(merged, ids) == pytest.approx(log_probabilities(tuned, ids), abs=1e-5)
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(whole_sft).chat_template


@pytest.mark.parametrize(
    "argv, why",
    [
        (["--dtype", "q4_0"], "--dtype q4_0: --to gguf writes float32, float16, q8_0"),
        (["--to", "safetensors", "--dtype", "q8_0"], "--to safetensors writes float32, float16, bfloat16"),
        (["--to", "safetensors", "--push_to_hub", "a/b"], "does not publish"),
        (["--push_to_hub", "b"], "--push_to_hub b: it must be the name of a repository, owner/name"),
        (["--push_to_hub", "owner/x-GGUF"], "is not on the Hub. Publish it first .* --base_hub_id owner/name"),
    ],
)
def test_what_cannot_be_right_is_refused(base, tmp_path, argv, why):
    with pytest.raises(Refusal, match=why):
        main(["export", str(base), *argv, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


SEVERAL = "runs/demo@step-*+runs/demo-sft"


@pytest.mark.parametrize("argv", [["export", SEVERAL], ["chat", SEVERAL], ["chat", "--compare", SEVERAL, "runs/other"]])
def test_a_reference_of_several_models_is_refused_with_one_of_them(tmp_path, monkeypatch, argv):
    for step in (8, 16, 120):
        (tmp_path / "runs" / "demo" / f"checkpoint-{step}").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=r"these are 3 models, and one is wanted: runs/demo@step-120\+runs/demo-sft, for"):
        main(argv)


def test_a_folder_with_other_files_is_refused(base, exported):
    for folder, to in ((base, "gguf"), (exported, "safetensors")):
        with pytest.raises(Refusal, match=f"holds files, and no earlier export --to {to}"):
            main(["export", str(base), "--to", to, "--output_dir", str(folder)])


def test_files_and_card_are_published_beside_the_model(hub, exported, base, whole_sft, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    from huggingface_hub import HfApi, hf_hub_download

    folder = shutil.copytree(exported, tmp_path / "out")
    argv = ["export", f"{base}+{whole_sft}", "--dtype", "q8_0", "--output_dir", str(folder)]
    argv += ["--push_to_hub", "owner/whole-GGUF", "--base_hub_id", "owner/whole@step-000008"]
    hub.faults.append(Fault(r"POST .*/commit/", 412, times=1))
    main(argv)
    names = set(HfApi().list_repo_files("owner/whole-GGUF"))
    assert names == {".gitattributes", "whole-F32.gguf", "whole-Q8_0.gguf", "Modelfile", "README.md", "export.json"}
    text = open(hf_hub_download("owner/whole-GGUF", "README.md"), encoding="utf-8").read()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "owner/whole" and metadata["base_model_relation"] == "quantized"
    assert metadata["base_model_revision"] == "step-000008" and "hf download owner/whole-GGUF" in text
    commits = len(HfApi().list_repo_commits("owner/whole-GGUF"))
    main(argv)
    assert len(HfApi().list_repo_commits("owner/whole-GGUF")) == commits  # nothing new, no commit
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="Modelfile", repo_id="owner/whole-GGUF")
    with pytest.raises(Refusal, match="holds Modelfile of somebody else"):
        main(argv)


def test_the_repository_of_a_run_is_not_written_over(hub, exported, base, whole_sft, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    from huggingface_hub import HfApi

    HfApi().create_repo("owner/of-a-run")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="owner/of-a-run")
    folder = shutil.copytree(exported, tmp_path / "out")
    argv = ["export", f"{base}+{whole_sft}", "--dtype", "q8_0", "--output_dir", str(folder)]
    with pytest.raises(Refusal, match=r"holds a model \(config.json\).* e.g. owner/of-a-run-GGUF"):
        main([*argv, "--push_to_hub", "owner/of-a-run", "--base_hub_id", "owner/of-a-run"])
