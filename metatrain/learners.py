"""What the package's meta-learners and base learners are called: known without importing one of them, or torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

#: Name → import path. One file each.
META_LEARNERS = {
    "anil": "metatrain.meta.anil:ANIL",
    "boil": "metatrain.meta.boil:BOIL",
    "fomaml": "metatrain.meta.fomaml:FOMAML",
    "hypernetwork": "metatrain.meta.hypernetwork:Hypernetwork",
    "imaml": "metatrain.meta.imaml:IMAML",
    "joint": "metatrain.meta.joint:Joint",
    "kernel": "metatrain.meta.kernel:Kernel",
    "logistic": "metatrain.meta.logistic:Logistic",
    "maml": "metatrain.meta.maml:MAML",
    "mamo": "metatrain.meta.mamo:MAMO",
    "matching": "metatrain.meta.matching:Matching",
    "meta_sgd": "metatrain.meta.meta_sgd:MetaSGD",
    "metaembedding": "metatrain.meta.metaembedding:MetaEmbedding",
    "mwuf": "metatrain.meta.mwuf:MWUF",
    "prototypical": "metatrain.meta.prototypical:Prototypical",
    "reptile": "metatrain.meta.reptile:Reptile",
    "ridge": "metatrain.meta.ridge:Ridge",
    "sequence": "metatrain.meta.sequence:SequenceAttention",
    "tanp": "metatrain.meta.tanp:TaNP",
}
BASE_LEARNERS = {
    "content": "metatrain.model.learners.content:ContentBased",
    "cross": "metatrain.model.learners.cross:DeepCross",
    "deepfm": "metatrain.model.learners.deepfm:DeepFM",
    "factorisation": "metatrain.model.learners.factorisation:Factorisation",
    "hybrid": "metatrain.model.learners.hybrid:Hybrid",
    "mlp": "metatrain.model.learners.mlp:MLP",
}


def remedy_for(name: str, known: Mapping[str, str]) -> str | None:
    """What to do about a name that is none of `known` and no import path; None: it is one of them."""
    if name in known or ":" in name:
        return None
    near = difflib.get_close_matches(name, known, n=1)
    return (
        f"Did you mean {near[0]!r}? " if near else f"Known: {', '.join(sorted(known))}. "
    ) + "One of your own is named by its import path: `package.module:Class`, or `path/to/file.py:Class`."
