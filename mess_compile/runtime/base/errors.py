"""The one exception tree. Python 3.8 syntax: this file travels to the device."""

from __future__ import annotations

from typing import Any, Iterable, Sequence


class MessError(Exception):
    """Something that the user can put right; the message says what, the value, and the remedy."""


class InputError(MessError):
    """A file, folder or value from outside is missing, damaged, foreign or out of range."""


class PlaceError(InputError):
    """A file could not be written for a reason that holds for every other file there: a full disk, missing rights."""


class StaleError(MessError):
    """An artefact was made from something that has changed since."""


class RequirementError(MessError):
    """No plan satisfies the requirement; the message names the best that can be reached."""


class BundleError(MessError):
    """A bundle is truncated, edited, unsigned or of another version; nothing of it was executed."""


class EngineError(MessError):
    """An engine library is missing, or could not load or run a graph."""


class NotFiniteError(EngineError):
    """A graph ran, but gave logits that are not numbers, or infinite."""


class BatchError(EngineError):
    """Some frames of a batch could not be computed; `results` has a Prediction or an EngineError for each, in order."""

    def __init__(self, message: str, results: Sequence[Any]) -> None:
        super().__init__(message)
        self.results = tuple(results)


MAX_CHARACTERS = 300
"""Characters of what a library says that a message repeats."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """For a message, behind the name: the nearest of what there is; empty where nothing is near."""
    import difflib

    near = difflib.get_close_matches(name[:80], list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_line(text: object) -> str:
    """What a library says, for a message of ours: the end of it, where the reason stands."""
    words = " ".join(str(text).split())
    if len(words) <= MAX_CHARACTERS:
        return words
    end = words[4 - MAX_CHARACTERS :]
    return "... " + (end.partition(" ")[2] or end)
