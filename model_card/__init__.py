"""Records of a run in, a card and its figures out. Never imports torch, never asks the network."""
