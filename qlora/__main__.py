"""`python -m qlora` is `qlora`."""

import sys

from .cli import main

sys.exit(main())
