import numpy as np
import pyarrow as pa
import pytest

from dpo_opt.schemas.arrow_numbers import numbers

KINDS = [pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_are_those_of_to_numpy(kind: pa.DataType) -> None:
    whole = pa.array(range(50), kind)
    columns = [whole, whole[3:9], whole[:0], pa.array([1, None, 3], kind)]
    chunked = [pa.chunked_array(parts, kind) for parts in ([], [whole[3:9]], [whole[7:], whole[:2]], columns)]
    for column in [*columns, *chunked]:
        plain = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        expected = plain.to_numpy(zero_copy_only=False)
        found = numbers(column)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
