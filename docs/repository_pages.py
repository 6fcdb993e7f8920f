"""Pages of the site that stand elsewhere in the repository, and links between files made links between pages.

Written as a reader of the repository sees them, links work there and on the site alike.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "index.md": "README.md",
    "format.md": "schemas/FORMAT.md",
    "benchmarks.md": "BENCHMARKS.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Page to the file of the repository that it shows."""

DOWNLOADS = ("examples/quickstart.ipynb",)
"""Files of the repository that pages link to, and that the site has as they are."""

_PAGE_OF = {path: page for page, path in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that do not stand in ``docs/``, and the files that they link to."""
    root = Path(config.config_file_path).parent
    for page, path in [*PAGES.items(), *((path, path) for path in DOWNLOADS)]:
        files.append(File.generated(config, page, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Point links to files of the repository at the pages that show them."""
    place = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def to_page(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
        return _PAGE_OF.get(target, target.removeprefix("docs/"))

    return _LINK.sub(to_page, markdown)
