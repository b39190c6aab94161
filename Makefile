# make serve: everything from nothing to an answering server. make test: what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
MODEL ?=
WORKERS ?= 2
# Where to take torch from. A machine without an NVIDIA GPU wants PyTorch's index of CPU builds (README, Installing).
TORCH_INDEX ?=
INSTALL = $(PYTHON) tools/install.py --venv $(VENV) --torch-index '$(TORCH_INDEX)' --goal '$(or $(MAKECMDGOALS),setup)'
NEEDED := pyproject.toml requirements/constraints.txt
# Where an environment forbids bytecode, each of the hundred servers that the tests start would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup serve chat test test-npu test-web browser screenshots aot nightly fuzz soak chaos real routing check lint types house bench trace size docs demo-model clean

setup: $(VENV)/.installed

# Developers' tools, and with them all that serving needs.
$(VENV)/.installed: $(NEEDED)
	$(INSTALL) dev
	touch $(VENV)/.serving $@

$(VENV)/.serving: $(NEEDED)
	$(INSTALL) serving
	touch $@

serve: $(VENV)/.serving
	$(BIN)/xllm serve $(MODEL) --port $(PORT)

chat: $(VENV)/.serving
	$(BIN)/xllm chat $(MODEL)

# The browser's driver keeps an event loop running, and Triton decides once for a process whether kernels are interpreted.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/web -n $(WORKERS) --dist loadfile -q
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/web -n $(WORKERS) --dist loadfile -q -rs
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops tests/cuda -n $(WORKERS) --dist loadfile -q

# The Ascend backend on the real torch_npu and an emulated device. The wheel lies beside the environment, not in it:
# installed, it would break `import torch` wherever CANN is missing.
test-npu: setup .npu/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.emulated_npu run $(BIN)/python -m pytest tests/npu -n $(WORKERS) --dist loadfile -q

.npu/.installed: requirements/npu.txt
	$(BIN)/python -m tests.emulated_npu install

# The web console in a real headless Chromium. `make test` runs it as well, where there is a Chromium.
test-web: setup browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/web -q -rs

# A Chromium for the tests: what the machine has, else from its packages (Debian, Ubuntu; needs root), else playwright's.
browser: setup
	$(BIN)/python tools/get_browser.py

screenshots: setup browser
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.web.screenshots docs/images

# Every CUDA kernel with every entry of cuda_ops/configs.json, compiled for sm_80 and sm_90a and examined; needs no GPU.
aot: setup
	$(BIN)/python -m tests.cuda.aot --workers $(WORKERS)

# A million random operations on the KV store (SEED= another episode to begin with), 1e5 each on the index of a cluster and
# on its router, KV events through networks that lose some, histories of the metadata store and of a cluster's members, every
# pair of features alone, and floods of a thousand sequences whose callers leave; ranks that go wrong in every phase (prints
# the table of it); nodes that are lost; hostile files, expressions and races in full. TRACE=FILE: `make routing`, too.
nightly: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kv.store_machine --operations 1000000 --seed $(or $(SEED),0)
	INDEX_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s --timeout 600 tests/routing/test_global_index.py \
		tests/routing/test_fleet_model.py tests/routing/test_lookups.py tests/engine/test_kv_publisher.py \
		tests/cluster/test_cache_feed.py
	HISTORIES_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/cluster/test_histories.py \
		tests/cluster/test_membership.py --timeout 600
	OMP_NUM_THREADS=1 $(BIN)/xllm bench master --rounds 1
	$(if $(TRACE),$(MAKE) routing TRACE=$(TRACE))
	MATRIX_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/engine/test_feature_matrix.py -n $(WORKERS)
	ABORTS_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/security/test_mass_aborts.py --timeout 600
	BOUNDS_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/text/test_template_bounds.py --timeout 1200
	WEIGHTS_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/security/test_weights_of_requests.py --timeout 600
	FAULTS_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/worker/test_faults.py --timeout 600
	ADDING_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/adding
	NODES_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/worker/test_nodes.py --timeout 300
	FAIRNESS_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/security/test_fairness.py --timeout 600
	HOSTILE_ALL=1 RACES_S=300 RACES_SEED=$(or $(SEED),0) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --timeout 3600 \
		tests/models/test_hostile_folders.py tests/serving/test_hostile_regexes.py \
		tests/serving/test_hostile_adapters.py tests/serving/test_races.py tests/structured/test_dead_ends.py

# Every kind of value in every field of every request.
fuzz: setup
	FUZZ_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/serving/test_fuzz.py --timeout 3600

# Mixed traffic on a real server, and whether it leaves anything behind; REQUESTS= and SEED= for another run.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --requests $(or $(REQUESTS),100000) --seed $(or $(SEED),0) --json benchmarks/results/soak.json

# A real cluster (etcd, two instances, four, and two again) under steady load; then three instances and three masters under
# faults drawn at random, and whether any answer is lost or wrong or anything is left behind; then the same with two
# instances that compute prompts and two that go on with them. SECONDS= and SEED= for another run.
chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cluster.chaos --elastic --seed $(or $(SEED),0) --json benchmarks/results/elastic.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cluster.chaos --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0) --json benchmarks/results/chaos.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cluster.chaos --roles --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0) --json benchmarks/results/chaos_roles.json

# Programs of other houses on what is published: vLLM's structs and publisher of KV events, Dynamo's indexer; a vLLM server on
# the CPU behind our master, and vLLM with our KV store inside. They are fetched (400 MB and twice 3 GB) into folders that are
# gone afterwards.
real: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.real.kv_events
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.real.openai_server
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.real.vllm_connector

# What each policy of the router makes of a trace (TRACE=, JSON lines with hash_ids) on eight real instances without a
# model, behind a real master: a minute for each six of the trace, and each policy.
routing: setup
	@test -n "$(TRACE)" || { echo "TRACE= says which trace"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/xllm bench router --trace $(TRACE) --instances 8 --processes --speed-up 6 --shrink 4 \
		--json benchmarks/results/router_processes.json

check: lint types house docs test

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

house: setup
	$(BIN)/python -m pytest -q tests/test_house.py tests/test_house_rules.py

bench: setup
	$(BIN)/xllm bench scheduler --json benchmarks/results/scheduler.json
	$(BIN)/xllm bench throughput --vs transformers --json benchmarks/results/throughput.json

# The way of one streamed chat request through the real server and its engine, function by function.
trace: setup
	$(BIN)/python -m tools.trace_request

size:
	@$(PYTHON) tools/size.py

docs: setup
	$(BIN)/python tools/gen_settings.py --check
	$(BIN)/python tools/gen_grafana.py --check
	$(BIN)/python tools/gen_limits.py --check
	$(BIN)/python -m tools.trace_request.docs --check

demo-model: setup
	$(BIN)/python -m tools.train_demo

clean:
	rm -rf $(VENV) *.egg-info
