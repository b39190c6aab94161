"""The benchmark's checkpoint as an OpenVINO model: the stateful graph that OpenVINO GenAI turns into paged attention.

Written with OpenVINO's own operators, in the form that its fusions look for (RMS norm, rotary embedding, and
SDPAToPagedAttention, which wants ReadValue, Gather by `beam_idx`, Concat); so no exporter needs to be installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_openvino(checkpoint: Path, folder: Path) -> Path:
    """Convert a Qwen3 checkpoint with untied embeddings to fp32 OpenVINO files in `folder`; returns the folder."""
    import openvino as ov

    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(_Graph(checkpoint).model(), folder / "openvino_model.xml", compress_to_fp16=False)
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return folder


class _Graph:
    """Letters: B sequences, T new tokens, S all tokens, N query heads, K kv heads, H head dim, D hidden."""

    def __init__(self, checkpoint: Path):
        import openvino.opset13 as op
        from safetensors.numpy import load_file

        self._op = op
        self._config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
        self._weights = load_file(checkpoint / "model.safetensors")
        self._sinks: list[Any] = []
        self._variables: list[Any] = []
        self._ids, self._mask_BS, self._positions_BT = (
            self._input(name, [-1, -1], np.int64) for name in ("input_ids", "attention_mask", "position_ids"))
        self._beam_idx_B = self._input("beam_idx", [-1], np.int32)
        self._batch = op.gather(op.shape_of(self._ids), self._ints([0]), self._ints(0))

    def model(self) -> Any:
        import openvino as ov

        op, config = self._op, self._config
        x_BTD = op.gather(self._weight("model.embed_tokens"), self._ids, self._ints(0))
        cos, sin = self._angles()
        visible = self._visible()
        for index in range(config["num_hidden_layers"]):
            name = f"model.layers.{index}"
            normed = self._norm(x_BTD, f"{name}.input_layernorm")
            x_BTD = op.add(x_BTD, self._attention(normed, index, cos, sin, visible))
            x_BTD = op.add(x_BTD, self._mlp(self._norm(x_BTD, f"{name}.post_attention_layernorm"), f"{name}.mlp"))
        logits = self._linear(self._norm(x_BTD, "model.norm"), "lm_head")
        logits.output(0).get_tensor().set_names({"logits"})
        inputs = [self._ids, self._mask_BS, self._positions_BT, self._beam_idx_B]
        return ov.Model([op.result(logits)], self._sinks, inputs, self._variables, "checkpoint")

    def _input(self, name: str, shape: list[int], dtype: type) -> Any:
        parameter = self._op.parameter(shape, dtype)
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
        return parameter

    def _ints(self, value: Any) -> Any:
        return self._op.constant(np.array(value, dtype=np.int64))

    def _floats(self, value: Any) -> Any:
        return self._op.constant(np.array(value, dtype=np.float32))

    def _weight(self, name: str) -> Any:
        return self._op.constant(self._weights.pop(f"{name}.weight"))

    def _linear(self, x: Any, name: str) -> Any:
        return self._op.matmul(x, self._weight(name), False, True)

    def _norm(self, x: Any, name: str) -> Any:
        op = self._op
        mean = op.reduce_mean(op.power(x, self._floats(2)), self._ints([-1]), True)
        root = op.sqrt(op.add(mean, self._floats(self._config["rms_norm_eps"])))
        return op.multiply(op.multiply(x, op.divide(self._floats(1), root)), self._weight(name))

    def _mlp(self, x: Any, name: str) -> Any:
        op = self._op
        gated = op.multiply(op.swish(self._linear(x, f"{name}.gate_proj")), self._linear(x, f"{name}.up_proj"))
        return self._linear(gated, f"{name}.down_proj")

    def _angles(self) -> tuple[Any, Any]:
        """cos and sin, [B, 1, T, H]."""
        op, size = self._op, self._config["head_dim"]
        inverse = 1.0 / self._config["rope_theta"] ** (np.arange(0, size, 2) / size)
        positions = op.convert(op.unsqueeze(self._positions_BT, self._ints(1)), "f32")
        frequencies = op.matmul(self._floats(inverse.reshape(1, -1, 1)), positions, False, False)
        half = op.transpose(frequencies, self._ints([0, 2, 1]))
        whole = op.unsqueeze(op.concat([half, half], 2), self._ints(1))
        return op.cos(whole), op.sin(whole)

    def _visible(self) -> Any:
        """Which position sees which, bool [B, 1, T, S]."""
        op = self._op
        total = op.gather(op.shape_of(self._mask_BS), self._ints(1), self._ints(0))
        older = op.less_equal(op.range(self._ints(0), total, self._ints(1), "i64"),
                              op.unsqueeze(self._positions_BT, self._ints([1, 3])))
        return op.logical_and(older, op.unsqueeze(op.not_equal(self._mask_BS, self._ints(0)), self._ints([1, 2])))

    def _attention(self, x_BTD: Any, index: int, cos: Any, sin: Any, visible: Any) -> Any:
        op, c, name = self._op, self._config, f"model.layers.{index}.self_attn"
        N, K, H = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        q = self._rotate(self._norm(self._heads(x_BTD, f"{name}.q_proj", N), f"{name}.q_norm"), cos, sin)
        k = self._rotate(self._norm(self._heads(x_BTD, f"{name}.k_proj", K), f"{name}.k_norm"), cos, sin)
        v = self._swap(self._heads(x_BTD, f"{name}.v_proj", K))
        keys, values = (self._repeat(self._cached(new, f"past_key_values.{index}.{part}"), N // K)
                        for part, new in (("key", k), ("value", v)))
        out = op.scaled_dot_product_attention(q, keys, values, visible, self._floats(H**-0.5), causal=False)
        return self._linear(op.reshape(self._swap(out), self._ints([0, 0, N * H]), True), f"{name}.o_proj")

    def _heads(self, x_BTD: Any, name: str, num_heads: int) -> Any:
        shape = self._ints([0, 0, num_heads, self._config["head_dim"]])
        return self._op.reshape(self._linear(x_BTD, name), shape, True)

    def _swap(self, x: Any) -> Any:
        return self._op.transpose(x, self._ints([0, 2, 1, 3]))

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        op, half = self._op, self._config["head_dim"] // 2
        x = self._swap(x)
        low = op.slice(x, self._ints([0]), self._ints([half]), self._ints([1]), self._ints([3]))
        high = op.slice(x, self._ints([half]), self._ints([2**31 - 1]), self._ints([1]), self._ints([3]))
        turned = op.concat([op.multiply(high, self._floats(-1)), low], 3)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def _cached(self, new_BKTH: Any, name: str) -> Any:
        """All keys (or values) so far, [B, K, S, H]."""
        import openvino as ov
        from openvino.op.util import Variable, VariableInfo

        op = self._op
        K, H = self._config["num_key_value_heads"], self._config["head_dim"]
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape([-1, K, -1, H]), ov.Type.f32, name
        variable = Variable(info)
        empty = op.broadcast(self._floats(0), op.concat([self._batch, self._ints([K, 0, H])], 0))
        past = op.gather(op.read_value(empty, variable), self._beam_idx_B, self._ints(0))
        keys = op.concat([past, new_BKTH], 2)
        self._sinks.append(op.assign(keys, variable))
        self._variables.append(variable)
        return keys

    def _repeat(self, x_BKSH: Any, group: int) -> Any:
        op, c = self._op, self._config
        wide = op.unsqueeze(x_BKSH, self._ints(2))
        shape = op.shape_of(x_BKSH)
        first = op.gather(shape, self._ints([0, 1]), self._ints(0))
        last = op.gather(shape, self._ints([2, 3]), self._ints(0))
        wide = op.broadcast(wide, op.concat([first, self._ints([group]), last], 0), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, self._ints([0, c["num_attention_heads"], -1, c["head_dim"]]), True)
