"""--train lora: adapters change nothing until they learn, learn alone, and are merged into OUT/final."""

import json
import re
import signal

import memory
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from safetensors.torch import load_file, save_file
from test_fsdp import agree, observe, two_ranks
from test_train import metrics, mixed, toy, train_here, write_texts  # noqa: F401 (fixtures)
from transformers import AutoModelForImageTextToText

import data
import model as models
import train

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
OPTIONS = "--train region,lora --lora-rank 4 --lr 1e-2 --steps 4 --batch-size 4 --warmup 1 --log-every 1"
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
    """In a checkpoint the base is the one that training began with. In the final model, it is but for the
    matrices of attention and MLP, each of which has changed by a matrix of rank 4 at most."""
    out, _ = one
    base, final = (load_file(path / "model.safetensors") for path in (checkpoint, out / "final"))
    kept = load_file(out / "step-000004" / "model.safetensors")
    assert set(base) == set(kept) == set(final)
    assert all(torch.equal(kept[name], base[name]) for name in base)
    changed = {name for name in base if not torch.equal(final[name], base[name])}
    assert changed == {name for name in base if ADAPTED.fullmatch(name)}
    assert len(changed) == NUMBER_ADAPTED[checkpoint.name]
    for name in changed:
        assert torch.linalg.matrix_rank(final[name] - base[name], rtol=1e-3) <= 4, name
    region = [load_file(out / name / "region_encoder.safetensors") for name in ("step-000002", "final")]
    assert all(not torch.equal(region[0][name], region[1][name]) for name in region[0])


def test_the_merged_model_answers_as_the_adapted_one_and_transformers_alone_loads_it(one, checkpoint, mixed):  # noqa: F811
    out, _ = one
    adapted, merged = (logits_of(out / name, mixed) for name in ("step-000004", "final"))
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5 * float(adapted.abs().max()))
    assert (merged - logits_of(checkpoint, mixed)).abs().max() > 0.1
    assert not list((out / "final").glob("*lora*"))
    alone, report = AutoModelForImageTextToText.from_pretrained(out / "final", output_loading_info=True)
    assert not any(report.values()) and not hasattr(alone, "peft_config")
    assert not [name for name, _ in alone.named_parameters() if "lora" in name or "base_layer" in name]


def test_a_base_in_bfloat16_is_merged_in_float32():
    w, a, b = torch.randn(5, 7).bfloat16(), torch.randn(2, 7), torch.randn(5, 2)
    weights = {"x.base_layer.weight": w, "x.lora_A.default.weight": a, "x.lora_B.default.weight": b}
    (merged,) = models.merge_lora(weights).values()
    expected = w.double() + 2 * b.double() @ a.double()
    torch.testing.assert_close(merged, expected.float(), rtol=1e-6, atol=1e-6)


def test_an_interrupted_run_ends_with_the_same_bits(one, tmp_path):
    """Once stopped by SIGTERM and resumed; once resumed from a checkpoint of another run, half way."""
    out, options = one
    assert observe([*options, "--out", tmp_path / "stopped"], sigterm=True)["exit"] == 128 + signal.SIGTERM
    assert list(train.checkpoints(tmp_path / "stopped")) == [2]
    train_here(*options, "--out", tmp_path / "stopped", "--resume", "latest")
    train_here(*options, "--out", tmp_path / "half", "--resume", out / "step-000002")
    for folder, first in (("stopped", 0), ("half", 2)):
        found = [(m["loss"], m["grad_norm"]) for m in metrics(tmp_path / folder)]
        assert found == [(m["loss"], m["grad_norm"]) for m in metrics(out)[first:]]
        assert final_bytes(tmp_path / folder) == final_bytes(out)


@pytest.fixture(scope="module")
def ranks(one, tmp_path_factory):
    """The same run on two ranks. With micro-batches of one sample, one has text where the other has media."""
    out, options = one
    top = tmp_path_factory.mktemp("ranks")
    jobs = {
        "ddp": ["--micro-batch", 1, "--grad-checkpoint"],
        "fsdp": ["--micro-batch", 1, "--fsdp", "--save-every", 2],
        "one-to-fsdp": ["--fsdp", "--grad-checkpoint", "--resume", out / "step-000002"],
    }
    jobs = {name: [*options, "--out", top / name, *arguments] for name, arguments in jobs.items()}
    two_ranks(jobs, tmp_path_factory.mktemp("meeting"))
    train_here(*options, "--out", top / "fsdp-to-one", "--resume", top / "fsdp" / "step-000002")
    return top


@any_family
@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-to-fsdp", "fsdp-to-one"])
def test_losses_and_the_final_model_are_those_of_one_process(one, ranks, name):
    out, _ = one
    agree(metrics(ranks / name), metrics(out)[2 if "-to-" in name else 0 :])
    for file in ("model.safetensors", "region_encoder.safetensors"):
        found, expected = (load_file(folder / "final" / file) for folder in (ranks / name, out))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ("--train region --lora-rank 4", "--lora-rank: expected a part .*, found region$"),
        ("--lora-rank 4", "--lora-rank: expected a part .*, found region,projector,llm,vision$"),
        ("--train region,llm,lora", "--train: expected either llm or lora, found region,llm,lora"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, arguments, complaint):
    texts = write_texts(tmp_path / "data.json", 2)
    with pytest.raises(SystemExit, match=complaint):
        train_here("--data", texts, "--out", tmp_path / "run", *arguments.split())


def rename(adapters):
    adapters["backbone.model.language_model.layers.9.mlp.up_proj.lora_A.default.weight"] = torch.ones(4, 64)


def drop(adapters):
    del adapters["backbone.model.language_model.layers.0.mlp.up_proj.lora_B.default.weight"]


def narrow(adapters):
    adapters["backbone.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight"] = torch.ones(3, 64)


@any_family
@pytest.mark.parametrize(
    "damage, complaint",
    [
        (rename, "found .*'left over': .*layers.9.mlp.up_"),
        (drop, "found .*'missing': .*layers.0.mlp.up_proj.lora_B"),
        (narrow, r"size mismatch for \S+layers.0.mlp.up_proj.lora_A"),
        (dict.clear, "'missing': "),
    ],
)
def test_adapters_that_do_not_fit_the_layers_are_refused(one, mixed, damage, complaint):  # noqa: F811
    path = one[0] / "step-000002" / "lora.safetensors"
    before, adapters = path.read_bytes(), load_file(path)
    damage(adapters)
    save_file(adapters, path)
    try:
        with pytest.raises(data.DataError, match=complaint):
            logits_of(path.parent, mixed)
    finally:
        path.write_bytes(before)


@any_family
def test_a_new_run_continues_the_adapters_of_a_checkpoint(one, tmp_path):
    out, options = one
    options = [*options, "--model", out / "step-000004", "--out", tmp_path / "run"]
    with pytest.raises(data.DataError, match="expected --lora-rank 4, as in lora.safetensors, found 8"):
        train_here(*options, "--lora-rank", 8)
    train_here(*options, "--steps", 1, "--lr", 0, "--region-lr", 0)
    assert final_bytes(tmp_path / "run") == final_bytes(out)
    settings = json.loads((tmp_path / "run" / "final" / "nanorefer.json").read_text())
    assert settings["frame_pixels"] == 3136


def test_operations_by_formula():
    """Qwen3-VL-2B: 28 layers of q and o 2048 x 2048, k and v 2048 x 1024, three matrices 2048 x 6144; and a
    tower of 24 layers with 4 matrices 1024 x 1024 and 2 of 1024 x 4096, besides its mergers.
    """
    llm = 28 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144)
    vision = 24 * (4 * 1024 * 1024 + 2 * 1024 * 4096)
    region, stage2, everything = (
        memory.operations("2b", train)
        for train in ("region", "region,projector,llm", "region,projector,llm,vision")
    )
    assert stage2 - region == pytest.approx(2 * memory.TOKENS * llm, rel=0.001)
    assert 1 < (everything - stage2) / (4 * memory.PATCHES * vision) < 1.1  # 1.08 with the mergers
    assert region == pytest.approx(2 * (stage2 - region) + (everything - stage2) / 2)
    assert (memory.PATCHES, memory.TOKENS) == (12 * 576, 4 * 144 + 200)


def test_memory_by_formula_counts_the_weights_of_the_published_models():
    """The totals are those that the Hub shows for the two checkpoints. Rank 16 adds 16 rows to each side of a
    matrix: of attention (query and output 2048 x 2048, key and value 1024 x 2048) and of the MLP."""
    backbones = [memory.numel(memory.build(size).backbone.parameters()) for size in ("2b", "8b")]
    assert backbones == [2_127_532_032, 8_767_123_696]
    region, lora = (memory.bytes_by_formula("2b", train, ranks=1) for train in ("region", "region,lora"))
    weights = 28 * 16 * (2 * (2048 + 2048) + 2 * (1024 + 2048) + 3 * (6144 + 2048))
    assert lora[0] - region[0] == 18 * weights
    assert lora[1] - region[1] == (16 + 4 / 28) * weights  # two layers of 28 are gathered, 2 bytes a weight
