"""What must hold in every file, read from its source: the rules that keep remote code loadable and the floor honest.

Remote code is the Python files directly in `locatvit_hf/`. They are copied beside the weights and run on
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

from tests.repeated_lines import package_files, repeated_blocks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
REMOTE_CODE = sorted(path for path in (ROOT / "locatvit_hf").glob("*.py") if path.name != "__init__.py")
ALLOWED = {"torch", "torchvision", "transformers", "huggingface_hub"} | sys.stdlib_module_names

# How transformers finds the files that a file needs: lines of text, wherever they stand.
RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.|import\s+\.)", re.MULTILINE)


@pytest.fixture(params=REMOTE_CODE, ids=lambda path: path.name)
def remote_file(request: pytest.FixtureRequest) -> Path:
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


def test_there_is_remote_code() -> None:
    names = {path.name for path in REMOTE_CODE}
    assert {"locat.py", "configuration_locatvit.py", "modeling_locatvit.py", "image_processing_locatvit.py"} <= names


def test_imports_only_what_every_user_has(remote_file: Path) -> None:
    needed = set(imports(ast.parse(remote_file.read_text())))
    forbidden = {name for name, optional in needed if name not in ALLOWED and not (optional and name == "triton")}
    assert not forbidden, f"{remote_file.name} needs {', '.join(sorted(forbidden))}"


def test_relative_imports_are_flat(remote_file: Path) -> None:
    """Only `from .name import X`: transformers finds neither packages, parents nor `from . import name`."""
    for node in relative_imports(ast.parse(remote_file.read_text())):
        assert node.level == 1 and node.module, f"{remote_file.name}:{node.lineno} is no `from .name import X`"
        assert "." not in node.module, f"{remote_file.name}:{node.lineno} imports from a sub-folder"
        assert (remote_file.parent / f"{node.module}.py").is_file(), f"{remote_file.name}:{node.lineno}: no such file"
        assert all(alias.name != "*" for alias in node.names), f"{remote_file.name}:{node.lineno} imports everything"


def test_no_text_reads_like_a_relative_import(remote_file: Path) -> None:
    """A docstring line that starts with `from .` is an import to transformers, which then looks for the file."""
    text = remote_file.read_text()
    real = {node.lineno for node in relative_imports(ast.parse(text))}
    found = {text.count("\n", 0, match.end()) + 1 for match in RELATIVE_IMPORT.finditer(text)}
    assert found == real


def test_no_postponed_annotations(remote_file: Path) -> None:
    """They turn the annotation `config: LocAtViTConfig` into text, and the model class loses its configuration."""
    assert "from __future__" not in remote_file.read_text()


def test_no_buffers_and_no_cached_methods(remote_file: Path) -> None:
    """Models are built without memory: a buffer made in `__init__` holds random bytes afterwards. Caches leak modules.

    BatchNorm brings its own buffers; that is torch's code.
    """
    for node in ast.walk(ast.parse(remote_file.read_text())):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "attr", None) != "register_buffer", f"{remote_file.name}:{node.lineno}"
        if isinstance(node, ast.ClassDef):
            for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
                decorators = " ".join(map(ast.unparse, method.decorator_list))
                assert "cache" not in decorators, f"{remote_file.name}:{method.lineno} caches a method"


def test_modeling_files_dispatch_attention_literally(remote_file: Path) -> None:
    """`set_attn_implementation` reads the source of the model's module for exactly these words."""
    if remote_file.name.startswith("modeling_") and remote_file.name != "modeling_utils_locat.py":
        assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in remote_file.read_text()


def test_a_configuration_is_read_without_models_and_images(remote_file: Path) -> None:
    """A JSON file about a model needs neither the model's code nor torchvision."""
    if remote_file.name.startswith("configuration_"):
        tree = ast.parse(remote_file.read_text())
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


# What each family spells out for its readers: its fields, residual branches, heads and keys, and the loops of a kernel.
SPELLED_OUT = tuple(f"locatvit_hf/{name}" for name in ("configuration_", "modeling_", "triton_", "conversion/locat"))


def test_no_block_of_lines_stands_twice(tmp_path: Path) -> None:
    """`python -m tests.repeated_lines` lists them all; a comment with the word "twice" before a block excuses it."""
    found = [blocks for blocks in repeated_blocks(package_files()) if not blocks[0].startswith(SPELLED_OUT)]
    assert not found, "\n".join(f"{length} lines: {one} and {other}" for one, other, length in found)


@pytest.mark.parametrize(("comment", "number"), [("", 1), ("# Stands twice: neither may import the other.", 0)])
def test_repeated_lines_are_found(comment: str, number: int, tmp_path: Path) -> None:
    block = "\n".join(f"    value_{index} = {index}" for index in range(7))
    (tmp_path / "one.py").write_text(f'def one(a,\n        b):\n    """Says so."""\n{block}\n')
    (tmp_path / "two.py").write_text(f"def two():\n    {comment}\n\n{block}\n    return 1\n")
    found = repeated_blocks([tmp_path / "one.py", tmp_path / "two.py"], root=tmp_path)
    assert found == [("one.py:4", "two.py:4", 7)][:number]


# Modules and names that were given up for the field's own words; options, configuration fields and recipe keys stay.
FORMER_MODULES = {
    "batches", "code_in", "exhibit", "keys", "kinds", "page", "pickles", "pictures", "pretrained", "publish",
    "remote", "reproduce", "samples", "self_distillation", "writing",
}  # fmt: skip
FORMER_PATHS = (
    "demo", "evidence", "locatvit_hf/conversion/export.py", "locatvit_hf/conversion/sources.py",
    "locatvit_hf/hub/families.py", "locatvit_hf/serving/examples.py", "locatvit_hf/visualization/layers.py",
    "training/inference.py",
)  # fmt: skip
FORMER_NAMES = {
    "APART", "ELSEWHERE", "Exhibit", "FeatureMapsMixin", "Interruption", "LEFT_BEHIND", "ONLY_VALUES", "Reference",
    "SAME_VALUE", "SPELLINGS", "TRAINED_WITH", "WAITS", "WITHOUT_EFFECT", "_account", "_agree", "_keep_batches",
    "_rehearse", "_undecayed", "account", "as_it_is", "ask", "atomic_folder", "bonus", "check_kind", "code_in",
    "complete_or_absent", "headless", "identify", "name_stages", "of_maps", "one_sentence_errors", "spell",
    "spread", "write_complete",
}  # fmt: skip


def names_of(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, arguments and variables, where they come into being or are imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.name


def test_modules_and_names_are_the_words_of_the_field() -> None:
    found = [path for path in FORMER_PATHS if (ROOT / path).exists()]
    for path in package_files():
        where = str(path.relative_to(ROOT))
        found += [where] if path.stem in FORMER_MODULES else []
        found += [f"{where}: {name}" for name in sorted(FORMER_NAMES & set(names_of(ast.parse(path.read_text()))))]
    assert not found, "\n".join(found)
