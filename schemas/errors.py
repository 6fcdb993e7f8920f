"""The few ways a run can end badly, each with its exit code: what a person reads instead of a traceback.

Every leaf also inherits the standard error it stands in for, so library users can catch either.
A new leaf is needed only where the exit code differs, or where a caller must tell it apart.
"""

import shlex

from dpo_opt.schemas.safe_text import printable


def quoted(name: object) -> str:
    """A path, a URL or another name as one word of a shell, on one line.

    A fix is there to be copied, whatever the folder is called, and a stranger's name must not look like
    another line of the message. What a terminal would obey or hide is escaped as bash has it.
    """
    text = str(name)
    return shlex.quote(text) if text.isprintable() else f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    # A byte of a file's name that is no UTF-8 is a lone surrogate in Python.
    rule = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", rule))


def first_line(error: BaseException, *, lines: int = 2, length: int = 200, named: bool | None = None) -> str:
    """What a library's error says first, short enough for a line of a message; never empty.

    Args:
        error: Of a library.
        lines: How many of its lines are kept, joined. Of a validation error of pydantic at least three are,
            because the third line says what is wrong.
        length: Most characters of its text.
        named: Whether the error's class stands before its text. None: where the text alone says too little,
            as that of a ``KeyError``.
    """
    said = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    kept = max(lines, 3) if said and "validation error" in said[0] else lines
    text = printable(" ".join(said[:kept]))[:length]
    name = type(error).__name__
    if named is None:
        named = bool(text) and not isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return f"{name}: {text or 'no message'}" if named else text or name


class DpoOptError(Exception):
    """A failure that is explained: what is wrong, where, why it matters and the command that fixes it.

    Args:
        what: The fact, with both values where two disagree.
        where: File and line, or shard and row.
        why: What would go wrong if the run went on.
        fix: One command, or one thing to do.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        # Where it is, is a name that others may have given: it stays on its line.
        head = f"{' '.join(self.where.splitlines())}: {self.what}" if self.where else self.what
        lines = [head]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return printable("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and workers send errors home.
        others = {name: value for name, value in vars(self).items() if name != "what"}
        return (_rebuild, (type(self), self.what, others))


def _rebuild(kind: type[DpoOptError], what: str, others: dict[str, str | None]) -> DpoOptError:
    return kind(what, **others)


class ConfigError(DpoOptError, ValueError):
    """A setting that cannot work: an unknown key, a missing model folder, a used output folder."""

    exit_code = 2


class DataError(DpoOptError, ValueError):
    """Data that cannot be used: a malformed row, a missing shard, a byte that changed on disk.

    Args:
        what: As in the base, and so are the next three.
        where: File and line, or shard and row.
        why: What would go wrong.
        fix: One thing to do.
        kind: Short name under which rows with the same defect are counted.
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(what, where=where, why=why, fix=fix)
        self.kind = kind


class FingerprintError(DpoOptError, ValueError):
    """Shards that were computed for something else than what they are being used for."""

    exit_code = 4


class EngineStopped(DpoOptError):
    """An engine broke at what it was asked, maybe through one row of it; asked again, it starts anew."""


class Interrupted(DpoOptError):
    """A person pressed Ctrl-C; what was finished is kept, and the same command goes on."""

    exit_code = 130


class Preempted(DpoOptError):
    """The scheduler asked for the machine; what was finished is kept, and the same command goes on."""

    exit_code = 75
