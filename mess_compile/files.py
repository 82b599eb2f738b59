"""Reads and writes state: JSON with a format and a version, replaced atomically; TOML and lists that people write."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mess_compile.runtime.base.decode import DecodeError, decode
from mess_compile.runtime.base.errors import InputError, MessError
from mess_compile.runtime.base.lfs_pointers import refuse_pointer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOML_BYTES = 1 << 18
_OLD = ".old"


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hex SHA-256 of a JSON value, regardless of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def replaced(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the body succeeds, remove it otherwise.

    It ends in `suffix`, for libraries that require one. Temporaries that killed runs left for the same `path` are
    removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    handle, name = tempfile.mkstemp(suffix, f".{path.name}.", path.parent)
    temporary = Path(name)
    try:
        with _held(handle), _named_for(temporary, path):
            os.chmod(name, 0o644)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Like `replaced`, for a folder: the old folder stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recovered(path)
    _remove_leftovers(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = temporary.with_name(temporary.name + _OLD)
    try:
        with _held(os.open(temporary, os.O_RDONLY)), _named_for(temporary, path):
            os.chmod(temporary, 0o755)
            yield temporary
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            if old.exists():
                os.replace(old, temporary)  # half removed, it must not look like a folder to recover
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _named_for(temporary: Path, path: Path) -> Iterator[None]:
    """Let errors name the file or folder to be written, not the temporary one."""
    try:
        yield
    except MessError as error:
        error.args = tuple(_renamed(part, temporary, path) for part in error.args)
        raise
    except OSError as error:
        if isinstance(error.filename, str):  # setting it otherwise changes the message
            error.filename = _renamed(error.filename, temporary, path)
        raise


def _renamed(words: Any, temporary: Path, path: Path) -> Any:
    return words.replace(str(temporary), str(path)) if isinstance(words, str) else words


def recovered(folder: Path) -> None:
    """Restore the `folder` that a run set aside before it was killed between the two renames of `replaced_folder`."""
    if folder.exists() or not folder.parent.is_dir():
        return
    aside = [left for left in _leftovers(folder) if left.suffix == _OLD]
    if aside:
        os.replace(max(aside, key=lambda left: left.stat().st_mtime), folder)


def _remove_leftovers(path: Path) -> None:
    for left in _leftovers(path):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _leftovers(path: Path) -> list[Path]:
    """Temporaries that killed runs left beside `path`, by the names that `tempfile` gives; living runs lock theirs."""
    stem = rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}(?:{re.escape(path.suffix)})?"
    name = re.compile(rf"({stem})(?:{re.escape(_OLD)})?")
    matches = [match for match in map(name.fullmatch, os.listdir(path.parent)) if match]
    return [path.with_name(match[0]) for match in matches if not _is_held(path.with_name(match[1]))]


@contextmanager
def _held(descriptor: int) -> Iterator[None]:
    """Lock a temporary to show other runs that it is in use; the system releases the lock when this run is killed."""
    try:
        with suppress(OSError):  # a file system without locks: `_is_held` then spares everything
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_held(temporary: Path) -> bool:
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def used_alone(folder: Path, otherwise: str) -> Iterator[None]:
    """Lock a folder against other processes that ask for the same; creates it if it is missing.

    Raises InputError with the text of `otherwise` when one holds it. The system releases the lock when this run is
    killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{folder} is in use: {otherwise}") from error
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
    finally:
        os.close(descriptor)


def read_lines(path: Path, most_bytes: int = 1 << 24) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark, with any line ends.

    Raises InputError naming the file, the line with another encoding, and what to do.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    refuse_pointer(path, content)
    if len(content) > most_bytes:
        raise InputError(f"{path} is larger than {most_bytes} bytes, too large for a list: check the file name")
    if content.count(b"\0") > len(content) // 4 or content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}, line 1 is not UTF-8 (UTF-16, as some editors write?): save the file as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {number} is not UTF-8 (Latin-1?): save the file as UTF-8") from error
    return re.split(r"\r\n|\r|\n", text)


def write_json(path: Path, format: str, version: int, content: dict[str, Any]) -> None:
    """Write `content` after its `format` and `version`; all of it or nothing."""
    lines = (f" {json.dumps(key)}: {_text_of(value)}" for key, value in (_named(format, version) | content).items())
    with replaced(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _named(format: str, version: int) -> dict[str, Any]:
    return {"format": format, "version": version}


def _text_of(value: Any) -> str:
    """Indented; a list of objects has one per line, and avoids Python's slow encoder: a front has hundreds."""
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value, indent=1).replace("\n", "\n ")


def read_json(path: Path, format: str, version: int | tuple[int, ...], remedy: str) -> dict[str, Any]:
    """Read what `write_json` wrote, in this version or one of several.

    Raises InputError naming the file, what is wrong with it and the remedy.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: {remedy}")
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != format:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path} has format {found!r}, not {format!r}: {remedy}")
    readable = version if isinstance(version, tuple) else (version,)
    if content.get("version") not in readable:
        known = " and ".join(map(str, readable))
        raise InputError(f"{path} has version {content.get('version')!r}; this release reads {known}: {remedy}")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file that a person wrote, of at most MAX_TOML_BYTES.

    Raises ValueError naming the problem, also for a file that never ends or a path that is not a file.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        with path.open("rb") as stream:
            content = stream.read(MAX_TOML_BYTES + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    if len(content) > MAX_TOML_BYTES:
        raise ValueError(f"it has more than {MAX_TOML_BYTES} bytes")
    refuse_pointer(path, content)
    try:
        text = content.decode("utf-8-sig")
        found: dict[str, Any] = tomllib.loads(text)
        return found
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not TOML, since it is not UTF-8 ({error}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not TOML ({error}){_comma_in(text)}") from error


def _comma_in(text: str) -> str:
    """A hint about a number with a decimal comma, which TOML does not know."""
    comma = re.search(r"^\s*\S+\s*=\s*([-+]?\d+),(\d+)\s*(?:#.*)?$", text, re.MULTILINE)
    return f"; numbers have a decimal point: {comma[1]}.{comma[2]}, not {comma[1]},{comma[2]}" if comma else ""


def decoded(path: Path, remedy: str, run: Callable[[], Any]) -> Any:
    """Run a decoder on content read from `path`; a wrong value or missing key becomes an InputError naming the file."""
    try:
        return run()
    except (InputError, DecodeError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from error


def decode_document(
    path: Path, kind: Any, content: dict[str, Any], remedy: str, check: Callable[[Any], None] | None = None
) -> Any:
    """The content that `read_json` gave as the dataclass `kind`, strictly: no missing or unknown key, no type coerced.

    `check` raises for values that do not fit together. Raises InputError naming the file, the value and the remedy.
    """
    entries = {name: value for name, value in content.items() if name not in ("format", "version")}

    def run() -> Any:
        found = decode(kind, entries, "", local=True)
        if check is not None:
            check(found)
        return found

    return decoded(path, remedy, run)
