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
from checkpoints import make_checkpoint
from PIL import Image
from test_train import TOP, launch, metrics, run, toy, train_here, write_texts  # noqa: F401 (toy is a fixture)

import data
import eval as evaluation
import model as models
import train

# Steps of 5 samples in micro-batches of 2, epochs of 7 samples: steps straddle epochs, and the last micro-
# batch is smaller.
SHAPE = "--batch-size 5 --micro-batch 2 --workers 2 --warmup 2 --steps 12".split()
SHAPE += "--single-frame 0.5".split()


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


def steps_saved(out):
    """After how many steps the whole checkpoints in OUT were saved."""
    return sorted(int(path.parent.name[5:]) for path in out.glob("step-*[0-9]/training.pt"))


def branch(out, steps, to):
    """Copies a run as if it had been killed after so many steps. Returns the new OUT."""
    shutil.copytree(out, to)
    shutil.rmtree(to / "final", ignore_errors=True)
    for done in steps_saved(to):
        if done > steps:
            shutil.rmtree(to / f"step-{done:06}")
    return to


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
        process = start("train.py", "--data", seven, "--out", out, "--save-every", 1, "--resume", *SHAPE)
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
    left = [name for name in sorted(os.listdir(out)) if not name.endswith(".tmp")]
    assert left == ["config.json", "final", "metrics.jsonl", "step-000011", "step-000012"]


def test_sigterm_saves_exits_and_the_run_goes_on(seven, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start("train.py", "--data", seven, "--out", out, *SHAPE)
    when_steps_are_logged(process, out, 3)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's processes get it too, as from torchrun
    output, _ = process.communicate(timeout=240)
    assert (
        process.returncode == 128 + signal.SIGTERM
        and "which are saved; --resume goes on" in output
        and "Traceback" not in output
    )
    (done,) = steps_saved(out)
    assert 3 <= done < 12 and not (out / "final").exists()
    run("train.py", "--out", out, "--resume")
    assert what_must_agree(out) == what_must_agree(uninterrupted)


def test_a_checkpoint_goes_on_on_another_number_of_ranks(toy, tmp_path):  # noqa: F811
    shape = ["--data", toy / "train.json"]
    shape += "--batch-size 4 --workers 0 --steps 4 --warmup 1".split()
    train_here("--out", tmp_path / "one", *shape, "--save-every", 2, "--keep", 9)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    two = branch(tmp_path / "one", 2, tmp_path / "two")
    run(*launcher, "train.py", *shape, "--out", two, "--resume")
    assert metrics(two)[:2] == metrics(tmp_path / "one")[:2], "with their times: it did not begin anew"
    one, two = metrics(tmp_path / "one")[2:], metrics(two)[2:]
    assert [m["step"] for m in two] == [2, 3]
    assert [m["supervised_tokens"] for m in two] == [m["supervised_tokens"] for m in one]
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in one], rel=2e-4)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 3 steps on 6 samples with a checkpoint after each, which looks as if it had been killed just
    before its end. Returns its OUT and its options, without --out."""
    top = tmp_path_factory.mktemp("stopped")
    options = ["--data", write_texts(top / "data.json", 6), "--batch-size", 2, "--steps", 3, "--warmup", 1]
    options += ["--workers", 0, "--save-every", 1, "--keep", 9]
    train_here(*options, "--out", top / "run")
    shutil.rmtree(top / "run" / "final")
    return top / "run", options


@pytest.mark.parametrize(
    "changed, complaint",
    [
        (["--seed", 1], "expected --seed 0,? as in the run that is resumed, found 1"),
        (["--lr", 5e-4], "expected --lr 0.001,? as in the run that is resumed, found 0.0005"),
        (["--num-frames", 3], "expected --num-frames 8,? as in the run that is resumed, found 3"),
        (["--weight-decay", 0], "expected --weight-decay 0.01,? as in the run that is resumed, found 0.0"),
        (["--steps", 9], "expected --steps 3,? as in the run that is resumed, found 9"),
    ],
)
def test_other_settings_are_refused(stopped, tmp_path, changed, complaint):
    """The losses could not be those of an uninterrupted run: another seed means another order."""
    out, options = stopped
    with pytest.raises(data.DataError, match=complaint):
        train_here(*options, "--out", out, "--resume", *changed)
    with pytest.raises(data.DataError, match=complaint):
        train_here("--out", out, "--resume", *changed)


def test_another_data_file_is_refused(stopped, tmp_path):
    out, options = stopped
    other = write_texts(tmp_path / "other.json", 6)
    complaint = r"expected --data \['.*data.json'\],? as in the run that is resumed, found \['"
    with pytest.raises(data.DataError, match=complaint):
        train_here("--data", other, "--out", out, "--resume")


def test_a_finished_run_is_refused(stopped, tmp_path):
    out, options = stopped
    out = shutil.copytree(out, tmp_path / "whole")
    train_here("--out", out, "--resume")
    for again in (["--resume"], [*options, "--resume"], options):
        with pytest.raises(data.DataError, match="whole: a folder without a finished run, found"):
            train_here("--out", out, *again)


def test_a_damaged_checkpoint_is_one_error(stopped, tmp_path):
    out = branch(stopped[0], 2, tmp_path / "run")
    path = out / "step-000002" / "training.pt"
    path.write_bytes(path.read_bytes()[:9999])
    with pytest.raises(data.DataError, match="step-000002: expected a whole checkpoint, found"):
        train_here("--out", out, "--resume")
    assert metrics(out) == metrics(stopped[0])


def test_a_folder_that_holds_a_run_is_refused_without_resume(stopped):
    out, options = stopped
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(data.DataError, match="--out .*run: a new folder, or --resume"):
        train_here(*options, "--out", out)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_may_share_out_its_work_differently(stopped, tmp_path):
    out, options = stopped
    changed = ["--micro-batch", 1, "--workers", 1, "--grad-checkpoint", "--keep", 1, "--max-bad", 0.5]
    train_here(*options, "--out", branch(out, 2, tmp_path / "run"), "--resume", *changed)
    resumed = metrics(tmp_path / "run")[-1]
    assert resumed["step"] == 2 and resumed["loss"] == pytest.approx(metrics(out)[2]["loss"], rel=1e-5)


def test_what_a_kill_left_half_written_is_gone_when_the_run_continues(stopped, tmp_path):
    """Lines of a log that a kill cut short, lines beyond the checkpoint, and temporary files and folders."""
    out = shutil.copytree(stopped[0], tmp_path / "run")
    shutil.rmtree(out / "step-000003")
    for name in ("step-000003.tmp", "final.tmp"):
        (out / name).mkdir()
        (out / name / "training.pt").write_text("half")
    (out / "metrics.jsonl.tmp").write_text('{"step": 0')
    (out / "mine.tmp").write_text("a file of the user")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    line = '{"step": 0, "places": ["a", "b"], "reason": "c"}\n'
    (out / "bad_samples.jsonl").write_text(line + '{"step": 2, "places": ["a", "d"]}\n{"step": 2, "pl')
    train_here(*stopped[1], "--out", out, "--resume", "--max-bad", 0.5)
    assert [m["step"] for m in metrics(out)] == [0, 1, 2]
    assert (out / "bad_samples.jsonl").read_text() == line
    expected = ["bad_samples.jsonl", "config.json", "final", "metrics.jsonl", "mine.tmp"]
    assert sorted(os.listdir(out)) == [*expected, "step-000001", "step-000002", "step-000003"]


def test_a_data_file_that_has_grown_is_refused(stopped, tmp_path):
    out, options = stopped
    path, before = options[1], options[1].read_bytes()
    try:
        write_texts(path, 7)
        with pytest.raises(data.DataError, match="expected 6 samples, as before, found 7"):
            train_here(*options, "--out", out, "--resume")
    finally:
        path.write_bytes(before)


def test_bad_samples_from_before_the_interruption_count_on(tmp_path):
    """One of 10 may be bad. The second one ends the run, also if the run is resumed between the two."""
    (first,), (second,) = (keys[:1] for keys in train.Order(10, 5, 2, seed=0, rank=0, world_size=1))
    path = write_texts(tmp_path / "data.json", 10, bad=[first[1], second[1]])
    options = ["--data", path, "--out", tmp_path / "run", "--batch-size", 5, "--steps", 2, "--workers", 0]
    options += ["--max-bad", 0.1, "--save-every", 1, "--resume"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="stopped: 2 of 10 samples cannot be used, more than --max-bad"):
            train_here(*options)
        assert steps_saved(tmp_path / "run") == [1]


def test_a_sample_that_is_bad_in_several_ways_counts_once(tmp_path):
    """Each epoch cuts an object to another frame, so one sample can be bad in several ways."""
    path = write_texts(tmp_path / "data.json", 2)
    samples = json.loads(path.read_text())
    for k in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{k}.png")
    samples[1]["video"] = [f"{k}.png" for k in range(3)]
    samples[1]["conversations"][0]["value"] = "What is <region>?"
    samples[1]["masks"] = [{str(k): [1, 2, 3] for k in range(3)}]  # no polygon, on no frame
    path.write_text(json.dumps(samples))
    samples = data.read_samples(path)
    dataset = data.ReferringDataset(samples, models.load_processor("tiny", ["a"]), single_frame=1.0)
    assert len({str(dataset[epoch, 1]) for epoch in range(6)}) > 1
    options = ["--data", path, "--out", tmp_path / "run", "--steps", 6, "--single-frame", 1, "--workers", 0]
    train_here(*options, "--max-bad", 0.5)
    (line,) = train.read_jsonl(tmp_path / "run" / "bad_samples.jsonl")
    assert line["step"] == 0 and line["places"][:2] == [str(path), "sample 1 (id 1)"]


def test_a_run_from_the_beginning_forgets_the_bad_samples_of_an_earlier_one(tmp_path):
    """The user has repaired them since."""
    path = write_texts(tmp_path / "data.json", 4, bad=[1])
    options = ["--data", path, "--out", tmp_path / "run", "--workers", 0, "--steps", 1, "--resume"]
    options += ["--max-bad", 0]
    with pytest.raises(SystemExit, match="stopped: 1 of 4 samples cannot be used"):
        train_here(*options)
    assert len(train.read_jsonl(tmp_path / "run" / "bad_samples.jsonl")) == 1
    write_texts(path, 4)
    train_here(*options)
    assert (tmp_path / "run" / "final").is_dir()
    assert not train.read_jsonl(tmp_path / "run" / "bad_samples.jsonl")


def test_resume_alone_goes_on_and_ends_with_the_same_bits(stopped, tmp_path):
    """All options come from OUT/config.json, also the batch size that was not given, whose default depends on
    the number of ranks."""
    out, options = stopped
    at = options.index("--batch-size")
    train_here(*options[:at], *options[at + 2 :], "--out", tmp_path / "whole")
    train_here("--out", branch(tmp_path / "whole", 1, tmp_path / "run"), "--resume")
    assert what_must_agree(tmp_path / "run") == what_must_agree(tmp_path / "whole")
    assert metrics(tmp_path / "run")[0] == metrics(tmp_path / "whole")[0], "with its times"


def test_a_run_that_was_moved_goes_on_where_it_is(stopped, tmp_path, monkeypatch):
    """--out need not be given where it is the default, and the one in config.json is that of before."""
    out, _ = stopped
    branch(out, 1, tmp_path / "out")
    before = sorted(os.listdir(out))
    monkeypatch.chdir(tmp_path)
    train_here("--resume")
    assert (tmp_path / "out" / "final").is_dir() and sorted(os.listdir(out)) == before


@pytest.mark.parametrize("parts", ["region", "llm", "projector,vision", "region,lora"])
def test_resume_alone_goes_on_whatever_learns(tmp_path, parts):
    options = [
        "--data",
        write_texts(tmp_path / "data.json", 4),
        "--workers",
        0,
        "--steps",
        2,
        "--save-every",
        1,
    ]
    train_here(*options, "--out", tmp_path / "whole", "--train", parts)
    train_here("--out", branch(tmp_path / "whole", 1, tmp_path / "run"), "--resume")
    assert what_must_agree(tmp_path / "run") == what_must_agree(tmp_path / "whole")


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    """With another option it is refused, and its log stays. It begins anew with its own."""
    options = ["--data", write_texts(tmp_path / "data.json", 4), "--workers", 0, "--steps", 2]
    train_here(*options, "--out", tmp_path / "whole")
    out = branch(tmp_path / "whole", 0, tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(data.DataError, match="^expected --steps 2,? as in the run that is resumed, found 3$"):
        train_here("--out", out, "--resume", "--steps", 3)
    assert (out / "metrics.jsonl").read_bytes() == before and not (out / "final").exists()
    train_here("--out", out, "--resume")
    assert what_must_agree(out) == what_must_agree(tmp_path / "whole")


@pytest.mark.parametrize("parts", ["region", "projector,vision", "region,lora"])
@pytest.mark.parametrize("base", ["tiny", "qwen3_vl"])
def test_a_checkpoint_holds_what_learns_alone_and_eval_loads_the_same_model(
    tmp_path, monkeypatch, base, parts
):
    """Without a spare row, the embeddings of the base grow by a random one for the placeholder."""
    live, save = {}, train.save_checkpoint
    model = base if base == "tiny" else make_checkpoint(tmp_path / "base", base, spare_rows=0)
    texts = write_texts(tmp_path / "data.json", 4)
    samples = data.read_samples(texts)

    def logits(model, processor):
        dataset = data.ReferringDataset(samples, processor)
        with torch.no_grad():
            return model.eval().logits(data.collate([dataset[0, i] for i in range(4)], processor))

    def save_and_look(model, processor, *arguments):
        save(model, processor, *arguments)
        live["learns"] = {name for name, p in model.named_parameters() if p.requires_grad}
        live["logits"] = logits(model, processor)

    monkeypatch.setattr(train, "save_checkpoint", save_and_look)
    options = ["--data", texts, "--model", model, "--train", parts, "--seed", 3, "--workers", 0]
    train_here(*options, "--out", tmp_path / "run", "--steps", 2, "--save-every", 2)
    folder = tmp_path / "run" / "step-000002"
    ckpt = torch.load(folder / "training.pt", weights_only=True)
    assert ckpt["model"].keys() == ckpt["optimizer"]["state"].keys() == live["learns"]
    assert not list(folder.glob("*.safetensors"))
    assert torch.equal(logits(*evaluation.load(folder, "cpu")), live["logits"])
    final = logits(*evaluation.load(tmp_path / "run" / "final", "cpu"))
    torch.testing.assert_close(final, live["logits"], rtol=1e-5, atol=1e-5 * float(final.abs().max()))


def test_a_resumed_run_draws_the_same_dropout(tmp_path):
    """No backbone here has dropout. If there is some, in the attention, a step draws it from (seed, step,
    rank), whatever was drawn before."""

    def with_dropout(module, *_):
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5

    options = ["--data", write_texts(tmp_path / "data.json", 4)]
    options += "--batch-size 4 --steps 4 --workers 0 --save-every 2".split()
    train_here(*options, "--out", tmp_path / "without")
    hook = torch.nn.modules.module.register_module_forward_pre_hook(with_dropout)
    try:
        train_here(*options, "--out", tmp_path / "one")
        train_here(*options, "--out", branch(tmp_path / "one", 2, tmp_path / "two"), "--resume")
        one_sample = ["--data", write_texts(tmp_path / "one.json", 1), "--workers", 0]
        train_here(*one_sample, "--out", tmp_path / "still", "--steps", 2, "--lr", 0, "--region-lr", 0)
    finally:
        hook.remove()
    without, one, two = ([m["loss"] for m in metrics(tmp_path / name)] for name in ("without", "one", "two"))
    assert two == one and one[0] != without[0]
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
    last = train.checkpoints(out)[-1]
    assert torch.load(last / "training.pt", weights_only=True)["step"] >= 1
    assert not (out / "final").exists()


def _write_for_ever(folder):
    number = 0
    while True:
        number += 1
        with train.atomic_write(os.path.join(folder, f"step-{number:06}")) as temporary:
            os.makedirs(temporary)
            for name in ("a", "b", "training.pt"):
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
        for path in train.checkpoints(folder):
            seen += 1
            content = str(int(path.name[5:])) * 20_000
            assert all((path / name).read_text() == content for name in ("a", "b", "training.pt"))
    assert seen > 40
