"""Exported models load and score in lm-eval and Inspect, as whole models and as adapters.

Skipped where a tool is not installed: pip install lm-eval inspect-ai.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from exported_models import export_each, logp, write_base
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export_each(base, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("kind", ["all", "merged"])
def test_generation_ends_where_rollouts_did(exported: dict[str, Path], kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported[kind])
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    model = AutoModelForCausalLM.from_pretrained(exported[kind])
    assert set(model.generation_config.eos_token_id) == ends and len(ends) == 2
    config = json.loads((exported[kind] / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & config.keys()


TASK = """
task: TASK
dataset_path: json
dataset_kwargs: { data_files: { test: FILE } }
test_split: test
doc_to_text: "{{question}}"
"""


@pytest.mark.parametrize("kind", ["all", "merged", "adapter"])
def test_lm_eval_scores_it(
    exported: dict[str, Path], base: Path, kind: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps({"question": f"{n} + {n}?", "answer": n % 2}) for n in range(3)]
    file.write_text("\n".join(rows) + "\n")
    head = TASK.replace("FILE", str(file))
    (tmp_path / "choice.yaml").write_text(
        head.replace("TASK", "choice")
        + 'output_type: multiple_choice\ndoc_to_choice: ["0", "2"]\ndoc_to_target: "{{answer}}"\n'
    )
    (tmp_path / "written.yaml").write_text(
        head.replace("TASK", "written")
        + 'output_type: generate_until\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: { until: [], max_gen_toks: 4, do_sample: false }\n"
        "metric_list: [{ metric: exact_match, aggregation: mean, higher_is_better: true }]\n"
    )
    folder = exported[kind]
    args = {"pretrained": str(folder), "dtype": "float32"}
    if kind == "adapter":
        args = {**args, "pretrained": str(base), "peft": str(folder), "tokenizer": str(folder)}
    result = lm_eval.simple_evaluate(
        model="hf", model_args=args, tasks=["choice", "written"], device="cpu", batch_size=2,
        task_manager=TaskManager(include_path=str(tmp_path)), log_samples=True,
        bootstrap_iters=0,
    )  # fmt: skip
    assert {"acc,none", "exact_match,none"} <= {
        key for of_task in result["results"].values() for key in of_task
    }
    sample = result["samples"]["choice"][0]
    ((theirs, _), *_) = sample["filtered_resps"]
    ours = logp(folder, base, "0 + 0?", " 0")
    assert theirs == pytest.approx(ours, abs=1e-3)
    assert len(result["samples"]["written"]) == 3


@pytest.mark.parametrize("kind", ["all", "merged", "adapter"])
def test_inspect_scores_it(exported: dict[str, Path], kind: str, tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    model = get_model(
        "hf/local", model_path=str(exported[kind]), device="cpu", do_sample=False,
        config=GenerateConfig(max_tokens=4, max_connections=2),
    )  # fmt: skip
    task = inspect_ai.Task(
        dataset=[Sample(input=f"{n} + {n}?", target=str(2 * n)) for n in range(2)],
        solver=generate(), scorer=match(),
    )  # fmt: skip
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none")
    assert log.status == "success", log.error
    assert log.samples is not None and len(log.samples) == 2
    assert log.results is not None and log.results.scores[0].metrics["accuracy"].value >= 0
    gc.collect()  # Inspect leaves streams open: their warnings are ignored here, not after the tests
