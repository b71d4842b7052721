"""`python -m congrad_ray` is the command `congrad`."""

from congrad_ray.cli.main import main

if __name__ == "__main__":
    main()
