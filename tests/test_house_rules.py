"""What must hold in every file, read from its source: the rules that keep remote code loadable and the floor honest.

Files that travel are the Python files directly in `locatvit_hf/`. They are copied beside the weights and run on
machines without this package, loaded by transformers, which finds what a file needs by reading its text.
"""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TRAVELLING = sorted(path for path in (ROOT / "locatvit_hf").glob("*.py") if path.name != "__init__.py")
ALLOWED = {"torch", "torchvision", "transformers", "huggingface_hub"} | sys.stdlib_module_names

# How transformers finds the files that a file needs: lines of text, wherever they stand.
RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.|import\s+\.)", re.MULTILINE)


@pytest.fixture(params=TRAVELLING, ids=lambda path: path.name)
def travelling(request: pytest.FixtureRequest) -> Path:
    return request.param


def imports(tree: ast.AST, optional: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level names of the absolute imports below `tree`, and whether they stand in the body of a `try`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0], optional
        elif isinstance(node, ast.Try):
            for statement in node.body:
                yield from imports(ast.Module([statement], []), optional=True)
            yield from imports(ast.Module([*node.handlers, *node.orelse, *node.finalbody], []), optional)
        else:
            yield from imports(node, optional)


def relative_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """The relative imports below `tree`."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0)


def test_there_are_files_that_travel() -> None:
    names = {path.name for path in TRAVELLING}
    assert {"locat.py", "configuration_locatvit.py", "modeling_locatvit.py", "image_processing_locatvit.py"} <= names


def test_imports_only_what_every_user_has(travelling: Path) -> None:
    needed = set(imports(ast.parse(travelling.read_text())))
    forbidden = {name for name, optional in needed if name not in ALLOWED and not (optional and name == "triton")}
    assert not forbidden, f"{travelling.name} needs {', '.join(sorted(forbidden))}"


def test_relative_imports_are_flat(travelling: Path) -> None:
    """Only `from .name import X`: transformers finds neither packages, parents nor `from . import name`."""
    for node in relative_imports(ast.parse(travelling.read_text())):
        assert node.level == 1 and node.module, f"{travelling.name}:{node.lineno} is no `from .name import X`"
        assert "." not in node.module, f"{travelling.name}:{node.lineno} imports from a sub-folder"
        assert (travelling.parent / f"{node.module}.py").is_file(), f"{travelling.name}:{node.lineno}: no such file"
        assert all(alias.name != "*" for alias in node.names), f"{travelling.name}:{node.lineno} imports everything"


def test_no_text_reads_like_a_relative_import(travelling: Path) -> None:
    """A docstring line that starts with `from .` is an import to transformers, which then looks for the file."""
    text = travelling.read_text()
    real = {node.lineno for node in relative_imports(ast.parse(text))}
    found = {text.count("\n", 0, match.end()) + 1 for match in RELATIVE_IMPORT.finditer(text)}
    assert found == real


def test_no_postponed_annotations(travelling: Path) -> None:
    """They turn the annotation `config: LocAtViTConfig` into text, and the model class loses its configuration."""
    assert "from __future__" not in travelling.read_text()


def test_no_buffers_and_no_cached_methods(travelling: Path) -> None:
    """Models are built without memory: a buffer made in `__init__` holds random bytes afterwards. Caches leak modules.

    BatchNorm brings its own buffers; that is torch's code.
    """
    for node in ast.walk(ast.parse(travelling.read_text())):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "attr", None) != "register_buffer", f"{travelling.name}:{node.lineno}"
        if isinstance(node, ast.ClassDef):
            for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
                decorators = " ".join(map(ast.unparse, method.decorator_list))
                assert "cache" not in decorators, f"{travelling.name}:{method.lineno} caches a method"


def test_modeling_files_dispatch_attention_literally(travelling: Path) -> None:
    """`set_attn_implementation` reads the source of the model's module for exactly these words."""
    if travelling.name.startswith("modeling_") and travelling.name != "modeling_utils_locat.py":
        assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in travelling.read_text()


def test_a_configuration_is_read_without_models_and_images(travelling: Path) -> None:
    """A JSON file about a model needs neither the model's code nor torchvision."""
    if travelling.name.startswith("configuration_"):
        tree = ast.parse(travelling.read_text())
        assert all(node.module.startswith("configuration_") for node in relative_imports(tree))
        assert not {"torch", "torchvision"} & {name for name, _ in imports(tree)}


def test_sub_packages_do_not_import_each_other_in_a_circle() -> None:
    """Wherever the imports stand: whoever reads a package has read those that it needs before."""
    packages = {path.parent.name: path.parent for path in (ROOT / "locatvit_hf").glob("*/__init__.py")}
    needed = {name: set() for name in packages}
    for name, folder in packages.items():
        for path in folder.rglob("*.py"):
            for node in relative_imports(ast.parse(path.read_text())):
                if node.level == len(path.relative_to(folder).parts) + 1:  # as far up as the package
                    modules = [node.module] if node.module else [alias.name for alias in node.names]
                    needed[name].update(module.partition(".")[0] for module in modules)
    found = {name: sorted(others & packages.keys()) for name, others in needed.items()}
    assert "utils" in found["hub"] and found["utils"] == []
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError, which names the circle


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(project: dict[str, object], *extras: str) -> dict[str, Requirement]:
    """What the package and these extras need from elsewhere, by name."""
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {need.name: need for need in map(Requirement, lines) if need.name != project["name"]}


def test_floor_pins_the_lower_bounds(project: dict[str, object]) -> None:
    """`make test-floor` tests what pyproject.toml promises: the same packages at the same versions."""
    lines = (ROOT / "tests" / "floor.txt").read_text().splitlines()
    pins = {pin.name: lowest(pin) for pin in map(Requirement, (line for line in lines if line[:1] != "#"))}
    users = [extra for extra in project["optional-dependencies"] if extra != "dev"]
    assert pins == {name: lowest(need) for name, need in requirements(project, *users).items()}


def lowest(requirement: Requirement) -> Version:
    """The version of `name==1.2` or `name>=1.2`."""
    (specifier,) = requirement.specifier
    assert specifier.operator in ("==", ">="), f"{requirement} has no lower bound"
    return Version(specifier.version)


IMPORT_NAMES = {"PIL": "pillow", "faiss": "faiss-cpu", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# The repository itself, the tests that transformers brings, and what pytest brings.
PACKAGES = ["locatvit_hf", "training", "benchmarks", "examples", "experiments", "tests"]
OWN = {*PACKAGES, "transformers_tests", "packaging"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package: str, project: dict[str, object]) -> None:
    """A package that happens to be installed is not a dependency: pyproject.toml names everything that is imported."""
    extras = project["optional-dependencies"].keys() - (set() if package == "tests" else {"dev"})
    declared = {name.lower().replace("-", "_") for name in requirements(project, *extras)} | OWN
    for path in (ROOT / package).rglob("*.py"):
        for name, optional in imports(ast.parse(path.read_text())):
            optional = optional or name == "tomllib"  # of the standard library from Python 3.11 on
            distribution = IMPORT_NAMES.get(name, name).lower().replace("-", "_")
            known = optional or name in sys.stdlib_module_names or distribution in declared
            assert known, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"
