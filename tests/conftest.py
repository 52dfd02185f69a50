"""Loads the fixtures, where tests are run."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Load fixtures.py. The process that only hands tests out to workers does without: its imports take seconds."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")
