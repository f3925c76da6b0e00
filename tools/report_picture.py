"""Draw docs/assets/report.png and report_dark.png, a diagnosis as a page: `python tools/report_picture.py`.

It needs Chromium.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import halfeven as he

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from diagnosis.faulty_nets import faulty  # noqa: E402  the tests' networks, which are no part of the package

PICTURES = {"report.png": "1", "report_dark.png": "0"}
"""Names of the pictures in docs/assets -> Chromium's number of the colour scheme."""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
SIZE = ("--window-size=1000,2400", "--force-device-scale-factor=0.8")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def main() -> None:
    """Diagnose a network with an outlier channel, and photograph the upper part of its page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("There is no Chromium, so the page cannot be photographed. Install it: apt-get install chromium.")
    fault = faulty("outlier_channel")
    qmodel = he.calibrate(he.prepare(fault.model, fault.batches[0], **fault.options), fault.batches).eval()
    diagnosis = he.diagnose(qmodel, fault.model, fault.batches, runtime=False)
    print(diagnosis)
    with tempfile.TemporaryDirectory() as folder:
        page = diagnosis.save(Path(folder) / "report.html")
        profile = f"--user-data-dir={folder}/profile"
        # The charts are drawn by the page's own code, within the time given.
        wait = "--virtual-time-budget=10000"
        for name, scheme in PICTURES.items():
            picture = ROOT / "docs/assets" / name
            colours = f"--blink-settings=preferredColorScheme={scheme}"
            command = [browser, *FLAGS, *QUIET, profile, wait, colours, *SIZE, f"--screenshot={picture}", page.as_uri()]
            subprocess.run(command, check=True, capture_output=True)
            print(f"{picture}: {picture.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
