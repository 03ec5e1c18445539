"""``python -m selfteach``."""

from selfteach.cli import main

if __name__ == "__main__":
    main()
