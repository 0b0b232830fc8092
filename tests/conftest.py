import os
import sys
import tempfile

# The modules lie at the top level, helpers beside the tests; tests never reach for the network.
here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(here), here]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
cache = tempfile.TemporaryDirectory()  # for the indices of data files; it goes with this process
os.environ["XDG_CACHE_HOME"] = cache.name

import torch  # noqa: E402

# Triton reads this while it is imported, which kernels.py does: without a GPU its kernels then run in numpy, if a test asks for them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
