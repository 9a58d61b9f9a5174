"""Records of a run in, pictures out. Never imports torch, never asks the network."""
