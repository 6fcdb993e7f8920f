"""How files of this machine are given to pyarrow: opened, never by their names.

pyarrow takes a relative name such as ``fresh:1/data.parquet`` for a URL, and cannot encode one that is not
UTF-8.
"""

import os
from pathlib import Path
from typing import Literal

import pyarrow as pa


def arrow_file(path: Path, mode: Literal["rb", "wb"] = "rb") -> pa.OSFile:
    """A file that pyarrow reads or writes by its own means, as fast as one that it opened.

    Raises:
        OSError: It is not there, or the system refuses.
    """
    return pa.OSFile(os.fsencode(path), mode)
