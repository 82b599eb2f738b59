"""What a library says is repeated by its end, where the reason stands."""

from __future__ import annotations

from mess_compile.runtime.base.errors import MAX_CHARACTERS, one_line


def test_a_long_message_keeps_its_end_from_a_word_on() -> None:
    told = one_line("before " * 100 + "\n the reason")
    assert told.startswith("... before")
    assert told.endswith("the reason")
    assert len(told) <= MAX_CHARACTERS


def test_one_long_word_is_not_lost() -> None:
    assert one_line("/very/long/path" * 50).endswith("/very/long/path")
