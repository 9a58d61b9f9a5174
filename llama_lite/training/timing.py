"""How fast a model trains on this machine: some steps of the real thing, timed for a few seconds."""

import contextlib
import dataclasses
import functools
import time

import torch

from ..distributed import print_main
from ..machine import hardware
from ..models.presets import flops_per_token

ENOUGH, MOST_STEPS = (
    1.0,
    30,
)  # seconds and steps that are timed after the first one, which allocates and chooses kernels

LIMIT = 4.0  # seconds after which a slow, or busy, machine has to do with what was timed

LONGEST = 1.5  # seconds of a micro-batch that is still timed

LOOK, BUSY = (
    0.2,
    50,
)  # seconds in which this process does nothing, and the share of the cores in percent that others may use meanwhile

MFU = {"cpu": 0.3, "cuda": 0.35}  # share of the peak at which a model is counted that is not timed

PLANNED_GPU = "H100"  # whose peak counts where a run on GPUs is planned on a machine without one

MICRO_TOKENS = {"cpu": 2048, "cuda": 8192}  # tokens of a micro-batch: a CPU's caches hold no more


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds: of a micro-batch trained on, forward and backward; of the optimizer; of a window without gradients; of
    one generated token.
    """

    micro_batch: float
    optimizer: float
    window: float
    token: float

    def step(self, accumulation: float) -> float:
        return accumulation * self.micro_batch + self.optimizer


class Machine:
    """How fast models train here. `precision`, `switches`: as the run will have them; `processes`: which share its
    steps.
    """

    def __init__(self, device: torch.device, precision: str, switches: dict, processes: int):
        self.device, self.precision, self.switches, self.processes = device, precision, switches, processes
        self.timed: dict[tuple, Pace] = {}

    @functools.cached_property
    def flops_per_second(self) -> float:
        """That training reaches in one process, before anything is timed."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            from trl.trainer.utils import get_peak_flops

            return MFU["cuda"] * get_peak_flops(PLANNED_GPU, self.precision)
        return MFU[self.device.type] * (hardware.peak_flops(self.precision, self.device) or 1e13)

    def pace(self, config, micro: int, block_size: int) -> Pace:
        """Timed, once; guessed by FLOPs where a micro-batch would take too long for that, or the planned device is not
        here.
        """
        key = (str(config.to_dict()), micro, block_size)
        if key not in self.timed:
            guess = flops_per_token(config, block_size) * micro * block_size / self.flops_per_second
            if guess > LONGEST or (self.device.type == "cuda" and not torch.cuda.is_available()):
                self.timed[key] = Pace(guess, 0.05 * guess, guess / 3 / micro, guess / 3 / micro / block_size * 8)
            else:
                if not self.timed:
                    warn_if_busy()
                self.timed[key] = pace(config, micro, block_size, self.precision, self.switches, self.device)
        return self.timed[key]

    def micro_windows(self, block_size: int) -> int:
        """Windows of a micro-batch."""
        return max(1, MICRO_TOKENS[self.device.type] // block_size)

    def tokens_per_second(self, config, block_size: int) -> float:
        """Of training alone, over all processes."""
        micro = self.micro_windows(block_size)
        return micro * block_size / self.pace(config, micro, block_size).step(1) * self.processes


def pace(config, micro_batch: int, block_size: int, precision: str, switches: dict, device: torch.device) -> Pace:
    """Times a model of a config (vocabulary included) with `micro_batch` windows of `block_size` tokens: 1 to 3 s on a
    CPU. Draws no global random number.

    switches: fused_loss and block_attention, applied as in a run; layers are not compiled, which takes longer than
    this.
    """
    from transformers import AutoModelForCausalLM

    from ..kernels.switches import apply_kernels
    from ..models.loading import check_language_model

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
            sum(times[1:]) < ENOUGH and len(times) <= MOST_STEPS and time.perf_counter() - start < LIMIT
        ):
            began = synchronize()
            with autocast:
                loss = model(input_ids=ids, labels=ids, **shifted).loss
            loss.backward()
            computed = synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(computed - began)
            updates.append(synchronize() - computed)
        model.eval()
        with torch.no_grad(), autocast:
            began = synchronize()
            model(input_ids=ids, labels=ids, **shifted)
            window = (synchronize() - began) / micro_batch
            began = synchronize()
            model.generate(
                ids[:1, :4],
                attention_mask=torch.ones_like(ids[:1, :4]),
                max_new_tokens=8,
                do_sample=True,
                eos_token_id=None,
                pad_token_id=0,
                trust_remote_code=False,
            )
            token = (synchronize() - began) / 8
    return Pace(_usual(times[1:]), _usual(updates[1:]), window, token)


def _usual(times: list[float]) -> float:
    """The lower quartile: other work on the machine makes single times too long, never too short."""
    return sorted(times)[len(times) // 4]


def warn_if_busy() -> None:
    """Say so if other programs compute here while something is about to be timed."""
    import psutil

    busy = psutil.cpu_percent(LOOK)
    if busy > BUSY:
        print_main(
            f"WARNING   other programs keep {busy:.0f} % of this machine's cores busy: what is timed now takes longer"
            " than on a quiet machine"
        )
