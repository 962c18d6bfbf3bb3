import pytest

from distill.data import DataConfig, Preprocessing

GOOD = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def test_the_defaults_need_no_files_and_no_augmentation():
    config = DataConfig()
    assert (config.name, config.root, config.crop_padding, config.hflip) == ("digits", None, 0, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "mnits"}, "name is 'mnits'; allowed: digits, synthetic, folder, cifar10, cifar100, mnist"),
        ({"name": "wds/"}, "name is 'wds/'; allowed: "),
        ({"name": "mnist"}, "root is None; name='mnist' needs the folder that holds MNIST/raw/"),
        ({"name": "mnist/letters", "root": "x"}, "name is 'mnist/letters'; allowed: mnist"),
        ({"name": "emnist", "root": "x"}, "name is 'emnist'; allowed: emnist/byclass, .*emnist/letters"),
        ({"name": "mnist", "root": "x", "train_split": "val"}, "train_split is 'val'; name='mnist' allows train, test"),
        ({"name": "eurosat", "root": "x", "eval_split": "val"}, "eval_split is 'val'.*every fifth image"),
        ({"name": "mnist", "root": "x", "class_map": "y"}, "class_map is 'y'; name='mnist' has its classes"),
        ({"download": True}, "download is True; name='digits' downloads nothing"),
        ({"name": "synthetic", "root": "x"}, "root is 'x'; name='synthetic' reads no files"),
        ({"synthetic_samples": 49}, "synthetic_classes is 10; allowed: 2 to synthetic_samples // 5, 9"),
        ({"on_corrupt": "ignore"}, "on_corrupt is 'ignore'; allowed: error, skip"),
        ({"name": "wds/x"}, "root is None; name='wds/x' needs the path of the folder of the shards"),
        ({"name": "folder"}, "root is None"),
        ({"name": "folder", "root": ""}, "root is ''"),
        ({"root": "somewhere"}, "root is 'somewhere'; name='digits' reads no files"),
        ({"eval_split": "val"}, "eval_split is 'val'; name='digits'"),
        ({"in_memory": False}, "in_memory is False"),
        ({"train_split": ""}, "train_split is ''"),
        ({"hflip": 1.5}, r"hflip is 1.5; allowed: a probability in \[0, 1\]"),
        ({"random_erasing": -0.1}, "random_erasing is -0.1"),
        ({"crop_padding": -1}, "crop_padding is -1; allowed: integers from 0 up"),
        ({"max_train_samples": 0}, "max_train_samples is 0; allowed: integers from 1 up"),
        ({"max_eval_samples": 0}, "max_eval_samples is 0"),
        ({"workers": -2}, "workers is -2; allowed: integers from 0 up"),
        ({"random_resized_crop": True, "crop_padding": 4}, "crop_padding is 4; with random_resized_crop only 0"),
        ({"auto_augment": "rond-m9"}, "auto_augment is 'rond-m9'.*allowed: one of rand, augmix"),
        ({"auto_augment": "random-m9"}, "auto_augment is 'random-m9'"),
        ({"auto_augment": "rand-q9"}, "auto_augment is 'rand-q9'"),
    ],
)
def test_a_wrong_data_config_names_the_field_what_it_found_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original", "v0r", "3a"])
def test_policies_of_timm_are_accepted(policy):
    assert DataConfig(auto_augment=policy).auto_augment == policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": (3, 8)}, r"input_size is \(3, 8\)"),
        ({"input_size": (3, 0, 8)}, r"input_size is \(3, 0, 8\)"),
        ({"mean": (0.5,)}, r"mean is \(0.5,\); input_size asks for 3"),
        ({"std": (0.5,)}, r"std is \(0.5,\); input_size asks for 3"),
        ({"std": (0.5, 0.0, 0.5)}, "allowed: values above 0"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; allowed: nearest, bilinear, bicubic"),
        ({"crop_pct": 0.0}, r"crop_pct is 0.0; allowed: values in \(0, 1\]"),
        ({"crop_pct": 1.1}, "crop_pct is 1.1"),
        ({"crop_mode": "random"}, "crop_mode is 'random'; allowed: center, squash, border"),
    ],
)
def test_a_wrong_preprocessing_names_the_field_what_it_found_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{**GOOD, **fields})
