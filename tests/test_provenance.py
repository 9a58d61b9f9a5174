"""Who made this: facts that can be checked."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from llama_lite.checkpoint.identity import is_deterministic
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.provenance import code_revision, hardware, package_versions, provenance
from llama_lite.training import trainer
from llama_lite.training.session import Session


def test_a_users_own_files_in_the_checkout_are_no_change_of_the_code(tmp_path):
    """`--suggest mine.yaml` made every later resume warn of another code revision."""

    def git(*words: str) -> None:
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *named, *words], check=True, capture_output=True)

    for name in ("llama_lite/a.py", "run.py", "mytext/b.py", "mine.yaml", "llama_lite/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    for name in ("llama_lite/a.py", "run.py"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = code_revision(tmp_path)
    for name, changed in (("mine.yaml", ""), ("mytext/b.py", ""), ("llama_lite/c.py", "+changes")):
        (tmp_path / name).write_text("2")
        assert code_revision(tmp_path) == f"{commit}{changed}"
    (tmp_path / "llama_lite/c.py").unlink()
    (tmp_path / "run.py").write_text("2")
    assert code_revision(tmp_path) == f"{commit}+changes"


def test_versions_are_the_installed_ones():
    assert package_versions()["torch"] == torch.__version__
    assert package_versions(("no-such-package",)) == {}


def test_revision_is_gits():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert code_revision() is None if head.returncode else code_revision().startswith(head.stdout.strip())


def test_the_record_is_json():
    import json

    assert json.loads(json.dumps(provenance()))["hardware"]["threads"] >= 1


def add_gpu(monkeypatch) -> None:
    """Let this machine have a GPU, which a run need not use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 12345)


@pytest.mark.parametrize("kind, exact", [("cpu", True), ("cuda", False), ("mps", False)])
def test_hardware_is_told_of_the_device_that_computes(kind, exact, monkeypatch):
    add_gpu(monkeypatch)
    device = torch.device(kind)
    found = hardware(device)
    assert provenance(device)["hardware"] == found
    assert (found["device"] == "NVIDIA H200") == (kind == "cuda") and ("threads" in found) == (kind == "cpu")
    assert is_deterministic({"environment": {"hardware": found}}) is exact
    assert (trainer._peak_memory(device) == 12345) == (kind == "cuda")
    assert hardware() == hardware(torch.device("cuda"))


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_is_one_on_a_cpu(monkeypatch):
    *_, run_args, training_args = parse_pretrain(["--output_dir", "runs/x", "--use_cpu"])
    assert training_args.device.type == "cpu"
    add_gpu(monkeypatch)
    session = SimpleNamespace(run_args=run_args, training_args=training_args, order_seed=1)
    plan = SimpleNamespace(processes=1, micro_batch=8, accumulation=2)
    identity = Session.identity(session, plan, config={}, data={}, switches={}).record()
    assert is_deterministic(identity) and identity["layout"]["threads"] == torch.get_num_threads()
    assert "instructions" in identity["environment"]["hardware"]
