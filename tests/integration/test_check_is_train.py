"""What cannot train is refused by `check` and `train` in the same line, before anything is sampled."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from model_families import byte_level
from tiny_models import save_model
from typer.testing import CliRunner

from selfteach.cli import app
from selfteach.errors import SelfteachError
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer import build, device_load

PARTS_ONLY = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(1, 9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def recipe(folder: Path, model: Path, *settings: str) -> list[str]:
    """Write problems and return the words of a command for a recipe that would train."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = folder / "recipe.toml"
    path.write_text(f'''
[model]
path = "{model}"
[data]
type = "files"
pool = "{rows}"
split = {{ validation = 2, test = 2 }}
[sampling]
max_tokens = 8
[objective]
type = "grpo"
[train]
steps = 1
problems_per_step = 2
group_size = 2
[guard]
idle_steps = 0
''')
    return [str(path), *(word for setting in settings for word in ("--set", setting))]


def refusal(*words: str) -> str:
    """Run a command that must be refused; return its line."""
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, SelfteachError), (result.exception, result.output)
    line = str(result.exception)
    assert "\n" not in line
    return line


def refused_alike(folder: Path, *words: str) -> str:
    """Return the line in which `check` and `train` refuse a recipe."""
    line = refusal("check", *words)
    assert refusal("train", *words, "--out", str(folder / "run")) == line
    assert not RunFolder(folder / "run").metrics()
    return line


def test_the_recipe_itself_trains(tmp_path: Path, model: Path) -> None:
    words = recipe(tmp_path, model)
    assert CliRunner().invoke(app, ["check", *words]).exit_code == 0
    result = CliRunner().invoke(app, ["train", *words, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    config = RunFolder(tmp_path / "run").config()
    assert config["optimizer"]["lr"] == 1e-5 and config["sampling"]["max_tokens"] == 8


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["data.split.validation=0"], "the validation problem set is empty"),
        (["data.split.test=0"], "the test problem set is empty.*evaluation.test = false"),
        (['data.answer_in="boxed"'], r'"boxed" reads .boxed, but solver.jinja asks for <answer>'),
        (['model.lora.targets=["q_proj", "c_attn"]'], "no linear layer named 'c_attn'; it has .*q_pro"),
        (
            ['objective.type="distillation"', 'context.type="reference"'],
            'context "reference" shows worked solutions, and none of the 4 training problems has',
        ),
        (['model.path="./nowhere"'], "'./nowhere': no such folder"),
        (['model.path="tests/nowhere"'], "'tests/nowhere': no such folder"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(
    tmp_path: Path, model: Path, settings: list[str], line: str
) -> None:
    assert re.search(line, refused_alike(tmp_path, *recipe(tmp_path, model, *settings)))


@pytest.mark.parametrize("lora", [False, True])
def test_what_exceeds_the_memory_is_refused_before_it_is_loaded(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("50000\n")
    monkeypatch.setattr(device_load, "CGROUP_LIMITS", (tmp_path / "absent", limit))
    monkeypatch.setattr(build, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    words = recipe(tmp_path, model, *(["model.lora.rank=2"] if lora else []))
    fix = "hold the frozen weights in 4 bits" if lora else "train adapters"
    assert re.search(
        rf"need 0\.\d MiB, and this device has 0\.0 MiB: {fix}", refused_alike(tmp_path, *words)
    )
    limit.write_text("max\n")  # no limit
    monkeypatch.undo()
    monkeypatch.setattr(device_load, "CGROUP_LIMITS", (limit,))
    assert CliRunner().invoke(app, ["check", *words]).exit_code == 0


def test_a_split_without_a_pool_is_not_ignored(tmp_path: Path, model: Path) -> None:
    words = recipe(tmp_path, model)
    path = Path(words[0])
    path.write_text(path.read_text().replace("pool =", "train ="))
    assert "data.split divides data.pool" in refused_alike(tmp_path, *words)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("solver.jinja", "Answer in <answer>.", "solver.jinja does not show {{ question }}"),
        ("teachr.jinja", "", "teachr.jinja: no template has this name.*did you mean teacher.jinja"),
    ],
)  # fmt: skip
def test_templates_that_show_nothing(
    tmp_path: Path, model: Path, name: str, text: str, line: str
) -> None:
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / name).write_text(text)
    words = recipe(tmp_path, model, f'model.templates="{templates}"')
    assert re.search(line, refused_alike(tmp_path, *words))


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{% if add_generation_prompt %}[assistant]{% endif %}", "does not write what the user says"),
        ("{{ messages[0]['content'] | int | round(foo=1) }}", "the chat template of .* fails"),
    ],
)  # fmt: skip
def test_chat_templates_that_write_nothing_or_fail(
    tmp_path: Path, template: str, line: str
) -> None:
    broken = save_model(tmp_path / "model", chat_template=template)
    assert re.search(line, refused_alike(tmp_path, *recipe(tmp_path, broken)))


def test_a_chat_template_that_takes_parts_only_gets_parts(tmp_path: Path) -> None:
    parts = save_model(tmp_path / "model", chat_template=PARTS_ONLY)
    words = recipe(tmp_path, parts)
    result = CliRunner().invoke(app, ["check", *words, "--show-prompts"])
    assert result.exit_code == 0, result.output
    assert "[user]What is" in result.output.replace("<s>", "")


def test_a_padding_token_outside_the_embedding_trains(tmp_path: Path) -> None:
    tokens = len(byte_level())
    folder = save_model(tmp_path / "model", vocab_size=tokens)
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == tokens
    tokenizer.save_pretrained(folder)
    words = [*recipe(tmp_path, folder), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["train", *words])
    assert result.exit_code == 0, result.output


def test_prompts_with_tokens_that_the_model_does_not_embed(tmp_path: Path) -> None:
    small = save_model(tmp_path / "model", vocab_size=60)
    assert "the model embeds 60 tokens" in refused_alike(tmp_path, *recipe(tmp_path, small))


def test_check_names_what_looks_wrong_and_shows_the_prompts(tmp_path: Path, model: Path) -> None:
    rows = [row | {"reference": "one step " * 9 + row["answer"]} for row in ROWS]
    words = recipe(tmp_path, model)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["check", *words, "--show-prompts"])
    assert "note: sampling.max_tokens = 8 is less than the references have" in result.output
    assert "the student is shown" in result.output and "What is" in result.output
