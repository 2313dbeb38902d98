"""`python -m longlive_rag`, which is also how torchrun starts a command."""

import sys

from longlive_rag.cli import main

sys.exit(main())
