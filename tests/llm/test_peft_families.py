"""Adapters that PEFT wrote for models with experts or latents: those of the attention are honoured.

PEFT cannot write one of a shared expert without one of the experts; `tests/models/test_experts.py` has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.llm.test_peft import by_peft, by_us, far, save_adapter
from tests.models.checkpoints import BY_ID, save_checkpoint
from xllm import LLM
from xllm.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about transformers
ATTENTION = r".*\.(q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa)"


def start(base: Path) -> LLM:
    return LLM(model=str(base), skip_tokenizer_init=True, dtype="float32", max_model_len=64, num_threads=1,
               num_kv_blocks=64, enable_lora=True)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2-lite-moe", "deepseek-v3-moe",
                                     "glm4-moe-bias-qk-norm-scaled"])
def test_equals_peft(tmp_path: Path, variant: str) -> None:
    base, folder = save_checkpoint(BY_ID[variant], tmp_path / "base"), tmp_path / "adapter"
    save_adapter(base, folder, target_modules=ATTENTION)
    with start(base) as llm:
        found = by_us(llm, folder)
        assert far(found, by_peft(base, folder)) < 2e-4
        assert far(found, by_us(llm, None)) > 0.05


@pytest.mark.parametrize(("members", "message"), [
    ({"target_modules": ["kv_b_proj"]}, r"'model\.layers\.0\.self_attn\.kv_b_proj' is nothing that an adapter"),
    ({"target_modules": ["gate_proj", "up_proj", "down_proj"]}, r"target_parameters \['(gate_up|down)_proj'"),
], ids=["kv_b_proj", "experts"])
def test_what_is_refused(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    base, folder = save_checkpoint(BY_ID["deepseek-v3-moe"], tmp_path / "base"), tmp_path / "adapter"
    save_adapter(base, folder, **members)
    with start(base) as llm, pytest.raises(ModelError, match=message):
        llm.load_adapter("x", folder)
