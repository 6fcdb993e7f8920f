"""The shape of the code: which way imports go between files and rooms; how long functions and files are."""

import ast
import graphlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from import_statements import imports_of

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("feedback", "precompute", "optimize", "analysis", "schemas")
LONGEST_FUNCTION = 80
LONGEST_FILE = 350

SOURCES = {
    ".".join(path.relative_to(ROOT / "dpo_opt").with_suffix("").parts): path
    for stage in STAGES
    for path in sorted((ROOT / "dpo_opt" / stage).rglob("*.py"))
} | {path.stem: path for path in sorted((ROOT / "dpo_opt").glob("*.py"))}
COMMANDS = {
    f"{room}.{path.stem}": path
    for room in ("commands", "kl", "sweep")
    for path in sorted((ROOT / "dpo_opt" / room).glob("*.py"))
}
MODULES = {name.removesuffix(".__init__"): path for name, path in (SOURCES | COMMANDS).items()}
"""Name below ``dpo_opt`` to file."""


def imported(text: str) -> Iterator[str]:
    """Modules, or names in them, that a file imports from ``dpo_opt``, below that name."""
    for found in imports_of(text, file="", folder=""):
        if found.top == "dpo_opt" and found.module != "dpo_opt" and not found.for_types:
            yield found.module.removeprefix("dpo_opt.")


def edges(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Module to the modules that it imports."""
    found: dict[str, set[str]] = {}
    for name, text in texts.items():
        targets = {t if t in texts else t.rpartition(".")[0] for t in imported(text)}
        found[name] = {t for t in targets if t in texts and t != name}
    return found


def room_of(module: str) -> str:
    """The folder of a stage that a module lies in; a file on top of a stage is a room of its own."""
    return ".".join(module.split(".")[:2])


def between_rooms(graph: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, targets in graph.items():
        found.setdefault(room_of(module), set()).update(map(room_of, targets))
    return {room: targets - {room} for room, targets in found.items()}


GRAPH = edges({name: path.read_text(encoding="utf-8") for name, path in MODULES.items()})


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_the_modules_are_seen() -> None:
    assert "schemas.errors" in GRAPH["schemas.shards"]
    assert "precompute.shards.commits" in GRAPH["precompute.run"]
    assert "optimize.forward" in between_rooms(GRAPH)["optimize.checkpoint"]


def test_no_two_files_import_each_other() -> None:
    # A package's own file offers what its modules have.
    graph = {name: targets for name, targets in GRAPH.items() if MODULES[name].name != "__init__.py"}
    assert circle(graph) == []


def test_rooms_stand_above_one_another() -> None:
    graph = {name: targets for name, targets in GRAPH.items() if MODULES[name].name != "__init__.py"}
    assert circle(between_rooms(graph)) == []


def test_a_circle_is_noticed() -> None:
    texts = {
        "a.x.one": "from dpo_opt.a.y import two",
        "a.y.two": "def late():\n    from dpo_opt.a.x.three import name",
        "a.x.three": "if TYPE_CHECKING:\n    from dpo_opt.a.y import two",
    }
    assert circle(edges(texts)) == []
    assert set(circle(between_rooms(edges(texts)))) == {"a.x", "a.y"}
    texts["a.x.three"] = "from dpo_opt.a.x import one"
    assert set(circle(edges(texts))) == {"a.x.one", "a.y.two", "a.x.three"}


def test_precompute_reads_from_top_to_bottom() -> None:
    order = ["run", "workers", "check", "shards", "tokens", "read"]
    graph = between_rooms(GRAPH)
    for i, room in enumerate(order):
        above = {f"precompute.{name}" for name in order[:i]}
        assert graph[f"precompute.{room}"].isdisjoint(above), room
    assert graph["precompute.engine"].isdisjoint({f"precompute.{name}" for name in order})


def too_long(text: str, longest: int) -> list[str]:
    """Functions with more lines."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions) and (node.end_lineno or 0) - node.lineno + 1 > longest
    ]


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_can_be_read_at_one_sitting(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert too_long(text, LONGEST_FUNCTION) == []


def test_a_long_function_is_noticed() -> None:
    assert too_long("class A:\n    def f():\n        a\n        b\n    def g(): pass\n", 2) == ["f"]
