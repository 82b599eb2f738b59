"""The command `verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import fail, print_json, progress_bar, say
from mess_compile.cli.options import BUNDLE, FILE, TARGET, json_option

_REMEDIES = {
    "power mode": "set the power mode back, or profile again",
    "latency": "see what else runs and how warm it is, profile again, or allow more by --latency-factor",
    "signature": "get it from somebody whom you know, or sign it by `bundle --sign KEY`",
}


@click.command(short_help="Does this machine compute what was evaluated?")
@click.argument("bundle", type=BUNDLE, shell_complete=completion.bundles)
@click.option("--allowed-signers", type=FILE, help="It must be signed by one of them: NAME and public key, one a line.")
@click.option("--identity", help="Which of the allowed signers; any by default.")
@click.option("--require-signature", is_flag=True, help="Refuse to go on without --allowed-signers.")
@click.option(
    "--latency-factor",
    type=click.FloatRange(min=0, min_open=True),
    help="What golden frames may take, in multiples of the plan's latency; 1.25 by default.",
)
@TARGET
@json_option
def verify(
    bundle: Path,
    allowed_signers: Path | None,
    identity: str | None,
    require_signature: bool,
    latency_factor: float | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Hashes, signature, golden frames, latency: does this machine compute what was evaluated?"""
    from mess_compile.runtime.bundle.signature import Signers
    from mess_compile.runtime.serve.verify import LATENCY_FACTOR, VerifyOptions, verify_bundle

    if allowed_signers is None and (require_signature or identity is not None):
        raise click.UsageError("a signature is checked by --allowed-signers FILE; add it.")
    signers = None if allowed_signers is None else Signers(allowed_signers, identity)
    chosen = VerifyOptions(signers, require_signature, latency_factor or LATENCY_FACTOR)
    with progress_bar(as_json) as progress:
        checks = verify_bundle(bundle, target, chosen, progress)
    good = all(check.passed for check in checks)
    if as_json:
        print_json({"passed": good, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            say(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    if not good:
        failed = [check.name for check in checks if not check.passed]
        remedy = _REMEDIES.get(failed[0], "write it again on this machine")
        fail(f"{bundle} failed verification on this machine ({', '.join(failed)}): {remedy}")
    if not as_json:
        hints.print_known(hints.run_on_an_image(bundle))
