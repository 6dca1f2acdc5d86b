"""`python -m qwenfit`, as torchrun starts it."""

from qwenfit.cli import main

if __name__ == "__main__":
    main()
