"""A made-up log in MovieLens-100K's layout: users and films with tastes and qualities that a model can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from metatrain.data.sources.movielens import GENRES_100K

JOBS = ("artist", "doctor", "engineer", "student", "writer")


def write_movielens_100k(folder: Path, users: int, films: int, events: int, seed: int = 0) -> Path:
    """Writes u.data, u.item and u.user with so many events a user, on average; the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    taste, kind = random.normal(size=(users, 3)), random.normal(size=(films, 3))
    generous, quality = random.normal(size=users) * 0.4, random.normal(size=films) * 0.5
    lines = []
    for user in range(users):
        seen = random.choice(films, size=random.integers(events // 2, events * 3 // 2), replace=False)
        for place, film in enumerate(seen):
            score = 3.5 + generous[user] + quality[film] + 0.6 * taste[user] @ kind[film] + random.normal() * 0.3
            lines.append(f"{user + 1}\t{film + 1}\t{int(np.clip(round(score), 1, 5))}\t{881250000 + 60 * place}")
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    flags = kind @ random.normal(size=(3, len(GENRES_100K))) > 0.8
    genres = ["|".join(str(int(flag)) for flag in row) for row in flags]
    years = [1950 + n % 48 for n in range(films)]
    items = (f"{n + 1}|Film {n + 1} ({y})|01-Jan-{y}||http://film|{genres[n]}" for n, y in enumerate(years))
    (folder / "u.item").write_text("\n".join(items) + "\n", encoding="latin-1")
    people = (f"{n + 1}|{18 + n % 50}|{'MF'[n % 2]}|{JOBS[n % 5]}|{10000 + n}" for n in range(users))
    (folder / "u.user").write_text("\n".join(people) + "\n")
    return folder
