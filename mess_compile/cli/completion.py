"""The command `completion`: scripts for shells, and what they offer; imports nothing heavy."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from mess_compile.backbone_names import BACKBONES
from mess_compile.package_files import profiles

PRECISIONS = ("fp32", "fp16", "int8")
_SPLITS = ("train", "val", "test")
_MANIFEST = "manifest.json"
_INSPECTED = (*BACKBONES, "graphs", "statistics", "latency", "plan")
_VARIABLE = "_MESS_COMPILE_COMPLETE"
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion type value
    local line="${COMP_LINE:0:$COMP_POINT}"
    local word="${line##*[[:space:]]}"

    response=$(env COMP_WORDS="$line" %(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read type value <<< "$completion"
        case $type in
            dir) COMPREPLY=(); compopt -o dirnames ;;
            file) COMPREPLY=(); compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done

    [[ $COMP_WORDBREAKS == *=* ]] && word="${word##*=}"
    if [[ $COMP_WORDBREAKS == *:* && $word == *:* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%%"${word##*:}"}"}")
    fi
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    """Splits the line itself, since bash splits words at colons too, which targets and destinations contain."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1:].isspace() else ""
        return words[1:], incomplete


class _Fish(FishComplete):
    """Takes items that contain commas: lists of precisions, and help of options."""

    source_template = FishComplete.source_template.replace('(string split "," ', '(string split -m 1 "," ')


add_completion_class(_Bash)
add_completion_class(_Fish)


@click.command(short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options, devices, splits, plans and bundles in a shell.

    \b
    bash    eval "$(mess-compile completion bash)"      in ~/.bashrc
    zsh     eval "$(mess-compile completion zsh)"       in ~/.zshrc, after compinit
    fish    mess-compile completion fish | source       in ~/.config/fish/config.fish
    """
    known = get_completion_class(shell)
    assert known is not None, "click completes in all three"
    click.echo(known(click.get_current_context().find_root().command, {}, "mess-compile", _VARIABLE).source())


def devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    folders = profiles(), _workspace(ctx) / "profiles"
    return _beginning(incomplete, ("cpu", *(path.stem for folder in folders for path in folder.glob("*.toml"))))


def hosts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return _beginning(incomplete, _memory(ctx, "hosts", {}).values())


def splits(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Splits with a folder in the data set or with statistics."""
    remembered = ctx.params.get("data") or _memory(ctx, "data", None)
    data = None if remembered is None else _workspace(ctx) / str(remembered)
    there = [name for name in _SPLITS if data is None or any(data.glob(f"{name}*")) or any(data.glob(f"*/{name}*"))]
    return _beginning(incomplete, filter(None, (_memory(ctx, "split", None), *(there or _SPLITS))))


def precisions(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The precisions that are not in the list yet."""
    chosen = incomplete.split(",")[:-1]
    left = [name for name in PRECISIONS if name not in chosen]
    return _beginning(incomplete, (",".join((*chosen, name)) for name in left))


def plans(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _files(incomplete, [*_planned(ctx), *_found(ctx, "plans/*.json")])


def bundles(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _files(incomplete, _found(ctx, "*.mess"))


def shipped(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _files(incomplete, [*_found(ctx, "*.mess"), *_memory(ctx, "ships", ())])


def compared(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _files(incomplete, [*_planned(ctx), *_found(ctx, "plans/*.json"), *_found(ctx, "*.mess")])


def inspected(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _files(incomplete, [*_INSPECTED, *_found(ctx, "*.mess")])


def targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    found = [f"{plan['target']}:{plan['precision']}" for plan in _plans_of(ctx)]
    return _beginning(incomplete, [*(name.partition(":")[0] for name in found), *found])


def operating_points(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return _beginning(incomplete, (point["name"] for plan in _plans_of(ctx) for point in plan["operating_points"]))


def _workspace(ctx: click.Context) -> Path:
    return Path(ctx.find_root().params.get("folder") or ".")


def _memory(ctx: click.Context, name: str, default: Any) -> Any:
    with suppress(OSError, ValueError, AttributeError):  # completion prints no errors
        return json.loads((_workspace(ctx) / "workspace.json").read_text()).get(name) or default
    return default


def _plans_of(ctx: click.Context) -> list[Any]:
    """The plans of the bundle on the line, which click has not assigned yet behind an option without value."""
    path = Path(ctx.params.get("bundle") or next(iter(ctx.args), ""))
    try:
        if path.is_dir():
            text = (path / _MANIFEST).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(_MANIFEST)
        found: list[Any] = json.loads(text)["plans"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return []
    return found


def _planned(ctx: click.Context) -> list[str]:
    """Devices that have a plan."""
    return [path.stem for path in _workspace(ctx).glob("plans/*.json")]


def _found(ctx: click.Context, pattern: str) -> list[str]:
    return [str(path) for path in _workspace(ctx).glob(pattern)]


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in sorted(dict.fromkeys(names)) if name.startswith(incomplete)]


def _files(incomplete: str, names: Iterable[str]) -> list[CompletionItem]:
    """The names that fit, or any file where none does."""
    found = [CompletionItem(name) for name in _beginning(incomplete, names)]
    return found or [CompletionItem(incomplete, type="file")]
