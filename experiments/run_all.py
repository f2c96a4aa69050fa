#!/usr/bin/env python3
"""Measure every experiment of the paper on this machine, then build the figures and the table of verdicts.

python experiments/run_all.py                     about twenty minutes
python experiments/run_all.py --tier smoke        two minutes
python experiments/run_all.py --network my_net.toml --sweep width=10,20 threads=1,2 output=8x8x8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from znn.bench.suite import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
