"""Loading: damaged, incomplete and hostile checkpoints are refused with words; memory and progress add up."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.backend import Backend
from xllm.errors import ConfigError, ModelError
from xllm.hub import resolve_model_path
from xllm.models.causal_lm import CausalLM
from xllm.models.loader import load_model
from xllm.models.weights import WeightSource

from .harness import PagedRunner, weight_bytes

MakeCheckpoint = Callable[[str], Path]
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def load(backend: Backend) -> Callable[..., CausalLM]:
    return lambda folder, **options: load_model(folder, backend=backend, dtype=torch.float32, **options)


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(("edit", "message"), [
    (lambda t: t.pop(O_PROJ), rf"tensor '{O_PROJ}' is missing in .*model\.safetensors"),
    (lambda t: t.update({O_PROJ: torch.zeros(64, 63)}),
     rf"model\.safetensors: tensor '{O_PROJ}' has shape \[64, 63\], the config asks for \[64, 64\]"),
    (lambda t: t.update({O_PROJ: torch.zeros(64, 64, dtype=torch.int8)}), rf"'{O_PROJ}' is of type I8; only F32"),
    (lambda t: t.update({"model.layers.3.extra": torch.zeros(2)}), r"'model\.layers\.3\.extra' is not part of"),
    (lambda t: t.update(extra=torch.zeros(2), more=torch.zeros(3)), "'extra' and 1 more is not part of"),
], ids=["missing", "mis-shaped", "integers", "unexpected", "two-unexpected"])
def test_wrong_tensors(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM], edit: Callable[..., Any],
                       message: str) -> None:
    folder = make_checkpoint("llama-gqa")
    edit_tensors(folder, edit)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_harmless_leftovers(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM],
                            caplog: pytest.LogCaptureFixture) -> None:
    """An old rope buffer, and the lm_head that some tied checkpoints store a second time."""
    folder = make_checkpoint("llama-tied")
    edit_tensors(folder, lambda t: t.update({
        "lm_head.weight": t["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load(folder)
    assert "lm_head" not in caplog.text


def test_untied_checkpoint_without_lm_head(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM]) -> None:
    folder = make_checkpoint("llama-gqa")
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"tensor 'lm_head\.weight' is missing"):
        load(folder)


HUGE_HEADER = struct.pack("<Q", 2**40)
BEYOND_THE_FILE = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1],
    lambda data: data[:len(data) // 2],
    lambda data: data[:5],
    lambda data: b"",
    lambda data: HUGE_HEADER + data[8:],
    lambda data: data[:8] + b"?" * 40 + data[48:],
    lambda data: struct.pack("<Q", len(BEYOND_THE_FILE)) + BEYOND_THE_FILE,
], ids=["last-byte", "half", "five-bytes", "empty", "header-length", "header", "offsets-beyond-the-file"])
def test_damaged_file(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM],
                      damage: Callable[[bytes], bytes]) -> None:
    folder = make_checkpoint("llama-gqa")
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or corrupt"):
        load(folder)


def swap_first_with_last(weight_map: dict[str, str]) -> None:
    first, last = min(weight_map, key=weight_map.__getitem__), max(weight_map, key=weight_map.__getitem__)
    weight_map[first], weight_map[last] = weight_map[last], weight_map[first]


@pytest.mark.parametrize(("edit", "message"), [
    (swap_first_with_last, r"model-000\d\d-of-000\d\d\.safetensors lacks tensor '.*', which .*index\.json places"),
    (lambda m: m.update({O_PROJ: "absent.safetensors"}), r"index\.json names absent\.safetensors, which does not"),
    (lambda m: m.update({O_PROJ: "../model.safetensors"}), rf"'{O_PROJ}' is placed in '\.\./model\.safetensors'"),
    (lambda m: m.update({O_PROJ: "/etc/passwd"}), "is not a plain file name"),
    (lambda m: m.update({O_PROJ: ".."}), r"index\.json names \.\., which does not exist"),
    (lambda m: m.update({O_PROJ: "..\\x.safetensors"}), "is not a plain file name"),
    (lambda m: m.update({O_PROJ: 3}), "is not a plain file name"),
    (lambda m: m.clear(), "'weight_map' is missing or empty"),
], ids=["flipped", "absent-file", "traversal", "absolute", "parent", "backslash", "number", "empty"])
def test_wrong_index(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM], edit: Callable[..., Any],
                     message: str) -> None:
    folder = make_checkpoint("llama-sharded")
    edit_index(folder, edit)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_shard_with_a_tensor_that_the_index_does_not_name(make_checkpoint: MakeCheckpoint,
                                                          load: Callable[..., CausalLM]) -> None:
    """As in transformers, the files decide: a tensor left out of the index is found all the same."""
    folder = make_checkpoint("llama-sharded")
    assert len(list(folder.glob("*.safetensors"))) > 2
    edit_index(folder, lambda m: m.pop(O_PROJ))
    load(folder)


@pytest.mark.parametrize(("name", "message"), [
    ("pytorch_model.bin", r"only as pytorch_model\.bin, a pickle"), (None, r"neither model\.safetensors nor"),
], ids=["pickle", "nothing"])
def test_no_safetensors(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM], name: str | None,
                        message: str) -> None:
    folder = make_checkpoint("llama-gqa")
    weights = folder / "model.safetensors"
    if name is None:
        weights.unlink()
    else:
        weights.rename(folder / name)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_code_in_the_folder_is_never_run(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM],
                                         tmp_path: Path) -> None:
    folder, trace = make_checkpoint("llama-gqa"), tmp_path / "executed"
    for module in ("modeling_evil", "configuration_evil", "config", "__init__"):
        (folder / f"{module}.py").write_text(f"open({str(trace)!r}, 'w').close()")
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), "trust_remote_code": True, "auto_map": {
        "AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}}
    file.write_text(json.dumps(config))
    load(folder)
    assert not trace.exists()


def test_progress_counts_the_bytes_of_the_files(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM]) -> None:
    folder = make_checkpoint("llama-fp16-on-disk-sharded")
    calls: list[tuple[int, int]] = []
    load(folder, progress=lambda done, total: calls.append((done, total)))
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    total = sum(tensor.nbytes for tensor in tensors)
    assert len(calls) == len(tensors)
    assert {call[1] for call in calls} == {total}
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1] == (total, total)


def test_taken_tensors_do_not_depend_on_the_file(make_checkpoint: MakeCheckpoint) -> None:
    """A checkpoint may be replaced while a model made from it is running."""
    folder = make_checkpoint("llama-gqa")
    with WeightSource(folder, dtype=torch.float32, device=torch.device("cpu")) as weights:
        norm_D = weights.take("model.norm.weight", (64,))
        with pytest.raises(ModelError, match=r"'model\.norm\.weight' is missing"):
            weights.take("model.norm.weight", (64,))
    before = norm_D.clone()
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert torch.equal(norm_D, before)


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied"])
def test_a_model_holds_its_weights_once(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM],
                                   variant: str) -> None:
    """Weights, the packed second copy of a tied table, and the rotary table of 10 positions x 16 floats."""
    folder = make_checkpoint(variant)
    tensors = load_file(folder / "model.safetensors")
    expected = sum(tensor.nbytes for tensor in tensors.values()) + 10 * 16 * 4
    if variant == "llama-tied":
        expected += tensors["model.embed_tokens.weight"].nbytes
    assert expected <= weight_bytes(load(folder, max_model_len=10)) <= 1.5 * expected


@pytest.mark.parametrize("max_model_len", [0, 257])
def test_max_model_len_out_of_range(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM],
                                    max_model_len: int) -> None:
    with pytest.raises(ConfigError, match=rf"max_model_len {max_model_len} is outside .*1 to 256"):
        load(make_checkpoint("llama-gqa"), max_model_len=max_model_len)


def test_unknown_quantization(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM]) -> None:
    with pytest.raises(ConfigError, match="quantization 'int3'"):
        load(make_checkpoint("llama-gqa"), quantization="int3")


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.05), ("fp8", 0.2), ("w8a8", 0.1)])
def test_quantised_is_close_and_smaller(make_checkpoint: MakeCheckpoint, load: Callable[..., CausalLM],
                                        backend: Backend, quantization: str, most: float) -> None:
    folder = make_checkpoint("llama-gqa")
    plain, quantised = load(folder, max_model_len=64), load(folder, max_model_len=64, quantization=quantization)
    prompt = list(range(3, 40))
    expected, found = (PagedRunner(model, backend).step({"a": prompt})["a"] for model in (plain, quantised))
    error = float((found - expected).norm() / expected.norm())
    assert most / 50 < error < most
    assert weight_bytes(quantised) < 0.6 * weight_bytes(plain)


def test_compute_dtype_is_the_one_asked_for(make_checkpoint: MakeCheckpoint, backend: Backend) -> None:
    with WeightSource(make_checkpoint("llama-gqa"), dtype=torch.bfloat16, device=torch.device("cpu")) as weights:
        assert weights.take("model.norm.weight", (64,)).dtype == torch.bfloat16


def test_resolve_local_folder_and_bundled(tmp_path: Path) -> None:
    assert resolve_model_path(str(tmp_path)) == tmp_path
    assert resolve_model_path(None).parts[-2:] == ("xllm", "bundled")


@pytest.mark.parametrize("model", ["/no/such/folder", "./no-such-folder", "a/b/c"])
def test_missing_folder(model: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model_path(model)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; a model is a folder"):
        resolve_model_path(str(file))


@pytest.mark.parametrize("model", ["nobody/no-such-model-here", "bad--id..", "-x"])
def test_hub_id_that_cannot_be_had(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"model '{model}'"):
        resolve_model_path(model)
