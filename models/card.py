"""The text of a model card: README.md beside a saved network, as the Hugging Face hub shows it."""

from __future__ import annotations

CARD = "README.md"
"""Its name in a folder or on the hub."""

CITATIONS = """@inproceedings{yang2025efficient,
  title     = {Efficient {ANN}-Guided Distillation: Aligning Rate-based Features of Spiking Neural Networks through
               Hybrid Block-wise Replacement},
  author    = {Yang, Shu and Yu, Chengting and Liu, Lei and Ma, Hanzhi and Wang, Aili and Li, Erping},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2025},
  note      = {arXiv:2503.16572}
}

@inproceedings{yu2024advancing,
  title     = {Advancing Training Efficiency of Deep Spiking Neural Networks through Rate-based Backpropagation},
  author    = {Yu, Chengting and Liu, Lei and Wang, Gaoang and Li, Erping and Wang, Aili},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2024},
  note      = {arXiv:2410.11488}
}"""
"""BibTeX of the papers that the package rests on."""

_LOAD = """import models  # of the package spikeswap

snn = models.load_snn("path/of/this/folder")  # or the id on the hub, "owner/name"
"""
USE_ON_IMAGES = f"""{_LOAD}snn.predict("image.png")  # names and probabilities of the likeliest classes
logits = snn(images)  # (B, C, H, W), normalised as config.json says under "extra"
for logits in snn.steps(images):  # after each time step, the mean so far: stop when it is clear enough
    ...
"""
USE_ON_FRAMES = f"""{_LOAD}logits = snn(frames)  # event frames (T, B, C, H, W), made as config.json says under "extra"
"""


def model_card(title: str, facts: str, made: str, tags: tuple[str, ...] = (), use: str = USE_ON_IMAGES) -> str:
    """README.md of a saved network.

    Args:
        title: what it is.
        facts: what is known of it, accuracies among them; Markdown.
        made: how it came about: the training recipe; Markdown.
        tags: further ones for the hub.
        use: Python code that loads and runs it.
    """
    return f"""---
library_name: spikeswap
license: apache-2.0
pipeline_tag: image-classification
tags: [{", ".join(("spiking-neural-network", "image-classification", *tags))}]
---
# {title}

{facts.strip()}

## Use

```python
{use.strip()}
```

## How it was made

{made.strip()}

## Licence

Apache-2.0, as the package. What the weights were learned from (a pretrained teacher, the images) may have terms of its
own.

## Citation

```bibtex
{CITATIONS}
```
"""
