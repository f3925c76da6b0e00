"""The same as `halfeven test`."""

import sys

from halfeven.cli.main import main

if __name__ == "__main__":
    main(["test", *sys.argv[1:]])
