# make demo: set everything up and run the main job on MovieLens-100K.  make test: set everything up and pass the tests.
.PHONY: setup demo test test-long test-cluster mutants bench check lock clean
.DEFAULT_GOAL := test
PYTEST := .venv/bin/python -m pytest -p no:cacheprovider

setup:
	@bash requirements/bootstrap.sh

demo: setup
	@.venv/bin/windlass demo --run-dir runs/demo

# Two processes: most of a test with real parts is the start of one engine or another, on one core.
test: setup check
	@$(PYTEST) -q -n 2 --dist loadfile --no-loadscope-reorder

test-long: setup
	@$(PYTEST) -q -m long

# A job across three hosts in network namespaces, one of which is cut off; needs root. Part of test-long.
test-cluster: setup
	@$(PYTEST) -q -m long tests/launch/test_network.py

# Break the stages on purpose, one mutation at a time: the pure tests must notice each.
mutants: setup
	@.venv/bin/python -m tests.mutants

# Run the benchmarks small and say what got slower than what was last accepted for this kind of machine.
bench: setup
	@.venv/bin/windlass bench suite

check: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

lock: setup
	@bash requirements/lock.sh

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
