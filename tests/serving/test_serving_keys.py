"""API keys: files of them, what is refused without being shown, reading again, and that only digests stay."""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmctl.config import ServeConfig
from llmctl.errors import UsageError
from llmctl.serving.keys import ApiKey, ServerKeys, key_digest
from llmctl.serving.spawned import early_worker

SECRET = "sk-Tr0ub4dor"


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that holds nothing yet, for its owner alone."""
    path = tmp_path / "my keys"
    path.touch(0o600)
    return path


def test_a_file_of_keys(file: Path) -> None:
    file.write_text(
        f"# who may\n\nalice {hashed('a')}\n  bob.2\t{hashed('b').replace(hashed('b')[7:], hashed('b')[7:].upper())} "
        f"priority # the night job\r\n#carol {hashed('c')}\n",
        encoding="utf-8-sig",
    )
    keys = ServerKeys("o", None, file)
    assert [keys.find(token) for token in (b"a", b"b", b"c", b"o")] == [
        ApiKey("alice", key_digest(b"a")),
        ApiKey("bob.2", key_digest(b"b"), may_set_priority=True),
        None,
        ApiKey("0", key_digest(b"o")),
    ]
    assert len(keys) == 3
    assert keys.warning() is None


GOOD = f"alice {hashed('a')}"
BAD = {
    SECRET: "line 2: expected NAME sha256:HEX [priority], found 1 word",
    f"{SECRET} {SECRET}": "line 2: expected sha256: and 64 hexadecimal digits",
    f"bob {SECRET}": "line 2: expected sha256: and 64 hexadecimal digits",
    f"bob {hashed(SECRET)[7:]}": "line 2: expected sha256: and 64 hexadecimal digits",
    f"bob {hashed(SECRET)}0": "line 2: expected sha256: and 64 hexadecimal digits",
    f"{SECRET}/ {hashed('b')}": "line 2: expected a name",
    f"7 {hashed('b')}": "line 2: expected a name",
    f"bob {hashed('b')} {SECRET}": "line 2: expected nothing or the word priority",
    f"bob {hashed('b')} priority {SECRET}": "line 2: expected NAME sha256:HEX [priority], found 4 words",
    f"alice {hashed('b')}": "line 2: the name of line 1 again",
    f"bob {hashed('a')}": "line 2: the key of line 1 again",
    f"bob {hashed('o')}": r"line 2: a key of --api-key or --priority-keys again (number 0)",
    f"bob {hashed('')}": "line 2: the hash of an empty key",
}


@pytest.mark.parametrize(("line", "said"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_line_is_told_and_not_shown(line: str, said: str, file: Path) -> None:
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(UsageError) as caught:
        ServerKeys("o", None, file)
    assert caught.value.message.startswith(f"--api-key-file {file}, {said}")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert hashed(SECRET)[7:] not in str(caught.value)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="the fix is for coreutils")
def test_the_fix_works_as_printed(file: Path) -> None:
    file.write_text("# nothing yet\n")
    with pytest.raises(UsageError, match="no key in it") as caught:
        ServerKeys(None, None, file)
    assert caught.value.fix is not None
    key = 'it\'s $HOME `x` "k"'
    subprocess.run(["sh", "-c", caught.value.fix], check=True, env={**os.environ, "KEY": key})
    found = ServerKeys(None, None, file).find(key.encode())
    assert found is not None
    assert found.name == "NAME"


def test_a_file_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(UsageError, match="--api-key-file nowhere: No such file"):
        ServerKeys(None, None, Path("nowhere"))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        ServerKeys(None, None, file)


def test_reading_again_takes_and_refuses_and_keeps_what_it_has_when_the_file_is_broken(file: Path) -> None:
    file.write_text(f"{GOOD}\nbob {hashed('b')}\n")
    keys = ServerKeys("o", None, file)

    def accepted() -> list[str]:
        return [token for token in "abco" if keys.find(token.encode())]

    file.write_text(f"bob {hashed('b')}\ncarol {hashed('c')}\n")
    keys.reload()
    assert accepted() == ["b", "c", "o"]
    for broken in ("", f"bob {hashed('b')}\n{SECRET}\n", f"o {hashed('o')}\n"):
        file.write_text(broken)
        with pytest.raises(UsageError):
            keys.reload()
        assert accepted() == ["b", "c", "o"]
    file.unlink()
    with pytest.raises(UsageError):
        keys.reload()
    assert accepted() == ["b", "c", "o"]
    assert keys.ever_accepted == {key_digest(key) for key in (b"a", b"b", b"c", b"o")}


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602])
def test_a_file_that_others_may_use_is_a_warning_with_a_fix(file: Path, mode: int) -> None:
    file.write_text(GOOD)
    file.chmod(mode)
    warning = ServerKeys(None, None, file).warning()
    assert warning is not None
    command = warning[warning.index("(chmod") + 1 : -1]
    subprocess.run(["sh", "-c", command], check=True)
    assert ServerKeys(None, None, file).warning() is None


def test_its_group_may_read_a_file(file: Path) -> None:
    file.write_text(GOOD)
    file.chmod(0o640)
    assert ServerKeys(None, None, file).warning() is None


def test_one_key_of_a_file_is_several_for_it_may_become_more(file: Path) -> None:
    file.write_text(GOOD)
    assert ServerKeys(None, None, file).several
    assert not ServerKeys("k").several
    assert ServerKeys("k", "l").several


def test_every_digest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, compared = ServerKeys("k,l,m"), []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for token in (b"k", b"l", b"wrong"):
        compared.clear()
        keys.find(token)
        assert compared == [key_digest(key) for key in (b"k", b"l", b"m")]


def test_a_key_with_white_space_is_refused_unseen() -> None:
    with pytest.raises(UsageError, match="--priority-keys: a key has white space") as caught:
        ServerKeys("k", f"a,{SECRET} b")
    assert SECRET not in str(caught.value)


def test_only_digests_stay() -> None:
    keys = ServerKeys(SECRET, "more-" + SECRET)
    assert SECRET not in repr(vars(keys))
    assert SECRET not in repr(ServeConfig(api_key=SECRET, priority_keys=SECRET))


def test_the_worker_inherits_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCTL_API_KEY", SECRET)
    monkeypatch.setenv("LLMCTL_PRIORITY_KEYS", SECRET)
    monkeypatch.setenv("LLMCTL_TEST", "kept")
    start, given = subprocess.Popen, {}

    def spy(*_: Any, **options: Any) -> Any:
        given.update(options["env"])
        return start("true", **options)

    monkeypatch.setattr(subprocess, "Popen", spy)
    with early_worker():
        pass
    assert given["LLMCTL_TEST"] == "kept"
    assert SECRET not in given.values()
