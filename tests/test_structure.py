"""How the package is built: rooms import one way, foundations stay light, functions stay short, names are the field's."""

import ast
import contextlib
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "llama_lite"
ROOMS = (  # a room imports those before it, and itself; `chat_format` and `kernels` stand side by side
    ("",),
    ("machine",),
    ("config",),
    ("data",),
    ("chat_format", "kernels"),
    ("checkpoint",),
    ("hub",),
    ("models",),
    ("evaluation",),
    ("training",),
    ("studies",),
    ("commands",),
)
SCRIPTS = sorted(ROOT.glob("run_*.py"))
SOURCES = [*SCRIPTS, *sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "model_card").rglob("*.py"))]
LONGEST, LONGEST_MAIN = 60, 110  # lines
DIALECT = set(
    "place told say on_main NoAnswer NotAllowed learnt meant mass shares fuse mended Asked seal settle_cpu wanted_recipe "
    "set_aside hand_over side_by_side use_blocks".split()
)
UNITS = re.compile(
    r"\b(nats?|tokens?|bytes?|bits?|items?|FLOPs?|seconds|windows|rows) an? (token|second|byte|step|item)\b"
)


def room_of(module: str) -> str:
    return module.partition(".")[0] if "." in module else ""


def imports_of(path: Path, at_import: bool = False) -> set[str]:
    """The modules of the package that a module imports, dotted, without the package's name. at_import: leave out those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    inner = {id(node) for function in functions for node in ast.walk(function)} if at_import else set()
    package = ["llama_lite", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in inner:
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        for alias in node.names:
            parts = [*base, *(node.module or "").split("."), alias.name]
            parts = [part for part in parts if part]
            while parts and not Path(ROOT, *parts).with_suffix(".py").exists():
                parts.pop()
            if parts and parts[0] == "llama_lite":
                found.add(".".join(parts[1:]))
    return found


def test_rooms_import_those_before_them():
    rank = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    assert folders == set(rank) - {""}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for imported in imports_of(path):
            ours, theirs = room_of(module), room_of(imported)
            if ours != theirs and rank[theirs] >= rank[ours]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_modules_import_each_other_in_no_circle():
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): imports_of(path, at_import=True)
        for path in PACKAGE.rglob("*.py")
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " > ".join((*path, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_nothing_of_the_card_imports_the_package():
    for path in (ROOT / "model_card").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) llama_lite", path.read_text(encoding="utf-8"), re.M), path


FOUNDATIONS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", ["hub.client", ",".join(FOUNDATIONS)])
def test_foundations_and_the_hubs_client_load_no_heavy_library(module):
    heavy = "torch transformers datatrove trl peft datasets accelerate"
    code = f"import importlib, sys\nfor name in {module!r}.split(','): importlib.import_module('llama_lite.' + name)\n"
    code += f"print([name for name in {heavy!r}.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_functions_are_short():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                most = LONGEST_MAIN if path in SCRIPTS and node.name == "main" else LONGEST
                if (lines := node.end_lineno - node.lineno + 1) > most:
                    long.append(f"{path.relative_to(ROOT)} {node.name} {lines}")
    assert not long


def names_of(tree: ast.AST):
    """Every name that code defines: functions, classes, parameters, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def test_names_are_the_fields():
    found = []
    for path in SOURCES:
        for name, line in names_of(ast.parse(path.read_text(encoding="utf-8"))):
            if name in DIALECT or (path.parent.name == "kernels" and name.startswith("of_")):
                found.append(f"{path.relative_to(ROOT)}:{line} {name}")
    assert not found


def texts_of(path: Path):
    """(line, text) of every line of a file, and of every string of Python code, whose parts can stand on several lines."""
    source = path.read_text(encoding="utf-8")
    yield from enumerate(source.splitlines(), 1)
    for node in ast.walk(ast.parse(source)) if path.suffix == ".py" else ():
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_units_are_per_something():
    found = []
    for path in [*SOURCES, *sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "model_card").rglob("*.j2"))]:
        for number, text in texts_of(path):
            if match := UNITS.search(" ".join(text.split())):
                found.append(f"{path.relative_to(ROOT)}:{number} {match[0]}")
    assert not found


def trees_of(path: Path):
    """The syntax tree of a file, and of the code in its strings that imports the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "llama_lite" in node.value:
            with contextlib.suppress(SyntaxError):  # a text, or a template of code
                yield ast.parse(node.value)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_uses_of_the_package_exists(path):
    """One was broken for a day by functions that had been renamed: nothing runs them but people."""
    missing = []
    for tree in trees_of(path):
        modules = {}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("llama_lite"):
                continue
            for alias in node.names:
                if importlib.util.find_spec(node.module).submodule_search_locations and (
                    importlib.util.find_spec(f"{node.module}.{alias.name}")
                ):
                    modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                elif not hasattr(importlib.import_module(node.module), alias.name):
                    missing.append(f"{node.module}.{alias.name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                module = modules[node.value.id]
                missing += [] if hasattr(module, node.attr) else [f"{module.__name__}.{node.attr}"]
    assert not missing
