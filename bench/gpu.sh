#!/usr/bin/env bash
# The proof on a GPU in one command and without a network: tests/gpu, then bench/gpu.py for as long as is left.
#
#   bench/gpu.sh --wheels FOLDER --seconds 540 --output FOLDER [arguments of bench/gpu.py]
#
#   --wheels FOLDER   Wheels for a fresh environment, which is made for this and removed at the end. Where torch
#                     is not among them, the environment also sees the packages of --python: a build of torch
#                     for CUDA is gigabytes. Without --wheels everything runs in the environment of --python.
#   --seconds N       For everything together; the tests get a third of what installing leaves.
#   --output FOLDER   Gets environment.json, tests.txt and bench.md, each written line by line.
#   --python PYTHON   Default: python3.
#
# Wheels for another machine: `pip download --only-binary=:all: --python-version 3.12 --platform
# manylinux_2_28_x86_64 -d FOLDER` with pydantic, universal_pathlib, rich, click, pytest-timeout, trl==1.16.0,
# datasets, liger-kernel and torchao, less what that machine has.
# It ends with 0 if the tests passed (on a machine without a GPU: were skipped) and the bench ran.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheels= seconds=540 output= python=python3
while [[ $# -gt 0 ]]; do
  case $1 in
    --wheels) wheels=$2 ;;
    --seconds) seconds=$2 ;;
    --output) output=$2 ;;
    --python) python=$2 ;;
    *) break ;;
  esac
  shift 2
done
[[ -n $output ]] || { echo "bench/gpu.sh: --output FOLDER is missing" >&2; exit 2; }
mkdir -p "$output"
output=$(cd "$output" && pwd)
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Where there is a GPU, tests that do not find it fail instead of skipping.
[[ ! -e /dev/nvidiactl ]] || export DPO_OPT_REQUIRE_GPU=1

if [[ -n $wheels ]]; then
  fresh=$(mktemp -d)
  trap 'rm -rf "$fresh"' EXIT
  # Without pip: the other Python's installs into it, also where Python came without the means to copy pip.
  "$python" -m venv --without-pip "$fresh"
  if ! compgen -G "$wheels/torch-[0-9]*.whl" >/dev/null; then
    # Read after the environment's own folder, so that what was carried counts.
    packages=$("$fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
      >"$packages/machine.pth"
  fi
  install=("$python" -m pip --python "$fresh/bin/python" install -q --no-index --no-deps --no-compile)
  "${install[@]}" --ignore-installed "$wheels"/*.whl
  "${install[@]}" --no-build-isolation -e "$root"
  python=$fresh/bin/python
fi

cd "$root"
"$python" -m dpo_opt env --json >"$output/environment.json"
status=0
left=$((seconds - SECONDS))
# Longer than the longest test, however little time is left.
share=$((left / 3 > 60 ? left / 3 : 60))
timeout -k 10 "$share" "$python" -m pytest -p no:cacheprovider -m gpu tests/gpu -rfEs 2>&1 \
  | tee "$output/tests.txt" || { status=1; echo "tests/gpu failed, or took more than $share s" | tee -a "$output/tests.txt"; }
left=$((seconds - SECONDS))
# It stops by itself; a run that takes far longer than was foreseen is ended.
timeout -k 10 $((left > 60 ? left + 60 : 120)) "$python" bench/gpu.py --seconds "$left" "$@" 2>"$output/bench.log" \
  | tee "$output/bench.md" || { status=1; tail -n 20 "$output/bench.log"; }
exit "$status"
