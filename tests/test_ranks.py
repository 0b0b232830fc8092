"""Several ranks do together what one process does, or all end; and LoRA, also on ranks.

The truths: one process on the same data, plain algebra in float64, transformers' own model.
"""

import json
import os
import re
import shutil
import socket

import pytest
import torch
import torch.distributed as dist
from checkpoints import make_checkpoint
from helpers import Program, box, read_lines, run, sample, write_json, write_texts
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText

import data
import eval as evaluation
import model as models
import train

STEPS = "--steps 3 --batch-size 4 --workers 0 --warmup 1 --num-frames 2"


@pytest.fixture(scope="module")
def mixed(toy):
    """Text alone, an image and a video without regions, a video with regions: in micro-batches of one sample,
    a rank computes on text alone while the other has pictures."""
    entries = json.loads((toy / "train.json").read_text())
    image = next(entry["image"] for entry in entries if "image" in entry)
    asks = next(entry for entry in entries if "video" in entry and "annotation" in entry)
    samples = [sample("Say red.", "red"), sample("What is it?", "a very long answer", image=image)]
    samples += [sample("What colour is the background?", "blue", video=asks["video"]), asks]
    return write_json(toy / "mixed.json", samples)


@pytest.fixture(scope="module")
def held_out(toy):
    """Five samples: in micro-batches of one, the second of two ranks has a forward pass less to do."""
    return write_json(toy / "held_out.json", json.loads((toy / "test.json").read_text())[:5])


@pytest.fixture(scope="module")
def command(mixed, held_out):
    return f"train.py --data {mixed} --val {held_out} --val-every 1 {STEPS}"


@pytest.fixture(scope="module")
def one(command, tmp_path_factory):
    """OUT of a run on one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(f"{command} --out {out}")
    return out


def assert_same_training(found, expected, atol=1e-4):
    """All that is logged but times, and OUT/final, up to rounding."""
    found_lines, expected_lines = (read_lines(out / "metrics.jsonl") for out in (found, expected))
    assert len(found_lines) == len(expected_lines)
    for line, other in zip(found_lines, expected_lines):
        assert line.keys() == other.keys()
        for name in line.keys() - {"tokens_per_s", "samples_per_s"}:
            assert line[name] == pytest.approx(other[name], rel=2e-5), name
    for name in ("model.safetensors", "region_encoder.safetensors"):
        weights = (load_file(out / "final" / name) for out in (found, expected))
        torch.testing.assert_close(*weights, rtol=0, atol=atol)


# ---- training on ranks ----
@pytest.mark.parametrize("options", ["", "--fsdp --grad-checkpoint --micro-batch 2"])
def test_two_ranks_train_and_measure_as_one_process(command, one, tmp_path, options):
    """Losses on training and held-out data, gradient norms, counts, weights."""
    run(f"{command} --out {tmp_path / 'run'} --micro-batch 1 {options}", ranks=2)
    assert_same_training(tmp_path / "run", one)


def test_fsdp_keeps_half_of_the_weights_and_gathers_a_layer_at_a_time():
    """Two ranks that torch pretends, with the share of a rank by division. A layer is gathered by itself."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        model = models.load_model("tiny", models.load_processor("tiny", ["a text"]))
        total = sum(p.numel() for p in model.parameters())
        train.shard(model, torch.device("cpu"))
        share = sum(p.to_local().numel() for p in model.parameters()) / total
    finally:
        dist.destroy_process_group()
    assert share == pytest.approx(1 / 2, abs=0.01)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(units) == 2 + 3 + 1  # layers of the tower, of the LLM, and all else


def test_grad_checkpoint_computes_each_layer_twice(mixed, tmp_path):
    """Counted by torch's hook in an MLP of each of the 2 + 3 layers."""
    counts = []
    for options in ([], ["--grad-checkpoint"]):
        seen, out = [], ["--out", str(tmp_path / f"{len(options)}"), "--data", str(mixed)]
        hook = torch.nn.modules.module.register_module_forward_pre_hook
        with hook(lambda module, _, seen=seen: seen.append(type(module).__name__)):
            train.train(train.parse([*out, *options, *STEPS.split(), "--steps", "1"]))
        counts.append(seen.count("Qwen3VLTextMLP") + seen.count("Qwen3VLVisionMLP"))
    assert counts == [2 + 3, 2 * (2 + 3)]


def test_a_bad_sample_of_one_rank(mixed, tmp_path):
    """It is left out as on one process, or ends all ranks. It is rank 1's, while rank 0 writes the files."""
    [keys] = train.order(4, 4, range(1), seed=0, rank=1, world_size=2)
    entries = json.loads(mixed.read_text())
    entries[keys[0][1]] = sample("What?", "That.", image="absent.png")
    path = write_json(mixed.with_name("one_bad.json"), entries)
    command = f"train.py --data {path} {STEPS} --max-bad"
    run(f"{command} 0.5 --out {tmp_path / 'one'}")
    run(f"{command} 0.5 --out {tmp_path / 'two'} --fsdp --micro-batch 1", ranks=2)
    assert_same_training(tmp_path / "two", tmp_path / "one")
    run(f"{command} 0.2 --out {tmp_path / 'strict'}", ranks=2, code=1)
    for name in ("one", "two", "strict"):
        [line] = read_lines(tmp_path / name / "bad_samples.jsonl")
        assert line["step"] == 0 and line["places"][:2] == [str(path), f"sample {keys[0][1]}"]
    assert not (tmp_path / "strict" / "final").exists()


def test_a_batch_is_a_multiple_of_the_ranks(tmp_path):
    """By default the largest one up to 16; one that is given and does not fit ends all ranks. Workers: ranks
    share the cores."""
    path = write_texts(tmp_path / "data.json", 20)
    command = f"train.py --data {path} --steps 2 --out {tmp_path}"
    run(f"{command}/run", ranks=3)
    [config] = read_lines(tmp_path / "run" / "config.json")
    assert config["workers"] == min(16, max(1, len(os.sched_getaffinity(0)) // 3))
    assert [line["epoch"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 15 / 20]
    assert "found 16" in run(f"{command}/other --batch-size 16", ranks=3, code=1)
    assert not (tmp_path / "other").exists()


def test_errors_end_all_ranks(mixed, tmp_path):
    """A held-out sample that only rank 1 reads; an OUT of each rank's own, of which one has a checkpoint."""
    bad = [sample("What?", "That."), sample("What?", "That.", image="absent.png")]
    path = write_json(tmp_path / "bad.json", bad)
    text = run(f"train.py --data {mixed} --val {path} --out {tmp_path / 'run'} {STEPS}", ranks=2, code=1)
    assert text.count(f"{path}: sample 1: ") == 2
    folders = [tmp_path / f"machine {rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    command = f"train.py --data {mixed} --out out {STEPS} --save-every 2 --resume"
    run(command, folder=folders[0])
    (folders[0] / "out" / "final").rename(tmp_path / "final")
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    with (
        Program(command, folder=folders[0], RANK="0", LOCAL_RANK="0", **place) as first,
        Program(command, folder=folders[1], RANK="1", LOCAL_RANK="0", **place) as second,
    ):
        for program in (first, second):
            assert "(2, 4, 0), (None, 4, 0)" in program.wait(1)


def test_a_rank_without_memory_ends_all_ranks_and_leaves_no_process(mixed, tmp_path):
    """With workers, in a step, in a measurement and in saving: a function of torch fails on rank 0 alone."""
    program = "import os, torch, train\ndef fail(*_, **__): raise torch.OutOfMemoryError('simulated')\n"
    program += "if os.environ['RANK'] == '0': torch.{} = fail\n"
    program += "with train.errors_in_one_line(): train.train(train.parse())"
    loss = "nn.functional.cross_entropy"
    fails = (loss, ""), (loss, f"--val {mixed}"), ("save", "--save-every 1")
    for i, (name, options) in enumerate(fails):
        (tmp_path / "fails.py").write_text(program.format(name))
        command = f"{tmp_path}/fails.py --data {mixed} {STEPS} --workers 2 --out {tmp_path}/{i} {options}"
        with Program(command, ranks=2) as ranks:
            assert "OutOfMemoryError: simulated" in ranks.wait(1)
            for rank in range(2):
                with pytest.raises(ProcessLookupError):
                    ranks.send(0, rank)  # asks whether a process is left


# ---- evaluation on ranks ----
def test_a_data_file_is_evaluated_on_ranks_as_on_one_process(toy, final, tmp_path):
    """Replies, table and loss. 7 samples in batches of 2: the ranks have unequal shares."""
    path = write_json(toy / "few.json", json.loads((toy / "test.json").read_text())[3:10])
    command = f"eval.py data {path} --model {final} --control full shuffle blind --max-new-tokens 4"
    command += f" --workers 0 --batch-size 2 --device cpu --out {tmp_path}"
    run(f"{command}/one")
    text = run(f"{command}/two", ranks=2)
    one, two = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert two == one and len({line["exact"] for line in one}) > 1
    assert {"full", "shuffle", "blind"} <= set().union(*one)
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert two["rows"] == one["rows"] and two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert text.count("constant") == 1, "one rank prints"
    shares = [len(read_lines(tmp_path / "two" / "parts" / f"none-{rank}.jsonl")) for rank in range(2)]
    assert shares in ([4, 3], [3, 4])


def test_what_ranks_could_not_ask_is_asked_by_the_next_run(toy, final, tmp_path):
    """A benchmark goes on without an entry of rank 1, whose picture is there in the next run, on one rank."""
    clip = next(toy.glob("videos/*.mp4"))
    ask = {"Question": "What is <region>?", "options": ["(A) red", "(B) blue"], "Answer": "(A) red"}
    ask |= {"annotation": [{"0": {"segmentation": box(4, 4, 20, 20)}}], "frame_idx": "0"}
    entries = [ask | {"video": name} for name in (str(clip), "absent.mp4", str(clip))]
    path = write_json(tmp_path / "q.json", entries)
    command = f"eval.py bench-q {path} --model {final} --workers 0 --device cpu --out {tmp_path / 'out'}"
    for ranks, missing in ((2, 1), (1, 0)):
        run(f"{command} --max-new-tokens 4", ranks=ranks)
        scores = json.loads((tmp_path / "out" / "scores.json").read_text())
        unasked = [line["pred"] is None for line in read_lines(tmp_path / "out" / "predictions.jsonl")]
        assert scores["not_asked"] == missing and unasked == [False, bool(missing), False]
        (tmp_path / "absent.mp4").write_bytes(clip.read_bytes())


# ---- LoRA ----
# Matrices of attention, full or linear, and MLP. Routed experts have none of their own.
ADAPTED = re.compile(
    r"model\.language_model\.layers\.\d\.(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_\w+|out_proj)"
    r"|mlp\.(shared_expert\.)?(gate|up|down)_proj|mlp\.shared_expert_gate)\.weight"
)
NUMBER_ADAPTED = {"qwen3_vl": 3 * (4 + 3), "qwen3_5_moe": 2 * 5 + 4 + 3 * 4}
LORA = "--train region,lora --lora-rank 4 --lr 1e-2 --frame-pixels 3136 --region-pixels 3136"


@pytest.fixture(scope="module", params=NUMBER_ADAPTED)
def adapted(request, mixed, tmp_path_factory):
    """A command, its base, and OUT of its run on one process."""
    top = tmp_path_factory.mktemp(request.param)
    base = make_checkpoint(top / request.param, request.param)
    command = f"train.py --data {mixed} --model {base} {STEPS} {LORA}"
    run(f"{command} --out {top / 'run'} --save-every 3")
    return command, base, top / "run"


def test_adapters_learn_alone_and_are_merged(adapted):
    """In float64: W + 2 B A, of the base and of the checkpoint; all else is the base's, to the bit. Logits of
    a text with the adapters of the checkpoint are those of transformers alone with OUT/final."""
    _, base, out = adapted
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out / "final"))
    learned = torch.load(out / "step-000003" / "training.pt", weights_only=True)["model"]
    assert all(".lora_" in name or name.startswith("region_encoder.") for name in learned)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if ADAPTED.fullmatch(name)}
    assert len(changed) == NUMBER_ADAPTED[base.name]
    for name in changed:
        layer = "backbone." + name.removesuffix(".weight")
        a, b = (learned.pop(f"{layer}.lora_{side}.default.weight").double() for side in "AB")
        assert a.shape[0] == b.shape[1] == 4
        expected = before[name].double() + 2 * b @ a
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert not [name for name in learned if ".lora_" in name]
    model, processor = evaluation.load(out / "step-000003", "cpu")
    question = sample("What is 2 + 2?", "4, of course")
    encoded = data.ReferringDataset([data.parse_sample(question, ("a",), "", 0)], processor)[0, 0]
    alone = AutoModelForImageTextToText.from_pretrained(out / "final").eval()
    with torch.no_grad():
        found = model.logits(data.collate([encoded], processor))
        expected = alone(input_ids=torch.as_tensor(encoded["input_ids"])[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_lora_on_two_ranks(adapted, tmp_path):
    """Against one process. Experts that are frozen, and embeddings that are not tied, are sharded as well."""
    command, base, out = adapted
    options = {"qwen3_vl": "", "qwen3_5_moe": "--fsdp --grad-checkpoint"}[base.name]
    run(f"{command} --out {tmp_path / 'run'} --micro-batch 1 {options}", ranks=2)
    assert_same_training(tmp_path / "run", out, atol=2e-4)


def test_adapters_change_nothing_at_first_and_have_defaults(tmp_path):
    """The first loss is that of the base to the bit; rank 16 and a rate of 2e-4 after the warm-up."""
    command = f"train.py --data {write_texts(tmp_path / 'data.json', 4)} --workers 0 --steps 1 --warmup 1"
    lines = []
    for parts in ("region", "region,lora"):
        run(f"{command} --train {parts} --out {tmp_path / parts}")
        lines += read_lines(tmp_path / parts / "metrics.jsonl")
    assert lines[0]["loss"] == lines[1]["loss"] and lines[1]["lr"] == 2e-4
    [config] = read_lines(tmp_path / "region,lora" / "config.json")
    assert config["lora_rank"] == 16


def test_a_base_in_bfloat16_is_merged_in_float32(tmp_path):
    """As on a GPU. Against the same algebra in float64."""
    base = make_checkpoint(tmp_path / "base", "qwen3_vl")
    processor = models.load_processor(base)
    model = models.load_model(base, processor)
    model.add_lora(4)
    q = model.backbone.model.language_model.layers[0].self_attn.q_proj
    q.base_layer.weight.data = w = q.base_layer.weight.detach().bfloat16()
    torch.nn.init.normal_(q.lora_B.default.weight)
    model.save_pretrained(tmp_path, processor)
    expected = w.double() + 2 * q.lora_B.default.weight.double() @ q.lora_A.default.weight.double()
    saved = load_file(tmp_path / "model.safetensors")
    found = saved["model.language_model.layers.0.self_attn.q_proj.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adapted", ["qwen3_vl"], indirect=True, scope="module")
def test_what_lora_cannot_do_is_one_error(adapted, mixed, tmp_path):
    """Options that would do nothing, adapters beside llm or over adapters, and ones that do not fit."""
    _, _, out = adapted
    torn = shutil.copytree(out / "step-000003", tmp_path / "torn")
    ckpt = torch.load(torn / "training.pt", weights_only=True)
    name = next(name for name in ckpt["model"] if "lora_A" in name)
    ckpt["model"][name] = ckpt["model"][name][:3]
    torch.save(ckpt, torn / "training.pt")
    cases = [
        ("--train region --lora-rank 4", "lora_rank"),
        ("--lora-rank 4", "lora_rank"),
        ("--train region,llm,lora", "region,llm,lora"),
        (f"--model {out / 'step-000003'} --train region,lora", "--train"),
        (f"--model {torn} --train region", name),
    ]
    for options, named in cases:
        arguments = f"--data {mixed} --out {tmp_path / 'run'} --workers 0 --steps 1 {options}"
        with pytest.raises(data.DataError) as error:
            train.train(train.parse(arguments.split()))
        assert named in str(error.value) and not (tmp_path / "run").exists()
