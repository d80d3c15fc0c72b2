"""The same as `pycompress bench int4_matmul`; the code is pycompress/bench/int4_matmul.py."""

import sys

from pycompress.bench.int4_matmul import main

if __name__ == "__main__":
    sys.exit(main())
