"""The tasks of an evaluation, and the sandbox that runs generated code."""
