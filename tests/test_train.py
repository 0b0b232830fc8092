"""train.py: the order of samples, the gradient, the optimizer, the files that it writes, and its options."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import Program, box, read_lines, refusal, run, sample, write_json, write_texts
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import train


@pytest.fixture(scope="module")
def here(toy, final, tmp_path_factory):
    """The folder in which the commands run: data files, and `base`, a model to begin with."""
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(final, folder / "base")
    write_texts(folder / "texts.json", 7)
    write_texts(folder / "bad.json", 8, bad=[1])
    entries = json.loads((toy / "train.json").read_text())
    moving = [entry for entry in entries if "video" in entry and "annotation" in entry]
    still = [entry for entry in entries if "image" in entry and "annotation" in entry]
    plain = sample("Which colour is the background?", "a very long answer")
    mixed = [sample("Say red.", "red"), plain | {"video": moving[0]["video"]}, moving[0], moving[1]]
    write_json(folder / "mixed.json", [*mixed, still[0], plain | {"image": still[0]["image"]}])
    return folder


def learn(here, out, options, **how):
    """Trains without workers in the folder. Returns OUT."""
    run(f"train.py --data texts.json --model base --workers 0 --out {out} {options}", folder=here, **how)
    return here / out


def column(out, name):
    """What a run has logged under this name, in order."""
    return [line[name] for line in read_lines(out / "metrics.jsonl") if name in line]


def weights(folder):
    """All weights of a saved model, {name: tensor}."""
    return load_file(folder / "model.safetensors") | load_file(folder / "region_encoder.safetensors")


def load_plain(folder):
    """The saved model and tokenizer, by transformers alone."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, report = AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert not any(report.values()), report
    return model, AutoTokenizer.from_pretrained(folder)


def plain_loss(model, tokenizer, path):
    """(cross-entropy summed over the supervised tokens, their number, all tokens), one sample at a time."""
    loss_sum, supervised, tokens = 0.0, 0, 0
    for entry in json.loads(Path(path).read_text()):
        question, answer = (turn["value"] for turn in entry["conversations"])
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt, answer = (tokenizer(text)["input_ids"] for text in (prompt, answer + "<|im_end|>"))
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        loss_sum += model(input_ids=ids, labels=labels).loss * len(answer)
        supervised += len(answer)
        tokens += len(prompt) + len(answer) + len(tokenizer("\n")["input_ids"])
    return loss_sum, supervised, tokens


# ---- the samples of a step ----
def test_the_order_is_a_row_of_shuffled_epochs_which_the_ranks_share():
    """10 samples in steps of 4, against a permutation's own properties."""

    def keys(ranks, seed=3):
        orders = [list(train.order(10, 4, range(5), seed, rank, ranks)) for rank in range(ranks)]
        return [[key for step in steps for key in step] for steps in zip(*orders)]

    assert keys(1) == keys(2) == keys(4)
    epochs, samples = zip(*[key for step in keys(1) for key in step])
    assert epochs == (0,) * 10 + (1,) * 10
    assert sorted(samples[:10]) == sorted(samples[10:]) == list(range(10))
    assert samples[:10] != samples[10:]
    assert keys(1) != keys(1, seed=4)


def test_an_object_is_cut_to_one_frame_that_depends_on_the_seed(here, toy):
    """With learning rates of 0, a loss tells which frames were used: those of samples that we cut by hand."""
    masks = {0: box(5, 5, 30, 30), 3: box(50, 10, 30, 30), 7: box(40, 60, 40, 30)}
    clip = "videos/train0000.mp4"
    write_json(here / "cut.json", [sample("<region>?", "red", {k: masks[k]}, video=clip) for k in masks])
    write_json(here / "three.json", [sample("<region>?", "red", masks, video=clip)])

    def losses(out, options):
        fixed = f"--media {toy} --train llm --lr 0 --batch-size 1 --steps 6"
        return [round(loss, 4) for loss in column(learn(here, out, f"{fixed} {options}"), "loss")]

    single = losses("cut", "--data cut.json --single-frame 0")
    options = "--data three.json --val three.json --single-frame 1 --seed"
    first, second = (losses(f"cut{n}", f"{options} {n}") for n in (1, 2))
    assert len(set(single)) == 3 and {*first, *second} == {*single}
    assert first != second
    at_start, at_end = column(here / "cut1", "val_loss")
    assert at_start == at_end and round(at_start, 4) not in single  # held-out objects are never cut


def test_the_weights_depend_on_the_seed(here):
    """Random ones, to which a rate of 0 adds nothing. (test_resume.py compares runs of the same seed.)"""
    options = "--model tiny --train llm --lr 0 --steps 1 --seed"
    one, other = (weights(learn(here, f"seed{n}", f"{options} {n}") / "final") for n in (1, 2))
    for name in ("model.visual.blocks.0.attn.qkv.weight", "mlp.1.weight"):
        assert not torch.equal(one[name], other[name])


# ---- the gradient and the optimizer ----
@pytest.mark.parametrize("clip", [2, 0])
def test_a_run_equals_a_plain_loop_over_single_samples(here, clip):
    """Metrics and weights, against transformers' own model and loss, and torch's own clipping and AdamW."""
    options = "--lr 1e-2 --region-lr 2e-2 --warmup 2 --weight-decay 0.5 --steps 6 --micro-batch 3"
    out = learn(here, f"clip{clip}", f"{options} --clip {clip} --train region,projector,llm,vision")
    model, tokenizer = load_plain(here / "base")
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.5}]
    groups += [{"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    shares = [0.5, 1, 1, 1, 1, 1 / 1.8]  # two steps up, and down in the last 30 % of 6
    for step, (line, share) in enumerate(zip(read_lines(out / "metrics.jsonl"), shares, strict=True)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # also in the tower, where matrices decay though texts say nothing
        loss_sum, supervised, tokens = plain_loss(model, tokenizer, here / "texts.json")
        (loss_sum / supervised).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * share
        optimizer.step()
        speeds = [line.pop(name) for name in ("tokens_per_s", "samples_per_s")]
        assert speeds[0] / speeds[1] == pytest.approx(tokens / 7)
        expected = {"step": step, "epoch": step, "supervised_tokens": supervised, "lr": 1e-2 * share}
        expected |= {"loss": loss_sum.item() / supervised, "grad_norm": norm.item()}
        assert line == pytest.approx(expected, rel=1e-4)
    before, after, theirs = weights(here / "base"), weights(out / "final"), model.state_dict()
    for name in before.keys() & theirs.keys():
        moved = (theirs[name] - before[name]).norm()
        assert (after[name] - theirs[name]).norm() <= 1e-4 * moved, name
    # Texts say nothing to the region encoder either. Its rate is another.
    left = math.prod(1 - 2e-2 * share * 0.5 for share in shares)
    for name in before.keys() - theirs.keys():
        expected = before[name] * (left if before[name].ndim == 2 else 1)
        torch.testing.assert_close(after[name], expected)


def test_only_what_train_names_learns(here, toy):
    """What has moved in OUT/final, by transformers' names. (No decay, so that gradients move it.)"""
    before = weights(here / "base")
    regions = load_file(here / "base/region_encoder.safetensors").keys()

    def part_of(name):
        if "visual" in name:
            return "projector" if "merger" in name else "vision"
        return "region" if name in regions else "llm"

    options = f"--data mixed.json --media {toy} --steps 1 --warmup 0 --weight-decay 0 --single-frame 0"
    for parts, rate in (("llm,vision", 2e-5), ("projector,vision", 2e-5), ("region", 1e-3)):
        out = learn(here, parts, f"{options} --train {parts}")
        assert column(out, "lr") == [rate]
        after = weights(out / "final")
        for name in before:
            assert torch.equal(before[name], after[name]) != (part_of(name) in parts), (parts, name)


# ---- held-out data ----
def test_held_out_loss_and_that_training_does_not_notice(here):
    """--val against transformers' own loss; the run, to the bit, against one without. With dropout."""
    shutil.copytree(here / "base", here / "dropout")
    config = here / "dropout/config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    write_texts(here / "held_out.json", 5)
    options = "--model dropout --train llm --steps 3 --micro-batch 2"
    without = learn(here, "without", options)
    out = learn(here, "with", f"{options} --val held_out.json --val-every 2")
    assert column(out, "loss") == column(without, "loss")
    for name, weight in weights(without / "final").items():
        assert torch.equal(weights(out / "final")[name], weight), name
    assert column(out, "step") == [0, 0, 1, 2, 2, 3]
    first, _, last = column(out, "val_loss")
    for loss, folder in ((first, "dropout"), (last, "with/final")):
        with torch.no_grad():
            loss_sum, tokens, _ = plain_loss(*load_plain(here / folder), here / "held_out.json")
        assert loss == pytest.approx(loss_sum.item() / tokens, rel=1e-5)


def test_media_are_looked_for_in_the_folder_of_media_alone(here, toy):
    """--media is that of --data and --val, else their own folder is: both runs have the same held-out loss,
    in micro-batches of any size. A bad held-out sample ends a run that would go on."""
    shutil.copy(here / "mixed.json", toy / "own.json")
    options = "--train llm --lr 0 --steps 2 --max-bad 0"
    media = learn(here, "media", f"--data mixed.json --val mixed.json --media {toy} {options}")
    own = learn(here, "own", f"--data {toy}/own.json --val {toy}/own.json {options} --micro-batch 1")
    assert column(media, "step") == [0, 0, 1, 2]  # measured at the start and the end
    assert column(own, "val_loss") == pytest.approx(column(media, "val_loss"), rel=1e-5)
    out = learn(here, "bad_val", f"--val mixed.json {options} --max-bad 1", code=1)
    assert not (out / "metrics.jsonl").exists() and not (out / "final").exists()


# ---- bad samples and errors ----
def test_a_bad_sample_is_left_out_recorded_once_and_not_replaced(here):
    """Two epochs in steps of one sample. Supervised tokens, against transformers' tokenizer."""
    options = "--data bad.json --train llm --lr 0 --batch-size 1"
    out = learn(here, "left_out", f"{options} --max-bad 0.125 --epochs 2")
    steps = read_lines(out / "metrics.jsonl")
    assert len(steps) == 16 and all(math.isfinite(line["loss"]) for line in steps)
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    entries = json.loads((here / "bad.json").read_text())
    answers = [entry["conversations"][1]["value"] for entry in entries if entry["conversations"]]
    counts = sorted(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)
    for epoch in (steps[:8], steps[8:]):
        assert sorted(line["supervised_tokens"] for line in epoch) == [0, *counts]
        assert all((line["samples_per_s"] > 0) == (line["supervised_tokens"] > 0) for line in epoch)
    (bad,) = read_lines(out / "bad_samples.jsonl")
    assert bad["places"][:2] == ["bad.json", "sample 1 (id 1)"] and bad["reason"]
    assert steps[bad["step"]]["supervised_tokens"] == 0
    for stopped in ("--max-bad 0.12", ""):  # "": more than 1 %
        out = learn(here, f"stopped{stopped[10:]}", f"{options} {stopped} --epochs 1", code=1)
        assert len(read_lines(out / "bad_samples.jsonl")) == 1 and not (out / "final").exists()


def test_errors_take_one_line_and_leave_no_process(here):
    """Of options, the output folder, bad samples, and a worker that was killed (other workers may print)."""
    workers = "--model base --train region --workers 2"
    for options, named in (
        ("--out errors", "--data"),
        ("--data texts.json --out texts.json/run --workers 0", "texts.json/run"),
        (f"--data bad.json --out errors_bad {workers}", "errors_bad"),
        (f"--data texts.json --out killed --steps 100000 {workers}", "DataLoader worker"),
    ):
        with Program(f"train.py {options}", folder=here) as program:
            if "killed" in options:
                program.wait_until((here / "killed/metrics.jsonl").exists)
                pid = program.processes[0].pid
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                os.kill(int(children.split()[0]), signal.SIGKILL)
            text = program.wait(code=1)
            assert named in text.splitlines()[-1] and ("Traceback" not in text or "killed" in options), text
            with pytest.raises(ProcessLookupError):
                program.send(0)  # asks whether a process is left


# ---- OUT and options ----
def test_a_folder_holds_one_run(here, tmp_path):
    """What an earlier run has left is refused, and stays; another file is no run."""
    for left in ("final/config.json", "config.json", "metrics.jsonl", "step-000001/training.pt"):
        write_json(tmp_path / left / left, {})
        options = f"--data d.json --out {tmp_path / left}".split()
        error = str(refusal(train.parse, options))
        assert left.split("/")[0] in error.replace(f"--out {tmp_path / left}", "")
        assert train.parse([*options, "--check"]).check
    write_json(here / "notes/notes.txt", {})
    out = learn(here, "notes", "--train llm --steps 1")
    assert sorted(os.listdir(out)) == ["config.json", "final", "metrics.jsonl", "notes.txt"]


FOR_ALL = {"num_frames": 8, "window": 2, "region_frames": 8, "region_tokens": 4, "max_length": 4096}
FOR_ALL |= {"single_frame": 0.25, "max_bad": 0.01, "batch_size": 7, "warmup": 10, "weight_decay": 0.01}
FOR_ALL |= {"clip": 1.0, "seed": 0, "keep": 2, "micro_batch": 8, "save_every": None, "lora_rank": None}
FOR_ALL |= dict.fromkeys(["resume", "fsdp", "grad_checkpoint"], False)
PRETRAINED = {"frame_pixels": 147456, "region_pixels": 147456, "region_lr": 1e-3}
DEFAULTS = {
    "--model tiny": {"lr": 1e-3, "region_lr": 3e-3, "train": "region,projector,llm,vision"}
    | {"frame_pixels": 1024, "region_pixels": 4096},
    "--model published": PRETRAINED | {"lr": 2e-5, "train": "region"},
}


def test_the_defaults_are_those_that_are_documented(here):
    """OUT/config.json against the numbers; --help has all options."""
    shutil.copytree(here / "base", here / "published")
    os.remove(here / "published/nanorefer.json")  # as on the Hub
    for number, (options, of_kind) in enumerate(DEFAULTS.items()):
        (config,) = read_lines(learn(here, f"default{number}", f"{options} --steps 1") / "config.json")
        expected = FOR_ALL | of_kind
        assert {name: config[name] for name in expected} == expected
    text = " ".join(run("train.py --help").split())
    for name in config:
        assert f"--{name.replace('_', '-')}" in text


def test_how_media_become_tokens_is_saved_and_inherited(here):
    """nanorefer.json beside the model, against the options; the next stage does the same unless told."""
    chosen = {"num_frames": 3, "frame_pixels": 2048, "region_pixels": 8192, "window": 0}
    chosen |= {"region_frames": 5, "region_tokens": 2, "max_length": 999}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    one = learn(here, "stage1", f"{options} --train llm --steps 1")
    two = learn(here, "stage2", "--model stage1/final --num-frames 4 --train llm --steps 1")
    assert json.loads((one / "final/nanorefer.json").read_text()) == chosen
    assert json.loads((two / "final/nanorefer.json").read_text()) == chosen | {"num_frames": 4}


def test_numbers_out_of_range_are_refused_by_name(capsys):
    """The least number of each option is accepted, and what is less, more or no number is not."""
    names = "batch-size micro-batch num-frames keep steps val-every save-every region-frames region-tokens"
    whole = dict.fromkeys(names.split(), 1) | dict.fromkeys(["workers", "window", "warmup", "seed"], 0)
    rates = dict.fromkeys("clip weight-decay lr epochs max-bad single-frame region-lr".split(), 0)
    wrong = [(name, least - 1) for name, least in whole.items()]
    wrong += [(name, value) for name in rates for value in (-1e-3, "nan", "inf")]
    for name, value in [*wrong, ("max-bad", 1.01), ("single-frame", 5), ("lr", "high"), ("no-such", 1)]:
        with pytest.raises(SystemExit) as error:
            train.parse(["--data", "d", f"--{name}={value}"])
        assert error.value.code == 2 and f"--{name}" in capsys.readouterr().err.splitlines()[-1]
    for name, least in (whole | rates | {"max-bad": 1, "single-frame": 1}).items():
        config = train.parse(f"--data d --val v --train region,lora --{name} {least}".split())
        assert getattr(config, name.replace("-", "_")) == least


def test_options_that_do_not_fit_are_refused(here, monkeypatch):
    """Each would be ignored, or end in a traceback. The error names what was found."""
    monkeypatch.chdir(here)
    for options, found in (
        ("--train region --lr 1e-4", "0.0001"),
        ("--train llm --region-lr 1e-4", "0.0001"),
        ("--train regions", "regions"),
        ("--val-every 3", "3"),
        ("--preview p.png", "p.png"),
        ("--problems p.jsonl", "p.jsonl"),
        ("--check --preview absent/p.png", "absent/p.png"),
        ("--device gpu", "gpu"),
        ("--fsdp", "one process"),
        *([] if torch.cuda.is_available() else [("--device cuda", "cuda")]),
    ):
        arguments = f"--data texts.json --out refused --steps 1 {options}".split()
        error = str(refusal(lambda arguments=arguments: train.train(train.parse(arguments))))
        assert f"found '{found}'" in error or f"found {found}" in error, options
    assert not (here / "refused").exists()
