"""Whose a call was stands in its log line, by name; keys and what was refused to a stranger do not."""

from __future__ import annotations

from tests.security.wire import ALICE, ROOT_KEY
from tests.serving.server_process import ServerProcess, wait_for


def test_names_and_no_keys(keyed: ServerProcess) -> None:
    wrong = "sk-a-wrong-key-of-some-length"
    for name, headers in (("lines-alice", {}), ("lines-nobody", {"Authorization": f"Bearer {wrong}"}),
                          ("lines-admin", {"Authorization": f"Bearer {ROOT_KEY}"})):
        keyed.http.get("/v1/models", headers={"X-Request-Id": name, **headers})
    keyed.http.get("/metrics", headers={"X-Request-Id": "lines-probe"})  # alice may not
    wait_for(lambda: "lines-probe" in keyed.log, what="the last line")
    lines = {name: line for line in keyed.log.splitlines() for name in ("alice", "nobody", "admin", "probe")
             if f" request_id=lines-{name} " in line}
    assert " GET /v1/models 200 finished " in lines["alice"] and " key=alice " in lines["alice"]
    assert " GET /v1/models 401 refused " in lines["nobody"] and " key=" not in lines["nobody"]
    assert " key=admin " in lines["admin"]
    assert " GET /metrics 403 refused " in lines["probe"]
    assert not any(secret in keyed.log for secret in (wrong, ALICE, ROOT_KEY))
