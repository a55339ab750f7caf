"""Contenders of one cell, tried one after the other: what stops one of them does not stop the next."""

import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.measure import reason

from .device import Processor

Tell = Callable[[dict[str, Any]], None]


class Poisoned(Exception):
    """A contender left the process without a usable device."""


def failure(error: BaseException) -> dict[str, str]:
    """Why something failed, in a line, and where, in the last lines of the traceback."""
    trace = "".join(traceback.format_exception(error))
    return {"missing": f"{type(error).__name__}: {reason(error)}", "trace": trace[-3000:]}


class Contenders:
    """The records of a cell's contenders.

    Args:
        names: who takes part.
        device: where.
        tell: reports what is known so far, and who is at work, to the process that stores it.
    """

    def __init__(self, names: list[str], device: Processor, tell: Tell):
        self.records: dict[str, dict[str, Any]] = {name: {} for name in names}
        self.device, self.tell = device, tell
        self.at_work: str | None = None

    def attempt(self, work: Callable[[str, dict[str, Any]], None]) -> None:
        """Call `work(name, record)` for each contender that nothing has stopped; an exception is put on record."""
        for name, record in self.records.items():
            if "missing" in record:
                continue
            self.at_work = name
            self.report()
            try:
                work(name, record)
            except Exception as error:  # whatever it is, the others are still measured
                record.update(failure(error))
            self.device.free()
            if not self.device.is_usable():
                raise Poisoned
        self.at_work = None
        self.report()

    def report(self) -> None:
        self.tell(self.record())

    def record(self) -> dict[str, Any]:
        return {"contenders": self.records, "at_work": self.at_work}
