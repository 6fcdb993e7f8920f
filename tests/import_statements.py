"""What files import, read from their syntax trees: nothing is run, so lazy imports are seen too."""

import ast
from collections.abc import Iterator
from typing import NamedTuple


class Import(NamedTuple):
    """One module, or a name in it, that a file imports."""

    file: str
    line: int
    folder: str
    module: str
    lazy: bool
    """Inside a function, or for type checkers only."""
    for_types: bool
    """For type checkers only: nothing is loaded for it."""

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports_of(text: str, *, file: str, folder: str) -> Iterator[Import]:
    """The import statements of a file, in order; a relative one fails the test."""

    def visit(node: ast.AST, lazy: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            checked = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                modules = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: a relative import"
                modules = [f"{child.module}.{alias.name}" for alias in child.names]
            else:
                modules = []
            for module in modules:
                yield Import(file, child.lineno, folder, module, lazy, for_types)
            yield from visit(child, lazy or checked or is_function, for_types or checked)

    yield from visit(ast.parse(text), lazy=False, for_types=False)
