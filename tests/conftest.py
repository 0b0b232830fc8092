"""Three rules for tests.

(a) A test compares what a user can see with a truth that none of our code computed: pycocotools, the model or
    processor of transformers, float64, a closed form, another decoder. Its first line names both.
(b) One fault, one test. Values go into a loop; another family or process only where it can change the result;
    and no process is started that helpers.py can give.
(c) No name with an underscore and no sentence is asserted, and no function of ours is patched: of a message,
    only the field that it names. Every promise of README.md has one test.
"""

import os
import sys
import tempfile

# The modules lie at the top level, and helpers beside the tests. Processes that tests start inherit all this.
here = os.path.dirname(os.path.abspath(__file__))
paths = [os.path.dirname(here), here]
sys.path[:0] = paths
os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["HF_HUB_OFFLINE"] = "1"  # tests never use the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see train.py
cache = tempfile.TemporaryDirectory()  # holds the indices of data files while the tests run
os.environ["XDG_CACHE_HOME"] = cache.name

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # small tensors gain nothing from more, and two test runs may share the cores

# Triton reads this variable when kernels.py imports it. Without a GPU, a test that asks for the Triton
# kernels then gets Triton's interpreter, which runs them in numpy.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    # pycocotools warns at each mask that it decodes, about numpy 2.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a small toy world: train.json, test.json, videos, ..."""
    import shapes

    folder = tmp_path_factory.mktemp("toy")
    shapes.write_world(folder, train_clips=6, test_clips=2)
    return folder


@pytest.fixture(scope="session")
def final(toy, tmp_path_factory):
    """The tiny model after three steps on the toy world, as train.py saved it."""
    from helpers import run

    out = tmp_path_factory.mktemp("run") / "out"
    run(f"train.py --data {toy}/train.json --out {out} --steps 3 --batch-size 4 --workers 0")
    return out / "final"
