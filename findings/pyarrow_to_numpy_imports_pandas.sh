#!/usr/bin/env bash
# pyarrow 26.0.1 with pandas 3.1.1 installed: the first Array.to_numpy() imports pandas.
# A good engineer would guess that a column becomes a NumPy array without another library: nothing of the call or its
# result is pandas'. A command that reads one column of a Parquet shard so pays for the import of pandas, about as long
# as everything else that it does. np.from_dlpack(array) gives the same numbers and imports nothing.
# Output seen:
#   before: False, after from_dlpack: False, after to_numpy: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pyarrow==26.0.1 pandas==3.1.1 numpy
cd "$work"
"$work/venv/bin/python" -c "
import pyarrow as pa, pyarrow.parquet as pq
pq.write_table(pa.table({'row': [0, 1, 2]}), 'shard.parquet')"
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import pyarrow.parquet as pq

array = pq.ParquetFile("shard.parquet").read(columns=["row"])["row"].chunk(0)
before = "pandas" in sys.modules
assert np.from_dlpack(array).tolist() == [0, 1, 2]
other = "pandas" in sys.modules
assert array.to_numpy().tolist() == [0, 1, 2]
after = "pandas" in sys.modules
print(f"before: {before}, after from_dlpack: {other}, after to_numpy: {after}")
assert (before, other, after) == (False, False, True)
PY
