"""No command writes over a file that it reads, and none finds out at its end that it cannot write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from serving.commands import run_batch
from serving.commands.cli import main
from serving.commands.output_file import check_output
from serving.commands.run_batch import answer, read_found, read_lines
from xllm.errors import ConfigError

LINES = [json.dumps({"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}})
         for n in range(3)]
NOBODY = ("--url", "http://127.0.0.1:9")  # nothing may be asked, so nothing need answer


def _symlink(path: Path) -> Path:
    link = path.with_name("link")
    link.symlink_to(path)
    return link


def _folder_link(path: Path) -> Path:
    link = path.parent.with_name("link")
    link.symlink_to(path.parent)
    return link / path.name


def _hard_link(path: Path) -> Path:
    os.link(path, path.with_name("hard"))
    return path.with_name("hard")


SPELLINGS: dict[str, Callable[[Path], Path]] = {
    "same": lambda path: path, "symlink": _symlink, "folder-link": _folder_link, "hard-link": _hard_link,
    "relative": lambda path: Path(os.path.relpath(path)), "dots": lambda path: path.parent / ".." / "in" / path.name,
    "double-slash": lambda path: Path(str(path).replace("/in/", "//in//./")),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "batch.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(LINES))  # without a last line break: as a line that was cut off
    return path


@pytest.mark.parametrize("flags", [(), ("--no-resume",)], ids=["resume", "no-resume"])
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_a_batch_is_not_its_own_output(source: Path, spell: Callable[[Path], Path], flags: tuple[str, ...],
                                       capsys: pytest.CaptureFixture[str]) -> None:
    before = source.read_bytes()
    other = spell(source)
    for given, output in ((source, other), (other, source)):
        assert main(["run-batch", "-i", str(given), "-o", str(output), *NOBODY, *flags]) == 1
        assert "same file" in capsys.readouterr().err
        assert source.read_bytes() == before


@pytest.mark.parametrize("content", [
    "\n".join(LINES) + "\n",  # another batch: its lines have ids, and are no answers
    json.dumps({"architectures": ["LlamaForCausalLM"]}),  # one line without an end: not one that was cut off
    '{"id": "cmpl-1", "custom', "[1]\n", "null\n", '"text"\n', "\n\n{", "\xff\n",
])
def test_a_foreign_file_stays(source: Path, content: str, capsys: pytest.CaptureFixture[str],
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_batch, "RETRY_S", 0.0)
    output = source.with_name("other")
    output.write_bytes(content.encode("latin-1"))
    status = main(["run-batch", "-i", str(source), "-o", str(output), *NOBODY])
    shown = capsys.readouterr().err
    if content == "\n\n{":  # may be the beginning of an answer
        assert "cannot be reached" in shown
        return
    assert status == 1 and "no output of run-batch" in shown
    assert output.read_bytes() == content.encode("latin-1")


def test_answers_are_read_up_to_where_they_were_cut(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = json.dumps(answer(next(read_lines(LINES)), None, "no")) + "\n"  # type: ignore[arg-type]
    for cut in range(len(first)):
        output.write_text(first + first[:cut])
        found = read_found(output)
        assert (found.done, found.failed, found.num_bytes) == (set(), {"r0"}, len(first))
        assert output.read_text() == first + first[:cut], "reading changes nothing"


@pytest.mark.parametrize("place", ["model/config.json", "template.jinja", "keys"])
def test_a_file_of_the_server_is_not_overwritten(source: Path, place: str, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / place
    path.write_text("{}")
    flags = ["--chat-template", str(tmp_path / "template.jinja"), f"--api-key-file={tmp_path / 'keys'}"]
    assert main(["run-batch", "-i", str(source), "-o", str(path), "--no-resume", "--", str(tmp_path / "model"),
                 *flags]) == 1
    assert "same file" in capsys.readouterr().err and path.read_text() == "{}"


def test_answers_may_lie_in_the_models_folder(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = source.with_name("answers")
    good = httpx.Response(200, json={})
    output.write_text("".join(json.dumps(answer(line, good)) + "\n" for line in read_lines(LINES)))  # type: ignore[arg-type]
    before = output.read_text()
    assert main(["run-batch", "-i", str(source), "-o", str(output), *NOBODY]) == 0
    assert "3 were there already" in capsys.readouterr().out and output.read_text() == before


@pytest.mark.parametrize(("output", "message"), [("nowhere/out", "no folder"), ("in", "is a folder"),
                                                 ("in/batch.jsonl/out", "no folder")])
def test_an_output_that_cannot_be(source: Path, output: str, message: str, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run-batch", "-i", str(source), "-o", str(tmp_path / output), *NOBODY]) == 1
    assert message in capsys.readouterr().err


def test_a_batch_that_is_no_text(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.write_bytes(b"\xff\xfe")
    assert main(["run-batch", "-i", str(source), "-o", str(source.with_name("out")), *NOBODY]) == 1
    assert "UTF-8" in capsys.readouterr().err and not source.with_name("out").exists()


BENCHES = {"throughput": ("--model",), "latency": (), "kv-dtype": (), "tiers": (), "cache": ("--trace",),
           "xtensor": ("--trace",), "scheduler": None, "serve": None, "master": None}


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_checks_its_output_first(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = tmp_path / "read"
    flag = BENCHES[name]
    if flag == ("--trace",):
        read.write_text("{}")
        same = read
    else:
        read.mkdir()
        same = read / "config.json"
        same.write_text("{}")
    cases = [(tmp_path / "nowhere" / "out", "no folder"), (tmp_path, "is a folder")]
    for output, message in cases if flag is None else [*cases, (same, "same file")]:
        reading = [] if flag is None else [*flag, str(read)]
        assert main(["bench", name, *reading, "--json", str(output)]) == 1
        assert message in capsys.readouterr().err
    assert same.read_text() == "{}"


def test_a_picture_and_its_numbers_are_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace"
    trace.write_text("{}")
    both = str(tmp_path / "out")
    assert main(["bench", "cache", "--trace", str(trace), "--json", both, "--plot", both]) == 1
    assert "the same file" in capsys.readouterr().err
    assert main(["bench", "cache", "--trace", str(trace), "--plot", str(trace)]) == 1
    assert "same file" in capsys.readouterr().err and trace.read_text() == "{}"


def test_letter_case_counts_where_the_file_system_says_so(tmp_path: Path) -> None:
    path = tmp_path / "Batch"
    path.write_text("x")
    other = tmp_path / "batch"
    if other.exists():  # the same file here
        with pytest.raises(ConfigError, match="same file"):
            check_output(other, [path])
    else:
        check_output(other, [path])
