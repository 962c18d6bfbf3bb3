"""Training of an analogue teacher: a script's job of its own, or the first part of a distillation run."""

from __future__ import annotations

import json
import logging

from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from distill.backward import once
from distill.batch_size import batch_that_fits
from distill.checkpoints import Checkpoints
from distill.config import TeacherConfig, TeacherTrainingConfig
from distill.data import Preprocessing, Splits, eval_loader, load_data, prepare_loader, skipped_images, train_loader
from distill.evaluation import top1
from distill.loop import fit
from distill.losses import cross_entropy
from distill.mixing import Mixing
from distill.preparation import unwrap
from distill.report import versions, warn_of_skipped
from distill.results import image_extra
from distill.saved_state import recall_skipped
from distill.session import Session
from distill.students import probe_images
from distill.teachers import build_teacher, teacher_preprocessing
from distill.train_config import TrainConfig
from models.io import CONFIG, WEIGHTS, replace_text, save_weights

log = logging.getLogger(__name__)


def train_teacher(
    session: Session,
    data: Splits,
    loader: DataLoader,
    teacher_config: TeacherConfig,
    preprocessing: Preprocessing,
    config: TrainConfig,
    seed: int,
    workers: int | None,
    resume: bool,
) -> nn.Module:
    """Trains a teacher, or takes the one that an interrupted run has finished; keeps it in `teacher/` of the run.

    Args:
        loader: of the evaluation images, prepared.
        preprocessing: how the images are made, which is kept with the weights, as the names of the classes are.

    Returns:
        the network on the device, in evaluation mode.
    """
    accelerator, path = session.accelerator, session.folder.path / "teacher"
    smoothing = config.label_smoothing
    set_seed(seed)
    checkpoints = Checkpoints(session.folder.checkpoints / "teacher") if resume else None
    if checkpoints is not None and (path / WEIGHTS).exists():
        if (last := checkpoints.newest(say=False)) is not None:
            recall_skipped(last.path, data.train)
        return build_teacher(teacher_config, len(data.classes), weights=path).to(accelerator.device).eval()
    network = build_teacher(teacher_config, len(data.classes)).to(accelerator.device).train()
    if config.grad_checkpointing:
        checkpoint_blocks(network)
    backward = once(lambda logits, labels: {"total": cross_entropy(logits, labels, smoothing)})
    images = probe_images(data, accelerator.device)
    config = batch_that_fits(accelerator, network, backward, images, config, checkpoints)
    result = fit(
        stage="teacher",
        accelerator=accelerator,
        model=network,
        backward=backward,
        loader=train_loader(data.train, config.batch_size, seed=seed, workers=workers),
        evaluate=lambda model: top1(accelerator, loader, lambda images: {"teacher_top1": model(images)}),
        config=config,
        folder=session.folder,
        resume=resume,
        mixing=Mixing(config, len(data.classes), smoothing, seed),
        score="teacher_top1",
        same_kernels=True,
    )
    network = unwrap(accelerator, result.model)
    if config.grad_checkpointing:
        network.set_grad_checkpointing(False)  # type: ignore[operator]  # its blocks would run around the hooks at their taps
    if accelerator.is_main_process:
        path.mkdir(exist_ok=True)
        spec = {**network.ann_spec, "extra": image_extra(preprocessing, data)}  # type: ignore[dict-item]
        replace_text(path / CONFIG, json.dumps(spec, indent=2) + "\n")
        save_weights(network, path / WEIGHTS)  # the last file: where it is, the teacher is whole
        log.info("the teacher, trained in %.0f s, is kept in %s", result.seconds, path)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return network.eval()


def checkpoint_blocks(network: nn.Module) -> None:
    """timm's own gradient checkpointing.

    Raises:
        ValueError: if this network has none.
    """
    try:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        name = type(network).__name__
        raise ValueError(f"grad_checkpointing must be false for a {name}, for which timm has none") from error


def run(config: TeacherTrainingConfig, session: Session, resume: bool) -> dict:
    """The job of scripts/train_teacher.py; returns the summary that it writes."""
    accelerator = session.accelerator
    preprocessing = teacher_preprocessing(config.teacher)
    log.info("images: %s", preprocessing)
    data = load_data(config.data, preprocessing, config.run.seed)
    loader = prepare_loader(accelerator, eval_loader(data.eval, config.train.batch_size, workers=config.data.workers))
    seed, workers = config.run.seed, config.data.workers
    teacher = train_teacher(session, data, loader, config.teacher, preprocessing, config.train, seed, workers, resume)
    loader = prepare_loader(accelerator, eval_loader(data.eval, config.train.batch_size, workers=config.data.workers))
    accuracy = top1(accelerator, loader, lambda images: {"teacher_top1": teacher(images)})
    skipped = list(skipped_images(accelerator, data.train, data.eval))
    summary = {**accuracy, "classes": list(data.classes), "skipped_images": skipped, "versions": versions()}
    if accelerator.is_main_process:
        session.folder.write_summary(summary)
        warn_of_skipped(skipped)
        log.info("teacher top-1: %.2f %%; weights in %s", summary["teacher_top1"], session.folder.path / "teacher")
    accelerator.end_training()
    return summary
