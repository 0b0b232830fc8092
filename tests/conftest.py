import os
import sys

# The modules lie at the top level, helpers beside the tests; tests never reach for the network.
here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(here), here]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402

# Triton reads this while it is imported, which kernels.py does: without a GPU its kernels then run in numpy, if a test asks for them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
