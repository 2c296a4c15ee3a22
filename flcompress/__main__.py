"""`python -m flcompress`."""

from flcompress.cli import main

main()
