"""The engine computes without the packages that only its service needs."""

import subprocess
import sys

# What speaks to other processes.
NOT_NEEDED = ("xllm.client.process", "xllm.client.engine_process", "xllm.client.command_codec", "xllm.worker.processes",
              "xllm.worker.rank", "xllm.worker.message_codec", "xllm.shared_params", "xllm.parallel.meeting",
              "xllm.worker.nodes_link", "xllm.worker.node", "xllm.worker.node_wire",
              "xllm.client.replicas", "xllm.client.replica_control",
              "xllm.client.cluster", "xllm.client.cluster_keys", "xllm.client.cluster_members", "xllm.client.dispatch",
              "xllm.client.frame_port", "xllm.client.gate_wire", "xllm.client.kv_subscriber",
              "xllm.client.member_client", "xllm.client.openai_server", "xllm.client.openai_wire", "xllm.client.remote",
              "xllm.engine.kv_publisher", "xllm.kv.event_stream", "xllm.kv.event_wire", "xllm.kv_events_keys",
              "xllm.routing.event_feed", "xllm.routing.vllm_reader", "xllm.client.handovers", "xllm.client.role_keeper",
              "xllm.transfer.entering", "xllm.transfer.in_process", "xllm.transfer.pieces", "xllm.transfer.put_wire",
              "xllm.transfer.shared_memory", "xllm.transfer.tcp", "xllm.transfer.tcp_peer",
              "xllm.transfer.tcp_session", "xllm.transfer.transports", "xllm.transfer.way", "xllm.worker.last_word",
              "xllm.worker.publisher", "xllm.worker.worker_transfers",
              "xllm.integrations.vllm")  # which vLLM imports
CODE = """
import sys

BLOCKED = ("msgspec", "zmq", "pydantic", "fastapi", "starlette", "uvicorn", "httpx", "prometheus_client")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Finder())
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.request import Request, SamplingParams

import importlib
import pkgutil
import xllm

for module in pkgutil.walk_packages(xllm.__path__, "xllm."):
    if module.name not in NOT_NEEDED:
        importlib.import_module(module.name)

core = EngineCore(EngineConfig.from_flat(max_model_len=64, num_kv_blocks=8, num_threads=1))
core.add(Request(request_id="a", prompt_token_ids=[5, 6, 7], sampling=SamplingParams(temperature=0, max_tokens=5,
                                                                                     ignore_eos=True)))
tokens = []
while core.has_work():
    tokens += [token for delta in core.step() for token in delta.token_ids]
core.shutdown()
assert len(tokens) == 5 and core.loop.num_steps == 5, tokens
assert not [name for name in BLOCKED if name in sys.modules]
"""


def test_five_steps_without_what_only_the_service_needs():
    code = f"NOT_NEEDED = {NOT_NEEDED}\n{CODE}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
