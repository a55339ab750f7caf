"""Fetches the test-suite of the installed transformers before the test modules of this folder import it."""

import re

import pytest

from tests.official import sources

sources.install()


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers that the library's tests wear."""
    for module in sources.folder().glob(f"{sources.PACKAGE}/test_*_common.py"):
        for marker in sorted(set(re.findall(r"\bmark\.(\w+)", module.read_text()))):
            config.addinivalue_line("markers", f"{marker}: of the test-suite of transformers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder carries the marker `official`."""
    for item in items:
        if "tests/official" in item.path.as_posix():
            item.add_marker(pytest.mark.official)
