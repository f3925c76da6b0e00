"""Keep OpenVINO from reporting its use over the network."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silently() -> Iterator[None]:
    """Import or call OpenVINO, within, without a report of it over the network.

    Its converter takes no argument for this. It sends nothing from jobs of continuous integration, which are known by
    an environment variable; that variable has this value within, and its own again afterwards. The lasting choice,
    which is a file in the user's home and the command `opt_in_out --opt_out`, stays the user's.
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
