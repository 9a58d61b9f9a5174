"""Attention alone, forward and backward, in bfloat16: torch's against ours in blocks, as it is and compiled. The
blocks' sizes are chosen by this.

python -m benchmarks.attention
"""

import itertools
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from llama_lite.kernels.block_attention import BlockAttention
from llama_lite.machine.hardware import keep_memory

SHAPES = ((8, 8, 256, 32), (8, 4, 512, 64), (2, 12, 1024, 64))  # batch, heads, context, width: demo, 6 x 256, 124m


def main() -> None:
    keep_memory()
    for shape in SHAPES:
        inputs = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]
        gradient = torch.randn(shape).bfloat16()
        ways = {"torch": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)}
        for size, compiled in itertools.product((128, 256), (False, True)):
            settings = shape[3] ** -0.5, size, compiled
            ways[f"blocks of {size}{', compiled' * compiled}"] = lambda q, k, v, settings=settings: (
                BlockAttention.apply(q, k, v, *settings)
            )
        seconds = {way: [] for way in ways}
        for turn in range(12):
            for way, attend in ways.items():
                began = time.perf_counter()
                torch.autograd.grad(attend(*inputs), inputs, gradient)
                seconds[way] += [time.perf_counter() - began] if turn > 1 else []
        medians = {way: statistics.median(values) for way, values in seconds.items()}
        print(shape, {way: f"{medians['torch'] / value:.2f}x" for way, value in medians.items()}, flush=True)


if __name__ == "__main__":
    main()
