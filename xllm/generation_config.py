"""`generation_config.json`: the sampling defaults that a checkpoint brings, as vLLM takes them. No torch here.

Members that change what is generated and are not built are refused by name; `generation_config` "vllm" leaves the whole
file out, so that such a checkpoint can be served all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm.errors import ConfigError, ModelError, RequestError, shortened
from xllm.model_files import is_there, read_json
from xllm.request import SamplingParams

FILE = "generation_config.json"
log = logging.getLogger(__name__)

TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
HONOURED = (*TAKEN, "max_new_tokens", "do_sample", "eos_token_id")
# Members that change what is generated, with the values under which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0.0,), "penalty_alpha": (0.0,), "dola_layers": (),
    "typical_p": (1.0,), "top_h": (), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],), "force_words_ids": ([],), "constraints": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "exponential_decay_length_penalty": (), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "sequence_bias": ([], {}), "token_healing": (False,), "guidance_scale": (1.0,),
    "watermarking_config": (), "num_return_sequences": (1,), "min_length": (0,), "min_new_tokens": (0,),
    "max_time": (), "stop_strings": ([],),
}
# How transformers computes or returns, of encoder-decoder models, of beams alone, or of the file itself.
HARMLESS = (
    "max_length", "early_stopping", "length_penalty", "use_mtp", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "renormalize_logits", "remove_invalid_values", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config",
    "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size", "_from_model_config",
    "transformers_version",
)


def read_sampling_defaults(source: str, model_path: Path) -> dict[str, Any]:
    """Arguments of `SamplingParams`. source: the setting `generation_config`; "auto" is the model's own file, "vllm"
    none, all else a folder that has one.

    Raises ConfigError, naming file and member.
    """
    if source == "vllm":
        return {}
    file = (model_path if source == "auto" else Path(source)) / FILE
    if not is_there(file):
        if source == "auto":
            return {}
        raise ConfigError(f"generation_config: there is no {file}")
    try:
        content = read_json(file)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    _check_members(content, file)
    defaults = {name: content[name] for name in TAKEN if content.get(name) is not None}
    if content.get("do_sample") is False:  # greedy, whatever the temperature beside it
        defaults["temperature"] = 0.0
    if content.get("max_new_tokens") is not None:
        defaults["max_tokens"] = content["max_new_tokens"]
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise _refused(file, str(error)) from None
    return defaults


def default_sampling(source: str, model_path: str) -> SamplingParams:
    """What a Python call without `sampling_params` means. Raises ConfigError."""
    return SamplingParams(**read_sampling_defaults(source, Path(model_path)))


def _check_members(content: Mapping[str, Any], file: Path) -> None:
    for name, value in content.items():
        if name in REFUSED and value is not None and value not in REFUSED[name]:
            raise _refused(file, f"{name} {value!r} is not built")
    if not isinstance(content.get("do_sample"), bool | None):
        raise _refused(file, f"do_sample must be true or false, got {content['do_sample']!r}")
    unknown = [name for name, value in content.items()
               if value is not None and name not in HONOURED and name not in REFUSED and name not in HARMLESS]
    if unknown:
        log.warning("%s has members that mean nothing here: %s", file, shortened(", ".join(unknown)))


def _refused(file: Path, message: str) -> ConfigError:
    return ConfigError(f"{file}: {shortened(message)}; --generation-config vllm ignores the file")
