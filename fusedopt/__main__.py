"""`python -m fusedopt` is the command `fusedopt`."""

import sys

from fusedopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
