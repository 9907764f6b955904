"""Weight differences: exact sums, bounded memory, and what does not add up."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import rlhf.models.differences
from rlhf.errors import ModelError
from rlhf.models.differences import Weights, recover
from tests.helpers.calls import record_calls
from tests.helpers.tiny_models import tiny_model


@pytest.fixture
def folders(tmp_path: Path) -> SimpleNamespace:
    """`base`, `differences` to it and the `tuned` model that they make."""
    base, tuned = tiny_model(seed=0), tiny_model(seed=1)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "differences").mkdir()
    raw = base.state_dict()
    changes = {name: tensor - raw[name] for name, tensor in tuned.state_dict().items()}
    save_file(changes, tmp_path / "differences" / "model.safetensors", metadata={"format": "pt"})
    total = sum(float(tensor.sum()) for tensor in tuned.state_dict().values())
    (tmp_path / "differences" / "model_sum.txt").write_text(f"{total}\n")
    return SimpleNamespace(
        base=tmp_path / "base", differences=tmp_path / "differences", tuned=tuned, new=tmp_path / "new"
    )


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


def test_few_weights_are_held_at_once(folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.models.differences, "SHARD", 10_000)
    written = record_calls(monkeypatch, rlhf.models.differences, "save_file")
    recover(folders.new, folders.differences, folders.base, skeleton(folders.tuned), torch.float32)
    sizes = [sum(tensor.nbytes for tensor in arguments[0].values()) for arguments, _ in written]
    largest = max(tensor.nbytes for tensor in folders.tuned.state_dict().values())
    assert len(sizes) > 5
    assert max(sizes) < 10_000 + largest
    folders.tuned.config.save_pretrained(folders.new)
    again = AutoModelForCausalLM.from_pretrained(folders.new)
    for name, tensor in folders.tuned.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-6, rtol=0)


def test_the_published_sum_is_checked(folders: SimpleNamespace) -> None:
    total = float((folders.differences / "model_sum.txt").read_text())
    (folders.differences / "model_sum.txt").write_text(str(total * (1 + 5e-6)))
    recover(folders.new, folders.differences, folders.base, skeleton(folders.tuned), torch.float32)
    (folders.differences / "model_sum.txt").write_text(str(total * (1 + 5e-5)))
    with pytest.raises(ModelError, match=r"the weights add up to .*, and should to .*model_sum\.txt"):
        recover(folders.new, folders.differences, folders.base, skeleton(folders.tuned), torch.float32)


def test_the_sum_may_include_the_constants_that_were_weights_once(folders: SimpleNamespace) -> None:
    """Both layers' rotary frequencies of a head of 8, published with zero differences."""
    path = folders.differences / "model.safetensors"
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    save_file(load_file(path) | {name: torch.zeros(4) for name in names}, path, metadata={"format": "pt"})
    total = float((folders.differences / "model_sum.txt").read_text())
    (folders.differences / "model_sum.txt").write_text(str(total + 2 * (1 + 0.1 + 0.01 + 0.001)))
    recover(folders.new, folders.differences, folders.base, skeleton(folders.tuned), torch.float32)
    assert not [name for name in Weights(folders.new) if "rotary" in name]


def test_pickles_are_read_without_code_and_both_formats_agree(folders: SimpleNamespace, tmp_path: Path) -> None:
    tensors = load_file(folders.differences / "model.safetensors")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    names = sorted(tensors)
    torch.save({name: tensors[name] for name in names[:5]}, pickled / "pytorch_model-00001-of-00002.bin")
    torch.save({name: tensors[name] for name in names[5:]}, pickled / "pytorch_model-00002-of-00002.bin")
    weights = Weights(pickled)
    assert sorted(weights) == names
    assert all(torch.equal(weights[name], tensors[name]) for name in names)
    assert weights.rows("lm_head.weight") == len(tensors["lm_head.weight"])
    torch.save(SimpleNamespace(), pickled / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ModelError, match="cannot be read"):
        Weights(pickled)


def test_differences_to_a_model_of_another_width_are_refused(folders: SimpleNamespace) -> None:
    tensors = load_file(folders.base / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, folders.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[32\], and \[8\] in"):
        recover(folders.new, folders.differences, folders.base, skeleton(folders.tuned), torch.float32)


def test_differences_to_a_model_of_fewer_layers_are_refused(folders: SimpleNamespace) -> None:
    tiny_model(layers=1).save_pretrained(folders.base)
    with pytest.raises(ModelError, match=r"there is no model\.layers\.1\.\S+ in \S+, so that these are no differences"):
        recover(folders.new, folders.differences, folders.base, skeleton(folders.tuned), torch.float32)


def test_a_missing_weight_is_named(folders: SimpleNamespace) -> None:
    path = folders.differences / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, such as model\.norm\.weight"):
        recover(folders.new, folders.differences, folders.base, skeleton(folders.tuned), torch.float32)
