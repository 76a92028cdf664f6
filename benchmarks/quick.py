"""All benchmarks of training in their quick versions, in less than ten minutes: every figure with its target.

python benchmarks/quick.py
"""

import subprocess
import sys
import time

from common import QUICK_RESULTS, ROOT, progress

ORDER = ("steps", "memory", "layers", "choice", "precision", "scaling", "startup", "files")


def main() -> None:
    start = time.monotonic()
    for name in ORDER:
        (QUICK_RESULTS / f"{name}.json").unlink(missing_ok=True)
        print(f"\n== {name} ==", flush=True)
        subprocess.run([sys.executable, ROOT / f"{name}.py", "--quick"], check=True)
    progress(f"all of it took {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
