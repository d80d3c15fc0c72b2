"""The same as `pycompress bench sparse_linear`; the code is pycompress/bench/sparse_linear.py."""

import sys

from pycompress.bench.sparse_linear import main

if __name__ == "__main__":
    sys.exit(main())
