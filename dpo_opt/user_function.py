"""Loads the Python function that a user names as ``FILE.py:NAME``, and checks every number that it returns.

The user's code runs with the rights of the command. So it is loaded only where an option names it: never
because a file of results, a run folder or a dataset does.
"""

import hashlib
import importlib.util
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from dpo_opt.schemas.errors import ConfigError, DataError, first_line, quoted

_FORM = "def NAME(prompts: list[str], completions: list[str]) -> list[float]"


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A user's function that rates completions; call it as ``rate(prompts, completions)``."""

    name: str
    """``FILE.py:NAME``, as it was given."""
    sha256: str
    """Of the file, in hex: results that are kept say by which code they were rated."""
    function: Callable[[list[str], list[str]], Iterable[float]]

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Rate completions.

        Args:
            prompts: N texts.
            completions: N texts; each answers the prompt at its place.

        Returns:
            N finite numbers.

        Raises:
            DataError: The function raised an error, or returned anything but N finite numbers.
        """
        try:
            found = list(self.function(list(prompts), list(completions)))
        except (Exception, SystemExit) as error:
            raise DataError(
                f"the function raised {first_line(error, named=True)}",
                where=_place(error, self.name),
                why="without its numbers the completions have no ratings",
                fix=f"correct {quoted(self.name)}, then run the same command again",
            ) from error
        if len(found) != len(completions):
            raise self._refused(f"it returned {len(found)} numbers for {len(completions)} completions")
        return [self._number(value, at) for at, value in enumerate(found)]

    def _number(self, value: object, at: int) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            raise self._refused(f"it returned a {type(value).__name__} for completion {at}") from None
        if not math.isfinite(number):
            raise self._refused(f"it returned {number} for completion {at}")
        return number

    def _refused(self, what: str) -> DataError:
        return DataError(
            what,
            where=self.name,
            why="each completion needs one finite number, in the order given",
            fix=f"write it as {_FORM}",
        )


def load_user_function(named: str) -> UserFunction:
    """Load ``FILE.py:NAME``. The file's top level runs now, the function when it is called.

    Raises:
        ConfigError: It has another form, the file is not there or cannot be loaded, or has no such function.
    """
    file, colon, name = named.rpartition(":")
    if not (colon and file.endswith(".py") and name.isidentifier()):
        raise ConfigError(
            f"{quoted(named)} names no function",
            why="a function is named by its file and its name in it",
            fix=f"pass FILE.py:NAME, with {_FORM} in FILE.py",
        )
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"there is no file {quoted(file)}", fix="pass FILE.py:NAME of a file that is there")
    code = path.read_bytes()
    function = getattr(_loaded(path), name, None)
    if not callable(function):
        raise ConfigError(f"it has no function {name}", where=file, fix=f"write {_FORM} there")
    return UserFunction(named, hashlib.sha256(code).hexdigest(), function)


def _loaded(path: Path) -> ModuleType:
    # Not put into `sys.modules`: a file named like a package would stand in for that package.
    spec = importlib.util.spec_from_file_location(f"dpo_opt_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"the file cannot be loaded: {first_line(error, named=True)}",
            where=_place(error, str(path)),
            fix=f"python {quoted(path)}",
        ) from error
    return module


def _place(error: BaseException, otherwise: str) -> str:
    """File and line at which a user's code failed, its own code before a library's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    file = otherwise.partition(".py:")[0].removesuffix(".py") + ".py"
    # Python makes the path of a file that it loads absolute.
    own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == Path(file).absolute()]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else otherwise
