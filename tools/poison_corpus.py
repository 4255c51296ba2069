"""``megagap poison-corpus``, started from a checkout."""

from functools import partial

from megagap.commands import call, run
from megagap.terminal.programs import CalledAs

main = partial(call, "poison-corpus", CalledAs.TOOL)

if __name__ == "__main__":
    run(main)
