"""Switches for speed: the same mathematics, and a fall back that is said where a machine has not what they need."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, log_of, same_tensors
from transformers import AutoModelForCausalLM

from llama_lite import cgroups, processes
from llama_lite.files import read_json
from llama_lite.kernels import block_attention, compile
from llama_lite.machine import hardware
from llama_lite.models.presets import load_model_config
from llama_lite.training import timing


@pytest.fixture
def fresh():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_layers_are_the_plain_ones(fresh):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_model_config("tiny"), dtype=torch.float32)
    compiled = copy.deepcopy(model)
    block_attention.enable_block_attention(compiled)  # as a run on a CPU has it
    assert compile.compile_layers(compiled, torch.device("cpu")) and list(compiled.state_dict()) == list(
        model.state_dict()
    )
    ids = torch.randint(0, model.config.vocab_size, (2, 33))
    for precision, tolerance in ((None, 1e-5), (torch.bfloat16, 2e-2)):
        found = []
        for one in (model, compiled):
            one.zero_grad()
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                loss = one(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append((loss.detach(), torch.cat([p.grad.flatten() for p in one.parameters()])))
        (loss, gradient), (ours, our_gradient) = found
        assert abs(ours - loss) < tolerance * loss and (our_gradient - gradient).norm() < tolerance * gradient.norm()
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1  # they were compiled


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_evaluates_uncompiled(pretrain, tmp_path, fresh):
    changes = {
        "max_steps": 8,
        "save_steps": 4,
        "eval_steps": 4,
        "compile_layers": True,
        "save_total_limit": 9,
        "order": "sequential",
    }
    whole = pretrain(tmp_path / "whole", **changes)
    assert read_json(whole / "run.json")["identity"]["environment"]["switches"]["compile_layers"] is True
    frames = torch._dynamo.utils.counters["frames"]["total"]
    assert 1 <= frames <= 4  # training's shape alone: not evaluation's, the probe's or the samples'
    torch.compiler.reset()
    again = pretrain(tmp_path / "again", "--resume_from_checkpoint", str(whole / "checkpoint-4"), **changes)
    assert log_of(again) == log_of(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(whole / "checkpoint-8" / name, again / "checkpoint-8" / name)


def test_without_a_compiler_layers_stay_as_they_are_and_it_is_said(monkeypatch, capsys):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    model = AutoModelForCausalLM.from_config(load_model_config("tiny"))
    assert not compile.compile_layers(model, torch.device("cpu"))
    assert capsys.readouterr().out.count("torch finds no C++ compiler (g++ or clang++): layers run uncompiled") == 1
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_without_mallopt_memory_is_returned_and_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: object())
    assert not hardware.keep_memory()
    assert "has no mallopt" in capsys.readouterr().out


KEPT = """
import os, sys
sys.path.insert(0, {root!r})
import llama_lite, torch
from llama_lite.machine.hardware import keep_memory

def resident():
    return os.sysconf("SC_PAGE_SIZE") * int(open("/proc/self/statm").read().split()[1])

if {keep}:
    assert keep_memory()
before = resident()
torch.ones(64 * 2**20)
after = resident()
print((after - before) // 2**20)
"""


@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_stays_with_the_process(keep):
    code = KEPT.format(root=str(ROOT), keep=keep)
    kept = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert kept >= 240 if keep else kept < 30


def test_a_gpu_that_the_table_does_not_have_gets_no_mfu_and_is_timed_for_the_plan(monkeypatch):
    """It used to be planned as one of 1e13 FLOP/s, which is a hundredth of a present one."""
    gpu, formats = torch.device("cuda"), []

    def product_seconds(device, size, repeats, names):
        formats.append(names)
        return dict.fromkeys(names, 2 * size**3 / 3e14)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X9000")
    monkeypatch.setattr(hardware, "product_seconds", product_seconds)
    assert hardware.peak_flops("bfloat16", gpu) is None
    speed = timing.Machine(gpu, "bfloat16", {}, 1).flops_per_second
    assert speed == pytest.approx(timing.MFU["cuda"] * 3e14) and formats == [("bfloat16",)]
    given = timing.Machine(gpu, "bfloat16", {}, 1, peak_flops=1e15)
    assert given.flops_per_second == timing.MFU["cuda"] * 1e15 and len(formats) == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert hardware.reachable_flops("bfloat16", gpu) == hardware.peak_flops("bfloat16", gpu) == 989e12


@pytest.mark.parametrize(
    "precision, native, timed",
    [
        ("float32", True, ["float32"]),
        ("bfloat16", True, ["float32", "bfloat16"]),
        ("bfloat16", False, ["float32"]),
    ],
)
def test_an_emulated_product_is_not_timed_for_the_peak(monkeypatch, precision, native, timed):
    """One of 1024 x 1024 takes seconds on a processor with AVX2 alone, and every run waited for it, in float32, too."""
    seconds, formats = {"float32": 0.2, "bfloat16": 0.1}, []

    def product_seconds(device, size, repeats, names):
        formats.append(list(names))
        return {name: seconds[name] for name in names}

    monkeypatch.setattr(hardware, "native_bfloat16", lambda device: (native, ""))
    monkeypatch.setattr(hardware, "product_seconds", product_seconds)
    expected = 2 * hardware.CPU_PRODUCT**3 / min(seconds[name] for name in timed)
    assert hardware.peak_flops(precision, torch.device("cpu")) == expected and formats == [timed]


def test_a_device_without_constants_is_planned_by_what_is_timed_there(monkeypatch):
    """A plan on Apple's mps used to end with a KeyError, and timings there did not wait for the device."""
    mps, waited = torch.device("mps"), []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(
        hardware, "product_seconds", lambda device, size, repeats, names: dict.fromkeys(names, 2 * size**3 / 2e12)
    )
    assert hardware.peak_flops("float32", mps) is None
    machine = timing.Machine(mps, "float32", {}, 1)
    assert machine.flops_per_second == pytest.approx(timing.MFU["cpu"] * 2e12)
    assert machine.micro_windows(256) == timing.MICRO_TOKENS["cpu"] // 256
    hardware.synchronize(mps)
    assert waited == ["mps"]


def test_a_run_on_gpus_that_are_not_here_is_planned_in_every_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    speeds = [
        timing.Machine(torch.device("cuda"), precision, {}, 1).flops_per_second
        for precision in ("bfloat16", "float16", "float32")
    ]
    assert speeds[0] == speeds[1] > speeds[2] > 0


VERSION_1 = ("cpu/docker/job/cpu.cfs_quota_us", "cpu/docker/job/cpu.cfs_period_us")
QUOTAS = {  # what the cgroups of a process say, and its cores where its affinity allows 8
    "none": ({}, 8),
    "max": ({"job/cpu.max": "max 100000"}, 8),
    "docker --cpus 1.5": ({"job/cpu.max": "150000 100000"}, 2),
    "less than a core": ({"job/cpu.max": "20000 100000"}, 1),
    "of the cgroup that the own one is in": ({"job/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
    "more than the affinity": ({"job/cpu.max": "1600000 100000"}, 8),
    "none, version 1": (dict(zip(VERSION_1, ("-1", "100000"), strict=True)), 8),
    "version 1": (dict(zip(VERSION_1, ("400000", "100000"), strict=True)), 4),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_cores_are_those_of_affinity_and_quota_and_processes_share_them(case, tmp_path, monkeypatch):
    files, cores = QUOTAS[case]
    (tmp_path / "own").write_text("7:memory:/other\n4:cpu,cpuacct:/docker/job\n0::/job\n")
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert processes.available_cores() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert processes.cores_for_a_process() == max(1, cores // 3)
