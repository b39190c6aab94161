"""Who may call what: every route's level, every way to write a path, and keys that fail closed."""

from __future__ import annotations

import hmac
import itertools
import re
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter
from starlette.responses import JSONResponse
from starlette.routing import Mount

from serving.api.app import ROUTES
from serving.api.gate import Access, AccessGate, RouteTable, check_declared, declared_paths, presented_key
from serving.api.route import Needs, Route, access_table
from serving.config import LimitSettings
from serving.security.caller import CALLER
from serving.security.hosts import HostRule
from serving.security.keys import KeyRing, build_key_ring
from tests.security.wire import ALICE, BOB, ROOT_KEY, bearer, call, request, scope
from tests.serving.server_process import ServerProcess
from xllm.errors import ConfigError

TABLE = {"/open": Access.PUBLIC, "/use": Access.USER, "/use/{name:path}": Access.USER, "/use/admin": Access.ADMIN,
         "/item/{id}/part": Access.USER, "/admin": Access.ADMIN}
LEVELS = access_table(ROUTES)
KEYS = build_key_ring(api_keys=["user-key", "other-key"], admin_keys=["root-key"])
PATH_TRICKS = ("//{0}", "/{0}/", "/{0}//", "/./{0}", "/x/../{0}", "/{0}/.", "/{0}/..", "/{0}.", "/{0};a=b", "/{0};",
               "/{0}%00", "/{0}%20", "/%2e/{0}", "/{0}%2f", "/%2f{0}", "/{0}%3f", "/{0}%23", "/{0}\\", "/\\{0}",
               "/health/../{0}", "/health%2f..%2f{0}", "/health;/{0}", "/health?/../{0}", "/{0}#/health",
               "http://127.0.0.1/{0}", "http://x/health?/{0}", "*", "{0}", "/health%0a/{0}")


def asgi(app: Any = None, keys: KeyRing = KEYS) -> AccessGate:
    async def answer(asked: dict[str, Any], receive: Any, send: Any) -> None:
        await JSONResponse({"caller": CALLER.get().name})(asked, receive, send)

    return AccessGate(app or answer, keys, HostRule(any_name=True), LimitSettings(), TABLE)


async def status(gate: AccessGate, method: str, path: str, key: str | None = None, **options: Any) -> int:
    headers = [("Authorization", f"Bearer {key}")] if key is not None else []
    return (await call(gate, scope(method, path, headers=headers, **options)))[0]


@pytest.mark.parametrize(("path", "without", "user", "admin"), [
    ("/open", 200, 200, 200), ("/use", 401, 200, 200), ("/use/a/b", 401, 200, 200), ("/use/admin", 401, 403, 200),
    ("/item/7/part", 401, 200, 200), ("/item/7/8/part", 401, 404, 404), ("/admin", 401, 403, 200),
    ("/nothing", 401, 404, 404), ("/item/7", 401, 404, 404),
])
async def test_levels(path: str, without: int, user: int, admin: int) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "PROPFIND", "get"):
        found = [await status(asgi(), method, path, key) for key in (None, "user-key", "root-key")]
        assert found == [without, user, admin], method
        assert await status(asgi(), method, path, "wrong") == without


async def test_a_server_without_keys_keeps_its_admin_routes_closed() -> None:
    gate = asgi(keys=KeyRing())
    assert [await status(gate, "POST", path) for path in ("/open", "/use", "/nothing")] == [200, 200, 404]
    assert [await status(gate, "POST", "/admin", key) for key in (None, "", "root-key")] == [403, 403, 403]


async def test_the_stricter_of_two_readings_counts() -> None:
    """The router decodes `%61`; a parameter that swallows the raw path must not lower what the decoded one needs."""
    assert await status(asgi(), "GET", "/use/admin", "user-key", raw_path="/use/%61dmin") == 403
    assert await status(asgi(), "GET", "/admin", "user-key", raw_path="/use/%2e%2e/admin") == 403
    assert await status(asgi(), "GET", "/admin", "user-key", raw_path="/%61dmin") == 404
    assert await status(asgi(), "GET", "/use", None, raw_path="/open") == 401


@pytest.mark.parametrize(("headers", "key"), [
    ([], None), ([("authorization", "Bearer k")], b"k"), ([("authorization", "bearer  k ")], b"k"),
    ([("authorization", "Basic k")], None), ([("authorization", "k")], None), ([("authorization", "Bearer")], None),
    ([("authorization", "Bearer ")], None), ([("x-api-key", "k")], b"k"), ([("x-api-key", "")], None),
    ([("x-api-key", "k"), ("authorization", "Bearer k")], b"k"),
    ([("x-api-key", "k"), ("authorization", "Bearer other")], None),
    ([("authorization", "Bearer k"), ("authorization", "Bearer other")], None),
    ([("authorization", "Bearer k"), ("authorization", "Basic x")], None),
])
def test_how_a_key_may_be_presented(headers: list[tuple[str, str]], key: bytes | None) -> None:
    assert presented_key([(name.encode(), value.encode()) for name, value in headers]) == key


def test_all_digests_are_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    ring = build_key_ring(api_keys=[f"key-{i}" for i in range(5)])
    for key in (b"key-0", b"key-4", b"none", b""):
        compared.clear()
        found = ring.find(key)
        assert len(compared) == 5
        assert all(len(a) == len(b) == 32 for a, b in compared), "digests, never the keys themselves"
        assert (found is not None) == key.startswith(b"key-")


async def test_the_caller_is_known_inside_and_forgotten_after() -> None:
    for key, name in (("user-key", "key-"), ("root-key", "admin")):
        _, body = await call(asgi(), scope("GET", "/use", headers=[("Authorization", f"Bearer {key}")]))
        assert body["caller"].startswith(name)
    assert (await call(asgi(), scope("GET", "/open")))[1]["caller"] == ""


async def test_what_is_not_http_is_closed() -> None:
    sent = []

    async def keep(message: dict[str, Any]) -> None:
        sent.append(message)

    await asgi()({"type": "websocket", "path": "/open"}, None, keep)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


# --- declarations


def test_a_route_without_a_level_stops_the_start() -> None:
    routes = APIRouter()

    @routes.get("/v1/brand_new")
    async def brand_new() -> None: ...

    with pytest.raises(ConfigError, match=r"/v1/brand_new: add a line to ROUTES"):
        check_declared(declared_paths(routes.routes), LEVELS)
    check_declared(declared_paths(routes.routes), {**LEVELS, "/v1/brand_new": Access.USER})


def test_declarations_that_contradict_each_other_stop_the_start() -> None:
    def route(method: str, access: Access) -> Route:
        async def answer(state: Any, request: Any) -> JSONResponse:
            return JSONResponse({})

        return Route(method, "/x", access, None, answer, Needs.NOTHING)

    assert access_table([route("GET", Access.USER), route("POST", Access.USER)]) == {"/x": Access.USER}
    with pytest.raises(ConfigError, match="different access levels"):
        access_table([route("GET", Access.USER), route("POST", Access.ADMIN)])
    with pytest.raises(ConfigError, match="GET /x is declared twice"):
        access_table([route("GET", Access.USER), route("GET", Access.USER)])
    with pytest.raises(ConfigError, match="method 'FETCH' is none of"):
        route("FETCH", Access.USER)


def test_what_hides_routes_cannot_be_mounted() -> None:
    with pytest.raises(ConfigError, match="not a plain route"):
        declared_paths([Mount("/static", routes=[])])
    outer, inner = APIRouter(), APIRouter()
    outer.include_router(inner)
    for route in outer.routes:
        with pytest.raises(ConfigError, match="not a plain route"):
            declared_paths([route])


def test_a_level_is_a_level() -> None:
    with pytest.raises(ConfigError, match="not an access level"):
        RouteTable({"/x": None})  # type: ignore[dict-item]


def test_only_these_are_public() -> None:
    public = {path for path, level in LEVELS.items() if level is Access.PUBLIC}
    assert public == {"/health", "/ready", "/ping", "/version", "/", "/web/{name}"}


# --- a real server


def test_every_route_without_a_key(keyed: ServerProcess) -> None:
    for path, level in LEVELS.items():
        concrete = re.sub(r"\{[^}]*\}", "demo", path)
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "BREW"):
            for headers in ([], [("Authorization", "Bearer wrong")], [("Authorization", f"Bearer {ALICE}x")],
                            [("Authorization", f"Bearer {ALICE}"), ("Authorization", f"Bearer {BOB}")]):
                found, _ = request(keyed.url, method, concrete, headers)
                if method == "BREW":
                    assert found == 400, "what is no method of HTTP is parsed no further"
                else:
                    assert (found == 401) == (level is not Access.PUBLIC), (method, concrete, headers, found)
    assert keyed.health().status_code == 200


def test_admin_routes_take_admin_keys_only(keyed: ServerProcess, open_server: ServerProcess) -> None:
    for path in (path for path, level in LEVELS.items() if level is Access.ADMIN):
        for method in ("GET", "POST"):
            assert request(keyed.url, method, path, list(bearer(BOB).items()))[0] == 403
            assert request(open_server.url, method, path)[0] == 403, "closed where there is no admin key"
        assert request(keyed.url, "PATCH", path, list(bearer(ROOT_KEY).items()))[0] in (404, 405)


def test_a_caller_sees_no_request_of_another(keyed: ServerProcess) -> None:
    for key in (ALICE, BOB):
        body = {"prompt": "x" * len(key), "max_tokens": 1}
        assert httpx.post(f"{keyed.url}/v1/completions", json=body, headers=bearer(key)).status_code == 200
    seen = [httpx.get(f"{keyed.url}/v1/stats", headers=bearer(key)).json()["requests"]
            for key in (ALICE, BOB, ROOT_KEY)]
    numbers = [{record["number"] for record in records} for records in seen]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]
    assert {max(numbers[0]), max(numbers[1])} <= numbers[2], "an administrator sees the last of each"


@pytest.mark.parametrize(("trick", "path"), list(itertools.product(PATH_TRICKS, ["metrics", "tokenize"])))
def test_no_way_to_write_a_path_needs_no_key(keyed: ServerProcess, trick: str, path: str) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        found, body = request(keyed.url, method, trick.format(path))
        public = trick.startswith(("/health?", "http://x/health?"))  # the path is /health, and a query
        assert found in ((200, 405, 401, 400) if public else (400, 401)), (method, trick, found)
        assert b"xllm:" not in body


@pytest.mark.parametrize("trick", PATH_TRICKS)
def test_and_with_a_key_they_lead_nowhere(keyed: ServerProcess, trick: str) -> None:
    found, body = request(keyed.url, "GET", trick.format("metrics"), [("Authorization", f"Bearer {ALICE}")])
    assert found in (400, 404) or trick.startswith("/health?"), trick
    assert b"xllm:" not in body


@pytest.mark.parametrize("path", ["/METRICS", "/Metrics", "/V1/models", "/healtH"])
def test_case_counts(keyed: ServerProcess, path: str) -> None:
    assert request(keyed.url, "GET", path)[0] == 401
    assert request(keyed.url, "GET", path, [("Authorization", f"Bearer {ALICE}")])[0] == 404


def test_both_headers_and_the_real_client(keyed: ServerProcess) -> None:
    for headers in (bearer(ALICE), bearer(BOB), bearer(ROOT_KEY), {"X-Api-Key": BOB}):
        assert httpx.get(f"{keyed.url}/v1/models", headers=headers).status_code == 200
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=BOB, max_retries=0) as client:
        assert client.completions.create(model="demo", prompt="hi", max_tokens=2).usage.completion_tokens == 2


def test_no_key_is_held_or_logged(keyed: ServerProcess) -> None:
    for key in (ALICE, BOB, ROOT_KEY):
        assert key not in keyed.log
        wrong = f"x{key}"[:-1]  # not the key: a path that no route has is logged as it came
        answer = httpx.get(f"{keyed.url}/v1/{wrong}", headers=bearer(wrong))
        assert answer.status_code == 401 and wrong not in answer.text


@pytest.mark.parametrize("host", ["x/health?", "a b", "", "a@b", "127.0.0.1:x", "[::1", "a,b", "a\\b", "é.com"])
def test_a_malformed_host_is_refused(open_server: ServerProcess, keyed: ServerProcess, host: str) -> None:
    for server in (open_server, keyed):
        assert request(server.url, "GET", "/health", host=host)[0] == 400


def test_a_strangers_name_is_refused_where_no_key_protects(open_server: ServerProcess, keyed: ServerProcess) -> None:
    """DNS rebinding: a page makes its own name point here, and its requests carry that name."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert request(open_server.url, "GET", "/v1/models", host=host)[0] == 403
        assert request(keyed.url, "GET", "/v1/models", [("Authorization", f"Bearer {ALICE}")], host=host)[0] == 200
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000", "192.168.1.5"):
        assert request(open_server.url, "GET", "/v1/models", host=host)[0] == 200
    twice = [("Host", "evil.example")]
    assert request(open_server.url, "GET", "/v1/models", twice, host="localhost")[0] == 400


def test_no_page_of_another_site_may_call(open_server: ServerProcess) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "content-type"}
    preflight = open_server.http.options("/v1/completions", headers=headers)
    assert preflight.status_code == 405
    simple = open_server.http.post("/v1/completions", content='{"prompt": "x"}',
                                   headers={"Origin": "https://evil.example", "Content-Type": "text/plain"})
    assert simple.status_code == 415, "what a page may send without asking first is not taken"
    for answer in (preflight, simple, open_server.http.get("/v1/models", headers=headers)):
        assert not [name for name in answer.headers if name.startswith("access-control")]
