"""The same as `halfeven export`."""

import sys

from halfeven.cli.main import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
