"""A family that is added as docs/extend.md says is trained, exported, described, audited and loaded like any other."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import run_program

from .snippets import ROOT

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```python title="(.*?)"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL))
REGISTRY = "locatvit_hf/utils/registry.py"
COMMANDS = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[-1].splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and the programs with the family of the page, and a data set of eight photos."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("locatvit_hf", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    for name, content in FILES.items():
        if name != REGISTRY:
            assert not (ROOT / name).exists()
            (folder / name).write_text(content)
    line, _, entry = FILES[REGISTRY].partition("\n\n")
    registry = (folder / REGISTRY).read_text()
    for before, added in (("from ..configuration_locatjumbo", line), ("        Family(LocAtViTConfig", entry.rstrip())):
        assert registry.count(before) == 1
        registry = registry.replace(before, f"{added}\n{before}")
    (folder / REGISTRY).write_text(registry)
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            (folder / "photos" / split / label).mkdir(parents=True)
            for number in range(2):
                pixels = random.integers(0, 256, (70, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / label / f"{number}.png")
    return folder


def test_a_family_is_two_files_and_one_entry(checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_MODULES_CACHE": str(checkout / "modules")}
    assert len(FILES) == 3 and [shlex.split(command)[0] for command in COMMANDS] == ["python", "locatvit", "python"]
    printed = []
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        command = arguments if program == "python" else ["-m", "locatvit_hf.cli", *arguments]
        run = run_program(*command, folder=checkout, environment=environment)
        assert run.returncode == 0, run.stdout + run.stderr
        printed.append(run.stdout)
    assert json.loads((checkout / "runs" / "cpvt" / "all_results.json").read_text())["updates"] == 1
    model = checkout / "runs" / "cpvt" / "model"
    code = {path.name for path in model.glob("*.py")}
    assert {"configuration_cpvt.py", "modeling_cpvt.py", "layers_locat.py"} <= code
    assert not code & {"locat.py", "modeling_locatvit.py", "triton_locat.py"}
    card = (model / "README.md").read_text()
    assert "A CPVT, a vision transformer whose positions come from a convolution." in card and "chu2023cpvt" in card
    assert "CPVTForImageClassification (cpvt)" in printed[1] and "All its code is that of locatvit-hf" in printed[1]
    assert float(printed[2]) < 1e-5
