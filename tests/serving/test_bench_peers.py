"""What the comparison with other engines needs and can be tested without them: names, and llama.cpp's batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.cpu import gguf
from benchmarks.cpu.peers import ENGINES, PEERS, LlamacppEngine
from serving.commands.bench.engines import OWN
from serving.commands.bench.random_model import SHAPE, _tensor_shapes


def test_every_tensor_has_a_gguf_name_of_its_own() -> None:
    names = {name: gguf.gguf_name(name) for name in _tensor_shapes()}
    assert len(set(names.values())) == len(names) == 3 + 11 * SHAPE["num_hidden_layers"]
    assert names["model.layers.7.mlp.up_proj.weight"] == "blk.7.ffn_up.weight"
    assert names["model.layers.0.input_layernorm.weight"] == "blk.0.attn_norm.weight"
    assert names["lm_head.weight"] == "output.weight"
    with pytest.raises(KeyError, match="rotary"):
        gguf.gguf_name("model.layers.0.self_attn.rotary.weight")


def test_engines_that_read_the_checkpoint_get_it(tmp_path: Path) -> None:
    assert set(PEERS.converters) == {"openvino", "llamacpp", "llamacpp-q8"} < set(ENGINES) - set(OWN.names)
    assert PEERS.weights_for("xllm", tmp_path / "model", tmp_path) == tmp_path / "model"


class Slots:
    """The arrays of a `llama_batch`, of `size` places."""

    def __init__(self, size: int):
        self.token, self.pos, self.n_seq_id, self.logits = ([0] * size for _ in range(4))
        self.seq_id, self.n_tokens = [[-1] for _ in range(size)], 0

    def rows(self) -> Iterator[tuple[int, int, int]]:
        for i in range(self.n_tokens):
            yield self.seq_id[i][0], self.pos[i], self.token[i]


def test_llamacpp_batches_hold_decodes_first_and_cut_prompts() -> None:
    engine = SimpleNamespace(BATCH=5, _batch=Slots(5))
    todo, position = [[10, 11, 12, 13], [20], [30, 31]], [0, 7, 0]
    assert LlamacppEngine._fill(engine, todo, position) == [(1, 0), (0, 4)]
    assert list(engine._batch.rows()) == [(1, 7, 20), (0, 0, 10), (0, 1, 11), (0, 2, 12), (0, 3, 13)]
    assert engine._batch.logits == [True, False, False, False, True]
    todo[0], todo[1] = [14], [21]
    assert LlamacppEngine._fill(engine, todo, position) == [(0, 0), (1, 1), (2, 3)]
    assert list(engine._batch.rows()) == [(0, 4, 14), (1, 8, 21), (2, 0, 30), (2, 1, 31)]
    assert position == [5, 9, 2]
