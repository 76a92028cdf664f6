"""All benchmarks of the adapter bank, one after the other; `--quick` for small versions of them.

python benchmarks/bank.py
"""

import subprocess
import sys

from common import ROOT

ORDER = ("bank_mixed", "bank_memory", "bank_latency", "bank_churn", "bank_store")


def main() -> None:
    for name in ORDER:
        print(f"\n== {name} ==", flush=True)
        subprocess.run([sys.executable, ROOT / f"{name}.py", *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
