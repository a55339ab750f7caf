from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from locatvit_hf.cli import app


@pytest.fixture(scope="session")
def locatvit() -> Callable:
    """Runs `locatvit ARGUMENTS` in this process; paths are taken as arguments too."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def refuses(locatvit) -> Callable[..., str]:
    """Runs `locatvit ARGUMENTS`, asserts that it ends with one sentence and exit code 1, and returns the sentence."""

    def run(*arguments) -> str:
        result = locatvit(*arguments)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit), result.exception
        sentence = result.stderr.strip()
        assert sentence and "\n" not in sentence and "Traceback" not in result.output, result.output
        return sentence

    return run
