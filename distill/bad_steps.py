"""Which images a step had whose loss or gradient was no number, of all processes: in the log and in a file."""

from __future__ import annotations

from accelerate import Accelerator
from torch.utils.data import DataLoader

from distill.data import ImageSet
from distill.data.loaders import sample_indices
from distill.processes import Agreement
from distill.runs import RunFolder

SHOWN_IMAGES = 64
"""Of a bad step, in the log; its file has them all."""


class BadSteps:
    """Of one training.

    Args:
        stage: names the training: "teacher", "student", ...
        loader: of the training, not prepared.
        accumulate: batches of a step.
    """

    def __init__(
        self,
        stage: str,
        accelerator: Accelerator,
        agreement: Agreement,
        folder: RunFolder,
        loader: DataLoader,
        accumulate: int,
    ) -> None:
        self._stage, self._accelerator, self._agreement, self._folder = stage, accelerator, agreement, folder
        self._loader, self._accumulate = loader, accumulate

    def write(self, parts: str, step: int, epoch: int, past: int, batches: int) -> str:
        """Of the step behind us; every process calls it. Returns which images it had, for people.

        Args:
            parts: of its loss on this process.
            step: its number, from 1.
            epoch: that runs, from 1.
            past: epochs on the same data before it, those of earlier trainings included.
            batches: done in it, on each process.
        """
        processes = self._agreement.gather({"loss": parts, **self._samples(past, batches)})
        if self._accelerator.is_main_process:
            values = {"stage": self._stage, "epoch": epoch, "step": step, "processes": processes}
            self._folder.write_bad_step(self._stage, step, values)
        shown = [number for process in processes for number in process["images"]]
        return (
            f"images {shown[:SHOWN_IMAGES]}{' ...' if len(shown) > SHOWN_IMAGES else ''} "
            f"({self._folder.bad_step(self._stage, step)} has all {len(shown)}, and their names where they have any)"
        )

    def _samples(self, past: int, batches: int) -> dict[str, list]:
        """This process's images: their places in the training set, and names where it has any."""
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        of_step = range(batches - self._accumulate, batches)
        images = [n for batch in of_step for n in sample_indices(self._loader, past, batch, rank, processes)]
        dataset = self._loader.dataset
        return {"images": images, "names": dataset.names_of(images) if isinstance(dataset, ImageSet) else []}
