"""``python -m megagap SUBCOMMAND ...``, the same as ``megagap SUBCOMMAND ...``."""

import sys
from functools import partial

from megagap.commands import dispatch, run
from megagap.terminal.programs import CalledAs

if __name__ == "__main__":
    run(partial(dispatch, sys.argv[1:], CalledAs.MODULE))
