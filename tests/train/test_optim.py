"""Our row-wise AdamW, clipping and schedules against torch's and transformers' on the same numbers."""

import math

import pytest
import torch

import packs
from train.config import RunConfig
from train.lora.parameters import PackedAdapters
from train.lora.targets import adapted_modules
from train.trainer.optim import PackedAdamW, adamw, row_norms

SHAPES = {"layers.0.q_proj": (6, 5), "layers.0.v_proj": (3, 5)}
CONFIGS = [
    packs.run_config({"r": 2}, {"weight_decay": 0.1, "max_grad_norm": 0.5}),
    packs.run_config({"r": 3, "loraplus_lr_ratio": 4.0}, {"adam_beta1": 0.8, "adam_beta2": 0.9, "max_grad_norm": 0.0}),
]


def adapters_of(configs: list[RunConfig]) -> PackedAdapters:
    targets = [adapted_modules(c.lora, list(SHAPES)) for c in configs]
    return PackedAdapters(targets, SHAPES, [0.0] * len(configs), torch.float64, packs.CPU)


def test_each_row_moves_as_torch_moves_it_alone() -> None:
    adapters = adapters_of(CONFIGS)
    torch.manual_seed(0)
    for row in range(2):
        for pair in adapters.tensors(row).values():
            for tensor in pair:
                tensor.normal_()
    twins = [
        {n: tuple(t.clone().requires_grad_() for t in pair) for n, pair in adapters.tensors(row).items()}
        for row in range(2)
    ]
    ours = PackedAdamW(adapters, [(c.train, c.lora) for c in CONFIGS], scale_losses=False)
    theirs = []
    for config, twin in zip(CONFIGS, twins, strict=True):
        t, ratio = config.train, config.lora.loraplus_lr_ratio or 1.0
        groups = [
            {"params": [pair[part] for pair in twin.values()], "lr": t.learning_rate * factor}
            for part, factor in ((0, 1.0), (1, ratio))
        ]
        theirs.append(
            torch.optim.AdamW(
                groups, betas=(t.adam_beta1, t.adam_beta2), eps=t.adam_epsilon, weight_decay=t.weight_decay
            )
        )
    for _ in range(5):
        for row, twin in enumerate(twins):
            for name, pair in adapters.tensors(row, adapters.gradient).items():
                for part, gradient in enumerate(pair):
                    gradient.normal_()
                    twin[name][part].grad = gradient.clone()
        ours.step([c.train.learning_rate for c in CONFIGS], torch.ones(2))
        for config, twin, optimizer in zip(CONFIGS, twins, theirs, strict=True):
            if config.train.max_grad_norm:
                torch.nn.utils.clip_grad_norm_([t for pair in twin.values() for t in pair], config.train.max_grad_norm)
            optimizer.step()
    for row, twin in enumerate(twins):
        for name, pair in adapters.tensors(row).items():
            for mine, other in zip(pair, twin[name], strict=True):
                torch.testing.assert_close(mine, other.detach(), rtol=1e-12, atol=1e-14)


def test_the_worked_example_of_a_step() -> None:
    """The numbers in the docstring of `adamw`."""

    def per_run(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[:, None]

    theta = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    assert row_norms(gradient).tolist() == [5.0, 0.5]
    applies, both = torch.tensor([[True], [True]]), (per_run(0.9, 0.9), per_run(0.999, 0.999))
    corrections = 1 - both[0], (1 - both[1]).sqrt()
    adamw(
        theta,
        m,
        v,
        gradient,
        applies,
        per_run(0.1, 0.1),
        per_run(0.01, 0.0),
        per_run(0.2, 1.0),
        *both,
        *corrections,
        per_run(1e-8, 1e-8),
    )
    torch.testing.assert_close(m, torch.tensor([[0.06, 0.08], [0.03, 0.04]], dtype=torch.float64))
    torch.testing.assert_close(v, torch.tensor([[0.00036, 0.00064], [0.00009, 0.00016]], dtype=torch.float64))
    torch.testing.assert_close(theta, torch.tensor([[0.89, 1.88], [0.9, 1.9]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_padding_stays_zero() -> None:
    adapters = adapters_of(CONFIGS)
    optimizer = PackedAdamW(adapters, [(c.train, c.lora) for c in CONFIGS], scale_losses=False)
    for row in range(2):
        for pair in adapters.tensors(row, adapters.gradient).values():
            for gradient in pair:
                gradient.fill_(1.0)
    optimizer.step([0.1, 0.1], torch.ones(2))
    real = sum(t.numel() for row in range(2) for pair in adapters.tensors(row).values() for t in pair)
    assert int((adapters.theta != 0).sum()) == real < adapters.theta.numel()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_bit_for_bit_and_alone(bad: float) -> None:
    adapters = adapters_of(CONFIGS)
    optimizer = PackedAdamW(adapters, [(c.train, c.lora) for c in CONFIGS], scale_losses=False)
    adapters.theta.normal_()
    optimizer.exp_avg.normal_()
    before = [matrix.clone() for matrix in (adapters.theta, optimizer.exp_avg, optimizer.exp_avg_sq)]
    adapters.gradient.normal_()
    adapters.gradient[0, 1] = bad
    outcome = optimizer.step([0.1, 0.1], torch.ones(2))
    after = (adapters.theta, optimizer.exp_avg, optimizer.exp_avg_sq)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))
    assert outcome.alive.tolist() == [False, True]
    assert not adapters.gradient.any()


def test_loss_scale_halves_for_the_overflowing_run_alone_and_grows_back() -> None:
    adapters = adapters_of(CONFIGS)
    optimizer = PackedAdamW(adapters, [(c.train, c.lora) for c in CONFIGS], scale_losses=True)
    adapters.gradient[0, 0] = math.inf
    outcome = optimizer.step([0.1, 0.1], torch.ones(2))
    assert outcome.alive.tolist() == [True, True]
    assert optimizer.loss_scale.tolist() == [2.0**15, 2.0**16]
    for _ in range(2000):
        optimizer.step([0.0, 0.0], torch.ones(2))
    assert optimizer.loss_scale.tolist() == [2.0**16, 2.0**17]


@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
def test_a_runs_norm_is_the_same_bits_in_any_pack(device: torch.device) -> None:
    """In a pack a run's numbers lie elsewhere, with other zeros between them."""
    shapes = {f"layers.{i}.{name}": (61, 37) for i in range(4) for name in ("q_proj", "v_proj", "o_proj")}
    mine = packs.run_config({"r": 4, "target_modules": ["q_proj", "v_proj"]})
    others = [packs.run_config({"r": 16}), packs.run_config({"r": 5, "target_modules": "all-linear"})]
    for seed in range(20):
        norms = []
        for configs in ([mine], [mine, *others]):
            targets = [adapted_modules(c.lora, list(shapes)) for c in configs]
            adapters = PackedAdapters(targets, shapes, [0.0] * len(configs), torch.float32, device)
            random = torch.Generator().manual_seed(seed)
            for pair in adapters.tensors(0, adapters.gradient).values():
                for part in pair:
                    part.copy_(torch.randn(part.shape, generator=random))
            optimizer = PackedAdamW(adapters, [(c.train, c.lora) for c in configs], scale_losses=False)
            norms.append(optimizer.step([0.1] * len(configs), torch.ones(len(configs), device=device)).grad_norm[0])
        assert torch.equal(*norms)
