"""The house: no folder imports one above it, and no import runs in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "obcache_sglang"
# From the ground up: what a folder may import stands before it.
STOREYS = ("settings", "kv", "compress", "cpu", "gpu", "scheduler", "frontend")
MESSAGES_ARE_BELOW = ("scheduler", "frontend")


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imports(name: str) -> set[str]:
    """Modules of ours that a module imports, anywhere in it, for types too."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{each.name}" for each in node.names]
            found |= {each if each in MODULES else node.module for each in names}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return found & MODULES.keys() - {name}


def folder(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and parts[1] in STOREYS) else ""


@pytest.mark.parametrize("name", sorted(each for each in MODULES if folder(each) in STOREYS))
def test_no_folder_imports_one_above_it(name: str) -> None:
    """Not for types either: a name that is known is a thing that is depended on."""
    height = STOREYS.index(folder(name))
    above = {each for each in imports(name) if folder(each) in STOREYS[height + 1 :]}
    assert not above
    if folder(name) not in MESSAGES_ARE_BELOW:
        assert "obcache_sglang.messages" not in imports(name)
    beside = {("gpu", "cpu"), ("frontend", "scheduler"), ("cpu", "compress")}
    assert not {each for each in imports(name) if (folder(name), folder(each)) in beside}


def test_no_import_runs_in_a_circle() -> None:
    """Imports within functions and for types count too."""
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()


def test_core_files_stay_readable() -> None:
    assert {name for name, file in MODULES.items() if len(file.read_text(encoding="utf-8").splitlines()) > 450} == set()


SHAPE = re.compile(r"\[[a-zA-Z0-9.][^\]]*\]|\bany shapes?\b|^As `|\bas in `|\bscalar\b", re.MULTILINE)
"""What a docstring says of a tensor: a list of dimensions, or where that stands."""


def without_shapes(source: str) -> list[str]:
    """The functions, nested ones too, that take or give tensors and do not say of which shape. Triton's kernels take pointers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        annotations = [node.returns, *(each.annotation for each in arguments if each is not None)]
        takes_tensors = any("torch.Tensor" in ast.unparse(each) for each in annotations if each is not None)
        if takes_tensors and not SHAPE.search(ast.get_docstring(node) or ""):
            found.append(node.name)
    return found


@pytest.mark.parametrize("name", sorted(each for each in MODULES if folder(each) in STOREYS))
def test_functions_of_tensors_say_shapes(name: str) -> None:
    assert not without_shapes(MODULES[name].read_text(encoding="utf-8"))


def test_a_function_that_does_not_is_found() -> None:
    said, unsaid = '"""x: [tokens, heads] float32."""', '"""What is highest."""'
    for docstring, found in ((said, []), (unsaid, ["f"])):
        assert without_shapes(f"def f(x: torch.Tensor | None) -> int:\n    {docstring}\n    return 1\n") == found
    assert without_shapes("def f() -> list[torch.Tensor]:\n    return []\n") == ["f"]
    assert without_shapes("def f(x: int) -> int:\n    return x\n") == []
