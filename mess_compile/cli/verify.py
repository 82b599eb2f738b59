"""The command `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import fail, print_json, progress_bar, say
from mess_compile.cli.options import BUNDLE, FILE, TARGET, gathered, json_option, verbose_option

if TYPE_CHECKING:
    from mess_compile.runtime.serve.verify import Check

_REMEDIES = {
    "power mode": "set the power mode of the profile, or profile again",
    "latency": "stop other programs, let it cool down, profile again, or allow more with --latency-factor",
    "signature": "get the bundle from a signer whom you trust, or sign it with `bundle --sign KEY`",
}


@dataclass(frozen=True)
class VerifyArguments:
    """What `verify` checks, and what it prints."""

    allowed_signers: Path | None
    identity: str | None
    require_signature: bool
    latency_factor: float | None
    target: str | None
    verbose: bool
    as_json: bool


@click.command(short_help="Check that this machine computes what was evaluated.")
@click.argument("bundle", type=BUNDLE, shell_complete=completion.bundles)
@click.option(
    "--allowed-signers",
    type=FILE,
    help="File of allowed signers, a name and a public key per line; requires a signature by one of them.",
)
@click.option("--identity", help="The allowed signer; any of them by default.")
@click.option("--require-signature", is_flag=True, help="Fail without --allowed-signers.")
@click.option(
    "--latency-factor",
    type=click.FloatRange(min=0, min_open=True),
    help="Longest time of golden frames, in multiples of the plan's latency; 1.25 by default.",
)
@TARGET
@verbose_option
@json_option
@gathered(VerifyArguments)
def verify(bundle: Path, arguments: VerifyArguments) -> None:
    """Check that this machine computes what was evaluated: hashes, signature, golden frames, latency."""
    from mess_compile.runtime.bundle.signature import Signers
    from mess_compile.runtime.serve.verify import LATENCY_FACTOR, VerifyOptions, verify_bundle

    allowed_signers, target, as_json = arguments.allowed_signers, arguments.target, arguments.as_json
    if allowed_signers is None and (arguments.require_signature or arguments.identity is not None):
        raise click.UsageError("--require-signature and --identity need --allowed-signers FILE: add it.")
    signers = None if allowed_signers is None else Signers(allowed_signers, arguments.identity)
    options = VerifyOptions(signers, arguments.require_signature, arguments.latency_factor or LATENCY_FACTOR)
    with progress_bar(as_json) as progress:
        checks = verify_bundle(bundle, target, options, progress)
    good = all(check.passed for check in checks)
    if as_json:
        print_json({"passed": good, "checks": [asdict(check) for check in checks]})
    else:
        _print_checks(bundle, checks, arguments.verbose)
    if not good:
        failed = [check.name for check in checks if not check.passed]
        remedy = _REMEDIES.get(failed[0], "write the bundle again on this machine")
        fail(f"{bundle} failed verification on this machine ({', '.join(failed)}): {remedy}")
    if not as_json:
        hints.print_known(hints.run_on_an_image(bundle))


def _print_checks(bundle: Path, checks: Sequence[Check], verbose: bool) -> None:
    """All of them, or by default how many passed and each that failed."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        names = [check.name for check in checks if not check.name.startswith("golden/")]
        golden = len(checks) - len(names)
        say(f"{bundle.name} passed on this machine: {golden} golden frames, {', '.join(names)}")
    for check in checks if verbose else failed:
        say(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
