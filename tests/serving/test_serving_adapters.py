"""What a server knows of its adapters: names, folders it may read, what becomes of them when a worker dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from llmctl.errors import (
    CheckpointError,
    LlmctlError,
    ModelNotFoundError,
    NotReadyError,
    PermissionDeniedError,
    RequestError,
    UsageError,
)
from llmctl.serving.adapters import AdapterModule, Adapters, ServedAdapter, parse_modules, path_below
from llmctl.serving.wire import (
    AdapterLoaded,
    AdapterRefused,
    Command,
    ErrorInfo,
    ForgetAdapter,
    KnowAdapter,
    LoadAdapter,
)

SQL, OTHER = AdapterModule("sql", Path("/a/sql")), AdapterModule("other", Path("/a/other"), "base")


class Offered:
    """Adapters whose worker is the test."""

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.adapters = Adapters(self.sent.append)

    async def load(self, module: AdapterModule, adapter_id: str) -> ServedAdapter:
        task = asyncio.create_task(self.adapters.load(module))
        await asyncio.sleep(0)
        assert self.sent.pop() == LoadAdapter(module.name, str(module.path))
        self.adapters.on_event(AdapterLoaded(module.name, adapter_id))
        self.sent.remove(KnowAdapter(adapter_id, str(module.path)))
        return await task


def offered(story: Callable[[Offered], Awaitable[None]]) -> None:
    asyncio.run(story(Offered()))  # type: ignore[arg-type]


def test_what_is_loaded_is_found_by_name_and_what_is_unloaded_is_not() -> None:
    async def story(it: Offered) -> None:
        sql = await it.load(SQL, "1")
        other = await it.load(OTHER, "2")
        assert (sql.id, sql.parent, other.parent) == ("1", "", "base")
        assert list(it.adapters) == [sql, other]
        assert (it.adapters.find("sql"), it.adapters.find("x"), it.adapters.find(None)) == (sql, None, None)
        assert it.adapters.unload("sql") is sql
        assert it.sent == [ForgetAdapter("1")]
        with pytest.raises(ModelNotFoundError, match="no adapter 'sql' is loaded"):
            it.adapters.unload("sql")

    offered(story)


def test_one_that_two_names_have_is_forgotten_with_the_second() -> None:
    """With the first its folder may go, too: what is evicted is read from the other's."""

    async def story(it: Offered) -> None:
        await it.load(SQL, "1")
        await it.load(OTHER, "1")
        it.adapters.unload("sql")
        assert it.sent == [KnowAdapter("1", "/a/other")]
        it.adapters.unload("other")
        assert it.sent[1:] == [ForgetAdapter("1")]

    offered(story)


def test_one_that_is_loaded_while_its_like_is_unloaded_is_known() -> None:
    """The worker, which has read it, is told to forget that content before it says so here."""

    async def story(it: Offered) -> None:
        await it.load(SQL, "1")
        task = asyncio.create_task(it.adapters.load(OTHER))
        await asyncio.sleep(0)
        it.adapters.unload("sql")
        it.adapters.on_event(AdapterLoaded("other", "1"))
        await task
        assert it.sent[-2:] == [ForgetAdapter("1"), KnowAdapter("1", "/a/other")]

    offered(story)


def test_what_the_worker_says_of_a_load_that_was_given_up_is_nothing() -> None:
    async def story(it: Offered) -> None:
        task = asyncio.create_task(it.adapters.load(SQL))
        await asyncio.sleep(0)
        it.adapters.worker_lost(NotReadyError("the server is shutting down"))
        with pytest.raises(NotReadyError):
            await task
        it.adapters.on_event(AdapterLoaded("sql", "1"))
        assert it.adapters.find("sql") is None

    offered(story)


def test_one_that_is_replaced_is_forgotten() -> None:
    async def story(it: Offered) -> None:
        await it.load(SQL, "1")
        replaced = await it.load(SQL, "2")
        assert it.sent == [ForgetAdapter("1")]
        assert it.adapters.find("sql") == replaced

    offered(story)


def test_a_refusal_leaves_what_was_there() -> None:
    async def story(it: Offered) -> None:
        before = await it.load(SQL, "1")
        task = asyncio.create_task(it.adapters.load(SQL))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="'sql' is being loaded"):
            await it.adapters.load(SQL)
        it.adapters.on_event(AdapterRefused("sql", ErrorInfo.of(CheckpointError("damaged"))))
        with pytest.raises(LlmctlError, match="damaged"):
            await task
        assert it.adapters.find("sql") is before

    offered(story)


def test_a_dead_worker_ends_what_is_loaded_and_the_next_is_told() -> None:
    """Also of one that is unloaded and has requests: those that survive are served with it, new ones are not taken."""

    async def story(it: Offered) -> None:
        sql, other = await it.load(SQL, "1"), await it.load(OTHER, "2")
        task = asyncio.create_task(it.adapters.load(AdapterModule("third", Path("/a/third"))))
        await asyncio.sleep(0)
        it.adapters.unload("other")
        it.adapters.worker_lost(NotReadyError("gone"))
        with pytest.raises(NotReadyError, match="gone"):
            await task
        it.sent.clear()
        it.adapters.worker_back([other, sql])
        assert it.sent == [KnowAdapter("2", "/a/other"), KnowAdapter("1", "/a/sql")]
        assert it.adapters.find("other") is None

    offered(story)


def test_the_answer_to_a_client_that_has_gone_is_taken_in() -> None:
    async def story(it: Offered) -> None:
        task = asyncio.create_task(it.adapters.load(SQL))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        it.adapters.on_event(AdapterLoaded("sql", "1"))
        assert it.adapters.find("sql") is not None

    offered(story)


def test_modules_by_name_and_path_or_as_vllms_json(tmp_path: Path) -> None:
    folder = str(tmp_path)
    found = parse_modules([f"a={folder}", f'{{"name": "b", "path": "{folder}", "base_model_name": "org/x"}}'], ["m"])
    assert found == (AdapterModule("a", tmp_path.resolve()), AdapterModule("b", tmp_path.resolve(), "org/x"))
    refused = {
        ("a",): "expected NAME=PATH, found 'a'",
        ("=x",): "expected NAME=PATH",
        ("a=",): "expected NAME=PATH",
        ('{"name": 5, "path": "x"}',): "not a module",
        ('{"name": "a", "path": "x", "rank": 5}',): "unknown field",
        (f"m={folder}",): "found 'm' twice",
        (f"a={folder}", f"a={folder}"): "found 'a' twice",
        ("a=/nowhere",): "a=/nowhere: no such folder",
        (f"a,b={folder}",): "printable and without commas, found 'a,b'",
        (f"a\x1b[31m={folder}",): r"found 'a\\x1b\[31m'",
        (f"a\n={folder}",): r"found 'a\\n'",
        (f"{'a' * 257}={folder}",): "at most 256 characters",
    }
    for given, said in refused.items():
        with pytest.raises(UsageError, match=said):
            parse_modules(given, ["m"])


def test_only_folders_below_the_one_are_read(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a" / "b", outside):
        folder.mkdir(parents=True)
    (root / "file").write_text("")
    (root / "out").symlink_to(outside)
    (root / "in").symlink_to(root / "a")
    (root / "loop").symlink_to(root / "loop")
    inside = {
        "a": "a",
        "a/b": "a/b",
        "a/../a": "a",
        "in/b": "a/b",
        str(root / "a"): "a",
        "./": "",
        "out/../root/a": "a",
    }
    for given, expected in inside.items():
        assert path_below(str(root), given) == (root / expected).resolve(), given
    for given in (
        "..",
        "../outside",
        "out",
        "out/x",
        "/",
        "/etc/passwd",
        str(outside),
        "a/../../outside",
        "in/../../..",
    ):
        with pytest.raises(PermissionDeniedError, match="outside it"):
            path_below(str(root), given)
    for given in ("x", "file", "a/x", "loop", "x" * 300, "a\0b"):
        with pytest.raises(ModelNotFoundError):
            path_below(str(root), given)
