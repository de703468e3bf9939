"""``llmctl bench compare`` against scripted servers: the order of visits, verdicts, documents, files."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from fake_openai_server import FakeServer, Reply, count_tokens

from llmctl.bench import local_server
from llmctl.bench.environment import without_secrets
from llmctl.bench.local_server import ServerError
from llmctl.bench.rounds import ORDERS, Player, Round, Visit

Start = Callable[..., FakeServer]
Bench = Callable[..., Result]

SMALL = ("--num-prompts", "2", "--input-len", "4-9", "--output-len", "3", "--num-warmups", "0")


def compare(bench: Bench, a: str, b: str, *args: str) -> tuple[int, dict[str, Any], Result]:
    result = bench("compare", "--a", a, "--b", b, *SMALL, "--json", *args)
    return result.exit_code, json.loads(result.stdout) if result.stdout.strip() else {}, result


def visit(side: str, speed: float, failed: int = 0) -> Visit:
    """A visit whose every figure follows from its speed."""
    figures = {"completed": 2 - failed, "failed": failed, "failed_ratio": failed / 2, "output_throughput": speed}
    figures |= {"median_tpot_ms": 1000 / speed, "median_e2el_ms": 9000 / speed, "p99_ttft_ms": 0.0}
    failures = [{"kind": "cut", "count": failed, "messages": ["cut off"]}] if failed else []
    return Visit(side, "20260101-000000", figures, failures)


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Rounds are made up, not measured: B's speed over A's, and the noise of a visit."""

    def set_up(ratio: float, noise: float) -> None:
        rng = np.random.default_rng(7)

        def play(self: Player, number: int) -> Round:
            self.models, self.versions = {"a": "m", "b": "m"}, {"a": "1", "b": None}
            speeds = {"a": 181.0, "b": 181.0 * ratio}
            order = ORDERS[number % 2]
            visits = [visit(one, speeds[one] * math.exp(noise * rng.normal())) for one in order.lower()]
            return Round(order, 0.25, tuple(visits))

        monkeypatch.setattr(Player, "play", play)

    return set_up


def test_a_slower_side_is_a_regression_and_nothing_more_is_played(
    plays: Callable[[float, float], None], bench: Bench
) -> None:
    plays(0.9, 0.01)
    code, doc, result = compare(bench, "http://a", "http://b")
    assert code == doc["exit_code"] == 5, result.stderr
    assert (doc["kind"], doc["num_rounds"], doc["interrupted"], doc["notes"]) == ("compare", 10, False, [])
    ratio = doc["ratios"]["output_throughput"]
    assert ratio["low"] < ratio["ratio"] < ratio["high"] < 1
    assert (ratio["decision"], doc["ratios"]["median_tpot_ms"]["decision"]) == ("regression", "regression")
    assert "p99_ttft_ms" not in doc["ratios"], "there is no ratio to 0"
    found = [line for line in result.stderr.splitlines() if line.startswith("gate failed: ")]
    assert re.fullmatch(
        r"gate failed: output_throughput fell [\d.]+% \(18\d → 16\d tok/s; allowed 2.5%, noise ±[\d.]+%, 10 rounds\)",
        found[0],
    )
    assert found[1].startswith("gate failed: median_tpot_ms rose 11% (")


def test_equal_sides_pass_and_a_faster_one_is_no_regression(
    plays: Callable[[float, float], None], bench: Bench
) -> None:
    for ratio in (1.0, 1.2):
        plays(ratio, 0.005)
        code, doc, result = compare(bench, "http://a", "http://b")
        assert (code, doc["num_rounds"]) == (0, 10), result.stderr
        assert {row["decision"] for row in doc["ratios"].values()} == {"pass"}


def test_what_is_trimmed_is_not_in_the_sentence_either(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round with a busy neighbour: A, B and their ratio are of the same rounds."""

    def play(self: Player, number: int) -> Round:
        self.models, self.versions = {"a": "m", "b": "m"}, {"a": "1", "b": None}
        speeds = {"a": 100.0 + number, "b": 90.0 + number if number != 4 else 9.0}
        return Round("ABBA", 0.0, tuple(visit(side, speeds[side]) for side in "abba"))

    monkeypatch.setattr(Player, "play", play)
    _, doc, result = compare(bench, "http://a", "http://b")
    row = doc["ratios"]["output_throughput"]
    assert row["b"] / row["a"] == pytest.approx(row["ratio"])
    assert row["b"] > 90 > doc["b"]["figures"]["output_throughput"]
    assert re.search(r"output_throughput fell 9\.\d% \(10\d → 9\d\.?\d? tok/s; ", result.stderr)
    assert re.search(r"output_throughput, tok/s +10\d +9\d", result.stderr)


def test_noise_is_inconclusive(plays: Callable[[float, float], None], bench: Bench) -> None:
    plays(1.0, 0.3)
    code, doc, result = compare(bench, "http://a", "http://b", "--max-rounds", "20")
    assert (code, doc["num_rounds"]) == (6, 20)
    assert doc["notes"][0].startswith(
        "inconclusive after 20 rounds; before them others used 25% of the processors: try"
    )
    assert "undecided: output_throughput " in result.stderr
    assert bench("compare", "--a", "http://a", "--b", "http://b", "--max-rounds", "8", "--exit-zero").exit_code == 0


def test_what_is_sent(start: Start, bench: Bench) -> None:
    """Each visit the same lengths and other words; in turns; and no more rounds than asked for."""
    a, b = start(), start()
    code, doc, _ = compare(bench, a.url, b.url, "--max-rounds", "2")
    assert code in (0, 5, 6)
    assert [played["order"] for played in doc["rounds"]] == ["ABBA", "BAAB"]
    assert ["".join(v["side"] for v in played["visits"]).upper() for played in doc["rounds"]] == ["ABBA", "BAAB"]
    arrivals = sorted([(s.arrived, "A") for s in a.seen] + [(s.arrived, "B") for s in b.seen])
    assert "".join(letter for _, letter in arrivals) == "AABBBBAABBAAAABB"
    prompts = [seen.body["prompt"] for seen in (*a.seen, *b.seen)]
    assert len(set(prompts)) == len(prompts) == 16
    wanted = sorted(count_tokens(seen.body["prompt"]) for seen in a.seen)
    assert sorted(count_tokens(seen.body["prompt"]) for seen in b.seen) == wanted == sorted(4 * sorted(set(wanted)))
    assert doc["workload"]["prompt_length_source"] == "server"


def test_keys_go_to_the_side_that_they_are_of(start: Start, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "shared")
    for words, keys in (((), {"Bearer shared"}), (("--b-api-key", ""), {None}), (("--b-api-key", "b"), {"Bearer b"})):
        a, b = start(), start()
        compare(bench, a.url, b.url, "--max-rounds", "1", *words)
        assert {seen.headers.get("authorization") for seen in a.seen} == {"Bearer shared"}
        assert {seen.headers.get("authorization") for seen in b.seen} == keys


def test_keys_are_not_in_a_result() -> None:
    words = ["compare", "--a-api-key", "k1", "--b-api-key=k2", "--api-key", "k3", "--header", "X=k4", "--seed", "3"]
    shown = without_secrets(words)
    assert shown == [
        "compare",
        "--a-api-key",
        "***",
        "--b-api-key=***",
        "--api-key",
        "***",
        "--header",
        "***",
        *words[-2:],
    ]


def test_too_few_rounds_are_inconclusive_and_the_files_say_why(
    plays: Callable[[float, float], None], bench: Bench, tmp_path: Path
) -> None:
    plays(1.0, 0.1)
    out = tmp_path / "new"
    args = ("--markdown", str(out / "c.md"), "--svg", str(out / "c.svg"), "--csv", str(out / "c.csv"))
    files = ("--junit", str(out / "c.xml"), "--result-filename", str(out / "c.json"), "--label", "x")
    code, doc, result = compare(bench, "http://a", "http://b", "--max-rounds", "2", *args, *files)
    assert code == doc["exit_code"] == 6
    (note,) = doc["notes"]
    assert note.startswith("inconclusive after 2 rounds; the first look is after 10; before them others used 25%")
    assert {gate["kind"] for gate in doc["gates"] if not gate["passed"]} == {"inconclusive"}
    markdown = (out / "c.md").read_text()
    assert markdown.startswith("### llmctl bench compare: inconclusive\n\n- **OPEN**: ")
    assert "- **OPEN**: output_throughput " in markdown
    assert markdown.index("**OPEN**") < markdown.index("<details>") < markdown.index("| output_throughput |")
    picture = ET.fromstring((out / "c.svg").read_text())
    assert "output_throughput" in "".join(picture.itertext())
    assert [(row["round"], row["side"]) for row in csv.DictReader((out / "c.csv").open())][:3] == [
        ("1", "a"),
        ("1", "b"),
        ("1", "b"),
    ]
    cases = ET.parse(out / "c.xml").getroot()[0].findall("testcase")
    assert len(cases) == len(doc["gates"])
    assert json.loads((out / "c.json").read_text())["label"] == "x"
    assert "inconclusive after 2 rounds" in result.stderr


def test_failed_requests_end_it(start: Start, bench: Bench) -> None:
    a, b = start(), start(Reply(), Reply("cut"))
    code, doc, result = compare(bench, a.url, b.url)
    assert code == 3
    assert doc["rounds"] == []
    assert len(b.seen) == 2, "no further visit"
    assert (doc["a"]["failed"], doc["b"]["failed"]) == (0, 1)
    assert "gate failed: B: 1 of 2 requests failed: " in result.stderr


def test_what_was_measured_before_ctrl_c_is_kept(
    plays: Callable[[float, float], None], bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plays(1.0, 0.01)
    play = Player.play

    def interrupted(self: Player, number: int) -> Round:
        if number == 2:
            raise KeyboardInterrupt
        return play(self, number)

    monkeypatch.setattr(Player, "play", interrupted)
    code, doc, result = compare(bench, "http://a", "http://b", "--csv", str(tmp_path / "c.csv"), "--exit-zero")
    assert code == doc["exit_code"] == 130
    assert (doc["num_rounds"], doc["interrupted"]) == (2, True)
    assert doc["notes"][0] == "interrupted after 2 rounds: judged by what these say"
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 8
    assert "Traceback" not in result.stderr


def test_no_time_for_another_round(plays: Callable[[float, float], None], bench: Bench) -> None:
    plays(1.0, 0.01)
    code, doc, result = compare(bench, "http://a", "http://b", "--max-duration", "1e-9")
    assert (code, doc["num_rounds"]) == (6, 1)
    assert "no time for another round" in result.stderr


class Started:
    """Stands in for ``local_server.serving``: what was started, with which options, and what ran at once."""

    def __init__(self, fake: FakeServer) -> None:
        self.fake, self.log, self.running = fake, list[str](), 0
        self.dies_at: int | None = None

    @contextlib.contextmanager
    def serving(self, model: str, options: tuple[str, ...], **_: object) -> Iterator[FakeServer]:
        self.log.append(" ".join([Path(model).name, *options]))
        if len(self.log) == self.dies_at:
            raise ServerError("the server ended with exit code 1 before it was ready", "error: out of memory")
        self.running += 1
        assert self.running == 1, "two servers at once"
        yield self.fake
        self.running -= 1


@pytest.fixture
def started(start: Start, monkeypatch: pytest.MonkeyPatch, tiny_engine: Path) -> Started:  # noqa: ARG001
    found = Started(start())
    monkeypatch.setattr(local_server, "serving", found.serving)
    monkeypatch.setattr(Player, "_visit", lambda _self, letter, *_: visit(letter, 100.0))
    return found


def test_an_engine_is_started_anew_for_each_stretch(bench: Bench, started: Started, tiny_engine: Path) -> None:
    code, doc, _ = compare(bench, str(tiny_engine), str(tiny_engine), "--max-rounds", "2", "--b-args", "--threads 1")
    assert code == 0, "without noise two rounds are enough"
    name = tiny_engine.name
    assert started.log == [name, f"{name} --threads 1", name, f"{name} --threads 1", name, f"{name} --threads 1"]
    assert doc["b"]["served"].endswith(f"{name} --threads 1")
    assert doc["workload"]["prompt_length_source"] == "tokenizer", "the engine's own"


def test_a_server_that_dies_later_does_not_lose_the_rounds(bench: Bench, started: Started, tiny_engine: Path) -> None:
    started.dies_at = 5
    code, doc, result = compare(bench, str(tiny_engine), str(tiny_engine))
    assert (code, doc["num_rounds"]) == (1, 1)
    assert "error: ended after 1 rounds by an error: the server ended with exit code 1" in result.stderr
    assert "out of memory" in doc["notes"][0]


def test_a_server_that_never_starts_is_one_line(bench: Bench, started: Started, tiny_engine: Path) -> None:
    started.dies_at = 1
    code, doc, result = compare(bench, str(tiny_engine), str(tiny_engine))
    assert (code, doc) == (1, {})
    assert result.stderr.splitlines()[-1].endswith("it said last: error: out of memory")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--a", "", "--b", "http://x"), "--a: expected a server's URL, an engine or a model"),
        (("--a", "http://x", "--b", "http://x", "--a-args", "--threads 1"), "--a-args: http://x is not started here"),
        (("--a", "m", "--b", "http://x", "--a-args", "--port 1"), "gets its address here"),
        (("--a", "m", "--b", "http://x", "--a-args", "threads 1"), "expected options of 'llmctl serve'"),
        (("--a", "http://x", "--b", "http://y", "--max-rounds", "0"), "--max-rounds: expected at least 1"),
        (("--a", "http://x", "--b", "http://y", "--max-duration", "0"), "--max-duration: expected seconds above 0"),
        (("--a", "http://x", "--b", "http://y", "--regression-metrics", ","), "expected at least one"),
        (("--a", "http://x", "--b", "http://y", "--svg", "."), "--svg .: expected a file, found a folder"),
        (("--a", "http:///v1", "--b", "http://x"), "expected http://HOST:PORT"),
        (("--a", "http://x", "--b", "http://y", "--api-key", "k"), "would be sent to two hosts, x and y"),
        (("--a", "http://x", "--b", "http://y", "--api-key", "k", "--a-api-key", "l"), "would be sent to two hosts"),
        (("--a", "m", "--b", "http://y", "--a-api-key", "k"), "--a-api-key: m is started here"),
        (("--a", "http://x", "--b", "http://y", "--b-api-key", "k\n"), "--api-key: expected printable characters"),
    ],
)
def test_usage_errors(bench: Bench, args: tuple[str, ...], said: str) -> None:
    result = bench("compare", *args, "--ready-timeout", "0")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
