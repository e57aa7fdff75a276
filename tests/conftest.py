"""What all tests share."""

import os

# Tensors in tests are small: handing them to a second thread costs ten times what it saves
# (measured with tests/unit/test_scores.py on two busy cores: 6.0 s against 0.5 s).
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# A machine that does other work makes an example slow, never wrong.
settings.register_profile("farflung", deadline=None)
settings.load_profile("farflung")
