"""Test clips whose every frame shows its own number, so that a test can tell which frame a reader returned.

The number's 8 bits are a row of black and white blocks, and the complement of each bit stands below it: a
picture that is blurred, smeared or mixed from two frames breaks the complement rule instead of passing for
another number. A texture drifts over the blocks, so that the encoders have motion to predict and make use of
P and B frames.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, BITS, RATE = 64, 128, 8, 24


def draw_number(number, height=HEIGHT, width=WIDTH):
    """-> uint8 (height, width, 3) RGB, grey; number in [0, 256)."""
    assert 0 <= number < 2**BITS, number
    bits = np.array([number >> b & 1 for b in range(BITS)])
    blocks = np.stack([bits, 1 - bits])  # (2, BITS)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * BITS // width
    y, x = np.mgrid[:height, :width]
    texture = 20 * np.sin(x / 7 + number / 3) * np.cos(y / 5 - number / 4)
    grey = 40 + 170 * blocks[rows][:, columns] + texture  # (height, width)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def read_number(frame):
    """The number in a decoded frame, uint8 (H, W, 3) RGB of any size. Raises ValueError if there is none."""
    height, width, _ = frame.shape
    y, x = (np.arange(2) * 2 + 1) * height // 4, (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    # (2, BITS): each block around its centre
    blocks = np.array([[frame[j - 2 : j + 3, i - 2 : i + 3].mean() for i in x] for j in y])
    bits = blocks > 127
    if np.abs(blocks - 127).min() < 25 or (bits[0] == bits[1]).any():
        raise ValueError(f"no clean number in the picture: {blocks.round()}")
    return sum(1 << b for b in range(BITS) if bits[0, b])


def write_video(
    path,
    codec="libx264",
    options=None,
    num_frames=72,
    pts=None,
    pictures=None,
    rate=RATE,
    audio_seconds=0,
    color_range=None,
    container_options=None,
):
    """Encodes frames 0 .. num_frames - 1 to a file, whose suffix chooses the container. Returns its path.

    pts: presentation times in 1 / rate s, default 0, 1, 2, ...; uneven ones make a variable frame rate.
    pictures: uint8 (num_frames, H, W, 3) RGB in place of numbers. color_range: 1 is limited (16-235), 2 is
    full (0-255). audio_seconds: so much silence is added, in whole seconds.
    """
    pictures = [draw_number(k) for k in range(num_frames)] if pictures is None else pictures
    options = {name: str(value) for name, value in (options or {}).items()}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.thread_count = 1  # the same file on every machine
        if color_range:
            stream.codec_context.color_range = color_range
        audio = container.add_stream("aac", rate=16000) if audio_seconds else None
        for time, picture in zip(pts or range(len(pictures)), pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_color_range=color_range)
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for k in range(audio_seconds * 16000 // 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, k * 1024, Fraction(1, 16000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode() if audio else [])
    return Path(path)


# ---- kinds of clips ----
X264 = "threads=1:scenecut=0:b-adapt=0:"
X265 = "pools=none:frame-threads=1:log-level=none:scenecut=0:b-adapt=0:"
VPX = {"g": 20, "lag-in-frames": 12, "auto-alt-ref": 1, "deadline": "good", "cpu-used": 5, "threads": 1}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


# Keyword arguments of write_video.
def x264(settings, **more):
    return {"options": {"x264-params": X264 + settings}} | more


def x265(settings):
    return {"codec": "libx265", "options": {"x265-params": X265 + settings}}


def av1(settings):
    options = {"preset": 12, "g": 20, "crf": 20, "svtav1-params": f"lp=1{settings}"}
    return {"codec": "libsvtav1", "options": options}


def vpx(codec, **more):
    return {"codec": codec, "options": VPX} | more


def mpeg(codec, **options):
    return {"codec": codec, "options": {"g": 12, "q:v": 3} | options}


RECORDING = [*range(60), *range(252, 252 + 12 * 192, 192)]  # of a screen: 2.5 s, then a frame in 8 s

# file name -> keyword arguments of write_video: 72 frames each
VIDEOS = {
    "h264 closed GOP.mp4": x264("keyint=12:bframes=2"),
    "h264 open GOP.mp4": x264("keyint=12:bframes=3:open-gop=1"),
    "h264 many B-frames.mkv": x264("keyint=30:bframes=8:b-pyramid=normal:ref=4"),
    "h264 plain B-frames.mp4": x264("keyint=72:bframes=2:b-pyramid=none"),
    "h264 GOP of 2.mov": x264("keyint=2:bframes=1:open-gop=1"),
    "h264 intra only.mp4": x264("keyint=1"),
    "h264 intra refresh.mp4": x264("keyint=24:intra-refresh=1:bframes=0:ref=3"),
    "h264 fragmented.mp4": x264("keyint=12:bframes=2:open-gop=1", container_options=FRAGMENTS),
    "h264 variable rate.mp4": x264("keyint=12:bframes=2", pts=RECORDING),
    "h264 variable rate.mkv": x264("keyint=12:bframes=2", pts=RECORDING),
    "h264 variable rate.ts": x264("keyint=12:bframes=2", pts=RECORDING),
    "h264 variable rate.flv": x264("keyint=12:bframes=2", pts=RECORDING),
    "vp8 variable rate.webm": vpx("libvpx", pts=RECORDING),
    "h264 negative start.mp4": x264("keyint=12:bframes=2", pts=range(-30, 42)),
    "h264.ts": x264("keyint=12:bframes=2:open-gop=1"),
    "h264.avi": x264("keyint=12:bframes=3:open-gop=1"),
    "h264.flv": x264("keyint=12:bframes=2"),
    "hevc closed GOP.mp4": x265("keyint=12:bframes=3:open-gop=0"),
    "hevc open GOP.mp4": x265("keyint=12:bframes=3:open-gop=1"),
    "hevc open GOP.mkv": x265("keyint=12:bframes=3:open-gop=1"),
    "hevc intra refresh.mp4": x265("keyint=24:bframes=0:intra-refresh=1"),
    "vp9.webm": vpx("libvpx-vp9"),
    "vp9 live.webm": vpx("libvpx-vp9", container_options={"live": "1"}),
    "vp9.mkv": vpx("libvpx-vp9"),
    "av1.mp4": av1(""),
    "av1 open GOP.mkv": av1(":irefresh-type=1"),
    "vp8.webm": vpx("libvpx"),
    "vp8.ogg": vpx("libvpx"),
    "mpeg4.avi": mpeg("mpeg4", bf=2),
    "mpeg4.mp4": mpeg("mpeg4", bf=2),
    "mpeg2.mpg": mpeg("mpeg2video", bf=2),
    "flv1.flv": mpeg("flv1"),
    "wmv2.wmv": mpeg("wmv2"),
    "gif.gif": {"codec": "gif"},
}


def packets_of(path):
    """The packets of a video, in the order in which they are stored."""
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def remux(sources, target, changes={}, without=()):  # noqa: B006
    """Copies the packets of videos into one file, one after another, without encoding. Returns its path.

    changes: {number: bytes} of packets that change, without: numbers of those that are left out; all are
    counted from 0. The header, and the parameter sets in it, are those of the first video.
    """
    taken = number = 0
    with av.open(str(sources[0])) as first, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(first.streams.video[0])
        for source in sources:
            packets = list(enumerate(packets_of(source), number))
            number += len(packets)
            packets = [(k, packet) for k, packet in packets if k not in without]
            for k, packet in packets:
                # Each video's times follow those of the video before.
                later = round(Fraction(taken, RATE) / packet.time_base) - packets[0][1].dts
                copy = av.Packet(changes.get(k, bytes(packet)))
                copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                copy.pts, copy.dts, copy.duration = packet.pts + later, packet.dts + later, packet.duration
                new.mux(copy)
            taken += len(packets)
    return Path(target)
