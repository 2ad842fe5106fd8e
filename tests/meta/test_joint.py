"""Joint training against a loop over tasks, and its fine-tuning against gradient steps taken one task at a time."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, made_up, meta_gradient, one_task, padded

from metatrain.meta.episode import Episodes
from metatrain.meta.joint import RATES_TRIED, STEPS_TRIED, Joint
from metatrain.model.learners.mlp import MLP


def joint(**settings) -> Joint:
    torch.manual_seed(1)
    return Joint(MLP(LAYOUT.width, (6,), "tanh", offset=3.0), **settings).double()


def events_of(alone: Episodes, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One task's inputs and labels, without padding."""
    examples = getattr(alone, name)
    there = examples.mask[0] > 0
    return examples.x[0][there], examples.labels[0][there]


@pytest.mark.parametrize("loss", ["squared", "huber", "absolute"])
def test_the_loss_is_the_mean_over_all_of_a_tasks_events(loss: str):
    meta, episodes = joint(loss=loss), made_up()
    each, queries = [], []
    for task in range(episodes.size):
        alone = one_task(episodes, task)
        parts = [events_of(alone, name) for name in ("support", "query")]
        x, y = (torch.cat(columns) for columns in zip(*parts, strict=True))
        each.append(meta.event_loss(meta.learner(x), y).mean())
        queries.append(meta.event_loss(meta.learner(parts[1][0]), parts[1][1]).mean().detach())
    found = meta(episodes)
    torch.testing.assert_close(found.total, torch.stack(each).sum())
    torch.testing.assert_close(found.after, torch.stack(queries))
    torch.testing.assert_close(found.before, found.after)
    gradient = meta_gradient(meta, found.total)
    assert_close(gradient, meta_gradient(meta, torch.stack(each).sum()))
    more = meta(padded(episodes))
    torch.testing.assert_close(more.after, found.after)
    assert_close(meta_gradient(meta, more.total), gradient, 1e-9)


@pytest.mark.parametrize("engine", ["vmap", "low_rank"])
def test_fine_tuning_is_gradient_descent_on_each_tasks_support(engine: str):
    meta, episodes = (
        joint(engine=engine, loss="huber", inner_loss="squared", adapt=("head.*", "layers.0.bias")),
        made_up(),
    )
    meta.choose({"steps": 7, "rate": 0.05})
    found = meta.predict(meta.adapt(episodes.support, {}), episodes.query).detach()
    plain = meta.predict(meta.unadapted(episodes.support, {}), episodes.query).detach()
    torch.testing.assert_close(plain, meta.learner(episodes.query.x).detach())
    for task in range(episodes.size):
        alone = one_task(episodes, task)
        (x, y), (query, _) = events_of(alone, "support"), events_of(alone, "query")
        tuned = joint().learner
        adapted = [p for n, p in tuned.named_parameters() if n.startswith("head.") or n == "layers.0.bias"]
        for _ in range(7 if len(x) else 0):
            gradients = torch.autograd.grad((tuned(x) - y).square().mean(), adapted)
            with torch.no_grad():
                for parameter, gradient in zip(adapted, gradients, strict=True):
                    parameter -= 0.05 * gradient
        torch.testing.assert_close(found[task, : len(query)], tuned(query).detach())
    assert (found - plain)[1:].abs().max() > 0.01
    torch.testing.assert_close(found[0], plain[0])  # no support


def test_until_one_is_chosen_the_recipes_settings_hold_and_every_candidate_can_be_chosen():
    meta, episodes = joint(steps=2, rate=0.1), made_up()
    before = meta.predict(meta.adapt(episodes.support, {}), episodes.query)
    other = joint()
    other.choose({"steps": 2, "rate": 0.1})
    torch.testing.assert_close(other.predict(other.adapt(episodes.support, {}), episodes.query), before)
    assert len(meta.candidates()) == len(STEPS_TRIED) * len(RATES_TRIED)
    for settings in meta.candidates():
        meta.choose(settings)
        assert meta.rates.shape == (settings["steps"], len(meta.adapted))
    assert not any("rates" in name for name in meta.state_dict())  # a checkpoint fits whatever is chosen


def test_every_parameter_has_a_gradient():
    meta = joint(adapt=("head.*",))
    meta(made_up()).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in meta.parameters())


def test_refusals():
    with pytest.raises(ValueError, match="matches no parameter"):
        joint(adapt=("nothing",))
    with pytest.raises(ValueError, match="unknown loss"):
        joint(loss="cubic")
