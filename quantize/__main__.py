"""`python -m quantize` is the same as `quantize`."""

from quantize.cli import main

main()
