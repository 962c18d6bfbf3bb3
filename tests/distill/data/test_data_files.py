import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from distill.data.files import FORMATS, find_split, list_split

DATA = Path(__file__).parents[3] / os.environ.get("DISTILL_DATA", "../shared/data")
needs_data = pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason=f"no real data in {DATA}: set DISTILL_DATA")


def png(value: int) -> bytes:
    """A 2x2 grey image of one value."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "png")
    return buffer.getvalue()


def write_folder(root: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tar_of_tars(path: Path, members: dict[str, bytes]) -> Path:
    """One tar a class inside, as ImageNet's training set comes."""
    inner = {}
    for name in sorted({name.split("/")[0] for name in members}):
        own = {member.split("/")[1]: data for member, data in members.items() if member.startswith(f"{name}/")}
        inner[f"{name}.tar"] = write_tar(path.with_suffix(".inner"), own).read_bytes()
    path.with_suffix(".inner").unlink()
    return write_tar(path, inner)


WRITERS = {
    "folder": lambda root, members: write_folder(root / "train", members),
    "tar": lambda root, members: write_tar(root / "train.tar", members),
    "tar of tars": lambda root, members: write_tar_of_tars(root / "train.tar", members),
}


@pytest.fixture(params=list(WRITERS))
def write(request):
    return WRITERS[request.param]


def test_images_classes_and_pixels_are_the_same_however_they_are_packed(write, tmp_path):
    members = {"cat/2.png": png(20), "cat/10.png": png(10), "ant/1.png": png(30), "ant/note.txt": b"no image"}
    split = list_split(write(tmp_path, members))
    assert split.classes == ("ant", "cat")
    assert split.labels.tolist() == [0, 1, 1]
    assert [int(np.asarray(file.open("L"))[0, 0]) for file in split.files] == [30, 10, 20]  # 10.png before 2.png
    assert [file.pixels() for file in split.files] == [4, 4, 4]
    assert split.files[0].open("RGB").getpixel((0, 0)) == (30, 30, 30)


def test_images_of_all_formats_of_torchvisions_folders_are_read(write, tmp_path):
    members = {}
    for i, ending in enumerate(FORMATS):
        buffer = io.BytesIO()
        Image.new("L", (2, 2), 20 * i).save(buffer, Image.registered_extensions()[ending], lossless=True)
        members[f"{chr(ord('a') + i)}/1{ending if i % 2 else ending.upper()}"] = buffer.getvalue()
    split = list_split(write(tmp_path, members))
    assert split.classes == tuple("abcdefghi") and split.labels.tolist() == list(range(9))
    assert [file.open("L").getpixel((1, 1)) for file in split.files] == [20 * i for i in range(9)]
    assert set(FORMATS) == set(torchvision.datasets.folder.IMG_EXTENSIONS)
    assert get_img_extensions() == (".png", ".jpg", ".jpeg")  # other users of timm in this process keep theirs


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat/day/1.png", "dog/day/1.png"), r"class 'day' of .* lie in cat/day and in dog/day; a class is one folder"),
        # Tiny ImageNet as it is unpacked
        (("n1/images/1.png", "n2/images/2.png", "n2/boxes.txt"), r"class 'images' of .* n1/images and in n2/images;"),
        (("ant/1.png", "ant/more/2.png", "bee/1.png"), r"lie in ant and in ant/more inside of it; a class is one fold"),
    ],
)
def test_a_class_in_several_folders_is_refused_with_two_of_them(kind, names, message, tmp_path):
    path = WRITERS[kind](tmp_path, {name: png(1) for name in names})
    with pytest.raises(ValueError, match=message):
        list_split(path)


def test_folders_of_classes_may_lie_deeper_and_in_parts_of_a_tar(tmp_path):
    deeper = write_folder(tmp_path / "deep", {"animals/ant/1.png": png(1), "plants/oak/1.png": png(2)})
    assert list_split(deeper).classes == ("ant", "oak")
    parts = [{"./ant/1.png": png(1), "oak/1.png": png(2)}, {"ant/2.png": png(3)}]
    inner = {f"{i}.tar": write_tar(tmp_path / "part", part).read_bytes() for i, part in enumerate(parts)}
    split = list_split(write_tar(tmp_path / "train.tar", inner))
    assert split.classes == ("ant", "oak") and split.labels.tolist() == [0, 1, 0]


def test_sixteen_bits_of_grey_keep_their_high_byte(write, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0x4321, dtype=np.uint16)).save(buffer, "png")
    file = list_split(write(tmp_path, {"ant/1.png": buffer.getvalue(), "bee/1.png": png(1)})).files[0]
    assert file.open("L").getpixel((0, 0)) == 0x43 and file.open("RGB").getpixel((1, 1)) == (0x43,) * 3


def test_a_corrupt_image_is_named_and_not_skipped(write, tmp_path):
    # 43 bytes of a png: its header and two bytes of its pixels
    members = {"ant/1.png": png(1), "ant/2.png": png(2)[:43], "cat/3.png": b"no image at all", "cat/4.png": png(4)}
    files = list_split(write(tmp_path, members)).files
    assert files[0].open("L").size == files[3].open("L").size == (2, 2)
    for index, name in ((1, "2.png"), (2, "3.png")):
        with pytest.raises(ValueError, match=f"cannot read the image .*{name}") as error:
            files[index].open("L")
        assert str(tmp_path / "train") in str(error.value)
    with pytest.raises(ValueError, match=r"cannot read the image .*3\.png.*: not in a format that Pillow knows"):
        files[2].pixels()


def test_a_corrupt_image_is_named_inside_its_tar(tmp_path):
    tar = write_tar(tmp_path / "train.tar", {"ant/1.png": b"?"})
    with pytest.raises(ValueError, match=f"ant/1.png in {tar}"):
        list_split(tar).files[0].open("RGB")
    nested = write_tar_of_tars(tmp_path / "val.tar", {"ant/1.png": b"?"})
    with pytest.raises(ValueError, match=f"ant.tar/1.png in {nested}"):
        list_split(nested).files[0].open("RGB")


def test_a_tar_cut_short_after_it_was_listed_is_an_error(tmp_path):
    tar = write_tar(tmp_path / "train.tar", {"ant/1.png": png(1)})
    files = list_split(tar).files
    tar.write_bytes(tar.read_bytes()[: 512 + 10])  # the header and ten bytes of the image
    with pytest.raises(ValueError, match=f"ant/1.png in {tar}: the tar ends after 10 of its"):
        files[0].open("L")


def test_a_file_that_is_no_tar_or_a_compressed_one_is_named(tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(b"this is not a tar file at all" * 50)
    with pytest.raises(ValueError, match=f"cannot read {path} as a tar"):
        list_split(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("ant/1.png"))
    with pytest.raises(ValueError, match=f"cannot read {path} as a tar"):
        list_split(path)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_no_images_names_the_path_and_what_was_looked_for(kind, tmp_path):
    path = WRITERS[kind](tmp_path, {"ant/note.txt": b"no image"})
    with pytest.raises(ValueError, match=rf"no images in {path}: looked for \.png, \.jpg, \.jpeg, \.webp, \.bmp, "):
        list_split(path)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_outside_of_class_folders_are_refused(kind, tmp_path):
    path = WRITERS[kind](tmp_path, {"ant/1.png": png(1), "stray.png": png(2)})
    with pytest.raises(ValueError, match=r"1 image\(s\) outside of class folders.*stray\.png"):
        list_split(path)


def test_classes_are_alphabetical_and_a_different_order_in_timm_is_warned_of(tmp_path):
    path = write_folder(tmp_path, {f"{name}/1.png": png(1) for name in ("2", "10", "1")})
    with pytest.warns(UserWarning, match="alphabetical order"):
        split = list_split(path)
    assert split.classes == ("1", "10", "2")


def test_timm_never_leaves_a_pickle_next_to_a_large_tar(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "train.tar", {"ant/1.png": png(1)})
    monkeypatch.setattr("timm.data.readers.reader_image_in_tar.os.path.getsize", lambda path: 11 * 1024**3)
    list_split(tar)
    assert os.listdir(tmp_path) == ["train.tar"]


def test_the_first_eval_split_that_exists_is_taken(tmp_path):
    write_tar(tmp_path / "test.tar", {})
    assert find_split(str(tmp_path), None) == tmp_path / "test.tar"
    (tmp_path / "validation").mkdir()
    assert find_split(str(tmp_path), None) == tmp_path / "validation"
    write_tar(tmp_path / "val.tar", {})
    assert find_split(str(tmp_path), None) == tmp_path / "val.tar"
    (tmp_path / "val").mkdir()
    assert find_split(str(tmp_path), None) == tmp_path / "val"
    assert find_split(str(tmp_path), "test") == tmp_path / "test.tar"


def test_a_missing_split_or_root_names_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=rf"nothing to read in '{tmp_path}': looked for train/ or train.tar"):
        find_split(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"val/ or val\.tar or validation/ or validation.tar or test/ or test.tar"):
        find_split(str(tmp_path), None)
    with pytest.raises(ValueError, match="nowhere', which is not a folder"):
        find_split(str(tmp_path / "nowhere"), "train")


@needs_data
def test_cifar10s_labels_are_the_official_ones():
    split = list_split(find_split(str(DATA / "cifar10"), None))
    assert split.path.name == "test.tar"
    assert split.classes == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
    )  # fmt: skip
    assert np.bincount(split.labels).tolist() == [1000] * 10
    labels = {file.name: label for file, label in zip(split.files, split.labels, strict=True)}
    with np.load(DATA / "cifar10" / "raw_sample.npz") as raw:
        names = [name if name.startswith("test/") else f"test/{name}" for name in raw["test_files"].tolist()]
        assert [labels[name] for name in names] == raw["test_labels"].tolist()


@needs_data
def test_cifar10s_jpegs_show_the_original_images():
    files = {file.name: file for file in list_split(DATA / "cifar10" / "test.tar").files}
    with np.load(DATA / "cifar10" / "raw_sample.npz") as raw:
        names, originals = raw["test_files"].tolist()[:200], raw["test_images"][:200].astype(float)
    decoded = np.stack([np.asarray(files[f"test/{n}" if "test/" not in n else n].open("RGB")) for n in names])
    errors = ((decoded - originals) ** 2).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / errors)
    assert psnr.min() > 23  # dB; the data's README: 23.1 at worst, 30.5 on average
    assert 30 < psnr.mean() < 31


@needs_data
def test_imagenets_classes_are_in_the_usual_order():
    split = list_split(DATA / "imagenet_sample" / "val.tar")
    assert list(split.classes) == (DATA / "imagenet_sample" / "synsets.txt").read_text().split()
    assert split.labels.tolist() == list(range(1000))
