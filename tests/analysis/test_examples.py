"""The worked examples of docs/analysis.md run as they stand."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
OTHERS = ("duckdb", "pandas", "datasets")


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    shards_writer: Callable[..., Any],
    run_writer: Callable[..., Path],
    texts: Callable[..., list[tuple[str, str, str]]],
) -> Path:
    """What the examples expect in the folder they run in."""
    path = tmp_path_factory.mktemp("examples")
    rows = texts(120, prompts=60)
    pairs = shards_writer(path / "shards", rows)
    run_writer(path / "run", path / "shards", pairs)
    run_writer(path / "run2", path / "shards", pairs, strength=2.0)
    lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in rows]
    (path / "pairs.jsonl").write_text("".join(lines))
    return path


def subject(example: str) -> str:
    """The library that an example shows, or the first words it imports."""
    return next((name for name in OTHERS if name in example), example.split("import ")[-1].splitlines()[0])


@pytest.mark.parametrize("example", EXAMPLES, ids=subject)
def test_a_worked_example_runs(
    example: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in OTHERS:
        if re.search(rf"^(import|from) {name}\b", example, re.MULTILINE):
            pytest.importorskip(name)
    monkeypatch.chdir(folder)
    exec(compile(example, "docs/analysis.md", "exec"), {})
    assert capsys.readouterr().out.strip() or (folder / "run.png").is_file()


def test_the_page_shows_every_library_it_promises() -> None:
    assert len(EXAMPLES) >= 8
    assert {name for name in OTHERS if any(name in example for example in EXAMPLES)} == set(OTHERS)
