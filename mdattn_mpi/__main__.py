"""``python -m mdattn_mpi`` is ``mdattn``."""

import sys

from mdattn_mpi.cli import main

sys.exit(main())
