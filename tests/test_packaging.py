"""What is in the repository is in the wheel, and one checkout is never mixed with another."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import dpo_opt

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STAGES = ("feedback", "precompute", "optimize", "analysis", "schemas")


def package_folders() -> dict[str, Path]:
    """Package to its folder, as it is imported: through the links of ``dpo_opt/``."""
    found = {}
    for folder, folders, files in os.walk(ROOT / "dpo_opt", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        if "__init__.py" in files:
            path = Path(folder).relative_to(ROOT)
            found[".".join(path.parts)] = ROOT / path
    return found


def repository_files(pattern: str) -> list[Path]:
    """Files of the checkout, without hidden folders, environments and build output."""
    skipped = {"tests", "build", "dist"}
    return [
        path
        for path in ROOT.rglob(pattern)
        for first in [path.relative_to(ROOT).parts[0]]
        if first not in skipped and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def copied_source(to: Path) -> Path:
    """A copy of what a build reads; a build folder left in the checkout would add files of an older state."""
    to.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("dpo_opt", *STAGES):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, to / name, ignore=ignored, symlinks=True)
    return to


def require_setuptools() -> None:
    (required,) = PROJECT["build-system"]["requires"]
    assert required.startswith("setuptools>=")
    setuptools = importlib.util.find_spec("setuptools") and importlib.metadata.version("setuptools")
    if not setuptools or int(setuptools.split(".")[0]) < int(required.removeprefix("setuptools>=")):
        pytest.skip(f"{required} is not installed here")


def test_each_stage_has_one_link_that_gives_it_its_import_path() -> None:
    for stage in STAGES:
        link = ROOT / "dpo_opt" / stage
        assert link.is_symlink()
        assert link.readlink() == Path("..") / stage


def test_every_folder_of_modules_is_a_package() -> None:
    found = {path.resolve() for path in package_folders().values()}
    assert len(found) >= 5
    modules = {path.parent.resolve() for path in repository_files("*.py")} - {ROOT / "bench"}
    apart = {ROOT / "docs", ROOT / "examples"}
    assert {folder for folder in modules if apart.isdisjoint((folder, *folder.parents))} == found


def test_package_data_exists() -> None:
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
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
    assert set(banned) == set(STAGES)


def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    require_setuptools()
    source = copied_source(tmp_path / "source")
    # A room that nobody listed anywhere.
    (source / "schemas" / "new_room").mkdir()
    (source / "schemas" / "new_room" / "__init__.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    data: dict[str, list[str]] = PROJECT["tool"]["setuptools"]["package-data"]
    expected = {"dpo_opt/schemas/new_room/__init__.py"}
    for package, folder in package_folders().items():
        for pattern in ["*.py", *data.get(package, [])]:
            expected |= {
                f"{package.replace('.', '/')}/{path.relative_to(folder)}" for path in folder.glob(pattern)
            }
    assert "dpo_opt/schemas/FORMAT.md" in expected
    assert "dpo_opt/analysis/templates/report.html.jinja" in expected
    assert held == expected


def test_two_checkouts_in_one_environment_are_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_setuptools()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    installed, other = (copied_source(tmp_path / name) for name in ("installed", "other"))
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    (library,) = subprocess.run(
        [python, "-c", ask], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    # The dependencies of the environment that tests run in, without what is installed there as editable.
    (Path(library) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-e",
        str(installed),
    ]
    subprocess.run(install, check=True, capture_output=True)
    ask = (
        "import dpo_opt.cli, dpo_opt.schemas.shards, dpo_opt.precompute.run as run; "
        "print(dpo_opt.cli.__file__, dpo_opt.schemas.shards.__file__, run.__file__, sep='\\n')"
    )
    for folder, expected in ((installed, installed), (tmp_path, installed), (other, other)):
        found = subprocess.run(
            [python, "-c", ask], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        assert [Path(file).resolve().is_relative_to(expected) for file in found] == [True] * 3, found


def test_these_tests_are_of_this_checkout() -> None:
    assert Path(dpo_opt.__file__).resolve().parent == ROOT / "dpo_opt", (
        "another checkout is installed in this environment: pip install -e ."
    )
