"""What a checkpoint says of its embeddings: the modules that sentence-transformers runs behind the model.

`modules.json` lists them, each with a folder of its own: the model, `Pooling`, any number of `Dense`, perhaps
`Normalize`. Older checkpoints have `1_Pooling/config.json` alone. Either is honoured, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xllm.errors import ModelError
from xllm.model_files import as_json, is_there, read_bounded, read_json
from xllm.models.weights import WeightSource
from xllm.pooling import KINDS, PoolingDefaults

MODULES_FILE, POOLING_FOLDER, SENTENCE_FILE = "modules.json", "1_Pooling", "sentence_bert_config.json"
MAX_MODULES = 64  # chosen: real checkpoints have a handful
WAY_OUT = "--pooling-type last (or another) embeds without the checkpoint's own modules"
LEGACY_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
                "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
                "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh, "Identity": lambda x_D: x_D, "ReLU": F.relu, "GELU": F.gelu, "Sigmoid": torch.sigmoid,
    "SiLU": F.silu,
}
SENTENCE = "sentence_embedding"

Layer = Callable[[Tensor], Tensor]  # vector_D -> another, fp32, in host memory


@dataclass(frozen=True, kw_only=True)
class EmbeddingModules:
    """defaults: how the hidden states of a text become a vector, for requests that do not say it. layers: what the
    vector then passes through, also for requests that do."""

    defaults: PoolingDefaults
    layers: tuple[Layer, ...] = ()


def read_embedding_modules(folder: Path, setting: str, hidden_size: int) -> EmbeddingModules:
    """setting: `pooling_type`; anything but "auto" replaces all that the checkpoint says.

    Raises ModelError, naming file and member, for a module that is not built.
    """
    modules, pooling = folder / MODULES_FILE, folder / POOLING_FOLDER
    if setting != "auto":
        return EmbeddingModules(defaults=PoolingDefaults(kind=setting, width=hidden_size))
    if is_there(modules):
        return _read_modules(modules, hidden_size)
    if is_there(pooling / "config.json"):
        return EmbeddingModules(defaults=PoolingDefaults(kind=_read_pooling(pooling, hidden_size), width=hidden_size))
    return EmbeddingModules(defaults=PoolingDefaults(width=hidden_size))


def _read_modules(file: Path, width: int) -> EmbeddingModules:
    kind, layers = None, []
    for index, module in enumerate(_module_list(file)):
        name, folder = _kind_and_folder(file, index, module)
        if (name == "Transformer") != (index == 0) or (name == "Pooling") != (index == 1):
            raise _refused(file, f"module {index} is {name}; a Transformer and a Pooling must come first, once")
        if name == "Pooling":
            kind = _read_pooling(folder, width)
        elif name == "Dense":
            layer, width = _read_dense(folder, width)
            layers.append(layer)
        elif name == "Normalize":
            _check_members(folder / "config.json", _optional_json(folder / "config.json"), {
                "module_input_name": (SENTENCE,), "module_output_name": (SENTENCE, None)})
            layers.append(_normalize)
        elif name != "Transformer":
            raise _refused(file, f"module {index} is a {name}, which is not built")
    if kind is None:
        raise _refused(file, "there is no Pooling among the modules")
    _check_model_settings(file.parent)
    is_last = bool(layers) and layers[-1] is _normalize
    return EmbeddingModules(defaults=PoolingDefaults(kind=kind, normalize=is_last, width=width),
                            layers=tuple(layers[:-1] if is_last else layers))


def _module_list(file: Path) -> list[Any]:
    modules = as_json(file, read_bounded(file))
    if not isinstance(modules, list) or not 0 < len(modules) <= MAX_MODULES:
        raise ModelError(f"{file} must hold a list of modules, {MAX_MODULES} at most")
    return modules


def _kind_and_folder(file: Path, index: int, module: Any) -> tuple[str, Path]:
    """The last part of the class's name, and where its files are. The first module is the checkpoint itself."""
    members = module if isinstance(module, dict) else {}
    name, path = members.get("type"), members.get("path")
    if not isinstance(name, str) or not isinstance(path, str):
        raise ModelError(f"{file}: module {index} must have 'type' and 'path'")
    if members.get("kwargs"):
        raise _refused(file, f"module {index}: kwargs {members['kwargs']!r} is not built")
    if not name.startswith("sentence_transformers."):
        raise _refused(file, f"module {index} is {name}, code of the checkpoint's own, which is never run")
    if Path(path).name != path or path == ".." or (index == 0) != (path == ""):
        raise _refused(file, f"module {index}: path {path!r} is not built; the model is in the folder itself, every "
                             "other module in a folder below it")
    return name.rpartition(".")[2], file.parent / path


def _read_pooling(folder: Path, hidden_size: int) -> str:
    """One of `KINDS`, in the layout of any version."""
    file = folder / "config.json"
    values = read_json(file)
    modes = values.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in LEGACY_MODES.items() if values.get(key)] or "mean"
    modes = modes if isinstance(modes, list) else [modes]
    kinds = ["last" if mode == "lasttoken" else mode for mode in modes]
    if len(kinds) != 1:
        raise _refused(file, f"pooling_mode {modes!r}: several at once are not built")
    if kinds[0] not in KINDS:
        raise _refused(file, f"pooling_mode {modes[0]!r} is not built; {', '.join(KINDS)} are")
    _check_members(file, values, {
        "pooling_mode": (values.get("pooling_mode"),), "include_prompt": (True, None),
        "embedding_dimension": (hidden_size, None), "word_embedding_dimension": (hidden_size, None),
        **dict.fromkeys(LEGACY_MODES, (True, False, None))})
    kind: str = kinds[0]
    return kind


def _read_dense(folder: Path, width: int) -> tuple[Layer, int]:
    """activation(weight_YX @ x + bias_Y), and Y."""
    file = folder / "config.json"
    values = read_json(file)
    num_outputs, has_bias = values.get("out_features"), values.get("bias", True)
    if type(num_outputs) is not int or num_outputs < 1 or not isinstance(has_bias, bool):
        raise ModelError(f"{file}: out_features must be a positive integer, and bias true or false")
    name = values.get("activation_function", "torch.nn.Tanh")
    activation = ACTIVATIONS.get(str(name).rpartition(".")[2])
    if activation is None or not str(name).startswith("torch.nn."):
        raise _refused(file, f"activation_function {name!r} is not built; {', '.join(ACTIVATIONS)} of torch.nn are")
    _check_members(file, values, {
        "in_features": (width,), "out_features": (num_outputs,), "bias": (has_bias,), "activation_function": (name,),
        "module_input_name": (SENTENCE, None), "module_output_name": (SENTENCE, None), "use_residual": (False, None)})
    with WeightSource(folder, dtype=torch.float32, device=torch.device("cpu")) as weights:
        weight_YX = weights.take("linear.weight", (num_outputs, width))
        bias_Y = weights.take("linear.bias", (num_outputs,)) if has_bias else None
        weights.check_all_taken()
    return lambda x_X: activation(F.linear(x_X, weight_YX, bias_Y)), num_outputs


def _normalize(x_D: Tensor) -> Tensor:
    return F.normalize(x_D, dim=-1)


def _check_members(file: Path, values: Mapping[str, Any], built: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ModelError for a member that is unknown, or has another value than those that are built."""
    for key, value in values.items():
        if key not in built and value not in (None, False, [], {}):
            raise _refused(file, f"unknown member {key!r} ({value!r})")
        if key in built and not any(value == other and type(value) is type(other) for other in built[key]):
            raise _refused(file, f"{key} {value!r} is not built here (only {built[key][0]!r} is)")


def _optional_json(file: Path) -> Mapping[str, Any]:
    return read_json(file) if is_there(file) else {}


def _check_model_settings(folder: Path) -> None:
    """Refuse what sentence-transformers does to a text before the model sees it."""
    file = folder / SENTENCE_FILE
    if _optional_json(file).get("do_lower_case"):
        raise _refused(file, "do_lower_case true is not built")
    file = folder / "config_sentence_transformers.json"
    settings = _optional_json(file)
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts")
    if name is not None and (not isinstance(prompts, dict) or prompts.get(name) != ""):
        raise _refused(file, f"default_prompt_name {name!r}: to put that prompt before every text is not built; with "
                             "null there, requests put it before theirs")


def max_text_tokens(folder: Path, setting: str) -> int | None:
    """To how many tokens sentence-transformers cuts a text, special ones included; None: it does not say, or `setting`
    (`pooling_type`) replaces what the checkpoint says. Raises ModelError."""
    file = folder / SENTENCE_FILE
    if setting != "auto" or not (folder / MODULES_FILE).is_file():
        return None
    length = _optional_json(file).get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise _refused(file, f"max_seq_length must be a positive integer, got {length!r}")
    return length


def _refused(file: Path, message: str) -> ModelError:
    return ModelError(f"{file}: {message}. {WAY_OUT}")
