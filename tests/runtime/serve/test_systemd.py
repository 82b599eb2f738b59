"""The systemd unit: what it runs, and what the user has to do where systemd cannot be reached."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.serve import systemd
from tests.runtime.homeless import homeless


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def systemctl(home: Path, code: int) -> None:
    script = f'#!/bin/sh\necho "$@" >>{home}/calls\necho "Failed to connect to bus" >&2\nexit {code}\n'
    (home / "bin" / "systemctl").write_text(script)
    (home / "bin" / "systemctl").chmod(0o755)


def test_the_unit_runs_the_version_in_use_and_restarts_it(home: Path) -> None:
    systemctl(home, 0)
    told = systemd.install(Path("/opt/street"), "/usr/bin/python3", "xavier")
    written = configparser.RawConfigParser()
    written.optionxform = str  # type: ignore[assignment,method-assign]
    written.read(home / ".config" / "systemd" / "user" / "mess-street.service")
    command = "/usr/bin/python3 /opt/street/current watch /opt/street/live --target xavier"
    assert written["Service"]["ExecStart"] == command
    assert written["Service"]["Restart"] == "always"
    assert (home / "calls").read_text().splitlines() == [
        "--user daemon-reload",
        "--user enable --now mess-street.service",
    ]
    assert "mess-street.service is enabled" in told
    assert "loginctl enable-linger" in told


def test_a_changed_unit_is_restarted(home: Path) -> None:
    """`enable --now` does not restart a running service, which would go on with its old command."""
    systemctl(home, 0)
    for target in ("xavier", "xavier", "xavier:fp16"):
        (home / "calls").unlink(missing_ok=True)
        systemd.install(Path("/opt/street"), "/usr/bin/python3", target)
        restarted = "--user restart mess-street.service" in (home / "calls").read_text().splitlines()
        assert restarted == (target == "xavier:fp16")


def test_without_a_home_folder_the_remedy_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homeless(monkeypatch)
    assert "set XDG_CONFIG_HOME" in systemd.install(Path("/opt/street"), "/usr/bin/python3")


def test_without_systemd_the_command_to_run_is_reported(home: Path) -> None:
    assert "there is no systemctl" in systemd.install(Path("/opt/street"), "/usr/bin/python3")
    systemctl(home, 1)
    told = systemd.install(Path("/opt/street"), "/usr/bin/python3")
    assert "Failed to connect to bus" in told
    assert told.endswith("`systemctl --user enable --now mess-street.service`")


@pytest.mark.parametrize("folder", ["/opt/my street", "/opt/100%", '/opt/"x"', "/opt/$HOME", "/opt/a;b"])
def test_a_path_with_special_characters_is_refused(folder: str) -> None:
    with pytest.raises(InputError, match="use a path of letters"):
        systemd.check_paths(Path(folder), "/usr/bin/python3")


def test_the_unit_finds_the_modules_that_a_login_shell_finds(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd reads no ~/.bashrc; without numpy the service would end again and again."""
    systemctl(home, 0)
    monkeypatch.setenv("PYTHONPATH", '/opt/100%/a "b":/opt/ros')
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    systemd.install(Path("/opt/street"), "/usr/bin/python3")
    text = (home / ".config" / "systemd" / "user" / "mess-street.service").read_text()
    assert 'Environment="PYTHONPATH=/opt/100%%/a \\"b\\":/opt/ros"\n' in text
    assert "LD_LIBRARY_PATH" not in text
