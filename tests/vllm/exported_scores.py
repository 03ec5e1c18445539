"""Prints the log-probabilities that vLLM gives the tokens of a prompt after the first.

It is run by the Python of vLLM's environment, which has nothing of selfteach.

python exported_scores.py MODEL IDS [ADAPTER]
"""

from __future__ import annotations

import json
import sys


def main(model: str, ids: list[int], adapter: str | None = None) -> None:
    """Load a model, with adapters if they are named, and score one prompt."""
    from vllm.lora.request import LoRARequest

    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=2,
        enable_lora=adapter is not None, enable_prefix_caching=False,
    )  # fmt: skip
    request = None if adapter is None else LoRARequest("exported", 1, adapter)
    (output,) = llm.generate(
        [{"prompt_token_ids": ids}],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
        lora_request=request,
    )
    places = output.prompt_logprobs[1:]
    scores = [of_token[token].logprob for of_token, token in zip(places, ids[1:], strict=True)]
    sys.stdout.write(f"scores {json.dumps(scores)}\n")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])
