"""One program tells another what it does, line by line: each a JSON object with one key, of which `error` is the last.

What it is to do comes as a file, a wish, of the same release on both sides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Optional, Tuple

from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, MessError

Say = Callable[[str, Any], None]


def line_of(kind: str, content: Any) -> str:
    return json.dumps({kind: content})


def said(line: str) -> Optional[Tuple[str, Any]]:
    """Kind and content of a line; None when it is not ours (engine libraries print, too)."""
    try:
        ((kind, content),) = json.loads(line).items()
    except (ValueError, AttributeError, RecursionError):
        return None
    return kind, content


def wish_of(kind: Any, text: str, form: str, version: int) -> Any:
    """A wish as the dataclass `kind`. Raises InputError naming what is wrong."""
    try:
        return decode.document(kind, text, form, version, "wish")
    except decode.ForeignError as error:
        raise InputError(f"the wish is not {form} {version}: run the same release on both sides") from error
    except decode.DecodeError as error:
        raise InputError(f"the wish cannot be read: {error}") from error


def tell(act: Callable[[Say], None], place: Path) -> int:
    """Have `act` say lines on standard output; exit code 1 after a last line `error`, 0 without.

    `place` is named where the system does not say which file it is about.
    """

    def say(kind: str, content: Any) -> None:
        print(line_of(kind, content), flush=True)

    try:
        act(say)
        return 0
    except MessError as error:
        say("error", str(error))
    except OSError as error:
        say("error", f"{error.strerror or error} ({error.filename or place}): make room there, and look at its rights")
    except MemoryError:
        say("error", "the device is out of memory: end what else runs there")
    return 1
