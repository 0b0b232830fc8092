"""Test clips whose every frame shows its own number, so that a test can tell which frame a reader returned.

The number's 8 bits are a row of black and white blocks, and the complement of each bit stands below it: a
picture that is blurred, smeared or mixed from two frames breaks the complement rule instead of passing for
another number. A texture drifts over the blocks, so that the encoders have motion to predict and make use of
P and B frames.
"""

import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

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
    """Inverse of draw_number for a decoded frame, uint8 (H, W, 3) RGB of any size; ValueError without a
    number."""
    height, width, _ = frame.shape
    y, x = (np.arange(2) * 2 + 1) * height // 4, (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    blocks = np.array(
        [[frame[j - 2 : j + 3, i - 2 : i + 3].mean() for i in x] for j in y]
    )  # (2, BITS): each block's centre
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
    with_audio_seconds=0,
    pictures=None,
    color_range=None,
    rate=RATE,
    container_options=None,
):
    """Encode frames 0 .. num_frames - 1 to `path`; its suffix chooses the container.

    pts: presentation times in 1 / rate s, default 0, 1, 2, ...; uneven ones make a variable frame rate.
    pictures: uint8 (num_frames, H, W, 3) RGB in place of numbers. color_range: 1 is limited (16-235), 2 is
    full (0-255).
    """
    pictures = [draw_number(k) for k in range(num_frames)] if pictures is None else pictures
    pts = range(len(pictures)) if pts is None else pts
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(
            codec, rate=rate, options={k: str(v) for k, v in (options or {}).items()}
        )
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.thread_count = 1  # the same file on every machine
        if color_range:
            stream.codec_context.color_range = color_range
        audio = container.add_stream("aac", rate=16000) if with_audio_seconds else None
        for time, picture in zip(pts, pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_color_range=color_range)
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            write_silence(container, audio, with_audio_seconds)
    return Path(path)


def write_silence(container, stream, seconds):
    """Mux `seconds` of silence into an open container."""
    for k in range(int(seconds * stream.rate) // 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = stream.rate, k * 1024, Fraction(1, stream.rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


X264 = "threads=1:scenecut=0:b-adapt=0:"
X265 = "pools=none:frame-threads=1:log-level=none:scenecut=0:b-adapt=0:"
VPX = {"g": 20, "lag-in-frames": 12, "auto-alt-ref": 1, "deadline": "good", "cpu-used": 5, "threads": 1}

# name -> (file name, keyword arguments of write_video): 72 frames each
VIDEOS = {
    "h264 closed GOP": ("a.mp4", dict(options={"x264-params": X264 + "keyint=12:bframes=2"})),
    "h264 open GOP": ("a.mp4", dict(options={"x264-params": X264 + "keyint=12:bframes=3:open-gop=1"})),
    "h264 many B-frames": (
        "a.mkv",
        dict(options={"x264-params": X264 + "keyint=30:bframes=8:b-pyramid=normal:ref=4"}),
    ),
    "h264 GOP of 2": ("a.mov", dict(options={"x264-params": X264 + "keyint=2:bframes=1:open-gop=1"})),
    "h264 intra only": ("a.mp4", dict(options={"x264-params": X264 + "keyint=1"})),
    "h264 intra refresh": (
        "a.mp4",
        dict(options={"x264-params": X264 + "keyint=24:intra-refresh=1:bframes=0:ref=3"}),
    ),
    "h264 fragmented": (
        "a.mp4",
        dict(
            options={"x264-params": X264 + "keyint=12:bframes=2:open-gop=1"},
            container_options={"movflags": "frag_keyframe+empty_moov"},
        ),
    ),
    "h264 variable rate": (
        "a.mp4",
        dict(
            options={"x264-params": X264 + "keyint=12:bframes=2"},
            pts=[k + 3 * (k // 5) + k * k // 50 for k in range(72)],
        ),
    ),
    "h264 mpeg-ts": ("a.ts", dict(options={"x264-params": X264 + "keyint=12:bframes=2:open-gop=1"})),
    "h264 avi": ("a.avi", dict(options={"x264-params": X264 + "keyint=12:bframes=3:open-gop=1"})),
    "h264 negative start": (
        "a.mp4",
        dict(options={"x264-params": X264 + "keyint=12:bframes=2"}, pts=range(-30, 42)),
    ),
    "hevc closed GOP": (
        "a.mp4",
        dict(codec="libx265", options={"x265-params": X265 + "keyint=12:bframes=3:open-gop=0"}),
    ),
    "hevc open GOP": (
        "a.mp4",
        dict(codec="libx265", options={"x265-params": X265 + "keyint=12:bframes=3:open-gop=1"}),
    ),
    "hevc open GOP mkv": (
        "a.mkv",
        dict(codec="libx265", options={"x265-params": X265 + "keyint=12:bframes=3:open-gop=1"}),
    ),
    "hevc intra refresh": (
        "a.mp4",
        dict(codec="libx265", options={"x265-params": X265 + "keyint=24:bframes=0:intra-refresh=1"}),
    ),
    "mpeg4 avi B-frames": ("a.avi", dict(codec="mpeg4", options={"bf": 2, "g": 12, "q:v": 3})),
    "mpeg4 mp4 B-frames": ("a.mp4", dict(codec="mpeg4", options={"bf": 2, "g": 12})),
    "mpeg2 mpg": ("a.mpg", dict(codec="mpeg2video", options={"bf": 2, "g": 12})),
    "vp8 webm": ("a.webm", dict(codec="libvpx", options=VPX)),
    "vp9 webm": ("a.webm", dict(codec="libvpx-vp9", options=VPX)),
    "vp9 live webm": ("a.webm", dict(codec="libvpx-vp9", options=VPX, container_options={"live": "1"})),
    "vp9 mkv": ("a.mkv", dict(codec="libvpx-vp9", options=VPX)),
    "av1 mp4": (
        "a.mp4",
        dict(codec="libsvtav1", options={"preset": 12, "g": 20, "crf": 20, "svtav1-params": "lp=1"}),
    ),
    "av1 open GOP mkv": (
        "a.mkv",
        dict(
            codec="libsvtav1",
            options={"preset": 12, "g": 20, "crf": 20, "svtav1-params": "lp=1:irefresh-type=1"},
        ),
    ),
    "gif": ("a.gif", dict(codec="gif")),
}


def remux(source, target, change):
    """Copy a video's packets, each as change(its number, its bytes) -> bytes; None leaves it out."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for k, packet in enumerate(p for p in old.demux(video=0) if p.size):
            data = change(k, bytes(packet))
            if data is not None:
                mux_copy(new, stream, packet, data, 0)
    return Path(target)


def tail_of(source, target, keyframe, skip=0):
    """Copy a video's packets from a keyframe (counted from 0) on, but for the first `skip`."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream, keyframes, taken, start = new.add_stream_from_template(old.streams.video[0]), -1, 0, None
        for packet in old.demux(video=0):
            keyframes += packet.size > 0 and packet.is_keyframe
            if packet.size and keyframes >= keyframe:
                taken += 1
                if taken > skip:
                    start = packet.dts if start is None else start
                    mux_copy(new, stream, packet, bytes(packet), -start)
    return Path(target)


def joined(first, second, target, taken=None):
    """Copy two MP4s' packets into one file, without encoding: `taken` of the first (all), then the second's.
    The header has the first's parameter sets; the second's stand in its first packet, once."""
    with av.open(str(first)) as old, av.open(str(second)) as other, av.open(str(target), "w") as new:
        stream, sets = new.add_stream_from_template(old.streams.video[0]), parameter_sets(other)
        packets = [packet for packet in old.demux(video=0) if packet.size]
        time_base = packets[0].time_base
        packets = packets[:taken]
        for packet in packets:
            mux_copy(new, stream, packet, bytes(packet), 0)
        end = round(Fraction(len(packets), RATE) / time_base)
        for k, packet in enumerate(packet for packet in other.demux(video=0) if packet.size):
            mux_copy(new, stream, packet, sets * (k == 0) + bytes(packet), end)
    return Path(target)


def parameter_sets(container):
    """The parameter sets in an MP4's header, each behind 4 bytes with its length, as packets hold them."""
    codec = container.streams.video[0].codec_context
    content, sets = codec.extradata, []
    if codec.name == "h264":  # avcC: for SPS, then PPS, their number and each behind its 2 bytes of length
        assert content[0] == 1 and content[4] & 3 == 3
        position, lists = 5, [31, 255]
        for mask in lists:
            count, position = content[position] & mask, position + 1
            for _ in range(count):
                size = int.from_bytes(content[position : position + 2], "big")
                sets.append(content[position + 2 : position + 2 + size])
                position += 2 + size
    else:  # hvcC: arrays, each with its kind, number of elements, and these
        assert content[0] == 1 and content[21] & 3 == 3
        position = 23
        for _ in range(content[22]):
            kind, count = content[position] & 63, int.from_bytes(content[position + 1 : position + 3], "big")
            position += 3
            for _ in range(count):
                size = int.from_bytes(content[position : position + 2], "big")
                sets += [content[position + 2 : position + 2 + size]] if kind in (32, 33, 34) else []
                position += 2 + size
    return b"".join(len(part).to_bytes(4, "big") + part for part in sets)


def mux_copy(container, stream, packet, content, later):
    """Mux a copy of a packet with this content, with its times so much later."""
    copy = av.Packet(content)
    copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
    copy.pts, copy.duration = packet.pts + later, packet.duration
    copy.dts = None if packet.dts is None else packet.dts + later
    container.mux(copy)


def write_bench(folder):
    """For the benchmarks: 10 s of 720p video, a textured scene that the camera pans over, and a disc with 8
    masks."""
    rng, (height, width), num_frames = np.random.default_rng(0), (720, 1280), 300
    layers = [
        Image.fromarray(rng.integers(0, 256, (2000 // s, 2000 // s, 3), np.uint8)).resize((2000, 2000))
        for s in (4, 16, 64)
    ]
    scene = np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0).astype(np.uint8)
    y, x = np.mgrid[:height, :width]

    def disc(k):
        return (y - 360 - 150 * np.sin(k / 40)) ** 2 + (x - 200 - 3 * k) ** 2 < 110**2

    def frame(k):
        picture = scene[k : k + height, 2 * k : 2 * k + width].copy()
        picture[disc(k)] = 255 - picture[disc(k)] // 2
        return picture

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / "clip.mp4", pictures=[frame(k) for k in range(num_frames)], rate=30)
    masks = {
        k: coco_mask.encode(np.asfortranarray(disc(k).astype(np.uint8))) for k in range(20, num_frames, 37)
    }
    annotation = {
        str(k): {"segmentation": mask | {"counts": mask["counts"].decode()}} for k, mask in masks.items()
    }
    turns = [
        {"from": "human", "value": "What is <region> doing?"},
        {"from": "gpt", "value": "It moves to the right."},
    ]
    sample = {"id": 0, "video": "clip.mp4", "conversations": turns, "annotation": [annotation]}
    (folder / "data.json").write_text(json.dumps([sample]))


if __name__ == "__main__":
    write_bench(sys.argv[1])
