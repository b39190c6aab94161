"""Published attacks by checkpoints, chat templates and media: folders that run code, files that lie, text that reaches
out of its sandbox."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.security.image_header import check_image
from serving.security.media_fetch import MediaFetcher, MediaPolicy
from serving.security.media_url import MediaError
from serving.security.paths import contained, hide_paths
from tests.security.advisories import advisory
from tests.security.test_advisories_wire import Bomb
from tests.security.test_image_header import jpeg, png
from tests.serving.server_process import ROOT, ServerProcess
from xllm.errors import RequestError, XllmError
from xllm.text.chat_template import ChatTemplate

BUNDLED = ROOT / "xllm" / "bundled"
# What reaches Python, and with it this machine, from inside a template that is not kept in a sandbox.
SSTI = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ self.__init__.__globals__ }}", "{{ cycler.__init__ }}",
    "{{ lipsum.__globals__['os'].popen('CANARY').read() }}", "{{ joiner.__init__.__globals__.os.popen('CANARY') }}",
    "{{ namespace.__init__.__globals__.os.popen('CANARY').read() }}", "{{ request.application.__globals__ }}",
    "{{ config.items() }}", "{{ get_flashed_messages.__globals__ }}", "{{ messages.__class__.__base__ }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}", "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}", "{{ ()['__class__'] }}", "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}", "{{ strftime_now.__closure__ }}", "{{ '%s'.format.__self__.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}", "{{ '{a.__init__}'.format_map({'a': 1}) }}",
    "{{ messages|map(attribute='__class__')|list }}", "{{ [1]|map('attr', '__class__')|list }}",
    "{{ messages.append(1) }}", "{{ messages[0].update({'role': 'x'}) }}", "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}", "{% import '/etc/passwd' as x %}", "{% extends '/etc/passwd' %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}", "{{ {}.__class__ }}", "{{ (1).__class__ }}",
    "{{ x.__init__.__globals__ }}", "{{ loop.__init__ }}", "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{{ caller.__globals__ }}", "{{ varargs.__class__ }}", "{{ url_for.__globals__ }}", "{{ ''.mro() }}",
)


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with everything around it that runs code where somebody loads it trustingly."""
    folder = tmp_path_factory.mktemp("home") / "secret-parent" / "evil-model"
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("__pycache__"))  # what is there later was run here
    canary = folder.parent / "canary"
    code = f"import os\nos.mkdir({str(canary)!r})\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "processing_evil", "__init__"):
        (folder / f"{name}.py").write_text(code)
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((folder / file).read_text())
        content["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil",
                               "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
                               "AutoProcessor": "other/repository--processing_evil.Evil"}
        content["custom_pipelines"] = {"x": {"impl": "modeling_evil.Evil"}}
        (folder / file).write_text(json.dumps(content))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
    attacks = "".join(f"{{% if messages[0].content == 'ssti {i}' %}}{text.replace('CANARY', f'mkdir {canary}')}"
                      "{% endif %}" for i, text in enumerate(SSTI) if "include" not in text and "import" not in text
                      and "extends" not in text)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}" + attacks)
    return folder


@pytest.fixture(scope="module")
def evil_server(evil: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("evil") / "log.txt", str(evil)) as running:
        yield running


def no_canary(folder: Path) -> bool:
    return not (folder.parent / "canary").exists()


@advisory("CVE-2025-66448", "CVE-2026-22807", "CVE-2026-27893", "CVE-2025-24357")
def test_code_beside_a_model_is_not_run(evil: Path, evil_server: ServerProcess, advisory_id: str) -> None:
    """`auto_map` and pickles: the model is loaded and serves, from safetensors and JSON alone."""
    answer = evil_server.http.post("/v1/completions", json={"prompt": "def f(", "max_tokens": 4})
    assert answer.status_code == 200
    assert no_canary(evil)
    assert not (evil / "__pycache__").exists()


@advisory("CVE-2026-5760")
@pytest.mark.parametrize("source", SSTI)
def test_templates_stay_in_their_sandbox(advisory_id: str, source: str, tmp_path: Path) -> None:
    """Refused, or rendered as nothing: no object of Python comes out, and nothing happens outside."""
    canary = tmp_path / "canary"
    messages = [{"role": "user", "content": "hello"}]
    try:
        text = ChatTemplate(source.replace("CANARY", f"mkdir {canary}"), {}).render(messages)
    except XllmError:
        text = ""
    assert not canary.exists()
    assert "<class" not in text and "<function" not in text and "root:" not in text and "0x" not in text
    assert messages == [{"role": "user", "content": "hello"}]


@advisory("CVE-2026-5760")
def test_a_models_own_template_harms_nobody(evil: Path, evil_server: ServerProcess, advisory_id: str) -> None:
    """By a real server whose checkpoint brings the attacks in its template, and by the rerank route that began it."""
    for i in range(len(SSTI)):
        body = {"messages": [{"role": "user", "content": f"ssti {i}"}], "max_tokens": 1}
        answer = evil_server.http.post("/v1/chat/completions", json=body)
        assert answer.status_code in (200, 400), answer.text
        assert str(evil.parent) not in answer.text
    for path in ("/v1/rerank", "/rerank"):
        rerank = evil_server.http.post(path, json={"query": "{{ ''.__class__ }}", "documents": ["ssti 3"]})
        assert rerank.status_code < 500
    assert no_canary(evil)
    assert evil_server.health().status_code == 200


@advisory("CVE-2025-61620", "CVE-2025-62426")
@pytest.mark.parametrize("body", [
    {"chat_template": "{% for i in range(10**9) %}{{ i }}{% endfor %}"}, {"chat_template": "{{ messages }}"},
    {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, {"chat_template_kwargs": {"tokenize": True}},
    {"chat_template_kwargs": {"messages": []}}, {"chat_template_kwargs": {"tools": ["x"] * 10}},
    {"chat_template_kwargs": {"self": 1}}, {"chat_template_kwargs": {"continue_final_message": True}},
    {"chat_template_kwargs": {"a-b": 1}}, {"chat_template_kwargs": [1]},
], ids=lambda body: json.dumps(body)[:60])
def test_templates_and_their_arguments_in_requests(open_server: ServerProcess, advisory_id: str,
                                                   body: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = open_server.http.post(path, json={"messages": [{"role": "user", "content": "x"}], **body})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] in body


@advisory("CVE-2025-62164", "CVE-2025-62372")
@pytest.mark.parametrize("value", ["", "AAAA", ["AAAA"], {"sparse": True}, 5, [[0.5] * 8]], ids=repr)
def test_no_tensors_in_requests(open_server: ServerProcess, advisory_id: str, value: Any) -> None:
    """Embeddings of prompts and of media, sparse or dense, whatever their shape: refused by name."""
    answer = open_server.http.post("/v1/completions", json={"prompt": "x", "prompt_embeds": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_embeds")
    for kind in ("image_embeds", "audio_embeds", "prompt_embeds"):
        body = {"messages": [{"role": "user", "content": [{"type": kind, kind: value}]}]}
        answer = open_server.http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


@advisory("allowed-local-media-path")
def test_paths_from_outside_stay_inside(advisory_id: str, tmp_path: Path) -> None:
    """Up, absolute, by a link, by a link to a folder, through what is not there: all the same refusal."""
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_text("x")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "media-too").mkdir()
    (tmp_path / "media-too" / "x").write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("..")
    (root / "circle").symlink_to("circle")
    (root / "inner").symlink_to("sub/a.png")
    assert contained(root, "sub/a.png") == contained(root, "inner") == contained(root, "sub/../sub/./a.png")
    messages = set()
    for name in ("../secret", "sub/../../secret", str(tmp_path / "secret"), "link", "up/secret", "circle", "none", "",
                 "../media-too/x", "..\\secret", "a\0b", "/etc/passwd", "....//secret", "sub/a.png/../../../secret",
                 "file:///etc/passwd", "%2e%2e/secret", "~/x"):
        with pytest.raises(RequestError) as raised:
            contained(root, name)
        messages.add(str(raised.value))
    assert len(messages) == 1
    assert str(tmp_path) not in messages.pop()


@advisory("allowed-local-media-path")
def test_a_checkpoint_names_no_file_outside(advisory_id: str, tmp_path: Path) -> None:
    import torch

    from xllm.errors import ModelError
    from xllm.models.weights import WeightSource

    (tmp_path / "outside.safetensors").write_bytes((BUNDLED / "model.safetensors").read_bytes()[:64])
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "sub/../../outside.safetensors",
                 "..\\outside.safetensors", "", ".", ".."):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ModelError):
            WeightSource(folder, dtype=torch.float32, device=torch.device("cpu")).__enter__()


def test_no_local_path_in_what_clients_read(evil: Path, evil_server: ServerProcess) -> None:
    """Names of models, errors and health say the folder's name at most; its path is a name for those who know it."""
    names = [card["id"] for card in evil_server.http.get("/v1/models").json()["data"]]
    assert names == ["evil-model"]
    texts = [evil_server.http.get(path).text
             for path in ("/v1/models", "/v1/models/x", "/health", "/metrics", "/ready")]
    texts += [evil_server.http.post("/v1/completions", json=body).text
              for body in ({"prompt": "x", "model": "no"}, {"prompt": "x", "max_tokens": 1}, {"prompt": 5})]
    assert not [text for text in texts if str(evil.parent) in text]
    known = evil_server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "model": str(evil)})
    assert known.status_code == 200


@pytest.mark.parametrize(("text", "shown"), [
    ("/etc/x/config.json is wrong", "config.json is wrong"), ("'/usr/a b'", "'a b'"), ("see /tmp.", "see tmp."),
    ("(file:///etc/passwd)", "(passwd)"), ("~/models/x: bad", "x: bad"), ("../a/b and ./c", "b and c"),
    ("C:\\Users\\me\\x.json", "x.json"), ("POST /v1/models is fine", "POST /v1/models is fine"), ("1/2 a/b", "1/2 a/b"),
    ("https://example.com/etc/x", "https://example.com/etc/x"), ("/", "/"), ("", ""),
])
def test_how_paths_are_hidden(text: str, shown: str) -> None:
    assert hide_paths(text) == shown


# --- files that lie


def tampered(folder: Path, header: dict[str, Any] | bytes, *, length: int | None = None, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + data)
    return folder


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@advisory("CVE-2026-53923", "CVE-2026-27940", "CVE-2025-53630", "CVE-2026-7482")
@pytest.mark.parametrize(("header", "length"), [
    ({"w": entry([4], 0, 16)}, 2**63), ({"w": entry([4], 0, 16)}, 2**64 - 1), ({"w": entry([4], 0, 16)}, 10**9),
    ({"w": entry([2**62, 4], 0, 16)}, None), ({"w": entry([2**32, 2**32], 0, 0)}, None),
    ({"w": entry([-4], 0, 16)}, None),
    ({"w": entry([4], 0, 2**63)}, None), ({"w": entry([4], 16, 0)}, None), ({"w": entry([4], -16, 0)}, None),
    ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, None), ({"w": entry([4], 8, 24)}, None),
    ({"w": entry([4], 0, 16, "F99")}, None), ({"w": entry(["4"], 0, 16)}, None), (b"{", None), (b"", 0), (b"[]", None),
    (b'{"w":' * 5000, None),
], ids=lambda value: str(value)[:50])
def test_safetensors_that_lie(advisory_id: str, header: Any, length: int | None, tmp_path: Path) -> None:
    """Lengths, offsets, overlaps and shapes that overflow: one error that names the file, and no memory is taken."""
    import torch

    from xllm.errors import ModelError
    from xllm.models.weights import WeightSource

    with pytest.raises(ModelError, match="model"), WeightSource(
            tampered(tmp_path, header, length=length, data=bytes(24)), dtype=torch.float32,
            device=torch.device("cpu")) as weights:
        weights.take("w", (4,))


@advisory("CVE-2026-53923", "CVE-2026-7482", "CVE-2025-24357", "CVE-2026-21869")
def test_other_formats_are_not_read(advisory_id: str, tmp_path: Path) -> None:
    """GGUF and pickled checkpoints: refused with words, unread."""
    import torch

    from xllm.errors import ModelError
    from xllm.models.weights import WeightSource

    gguf = b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63)
    for name in ("model.gguf", "pytorch_model.bin", "model.ckpt", "consolidated.00.pth", "model.pt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(gguf if name.endswith("gguf") else pickle.dumps(Bomb(tmp_path / "canary")))
        with pytest.raises(ModelError):
            WeightSource(folder, dtype=torch.float32, device=torch.device("cpu")).__enter__()
    result = subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0",
                             str(tmp_path / "model.gguf" / "model.gguf")], cwd=ROOT, capture_output=True, text=True,
                            timeout=120, check=False)
    assert result.returncode == 1
    assert "is a file; a model is a folder with config.json and safetensors files" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "canary").exists()


# --- media


@advisory("CVE-2026-22773", "CVE-2026-22778", "CVE-2026-5497", "CVE-2026-34755", "CVE-2025-46722")
async def test_images_are_measured_before_they_are_decoded(open_server: ServerProcess, advisory_id: str) -> None:
    """No route takes images or video, in any number; what will stand before a decoder bounds pixels, knows no JPEG
    2000, and its errors hold no address of memory. Nothing is named by a hash of pixels that forgets their shape."""
    frames = "data:video/jpeg;base64," + ",".join(["AAAA"] * 5000)
    for part in ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                 {"type": "video_url", "video_url": {"url": frames}}):
        answer = open_server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
        assert answer.status_code == 400
    assert check_image(png(1, 1)) == (1, 1)
    for content in (png(2**31, 2**31), png(65535, 65535), jpeg(65535, 65535), b"\0\0\0\x0cjP  \r\n\x87\n",
                    b"\xff\x4f\xff\x51", png(0, 1), b"junk"):
        with pytest.raises(MediaError) as raised:
            check_image(content)
        assert "0x" not in str(raised.value) and "object at" not in str(raised.value)
    with pytest.raises(MediaError, match="base64"):
        await MediaFetcher(MediaPolicy()).fetch(frames)


def test_nothing_was_left_by_any_of_them(evil: Path, evil_server: ServerProcess) -> None:
    assert no_canary(evil)
    assert "Traceback" not in evil_server.log
    assert os.listdir(evil.parent) == ["evil-model"]
