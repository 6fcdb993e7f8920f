"""Runs examples/quickstart.ipynb, and writes it again with what it printed.

``python tests/notebook.py MODEL`` runs it with a model folder and keeps the outputs in the file. Progress
goes to stderr, and is left out.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def execute(folder: Path, model: Path) -> Any:
    """The notebook as it is after every cell has run in a folder.

    Raises:
        CellExecutionError: A cell failed.
    """
    programs = folder / "bin"
    programs.mkdir()
    (programs / "dpo-opt").write_text(f'#!/bin/sh\nexec {sys.executable} -m dpo_opt "$@"\n')
    (programs / "dpo-opt").chmod(0o755)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {
        **os.environ,
        "DPO_OPT_MODEL": str(model),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # Its cells are run for their results: what libraries warn of is not the reader's to mend.
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    return client.execute(env=environment)


def tidy(notebook: Any) -> None:
    """Leave out what differs from run to run: progress, when cells ran, in how many pieces they printed."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        kept: list[Any] = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if kept and output.get("name") == kept[-1].get("name") == "stdout":
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        executed = execute(Path(where), Path(sys.argv[1]).resolve())
    tidy(executed)
    nbformat.write(executed, NOTEBOOK)
