"""Hardware, number formats and launch layout. May import: the modules of `llama_lite` itself (the foundations)."""
