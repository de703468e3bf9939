"""Objects of token ids and numbers that are read as one list: as a decoder of objects reads them, or not at all."""

from __future__ import annotations

import json
import random

import pytest

from llmctl.serving.number_members import behind_plain_members, plain_members

PLAIN = [
    b'{"0":1}', b'{"1": 2.5, "3": -4}', b'{"1":-2e3,"2":1E-2}', b'{"10":1,"2":-0.0}',
    b'{"99999999999999999999":1}', b'{"5":1%s}' % (b"0" * 400),
]  # fmt: skip
NOT_PLAIN = [
    b"{}", b'{"1":"2"}', b'{"1,2":3}', b'{"1:2":3}', b'{":1":2}', b'{"1":":2"}', b'{"1:2,3":"4"}', b'{" 1":2}',
    b'{"1 ":2}', b'{"-1":2}', b'{"-0":2}', b'{"+1":2}', b'{"01":2}', b'{"1.0":2}', b'{"1e0":2}', b'{"":1}',
    b'{"1":2,"1":3}', b'{"1":{"2":3}}', b'{"1":[2]}', b'{"1":true}', b'{"1":null}', b'{"x":1}', b'{"1" :2}',
    b'{"1":\t2}', b"[1,2]", b'"1"', b"1", b'{"\\u0031":2}', b'{"1":2,"3":"4,5"}',
]  # fmt: skip


@pytest.mark.parametrize("data", PLAIN)
def test_plain_members_are_those_of_the_object(data: bytes) -> None:
    found = plain_members(data)
    assert found is not None
    assert {str(name): value for name, value in zip(*found, strict=True)} == json.loads(data)


@pytest.mark.parametrize("data", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_others(data: bytes) -> None:
    json.loads(data)
    assert plain_members(data) is None


def test_what_is_read_of_any_object_is_as_a_decoder_has_it() -> None:
    draws = random.Random(3)
    names = ['"1"', '"23"', '"4"', '"5"', '"60"', '"-7"', '" 8"', '"9,1"', '":1"', '"1.5"', '"x"', '"007"']
    values = ["1", "-2", "0.5", "-1e2", "1", "3", '"4"', "[5]", '{"6":7}', "true", '",8"', '":"']
    plain = behind = 0
    for _ in range(20_000):
        space = draws.choice(["", " "])
        count = draws.randrange(1, 5)
        odd = draws.random() < 0.5
        pairs = [
            draws.choice(names[: None if odd else 5]) + ":" + space + draws.choice(values[: None if odd else 6])
            for _ in range(count)
        ]
        data = ("{" + f",{space}".join(pairs) + "}").encode()
        whole = json.loads(data)
        if (found := plain_members(data)) is not None:
            plain += 1
            assert {str(name): value for name, value in zip(*found, strict=True)} == whole
        try:
            rest = json.loads(behind_plain_members(data))
        except ValueError:
            continue
        behind += rest != whole
        assert rest.items() <= whole.items(), data
    assert min(plain, behind) > 1000, (plain, behind)
