"""Named checks, run in the order they are written. Each one's outcome is a line; one that fails fails the script."""

import sys
import time
import traceback

CHECKS = []

SOON = 30.0  # seconds that a thing may take which a user expects at once


def check(function):
    CHECKS.append(function)
    return function


def until(what, reached, within=SOON):
    """Calls `reached` until it gives something, which is given back."""
    deadline = time.monotonic() + within
    while True:
        found = reached()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(0.02)


def equal(came, wanted, what=""):
    assert came == wanted, f"{what}: {came!r} came, {wanted!r} was wanted"


def run(*arguments):
    failed = 0
    for function in CHECKS:
        name = function.__name__.replace("_", " ")
        try:
            function(*arguments)
            print(f"ok      {name}")
        except Exception:  # every check is tried, whatever the ones before it did
            failed += 1
            print(f"FAILED  {name}")
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} hold")
    sys.exit(1 if failed or not CHECKS else 0)
