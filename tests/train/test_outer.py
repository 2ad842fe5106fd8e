"""The outer optimizer against torch's own, its rates, early stopping, and what a run's identity holds."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from metatrain.checkpoint.identity import check_identity, identity
from metatrain.config import Config, EarlyStopping, OptimizerConfig
from metatrain.errors import CheckpointError
from metatrain.train.early_stopping import Patience
from metatrain.train.outer import DenseOptimizer, rate_share


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    warmup=st.integers(0, 30),
    total=st.integers(1, 200),
    final=st.floats(0, 1),
)
def test_rates_rise_in_the_warmup_then_fall_to_the_final_share(schedule, warmup, total, final):
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup, final_share=final)
    shares = [rate_share(config, step, total) for step in range(total)]
    assert all(0 <= share <= 1 for share in shares)
    rising, falling = shares[:warmup], shares[warmup:]
    assert rising == sorted(rising)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    if len(falling) > 1 and schedule != "constant":
        assert math.isclose(falling[0], 1.0)
        assert math.isclose(falling[-1], final, abs_tol=1e-9)


def test_updates_equal_torch_adamw_with_clipping_and_decay_of_layers_weights_alone():
    torch.manual_seed(0)
    # In the order of their names, or the norm is another sum.
    shapes = {
        "layers.0.bias": (3,),
        "layers.0.weight": (3, 2),
        "log_strength": (),
        "norm.weight": (3,),
        "rates": (2, 3),
    }
    ours = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    theirs = [nn.Parameter(p.detach().clone()) for p in ours.values()]
    optimizer = DenseOptimizer(ours, OptimizerConfig(clip=0.5, weight_decay=0.1))
    groups = [{"params": theirs[1:2], "weight_decay": 0.1}, {"params": [theirs[0], *theirs[2:]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01)
    for step in range(5):
        for mine, other in zip(ours.values(), theirs, strict=True):
            mine.grad = torch.randn_like(mine) * (step + 1)
            other.grad = mine.grad.clone()
        expected = nn.utils.clip_grad_norm_(theirs, 0.5)
        norm = optimizer.clip()
        optimizer.update(0.01)
        reference.step()
        assert torch.equal(norm, expected)
    assert all(torch.equal(mine, other) for mine, other in zip(ours.values(), theirs, strict=True))


def test_a_loaded_state_goes_on_exactly():
    def run(steps, parameter, optimizer):
        for step in steps:
            parameter.grad = torch.tensor([1.0, -float(step)])
            optimizer.clip()
            optimizer.update(0.1)

    whole = nn.Parameter(torch.zeros(2))
    run(range(6), whole, DenseOptimizer({"p": whole}, OptimizerConfig()))
    first = nn.Parameter(torch.zeros(2))
    before = DenseOptimizer({"p": first}, OptimizerConfig())
    run(range(3), first, before)
    second = nn.Parameter(first.detach().clone())
    after = DenseOptimizer({"p": second}, OptimizerConfig())
    for name, tensor in after.state_dict().items():
        tensor.copy_(before.state_dict()[name])
    run(range(3, 6), second, after)
    assert torch.equal(whole, second)


def test_patience_ends_after_so_many_validations_without_improvement_through_a_restart():
    patience = Patience(EarlyStopping(patience=2, tolerance=0.1))
    assert [patience.judge(loss) for loss in (1.0, 0.95, 0.5)] == [True, False, True]
    assert not patience.judge(0.45)
    patience = Patience(EarlyStopping(patience=2, tolerance=0.1), patience.state())
    assert not patience.exhausted
    patience.judge(0.6)
    assert patience.exhausted


def test_a_changed_model_is_named_and_a_changed_worker_count_is_not():
    base = Config.model_validate({"train": {"workers": 1}})
    wider = Config.model_validate({"train": {"workers": 2, "epochs": 99}})
    other = Config.model_validate({"model": {"hidden": [8]}, "meta": {"steps": 7}})
    check_identity(identity(base, "d"), identity(wider, "d"), "run")
    with pytest.raises(CheckpointError, match="another model") as caught:
        check_identity(identity(base, "d"), identity(other, "d"), "run")
    assert "model.hidden: was [64, 64], is [8]" in str(caught.value)
    assert "meta.steps: was 3, is 7" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        check_identity(identity(base, "d"), identity(base, "e"), "run")
    assert "dataset: was 'd', is 'e'" in str(caught.value)
    cosine = {"schedule": "cosine"}
    three, four = ({"train": {"optimizer": cosine, "epochs": epochs}} for epochs in (3, 4))
    saved, current = (identity(Config.model_validate(raw), "d") for raw in (three, four))
    with pytest.raises(CheckpointError) as caught:
        check_identity(saved, current, "run")
    assert "train.epochs: was 3, is 4" in str(caught.value)
