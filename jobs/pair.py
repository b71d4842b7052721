"""`congrad pair` as the entrypoint of `ray job submit`: the same arguments, the same exit codes."""

import sys
from pathlib import Path

# Python puts a script's own folder first, where select.py would stand in for the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from congrad_ray.cli import main

if __name__ == "__main__":
    main(["pair", *sys.argv[1:]])
