"""Processes that work cells off one by one, so that a kernel can break nothing but its own cell.

A process that dies, or that a kernel left without a usable device, is replaced, and one that takes longer than a cell
may is killed. The cell is then run again without the contender that was at work; a cell without contenders has failed.
"""

import multiprocessing
import multiprocessing.connection
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .cells import Cell, Phase

OUT_OF_TIME = "out of time"
Outcome = dict[str, Any]


def not_measured(why: str, **record: Any) -> Outcome:
    """What is stored of a cell without a result."""
    return {**record, "state": "not measured", "why": why}


def context_of(method: str) -> multiprocessing.context.BaseContext:
    """method: "forkserver", which imports everything once, or "spawn", every process for itself."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["benchmarks.gpu_check.preload"])
    return context


def serve(connection: multiprocessing.connection.Connection, rehearsal: bool) -> None:
    """The other side: receives cells and sends ("partial", record), and ("done" or "poisoned", outcome) of each."""
    from . import work  # brings torch, which the process that writes the results never loads

    device = work.device_of(rehearsal)
    while True:
        try:
            cell, without = connection.recv()
        except EOFError:
            return
        outcome = work.run(cell, without, device, lambda record: connection.send(("partial", record)))
        connection.send(("done" if device.is_usable() else "poisoned", outcome))


@dataclass
class Job:
    """A cell, what is known of it, and the contenders that are left out, with the reason."""

    cell: Cell
    without: dict[str, Outcome] = field(default_factory=dict)
    partial: dict[str, Any] = field(default_factory=dict)


class Lane:
    """One process, and the job that it works on."""

    def __init__(self, context: multiprocessing.context.BaseContext, rehearsal: bool):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, rehearsal), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.limit = self.until = 0.0

    def begin(self, job: Job, limit: float) -> None:
        self.job, self.limit, self.until = job, limit, time.monotonic() + limit
        try:
            self.connection.send((job.cell, tuple(job.without)))
        except OSError:
            pass  # it has died meanwhile: that is found out by waiting for it

    def end(self) -> str:
        """Kills the process where it still runs. Returns how it ended."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        code = self.process.exitcode
        return f"its process ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"


def work_off(
    phase: Phase,
    until: float,
    context: multiprocessing.context.BaseContext,
    rehearsal: bool,
    store: Callable[[str, Outcome], None],
) -> None:
    """Run all cells of a phase.

    Args:
        phase: the cells, in this order.
        until: when to stop, on the clock of `time.monotonic`. What is not done then is stored as not measured.
        context: where processes come from.
        rehearsal: whether they work on the processor.
        store: takes the name and the outcome of every cell, once or, while it is still at work, several times.
    """
    pending, lanes = deque(Job(cell) for cell in phase.cells), []
    try:
        while pending or any(lane.job for lane in lanes):
            if time.monotonic() >= until:
                break
            idle = [lane for lane in lanes if lane.job is None]
            if pending and not idle and len(lanes) < phase.lanes:
                idle = [Lane(context, rehearsal)]
                lanes += idle
            for lane in idle[: len(pending)]:
                job = pending.popleft()
                lane.begin(job, getattr(job.cell, "limit", None) or phase.limit)
            busy = [lane for lane in lanes if lane.job]
            handles = [handle for lane in busy for handle in (lane.connection, lane.process.sentinel)]
            wake = min(until, *(lane.until for lane in busy))
            if pending and len(lanes) < phase.lanes:
                wake = 0.0  # a lane more is wanted
            multiprocessing.connection.wait(handles, max(wake - time.monotonic(), 0.0))
            for lane in busy:
                if not _listen(lane, store):
                    lanes.remove(lane)
                    pending.extendleft(_after_death(lane, lane.end(), store))
                elif lane.job and lane.until <= time.monotonic() < until:
                    lanes.remove(lane)
                    lane.end()
                    pending.extendleft(_after_death(lane, f"it took longer than {lane.limit:g} s", store))
    finally:
        for lane in lanes:
            if lane.job:
                _listen(lane, store)  # it may have just finished
            lane.end()
            if lane.job:
                store(lane.job.cell.name, not_measured(OUT_OF_TIME, **_merged(lane.job, lane.job.partial)))
        for job in pending:
            store(job.cell.name, not_measured(OUT_OF_TIME, **_merged(job, job.partial)))


def _listen(lane: Lane, store: Callable[[str, Outcome], None]) -> bool:
    """Take what a lane has sent. False where its process is gone, or has no use any more."""
    try:
        while lane.connection.poll():
            what, record = lane.connection.recv()
            name = lane.job.cell.name
            if what == "partial":
                lane.job.partial = record
                store(name, not_measured(OUT_OF_TIME, **_merged(lane.job, record)))
            elif what == "poisoned" and record.get("at_work"):
                lane.job.partial = record
                return False
            else:
                store(name, _merged(lane.job, record))
                lane.job = None
                if what == "poisoned":
                    return False
    except (EOFError, OSError):
        return False
    return lane.process.exitcode is None


def _after_death(lane: Lane, why: str, store: Callable[[str, Outcome], None]) -> list[Job]:
    """What is left to do of the job of a lane that ended: nothing, or the same without the contender at work."""
    job = lane.job
    if job is None:
        return []
    culprit = job.partial.get("at_work")
    if culprit is None:
        store(job.cell.name, {**_merged(job, job.partial), "state": "failed", "why": why})
        return []
    known = job.partial.get("contenders", {}).get(culprit, {})
    left_out = {**job.without, culprit: {"missing": why, **known}}
    return [Job(job.cell, left_out, {"contenders": dict(left_out)})]


def _merged(job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """A record with the contenders that were left out, and without the name of the one at work."""
    record = {key: value for key, value in record.items() if key != "at_work"}
    if job.without:
        record["contenders"] = {**record.get("contenders", {}), **job.without}
    return record
