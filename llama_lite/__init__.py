"""Pretrain a small LLaMA so that every claim about it can be run again. One module per concern; see README.md."""

import os

os.environ.setdefault(
    "THP_MEM_ALLOC_ENABLE", "1"
)  # huge pages for torch's large tensors on a CPU; torch reads it once, when imported
