"""One function for each kind of cell; what it raises becomes the outcome of the cell."""

import math
import os
import signal
import time
from typing import Any

from . import correctness, families, speed
from .cells import Case, Cell, Drill, Facts
from .contenders import Contenders, Poisoned, Tell, failure
from .device import Gpu, Processor


def device_of(rehearsal: bool) -> Processor:
    return Processor() if rehearsal else Gpu()


def run(cell: Cell, without: tuple[str, ...], device: Processor, tell: Tell) -> dict[str, Any]:
    """The outcome of a cell: `state` ("measured" or "failed"), `why` where it failed, `seconds`, and its record.

    Args:
        cell: what to do.
        without: contenders to leave out.
        device: where.
        tell: takes what is known so far.
    """
    start = time.perf_counter()
    outcome: dict[str, Any] = {"state": "measured"}
    known: dict[str, Any] = {}

    def remember(record: dict[str, Any]) -> None:
        known.clear()
        known.update(record)
        tell(without_nan(record))

    try:
        device.prepare()
        outcome.update(KINDS[cell.kind](cell, without, device, remember))
        if outcome.get("passed") is False:
            outcome["state"] = "failed"
    except Poisoned:
        outcome.update(known, state="failed")
    except Exception as error:
        failed = failure(error)
        outcome.update(known, state="failed", why=failed["missing"], trace=failed["trace"])
    finally:
        device.free()
    return without_nan({**outcome, "took": round(time.perf_counter() - start, 2)})


def without_nan(value: Any) -> Any:
    """The same for JSON, which has no numbers for NaN and infinities: text in their place."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def facts(cell: Facts, without: tuple[str, ...], device: Processor, tell: Tell) -> dict[str, Any]:
    return {"facts": device.facts()}


def case(cell: Case, without: tuple[str, ...], device: Processor, tell: Tell) -> dict[str, Any]:
    return correctness.check(cell, device.name)


def drill(cell: Drill, without: tuple[str, ...], device: Processor, tell: Tell) -> dict[str, Any]:
    """What a kernel may do to its process; in a race, its second contender does it."""

    def misbehave(name: str = "", record: dict | None = None) -> None:
        if name and name != "second":
            record["parts"] = {"drill": {"seconds": [1.0]}}
        elif cell.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif cell.how == "hangs":
            time.sleep(3600)
        elif cell.how != "succeeds":
            device.poisoned = cell.how == "poisons"
            raise RuntimeError("as the drill wants it")

    entries = Contenders([name for name in cell.contenders if name not in without], device, tell)
    entries.attempt(misbehave)
    if not cell.contenders:
        misbehave()
    return entries.record()


KINDS = {
    "facts": facts,
    "case": case,
    "speed": speed.race,
    "family": families.train,
    "profile": speed.kernels,
    "drill": drill,
}
