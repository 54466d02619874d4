# Two commands matter: `make demo` and `make test`. Both do all set-up by themselves.
# ARGS="…" is passed on to the command behind a target.
.DEFAULT_GOAL := help
PY := .venv/bin/python
TW := .venv/bin/trueweight
ARGS ?=

.PHONY: help setup setup-dev setup-gpu demo up down test check soak lock stubs clean \
        bench-node bench-sampler bench-verify bench-ledger

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## Install what the demo needs into .venv (CPU)
	@deploy/setup.sh cpu

setup-dev:
	@deploy/setup.sh dev

setup-gpu: ## Install a worker node for a CUDA GPU into .venv
	@deploy/setup.sh gpu

demo: setup ## Run a small market on this machine: paid requests, one cheat, verdicts, books
	@$(TW) simulate demo $(ARGS)

up: setup ## Start the market without the cheat and keep it running (MODEL=DIR for another model)
	@$(TW) simulate up $(if $(MODEL),--model "$(MODEL)") $(ARGS)

down: ## End the market that `make up` started
	@if [ -x $(TW) ]; then $(TW) simulate down $(ARGS); else echo "No market is up."; fi

check: setup-dev ## Lint, format and strict types over all rooms
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@deploy/typecheck.sh

# Two workers: half of the suite waits for processes, and more would starve the engines' deadlines.
test: check ## All tests that fit 15 minutes, after `make check`
	@$(PY) -m pytest -m "not soak" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: setup-dev ## The long tests
	@$(PY) -m pytest -m soak --timeout 7200 $(ARGS)

bench-node: setup-dev ## Throughput of the bare engine, with the sampler, and through the node
	@$(PY) -m trueweight.simulation.bench_node $(ARGS)

bench-sampler: setup-dev ## CPU time of sampling one row, by vocabulary and parameters
	@$(PY) -m trueweight.simulation.bench_sampler $(ARGS)

bench-verify: setup-dev ## What checking costs, what cheats cost, and that honest nodes stay clear
	@$(PY) -m trueweight.simulation.bench_verify $(ARGS)

bench-ledger: setup-dev ## Hold and capture pairs per second on both databases
	@$(PY) -m trueweight.simulation.bench_ledger $(ARGS)

lock: ## Re-resolve requirements/*.in (needs uv)
	@deploy/lock.sh

stubs: setup-dev ## Regenerate protos/v1/*_pb2*
	@deploy/generate_stubs.sh

clean: down ## End the market, remove caches and the run directory, keep .venv
	@rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .trueweight
