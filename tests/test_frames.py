"""Is the frame that open_media reads the one asked for? Each frame of a clip shows its number (clips.py).

Further truths are PyAV, decoding all packets from the first on; decord2, with an FFmpeg of its own; PIL.
"""

import os
import pickle
import re
import signal
import struct
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import av
import clips
import decord
import numpy as np
import pytest
from clips import draw_number, read_number, remux, write_video, x264, x265
from helpers import box, sample, write_json
from PIL import Image, ImageOps

import data
import eval as evaluation
import model
from data import DataError, open_media

SHORT_GOP = x264("keyint=12:bframes=2:open-gop=1")
LONG_GOP = x264("keyint=72:bframes=2:b-pyramid=none:ref=3")
# decord2 3.4.0 fails on edit lists, MPEG-TS, files without a duration, and an EAGAIN of FFmpeg's.
DECORD_FAILS = {"h264 negative start.mp4", "h264.ts", "h264 variable rate.ts"}
DECORD_FAILS |= {"hevc closed GOP.mp4", "vp9 live.webm", "vp8.ogg"}


def plain(path):
    """[(pts, picture)] of every frame, as a player shows them, which goes on behind what does not decode."""
    frames = []
    with av.open(str(path)) as container, suppress(av.error.InvalidDataError):
        container.streams.video[0].thread_count = 1
        for packet in container.demux(video=0):
            with suppress(av.error.InvalidDataError):
                frames += [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
    return frames


def numbers(path, indices=None):
    """The numbers that are drawn in these frames (default: all), in the order of the indices."""
    media = open_media(path)
    indices = indices or range(media.info.num_frames)
    pictures = media.read(indices)
    return [read_number(pictures[k]) for k in indices]


def fails(call, *names):
    """Asserts that the call raises a DataError that names these files or values."""
    with pytest.raises(DataError) as caught:
        call()
    assert all(str(name) in str(caught.value) for name in names), (caught.value, names)


def check(path, step=1, holes=0):
    """Asserts that each frame is what plain decoding shows: all in one read, and each in a read of its own.
    The frames of so many packets that do not decode are errors, and no others take their numbers."""
    media, shown = open_media(path), plain(path)
    truth = [picture for _, picture in shown]
    if holes:
        truth = [dict(shown).get(pts) for pts in sorted(packet.pts for packet in clips.packets_of(path))]
    assert media.info.num_frames == len(media.times) == len(truth)
    everything = media.read([k for k, picture in enumerate(truth) if picture is not None])
    assert len(everything) == len(truth) - holes
    for k, picture in enumerate(truth):
        if picture is None:
            fails(lambda k=k: media.read([0, k]), path, [k])
        else:
            assert (everything[k] == picture).all(), k
            assert k % step or (media.read([k])[k] == picture).all(), k
    return media


@pytest.mark.parametrize("name", clips.VIDEOS)
def test_frames_are_the_ones_asked_for(tmp_path, name):
    # The number in each frame, its time and the clip's size, against what was encoded, PyAV and decord2.
    path = write_video(tmp_path / name, **clips.VIDEOS[name])
    times = clips.VIDEOS[name].get("pts", range(72))
    first = 30 if times[0] < 0 else 0  # what lies before time 0 is never shown
    n, times = 72 - first, times[first:]
    media = check(path, step=5)
    info = media.info
    assert (info.num_frames, info.height, info.width, info.is_image) == (n, 64, 128, False)
    assert info.fps == pytest.approx((n - 1) / (times[-1] - times[0]) * 24, rel=1e-3)
    # GIF counts in 1/100 s.
    assert media.times == pytest.approx([(time - times[0]) / 24 for time in times], abs=0.011)
    assert numbers(path) == list(range(first, 72))
    indices = [40, 3, 39, 17, 40, 3]
    assert numbers(path, indices) == [first + k for k in indices] and media.read([]) == {}
    for k in (-1, n, 10**12, 1.0, "3", None, True):
        fails(lambda k=k: media.read([0, k]), path, k)
    assert path not in [link.resolve() for link in Path("/proc/self/fd").iterdir()]  # which is open
    if name not in DECORD_FAILS:
        reader = decord.VideoReader(str(path), num_threads=1)
        theirs = np.stack([reader.next().asnumpy() for _ in range(len(reader))]).astype(int)
        assert np.abs(theirs - list(media.read(range(72)).values())).mean(axis=(1, 2, 3)).max() < 3


def test_seeks_save_decoding(tmp_path):
    # How much of a file is read, against its groups of 10 frames, each a tenth of the file.
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 128, 3), np.uint8) for _ in range(100)]
    group = "keyint=10:bframes=2:open-gop=1:qp=20"
    # An edit list hides the first 25 frames; FFmpeg then seeks to a keyframe too early.
    cut = x264(group, pts=range(-25, 75))
    for settings, start, more in ((x264(group), 0, 0), (x265(group), 0, 0), (cut, 25, 0.12)):
        path = write_video(tmp_path / "a.mp4", pictures=noise, **settings)
        media, counter = open_media(path), Path("/proc/self/io")  # "rchar: BYTES ...", of this process
        # Keyframes are read from themselves, others from the one before, near ones in one pass.
        for frames, most in (([60], 0.16), ([69], 0.27), ([95, 26, 50, 51], 0.5), (range(25, 100), 1.1)):
            before = int(counter.read_text().split()[1])
            media.read([frame - start for frame in frames])
            assert int(counter.read_text().split()[1]) - before < (most + more) * path.stat().st_size, frames


def test_damage(tmp_path):
    # Plain decoding, where packets show nothing or are overwritten: frames do not shift.
    source = write_video(tmp_path / "a.webm", **clips.vpx("libvpx"))
    content = bytearray(clips.packets_of(source)[27])
    content[0] &= ~0x10  # VP8's show_frame bit (RFC 6386, 9.1)
    path = remux([source], tmp_path / "hidden.webm", {27: bytes(content)})
    check(path, step=9)
    assert numbers(path) == [k for k in range(72) if k != 27]
    source = write_video(tmp_path / "a.mp4", **x265("keyint=48:bframes=1:b-pyramid=0"))
    delimiter = b"\0\0\0\3\x46\1\x50"  # an access unit that holds nothing else
    check(remux([source], tmp_path / "hole.mp4", {30: delimiter}), holes=1)
    check(remux([source], tmp_path / "start.mp4", {0: delimiter}))
    # Before a frame comes out; and one to which others refer: what FFmpeg shows depends on what it decoded.
    sources = write_video(tmp_path / "b.mp4", **SHORT_GOP), write_video(tmp_path / "c.mp4", **LONG_GOP)
    for i, name, number, holes in ((0, "0.mp4", 0, 0), (0, "1.mkv", 1, 1), (1, "31.mp4", 31, 1)):
        broken = b"\xff" * clips.packets_of(sources[i])[number].size
        check(remux([sources[i]], tmp_path / name, {number: broken}), holes=holes)
    # Single bits: FFmpeg flags the frame that it could not decode, but not those that refer to it.
    path = write_video(tmp_path / "bit.mp4", **x264("keyint=24:bframes=0"))
    content = path.read_bytes()
    start = content.find(b"mdat")
    for share in (22, 30):
        place = start + (len(content) - start) * share // 80
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        check(path)


def test_truncated_files(tmp_path):
    # Plain decoding, of files whose end is missing.
    kinds = {"mp4": {"container_options": {"movflags": "faststart"}}, "mkv": {}, "ts": {}, "flv": {}}
    kinds |= {"mov": {"container_options": clips.FRAGMENTS}, "webm": clips.vpx("libvpx-vp9")}
    for suffix, settings in kinds.items():
        path = write_video(tmp_path / f"a.{suffix}", **SHORT_GOP | settings)
        for share in (0.9, 0.7):
            os.truncate(path, int(share * path.stat().st_size))
            check(path, step=9)


def test_clips_that_begin_before_their_keyframe(tmp_path):
    # Plain decoding: a player leaves out the first frames, which refer to some that were cut off.
    for suffix in ("mkv", "mp4", "ts"):
        for encode, settings in ((x265, ":open-gop=1"), (x264, ":open-gop=1"), (x264, "")):
            source = write_video(tmp_path / f"a.{suffix}", **encode("keyint=12:bframes=3" + settings))
            keyframes = [k for k, packet in enumerate(clips.packets_of(source)) if packet.is_keyframe]
            first = keyframes[1] if settings else 5
            path = remux([source], tmp_path / f"tail.{suffix}", without=range(first))
            check(path, step=7)
            assert numbers(path) == list(range(12, 72))


def test_times_that_do_not_rise(tmp_path):
    # The numbers drawn and the rate encoded. HLS segments are joined as bytes, and their times begin anew.
    path, content = tmp_path / "a.ts", b""
    for first in (0, 30):
        pictures = [draw_number(k) for k in range(first, first + 30)]
        content += write_video(path, pictures=pictures, **SHORT_GOP).read_bytes()
    path.write_bytes(content)
    media = check(path, step=7)
    assert numbers(path) == list(range(60)) and media.info.fps == pytest.approx(24)
    assert media.times == pytest.approx([k / 24 for k in range(60)])
    # At 3000 frames a second, Matroska's milliseconds give three frames the same pts.
    fast = write_video(tmp_path / "fast.mkv", rate=3000, **x264("keyint=24:bframes=0"))
    assert numbers(fast, [71, 40, 41, 42]) == [71, 40, 41, 42]
    # Where all frames have time 0, the codec's own rate is left.
    packets = clips.packets_of(write_video(tmp_path / "source.mp4", **SHORT_GOP))
    with av.open(str(tmp_path / "source.mp4")) as source, av.open(str(tmp_path / "zero.mp4"), "w") as zero:
        stream = zero.add_stream_from_template(source.streams.video[0])
        for packet in packets:
            packet.stream, packet.pts, packet.dts = stream, 0, 0
            zero.mux(packet)
    assert check(tmp_path / "zero.mp4", step=7).times == pytest.approx([k / 24 for k in range(72)])


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_parameter_sets_that_change_within_a_file(tmp_path, codec):
    # Plain decoding. Of two streams that were joined, the second's parameter sets stand in its first packet
    # alone. Who starts at a later keyframe decodes with those of the header: other pictures, and no error.
    encode = x264 if codec == "h264" else x265
    changes = ("cqm=jvt", "cqm=flat") if codec == "h264" else ("deblock=6", "deblock=-6")
    parts = []
    for first, change in zip((0, 30), changes):
        pictures = [draw_number(k) for k in range(first, first + 30)]
        settings = encode("keyint=12:bframes=2:open-gop=0:" + change)
        parts.append(write_video(tmp_path / f"{first}.mp4", pictures=pictures, **settings))
    with av.open(str(parts[1])) as container:  # this filter of FFmpeg's writes the sets into the first packet
        to_units = av.BitStreamFilterContext(f"{codec}_mp4toannexb", container.streams.video[0])
        units = re.split(b"\0\0\0?\1", bytes(*to_units.filter(next(container.demux(video=0)))))[1:]
    *sets, picture = (len(unit).to_bytes(4, "big") + unit for unit in units)
    first = {30: b"".join(sets) + picture}
    before = {29: bytes(clips.packets_of(parts[0])[29]) + b"".join(sets)}  # in a packet that is no keyframe
    for taken, changes in ((30, first), (0, first), (30, before)):  # taken of the first, beside its header
        for suffix in ("mp4", "mkv"):
            path = remux(parts, tmp_path / f"joined.{suffix}", changes, without=range(taken, 30))
            check(path, step=3)
            assert numbers(path) == list(range(30 - taken, 60))


def test_colours_are_those_that_were_encoded(tmp_path):
    # RGB, not BGR; black is 16 in a limited-range video (1), 0 in a full-range one (2).
    picture = np.full((64, 128, 3), (200, 30, 90), np.uint8)
    settings = {"codec": "libvpx-vp9", "options": {"crf": 5}, "pictures": [picture] * 3}
    for color_range in (1, 2):
        path = write_video(tmp_path / "a.webm", color_range=color_range, **settings)
        assert np.abs(open_media(path).read([1])[1].astype(int) - picture).max() <= 4


def test_other_streams_are_not_the_video(tmp_path):
    # The numbers drawn, beside sound that lasts longer, and behind cover art, which shows 200.
    assert numbers(write_video(tmp_path / "sound.mp4", audio_seconds=5), [71]) == [71]
    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as container:
        streams = container.add_stream("libx264", rate=24), container.add_stream("png", rate=24)
        streams[1].disposition = av.stream.Disposition.attached_pic
        for stream, pix_fmt in zip(streams, ("yuv420p", "rgb24")):
            stream.height, stream.width, stream.pix_fmt = 64, 128, pix_fmt
        for number, stream in zip((5, 200), streams):
            frame = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
            container.mux(stream.encode(frame) + stream.encode())
    content = path.read_bytes()  # the boxes moov[mvhd, trak, udta[cover]] become moov[mvhd, udta, trak]
    track, cover = content.find(b"trak") - 4, content.find(b"udta") - 4
    path.write_bytes(content[:track] + content[cover:] + content[track:cover])
    assert numbers(path) == [5]


def test_a_video_of_which_a_player_shows_a_part_is_refused(tmp_path):
    # MP4's clap is width, height and two offsets, each a fraction. FFmpeg turns it into Matroska's PixelCrop.
    plain = write_video(tmp_path / "a.mp4", num_frames=5).read_bytes()
    end = plain.find(b"stts") - 4  # of the sample description avc1
    for width in (128, 96):
        content = bytearray(plain)
        content[end:end] = struct.pack(">I4s8I", 40, b"clap", width, 1, 64, 1, 0, 1, 0, 1)
        for name in (b"avc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
            start = content.rfind(name, 0, end) - 4
            content[start : start + 4] = (int.from_bytes(content[start : start + 4]) + 40).to_bytes(4)
        (tmp_path / "a.mp4").write_bytes(content)
        for path in (tmp_path / "a.mp4", remux([tmp_path / "a.mp4"], tmp_path / "a.mkv")):
            if width == 128:
                assert numbers(path) == list(range(5))
            else:
                fails(lambda path=path: open_media(path), path, "16/16/0/0")


def test_images_of_all_kinds(tmp_path):
    # The number drawn, whatever the mode, the suffix and its case.
    kinds = "RGB.jpg RGB.JPEG L.jpg CMYK.jpg YCbCr.jpg RGB.PNG RGBA.png L.png LA.png P.png 1.png RGB.webp"
    kinds += " RGBA.WebP RGB.bmp P.bmp RGB.tif CMYK.tiff"
    for kind in kinds.split():
        picture = Image.fromarray(draw_number(77))
        picture.convert(kind.split(".")[0], dither=Image.Dither.NONE).save(tmp_path / kind)
        info = open_media(tmp_path / kind).info
        assert (info.num_frames, info.fps, info.height, info.width, info.is_image) == (1, 24, 64, 128, True)
        assert numbers(tmp_path / kind, [0, 0]) == [77, 77], kind
    assert numbers(tmp_path) == [77] * len(kinds.split())


def test_exif_orientation(tmp_path):
    # PIL's ImageOps.exif_transpose, for all 8 orientations.
    for suffix in ("jpg", "png", "webp", "tif"):
        path = tmp_path / f"a.{suffix}"
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(draw_number(77)).save(path, exif=exif)
            with Image.open(path) as image:
                upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            media = open_media(path)
            assert (media.info.height, media.info.width) == upright.shape[:2]
            assert (media.read([0])[0] == upright).all(), (suffix, orientation)
    # No other tag matters, such as a maker that is a fraction, on which exif_transpose fails.
    maker, turn = struct.pack("<HHII", 0x10F, 5, 1, 38), struct.pack("<HHII", 0x112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + maker + turn + struct.pack("<III", 0, 6, 1)
    Image.fromarray(np.rot90(draw_number(77))).save(tmp_path / "a.jpg", exif=exif)
    assert numbers(tmp_path / "a.jpg", [0]) == [77]


def test_folders_and_lists_of_frames(tmp_path):
    # The number drawn in each: a folder is in natural order, a list in its own; 24 frames a second.
    folder = tmp_path / "frames"
    folder.mkdir()
    for name, number in (("img2", 2), ("img10", 10), ("img1", 1), ("img33", 33), ("1²2", 4), ("1٣2", 5)):
        Image.fromarray(draw_number(number)).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not a frame")
    (folder / ".img0.png").write_bytes(b"a dot file")
    assert sorted(numbers(folder, [0, 1])) == [4, 5]
    assert numbers(folder, [5, 2, 3, 4, 4]) == [33, 1, 2, 10, 10]
    files = [folder / "img2.png", str(folder / "img10.png"), folder / "img1.png", folder / "img2.png"]
    assert numbers(files, [3, 0, 1, 2]) == [2, 2, 10, 1]
    assert open_media(files).times == pytest.approx([0, 1 / 24, 2 / 24, 3 / 24])
    assert not open_media(folder).info.is_image and not open_media(files[:1]).info.is_image
    Image.fromarray(draw_number(5, 60, 128)).save(folder / "img5.png")
    fails(lambda: open_media(folder).read([0, 4]), "img5.png", "(60, 128)")


def test_not_media(tmp_path):
    # What a typo or a broken download may point at is an error that names the file.
    video = write_video(tmp_path / "a.ts", num_frames=5)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{video}\n#EXT-X-ENDLIST\n"
    mp4 = write_video(tmp_path / "a.mp4", num_frames=5, audio_seconds=1).read_bytes()
    contents = dict.fromkeys(["text.mp4", "text.txt", "text.png", "text"], b"hello\n" * 100)
    contents |= {"empty.mp4": b"", "empty.png": b"", "list.m3u8": playlist.encode()}
    contents |= {"cut.mp4": mp4[: mp4.find(b"moov")], "sound.mp4": mp4.replace(b"trak", b"free", 1)}
    contents["photo.heic"] = mp4  # FFmpeg would open it
    for suffix in ("png", "jpg", "webp", "bmp"):
        Image.fromarray(draw_number(3)).save(tmp_path / f"a.{suffix}")
        content = (tmp_path / f"a.{suffix}").read_bytes()
        contents[f"cut.{suffix}"] = content[: len(content) * 2 // 3]
    Image.new("RGB", (8, 8)).save(tmp_path / "exif.png", exif=b"II*\0")  # PIL raises struct.error
    (tmp_path / "no images").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "exif.png", "no images", "missing.mp4", "missing.png"]:
        fails(lambda name=name: open_media(tmp_path / name).read([0]), tmp_path / name)


def test_names_and_titles(tmp_path, monkeypatch):
    # The number drawn, where FFmpeg would take a colon for a protocol, or PyAV a title for UTF-8.
    monkeypatch.chdir(tmp_path)
    content = write_video(tmp_path / "a.mkv", num_frames=5).read_bytes()
    for name in ("scene:01.mkv", "50%d.mkv", "a b#?é.mkv"):
        (tmp_path / name).write_bytes(content.replace(b"Lavf", b"\xe9\xff\xfe\xe9"))
        assert numbers(name, [3]) == [3]


def test_files_that_change_or_vanish(tmp_path):
    # Between open_media and read: an error that names the file, or the frame that was asked for.
    files = [write_video(tmp_path / "a.mp4", **SHORT_GOP), tmp_path / "0.png", tmp_path / "1.png"]
    for file in files[1:]:
        Image.fromarray(draw_number(3)).save(file)
    video, images = open_media(files[0]), open_media(files[1:])
    write_video(files[0], num_frames=30, **SHORT_GOP)
    assert read_number(video.read([20])[20]) == 20
    fails(lambda: video.read([20, 50]), files[0], 50)
    for file in files:
        file.unlink()
    fails(lambda: video.read([50]), files[0])
    fails(lambda: images.read([1]), files[2])


def dataset_of(folder, entries):
    """The ReferringDataset of these entries of a data file."""
    samples = data.read_samples(write_json(folder / "data.json", entries))
    processor = model.load_processor("tiny", data.sample_texts(samples))
    return data.ReferringDataset(samples, processor, single_frame=0.5)


def test_a_file_that_hangs_is_given_up(tmp_path):
    # A pipe into which nobody writes, at the first and at a later frame. The alarm is sent here, once the
    # reader waits; the time that was left until it would have come, and come again, is compared with 240 s.
    Image.fromarray(draw_number(3)).save(tmp_path / "a.png")
    lists = ["pipe0.png", "a.png"], ["a.png", "pipe1.png"], ["a.png", "a.png"]
    dataset, left = dataset_of(tmp_path, [sample("What?", "A.", video=names) for names in lists]), []

    def interrupt(pipe, done):
        with open(pipe, "wb"):  # returns when the reader, too, has opened it
            left.append(signal.getitimer(signal.ITIMER_REAL))
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
            done.wait(60)

    signal.signal(signal.SIGALRM, pytest.fail)  # unless there is a time limit
    for i in (0, 1):
        pipe, done = tmp_path / f"pipe{i}.png", threading.Event()
        os.mkfifo(pipe)
        threading.Thread(target=interrupt, args=[pipe, done], daemon=True).start()
        found = dataset[0, i]
        done.set()
        places = str(tmp_path / "data.json"), f"sample {i}", str(pipe)
        assert found.args[1:] == places and 200 < left[i][0] <= left[i][1] == 240
    assert isinstance(dataset[0, 2], dict)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.signal(signal.SIGALRM, signal.SIG_DFL) == pytest.fail  # the handler is the one of before


def test_what_workers_get_survives_pickling(tmp_path):
    # Python 3.14 sends the data set to its workers as a pickle. It gives the same samples, and errors.
    masks = {40: box(9, 9, 30, 30), 3: box(20, 9, 30, 30)}
    names = [write_video(tmp_path / name, **SHORT_GOP).name for name in ("a.mp4", "b.mp4", "c.mp4")]
    entries = [sample("What is <region>?", "It.", masks, video=name) for name in names]
    dataset = dataset_of(tmp_path, [*entries, sample("Where?", "There.", video="absent.mp4")])
    questions = evaluation.Questions(dataset.samples, dataset.processor, "shuffle")  # keys: sample and turn
    for original, keys in ((dataset, [(0, 0), (1, 1), (0, 3)]), (questions, [(0, 0), (2, 0), (3, 0)])):
        sent, _ = pickle.loads(pickle.dumps((original, partial(data.collate, processor=dataset.processor))))
        for key in keys[:2]:
            np.testing.assert_equal(sent[key], original[key])
        assert sent[keys[2]].args == original[keys[2]].args and "absent.mp4" in str(sent[keys[2]])
