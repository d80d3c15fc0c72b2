"""The same as `pycompress bench distill_loss`; the code is pycompress/bench/distill_loss.py."""

import sys

from pycompress.bench.distill_loss import main

if __name__ == "__main__":
    sys.exit(main())
