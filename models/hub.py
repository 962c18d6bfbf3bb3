"""Saved networks on the Hugging Face hub: from there, and to there."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import huggingface_hub
from huggingface_hub import ModelCard, ModelHubMixin

from models.card import CARD, USE_ON_FRAMES, USE_ON_IMAGES, model_card
from models.encoding import takes_event_frames

log = logging.getLogger(__name__)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""The files of a saved network; beside them a model card. Nothing else is fetched: no pickles, no code."""

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

_NOTE = "> Saved with {} time steps; what follows was measured with {}."
_EARLIER_NOTE = re.compile(rf"\s*{_NOTE.format(r'[0-9]+', r'([0-9]+)')}\s*")


class Download(TypedDict, total=False):
    """How a network is fetched from the hub, as huggingface_hub understands it; without effect on folders."""

    revision: str | None
    """A branch, tag or commit; None: the newest of the main branch."""
    cache_dir: str | os.PathLike[str] | None
    """Folder for what is downloaded; None: the hub's usual one."""
    token: str | bool | None
    """For private repositories; None: the one that was logged in with."""
    local_files_only: bool
    """Whether to take what is in the cache and ask nobody."""
    force_download: bool
    """Whether to download anew what is in the cache."""


def local_folder(folder_or_id: str | os.PathLike[str], **download: Unpack[Download]) -> Path:
    """The folder of a saved network, downloaded where there is no such folder and the text could be an id of the hub.

    Args:
        folder_or_id: a folder, or "owner/name" on the hub; a folder of that name comes first. Only a text is an id.

    Raises:
        FileNotFoundError: if there is no such folder and the hub does not give the network; says why. What is no folder
            and no id comes back as it is.
    """
    path = Path(folder_or_id)
    if path.is_dir() or not isinstance(folder_or_id, str) or not _ID.fullmatch(folder_or_id):
        return path
    log.info("there is no folder %s: the network of this name is taken from the hub", folder_or_id)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                folder_or_id,
                allow_patterns=[CONFIG, WEIGHTS, CARD],
                **download,  # type: ignore[arg-type]  # any path serves as cache_dir
            )
        )
    except Exception as error:  # what it raises depends on its version and on the HTTP client below it
        revision = f" at revision {download['revision']!r}" if download.get("revision") else ""
        raise FileNotFoundError(
            f"there is no folder {folder_or_id!r}, and the hub gives no network of this name{revision}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def saved_network(folder_or_id: str | os.PathLike[str], what: str, **download: Unpack[Download]) -> Path:
    """`local_folder`, with the two files that a saved network has.

    Args:
        what: the kind of network, for the message.

    Raises:
        FileNotFoundError: names the folder or id and the missing file.
    """
    folder = local_folder(folder_or_id, **download)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder_or_id} holds no saved {what}: {name} is missing")
    return folder


class OnHub(ModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of spiking networks, as users of the hub know them."""

    card: str | None
    """The model card that the network was loaded with; None: one is made from what is known of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # huggingface_hub's keeps the arguments of __init__ in each network, in copies those that nobody gave: a spiking
        # network is rebuilt from its `spec` alone
        return object.__new__(cls)

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes what `models.save_snn` writes, and a model card where none lies in the folder.

        Not huggingface_hub's own, which removes config.json before it saves: where a network cannot be saved, or a disk
        is full, what lies in the folder stays whole.

        Args:
            save_directory: made where missing; weights and configuration in it are replaced.
            repo_id: for `push_to_hub`; None: the folder's name.
            push_to_hub: whether to upload the network, too.
            model_card_kwargs: for `generate_model_card`.
            push_to_hub_kwargs: for `push_to_hub`. A `config` has no effect: the network knows how it is made.

        Returns:
            The address of the commit; None where nothing is uploaded.

        Raises:
            ValueError: if the network cannot be rebuilt from what is known of it.
        """
        from models.io import save_snn  # which is built on this file

        folder, for_card = Path(save_directory), model_card_kwargs or {}
        save_snn(self, folder)
        if not (folder / CARD).exists():
            self.generate_model_card(**for_card).save(folder / CARD)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> str:
        """huggingface_hub's, which makes the repository first: what cannot be saved is refused before it."""
        from models.io import check_saveable  # which is built on this file

        check_saveable(self)
        return super().push_to_hub(repo_id, **kwargs)

    def generate_model_card(self: Any, **kwargs: Any) -> ModelCard:
        """The card that the network came with, or one that says what can be known without a run."""
        if self.card:
            return kept_card(self.card, self.timesteps, self.spec.get("timesteps", self.timesteps))
        return ModelCard(plain_card(self, **kwargs), ignore_metadata_errors=True)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's takes arguments of __init__, too
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **download: Unpack[Download]
    ) -> Self:
        """`models.load_snn` under the name that users of the hub expect.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the hub.
            download: revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: names the folder or id.
            ValueError: if the configuration is unreadable or does not fit the weights, or the network is of another
                class than the one that was asked.
            TypeError: for other arguments: config.json alone says how the network is made.
        """
        from models.io import load_snn  # which is built on this file

        if unknown := sorted(download.keys() - Download.__annotations__.keys()):
            raise TypeError(f"from_pretrained takes {sorted(Download.__annotations__)}, found {unknown}")
        snn = load_snn(pretrained_model_name_or_path, **download)
        if not isinstance(snn, cls):
            raise ValueError(f"{pretrained_model_name_or_path} holds a {type(snn).__name__}, not a {cls.__name__}")
        return snn


def kept_card(text: str, timesteps: int, loaded_with: int) -> ModelCard:
    """The card that a network came with, which says so where its figures are of another T than it is saved with.

    Args:
        text: the card.
        timesteps: T that the network is saved with.
        loaded_with: T that it was loaded with. The figures are of that one, unless the card names an earlier one.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    earlier = _EARLIER_NOTE.match(card.text)
    measured_with = int(earlier[1]) if earlier else loaded_with
    below = card.text[earlier.end() :] if earlier else card.text
    if measured_with != timesteps:
        card.text = f"\n{_NOTE.format(timesteps, measured_with)}\n\n{below}"
    elif earlier:
        card.text = below
    return card


def plain_card(snn: Any) -> str:
    """A model card without figures: nothing is known of how the network was trained but the gradient it is set to."""
    spec = snn.spec
    twin = f"Spiking twin of {spec['ann']['name']}" if spec.get("ann") else f"Spiking network {spec.get('name', '')}"
    parameters = sum(p.numel() for p in snn.parameters())
    facts = f"{snn.timesteps} time steps, {parameters:,} parameters, images of {snn.in_chans} channel(s)."
    made = f"With SpikeSwap; the gradient in training is `{snn.algorithm}`."
    return model_card(
        twin.strip(), facts, made, use=USE_ON_FRAMES if takes_event_frames(snn.in_chans) else USE_ON_IMAGES
    )
