"""Where `data.name` finds its image files: a training and a held-out list of images that are not read yet."""

import numpy as np

from distill.data.config import DataConfig
from distill.data.files import FileSplit, find_split, list_split, read_class_map
from distill.data.hub_sets import list_hub
from distill.data.shards import list_shards
from distill.data.torchvision_names import torchvision_set
from distill.data.torchvision_sets import list_torchvision


def list_files(config: DataConfig, training: bool = True) -> list[FileSplit]:
    """Training and held-out images of the config; `docs/data.md` says what lies where.

    Args:
        training: whether any are trained on; where not, folders and tars need no training split: it is then empty.
    """
    kind, _, rest = config.name.partition("/")
    if torchvision_set(config.name) is not None:
        return list_torchvision(config)
    if kind == "hfds":
        return list_hub(rest, config.root, config.train_split, config.eval_split)
    classes = None if config.class_map is None else read_class_map(config.class_map)
    assert config.root is not None  # checked by the config
    if kind == "wds":
        return list_shards(config.root, config.train_split, config.eval_split, classes)
    if not training:
        evaluation = list_split(find_split(config.root, config.eval_split), classes)
        return [evaluation.part(np.empty(0, dtype=np.int64)), evaluation]
    paths = [find_split(config.root, split) for split in (config.train_split, config.eval_split)]
    return [list_split(path, classes) for path in paths]
