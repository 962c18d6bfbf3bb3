"""Recordings of event cameras in the formats of the real sets, a few events each, and their frames by plain loops."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
Events = np.ndarray  # (N, 4): time in microseconds, x, y, polarity; times rise


def random_events(rng: np.random.Generator, count: int, size: int) -> Events:
    """Events all over a camera of size x size pixels."""
    places = rng.integers(0, size, (count, 2))
    return np.column_stack([np.sort(rng.integers(0, 300_000, count)), places, rng.integers(0, 2, count)])


def striped_events(rng: np.random.Generator, label: int, count: int = 400) -> Events:
    """Events of 34x34 pixels in the left (0) or right (1) third: easily told apart."""
    events = random_events(rng, count, 34)
    events[:, 1] = events[:, 1] // 3 + 22 * label
    return events


def frames_of(events: Events, timesteps: int, size: int) -> np.ndarray:
    """(T, 2, H, W): frame t counts the events t * (N // T) to (t + 1) * (N // T), the last one those left over, too."""
    frames = np.zeros((timesteps, 2, size, size))
    share = len(events) // timesteps
    for i, (_, x, y, polarity) in enumerate(events):
        frames[min(i // share, timesteps - 1), polarity, y, x] += 1
    return frames


def atis(events: Events) -> bytes:
    """N-MNIST's format: 40 bits an event."""
    return b"".join(bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255]) for t, x, y, p in events.tolist())


def aedat2(events: Events) -> bytes:
    """CIFAR10-DVS's format: a header, then address and time, 32 bits each; SpikingJelly turns the picture and swaps
    the polarities, which is undone here."""
    body = b"".join(
        struct.pack(">II", (127 - y) << 1 | (127 - x) << 8 | (1 - p), 2**31 + t) for t, x, y, p in events.tolist()
    )  # times above 2^31: the header's reader stops at what is no text
    return b"#!AER-DAT2.0\r\n# a comment\r\n" + body


def aedat3(events: Events) -> bytes:
    """DVS128 Gesture's format: a header, then packets of 28 bytes and the events, 64 bits each."""
    body = b"".join(struct.pack("<II", x << 17 | y << 2 | p << 1 | 1, t) for t, x, y, p in events.tolist())
    packet = struct.pack("<HHIIIIII", 1, 0, 8, 4, 0, len(events), len(events), len(events))
    return b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n" + packet + body


def nmnist_tar(path: Path, recordings: dict[str, Events]) -> Path:
    """A tar of recordings by name, e.g. Train/0/00001, below a folder nmnist/."""
    with tarfile.open(path, "w") as tar:
        for name, events in recordings.items():
            add(tar, f"nmnist/{name}.bin", atis(events))
    return path


def striped_tar(path: Path, train: int = 8, test: int = 3) -> Path:
    """Two classes, so many recordings of each."""
    rng = np.random.default_rng(0)
    names = [f"{split}/{label}/{i:05}" for split, n in (("Train", train), ("Test", test)) for i in range(n)
             for label in (0, 1)]  # fmt: skip
    return nmnist_tar(path, {name: striped_events(rng, int(name.split("/")[1])) for name in names})


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
