"""The tests of codexd, and its proofs.

The fakes say `env python3`: let that be the Python that runs the tests, and not the shim of a
version manager, which takes ten times as long to start and made the proofs twice as long.
"""

import os
import sys

os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
