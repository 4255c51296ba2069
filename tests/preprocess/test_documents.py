"""Whatever JSON parsers differ on, or fail on, is one document or a fault with its line."""

import json

import pytest

from megagap.preprocess.documents import Fault, documents_of
from megagap.preprocess.units import Mark, Unit


def documents_in(*lines: bytes) -> list[tuple[str, ...] | Fault]:
    unit = Unit(0, "a.jsonl", "lines", b"\n".join(lines), 1, 0, Mark())
    return list(documents_of(unit, ["text", "a b"]))


def one(text: str, more: str = "") -> bytes:
    return f'{{"text": {text}, "a b": "x"{more}}}'.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (one('"é \\u00e9 \\ud83d\\ude00"'), "é é 😀"),
        (one('"a"', ', "n": NaN, "i": -Infinity'), "a"),
        (one('"a"', f', "n": {"9" * 400}'), "a"),
        (one('"a"', ', "n": 1e999'), "a"),
        (one('"a"', ', "type": "text"'), "a"),
        (one('"a"', ', "text2": 1, "meta": {"text": "b"}'), "a"),
        (one('"a"', ', "meta": [{"text": "b", "a b": 1}, {"text": "c"}]'), "a"),
        (one('"\\"text\\": \\"text\\":"'), '"text": "text":'),
        (one('"\\u0000"'), "\0"),
        (b"\t" + one('"a"') + b" \r", "a"),
    ],
)
def test_these_are_documents(line: bytes, text: str) -> None:
    assert documents_in(line) == [(text, "x")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (one('"\\ud83d"'), "'text' is not text"),
        (one('"\\ude00\\ud83d"'), "'text' is not text"),
        (one('"\ud83d"'), "invalid UTF-8"),
        (b'{"text": "\xe9"}', "invalid UTF-8"),
        (b'{"text": "a\x00"}', "invalid JSON"),
        (b"\x00" * 50, "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid JSON"),
        (b'{"text": ' + b"9" * 5000 + b'.0, "n": ' + b"9" * 5000 + b"}", "'text' is not text"),
        (b"\xef\xbb\xbf" + one('"a"'), "invalid JSON"),
        (one('"a"', ', "text": "b"'), "key 'text' more than once"),
        (b'{"text": "a", "text": "a", "a b": "x"}', "key 'text' more than once"),
        (one('"a"', ', "a b": null'), "key 'a b' more than once"),
        (one("null"), "'text' is not text"),
        (one("NaN"), "'text' is not text"),
        (b'"text"', "not a JSON object"),
        (b'{"text": "a"}', "no key 'a b'"),
        (one('"a"') + one('"a"'), "invalid JSON"),
        (b"{'text': 'a'}", "invalid JSON"),
    ],
)
def test_these_are_faults_with_their_line(line: bytes, reason: str) -> None:
    before, fault, after = documents_in(one('"b"'), line, one('"c"'))
    assert (before, after) == (("b", "x"), ("c", "x"))
    assert isinstance(fault, Fault) and fault.line == 1 and fault.reason == reason
    json.dumps(fault.details).encode()


def test_a_number_of_any_length_beside_the_text_is_not_a_fault():
    digits = b"9" * 10_000
    assert documents_in(b'{"id": ' + digits + b', "text": "fine", "a b": ""}') == [("fine", "")]
    (fault,) = documents_in(b'{"id": ' + digits + b', "text": "one", "text": "two", "a b": ""}')
    assert isinstance(fault, Fault) and "more than once" in fault.details
