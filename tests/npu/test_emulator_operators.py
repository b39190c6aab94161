"""The emulated operators are the wheel's: their schemas, their shapes and types, and nothing beside them runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.emulated_npu.kernels import NATIVE as NATIVE_ATEN
from tests.emulated_npu.operators import NATIVE
from tests.emulated_npu.operators.registry import BY_DESCRIPTION, REFERENCES, overload
from tests.emulated_npu.schemas import from_dispatcher, known
from tests.npu.op_samples import Sample, samples

SAMPLES = samples()
CASES = [pytest.param(name, case, id=f"{name}-{case}") for name in SAMPLES for case in SAMPLES[name]]
# What the wheel writes without saying so in the schema, which torch's own check is right to refuse.
WRITES_UNDECLARED = {f"npu::npu_fused_infer_attention_score{version}.out" for version in ("", "_v2")}

RETURNS_AN_ARGUMENT = {"npu::_npu_moe_token_unpermute"}  # which its schema conceals, too
META_NEEDS_MORE = ("npu::npu_top_k_top_p", "p")  # the wheel's meta kernel takes k for given


def has_meta(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(overload(name).name(), "Meta")


def to_npu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.npu()
    return [to_npu(each) for each in value] if isinstance(value, list) else value


# By operator, the argument that the device wants as fractals.
IN_FRACTALS = {"npu::npu_grouped_matmul_swiglu_quant_v2": 1}


def on_npu(sample: Sample, host_argument: int | None = None) -> Sample:
    args = tuple(each if i == host_argument else to_npu(each) for i, each in enumerate(sample[0]))
    return args, {key: to_npu(each) for key, each in sample[1].items()}


def test_every_reference_has_samples() -> None:
    assert set(SAMPLES) == set(REFERENCES)


def test_the_schemas_are_those_of_the_wheel() -> None:
    assert from_dispatcher() == known()[torch_npu.__version__]


def test_schemas_that_differ_between_versions() -> None:
    now, then = known()["2.13.0"], known()["2.10.0.post4"]
    assert {name for name in now if now[name] != then[name]} == {
        "npu::npu_moe_gating_top_k",  # input_ids and tid2eid are new
        "npu::npu_grouped_matmul_swiglu_quant_v2",  # float as dequant_dtype was 0, and is 6
        "npu::_npu_moe_token_unpermute",  # there was none
    }
    assert set(now) == set(REFERENCES) | set(BY_DESCRIPTION) == set(then)


def test_what_has_no_meta_kernel() -> None:
    """Here nothing but the schema holds a reference to account."""
    workspaces = {name for name in REFERENCES if name.endswith("_workspace")}
    in_place = {"npu::npu_gather_pa_kv_cache", "atb::_npu_paged_attention", "atb::_npu_reshape_and_cache"}
    assert {name for name in REFERENCES if not has_meta(name)} == workspaces | in_place | WRITES_UNDECLARED


@pytest.mark.parametrize(("name", "case"), CASES)
def test_opcheck(name: str, case: str) -> None:
    has_fake = has_meta(name) and (name, case) != META_NEEDS_MORE
    checks = ["test_schema"] * (name not in WRITES_UNDECLARED | RETURNS_AN_ARGUMENT) + ["test_faketensor"] * has_fake
    if checks:
        args, kwargs = samples()[name][case]
        torch.library.opcheck(overload(name), args, kwargs, test_utils=checks)


@pytest.mark.parametrize("name", sorted(WRITES_UNDECLARED))
def test_writes_that_the_schema_conceals(name: str) -> None:
    args, kwargs = samples()[name]["paged"]
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(overload(name), args, kwargs, test_utils="test_schema")


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_the_device_computes_the_reference(name: str, case: str, way: str) -> None:
    """Through the dispatcher, on the device: results and what is written in place, in both ways of running."""
    sample = samples()[name][case]
    expected = overload(name)(*sample[0], **sample[1])
    args, kwargs = on_npu(samples()[name][case], 7 if name.startswith("atb::_npu_paged_attention") else None)
    if (tiled := IN_FRACTALS.get(name)) is not None:
        args[tiled][0] = torch_npu.npu_format_cast(args[tiled][0], 29)
    if way == "eager":
        result = overload(name)(*args, **kwargs)
    else:
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            result = overload(name)(*args, **kwargs)
        graph.replay()
    assert_same(result, expected)
    assert_same(args, sample[0])
    assert_same(kwargs.get("out"), sample[1].get("out"))


def assert_same(given: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert isinstance(given, Tensor) and given.dtype == expected.dtype
        torch.testing.assert_close(given.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, list | tuple):
        assert len(given) == len(expected)
        for pair in zip(given, expected, strict=True):
            assert_same(*pair)


@pytest.mark.parametrize(
    "name", ["npu::npu_interleave_rope", "npu::npu_kv_rmsnorm_rope_cache", "atb::_npu_flash_attention"]
)
def test_another_operator_is_an_error(name: str) -> None:
    op = overload(name)
    arguments = [
        torch.ones(2, device="npu") if str(arg.type) == "Tensor" else 1
        for arg in op._schema.arguments
        if not arg.has_default_value()
    ]
    with pytest.raises(NotImplementedError, match=f"{name} is not emulated"):
        op(*arguments)


def test_no_operator_runs_the_wheel_s_own_kernel() -> None:
    """By where the dispatcher says that each was registered: here, but for a few that run nothing on the device."""
    names = [*torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")]
    own = {name for name in names if name.startswith(("npu::", "atb::")) and not is_ours(name)}
    assert len(names) > 1400 and own == NATIVE
    aten = {name.split("::")[1].split(".")[0] for name in names if name.startswith("aten::") and not is_ours(name)}
    without_schema = {name for name in aten if not hasattr(torch.ops.aten, name)}
    assert aten - without_schema <= NATIVE_ATEN


def is_ours(name: str) -> bool:
    dump = torch._C._dispatch_dump(name)
    return any(line.startswith("PrivateUse1: ") and "tests/emulated_npu" in line for line in dump.splitlines())


def test_arguments_that_are_not_emulated() -> None:
    (query, key, value), given = on_npu(samples()["npu::npu_fused_infer_attention_score"]["paged"])
    with pytest.raises(NotImplementedError, match="pse_shift"):
        torch_npu.npu_fused_infer_attention_score(query, key, value, pse_shift=query, **given)


def test_a_tensor_of_the_host_among_the_device_s() -> None:
    x = torch.ones(2, 2, device="npu")
    assert (x + torch.tensor(1.0)).sum().item() == 8.0
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="same device"):
        torch_npu.npu_rms_norm(x, torch.ones(2))


def test_in_place_views_change_the_tensor() -> None:
    x = torch.arange(6.0, device="npu").view(2, 3)
    assert x.t_().shape == (3, 2) and x.cpu().tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert x.unsqueeze_(0).shape == (1, 3, 2) and (x + 1).shape == (1, 3, 2)


def test_inference_mode_ends_with_its_block() -> None:
    """What is at an address in inference mode does not make a tensor of inference mode out of what is there later."""
    with torch.inference_mode():
        inside = torch.empty(77, device="npu").fill_(1)
    address = inside.data_ptr()
    del inside
    outside = torch.empty(77, device="npu")
    assert outside.data_ptr() == address and outside.add_(1).isnan().all()
    with torch.inference_mode():
        assert outside.fill_(2).sum().item() == 154.0


def test_results_into_given_tensors() -> None:
    x, out = torch.arange(3.0, device="npu"), torch.empty(3, device="npu")
    assert torch.add(x, 1, out=out) is out and out.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(NotImplementedError, match=r"out= of shape \(0,\)"):
        torch.add(x, 1, out=torch.empty(0, device="npu"))


def test_format_casts_change_the_description() -> None:
    weight = torch.randn(32, 64).bfloat16().npu()
    cast = torch_npu.npu_format_cast(weight, 29)
    assert (torch_npu.get_npu_format(weight), torch_npu.get_npu_format(cast)) == (2, 29)
    assert torch.equal(cast.cpu(), weight.cpu()) and torch.equal((cast @ weight.T).cpu(), (weight @ weight.T).cpu())
    assert torch_npu.get_npu_format(torch_npu.npu_format_cast(cast, 2)) == 2
    with pytest.raises(RuntimeError, match="fractals"):
        torch_npu.npu_format_cast(torch.ones(5, 7, device="npu"), 29)
