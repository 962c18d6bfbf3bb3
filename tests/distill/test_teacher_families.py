"""Every family of timm as a teacher: its taps, its own features sent through them, and hybrids that learn."""

import re
from pathlib import Path

import pytest
import torch
from timm_families import QUICK, REFUSED, TEACHERS
from torch import nn

from distill import HybridDistiller
from distill.taps import append_rows, check_taps, hooks, rounding, tap_names
from models import create_snn

DOC = Path(__file__).parents[2] / "docs" / "teachers.md"
QUICK_REFUSED = ["Hiera", "PiT"]


def families(table, quick):
    return [pytest.param(name, id=name, marks=() if name in quick else pytest.mark.slow) for name in table]


def told(layout):
    return layout.kind + (f"+{layout.prefix_tokens}" if layout.prefix_tokens else "")


def kept_features(teacher, taps, images):
    """The teacher's logits, and its features in its own form, by name."""
    features = {}

    def keep(name):
        return lambda module, args, output: features.update({name: output.clone()})

    with torch.no_grad(), hooks([(teacher.get_submodule(tap.name), keep(tap.name)) for tap in taps]):
        logits = teacher(images)
    return logits, features


def student_of():
    return create_snn("resnet18_cifar", 7, timesteps=1, width=8)


class Own(nn.Module):
    """In place of an adapter: the teacher's own feature as a map, whatever the student says."""

    def __init__(self, feature):
        super().__init__()
        self.feature = feature

    def forward(self, rate, size):
        assert tuple(size) == tuple(self.feature.shape[2:])
        return self.feature


@pytest.mark.parametrize("family", families(TEACHERS, QUICK))
def test_a_family_serves_as_a_teacher(family):
    entry = TEACHERS[family]
    teacher, images = entry.build(), entry.images()
    size = tuple(images.shape[2:])
    names = tap_names(teacher, "stages", images)
    assert names == entry.taps.split()
    taps = check_taps(teacher, names, images)
    assert [tap.name for tap in taps] == names and {told(tap.layout) for tap in taps} == {entry.layout}

    own, features = kept_features(teacher, taps, images)
    assert own.shape == (2, 7) and (own[0] - own[1]).abs().max() > 100 * torch.finfo(own.dtype).eps * own.abs().max()
    maps = {tap.name: tap.layout.to_map(features[tap.name], size) for tap in taps}
    for tap in taps:
        assert tap.layout.size(features[tap.name], size) == maps[tap.name].shape[2:]
        assert tap.shape == maps[tap.name].shape[1:] and len({*maps[tap.name].shape[2:]}) == 1  # of square images
        prefix = tap.layout.prefix(features[tap.name])
        # rows in another order, so that what passes through is what was injected, not the images themselves
        rows = tap.layout.from_map(maps[tap.name].flip(0), None if prefix is None else prefix.flip(0))
        with torch.no_grad(), hooks([(teacher.get_submodule(tap.name), append_rows(rows))]):
            logits = teacher(images)
        torch.testing.assert_close(logits[2:], own.flip(0), rtol=0, atol=rounding(own))
        torch.testing.assert_close(logits[:2], own, rtol=0, atol=rounding(own))

    distiller = HybridDistiller(teacher, student_of(), images=images)
    out = distiller(images)
    assert list(out.hybrid_logits) == names
    assert all(logits.shape == (2, 7) and logits.isfinite().all() for logits in out.hybrid_logits.values())
    # of one hybrid at a time: the head's scale differs between families, a sum would hide what does not arrive
    for (name, logits), adapter in zip(out.hybrid_logits.items(), distiller.adapters, strict=True):
        weight = torch.randn_like(logits)
        gradients = torch.autograd.grad((logits * weight).sum(), list(adapter.parameters()), retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients), name
        assert gradients[0].abs().max() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())

    distiller.adapters = nn.ModuleList(Own(maps[name]) for name in names)
    alone = [distiller(images, active=[name]) for name in names]  # the blocks between taps then see the blank alone
    for out in (distiller(images), *alone):
        for logits in out.hybrid_logits.values():
            torch.testing.assert_close(logits, own, rtol=0, atol=rounding(own))


@pytest.mark.parametrize("family", families(REFUSED, QUICK_REFUSED))
def test_a_family_is_refused_by_name_with_the_reason(family):
    entry = REFUSED[family]
    teacher, images = entry.build(), entry.images()
    with pytest.raises(ValueError, match=entry.reason):
        HybridDistiller(teacher, student_of(), images=images)
    if by_hand := entry.by_hand.split():
        out = HybridDistiller(teacher, student_of(), taps=by_hand, images=images)(images)
        assert list(out.hybrid_logits) == by_hand
        assert all(logits.shape == (2, 7) and logits.isfinite().all() for logits in out.hybrid_logits.values())


def test_the_families_are_many():
    assert len(TEACHERS) >= 40 and len({entry.network for entry in TEACHERS.values()}) == len(TEACHERS)
    assert not TEACHERS.keys() & REFUSED.keys() and TEACHERS.keys() >= set(QUICK)


def rows_of(heading):
    """Cells of the table under a heading of the page, without its first two lines."""
    section = DOC.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code(cell):
    return re.findall("`([^`]+)`", cell)


def test_the_page_lists_the_families_that_serve():
    found = [(family, code(network), layout, code(taps)) for family, network, layout, taps in rows_of("What serves")]
    assert found == [(name, [e.network], e.layout, e.taps.split()) for name, e in TEACHERS.items()]


def test_the_page_lists_the_families_that_are_refused():
    found = [(family, code(network), why, code(taps)) for family, network, why, taps in rows_of("What is refused")]
    assert found == [(name, [e.network], e.words, e.by_hand.split()) for name, e in REFUSED.items()]
