"""What is in the repository is in the wheel: a forgotten subfolder works in an editable install only."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import dpo_opt

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Package to its folder, as the build sees it."""
    return {name: ROOT / SETUPTOOLS["package-dir"].get(name, name) for name in SETUPTOOLS["packages"]}


def repository_files(pattern: str) -> list[Path]:
    """Files of the checkout, without hidden folders, environments and build output."""
    skipped = {"tests", "build", "dist"}
    return [
        path
        for path in ROOT.rglob(pattern)
        for first in [path.relative_to(ROOT).parts[0]]
        if first not in skipped and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def test_every_package_folder_is_listed() -> None:
    found = {path.parent for path in repository_files("__init__.py")}
    assert len(found) >= 5
    assert found == set(package_folders().values())


def test_package_data_exists() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list(package_folders()[package].glob(pattern)), f"{package}: {pattern}"


def test_the_version_is_stated_once() -> None:
    assert dpo_opt.__version__ == PROJECT["project"]["version"]


def test_the_command_is_installed() -> None:
    assert PROJECT["project"]["scripts"] == {"dpo-opt": "dpo_opt.__main__:run"}
    command = [sys.executable, "-m", "dpo_opt", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == f"dpo-opt, version {dpo_opt.__version__}\n"


def test_bare_names_of_the_stages_are_banned() -> None:
    banned = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert {f"dpo_opt.{name}" for name in banned} == set(package_folders()) - {"dpo_opt"}


def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    (required,) = PROJECT["build-system"]["requires"]
    assert required.startswith("setuptools>=")
    setuptools = importlib.util.find_spec("setuptools") and importlib.metadata.version("setuptools")
    if not setuptools or int(setuptools.split(".")[0]) < int(required.removeprefix("setuptools>=")):
        pytest.skip(f"{required} is not installed here")
    # In a copy: a build folder left in the checkout would add files of an older state.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in package_folders().values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, source / folder.relative_to(ROOT), ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for package, folder in package_folders().items():
        patterns = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        for pattern in patterns:
            expected |= {f"{package.replace('.', '/')}/{path.name}" for path in folder.glob(pattern)}
    assert "dpo_opt/schemas/FORMAT.md" in expected
    assert "dpo_opt/analysis/page.html.jinja" in expected
    assert held == expected
