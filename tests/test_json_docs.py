"""Programs are written by docs/json.md: what it says is there, and nothing is there that it does not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import printed_json
from tests.json_docs import differences


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ("search", ("search", "--max-err", "50%", "--explain")),
        ("bench --deadline", ("bench", "host.mess", "--split", "test", "--passes", "1", "--deadline", "20ms")),
        ("build --dry-run, profile --dry-run", ("profile", "--dry-run")),
        ("profile", ("inspect", "latency")),
        ("search", ("inspect", "plan")),
        ("evaluate", ("inspect", "statistics")),
        ("profile", ("profile", "--device", "xavier", "--estimate")),
    ],
)
def test_what_options_add_is_documented_too(
    workspace: Path, section: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    assert differences(section, printed_json(*arguments)) == []


def test_the_check_sees_what_is_new_gone_or_of_another_kind() -> None:
    good = {"passed": True, "checks": [{"name": "hashes", "passed": True, "detail": "as written"}]}
    assert differences("verify", good) == []
    assert differences("verify", {**good, "more": 1}) == ["verify.more is not documented"]
    assert differences("verify", {"passed": True}) == ["verify.checks is not printed"]
    assert differences("verify", {**good, "passed": 1}) == ["verify.passed is 1, not true/false"]
    assert differences("verify", {**good, "checks": [{**good["checks"][0], "name": None}]}) == [
        "verify.checks[].name is null"
    ]
    assert len(differences("verify", {**good, "checks": [{}]})) == 3
