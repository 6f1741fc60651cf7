"""`python -m mycel` is the same as `mycel`."""

from mycel.cli.main import main

if __name__ == "__main__":
    main()
