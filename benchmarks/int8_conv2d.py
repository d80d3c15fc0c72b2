"""The same as `pycompress bench int8_conv2d`; the code is pycompress/bench/int8_conv2d.py."""

import sys

from pycompress.bench.int8_conv2d import main

if __name__ == "__main__":
    sys.exit(main())
