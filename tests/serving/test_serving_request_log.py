"""The request log: its lines, and that it survives full disks, moved and deleted files and readers that do not read."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from request_records import record, refused, wait_until

from llmctl.errors import UsageError
from llmctl.serving import request_log
from llmctl.serving.keys import ServerKeys
from llmctl.serving.redaction import REDACTED, Redactor
from llmctl.serving.request_log import RequestLog

REDACTOR = Redactor(ServerKeys("sk-secret"))


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "FLUSH_SECONDS", 0.01)


@contextmanager
def writing(path: Path | str) -> Iterator[RequestLog]:
    made = RequestLog(str(path), REDACTOR)
    try:
        yield made
    finally:
        made.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def ids(path: Path) -> list[str]:
    return [line["request_id"] for line in lines(path)]


def test_lines_are_as_documented(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with writing(file) as made:
        made.write(record())
        made.write(refused())
    finished, bad = lines(file)
    assert finished == {
        "time": "2027-01-15T08:00:12.500000Z",
        "request_id": "r0",
        "tenant": "key alice",
        "endpoint": "/v1/completions",
        "model": "m",
        "status": 200,
        "error": None,
        "stream": True,
        "n": 1,
        "max_tokens": 3,
        "priority": -1,
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "output_tokens": 3,
        "finish_reasons": ["length"],
        "queue_s": 0.3,
        "ttft_s": 0.9,
        "e2e_s": 1.9,
        "itl_s": 0.5,
    }
    assert bad.keys() == finished.keys()
    assert {name for name, value in bad.items() if value is not None} == {
        *("time", "request_id", "tenant", "endpoint", "model", "status", "error", "finish_reasons"),
    }
    assert file.stat().st_mode & 0o077 == 0


def test_the_documentation_names_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    section = text[text.index("## Request log") :].split("\n## ")[0]
    for name in request_log.LogLine.__struct_fields__:
        assert f"`{name}`" in section, name


def test_texts_are_cut_and_have_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MOST_TEXT", 20)
    file = tmp_path / "log"
    with writing(file) as made:
        made.write(record(prompts=("my key: sk-secret", [7] * 30), outputs=("x" * 30, "")))
    (line,) = lines(file)
    assert line["prompts"] == [f"my key: {REDACTED}", [7] * 20]
    assert line["outputs"] == ["x" * 20, ""]


def test_it_is_written_while_the_server_runs(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with writing(file) as made:
        for number in range(3):
            made.write(record(number))
        wait_until(lambda: ids(file) == ["r0", "r1", "r2"])


def test_the_end_writes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "FLUSH_SECONDS", 1000.0)
    file = tmp_path / "log"
    with writing(file) as made:
        made.write(record())
        assert lines(file) == []
    assert ids(file) == ["r0"]


def test_it_is_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "log"
    for number in range(2):
        with writing(file) as made:
            made.write(record(number))
    assert ids(file) == ["r0", "r1"]


def test_a_moved_file_is_written_until_it_is_opened_again(tmp_path: Path) -> None:
    file, moved = tmp_path / "log", tmp_path / "log.1"
    with writing(file) as made:
        made.write(record(0))
        wait_until(lambda: ids(file) == ["r0"])
        file.rename(moved)
        made.write(record(1))
        wait_until(lambda: ids(moved) == ["r0", "r1"])
        assert not file.exists()
        made.reopen()
        wait_until(file.exists)
        made.write(record(2))
        wait_until(lambda: ids(file) == ["r2"])
    assert ids(moved) == ["r0", "r1"]


def test_a_deleted_file_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with writing(file) as made:
        file.unlink()
        made.write(record(1))
        wait_until(lambda: file.exists() and ids(file) == ["r1"])


def test_trouble_is_said_once_and_ends_without_a_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    file = folder / "log"
    with caplog.at_level(logging.WARNING), writing(file) as made:
        file.unlink()
        folder.rmdir()
        for number in range(50):
            made.write(record(number))
        wait_until(lambda: len(caplog.records) == 1)
        for number in range(50, 60):
            made.write(record(number))
        wait_until(lambda: not made._records)
        folder.mkdir()
        wait_until(lambda: file.exists() and len(file.read_bytes().splitlines()) == 60)
        wait_until(lambda: len(caplog.records) == 2)
    assert ids(file) == [f"r{number}" for number in range(60)]
    assert [r.getMessage() for r in caplog.records] == [
        f"--request-log {file}: No such file or directory; the server goes on",
        f"--request-log {file} is written again",
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_takes_no_more_than_its_bound_and_another_file_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "_MOST_UNWRITTEN_BYTES", 4000)
    file = tmp_path / "log"
    file.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING), writing(file) as made:
        for number in range(100):
            made.write(record(number))
        wait_until(lambda: not made._records)
        kept = len(made._lines)
        assert 4000 < sum(map(len, made._lines)) < 5000
        file.unlink()
        made.reopen()
        wait_until(lambda: len(caplog.records) == 3)
    assert ids(file) == [f"r{number}" for number in range(kept)]
    said = [r.getMessage() for r in caplog.records]
    assert said[0] == f"--request-log {file}: No space left on device; the server goes on"
    assert said[2] == f"--request-log {file}: {100 - kept} records are lost"


def test_what_takes_a_part_of_a_line_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, file = os.write, tmp_path / "log"
    monkeypatch.setattr(request_log.os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    with writing(file) as made:
        made.write(record(0, tenant="x" * 1000))
    assert ids(file) == ["r0"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_disk_that_is_full_in_the_middle_of_a_line(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, file, calls = os.write, tmp_path / "log", []

    def half(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(request_log.os, "write", half)
    with writing(file) as made:
        made.write(record(1))
        wait_until(lambda: len(calls) > 2)
        if moved:
            file.rename(tmp_path / "log.1")
            made.reopen()
            wait_until(file.exists)
        monkeypatch.setattr(request_log.os, "write", write)
        wait_until(lambda: file.read_bytes().endswith(b"\n"))
    assert ids(file) == ["r1"]


def test_it_never_holds_more_than_its_bound_of_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of a pipe that does not read: the thread waits in its write."""
    monkeypatch.setattr(request_log, "MOST_RECORDS", 100)
    monkeypatch.setattr(request_log, "_CLOSE_SECONDS", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with caplog.at_level(logging.ERROR), writing(pipe) as made:
            made.write(record(0, tenant="x" * 2**20))
            wait_until(lambda: _reads(reader))
            for number in range(1000):
                made.write(record(number))
            assert len(made._records) == 100
        assert caplog.messages == [f"--request-log {pipe}: the last 101 records are lost"]
    finally:
        os.close(reader)
        made._thread.join()


def _reads(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        return bool(os.read(descriptor, 1))
    return False


def test_a_file_that_cannot_be_opened_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--request-log {tmp_path}: Is a directory"):
        RequestLog(str(tmp_path), REDACTOR)


def test_stdout() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from request_records import record\n"
        "from llmctl.serving.keys import ServerKeys\n"
        "from llmctl.serving.redaction import Redactor\n"
        "from llmctl.serving.request_log import RequestLog\n"
        "made = RequestLog('-', Redactor(ServerKeys())); made.write(record()); made.reopen(); made.close()\n"
        "print('still open')"
    )
    folder = str(Path(__file__).parent)
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    first, second = result.stdout.splitlines()
    assert json.loads(first)["request_id"] == "r0"
    assert second == "still open"


def test_a_fifo_that_nobody_reads_is_refused_and_one_with_a_reader_is_written(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match=r"--request-log .*log: "):
        RequestLog(str(fifo), REDACTOR)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with writing(fifo) as made:
        for number in range(1000):  # more than a pipe holds
            made.write(record(number))
        data = b""
        while data.count(b"\n") < 1000:
            with suppress(BlockingIOError):
                data += os.read(reader, 65536)
    os.close(reader)
    assert [json.loads(line)["request_id"] for line in data.splitlines()] == [f"r{n}" for n in range(1000)]
