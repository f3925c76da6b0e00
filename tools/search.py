"""The same as `halfeven search`."""

import sys

from halfeven.cli.main import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
