"""A small random checkpoint of the toy family, and what it computes, all tokens at once, with plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.toy_family import ARCHITECTURE

V, D, F, N, R, E, LAYERS = 97, 32, 40, 4, 24, 3, 4
THETA, EPS = 10000.0, 1e-6
CONFIG = {"architectures": [ARCHITECTURE], "vocab_size": V, "hidden_size": D, "intermediate_size": F,
          "num_hidden_layers": LAYERS, "num_attention_heads": N, "max_position_embeddings": 256, "latent_width": R,
          "num_experts": E, "torch_dtype": "float32"}


def save_toy(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(12)
    save_file({name: (1.0 + 0.2 * noise if len(shape) == 1 else noise * 1.5 / shape[-1] ** 0.5)
               for name, shape in shapes().items() for noise in [torch.randn(shape, generator=generator)]},
              folder / "model.safetensors")
    return folder


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D),
                                         "model.norm.weight": (D,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{norm}.weight": (D,) for norm in ("input_layernorm", "post_attention_layernorm")}
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        if i % 2 == 0:
            found |= {f"{attention}.q_proj.weight": (N * R, D), f"{attention}.kv_down.weight": (R, D),
                      f"{attention}.o_proj.weight": (D, N * R), f"{mlp}.router.weight": (E, D)}
            found |= {f"{mlp}.experts.{e}.{name}.weight": shape for e in range(E)
                      for name, shape in (("up", (F, D)), ("down", (D, F)))}
            continue
        K, H = kv_shape(i)
        found |= {f"{attention}.{name}_proj.weight": (rows * H, D) for name, rows in (("q", N), ("k", K), ("v", K))}
        found |= {f"{attention}.o_proj.weight": (D, N * H), f"{mlp}.gate_proj.weight": (F, D),
                  f"{mlp}.up_proj.weight": (F, D), f"{mlp}.down_proj.weight": (D, F)}
    return found


def kv_shape(layer: int) -> tuple[int, int]:
    """kv heads and head dim: another pair in layers 1 and 3."""
    return {1: (2, 16), 3: (1, 24)}[layer]


class Naive:
    """The whole sequence at once, in float64, without a cache."""

    def __init__(self, folder: Path):
        self._weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}

    def logits(self, tokens: list[int]) -> Tensor:
        """[len(tokens), V]"""
        w = self._weights
        x = w["model.embed_tokens.weight"][tokens]
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            mix, mlp = (self._latent, self._experts) if i % 2 == 0 else (self._pair, self._gated)
            x = x + mix(i, norm(x, w[f"{layer}.input_layernorm.weight"]))
            x = x + mlp(i, norm(x, w[f"{layer}.post_attention_layernorm.weight"]))
        return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt):]

    def _part(self, layer: int, name: str) -> Tensor:
        return self._weights[f"model.layers.{layer}.{name}.weight"]

    def _latent(self, layer: int, x: Tensor) -> Tensor:
        latents = x @ self._part(layer, "self_attn.kv_down").T
        q = (x @ self._part(layer, "self_attn.q_proj").T).view(len(x), N, R)
        out = [causal(q[:, head], latents, latents) for head in range(N)]
        return torch.cat(out, dim=1) @ self._part(layer, "self_attn.o_proj").T

    def _pair(self, layer: int, x: Tensor) -> Tensor:
        K, H = kv_shape(layer)
        q, k, v = ((x @ self._part(layer, f"self_attn.{name}_proj").T).view(len(x), -1, H) for name in "qkv")
        q, k = rotated(q), rotated(k)
        out = [causal(q[:, head], k[:, head // (N // K)], v[:, head // (N // K)]) for head in range(N)]
        return torch.cat(out, dim=1) @ self._part(layer, "self_attn.o_proj").T

    def _experts(self, layer: int, x: Tensor) -> Tensor:
        chosen = (x @ self._part(layer, "mlp.router").T).argmax(-1).tolist()
        rows = [self._part(layer, f"mlp.experts.{e}.down")
                @ (self._part(layer, f"mlp.experts.{e}.up") @ row).relu().square() for row, e in zip(x, chosen)]
        return torch.stack(rows)

    def _gated(self, layer: int, x: Tensor) -> Tensor:
        gate, up = (x @ self._part(layer, f"mlp.{name}_proj").T for name in ("gate", "up"))
        return (gate * gate.sigmoid() * up) @ self._part(layer, "mlp.down_proj").T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.T * q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ v


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding in the half-split form; x: [T, heads, H]."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
