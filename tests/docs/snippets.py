"""Runs the code blocks of a page as a reader does: in order, in one folder, Python in one session."""

import os
import re
import sys
from pathlib import Path

from tests.processes import run_program

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SESSION = """
import subprocess, sys
session = {"__name__": "__main__"}
for number, (language, code) in enumerate(%r, 1):
    print(f"--- block {number} ({language})", flush=True)
    if language == "python":
        exec(compile(code, f"block {number}", "exec"), session)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
"""


def read_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of the Python and shell blocks of a Markdown page; blocks of other languages are not run."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run_blocks(blocks: list[tuple[str, str]], folder: Path, **environment: str) -> str:
    """What the blocks print. The commands of this interpreter come first on the path."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_MODULES_CACHE": str(folder / "modules"),
        **environment,
    }
    run = run_program("-c", SESSION % blocks, folder=folder, environment=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout
