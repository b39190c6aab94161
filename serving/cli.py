"""The `xllm` command. Nothing heavy is imported before the subcommand is known."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from serving.config import ServerConfig
from serving.flags import FlagParser, add_flags, apply_speculative_config, tree_from
from xllm.config import EngineConfig
from xllm.errors import ConfigError, XllmError

BENCHES = ("throughput", "latency", "serve", "scheduler", "cache", "tiers", "xtensor", "kv-dtype",
           "neighbours")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 fine, 1 failed, 2 used wrongly."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["bench"]:
        return _bench(args[1:])
    try:
        namespace = build_parser().parse_args(args)
        apply_speculative_config(namespace)
        return int(_COMMANDS[namespace.command](namespace))
    except XllmError as error:
        print(f"xllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def build_parser() -> FlagParser:
    parser = FlagParser(prog="xllm", description="An LLM inference engine for Ascend NPUs, CUDA GPUs and CPUs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=FlagParser)
    serve = commands.add_parser("serve", help="serve the OpenAI API over HTTP")
    _add_engine_flags(serve)
    add_flags(serve, ServerConfig)
    generate = commands.add_parser("generate", help="complete one or more prompts in this process")
    _add_engine_flags(generate)
    _add_sampling_flags(generate)
    generate.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    generate.add_argument("--stats", action="store_true", help="say at the end how fast it was")
    chat = commands.add_parser("chat", help="talk to a model in the terminal")
    _add_engine_flags(chat)
    _add_sampling_flags(chat)
    chat.add_argument("--url", help="use this running server instead of loading a model here")
    chat.add_argument("--api-key", help="the server's key, with --url")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    batch = commands.add_parser("run-batch", help="answer a file of requests (OpenAI's batch format)")
    _add_batch_flags(batch)
    top = commands.add_parser("top", help="watch a running server in the terminal")
    _add_top_flags(top)
    commands.add_parser("bench", help=f"measure: {', '.join(BENCHES)}")
    commands.add_parser("doctor", help="say what this machine can run, and what is missing")
    return parser


def _add_engine_flags(parser: FlagParser) -> None:
    parser.add_argument("model_positional", nargs="?", metavar="MODEL",
                        help="local folder or Hub id; none: the bundled demo model")
    add_flags(parser, EngineConfig)
    parser.add_argument("--speculative-config", metavar="JSON", default=argparse.SUPPRESS,
                        help='the speculative settings in one, as {"method": "ngram", "num_speculative_tokens": 4}')


def _add_sampling_flags(parser: FlagParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=256, metavar="INT")
    parser.add_argument("--temperature", type=float, default=None, metavar="FLOAT")
    parser.add_argument("--top-p", type=float, default=None, metavar="FLOAT")


def _add_batch_flags(parser: FlagParser) -> None:
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="requests, one JSON object a line")
    parser.add_argument("-o", "--output-file", required=True, metavar="FILE", help="answers, one JSON object a line")
    parser.add_argument("--url", help="ask this running server instead of starting one")
    parser.add_argument("--api-key", help="the server's key, with --url")
    parser.add_argument("--concurrency", type=int, default=64, metavar="INT",
                        help="open requests (default %(default)s)")
    parser.add_argument("--no-resume", dest="resume", action="store_false",
                        help="begin anew instead of going on where the output file ends")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="-- FLAGS",
                        help="MODEL and flags of `xllm serve` for the server that is started")


def _add_top_flags(parser: FlagParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default %(default)s)")
    parser.add_argument("--api-key", help="the server's key")
    parser.add_argument("--interval", type=float, default=0.5, metavar="SECONDS", help="between two looks")
    parser.add_argument("--once", action="store_true", help="print one look and end")


def engine_config(namespace: argparse.Namespace) -> EngineConfig:
    """The engine's settings from the flags; MODEL and --model mean the same. Raises ConfigError."""
    if namespace.model_positional is not None:
        if "model" in namespace:
            raise SystemExit("xllm: error: the model is given twice")
        namespace.model = namespace.model_positional
    config: EngineConfig = tree_from(namespace, EngineConfig)
    return config


def _serve(namespace: argparse.Namespace) -> int:
    from serving import serve

    config, server = engine_config(namespace), tree_from(namespace, ServerConfig)
    return serve.run(config, server)


def _generate(namespace: argparse.Namespace) -> int:
    from serving import terminal

    return terminal.generate(engine_config(namespace), namespace)


def _chat(namespace: argparse.Namespace) -> int:
    from serving import terminal

    return terminal.chat(None if namespace.url else engine_config(namespace), namespace)


def _run_batch(namespace: argparse.Namespace) -> int:
    from serving import run_batch

    flags = namespace.flags[1:] if namespace.flags[:1] == ["--"] else namespace.flags
    if namespace.url and flags:
        raise ConfigError("--url names a server that runs already: it takes no flags of `xllm serve`")
    return run_batch.run(namespace, flags)


def _top(namespace: argparse.Namespace) -> int:
    from serving import top

    return top.run(namespace)


def _doctor(namespace: argparse.Namespace) -> int:
    from serving import doctor

    return doctor.main()


def _bench(args: list[str]) -> int:
    if not args or args[0] not in BENCHES:
        print(f"usage: xllm bench {{{','.join(BENCHES)}}} ...", file=sys.stderr)
        return 0 if args[:1] in (["-h"], ["--help"]) else 2
    try:
        return int(importlib.import_module(f"serving.bench.{args[0].replace('-', '_')}").main(args[1:]))
    except (XllmError, OSError) as error:
        print(f"xllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


_COMMANDS = {"serve": _serve, "generate": _generate, "chat": _chat, "run-batch": _run_batch, "top": _top,
             "doctor": _doctor}

if __name__ == "__main__":
    sys.exit(main())
