"""--train lora: adapters change nothing until they learn, learn alone, and are merged into OUT/final."""

import json
import re
import shutil
import signal

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from safetensors.torch import load_file
from test_fsdp import agree, observe, two_ranks
from test_resume import branch, steps_saved
from test_train import metrics, mixed, toy, train_here, write_texts  # noqa: F401 (fixtures)
from transformers import AutoModelForImageTextToText

import data
import model as models

# Each layer has its matrices of attention, full or linear, and of its MLP; experts are no nn.Linear.
ADAPTED = re.compile(
    r"model\.(language_model\.)?layers\.\d\.(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_\w+|out_proj)"
    r"|mlp\.(shared_expert\.)?(gate|up|down)_proj|mlp\.shared_expert_gate)\.weight"
)
NUMBER_ADAPTED = {
    "qwen3_vl": 3 * (4 + 3),
    "qwen2_5_vl": 3 * (4 + 3),
    "qwen3_vl_moe": 3 * 4,
    "qwen3_5": 2 * 5 + 4 + 3 * 3,
    "qwen3_5_moe": 2 * 5 + 4 + 3 * 4,
}
OPTIONS = "--train region,lora --lora-rank 4 --lr 1e-2 --steps 4 --batch-size 4 --warmup 1"
OPTIONS = [*OPTIONS.split(), *"--workers 0 --frame-pixels 3136 --region-pixels 3136 --keep 9".split()]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / request.param, request.param)


any_family = pytest.mark.parametrize("checkpoint", FAMILIES[:1], indirect=True, scope="module")


@pytest.fixture(scope="module")
def one(checkpoint, mixed, tmp_path_factory):  # noqa: F811
    """OUT of an uninterrupted run on one process, and the options of that run without --out."""
    out = tmp_path_factory.mktemp("one") / "run"
    options = ["--data", mixed, "--model", checkpoint, *OPTIONS]
    train_here(*options, "--out", out, "--save-every", 2)
    return out, options


def logits_of(folder, path, change=lambda model: None):
    """The logits of a model, changed in place, for the samples in a data file."""
    processor = models.load_processor(folder, frame_pixels=3136, region_pixels=3136)
    model = models.load_model(folder, processor).eval()
    change(model)
    samples = data.read_samples(path)
    dataset = data.ReferringDataset(samples, processor)
    with torch.no_grad():
        return model.logits(data.collate([dataset[0, i] for i in range(len(samples))], processor))


def final_bytes(out):
    names = ("model.safetensors", "region_encoder.safetensors")
    return [(out / "final" / name).read_bytes() for name in names]


def test_adapters_change_no_bit_until_they_learn(checkpoint, mixed):  # noqa: F811
    def awake(model):
        model.add_lora(4)
        for p in model.parameter_groups()["lora"]:
            torch.nn.init.normal_(p)

    base = logits_of(checkpoint, mixed)
    assert torch.equal(logits_of(checkpoint, mixed, lambda model: model.add_lora(4)), base)
    assert not torch.allclose(logits_of(checkpoint, mixed, awake), base, atol=0.1)


@any_family
def test_each_parameter_is_in_one_group(checkpoint):
    model = models.load_model(checkpoint, models.load_processor(checkpoint))
    model.add_lora(4)
    grouped = [id(p) for group in model.parameter_groups().values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_only_the_adapters_and_the_region_encoder_learn(checkpoint, one):
    """A checkpoint holds nothing of the base. In the final model, it is the one that training began with, but
    for the matrices of attention and MLP, each of which has changed by a matrix of rank 4 at most."""
    out, _ = one
    base, final = (load_file(path / "model.safetensors") for path in (checkpoint, out / "final"))
    kept = [torch.load(out / f"step-00000{k}" / "training.pt", weights_only=True)["model"] for k in (2, 4)]
    assert all(".lora_" in name or name.startswith("region_encoder.") for name in kept[1])
    assert set(base) == set(final)
    changed = {name for name in base if not torch.equal(final[name], base[name])}
    assert changed == {name for name in base if ADAPTED.fullmatch(name)}
    assert len(changed) == NUMBER_ADAPTED[checkpoint.name]
    for name in changed:
        assert torch.linalg.matrix_rank(final[name] - base[name], rtol=1e-3) <= 4, name
    assert all(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_the_merged_model_answers_as_the_adapted_one_and_transformers_alone_loads_it(one, checkpoint, mixed):  # noqa: F811
    out, _ = one
    adapted, merged = (logits_of(out / name, mixed) for name in ("step-000004", "final"))
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5 * float(adapted.abs().max()))
    assert (merged - logits_of(checkpoint, mixed)).abs().max() > 0.1
    assert not list((out / "final").glob("*lora*"))
    alone, report = AutoModelForImageTextToText.from_pretrained(out / "final", output_loading_info=True)
    assert not any(report.values()) and not hasattr(alone, "peft_config")
    assert not [name for name, _ in alone.named_parameters() if "lora" in name or "base_layer" in name]


@any_family
def test_a_base_in_bfloat16_is_merged_in_float32(checkpoint, tmp_path):
    model = models.load_model(checkpoint, models.load_processor(checkpoint))
    model.add_lora(4)
    q = model.backbone.model.language_model.layers[0].self_attn.q_proj
    q.base_layer.weight.data = w = q.base_layer.weight.detach().bfloat16()
    torch.nn.init.normal_(q.lora_B.default.weight)
    model.save_pretrained(tmp_path, {})
    expected = w.double() + 2 * q.lora_B.default.weight.double() @ q.lora_A.default.weight.double()
    found = load_file(tmp_path / "model.safetensors")["model.language_model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


def test_an_interrupted_run_ends_with_the_same_bits(one, tmp_path):
    """Once stopped by SIGTERM and resumed; once resumed from a checkpoint of another run, half way."""
    out, options = one
    assert observe([*options, "--out", tmp_path / "stopped"], sigterm=True)["exit"] == 128 + signal.SIGTERM
    assert steps_saved(tmp_path / "stopped") == [2]
    train_here("--out", tmp_path / "stopped", "--resume")
    train_here("--out", branch(out, 2, tmp_path / "half"), "--resume")
    assert metrics(tmp_path / "half")[:2] == metrics(out)[:2], "with their times: it did not begin anew"
    for folder in ("stopped", "half"):
        found = [(m["loss"], m["grad_norm"]) for m in metrics(tmp_path / folder)]
        assert found == [(m["loss"], m["grad_norm"]) for m in metrics(out)]
        assert final_bytes(tmp_path / folder) == final_bytes(out)


@pytest.fixture(scope="module")
def ranks(one, tmp_path_factory):
    """The same run on two ranks. With micro-batches of one sample, one has text where the other has media."""
    out, options = one
    top = tmp_path_factory.mktemp("ranks")
    jobs = {
        "ddp": ["--micro-batch", 1, "--grad-checkpoint"],
        "fsdp": ["--micro-batch", 1, "--fsdp", "--save-every", 2],
        "one-to-fsdp": ["--fsdp", "--grad-checkpoint", "--resume"],
    }
    branch(out, 2, top / "one-to-fsdp")
    jobs = {name: [*options, "--out", top / name, *arguments] for name, arguments in jobs.items()}
    two_ranks(jobs, tmp_path_factory.mktemp("meeting"))
    train_here("--out", branch(top / "fsdp", 2, top / "fsdp-to-one"), "--resume", "--no-fsdp")
    return top


@any_family
@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-to-fsdp", "fsdp-to-one"])
def test_losses_and_the_final_model_are_those_of_one_process(one, ranks, name):
    out, _ = one
    agree(metrics(ranks / name), metrics(out))
    if "-to-" in name:
        before = out if name == "one-to-fsdp" else ranks / "fsdp"
        assert metrics(ranks / name)[:2] == metrics(before)[:2], "with their times: it did not begin anew"
    for file in ("model.safetensors", "region_encoder.safetensors"):
        found, expected = (load_file(folder / "final" / file) for folder in (ranks / name, out))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ("--train region --lora-rank 4", "that uses (--)?lora.rank, found 'region'$"),
        ("--lora-rank 4", "that uses (--)?lora.rank, found 'region,projector,llm,vision'$"),
        ("--train region,llm,lora", "--train: .*, not both llm and lora, found 'region,llm,lora'"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, arguments, complaint):
    texts = write_texts(tmp_path / "data.json", 2)
    with pytest.raises(data.DataError, match=complaint):
        train_here("--data", texts, "--out", tmp_path / "run", *arguments.split())


def rename(adapters):
    adapters["backbone.model.language_model.layers.9.mlp.up_proj.lora_A.default.weight"] = torch.ones(4, 64)


def narrow(adapters):
    adapters["backbone.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight"] = torch.ones(3, 64)


@any_family
@pytest.mark.parametrize(
    "damage, complaint",
    [
        (rename, "Unexpected key.* .*layers.9.mlp.up_proj.lora_A"),
        (narrow, r"size mismatch for \S+layers.0.mlp.up_proj.lora_A"),
    ],
)
def test_adapters_that_do_not_fit_the_layers_are_refused(one, mixed, tmp_path, damage, complaint):  # noqa: F811
    folder = shutil.copytree(one[0] / "step-000002", tmp_path / "step-000002")
    ckpt = torch.load(folder / "training.pt", weights_only=True)
    damage(ckpt["model"])
    torch.save(ckpt, folder / "training.pt")
    with pytest.raises(data.DataError, match=complaint):
        logits_of(folder, mixed)


@any_family
def test_a_new_run_begins_with_the_adapted_model_of_a_checkpoint(one, mixed, tmp_path):  # noqa: F811
    """The adapters stay as they are, and there are no others beside them. Its own checkpoint needs both."""
    out, options = one
    options = ["--data", mixed, "--model", out / "step-000004", "--workers", 0, "--steps", 1]
    with pytest.raises(data.DataError, match="expected --train lora: a model without adapters"):
        train_here(*options, "--out", tmp_path / "lora", "--train", "region,lora")
    options += ["--train", "region", "--region-lr", 0, "--save-every", 1]
    train_here(*options, "--out", tmp_path / "run")
    assert final_bytes(tmp_path / "run") == final_bytes(out)
    settings = json.loads((tmp_path / "run" / "final" / "nanorefer.json").read_text())
    assert settings["frame_pixels"] == 3136
    adapted = logits_of(out / "step-000004", mixed)
    assert torch.equal(logits_of(tmp_path / "run" / "step-000001", mixed), adapted)
