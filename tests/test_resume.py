"""Runs that are killed, stopped or broken continue as if nothing had happened: equal losses, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import torch
from test_train import TOP, launch, metrics, run, toy, train_here, write_texts  # noqa: F401 (toy is a fixture)

import data
import train

# Steps of 5 samples in micro-batches of 2, epochs of 7 samples: steps straddle epochs, and the last micro-
# batch is smaller.
SHAPE = "--batch-size 5 --micro-batch 2 --workers 2 --warmup 2 --steps 12".split()
SHAPE += "--log-every 1 --single-frame 0.5".split()


@pytest.fixture(scope="module")
def seven(toy):  # noqa: F811
    path = toy / "seven.json"
    path.write_text(json.dumps(json.loads((toy / "train.json").read_text())[:7]))
    return path


@pytest.fixture(scope="module")
def uninterrupted(seven, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run("train.py", "--data", seven, "--out", out, *SHAPE)
    return out


def what_must_agree(folder):
    """The logged values that a step determines, and the bytes of the final model."""
    timeless = [
        {name: m[name] for name in ("step", "epoch", "loss", "lr", "grad_norm", "supervised_tokens")}
        for m in metrics(folder)
    ]
    return timeless, *(
        (folder / "final" / name).read_bytes() for name in ("model.safetensors", "region_encoder.safetensors")
    )


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=TOP, env=environment, start_new_session=True, **output
    )


def when_steps_are_logged(process, out, steps, patience=240):
    """Waits until the run has logged so many steps, or ended."""
    deadline = time.monotonic() + patience
    while process.poll() is None and len(train.read_jsonl(out / "metrics.jsonl")) < steps:
        assert time.monotonic() < deadline, "no progress"
        with (
            pytest.raises(subprocess.TimeoutExpired)
            if process.poll() is None
            else pytest.MonkeyPatch.context()
        ):
            process.wait(timeout=0.02)


def test_killed_again_and_again_it_ends_with_the_same_bits(seven, uninterrupted, tmp_path):
    out, rng, kills = tmp_path / "run", random.Random(0), 0
    while not (out / "final").exists():
        process = start(
            "train.py", "--data", seven, "--out", out, "--save-every", 1, "--resume", "latest", *SHAPE
        )
        before = len(train.read_jsonl(out / "metrics.jsonl"))
        if kills < 5:
            when_steps_are_logged(process, out, max(before - 1, 0) + rng.randint(1, 3))
            with_luck_in_a_save = rng.uniform(0, 0.3)
            try:
                process.wait(timeout=with_luck_in_a_save)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
        output, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), output[-3000:]
    assert kills >= 3 and what_must_agree(out) == what_must_agree(uninterrupted)
    assert sorted(os.listdir(out)) == ["final", "metrics.jsonl", "step-000011", "step-000012"]


def test_sigterm_saves_exits_and_the_run_goes_on(seven, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start("train.py", "--data", seven, "--out", out, *SHAPE)
    when_steps_are_logged(process, out, 3)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's processes get it too, as from torchrun
    output, _ = process.communicate(timeout=240)
    assert (
        process.returncode == 128 + signal.SIGTERM
        and "--resume latest continues" in output
        and "Traceback" not in output
    )
    (done,) = train.checkpoints(out)
    assert 3 <= done < 12 and not (out / "final").exists()
    run("train.py", "--data", seven, "--out", out, "--resume", "latest", *SHAPE)
    assert what_must_agree(out) == what_must_agree(uninterrupted)


def test_a_checkpoint_goes_on_on_another_number_of_ranks(toy, tmp_path):  # noqa: F811
    shape = ["--data", toy / "train.json"]
    shape += "--batch-size 4 --workers 0 --log-every 1 --steps 4 --warmup 1".split()
    train_here("--out", tmp_path / "one", *shape, "--save-every", 2, "--keep", 9)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    resume = ["--out", tmp_path / "two", "--resume", tmp_path / "one" / "step-000002"]
    run(*launcher, "train.py", *shape, *resume)
    one, two = metrics(tmp_path / "one")[2:], metrics(tmp_path / "two")
    assert [m["step"] for m in two] == [2, 3]
    assert [m["supervised_tokens"] for m in two] == [m["supervised_tokens"] for m in one]
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in one], rel=2e-4)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 3 steps on 6 samples with a checkpoint after each, which looks as if it had been killed just
    before its end. Returns its OUT and its options, without --out."""
    top = tmp_path_factory.mktemp("stopped")
    options = ["--data", write_texts(top / "data.json", 6), "--batch-size", 2, "--steps", 3, "--warmup", 1]
    options += ["--workers", 0, "--log-every", 1, "--save-every", 1, "--keep", 9]
    train_here(*options, "--out", top / "run")
    shutil.rmtree(top / "run" / "final")
    return top / "run", options


@pytest.mark.parametrize(
    "changed, complaint",
    [
        (["--seed", 1], "expected seed 0 as in the run that is resumed, found 1"),
        (["--lr", 5e-4], "expected lr 0.001 as in the run that is resumed, found 0.0005"),
        (["--num-frames", 3], "expected num_frames 8 as in the run that is resumed, found 3"),
        (["--weight-decay", 0], "expected weight_decay 0.01 as in the run that is resumed, found 0.0"),
        (["--steps", 9], "expected steps 3 as in the run that is resumed, found 9"),
    ],
)
def test_other_settings_are_refused(stopped, tmp_path, changed, complaint):
    """The losses could not be those of an uninterrupted run: another seed means another order."""
    out, options = stopped
    with pytest.raises(SystemExit, match=complaint):
        train_here(*options, "--out", tmp_path, "--resume", out / "step-000001", *changed)


def test_another_data_file_is_refused(stopped, tmp_path):
    out, options = stopped
    other = ["--data", write_texts(tmp_path / "other.json", 6), *options[2:]]
    complaint = r"expected data \['.*data.json'\] as in the run that is resumed, found \['.*other.json"
    with pytest.raises(SystemExit, match=complaint):
        train_here(*other, "--out", tmp_path, "--resume", out / "step-000001")


def test_what_is_no_checkpoint_or_finished_is_refused(stopped, tmp_path):
    _, options = stopped
    with pytest.raises(SystemExit, match="expected the folder of a checkpoint, found no training.pt in it"):
        train_here(*options, "--out", tmp_path / "new", "--resume", tmp_path)
    train_here(*options, "--out", tmp_path / "whole")
    with pytest.raises(SystemExit, match="is finished"):
        train_here(*options, "--out", tmp_path / "whole", "--resume", "latest")


def test_a_resumed_run_may_share_out_its_work_differently(stopped, tmp_path):
    out, options = stopped
    changed = ["--micro-batch", 1, "--workers", 1, "--grad-checkpoint", "--keep", 1, "--max-bad", 0.5]
    train_here(*options, "--out", tmp_path / "run", "--resume", out / "step-000002", *changed)
    (resumed,) = metrics(tmp_path / "run")
    assert resumed["step"] == 2 and resumed["loss"] == pytest.approx(metrics(out)[2]["loss"], rel=1e-5)


def test_what_a_kill_left_half_written_is_gone_when_the_run_continues(stopped, tmp_path):
    """Lines of a log that a kill cut short, lines beyond the checkpoint, and temporary files and folders."""
    out = shutil.copytree(stopped[0], tmp_path / "run")
    shutil.rmtree(out / "step-000003")
    for name in ("step-000003.0123456789ab.tmp", "step-000000.tmp", "final.0123456789ab.tmp"):
        (out / name).mkdir()
        (out / name / "training.pt").write_text("half")
    (out / "metrics.jsonl.0123456789ab.tmp").write_text('{"step": 0')
    (out / "mine.tmp").write_text("a file of the user")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    (out / "bad_samples.jsonl").write_text('{"places": ["a", "b"], "reason": "c"}\n{"places": ["a", "d')
    train_here(*stopped[1], "--out", out, "--resume", "latest", "--max-bad", 0.5)
    assert [m["step"] for m in metrics(out)] == [0, 1, 2]
    assert (out / "bad_samples.jsonl").read_text() == '{"places": ["a", "b"], "reason": "c"}\n'
    expected = ["bad_samples.jsonl", "final", "metrics.jsonl", "mine.tmp"]
    assert sorted(os.listdir(out)) == [*expected, "step-000001", "step-000002", "step-000003"]


def test_a_data_file_that_has_grown_is_refused(stopped, tmp_path):
    out, options = stopped
    path, before = options[1], options[1].read_bytes()
    try:
        write_texts(path, 7)
        with pytest.raises(SystemExit, match="expected samples 6 as in the run that is resumed, found 7"):
            train_here(*options, "--out", tmp_path, "--resume", out / "step-000001")
    finally:
        path.write_bytes(before)


def test_an_older_checkpoint_cannot_go_on_among_later_ones(stopped, tmp_path):
    """Otherwise --resume latest would go on from the later steps of the other branch."""
    out, options = stopped
    before = sorted(os.listdir(out))
    with pytest.raises(SystemExit, match="holds later steps than .*step-000001"):
        train_here(*options, "--out", out, "--resume", out / "step-000001")
    assert sorted(os.listdir(out)) == before
    train_here(*options, "--out", tmp_path / "elsewhere", "--resume", out / "step-000001")
    assert [m["step"] for m in metrics(tmp_path / "elsewhere")] == [1, 2]


def test_bad_samples_from_before_the_interruption_count_on(tmp_path):
    """One of 10 may be bad. The second one ends the run, also if the run is resumed between the two."""
    (first,), (second,) = (keys[:1] for keys in train.Order(10, 5, 2, seed=0, rank=0, world_size=1))
    path = write_texts(tmp_path / "data.json", 10, bad=[first[1], second[1]])
    options = ["--data", path, "--out", tmp_path / "run", "--batch-size", 5, "--steps", 2, "--workers", 0]
    options += ["--max-bad", 0.1, "--save-every", 1, "--log-every", 1, "--resume", "latest"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="stopped: 2 samples cannot be used, --max-bad allows 1;"):
            train_here(*options)
        assert list(train.checkpoints(tmp_path / "run")) == [1]


def test_a_sample_that_is_bad_in_several_ways_counts_once(tmp_path):
    """Each epoch cuts an object to another frame, so one sample can be bad in several ways."""
    config = train.Config(out=str(tmp_path), max_bad=0.01)

    def errors(reason, frame):
        return [data.DataError(reason, "data.json", "sample 3", frame)]

    bad_samples = train.BadSamples(config, num_samples=100)
    bad_samples.add(errors("unreadable", "frame 20"))
    bad_samples.add(errors("unreadable", "frame 10"))
    resumed = train.BadSamples(config, num_samples=100)
    resumed.add(errors("absent", "frame 15"))
    assert len(train.read_jsonl(tmp_path / "bad_samples.jsonl")) == 1
    with pytest.raises(SystemExit, match="2 samples cannot be used"):
        resumed.add([data.DataError("unreadable", "data.json", "sample 4", "frame 20")])


@pytest.mark.parametrize("resume", [[], ["--resume", "latest"]])
def test_a_run_from_the_beginning_forgets_the_bad_samples_of_an_earlier_one(tmp_path, resume):
    """The user has repaired them since."""
    path = write_texts(tmp_path / "data.json", 4, bad=[1])
    options = ["--data", path, "--out", tmp_path / "run", "--workers", 0, "--steps", 1, *resume]
    options += ["--max-bad", 0]
    with pytest.raises(SystemExit, match="stopped: 1 samples cannot be used"):
        train_here(*options)
    assert len(train.read_jsonl(tmp_path / "run" / "bad_samples.jsonl")) == 1
    write_texts(path, 4)
    train_here(*options)
    assert (tmp_path / "run" / "final").is_dir() and not (tmp_path / "run" / "bad_samples.jsonl").exists()


def test_another_run_is_not_overwritten_from_a_checkpoint(stopped, tmp_path):
    """Its log would lose the steps behind the checkpoint, and --keep would delete its checkpoints."""
    out, options = stopped
    other = shutil.copytree(out, tmp_path / "other")
    shutil.rmtree(other / "step-000002")
    shutil.rmtree(other / "step-000003")
    before = (other / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="--out .*other: holds another run than that of .*step-000002"):
        train_here(*options, "--out", other, "--resume", out / "step-000002")
    assert (other / "metrics.jsonl").read_bytes() == before
    (tmp_path / "link").symlink_to(other)  # a link to the run's own folder is no other run
    train_here(*options, "--out", tmp_path / "link", "--resume", other / "step-000001")
    assert [m["step"] for m in metrics(other)] == [0, 1, 2]


def test_the_batch_size_that_is_not_given_is_that_of_the_run_that_is_resumed(stopped, tmp_path):
    """Its default depends on the number of ranks, which a resumed run may change."""
    out, options = stopped
    at = options.index("--batch-size")
    options = options[:at] + options[at + 2 :]
    train_here(*options, "--out", tmp_path / "run", "--resume", out / "step-000001")
    assert [m["loss"] for m in metrics(tmp_path / "run")] == [m["loss"] for m in metrics(out)[1:]]


def test_a_resumed_run_draws_the_same_dropout(tmp_path):
    """No backbone here has dropout. If there is some, in the attention, a step draws it from (seed, step,
    rank), whatever was drawn before."""

    def with_dropout(module, *_):
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5

    options = ["--data", write_texts(tmp_path / "data.json", 4)]
    options += "--batch-size 4 --steps 4 --workers 0 --log-every 1 --save-every 2".split()
    train_here(*options, "--out", tmp_path / "without")
    hook = torch.nn.modules.module.register_module_forward_pre_hook(with_dropout)
    try:
        train_here(*options, "--out", tmp_path / "one")
        train_here(*options, "--out", tmp_path / "two", "--resume", tmp_path / "one" / "step-000002")
        one_sample = ["--data", write_texts(tmp_path / "one.json", 1), "--workers", 0, "--log-every", 1]
        train_here(*one_sample, "--out", tmp_path / "still", "--steps", 2, "--lr", 0, "--region-lr", 0)
    finally:
        hook.remove()
    without, one, two = ([m["loss"] for m in metrics(tmp_path / name)] for name in ("without", "one", "two"))
    assert two == one[2:] and one[0] != without[0]
    first, second = (m["loss"] for m in metrics(tmp_path / "still"))
    assert first != second  # the same sample and weights, but other dropout
    final = "final/model.safetensors"
    assert (tmp_path / "one" / final).read_bytes() == (tmp_path / "two" / final).read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path):
    out = tmp_path / "run"
    options = ["--data", write_texts(tmp_path / "data.json", 6), "--out", out, "--batch-size", 3]
    options += "--workers 0 --warmup 2 --steps 12 --save-every 1 --lr 1e30 --clip 0".split()
    with pytest.raises(SystemExit, match=r"stopped at step \d+: loss .*; rank 0 had samples \["):
        train_here(*options)
    last = list(train.checkpoints(out).values())[-1]
    assert torch.load(os.path.join(last, "training.pt"), weights_only=True)["done"] >= 1
    assert not (out / "final").exists()


def _write_for_ever(folder):
    number = 0
    while True:
        number += 1
        with data.atomic_write(os.path.join(folder, f"step-{number:06}")) as temporary:
            os.makedirs(temporary)
            for name in "abc":
                with open(os.path.join(temporary, name), "w") as file:
                    file.write(str(number) * 20_000)


def test_whatever_moment_the_kill_comes_a_folder_is_whole_or_absent(tmp_path):
    rng, seen = random.Random(1), 0
    for attempt in range(40):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        writer = get_context("fork").Process(target=_write_for_ever, args=(folder,))
        writer.start()
        writer.join(timeout=rng.uniform(0.01, 0.1))
        writer.kill()
        writer.join()
        for number, path in train.checkpoints(folder).items():
            seen += 1
            assert all(open(os.path.join(path, name)).read() == str(number) * 20_000 for name in "abc")
    assert seen > 40
