#!/usr/bin/env bash
# Strict types over rooms. The rooms are mapped onto the namespace `trueweight` by the installer;
# mypy finds them through a view of symbolic links. Usage: deploy/typecheck.sh [ROOM …]
# Without an argument tests/ are looked at too, as pyproject.toml says.
set -euo pipefail
cd "$(dirname "$0")/.."
rooms=(protos runtime node router verifier ledger client simulation)
view=build/typeview/trueweight
mkdir -p "$view"
for room in "${rooms[@]}"; do ln -sfn "../../../$room" "$view/$room"; done
tests=(-p tests)
[ $# -gt 0 ] && rooms=("$@") tests=()
MYPYPATH=build/typeview "${PYTHON:-.venv/bin/python}" -m mypy --cache-dir "${MYPY_CACHE:-.mypy_cache}" \
  $(printf -- '-p trueweight.%s ' "${rooms[@]}") "${tests[@]}"
