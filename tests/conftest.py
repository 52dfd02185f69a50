"""Loads the fixtures, where tests are run."""

import os
import signal

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on the network; set before transformers is imported
os.environ["TQDM_DISABLE"] = "1"
# Where several processes share the cores, their threads would wait for each other; children take this over.
os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} if "PYTEST_XDIST_WORKER" in os.environ else {})

# A shell lets what it runs in the background (`make test &`) ignore Ctrl-C, and so would all programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Load fixtures.py. The process that only hands tests out to workers does without: its imports take seconds."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")
