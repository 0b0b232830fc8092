"""The picture at the top of the README shows what eval.py has written, and nothing else."""

import json

import figure
import numpy as np
import pytest
import shapes
from PIL import Image

import data
import eval as evaluation
import model as models

STEPS = {20: "step-000020", 40: "step-000040", 50: "final"}
# Right answers out of 8 at each of these steps.
RIGHT = {"colour": (1, 6, 8), "shape": (2, 3, 7), "direction": (0, 1, 5), "relation": (2, 2, 4)}
CONTROLS = {"full": 8, "shuffle": 6, "blind": 1}  # out of 32


@pytest.fixture
def toy(tmp_path):
    shapes.write_world(tmp_path / "toy", train_clips=0, test_clips=6)
    return tmp_path / "toy"


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 50 steps, without weights."""
    for name in ("step-000020", "step-000040", "final"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / models.CHECKPOINT).touch()
    lines = [{"step": 40, "loss": 1.0}, {"step": 49, "loss": 0.5}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run"


def reply_to(entry, column):
    """The replies by hand: colours are right, shapes are wrong. Blind writes a formula that is wrong."""
    answer = entry["conversations"][1]["value"]
    if column == "blind":
        return r"$\red$redred"
    return "shapeless" if entry["type"] == "shape" else answer


@pytest.fixture
def asked(toy, monkeypatch):
    """Writes scores by hand in place of eval.py, and returns the list of its command lines."""
    commands = []

    def write_scores(options):
        args = evaluation.parse(options)
        commands.append((args.model, args.control))
        i = list(STEPS.values()).index(args.out.name)
        rows = {kind: {"exact": {"right": right[i], "asked": 8}} for kind, right in RIGHT.items()}
        rows["about regions"] = {c: {"right": n, "asked": 32} for c, n in CONTROLS.items() if args.control}
        lines = []
        for entry in json.loads((toy / "test.json").read_text()):
            question, answer = (turn["value"] for turn in entry["conversations"])
            line = {"type": entry["type"], "video": entry["video"], "question": question, "answer": answer}
            line |= {column: reply_to(entry, column) for column in ("exact", "blind")}
            lines.append(json.dumps(line) + "\n")
        (args.out / "predictions.jsonl").write_text("".join(lines))
        (args.out / "scores.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(evaluation, "main", write_scores)
    return commands


def command(toy, run, out):
    return [str(toy), str(run), "--out", str(out)]


def test_each_model_is_asked_once_and_the_last_with_controls(toy, run, asked, tmp_path):
    figure.main(command(toy, run, tmp_path / "f.png"))
    without = [(str(run / "step-000020"), []), (str(run / "step-000040"), [])]
    assert asked == [*without, (str(run / "final"), ["full", "shuffle", "blind"])]
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.format == "PNG" and picture.width == 1800
    assert (tmp_path / "f.png").stat().st_size < 200_000

    (run / "asked" / "step-000040" / "scores.json").unlink()  # as after a kill
    figure.main(command(toy, run, tmp_path / "f.png"))
    assert asked[3:] == [without[1]]

    (toy / "test.json").write_text((toy / "test.json").read_text() + "\n")
    with pytest.raises(SystemExit, match="step-000020: a new folder, or that of a run of this command"):
        figure.main(command(toy, run, tmp_path / "f.png"))


@pytest.fixture
def drawn(toy, run, asked, tmp_path):
    figure.main(command(toy, run, tmp_path / "f.png"))
    return figure.draw(toy, run, figure.find_models(toy, run))


def test_curves_and_controls_are_those_of_the_scores(drawn):
    right = drawn.subfigs[1]
    (axis,) = right.axes
    lines = {line.get_label(): line for line in axis.lines}
    for kind, counts in RIGHT.items():
        (label,) = (label for label in lines if label.split()[0] == kind)
        assert label.split()[1] == {8: "100%", 7: "88%", 5: "62%", 4: "50%"}[counts[-1]]
        line = lines.pop(label)
        assert list(line.get_xdata()) == [20, 40, 50]
        assert list(line.get_ydata()) == [count / 8 for count in counts]
    flat = {label: set(line.get_ydata()) for label, line in lines.items()}
    assert flat == {
        "full: mask of the whole frame  25%": {0.25},
        "shuffle: mask of another clip  19%": {0.1875},
        "blind: no mask and no video  3%": {0.03125},
    }
    assert len({line.get_linestyle() for line in lines.values()}) == 3
    in_legends = [text.get_text() for legend in right.legends for text in legend.get_texts()]
    assert sorted(in_legends) == sorted(line.get_label() for line in axis.lines)
    colours = {line.get_label().split()[0]: line.get_color() for line in axis.lines}
    assert {kind: colours[kind] for kind in RIGHT} == figure.KINDS


def test_questions_are_about_two_objects_of_a_clip(drawn, toy):
    """Truth: the colours in the picture itself, which the right answers to questions of colour name."""
    axes = np.array(drawn.subfigs[0].axes).reshape(4, 2, 3)
    titles = [axis.get_title(loc="left") for axis in axes[:, 0, 0]]
    assert titles == list(shapes.ASK.values())
    entries = json.loads((toy / "test.json").read_text())
    first_two = [e for e in entries if e["type"] == "colour"][:2]
    assert len({e["video"] for e in first_two}) == 1
    for half, entry in zip(axes[0], first_two):
        colour = entry["conversations"][1]["value"]
        assert texts(half[2]) == ["answer", f"{colour} ✓", "asked blind", r"$\red$re… ✗"]
        for axis in half[:2]:
            (image,) = axis.images
            distance = np.abs(image.get_array().astype(int) - shapes.COLOURS[colour]).max(axis=2)
            y, x = np.nonzero(distance < 60)
            for outline in axis.collections:
                corners = np.concatenate([path.vertices for path in outline.get_paths()])
                found = [*corners.min(axis=0), *corners.max(axis=0)]
                # The edges of the objects are blurred: a clip has colours at half its resolution.
                assert np.allclose(found, [x.min(), y.min(), x.max(), y.max()], atol=3)
            assert len(axis.texts) == 0
        earlier, later = (axis.images[0].get_array() for axis in half[:2])
        assert (earlier != later).any()
    for half in axes[1]:
        assert texts(half[2])[1] == "shapeles… ✗"
    for half in axes[3]:  # where is 1 from 2?
        answer = texts(half[2])[1].removesuffix(" ✓")
        for axis in half[:2]:
            assert texts(axis) == ["1", "2"]
            first, second = (np.array(text.get_position()) for text in axis.texts)
            x, y = first - second
            assert {"left": x < 0, "right": x > 0, "above": y < 0, "below": y > 0}[answer]
    clips = [tuple(axis.images[0].get_array().tobytes() for axis in row[:, 0]) for row in axes]
    assert all(first == second for first, second in clips) and len(set(clips)) == 4


def test_the_first_clips_with_two_different_answers_are_shown():
    by_hand = [
        "relation a left", "relation a left", "colour a red", "relation b left", "colour a blue",
        "shape a cross", "shape a circle", "shape b circle", "shape b cross", "relation b above",
        "direction c up", "relation d left", "relation d below", "direction c down", "background e black",
    ]  # fmt: skip
    keys = ("type", "video", "answer")
    questions = [dict(zip(keys, line.split())) for line in by_hand]
    pairs = {"colour": (2, 4), "shape": (7, 8), "direction": (10, 13), "relation": (11, 12)}
    assert figure.choose_pairs(questions) == pairs
    with pytest.raises(data.DataError, match="two answers to questions about its relation, found None"):
        figure.choose_pairs(questions[:12] + questions[13:])


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_a_run_without_all_its_checkpoints_is_refused(toy, run, asked, tmp_path):
    """The default of --keep leaves the last two, from which no curve can be drawn."""
    (run / "step-000020").rename(run / "step-000060")
    expected = rf"error: expected {run}: .* --data {toy}/train.json --out {run} --save-every 70 --keep 8"
    with pytest.raises(SystemExit, match=expected + r".*found \['step-000040', 'step-000060', 'final'\]"):
        figure.main(command(toy, run, tmp_path / "f.png"))
    (run / "step-000060").rename(run / "step-000020")
    (run / "final").rename(run / "other")
    with pytest.raises(SystemExit, match=expected):
        figure.main(command(toy, run, tmp_path / "f.png"))
    with pytest.raises(SystemExit, match=r"found \[\]"):
        figure.main(command(toy, tmp_path / "nowhere", tmp_path / "f.png"))
    assert not asked and not (tmp_path / "f.png").exists()
