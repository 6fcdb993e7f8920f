#!/usr/bin/env bash
# fsspec 2026.9.0 and obstore 0.12.1: mode="create" of put_file, which is to refuse a file that exists, depends on the
# file system. The memory file system refuses. The local one refuses in pipe_file, but its put_file takes the argument
# and replaces the file. obstore's own put refuses on the same folder, while its fsspec adapter replaces the file in
# both calls. None of the calls that replace says anything. One would expect a store that cannot create exclusively to
# refuse the argument, and an adapter to pass it on: several writers that rely on it overwrite each other's files.
#
# Seen:
#   memory put_file: FileExistsError, holds first
#   memory pipe_file: FileExistsError, holds first
#   local put_file: returned, holds second
#   local pipe_file: FileExistsError, holds first
#   obstore adapter put_file: returned, holds second
#   obstore adapter pipe_file: returned, holds second
#   obstore put: AlreadyExistsError, holds first
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q fsspec==2026.9.0 obstore==0.12.1
"$work/venv/bin/python" - "$work" <<'PY'
import pathlib
import sys

import fsspec
import obstore
from obstore.fsspec import FsspecStore
from obstore.store import LocalStore

folder = pathlib.Path(sys.argv[1])
source, target = folder / "source", folder / "target"
source.write_text("second")
seen = []


def tried(name, call, path, read):
    try:
        call()
        outcome = "returned"
    except Exception as error:
        outcome = type(error).__name__
    line = f"{name}: {outcome}, holds {read(path).decode()}"
    print(line)
    seen.append(line)


def on_disk(path):
    return pathlib.Path(path).read_bytes()


systems = {
    "memory": (fsspec.filesystem("memory"), "/target", None),
    "local": (fsspec.filesystem("file"), str(target), on_disk),
    "obstore adapter": (FsspecStore("file"), str(target), on_disk),
}
for name, (system, path, read) in systems.items():
    for method, value in (("put_file", None), ("pipe_file", b"second")):
        if read is None:
            system.pipe_file(path, b"first")
        else:
            target.write_text("first")
        if method == "put_file":
            call = lambda: system.put_file(str(source), path, mode="create")
        else:
            call = lambda: system.pipe_file(path, value, mode="create")
        tried(f"{name} {method}", call, path, read or system.cat_file)
target.write_text("first")
store = LocalStore(str(folder))
tried("obstore put", lambda: obstore.put(store, "target", b"second", mode="create"), str(target), on_disk)
assert seen == [
    "memory put_file: FileExistsError, holds first",
    "memory pipe_file: FileExistsError, holds first",
    "local put_file: returned, holds second",
    "local pipe_file: FileExistsError, holds first",
    "obstore adapter put_file: returned, holds second",
    "obstore adapter pipe_file: returned, holds second",
    "obstore put: AlreadyExistsError, holds first",
], seen
PY
