"""Files from the Hugging Face Hub, at a commit: the one place that may go to the network for them."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dpo_opt.schemas.errors import ConfigError, first_line

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
"""Also the name that the Hub's cache gives to a folder of files."""


def fetch(
    repository: str,
    *,
    kind: Kind,
    revision: str | None,
    patterns: Sequence[str],
    extra: str,
    unwanted: Sequence[str] = (),
) -> Path:
    """Folder with a repository's files, from the local cache where they are there already.

    Args:
        repository: ``ORGANISATION/NAME``.
        kind: What it holds.
        revision: Commit, branch or tag; the default branch where it is None.
        patterns: Files that are wanted.
        extra: Extra of this package that installs what is needed.
        unwanted: Files among them that are not.

    Raises:
        ConfigError: A package is missing, or the Hub cannot provide it.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _not_installed(repository, extra) from error
    try:
        return Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(unwanted),
            )
        )
    except _hub_errors() as error:
        raise _not_to_be_had(repository, error) from error


def list_files(
    repository: str, *, kind: Kind, revision: str, patterns: Sequence[str]
) -> dict[str, bool] | None:
    """The files that a repository has at a commit, each with whether it is in the local cache.

    Returns:
        None where the Hub does not say, or huggingface_hub is missing or too old to.
    """
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=list(patterns), dry_run=True
        )
    except (ImportError, TypeError):
        return None
    except _hub_errors():
        return None
    return {file.filename: not file.will_download for file in found}


def current_commit(repository: str, *, kind: Kind, revision: str | None, extra: str) -> str:
    """The commit that a branch or tag stands at now.

    Raises:
        ConfigError: A package is missing, or the Hub cannot say.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise _not_installed(repository, extra) from error
    try:
        return str(HfApi().repo_info(repository, repo_type=kind, revision=revision).sha)
    except _hub_errors() as error:
        raise _not_to_be_had(repository, error) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # A ValueError also for a repository whose file names lead out of the cache: none of it is written.
    return (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, *connection_errors())


def connection_errors() -> list[type[Exception]]:
    """What the HTTP client of huggingface_hub raises where nothing answers; httpx's are no OSErrors."""
    return [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]


def _not_installed(repository: str, extra: str) -> ConfigError:
    return ConfigError(
        f"{repository!r} is not here, and fetching it needs huggingface_hub",
        fix=f"pip install 'dpo-opt[{extra}]'",
    )


def _not_to_be_had(repository: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{repository!r} is neither here nor to be had from the Hub ({first_line(error)})",
        fix="name what exists on this machine, or check the name and `hf auth login`",
    )
