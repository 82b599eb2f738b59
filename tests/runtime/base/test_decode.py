"""A file that somebody edited is taken as it is meant, or refused with the entry, its value and what belongs there."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.runtime.base import decode
from mess_compile.runtime.base.decode import DecodeError, entry


@dataclass(frozen=True)
class Wheel:
    hw: tuple[int, int]
    spokes: int = field(default=8, metadata=decode.OPTIONAL)


@dataclass(frozen=True)
class Cart:
    name: str = field(metadata=entry(check=decode.matches("[a-z]+", "small letters")))
    load_kg: float
    wheels: tuple[Wheel, ...] = field(metadata=entry(key="wheel"))
    sizes: dict[str, int | str]
    colour: str | None = None
    tags: tuple[str, ...] = field(default=(), metadata=entry(each=decode.one_of(("old", "new"))))
    seen_s: float | None = field(default=None, metadata=decode.LOCAL)


CONTENT: dict[str, Any] = {
    "name": "hay",
    "load_kg": 20,
    "wheel": [{"hw": [2, 3]}, {"hw": [4, 5], "spokes": 6}],
    "sizes": {"seat": 3, "rail": "wide"},
    "colour": None,
    "tags": ["old"],
}


def test_a_document_becomes_the_value_it_describes() -> None:
    expected = Cart("hay", 20.0, (Wheel((2, 3)), Wheel((4, 5), 6)), {"seat": 3, "rail": "wide"}, None, ("old",))
    found = decode.decode(Cart, CONTENT, "")
    assert found == expected
    assert type(found.load_kg) is float
    assert decode.decode(Cart, {**CONTENT, "seen_s": 2}, "", local=True).seen_s == 2.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "Hay"}, "name is 'Hay', not small letters"),
        ({"name": None}, "name is None, not small letters"),
        ({"load_kg": "20"}, "load_kg is '20', not a number"),
        ({"load_kg": True}, "load_kg is True, not a number"),
        ({"load_kg": float("inf")}, "load_kg is inf, not a number"),
        ({"load_kg": 10**400}, f"load_kg is 1{'0' * 79}, not a number"),
        ({"wheel": {}}, "wheel is {}, not a list"),
        ({"wheel": [{"hw": [2, 3, 4]}]}, "wheel[0].hw has 3 entries, not 2"),
        ({"wheel": [{"hw": [2, 3]}, {"hw": [2, 3.5]}]}, "wheel[1].hw[1] is 3.5, not an integer"),
        ({"wheel": [{}]}, "wheel[0].hw is missing"),
        ({"wheel": [7]}, "wheel[0] is 7, not an object"),
        ({"wheel": [{"hw": [2, 3], "spoke": 6}]}, "wheel[0].spoke is not a known entry (did you mean 'spokes'?)"),
        ({"sizes": {"seat": []}}, "sizes[seat] is [], not an integer or text"),
        ({"colour": 3}, "colour is 3, not text"),
        ({"tags": ["old", "blue"]}, "tags[1] is 'blue', not one of old, new"),
        ({"zzz": 1}, "zzz is not a known entry; known are colour, load_kg, name, sizes, tags, wheel"),
        ({"a\nb": 1}, "'a\\nb' is not a known entry; known are colour, load_kg, name, sizes, tags, wheel"),
        ({"seen_s": 1.0}, "seen_s is not a known entry; known are colour, load_kg, name, sizes, tags, wheel"),
    ],
)
def test_a_wrong_entry_is_named_with_its_value(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DecodeError) as refused:
        decode.decode(Cart, {**CONTENT, **changed}, "")
    assert str(refused.value) == message


def test_a_missing_entry_is_named_with_what_belongs_there() -> None:
    without = {key: value for key, value in CONTENT.items() if key != "name"}
    with pytest.raises(DecodeError, match=r"^cart\.name is missing: give small letters$"):
        decode.decode(Cart, without, "cart")


def test_a_file_that_a_person_wrote_has_tables_and_lists_counted_from_one() -> None:
    with pytest.raises(DecodeError, match=r"wheel\[2\]\.hw\[1\] is 'a'"):
        decode.decode(Cart, {**CONTENT, "wheel": [{"hw": [2, 3]}, {"hw": ["a", 3]}]}, "", toml=True)
    with pytest.raises(DecodeError, match="sizes is 3, not a table"):
        decode.decode(Cart, {**CONTENT, "sizes": 3}, "", toml=True)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=8,
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
WHEELS = st.builds(Wheel, st.tuples(st.integers(), st.integers()), st.integers())
CARTS = st.builds(
    Cart,
    st.text(string.ascii_lowercase, min_size=1),
    NUMBERS,
    st.lists(WHEELS, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3),
    st.none() | st.text(),
    st.lists(st.sampled_from(["old", "new"]), max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=40)
@given(CARTS)
def test_what_is_encoded_is_decoded(cart: Cart) -> None:
    text = json.dumps(decode.encode(cart, "cart", 1))
    assert decode.document(Cart, text, "cart", 1, "cart") == cart


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([*CONTENT, "more"]), VALUES)
def test_any_value_of_any_entry_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    refusal = ""
    try:
        found = decode.decode(Cart, {**CONTENT, key: value}, "")
    except DecodeError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(key)
        assert "\n" not in refusal
    else:
        text = json.dumps(decode.encode(found, "cart", 1))
        assert decode.document(Cart, text, "cart", 1, "") == found
