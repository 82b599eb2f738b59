"""A class list that is read otherwise than it was meant shifts every label value: it is refused by line instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from mess_compile.data.class_list import read_class_list
from mess_compile.runtime.base.errors import InputError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "classes.txt"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"sky\nroad\n", ("sky", "road")),
        (b"\xef\xbb\xbfsky\r\nroad\r\n", ("sky", "road")),
        (b"sky\rroad", ("sky", "road")),
        (b"# the classes of the yard\n\nsky  # blue\nC#\n", ("sky", "C#")),
        ("Straße\nŁódź\n".encode(), ("Straße", "Łódź")),
        (b"traffic light\ntraffic light pole 250 170 30\n", ("traffic light", "traffic light pole")),
        (b"lane 1 10 20 30\nlane 2 10 20 40\n", ("lane 1", "lane 2")),
        (b"sky\t1 2 3\n  road  2\t3 4  \n", ("sky", "road")),
        (b"2-wheeler\ncar/truck\n", ("2-wheeler", "car/truck")),
        (b"red\ngreen\nblue\n", ("red", "green", "blue")),
    ],
)
def test_names_are_what_a_person_reads_in_the_file(path: Path, content: bytes, names: tuple[str, ...]) -> None:
    path.write_bytes(content)
    assert read_class_list(path).names == names


def test_the_last_three_numbers_are_the_colour_and_void_has_values_and_colours(path: Path) -> None:
    path.write_text("traffic light 250 170 30\nlane 1 1 2 3\nignore 7\nignore 0 0 0\n")
    found = read_class_list(path)
    assert found.colours == ((250, 170, 30), (1, 2, 3))
    assert found.is_coloured
    assert found.ignored == {7, 255}
    assert found.void_colours == ((0, 0, 0),)


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"name,r,g,b\nsky,1,2,3\nroad,3,4,5\n", 1, "looks like a table"),
        (b"sky;1;2;3\nroad;3;4;5\n", 1, "looks like a table"),
        (b"name r g b\nsky 1 2 3\nroad 3 4 5\n", 1, "looks like a header"),
        (b"\nClass\nsky\nroad\n", 2, "looks like a header"),
        (b"sky\nStra\xdfe\n", 2, "is not UTF-8"),
        ("sky\nroad\n".encode("utf-16"), 1, "is not UTF-8 .UTF-16"),
        ("sky\nroad\n".encode("utf-16-be"), 1, "is not UTF-8 .UTF-16"),
        (b"// classes\nsky\nroad\n", 1, "comments begin with #"),
        (b"; classes\nsky\nroad\n", 1, "table"),
        (b"- sky\n- road\n", 1, "does not begin with a name"),
        (b"names:\n  0: sky\n", 1, "contains ':'"),
        (b"0: sky\n1: road\n", 1, "begins with a number"),
        (b"0 sky\n1 road\n", 1, "begins with a number"),
        (b"sky 0\nroad 1\n", 1, "ends in 1 number"),
        (b"sky 1 2\nroad\n", 1, "ends in 2 numbers"),
        (b"sky\nroad 256 0 0\n", 2, "beyond 255"),
        (b"sky\nignore 256\n", 2, "numbers of 0 to 255"),
        (b"sky\nroad #804080\n", 2, "hexadecimal"),
        (b'sky\n"traffic light"\n', 2, "without quotes"),
        (b"sky\ntraffic\\ light\n", 2, "without quotes or escapes"),
        ("sky\nroad\ufffd\n".encode(), 2, "contains"),
        ("sky\u200b\nroad\n".encode(), 1, "invisible characters"),
        (b"sky\nroad\nsky\n", 3, "the class of line 1"),
    ],
)
def test_what_would_shift_or_spoil_classes_is_refused_by_line(
    path: Path, content: bytes, line: int, words: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"classes\.txt, line {line}\b.*{words}") as refused:
        read_class_list(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"sky\n", b"# nothing\n"])
def test_fewer_than_two_classes_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match="give 2 to 255"):
        read_class_list(path)


def test_a_pointer_of_git_lfs_is_no_class_list(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14212972\n")
    with pytest.raises(InputError, match=r"is a Git LFS pointer.*git lfs pull"):
        read_class_list(path)
