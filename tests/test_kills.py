"""Every program and verb goes on after it was killed, and ends as a run in one go does; docs/durability.md has more."""

import random

import pytest

from tests import kills


@pytest.mark.slow
def test_every_program_goes_on_after_kills_at_random_moments(tmp_path):
    kills.prepare(tmp_path)
    for name, command in kills.programs(tmp_path).items():
        row = kills.kill_and_continue(name, command, tmp_path / "runs" / name, 3, random.Random(name))
        assert row.equal == row.runs, row
