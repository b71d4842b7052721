"""`congrad benchmark` as the entrypoint of `ray job submit`: the same arguments, the same exit codes."""

import sys

from congrad_ray.cli.main import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
