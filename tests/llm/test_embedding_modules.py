"""What a checkpoint's modules.json and 1_Pooling say of its embeddings: honoured, or refused with file and member.

The truth is computed by hand from transformers' hidden states, as sentence-transformers does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.runner.tiny_model import PROMPT, save_checkpoint
from xllm import LLM, PoolingParams
from xllm.errors import ModelError, RequestError
from xllm.hub import HUB_PATTERNS

IDS, WIDTH = PROMPT[:19], 64
POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda h_TD: h_TD[0], "lasttoken": lambda h_TD: h_TD[-1], "mean": lambda h_TD: h_TD.mean(0),
    "max": lambda h_TD: h_TD.max(0).values, "mean_sqrt_len_tokens": lambda h_TD: h_TD.sum(0) / len(h_TD)**0.5,
    "weightedmean": lambda h_TD: torch.arange(1.0, len(h_TD) + 1) @ h_TD / (len(h_TD) * (len(h_TD) + 1) / 2),
}
OLD = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
       "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken"}
OLD_TYPES, NEW_TYPES = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules.x."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("embedding") / "base")


@pytest.fixture(scope="module")
def hidden_TD(base: Path) -> torch.Tensor:
    with torch.inference_mode():
        model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
        return model(torch.tensor([IDS])).last_hidden_state[0].clone()


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    for file in base.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def write(folder: Path, *names: str, pooling: object = None, dense: object = None, types: str = OLD_TYPES) -> None:
    """modules.json of these modules, and their files."""
    listed = [{"idx": index, "name": str(index), "path": "" if name == "Transformer" else f"{index}_{name}",
               "type": types + name} for index, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(listed))
    for entry in listed[1:]:
        (folder / entry["path"]).mkdir(exist_ok=True)
        content = {"Pooling": pooling, "Dense": dense}.get(entry["path"].partition("_")[2])
        if content is not None:
            (folder / entry["path"] / "config.json").write_text(json.dumps(content))


def embed(folder: Path, params: PoolingParams | None = None, **settings: Any) -> torch.Tensor:
    with LLM(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64, num_threads=1,
             num_kv_blocks=32, **settings) as llm:
        return torch.tensor(llm.embed([{"prompt_token_ids": IDS}], params)[0].embedding)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("layout", ["old", "new", "list", "alone"])
@pytest.mark.parametrize("kind", POOLED)
def test_pooling_in_either_layout(folder: Path, hidden_TD: torch.Tensor, kind: str, layout: str) -> None:
    new = {"embedding_dimension": WIDTH, "pooling_mode": [kind] if layout == "list" else kind, "include_prompt": True}
    old = {"word_embedding_dimension": WIDTH, **{f"pooling_mode_{name}": key == kind for key, name in OLD.items()}}
    if layout == "alone":  # without modules.json vectors have length 1
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    else:
        write(folder, "Transformer", "Pooling", pooling=old if layout == "old" else new,
              types=OLD_TYPES if layout == "old" else NEW_TYPES)
    vector = POOLED[kind](hidden_TD)
    close(embed(folder), F.normalize(vector, dim=0) if layout == "alone" else vector)


def test_no_mode_at_all_is_the_mean(folder: Path, hidden_TD: torch.Tensor) -> None:
    write(folder, "Transformer", "Pooling", "Normalize", pooling={"pooling_mode_cls_token": False})
    close(embed(folder), F.normalize(hidden_TD.mean(0), dim=0))


@pytest.mark.parametrize("activation", ["Tanh", "Identity", "ReLU", "GELU", "Sigmoid", "SiLU", None])
def test_dense_layers(folder: Path, hidden_TD: torch.Tensor, activation: str | None) -> None:
    """Two of them, then length 1; the first with an activation, the default being Tanh."""
    generator = torch.Generator().manual_seed(2)
    first = {"linear.weight": torch.randn(24, WIDTH, generator=generator) / 8, "linear.bias": torch.randn(24)}
    second = {"linear.weight": torch.randn(10, 24, generator=generator)}
    write(folder, "Transformer", "Pooling", "Dense", "Dense", "Normalize", pooling={"pooling_mode": "mean"})
    for path, tensors, config in (
            ("2_Dense", first, {"in_features": WIDTH, "out_features": 24, "bias": True} | (
                {} if activation is None else {"activation_function": f"torch.nn.modules.activation.{activation}"})),
            ("3_Dense", second, {"in_features": 24, "out_features": 10, "bias": False,
                                 "activation_function": "torch.nn.modules.linear.Identity"})):
        save_file(tensors, folder / path / "model.safetensors")
        (folder / path / "config.json").write_text(json.dumps(config))
    module = getattr(torch.nn, activation or "Tanh")()
    vector = second["linear.weight"] @ module(first["linear.weight"] @ hidden_TD.mean(0) + first["linear.bias"])
    close(embed(folder), F.normalize(vector, dim=0))
    close(embed(folder, PoolingParams(normalize=False)), vector)
    close(embed(folder, PoolingParams(dimensions=4)), F.normalize(vector[:4], dim=0))
    with pytest.raises(RequestError, match="have 10 numbers"):
        embed(folder, PoolingParams(dimensions=11))


def test_length_one_before_a_dense_layer(folder: Path, hidden_TD: torch.Tensor) -> None:
    weight = torch.randn(8, WIDTH)
    write(folder, "Transformer", "Pooling", "Normalize", "Dense", pooling={"pooling_mode": "cls"}, dense={
        "in_features": WIDTH, "out_features": 8, "bias": False, "activation_function": "torch.nn.Identity"})
    save_file({"linear.weight": weight}, folder / "3_Dense" / "model.safetensors")
    close(embed(folder), weight @ F.normalize(hidden_TD[0], dim=0))


def test_a_request_and_the_setting_come_first(folder: Path, hidden_TD: torch.Tensor) -> None:
    write(folder, "Transformer", "Pooling", pooling={"pooling_mode": "mean"})
    close(embed(folder, PoolingParams(kind="max", normalize=True)), F.normalize(hidden_TD.max(0).values, dim=0))
    close(embed(folder, pooling_type="cls"), F.normalize(hidden_TD[0], dim=0))
    write(folder, "Transformer", "Pooling", pooling={"pooling_mode": ["mean", "max"]})
    close(embed(folder, pooling_type="last"), F.normalize(hidden_TD[-1], dim=0))


DENSE = {"in_features": WIDTH, "out_features": 4, "bias": False}
POOLING_FILE, DENSE_FILE = r"1_Pooling/config\.json: ", r"2_Dense/config\.json: "


@pytest.mark.parametrize(("content", "message"), [
    ({"pooling_mode": ["cls", "mean"]}, "several at once"), ({"pooling_mode": "median"}, "'median' is not built"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "several at once"),
    ({"pooling_mode": "cls", "include_prompt": False}, "include_prompt False"), ({"pooling_mode": []}, "several"),
    ({"pooling_mode": "cls", "embedding_dimension": 65}, "embedding_dimension 65"),
    ({"word_embedding_dimension": 32}, "word_embedding_dimension 32"), ({"pooling_mode": 3}, "3 is not built"),
    ({"pooling_mode": "mean", "later": 1}, "unknown member 'later'"),
], ids=str)
def test_pooling_that_is_not_built(folder: Path, content: object, message: str) -> None:
    write(folder, "Transformer", "Pooling", pooling=content)
    with pytest.raises(ModelError, match=POOLING_FILE + ".*" + message + ".*--pooling-type"):
        embed(folder)


@pytest.mark.parametrize(("content", "message"), [
    ({"in_features": 32}, "in_features 32"), ({"out_features": 0}, "out_features"),
    ({"use_residual": True}, "residual"),
    ({"activation_function": "my.Tanh"}, "my.Tanh"), ({"activation_function": "torch.nn.Softplus"}, "Softplus"),
    ({"module_input_name": "token_embeddings"}, "token_embeddings"), ({"later": "x"}, "'later'"), ({"bias": 1}, "bias"),
    ({"module_output_name": "other"}, "module_output_name"),
], ids=str)
def test_a_dense_layer_that_is_not_built(folder: Path, content: dict[str, Any], message: str) -> None:
    write(folder, "Transformer", "Pooling", "Dense", pooling={"pooling_mode": "mean"}, dense={**DENSE, **content})
    with pytest.raises(ModelError, match=DENSE_FILE + ".*" + message):
        embed(folder)


@pytest.mark.parametrize(("names", "message"), [
    (("Transformer",), "no Pooling"), (("Pooling", "Transformer"), "in the folder itself"),
    (("Transformer", "Pooling", "Pooling"), "must come first"), (("Transformer", "Pooling", "LSTM"), "LSTM"),
    (("Transformer", "Dense", "Pooling"), "must come first"), (("Transformer", "Pooling", "LayerNorm"), "LayerNorm"),
], ids=str)
def test_modules_that_are_not_built(folder: Path, names: tuple[str, ...], message: str) -> None:
    write(folder, *names, pooling={"pooling_mode": "mean"}, dense=DENSE)
    with pytest.raises(ModelError, match=rf"modules\.json: .*{message}"):
        embed(folder)


@pytest.mark.parametrize(("change", "message"), [
    ({"type": "custom_st.Pooling"}, "never run"), ({"path": "../x"}, "path"), ({"path": None}, "'type' and 'path'"),
    ({"kwargs": {"x": 1}}, "kwargs"),
], ids=str)
def test_entries_that_are_not_built(folder: Path, change: dict[str, Any], message: str) -> None:
    write(folder, "Transformer", "Pooling", pooling={"pooling_mode": "mean"})
    file = folder / "modules.json"
    first, second = json.loads(file.read_text())
    file.write_text(json.dumps([first, {**second, **change}]))
    with pytest.raises(ModelError, match=message):
        embed(folder)


def test_the_files_of_all_modules_come_from_the_hub() -> None:
    files = ["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
             "model.safetensors"]
    others = ["onnx/model.safetensors", "2_Dense/pytorch_model.bin", "original/consolidated.safetensors"]
    assert list(filter_repo_objects([*files, *others], allow_patterns=list(HUB_PATTERNS))) == files


def test_normalising_tokens_is_not_built(folder: Path) -> None:
    write(folder, "Transformer", "Pooling", "Normalize", pooling={"pooling_mode": "mean"})
    (folder / "2_Normalize" / "config.json").write_text(json.dumps({"module_input_name": "token_embeddings"}))
    with pytest.raises(ModelError, match="module_input_name"):
        embed(folder)


def test_a_default_prompt_is_refused_unless_it_is_empty(folder: Path) -> None:
    write(folder, "Transformer", "Pooling", pooling={"pooling_mode": "mean"})
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps({"default_prompt_name": "query", "prompts": {"query": "query: "}}))
    with pytest.raises(ModelError, match=r"default_prompt_name 'query'.*--pooling-type"):
        embed(folder)
    plain = embed(folder, pooling_type="mean")
    for content in ({"default_prompt_name": "document", "prompts": {"document": "", "query": "query: "}},
                    {"default_prompt_name": None, "prompts": {"query": "query: "}}):
        file.write_text(json.dumps(content))
        close(F.normalize(embed(folder), dim=-1), plain)


def test_longer_texts_than_the_checkpoint_reads_are_refused(folder: Path) -> None:
    write(folder, "Transformer", "Pooling", pooling={"pooling_mode": "mean"})
    file = folder / "sentence_bert_config.json"
    file.write_text(json.dumps({"max_seq_length": len(IDS) - 1}))
    whole = embed(folder)  # with max_model_len
    settings: dict[str, Any] = {"model": str(folder), "skip_tokenizer_init": True, "dtype": "float32", "num_threads": 1,
                                "num_kv_blocks": 32}
    with LLM(**settings) as llm:
        assert llm.embed([{"prompt_token_ids": IDS[:-1]}])
        with pytest.raises(RequestError, match="max_model_len"):
            llm.embed([{"prompt_token_ids": IDS}])
    file.write_text(json.dumps({"max_seq_length": len(IDS)}))
    with LLM(**settings) as llm:
        close(torch.tensor(llm.embed([{"prompt_token_ids": IDS}])[0].embedding), whole)
    file.write_text(json.dumps({"max_seq_length": "512"}))
    with pytest.raises(ModelError, match="max_seq_length must be a positive integer"):
        LLM(**settings)
