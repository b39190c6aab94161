"""Adapters over HTTP: a model's name chooses one; an admin loads and unloads them below one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.adapters import write_adapter
from tests.serving.server_process import ServerProcess, wait_for

ADMIN = "an-admin-key-of-some-length"
BODY = {"prompt": "def add(a, b):\n", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    root = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("first", "more/second", "more/third")):
        write_adapter(root / name, seed)
    flags = ("--lora-modules", f"first={root / 'first'}", "--lora-folder", str(root / "more"), "--max-loras", "2")
    with ServerProcess(root / "log.txt", *flags, "--admin-api-key", ADMIN) as server:
        yield server, root
        server.wait_idle()


@pytest.fixture(scope="module")
def admin(adapted: tuple[ServerProcess, Path]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=adapted[0].url, timeout=60, headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        yield client


def text(server: ServerProcess, model: str | None) -> str:
    answer = server.http.post("/v1/completions", json={**BODY, "model": model})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_models_name_chooses_the_adapter(adapted: tuple[ServerProcess, Path]) -> None:
    server, _ = adapted
    with server.client() as client:
        models = {model.id: model for model in client.models.list().data}
        assert models["first"].parent in models and len(models) == 2
        chat = client.chat.completions.create(model="first", max_tokens=4, messages=[{"role": "user", "content": "x"}])
        assert chat.model == "first"
    assert text(server, "first") != text(server, None)
    assert server.http.post("/v1/completions", json={**BODY, "model": "second"}).status_code == 404
    forms = [server.http.post("/generate", json={"inputs": BODY["prompt"], "parameters": {
        "max_new_tokens": 16, "adapter_id": name}}).json()["generated_text"] for name in (None, "first")]
    assert forms[0] != forms[1], "TGI's name for it"
    vectors = [server.http.post("/v1/embeddings", json={"input": "x", "model": name}).json()["data"][0]["embedding"]
               for name in (None, "first")]
    assert vectors[0] != vectors[1]


def test_loaded_and_unloaded_while_serving(adapted: tuple[ServerProcess, Path], admin: httpx.Client) -> None:
    server, _ = adapted
    plain, first = text(server, None), text(server, "first")
    assert admin.post("/v1/load_lora_adapter", json={"lora_name": "s", "lora_path": "second"}).json() == {
        "adapters": ["first", "s"]}
    second = text(server, "s")
    assert len({plain, first, second}) == 3
    full = admin.post("/v1/load_lora_adapter", json={"lora_name": "t", "lora_path": "third"})
    assert full.status_code == 409 and "max_loras" in full.text
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "s"}).json() == {"adapters": ["first"]}
    assert server.http.post("/v1/completions", json={**BODY, "model": "s"}).status_code == 404
    assert (text(server, None), text(server, "first")) == (plain, first)
    admin.post("/v1/load_lora_adapter", json={"lora_name": "s", "lora_path": "third"})
    assert text(server, "s") != second, "nothing of the old adapter is left in the cache"
    admin.post("/v1/unload_lora_adapter", json={"lora_name": "s"})


def check_a_models_names(server: ServerProcess, names: tuple[str, ...], folder: Path, flags: tuple[str, ...]) -> None:
    """Of those that the server was started with by `flags` no adapter gets one, then or at another start."""
    for name in names:
        answer = server.http.post("/v1/load_lora_adapter", headers={"Authorization": f"Bearer {ADMIN}"},
                                  json={"lora_name": name, "lora_path": folder.name})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_name", answer.text
        refused = subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0", *flags,
                                  "--lora-modules", f"{name}={folder}"], capture_output=True, text=True,
                                 timeout=60, check=False)
        assert refused.returncode == 1 and f"lora_modules: {name!r} is the served model's own" in refused.stderr


def test_an_adapter_may_not_have_the_models_name(adapted: tuple[ServerProcess, Path]) -> None:
    """Requests by that name get the model: the adapter would be there and never used."""
    check_a_models_names(adapted[0], ("demo",), adapted[1] / "more" / "second", ())


def test_an_adapter_may_not_have_a_name_that_the_model_was_given(tmp_path: Path) -> None:
    names, folder = ("chosen", "another"), tmp_path / "loras" / "v1"
    write_adapter(folder, 1)
    flags = tuple(f"--served-model-name={name}" for name in names)
    with ServerProcess(tmp_path / "log.txt", *flags, "--enable-lora", "--lora-folder", str(folder.parent),
                       "--admin-api-key", ADMIN) as server:
        check_a_models_names(server, names, folder, flags)
        assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == list(names)


@pytest.mark.parametrize("path", ["..", "../first", ".", "", "/etc", "second/../../first", "nowhere",
                                  "second/adapter_config.json"])
def test_nothing_outside_the_folder_is_read(adapted: tuple[ServerProcess, Path], admin: httpx.Client,
                                            path: str) -> None:
    answer = admin.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_path"
    assert str(adapted[1]) not in answer.text


def test_links_are_followed_before_they_are_believed(adapted: tuple[ServerProcess, Path], admin: httpx.Client) -> None:
    link = adapted[1] / "more" / "link"
    link.symlink_to(adapted[1] / "first")
    assert admin.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "link"}).status_code == 400


def test_who_may_and_what_is_wrong(adapted: tuple[ServerProcess, Path], admin: httpx.Client) -> None:
    body = {"lora_name": "x", "lora_path": "second"}
    assert adapted[0].http.post("/v1/load_lora_adapter", json=body).status_code == 401
    for wrong in ({"lora_name": "", "lora_path": "second"}, {"lora_name": "first", "lora_path": "second"}):
        answer = admin.post("/v1/load_lora_adapter", json=wrong)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_name"
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 400


def write_slow_adapter(folder: Path, seed: int) -> None:
    """An adapter whose settings come through a pipe: whoever reads it waits."""
    write_adapter(folder, seed)
    (folder / "adapter_config.json").rename(folder / "settings")
    os.mkfifo(folder / "adapter_config.json")


@contextmanager
def while_reading(folder: Path, settings: str | None = None) -> Iterator[None]:
    """Within, somebody waits for the settings; behind it they are given, and from then on they are in a file."""
    file = folder / "adapter_config.json"
    with file.open("w") as pipe:  # opens as soon as it is read
        yield
        (folder / "settings").replace(file)
        pipe.write(settings or file.read_text())


def load_in_background(admin: httpx.Client, name: str) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(
        admin.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name})))
    thread.start()
    return thread, answers


def test_reading_an_adapter_holds_up_nobody(adapted: tuple[ServerProcess, Path], admin: httpx.Client) -> None:
    """Streams go on while an adapter is read, other commands are answered, and it is entered when it is there."""
    server, root = adapted
    folder = root / "more" / "slow"
    write_slow_adapter(folder, 7)
    thread, answers = load_in_background(admin, "slow")
    with while_reading(folder):
        with server.client() as client:
            stream = client.completions.create(model="first", prompt="x", max_tokens=200, stream=True,
                                               extra_body={"ignore_eos": True})
            assert sum(1 for _ in stream) > 100
        assert server.http.post("/v1/completions", json={**BODY, "model": "slow"}).status_code == 404
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "slow"}).status_code == 400
        assert not answers
    thread.join(30)
    assert answers[0].json() == {"adapters": ["first", "slow"]}
    assert text(server, "slow") not in (text(server, "first"), text(server, None))
    admin.post("/v1/unload_lora_adapter", json={"lora_name": "slow"})


def test_what_is_wrong_is_said_when_it_has_been_read(adapted: tuple[ServerProcess, Path], admin: httpx.Client) -> None:
    server, root = adapted
    write_slow_adapter(root / "more" / "wrong", 8)
    thread, answers = load_in_background(admin, "wrong")
    with while_reading(root / "more" / "wrong", '{"peft_type": "OFT"}'):
        assert server.http.get("/health").json()["status"] == "ok"
    thread.join(30)
    assert answers[0].status_code == 400 and "only LORA is built" in answers[0].text
    assert str(root) not in answers[0].text


def test_two_of_one_name_at_once(adapted: tuple[ServerProcess, Path], admin: httpx.Client) -> None:
    """Whichever was read first has the name."""
    write_slow_adapter(adapted[1] / "more" / "twice", 9)
    (first, answers), (second, others) = (load_in_background(admin, "twice") for _ in range(2))
    with while_reading(adapted[1] / "more" / "twice"):
        pass
    first.join(30)
    second.join(30)
    found = {answer.status_code: answer.text for answer in answers + others}
    assert found.keys() == {200, 400} and "is loaded already" in found[400]
    admin.post("/v1/unload_lora_adapter", json={"lora_name": "twice"})


def test_an_engine_that_comes_back_has_the_adapters_of_the_last_one(
        adapted: tuple[ServerProcess, Path], admin: httpx.Client) -> None:
    """Also where that is not what it starts with: `first` is another one by then, and later there is none."""
    server, _ = adapted
    first = text(server, "first")
    for path in ("second", None):
        admin.post("/v1/unload_lora_adapter", json={"lora_name": "first"})
        if path is not None:
            admin.post("/v1/load_lora_adapter", json={"lora_name": "first", "lora_path": path})
            expected = text(server, "first")
            assert expected != first
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for(lambda: server.http.get("/ready").status_code != 200, what="the end of the engine")
        wait_for(lambda: server.http.get("/ready").status_code == 200, 60.0, what="another engine")
        if path is not None:
            assert text(server, "first") == expected
    assert server.http.post("/v1/completions", json={**BODY, "model": "first"}).status_code == 404
