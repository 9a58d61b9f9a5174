"""How long a step of training takes on this machine: some steps of the real thing, timed for a few seconds."""

import contextlib
import dataclasses
import statistics
import time

import torch

ENOUGH, MOST_STEPS = 1.0, 30  # seconds and steps that are timed after the first one, which allocates and chooses kernels
LIMIT = 4.0  # seconds after which a slow, or busy, machine has to do with what was timed


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds: of a micro-batch trained on, forward and backward; of the optimiser; of a window without gradients; of one generated token."""

    micro_batch: float
    optimizer: float
    window: float
    token: float

    def step(self, accumulation: int) -> float:
        return accumulation * self.micro_batch + self.optimizer


def pace(config, micro_batch: int, block_size: int, precision: str, switches: dict, device: torch.device) -> Pace:
    """Times a model of a config (vocabulary included) with `micro_batch` windows of `block_size` tokens: 1 to 3 s on a CPU. Draws no global random number.

    switches: fused_loss and block_attention, applied as in a run; layers are not compiled, which takes longer than this.
    """
    from transformers import AutoModelForCausalLM

    from . import block_attention
    from .fused_loss import fuse

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            ids = torch.randint(0, config.vocab_size, (micro_batch, block_size))
        shifted = {"shift_labels": ids} if switches["fused_loss"] else {}
        if switches["fused_loss"]:
            fuse(model)
        if switches["block_attention"]:
            block_attention.use_blocks(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        dtype = getattr(torch, precision)
        autocast = torch.autocast(device.type, dtype) if precision != "float32" else contextlib.nullcontext()
        times, updates = [], []
        start = time.perf_counter()
        while len(times) < 2 or (sum(times[1:]) < ENOUGH and len(times) <= MOST_STEPS and time.perf_counter() - start < LIMIT):
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
                ids[:1, :4], attention_mask=torch.ones_like(ids[:1, :4]), max_new_tokens=8, do_sample=True, eos_token_id=None, pad_token_id=0
            )
            token = (synchronize() - began) / 8
    return Pace(statistics.median(times[1:]), statistics.median(updates[1:]), window, token)
