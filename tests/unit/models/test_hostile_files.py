"""Files that come from others run no code: checkpoints, models and templates."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from selfteach.config.recipe import Recipe
from selfteach.errors import CheckpointError, EngineError, RecipeError
from selfteach.models import fsdp
from selfteach.models.loading import load_model
from selfteach.models.model_path import resolve
from selfteach.prompts.template_set import Templates


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tensors = {"weights.a": torch.arange(6.0).reshape(2, 3), "weights.b": torch.ones(2).bfloat16()}
    folder = tmp_path / "shards"
    state_dict_saver.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder


def test_shards_are_read_as_they_were_written(shards: Path) -> None:
    assert fsdp.names(shards) == {"weights.a", "weights.b"}
    read = {"weights.a": torch.zeros(2, 3), "weights.b": torch.zeros(2).bfloat16()}
    fsdp.load(shards, read)
    assert torch.equal(read["weights.a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(read["weights.b"], torch.ones(2).bfloat16())


def test_metadata_of_a_checkpoint_run_no_code(shards: Path, tmp_path: Path) -> None:
    (shards / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for read in (lambda: fsdp.names(shards), lambda: fsdp.load(shards, {"a": torch.zeros(1)})):
        with pytest.raises(CheckpointError, match="no checkpoint needs") as error:
            read()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_other_values_than_tensors_is_refused(shards: Path) -> None:
    """torch unpickles such values freely."""
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    metadata.state_dict_metadata["weights.a"] = BytesStorageMetadata()
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError):
        fsdp.names(shards)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(resolve("lab:two_styles"), tmp_path / "model")


def config_of(model: Path) -> Recipe:
    return Recipe.model_validate({"model": {"path": str(model)}, "train": {"steps": 0}})


@pytest.mark.parametrize("file", ["pytorch_model.bin", "../other/model.safetensors", "weights.pt"])
def test_an_index_that_names_a_pickle_is_refused(model: Path, tmp_path: Path, file: str) -> None:
    from safetensors.torch import load_file

    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    torch.save({"bomb": Bomb(tmp_path / "ran")}, model / Path(file).name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match="no safetensors file") as error:
        load_model(config_of(model).model, torch.device("cpu"))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_weights_in_a_pickle_are_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(EngineError):
        load_model(config_of(model).model, torch.device("cpu"))


HOSTILE = {
    "code": "{{ question.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ fence.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "attr filter": "{{ question | attr('__class__') | attr('__mro__') }}",
    "format": "{{ '{0.__class__}'.format(question) }}",
    "memory": "{{ 'a' * 10000000000 }}",
    "power": "{{ 9 ** 999999999 }}",
    "range": "{% for i in range(100000000) %}{% endfor %}",
    "zero": "{{ 1 / 0 }}",
    "type": "{{ question + 1 }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_runs_in_a_sandbox(tmp_path: Path, kind: str) -> None:
    (tmp_path / "solver.jinja").write_text(HOSTILE[kind])
    templates = Templates(f"{tmp_path}/")
    with pytest.raises(RecipeError, match=r"template solver\.jinja") as error:
        templates.render("solver", question="q")
    assert "\n" not in str(error.value)
