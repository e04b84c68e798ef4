"""What the README of a converted checkpoint says about its conversion."""

import json

from hf_sparse.conversion.report import inputs_in_words
from hf_sparse.conversion.source import Checkpoint
from hf_sparse.conversion.target import Target
from hf_sparse.integration.card import Card


def conversion_card(
    checkpoint: Checkpoint,
    target: Target,
    *,
    density: float,
    is_calibrated: bool = False,
    loads_by_code: bool = False,
) -> Card:
    """Return what a README is to say.

    Args:
        checkpoint: the source.
        target: what it became.
        density: pairs read, over all pairs, at the longest input.
        is_calibrated: whether its centroids were moved on a text.
        loads_by_code: whether it brings the code that registers its type.
    """
    # a name that may be published: the Hub's id, or the last part of a local folder
    name = checkpoint.name if checkpoint.is_from_hub else checkpoint.root.name
    after = inputs_in_words(target.length, target.image_size)
    before = inputs_in_words(target.length_before, target.image_size_before)
    if target.image_size is None:
        after, before = f"up to {after}", before.removesuffix(" tokens")
    origin = checkpoint.origin
    source = f"the dense `{target.architectures[0]}`" if origin is None else f"the `{origin.architecture}`"
    compared = "the dense one" if origin is None else "that one"
    said = [
        f"This checkpoint was converted with `hf_sparse` from {source} of `{name}`, and not trained since.",
        f"It reads {after}, where {compared} reads {before}.",
        f"Of all pairs of tokens at that length it reads {density:.2%}.",
    ]
    if is_calibrated:
        said.append("Its centroids were moved to the queries and keys that it has on a text.")
    if target.rotary:
        said.append(f"Its rotary positions are `{json.dumps(target.rotary)}`.")
    return Card(
        entry=target.entry,
        origin="\n".join(said),
        subfolder=checkpoint.inner,
        base_model=checkpoint.name.partition("@")[0] if checkpoint.is_from_hub else None,
        loads_by_code=loads_by_code,
    )
