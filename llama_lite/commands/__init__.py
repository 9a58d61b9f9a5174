"""The small commands (`python -m llama_lite.commands.NAME`). Nothing imports them."""
