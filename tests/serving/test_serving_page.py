"""The page's files: who gets them, under which headers, and that nothing in them comes from elsewhere or runs text."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from serving.test_serving_addresses import Site

from llmctl.serving.page import CONTENT_SECURITY_POLICY, FOLDER, SHELL_PATHS

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in FOLDER.iterdir())
PATHS = [*SHELL_PATHS, *(f"/ui/{path.name}" for path in FILES)]
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
MOST_BYTES = 200_000
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.fixture(scope="module")
def site() -> Site:
    return Site()


@pytest.fixture(scope="module")
def keyed() -> Site:
    return Site("secret")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_file_is_served_to_whoever_asks(keyed: Site, method: str, path: str) -> None:
    """Without the key, too: the page has to be there to ask for it."""
    status, headers, body = keyed.ask(method, path)
    file = FOLDER / ("index.html" if path in SHELL_PATHS else path.rpartition("/")[2])
    assert status == 200
    assert body == file.read_bytes()  # uvicorn leaves it out for HEAD
    assert headers["content-type"].partition(";")[0] == TYPES[file.suffix[1:]]
    assert headers["content-length"] == str(file.stat().st_size)
    assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


def test_the_policy_lets_nothing_in() -> None:
    directives = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))
    assert directives == {
        **{"default-src": "'none'", "base-uri": "'none'", "frame-ancestors": "'none'", "form-action": "'none'"},
        **{"script-src": "'self'", "style-src": "'self'", "connect-src": "'self'", "img-src": "'self' data:"},
    }


def test_who_has_a_file_is_told_so(site: Site) -> None:
    _, headers, _ = site.ask("GET", "/ui/app.js")
    tag = headers["etag"]
    for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        status, again, body = site.ask("GET", "/ui/app.js", ("if-none-match", given))
        assert (status, body, again["etag"]) == (304, b"", tag), given
        assert again["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert site.ask("GET", "/ui/app.js", ("if-none-match", '"other"'))[0] == 200
    assert site.ask("GET", "/ui/chat.js")[1]["etag"] != tag


def test_the_key_is_asked_for_everything_else(keyed: Site) -> None:
    """``POST /`` generates."""
    json = ("content-type", "application/json")
    for method, path in (
        *(("POST", "/"), ("PUT", "/"), ("POST", "/docs"), ("GET", "/ui/none.js"), ("GET", "/ui/"), ("GET", "/ui")),
        *(("GET", "/engine"), ("GET", "/requests"), ("GET", "/openapi.json"), ("GET", "/ui/../metrics")),
    ):
        assert keyed.ask(method, path, json)[0] == 401, (method, path)
        assert keyed.ask(method, path, json, ("authorization", "Bearer secret"))[0] != 401, (method, path)


@pytest.mark.parametrize("path", ["/ui/none.js", "/ui/", "/ui/../page.py", "/ui/%2e%2e/page.py", "/ui/a/b.js"])
def test_no_other_file_is_served(site: Site, path: str) -> None:
    assert site.ask("GET", path)[0] == 404


def test_without_the_page_there_is_none() -> None:
    site = Site(ui=False)
    status, headers, _ = site.ask("GET", "/")
    assert (status, headers["allow"]) == (405, "POST")
    assert [site.ask("GET", path)[0] for path in ("/docs", "/ui/app.js", "/ui/index.html")] == [404, 404, 404]
    assert site.ask("GET", "/openapi.json")[0] == 200
    assert Site("secret", ui=False).ask("GET", "/docs")[0] == 401


def test_its_path_still_generates(site: Site) -> None:
    assert site.ask("POST", "/", ("content-type", "application/json"))[0] == 503  # the engine is not started
    status, headers, _ = site.ask("DELETE", "/")
    assert (status, headers["allow"]) == (405, "GET, HEAD, POST")


def test_its_addresses_are_relative_so_that_any_proxy_may_have_it_anywhere() -> None:
    site = Site(root_path="/llm")
    for path in ("/llm/", "/llm/docs", "/llm/ui/app.js", "/", "/ui/app.js"):
        assert site.ask("GET", path)[0] == 200, path
    status, headers, _ = site.ask("GET", "/llm/docs/")
    assert (status, headers["location"]) == (307, "../docs")


# The files themselves


def text_of(suffix: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in FILES if path.suffix == suffix}


def test_they_are_small_and_all_are_packed() -> None:
    assert sum(path.stat().st_size for path in FILES) < MOST_BYTES
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = patterns["llmctl.serving"]
    for path in FILES:
        assert any(fnmatch.fnmatch(f"ui/{path.name}", pattern) for pattern in packed), path.name


def test_each_is_named_by_another_and_is_there() -> None:
    named = set(re.findall(r'(?:href|src)="ui/([\w.-]+)"', (FOLDER / "index.html").read_text()))
    for text in text_of(".js").values():
        named |= set(re.findall(r"""from '\./([\w.-]+)';""", text))
    assert named | {"index.html"} == {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text().replace(SVG_NAMESPACE, "")
    assert re.findall(r"(?:https?|wss?|data):/?/?[\w.-]+", text) == []
    assert re.findall(r"(?:src|href)\s*=\s*[\"'](?!ui/|#)[^\"']*|\burl\(|@import|import\(|from '(?!\./)", text) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_text_becomes_markup_or_code(path: Path) -> None:
    text = path.read_text()
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|createContextualFragment|srcdoc"
    )
    assert (
        re.findall(sinks + r"|DOMParser|setAttribute\('style|\bstyle=|<style|<script>|\son\w+=\"|javascript:", text)
        == []
    )
    assert re.findall(r"sessionStorage|indexedDB|document\.cookie|serviceWorker", text) == []
    if path.name != "store.js":
        assert "localStorage" not in text


def test_the_key_does_not_leave_its_module() -> None:
    text = (FOLDER / "server.js").read_text()
    assert re.findall(r"^export (?:let|const) (?:key|declined)\b", text, re.MULTILINE) == []
    assert re.findall(r"\bkey\b(?= =[^=])", text) == ["key", "key"]  # at the beginning, and as it is given
    assert re.findall(r"[^\n]*Bearer[^\n]*", text) == ["    if (used) headers.Authorization = `Bearer ${used}`;"]
