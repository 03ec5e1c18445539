"""TRL trains with our critic: three steps of SDPO for real. Needs TRL 1.16 (`make test-trl`)."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import served_critic_recipe
from datasets import Dataset
from model_families import byte_level
from scripted_server import Server, refuses, says, serving
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from selfteach.errors import CriticError, RecipeError
from selfteach.integrations import trl as ours
from selfteach.integrations.trl import critique_feedback, reward_func

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and what it imports

CRITIC = "max_tokens = 64\nhttp_retries = 0\nmax_attempts = 1\nmin_similarity = 0"
CRITIQUED, FAILED = "How much is 3 times 4 less 2?", "How much is 1 plus 1?"
CRITIQUE = (
    "<step_1>3 times 4 is twelve.</s></step_1>\n<step_2>12 less 2 is ten.</step_2>\n"
    "<answer>10</answer>"
)


def replies(body: dict[str, Any]) -> str:
    return CRITIQUE if CRITIQUED in body["messages"][-1]["content"] else "I like it. </s>"


@pytest.fixture(scope="module", autouse=True)
def _trl() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = pytest.importorskip("trl", reason="TRL is not installed").__version__
        if not version.startswith("1.16."):
            pytest.skip(f"written for TRL 1.16, found {version}")
        import_module("trl.experimental.sdpo")
        _ = ours.CritiqueSDPOTrainer


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = byte_level()
    tokenizer.pad_token = "<s>"
    return tokenizer


class Seen(TrainerCallback):
    """Records the teacher's prompts of each batch, as texts, and which rollouts are distilled."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.questions: list[str] = []
        self.prompts: list[str] = []
        self.distilled: list[bool] = []

    def on_generation_prompts_selected(self, *, generation_prompts: Any, **_: Any) -> None:
        self.questions += [prompt[-1]["content"] for prompt in generation_prompts]

    def on_teacher_context_built(
        self, *, teacher_input_ids: Any, teacher_attention_mask: Any, completion_mask: Any,
        self_distillation_mask: Any, **_: Any,
    ) -> None:  # fmt: skip
        ends = teacher_input_ids.size(1) - completion_mask.size(1)
        for ids, mask in zip(teacher_input_ids, teacher_attention_mask, strict=True):
            shown = ids[:ends][mask[:ends].bool()]
            self.prompts.append(self.tokenizer.decode(shown, skip_special_tokens=False))
        self.distilled += self_distillation_mask.bool().tolist()


def trainer(tmp_path: Path, url: str, tokenizer: Any, **changes: Any) -> tuple[Any, Seen]:
    from trl.experimental.sdpo import SDPOConfig

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = served_critic_recipe(
        tmp_path / "recipe.toml", model=tmp_path / "tokenizer", url=url,
        cache=tmp_path / "replies.sqlite", critic=CRITIC,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "solution": answer,
            "problem_id": question,
        }
        for question, answer in [(CRITIQUED, "10"), (FAILED, "2")]
    ]
    settings = {
        "include_environment_feedback": True, "max_steps": 3, "per_device_train_batch_size": 4,
        "num_generations": 2, "max_completion_length": 8, "learning_rate": 1e-2, "logging_steps": 1,
        "teacher_model_kind": "live", "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    seen = Seen(tokenizer)
    made = ours.CritiqueSDPOTrainer(
        model=model,
        reward_funcs=reward_func("exact"),
        feedback=critique_feedback(recipe),
        args=SDPOConfig(str(tmp_path / "out"), **{**settings, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[seen],
    )
    return made, seen


def logs(made: Any, name: str) -> list[float]:
    return [row[name] for row in made.state.log_history if name in row]


def questions(server: Server) -> list[str]:
    contents = [body["messages"][-1]["content"] for body in server.requests]
    return [CRITIQUED if CRITIQUED in content else FAILED for content in contents]


def test_three_steps_show_the_teacher_problem_and_critique(tmp_path: Path, tokenizer: Any) -> None:
    with serving(says(replies)) as server:
        made, seen = trainer(tmp_path, server.url, tokenizer)
        before = {name: weight.clone() for name, weight in made.model.named_parameters()}
        made.train()
        assert made.state.global_step == 3 and len(seen.prompts) == 12
        assert any(not torch.equal(before[n], w) for n, w in made.model.named_parameters())
        for question, prompt, distilled in zip(
            seen.questions, seen.prompts, seen.distilled, strict=True
        ):
            assert question in prompt and "</s>" not in prompt  # quoted, it ends no turn
            assert ("12 less 2 is ten." in prompt) == distilled == (question == CRITIQUED)
            if question == FAILED:  # as TRL does without feedback: the student's prompt
                assert prompt == f"<s>[user]{FAILED}[assistant]"
        # What failed is in the logs, and what was paid for is in the cache.
        assert logs(made, "critique/rollouts") == [4.0, 4.0, 4.0]
        assert logs(made, "critique/failed") == logs(made, "critique/failed/malformed") == [2.0] * 3
        assert logs(made, "critique/failed/unavailable") == [0.0] * 3
        assert made.teacher_context_builder.failures == {"malformed": 6}
        assert logs(made, "self_distillation/feedback_used_fraction") == [0.5] * 3
        assert 0.0 not in logs(made, "self_distillation/distillation_loss")
        paid = len(server.requests)
        assert paid == sum(logs(made, "critique/requests")) > 0 and set(questions(server)) == {
            CRITIQUED,
            FAILED,
        }
        # The same run again samples the same and pays for nothing.
        again, _ = trainer(tmp_path, server.url, tokenizer)
        again.train()
        assert len(server.requests) == paid
        assert logs(again, "critique/requests") == [0.0] * 3
        assert logs(again, "critique/cached") == [4.0] * 3
        for name, weight in again.model.named_parameters():
            torch.testing.assert_close(weight, dict(made.model.named_parameters())[name])


def test_a_context_that_would_push_out_the_problem_is_left_out_and_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    with serving(says(replies)) as server:
        made, seen = trainer(tmp_path, server.url, tokenizer, max_reprompt_len=150, max_steps=1)
        made.train()
    assert not any(seen.distilled)
    assert logs(made, "critique/failed/too_long") == [2.0]
    assert logs(made, "critique/failed") == [4.0]


def test_a_critic_that_is_down_stops_the_training_in_one_line(
    tmp_path: Path, tokenizer: Any
) -> None:
    with serving(refuses(500)) as server:
        made, _ = trainer(tmp_path, server.url, tokenizer)
        with pytest.raises(CriticError, match="unavailable") as error:
            made.train()
    assert "\n" not in str(error.value)


def test_feedback_that_trl_would_ignore_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with (
        serving(says(replies)) as server,
        pytest.raises(RecipeError, match="include_environment_feedback=True"),
    ):
        trainer(tmp_path, server.url, tokenizer, include_environment_feedback=False)
