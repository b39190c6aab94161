"""A sampling parameter that acts on the draw: `max_gap`, how far below the largest logit a token's may lie; 0: any.

It is the one that touches most: the contract, its truth, and what each device has of its own.
"""

from __future__ import annotations

from tests.adding.scratch import Edit, after

REQUEST, TYPES, REFERENCE = "xllm/request.py", "serving/api/types.py", "backends/reference/sampling.py"
CPU, KERNELS, CUDA, NPU = ("backends/cpu/sampling.c", "backends/cpu/kernels.py", "cuda_ops/sampling.py",
                           "npu_ops/sampling.py")
LOAD = "min_p = tl.load(min_p_ptr + row).to(tl.float32)"
MAX_GAP = (
    after(REQUEST, "    min_p: float = 0.0", "    max_gap: float = 0.0  # 0: none"),
    after(REQUEST, '    "top_k": (0, 2**31 - 1, True, False), "min_p": (0.0, 1.0, False, False),',
          '    "max_gap": (0.0, 1e6, False, False),'),
    Edit(REQUEST, '"min_p": Column("float32", 0.0)}', '"min_p": Column("float32", 0.0), '
         '"max_gap": Column("float32", 0.0)}'),
    Edit(TYPES, "    min_p: float | None = None\n",
         "    min_p: float | None = None\n    max_gap: float | None = None\n", times=2),
    Edit("backends/opset.py", "        uniform_S: Tensor,\n", "        max_gap_S: Tensor, uniform_S: Tensor,\n"),
    Edit("backends/opset.py", "drop tokens below min_p * largest, then keep the\n",
         "drop tokens below min_p * largest and\n        those whose logit lies more than max_gap (0: any) below the "
         "largest, then keep the\n"),

    Edit(REFERENCE, "min_p_S: Tensor, uniform_S: Tensor\n", "min_p_S: Tensor, max_gap_S: Tensor,\n"
         "    uniform_S: Tensor\n"),
    Edit(REFERENCE, "    probs = keep_top_p(", "    gap_S = torch.where(max_gap_S > 0, max_gap_S, float(\"inf\"))\n"
         "    probs = probs.masked_fill(logits_SV < (logits_SV.amax(dim=1) - gap_S)[:, None], 0.0)\n"
         "    probs = keep_top_p("),

    Edit(CPU, "const float *logits, *temperature, *top_p, *min_p;",
         "const float *logits, *temperature, *top_p, *min_p, *max_gap;"),
    Edit(CPU, "float top_p, float min_p,\n                          double uniform) {",
         "float top_p, float min_p,\n                          float max_gap, double uniform) {"),
    Edit(CPU, "    const double total = weigh(",
         "    if (max_gap > 0) min_p = MAX(min_p, expf(-max_gap / temperature));\n    const double total = weigh("),
    Edit(CPU, "c->min_p[s],\n                               c->uniform[s]);",
         "c->min_p[s],\n                               c->max_gap[s], c->uniform[s]);"),
    Edit(CPU, "const float *min_p, const double *uniform, int64_t *out,",
         "const float *min_p, const float *max_gap, const double *uniform, int64_t *out,"),
    Edit(CPU, "{logits, temperature, top_p, min_p, top_k,", "{logits, temperature, top_p, min_p, max_gap, top_k,"),
    Edit(KERNELS, '"xllm_sample": (None, [c_void_p] * 7 +', '"xllm_sample": (None, [c_void_p] * 8 +'),
    Edit(KERNELS, "top_p_S: Tensor, min_p_S: Tensor,\n        uniform_S: Tensor,",
         "top_p_S: Tensor, min_p_S: Tensor,\n        max_gap_S: Tensor, uniform_S: Tensor,"),
    after(KERNELS, "        top_k_S, uniform_S = top_k_S.long(), uniform_S.double()",
          "        max_gap_S = max_gap_S.float()"),
    Edit(KERNELS, "            uniform_S.data_ptr(), ids_S",
         "            max_gap_S.data_ptr(), uniform_S.data_ptr(), ids_S"),

    Edit(CUDA, '"min_p_ptr", "uniform_ptr"', '"min_p_ptr", "max_gap_ptr",\n           "uniform_ptr"'),
    Edit(CUDA, '"temperature_ptr", "min_p_ptr"])', '"temperature_ptr", "min_p_ptr", "max_gap_ptr"])'),
    Edit(CUDA, "sums_ptr, temperature_ptr, min_p_ptr, stride, V,\n",
         "sums_ptr, temperature_ptr, min_p_ptr, max_gap_ptr, stride, V,\n"),
    Edit(CUDA, f"        {LOAD}\n", f"        {LOAD}\n        gap = tl.load(max_gap_ptr + row).to(tl.float32)\n"
         "        min_p = tl.where(gap > 0, tl.maximum(min_p, tl.exp(-gap / temperature)), min_p)\n", times=2),
    Edit(CUDA, "top_p_ptr, min_p_ptr, uniform_ptr, values_ptr", "top_p_ptr, min_p_ptr, max_gap_ptr, uniform_ptr,\n"
         "    values_ptr"),
    Edit(CUDA, "min_p_S: Tensor, uniform_S: Tensor\n", "min_p_S: Tensor, max_gap_S: Tensor,\n    uniform_S: Tensor\n"),
    Edit(CUDA, "temperature_S, min_p_S, stride, V,", "temperature_S, min_p_S,\n           max_gap_S, stride, V,"),
    Edit(CUDA, "top_p_S, min_p_S, uniform_S, survey.values,\n           ", "top_p_S, min_p_S, max_gap_S, uniform_S,\n"
         "           survey.values, "),

    Edit(NPU, "min_p_S: Tensor,\n           uniform_S: Tensor)", "min_p_S: Tensor,\n           max_gap_S: Tensor, "
         "uniform_S: Tensor)"),
    Edit(NPU, "    kept_SV = _kept(",
         "    least_S = torch.where(max_gap_S > 0, torch.exp(-max_gap_S / temperature[:, 0]), 0.0)\n"
         "    min_p_S = torch.maximum(min_p_S, least_S)\n    kept_SV = _kept("),
)
