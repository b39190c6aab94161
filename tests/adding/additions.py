"""One of each thing that docs/adding.md says how to add, as new files and the lines that they need elsewhere."""

from __future__ import annotations

from tests.adding.draw import MAX_GAP
from tests.adding.scratch import Addition, Edit, after

REQUEST, TYPES, CONFIG = "xllm/request.py", "serving/api/types.py", "xllm/config.py"
REGISTRY = "xllm/models/model_registry.py"
NGRAM_BODY = ("            found.append(_forbidden(completed))",
              "        if self.sampling.no_repeat_ngram_size:",
              "            found.append(_forbidden(_repeats(output, self.sampling.no_repeat_ngram_size)))")
NGRAM_FUNCTION = '''def _repeats(output: np.ndarray, size: int) -> list[int]:
    """Tokens that would end an n-gram of that size for the second time."""
    if len(output) < size:
        return []
    grams = np.lib.stride_tricks.sliding_window_view(output, size)
    is_last = (grams[:, :-1] == output[len(output) - size + 1 :]).all(axis=1)
    return np.unique(grams[is_last, -1]).tolist()


def _forbidden('''
SOFTCAP = '''class SoftcapOp(Protocol):
    def __call__(self, x_TX: Tensor, cap: float) -> None:
        """x = cap * tanh(x / cap), in place, computed in fp32."""
        ...


# Not in every step'''
SOFTCAP_TRUTH = '''    return F.silu(gate_TF) * up_TF


def softcap(x_TX: Tensor, cap: float) -> None:
    x_TX.copy_(cap * (x_TX.float() / cap).tanh())
'''
SOFTCAP_CALL = '''    def softcap(self, x_TX: Tensor, cap: float) -> None:
        if x_TX.dtype is not FP32 or not x_TX.is_contiguous():
            return activation.softcap(x_TX, cap)
        self.softcap_c(x_TX.data_ptr(), x_TX.numel(), cap)

    def silu_mul('''
SOFTCAP_KERNEL = '''/* x = cap * tanh(x / cap) */
EXPORT void xllm_softcap(float *x, int64_t n, float cap) {
    for (int64_t i = 0; i < n; i++) x[i] = cap * tanhf(x[i] / cap);
}

EXPORT void xllm_silu_mul('''

ADDITIONS = (
    Addition(name="a sampling parameter that edits logits", most=8, edits=(
        after(REQUEST, "    repetition_penalty: float = 1.0", "    no_repeat_ngram_size: int = 0  # 0: any may repeat"),
        after(REQUEST,
              '    "repetition_penalty": (0.0, 100.0, False, True), "seed": (-(2**63), 2**64 - 1, True, False),',
              '    "no_repeat_ngram_size": (0, 2**31 - 1, True, False),'),
        after(REQUEST, "            or self.bad_words_token_ids", "            or self.no_repeat_ngram_size"),
        Edit(TYPES, "    repetition_penalty: float | None = None\n",
             "    repetition_penalty: float | None = None\n    no_repeat_ngram_size: int | None = None\n", times=2),
        after("xllm/runner/logit_edits.py", *NGRAM_BODY),
        Edit("xllm/runner/logit_edits.py", "def _forbidden(", NGRAM_FUNCTION),
    )),
    Addition(name="a sampling parameter of the draw", most=8, edits=MAX_GAP),
    Addition(name="a model family, dense", most=2, new=("xllm/models/seed_oss.py",), edits=(
        after(REGISTRY, '    "Qwen3ForCausalLM": "xllm.models.qwen3",',
              '    "SeedOssForCausalLM": "xllm.models.seed_oss",'),
    )),
    Addition(name="a model family, not dense", most=2,
             new=("xllm/models/toy_family.py = tests/models/toy_family.py",),
             edits=(after(REGISTRY, "FAMILIES = {", '    "ToyForCausalLM": "xllm.models.toy_family",'),)),
    Addition(name="an operator", most=6, edits=(
        Edit("backends/opset.py", "# Not in every step", SOFTCAP),
        after("backends/opset.py", "    silu_mul: SiluMulOp", "    softcap: SoftcapOp"),
        Edit("backends/reference/activation.py", "    return F.silu(gate_TF) * up_TF\n", SOFTCAP_TRUTH),
        after("backends/reference/__init__.py", "    silu_mul=activation.silu_mul,", "    softcap=activation.softcap,"),
        Edit("backends/cpu/elementwise.c", "EXPORT void xllm_silu_mul(", SOFTCAP_KERNEL),
        after("backends/cpu/kernels.py", '    "xllm_silu_mul": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int]),',
              '    "xllm_softcap": (None, [c_void_p, c_int64, c_float]),'),
        Edit("backends/cpu/kernels.py", "    def silu_mul(", SOFTCAP_CALL),
        after("backends/cpu/cpu.py", "        silu_mul=kernels.silu_mul,", "        softcap=kernels.softcap,"),
    )),
    Addition(name="an eviction policy", most=3, new=("xllm/kv/eviction/lifo.py",), edits=(
        after("xllm/kv/eviction/__init__.py", "from xllm.kv.eviction.lfu import LFU",
              "from xllm.kv.eviction.lifo import LIFO"),
        Edit("xllm/kv/eviction/__init__.py", '"fifo": FIFO, ', '"fifo": FIFO, "lifo": LIFO, '),
        Edit(CONFIG, '"fifo", "arc", "s3-fifo")', '"fifo", "lifo", "arc", "s3-fifo")'),
    )),
    Addition(name="a tool parser", most=2, new=("serving/parsers/tools/granite.py",), edits=(
        after("serving/parsers/parser_registry.py", '    "hermes": "hermes:HermesParser",',
              '    "granite": "granite:GraniteParser",'),
        after("serving/parsers/parser_registry.py", '    """The format that a chat template teaches its model; None '
              'where it is not certain."""', '    if "<|tool_call|>" in template:', '        return "granite"'),
    )),
    Addition(name="a setting", most=1, edits=(
        after("serving/config.py", '    port: int = option(8000, "port to listen on; 0: any free one")',
              '    max_echo_chars: int = option(4096, "longest text that /v1/echo takes")'),
    )),
    Addition(name="a route", most=2, new=("serving/api/routes/echo.py",), edits=(
        after("serving/api/app.py", '    "embeddings",', '    "echo",'),
    )),
    Addition(name="a backend", most=4, new=("backends/plain.py",), edits=(
        Edit("backends/__init__.py", '"cuda", "npu")', '"cuda", "npu", "plain")'),
        after("backends/__init__.py", "        return CpuBackend(cache_dir=cache_dir, compiled=compiled)",
              '    if name == "plain":', "        from backends.plain import PlainBackend", "",
              "        return PlainBackend()"),
        Edit(CONFIG, 'choices=("auto", "cpu", "cuda", "npu"))', 'choices=("auto", "cpu", "cuda", "npu", "plain"))'),
    )),
    Addition(name="a proposer of drafts", most=3, new=("xllm/speculative/repeat.py",), edits=(
        after("xllm/speculative/proposer_registry.py", "from xllm.speculative.proposer import Proposer",
              "from xllm.speculative.repeat import RepeatProposer"),
        Edit("xllm/speculative/proposer_registry.py", "PROPOSERS:", "def _repeat(settings: SpeculativeSettings) -> "
             "Proposer:\n    return RepeatProposer()\n\n\nPROPOSERS:"),
        Edit("xllm/speculative/proposer_registry.py", '{"ngram": _ngram}', '{"ngram": _ngram, "repeat": _repeat}'),
        Edit(CONFIG, 'choices=("ngram",))', 'choices=("ngram", "repeat"))'),
    )),
    Addition(name="a metric", most=2, edits=(
        after("xllm/stats.py", '    prefix_hits_total: int = counter(0, "prefix_cache_hits", "Tokens found in the '
              'prefix cache")',
              '    prefix_hit_sequences_total: int = counter(0, "prefix_hit_sequences",',
              '                                              "Sequences of which the prefix cache had the beginning")'),
        after("xllm/scheduler/admission.py",
              "            self._counters.cached_prompt_tokens_total += seq.num_cached_tokens",
              "            self._counters.prefix_hit_sequences_total += num_cached > 0"),
    )),
    Addition(name="a scheduling policy", most=2, edits=(
        Edit("xllm/scheduler/policy.py", "_KEYS: dict", "def _longest_job(seq: SequenceState) -> Key:\n"
             "    return (-seq.num_prompt_tokens,)\n\n\n_KEYS: dict"),
        after("xllm/scheduler/policy.py", '    "sjf": _shortest_job,', '    "ljf": _longest_job,'),
        Edit(CONFIG, '"sjf", "prefill-first"', '"sjf", "ljf", "prefill-first"'),
    )),
)
