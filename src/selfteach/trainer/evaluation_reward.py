"""Rewards an evaluation batch by batch, each batch in the run folder before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfteach.feedback.rewards.combined_reward import CombinedReward
from selfteach.feedback.rewards.reward_journal import RewardJournal
from selfteach.protocols import Verifier
from selfteach.runtime.run_folder import RunFolder
from selfteach.tasks.verifiers import verdicts_of, verify_rollouts
from selfteach.trainer.build import Built
from selfteach.trainer.reward_metrics import mean_rewards
from selfteach.types import Problem, Rollout, Verdict


def with_stored_rewards(
    built: Built, run: RunFolder, name: str, rollouts: Sequence[Rollout]
) -> Built:
    """Return components whose reward is that of these rollouts, computed once and stored in a folder.

    Unchanged where rewards do not decide success. Raises `PartError` or `CriticError`.
    """
    components = built.components
    if components.reward is None:
        return built
    verdicts = stored_verdicts(built, run, name, rollouts)
    by_key = {r.key: verdict for r, verdict in zip(rollouts, verdicts, strict=True)}

    def stored(judged: Sequence[tuple[Rollout, Verdict]]) -> list[Verdict]:
        return [by_key[rollout.key] for rollout, _ in judged]

    return replace(built, components=replace(components, reward=stored))


def stored_verdicts(
    built: Built, run: RunFolder, name: str, rollouts: Sequence[Rollout]
) -> list[Verdict]:
    """Return the verdicts of rollouts, with rewards from a folder where these decide success."""
    reward = built.components.reward
    if isinstance(reward, CombinedReward):
        reward = reward.at(0, RewardJournal(run, name, run.identity))
    return verdicts_of(rollouts, built.components.verify, reward)


class BatchwiseReward:
    """Implements `Reward` for rollouts that come in batches, and whose reward decides success.

    ``start`` gets each batch as it is complete; a call returns the verdicts of rollouts of any of them.
    ``name`` is that of the evaluation's rollouts, ``update`` the number of the policy's updates.
    """

    def __init__(self, run: RunFolder, built: Built, name: str, update: int) -> None:
        self.decides = built.components.reward is not None
        self._run, self._built, self._name, self._update = run, built, name, update
        self._verdicts: dict[tuple[str, int], Verdict] = {}
        self._by_text: dict[tuple[str, str], Verdict] = {}

    def start(self, number: int, rollouts: Sequence[Rollout]) -> None:
        """Reward one batch; nothing happens where rewards do not decide success."""
        components = self._built.components
        reward = components.reward
        if not isinstance(reward, CombinedReward):
            return
        buyer = f"{self._run.identity}/{components.ranks.rank}"
        journal = RewardJournal(self._run, f"{self._name}.{number:03d}", buyer)
        verified = verify_rollouts(components.verify, rollouts)
        rewarded = reward.at(self._update, journal)(list(zip(rollouts, verified, strict=True)))
        for rollout, first, verdict in zip(rollouts, verified, rewarded, strict=True):
            self._verdicts[rollout.key] = verdict
            if rollout.verdict is None:  # else an environment gave it
                self._by_text[rollout.problem.id, rollout.answer_text] = first

    @property
    def verifier(self) -> Verifier:
        """Return the verifier; what `start` has verified is not verified again."""
        return self._verified if self.decides else self._built.components.verify

    def _verified(self, problem: Problem, text: str) -> Verdict:
        return self._by_text[problem.id, text]

    def __call__(self, judged: Sequence[tuple[Rollout, Verdict]]) -> list[Verdict]:
        """Return the verdicts of rollouts whose batches were rewarded."""
        return [self._verdicts[rollout.key] for rollout, _ in judged]

    def metrics(self) -> dict[str, float]:
        """Return the means of all ranks' rewards; empty where rewards do not decide success."""
        if not self.decides:
            return {}
        ranks = self._built.components.ranks
        mine = [v.rewards for v in self._verdicts.values() if v.rewards is not None]
        rewards = ranks.gather(mine)
        return mean_rewards(rewards) if rewards else {}
