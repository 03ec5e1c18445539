"""Rewards of one's own, of the signature that TRL's GRPOTrainer calls: they work there unchanged.

A function gets the prompts and completions of whole groups, the sampled token ids, and each column of
the problems' rows as a list; it returns a number for each completion, or None where it does not apply.
"""

import asyncio


def brevity(completions, completion_ids, longest=40, **kwargs):
    """Reward short completions: 1 for an empty one, 0 from ``longest`` tokens on."""
    kwargs["log_metric"]("tokens", sum(map(len, completion_ids)) / len(completion_ids))
    return [max(0.0, 1 - len(ids) / longest) for ids in completion_ids]


async def names_the_answer(completions, answer, **kwargs):
    """Reward completions that name the gold answer somewhere; a service could be asked here."""
    await asyncio.sleep(0)
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(gold in text.split()) for text, gold in zip(texts, answer, strict=True)]
