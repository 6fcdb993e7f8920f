import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.sidecars import COLUMNS, new_column, read_column, write_column


def write(folder: Path, name: str, values: dict[int, float]) -> Path:
    column = new_column()
    for row, value in values.items():
        column.rows.append(row)
        column.values.append(value)
    write_column(folder, name, column)
    return folder / COLUMNS / f"{name}.parquet"


def read(folder: Path, name: str, rows: list[int], default: float = 1.0) -> list[float] | None:
    found = read_column(folder, name, files=None, rows=np.array(rows, dtype=np.int64), default=default)
    return None if found is None else found.tolist()


def test_a_column_is_a_small_table_that_anybody_can_read(tmp_path: Path) -> None:
    path = write(tmp_path, "weight", {2: 0.5, 7: 3.0})
    assert path == tmp_path / "columns" / "weight.parquet"
    table = pq.read_table(path)
    assert table.schema.types == [pa.int64(), pa.float64()]
    assert table.to_pylist() == [{"row": 2, "weight": 0.5}, {"row": 7, "weight": 3.0}]
    assert [p.name for p in path.parent.iterdir()] == ["weight.parquet"]


def test_rows_without_a_value_have_the_default(tmp_path: Path) -> None:
    values = {0: 0.0, 3: -2.5, 4: 1e300, 9: 0.1}
    write(tmp_path, "margin", values)
    for rows in itertools.permutations([0, 3, 4, 8, 9, 10], 4):
        expected = [values.get(row, 7.0) for row in rows]
        assert read(tmp_path, "margin", list(rows), default=7.0) == expected
    assert read(tmp_path, "margin", [3, 3, 1]) == [-2.5, -2.5, 1.0]
    assert read(tmp_path, "margin", []) == []


def test_a_column_that_nobody_wrote_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, "weight", [0, 1]) is None
    write(tmp_path, "margin", {0: 1.0})
    assert read(tmp_path, "weight", [0, 1]) is None


def test_a_column_without_values_is_all_default(tmp_path: Path) -> None:
    write(tmp_path, "weight", {})
    assert read(tmp_path, "weight", [0, 5]) == [1.0, 1.0]


def test_a_column_may_be_replaced_in_any_order_and_as_whole_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "weight", {0: 1.0})
    pq.write_table(pa.table({"weight": [5, 4, 3], "row": [9, 2, 4], "note": ["a", "b", "c"]}), path)
    assert read(tmp_path, "weight", [4, 9, 0, 2]) == [3.0, 5.0, 1.0, 4.0]


@pytest.mark.parametrize(
    "table",
    [
        {"row": [0], "margin": [1.0]},
        {"weight": [1.0]},
        {"row": [0], "weight": ["heavy"]},
    ],
)
def test_another_table_is_refused(tmp_path: Path, table: dict[str, list[object]]) -> None:
    path = write(tmp_path, "weight", {0: 1.0})
    pq.write_table(pa.table(table), path)
    with pytest.raises(DataError, match='not a column "weight" by row') as caught:
        read(tmp_path, "weight", [0])
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, -0.64, 2.0], "row 5 has the weight -0.64"),
        ([1.0, None, 2.0], "row 5 has the weight nothing"),
        ([1.0, float("nan"), 2.0], "row 5 has the weight nothing"),
        ([1.0, float("inf"), -1.0], r"row 5 has the weight inf \(2 rows in all\)"),
    ],
)
def test_a_weight_that_is_no_number_from_0_on_is_refused_by_its_row(
    tmp_path: Path, values: list[float | None], said: str
) -> None:
    path = write(tmp_path, "weight", {0: 1.0})
    pq.write_table(pa.table({"row": [9, 5, 2], "weight": values}), path)
    # Also where other rows are asked for: the file is wrong.
    for rows in ([5], [9, 2]):
        with pytest.raises(DataError, match=said) as caught:
            read(tmp_path, "weight", rows)
        assert caught.value.where == str(path)
        assert "from 0 on" in str(caught.value)


def test_of_other_columns_only_what_is_no_number_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "margin", {0: -3.0})
    assert read(tmp_path, "margin", [0]) == [-3.0]
    pq.write_table(pa.table({"row": [0, 1], "margin": [-3.0, None]}), path)
    with pytest.raises(DataError, match="row 1 has the margin nothing"):
        read(tmp_path, "margin", [0])


def test_a_value_without_a_row_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "weight", {0: 1.0})
    pq.write_table(pa.table({"row": [0, None], "weight": [1.0, 2.0]}), path)
    with pytest.raises(DataError, match="a row number is missing"):
        read(tmp_path, "weight", [0])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "weight", {0: 1.0})
    for data in (b"", b"no table", path.read_bytes()[:-5]):
        path.write_bytes(data)
        with pytest.raises(DataError, match='not a column "weight" by row'):
            read(tmp_path, "weight", [0])


def test_what_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "weight", {0: 1.0})
    assert list((tmp_path / COLUMNS).iterdir()) == []
