"""The same as `halfeven ptq`."""

import sys

from halfeven.cli.main import main

if __name__ == "__main__":
    main(["ptq", *sys.argv[1:]])
