"""Pretrain a small LLaMA so that every claim about it can be run again. One module a concern; see README.md."""
