"""The model and the loop on a simulated GPU, against the same on a CPU: the rounding alone may differ."""

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from helpers import box, read_lines, sample, write_json
from simulated_gpu import SimulatedGPU, to_cpu
from torch import nn

import data
import eval as evaluation
import model as models
import train

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real GPU")
FAMILIES = {
    "qwen3_vl": ["--train", "region,lora"],  # deepstack
    "qwen2_5_vl": ["--train", "region,projector,llm,vision", "--grad-checkpoint"],  # windows
    "qwen3_5_moe": ["--train", "region,projector"],  # experts and linear attention
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A model whose weights are exact in bfloat16, as published ones are, but for each fifth."""
    path = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    settings = {"num_frames": 3, "frame_pixels": 100**2, "region_pixels": 100**2, "region_tokens": 2}
    processor = models.load_processor(path, **settings)
    model = models.load_model(path, processor)
    for last in (model.region_encoder.mlp[-1], model.region_encoder.position[-1]):
        nn.init.normal_(last.weight, std=0.1)  # or else no gradient would pass
    for i, p in enumerate(model.parameters()):
        p.data = p.data.bfloat16().float() + 2**-20 * (i % 5 == 0)
    model.save_pretrained(path, processor)
    return path


def build(folder, *options):
    """The model as train.py builds it, and its processor."""
    config = train.parse(["--data", "-", "--model", str(folder), "--out", f"{folder}/new", *options])
    processor = models.load_processor(folder)
    train.fill_in_defaults(config, processor, 4)
    return train.build_model(config, processor, torch.device("cpu"))[0], processor


@pytest.fixture(scope="module")
def few(toy):
    """A data file with a sample of each kind."""
    left, right = box(5, 5, 30, 25), box(40, 30, 30, 25)
    video, image = {"video": "videos/test0000.mp4"}, {"image": "images/test0000-2.png"}
    objects = {"0": left, "3": right, "7": left}, {"2": right}
    entries = [
        sample("What?", "Never."),
        sample("<video>\nIs <region> by <region>?", "Yes.", *objects) | video,
        sample("<image>\nWhat is it?", "Shapes in a picture.") | image,
        sample("<image>\nWhat is <region>?", "A box.", {"0": right}) | image,
    ]
    return write_json(toy / "few.json", entries)


def step(model, batch):
    """Returns the loss, and the gradients that a step makes."""
    loss = to_cpu(train.backward(model, [batch]))
    return loss, {name: to_cpu(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def test_a_step_in_mixed_precision_mixes_nothing_and_waits_for_nothing(folder, few):
    """Frozen weights that bfloat16 holds exactly, and matrix products, are in bfloat16."""
    [options] = (options for family, options in FAMILIES.items() if family in str(folder))
    model, processor = build(folder, *options)
    dataset = data.ReferringDataset(data.read_samples(few), processor)
    batch = data.collate([dataset[0, i] for i in range(4)], processor)
    expected_loss, expected = step(model, batch)
    model.zero_grad()
    low_bits = {name: p.detach().numpy().view(np.uint32) & 0xFFFF for name, p in model.named_parameters()}
    with SimulatedGPU() as gpu:
        train.halve_frozen(model)
        model.to("cuda")
        for name, p in model.named_parameters():
            is_half = not p.requires_grad and not low_bits[name].any()
            assert p.is_cuda and p.dtype == (torch.bfloat16 if is_half else torch.float32), name
        batch = train.to_device(batch, torch.device("cuda"))
        gpu.waits.clear()
        loss, gradients = step(model, batch)
        assert not gpu.waits
        # What is kept in bfloat16 changes no logit by a bit.
        with torch.no_grad():
            logits = to_cpu(model.logits(batch))
            model.float()
            assert logits.dtype == torch.bfloat16 and torch.equal(logits, to_cpu(model.logits(batch)))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected_loss.item(), rel=0.01)
    found, expected = (torch.cat([x[name].flatten() for name in gradients]) for x in (gradients, expected))
    assert (found - expected).norm() < 0.2 * expected.norm()  # 0.03 to 0.12


def test_a_run_on_the_gpu_has_the_losses_of_one_on_the_cpu_and_waits_once_a_step(folder, few, tmp_path):
    """A step waits for the loss and the norm, which decide whether it is taken."""
    for device in ("cpu", "cuda"):
        options = f"--data {few} --val {few} --model {folder} --out {tmp_path}/{device} --device {device}"
        options += " --train region,projector --steps 2 --batch-size 4 --micro-batch 2 --workers 0"
        with SimulatedGPU() as gpu:
            train.train(train.parse(options.split()))
    assert gpu.waits["train"] == 2 and not gpu.waits["to_device"]
    on_cpu, on_gpu = (read_lines(tmp_path / device / "metrics.jsonl") for device in ("cpu", "cuda"))
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        for name in {"loss", "grad_norm", "val_loss"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=0.02), name


def test_questions_are_answered_on_the_gpu(folder, few):
    """As many tokens as are asked for, and no device is mixed: in bfloat16 they need not be the CPU's."""
    model, processor = build(folder)
    questions = evaluation.Questions(data.read_samples(few), processor)
    with SimulatedGPU():
        model.eval().to("cuda")
        batch = data.collate([questions[i, 0] for i in range(4)], processor, for_generation=True)
        model.end_token_ids = set()
        answers = model.generate(train.to_device(batch, torch.device("cuda")), max_new_tokens=3)
    assert list(map(len, answers)) == [3] * 4


def test_the_simulation_tells_devices_apart_and_counts_waits():
    """What torch's manual says of CUDA: what waits, what does not, and what mixes devices."""
    with SimulatedGPU() as gpu:
        x = torch.arange(3.0, device="cuda")
        torch.where(x > 1, x, torch.tensor(1.0)).index_select(0, x.long())
        torch.ones(3).to(x.device, non_blocking=True)
        assert not gpu.waits
        x[x > 1], x[0].item(), x.copy_(torch.ones(3))
        assert gpu.waits.total() == 3
        with pytest.raises(AssertionError, match="CPU"):
            torch.cat([x, torch.ones(3)])
