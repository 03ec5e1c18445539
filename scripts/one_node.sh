#!/bin/sh
# One node of 8 GPUs: 1 trains, 1 samples (vLLM), 4 serve the critic. For the addresses in the recipe see
# docs/scaling.md. New weights travel in memory (docs/vllm.md): full weights from GPU to GPU over NCCL,
# adapters through the worker extension, for which selfteach is installed in vLLM's environment too.
#   RECIPE=recipe.toml OUT=runs/x sh scripts/one_node.sh
set -eu
: "${RECIPE:?a recipe}" "${OUT:?a folder for the run}"
CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 \
	python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen3-1.7B --served-model-name solver \
	--host 127.0.0.1 --port 8001 --logprobs-mode processed_logprobs --enable-lora --max-lora-rank 64 \
	--worker-extension-cls selfteach.rollout.vllm.worker_extension.StreamedWeights \
	--weight-transfer-config '{"backend": "nccl"}' &
policy=$!
CUDA_VISIBLE_DEVICES=4,5,6,7 vllm serve Qwen/QwQ-32B --host 127.0.0.1 --port 8000 \
	--tensor-parallel-size 4 --enable-prefix-caching &
critic=$!
trap 'kill $policy $critic' EXIT
for port in 8000 8001; do until curl -fs "http://127.0.0.1:$port/health" >/dev/null; do sleep 5; done; done
CUDA_VISIBLE_DEVICES=0 selfteach train "$RECIPE" --arm step_aligned --out "$OUT"
