"""Print what Python 3.8 and numpy 1.17 have, for `names_3_8.txt`: a module or type, then its public names.

    PYTHONPATH=NUMPY python3.8 tests/runtime/list_names.py > tests/runtime/names_3_8.txt

Functions of numpy whose signature is known have their keywords behind a colon. Constants are left out.
"""

import importlib
import inspect
import sys

LIBRARY = """
argparse array ast atexit base64 binascii bisect builtins collections collections.abc concurrent concurrent.futures
contextlib copy csv ctypes ctypes.util dataclasses datetime difflib enum errno fcntl functools gc getpass glob gzip
hashlib heapq hmac html http http.client importlib importlib.metadata importlib.util inspect io itertools json logging
math mmap numbers operator os os.path pathlib pickle platform queue random re resource secrets select shlex shutil
signal socket socketserver stat statistics string struct subprocess sys tarfile tempfile textwrap threading time
traceback types typing unicodedata urllib urllib.parse uuid warnings weakref zipfile zlib
"""
NUMPY = "numpy numpy.lib numpy.lib.format numpy.lib.stride_tricks numpy.linalg numpy.random"
TYPES = (bytearray, bytes, dict, float, frozenset, int, list, set, str, tuple)


def main() -> None:
    assert sys.version_info[:2] == (3, 8), "run this with Python 3.8"
    for name in (LIBRARY + NUMPY).split():
        print(name, *described(importlib.import_module(name), name in NUMPY.split()))
    for kind in TYPES:
        print("." + kind.__name__, *described(kind))
    print(".Path", *described(importlib.import_module("pathlib").Path))
    print(".ndarray", *described(importlib.import_module("numpy").ndarray))


def described(thing: object, keywords: bool = False) -> "list[str]":
    public = [name for name in dir(thing) if not name.startswith("_") and not name.isupper()]
    return [name + (signature(getattr(thing, name)) if keywords else "") for name in public]


def signature(function: object) -> str:
    if inspect.isclass(function) or not callable(function):
        return ""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return ""
    return ":" + ",".join(parameter.name for parameter in parameters)


if __name__ == "__main__":
    main()
