"""The environment of all tests: one loopback Hub, an empty cache, one thread per process. Imported before everything
that reads it.
"""

import os
import tempfile

from hub_server import Hub

HUB = Hub()  # the only Hub that any test, and any process that one starts, can reach
HUB.up()
os.environ.update(HUB.environment())
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read when trackio is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # two processes test at once, on two cores
ENVIRONMENT = dict(os.environ)  # of every process that a test starts, unless the test changes it
_found = dict(os.environ)


def begin_test() -> None:
    """Note the environment that a test finds: libraries add variables to it when they are imported (torch, lm-eval,
    scikit-learn) or compile, here as in every process that imports them.
    """
    _found.clear()
    _found.update(os.environ)


def is_changed() -> bool:
    """Whether the test that runs has changed the environment, or an earlier one has left it changed."""
    now, found = ({**variables, "PYTEST_CURRENT_TEST": ""} for variables in (os.environ, _found))
    return now != found or any(now.get(name) != value for name, value in ENVIRONMENT.items())
