"""Is the frame that open_media reads the one asked for? Each frame shows its number (clips.py)."""

import os
import pickle
import random
import struct
from contextlib import contextmanager

import av
import decord
import numpy as np
import pytest
import torch
from clips import (
    VIDEOS,
    VPX,
    X264,
    X265,
    draw_number,
    joined,
    read_number,
    remux,
    tail_of,
    write_silence,
    write_video,
)
from PIL import Image

import data
from data import DataError, MediaInfo, open_media

SHORT_GOP = {"x264-params": X264 + "keyint=12:bframes=2:open-gop=1"}
# Containers or codecs whose packets don't tell the frames apart; and streams with no keyframe but the first.
COUNTED = {
    "h264 mpeg-ts",
    "h264 avi",
    "mpeg4 avi B-frames",
    "mpeg4 mp4 B-frames",
    "mpeg2 mpg",
    "vp8 webm",
    "gif",
}
NO_KEYFRAMES = {"h264 intra refresh", "hevc intra refresh", "av1 open GOP mkv"}
SEEKABLE = [name for name in VIDEOS if name not in COUNTED | NO_KEYFRAMES]


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """{name: path} of every clip in VIDEOS, encoded once."""
    paths = {}
    for k, (name, (file, settings)) in enumerate(VIDEOS.items()):
        paths[name] = write_video(tmp_path_factory.mktemp(f"clip{k}") / file, **settings)
    return paths


@pytest.fixture
def clip(videos):
    return videos["h264 open GOP"]


@pytest.fixture
def decoded(monkeypatch):
    """How many frames the decoder puts out in each stretch; a stretch begins at a seek or at the start."""
    counts = []

    def counting(frames_of):
        def counted(*args):
            counts.append(0)  # once the first frame is asked for
            for frame in frames_of(*args):
                counts[-1] += 1
                yield frame

        return counted

    for name in ("shown_frames", "needed_frames"):
        monkeypatch.setattr(data, name, counting(getattr(data, name)))
    return counts


def read_frames(path, indices):
    """uint8 (len(indices), H, W, 3), in the order of the indices."""
    pictures = open_media(path).read(indices)
    return np.stack([pictures[k] for k in indices])


def numbers(path, indices):
    return [read_number(frame) for frame in read_frames(path, indices)]


def forward(path):
    """Every frame by the plainest decoding: one thread, from the start, no seek. uint8 (n, H, W, 3)."""
    return np.stack([picture for _, picture in forward_with_pts(path)])


def forward_with_pts(path):
    """[(pts, picture)] of every frame, as a player shows them, which goes on behind what does not decode."""
    frames = []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        packets = container.demux(video=0)
        while True:
            try:
                frames += next(packets).decode()
            except StopIteration:
                break
            except av.error.InvalidDataError:
                continue
    return [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in frames]


def assert_plain(path):
    """Each frame is what plain decoding shows: all in one read, and each in a read of its own. Returns its
    Video."""
    media, truth = open_media(path), forward(path)
    assert media.info.num_frames == len(media.times) == len(truth)
    everything = media.read(range(len(truth)))
    for k, picture in enumerate(truth):
        assert (everything[k] == picture).all() and (media.read([k])[k] == picture).all(), k
    return media


@pytest.mark.parametrize("name", VIDEOS)
def test_video_frames_are_the_ones_asked_for(videos, name):
    path, first = (
        videos[name],
        30 if name == "h264 negative start" else 0,
    )  # 30 frames lie before time 0: never shown
    media, n = open_media(path), 72 - first
    info, pts = media.info, VIDEOS[name][1].get("pts", range(72))[first:]
    assert (info.num_frames, info.height, info.width, info.is_image) == (n, 64, 128, False)
    assert info.fps == pytest.approx(8 if name == "h264 variable rate" else 24, rel=1e-3)
    times = [(time - pts[0]) / 24 for time in pts]
    assert media.times == pytest.approx(
        times, abs=0.011 if name == "gif" else 0.001
    )  # in ms, or GIF's 1/100 s
    truth = forward(path)
    assert [read_number(frame) for frame in truth] == list(range(first, 72))

    frames = read_frames(path, range(n))
    assert frames.dtype == np.uint8 and frames.shape == (n, 64, 128, 3)
    assert (frames == truth).all()
    shuffled = random.Random(0)
    for size in (1, 3, 10):
        indices = shuffled.choices(range(n), k=size) * 2  # out of order, some twice
        assert (read_frames(path, indices) == truth[indices]).all(), indices
    for k in range(0, n, 7 if name in COUNTED else 1):  # each frame as the target of its own seek
        assert (read_frames(path, [k])[0] == truth[k]).all(), k
    assert numbers(path, [n - 1]) == [71]


# What decord2 3.4.0 gets wrong even so.
DECORD_FAILS = {
    "h264 negative start": "it repeats the last frame for those that an edit list cut off",
    "h264 mpeg-ts": "it loses the first group of pictures",
    "hevc closed GOP": "it sends a packet before it has taken the frames: avcodec_send_packet gives EAGAIN",
    "vp9 live webm": "it does not open a file without a duration",
}


@pytest.mark.parametrize("name", VIDEOS)
def test_decord_agrees(videos, name):
    """A second decoder with an FFmpeg of its own; forward from frame 0, the way in which it is exact."""
    if name in DECORD_FAILS:
        pytest.skip(f"decord2 3.4.0: {DECORD_FAILS[name]}")
    reader = decord.VideoReader(str(videos[name]), num_threads=1)
    theirs = np.stack([reader.next().asnumpy() for _ in range(len(reader))])
    ours = read_frames(videos[name], range(72))
    assert theirs.shape == ours.shape
    assert np.abs(theirs.astype(int) - ours).mean(axis=(1, 2, 3)).max() < 3


@pytest.mark.parametrize("name", SEEKABLE)
def test_seeks_save_decoding(videos, name, decoded):
    n = open_media(videos[name]).info.num_frames
    read_frames(videos[name], [n - 5])
    assert len(decoded) == 1 and decoded[0] < n - 10, decoded  # one stretch, much shorter than the file


@pytest.mark.parametrize("name", ["h264 closed GOP", "h264 open GOP", "hevc open GOP", "vp9 mkv"])
def test_a_keyframe_is_read_from_itself(videos, name, decoded):
    with av.open(str(videos[name])) as container:
        shown = sorted((packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size)
    keyframes = [k for k, (_, is_keyframe) in enumerate(shown) if is_keyframe and k > 20]
    assert keyframes
    for k in keyframes:
        decoded.clear()
        assert numbers(videos[name], [k]) == [k] and decoded == [1], k


def test_frames_that_nothing_refers_to_are_not_decoded(tmp_path, decoded):
    """With x264's plain B-frames, two of three frames are such. A wanted one comes, whichever it is."""
    path = write_video(
        tmp_path / "b.mp4", options={"x264-params": X264 + "keyint=72:bframes=2:b-pyramid=none"}
    )
    truth = forward(path)
    for k in range(72):
        assert (read_frames(path, [k])[0] == truth[k]).all(), k
    decoded.clear()
    assert (read_frames(path, [10, 70]) == truth[[10, 70]]).all()
    assert len(decoded) == 1 and decoded[0] < 30


def test_one_pass_serves_near_frames_and_far_ones_get_seeks(tmp_path, decoded):
    path = write_video(tmp_path / "long.mp4", num_frames=250, options=SHORT_GOP)
    assert numbers(path, [245, 2, 120, 122, 120]) == [245, 2, 120, 122, 120]
    assert len(decoded) == 3 and sum(decoded) < 50, decoded
    decoded.clear()
    assert numbers(path, range(250)) == list(range(250))
    assert decoded == [250]  # no seek where every frame is wanted


class BadSeek:
    """A container whose seek leads `miss` frames past the keyframe, as a bad index may, or fails (None)."""

    def __init__(self, container, miss):
        self.container, self.miss = container, miss

    def __getattr__(self, name):
        return getattr(self.container, name)

    def seek(self, time, stream):
        if self.miss is None:
            raise av.error.PermissionError(1, "Operation not permitted")
        self.container.seek(time + round(self.miss / 24 / stream.time_base), stream=stream, any_frame=True)


def seek_badly(monkeypatch, miss):
    open_video = data.open_video

    @contextmanager
    def opened(path):
        with open_video(path) as (container, stream):
            yield BadSeek(container, miss), stream

    monkeypatch.setattr(data, "open_video", opened)


def test_a_seek_that_goes_astray_falls_back_to_the_start(clip, decoded, monkeypatch):
    """Some files' index leads to a later keyframe. The frame must still come, and never a neighbour."""
    truth = forward(clip)
    seek_badly(monkeypatch, 24)  # two keyframes too late
    assert (read_frames(clip, [40])[0] == truth[40]).all()
    assert decoded[-1] == 41  # from the start up to it


@pytest.mark.parametrize("miss", [-5, 5, None])
@pytest.mark.parametrize("name", ["h264 closed GOP", "h264 open GOP", "hevc open GOP", "vp9 mkv", "av1 mp4"])
def test_a_bad_seek_falls_back_to_the_start(videos, name, miss, decoded, monkeypatch):
    truth = forward(videos[name])
    seek_badly(monkeypatch, miss)
    for k in range(24, 72, 3):
        decoded.clear()
        assert (read_frames(videos[name], [k])[0] == truth[k]).all(), k
        if miss != -5:  # from there, some decoders wait for the keyframe, and the seek was right after all
            assert decoded[-1] == k + 1, k


def test_packets_that_show_nothing_are_not_frames(tmp_path):
    """VP8's hidden reference frames are packets of their own."""

    def hide(k, packet):
        return (
            bytes([packet[0] & ~0x10]) + packet[1:] if k == 27 else packet
        )  # RFC 6386, 9.1: the show_frame bit

    path = remux(write_video(tmp_path / "a.webm", "libvpx", VPX), tmp_path / "hidden.webm", hide)
    assert numbers(path, range(open_media(path).info.num_frames)) == [k for k in range(72) if k != 27]


def test_packet_without_a_frame_is_an_error_not_a_shift(tmp_path):
    def blank(k, packet):
        return b"\0\0\0\3\x46\1\x50" if k == 30 else packet  # an access unit delimiter, and no picture

    source = write_video(
        tmp_path / "a.mp4", "libx265", {"x265-params": X265 + "keyint=48:bframes=1:b-pyramid=0"}
    )
    path, shown = remux(source, tmp_path / "hole.mp4", blank), forward(tmp_path / "a.mp4")
    left = [read_number(frame) for frame in forward(path)]
    (hole,) = set(range(72)) - set(left)
    assert (read_frames(path, left) == shown[left]).all()
    for k in left:
        assert (read_frames(path, [k])[0] == shown[k]).all(), k
    with pytest.raises(DataError, match=rf"hole.mp4: expected 72 frames that decode, found .*\[{hole}\]"):
        read_frames(path, [hole - 1, hole])


def test_equal_times_are_counted(tmp_path):
    """At 3000 frames a second, Matroska's milliseconds give three frames the same pts."""
    path = write_video(
        tmp_path / "fast.mkv", options={"x264-params": X264 + "keyint=24:bframes=0"}, rate=3000
    )
    assert numbers(path, [71, 40, 41, 42]) == [71, 40, 41, 42]


# What a player does: QuickTime's matrix sends the stored pixel (x, y) to (a x + c y, b x + d y), y down, then
# moves the picture back to the origin. The phone's "portrait" is (0, 1, -1, 0).
@pytest.mark.parametrize("a, b, c, d", [(0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1)])
def test_display_rotation(tmp_path, a, b, c, d):
    stored = np.zeros((64, 128, 3), np.uint8)
    stored[:32, :64], stored[:32, 64:], stored[32:, :64] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    path = write_video(tmp_path / "a.mp4", pictures=[stored] * 3, options={"crf": 5})
    content = bytearray(path.read_bytes())
    matrix = content.find(b"tkhd") + 4 + 40
    assert struct.unpack_from(">9i", content, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">5i", content, matrix, a << 16, b << 16, 0, c << 16, d << 16)
    path.write_bytes(content)

    frame, info = read_frames(path, [1])[0], open_media(path).info
    assert frame.shape == (info.height, info.width, 3) == ((128, 64, 3) if a == 0 else (64, 128, 3))
    y, x = np.mgrid[:64, :128]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    shown = np.empty_like(frame)
    shown[shown_y - shown_y.min(), shown_x - shown_x.min()] = stored
    assert np.abs(frame.astype(int) - shown).mean() < 12  # the 4 quarters differ by far more


@pytest.mark.parametrize("color_range", [1, 2])
def test_colors(tmp_path, color_range):
    """RGB, not BGR; black is 16 in a limited-range video, 0 in a full-range one (VP9 says so in a flag)."""
    picture = np.full((64, 128, 3), (200, 30, 90), np.uint8)
    path = write_video(
        tmp_path / "a.webm", "libvpx-vp9", pictures=[picture] * 3, color_range=color_range, options={"crf": 5}
    )
    assert np.abs(read_frames(path, [1])[0].astype(int) - picture).max() <= 4


def test_folder_of_images(tmp_path):
    for k in (2, 10, 1, 33):
        Image.fromarray(draw_number(k)).save(tmp_path / f"img{k}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".img0.png").write_bytes(b"a dot file")
    assert open_media(tmp_path).info == MediaInfo(4, 24.0, 64, 128, is_image=False)
    assert numbers(tmp_path, [3, 0, 1, 2, 2]) == [33, 1, 2, 10, 10]
    Image.fromarray(draw_number(5, 60, 128)).save(tmp_path / "img5.png")
    with pytest.raises(DataError, match=r"img5.png: expected.*\(64, 128\), found \(60, 128\)"):
        read_frames(tmp_path, [0, 2])


def test_a_list_of_images_keeps_its_order(tmp_path):
    paths = [tmp_path / f"img{k}.png" for k in (2, 10, 1, 33)]
    for path, number in zip(paths, (2, 10, 1, 33)):
        Image.fromarray(draw_number(number)).save(path)
    paths.append(str(paths[1]))  # twice, and a text in place of a Path
    assert open_media(paths).info == MediaInfo(5, 24.0, 64, 128, is_image=False)
    assert numbers(paths, [3, 0, 1, 2, 4]) == [33, 2, 10, 1, 10]
    with pytest.raises(DataError, match=r"img2.png to .*img10.png \(5 frames\): .*from 0 to 4, found 5"):
        read_frames(paths, [5])
    with pytest.raises(DataError, match="at least one frame file"):
        read_frames([], [0])


@pytest.mark.parametrize(
    "mode, suffix",
    [("RGB", "jpg"), ("RGBA", "png"), ("L", "png"), ("P", "png"), ("RGB", "webp"), ("CMYK", "jpg")],
)
def test_single_image(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(draw_number(77)).convert(mode).save(path)
    assert open_media(path).info == MediaInfo(1, 24.0, 64, 128, is_image=True)
    assert numbers(path, [0, 0]) == [77, 77]


def test_suffixes_in_capitals_mean_the_same(tmp_path):
    Image.fromarray(draw_number(77)).save(tmp_path / "A.JPG")
    Image.fromarray(draw_number(78)).save(tmp_path / "B.Png")
    assert open_media(tmp_path / "A.JPG").info.is_image and numbers(tmp_path / "A.JPG", [0]) == [77]
    assert not open_media(tmp_path).info.is_image and numbers(tmp_path, [0, 1]) == [77, 78]


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying down: turn by 90 degrees clockwise
    Image.fromarray(draw_number(77)).rotate(90, expand=True).save(tmp_path / "a.jpg", exif=exif)
    assert numbers(tmp_path / "a.jpg", [0]) == [77]
    assert open_media(tmp_path / "a.jpg").info.height == 64


def test_gif_matches_pillow(videos):
    frames = read_frames(videos["gif"], [5, 70])
    with Image.open(videos["gif"]) as gif:
        for frame, k in zip(frames, [5, 70]):
            gif.seek(k)
            assert (frame == np.asarray(gif.convert("RGB"))).all()


def test_frames_come_by_number(clip):
    media = open_media(clip)
    frames = media.read((71, 24, 0, 47, 24))
    assert media.info.num_frames == 72 and {k: read_number(f) for k, f in frames.items()} == {
        k: k for k in (0, 24, 47, 71)
    }
    assert media.read([]) == {}


def test_an_image_is_opened_once_for_its_size_and_once_for_each_read(tmp_path, monkeypatch):
    opened, really_open = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda file: opened.append(os.path.basename(file)) or really_open(file)
    )
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a.tif"):
        Image.fromarray(draw_number(77)).save(tmp_path / name)
        media = open_media(tmp_path / name)
        assert opened == [name] and (media.info.height, media.info.width) == (64, 128)
        assert read_number(media.read([0, 0])[0]) == 77 and opened == [name] * 2
        opened.clear()
    assert len(open_media(tmp_path).read([4, 2])) == 2 and opened == ["a.bmp", "a.png", "a.webp"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_has_one_size(tmp_path, suffix, orientation):
    """The size that the header tells and that decoding gives, by EXIF's table: 5 to 8 swap the sides."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(draw_number(77)).save(tmp_path / f"a.{suffix}", exif=exif)
    media = open_media(tmp_path / f"a.{suffix}")
    expected = (128, 64) if orientation > 4 else (64, 128)
    assert (media.info.height, media.info.width) == media.read([0])[0].shape[:2] == expected


@pytest.mark.parametrize("name", ["h264 open GOP", "h264 mpeg-ts", "gif"])
def test_a_video_is_indexed_once(videos, name, monkeypatch):
    opened, really_open = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **more: opened.append(args) or really_open(*args, **more))
    media = open_media(videos[name])
    assert len(opened) == 1 + (name in COUNTED) and media.info.num_frames == 72
    assert (media.pts is None) == (media.keyframes is None) == (name in COUNTED)
    opened.clear()
    monkeypatch.setattr(data, "list_packets", None)
    for k in (40, 3):
        assert read_number(media.read([k])[k]) == k
    assert len(opened) == 2  # once for each read, and nothing of it is kept
    assert len(pickle.dumps(media)) < 3000  # times and pts of 72 frames, and no pixels


def test_an_edit_list_hides_packets(videos, decoded):
    """30 frames lie before time 0. FFmpeg starts at the keyframe before it, 24, so that packets 24 to 29 are
    decoded and not shown. (decord2 counts them when it seeks: its frame 20 is the 14th that is shown.)"""
    assert numbers(videos["h264 negative start"], [0, 20]) == [30, 50]
    assert len(decoded) == 2  # the second after a seek


def test_a_cut_by_an_edit_list_hides_its_packets(tmp_path):
    """A clip cut without being encoded anew: the edit list of a whole file is moved to frame 17."""
    path = write_video(tmp_path / "cut.mp4", options={"x264-params": X264 + "keyint=12:bframes=0"})
    content = bytearray(path.read_bytes())
    box = content.find(b"elst")  # version and flags, number of edits, then: duration, media time, rate
    assert struct.unpack_from(">III", content, box + 4)[:2] == (0, 1)
    duration, media_time = struct.unpack_from(">Ii", content, box + 12)
    assert (duration, media_time) == (3000, 0)  # 72 frames in ms; the other is in 1 / 12288 s: 512 a frame
    struct.pack_into(">Ii", content, box + 12, round(duration * 55 / 72), 17 * 512)
    path.write_bytes(content)
    media = open_media(path)
    assert media.info.num_frames == 55 and media.pts is not None
    assert [read_number(media.read([k])[k]) for k in (0, 20, 54)] == [17, 37, 71]


def test_odd_names(tmp_path, monkeypatch):
    """FFmpeg takes what stands before a colon for a protocol, and %d for a series of images."""
    monkeypatch.chdir(tmp_path)
    for name in ("scene:01.mp4", "50%d.mp4", "a b#?é.mp4"):
        assert numbers(write_video(tmp_path / "a.mp4", num_frames=5).rename(name), [3]) == [3]


def test_nothing_stays_open(videos, tmp_path):
    (tmp_path / "bad.mp4").write_text("text")
    before = os.listdir("/proc/self/fd")
    for path in videos.values():
        read_frames(path, [40, 3])
    for path, indices in ((tmp_path / "bad.mp4", [0]), (videos["vp9 mkv"], [1000])):
        with pytest.raises(DataError):
            read_frames(path, indices)
    assert os.listdir("/proc/self/fd") == before


class Frames(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.items = [(path, k) for path in paths for k in (70, 5, 40)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, k = self.items[i]
        return k, torch.from_numpy(read_frames(path, [k])[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers(videos, start):
    paths = [videos[name] for name in ("h264 open GOP", "hevc open GOP", "vp9 webm", "av1 mp4", "gif")]
    dataset = Frames(paths)
    dataset[0]  # the parent reads first: after that, decord hangs in forked workers
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=2 if start == "fork" else 1,
        multiprocessing_context=start,
        timeout=60,
    )
    assert [(k, read_number(frame.numpy())) for k, frame in loader] == [(k, k) for k in (70, 5, 40)] * len(
        paths
    )


@pytest.mark.parametrize("k", [-1, 72, 10**12, 1.0, "3", None, True])
def test_bad_index(clip, k):
    with pytest.raises(DataError, match=r"a.mp4: expected a frame index from 0 to 71, found"):
        read_frames(clip, [0, k])


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


@pytest.mark.parametrize(
    "suffix, settings",
    [
        (".mp4", dict(options=SHORT_GOP, container_options={"movflags": "faststart"})),
        (".mp4", dict(options=SHORT_GOP, container_options={"movflags": "frag_keyframe+empty_moov"})),
        (".mkv", dict(options=SHORT_GOP)),
        (".webm", dict(codec="libvpx-vp9", options=VPX)),
        (".avi", dict(codec="mpeg4")),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_video(tmp_path, suffix, settings, share):
    """What plain decoding shows comes, counted from the first frame."""
    path = write_video(tmp_path / f"a{suffix}", **settings)
    content = path.read_bytes()
    start = max(0, content.find(b"movi"))  # half of the AVI is a header
    cut(path, start + int((len(content) - start) * share))
    n = assert_plain(path).info.num_frames
    assert 72 * share - 20 < n <= 72 - (suffix != ".avi")  # after the AVI's frames there is an index
    with pytest.raises(DataError, match=rf"a{suffix}: expected a frame index from 0 to {n - 1}, found {n}"):
        read_frames(path, [n])


def test_truncated_between_packets(tmp_path):
    path = write_video(tmp_path / "a.mp4", options=SHORT_GOP, container_options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        end = sorted(p.pos + p.size for p in container.demux(video=0) if p.size)[50]
    assert assert_plain(cut(path, end)).info.num_frames == 51


def test_audio_may_outlast_the_video(tmp_path):
    for suffix in ("mp4", "mkv"):
        assert numbers(write_video(tmp_path / f"a.{suffix}", with_audio_seconds=5), [71]) == [71]


def assert_plain_by_pts(path):
    """Each frame is what plain decoding shows at its pts, or an error where that shows nothing. Returns how
    many there are of both."""
    media, truth = open_media(path), dict(forward_with_pts(path))
    if media.pts is None:
        return assert_plain(path).info.num_frames, 0
    missing = [k for k, pts in enumerate(media.pts) if pts not in truth]
    for k, pts in enumerate(media.pts):
        if k in missing:
            with pytest.raises(DataError, match=rf"expected {len(media.pts)} frames that decode, .*\[{k}\]"):
                media.read([0, k])
        else:
            assert (media.read([k])[k] == truth[pts]).all(), k
    return len(media.pts) - len(missing), len(missing)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_damage_in_the_middle(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", options=SHORT_GOP)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 300] = bytes(300)
    path.write_bytes(content)
    assert numbers(path, [0, 5]) == [0, 5]
    assert_plain_by_pts(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("number", [0, 1])
def test_damage_before_the_first_frame_comes_out(tmp_path, number, suffix):
    """A packet that is an error of FFmpeg's: a player goes on behind it."""
    source = write_video(tmp_path / "a.mp4", options=SHORT_GOP)
    path = remux(source, tmp_path / f"b{suffix}", lambda k, old: b"\xff" * len(old) if k == number else old)
    assert 0 < len(forward(path)) < 72
    assert_plain_by_pts(path)


def not_video(folder):
    """Fill `folder` with what a user's typo or broken download may point at."""
    write_video(folder / "moov.mp4")
    cut(folder / "moov.mp4", (folder / "moov.mp4").read_bytes().find(b"moov"))
    for name in ("text.mp4", "text.txt", "text.png", "text"):
        (folder / name).write_text("hello\n" * 100)
    for name in ("empty.mp4", "empty.png", "ebml.mkv"):
        (folder / name).write_bytes(b"\x1a\x45\xdf\xa3" if name == "ebml.mkv" else b"")
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        Image.fromarray(draw_number(3)).save(folder / name)
        cut(folder / name, (folder / name).stat().st_size * 2 // 3)
    content = write_video(folder / "codec.mkv", num_frames=3).read_bytes()
    (folder / "codec.mkv").write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))
    with av.open(str(folder / "audio.mp4"), "w") as container:
        write_silence(container, container.add_stream("aac", rate=16000), 1)
    with av.open(str(folder / "cover.mp4"), "w") as container:
        audio, picture = container.add_stream("aac", rate=16000), container.add_stream("png", rate=1)
        picture.height, picture.width, picture.pix_fmt = 64, 128, "rgb24"
        picture.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(draw_number(3), format="rgb24")
        container.mux(picture.encode(frame) + picture.encode())
        write_silence(container, audio, 1)
    (folder / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    )
    (folder / "no images").mkdir()
    (folder / "no images" / "a.txt").write_text("")


@pytest.mark.parametrize(
    "name, found",
    [
        ("missing.mp4", "No such file"),
        ("empty.mp4", "0"),
        ("empty.png", "0"),
        ("no images", "none"),
        ("moov.mp4", "Invalid data"),
        ("text.mp4", "Invalid data"),
        ("text.txt", "Invalid argument"),
        ("text", "Invalid data"),
        ("list.m3u8", "Invalid argument"),
        ("ebml.mkv", "Invalid data"),
        ("codec.mkv", ""),  # of a kind that FFmpeg does not know
        ("audio.mp4", "only ..audio"),
        ("cover.mp4", "cover art"),
        ("text.png", "cannot identify"),
        ("cut.png", "truncated"),
        ("cut.jpg", "truncated"),
        ("cut.webp", "could not create decoder"),
    ],
)
def test_not_media(tmp_path, name, found):
    not_video(tmp_path)
    with pytest.raises(DataError, match=rf"{name}: expected .*found.*{found}"):
        read_frames(tmp_path / name, [0])


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(draw_number(3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="a.png: expected an image.*exceeds limit"):
        read_frames(tmp_path / "a.png", [0])


def test_titles_need_not_be_utf_8(tmp_path):
    """PyAV decodes metadata while it opens a file, and a UnicodeDecodeError ended the worker."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_number(5), format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mkv").read_bytes()
    assert content.count(b"TITLE") == 1
    (tmp_path / "a.mkv").write_bytes(content.replace(b"TITLE", b"\xe9\xff\xfe\xe9\xff"))
    assert read_number(read_frames(tmp_path / "a.mkv", [0])[0]) == 5


def test_an_exif_header_that_is_cut_short_is_a_data_error(tmp_path):
    """PIL raises struct.error, which is neither an OSError nor a ValueError."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", exif=b"II*\0")
    with pytest.raises(DataError, match="a.png: expected an image that decodes, found: unpack requires"):
        read_frames(tmp_path / "a.png", [0])


def test_digits_of_other_scripts_do_not_end_the_natural_order(tmp_path):
    """ "²".isdigit() is true, int("²") an error; and a number cannot be compared with a letter."""
    for name in ("1²2.png", "1a2.png", "1٣2.png", "10.png", "9.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert open_media(tmp_path).info.num_frames == 5
    assert [os.path.basename(file) for file in open_media(tmp_path).files[-2:]] == ["9.png", "10.png"]


@pytest.mark.parametrize("place", [22, 30, 44, 52])
def test_a_damaged_frame_is_what_plain_decoding_shows(tmp_path, place):
    """FFmpeg flags the frame that it could not decode, but not those that refer to it, up to a keyframe.

    A single bit is changed, where FFmpeg notices it. (It cannot always: another stream may be valid, too.)
    """
    path = write_video(tmp_path / "a.mp4", options={"x264-params": X264 + "keyint=24:bframes=0"})
    right = forward(path)
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat")
    content[start + (len(content) - start) * place // 80] ^= 0x10
    path.write_bytes(content)
    shown, missing = assert_plain_by_pts(path)
    assert shown + missing == 72
    media, damaged = open_media(path), 0
    for k in range(72):
        try:
            damaged += (media.read([k])[k] != right[k]).any()
        except DataError:
            damaged += 1
    assert 1 < damaged <= 24  # the rest of one group of pictures


@pytest.mark.parametrize("number", [4, 31])
def test_a_packet_that_does_not_decode_is_noticed_where_b_frames_are_left_out(tmp_path, number):
    """Other frames refer to it. What FFmpeg shows in their place depends on which frames it has decoded."""
    options = {"x264-params": X264 + "keyint=72:bframes=2:b-pyramid=none:ref=3"}
    source = write_video(tmp_path / "a.mp4", options=options)
    path = remux(source, tmp_path / "b.mp4", lambda k, old: b"\xff" * len(old) if k == number else old)
    assert assert_plain_by_pts(path) == (71, 1)


# Clips cut by stream copy. The first frames refer to some that were cut off, and a player leaves them out.
CUTS = {
    "hevc open GOP, at its 2nd keyframe": (
        1,
        0,
        {"codec": "libx265"},
        X265 + "keyint=12:bframes=3:open-gop=1",
    ),
    "h264 open GOP, at its 2nd keyframe": (1, 0, {}, X264 + "keyint=12:bframes=3:open-gop=1"),
    "h264, in the middle of a GOP": (0, 5, {}, X264 + "keyint=12:bframes=3"),
}


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
@pytest.mark.parametrize("name", CUTS)
def test_a_clip_that_begins_before_its_keyframe(tmp_path, name, suffix):
    keyframe, skip, settings, options = CUTS[name]
    options = {("x265-params" if settings else "x264-params"): options}
    source = write_video(tmp_path / f"a{suffix}", options=options, **settings)
    path = tail_of(source, tmp_path / f"cut{suffix}", keyframe, skip)
    assert_plain(path)
    assert numbers(path, range(60)) == list(range(12, 72))


def test_joined_transport_streams(tmp_path):
    """HLS segments, one file after another: times begin anew, so the rate tells them."""
    settings = {"options": {"x264-params": X264 + "keyint=12:bframes=2"}}
    pictures = [draw_number(k) for k in range(60)]
    parts = [write_video(tmp_path / f"{i}.ts", pictures=pictures[i : i + 30], **settings) for i in (0, 30)]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    media = assert_plain(tmp_path / "joined.ts")
    assert numbers(tmp_path / "joined.ts", range(60)) == list(range(60))
    assert media.info.fps == pytest.approx(24) and media.times == pytest.approx([k / 24 for k in range(60)])


# Encoder settings that stand in the parameter sets, and that decoding with the other ones does not notice: it
# gives other pictures.
CHANGES = {
    "libx264": ("x264-params", X264 + "keyint=12:bframes=2", ":cqm=jvt", ":cqm=flat"),
    "libx265": (
        "x265-params",
        X265 + "keyint=12:bframes=2:open-gop=0",
        ":cbqpoffs=12:crqpoffs=-12",
        ":cbqpoffs=0:crqpoffs=0",
    ),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("codec", CHANGES)
@pytest.mark.parametrize("case", ["in the middle", "in the first packet", "repeated"])
def test_parameter_sets_that_change_within_a_file(tmp_path, case, codec, suffix):
    """Two streams joined by stream copy: the second's parameter sets stand in its first packet alone, so that
    who starts at one of its later keyframes decodes with those of the header."""
    grey = [draw_number(k)[..., 0] for k in range(60)]
    pictures = [np.stack([part, np.roll(part, 9, axis=1), 255 - part], axis=2) for part in grey]
    name, common, first, second = CHANGES[codec]
    a = write_video(tmp_path / "a.mp4", codec, {name: common + first}, pictures=pictures[:30])
    b = write_video(tmp_path / "b.mp4", codec, {name: common + second}, pictures=pictures[30:])
    if case == "repeated":  # which is no change
        media = assert_plain(joined(a, a, tmp_path / f"joined{suffix}"))
        assert media.pts is not None and media.keyframes == [0, 12, 24, 30, 42, 54]
        return
    taken = 30 if case == "in the middle" else 0  # frames of the first stream, beside its header
    media = assert_plain(joined(a, b, tmp_path / f"joined{suffix}", taken))
    assert media.pts is None
    for picture, found in zip(pictures[30 - taken :], media.read(range(30 + taken)).values()):
        assert np.abs(picture.astype(int) - found).mean() < 25


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.ts", "a.webm"])
def test_times_are_each_frames_own(tmp_path, name):
    """A screen recording: 60 frames in 2.5 s, then 8 frames, one in 8 s."""
    pts = [*range(60), *[60 + 192 * (i + 1) for i in range(8)]]
    settings = {"codec": "libvpx", "options": VPX} if name == "a.webm" else {"options": SHORT_GOP}
    path = write_video(tmp_path / name, num_frames=68, pts=pts, **settings)
    media = open_media(path)
    assert media.times == pytest.approx([k / 24 for k in pts], abs=0.001)
    assert media.info.fps == pytest.approx(67 / (pts[-1] / 24), rel=1e-4)
    assert numbers(path, [59, 60, 67]) == [59, 60, 67]


def test_images_have_the_times_of_a_steady_rate(tmp_path):
    for k in range(3):
        Image.fromarray(draw_number(k)).save(tmp_path / f"{k}.png")
    assert open_media(tmp_path).times == pytest.approx([0, 1 / 24, 2 / 24])


def exif_header(*tags):
    """An EXIF header of (tag, kind, count, content), in ascending order, whatever the content says."""
    end, entries, more = 8 + 2 + 12 * len(tags) + 4, b"", b""
    for tag, kind, count, content in tags:
        value = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack("<I", end + len(more))
        entries += struct.pack("<HHI", tag, kind, count) + value
        more += content if len(content) > 4 else b""
    head = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return head + entries + struct.pack("<I", 0) + more


@pytest.mark.parametrize(
    "tag",
    [
        (0x010F, 5, 1, struct.pack("<II", 6, 1)),
        (0x9000, 12, 1, struct.pack("<d", 1.5)),
        (0x011A, 10, 1, struct.pack("<ii", -1, 0)),
        (0x9001, 16, 1, struct.pack("<Q", 2**60)),
    ],
    ids=["Make as a rational", "ExifVersion as a double", "XResolution of -1/0", "64 bits"],
)
def test_a_malformed_exif_tag_does_not_keep_a_photo_from_being_turned(tmp_path, tag):
    exif = exif_header(*sorted([(0x0112, 3, 1, struct.pack("<H", 6)), tag]))
    picture = Image.fromarray(draw_number(77)).rotate(90, expand=True)
    picture.save(tmp_path / "a.jpg", quality=95, exif=exif)
    media = open_media(tmp_path / "a.jpg")
    assert (media.info.height, media.info.width) == (64, 128) and read_number(media.read([0])[0]) == 77
