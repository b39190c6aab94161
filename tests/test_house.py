"""The rules of the house (docs/structure.md), checked on the syntax trees: imports run downwards only and never in a
circle, files and constructors stay small, and nothing lies about that nobody reaches. `house.py` has what they are
computed from, `test_house_rules.py` shows that each of them refuses something."""

import ast
import subprocess
import sys

import pytest

from tests.house import (
    OWN,
    ROOT,
    complaints_of_circles,
    complaints_of_collaborators,
    complaints_of_numbers,
    complaints_of_reach,
    complaints_of_sizes,
    complaints_of_twins,
    imports,
    is_run,
    modules_of,
    parse,
    twin_classes,
    twin_modules,
    within,
)

# Which of our own modules may be imported from where; the longest matching prefix decides.
BASE = ["xllm.config", "xllm.errors", "xllm.sizes", "xllm.env", "xllm.model_files", "xllm.request", "xllm.sequence",
        "xllm.step", "xllm.stats", "xllm.shown", "xllm.child_process", "xllm.child_end", "xllm.logs", "xllm.log_writer",
        "xllm.pooling", "xllm.private_files", "xllm.structured.spec", "xllm.shared_params", "xllm.token_ids",
         "xllm.foreign", "xllm.suggestion", "xllm.run_child", "xllm.processor", "xllm.version", "xllm.json_setting",
         "xllm.setting_tree", "xllm.engine_count", "xllm.option", "xllm.node_settings", "xllm.host_port",
         "xllm.kv_events_settings", "xllm.kv_events_keys", "xllm.kv_store_settings", "xllm.progress", "xllm.kv_offer",
         "xllm.kv_layout", "xllm.transfer_settings"]
MODEL_FLOOR = [*BASE, "xllm.parallel", "xllm.layers", "xllm.models", "backends"]
RUN_FLOOR = [*MODEL_FLOOR, "xllm.cost", "xllm.kv", "xllm.scheduler", "graph", "xllm.speculative", "xllm.structured",
             "xllm.runner"]
TEXT = ["xllm.hub", "xllm.generation_config", "xllm.text"]
FRONT = ["xllm.llm", "xllm.async_llm", "xllm.answer", "xllm.inputs", "xllm.outputs"]
MESSAGES = ["xllm.worker.messages", "xllm.worker.failures", "xllm.worker.link"]
EVENTS = ["xllm.kv.block", "xllm.kv.event_wire"]  # what names a block, and what is said of it on the wire
SETTINGS = ["serving.config", "serving.limits"]
ALLOWED = {
    "cuda_ops": ["cuda_ops"],
    "npu_ops": ["npu_ops"],
    "backends": ["backends"],
    "backends.cuda": ["backends", "cuda_ops"],
    "backends.cuda_experts": ["backends", "cuda_ops"],
    "backends.cuda_latent": ["backends", "cuda_ops"],
    "backends.cuda_linear": ["backends", "cuda_ops"],
    "backends.npu": ["backends", "npu_ops"],
    "backends.npu_experts": ["backends", "npu_ops"],
    "backends.npu_graphs": ["backends", "npu_ops"],
    "backends.npu_latent": ["backends", "npu_ops"],
    "backends.npu_step": ["backends", "npu_ops"],
    "graph": ["graph", "backends"],
    **dict.fromkeys(BASE, BASE),
    "xllm.cost": [*BASE, "xllm.cost"],
    "xllm.kv": [*BASE, "xllm.cost", "xllm.kv"],
    "xllm.scheduler": [*BASE, "xllm.cost", "xllm.kv", "xllm.scheduler"],
    "xllm.parallel": MODEL_FLOOR,
    "xllm.layers": MODEL_FLOOR,
    "xllm.models": MODEL_FLOOR,
    "xllm.speculative": [*RUN_FLOOR],
    "xllm.structured": [*BASE, "xllm.structured"],
    "xllm.runner": RUN_FLOOR,
    "xllm.transfer": [*BASE, "xllm.kv", "xllm.transfer"],
    "xllm.worker": [*RUN_FLOOR, *TEXT, "xllm.transfer", "xllm.worker"],
    **{name: [*BASE, "xllm.kv.moves", *MESSAGES] for name in MESSAGES},
    # It speaks to workers in messages and holds nothing of what they hold.
    "xllm.engine": [*BASE, "xllm.cost", "xllm.kv", "xllm.scheduler", "xllm.engine", "xllm.worker.open", *MESSAGES],
    "xllm.integrations": [*BASE, "xllm.kv.store_client", "xllm.integrations"],  # what runs inside other engines
    "xllm.text": [*BASE, "xllm.text"],
    "xllm.routing": [*BASE, *EVENTS, "xllm.cost", "xllm.routing"],
    "xllm.client": [*BASE, *TEXT, *EVENTS, "xllm.engine", "xllm.routing", "xllm.client"],
    **{name: [*BASE, *TEXT, *FRONT, "xllm.structured", "xllm.engine", "xllm.client"] for name in FRONT},
    "xllm": ["xllm", "backends", "graph"],
    "xllm.__main__": ["serving.commands.cli"],  # `python -m xllm` is the command, which lives above; nothing imports it
    "serving": ["serving", "xllm"],
    "serving.limits": ["xllm"],
    "serving.cluster_access": ["xllm"],
    "serving.parsers": ["serving.parsers", "xllm"],
    "serving.config": ["serving.cluster_access", "serving.limits", "serving.parsers", "xllm"],
    "serving.security": ["serving.security", *SETTINGS, "xllm"],
    "serving.security.hosts": ["serving.api.errors", "xllm"],  # it refuses as the API does
    "serving.cluster": ["serving.cluster", "xllm"],
    "serving.observe": ["serving.observe", "serving.security", *SETTINGS, "xllm"],
    "serving.engine": ["serving.engine", "serving.observe", "serving.security", *SETTINGS, "xllm"],
    "serving.api": ["serving.api", "serving.engine", "serving.observe", "serving.parsers", "serving.security",
                    *SETTINGS, "xllm"],
    "serving.commands": ["serving", "xllm"],
    "serving.commands.doctor": ["serving", "xllm", "backends"],  # it looks at devices
    "serving.commands.bench": ["serving", "xllm", "backends"],  # it measures parts
    "benchmarks": ["benchmarks", "serving", "xllm", "backends", "graph", "cuda_ops", "npu_ops"],
    "tools": ["tools", "serving", "xllm"],
}
NO_TORCH = [*BASE, "xllm.cost", "xllm.kv", "xllm.routing", "xllm.scheduler", "xllm.transfer", "xllm.engine", *MESSAGES,
            "serving"]
# What breaks a rule today. An entry goes with the change that mends it: the tests fail while a mended one stands here.
KNOWN_CIRCLES: list[frozenset[str]] = []
KNOWN_COLLABORATORS: list[str] = []
# A name stands for one thing. These stand for the same thing in several places.
TWIN_MODULES = {
    "activation": "an operator of each device",
    "attention": "an operator of each device, and its layer",
    "cluster": "its instances as one engine, and the route that shows them",
    "config": "the settings of the engine and those of the server",
    "experts": "operators of each device, and their layer",
    "deepseek": "a family of models: its checkpoints and its tool calls",
    "errors": "those of the engine and those of the API",
    "kv": "operators of each device",
    "latent": "operators of each device",
    "kv_codes": "number formats of the KV cache on each device",
    "linear": "an operator of each device, and its layer",
    "logits": "operators of each device",
    "lora": "an operator of each device",
    "mistral": "a family of models: its checkpoints and its tool calls",
    "norm": "operators of each device, and their layer",
    "rotary": "an operator of each device, and its table",
    "sampling": "operators of each device",
    "stats": "what an engine says about itself, and the route that shows it",
    "vmm": "virtual memory of each device, and its interface",
}
TWIN_CLASSES = {
    "Forms": "which sequences of a step attend to latents in which form, as each device needs it",
    "PackedLora": "adapters as each device packs them",
    "Pool": "pages of memory of each device",
    "RowOrder": "rows sorted by expert, as each device keeps them",
    "StepPlan": "a step as each device's attention takes it",
}
# What is built and proven and waits for the change that uses it (by its subject); taken off as it is used.
WAITING = {
    "npu_ops.rotary.mrope": "positions of images and video",
    "serving.security.addresses": "media in requests",
    "serving.security.image_header": "media in requests",
    "serving.security.media_fetch": "media in requests",
    "serving.security.media_url": "media in requests",
}
# The console command, the public names, and what is run by hand. A product module that is run as a process of its own
# (`xllm.client.engine_process`) is reached by its name in the module that starts it. vLLM imports our connector.
ENTRY_POINTS = ["xllm.__main__", "xllm", "serving.__main__", "xllm.integrations.vllm"]
RUN_BY_HAND = ("benchmarks", "tools")
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"}


MODULES = list(modules_of(ROOT).items())
SHIPPED = [(name, path) for name, path in MODULES if not name.startswith("tests")]


def rule_for(name: str) -> list[str]:
    return ALLOWED[max((p for p in ALLOWED if within(name, p)), key=len)]


@pytest.mark.parametrize(("name", "path"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_imports_run_downwards(name, path):
    allowed = rule_for(name)
    for line, target in imports(parse(path)):
        if target.split(".")[0] in OWN:
            assert any(within(target, prefix) for prefix in allowed), f"{path.name}:{line} imports {target}"


@pytest.mark.parametrize(("name", "path"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_what_is_forbidden_by_name(name, path):
    tree = parse(path)
    for line, target in imports(tree):
        top = target.split(".")[0]
        assert top not in PICKLES, f"{path.name}:{line} imports {target}"
        if any(within(name, prefix) for prefix in NO_TORCH):
            assert top != "torch" or name.startswith("serving."), f"{path.name}:{line} imports torch"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        where = f"{path.name}:{node.lineno}"
        if owner == "torch":
            device_floor = name.startswith(("backends", "cuda_ops", "npu_ops", "benchmarks"))
            assert node.attr not in ("cuda", "npu") or device_floor, f"{where} uses torch.{node.attr}"
            assert node.attr != "load", f"{where} uses torch.load"
        if owner == "os" and node.attr in ("environ", "getenv", "putenv"):
            assert name == "xllm.env" or name.startswith(("tools", "benchmarks")), f"{where} reads the environment"
        assert node.attr not in ("recv_pyobj", "send_pyobj"), f"{where} sends pickles"


def test_nothing_above_the_devices_asks_which_one_it_is():
    """What differs is a fact of `Backend`, so that one more device changes nothing up there."""
    names = {"cpu", "cuda", "npu"}
    for name, path in SHIPPED:
        for node in ast.walk(parse(path)) if name.startswith(("graph", "xllm", "serving")) else ():
            if isinstance(node, ast.Compare):
                asked = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)} & names
                assert not asked, f"{path.name}:{node.lineno} asks whether the device is {asked}"


@pytest.mark.parametrize(("name", "path"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_light_modules_do_not_pull_torch_at_import(name, path):
    if any(within(name, prefix) for prefix in NO_TORCH):
        for line, target in imports(parse(path), lazy=False):
            assert target.split(".")[0] not in ("torch", "transformers"), f"{path.name}:{line} imports {target}"


@pytest.mark.parametrize("module", ["xllm", "xllm.scheduler.scheduler", "xllm.kv.manager", "serving.commands.cli"])
def test_importing_it_loads_no_torch(module):
    code = f"import sys, {module}; print(sorted(m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_is_listed_for_installation():
    listed = (ROOT / "pyproject.toml").read_text()
    for top in ("xllm", "backends", "serving", "graph", "cuda_ops", "npu_ops"):
        for init in (ROOT / top).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            assert f'"{name}"' in listed, f"{name} is not in pyproject.toml"


def test_nothing_says_where_or_by_whom_it_was_made():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".c", ".txt", "") and path.is_file():
            text = path.read_text(errors="ignore")
            for word in ("/wor" + "k/main", "/roo" + "t/", "/opt/whe" + "els"):
                assert word not in text, f"{name} names a path of one machine: {word}"


def test_no_imports_run_in_a_circle():
    assert complaints_of_circles(dict(MODULES), KNOWN_CIRCLES) == []


def test_no_file_is_too_long():
    assert complaints_of_sizes(ROOT) == []


def test_no_class_needs_too_many_others():
    assert complaints_of_collaborators(dict(SHIPPED), KNOWN_COLLABORATORS) == []


def test_every_number_says_where_it_comes_from():
    product = {name: path for name, path in SHIPPED if not name.startswith(RUN_BY_HAND)}
    assert complaints_of_numbers(product) == []


def test_no_name_stands_for_two_things():
    product = {name: path for name, path in SHIPPED if not name.startswith(RUN_BY_HAND)}
    assert complaints_of_twins(twin_modules(product), TWIN_MODULES) == []
    assert complaints_of_twins(twin_classes(product), TWIN_CLASSES) == []


def test_few_modules_lie_loose_in_serving():
    loose = [path.name for path in (ROOT / "serving").glob("*.py") if not path.name.startswith("__")]
    assert len(loose) <= 6, loose


def test_every_module_is_reached_from_an_entry_point():
    by_hand = [name for name, path in SHIPPED if name.startswith(RUN_BY_HAND) and is_run(parse(path))]
    assert complaints_of_reach(dict(SHIPPED), [*ENTRY_POINTS, *by_hand], WAITING) == []
