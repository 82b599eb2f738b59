"""Messages between two programs: nothing that a device prints causes a traceback."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mess_compile.device.remote import parse_host
from mess_compile.reporter import SILENT
from mess_compile.runtime.base import decode, protocol
from mess_compile.runtime.base.errors import InputError
from mess_compile.ship.client import Destination, _receive, _Replies

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@dataclass(frozen=True)
class Report:
    what: str
    seconds: float


@given(st.text(), values)
def test_a_message_survives_its_line(kind: str, content: Any) -> None:
    line = protocol.message_to_line(kind, content)
    assert "\n" not in line
    assert protocol.message_from_line(line) == (kind, content)


@pytest.mark.parametrize(
    "line", ["", "[TRT] 3 warnings", "12", "[]", "{}", '{"a": 1, "b": 2}', "[" * 100_000, '{"a": 1']
)
def test_the_output_of_libraries_is_not_a_message(line: str) -> None:
    assert protocol.message_from_line(line) is None


def deep(levels: int) -> Any:
    content: Any = []
    for _ in range(levels):
        content = [content]
    return content


@pytest.mark.parametrize(
    "content", [[], {"what": 1, "seconds": 1.0}, {"what": "a", "seconds": 10**400}, {"what": "a"}, deep(900)]
)
def test_content_of_another_kind_is_refused_by_name(content: Any) -> None:
    with pytest.raises(decode.DecodeError, match="report"):
        decode.decode(Report, content, "report")


def test_integers_are_taken_for_numbers_within_their_range() -> None:
    largest = int(1.7976931348623157e308)
    for number in (0, -3, largest, -largest):
        assert decode.decode(Report, {"what": "a", "seconds": number}, "report") == Report("a", float(number))
    with pytest.raises(decode.DecodeError, match=r"report\.seconds"):
        decode.decode(Report, {"what": "a", "seconds": largest * 2}, "report")


def test_a_device_that_sends_nonsense_is_named() -> None:
    place = Destination("ssh://xavier:/opt/street", parse_host("xavier"), "/opt/street")
    step = {"what": "verify", "number": 1, "total": 1, "expected_s": 10**400}
    with pytest.raises(InputError, match="ssh://xavier:/opt/street sent an unexpected reply"):
        _receive(_Replies(), json.dumps({"step": step}), place, SILENT)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("the request is odd"), "the request is odd"),
        (OSError(28, "No space left on device", "/a/file"), "No space left on device (/a/file): make room there"),
        (OSError("broken"), "broken (requests): make room there"),
        (MemoryError(), "the device is out of memory"),
    ],
)
def test_an_error_is_the_last_message(error: BaseException, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def act(send: protocol.Send) -> None:
        send("step", 1)
        raise error

    assert protocol.serve_messages(act, Path("requests")) == 1
    first, last = map(protocol.message_from_line, capsys.readouterr().out.splitlines())
    assert first == ("step", 1)
    assert last is not None
    assert last[0] == "error"
    assert last[1].startswith(words)
