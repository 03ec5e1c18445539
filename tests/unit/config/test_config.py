"""Recipes: each error is one line that names the nearest valid choice; layers merge in order."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from selfteach.config.critic_section import LocalCriticConfig
from selfteach.config.objective_section import GrpoConfig
from selfteach.config.recipe import CONTEXTS, CRITIC_CONTEXTS, Recipe
from selfteach.config.recipe_file import load_study, pairs, study_from
from selfteach.config.schema import merge, parse_setting, validate
from selfteach.errors import RecipeError

ALIGNED = 'critic = { type = "oracle" }\ncontext = { type = "step_aligned" }\n'
TWO_ARMS = (
    '[arms.grpo]\nobjective = { type = "grpo" }\n'
    '[arms.aligned]\ncritic = { type = "oracle" }\ncontext = { type = "step_aligned" }\n'
)


def error_of(toml: str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        study_from(tomllib.loads(toml), settings)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("recipe: ")
    return message


GRPO = "[objective]\ntype = 'grpo'\n"
SAMPLED = "[context]\ntype = 'reference'\n[objective]\nsupport = 'sampled'\n"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        # An unknown key, at every depth, and the nearest right one.
        ("sed = 1", "unknown key 'sed'; did you mean 'seed'?"),
        ("[optimizer]\nlrr = 1", "unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("[train]\nstep = 1", "did you mean 'steps'?"),
        ("[model.lora]\nrnk = 1", "did you mean 'rank'?"),
        ("[objective]\ntype = 'grpo'\nclip_hi = 1", "did you mean 'clip_high'?"),
        ("[objective]\ntype = 'distillation'\ndivergense = 'jsd'", "did you mean 'divergence'?"),
        ("[teacher]\ntype = 'ema'\nrat = 0.1", "did you mean 'rate'?"),
        ("[data]\ntype = 'lab'\nmax_solve_ratee = 0.1", "did you mean 'max_solve_rate'?"),
        ("[critic]\ntype = 'oracle'\nerror = 0.1", "did you mean 'error_rate'?"),
        (
            "[sampling]\nbeams = 4",
            "known: top_p, top_k, min_p, temperature, max_tokens, batch_size",
        ),
        # A wrong value: the key, what is allowed, the value.
        ("[optimizer]\nlr = -1", "optimizer.lr: input should be greater than 0, found -1"),
        ("[optimizer]\nlr = 'fast'", "optimizer.lr: "),
        ("[train]\nsteps = 1.5", "train.steps: "),
        ("[context]\ntype = 'aligned'", "'step_aligned'"),
        ("[objective]\ntype = 'ppo'", "'grpo'"),
        ("[teacher]\ntype = 'frozen'", "'initial'"),
        ("[data]\ntype = 'math'", "'files'"),
        ("[sampling]\ntemperature = 0", "sampling.temperature: "),
        ("[evaluation]\ntemperature = -1", "evaluation.temperature: "),
        ("[sampling]\ntop_p = 0", "sampling.top_p: "),
        ("[optimizer]\ndecay = 'cos'", "'cosine'"),
        # Combinations that make no sense.
        (
            "[evaluation]\ntemperature = 0",
            "set evaluation.validation_k = 1 and evaluation.test_k = 1",
        ),
        (GRPO + "loss_type = 'dr_grpo'\naggregation = 'token_mean'", "remove one of them"),
        (GRPO + "surrogate = 'cispo'\nclip_delta = 4.0", "cispo has clip_high alone"),
        (GRPO + "clip_high = 0.5\nclip_delta = 1.5", "must be above 1 + clip_high = 1.5"),
        (GRPO + "[sampling]\ntop_k = 20", "sampling.top_k = 20 cuts the distribution"),
        (SAMPLED + "[sampling]\ntop_p = 0.9\nmin_p = 0.1", "top_p = 0.9, min_p = 0.1 cuts"),
        (
            "[context]\ntype = 'reference'\n[objective]\nimportance_cap = 2.0\n[sampling]\nmin_p = 0.1",
            "importance_cap compares whole distributions",
        ),
        (
            "[context]\ntype = 'reference'\n[evaluation]\ntop_p = 0.9\nmin_p = 0.1\n"
            "[engine]\ntype = 'vllm'",
            "evaluation.top_p and evaluation.min_p together keep other tokens in vLLM",
        ),
        (
            "[context]\ntype = 'reference'\n[engine]\ntype = 'vllm'\nbatch_invariant = true",
            "by ones without gradients",
        ),
        (
            "[context]\ntype = 'reference'\n[sampling]\ntop_p = 0.9\n[engine]\ntype = 'vllm'\n"
            "[train]\ndeterministic = true",
            "train.deterministic with sampling.top_p",
        ),
        ("[context]\ntype = 'reference'\n[sampling]\ndynamic_rounds = 2", "needs objective.type"),
        (GRPO + "[sampling]\ndynamic_rounds = 2\n[train]\nstaleness = 1", "train.staleness = 0"),
        (GRPO + "[sampling]\ndynamic_rounds = 2\n[critic]\ntype = 'oracle'", "critic = false"),
        ("[context]\ntype = 'step_aligned'", 'needs a critic: add [critic] type = "oracle"'),
        ("[train]\nsteps = 1", "distillation without a context has nothing to teach"),
        ("[context]\ntype = 'reference'\n[objective]\ntype = 'grpo'", "grpo uses no context"),
        ("[objective]\ntype = 'grpo'\n[train]\ngroup_size = 1", "at least 2"),
        (
            "[context]\ntype = 'reference'\n[objective]\ntype = 'distillation'\n"
            "from_first_error = true",
            "from_first_error needs a critic",
        ),
        (
            "[context]\ntype = 'reference'\n[objective]\nchanged_steps_fraction = 0.25",
            "changed_steps_fraction needs a critic",
        ),
        (
            "[context]\ntype = 'peer'\n[train]\ngroup_size = 1",
            '"peer" needs a train.group_size of at least 2',
        ),
        ("[context]\ntype = 'peer'\nfallback = 'peer'", "fallback must differ"),
        ("[context]\ntype = 'peer'\nfallback = 'none'", "fallback must differ"),
        ("[context]\ntype = 'peer'\nfallback = 'holistic'", "needs a critic"),
        ("[objective]\ntype = 'hybrid'", "distillation without a context has nothing to teach"),
        (
            "[context]\ntype = 'reference'\n[objective]\ntype = 'hybrid'\n[train]\ngroup_size = 1",
            "grpo needs a train.group_size of at least 2",
        ),
        ("[objective]\ntype = 'hybrid'\nweight = 1.5", "a mixture needs 0 to 1"),
        ("[objective]\ntype = 'hybrid'\nweight = { start = 1, end = 0, step = 9 }", "'steps'?"),
        ("[objective]\ntype = 'hybrid'\ngrpo = { kl_coef = 0.1 }", "kl_coef must be 0"),
        ("[objective]\ntype = 'hybrid'\ndistillation = { betta = 1 }", "did you mean 'beta'?"),
    ],
)
def test_an_error_of_a_recipe_is_one_line(toml: str, message: str) -> None:
    assert message in error_of(toml)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[study]\nseed = [1]\n", "did you mean 'seeds'?"),
        ("[study]\nheadline = ['aligned-grop']\n", "did you mean 'aligned-grpo'?"),
        ("[study]\nheadline = ['grpo-aligned']\n", "study.headline: 'grpo-aligned'"),
        ("[sweep]\nlr = [1e-3]\nseeds = [0]\n", "sweep.seeds and study.seeds share [0]"),
        ("[sweep]\nlr = []\nseeds = [9]\n", "sweep.lr: "),
        ("[sweep]\nlr = [1e-3]\nseeds = [9]\nvariants = ['esy']\n", "sweep.variants: 'esy'"),
        ("[variants.x]\ntitle = 'x'\nseeds = [0]\narms = ['grop']\n", "did you mean 'grpo'?"),
        ("[variants.x]\ntitle = 'x'\nseeds = [0]\nset = { train = { step = 1 } }\n", "'steps'?"),
        ("[arms.bad]\ncontxt = { type = 'reference' }\n", "did you mean 'context'?"),
    ],
)
def test_an_error_of_a_study_is_one_line(toml: str, message: str) -> None:
    assert message in error_of(TWO_ARMS + toml)


def test_several_errors_are_counted() -> None:
    assert "(and 1 more)" in error_of("[optimizer]\nlr = -1\neps = -1\n")


def test_an_empty_table_of_arms() -> None:
    assert "[arms] is empty" in error_of(ALIGNED + "[arms]\n")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("a = = 1")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path, message in [
        (tmp_path / "nowhere.toml", "no such recipe"),
        (tmp_path, "is a folder; name the recipe file"),
        (tmp_path / "broken.toml", "not valid TOML"),
        (tmp_path / "binary.toml", "not valid TOML"),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_study(path)


def test_a_file_without_arms_is_a_study_of_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(ALIGNED + "seed = 3\n")
    study = load_study(path)
    assert list(study.arms) == ["mine"]
    assert study.recipe("mine").seed == 3 and study.recipe("mine", seed=5).seed == 5
    with pytest.raises(RecipeError, match="no arm 'mind'; did you mean 'mine'"):
        study.recipe("mind")


def test_layers_apply_from_common_to_overrides() -> None:
    study = study_from(
        tomllib.loads(
            "[optimizer]\nlr = 1e-1\nwarmup_steps = 1\n" + TWO_ARMS + "optimizer = { lr = 3e-1 }\n"
            "[variants.v]\ntitle = 'v'\nseeds = [0]\n"
            "set = { optimizer = { lr = 2e-1, eps = 1e-3 } }\n"
            "arm_overrides = { aligned = { optimizer = { lr = 4e-1 } } }\n"
        )
    )

    def lr(arm: str, **more: object) -> float:
        return study.recipe(arm, **more).optimizer.lr  # type: ignore[arg-type]

    assert lr("grpo") == 0.1
    assert lr("aligned") == 0.3, "the arm over the common sections"
    assert lr("grpo", variant="v") == 0.2, "the variant over the common sections"
    assert lr("aligned", variant="v") == 0.4, "the variant's choice for the arm over the arm"
    assert lr("aligned", variant="v", overrides={"optimizer": {"lr": 0.5}}) == 0.5
    other = study.recipe("aligned", variant="v").optimizer
    assert (other.warmup_steps, other.eps) == (1, 1e-3), "what no layer names stays"


def test_the_base_row_has_the_arms_model_and_evaluation_and_trains_nothing() -> None:
    toml = TWO_ARMS.replace("[arms.aligned]", "model = { path = 'lab:easy' }\n[arms.aligned]")
    base = study_from(tomllib.loads("[evaluation]\ntest_k = 7\n" + toml)).base_recipe(seed=4)
    assert (base.train.steps, base.context.type, base.critic) == (0, "none", None)
    assert (base.model.path, base.evaluation.test_k, base.seed) == ("lab:easy", 7, 4)


def test_merge_replaces_a_table_of_another_type() -> None:
    low = {"objective": {"type": "distillation", "beta": 0.3}, "seed": 1}
    assert merge(low, {"objective": {"type": "grpo"}}) == {"objective": {"type": "grpo"}, "seed": 1}
    same = merge(low, {"objective": {"type": "distillation", "top_k": 3}})
    assert same["objective"] == {"type": "distillation", "beta": 0.3, "top_k": 3}
    without = merge(low, {"objective": {"beta": 0.7}})
    assert without["objective"] == {"type": "distillation", "beta": 0.7}
    assert low == {"objective": {"type": "distillation", "beta": 0.3}, "seed": 1}, "not changed"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed=3", {"seed": 3}),
        ("optimizer.lr=5e-4", {"optimizer": {"lr": 5e-4}}),
        ("model.path=lab:easy", {"model": {"path": "lab:easy"}}),
        ("model.path='lab:easy'", {"model": {"path": "lab:easy"}}),
        ("a.b = [1, 2]", {"a": {"b": [1, 2]}}),
        ("a={type = 'x', b = 2}", {"a": {"type": "x", "b": 2}}),
        ("a=b=c", {"a": "b=c"}),
        ("evaluation.test=false", {"evaluation": {"test": False}}),
    ],
)
def test_settings_are_toml_or_plain_text(setting: str, value: object) -> None:
    assert parse_setting(setting) == value


@pytest.mark.parametrize("setting", ["seed", "=3", " =3", ""])
def test_a_setting_without_key_or_value(setting: str) -> None:
    with pytest.raises(RecipeError, match="write key=value"):
        parse_setting(setting)


def test_a_setting_does_not_bring_back_a_section_that_an_arm_removes() -> None:
    toml = """
    critic = { type = "local", path = "a/model" }
    [arms.grpo]
    critic = false
    objective = { type = "grpo" }
    [arms.step_aligned]
    context = { type = "step_aligned" }
    """
    study = study_from(tomllib.loads(toml), ["critic.path=another/model"])
    assert study.recipe("grpo").critic is None
    critic = study.recipe("step_aligned").critic
    assert isinstance(critic, LocalCriticConfig) and critic.path == "another/model"


def test_a_setting_overrides_every_arm() -> None:
    toml = "[optimizer]\nlr = 1e-1\n" + TWO_ARMS + "optimizer = { lr = 3e-1 }\n"
    study = study_from(tomllib.loads(toml), ["optimizer.lr=0.7"])
    assert [study.recipe(arm).optimizer.lr for arm in study.arms] == [0.7, 0.7]
    one = study_from(tomllib.loads(toml), ["arms.grpo.optimizer.lr=0.9", "study.seeds=[4]"])
    assert [one.recipe(arm).optimizer.lr for arm in one.arms] == [0.9, 0.3]
    assert one.study.seeds == (4,)


def test_an_error_of_a_setting_is_that_of_a_file() -> None:
    assert "did you mean 'lr'?" in error_of(TWO_ARMS, "optimizer.lrr=1")
    assert "did you mean 'seeds'?" in error_of(TWO_ARMS, "study.seed=[1]")


def test_pairs_are_later_minus_earlier_and_each_minus_base() -> None:
    assert pairs(["a", "b", "c"]) == ["b-a", "c-a", "c-b", "a-base", "b-base", "c-base"]


def test_critic_contexts_and_no_others_need_a_critic() -> None:
    without = {
        *("none", "reference", "aligned_reference", "other_reference", "peer", "environment")
    }
    assert set(CONTEXTS) - CRITIC_CONTEXTS == without
    for name in CONTEXTS:
        values = {"context": {"type": name}, "train": {"steps": 0}}
        if name in CRITIC_CONTEXTS:
            with pytest.raises(RecipeError, match="needs a critic"):
                validate(Recipe, values, where="test")
        else:
            validate(Recipe, values, where="test")


def test_a_resolved_recipe_reads_back_from_json() -> None:
    study = study_from(tomllib.loads(TWO_ARMS))
    for arm in study.arms:
        recipe = study.recipe(arm, seed=2)
        again = Recipe.model_validate(json.loads(recipe.model_dump_json()))
        assert again == recipe


def test_a_recipe_is_immutable() -> None:
    recipe = study_from(tomllib.loads(TWO_ARMS)).recipe("grpo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("selfteach.config.recipe", ("torch", "transformers", "numpy")),
        # What the process of a study imports before it starts those of its runs.
        (
            "selfteach.cli, selfteach.commands.progress, selfteach.commands.study.run_study",
            ("torch", "transformers"),
        ),
        # `selfteach --help` also works without the extra "plan".
        ("selfteach.cli", ("torch", "simpy")),
    ],
)
def test_reading_a_recipe_imports_no_torch(modules: str, heavy: tuple[str, ...]) -> None:
    code = (
        f"import sys, {modules}\n"
        f"heavy = {{*{heavy}}} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_creating_a_study_imports_no_torch(tmp_path: Path) -> None:
    """The process of a study imports nothing that only those of its runs need."""
    code = (
        "import sys, tomllib, pathlib\n"
        "from selfteach.config.recipe_file import study_from\n"
        "from selfteach.commands.study.run_study import create_study, jobs_of\n"
        f"study, folder = study_from(tomllib.loads({TWO_ARMS!r})), pathlib.Path({str(tmp_path)!r})\n"
        "create_study(study, folder, 'x', 'study'), jobs_of(study, folder)\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and (tmp_path / "study.json").exists(), result.stderr


def test_an_error_names_the_file_the_arm_and_the_key() -> None:
    with pytest.raises(RecipeError) as caught:
        study_from(tomllib.loads(TWO_ARMS), ["arms.grpo.objective.clip_hi=1"], where="my.toml")
    assert str(caught.value) == (
        "my.toml: arm 'grpo': unknown key 'objective.clip_hi'; did you mean 'clip_high'?"
    )


@pytest.mark.parametrize("name", ["a-b", "base", "a b", "../x"])
def test_names_of_arms_can_be_folders_and_parts_of_differences(name: str) -> None:
    assert "a name is letters" in error_of(f'[arms."{name}"]\n{ALIGNED}')


def test_an_override_can_remove_adapters() -> None:
    study = study_from(
        tomllib.loads(
            f"model = {{ lora = {{ rank = 2 }} }}\n{ALIGNED}[variants.full]\ntitle = 'full weights'\n"
            "seeds = [0]\nset = { model = { lora = false } }"
        )
    )
    assert study.recipe("run").model.lora is not None
    assert study.recipe("run", variant="full").model.lora is None


def test_an_override_can_turn_autocast_off() -> None:
    study = study_from(
        tomllib.loads(
            f"model = {{ autocast = 'auto' }}\n{ALIGNED}[variants.exact]\ntitle = 'float32'\n"
            "seeds = [0]\nset = { model = { autocast = false } }"
        )
    )
    assert study.recipe("run").model.autocast == "auto"
    assert study.recipe("run", variant="exact").model.autocast is None
    assert "model.autocast" in error_of(f"model = {{ autocast = 'half' }}\n{ALIGNED}")


def test_a_recipe_extends_the_common_sections_of_another(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "one.toml").write_text(
        "[train]\nsteps = 7\nproblems_per_step = 3\n[critic]\ntype = 'oracle'\n"
        "[objective]\ntype = 'distillation'\nbeta = 0.3\n[study]\ntitle = 'base'\n"
        "[arms.a]\ncontext = { type = 'step_aligned' }\n"
    )
    (tmp_path / "two.toml").write_text(
        "extends = 'base/one.toml'\ncritic = false\ncontext = { type = 'reference' }\n"
        "[train]\nsteps = 9\n"
    )
    (tmp_path / "three.toml").write_text("extends = 'two.toml'\n[objective]\ntype = 'hybrid'\n")
    two, three = (load_study(tmp_path / f"{name}.toml") for name in ("two", "three"))
    assert list(two.arms) == ["two"] and two.study.title == "", "arms and study are not inherited"
    recipe = two.recipe("two")
    assert (recipe.train.steps, recipe.train.problems_per_step) == (9, 3)
    assert recipe.critic is None and recipe.objective.beta == 0.3
    assert three.recipe("three").objective.type == "hybrid"
    assert three.recipe("three").context.type == "reference"


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("'me.toml'", "leads back to itself"),
        ("'other.toml'", "leads back to itself"),
        ("'missing.toml'", "missing.toml: no such recipe"),
        ("3", "extends must name another recipe file, found 3"),
    ],
)
def test_an_error_of_extends_is_one_line(tmp_path: Path, extends: str, message: str) -> None:
    (tmp_path / "me.toml").write_text(f"extends = {extends}\n")
    (tmp_path / "other.toml").write_text("extends = 'me.toml'\n")
    with pytest.raises(RecipeError, match=message):
        load_study(tmp_path / "me.toml")


def test_the_base_row_of_a_study_with_token_masks_needs_no_critic() -> None:
    toml = ALIGNED + "[objective]\nfrom_first_error = true\nchanged_steps_fraction = 0.5\n"
    base = study_from(tomllib.loads(toml)).base_recipe(seed=0)
    assert base.critic is None and base.train.steps == 0


@pytest.mark.parametrize(
    ("loss_type", "surrogate", "aggregation"),
    [
        ("grpo", "clipped", "sequence_mean"),
        ("bnpo", "clipped", "token_mean"),
        ("dapo", "clipped", "token_mean"),
        ("dr_grpo", "clipped", "max_tokens"),
        ("cispo", "cispo", "token_mean"),
    ],
)
def test_a_loss_type_sets_surrogate_and_aggregation(
    loss_type: str, surrogate: str, aggregation: str
) -> None:
    recipe = Recipe.model_validate({"objective": {"type": "grpo", "loss_type": loss_type}})
    for reread in (recipe, Recipe.model_validate(recipe.model_dump(mode="json"))):
        assert isinstance(reread.objective, GrpoConfig)
        assert (reread.objective.surrogate, reread.objective.aggregation) == (
            surrogate,
            aggregation,
        )


def test_the_base_row_samples_for_no_objective_and_refuses_nothing() -> None:
    """Its objective is the default; what training would refuse has no meaning for it."""
    arms = "[sampling]\ndynamic_rounds = 2\n[arms.grpo]\nobjective = { type = 'grpo' }\n"
    study = study_from(tomllib.loads(arms))
    assert study.recipe("grpo", seed=0).sampling.dynamic_rounds == 2
    assert study.base_recipe(seed=0).train.steps == 0
