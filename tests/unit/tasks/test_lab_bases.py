"""Test the shipped base models: plain transformers loads them, they belong to their worlds, and their
cards say how they were made."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfteach.errors import DataError
from selfteach.models.model_path import BASES
from selfteach.prompts.template_set import Templates
from selfteach.tasks.lab import probe
from selfteach.tasks.lab.corpus import CONTEXT_SHARES, DIAL_SHARES
from selfteach.tasks.lab.pretrain import pretrain, save
from selfteach.tasks.lab.tokenizer import build_tokenizer
from selfteach.tasks.lab.world import ROOT, World, WorldConfig
from selfteach.tasks.lab.worlds import WORLDS, world_of

FOLDERS = sorted(path.parent for path in BASES.glob("*/model.safetensors"))


def facts(folder: Path) -> dict:
    return json.loads((folder / "world.json").read_text())


def test_every_base_belongs_to_a_named_world_and_the_main_ones_are_there() -> None:
    names = {folder.name for folder in FOLDERS}
    assert {"two_styles", "no_pull", "one_style", "easy"} <= names <= set(WORLDS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_base_loads_with_plain_transformers_and_writes_well_formed_answers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 500_000 < model.num_parameters() < 800_000
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    world = world_of(folder)
    for question in islice(world.questions("validation"), 4):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": " ".join(question)}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        ids = prompt["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id != ids[0, 1]
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids),
                do_sample=False, max_new_tokens=40,
            )  # fmt: skip
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        checked = probe.check(world, question, text)
        assert checked.answer is not None and len(checked.steps) == 5
        assert {step.error for step in checked.steps} <= {None, "value"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_world_beside_the_weights_is_the_named_one(folder: Path) -> None:
    world = world_of(folder)
    assert world.config == WORLDS[folder.name]
    assert world.table == World(WORLDS[folder.name]).table
    assert facts(folder)["context_shares"] == CONTEXT_SHARES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_says_what_the_base_is_and_what_was_measured(folder: Path) -> None:
    card, training = (folder / "README.md").read_text(), facts(folder)["training"]
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert (
        f"--world {folder.name} --steps {training['steps']} --seed {training['seed']} "
        f"--out src/selfteach/tasks/lab/bases/{folder.name}" in card
    )
    lines = [line.split("|") for line in card.splitlines()]
    rows = {cells[1].strip(): cells[2:-1] for cells in lines if len(cells) == 10}
    for kind in ("nothing", probe.RETRY, *probe.CONTEXTS):
        assert all(float(cell) >= 0 for cell in rows[kind]), kind
    assert float(rows["nothing"][0]) == 1000


def test_a_folder_without_a_world_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no world\.json"):
        world_of(tmp_path)
    (tmp_path / "world.json").write_text("{}")
    with pytest.raises(DataError, match=r"has no world\.json"):
        world_of(tmp_path)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> probe.ProbeResult:
    """Replace the measurement in `save`, which samples thousands of answers."""
    some = probe.AnswerShares(10, 0.2, 0.7, 0.1, 0.0, 0.3)
    result = probe.ProbeResult(0, 0.25, some, {kind: some for kind in probe.CONTEXTS})  # noqa: C420
    monkeypatch.setattr("selfteach.tasks.lab.pretrain.measure", lambda out: result)
    return result


def test_pretraining_is_reproducible_and_saves_model_tokenizer_and_card(
    tmp_path: Path, unmeasured: probe.ProbeResult
) -> None:
    world = World(replace(WORLDS["two_styles"], seed=7))
    for name in ("a", "b"):
        pretrain(world, tmp_path / name, steps=2, batch_size=2, seed=3)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b"))
    for name, param in a.named_parameters():
        assert torch.equal(param, b.get_parameter(name)), name
    assert world_of(tmp_path / "a").table == world.table
    assert facts(tmp_path / "a")["training"] == {"steps": 2, "batch_size": 2, "lr": 2e-3, "seed": 3}
    card = (tmp_path / "a" / "README.md").read_text()
    assert "--world two_styles --world-seed 7 --steps 2 --seed 3" in card


def test_the_card_of_a_dial_base_names_its_documents_and_measures_every_position(
    tmp_path: Path, unmeasured: probe.ProbeResult
) -> None:
    world = World(replace(WORLDS["two_styles"], pull=0.25))
    pretrain(world, tmp_path, steps=2, batch_size=2, shares=DIAL_SHARES)
    card = (tmp_path / "README.md").read_text()
    assert "--world two_styles --pull 0.25 --documents dial --steps 2" in card
    assert "| partly_aligned | 14 |" in card
    measured = probe.readable_contexts(tmp_path)
    assert [kind for kind in measured if kind.startswith("partly")] == [
        f"partly_aligned {steps}" for steps in range(6)
    ]
    assert {kind.split()[0] for kind in measured} == set(DIAL_SHARES) - {"none"}
    assert probe.readable_contexts(BASES / "two_styles") == list(probe.CONTEXTS)


def test_the_probe_shows_the_stated_number_of_the_critique_s_steps() -> None:
    world, rng = World(), np.random.default_rng(0)
    question = next(world.questions("validation"))
    text = "\n".join(map(str, world.solution(question, world.native_styles[0])))
    for steps in range(6):
        kind = f"partly_aligned {steps}"
        shown = probe.context(world, Templates("lab"), kind, question, question, text, rng)
        assert len([line for line in shown.splitlines() if " + " in line]) == steps


def test_an_unnamed_world_has_a_card_too(
    tmp_path: Path, unmeasured: probe.ProbeResult, tiny_llama, lab_tokenizer
) -> None:
    world = World(WorldConfig(weak_share=0.1))
    training = {"steps": 1, "batch_size": 1, "lr": 1.0, "seed": 0}
    save(tiny_llama, lab_tokenizer, world, tmp_path, training)
    assert "weak_share=0.1" in (tmp_path / "README.md").read_text()


def test_the_probe_counts_by_hand() -> None:
    world = World()
    question = next(world.questions("validation"))
    truth = world.truth(question)[ROOT]
    lines = [str(line) for line in world.solution(question, world.native_styles[0])]
    wrong = [lines[0][:-1] + ("a" if lines[0][-1] != "a" else "b"), *lines[1:]]
    texts = [
        "\n".join([*lines, f"# {truth}"]),  # right
        "\n".join([*wrong, f"# {truth}"]),  # right by luck, a value wrong
        "\n".join([lines[1], lines[1]]),  # bookkeeping
        "\n".join(lines),  # no answer line: form
        "nonsense",  # form
    ]
    checked = [probe.check(world, question, text) for text in texts]
    shares = probe.shares(world, [question] * 5, checked)
    assert shares == probe.AnswerShares(5, 0.4, 0.2, 0.2, 0.4, 0.0)


def test_the_null_control_shows_the_critique_for_another_question() -> None:
    assert probe._subjects("other_answer", [4, 7, 9]) == [7, 9, 4]
    assert probe._subjects("step_aligned", [4, 7, 9]) == [4, 7, 9]


def test_the_probe_asks_validation_questions_in_every_context() -> None:
    result = probe.measure(BASES / "two_styles", questions=12)
    assert result == probe.measure(BASES / "two_styles", questions=12), "it seeds its sampling"
    assert set(result.by_context) == {probe.RETRY, *CONTEXT_SHARES} - {"none"}
    missed = round(12 * (1 - result.without_context.correct))
    assert {shares.answers for shares in result.by_context.values()} == {missed}
    assert result.without_context.reference_lines < 0.2
    assert len(probe.table(result).splitlines()) == 2 + 1 + len(result.by_context)
