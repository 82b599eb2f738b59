"""Defines the one tree of exceptions. Python 3.8 syntax: this file travels to the device."""

from __future__ import annotations

from typing import Any, Iterable, Sequence


class MessError(Exception):
    """A problem that the user can solve; the message names the thing, the value and the remedy."""


class InputError(MessError):
    """A file, folder or value from outside is missing, damaged, foreign or out of range."""


class PlaceError(InputError):
    """A file could not be written for a reason that affects every file there: a full disk, missing rights."""


class StaleError(MessError):
    """An artefact was made from inputs that have changed since."""


class RequirementError(MessError):
    """No plan satisfies the requirement; the message names the best value that plans reach."""


class BundleError(MessError):
    """A bundle is truncated, edited, unsigned or of another version; nothing from it was executed."""


class EngineError(MessError):
    """An engine library is missing, or could not load or run a graph."""


class NotFiniteError(EngineError):
    """A graph ran, but its logits contain NaN or infinities."""


class BatchError(EngineError):
    """Some frames of a batch could not be computed; `results` has a Prediction or an EngineError for each, in order."""

    def __init__(self, message: str, results: Sequence[Any]) -> None:
        super().__init__(message)
        self.results = tuple(results)


MAX_CHARACTERS = 300
"""A message quotes at most so many characters from a library's error."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message: the known name nearest to `name`; empty if none is near."""
    import difflib

    near = difflib.get_close_matches(name[:80], list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_line(text: object) -> str:
    """A library's message on one line, cut to its end, where the reason is."""
    words = " ".join(str(text).split())
    if len(words) <= MAX_CHARACTERS:
        return words
    end = words[4 - MAX_CHARACTERS :]
    return "... " + (end.partition(" ")[2] or end)
