#!/bin/sh
# What an hour on one GPU adds: the same tasks and arms with a larger policy and a larger critic from the hub,
# 12 answers to each test problem, five seeds. Resumable: run it again until it ends by itself.
#
#   sh experiments/paper_on_a_laptop/one_gpu_hour.sh                    # 1.5B taught by 7B; 80 GB of GPU memory
#   POLICY=Qwen/Qwen3-1.7B CRITIC=Qwen/Qwen3-8B sh experiments/paper_on_a_laptop/one_gpu_hour.sh
set -eu
HERE=experiments/paper_on_a_laptop
POLICY=${POLICY:-Qwen/Qwen2.5-Coder-1.5B-Instruct}
CRITIC=${CRITIC:-Qwen/Qwen2.5-Coder-7B-Instruct}
OUT=${OUT:-runs/paper_on_a_gpu}
SECONDS_LEFT=${SECONDS_LEFT:-3500}
nvidia-smi --query-gpu=name,memory.total --format=csv

# Terms and digits at which the larger policy fails as often as the small one does on the laptop.
timeout --signal=TERM "$SECONDS_LEFT" sh -eux -c "
selfteach select $HERE/select_chain_sums.toml --out $OUT/chain_sums \
	--set model.path=$POLICY --set critic.path=$CRITIC --set critic.max_tokens=192 --set data.train=1200 --set data.seed=31 \
	--set data.min_terms=7 --set data.max_terms=7 --set data.max_digits=3 --set sampling.max_tokens=160 \
	--set sampling.batch_size=2048
test -f $OUT/study/study.json && selfteach resume $OUT/study || selfteach study $HERE/chain_sums.toml --out $OUT/study \
	--set model.path=$POLICY --set arms.step_aligned.critic.path=$CRITIC --set sampling.max_tokens=160 \
	--set data.train=$OUT/chain_sums/train.jsonl --set data.validation=$OUT/chain_sums/validation.jsonl \
	--set data.test=$OUT/chain_sums/test.jsonl --set sampling.batch_size=2048 --set evaluation.test_k=12 \
	--set train.steps=16 --set arms.step_aligned.critic.max_tokens=192
"
echo "table and report: $OUT/study"
