"""What a saved network says of its images."""

import json

from models.preprocessing import Preprocessing, preprocessing_of

WRITTEN = dict(
    input_size=(3, 8, 9), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), interpolation="bicubic", crop_pct=0.5,
    crop_mode="squash",
)  # fmt: skip


def test_all_of_it_comes_back_from_json():
    pre = Preprocessing(**WRITTEN)
    assert preprocessing_of({"extra": json.loads(json.dumps(pre.entries()))}) == pre
    assert pre.entries().keys() == WRITTEN.keys()


def test_it_is_one_line_of_what_a_configuration_says():
    assert str(Preprocessing(**WRITTEN)) == (
        "3x8x9, mean [0.1, 0.2, 0.3], std [1.0, 2.0, 3.0], interpolation bicubic, crop_pct 0.5, crop_mode squash"
    )


def test_networks_that_were_saved_before_crop_mode_are_cropped_in_the_middle():
    extra = Preprocessing(**WRITTEN).entries()
    del extra["crop_mode"]
    assert preprocessing_of({"extra": extra}) == Preprocessing(**WRITTEN | {"crop_mode": "center"})
