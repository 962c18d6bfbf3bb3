"""Checkpointed networks train as those that keep everything, to the last bit of float64, in less memory."""

import contextlib
import copy
import weakref

import pytest
import timm
import torch
import torch.distributed as dist
from compiler import skip_without_compiler
from host_reads import HostReads
from torch import nn
from toy_networks import Head, Masks, PreActivation, Residual, Sums, conv_bn, generic, spiking

import models.sync
from benchmarks.measure import saved_bytes
from distill import HybridDistiller
from distill.meters import recorded_rates
from models import (
    ALGORITHMS,
    FEEDBACK_ALGORITHMS,
    NeuronConfig,
    SpikeTrain,
    SpikingNeuron,
    compile_kernels,
    create_snn,
    set_algorithm,
    spiking_twin,
)
from models.checkpointing import CHECKPOINTED, blocks_of
from models.compiling import is_compiling
from models.kept_train import keep, pack
from models.ranks import taking_together
from models.term import Term

T = 3
NARROW = dict(num_classes=5, channels=(4, 4, 8, 8), zero_init_last=False)


def twin(name, algorithm="rate_m", **kwargs):
    ann = generic(timm.create_model(name, **{"num_classes": 5, **kwargs}))
    return spiking_twin(ann, T, algorithm=algorithm, gates="keep", input_size=(3, 32, 32)).train()


def network(name, algorithm="rate_m"):
    return generic(create_snn(name, 5, T, algorithm=algorithm, width=8)).train()


NETWORKS = {
    "ResNet": lambda algorithm: twin("resnet18", algorithm, drop_path_rate=0.3, drop_rate=0.2, **NARROW),
    "depthwise": lambda algorithm: twin("mobilenetv2_035", algorithm, drop_path_rate=0.3),
    "gates": lambda algorithm: twin("test_efficientnet", algorithm),
    "stages of blocks": lambda algorithm: twin("regnetx_002", algorithm),
    "lists of trains": lambda algorithm: twin("densenet121", algorithm, block_config=(2, 2), growth_rate=4),
    "layers in a row": lambda algorithm: network("vgg11_cifar", algorithm),
    "sums of spikes": lambda algorithm: network("sew_resnet18", algorithm),
    "currents": lambda algorithm: network("preact_resnet34", algorithm),
}


def images(size=32):
    return torch.rand(3, 3, size, size, dtype=torch.float64)


def train_once(snn, x, loss=lambda snn, x: snn(x).square().sum()):
    """The loss, the gradients, and the buffers behind both passes."""
    torch.manual_seed(1)
    total = loss(snn, x)
    total.backward()
    gradients = {name: p.grad for name, p in snn.named_parameters()}
    return {"loss": total.detach(), **gradients, **dict(snn.named_buffers())}


def checkpointed(snn):
    copied = copy.deepcopy(snn)
    (copied.student if isinstance(copied, HybridDistiller) else copied).set_grad_checkpointing(True)
    return copied


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("algorithm", ["rate_m", "bptt"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_and_running_statistics_are_those_without(name, algorithm):
    plain = NETWORKS[name](algorithm)
    ours = checkpointed(plain)
    x = images()
    expected = train_once(plain, x)
    assert sum(g.any() for g in expected.values() if g is not None) > 20, "a network that does not learn proves nothing"
    assert_equal(train_once(ours, x), expected)


def test_dsr_is_checkpointed_as_well():
    plain = network("sew_resnet18", "dsr")
    ours, x = checkpointed(plain), images()
    assert_equal(train_once(ours, x), train_once(plain, x))


@pytest.mark.parametrize("toy", [Residual, PreActivation, Sums, Masks])
def test_toy_networks_with_a_learned_leak(toy):
    plain = spiking(generic(toy(NeuronConfig(learnable_leak=True))), T).train()
    if not list(blocks_of(plain)):
        with pytest.raises(ValueError, match=f"found no blocks in Spiking{toy.__name__}"):
            plain.set_grad_checkpointing(True)
        return
    ours, x = checkpointed(plain), images(12)
    assert_equal(train_once(ours, x), train_once(plain, x))


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_passes_train_as_without_checkpointing(caplog):
    # network and images of tests/models/test_firing_passes.py: what is compiled there need not be compiled again
    network = generic(Residual(NeuronConfig(leak=0.5))).to(memory_format=torch.channels_last)
    plain = spiking(network, 3).train()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64).to(memory_format=torch.channels_last)
    ours = checkpointed(plain)
    compile_kernels(True)
    expected, found = train_once(plain, x), train_once(ours, x)
    skip_without_compiler(caplog)
    assert is_compiling()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("algorithm", ["rate_m", "bptt"])
@pytest.mark.parametrize("taps", ["stages", "blocks", ["layer1.0.conv1"]])
def test_hybrids_train_the_same_and_their_taps_fire_once(taps, algorithm):
    teacher = generic(timm.create_model("resnet18", **NARROW))
    student_taps = None
    if isinstance(taps, list):  # no cut of the teacher: somebody who listens inside of a block of the student
        taps, student_taps = ["layer1.0"], {"layer1.0": taps[0]}
    student = spiking_twin(teacher, T, algorithm=algorithm, input_size=(3, 32, 32)).train()
    plain = HybridDistiller(teacher, student, taps, student_taps, images=images())
    ours, x = checkpointed(plain), images()
    fired = []
    for name in ours.student_taps.values():
        ours.student.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))

    def loss(distiller, x):
        output = distiller(x)
        return sum(logits.square().sum() for logits in [output.student_logits, *output.hybrid_logits.values()])

    assert_equal(train_once(ours, x, loss), train_once(plain, x, loss))
    assert sorted(fired) == sorted(ours.student_taps.values())


@pytest.mark.parametrize("algorithm", ["rate_m", "bptt"])
def test_who_listens_inside_of_blocks_hears_each_module_once_and_memory_falls_all_the_same(algorithm):
    """As the firing rates of a training step are recorded, and with losses on what hooks see."""
    plain = NETWORKS["ResNet"](algorithm)
    ours, x = checkpointed(plain), images()
    heard, held = [], []

    def loss(snn, x):
        seen = []

        def hook(module, args, output):
            heard.append(module)
            seen.append(output.rate.square().sum())

        listened = [m for m in snn.modules() if isinstance(m, (SpikingNeuron, nn.Conv2d, nn.BatchNorm2d))]
        handles = [module.register_forward_hook(hook) for module in listened]
        with saved_bytes(snn) as count:
            total = snn(x).square().sum()
        held.append(count())
        assert len(seen) == len(listened)
        for handle in handles[::2]:
            handle.remove()  # the others are there in the backward pass, too
        return total + sum(seen)

    expected = train_once(plain, x, loss)
    heard.clear()
    found = train_once(ours, x, loss)
    assert len(heard) == len(set(heard))
    for name, value in expected.items():  # sums of gradients in another order: rounded as their largest is
        atol = 1e-12 * float(value.abs().max().clamp(min=1))
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=atol, msg=name)


def test_the_recorded_firing_rates_of_a_step_cost_no_memory():
    snn, x = checkpointed(NETWORKS["ResNet"]("rate_m")), images()
    held = []
    for recording in (contextlib.nullcontext(), recorded_rates(snn)):
        torch.manual_seed(1)
        with recording as rates, saved_bytes(snn) as count:
            total = snn(x).sum()
            held.append(count())
            before = {name: rate.clone() for name, rate in (rates or {}).items()}
            total.backward()
    assert held[0] == held[1]
    assert len(before) == 17
    assert_equal(rates, before)


def test_a_hook_that_changes_an_output_inside_of_a_block_is_refused():
    snn = checkpointed(NETWORKS["ResNet"]("rate_m"))
    snn.layer2[0].conv1.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="a forward hook changes the output of a Conv2d, which runs twice"):
        snn(images())


@pytest.mark.parametrize("until", ["layer2", "layer2.0", "layer2.0.conv1"])
def test_a_network_that_is_stopped_at_a_module_trains_the_same(until):
    plain = NETWORKS["ResNet"]("rate_m")
    ours, x = checkpointed(plain), images()

    def loss(snn, x):
        return snn(x, until=until).square().sum()

    assert_equal(train_once(ours, x, loss), train_once(plain, x, loss))


def test_frozen_blocks_and_images_that_differ_from_step_to_step():
    plain = NETWORKS["ResNet"]("rate_m")
    ours = checkpointed(plain)
    frames = torch.rand(T, 3, 3, 32, 32, dtype=torch.float64)
    for snn in (plain, ours):
        snn.layer1.eval()
    assert_equal(train_once(ours, frames), train_once(plain, frames))


def test_a_graph_can_be_gone_back_through_twice():
    snn = checkpointed(NETWORKS["ResNet"]("rate_m"))
    total = snn(images()).square().sum()
    total.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in snn.named_parameters()}
    total.backward()
    for name, p in snn.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["rate_m", "bptt"])
def test_processes_exchange_nothing_more(algorithm, tmp_path, monkeypatch):
    """The statistics of the first run are those of the second, also behind `synchronised_batch_norm`."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    calls = []
    gather, reduce = dist.all_gather, dist.all_reduce
    # as if another process held the same images: moments stay, counts and sums double
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)

    def all_gather(table, own, group):
        calls.append("all_gather")
        for row in table:
            gather([row], own)

    def all_reduce(packed, group):
        calls.append("all_reduce")
        reduce(packed)
        packed *= 2

    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    try:
        plain = NETWORKS["ResNet"](algorithm)
        ours, x = checkpointed(plain), images()

        def loss(snn, x):
            with taking_together(dist.group.WORLD), models.sync._SynchronisedFunctions():
                return snn(x).square().sum()

        expected, of_plain = train_once(plain, x, loss), calls.copy()
        calls.clear()
        assert_equal(train_once(ours, x, loss), expected)
        assert calls == of_plain
        assert len(calls) > 20
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "algorithm", "factor"),
    [
        # a block of ResNet-50 leaves currents, kappas and counts of three layers, 4 + 4 + 1 bytes a neuron and the last
        # of 4 times the width: about (2 * 9 + 4 * 9) / 4 = 13 bytes for each number that it gives, and keeps 1 bit * T
        (lambda a: twin("resnet50", a, **NARROW), "rate_m", 3),
        (lambda a: twin("resnet50", a, **NARROW), "bptt", 5),
        (NETWORKS["layers in a row"], "rate_m", 5),
        (NETWORKS["depthwise"], "rate_m", 2),
        (NETWORKS["sums of spikes"], "bptt", 4),
    ],
)
def test_less_is_held_between_the_passes(make, algorithm, factor):
    snn, x = make(algorithm), images()
    held = []
    for enable in (False, True):
        snn.set_grad_checkpointing(enable)
        with saved_bytes(snn) as count:
            total = snn(x).sum()
        held.append(count())
        total.backward()
    assert held[0] > factor * held[1], held


def test_no_tensor_of_a_block_lives_between_the_passes():
    """What `saved_bytes` cannot see: tensors that something else than the graph holds."""
    snn = checkpointed(spiking(nn.Sequential(conv_bn(3, 6), SpikingNeuron(), *_rows(), Head(6)).double(), T)).train()
    alive = []

    def watch(module, args, output):
        for term in output.terms:
            alive.extend(weakref.ref(tensor) for tensor in (term.stream, term._rate) if tensor is not None)

    inner = [m for row in snn[2:4] for m in row.modules() if isinstance(m, nn.Conv2d)]
    real = type(inner[0]).forward
    for conv in inner:
        conv.forward = lambda x, conv=conv: _watched(real(conv, x), watch)
    total = snn(images(8)).sum()
    assert alive
    assert not any(tensor() is not None for tensor in alive)
    total.backward()


def _rows():
    return [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), SpikingNeuron()) for _ in range(2)]


def _watched(output, watch):
    watch(None, None, output)
    return output


def test_evaluation_and_passes_without_a_graph_run_once():
    snn = checkpointed(NETWORKS["ResNet"]("rate_m"))
    before = snn.bn1.num_batches_tracked.clone()
    with torch.no_grad():
        snn(images())
    assert snn.bn1.num_batches_tracked == before + 1
    assert torch.equal(snn.eval()(images() * 0), snn(images() * 0))
    assert "forward" not in vars(snn.layer1[0])


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a not in (*CHECKPOINTED, *FEEDBACK_ALGORITHMS)])
def test_algorithms_without_use_of_it_are_refused(algorithm):
    snn = create_snn("sew_resnet18", 5, T, algorithm=algorithm, width=8)
    with pytest.raises(ValueError, match=rf"gradient checkpointing goes with one of .*found '{algorithm}'"):
        snn.set_grad_checkpointing(True)
    snn.set_grad_checkpointing(False)
    other = checkpointed(create_snn("sew_resnet18", 5, T, width=8))
    with pytest.raises(ValueError, match=rf"gradient checkpointing goes with one of .*found '{algorithm}'"):
        set_algorithm(other, algorithm)


def test_the_twin_of_a_teacher_that_timm_checkpoints_starts_without():
    teacher = timm.create_model("resnet18", **NARROW)
    teacher.set_grad_checkpointing(True)
    snn = spiking_twin(teacher, T, input_size=(3, 32, 32)).train()
    assert teacher.grad_checkpointing
    assert not snn.grad_checkpointing
    snn(images().float()).sum().backward()


# -- what is kept of a train --------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("steps", "size"), [(1, 1), (4, 1), (8, 1), (9, 2), (17, 3)])
def test_spikes_are_a_bit_each(steps, size, memory_format):
    stream = torch.randint(2, (steps * 2, 3, 4, 5)).float().contiguous(memory_format=memory_format)
    tensors, restore = pack(stream, steps)
    assert sum(t.nbytes for t in tensors) == size * 2 * 3 * 4 * 5
    again = restore(iter(tensors))
    assert torch.equal(again, stream)
    assert again.stride() == stream.stride()


@pytest.mark.parametrize(("largest", "size"), [(3, 1), (255, 1), (256, 4), (0.5, 4), (-1, 4), (float("nan"), 4)])
def test_sums_of_spikes_are_a_byte_each_and_currents_stay(largest, size):
    stream = torch.ones(6, 5)
    stream[4, 2] = largest
    tensors, restore = pack(stream, 3)
    assert sum(t.nbytes for t in tensors) == size * 30
    assert torch.equal(restore(iter(tensors)).nan_to_num(7), stream.nan_to_num(7))


def test_rates_come_back_from_spikes_and_are_kept_where_they_do_not():
    spikes = torch.tensor([1.0, 0, 1, 1, 1, 0]).view(6, 1)  # three steps of two images: 1 1 1 and 0 1 0
    rate = torch.tensor([[1.0], [1 / 3]], requires_grad=True)
    tensors, restored = keep(SpikeTrain([Term(spikes, 3, _rate=rate)], 3, "rate"))
    assert len(tensors) == 1
    assert torch.equal(restored(tensors).rate, rate)
    assert restored(tensors).rate.is_leaf
    assert restored(tensors).rate.requires_grad
    tensors, restored = keep(SpikeTrain([Term(spikes, 3, _rate=rate + 1)], 3, "rate"))
    assert len(tensors) == 2
    assert torch.equal(restored(tensors).rate, rate + 1)


def test_what_neurons_gave_is_not_looked_at_to_see_that_it_is_spikes():
    train = SpikingNeuron()(SpikeTrain.from_stream(torch.randn(T, 2, 4), "rate"))
    with HostReads() as reads:
        tensors, restored = keep(train)
    assert [t.dtype for t in tensors] == [torch.uint8] and torch.equal(restored(tensors).stream, train.stream)
    assert reads.count == 1  # whether the rates are those of the counts
    with HostReads() as reads:
        pack(torch.randint(3, (16, 4)).float(), 8)
    assert reads.count == 1  # the first step tells; the others are asked with one .tolist()


# -- which modules are blocks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("resnet18", NARROW, [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]),
        (
            "regnetx_002",
            {},
            ["stem", "s1.b1", "s2.b1", *[f"s3.b{i}" for i in range(1, 5)], *[f"s4.b{i}" for i in range(1, 8)]],
        ),
        ("mobilenetv2_035", {}, [f"blocks.{i}.{j}" for i, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for j in range(n)]),
    ],
)
def test_blocks_are_those_of_the_network(name, kwargs, expected):
    snn = twin(name, **kwargs)
    names = {module: name for name, module in snn.named_modules()}
    assert [names[block] for block in blocks_of(snn)] == expected
