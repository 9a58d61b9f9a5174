"""Speed of training on this machine: some steps of a real model, timed for a few seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from typing import TYPE_CHECKING

import torch

from ..distributed import print_main
from ..machine import hardware
from ..models.presets import count_parameters, flops_per_token
from .memory import capacity

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# seconds and steps that are timed after the first one, which allocates and chooses kernels
MIN_SECONDS, MAX_STEPS = 1.0, 30
LIMIT = 4.0  # seconds after which timing ends on a slow or busy machine
GENERATED = 8  # tokens of a timed generation
TIMED_BYTES, TIMED_SHARE = 16, 0.6  # bytes per parameter of what is timed, and the share of memory that they may take
MAX_TIMED = 1.5  # seconds of a micro-batch that is still timed

# seconds in which this process idles, and percent of the cores that other programs may use meanwhile
LOAD_SECONDS, BUSY_PERCENT = 0.2, 50
MFU = {"cpu": 0.3, "cuda": 0.35}  # fraction of the peak FLOP/s that is assumed for a model that is not timed
# whose peak FLOP/s are used to plan a run on GPUs on a machine without one; those in float32 (NVIDIA's data sheet) are
# not in TRL's table
PLANNED_GPU, PLANNED_FLOAT32 = "H100", 67e12
MICRO_TOKENS = {"cpu": 2048, "cuda": 8192}  # tokens of a micro-batch: a CPU's caches hold no more


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of a micro-batch (forward and backward), of the optimizer, of a window without gradients, and of one
    generated token.
    """

    micro_batch: float
    optimizer: float
    window: float
    token: float

    def step(self, accumulation: float) -> float:
        """Seconds of an optimizer step of `accumulation` micro-batches."""
        return accumulation * self.micro_batch + self.optimizer


class Machine:
    """Speed of models on this machine. `precision`, `switches`: those of the run; `processes`: number that share its
    steps; `peak_flops`: the user's --peak_flops.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        switches: dict,
        processes: int,
        peak_flops: float | None = None,
    ):
        self.device, self.precision, self.switches, self.processes = device, precision, switches, processes
        self.peak_flops, self.timed = peak_flops, {}

    @functools.cached_property
    def flops_per_second(self) -> float:
        """FLOP/s of training in one process, assumed before anything is timed."""
        if self.peak_flops:
            return hardware.planning_constant(MFU, self.device) * self.peak_flops
        if self.device.type == "cuda" and not torch.cuda.is_available():
            from trl.trainer.utils import get_peak_flops

            return MFU["cuda"] * (get_peak_flops(PLANNED_GPU, self.precision) or PLANNED_FLOAT32)
        reachable = hardware.reachable_flops(self.precision, self.device)
        return hardware.planning_constant(MFU, self.device) * reachable

    def pace(self, config: PreTrainedConfig, micro: int, block_size: int) -> Pace:
        """Seconds, timed once per shape; estimated from FLOPs where a micro-batch would take too long, or the planned
        device is absent.
        """
        key = (str(config.to_dict()), micro, block_size)
        if key not in self.timed:
            guess = flops_per_token(config, block_size) * micro * block_size / self.flops_per_second
            absent = self.device.type == "cuda" and not torch.cuda.is_available()
            if guess > MAX_TIMED or absent or not fits(config, self.device):
                self.timed[key] = Pace(guess, 0.05 * guess, guess / 3 / micro, guess / 3 / micro / block_size * 8)
            else:
                if not self.timed:
                    warn_if_busy()
                self.timed[key] = pace(config, micro, block_size, self.precision, self.switches, self.device)
        return self.timed[key]

    def micro_windows(self, block_size: int) -> int:
        """Windows per micro-batch, from the tokens that suit the device."""
        return max(1, hardware.planning_constant(MICRO_TOKENS, self.device) // block_size)

    def tokens_per_second(self, config: PreTrainedConfig, block_size: int) -> float:
        """Tokens per second of training alone, over all processes."""
        micro = self.micro_windows(block_size)
        return micro * block_size / self.pace(config, micro, block_size).step(1) * self.processes


def fits(config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether memory holds a model with gradients and moments in float32, which is what is timed."""
    return TIMED_BYTES * count_parameters(config)[0] < TIMED_SHARE * capacity(device)


def pace(
    config: PreTrainedConfig, micro_batch: int, block_size: int, precision: str, switches: dict, device: torch.device
) -> Pace:
    """Time a model of a config (vocabulary included) with `micro_batch` windows of `block_size` tokens: 1 to 3 s on a
    CPU. The global random state does not change.

    switches: fused_loss and block_attention, applied as in a run; layers are not compiled, which takes longer than
    this.
    """
    from transformers import AutoModelForCausalLM

    from ..kernels.switches import apply_kernels
    from ..models.loading import check_language_model

    def synchronize():
        hardware.synchronize(device)
        return time.perf_counter()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            ids = torch.randint(0, config.vocab_size, (micro_batch, block_size))
        check_language_model(f"--model_config {config.name_or_path}", model)
        shifted = {"shift_labels": ids} if switches["fused_loss"] else {}
        apply_kernels(model, switches["fused_loss"], switches["block_attention"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        dtype = getattr(torch, precision)
        autocast = torch.autocast(device.type, dtype) if precision != "float32" else contextlib.nullcontext()
        times, updates = [], []
        start = time.perf_counter()
        while len(times) < 2 or (
            sum(times[1:]) < MIN_SECONDS and len(times) <= MAX_STEPS and time.perf_counter() - start < LIMIT
        ):
            phase_start = synchronize()
            with autocast:
                loss = model(input_ids=ids, labels=ids, use_cache=False, **shifted).loss
            loss.backward()
            computed = synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(computed - phase_start)
            updates.append(synchronize() - computed)
        model.eval()
        with torch.no_grad(), autocast:
            phase_start = synchronize()
            model(input_ids=ids, labels=ids, use_cache=False, **shifted)
            window = (synchronize() - phase_start) / micro_batch
            phase_start = synchronize()
            _generate(model, ids[:1, :4], GENERATED)
            token = (synchronize() - phase_start) / GENERATED
    return Pace(_usual(times[1:]), _usual(updates[1:]), window, token)


def _generate(model, ids: torch.Tensor, count: int) -> None:
    """Sample `count` tokens behind ids [1, prompt]."""
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=True,
        eos_token_id=None,
        pad_token_id=0,
        trust_remote_code=False,
    )


def _usual(times: list[float]) -> float:
    """The lower quartile: other load makes single times too long, never too short."""
    return sorted(times)[len(times) // 4]


def warn_if_busy() -> None:
    """Print a warning if other programs use the cores while something is about to be timed."""
    import psutil

    busy = psutil.cpu_percent(LOAD_SECONDS)
    if busy > BUSY_PERCENT:
        print_main(
            f"WARNING   other programs keep {busy:.0f} % of this machine's cores busy: timings are longer than on an"
            " idle machine"
        )
