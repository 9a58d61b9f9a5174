"""The precision that is chosen: what was asked for, what the run began in, or what this device computes natively, and
never a slower one.
"""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, config_file, launch, launch_ranks

from llama_lite.config.common import CommonRunArguments
from llama_lite.errors import Refusal
from llama_lite.files import read_json, read_jsonl
from llama_lite.machine import hardware, precision
from llama_lite.training import derive_pretrain
from llama_lite.training.decisions import Decisions, decide_precision

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """machine(supported, ratio): a CPU that says whether it has bfloat16, and whose bfloat16 product takes `ratio`
    times as long as float32's.
    """

    def make(supported, ratio):
        hardware.native_bfloat16.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
        monkeypatch.setattr(
            hardware, "product_seconds", lambda device, size, repeats: {"float32": 1.0, "bfloat16": ratio}
        )

    yield make
    hardware.native_bfloat16.cache_clear()


@pytest.mark.parametrize(
    "supported, ratio, chosen, why",
    [
        (True, 0.4, "bfloat16", "takes 0.40 of float32's time"),
        (True, 2.6, "float32", "takes 2.6 times as long here"),  # AVX512 without bfloat16: torch says yes
        (False, 0.4, "float32", "no bfloat16 instructions"),
    ],
)
def test_auto_asks_the_device_and_a_product(machine, supported, ratio, chosen, why):
    machine(supported, ratio)
    assert precision.choose("auto", None, CPU)[0] == chosen and why in precision.choose("auto", None, CPU)[1]
    assert precision.choose("bfloat16", None, CPU)[0] == "bfloat16"  # what is asked for is done


@pytest.mark.parametrize("slower, chosen", [(0.06, "bfloat16"), (3.0, "float32")])  # in hardware, and emulated
def test_auto_on_a_gpu_is_decided_by_products_and_not_by_their_launch(slower, chosen, monkeypatch):
    """An H200: float32 at 50e12 FLOP/s, and launches, which take 10 us, a little longer in bfloat16."""

    def product_seconds(device, size, repeats):
        seconds = 2 * size**3 / 50e12
        return {"float32": 10e-6 + seconds, "bfloat16": 11e-6 + slower * seconds}

    hardware.native_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(hardware, "product_seconds", product_seconds)
    assert precision.choose("auto", None, torch.device("cuda"))[0] == chosen
    hardware.native_bfloat16.cache_clear()


def test_a_resumed_run_keeps_its_precision_and_says_so(machine):
    machine(False, 9.0)
    assert precision.choose("auto", "bfloat16", CPU) == (
        "bfloat16",
        "as this run began; this processor has no bfloat16 instructions",
    )
    machine(True, 0.4)
    assert precision.choose("auto", "float32", CPU) == ("float32", "as this run began")


@pytest.mark.parametrize("given, recorded", [("float32", None), ("bfloat16", "float32"), ("auto", "bfloat16")])
def test_no_product_is_timed_for_a_given_or_a_recorded_precision(given, recorded, machine, monkeypatch):
    machine(True, 0.4)
    monkeypatch.setattr(hardware, "product_seconds", lambda *args: pytest.fail("a product was timed"))
    run = CommonRunArguments(precision=given)
    explicit_args = {} if given == "auto" else {"precision": given}
    decide_precision(Decisions([run], explicit_args), recorded, CPU)
    assert run.precision == (recorded if given == "auto" else given)


@pytest.mark.parametrize("switch", ["--deterministic", "--full_determinism"])
def test_cublas_finds_its_variable_at_the_first_product_that_is_timed(switch, sft, machine, tmp_path, monkeypatch):
    """It reads it once, and torch too: set later, the products of a tuning run end with an error."""
    found = []

    def product_seconds(device, size, repeats, formats=("float32", "bfloat16")):
        found.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return dict.fromkeys(formats, 1.0)

    machine(True, 0.4)
    monkeypatch.setattr(hardware, "product_seconds", product_seconds)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test ends
        monkeypatch.delenv(name)
    sft(tmp_path / "run", switch, "--dry_run")
    assert found and set(found) == {":4096:8"}


@pytest.mark.parametrize("leave_out", ["", "AVX512_CORE", "AVX2"])
def test_auto_never_picks_the_slower_product(leave_out):
    """On this machine, and as if its processor had fewer instructions: the choice is the faster of two products of
    another size.
    """
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; from llama_lite.machine import hardware,"
        " precision; torch.set_num_threads(1); cpu = torch.device('cpu'); chosen = precision.choose('auto', None,"
        " cpu)[0]; seconds = hardware.product_seconds(cpu, 512, 40); print(chosen, seconds['bfloat16'] /"
        " seconds['float32'])"
    )
    environment = {"ONEDNN_MAX_CPU_ISA": leave_out} if leave_out else {}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    chosen, ratio = done.stdout.split()
    assert (chosen == "bfloat16" and float(ratio) < 1.3) or (chosen == "float32" and float(ratio) > 0.8)
    assert chosen == "float32" or leave_out == ""


def test_a_run_is_resumed_in_the_precision_and_with_the_switches_that_it_began_with(
    settings, pretrain, tmp_path, monkeypatch, capsys
):
    whole = pretrain(tmp_path / "whole", precision="bfloat16", block_attention=True, fused_loss=True)
    run = tmp_path / "run"
    pretrain(run, precision="bfloat16", block_attention=True, fused_loss=True, max_steps=5)
    monkeypatch.setattr(precision, "lacks_bfloat16", lambda device: "this processor has no bfloat16 instructions")
    monkeypatch.setattr(derive_pretrain, "choose_fused_loss", lambda *machine: (False, ""))
    capsys.readouterr()
    pretrain(run, allow_changes="max_steps")
    said = capsys.readouterr().out
    assert "bfloat16  as this run began; this processor has no bfloat16 instructions" in said
    manifest = read_json(run / "checkpoint-12" / "manifest.json")["identity"]
    assert (
        manifest["hyperparameters"]["precision"] == "bfloat16"
        and manifest["environment"]["switches"]["fused_loss"] is True
    )
    assert (
        manifest["environment"]["switches"]
        == read_json(whole / "checkpoint-12" / "manifest.json")["identity"]["environment"]["switches"]
    )


def test_another_precision_on_resume_is_refused(pretrain, tmp_path):
    pretrain(tmp_path / "run", max_steps=3, save_steps=3, eval_steps=3, precision="bfloat16")
    with pytest.raises(Refusal, match=r"precision\s+bfloat16 -> float32"):
        pretrain(tmp_path / "run", max_steps=3, save_steps=3, eval_steps=3, precision="float32")


def test_mfu_is_never_shown_above_what_is_possible(pretrain, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda chosen, device: 1.0)
    run = pretrain(tmp_path / "run", max_steps=3, save_steps=3, eval_steps=3)
    logged = [entry for entry in read_jsonl(run / "log.jsonl") if "tokens_per_second" in entry]
    assert logged and not any("mfu" in entry for entry in logged)


def test_what_a_device_cannot_train_in_is_refused():
    with pytest.raises(Refusal, match="--precision float16: CPUs do not support training in it"):
        precision.check_device("float16", CPU)


def test_two_processes_compute_in_what_rank_0_chose(settings, tmp_path):
    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "two"), max_steps=3, save_steps=3, eval_steps=3)
    done = launch_ranks(ROOT / "configs/accelerate/cpu2.yaml", "--config", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chosen    precision") == 1
    one = config_file(tmp_path, settings, output_dir=str(tmp_path / "one"), max_steps=3, save_steps=3, eval_steps=3)
    assert launch("--config", str(one)).returncode == 0
    manifests = [read_json(tmp_path / name / "checkpoint-3" / "manifest.json")["identity"] for name in ("one", "two")]
    assert manifests[0]["hyperparameters"] == manifests[1]["hyperparameters"]
