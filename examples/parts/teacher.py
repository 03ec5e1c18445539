"""A teacher of one's own: the weights with which rollouts are scored under their contexts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfteach.models.lm_head import Scores
from selfteach.models.policy import Policy
from selfteach.models.teacher import score_initial
from selfteach.types import Sequences


class LateTeacher:
    """Teaches with the weights that the policy had at the last multiple of ``every`` updates."""

    def __init__(self, policy: Policy, every: int = 10) -> None:
        if policy.has_adapters:
            raise ValueError("trains all weights: remove model.lora")
        self._policy, self._every = policy, every
        self._updates = torch.zeros((), dtype=torch.long)
        self._weights = {name: w.detach().clone() for name, w in policy.trainable.items()}

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Return the logits of the rollouts' tokens under the late weights."""
        return score_initial(self._policy, self._weights, sequences)

    def update(self) -> None:
        """Count an update of the policy, and copy its weights when it is time."""
        self._updates += 1
        if self._updates % self._every == 0:
            self.load_state({**self._policy.trainable, "updates": self._updates})

    def state(self) -> Mapping[str, Tensor]:
        """Return all that a resume needs."""
        return {**self._weights, "updates": self._updates}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self._updates.copy_(state["updates"])
        for name, weight in self._weights.items():
            weight.copy_(state[name])
