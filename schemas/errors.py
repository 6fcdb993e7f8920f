"""The errors that a user reads instead of a traceback, each with its exit code; quoting of names in messages.

ConfigError, DataError and FingerprintError are also ValueErrors, so users of the library can catch either. A
new class is needed only if its exit code differs, or if a caller must tell it apart.
"""

import shlex

from dpo_opt.schemas.safe_text import printable

AGAIN = "run the same command again"
"""Of a fix; a command that would refuse to run again puts the one that goes on in its place."""


def quoted(name: object) -> str:
    """A path, a URL or another name as one shell word, on one line.

    Users copy a fix into a shell, so it must work for folders of any name. A name chosen by a stranger must
    not look like another line of the message. Characters that a terminal would obey or hide are escaped in
    bash's way.
    """
    text = str(name)
    return shlex.quote(text) if text.isprintable() else f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    # In Python, a byte of a file name that is not UTF-8 is a lone surrogate.
    rule = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", rule))


def first_line(error: BaseException, *, lines: int = 2, length: int = 200, named: bool | None = None) -> str:
    """The first lines of a library's error, short enough for one line of a message; never empty.

    Args:
        error: An error that a library raised.
        lines: How many of its lines are kept and joined. Of pydantic's validation errors at least three are
            kept, because the third line says what is wrong.
        length: Most characters of its text.
        named: Whether the error's class is put before its text. None: only if the text alone says too little,
            as for a ``KeyError``.
    """
    said = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    kept = max(lines, 3) if said and "validation error" in said[0] else lines
    text = printable(" ".join(said[:kept]))[:length]
    name = type(error).__name__
    if named is None:
        named = bool(text) and not isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return f"{name}: {text or 'no message'}" if named else text or name


class DpoOptError(Exception):
    """An error with an explanation: what is wrong, where, why it matters, and the one command that fixes it.

    Args:
        what: What is wrong; both values, if two disagree.
        where: File and line, or shard and row.
        why: What would go wrong if the run continued.
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
        # `where` may hold a name that a stranger chose: it must stay on its line.
        head = f"{' '.join(self.where.splitlines())}: {self.what}" if self.where else self.what
        lines = [head]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return printable("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send errors back pickled, and the default pickling loses keyword-only arguments.
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
        what: See ``DpoOptError``, also for ``where``, ``why`` and ``fix``.
        where: File and line, or shard and row.
        why: What would go wrong.
        fix: One thing to do.
        kind: Short name under which rows with the same problem are counted.
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
    """Shards that were scored with another model, tokenizer or setting than they are used with now."""

    exit_code = 4


class EngineStopped(DpoOptError):
    """An engine failed on its sequences, maybe because of a single row. Its next call starts it again."""


class Interrupted(DpoOptError):
    """The user pressed Ctrl-C. Finished work is kept, and the same command continues from there."""

    exit_code = 130


class Preempted(DpoOptError):
    """The scheduler needs the machine. Finished work is kept, and the same command continues from there."""

    exit_code = 75
