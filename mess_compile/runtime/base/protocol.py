"""Two programs of one release talk by lines: a request comes as a file, replies are printed.

A reply is a line with a JSON object of one key, its kind. The last one is `error` when the work failed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Optional, Tuple

from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, MessError

Send = Callable[[str, Any], None]
"""Sends a message: its kind and its content."""


def message_to_line(kind: str, content: Any) -> str:
    return json.dumps({kind: content})


def message_from_line(line: str) -> Optional[Tuple[str, Any]]:
    """Kind and content of a line; None for a line that is not a message, such as what engine libraries print."""
    try:
        ((kind, content),) = json.loads(line).items()
    except (ValueError, AttributeError, RecursionError):
        return None
    return kind, content


def request_to_json(request: Any, form: str, version: int) -> str:
    """The text of a request, a dataclass."""
    return json.dumps(decode.encode(request, form, version), sort_keys=True)


def request_from_json(kind: Any, text: str, form: str, version: int) -> Any:
    """The inverse of `request_to_json`, for the dataclass `kind`. Raises InputError naming what is wrong."""
    try:
        return decode.document(kind, text, form, version, "request")
    except decode.ForeignError as error:
        raise InputError(
            f"unsupported request version (not {form} {version}): run the same release on both sides"
        ) from error
    except decode.DecodeError as error:
        raise InputError(f"the request cannot be read: {error}") from error


def serve_messages(act: Callable[[Send], None], place: Path) -> int:
    """Call `act` with a function that prints messages; the exit code is 1 after a last message `error`, otherwise 0.

    `place` is named in the error where the system does not name a file.
    """

    def send(kind: str, content: Any) -> None:
        print(message_to_line(kind, content), flush=True)

    try:
        act(send)
        return 0
    except MessError as error:
        send("error", str(error))
    except OSError as error:
        reason, path = error.strerror or error, error.filename or place
        send("error", f"{reason} ({path}): make room there, and check its permissions")
    except MemoryError:
        send("error", "the device is out of memory: stop other programs there")
    return 1
