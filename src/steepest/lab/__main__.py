"""Run the command line without looking for the packages it needs; an experiment starts its workers so."""

import sys

from .cli import run

if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
