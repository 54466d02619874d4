#!/usr/bin/env bash
# Regenerates protos/v1/*_pb2*.py[i] from protos/v1/*.proto. A test compares them with the commit.
# Usage: deploy/generate_stubs.sh [OUT_DIR]   (default: in place)
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cd "$top"
"${PYTHON:-.venv/bin/python}" -m grpc_tools.protoc -Itrueweight/protos=protos \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/v1/*.proto
# Files without a service need no _grpc module.
for f in "$out"/trueweight/protos/v1/*_pb2_grpc.py; do
  grep -q '^class .*Servicer' "$f" || rm "$f"
done
mkdir -p "${1:-protos/v1}"
cp "$out"/trueweight/protos/v1/* "${1:-protos/v1}/"
