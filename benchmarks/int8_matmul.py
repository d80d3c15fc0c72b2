"""The same as `pycompress bench int8_matmul`; the code is pycompress/bench/int8_matmul.py."""

import sys

from pycompress.bench.int8_matmul import main

if __name__ == "__main__":
    sys.exit(main())
