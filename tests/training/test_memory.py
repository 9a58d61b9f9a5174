"""The forecast of a step's memory against what the step really took, and what a plan says of it."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from llama_lite.errors import Refusal
from llama_lite.machine.parallelism import Layout
from llama_lite.models.presets import load_model_config
from llama_lite.training import memory
from llama_lite.training.memory import Memory, step_memory, what_would_fit

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1365,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
# what is measured: the parts of a step's memory as with SHAPE, in narrower layers and more of them, which take fewer
# products for the same memory: where bfloat16 is emulated, products are nearly all of the time
MEASURED = {
    "vocab_size": 16384,
    "hidden_size": 160,
    "intermediate_size": 427,
    "num_hidden_layers": 16,
    "head_dim": 40,
}
WINDOWS, LENGTH = 2, 192
MEASURE = """
import sys, torch
sys.path.insert(0, {root!r})
from transformers import AutoModelForCausalLM
from llama_lite.kernels.fused_cross_entropy import apply_fused_cross_entropy
from llama_lite.models.presets import load_model_config

torch.set_num_threads(1)

def peak():  # not ru_maxrss, which begins with that of the process that forked this one
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

def step(config, micro_batch, length):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if {fused}:
        apply_fused_cross_entropy(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the moments, which every step but the first one finds
    optimizer.zero_grad()
    ids = torch.randint(0, config.vocab_size, (micro_batch, length))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled={bf16}):
            loss = model(input_ids=ids, labels=ids, shift_labels=ids).loss
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

step(load_model_config("tiny"), 1, 8)  # what the libraries themselves take
before = peak()
config = load_model_config("demo")
for name, value in {shape}.items():
    setattr(config, name, value)
step(config, {windows}, {length})
print(peak() - before)
"""


def shaped(**changes):
    config = load_model_config("demo")
    for name, value in {**SHAPE, **changes}.items():
        setattr(config, name, value)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("precision, fused", [("float32", False), ("bfloat16", True)])
def test_the_forecast_is_within_a_tenth_of_the_measured_peak(precision, fused):
    shape = {"shape": MEASURED, "windows": WINDOWS, "length": LENGTH}
    code = MEASURE.format(root=str(ROOT), fused=fused, bf16=precision == "bfloat16", **shape)
    exact = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # what is freed is returned at once: the allocator's fragments are not measured
    measured = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=exact).stdout
    )
    forecast = step_memory(shaped(**MEASURED), WINDOWS, LENGTH, precision, fused=fused)
    assert forecast.total == pytest.approx(measured, rel=0.1)


def test_the_forecast_adds_up():
    config = shaped()
    plain = step_memory(config, 4, 256, "bfloat16")
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        elements = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert (plain.weights, plain.gradients, plain.optimizer) == (4 * elements, 4 * elements, 8 * elements)
    whole = memory._fake_step(config, 3, 4, 256, "bfloat16", False, False, False)[0]  # followed through every layer
    assert step_memory(shaped(num_hidden_layers=3), 4, 256, "bfloat16").total == pytest.approx(whole, rel=0.01)
    assert step_memory(shaped(num_hidden_layers=8), 4, 256, "bfloat16").activations == pytest.approx(
        plain.activations
        + 2 * (plain.activations - step_memory(shaped(num_hidden_layers=5), 4, 256, "bfloat16").activations),
        rel=0.01,
    )
    sharded = step_memory(config, 4, 256, "bfloat16", Layout(8, "fsdp2"))
    assert (
        sharded.weights + sharded.gradients + sharded.optimizer == pytest.approx(16 * elements / 8, rel=1e-3)
        and sharded.gathered
    )
    assert (
        step_memory(shaped(num_hidden_layers=1), 4, 256, "bfloat16").weights
        < step_memory(shaped(num_hidden_layers=2), 4, 256, "bfloat16").weights
    )
    for layout in (Layout(2, "ddp"), Layout(8, "fsdp2")):  # in no bucket yet, not yet sharded
        once = step_memory(config, 4, 256, "bfloat16", layout)
        assert step_memory(config, 4, 256, "bfloat16", layout, accumulates=True).total == once.total + 4 * elements
    hybrid, kept = Layout(16, "fsdp2", replicas=2), Layout(8, "fsdp2", reshard=False)
    assert step_memory(config, 4, 256, "bfloat16", hybrid) == sharded and str(hybrid) == "HSDP over 8, 2 replicas"
    assert step_memory(config, 4, 256, "bfloat16", kept).gathered == 2 * elements > sharded.gathered
    zero2 = step_memory(config, 4, 256, "bfloat16", Layout(8, "zero2"))
    assert zero2.weights == 2 * elements and zero2.gradients + zero2.optimizer == pytest.approx(2 * elements, rel=1e-3)
    assert step_memory(config, 4, 256, "bfloat16", checkpointing=True).activations < plain.activations
    assert step_memory(config, 4, 256, "bfloat16", fused=True).activations < plain.activations


def test_what_would_fit_does(monkeypatch):
    config, layout = shaped(), Layout(1, "none")
    room = step_memory(config, 2, 256, "bfloat16").total
    plan = SimpleNamespace(micro_batch=8, accumulation=1)
    said = what_would_fit(config, plan, 256, "bfloat16", layout, False, room)
    assert "--per_device_train_batch_size 2" in said
    checkpointed = step_memory(config, 8, 256, "bfloat16", checkpointing=True).total
    assert "or --activation_checkpointing" in what_would_fit(config, plan, 256, "bfloat16", layout, False, checkpointed)
    monkeypatch.setattr(memory, "step_memory", lambda *args, **kwargs: Memory(0, 0, 0, room + 1))
    assert "choose a smaller --model_config" in what_would_fit(config, plan, 256, "bfloat16", layout, False, room)


def test_days_are_flops_over_peak():
    lines = memory.gpu_lines(Memory(0, 0, 0, int(70e9)), 989e12 * 0.5 * 86_400 * 8, "bfloat16", 8, 50.0)
    assert any(line.endswith("H100: 8.0 days, 1.0 days on 8") for line in lines)
    assert any("A100" in line and "does not fit" not in line for line in lines) and any(
        "L40S" in line and "does not fit in 48 GB" in line for line in lines
    )
    assert memory.gpu_lines(Memory(0, 0, 0, 0), 1e20, "float32", 1, 50.0) == []  # TRL's table knows no float32


def planned(tmp_path, room, free, monkeypatch, layout=memory.ONE_PROCESS, device="cpu", **run):
    plan = SimpleNamespace(
        micro_batch=4,
        accumulation=2,
        checkpoints_kept=3,
        saves=10,
        steps=10,
        checkpoint_bytes=100,
        model_bytes=10,
        flops_per_token=1e9,
        tokens=1e9,
        parameters=1_000_000,
        processes=layout.processes,
    )
    training = SimpleNamespace(
        device=torch.device(device), activation_checkpointing=False, output_dir=str(tmp_path / "run")
    )
    monkeypatch.setattr(memory, "capacity", lambda device: room)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    arguments = SimpleNamespace(
        **{
            "plan_launch": None,
            "plan_mfu": 40.0,
            "plan_price": None,
            "explicit_args": {},
            "block_size": 64,
            "async_save": True,
            "shard_checkpoints": False,
            **run,
        }
    )
    return memory.forecast(load_model_config("tiny"), plan, layout, "bfloat16", False, training, arguments)


def test_a_plan_that_does_not_fit_says_so_and_what_would(tmp_path, monkeypatch):
    lines, problems = planned(tmp_path, 10**9, 420, monkeypatch)
    assert problems == [] and lines[0].startswith("memory per device") and "H100:" in "".join(lines)
    assert lines[1].endswith("written while training goes on, from a copy of 11.4 MiB in this machine's memory")
    assert "$" not in "".join(lines)
    priced = "".join(planned(tmp_path, 10**9, 420, monkeypatch, plan_price=5.0)[0])
    # 1e18 FLOP at 40 % of 989e12: 2,528 s
    assert re.search(r"H100: 42\.\d min, \$3\.51 at \$5\.00 per GPU and hour", priced), priced
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    lines, _ = planned(tmp_path, 10**9, 420, monkeypatch)
    assert "training waits for each: the copy that one is written from takes 11.4 MiB of memory" in lines[1]
    parts = planned(tmp_path, 10**9, 420, monkeypatch, layout=Layout(2, "fsdp2"), shard_checkpoints=True)[0][1]
    assert "the copy that one is written from takes 5.7 MiB" in parts
    assert "(--no_async_save)" in planned(tmp_path, 10**9, 420, monkeypatch, async_save=False)[0][1]
    _, problems = planned(tmp_path, 10**9, 419, monkeypatch)
    assert (
        len(problems) == 1 and "takes up to 420 bytes of disk" in problems[0] and "--save_total_limit 2" in problems[0]
    )
    _, problems = planned(tmp_path, 1000, 419, monkeypatch)
    assert len(problems) == 2 and "this machine's memory gives a process 1.0 KiB" in problems[0]
    assert planned(tmp_path, 1000, 420, monkeypatch, plan_launch="somewhere")[1] == []  # a GPU of 80 GB takes it


@pytest.mark.parametrize("device, outcome", [("cpu", "waits"), ("mps", "waits"), ("cuda", "goes on")])
def test_a_step_in_this_machines_memory_leaves_less_for_the_copy_of_a_save(tmp_path, monkeypatch, device, outcome):
    monkeypatch.setattr(memory, "available_memory", lambda: 16 * 2**20)  # 12.8 MiB for a copy of 11.4, without a step
    lines, _ = planned(tmp_path, 10**9, 420, monkeypatch, device=device)
    assert f"training {outcome}" in lines[1]


def test_the_plan_advises_on_resharding(tmp_path, monkeypatch):
    def advice(room: int, reshard: bool, auto: bool = False) -> str:
        layout = Layout(8, "fsdp2", reshard=reshard, auto_reshard=auto)
        lines = planned(tmp_path, room, 420, monkeypatch, layout)[0]
        assert "accumulated gradients" in lines[0] and "FSDP2 over 8" in lines[0]
        return next(line for line in lines if line.startswith("resharding"))

    assert "false is faster, and fits" in advice(10**9, True) and "false, as it is" in advice(10**9, False)
    assert "true, as it is" in advice(1000, True) and "true saves up to 1.9 MiB" in advice(1000, False)
    assert "auto gives false, which is faster, and fits" in advice(10**9, True, auto=True)
    assert "auto gives true: false does not fit" in advice(1000, True, auto=True)


@pytest.mark.parametrize(
    "value, room, expected", [("auto", 10**9, "false"), ("auto", 1000, "true"), ("true", 10**9, None)]
)
def test_a_run_takes_the_plans_advice_where_the_launcher_leaves_it_open(monkeypatch, value, room, expected):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", value)
    monkeypatch.setattr(memory, "capacity", lambda device: room)
    training = SimpleNamespace(device=torch.device("cpu"), activation_checkpointing=False)
    plan = SimpleNamespace(parameters=10_000, micro_batch=1, accumulation=1)
    run = SimpleNamespace(block_size=64, precision="float32", fused_loss=False)
    said = memory.settle_resharding(shaped(), plan, training, run)
    assert os.environ["FSDP_RESHARD_AFTER_FORWARD"] == (expected or value)
    assert said is None if expected is None else said.startswith(f"fsdp_reshard_after_forward {expected}: ")


def test_a_forecast_leaves_the_loss_whole():
    """Where a step is only followed for its memory three slices are enough; a run in the same process takes all."""
    from llama_lite.kernels import fused_cross_entropy

    memory._fake.cache_clear()
    step_memory(shaped(), 1, 64, "float32", fused=True)
    assert fused_cross_entropy.MAX_CHUNKS is None


def test_strict_plan_refuses_before_anything_is_trained(pretrain, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "capacity", lambda device: 1000)
    with pytest.raises(Refusal, match=r"--strict_plan: a step takes .* gives a process 1\.0 KiB"):
        pretrain(tmp_path / "run", "--strict_plan")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_that_the_machine_cannot_hold_is_refused_and_a_tight_one_is_told(monkeypatch, capsys):
    """Linux kills a process without memory, and leaves no line."""
    config, layout = load_model_config("tiny"), Layout()
    plan = SimpleNamespace(micro_batch=8, accumulation=1)
    training = SimpleNamespace(device=torch.device("cpu"), activation_checkpointing=False)
    run = SimpleNamespace(precision="float32", fused_loss=True, block_size=64, strict_plan=False)
    needed = step_memory(config, 8, 64, "float32", layout, True, False, False).total
    usable = memory.USABLE_FRACTION["cpu"]
    for available, told in ((needed, ""), (needed - 1, "WARNING   a step takes"), (usable * needed - 1, None)):
        monkeypatch.setattr(memory, "capacity", lambda device, available=available: int(available))
        if told is None:
            with pytest.raises(
                Refusal, match=r"the run does not fit into this machine: a step takes .* --model_config"
            ):
                memory.check_memory(config, plan, layout, training, run)
        else:
            memory.check_memory(config, plan, layout, training, run)
            assert capsys.readouterr().out.startswith(told)
