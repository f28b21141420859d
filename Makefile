# make demo   the main job on a real model        make test   lint, types and tests
# make check  lint, types and the tests of the pure core, in a minute: the inner loop
# make setup  builds .venv with pinned versions   make clean  removes what these made
# make engines  installs the engines that have an environment of their own (compiles llama.cpp, downloads OpenVINO and
#               vLLM: some minutes, 5 GB); make test-engines runs their tests on the real thing
# make mutants  changes the pure core, one small fault at a time, and counts what the tests notice; with SINCE=revision
#               a sample of those on the lines that changed, which takes some minutes
# make prometheus  fetches Prometheus and promtool from Debian into .venv (19 MB), for the tests of what export writes;
#               without it they are skipped
# make gate   is the demo's adapter still as good as what recipes/gate.baseline.json accepted? Some minutes
# make adapters  trains the demo's further adapters again and measures them (about an hour on two cores)
# make audit  bandit on the code, pip-audit on the pinned versions: exceptions have their reasons beside them
# make docs     builds the documentation into site/; a warning fails
PYTHON ?= python3.11
BIN := .venv/bin
MODEL := models/smollm2-135m-instruct

ADAPTERS := r4 r16 r32 r64 p-tuning prefix

# two processes, each with whole files of tests: fixtures of a file are made once; the longest first (tests/conftest.py)
TWO := -n 2 --dist loadfile --no-loadscope-reorder
PURE := layers docs gate_core thresholds stats recipe stopping evidence decide render store trust_stats trust_answers \
        trust_times trust_decisions broken_models honest_times $(addprefix rules_,limits speed answers parity requirements ratios table)

# A verdict is a result, whichever it is: 0 accepted, 1 rejected, 3 undecided. Anything else went wrong.
decide = $(BIN)/peftopt run $(1); code=$$?; case $$code in 0|1|3) ;; *) exit $$code ;; esac

PROMETHEUS := .venv/prometheus/usr/bin/promtool

.PHONY: setup engines prometheus demo adapters quick gate check test test-engines mutants audit docs clean
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quantize,demo,serve]'
	touch $@

# apart: what only tests need is not there to be imported by what is timed
.venv/tested: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quantize,demo,serve,dev]'
	touch $@

$(MODEL)/model.safetensors: | .venv/ready
	$(BIN)/python demo/fetch_model.py

engines: setup
	$(BIN)/peftopt env install llamacpp
	$(BIN)/peftopt env install openvino
	$(BIN)/peftopt env install vllm

test-engines: engines .venv/tested $(MODEL)/model.safetensors
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m engines tests/test_llamacpp.py tests/test_openvino.py tests/test_vllm.py

demo: setup $(MODEL)/model.safetensors
	$(call decide,recipes/demo.yaml)

adapters: setup $(MODEL)/model.safetensors
	for name in $(ADAPTERS); do \
	  $(BIN)/python demo/train_adapter.py --name $$name && $(BIN)/python demo/evaluate_adapter.py \
	    --adapter demo/adapters/$$name --limit 100 --batch 8 --max-new-tokens 24 || exit 1; \
	done

quick: setup $(MODEL)/model.safetensors
	$(call decide,recipes/quick.yaml)

gate: setup $(MODEL)/model.safetensors
	$(BIN)/peftopt gate recipes/gate.yaml --max-age 3650d --no-forecast

check: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(TWO) $(PURE:%=tests/test_%.py)

test: .venv/tested $(MODEL)/model.safetensors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(TWO) -m "not engines"

audit: .venv/tested
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive peftopt
	.ci/audit
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/fuzz.py --seconds 90 --files 1000

mutants: .venv/tested
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/mutants.py $(if $(SINCE),--changed $(SINCE) --sample 150 --minutes 3 --floor 0.75)

prometheus: $(PROMETHEUS)

# unpacked, not installed: that needs no root
$(PROMETHEUS):
	rm -rf .venv/prometheus
	mkdir -p .venv/prometheus
	cd .venv/prometheus && { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }; }
	cd .venv/prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb
	touch $@

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quantize,demo,serve,docs]'
	touch $@

docs: .venv/docs
	$(BIN)/python docs/generate.py --check
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv models site results/artifacts results/runs
