"""Parsing, masks and coverage, each against an independent truth; bad input must name its place."""

import json
import multiprocessing
import os
import pickle
import re
from contextlib import suppress
from functools import reduce

import numpy as np
import pytest
from clips import write_video
from PIL import Image
from pycocotools import mask as coco_mask

import data
import eval as evaluation
import model as models
from data import DataError

H, W = 24, 32


def square(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def compressed(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask):
    """COCO's list of runs, down the columns, beginning with zeros: written out one pixel at a time."""
    runs, current = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != current:
            runs.append(0)
            current = pixel
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (H, W, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "clip").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (H, W, 3), dtype=np.uint8)).save(tmp_path / "clip" / f"f{i}.png")
    return tmp_path


def good():
    """A sample with two objects and two turns, which the tests below spoil one field at a time."""
    return {
        "id": 7,
        "video": "clip",
        "conversations": [
            {"from": "human", "value": "<video>\nWhat is <region>?"},
            {"from": "gpt", "value": "A dog."},
            {"from": "human", "value": "And <region>?"},
            {"from": "gpt", "value": "A cat."},
        ],
        "annotation": [
            {"1": {"segmentation": [square(4, 4, 12, 12)]}, "10": {"segmentation": square(6, 6, 12, 12)}},
            {"3": {"segmentation": compressed(np.eye(H, W))}, "4": {"segmentation": None}, "5": {}},
        ],
    }


def write(folder, entries, name="data.json"):
    path = folder / name
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path


def read_one(folder, entry):
    return data.read_samples(write(folder, [entry]))[0]


# ---- files -------------------------------------------------------------------------------------------------


def test_array_and_lines_and_several_files_read_alike(folder):
    entries = [good() | {"id": i, "note": 'ünï\n{["' * i} for i in range(5)]
    array = write(folder, entries)
    pretty = write(folder, "\ufeff" + json.dumps(entries, indent=2, ensure_ascii=False), "pretty.json")
    lines = write(
        folder, "\n\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n", "data.jsonl"
    )
    expected = [data.read_samples(array)[i] for i in range(5)]
    assert [s.id for s in expected] == list(range(5))
    for path in (pretty, lines):
        samples = data.read_samples(path)
        assert [(s.id, s.turns, s.objects, s.media) for s in (samples[i] for i in range(len(samples)))] == [
            (s.id, s.turns, s.objects, s.media) for s in expected
        ]
    both = data.read_samples([array, lines])
    assert len(both) == 10 and both[7].id == 2 and both[7].place[0] == str(lines)


@pytest.mark.parametrize(
    "text, line, column",
    [
        ('[{"id": 1},\n {"id": 2,, }]', 2, 11),
        ('[{"id": 1}\n {"id": 2}]', 2, 2),
        ('[{"id": 1}, ]', 1, 13),
        ('[{"id": 1}', 1, 11),
        ('[{"id": 1}] []', 1, 13),
        ('{"id": 1}\n{"id": }\n', 2, 8),
        ('[{"a": "unfinished}]', 1, 8),
    ],
)
def test_json_that_does_not_parse_names_line_and_byte(folder, text, line, column):
    path = write(folder, text)
    with pytest.raises(DataError, match=f"data.json: {place(text, line, column)}: "):
        data.read_samples(path)


def place(text, line, column):
    """How an error names the place that json.loads gives as line and column, counted from 1."""
    before = "\n".join(text.split("\n")[: line - 1] + [text.split("\n")[line - 1][: column - 1]])
    return f"line {line}, byte {len(before.encode())} of the file"


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ \n]\n", "[NaN]", "[" * 100_000, "3"])
def test_files_without_samples_are_refused(folder, text):
    with pytest.raises(
        DataError,
        match="data.json"
        if text.strip("[] \n")
        else "data.json: expected (at least one sample|a readable file, found: maximum recursion depth)",
    ):
        data.read_samples(write(folder, text))[0]


def test_missing_and_undecodable_files_are_refused(folder):
    with pytest.raises(DataError, match="No such file"):
        data.read_samples(folder / "absent.json")
    (folder / "latin.json").write_bytes(b'[{"id": "\xe9"}]')
    with pytest.raises(DataError, match="UTF-8"):
        data.read_samples(folder / "latin.json")


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_samples_are_found_as_json_finds_them(folder, monkeypatch, chunk):
    monkeypatch.setattr(data, "CHUNK", chunk)  # bytes that are read at a time, unless a sample is longer
    entries = [
        {"id": 0, "deep": [[{"a": []}], "]},{["]},
        12345678,
        -1.5e-3,
        'ünï \\ "[,',
        [],
        {},
        None,
        True,
        {"id": "😀" * 9},
        7,
    ]
    spellings = {
        "compact.json": json.dumps(entries, separators=(",", ":"), ensure_ascii=False),
        "pretty.json": "\ufeff \r\n" + json.dumps(entries, indent=3, ensure_ascii=False) + " \n\t",
        "lines.jsonl": "\n".join(json.dumps(e, ensure_ascii=False) for e in [*entries, 8]),
    }
    for name, text in spellings.items():
        samples = data.read_samples(write(folder, text, name))
        assert [samples.read(i)[0] for i in range(len(samples))] == entries + [8] * (name == "lines.jsonl")
    for text, line, column in (
        ("[{},\n 1234567 8]", 2, 10),
        ('["ü",\n"ü" x]', 2, 5),
        ("[1, 2] \n\n 3", 3, 2),
        ("[1, 2}, 3]", 1, 6),
        ("[1, [2}, 3]", 1, 7),
        ('["a": 1]', 1, 5),
        ('["\\', 1, 2),
        ('[{"a": "b}, {"a": "c"}]', 1, 15),  # a quote is missing
        ('[{"a": "b},\n {"a": "c"}]', 1, 12),
        ("[1, 2", 1, 6),
        ('["a', 1, 2),
    ):
        with pytest.raises(json.JSONDecodeError, match=f"line {line} column {column} "):
            json.loads(text)
        with pytest.raises(DataError, match=f"{place(text, line, column)}: "):
            data.read_samples(write(folder, text))


def test_a_value_of_jsonl_may_span_lines_but_needs_one_of_its_own(folder):
    path = write(folder, '{\n  "id": 1\n}\n\n{"id": 2}', "data.jsonl")
    samples = data.read_samples(path)
    assert [samples.read(i)[0] for i in range(len(samples))] == [{"id": 1}, {"id": 2}]
    for text, line, byte in (
        ('{"id": 1} {"id": 2}', 1, 10),
        ('{"id": 1}{"id": 2}', 1, 9),
        ('{"id": 1},\n{"id": 2}', 1, 9),
    ):
        with pytest.raises(
            DataError, match=f"data.json: line {line}, byte {byte} of the file: not valid JSON"
        ):
            data.read_samples(write(folder, text))


def test_a_sample_without_end_does_not_fill_the_memory(folder, monkeypatch):
    """What is longer than MAX_SAMPLE is a syntax error, even if the rest of the file completes it."""
    monkeypatch.setattr(data, "CHUNK", 8)
    monkeypatch.setattr(data, "MAX_SAMPLE", 32)
    assert len(data.read_samples(write(folder, [1, "x" * 28]))) == 2
    with pytest.raises(
        DataError, match="data.json: line 1, byte 4 of the file: not valid JSON: Unterminated"
    ):
        data.read_samples(write(folder, [1, "x" * 40]))


def test_a_file_that_is_cut_while_it_is_read_is_an_error(folder, monkeypatch):
    """It was mapped into memory, and the process died of a bus error."""
    path = write(folder, [good()] * 40)
    find_samples = data._find_samples

    def cut(file):
        for number, span in enumerate(find_samples(file)):
            if number == 3:
                os.truncate(path, 5000)
            yield span

    monkeypatch.setattr(data, "_find_samples", cut)
    monkeypatch.setattr(data, "CHUNK", 1024)
    with pytest.raises(DataError, match="data.json: line 1, byte .* of the file: not valid JSON"):
        data.read_samples(path)


def test_the_index_is_kept_and_made_anew_when_the_file_changes(folder, monkeypatch):
    path = write(folder, [good(), good()])
    data.read_samples(path)
    monkeypatch.setattr(data, "_find_samples", None)  # cannot be called: the second time nothing is parsed
    samples = data.read_samples(path)
    assert len(samples) == 2
    again = pickle.loads(pickle.dumps(samples))  # as a spawned worker gets it
    assert again[1] == samples[1]
    monkeypatch.undo()
    write(folder, [good(), good(), good()])
    for number in (0, 1):  # each sample is an error of its own, so that --max-bad counts them
        with pytest.raises(
            DataError, match=f"sample {number}: expected the file as it was when it was opened"
        ):
            samples[number]
    path.unlink()
    with pytest.raises(
        DataError, match="sample 1: expected a readable file with ordinary JSON, found: No such file"
    ):
        samples[1]
    write(folder, [good(), good(), good()])
    assert len(data.read_samples(path)) == 3


def test_an_edit_of_equal_length_is_noticed(folder, monkeypatch):
    """A file's size alone does not tell that it has changed: the samples may begin elsewhere now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    path = write(folder, '[{"id": 1}, {"id": 22}]')
    before = data.read_samples(path)
    assert [before.read(i)[0] for i in range(2)] == [{"id": 1}, {"id": 22}]
    made = os.stat(path).st_mtime_ns
    write(folder, '[{"id": 33}, {"id": 4}]')
    os.utime(path, ns=(made, made + 1_000_000_000))
    after = data.read_samples(path)
    assert [after.read(i)[0] for i in range(2)] == [{"id": 33}, {"id": 4}]
    with pytest.raises(DataError, match="sample 0: expected the file as it was when it was opened"):
        before.read(0)


@pytest.mark.parametrize("pattern", ["[%s,\n%s,\n%s]", "%s\n%s\n%s"])
def test_a_number_that_python_does_not_read_is_the_error_of_its_sample(folder, pattern):
    """It was an error of the file, so that one such number made 700,000 samples unusable."""
    right = json.dumps(good())
    samples = data.read_samples(
        write(folder, pattern % (right, '{"id": 1, "scores": [' + "7" * 5000 + "]}", right))
    )
    with pytest.raises(
        DataError, match="data.json: sample 1: expected .*ordinary JSON, found: Exceeds the limit"
    ):
        samples[1]
    assert [samples[i].id for i in (0, 2)] == [7, 7]


def test_a_key_twice_is_an_error(folder):
    """json.loads keeps the last one, so that a frame lost its mask in silence."""
    text = json.dumps(good())
    path = write(folder, f'[{text}, {{"id": 1, "masks": {{"36": null, "40": null, "36": [1]}}}}, {text}]')
    samples = data.read_samples(path)
    found = r"data.json: sample 1: expected each key once in an object, found \['36', '40', '36'\]"
    with pytest.raises(DataError, match=found):
        samples[1]
    assert [samples[i].id for i in (0, 2)] == [7, 7]


def test_ids_without_end_stay_out_of_messages(folder):
    with pytest.raises(DataError) as caught:
        read_one(folder, {"id": "x" * 10**6})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "damage", [b"", b"123", bytes(200), bytes(16 * 5), None], ids=["empty", "short", "odd", "zeros", "cut"]
)
def test_a_damaged_index_is_made_anew(folder, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    path = write(folder, [good() | {"id": i} for i in range(3)])
    data.read_samples(path)
    (kept,) = (folder / "cache/nanorefer").iterdir()
    kept.write_bytes(kept.read_bytes()[:-16] if damage is None else damage)  # None: its last row is missing
    samples = data.read_samples(path)
    assert [samples[i].id for i in range(len(samples))] == [0, 1, 2]


def test_processes_may_open_a_file_that_another_writes_anew(folder):
    """The index is replaced while others map it: a file of 1 or of 40 samples, never anything between."""
    path, writer = folder / "data.json", multiprocessing.Process(target=_rewrite, args=(folder,), daemon=True)
    write(folder, [good()])
    writer.start()
    seen = set()
    while writer.is_alive():
        with suppress(DataError):  # it changed while its index was made
            seen.add(len(data.read_samples(path)))
    assert seen <= {1, 40} and seen


def _rewrite(folder):
    for number in range(150):
        os.replace(write(folder, [good()] * (1, 40)[number % 2], "aside.json"), folder / "data.json")
        data.read_samples(folder / "data.json")


def test_an_index_that_cannot_be_kept_says_where(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(folder, "a file, not a folder", "cache")))
    with pytest.raises(DataError, match="cache/nanorefer.*XDG_CACHE_HOME.*Not a directory"):
        data.read_samples(write(folder, [good()]))


def test_media_paths_are_relative_to_a_folder(folder):
    file = write(folder, [good() | {"video": path} for path in ("a.mp4", "../a.mp4", "/b/a.mp4", ["a.mp4"])])
    names = ["a.mp4", "../a.mp4", "/b/a.mp4", "a.mp4"]
    for media in (None, "/elsewhere"):
        samples = data.read_samples(file, media)
        expected = [os.path.join(media or str(folder), name) for name in names]
        assert [sample.media for sample in samples] == expected
    frames = ["clip/f0.png", "../f1.png"]
    sample = data.read_samples(write(folder, [good() | {"video": frames}]), "/elsewhere")[0]
    assert sample.media == ("/elsewhere/clip/f0.png", "/elsewhere/../f1.png")


def test_a_decoder_that_hangs_loses_its_sample_and_nothing_else(folder, monkeypatch, processor):
    plain = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}],
    }
    never, _ = os.pipe()
    real, opened = data.open_media, []

    def open_media(path):
        opened.append(path)
        return os.read(never, 1) if path.endswith("clip") else real(path)  # blocks in C, as a decoder does

    monkeypatch.setattr(data, "open_media", open_media)
    monkeypatch.setattr(data, "READ_SECONDS", 1)
    dataset = data.ReferringDataset(data.read_samples(write(folder, [good(), plain, good()])), processor)
    found = [dataset[0, i] for i in range(3)]
    for error in (found[0], found[2]):
        assert re.search(r"sample \d.*clip: expected to be read within 1 s, found", str(error))
    assert found[1]["kind"] == "image" and len(opened) == 3


# ---- samples -----------------------------------------------------------------------------------------------


def test_each_region_is_bound_to_its_object_in_order(folder):
    sample = read_one(folder, good())
    assert sample.turns == [("<video>\nWhat is <region>?", "A dog."), ("And <region>?", "A cat.")]
    assert [sorted(frames) for frames in sample.objects] == [[1, 10], [3]]
    assert sample.media == str(folder / "clip") and sample.id == 7


def test_masks_key_means_what_annotation_means(folder):
    entry = good()
    expected = read_one(folder, entry).objects
    frames = entry.pop("annotation")
    entry["masks"] = [{f: m.get("segmentation") for f, m in obj.items()} for obj in frames]
    entry["video"] = ["clip"]
    assert read_one(folder, entry).objects == expected

    image = {
        "image": "a.png",
        "conversations": good()["conversations"],
        "masks": [square(1, 1, 9, 9), compressed(np.eye(H, W))],
    }
    image["conversations"][0]["value"] = "<image>\nWhat is <region>?"
    assert [list(o) for o in read_one(folder, image).objects] == [[0], [0]]


def test_media_tag_may_stand_anywhere_in_the_first_question_or_be_missing(folder):
    for value, expected in [
        ("What is <region> in <video>?", "What is <region> in <video>?"),
        ("What is <region>?\n<video>", "What is <region>?\n<video>"),
        ("What is <region>?", "<video>\nWhat is <region>?"),
    ]:
        entry = good()
        entry["conversations"][0]["value"] = value
        assert read_one(folder, entry).turns[0][0] == expected


def test_leading_answers_are_dropped_and_the_media_stay(folder):
    entry = good()
    entry["conversations"] = [
        {"from": "gpt", "value": "Hello."},
        {"from": "gpt", "value": "<video>"},
    ] + entry["conversations"]
    entry["conversations"][2]["value"] = "What is <region>?"
    sample = read_one(folder, entry)
    assert sample.turns[0][0] == "<video>\nWhat is <region>?" and sample.media


def spoil(path, value):
    """-> a function that sets one field (a path of keys) of a sample; value ... deletes it."""

    def change(entry):
        *parents, last = path
        for key in parents:
            entry = entry[key]
        if value is ...:
            del entry[last]
        else:
            entry[last] = value

    return change


C, A = "conversations", "annotation"
BAD_SAMPLES = {
    "not an object": (lambda e: e.clear(), "conversations"),
    "no turns": (spoil([C], []), "conversations.*list of turns"),
    "turns of another type": (spoil([C], "hi"), "conversations.*list of turns.*'hi'"),
    "turn of another type": (spoil([C, 1], "hi"), "turn 1.*'hi'"),
    "unknown speaker": (spoil([C, 0, "from"], "user"), "turn 0.*human or gpt.*'user'"),
    "text of another type": (spoil([C, 0, "value"], 3), "turn 0.*value.*3"),
    "half a character in a path": (spoil(["video"], "a\ud83d.mp4"), r"ordinary JSON, found: .*'\\ud83d'"),
    "half a character": (
        spoil([C, 1, "value"], "a\ud83d"),
        r"ordinary JSON, found: .*'\\ud83d'",
    ),  # JSON can write it
    "empty answer": (spoil([C, 1, "value"], " "), "turn 1.*not empty"),
    "two human turns": (spoil([C, 1, "from"], "human"), "gpt as turn 1, found 'human'"),
    "no answer": (
        spoil([C], [{"from": "human", "value": "<region> <region>"}]),
        "each followed by its gpt answer",
    ),
    "only answers": (spoil([C], [{"from": "gpt", "value": "x"}]), "each followed by its gpt answer"),
    "unanswered end": (spoil([C, 3], ...), "each followed by its gpt answer.*found .*And <region>"),
    "too few tags": (spoil([C, 2, "value"], "And?"), r"as many <region> tags .*\(2\), found 1"),
    "too many tags": (spoil([C, 2, "value"], "<region><region>"), r"as many <region> tags .*\(2\), found 3"),
    "tag in an answer": (spoil([C, 1, "value"], "A <region>."), "turn 1|no <region> in an answer"),
    "media tag too late": (spoil([C, 2, "value"], "<video> <region>"), "only in the first human turn"),
    "two media tags": (spoil([C, 0, "value"], "<video><image><region>"), "one media tag"),
    "tag without media": (spoil(["video"], ...), "key for the media tag"),
    "video and image": (spoil(["image"], "a.png"), "not both"),
    "a video under image": (
        lambda e: e.update(image=e.pop("video") + ".mp4"),
        r"image: a file in .*\.png.*, found 'clip.mp4'",
    ),
    "video of another type": (spoil(["video"], 5), "video: one path, found 5"),
    "several videos": (spoil(["video"], ["a.mp4", "b.mp4"]), r"video: a file in .*\.png.*, found 'a.mp4'"),
    "a video among frame files": (spoil(["video"], ["a.png", "a.mp4"]), "video: a file in .*, found 'a.mp4'"),
    "an empty list of frame files": (spoil(["video"], []), r"video: a path .*, found \[\]"),
    "a number among frame files": (spoil(["video"], ["a.png", 5]), "video: one path, found 5"),
    "a key of RynnEC's files": (spoil(["mask_ids"], [0, 1]), "expected no mask_ids, .*, found 'mask_ids'"),
    "a video with masks drawn in": (spoil(["masked_video"], "b.mp4"), "expected no masked_video, "),
    "times of frames": (spoil(["timestamps"], [0.5]), "expected no timestamps, "),
    "a list of images": (
        lambda e: e.update(image=["a.png", "b.png"], video=None),
        r"image: a path .*, found \['a.png', 'b.png'\]",
    ),
    "both mask keys": (spoil(["masks"], []), "annotation or masks, not both"),
    "objects of another type": (spoil([A], {"1": {}}), "annotation.*one entry an object"),
    "object of another type": (spoil([A, 1], 5), "annotation: object 1.*5"),
    "object without a mask": (spoil([A, 1], {"3": {"segmentation": None}}), "object 1.*at least one frame"),
    "negative frame": (
        spoil([A, 0, "-1"], {"segmentation": square(1, 1, 9, 9)}),
        "object 0.*frame '-1'.*whole number from 0",
    ),
    "frame not a number": (
        spoil([A, 0, "1.5"], {"segmentation": square(1, 1, 9, 9)}),
        "object 0.*frame '1.5'",
    ),
    "frame of many digits": (
        spoil([A, 0, "0" * 5000], {}),
        "object 0: frame '0{20}': .*whole number from 0, found '0+[.]{3}$",
    ),
    "the same frame twice": (spoil([A, 0, "01"], {"segmentation": square(1, 1, 9, 9)}), "each frame once"),
    "the same frame twice, hidden once": (
        lambda e: e[A].insert(0, {"01": None, **e[A].pop(0)}),
        "object 0.*frame '1'.*each frame once",
    ),
    "mask not wrapped": (spoil([A, 0, "1"], square(1, 1, 9, 9)), "object 0.*frame '1'.*segmentation"),
    "size of another type": (spoil(["height"], "24"), "height and width"),
    "half a size": (spoil(["width"], 32), "height and width"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_wrong_sample_gets_one_error_with_its_place(folder, name):
    change, message = BAD_SAMPLES[name]
    entry = good()
    change(entry)
    with pytest.raises(DataError, match=message) as caught:
        read_one(folder, entry)
    assert "data.json: sample 0" in str(caught.value) and "found" in str(caught.value)
    assert read_one(folder, good()).id == 7  # the sample that was spoilt is right


def test_errors_survive_the_way_between_processes(folder):
    import pickle

    entry = good()
    entry["conversations"][0]["from"] = "user"
    with pytest.raises(DataError) as caught:
        read_one(folder, entry)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# ---- masks -------------------------------------------------------------------------------------------------


def random_masks():
    rng = np.random.default_rng(1)
    yield np.zeros((H, W), np.uint8)
    yield np.ones((H, W), np.uint8)
    for share in (0.02, 0.5, 0.9):
        yield (rng.random((H, W)) < share).astype(np.uint8)
    blob = np.zeros((130, 70), np.uint8)
    blob[20:110, 5:66] = 1  # long runs: several characters a number, negative differences
    yield blob


@pytest.mark.parametrize("number", range(6))
def test_rle_in_both_forms_gives_the_pixels(number):
    mask = list(random_masks())[number]
    for form in (compressed(mask), uncompressed(mask)):
        decoded = data.decode_mask(form, *mask.shape)
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, mask)


def test_polygons_cover_their_inside():
    one = data.decode_mask(square(4, 6, 20, 16), H, W)
    expected = np.zeros((H, W), np.uint8)
    expected[6:16, 4:20] = 1
    np.testing.assert_array_equal(one, expected)
    two = data.decode_mask([square(4, 6, 10, 16), square(10, 6, 20, 16)], H, W)
    np.testing.assert_array_equal(two, expected)


def test_mask_of_another_resolution_of_the_same_shape_keeps_its_size():
    small = np.ones((12, 16), np.uint8)
    assert data.decode_mask(compressed(small), 720, 960).shape == (12, 16)
    odd = np.ones((480, 854), np.uint8)  # 480p of a 720p film: the width is rounded
    assert data.decode_mask(compressed(odd), 720, 1280).shape == (480, 854)
    assert data.decode_mask(compressed(np.ones((720, 1280), np.uint8)), 240, 426).shape == (
        720,
        1280,
    )  # the film is 240p, cut to even


BAD_MASKS = {
    "runs too short": ({"size": [4, 4], "counts": [3, 4]}, "sum to 4 . 4 = 16, found 7"),
    "runs too long": ({"size": [4, 4], "counts": [3, 14]}, "sum to 4 . 4 = 16, found 17"),
    "negative run": ({"size": [4, 4], "counts": [20, -4]}, "whole numbers"),
    "run not whole": ({"size": [4, 4], "counts": [8.0, 8]}, "whole numbers"),
    "boolean run": ({"size": [4, 4], "counts": [True, 15]}, "whole numbers"),
    "compressed runs too short": (
        {"size": [4, 5], "counts": compressed(np.eye(4))["counts"]},
        "sum to 4 . 5 = 20, found 16",
    ),
    "compressed, cut inside a number": (
        {"size": [130, 70], "counts": compressed(np.eye(130, 70))["counts"][:3]},
        "compressed RLE string that ends with a whole number, found '01R'",
        (130, 70),
    ),
    "compressed, cut between two numbers": (
        {"size": [130, 70], "counts": compressed(np.eye(130, 70))["counts"][:4]},
        "sum to 130 . 70 = 9100, found 131$",  # the diagonal's first pixel and the gap to its second
        (130, 70),
    ),
    "compressed, other characters": ({"size": [4, 4], "counts": "\u00e9~ "}, "compressed RLE string"),
    "compressed, unfinished number": ({"size": [4, 4], "counts": "P" * 3}, "compressed RLE string"),
    "compressed, endless number": ({"size": [4, 4], "counts": "P" * 99 + "0"}, "compressed RLE string"),
    "compressed, a number too long for pycocotools": (
        {"size": [4, 4], "counts": "0<1goooooO"},
        "compressed RLE string",
    ),
    "sum too large to print": (
        {"size": [4, 4], "counts": [9 * 10**4299] * 2},
        "sum to 4 . 4 = 16, found a int too large to print",
    ),
    "nested too deeply to print": (
        [reduce(lambda nest, _: [nest], range(100_000))],
        "at least 3 points.*found a list too large to print",
    ),
    "no size": ({"counts": [16]}, "size"),
    "size zero": ({"size": [0, 4], "counts": []}, "size"),
    "size absurd": ({"size": [10**9, 10**9], "counts": [10**18]}, "size"),
    "counts of another type": ({"size": [4, 4], "counts": 16}, "counts"),
    "empty": ([], "RLE or polygons"),
    "a string": ("mja", "RLE or polygons"),
    "two points": ([1, 1, 3, 3], "3 points"),
    "odd": ([1, 1, 3, 3, 5, 1, 9], "even count"),
    "NaN": ([1, 1, 3, float("nan"), 5, 1], r"points \(x, y\) in pixels"),
    "infinite": ([1, 1, 3, float("inf"), 5, 1], r"points \(x, y\) in pixels"),
    "absurd": ([1, 1, 3, 1e30, 5, 1], r"points \(x, y\) in pixels"),
    "far outside": ([1, 1, 3, 3, 900, 1], "near the 4x4 frame"),
    "text for a number": ([1, 1, "3", 3, 5, 1], r"points \(x, y\) in pixels"),
    "polygon in a polygon": ([[[1, 1, 3, 3, 5, 1]]], r"at least 3 points.*, found \[\[1, 1, 3, 3, 5, 1\]\]$"),
    "points in pairs": ([[[1, 1], [3, 3], [5, 1], [1, 1], [3, 3], [5, 1]]], r"points \(x, y\) in pixels"),
    "boxes mixed": ([1, 1, 3, 3, 5, [1]], r"points \(x, y\) in pixels"),
    "another shape": (compressed(np.ones((4, 8))), "frame's shape, 4x4"),
    "transposed": (compressed(np.ones((8, 4))), "frame's shape"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_wrong_mask_is_refused_before_pycocotools_sees_it(name):
    segmentation, message, *frame = BAD_MASKS[name]
    with pytest.raises(DataError, match=message):
        data.decode_mask(segmentation, *(frame[0] if frame else (4, 4)))


# ---- coverage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (7, 5), (24, 32), (27, 27), (50, 3)])
def test_coverage_is_the_exact_share_of_each_cell(grid):
    """Truth: every pixel is split into gh x gw parts, so that a cell is a whole number of them (float64)."""
    gh, gw = grid
    for mask in list(random_masks())[:5]:
        parts = np.kron(mask.astype(np.float64), np.ones((gh, gw)))
        expected = parts.reshape(gh, H, gw, W).mean(axis=(1, 3))
        found = data.coverage(mask, gh, gw)
        assert found.dtype == np.float32 and found.shape == grid
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_coverage_does_not_depend_on_the_resolution_and_never_rounds_to_nothing():
    mask = list(random_masks())[3]
    np.testing.assert_allclose(
        data.coverage(np.kron(mask, np.ones((3, 3), np.uint8)), 5, 7), data.coverage(mask, 5, 7), atol=1e-6
    )
    pixel = np.zeros((720, 1280), np.uint8)
    pixel[411, 997] = 1
    found = data.coverage(pixel, 27, 27)
    assert (found > 0).sum() == 1 and found[411 * 27 // 720, 997 * 27 // 1280] > 0
    assert (
        data.coverage(np.ones((7, 9), np.uint8), 4, 4).min() == pytest.approx(1)
        and data.coverage(pixel, 27, 27).max() <= 1
    )


def test_mask_box_is_the_bounding_box_in_fractions():
    mask = np.zeros((20, 40), np.uint8)
    mask[5:10, 10:30] = 1
    assert data.mask_box(mask) == pytest.approx((0.5, 0.375, 0.5, 0.25))


# ---- media and masks of a sample ---------------------------------------------------------------------------


@pytest.fixture
def processor():
    settings = {"frame_pixels": 32 * 32, "region_pixels": 64 * 64, "window": 0}
    return models.load_processor("tiny", ["What is it?"], **settings)


def box_of(*frames):
    return {f: {"segmentation": square(4, 4, 12, 12)} for f in frames}


BAD_MEDIA = {
    "missing": (
        spoil(["video"], "absent.mp4"),
        "absent.mp4: expected a media file or a folder of images, found: No such file",
    ),
    "empty": (spoil(["video"], "empty.mp4"), "empty.mp4: expected a file that is not empty, found 0"),
    "not media": (
        spoil(["video"], "data.json"),
        "/data.json: expected a video that FFmpeg can open and decode, found: Invalid",
    ),
    "folder without images": (
        spoil(["video"], "nothing"),
        "nothing: expected images in the folder, found 'none'",
    ),
    "a missing frame file": (
        spoil(["video"], ["a.png", "absent.png"] + ["a.png"] * 10),
        "/absent.png: expected an image that decodes, found: No such file",
    ),
    "the first frame file is missing": (
        spoil(["video"], ["absent.png"] + ["a.png"] * 11),
        "/absent.png: expected an image that decodes, found: No such file",
    ),
    "a frame file that is no image": (
        spoil(["video"], ["a.png", "empty.png"] + ["a.png"] * 10),
        "/empty.png: expected an image that decodes, found: cannot identify",
    ),
    "a frame file of another size": (
        spoil(["video"], ["a.png", "small.png"] + ["a.png"] * 10),
        r"/small.png: expected an image of the first frame's height and width \(24, 32\), found \(16, 16\)",
    ),
    "past the end of a list": (
        spoil(["video"], ["a.png"] * 10),
        "object 0: .*frame indices below 10, the number of frames, found 10",
    ),
    "past the end": (spoil([A, 0], box_of("1", "12")), "object 0: .*below 12.*found 12"),
    "image has one frame": (
        lambda e: (e.update(image="a.png"), e.pop("video")),
        "object 0: .*below 1, .*found 10",
    ),
    "empty mask": (
        spoil([A, 1], {"3": {"segmentation": compressed(np.zeros((H, W)))}}),
        "object 1: .*mask that is not empty",
    ),
    "mask of another shape": (
        spoil([A, 1, "3", "segmentation"], compressed(np.ones((32, 24)))),
        "object 1: frame 3: .*frame's shape, 32x24",
    ),
    "size of another shape": (
        lambda e: e.update(height=32, width=24),
        "height and width of the frame's shape, 32x24.*24x32",
    ),
    "broken mask": (
        spoil([A, 1, "3", "segmentation", "counts"], [1, 2]),
        "object 1: frame 3: .*sum to 24 . 32 = 768, found 3",
    ),
    "control token": (
        spoil([C, 0, "value"], "<|im_end|> <region>"),
        "control tokens, found '<|im_end|>'".replace("|", r"\|"),
    ),
}


@pytest.mark.parametrize("name", BAD_MEDIA)
def test_wrong_media_and_masks_come_back_as_errors_with_their_place(folder, processor, name):
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (16, 16)).save(folder / "small.png")
    (folder / "nothing").mkdir()
    change, message = BAD_MEDIA[name]
    entry = good()
    change(entry)
    dataset = data.ReferringDataset(data.read_samples(write(folder, [entry, good()])), processor)
    error = dataset[0, 0]
    assert isinstance(error, DataError) and re.search(message, str(error)), error
    assert "data.json: sample 0 (id 7): " in str(error)
    error = evaluation.Questions(dataset.samples, processor)[0, 1]
    assert isinstance(error, DataError) and re.search(message, str(error)), error
    assert isinstance(dataset[0, 1], dict)  # its neighbour is untouched


def test_a_bad_sample_leaves_its_neighbours_batch_as_it_was(folder, processor):
    bad = good()
    bad[A][0] = box_of("99")
    dataset = data.ReferringDataset(data.read_samples(write(folder, [bad, good()])), processor)
    batch = data.collate([dataset[0, 0], dataset[0, 1]], processor)
    alone = data.collate([dataset[0, 1]], processor)
    error, nothing = batch.pop("errors")
    assert isinstance(error, DataError) and nothing is None and alone.pop("errors") == [None]
    assert batch.keys() == alone.keys()
    for part in ("tower", "attention", "regions"):
        batch |= batch.pop(part)
        alone |= alone.pop(part)
    for name, value in alone.items():
        np.testing.assert_array_equal(batch[name], value)


def test_hidden_and_empty_frames_are_skipped(folder, processor):
    entry = good()
    entry[A][1] = {"2": {"segmentation": compressed(np.zeros((H, W)))}, "9": {"segmentation": None}} | box_of(
        "4"
    )
    encoded = data.ReferringDataset(data.read_samples(write(folder, [entry])), processor)[0, 0]
    assert encoded["object_frames"] == [2, 1] and encoded["boxes"][2][4] == pytest.approx(4 / 11)


def test_a_frame_is_decoded_once_however_many_ask_for_it(folder, processor, monkeypatch):
    loaded, really_open = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda file: loaded.append(os.path.basename(file)) or really_open(file)
    )
    entry = good()
    entry[A] = [box_of("0", "3"), box_of("3", "11")]  # 0 and 11 are among the video's own eight, too
    dataset = data.ReferringDataset(data.read_samples(write(folder, [entry])), processor)
    first = dataset[0, 0]
    assert sorted(loaded)[-7:] == ["f11.png", "f2.png", "f3.png", "f5.png", "f6.png", "f8.png", "f9.png"]
    assert {*loaded[:-7]} == {"f0.png"} and first["region_still"] == [
        0,
        1,
        1,
        2,
    ]  # the first also tells the size
    loaded.clear()
    np.testing.assert_array_equal(dataset[1, 0]["video_patches"], first["video_patches"])
    assert not loaded  # the second epoch comes from the cache


def test_a_bare_mask_is_for_images_alone(folder):
    mask = compressed(np.eye(H, W))
    turns = [{"from": "human", "value": "What is <region>?"}, {"from": "gpt", "value": "A dog."}]
    for image, given in (("a.png", [mask]), ("A.JPG", [[square(1, 1, 9, 9)]])):
        assert read_one(folder, {"video": image, "conversations": turns, "masks": given}).objects == [
            {0: given[0]}
        ]
    for bare in (mask, [square(1, 1, 9, 9)]):
        with pytest.raises(DataError, match="object 0.*frame"):
            read_one(folder, {"video": "a.mp4", "conversations": turns, "masks": [bare]})


def test_a_path_that_no_file_system_takes_is_a_data_error():
    with pytest.raises(DataError, match="xxx: expected a media file or a folder of images"):
        data.open_media("x" * 5000)


def test_a_boxed_mask_covers_its_bounding_box(folder, processor):
    """The boxes are pycocotools' own. Their share of a cell is the product of two overlaps of intervals."""

    def overlap(cells, begin, size, pixels):
        edges = np.arange(cells + 1) * pixels / cells
        inside = np.minimum(edges[1:], begin + size) - np.maximum(edges[:-1], begin)
        return inside.clip(min=0) * cells / pixels

    entry = good()
    rng = np.random.default_rng(1)
    speckles = np.zeros((H, W))
    speckles[5:17, 9:30] = rng.random((12, 21)) < 0.1
    entry[A] = [
        {"1": {"segmentation": [3, 2, 20, 5, 8, 23]}, "7": {"segmentation": compressed(speckles)}},
        {"7": {"segmentation": uncompressed(np.eye(H, W, 4))}},
    ]
    samples = data.read_samples(write(folder, [entry]))
    plain = evaluation.Questions(samples, processor)[0, 1]
    boxed = evaluation.Questions(samples, processor, "box")[0, 1]
    gh, gw = (side // processor.merge_size for side in plain["still_grids"][0])
    rles = coco_mask.frPyObjects([entry[A][0]["1"]["segmentation"]], H, W)
    rles += [compressed(speckles), compressed(np.eye(H, W, 4))]
    for grid, rle in zip(boxed["coverage"], rles, strict=True):
        x, y, w, h = coco_mask.toBbox(rle)
        expected = np.outer(overlap(gh, y, h, H), overlap(gw, x, w, W))
        np.testing.assert_allclose(grid.reshape(gh, gw), expected, atol=1e-6)
    assert all((b > a + 1e-3).any() for a, b in zip(plain["coverage"], boxed["coverage"]))
    for name in plain.keys() - {"coverage"}:
        assert np.array_equal(plain[name], boxed[name]), name


def shuffled(samples, processor, seed=0):
    questions = evaluation.Questions(samples, processor, "shuffle")
    questions.seed = seed
    return questions


def test_a_shuffled_mask_comes_from_a_sample_that_can_be_read(folder, processor):
    turns = [{"from": "human", "value": "What is <region>?"}, {"from": "gpt", "value": "A dog."}]
    right = {
        "image": "a.png",
        "conversations": turns,
        "annotation": [{"0": {"segmentation": square(4, 4, 12, 12)}}],
    }
    missing = right | {"image": "nope.png"}
    other = right | {"image": "clip/f0.png", "annotation": [{"0": {"segmentation": square(16, 8, 32, 24)}}]}
    malformed = other | {"annotation": [{"0": {"segmentation": [[1, 1, 2]]}}]}
    samples = data.read_samples(write(folder, [right, missing, malformed, other]))
    for seed in range(6):
        encoded = shuffled(samples, processor, seed)[0, 0]
        np.testing.assert_allclose(encoded["boxes"][0][:4], (24 / 32, 16 / 24, 16 / 32, 16 / 24))


def images_with_boxes(folder, count):
    """Samples on images of their own, the i-th asked about the box from (4 * i, 8) to (4 * i + 4, 16)."""
    turns = [{"from": "human", "value": "What is <region>?"}, {"from": "gpt", "value": "A dog."}]
    entries = []
    for i in range(count):
        (folder / f"image{i}.png").write_bytes((folder / "a.png").read_bytes())
        masks = [{"0": {"segmentation": square(4 * i, 8, 4 * i + 4, 16)}}]
        entries.append({"image": f"image{i}.png", "conversations": turns, "annotation": masks})
    return entries


def donor(encoded):
    """Which of images_with_boxes a shuffled mask came from: by the left edge of its box."""
    center_x, _, width = encoded["boxes"][0][:3]
    return round((center_x - width / 2) * W / 4)


def test_the_masks_of_questions_are_shuffled_apart_and_by_seed(folder, processor):
    """If all questions took the mask of one donor, the control would measure that one mask."""
    samples = data.read_samples(write(folder, images_with_boxes(folder, 8)))
    donors = [donor(shuffled(samples, processor)[i, 0]) for i in range(8)]
    assert all(other != i for i, other in enumerate(donors)) and len(set(donors)) > 3, donors
    again = shuffled(samples, processor)
    assert [donor(again[i, 0]) for i in range(8)] == donors
    another = shuffled(samples, processor, seed=1)
    assert [donor(another[i, 0]) for i in range(8)] != donors


def test_any_object_of_a_donor_may_lend_its_mask(folder, processor):
    one, two, three = images_with_boxes(folder, 3)
    turns = [{"from": "human", "value": "<region> or <region>?"}, {"from": "gpt", "value": "A dog."}]
    both = two | {"conversations": turns, "annotation": two[A] + three[A]}
    samples = data.read_samples(write(folder, [one, both]))
    assert {donor(shuffled(samples, processor, seed)[0, 0]) for seed in range(16)} == {1, 2}


def frames_of(encoded):
    """The frames on which a sample's objects are shown, of a clip of 12."""
    return sorted({round(box[4] * 11) for box in encoded["boxes"]})


def test_the_frames_of_a_sample_depend_on_seed_and_epoch(folder, processor):
    entry = good()
    entry[A] = [box_of(*map(str, range(12))), box_of("3")]
    samples = data.read_samples(write(folder, [entry]))

    def chosen(seed):
        dataset = data.ReferringDataset(samples, processor, single_frame=1.0, seed=seed)
        return [frames_of(dataset[epoch, 0]) for epoch in range(6)]

    assert chosen(0) == chosen(0) and len(set(map(str, chosen(0)))) > 1
    assert chosen(0) != chosen(1)


def test_an_empty_mask_is_replaced_by_another_frame_of_the_same_mix(folder, processor):
    """single_frame=1: one frame of each object, and never the one where it is hidden."""
    hidden = {"2": {"segmentation": compressed(np.zeros((H, W)))}}
    entry = good()
    entry[A] = [hidden | box_of("4", "6"), box_of("3")]
    samples = data.read_samples(write(folder, [entry]))
    dataset = data.ReferringDataset(samples, processor, single_frame=1.0)
    encoded = [dataset[epoch, 0] for epoch in range(16)]
    assert all(e["object_frames"] == [1, 1] for e in encoded)
    assert {tuple(frames_of(e)) for e in encoded} == {(3, 4), (3, 6)}
    assert all(len(e["still_patches"]) == 2 for e in encoded)
    everything = data.ReferringDataset(samples, processor, single_frame=0.0)[0, 0]
    assert everything["object_frames"] == [2, 1] and frames_of(everything) == [3, 4, 6]


def test_a_pair_of_frames_lasts_as_long_as_it_stands_for(folder, processor):
    """A clip of 20 s, 8 frames of it: 4 pairs, one each 5 s."""
    write_video(folder / "slow.mp4", num_frames=40, rate=2)
    entry = {"video": "slow.mp4", "conversations": [dict(turn) for turn in good()[C]], A: [box_of("1")] * 2}
    encoded = data.ReferringDataset(data.read_samples(write(folder, [entry])), processor)[0, 0]
    assert encoded["prompt_grid"][0] == 4 and encoded["seconds_per_pair"] == pytest.approx(5.0)


def test_polygons_are_drawn_on_the_size_that_the_sample_gives(folder, processor):
    """The frames are 24 x 32 pixels, the polygon was drawn on 48 x 64: its box is (16..32, 8..40) of that."""
    entry = good() | {"height": 2 * H, "width": 2 * W}
    entry[A] = [{"1": {"segmentation": square(16, 8, 32, 40)}}, box_of("3")]
    encoded = data.ReferringDataset(data.read_samples(write(folder, [entry])), processor)[0, 0]
    assert encoded["boxes"][0][:4] == pytest.approx((24 / 64, 24 / 48, 16 / 64, 32 / 48))


def test_a_picture_of_more_than_200_to_1_is_an_error_of_its_sample(folder, processor):
    plain = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    for height in (200, 201):
        Image.fromarray(np.zeros((height, 1, 3), np.uint8)).save(folder / f"{height}.png")
    entries = [{"image": f"{height}.png", "conversations": plain} for height in (200, 201)]
    dataset = data.ReferringDataset(data.read_samples(write(folder, entries)), processor)
    assert dataset[0, 0]["kind"] == "image"
    assert re.search(r"sample 1: .*200 times as long as wide, found \(201, 1\)", str(dataset[0, 1]))


@pytest.mark.parametrize(
    "shortest, longest, region, low, high",
    [  # pixels: the checkpoint's smallest and largest picture, --region-pixels; what a picture becomes
        (1024, 64 * 64, 128 * 128, 1024, 64 * 64),  # no more than the checkpoint takes
        (10**6, 10**7, 64 * 64, 48 * 64, 64 * 80),  # nor more than the user asked for, but for rounding up
        (64 * 64, 10**7, 128 * 128, 64 * 64, 128 * 128),  # no less than the checkpoint's smallest
    ],
)
def test_stills_keep_to_the_limits_of_checkpoint_and_user(processor, shortest, longest, region, low, high):
    images, settings = processor.image_processor, data.Settings(region_pixels=region)
    images.size = {"shortest_edge": shortest, "longest_edge": longest}
    processor = models.Processor(processor.tokenizer, images, processor.config, settings)
    for size in ((720, 1280), (20, 30)):
        height, width = processor.still_size(*size)
        assert low <= height * width <= high and height % processor.factor == width % processor.factor == 0


def test_answers_are_learned_without_the_space_around_them(folder, processor):
    entry = good()
    entry[C][1]["value"], entry[C][3]["value"] = " A dog. ", "A\ncat.\n"
    encoded = data.ReferringDataset(data.read_samples(write(folder, [entry])), processor)[0, 0]
    learned = [token for token in encoded["labels"].tolist() if token != -100]
    end = processor.tokenizer.eos_token
    assert processor.tokenizer.decode(learned) == f"A dog.{end}A\ncat.{end}"


def test_a_full_cache_forgets_all(folder, processor, monkeypatch):
    """A still of 64 x 64 takes 12 KB, and 30 KB hold two: of eight, the seventh pair is forgotten for the
    last one. 1 KB holds none, and 1 MB all."""
    opened, really_open = [], Image.open

    def counted(file, *arguments):
        opened.append(os.path.basename(file))
        return really_open(file, *arguments)

    samples = data.read_samples(write(folder, images_with_boxes(folder, 8)))
    for i in range(8):
        Image.fromarray(np.full((64, 64, 3), 30 * i, np.uint8)).save(folder / f"image{i}.png")
    for cache_bytes, remembered in (
        (1000, set()),
        (30_000, {"image7.png"}),
        (1 << 20, {f"image{i}.png" for i in (0, 6, 7)}),
    ):
        dataset = data.ReferringDataset(samples, processor, cache_bytes=cache_bytes)
        for _ in range(3):
            first = [dataset[0, i] for i in range(8)]
        monkeypatch.setattr(Image, "open", counted)
        opened.clear()
        for i in (7, 6, 0):
            np.testing.assert_array_equal(dataset[0, i]["still_patches"], first[i]["still_patches"])
            assert (first[i]["still_patches"][0] == 30 * i).all()
        monkeypatch.undo()
        assert {"image7.png", "image6.png", "image0.png"} - {*opened} == remembered


def test_a_partly_hidden_object_is_cut_to_one_frame_as_often_as_others(folder, processor):
    """The coin was tossed again whenever a hidden frame had been chosen: 0.34 in place of 0.25."""
    entry, empty = good(), {"segmentation": compressed(np.zeros((H, W)))}
    entry[A][0] = {str(k): empty for k in range(4)} | box_of("4", "5", "6", "7")
    dataset = data.ReferringDataset(data.read_samples(write(folder, [entry])), processor, single_frame=0.25)
    single = sum(dataset[epoch, 0]["object_frames"][0] == 1 for epoch in range(400))
    assert 70 < single < 130  # expected 100, with a deviation of 9; it was 136


def test_another_spelling_of_the_same_file_is_no_other_media(folder, processor):
    frames = [f"clip/f{i}.png" for i in range(12)]
    lists = [good() | {"video": frames}, good() | {"video": [f"./{name}" for name in frames[::-1]]}]
    for entries in ([good(), good() | {"video": "./clip"}], lists):
        samples = data.read_samples(write(folder, entries))
        assert "other media to take masks from" in str(shuffled(samples, processor)[0, 0])


def test_a_list_of_frame_files_is_read_as_a_folder_of_frames_is(folder, processor):
    """In the order as given: frame k of the list is the k-th path, whatever natural order would say."""
    frames = [f"clip/f{i}.png" for i in range(12)]
    swapped = frames[:3] + [frames[11]] + frames[4:11] + [frames[3]]
    entries = [good(), good() | {"video": frames}, good() | {"video": swapped}]
    dataset = data.ReferringDataset(data.read_samples(write(folder, entries)), processor)
    folder_of_frames, listed, swapped = (dataset[0, i] for i in range(3))
    assert folder_of_frames.keys() == listed.keys()
    for name, value in folder_of_frames.items():
        np.testing.assert_array_equal(listed[name], value)
    (on_frame_3,) = (i for i, box in enumerate(swapped["boxes"]) if box[4] == 3 / 11)
    still = swapped["region_still"][on_frame_3]
    height, width = processor.still_size(H, W)
    f11 = Image.open(folder / "clip/f11.png").resize((width, height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(swapped["still_patches"][still], processor.still_patches(np.asarray(f11)))
    assert (swapped["still_patches"][still] != listed["still_patches"][still]).any()


def test_a_list_that_is_not_read_in_time_is_named_in_short(monkeypatch):
    never, _ = os.pipe()
    monkeypatch.setattr(data, "READ_SECONDS", 0.1)
    name = data.media_name(("a.png", "b.png", "c.png"))
    with pytest.raises(DataError, match=r"^a.png to c.png \(3 frames\): expected to be read within 0.1 s"):
        with data.time_limit(name):
            os.read(never, 1)


def test_a_worker_that_opens_a_changed_file_says_so(folder):
    """A spawned worker must not read other samples than the process that spawned it."""
    same, changed = write(folder, [good()], "same.json"), write(folder, [good(), good()])
    pickled = pickle.dumps(data.read_samples([same, changed]))
    assert len(pickle.loads(pickled)) == 3
    write(folder, [good()])
    samples = pickle.loads(pickled)
    assert samples[0].id == 7
    for i in (1, 2):
        with pytest.raises(
            DataError, match="data.json: sample .: expected the file as it was when it was opened"
        ):
            samples[i]


def test_a_size_that_is_too_large_is_called_so(folder):
    with pytest.raises(DataError, match=r"height and width: .* at most 67108864, found \(10000, 10000\)"):
        read_one(folder, good() | {"height": 10_000, "width": 10_000})
