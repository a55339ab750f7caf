"""`python -m benchmarks.gpu_check`: is the fused kernel right, is it faster, and what should be the default?

In at most `--minutes`, on the first CUDA device: correctness, speed and memory, training steps, a profile, and a
decision by a written rule. Results are stored after every cell, so that a run that is cut short keeps what it knows.
"""

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import lanes, verdict
from .cells import Phase, phases

ROOT = Path(__file__).resolve().parents[2]
FULL = 8.0  # minutes for which the reserves of the phases are made


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=FULL, help="when to stop, compilation included (default: 8)")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/gpu-<kind>)")
    parser.add_argument("--seed", type=int, help="of shapes and inputs (default: drawn, and stored)")
    parser.add_argument("--rehearse", action="store_true", help="the same on the processor, with tiny sizes")
    chosen = parser.parse_args(given)
    if not 0 < chosen.minutes < 1e4:
        parser.error("--minutes must be above 0.")
    return chosen


class Book:
    """The results, and the files in which they are stored.

    Args:
        plan: the phases; every cell is on record from the start, as not measured.
        facts: what else the results say about the run.
        folder: where; None until the device is known.
    """

    def __init__(self, plan: list[Phase], facts: dict[str, Any], folder: Path | None):
        self.plan, self.folder, self.start = plan, folder, time.monotonic()
        self.results: dict[str, Any] = {**facts, "device": {}, "seconds": 0.0, "phases": {}, "decision": {}}
        for phase in plan:
            self.enter(phase)

    def enter(self, phase: Phase) -> None:
        """Put the cells of a phase on record."""
        cells = {cell.name: lanes.not_measured(lanes.OUT_OF_TIME, cell=asdict(cell)) for cell in phase.cells}
        self.results["phases"][phase.name] = {"title": phase.title, "cells": cells}

    def store(self, phase: Phase, name: str, outcome: lanes.Outcome) -> None:
        """Put the outcome of a cell on record and on disk."""
        cells = self.results["phases"][phase.name]["cells"]
        cells[name] = {"cell": cells[name]["cell"], **outcome}
        self.write()

    def write(self) -> None:
        """The files, each complete or as before."""
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        self.results["decision"] = verdict.decide(self.results)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = {
            "gpu_check.json": json.dumps(self.results, indent=1, allow_nan=False) + "\n",
            "gpu_check.md": verdict.markdown(self.results, self.plan),
        }
        for name, content in stored.items():
            partial = self.folder / f".partial-{name}"
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, self.folder / name)


def commit() -> str:
    """The short hash of the checkout, with "+" where its code differs; "unknown" where there is no git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def main(given: list[str] | None = None) -> int:
    """Returns the exit status: 0 where nothing failed, 1 where something did, 2 without a device."""
    chosen = arguments(given)
    start = time.monotonic()
    end = start + 60 * chosen.minutes
    seed = random.randrange(2**31) if chosen.seed is None else chosen.seed
    if chosen.rehearse:  # before anything imports Triton
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    else:  # so that no library starts CUDA in the process from which the others are forked
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    plan = phases(seed, chosen.rehearse)
    folder = chosen.output
    if folder is None and chosen.rehearse:
        folder = Path(tempfile.mkdtemp(prefix="gpu_check-"))
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *(sys.argv[1:] if given is None else given)]),
        "commit": commit(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "minutes": chosen.minutes,
        "seed": seed,
        "rehearsal": chosen.rehearse,
    }
    book = Book(plan, facts, folder)
    book.write()
    method = "forkserver"
    for number, phase in enumerate(plan):
        if phase.name == "profile":
            profile = verdict.slowest(book.results)
            phase.cells = [profile] if profile else []
            book.enter(phase)
        reserved = sum(later.reserve for later in plan[number + 1 :]) * min(chosen.minutes / FULL, 1.0)
        if phase.name == "device":  # which reads libraries from a disk, and without which the others are nothing
            reserved = 0.0
        until = end - reserved - 3.0 * min(chosen.minutes / FULL, 1.0)  # the last seconds are for ending processes
        began = time.monotonic()
        say(start, f"{phase.title}: {len(phase.cells)} to do, until {until - start:.0f} s at the latest")

        def store(name: str, outcome: lanes.Outcome, phase: Phase = phase) -> None:
            book.store(phase, name, outcome)
            if "took" in outcome:
                say(start, f"  {name}: {outcome['state']} in {outcome['took']} s {outcome.get('why', '')}")

        lanes.work_off(phase, until, lanes.context_of(method), chosen.rehearse, store)
        if phase.name == "device":
            outcome = first = outcome_of(book)
            if first["state"] == "failed":
                # Perhaps a library started CUDA where processes are forked from: let each start by itself.
                method = "spawn"
                lanes.work_off(phase, until, lanes.context_of(method), chosen.rehearse, store)
                outcome = outcome_of(book)
                if outcome["state"] != "measured":
                    print(f"Nothing was checked. {first['why']}.", file=sys.stderr)
                    return 2
            book.results["device"] = outcome.get("facts", {})
            if book.folder is None:
                kind = re.sub(r"[^a-z0-9]+", "-", book.results["device"].get("device", "unknown").lower()).strip("-")
                book.folder = ROOT / "benchmarks" / "results" / f"gpu-{kind}"
        book.results["phases"][phase.name]["seconds"] = round(time.monotonic() - began, 1)
        book.write()
    print()
    print(verdict.text(verdict.summary(book.results, plan)))
    print("\n".join(book.results["decision"]["reasons"]))
    print(f"Written to {book.folder}")
    failed = [
        name
        for phase in plan
        if phase.name not in ("drill", "speed")
        for name, cell in verdict.cells_of(book.results, phase.name).items()
        if cell["state"] == "failed"
    ]
    return 1 if failed else 0


def outcome_of(book: Book) -> lanes.Outcome:
    """Of the only cell of the first phase."""
    [outcome] = book.results["phases"]["device"]["cells"].values()
    return outcome


def say(start: float, sentence: str) -> None:
    print(f"{time.monotonic() - start:6.1f} s  {sentence}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the other processes on the way
    sys.exit(main())
