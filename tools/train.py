"""The same as `halfeven train`."""

import sys

from halfeven.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
