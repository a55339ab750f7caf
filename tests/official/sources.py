"""The test-suite of the installed transformers, from its source distribution and never copied into this repository.

The wheel of transformers carries no tests, the source distribution on PyPI carries the common ones. `install` downloads
that of the *installed* version once, unpacks its `tests/` as the package `transformers_tests` under `.cache/`, adds the
few modules that those tests import and the distribution leaves out, and puts the result on `sys.path`.
"""

import fcntl
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests"
PACKAGE = "transformers_tests"

# Imported by the common tests, absent from the source distribution. The first three serve what our models do not do
# (text parameters, the exporters' own tests, text generation). The last maps the URL of a fixture to a local copy; our
# processor tests make their own images, so nothing asks it.
STUBS = {
    f"{PACKAGE}/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}


def folder() -> Path:
    """Where the tests of the installed version are."""
    return CACHE / transformers.__version__


def install() -> None:
    """Make `import transformers_tests.test_modeling_common` work.

    Raises:
        RuntimeError: If the source distribution cannot be downloaded; the message holds what pip said.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:  # the workers of pytest-xdist arrive together
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder().is_dir():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                _unpack(_download(Path(scratch)), Path(scratch) / "ready")
                (Path(scratch) / "ready").rename(folder())
    if str(folder()) not in sys.path:
        sys.path.insert(0, str(folder()))


def _download(scratch: Path) -> Path:
    """The source distribution of the installed transformers, as pip finds it."""
    requirement = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", "transformers", "--dest", str(scratch), requirement]
    run = subprocess.run(command, capture_output=True, text=True)
    archives = list(scratch.glob("transformers-*.tar.gz"))
    if run.returncode or not archives:
        raise RuntimeError(f"The source distribution of {requirement} could not be downloaded.\n{run.stderr}")
    return archives[0]


def _unpack(archive: Path, target: Path) -> None:
    """Lay out `target/transformers_tests/` from the `tests/` of the archive, with the stubs in place."""
    with tarfile.open(archive) as tar:
        tar.extractall(target / "archive", filter="data")
    (top,) = (target / "archive").iterdir()
    shutil.move(top / "tests", target / PACKAGE)
    shutil.rmtree(target / "archive")
    (target / PACKAGE / "__init__.py").touch()
    for name, text in STUBS.items():
        stub = target / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        if stub.parent.parent.name == PACKAGE:
            (stub.parent / "__init__.py").touch()
        stub.write_text(text)
