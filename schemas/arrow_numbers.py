"""Columns of numbers as numpy arrays, without pandas."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def numbers(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[Any]:
    """The values of a column of integers or floats, read-only; where some are missing, NaN stands for them.

    pyarrow's own ``to_numpy`` imports pandas if that is installed, which takes half a second.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = array.buffers()[1] if len(array) and not array.null_count else None
    if values is None:
        found: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
        return found
    every = np.frombuffer(values, dtype=array.type.to_pandas_dtype())
    return every[array.offset : array.offset + len(array)]
