"""``megagap curate``, started from a checkout."""

from functools import partial

from megagap.commands import call, run
from megagap.terminal.programs import CalledAs

main = partial(call, "curate", CalledAs.TOOL)

if __name__ == "__main__":
    run(main)
