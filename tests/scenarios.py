"""Programs of tests/native in which ranks meet on GPUs made of threads, and what they say."""

import re
import subprocess

from native_build import FFI, NATIVE, build


def build_scenarios(folder, name):
    """What calls native/NAME.cc with a scenario and its arguments, and gives what it prints."""
    units = ("arena", "exchange", "meeting", "pool", "mailbox", "failure")
    sources = [FFI / f"{unit}.cc" for unit in units]
    sources += [NATIVE / f"{unit}.cc" for unit in ("fake_gpus", "fake_driver", name)]
    built = build(folder, *sources)

    def run(*args):
        done = subprocess.run(
            [built, *map(str, args)], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout

    return run


def texts(output, what):
    """What each rank said after a step, in the order of ranks."""
    return re.findall(rf"^{what}, rank \d+: (.*)$", output, re.MULTILINE)
