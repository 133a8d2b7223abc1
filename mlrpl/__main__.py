"""`python -m mlrpl` is the command `mlrpl`."""

from mlrpl.cli import main

if __name__ == "__main__":
    main()
