"""The pages lead where they say: pages, links, commands and names are there."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import quickstart
import yaml

from dpo_opt.cli import main
from dpo_opt.schemas import errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), ROOT / "schemas" / "FORMAT.md"])
STAGES = ("feedback", "precompute", "optimize", "analysis", "schemas")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_of(page: Path) -> list[str]:
    """The ``dpo-opt`` command lines of a page's blocks, each as one line."""
    blocks = "\n".join(_FENCE.findall(page.read_text(encoding="utf-8")))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"(\S+=\S+ )*dpo-opt (?!COMMAND)\S", line)]


def parse(line: str) -> None:
    """Refuse a command line that names no command, or an option that the command has not."""
    words = shlex.split(line, comments=True)
    words = words[words.index("dpo-opt") + 1 :]
    if ">" in words:
        words = words[: words.index(">")]
    for place, word in enumerate(words[:-1]):
        if word in ("--config", "--trl-config"):
            words[place + 1] = str(ROOT / "mkdocs.yml")  # a file that is there; its content is read later
    name, *arguments = words
    main.commands[name].make_context(name, arguments, parent=click.Context(main, info_name="dpo-opt"))


def hook(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nav_pages(entries: list[Any]) -> list[str]:
    found = []
    for entry in entries:
        (value,) = entry.values()
        found += nav_pages(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_menu_once() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'dpo-opt[docs]'")
    menu = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    elsewhere = hook("repository_pages").PAGES
    assert sorted(menu) == sorted([*(path.name for path in DOCS.glob("*.md")), *elsewhere])
    assert [path for path in elsewhere.values() if not (ROOT / path).is_file()] == []


def test_files_that_the_site_downloads_are_linked() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'dpo-opt[docs]'")
    linked = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)#:\s]+\.ipynb)\)", page.read_text(encoding="utf-8"))
    }
    assert {ROOT / path for path in hook("repository_pages").DOWNLOADS} == linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in link or (page.parent / link).exists(), link


def test_files_that_pages_name_are_there() -> None:
    stages = "|".join(("tests", "bench", "findings", "dpo_opt", *STAGES))
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(rf"\b(?:{stages})/[\w/]+\.(?:py|sh|md)\b", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 30
    assert [(page, path) for page, path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=name_of)
def test_commands_are_there_with_their_options(page: Path) -> None:
    for line in commands_of(page):
        parse(line)


def test_a_command_that_is_not_there_is_noticed() -> None:
    with pytest.raises(click.UsageError, match="--lerning-rate"):
        parse("dpo-opt train --shards S --lerning-rate 1  # a comment")
    with pytest.raises(KeyError):
        parse("dpo-opt precomputed")


def test_every_command_of_the_quickstart_has_its_output() -> None:
    steps = quickstart.steps(quickstart.PAGE.read_text(encoding="utf-8"))
    shown = [s for s in steps if "dpo-opt" in s.content and ">" not in s.content]
    assert {shlex.split(s.content)[1] for s in shown} >= {"check", "convert", "precompute", "train", "score"}
    assert [s.content for s in shown if not s.output.strip()] == []
    assert quickstart.PICTURE.stat().st_size < 200_000


def test_outputs_are_written_where_they_stand(tmp_path: Path) -> None:
    page = (
        'Save this.\n\n```python title="a.py"\nprint(1)\n```\n\nRun it.\n\n'
        "```bash\npython a.py\n```\n\n```text\nold\n```\n\n```bash\ntrue\n```\n\n```sh\nfalse\n```\n"
    )
    written = quickstart.with_outputs(page, tmp_path)
    assert written == page.replace("old", "1")
    assert quickstart.with_outputs(written.replace("```text\n1\n```\n\n", ""), tmp_path) == written
    with pytest.raises(subprocess.CalledProcessError):
        quickstart.with_outputs("```bash\nfalse\ntrue\n```\n", tmp_path)


def test_every_exit_code_is_explained() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.DpoOptError)}
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^## Exit code (\d+)$", text, re.MULTILINE)} == {0, *codes}


FROM_ELSEWHERE = {"No space left on device", "Disk quota exceeded", "Too many open files", "No such option"}
"""Messages of the system and of click."""


def test_the_messages_that_are_explained_are_ours() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## Exit code 1\n")[2]
    cells = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    quoted = {part for cell in cells for part in re.findall(r"`([^`]+ [^`]+)`", cell)} - FROM_ELSEWHERE
    assert len(quoted) >= 6
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dpo_opt").rglob("*.py"))
    sources += "".join(
        path.read_text(encoding="utf-8") for s in STAGES for path in (ROOT / s).rglob("*.py")
    ).replace("{MANIFEST}", "manifest.json")
    parts = [part.strip() for message in quoted for part in message.split("...") if part.strip()]
    assert [part for part in parts if part not in sources] == []


def test_the_reference_has_every_command_and_option() -> None:
    reference = hook("command_reference")
    text = reference.on_page_markdown(
        (DOCS / "cli.md").read_text(encoding="utf-8"), page=None, config=None, files=None
    )
    for name, command in main.commands.items():
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        options = {option for p in command.params for option in p.opts if option.startswith("--")}
        assert options
        assert [option for option in options if option not in section] == []


def test_public_names_exist_and_none_is_left_out() -> None:
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name
    for package in ("precompute", "optimize", "analysis"):
        public = importlib.import_module(f"dpo_opt.{package}").__all__
        assert {f"dpo_opt.{package}.{name}" for name in public} <= set(names)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'dpo-opt[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "quickstart" / "index.html").is_file()
    assert (tmp_path / "examples" / "quickstart.ipynb").is_file()


@pytest.mark.slow
@pytest.mark.skipif("DPO_OPT_QUICKSTART" not in os.environ, reason="takes minutes: `make prove` runs it")
def test_the_quickstart_prints_what_it_shows(tmp_path: Path) -> None:
    page = quickstart.PAGE.read_text(encoding="utf-8")
    found = quickstart.with_outputs(page, tmp_path)

    def labels(text: str) -> list[str]:
        """What each line begins with: figures differ by machine, and so may the token that differs most."""
        lines = [re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+)?", "N", line).split() for line in text.splitlines()]
        return [line[0] for line in lines if line]

    assert labels(found) == labels(page)
