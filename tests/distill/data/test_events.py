"""Event data: frames against an integration by plain loops, splits, augmentation, where files are found and kept."""

import gc
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_events import CIFAR10, add, aedat2, aedat3, atis, frames_of, nmnist_tar, random_events, striped_tar

from distill.data import DataConfig, Preprocessing, eval_loader, event_files, load_data, train_loader
from distill.data.event_files import SETS
from distill.data.event_frames import summed
from distill.data.events import leading
from distill.data.locks import LOCK, alone_in

DATA = Path(__file__).parents[3] / os.environ.get("DISTILL_DATA", "../shared/data")
SAMPLE = DATA / "nmnist_sample.tar"
T = 3


def preprocessing(size=34, mean=(0.0, 0.0), std=(1.0, 1.0), **options):
    return Preprocessing(input_size=(2, size, size), mean=mean, std=std, **options)


def opened(root, cache=None, timesteps=T, size=34, name="nmnist", seed=0, **options):
    config = DataConfig(name=name, root=str(root), cache=None if cache is None else str(cache), **options)
    return load_data(config, preprocessing(size), seed, timesteps)


def equal(found, expected):
    assert found.dtype == torch.float32
    return np.array_equal(found.numpy(), expected)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A tar of N-MNIST's layout, and its recordings by name."""
    rng = np.random.default_rng(0)
    names = ["Train/0/00002", "Train/0/00003", "Train/7/00001", "Test/0/00001", "Test/7/00002"]
    recordings = {name: random_events(rng, 50 + 7 * i, 34) for i, name in enumerate(names)}
    return nmnist_tar(tmp_path_factory.mktemp("digits") / "digits.tar", recordings), recordings


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    return striped_tar(tmp_path_factory.mktemp("stripes") / "stripes.tar")


def test_frames_of_nmnist_are_the_counts_of_its_events(digits, cache):
    tar, recordings = digits
    data = opened(tar, cache)
    assert data.classes == ("0", "7")
    for images, part in ((data.train, "Train"), (data.eval, "Test")):
        names = [name for name in recordings if name.startswith(part)]
        assert len(images) == len(names)
        for (frames, label), name in zip([images[i] for i in range(len(images))], names, strict=True):
            assert equal(frames, frames_of(recordings[name], T, 34))
            assert data.classes[label] == name.split("/")[1]


def test_without_timesteps_items_are_the_sums_over_time(digits, cache):
    tar, recordings = digits
    data = opened(tar, cache, timesteps=None)
    assert equal(data.train[0][0], frames_of(recordings["Train/0/00002"], 1, 34)[0])
    images, labels = next(iter(eval_loader(data.eval, 2)))
    assert images.shape == (2, 2, 34, 34) and labels.tolist() == [0, 1]
    assert torch.equal(images, summed(next(iter(eval_loader(opened(tar, cache).eval, 2)))[0]))


def test_summed_leaves_images_as_they_are():
    images, frames = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 2, 4, 4)
    assert summed(images) is images
    torch.testing.assert_close(summed(frames), frames[0] + frames[1] + frames[2])


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_have_time_first(stripes, cache, in_memory):
    data = opened(stripes, cache, in_memory=in_memory, workers=0)
    assert data.train.in_memory is in_memory and len(data.train) == 16 and len(data.eval) == 6
    batches = list(train_loader(data.train, 6, seed=0, workers=0))
    assert [frames.shape for frames, _ in batches] == [(T, 6, 2, 34, 34)] * 2
    frames, labels = list(eval_loader(data.eval, 4, workers=0))[1]
    assert frames.shape == (T, 2, 2, 34, 34) and labels.dtype == torch.int64
    for i in range(2):
        assert torch.equal(frames[:, i], data.eval[4 + i][0]) and labels[i] == data.eval[4 + i][1]


def test_loader_processes_read_the_same_frames(stripes, cache):
    data = opened(stripes, cache, in_memory=False, event_shift=3)
    alone, helped = (next(iter(train_loader(data.train, 8, seed=1, workers=n))) for n in (0, 2))
    assert torch.equal(alone[0], helped[0]) and torch.equal(alone[1], helped[1])


def test_the_first_recordings_of_every_class_are_kept(stripes, cache):
    data = opened(stripes, cache, max_train_samples=5, max_eval_samples=2)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1] and data.eval.labels.tolist() == [0, 1]


@pytest.mark.parametrize("in_memory", [True, False])
def test_without_training_recordings_none_is_read(stripes, cache, in_memory):
    config = DataConfig(name="nmnist", root=str(stripes), cache=str(cache), in_memory=in_memory)
    data = load_data(config, preprocessing(), 0, T, training=False)
    assert (len(data.train), len(data.eval), data.classes) == (0, 6, ("0", "1"))
    assert torch.equal(data.eval[5][0], opened(stripes, cache).eval[5][0])


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """CIFAR10-DVS unpacked: ten recordings of each class."""
    root, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(1)
    recordings = {(name, i): random_events(rng, 30, 128) for name in CIFAR10 for i in range(10)}
    for (name, i), events in recordings.items():
        (root / name).mkdir(exist_ok=True)
        (root / name / f"cifar10_{name}_{i}.aedat").write_bytes(aedat2(events))
    return root, recordings


def test_frames_and_split_of_cifar10_dvs(cifar, cache):
    root, recordings = cifar
    data = opened(root, cache, name="cifar10_dvs", size=128)
    assert data.classes == CIFAR10 and len(data.train) == 90 and len(data.eval) == 10
    assert equal(data.train[9 * 4 + 2][0], frames_of(recordings["deer", 2], T, 128))
    for label, name in enumerate(CIFAR10):  # the last recording of each class is held out
        frames, found = data.eval[label]
        assert found == label and equal(frames, frames_of(recordings[name, 9], T, 128))
    assert not (root / "events_np").exists()  # everything is in the cache


def test_the_split_is_spikingjellys():
    utils = sys.modules[SETS["nmnist"].reader_class.__module__].utils  # the package itself wants torchaudio
    labels = np.random.default_rng(0).integers(0, 4, 57)
    train, held_out = utils.split_to_train_test_set(0.9, [(None, label) for label in labels.tolist()], 4)
    first = leading(labels, 0.9)
    assert sorted(train.indices) == np.flatnonzero(first).tolist()
    assert sorted(held_out.indices) == np.flatnonzero(~first).tolist()


@pytest.fixture(scope="module")
def gestures(tmp_path_factory):
    """DVS128 Gesture unpacked: one trial to train on, one held out, each of all gestures in 100 us after another."""
    root, rng = tmp_path_factory.mktemp("gestures"), np.random.default_rng(2)
    folder = root / "DvsGesture"
    folder.mkdir()
    recordings = {}
    for split, trial in (("train", "user01_lab"), ("test", "user24_led")):
        events = random_events(rng, 11 * 20, 128)
        events[:, 0] = np.arange(11 * 20) * 5 + 1000
        (folder / f"{trial}.aedat").write_bytes(aedat3(events))
        rows = [f"{i + 1},{1000 + 100 * i},{1100 + 100 * i}" for i in range(11)]
        (folder / f"{trial}_labels.csv").write_text("\n".join(["class,startTime_usec,endTime_usec", *rows]) + "\n")
        (folder / f"trials_to_{split}.txt").write_text(f"{trial}.aedat\n")
        recordings |= {(split, str(i)): events[20 * i : 20 * i + 20] for i in range(11)}
    return root, recordings


def test_frames_and_split_of_dvs128_gesture(gestures, cache):
    root, recordings = gestures
    data = opened(root, cache, name="dvs128_gesture", size=128)
    assert sorted(data.classes, key=int) == [str(i) for i in range(11)] and len(data.train) == len(data.eval) == 11
    for split, images in (("train", data.train), ("test", data.eval)):
        for index in range(11):
            frames, label = images[index]
            assert equal(frames, frames_of(recordings[split, data.classes[label]], T, 128))


def test_frames_are_normalised_so_that_their_sum_is(digits, cache):
    tar, recordings = digits
    config = DataConfig(name="nmnist", root=str(tar), cache=str(cache))
    mean, std = (0.5, 2.0), (4.0, 0.25)
    frames, _ = load_data(config, preprocessing(34, mean, std), 0, T).train[0]
    counts = frames_of(recordings["Train/0/00002"], T, 34)
    expected = (counts.sum(0) - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(frames.sum(0).numpy(), expected, rtol=1e-5, atol=1e-5)
    image, _ = load_data(config, preprocessing(34, mean, std), 0).train[0]
    np.testing.assert_allclose(image.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_frames_are_resized_to_the_input_size(digits, cache):
    tar, recordings = digits
    counts = frames_of(recordings["Train/0/00002"], T, 34)
    config = DataConfig(name="nmnist", root=str(tar), cache=str(cache))
    nearest = load_data(config, preprocessing(17, interpolation="nearest"), 0, T).train[0][0]
    assert equal(nearest, counts[:, :, ::2, ::2])
    smooth = load_data(config, preprocessing(17), 0, T).train[0][0]
    assert smooth.shape == (T, 2, 17, 17)
    # antialiased: the interior's mean is kept, whatever pixels events fall on
    assert smooth.mean() == pytest.approx(counts.mean(), rel=0.05)


def test_training_frames_are_shifted_and_flipped_as_a_whole(stripes, cache):
    options = dict(event_shift=2, hflip=0.5)
    data, plain = opened(stripes, cache, **options), opened(stripes, cache)
    sums = opened(stripes, cache, timesteps=None, **options)
    found = set()
    for index in range(len(data.train)):
        for epoch in range(3):
            frames, original = data.train[epoch, index][0], plain.train[index][0]
            matches = [
                (dy, dx, flip)
                for dy in range(-2, 3) for dx in range(-2, 3) for flip in (False, True)
                if torch.equal(frames, (lambda f, flip=flip: f.flip(3) if flip else f)(original.roll((dy, dx), (2, 3))))
            ]  # fmt: skip
            assert len(matches) == 1
            found.update(matches)
            assert torch.equal(sums.train[epoch, index][0], frames.sum(0))
    assert {dy for dy, _, _ in found} == {dx for _, dx, _ in found} == {-2, -1, 0, 1, 2}
    assert {flip for *_, flip in found} == {False, True}
    assert torch.equal(data.eval[0][0], plain.eval[0][0])  # held-out recordings stay as they are


def test_augmentation_is_a_function_of_seed_epoch_and_index(stripes, cache):
    options = dict(event_shift=4, hflip=0.5)
    first, again = (opened(stripes, cache, **options) for _ in range(2))
    other = opened(stripes, cache, seed=1, **options)
    keys = [(epoch, index) for epoch in range(2) for index in range(8)]
    ours = [first.train[key][0] for key in reversed(keys)][::-1]  # in another order
    assert all(torch.equal(a, again.train[key][0]) for a, key in zip(ours, keys, strict=True))
    assert any(not torch.equal(a, other.train[key][0]) for a, key in zip(ours, keys, strict=True))
    assert any(not torch.equal(first.train[0, i][0], first.train[1, i][0]) for i in range(8))


def test_the_root_may_be_a_folder_which_then_holds_the_frames(digits, tmp_path):
    tar, recordings = digits
    with tarfile.open(tar) as packed:
        packed.extractall(tmp_path, filter="data")
    root = tmp_path / "nmnist"
    frames, _ = opened(root).train[0]
    assert equal(frames, frames_of(recordings["Train/0/00002"], T, 34))
    assert {path.name for path in root.iterdir()} == {
        "Train",
        "Test",
        LOCK,
        "events_np",
        "events_np.recordings",
        f"frames_number_{T}_split_by_number",
    }
    for path in root.rglob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype != object for name in arrays.files)
    moved = root.rename(tmp_path / "prepared")  # the events alone serve, from any cache
    for part in ("Train", "Test"):
        (moved / part).rename(tmp_path / part)
    assert torch.equal(opened(moved, tmp_path / "other").train[0][0], frames)
    assert torch.equal(opened(tmp_path, tmp_path / "third").train[0][0], frames)  # one folder up


def test_what_is_prepared_is_used_again(digits, tmp_path):
    tar, _ = digits
    opened(tar, tmp_path / "c")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    opened(tar, tmp_path / "c")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before


def prepared_folder(root, recordings, counts):
    """The set's folder at root, with so many recordings of each class to train on."""
    for name, count in (("Train/0", counts[0]), ("Train/7", counts[1]), ("Test/0", 1), ("Test/7", 1)):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.bin").write_bytes(atis(recordings["Train/7/00001"]))
    return root


@pytest.mark.parametrize("cached", [False, True])
def test_recordings_that_were_added_are_refused_with_what_to_remove(digits, tmp_path, cached):
    root, cache = prepared_folder(tmp_path / "set", digits[1], (2, 1)), tmp_path / "cache" if cached else None
    opened(root, cache)
    opened(root, cache, timesteps=None)
    (folder,) = cache.iterdir() if cached else (root,)
    (root / "Train" / "notes.txt").write_text("no recording")
    assert len(opened(root, cache).train) == 3
    (root / "Train" / "notes.txt").unlink()  # which SpikingJelly would take for a class
    prepared_folder(root, digits[1], (3, 1))
    old = [folder / "events_np", *(folder / f"frames_number_{n}_split_by_number" for n in (1, T))]
    with pytest.raises(ValueError, match=f"there are 6 recordings in {root}, {old[0]} was made of 5") as raised:
        opened(root, cache)
    assert f"remove {', '.join(map(str, old))}, which are then made anew" in str(raised.value)
    shutil.rmtree(old[0])  # of the frames some are forgotten
    shutil.rmtree(old[2])
    assert len(opened(root, cache).train) == 4
    with pytest.raises(ValueError, match=f"of 6 recordings, {old[1]} the frames of 5: remove {old[1]}, which"):
        opened(root, cache, timesteps=None)
    shutil.rmtree(old[1])
    assert len(opened(root, cache, timesteps=None).train) == 4


def test_the_events_that_a_cache_links_to_are_counted_too(digits, tmp_path):
    root = prepared_folder(tmp_path / "set", digits[1], (2, 1))
    opened(root)
    opened(root, tmp_path / "cache")
    (link,) = tmp_path.glob("cache/*/events_np")
    assert link.is_symlink()
    prepared_folder(root, digits[1], (2, 2))
    frames = [folder / f"frames_number_{T}_split_by_number" for folder in (link.parent, root)]
    old = ", ".join(map(str, [root / "events_np", link, *frames]))
    with pytest.raises(ValueError, match=f"there are 6 recordings .* was made of 5: remove {old}, which"):
        opened(root, tmp_path / "cache")
    for path in (root / "events_np", *frames):
        shutil.rmtree(path)
    link.unlink()
    assert len(opened(root, tmp_path / "cache").train) == 4


def test_an_interrupted_preparation_leaves_nothing_half_done(digits, tmp_path, monkeypatch):
    tar, recordings = digits
    reader = SETS["nmnist"].reader_class

    def stop(source, raw):
        (raw / "train").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reader, "create_raw_from_extracted", staticmethod(stop))
        opened(tar, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.rglob("*")] == [LOCK]
    assert equal(opened(tar, tmp_path).train[0][0], frames_of(recordings["Train/0/00002"], T, 34))


def test_machines_that_share_a_folder_prepare_it_in_turns(digits, tmp_path, monkeypatch):
    class SecondMachine:
        """Of two machines it is the slower one: what it waited for is there."""

        def __init__(self, folder):
            monkeypatch.setattr(event_files, "alone_in", alone_in)
            opened(digits[0], tmp_path)  # the other machine

        def __enter__(self):
            monkeypatch.setattr(event_files, "_unpack", None)  # nothing is made again
            monkeypatch.setattr(event_files, "_move", None)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(event_files, "alone_in", SecondMachine)
    assert len(opened(digits[0], tmp_path).train) == 3
    (folder,) = tmp_path.iterdir()
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == [LOCK, "events_np", f"frames_number_{T}_split_by_number"]


@pytest.mark.parametrize("name", ["../escaped.bin", "/escaped.bin/../../up.bin", "nmnist/Train/../../../escaped.bin"])
def test_a_tar_whose_names_leave_the_folder_is_refused(tmp_path, name):
    evil = tmp_path / "deep" / "evil.tar"
    evil.parent.mkdir()
    with tarfile.open(evil, "w") as tar:
        add(tar, name, b"12345")
    with pytest.raises(ValueError, match=r"root: .*evil\.tar is not safe to unpack"):
        opened(evil, tmp_path / "deep" / "cache")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != LOCK] == [evil]


def test_a_tar_whose_links_leave_the_folder_is_refused(tmp_path):
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as tar:
        link = tarfile.TarInfo("nmnist")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        tar.addfile(link)
    with pytest.raises(ValueError, match="not safe"):
        opened(evil, tmp_path / "cache")


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda p: p / "nowhere", ["there is no", "nowhere", "Train.zip", "garrickorchard.com"]),
        (lambda p: p, ["no N-MNIST in", "events_np/", "Train/, Test/", "Train.zip", "garrickorchard.com"]),
        (lambda p: written(p / "a.txt", b"text"), ["a.txt is neither a folder nor a tar or zip"]),
        (lambda p: nmnist_tar(p / "half.tar", {"Train/0/1": random_events(np.random.default_rng(0), 9, 34)}),
         ["holds no N-MNIST", "Train/, Test/"]),
        (lambda p: written(p / "events_np.building", b"").parent, ["SpikingJelly was interrupted", "remove"]),
    ],
    ids=["nothing", "empty", "no archive", "half a set", "half prepared"],
)  # fmt: skip
def test_data_that_is_not_there_is_named_with_where_to_get_it(tmp_path, make, texts):
    with pytest.raises(ValueError) as raised:
        opened(make(tmp_path), tmp_path / "cache")
    for text in texts:
        assert text in str(raised.value)


@pytest.mark.parametrize("data", [bytes(13), bytes([5, 200, 128, 0, 0]) * 9], ids=["torn", "outside of the camera"])
def test_a_damaged_recording_is_refused_with_its_set(tmp_path, data):
    whole = {f"{split}/0/1": random_events(np.random.default_rng(0), 9, 34) for split in ("Train", "Test")}
    tar = nmnist_tar(tmp_path / "a.tar", whole)
    with tarfile.open(tar, "a") as more:
        add(more, "nmnist/Train/0/2.bin", data)
    with pytest.raises(ValueError, match=r"a recording of N-MNIST in .*a\.tar cannot be read"):
        opened(tar, tmp_path / "cache")


def test_recordings_are_read_where_threads_and_collections_meet(tmp_path):
    """With several reading threads Python 3.11 fails here: a collection within `ast.parse` lets another thread run."""

    def some_python(phase, info):
        sum(range(9))

    rng = np.random.default_rng(0)
    many = {f"{split}/{i % 2}/{i}": random_events(rng, 9, 34) for split in ("Train", "Test") for i in range(40)}
    tar = nmnist_tar(tmp_path / "many.tar", many)
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    gc.callbacks.append(some_python)
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    try:
        data = opened(tar, tmp_path)
    finally:
        gc.callbacks.remove(some_python)
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
    assert (len(data.train), len(data.eval)) == (40, 40)


def test_a_file_of_frames_that_cannot_be_read_is_named(digits, tmp_path):
    opened(digits[0], tmp_path)
    (file,) = tmp_path.rglob(f"frames_number_{T}*/test/7/*.npz")
    file.write_bytes(b"PK torn apart")
    with pytest.raises(ValueError, match=rf"cannot read the frames .*{file.name}"):
        opened(digits[0], tmp_path)


def written(path, data):
    path.write_bytes(data)
    return path


def test_a_cache_that_cannot_be_written_is_named(digits, tmp_path):
    taken = written(tmp_path / "taken", b"")
    with pytest.raises(ValueError, match=r"cache: .*taken.* cannot be written"):
        opened(digits[0], taken)


def test_too_few_recordings_to_hold_some_out_are_refused(tmp_path):
    for name in CIFAR10:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"cifar10_{name}_0.aedat").write_bytes(
            aedat2(random_events(np.random.default_rng(0), 9, 128))
        )
    with pytest.raises(ValueError, match="too few recordings"):
        opened(tmp_path, name="cifar10_dvs", size=128)


def test_splits_of_other_classes_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    tar = nmnist_tar(
        tmp_path / "a.tar", {f"{n}/1": random_events(rng, 9, 34) for n in ("Train/0", "Train/1", "Test/0")}
    )
    with pytest.raises(ValueError, match=r"same classes, found \['0', '1'\] and \['0'\]"):
        opened(tar, tmp_path / "cache")


def test_recordings_of_a_single_class_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    tar = nmnist_tar(tmp_path / "a.tar", {f"{n}/4/1": random_events(rng, 9, 34) for n in ("Train", "Test")})
    with pytest.raises(ValueError, match=r"root: .*a\.tar has the class '4' alone, at least two are needed"):
        opened(tar, tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="nmnist"), "root is None"),
        (dict(name="nmnist", root="r", crop_padding=2), "crop_padding is 2; name='nmnist' is event data"),
        (dict(name="cifar10_dvs", root="r", random_erasing=0.5), "random_erasing is 0.5"),
        (dict(name="nmnist", root="r", eval_split="b"), "eval_split is 'b'"),
        (dict(name="nmnist", root="r", event_shift=-1), "event_shift is -1"),
        (dict(name="folder", root="r", event_shift=1), "event_shift is 1; name='folder' is images"),
        (dict(cache="c"), "cache is 'c'; name='digits' is images"),
    ],
)
def test_settings_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize(
    ("pre", "options", "message"),
    [
        (Preprocessing(input_size=(3, 34, 34), mean=(0.0,) * 3, std=(1.0,) * 3), {}, "2 channels"),
        (preprocessing(8), dict(event_shift=8), "event_shift is 8; frames of 8x8 allow 0 to 7"),
        (preprocessing(8, interpolation="lanczos"), {}, "lanczos.*nearest, bilinear, bicubic"),
    ],
)
def test_what_frames_cannot_be_made_of_is_refused(digits, cache, pre, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(name="nmnist", root=str(digits[0]), cache=str(cache), **options), pre, 0, T)


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"no {SAMPLE.name} in DISTILL_DATA or ../shared/data")
def test_the_real_sample(tmp_path):
    with tarfile.open(SAMPLE) as whole, tarfile.open(tmp_path / "some.tar", "w") as some:
        names = sorted(name for name in whole.getnames() if name.endswith(".bin"))
        files = {name: whole.extractfile(name).read() for name in names if "Test" in name or name[-9:] < "00200.bin"}
        for name, data in files.items():
            add(some, name, data)
    data = opened(tmp_path / "some.tar", tmp_path)
    assert data.classes == tuple("0123456789") and len(data.train) == 199 and len(data.eval) == 100
    first = np.frombuffer(next(d for name, d in files.items() if "Train" in name), np.uint8).astype(int).reshape(-1, 5)
    events = np.column_stack([first[:, 4], first[:, 0], first[:, 1], first[:, 2] >> 7])
    assert equal(data.train[0][0], frames_of(events, T, 34))
    train, held_out = (torch.stack([s[i][0] for i in range(len(s))]).flatten(1) for s in (data.train, data.eval))
    nearest = data.train.labels[torch.cdist(held_out, train).argmin(1)]
    assert (nearest == data.eval.labels).mean() > 0.5  # chance is 0.1
