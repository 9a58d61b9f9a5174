"""Pretrain a small LLaMA so that every claim about it can be run again. The rooms: docs/architecture.md."""

import os

# Huge pages for torch's large tensors on a CPU; torch reads it once, when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
