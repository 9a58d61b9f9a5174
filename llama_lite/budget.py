"""What a text holds and what this machine can do in the time there is, before anything is prepared: counted on a sample, timed on some steps."""

import functools

import torch
from trl.trainer.utils import compute_flops_per_token

from . import precision, shapes, timing
from .text_facts import TextFacts, look

START, FINISH = 12.0, 12.0  # seconds: from the command to the first step, and from the last step to the end (imports; export, card, figures)
CURATE, TOKENISE = 1e6, 4e6  # bytes of text a second and core that are curated (near-duplicates too), and tokenised
CPU_MFU, GPU_MFU = 0.3, 0.35  # share of the peak at which a model is counted that is not timed
LONGEST = 1.5  # seconds of a micro-batch that is still timed
COMPILED = {"bfloat16": 1.2, "float32": 1.06, "float16": 1.2}  # times as fast; benchmarks/train.py
COMPILING = 40.0  # seconds
SAVE = 0.6, 1 / 150e6  # seconds of a checkpoint, and of a byte of it


class Machine:
    """How fast models train here. `precision`, `switches`: as the run will have them; `processes`: that share its steps."""

    def __init__(self, device: torch.device, number_format: str, switches: dict, processes: int):
        self.device, self.precision, self.switches, self.processes = device, number_format, switches, processes
        self.timed: dict[tuple, timing.Pace] = {}

    @functools.cached_property
    def flops_per_second(self) -> float:
        """That training reaches on one process, before anything is timed."""
        peak = precision.peak_flops(self.precision, self.device) or 1e13
        return (CPU_MFU if self.device.type == "cpu" else GPU_MFU) * peak

    def pace(self, config, micro: int, block: int) -> timing.Pace:
        """Timed, once; of a model that is too large for that, guessed by its FLOPs."""
        key = (str(config.to_dict()), micro, block)
        if key not in self.timed:
            guess = compute_flops_per_token(config, block) * micro * block / self.flops_per_second
            if guess > LONGEST:
                self.timed[key] = timing.Pace(guess, 0.05 * guess, guess / 3 / micro, guess / 3 / micro / block * 8)
            else:
                self.timed[key] = timing.pace(config, micro, block, self.precision, self.switches, self.device)
        return self.timed[key]

    def micro_windows(self, block: int) -> int:
        """Windows of a micro-batch: some 2,000 tokens on a CPU, whose caches hold no more; on a GPU 8,000."""
        return max(1, (2048 if self.device.type == "cpu" else 8192) // block)

    def tokens_per_second(self, config, block: int) -> float:
        """Of training alone, over all processes."""
        micro = self.micro_windows(block)
        return micro * block / self.pace(config, micro, block).step(1) * self.processes


class Budget:
    """A text, and the tokens that it makes by a tokenizer."""

    def __init__(self, text):
        self.text = text

    @functools.cached_property
    def facts(self) -> TextFacts:
        return look(self.text.source)

    @functools.lru_cache(maxsize=8)
    def tokens(self, tokenizer: str, vocab_size: int | None) -> int:
        """Estimated, of the whole text."""
        return int(self.facts.bytes * self.facts.tokens_per_byte(tokenizer, vocab_size))

    def preparing_seconds(self, size: float, workers: int, curated: bool) -> float:
        """That curating and tokenising so many bytes of text take."""
        return 3 + size / TOKENISE / workers + (size / CURATE / workers if curated else 0)
