"""Signals that schedulers send to all processes of a run, and what the system does to those that load data."""

import re
import signal


class GracefulShutdown:
    """While open, SIGTERM, SIGUSR1 and the first Ctrl-C set `signal` instead of ending the program.

    SIGTERM comes from a scheduler, SIGUSR1 from one that was asked to warn in time (Windows does not have it). A second
    Ctrl-C ends the program.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "GracefulShutdown":
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def ignore_shutdown() -> None:
    """Leave signals that a scheduler sends to all processes of a run to the one that saves and ends the others."""
    for number in GracefulShutdown.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def report_ended_loaders_late() -> None:
    """Have a batch that is waited for raise where a process that loads data was killed.

    The loaders of torch would raise wherever the program is then, also in the middle of a step.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def ended_loader(error: BaseException | None) -> bool:
    """Whether an error means that a process that loads data was ended from outside.

    Errors inside such a process have a type of their own, and another message.
    """
    exited = re.match(r"DataLoader worker \(pids?(\(s\))? [\d, ]+\)", str(error))
    return bool(exited and isinstance(error, RuntimeError)) or isinstance(error, EOFError | ConnectionError)
