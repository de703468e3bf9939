"""What is shown of text that clients sent: no key wherever it stands, no query, no user; everything else as it was."""

from __future__ import annotations

import base64
import logging
import string
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.serving.keys import ServerKeys, key_digest
from llmctl.serving.redaction import LONGEST_WORD, MOST_WORK, REDACTED, RedactingFormatter, Redactor

KEYS = ["sk-Tr0ub4dor_x.y~z", "abc", base64.b64encode(bytes(range(200, 232))).decode(), "s+p/a=="]
REDACTOR = Redactor(ServerKeys(",".join(KEYS)))

_CHARACTERS = string.ascii_letters + string.digits + "-._~+/="
# What a key may stand beside: anything but a letter or a digit, which would make another word of it.
_BESIDE = st.text(st.sampled_from(" \t\n\"'/?&=:@,;()[]{}<>|#%!$^*`~+-._\\"), max_size=4)


@settings(deadline=None)
@given(st.sampled_from(KEYS), _BESIDE, _BESIDE, st.text("xyz", max_size=3), st.booleans())
def test_a_key_is_found_between_any_two_marks(key: str, before: str, after: str, word: str, coded: bool) -> None:
    text = f"{word} {before}{quote(key, safe='') if coded else key}{after} {word}"
    for shown in (REDACTOR.prose(text), REDACTOR.line(text)):
        assert key not in shown
        assert quote(key, safe="") not in shown


@settings(deadline=None)
@given(st.text(_CHARACTERS, min_size=1, max_size=60).filter(lambda key: "," not in key))
def test_any_key_is_found_in_a_path(key: str) -> None:
    start, end = '"GET /v1/models/', ' HTTP/1.1"'
    line = f"{start}{key}{end}"
    assert Redactor(ServerKeys(key)).line(line) == f"{start}{REDACTED}{end}" or (
        key in end or line.index(key) < len(start)  # a key that the rest of the line has, too, or begins ("//")
    )


@settings(deadline=None)
@given(st.text())
def test_what_has_no_key_stays(text: str) -> None:
    redactor = Redactor(ServerKeys("0123456789abcdefghijklmnopqrstuvwxyz"))
    assert redactor.prose(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET /v1/models?api_key=foreign&x=y HTTP/1.1", f"GET /v1/models?{REDACTED} HTTP/1.1"),
        ("GET /v1/models?foreign HTTP/1.1", f"GET /v1/models?{REDACTED} HTTP/1.1"),
        ("POST http://c:4318/v1/traces?token=foreign failed", f"POST http://c:4318/v1/traces?{REDACTED} failed"),
        ("GET //user:foreign@host/v1", f"GET //{REDACTED}@host/v1"),
        ("http://foreign@host/x and http://a:b@c@d/", f"http://{REDACTED}@host/x and http://{REDACTED}@d/"),
        ("why? because", "why? because"),
        ("a/b@c", "a/b@c"),
    ],
)
def test_queries_and_users_of_urls(text: str, shown: str) -> None:
    assert REDACTOR.line(text) == shown


def test_codes_in_two_layers_of_a_key_and_of_what_is_beside_it() -> None:
    assert REDACTOR.prose("/%61bc /%2561bc") == f"/{REDACTED} /{REDACTED}"
    assert REDACTOR.prose("a%3Babc a%253babc%40") == f"a%3B{REDACTED} a%253b{REDACTED}%40"
    assert REDACTOR.line("//user%3Aforeign%40host/v1") == f"//{REDACTED}@host/v1"


def test_long_words_are_left_out_of_lines_and_searched_in_prose() -> None:
    long = "x/" * LONGEST_WORD + "abc"
    assert REDACTOR.line(f"GET {long} 1") == f"GET [{len(long)} characters] 1"
    assert REDACTOR.prose(long) == long.removesuffix("abc") + REDACTED


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is hashed from now on."""
    hashed: list[bytes] = []

    class Counted:
        def update(self, data: bytes) -> None:
            hashed.append(data)

        def digest(self) -> bytes:
            return b""

    monkeypatch.setattr("llmctl.serving.redaction.key_hash", Counted)
    return hashed


def test_the_work_on_a_word_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = count_hashes(monkeypatch)
    for word in ("/" * LONGEST_WORD, "-a" * (LONGEST_WORD // 2), "/" * 96):
        hashed.clear()
        REDACTOR.line(word)
        assert len(hashed) <= 16 * LONGEST_WORD + 32
    hashed.clear()
    REDACTOR.line("%41q" * (LONGEST_WORD // 4))
    assert len(hashed) <= 3 * 16 * LONGEST_WORD
    hashed.clear()
    REDACTOR.prose("/" * 10_000)
    assert len(hashed) <= 16 * 10_000
    hashed.clear()
    REDACTOR.prose("word " * 1000)
    assert len(hashed) == 1000


@pytest.mark.parametrize("word", ["/" * 200, "%25" * 80, "%25" * 4, "a", "a.b"])
def test_the_work_on_a_line_is_bounded(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may send a line for the log does not stop the event loop with it."""
    hashed = count_hashes(monkeypatch)
    shown = REDACTOR.line(f"{word} " * 2_000)
    assert len(hashed) <= MOST_WORK
    assert shown.endswith(f"[{len(word)} characters] ")


def test_a_long_traceback_is_whole() -> None:
    formatter = RedactingFormatter(REDACTOR, "%(message)s")
    line = 'File "/usr/lib/python3.13/site-packages/llmctl/serving/redaction.py", line 1, in f'
    record = logging.LogRecord("n", logging.ERROR, __file__, 1, "\n".join([line] * 2000), (), None)
    assert formatter.format(record) == record.getMessage()


def test_a_removed_key_is_still_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"old sha256:{key_digest(b'old-key').hex()}\n")
    keys = ServerKeys(None, None, file)
    file.write_text(f"new sha256:{key_digest(b'new-key').hex()}\n")
    keys.reload()
    assert Redactor(keys).line("old-key new-key") == f"{REDACTED} {REDACTED}"


def test_tracebacks_are_redacted() -> None:
    formatter = RedactingFormatter(REDACTOR, "%(message)s")
    try:
        raise ValueError(f"what is {KEYS[0]}?")
    except ValueError as error:
        record = logging.LogRecord("n", logging.ERROR, __file__, 1, "%s failed", (KEYS[0],), (ValueError, error, None))
    text = formatter.format(record)
    assert KEYS[0] not in text
    assert f"ValueError: what is {REDACTED}?" in text
