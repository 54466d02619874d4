#!/usr/bin/env bash
# Re-resolves requirements/*.in into exact pins. Usage: deploy/lock.sh [extra `uv pip compile` flags]
set -euo pipefail
cd "$(dirname "$0")/../requirements"
flags=(--python-version 3.11 --no-header --no-emit-index-url --no-emit-find-links)
# Only the CPU build of torch may come from a local folder of wheels.
cpu=("${flags[@]}" --override overrides.txt ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"})
uv pip compile -q "${cpu[@]}" "$@" dev.in -o dev.txt
uv pip compile -q "${cpu[@]}" "$@" -c dev.txt cpu.in -o cpu.txt
uv pip compile -q "${cpu[@]}" "$@" -c dev.txt base.in -o base.txt
uv pip compile -q "${flags[@]}" --python-platform x86_64-manylinux_2_28 -c base.txt "$@" gpu.in -o gpu.txt
