"""The quickstart's commands, and what they print.

``python tests/quickstart.py`` runs them and writes the page again. In ``docs/quickstart.md`` a block of
``bash`` is a command that is run, and the block of ``text`` after it is what it printed on stdout. A block of
``python`` with a title is a file. A block of ``sh`` is not run.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quickstart.md"
PICTURE = ROOT / "docs" / "images" / "report.png"
_BLOCK = re.compile(
    r'```(?:python title="(?P<file>[^"]+)"\n(?P<content>.*?)|bash\n(?P<command>.*?))```\n'
    r"(?:\n```text\n(?P<output>.*?)```\n)?",
    re.DOTALL,
)


class Step(NamedTuple):
    """A file to write or a command to run, in the order of the page."""

    file: str | None
    content: str
    """Of the file; or the command, maybe several lines."""
    output: str


def steps(page: str) -> list[Step]:
    """What the page tells its reader to do."""
    return [
        Step(found["file"], found["content"] or found["command"], found["output"] or "")
        for found in _BLOCK.finditer(page)
    ]


def run(step: Step, folder: Path) -> str:
    """Do one step in a folder, and return what it printed.

    Raises:
        CalledProcessError: The command failed.
    """
    if step.file is not None:
        (folder / step.file).write_text(step.content, encoding="utf-8")
        return ""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-e", "-c", step.content],
        cwd=folder, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip


def with_outputs(page: str, folder: Path) -> str:
    """The page with every output as it is now; the commands leave their files in ``folder``."""

    def done(found: re.Match[str]) -> str:
        step = Step(found["file"], found["content"] or found["command"], "")
        output = run(step, folder)
        block = found[0].partition("\n```text\n")[0]
        return block + (f"\n```text\n{output.strip(chr(10))}\n```\n" if output.strip() else "")

    return _BLOCK.sub(done, page)


def take_picture(report: Path) -> None:
    """The top of the report, as a browser shows it."""
    PICTURE.parent.mkdir(exist_ok=True)
    size = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,980"]
    subprocess.run(["chromium", *size, f"--screenshot={PICTURE}", report.as_uri()], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        PAGE.write_text(with_outputs(PAGE.read_text(encoding="utf-8"), Path(made)), encoding="utf-8")
        take_picture(Path(made) / "report.html")
