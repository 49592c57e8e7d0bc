"""The definitions, in NumPy float64 and loops. Imports nothing of longctx.

Each function is written from its paper's equation, as plainly as possible; the fast versions are
held to it.
"""

import numpy as np
