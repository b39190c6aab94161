"""The `xllm` command. Nothing heavy is imported before the subcommand is known."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import sys
from collections.abc import Sequence

from serving.commands.cluster_flags import NOT_OF_UP, ClusterUpConfig, check_instance_flags
from serving.commands.flags import (
    FlagParser,
    add_flags,
    add_foreign_flags,
    apply_speculative_config,
    flags_of,
    parse_int,
    tree_from,
)
from serving.config import ServerConfig
from serving.master_config import NOT_OF_A_MASTER, MasterConfig
from xllm import __version__, env, logs
from xllm.config import EngineConfig
from xllm.engine_count import check_nodes
from xllm.errors import ConfigError, XllmError
from xllm.foreign.table import ENGINE, FOREIGN, SERVER
from xllm.logs import FORMATS, LEVELS
from xllm.node_settings import resolve_nodes
from xllm.suggestion import nearest

BENCHES = ("throughput", "latency", "serve", "scheduler", "cache", "tiers", "xtensor", "kv-dtype",
           "neighbours", "router", "master")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 fine, 1 failed, 2 used wrongly."""
    args = list(sys.argv[1:] if argv is None else argv)
    for name in env.mistyped_names():
        print(f"xllm: warning: environment variable {name} is not read; those that are: {', '.join(env.NAMES)}",
              file=sys.stderr)
    if not args:  # as pip does
        build_parser().print_help()
        return 0
    if args[:1] == ["bench"]:
        return _bench(args[1:])
    flags: list[str] = []
    if args[:1] == ["cluster"] and "--" in args:  # what is behind it is for `xllm serve`
        args, flags = args[:args.index("--")], args[args.index("--") + 1:]
    try:
        namespace = build_parser().parse_args(args)
        namespace.instance_flags = flags
        apply_speculative_config(namespace)
        return int(_COMMANDS[namespace.command](namespace))
    except XllmError as error:
        if logs.is_json():
            logging.getLogger("xllm.cli").critical("%s", error)
        else:
            print(f"xllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def build_parser() -> FlagParser:
    """The parser of all commands and their flags. Imports nothing heavy."""
    parser = FlagParser(prog="xllm", description="An LLM inference engine for Ascend NPUs, CUDA GPUs and CPUs.")
    parser.add_argument("-V", "--version", action="version", version=f"xllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=FlagParser)
    serve = commands.add_parser("serve", help="serve the OpenAI API over HTTP")
    _add_engine_flags(serve)
    add_flags(serve, ServerConfig)
    add_foreign_flags(serve, FOREIGN)
    master = commands.add_parser("master", help="serve the OpenAI API over the instances of a cluster")
    add_flags(master, MasterConfig, skip=NOT_OF_A_MASTER)
    generate = commands.add_parser("generate", help="complete one or more prompts in this process")
    _add_engine_flags(generate)
    add_foreign_flags(generate, ENGINE)
    _add_sampling_flags(generate)
    _add_log_flags(generate)
    generate.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    generate.add_argument("--stats", action="store_true", help="say at the end how fast it was")
    chat = commands.add_parser("chat", help="talk to a model in the terminal")
    _add_engine_flags(chat)
    add_foreign_flags(chat, ENGINE)
    _add_sampling_flags(chat)
    _add_log_flags(chat)
    chat.add_argument("--url", help="use this running server instead of loading a model here")
    chat.add_argument("--api-key", help="the server's key, with --url")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    batch = commands.add_parser("run-batch", help="answer a file of requests (OpenAI's batch format)")
    _add_batch_flags(batch)
    top = commands.add_parser("top", help="watch a running server in the terminal")
    _add_top_flags(top)
    profile = commands.add_parser("profile", help="measure what steps of a model cost, and how well that is predicted")
    _add_engine_flags(profile)
    add_foreign_flags(profile, ENGINE)
    _add_log_flags(profile)
    profile.add_argument("--rounds", type=int, default=5, metavar="INT",
                         help="measurements of each point (default %(default)s)")
    profile.add_argument("--json", metavar="FILE", help="write the result to this file, with the fitted model")
    _add_cluster_flags(commands.add_parser("cluster", help="a whole cluster on this machine: `cluster up`"))
    commands.add_parser("bench", help=f"measure: {', '.join(BENCHES)}")
    doctor = commands.add_parser("doctor", help="say what this machine can run, and what is missing")
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="a local folder: say how many ranks can share it")
    doctor.add_argument("--compile", action="store_true", help="only compile the CPU's kernels, if they are not yet")
    return parser


def _add_cluster_flags(cluster: FlagParser) -> None:
    actions = cluster.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=FlagParser)
    up = actions.add_parser("up", help="start a master and instances", usage="xllm cluster up [MODEL] [flags] "
                            "[-- flags of `xllm serve` for each instance]")
    up.add_argument("--instances", dest="num_instances", type=parse_int, metavar="INT",
                    help="how many instances are started that do all of a request (default: 2, or none beside others)")
    for role in ("prefill", "decode"):
        up.add_argument(f"--{role}", dest=f"num_{role}", type=parse_int, default=0, metavar="INT",
                        help=f"how many instances in the role {role.upper()} (default: %(default)s)")
    _add_engine_flags(up)
    add_flags(up, MasterConfig, skip=(*NOT_OF_A_MASTER, *NOT_OF_UP))


def _add_engine_flags(parser: FlagParser) -> None:
    parser.add_argument("model_positional", nargs="?", metavar="MODEL",
                        help="local folder or Hub id; none: the bundled demo model")
    add_flags(parser, EngineConfig)
    parser.add_argument("--speculative-config", metavar="JSON", default=argparse.SUPPRESS,
                        help='the speculative settings in one, as {"method": "ngram", "num_speculative_tokens": 4}')


def _add_log_flags(parser: FlagParser) -> None:
    parser.add_argument("--log-level", choices=LEVELS, help="log lines of this level and above (default: what "
                        "XLLM_LOG says, or warning)")
    parser.add_argument("--log-format", choices=FORMATS, help="of log lines (default: what XLLM_LOG_FORMAT says, or "
                        "text)")


def _log_quietly(namespace: argparse.Namespace) -> None:
    logs.configure(namespace.command, level=namespace.log_level, form=namespace.log_format, default="warning")


def _add_sampling_flags(parser: FlagParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=256, metavar="INT")
    parser.add_argument("--temperature", type=float, default=None, metavar="FLOAT")
    parser.add_argument("--top-p", type=float, default=None, metavar="FLOAT")


def _add_batch_flags(parser: FlagParser) -> None:
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="requests, one JSON object a line")
    parser.add_argument("-o", "--output-file", required=True, metavar="FILE", help="answers, one JSON object a line")
    parser.add_argument("--url", help="ask this running server instead of starting one")
    parser.add_argument("--api-key", help="the server's key, with --url")
    _add_log_flags(parser)
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
    config: EngineConfig = tree_from(namespace, EngineConfig, ENGINE)
    return config


def _serve(namespace: argparse.Namespace) -> int:
    from serving.commands import serve

    logs.configure("api")  # what is said of the settings themselves
    server = tree_from(namespace, ServerConfig, SERVER)
    logs.configure("api", level=server.log.log_level, form=server.log.log_format)
    config = engine_config(namespace)
    nodes = resolve_nodes(config.nodes, env.launcher(), config.device.tensor_parallel_size)
    check_nodes(config.device, nodes)
    if nodes.node_rank:
        from serving.commands import serve_node

        logs.configure(f"node{nodes.node_rank}", level=server.log.log_level, form=server.log.log_format)
        return serve_node.run(dataclasses.replace(config, nodes=nodes))
    return serve.run(config, server)


def _master(namespace: argparse.Namespace) -> int:
    from serving.commands import master

    logs.configure("master")  # what is said of the settings themselves
    config = tree_from(namespace, MasterConfig)
    logs.configure("master", level=config.log.log_level, form=config.log.log_format)
    return master.run(config)


def master_main() -> int:
    """`xllm_master_serving`, upstream's name: the same as `xllm master`."""
    return main(["master", *sys.argv[1:]])


def _cluster(namespace: argparse.Namespace) -> int:
    from serving.commands import cluster_up

    logs.configure("master", default="warning")  # what is said of the settings themselves
    config = tree_from(namespace, ClusterUpConfig)
    logs.configure("master", level=config.log.log_level, form=config.log.log_format, default="warning")
    engine_config(namespace)  # what is wrong with it is said before anything starts
    flags = [*flags_of(namespace, EngineConfig), *namespace.instance_flags]
    instance = build_parser().parse_args(["serve", *flags])
    check_instance_flags(instance)
    apply_speculative_config(instance)
    tree_from(instance, ServerConfig, SERVER)
    engine_config(instance)
    return cluster_up.run(config, _roles(namespace), flags)


def _roles(namespace: argparse.Namespace) -> list[str]:
    """Of the instances of `xllm cluster up`. Raises ConfigError."""
    num_prefill, num_decode = namespace.num_prefill, namespace.num_decode
    if min(num_prefill, num_decode) < 0 or (num_prefill > 0) > (num_decode > 0 or (namespace.num_instances or 0) > 0):
        raise ConfigError("--prefill needs --decode, or --instances, which go on with what it has begun")
    number = namespace.num_instances
    if number is None:
        number = 0 if num_prefill or num_decode else 2
    return [*["DEFAULT"] * number, *["PREFILL"] * num_prefill, *["DECODE"] * num_decode]


def _generate(namespace: argparse.Namespace) -> int:
    from serving.commands import terminal

    _log_quietly(namespace)
    return terminal.generate(engine_config(namespace), namespace)


def _chat(namespace: argparse.Namespace) -> int:
    from serving.commands import terminal

    _log_quietly(namespace)
    return terminal.chat(None if namespace.url else engine_config(namespace), namespace)


def _run_batch(namespace: argparse.Namespace) -> int:
    from serving.commands import run_batch

    _log_quietly(namespace)
    flags = namespace.flags[1:] if namespace.flags[:1] == ["--"] else namespace.flags
    if namespace.url and flags:
        raise ConfigError("--url names a server that runs already: it takes no flags of `xllm serve`")
    return run_batch.run(namespace, flags)


def _top(namespace: argparse.Namespace) -> int:
    from serving.commands import top

    return top.run(namespace)


def _profile(namespace: argparse.Namespace) -> int:
    from serving.commands import profile

    _log_quietly(namespace)
    return profile.run(engine_config(namespace), namespace)


def _doctor(namespace: argparse.Namespace) -> int:
    from serving.commands import doctor

    if namespace.compile and namespace.model is not None:
        raise ConfigError("--compile has nothing to do with a model: leave one of them away")
    return doctor.compile_kernels() if namespace.compile else doctor.main(namespace.model)


def _bench(args: list[str]) -> int:
    usage = f"usage: xllm bench {{{','.join(BENCHES)}}} ..."
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return 0
    if args[0] not in BENCHES:
        print(f"{usage}\nxllm bench: error: unknown benchmark {args[0]!r}{nearest(args[0], BENCHES)}", file=sys.stderr)
        return 2
    from serving.commands.bench import report

    name = args[0].replace("-", "_")
    return report.ended(lambda: int(importlib.import_module(f"serving.commands.bench.{name}_bench").main(args[1:])))


_COMMANDS = {"serve": _serve, "master": _master, "cluster": _cluster, "generate": _generate, "chat": _chat,
             "run-batch": _run_batch, "top": _top, "profile": _profile, "doctor": _doctor}

if __name__ == "__main__":
    sys.exit(main())
