"""Runs with an environment: from recipe to result, the same after a kill, and in the folder."""

from __future__ import annotations

import json
import operator
import re
import shutil
from pathlib import Path

import counting_environment
import pyarrow.parquet as pq
import pytest
import scripted_server
from episode_model import calculator_recipe, save_model
from same_run import assert_same
from scripted_vllm import serving

from selfteach import cli
from selfteach.commands.actions import load, one_run
from selfteach.commands.forecast.collection import ForecastRequest
from selfteach.commands.forecast.run_forecast import forecast
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import PartError, RecipeError
from selfteach.models.plain_pass import plain_logits
from selfteach.rollout.journaled_engine import JournaledEngine, SamplingInterrupted
from selfteach.rollout.vllm import vllm_engine
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end

COUNTING = Path(counting_environment.__file__).read_text()
RECIPE = """
[model]
path = "{model}"
templates = "lab"
thinking = {{ student = false, teacher = false }}

[data]
type = "chain_sums"
train = 8
validation = 2
test = 2

[sampling]
max_tokens = 12
batch_size = 8

[environment]
type = "./counting.py:Counting"
options = {{ last = 2 }}
max_turns = 4

[train]
steps = 3
problems_per_step = 2
group_size = 4
checkpoint_every = 1
keep_checkpoints = 3
threads = 1

[evaluation]
every = 3
validation_k = 1
test_k = 1

[arms.grpo]
objective = {{ type = "grpo" }}

[arms.environment]
context = {{ type = "environment", fallback = "reference" }}
objective = {{ type = "distillation" }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("episodes")
    model = save_model(folder / "model")
    (folder / "counting.py").write_text(COUNTING)
    (folder / "recipe.toml").write_text(RECIPE.format(model=model))
    return folder


def recipe(folder: Path, arm: str = "grpo", **changes: object) -> Recipe:
    chosen = one_run(load(folder / "recipe.toml", [], arm), arm, 0)
    return validate(Recipe, merge(chosen.model_dump(mode="json"), changes), where="test")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    run_to_end(recipe(folder), folder / "whole")
    return folder / "whole"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampled(row: dict) -> int:
    return sum(s["stop"] - s["start"] for s in row["segments"] if s["kind"] == "model")


def test_a_run_trains_on_turns_and_says_so(whole: Path) -> None:
    steps = [row for row in RunFolder(whole).metrics() if row["kind"] == "step"]
    assert len(steps) == 3 and all(row["turns"] > 1 for row in steps)
    assert all(row["environment_tokens"] > 0 for row in steps)
    assert any(row["tokens_trained"] > 0 for row in steps)
    stored = [r for path in sorted((whole / "rollouts").glob("step_*")) for r in rows(path)]
    for row in stored:
        zeros = sum(logp == 0.0 for logp in row["logps"])
        assert zeros == len(row["token_ids"]) - sampled(row)
        assert row["observation"].startswith("Your number is") and row["verdict"]["formatted"]
    first = stored[: len(stored) // 3]
    assert steps[0]["length"] == pytest.approx(sum(map(sampled, first)) / len(first))
    samples = rows(whole / "samples" / "step_000001.jsonl")
    assert {s["kind"] for row in samples for s in row["segments"]} == {"model", "environment"}


def test_a_killed_run_ends_in_the_same_weights(folder: Path, whole: Path) -> None:
    """A resume reads the episodes of a step that was sampled and not trained on."""
    other = folder / "resumed"
    shutil.copytree(whole, other)
    for path in (other / "result.json", other / "model"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (other / "checkpoints").glob("step_*3"):
        shutil.rmtree(path)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    before = [line for line in lines if json.loads(line)["step"] < 3]
    (other / "metrics.jsonl").write_text("".join(before))
    stored = {p.name: p.read_bytes() for p in (other / "rollouts").glob("step_000003*")}
    run_to_end(recipe(folder), other)
    assert_same(whole, other)
    assert stored == {p.name: p.read_bytes() for p in (other / "rollouts").glob("step_000003*")}


@pytest.mark.slow
def test_every_sample_of_a_step_is_the_same_without_its_file(folder: Path, whole: Path) -> None:
    """Sampled again in another process order, an episode is the same: streams have keys."""
    again = folder / "again"
    run_to_end(recipe(folder), again)
    assert_same(whole, again)
    for path in sorted((whole / "rollouts").glob("*.jsonl")):
        assert path.read_bytes() == (again / "rollouts" / path.name).read_bytes()


@pytest.mark.slow
def test_distillation_on_the_environment_s_feedback(folder: Path) -> None:
    run_to_end(recipe(folder, "environment", train={"steps": 1}), folder / "feedback")
    (samples,) = (folder / "feedback" / "samples").glob("*.jsonl")
    contexts = [row["context"] for row in rows(samples)]
    assert any(text and "You have stopped too early." in text for text in contexts) or all(contexts)


def last_turn_changed(body: dict) -> str:
    """Return a critique that repeats an episode's turns, and writes the last one anew."""
    shown = (
        body["messages"][-1]["content"].partition("ATTEMPT BEGINS")[2].partition("ATTEMPT ENDS")[0]
    )
    turns = re.findall(r"<turn_\d+>\n(.*?)\n</turn_\d+>", shown, re.DOTALL)
    written = [*turns[:-1], "go on"]
    return "\n".join(f"<turn_{i}>\n{text}\n</turn_{i}>" for i, text in enumerate(written, 1))


@pytest.mark.slow
def test_a_step_trains_on_critiques_of_what_the_environment_judged(folder: Path) -> None:
    """No verifier reads the critic's last turn, which is a step as the others are."""
    with scripted_server.serving(scripted_server.says(last_turn_changed)) as server:
        critic = {
            "type": "endpoint", "base_url": server.url, "model": "scripted", "http_retries": 0,
            "reply_cache": str(folder / "replies.sqlite"), "min_similarity": 0.0,
        }  # fmt: skip
        judged = recipe(
            folder, critic=critic, context={"type": "step_aligned"}, model={"templates": "turns_bare"},
            objective={"type": "distillation", "from_first_error": True}, train={"steps": 1},
        )  # fmt: skip
        run_to_end(judged, folder / "judged")
        critiqued = []
        for path in ("rollouts/step_000001.000", "samples/step_000001"):
            out, place = folder / "judged.jsonl", folder / "judged" / f"{path}.jsonl"
            cli.app(["critique", str(place), "--out", str(out)], standalone_mode=False)
            critiqued.append([row["critique"]["first_error"] for row in rows(out)])
    samples = rows(folder / "judged" / "samples" / "step_000001.jsonl")
    sampled = {
        (row["problem_id"], row["sample"]): row
        for path in (folder / "judged" / "rollouts").glob("step_000001.*") for row in rows(path)
    }  # fmt: skip
    errors, starts = [], []
    for row in samples:
        assert "steps" in row["critique"], row["critique"]
        segments = sampled[row["problem_id"], row["sample"]]["segments"]
        last = [segment for segment in segments if segment["kind"] == "model"][-1]
        is_cut = segments[-1]["event"] == "truncated"
        errors.append(row["first_error_token"])
        starts.append(None if is_cut else last["start"])
    assert critiqued == [[row["critique"]["first_error"] for row in samples]] * 2
    assert errors == starts and any(starts) and any(row["correct"] for row in samples)
    (step,) = [row for row in RunFolder(folder / "judged").metrics() if row["kind"] == "step"]
    in_loss = sum(start is not None for start in starts) / len(starts)
    assert step["frac_in_loss"] == pytest.approx(in_loss) and step["loss"] > 0


@pytest.mark.slow
def test_a_forecast_s_teacher_plays_the_same_episodes(folder: Path, tmp_path: Path) -> None:
    """The environment shows a number of its seed first, which is in the teacher's prompt."""
    arms = {"environment": recipe(folder, "environment")}
    result = forecast(arms, ForecastRequest(problems=2, k=2), tmp_path)
    assert result["arms"]["environment"]["measures"]["edge"] is not None
    first, again = (
        {(row["problem_id"], row["sample"]): row["observation"]
         for path in sorted((tmp_path / "rollouts").glob(f"{name}.*")) for row in rows(path)}
        for name in ("base_0", "teacher_environment")
    )  # fmt: skip
    assert len(first) == 4 and first == again


def test_check_runs_the_environment_s_contract(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.app(["check", str(folder / "recipe.toml")], standalone_mode=False)
    out = capsys.readouterr().out
    assert "environment: counting.py:Counting(last=2)" in out and "its contract holds" in out
    assert "episodes with counting.py:Counting: at most 4 turns of 12 tokens" in out


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("self.turns += 1", "step(Turn) raised"),
        ('return f"Your number', "reset(problem"),
    ],
)
def test_check_says_what_is_broken_about_an_environment(
    folder: Path, tmp_path: Path, broken: str, why: str
) -> None:
    shutil.copy(folder / "recipe.toml", tmp_path)
    text = COUNTING.replace(broken, f"raise KeyError('x')\n        {broken}")
    (tmp_path / "counting.py").write_text(text)
    with pytest.raises(PartError) as error:
        cli.app(["check", str(tmp_path / "recipe.toml")], standalone_mode=False)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_environment_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text("class Counting:\n    def __init__(self, last): ...\n")
    part = {"type": f"{tmp_path}/counting.py:Counting", "options": {"last": 1}}
    with pytest.raises(PartError, match="has no reset, step, verdict, tools"):
        run_to_end(recipe(folder, environment=part), tmp_path / "run")
    with pytest.raises(RecipeError, match="max_turns"):
        recipe(folder, environment={"type": "calculator", "max_turns": 0})


@pytest.mark.slow
def test_a_vllm_server_continues_episodes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn is a request with the ids so far; of a server that dies, complete groups are saved."""
    monkeypatch.setattr(vllm_engine, "RETRY_INTERVAL_S", 0.01)
    plain = build(recipe(folder))
    model, problems = plain.components.policy.model, plain.task.problems("train")[:3]
    with serving(model, plain.tokenizer) as server:  # type: ignore[arg-type]
        engine = {
            "type": "vllm_server", "url": server.url, "model": "tiny", "patience_seconds": 0.0,
            "concurrency": 1, "tolerance": 1e-3,
        }  # fmt: skip
        built = build(recipe(folder, engine=engine))
        sampling = built.components.sampling
        server.requests.clear()
        rollouts = built.components.engine.generate(problems, sampling)
        prompts = [tuple(body["prompt"]) for body in server.requests if body.get("logprobs") == 0]
        for rollout in rollouts:
            ids = (*rollout.prompt_ids, *rollout.token_ids)
            for turn in rollout.turns:
                assert ids[: len(rollout.prompt_ids) + turn.start] in prompts
            logp_TV = plain_logits(model, list(ids[:-1])).double().log_softmax(-1)
            for i in rollout.model_positions:
                row = logp_TV[len(rollout.prompt_ids) + i - 1]
                assert rollout.logps[i] == pytest.approx(row[rollout.token_ids[i]].item(), abs=1e-3)
        assert any(len(rollout.turns) > 1 for rollout in rollouts)
        run, name = RunFolder(tmp_path / "run"), "step_000001"
        server.dies_after = 20
        with pytest.raises(
            SamplingInterrupted, match=r"\d+ of \d+ episodes of this batch are saved"
        ):
            JournaledEngine(built.components.engine, run, name).generate(problems, sampling)
        server.dies_after = None
        again = JournaledEngine(built.components.engine, run, name).generate(problems, sampling)
        assert again == rollouts


def calculator(folder: Path, **changes: object) -> Recipe:
    return calculator_recipe(folder / "model", **changes)


@pytest.mark.slow
def test_step_aligned_critiques_of_episodes_by_the_oracle(folder: Path) -> None:
    one = calculator(folder)
    assert one.model.templates == "turns_chain_sums"
    run_to_end(one, folder / "aligned")
    samples = rows(folder / "aligned" / "samples" / "step_000001.jsonl")
    critiques = [row["critique"] for row in samples]
    cut = [row["segments"][-1]["event"] == "truncated" for row in samples]
    errors = [critique["first_error"] is not None for critique in critiques]
    assert all(map(operator.or_, errors, cut)) and any(errors), "a random model"
    assert all("<turn_1>" in row["context"] for row in samples)
    steps = [row for row in RunFolder(folder / "aligned").metrics() if row["kind"] == "step"]
    assert all(row["loss"] > 0 for row in steps)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rollouts/step_000001.000", "samples/step_000001"])
def test_critique_reads_the_episodes_of_a_run(folder: Path, tmp_path: Path, place: str) -> None:
    run = folder / "critiqued"
    if not run.exists():
        run_to_end(calculator(folder, train={"steps": 1}), run)
    out = tmp_path / "critiques.jsonl"
    cli.app(["critique", str(run / f"{place}.jsonl"), "--out", str(out)], standalone_mode=False)
    samples = rows(run / "samples" / "step_000001.jsonl")
    for critiqued, sample in zip(rows(out), samples, strict=True):
        assert critiqued["critique"] == sample["critique"]
        assert critiqued["segments"] == sample["segments"]


@pytest.mark.slow
def test_sampling_and_training_overlap_for_episodes(folder: Path) -> None:
    """An order of steps, as for single answers: the same rollouts with and without a second copy."""
    ahead = {"train": {"staleness": 1}, "sampling": {"separate_copy": True}}
    run_to_end(calculator(folder, **ahead), folder / "ahead")
    run_to_end(calculator(folder, train={"staleness": 1}), folder / "in_order")
    assert_same(folder / "ahead", folder / "in_order")


@pytest.mark.slow
def test_inspect_scores_the_model_s_tokens_of_each_turn(folder: Path, whole: Path) -> None:
    words = ["inspect", whole, "--contexts", "reference", "--out", folder / "inspected", "-k", 2]
    cli.app([*map(str, words), "--limit", "2"], standalone_mode=False)
    answers = rows(folder / "inspected" / "answers.jsonl")
    tokens = pq.read_table(folder / "inspected" / "tokens.parquet").to_pylist()
    assert any(len(row["segments"]) > 1 for row in answers)
    for line, row in enumerate(answers):
        contexts = {token["context"] for token in tokens if token["answer"] == line}
        for context in contexts:
            chosen = [t for t in tokens if (t["answer"], t["context"]) == (line, context)]
            assert len(chosen) == row["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpo", "rosd", "trace"])
def test_other_methods_recipes_run_on_episodes_unchanged(folder: Path, name: str) -> None:
    """Their contexts, gates and objectives with a calculator: only model, data and sizes are others."""
    settings = [
        "environment.type=calculator", "environment.max_turns=3", f"model.path={folder / 'model'}",
        "model.thinking.student=false", "model.thinking.teacher=false", "model.lora=false",
        "model.weights_dtype=float32", "model.autocast=false", "model.gradient_checkpointing=false",
        "train.max_length=2000",
        "data.type=chain_sums", "data.train=8", "data.validation=2", "data.test=2",
        "sampling.max_tokens=12", "sampling.batch_size=8", "train.steps=1", "train.threads=1",
        "train.problems_per_step=2", "train.group_size=4", "evaluation.validation_k=1",
        "evaluation.test_k=1",
    ]  # fmt: skip
    one = one_run(load(f"baselines/{name}", settings), None, 0)
    critic = None if one.critic is None else {"type": "oracle"}
    one = Recipe.model_validate({**one.model_dump(mode="json"), "critic": critic})
    run_to_end(one, folder / name)
    (row,) = [row for row in RunFolder(folder / name).metrics() if row["kind"] == "step"]
    assert row["turns"] >= 1 and row["rollouts_sampled"] == 8
    assert row["tokens_trained"] > 0
