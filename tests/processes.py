"""Programs in processes of their own, as users start them, forked from one process that has imported torch.

What a fresh interpreter spends most of its seconds on is importing torch and other large libraries. This file, started
as a program, imports them once and forks for every request; all the rest, with what it reads from its environment
(huggingface_hub, transformers, this package), each program imports by itself.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

SECONDS = 1800  # after which a program is ended
# What transformers, datasets and accelerate import, and what imports none of them.
LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.elastic.multiprocessing"),
    *("torchvision.transforms.v2", "torchao.quantization", "torchao.prototype.safetensors.safetensors_support"),
    *("scipy.optimize", "pandas", "pyarrow.dataset", "jinja2", "yaml", "tokenizers"),
)


@functools.cache
def _server() -> subprocess.Popen:
    """It ends with this process, which closes its input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(**request: object) -> int:
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def start_program(
    *arguments: str | Path,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    output: tuple[str, str] = (os.devnull, os.devnull),
    group: bool = False,
) -> int:
    """Starts `python ARGUMENTS`, and returns the number of the process.

    Args:
        arguments: `-m MODULE`, `-c PROGRAM` or a file, and what the program is given. After `-I` the program finds
            installed packages alone.
        folder: The working directory; by default this one's.
        environment: All its variables; by default those of this process.
        output: The files that receive what the program prints, and its errors.
        group: Whether the process leads a group of its own.
    """
    environment = dict(os.environ if environment is None else environment)
    words = list(map(str, arguments))
    where = {"folder": str(folder or Path.cwd()), "environment": environment, "output": output, "group": group}
    return _ask(arguments=words, **where)


def wait_for(process: int) -> int:
    """The exit status of a process of `start_program`, below zero for the signal that ended it."""
    return _ask(wait=process)


def run_program(
    *arguments: str | Path, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` to its end, see `start_program`, and returns its exit status and what it printed."""
    with tempfile.NamedTemporaryFile("r") as printed, tempfile.NamedTemporaryFile("r") as errors:
        output = printed.name, errors.name
        status = wait_for(start_program(*arguments, folder=folder, environment=environment, output=output))
        return subprocess.CompletedProcess(arguments, status, printed.read(), errors.read())


def _serve() -> dict[str, object] | None:
    """Forks for every request. Returns it in the new process, and None at the end of the input."""
    for module in LIBRARIES:
        with contextlib.suppress(ImportError):  # a program that needs it says so
            importlib.import_module(module)
    gc.freeze()  # so that the memory stays shared
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            return request
        print(answer, flush=True)
    return None


def _become(arguments: list[str], folder: str, environment: dict[str, str], output: list[str], group: bool) -> None:
    """Runs a program in this process, as if the interpreter had been started for it."""
    if group:
        os.setsid()
    signal.alarm(SECONDS)
    for descriptor, name in enumerate([os.devnull, *output]):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    isolated = arguments[0] == "-I"
    kind, *rest = arguments[isolated:]
    here = folder if kind in ("-m", "-c") else str(Path(kind).resolve().parent)
    searched = [] if isolated else [here, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = searched + [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(rest[0], main.__dict__)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__" and (asked := _serve()):
    _become(**asked)
