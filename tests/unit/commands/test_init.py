"""`selfteach init` writes a recipe that fits model and problems, and refuses wrong input in a line."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from model_families import byte_level
from scripted_server import lists, serving
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from selfteach.cli import app
from selfteach.commands.init import trial
from selfteach.commands.init.trial import Trial, advice, describe_trial
from selfteach.config.recipe_file import Study, load_study
from selfteach.errors import SelfteachError, Terminated
from selfteach.types import Problem, Rollout, Verdict

SUMS = [
    {
        "question": f"What is {n} plus 1?",
        "answer": f"Adding one to {n} gives the number after it.\n#### {n + 1}",
    }
    for n in range(40)
]
WORDS = [{"prompt": f"Which city is number {n}?", "solution": f"Paris {n}th"} for n in range(40)]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def save_model(folder: Path, *, chat_template: str = CHAT, window: int = 4096) -> str:
    tokenizer = byte_level(chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=window,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("sums.jsonl", SUMS), ("words.jsonl", WORDS)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def init(*words: object) -> str:
    result = CliRunner().invoke(app, ["init", *map(str, words)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def written(path: str = "recipe.toml") -> Study:
    return load_study(path)


def refused(*words: object) -> str:
    """Run a call that must be refused and write nothing; return its line."""
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(app, ["init", *map(str, words)])
    assert isinstance(result.exception, SelfteachError), (result.exception, result.output)
    line = str(result.exception)
    assert "\n" not in line and sorted(Path().rglob("*")) == before
    return line


def test_a_recipe_for_this_model_and_these_problems_is_tried(model: str) -> None:
    output = init("--model", model, "--data", "sums.jsonl", "--answers", 1)
    study = written()
    assert list(study.arms) == ["grpo", "reference"]
    recipe = study.recipe("reference")
    assert (recipe.model.path, recipe.model.lora, recipe.optimizer.lr) == (model, None, 1e-5)
    assert recipe.model.templates == "steps_few_shot"
    data = recipe.data.model_dump()
    assert (data["pool"], data["verifier"]) == ("sums.jsonl", "math")
    assert (data["split"]["validation"], data["split"]["test"]) == (4, 4)
    assert data["columns"]["answer"] == "answer | after:####"
    assert 64 <= recipe.sampling.max_tokens <= 256
    assert "What is" in output and "Adding one to" in output  # the prompts, the teacher's too
    for pattern in (
        r"8 answers of the untrained model to 8 training problems",
        r"form: +\d+% have a final answer", r"length: \d+ tokens on average", r"solved: 0%",
        r"note: none is solved", r"selfteach check recipe\.toml", r"selfteach forecast recipe\.toml",
        r"selfteach study recipe\.toml --out runs/first",
    ):  # fmt: skip
        assert re.search(pattern, output), pattern
    text = Path("recipe.toml").read_text()
    assert text.count("#") > 15  # it is commented
    checked = CliRunner().invoke(app, ["check", "recipe.toml"])
    assert checked.exit_code == 0, (checked.output, checked.exception)


def test_offline_runs_no_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "try_model", None)
    output = init("--model", model, "--data", "words.jsonl", "--offline", "--out", "new/r.toml")
    assert "the student is shown" in output and "check --offline new/r.toml" in output
    study = written("new/r.toml")
    assert list(study.arms) == ["grpo", "peer"]  # neither worked solutions nor a critic
    recipe = study.recipe("grpo")
    assert recipe.data.model_dump()["verifier"] == "exact" and recipe.model.templates is None


def test_a_hub_model_that_is_not_here() -> None:
    output = init("--model", "Qwen/Qwen3-1.7B", "--data", "sums.jsonl", "--offline")
    assert "the tokenizer is not on this machine" in output
    recipe = written().recipe("grpo")
    assert recipe.model.lora is not None and recipe.optimizer.lr == 1e-4
    assert recipe.model.thinking.student is False


def test_the_lab(here: Path) -> None:
    output = init("--model", "lab:two_styles", "--data", "lab", "-k", 1)
    assert list(written().arms) == ["grpo", "step_aligned", "reference"]
    assert written().recipe("step_aligned").optimizer.lr == 1e-3
    assert "form:   100%" in output


def test_a_model_with_a_switch_and_a_short_window(here: Path) -> None:
    path = save_model(here / "short", chat_template=CHAT + SWITCH, window=400)
    init("--model", path, "--data", "words.jsonl", "--offline")
    recipe = written().recipe("grpo")
    assert recipe.model.thinking.student is False
    assert recipe.sampling.max_tokens < 200
    path = save_model(here / "tiny", window=64)
    assert "leaves no room" in refused("--model", path, "--data", "words.jsonl", "--out", "x.toml")


def test_layers_of_another_name_get_the_adapters(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfteach.commands.init.recipe_draft.WITH_ADAPTERS", 1)
    tokenizer = byte_level(chat_template=CHAT)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=2048)
    GPT2LMHeadModel(config).save_pretrained(here / "gpt2")
    tokenizer.save_pretrained(here / "gpt2")
    init("--model", "./gpt2", "--data", "words.jsonl", "--offline")
    lora = written().recipe("grpo").model.lora
    assert lora is not None and set(lora.targets) == {"c_attn", "c_proj", "c_fc"}


def test_test_problems_and_columns_of_other_names(model: str, here: Path) -> None:
    rows = [{"body": f"{n} + {n}?", "gold": 2 * n} for n in range(12)]
    (here / "own.csv").write_text(
        "body,gold\n" + "".join(f"{r['body']},{r['gold']}\n" for r in rows)
    )
    line = refused("--model", model, "--data", "own.csv", "--offline")
    assert "the columns are 'body', 'gold'" in line and "--column question=NAME" in line
    columns = ("--column", "question=body", "--column", "answer=gold")
    init("--model", model, "--data", "own.csv", *columns, "--offline")
    data = written().recipe("grpo").data.model_dump()
    assert (data["columns"]["question"], data["verifier"]) == ("body", "math")
    (here / "test.csv").write_text("body,gold\n77 + 1?,78\n")
    init(
        "--model",
        model,
        "--data",
        "own.csv",
        "--test",
        "test.csv",
        *columns,
        "--offline",
        "--force",
    )
    data = written().recipe("grpo").data.model_dump()
    assert (data["test"], data["split"]["test"]) == ("test.csv", 0)


def test_a_critic_that_serves_one_model(model: str) -> None:
    with serving() as server:
        server.listing = lists("judge-7b")
        init("--model", model, "--data", "sums.jsonl", "--critic", server.url, "-k", 1)
        assert not server.requests  # nothing is bought, apart from the healthcheck
    study = written()
    assert list(study.arms) == ["grpo", "step_aligned", "reference"]
    critic = study.recipe("step_aligned").critic
    assert critic is not None and critic.model_dump()["model"] == "judge-7b"
    assert study.recipe("grpo").critic is None and study.recipe("reference").critic is None


def test_a_critic_that_is_not_clear(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--model", model, "--data", "sums.jsonl")
    with serving() as server:
        server.listing = lists("a", "b")
        line = refused(*words, "--critic", server.url)
        assert "it serves a, b; name one with --critic-model" in line
        url = server.url
    assert "no server at" in refused(*words, "--critic", url)
    assert "--critic-model" in refused(*words, "--critic", url, "--offline")
    assert "write it like http" in refused(*words, "--critic", "localhost:8000")
    assert "need the server: --critic URL" in refused(*words, "--critic-model", "a")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    line = refused(*words, "--critic", url, "--critic-key-env", "NO_SUCH_KEY")
    assert "NO_SUCH_KEY" in line and "critic.api_key_env" not in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file$"),
        (["--data", "data/nowhere.parquet"], "--data data/nowhere.parquet: no such file"),
        (["--data", "README"], "no such file; .* one of lab, chain_sums, .*gsm8k"),
        (["--data", "empty.jsonl"], "empty.jsonl.* is empty|problem set is empty"),
        (["--data", "two.jsonl"], "two.jsonl: 2 problems are too few"),
        (["--data", "broken.jsonl"], r"broken\.jsonl:1: not a JSON object"),
        (["--data", "."], "not one of save_to_disk"),
        (["--data", "sums.jsonl", "--test", "nowhere.jsonl"], "--test nowhere.jsonl: no such file"),
        (["--data", "sums.jsonl", "--column", "questoin=q"], "--column 'questoin=q': write one of"),
        (["--data", "sums.jsonl", "--out", "folder"], "--out folder is a folder"),
        (["--data", "sums.jsonl", "--out", "sums.jsonl"], "exists; name another file, .* --force"),
        (["--data", "sums.jsonl", "--out", "sums.jsonl/r.toml"], "sums.jsonl is a file"),
        (["--data", "sums.jsonl", "--model", "./nowhere"], "no such folder"),
        (["--data", "sums.jsonl", "--model", "models/nowhere"], "no such folder"),
        (["--data", "sums.jsonl", "--model", "folder"], "folder"),
        (["--data", "lab"], "lab"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_writes_nothing(
    words: list[str], line: str, model: str, here: Path
) -> None:
    (here / "folder").mkdir()
    (here / "empty.jsonl").write_text("\n")
    (here / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS[:2]))
    (here / "broken.jsonl").write_text("[1]\n")
    given = words if "--model" in words else [*words, "--model", model]
    assert re.search(line, refused(*given, "--offline"))


def test_a_base_model_is_refused(here: Path) -> None:
    tokenizer = byte_level(chat_template=None)
    tokenizer.chat_template = None
    save_model(here / "base")
    for file in (here / "base").glob("*template*"):
        file.unlink()
    tokenizer.save_pretrained(here / "base")
    assert "has no chat template" in refused("--model", "./base", "--data", "sums.jsonl")


def test_an_existing_file_is_replaced_only_with_force(model: str, here: Path) -> None:
    Path("recipe.toml").write_text("mine")
    words = ("--model", model, "--data", "sums.jsonl", "--offline")
    assert "exists" in refused(*words)
    assert Path("recipe.toml").read_text() == "mine"
    init(*words, "--force")
    assert tomllib.loads(Path("recipe.toml").read_text())["arms"]


def test_an_interruption_keeps_the_recipe(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise Terminated(130)

    monkeypatch.setattr(trial, "try_model", interrupted)
    with pytest.raises(Terminated) as end:
        CliRunner().invoke(app, ["init", "--model", model, "--data", "sums.jsonl"])
    assert end.value.progress == "kept: recipe.toml; go on with selfteach check recipe.toml"
    assert written().arms


def judged(correct: bool, formatted: bool = True, finished: bool = True) -> Trial:
    problem = Problem("1", "q", "4")
    rollout = Rollout(problem, 0, (), (1, 2), (0.0, 0.0), "text", finished, 0)
    verdict = Verdict(correct, formatted, "3" if formatted else None, None)
    return Trial([rollout], [verdict], 2)


@pytest.mark.parametrize(
    ("outcome", "note"),
    [
        (judged(True), "solves nearly all"),
        (judged(False), "none is solved"),
        (judged(False, formatted=False), "not in the form"),
        (judged(False, formatted=False, finished=False), "raise sampling.max_tokens"),
    ],
)
def test_advice(outcome: Trial, note: str) -> None:
    assert note in "\n".join(advice(outcome)) and note in "\n".join(describe_trial(outcome))
