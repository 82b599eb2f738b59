"""Groups of images that belong together, named by a pattern on image ids (`--group-by`).

The pattern comes from a user, a plan or a bundle, and may take for ever on some ids: it is matched in a process of its
own, which is stopped after a while.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.runtime.base.errors import InputError

NO_PATTERN = "none"
"""What resets a remembered pattern."""
ENVIRONMENT_KEY = "group_by"
"""The pattern among what a bundle's plan carries."""
SECONDS = 5.0
_MOST_CHARACTERS = 200
_MATCHER = """
import json, re, sys
pattern, ids = json.load(sys.stdin)
found = [re.search(pattern, name) for name in ids]
names = [None if each is None else (each.groups() or ("",))[0] or each.group() for each in found]
json.dump(names, sys.stdout)
"""


def checked_pattern(pattern: str) -> str:
    """The pattern of `--group-by`. Raises InputError when it is empty, does not compile, or is longer than any name
    needs."""
    if not pattern:
        raise InputError(f"--group-by is empty: give a pattern such as '^[0-9]+', or {NO_PATTERN}")
    if len(pattern) > _MOST_CHARACTERS:
        raise InputError(
            f"--group-by {pattern[:40]!r}... has {len(pattern)} characters: give a pattern of at most "
            f"{_MOST_CHARACTERS}, such as '^[0-9]+'"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"--group-by {pattern!r} is not a regular expression ({error}): give one such as '^[0-9]+'"
        ) from error
    return pattern


def groups_of_ids(ids: Sequence[str], pattern: str) -> tuple[str, ...]:
    """The group of each image: the first group of the pattern in its id or, without one, the whole match.

    An id that the pattern does not match is a group of its own. Raises InputError when it matches none, does not
    compile, or takes longer than SECONDS.
    """
    names = _matched(tuple(ids), checked_pattern(pattern))
    if not any(names):
        example = f" (the first of {len(ids)} is {ids[0]!r})" if ids else ""
        raise InputError(
            f"--group-by {pattern!r} matches no image id{example}: give a pattern that does, or --group-by {NO_PATTERN}"
        )
    return tuple(name or own for name, own in zip(names, ids, strict=True))


@lru_cache(maxsize=8)
def _matched(ids: tuple[str, ...], pattern: str) -> tuple[str | None, ...]:
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    try:
        done = subprocess.run(
            command, input=json.dumps([pattern, ids]), capture_output=True, text=True, timeout=SECONDS
        )
        names: tuple[str | None, ...] = tuple(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        raise InputError(
            f"--group-by {pattern!r} takes more than {SECONDS:g} s on {len(ids)} image ids: give a simpler pattern, "
            "without a repeat inside a repeat"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"--group-by {pattern!r} could not be matched ({error}): give a simpler pattern") from error
    return names


def grouped(statistics: ExitStatistics, pattern: str | None) -> ExitStatistics:
    """The statistics with the groups that the pattern names; None leaves those that they were recorded with."""
    if pattern is None:
        return statistics
    return dataclasses.replace(statistics, group=groups_of_ids(statistics.image_id, pattern))


def unmatched(statistics: ExitStatistics, pattern: str) -> int:
    """How many images the pattern does not match: each is a group of its own."""
    return sum(not name for name in _matched(statistics.image_id, pattern))


def rule_of(groups: Sequence[str], pattern: str | None) -> str:
    """The number of groups, and what names them."""
    count = len(set(groups))
    if pattern is not None:
        return f"{count} {'group' if count == 1 else 'groups'} by --group-by {pattern!r}"
    if count == len(groups):
        return "1 image" if count == 1 else f"{count} groups, one an image"
    return f"{count} {'sequence' if count == 1 else 'sequences'} by image name"
