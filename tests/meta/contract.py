"""What every meta-learner promises, checked on made-up episodes; and such episodes.

A method's own test adds a slow float64 reference that takes one task at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.layout import Columns, Layout
from metatrain.meta.learner import MetaLearner

#: Two task features, the item's id and two content features, one event feature: 4 + 2 + 8 + 4 + 2 + 1 columns.
LAYOUT = Layout(
    (
        Columns("age", "task", 0, 4),
        Columns("gender", "task", 4, 6),
        Columns("item", "item", 6, 14),
        Columns("genres", "item", 14, 18),
        Columns("year", "item", 18, 20),
        Columns("hour", "event", 20, 21),
    )
)
TOLERANCE = 1e-5


def made_up(
    tasks: int = 5,
    support: int = 6,
    query: int = 4,
    *,
    click: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    least_support: int = 0,
) -> Episodes:
    """Episodes over `LAYOUT` of uneven lengths, the first task with the least support; labels 1 to 5, or 0 and 1.

    A task's columns are the same in all its events, as they are in a dataset.
    """
    generator = torch.Generator().manual_seed(seed)
    of_task = len(LAYOUT.of("task"))
    own = torch.randn(tasks, 1, of_task, generator=generator)

    def examples(events: int, least: int) -> Examples:
        x = torch.randn(tasks, events, LAYOUT.width, generator=generator)
        x[..., :of_task] = own
        lengths = torch.randint(least, events + 1, (tasks,), generator=generator)
        lengths[0], lengths[-1] = least, events
        mask = (torch.arange(events) < lengths[:, None]).double()
        choices = torch.randint(0, 2, (tasks, events), generator=generator)
        labels = choices if click else torch.randint(1, 6, (tasks, events), generator=generator)
        return Examples((x * mask[..., None]).to(dtype), {}, (labels * mask).to(dtype), mask.to(dtype))

    return Episodes(examples(support, least_support), examples(query, 1), {})


def one_task(episodes: Episodes, task: int) -> Episodes:
    """A task alone, without padding (a task without support keeps one event of mask 0)."""

    def cut(examples: Examples) -> Examples:
        events = max(1, int(examples.mask[task].sum()))
        return Examples(
            examples.x[task : task + 1, :events],
            {},
            examples.labels[task : task + 1, :events],
            examples.mask[task : task + 1, :events],
        )

    return Episodes(cut(episodes.support), cut(episodes.query), {})


def padded(episodes: Episodes, by: int = 3) -> Episodes:
    """The same tasks with more padding, which holds anything."""

    def longer(examples: Examples) -> Examples:
        tasks, _, width = examples.x.shape
        x = torch.cat([examples.x, torch.full((tasks, by, width), 7.0, dtype=examples.x.dtype)], 1)
        more = torch.full((tasks, by), 9.0, dtype=examples.x.dtype)
        return Examples(
            x, {}, torch.cat([examples.labels, more], 1), torch.cat([examples.mask, torch.zeros_like(more)], 1)
        )

    return Episodes(longer(episodes.support), longer(episodes.query), {})


def meta_gradient(meta: MetaLearner, total: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter; zero where there is none."""
    names, parameters = zip(*meta.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Each tensor within `tolerance` of its own norm, or 3e-7 of the whole gradient's."""
    assert found.keys() == expected.keys()
    whole = torch.stack([e.norm() for e in expected.values()]).norm()
    assert whole > 0
    for name, e in expected.items():
        distance = (found[name].to(e) - e).norm()
        assert distance <= tolerance * e.norm() + 3e-7 * whole, f"{name}: {float(distance / e.norm().clamp(min=1e-30))}"


def check_contract(
    make: Callable[[], MetaLearner], *, click: bool = False, own_losses: bool = False, ordered: bool = False
) -> None:
    """What `MetaLearner` promises of any method.

    Args:
        make: Gives a float64 meta-learner over `LAYOUT`.
        click: Whether labels are clicks.
        own_losses: Whether the method's meta-loss has terms beside the query loss.
        ordered: Whether the order of support events matters to the method; to all others it must not.
    """
    torch.manual_seed(0)
    meta, episodes = make().double(), made_up(click=click)
    found = meta(episodes)
    gradient = meta_gradient(meta, found.total)
    assert torch.isfinite(found.after).all()
    if not own_losses:
        torch.testing.assert_close(found.total.detach(), found.after.sum())
    # Padding changes nothing, whatever it holds.
    more = meta(padded(episodes))
    torch.testing.assert_close(more.after, found.after)
    torch.testing.assert_close(more.before, found.before)
    torch.testing.assert_close(more.total, found.total)
    assert_close(meta_gradient(meta, more.total), gradient, 1e-9)
    # Tasks don't see one another: each alone gives the same loss, and the gradients add up.
    alone = [meta(one_task(episodes, task)) for task in range(episodes.size)]
    torch.testing.assert_close(torch.cat([a.after for a in alone]), found.after)
    torch.testing.assert_close(torch.cat([a.before for a in alone]), found.before)
    each = [meta_gradient(meta, a.total) for a in alone]
    assert_close(gradient, {name: torch.stack([g[name] for g in each]).sum(0) for name in gradient}, 1e-9)
    # The first task has no support: it is as if unadapted.
    assert not episodes.support.mask[0].any()
    torch.testing.assert_close(found.after[0], found.before[0])
    # Adapting apart from training gives the same.
    fast = meta.adapt_whole(episodes.support, episodes.rows)
    torch.testing.assert_close(meta.task_losses(meta.predictions(fast, episodes.query), episodes.query), found.after)
    part = meta.predict(fast.tasks(1, 3), episodes.query.tasks(1, 3))
    torch.testing.assert_close(part, meta.predict(fast, episodes.query)[1:3])
    # The order of support events says nothing, or does.
    backwards = Examples(*(t.flip(1) if isinstance(t, Tensor) else t for t in vars(episodes.support).values()))
    turned = meta.predict(meta.adapt(backwards, {}), episodes.query) * episodes.query.mask
    straight = meta.predict(fast, episodes.query) * episodes.query.mask
    if ordered:
        assert (turned - straight)[-1].abs().max() > 1e-6
    else:
        torch.testing.assert_close(turned, straight)
    # Adaptation does something, and float32 gives the same up to rounding.
    assert (found.after - found.before)[1:].abs().max() > 1e-6
    single = make().float()
    single.load_state_dict(meta.state_dict())
    narrow = single(made_up(click=click, dtype=torch.float32))
    torch.testing.assert_close(narrow.after.double(), found.after, rtol=1e-4, atol=1e-5)
