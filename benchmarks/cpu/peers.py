"""Engines of other houses for the benchmarks, each in a process of its own, as `serving/commands/bench/engines.py` has
them. The extra `bench-peers` installs what they need, but for vLLM."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmarks.cpu.gguf import write_gguf
from benchmarks.cpu.openvino_model import write_openvino
from serving.commands.bench import engines
from serving.commands.bench.engines import EngineSet, Prompts


class VllmEngine:
    """vLLM's offline API, where it is installed."""

    def __init__(self, folder: str, threads: int):
        from vllm import LLM  # type: ignore[import-not-found]

        self._llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=2304, max_num_seqs=32,
                        enable_prefix_caching=False)

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)


class OpenvinoEngine:
    """OpenVINO GenAI's continuous batching, of the files of `write_openvino`.

    Its defaults would keep KV in 8 bits, and compute in bf16 where the processor can.
    """

    def __init__(self, folder: str, threads: int):
        import openvino_genai as genai

        schedule = genai.SchedulerConfig()
        schedule.cache_size, schedule.max_num_seqs, schedule.enable_prefix_caching = 1, 32, False  # GiB
        schedule.max_num_batched_tokens = 2304
        properties = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        tokenizer = genai.Tokenizer(folder)  # an empty one: there are no files for it
        self._genai = genai
        self._pipeline = genai.ContinuousBatchingPipeline(folder, tokenizer, schedule, "CPU", **properties)

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        import numpy as np
        import openvino as ov

        ids = [ov.Tensor(np.array([p], dtype=np.int64)) for p in prompts]
        outputs = self._pipeline.generate(ids, [self._greedy(n) for n in max_tokens])
        return sum(len(o.m_generation_ids[0]) for o in outputs)

    def _greedy(self, num_tokens: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = num_tokens, False, True
        config.eos_token_id, config.stop_token_ids = 0, {0}  # it wants some, and ignores them
        return config


class LlamacppEngine:
    """llama.cpp through the C functions of llama-cpp-python, batched as its server does it: decodes, then prompts.

    It takes the file of `write_gguf`.
    """

    BATCH = 2048  # tokens that llama_decode takes at once; the server's default

    def __init__(self, file: str, threads: int):
        import llama_cpp

        self._lib, self._threads = llama_cpp, threads
        self._silence = llama_cpp.llama_log_callback(lambda level, text, user_data: None)  # it is called later on, too
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        assert self._model, "llama.cpp does not take the model"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(self.BATCH, 0, 1)
        self._context: Any = None
        self._room = (0, 0)

    def generate(self, prompts: Prompts, max_tokens: list[int]) -> int:
        self._prepare(len(prompts), max(len(p) + n for p, n in zip(prompts, max_tokens)))
        todo = [list(p) for p in prompts]  # tokens that the context has not seen
        position, left = [0] * len(prompts), list(max_tokens)
        while any(left):
            samples = self._fill(todo, position)
            if self._lib.llama_decode(self._context, self._batch):
                raise RuntimeError("llama_decode failed")
            for seq, index in samples:
                token, left[seq] = self._argmax(index), left[seq] - 1
                todo[seq] = [token] if left[seq] else []
        return sum(max_tokens) - sum(left)

    def _prepare(self, num_seqs: int, length: int) -> None:
        """An empty context with a KV stream of `length` for each sequence, the old one if it fits."""
        lib = self._lib
        if self._room[0] == num_seqs and self._room[1] >= length:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
            return
        if self._context:
            lib.llama_free(self._context)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = num_seqs * (-(-length // 256) * 256), num_seqs, self.BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = lib.GGML_TYPE_F32
        self._context, self._room = lib.llama_init_from_model(self._model, params), (num_seqs, length)
        assert self._context, "llama.cpp does not make a context"

    def _fill(self, todo: Prompts, position: list[int]) -> list[tuple[int, int]]:
        """Take up to BATCH tokens, short rests first; returns (sequence, place in the batch) of those to sample at."""
        batch, n, samples = self._batch, 0, []
        for seq in sorted(range(len(todo)), key=lambda s: len(todo[s]) > 1):
            part = todo[seq][: self.BATCH - n]
            del todo[seq][: len(part)]
            for token in part:
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, position[seq], 1, seq
                batch.logits[n] = False
                position[seq], n = position[seq] + 1, n + 1
            if part and not todo[seq]:
                batch.logits[n - 1] = True
                samples.append((seq, n - 1))
        batch.n_tokens = n
        return samples

    def _argmax(self, index: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


ENGINES: dict[str, Any] = {
    **engines.ENGINES,
    "vllm": VllmEngine,
    "openvino": OpenvinoEngine,
    "llamacpp": LlamacppEngine,
    "llamacpp-q8": LlamacppEngine,
}

PEERS = EngineSet("benchmarks.cpu.peers", tuple(ENGINES), {
    "openvino": write_openvino, "llamacpp": write_gguf, "llamacpp-q8": partial(write_gguf, q8=True)})

if __name__ == "__main__":
    engines.worker(ENGINES, sys.argv[1], sys.argv[2], int(sys.argv[3]))
