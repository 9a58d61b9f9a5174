"""Publishing to the Hugging Face Hub and downloading from it, verified. May import: what checkpoint may, and
checkpoint.
"""
