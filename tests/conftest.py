import os
import sys
import tempfile

# The modules lie at the top level, and helpers beside the tests. Tests never use the network.
here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(here), here]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch's threads sleep while they wait for each other, as in train.py. To be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
cache = tempfile.TemporaryDirectory()  # holds the indices of data files while the tests run
os.environ["XDG_CACHE_HOME"] = cache.name

import torch  # noqa: E402

# Triton reads this variable when kernels.py imports it. Without a GPU, a test that asks for the Triton
# kernels then gets Triton's interpreter, which runs them in numpy.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
