"""Imports run one way: a module sees rows above its own and, inside a row, what stands before it."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import perpixel

PACKAGE = Path(perpixel.__file__).parent

# Top to bottom; a name stands for itself and all that is below it, the longest match counts. Names of one row may not
# see each other, unless they are of one package; an arrow inside a row of the design is a row of its own here.
ROWS = (
    ("errors", "distributed", "allocator"),
    ("rle", "video"),
    ("drawing", "third_party"),
    ("config", "structures"),
    ("locations", "ops", "coco_categories"),
    ("nn", "assign"),
    ("methods", "methods.detector"),
    ("methods.fcos",),
    ("methods.mip", "methods.directpose", "methods.condinst"),
    ("methods.boxinst",),
    ("data", "optimize"),
    ("metrics",),
    ("engine",),
    ("analysis",),
    ("recipe",),
    ("interop.adelaidet",),
    ("hub",),
    ("predictor",),
    ("runs", "annotate"),
    ("demo",),
    ("interop",),
    ("cli",),
    ("__main__",),
    ("",),  # the package itself
)

# Pairs that may not meet, whatever their rows.
STRANGERS = (("data", "methods"), ("engine", "methods"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Modules of perpixel that a file imports anywhere, for more than type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {id(n) for node in ast.walk(tree) if _for_type_checkers(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("perpixel.") for a in node.names if a.name.startswith("perpixel."))
        elif isinstance(node, ast.ImportFrom) and node.module == "perpixel":
            yield from (a.name for a in node.names if not a.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("perpixel."):
            base = str(node.module).removeprefix("perpixel.")
            yield from (f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def row(module: str) -> tuple[int, str]:
    """Row and name of the longest entry that a module falls under."""
    entries = [(name, i) for i, names in enumerate(ROWS) for name in names]
    matches = [(name, i) for name, i in entries if name in ("", module) or module.startswith(name + ".")]
    name, index = max(matches, key=lambda match: len(match[0]))
    return index, name


GRAPH = {module_name(path): set(imports(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_module_has_a_row() -> None:
    assert [module for module in GRAPH if module and row(module)[1] == ""] == []


def test_modules_import_from_rows_above_alone() -> None:
    wrong = []
    for module, seen in GRAPH.items():
        (own, own_name) = row(module)
        for other in seen:
            level, name = row(other)
            if level > own or (level == own and name != own_name):
                wrong.append(f"{module} (row {own}) imports {other} (row {level})")
    assert wrong == []


def test_no_modules_import_each_other() -> None:
    try:
        order = list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        raise AssertionError(f"modules import each other: {error.args[1]}") from error
    assert len(order) >= len(GRAPH)


def test_strangers_never_meet() -> None:
    meetings = [
        f"{module} imports {other}"
        for module, seen in GRAPH.items()
        for other in seen
        for a, b in STRANGERS
        if {module.split(".")[0], other.split(".")[0]} == {a, b}
    ]
    assert meetings == []


def test_only_the_transforms_know_tv_tensors() -> None:
    users = [m for m in GRAPH if m and "tv_tensors" in _source(m)]
    assert users in ([], ["data.transforms"])


def _source(module: str) -> str:
    path = PACKAGE.joinpath(*module.split("."))
    file = path.with_suffix(".py")
    return (file if file.is_file() else path / "__init__.py").read_text(encoding="utf-8")
