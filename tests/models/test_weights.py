"""Shards of a checkpoint's tensors: the right numbers, and no byte of the file beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from backends.scaled_weight import ScaledWeight
from xllm.errors import ModelError
from xllm.layers.layer_context import Weights
from xllm.models.dummy_weights import DummyWeights
from xllm.models.fp8_format import Fp8Format
from xllm.models.weights import WeightSource
from xllm.parallel.shard import Shard

CPU = torch.device("cpu")
SMAPS = Path("/proc/self/smaps")
MIB = 2**20


def save(folder: Path, **tensors: Tensor) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def open_weights(folder: Path, dtype: torch.dtype = torch.float32) -> WeightSource:
    return WeightSource(folder, dtype=dtype, device=CPU)


@pytest.mark.parametrize("disk", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("axis", "count"), [(0, 2), (1, 2), (0, 3), (1, 5), (0, 7), (1, 1)])
def test_shards_put_together_are_the_tensor(tmp_path: Path, disk: torch.dtype, axis: int, count: int) -> None:
    """Where 7 ranks share 5 rows, the last two get none."""
    whole = torch.randn(5, 10).to(disk)
    save(tmp_path, w=whole)
    parts = []
    for index in range(count):
        with open_weights(tmp_path) as weights:
            part = weights.take("w", (5, 10), Shard(axis, index, count))
        assert part.dtype is torch.float32 and part.is_contiguous()
        assert part.untyped_storage().nbytes() == 4 * part.numel()  # no view of more
        parts.append(part)
    assert torch.equal(torch.cat(parts, axis), whole.float())


def test_the_shape_asked_for_is_that_of_the_whole(tmp_path: Path) -> None:
    save(tmp_path, w=torch.zeros(4, 6))
    with open_weights(tmp_path) as weights, pytest.raises(ModelError, match=r"has shape \[4, 6\], the config asks for"):
        weights.take("w", (2, 6), Shard(0, 0, 2))


def test_what_may_be_there_or_not(tmp_path: Path) -> None:
    save(tmp_path, w=torch.zeros(3), spare=torch.zeros(2))
    with open_weights(tmp_path) as weights:
        weights.take("w", (3,))
        assert weights.has("spare") and not weights.has("absent") and not weights.has("w")
        with pytest.raises(ModelError, match="'spare' is not part of this architecture"):
            weights.check_all_taken()
        weights.take("spare", (2,))
        weights.check_all_taken()


def test_names_without_their_first_part_are_completed(tmp_path: Path) -> None:
    table = torch.randn(4, 2)
    save(tmp_path, **{"embed_tokens.weight": table, "norm.weight": torch.ones(2), "lm_head.weight": torch.ones(4, 2)})
    with open_weights(tmp_path) as weights:
        assert weights.is_bare and weights.has("lm_head.weight")
        torch.testing.assert_close(weights.take("model.embed_tokens.weight", (4, 2)), table)
        weights.take("lm_head.weight", (4, 2))
        with pytest.raises(ModelError, match=r"tensor 'norm\.weight' is not part"):
            weights.check_all_taken()
    save(tmp_path, **{"embed_tokens.weight": table, "model.norm.weight": torch.ones(2)})
    with open_weights(tmp_path) as weights:
        assert not weights.is_bare and not weights.has("model.embed_tokens.weight")


def resident_bytes(file: Path) -> int:
    """How much of a file's maps this process has touched."""
    total, ours = 0, False
    for line in SMAPS.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            ours = line.endswith(str(file))
        elif ours and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux says which pages of a map are resident")
@pytest.mark.parametrize("shard", [Shard(0, 1, 2), Shard(1, 0, 2), Shard(1, 3, 4)], ids=str)
def test_a_rank_reads_its_own_bytes_alone(tmp_path: Path, shard: Shard) -> None:
    """32 MiB in two rows. Linux maps what it has in memory around a byte that is touched, up to 2 MiB at once."""
    shape, num_runs = (2, 4 * MIB), 1 if shard.axis == 0 else 2
    whole = torch.randn(shape)
    save(tmp_path, w=whole, other=torch.zeros(2 * MIB))
    file = tmp_path / "model.safetensors"
    with open_weights(tmp_path) as weights:
        before = resident_bytes(file)
        part = weights.take("w", shape, shard)
        touched = resident_bytes(file) - before
        weights.take("other", (2 * MIB,))
        assert resident_bytes(file) - before - touched >= 4 * MIB  # it is seen when it is read
    assert torch.equal(part, whole[shard.of(shape)])
    assert part.nbytes - 4 * MIB <= touched <= part.nbytes + num_runs * 4 * MIB < whole.nbytes
    assert before < 4 * MIB


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux says which pages of a map are resident")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_rank_reads_its_part_of_stacked_experts_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    """One after the other. Two experts of gate and up, of 32 MiB in fp32: the first rank's rows are two runs in each of
    them."""
    shape, block = (2, 4, 4 * MIB), Fp8Format(3, 2 * MIB)
    whole = torch.randint(-8, 8, shape).to(dtype)
    save(tmp_path, w=whole, **({} if dtype is torch.float32 else {"w_scale_inv": torch.rand(2, 2, 2) + 1.0}))
    file, run_bytes = tmp_path / "model.safetensors", 4 * MIB * dtype.itemsize
    rows = [(slice(0, 1), slice(0, shape[2])), (slice(2, 3), slice(0, shape[2]))]
    with WeightSource(tmp_path, dtype=torch.float32, device=CPU, fp8=block, keeps_fp8=True) as weights:
        before = resident_bytes(file)
        for number, part in enumerate(weights.take_experts("w", shape, rows)):
            codes = part.codes_YX if isinstance(part, ScaledWeight) else part
            assert torch.equal(codes.float(), whole[number, ::2].float())
            assert codes.untyped_storage().nbytes() == codes.nbytes
            touched, wanted = resident_bytes(file) - before, (number + 1) * 2 * run_bytes
            assert wanted <= touched <= wanted + (number + 1) * 4 * MIB < whole.nbytes
        weights.check_all_taken()


@pytest.mark.parametrize("shard", [Shard(0, 1, 2), Shard(1, 2, 3), Shard(0, 0, 1), None], ids=str)
def test_random_weights_are_parts_of_one_tensor(shard: Shard | None) -> None:
    def fresh() -> Weights:
        return DummyWeights(dtype=torch.float32, device=CPU)

    whole, part = fresh().take("w", (6, 9)), fresh().take("w", (6, 9), shard)
    assert torch.equal(part, whole if shard is None else whole[shard.of((6, 9))])
    assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
