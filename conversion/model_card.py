"""What the README of a converted checkpoint says about its conversion."""

import json

from hf_sparse.conversion.report import inputs_in_words
from hf_sparse.conversion.target import Target


def card(held: str | None, *, name: str, inner: str, target: Target, is_calibrated: bool = False) -> str:
    """Return a README with a section on the conversion behind what it says already.

    Args:
        held: the source's README, front matter and all; None where there is none.
        name: of the source.
        inner: where the transformer lies in the checkpoint, "" for the top.
        target: what it became.
        is_calibrated: whether its centroids were moved on a text.
    """
    pattern = json.dumps(target.entry.to_dict()["pattern"])
    architecture = target.architectures[0]
    subfolder = f', subfolder="{inner}"' if inner else ""
    after = inputs_in_words(target.length, target.image_size)
    before = inputs_in_words(target.length_before, target.image_size_before)
    if target.image_size is None:
        after, before = f"up to {after}", before.removesuffix(" tokens")
    calibrated = "\nIts centroids were moved to the queries and keys that it has on a text." if is_calibrated else ""
    rotary = f"\nIts rotary positions are `{json.dumps(target.rotary)}`." if target.rotary else ""
    section = f"""## Converted to sparse attention

This checkpoint was converted with `hf_sparse` from the dense `{architecture}` of `{name}`, and not trained since.
It reads {after}, where the dense one reads {before}.
Its attention follows `{pattern}`.{calibrated}{rotary}

```python
import hf_sparse  # registers the sparse classes; without it the next line raises
from transformers import AutoModel

model = AutoModel.from_pretrained("path/to/this/checkpoint"{subfolder})
```
"""
    return section if held is None else f"{held.rstrip()}\n\n{section}"
