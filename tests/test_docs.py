"""Documents that mislead cost more than none: links lead somewhere, quoted messages exist, the commands are today's."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mess_compile.targets import find_target
from tests.commands import run

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for folder, pattern in (("", "*.md"), ("docs", "*.md"), ("examples", "**/*.md"))
    for path in (ROOT / folder).glob(pattern)
    if "demo" not in path.parts
)
MESSAGE = re.compile(r"^\| `(.+)` \| ", re.MULTILINE)


def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(path: Path) -> frozenset[str]:
    """What the headings of a page can be linked by, on the forge and on the site alike."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return frozenset(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}; there are {sorted(anchors(target))}"


def test_every_page_is_in_the_navigation_and_the_readme_leads_to_it() -> None:
    navigation = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(navigation) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    linked = set(re.findall(r"\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert set(navigation) - linked == {"index.md"}


def test_the_readme_is_one_screen_with_a_picture_that_loads_at_once() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 75
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (ROOT / picture).stat().st_size < 200_000


def test_the_readmes_figures_are_those_of_the_example() -> None:
    text = (ROOT / "README.md").read_text()
    example = (ROOT / "examples" / "02-camvid" / "README.md").read_text()
    assert "| `--max-err 1%` | baseline, measured | 60.33 | 29.78 | 5.790 |" in example
    assert "| | measured | 58.85 | 8.50 | 0.895 |" in example
    for figure in ("60.33", "29.78 ms", "5.79 GMACs", "58.85", "8.50 ms", "0.90 GMACs"):
        assert figure in text


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tools.commands_page import page; print(page(), end='')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    told = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert done.stdout == told, "run `python tools/commands_page.py`"


@cache
def printed_texts() -> str:
    """Every text of the package, one a line; what is filled in is a star."""
    texts = []
    for path in sorted((ROOT / "mess_compile").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                texts.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in texts)


MESSAGES = [
    quoted
    for row in MESSAGE.findall((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    for quoted in row.split("` and `")
]


def test_many_messages_are_explained() -> None:
    assert len(MESSAGES) > 40


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_that_is_explained_can_be_printed(message: str) -> None:
    if message == "classes.txt":
        return
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
    assert re.search(r"[^\n]*?".join(pieces), printed_texts()), f"nothing prints {message!r}"


def test_troubleshooting_finds_what_a_mistake_prints(tmp_path: Path) -> None:
    """Of mistakes that newcomers make, as they make them."""
    for arguments in (
        ("-C", tmp_path / "gone", "search"),
        ("-C", tmp_path, "profile", "--device", "xaver"),
        ("-C", tmp_path, "bench", tmp_path / "host.mess"),
        ("-C", tmp_path, "train", "--data", tmp_path),
    ):
        error = run(*arguments).stderr
        found = [m for m in MESSAGES if re.search(".*?".join(map(re.escape, m.split("…"))), error)]
        assert found, f"docs/troubleshooting.md says nothing of {error!r}"


def test_the_target_of_the_documents_is_one(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", (ROOT / "docs" / "targets.md").read_text(), re.DOTALL)
    assert block is not None
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "bench-pc.toml").write_text(block[1])
    assert find_target("bench-pc", tmp_path).compute_capability == (8, 6)
