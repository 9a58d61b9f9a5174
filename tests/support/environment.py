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
