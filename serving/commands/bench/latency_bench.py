"""`xllm bench latency`: time to the first token and between tokens, one request at a time."""

from __future__ import annotations

import random

from serving.commands.bench import report
from serving.commands.flags import FlagParser
from xllm.errors import ConfigError


def main(argv: list[str]) -> int:
    from tqdm import tqdm

    from xllm import LLM, SamplingParams

    parser = FlagParser(prog="xllm bench latency", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="local folder or Hub id; none: the bundled model")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--num-requests", type=int, default=20)
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    report.check(args.json, args.model)
    for name in ("input_len", "output_len", "num_requests"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(args, name)}")
    rng, first_ms, between_ms = random.Random(0), [], []
    params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    with LLM(args.model, max_num_seqs=1) as llm:
        vocab_size = llm.facts.vocab_size
        for i in tqdm(range(args.num_requests + 1), desc="requests"):
            prompt = [rng.randrange(vocab_size) for _ in range(args.input_len)]
            metrics = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].metrics
            if i:  # the first warms up
                assert metrics.first_token_time is not None and metrics.last_token_time is not None
                first_ms.append((metrics.first_token_time - metrics.arrival_time) * 1e3)
                gap = metrics.last_token_time - metrics.first_token_time
                between_ms.append(gap / max(1, args.output_len - 1) * 1e3)
    report.write({"model": args.model or "bundled", "input_tokens": args.input_len, "output_tokens": args.output_len,
                  "time_to_first_token_ms": report.quantiles(first_ms),
                  "time_per_output_token_ms": report.quantiles(between_ms)}, args.json)
    return 0
