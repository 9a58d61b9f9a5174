"""What this machine computes and how it is shared. May import: the modules of `llama_lite` itself (the foundations)."""
