"""A training step on a simulated GPU: no operation mixes devices, and the CPU hardly ever waits."""

from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from simulated_gpu import GPUTensor, SimulatedGPU, to_cpu
from test_model import batch_of, checkpoint, give_regions_weight, loaded, world  # noqa: F401 (fixtures)
from test_pack import join, relative_error
from test_train import train_here
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint as checkpoint_layer
from transformers import AutoModelForImageTextToText

import data
import eval as evaluation
import model as models
import train

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real GPU")


@pytest.fixture
def ready(loaded, world):  # noqa: F811
    """(model, a batch with every kind of sample), and as many gradients as possible that are not 0."""
    model, processor = loaded
    give_regions_weight(model)
    return model.train(), batch_of(world, processor, [4, 1, 0, 2, 5, 3])


def step(model, batch):
    """Returns the loss and the gradients that a step makes, on the CPU."""
    loss = train.backward(model, [batch])
    gradients = {name: to_cpu(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return to_cpu(loss), gradients


def step_on_gpu(model, batch, exact=False):
    """Returns the same, and where the CPU waited for the GPU."""
    with SimulatedGPU(exact) as gpu:
        model.to(gpu.device)
        gpu.waits.clear()
        return *step(model, train.to_device(batch, gpu.device)), gpu.waits


def test_a_step_on_the_gpu_equals_one_on_the_cpu(ready):
    model, batch = ready
    expected_loss, expected = step(model, batch)
    loss, gradients, _ = step_on_gpu(model, batch, exact=True)
    assert all(isinstance(p, GPUTensor) for p in model.parameters())
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize(
    "names, grad_checkpoint",
    [("region", False), ("region,lora", False), ("region,projector,llm,vision", True)],
)
def test_a_step_in_mixed_precision_mixes_nothing_and_waits_for_nothing(ready, names, grad_checkpoint):
    """As train.py does it on a GPU: frozen weights, and what goes into matrix products, are bfloat16. The
    goal was that a micro-batch waits for the GPU ten times at most."""
    model, batch = ready
    if "lora" in names:
        model.add_lora(4)
    train.choose_parameters(model, train.Config(train=names, lr=1.0, region_lr=1.0))
    for p in model.parameters():  # as published weights, so that halve_frozen finds them exact
        p.data = p.data.bfloat16().float()
    expected_loss, expected = step(model, batch)
    train.halve_frozen(model)
    if grad_checkpoint:
        for layer in model.layers():  # as train.build_model does
            layer.forward = partial(checkpoint_layer, layer.forward, use_reentrant=False)
    loss, gradients, waits = step_on_gpu(model, batch)
    assert not waits
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected_loss.item(), rel=0.01)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
    # 0.03 to 0.12, most where another expert is chosen.
    assert relative_error(*(join(x, gradients) for x in (gradients, expected))) < 0.2


def test_frozen_weights_in_bfloat16_change_no_logit_by_a_bit(checkpoint, loaded, world):  # noqa: F811
    """Those that bfloat16 holds exactly are halved, among others that are not. With the embeddings, what the
    layers add up had become bfloat16, too, which it is not in evaluation."""
    (model, processor), logits = loaded, []
    give_regions_weight(model)
    halved = models.load_model(checkpoint, processor).eval()
    learning = [*halved.region_encoder.parameters()]
    for i, p in enumerate(model.parameters()):
        p.data = p.data.bfloat16().float() + (1e-3 if i % 5 == 0 else 0)
    halved.load_state_dict(model.state_dict())
    train.choose_parameters(halved, train.Config(train="region", lr=1.0, region_lr=1.0))
    train.halve_frozen(halved)
    for i, (p, before) in enumerate(zip(halved.parameters(), model.parameters())):
        stays = i % 5 == 0 or any(p is other for other in learning)
        assert p.dtype == (torch.float32 if stays else torch.bfloat16) and torch.equal(p.float(), before)
    batch = batch_of(world, processor, [4, 1, 0, 2, 5, 3])
    for each in (model, halved):
        with torch.no_grad(), SimulatedGPU() as gpu:
            each.to(gpu.device)
            logits.append(to_cpu(each.logits(train.to_device(batch, gpu.device))))
    assert torch.equal(*logits)


def test_a_model_with_halved_weights_loads_whole_with_transformers_alone(checkpoint, tmp_path):  # noqa: F811
    """transformers would have written the dtype of the first weight, and loaded those that learned in it."""
    processor = models.load_processor(checkpoint)
    model = models.load_model(checkpoint, processor)
    train.choose_parameters(model, train.Config(train="region,llm", lr=1.0, region_lr=1.0))
    for p in model.parameters():
        p.data = p.data + 1e-4 if p.requires_grad else p.data.bfloat16().float()
    train.halve_frozen(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    model.save_pretrained(tmp_path, asdict(processor.settings))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    for name, weight in model.backbone.state_dict().items():
        assert plain[name].dtype == torch.float32 and torch.equal(plain[name], weight.float()), name


def test_a_step_of_the_whole_loop_waits_once(world, tmp_path, monkeypatch):  # noqa: F811
    """train.train itself, with norm and optimizer, has the losses that it has on the CPU.
    Whatever the number of micro-batches, a step waits for the loss and the norm, which decide whether it is
    taken. With several ranks, the counts of all go to the GPU and back."""
    waits, backward = [], train.backward

    def watched(*args):
        waits.append(gpu.waits.copy())
        return backward(*args)

    monkeypatch.setattr(train, "save_final", lambda *args: None)
    options = ["--data", world[1] / "data.json", "--steps", 3, "--batch-size", 6, "--micro-batch", 2]
    options += ["--workers", 0]
    train_here(*options, "--out", tmp_path / "cpu")
    with SimulatedGPU(exact=True) as gpu:
        monkeypatch.setattr(train, "backward", watched)
        monkeypatch.setattr(train, "init_distributed", torch.device)  # torch.cuda does not know of it
        train_here(*options, "--out", tmp_path / "gpu", "--device", "cuda")
    on_cpu, on_gpu = (train.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("cpu", "gpu"))
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in on_gpu] == pytest.approx([m[name] for m in on_cpu], rel=1e-4)
    of_a_step = {"train.py train aten._to_copy": 1}
    assert waits[1] - waits[0] == waits[2] - waits[1] == of_a_step


def test_evaluation_on_the_gpu_equals_that_on_the_cpu(loaded, world):  # noqa: F811
    model, processor = loaded
    keys = [(q["sample"], q["turn"]) for q in evaluation.read_questions(world[0], strict=True)]

    def evaluate():
        dataset = evaluation.Questions(world[0], processor)
        replies = [*evaluation.generate_replies(model, dataset, [keys], max_new_tokens=3)]
        dataset = data.ReferringDataset(world[0], processor)
        return replies, train.mean_loss(model, dataset, batch_size=4, workers=0)

    replies, loss = evaluate()
    with SimulatedGPU(exact=True) as gpu:
        model.to(gpu.device)
        assert evaluate() == (replies, pytest.approx(loss, rel=1e-5))


# ---- the simulation itself


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: x.index_select(0, y.long()),
        lambda x, y: F.linear(x[None], y[None]),
        lambda x, y: x.requires_grad_().mul(2).backward(y),
    ],
)
def test_tensors_of_two_devices_do_not_mix(mix):
    with SimulatedGPU() as gpu:
        x, y = torch.ones(3, device=gpu.device), torch.ones(3)
        mix(x, y.to(gpu.device))
        with pytest.raises((AssertionError, RuntimeError), match="CPU|device"):
            mix(x, y)
        assert (x + torch.tensor(1.0)).device == gpu.device  # a number may come from the CPU


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0]),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.index_put((x > 1,), x[:1]),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_what_waits_for_the_gpu_is_counted(wait):
    with SimulatedGPU() as gpu:
        x = torch.arange(3.0, device=gpu.device)
        wait(x)
        assert gpu.waits.total() == 1, gpu.waits


@pytest.mark.parametrize(
    "go_on",
    [
        lambda x: x.index_select(0, x.long()),
        lambda x: x[x.long()],
        lambda x: x.masked_fill(x > 1, 0),
        lambda x: torch.where(x > 1, x, 0),
        lambda x: x.repeat_interleave(x.long(), output_size=3),
        lambda x: x.argsort().bfloat16(),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x.copy_(torch.ones(3), non_blocking=True),
    ],
)
def test_what_does_not_wait_is_not_counted(go_on):
    with SimulatedGPU() as gpu:
        go_on(torch.arange(3.0, device=gpu.device))
        assert not gpu.waits


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": torch.float32},
        {"size": 12},
        {"bounds": [0, 3, 5]},
        {"bounds": [0.0, 3.0, 6.0]},
        {"longest": 2},
        {"window_size": (-1, 1)},
        {"device": "cpu"},
    ],
)
def test_flash_attention_is_particular_about_its_arguments(wrong):
    given = {"dtype": torch.bfloat16, "size": 8, "bounds": [0, 3, 6], "longest": 3, "window_size": (-1, 0)}

    def attend(dtype, size, bounds, longest, window_size, device=SimulatedGPU.device):
        x = torch.ones(6, 2, size, dtype=dtype, device=SimulatedGPU.device)
        is_float = isinstance(bounds[0], float)
        bounds = torch.tensor(bounds, dtype=torch.float32 if is_float else torch.int32, device=device)
        return varlen_attn(x, x, x, bounds, bounds, longest, longest, scale=1.0, window_size=window_size)

    with SimulatedGPU():
        assert to_cpu(attend(**given)).tolist() == torch.ones(6, 2, 8).tolist()
        with pytest.raises(AssertionError):
            attend(**given | wrong)
