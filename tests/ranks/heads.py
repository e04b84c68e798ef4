"""Compare a model whose heads are spread over two ranks by transformers with the whole one, as ``torchrun`` starts it.

``torchrun -m tests.ranks.heads FOLDER``: FOLDER/sparse is a checkpoint; FOLDER/said.json gets how far the two are apart.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_sparse  # noqa: F401  registers the sparse classes


def main() -> None:
    """Compare one checkpoint, and give the spread model an attention name."""
    folder = Path(sys.argv[1])
    ids = torch.arange(5, 45)[None]
    whole = AutoModelForCausalLM.from_pretrained(folder / "sparse").eval()
    spread = AutoModelForCausalLM.from_pretrained(
        folder / "sparse", distributed_config=DistributedConfig(tp_size=2)
    ).eval()
    dense = (
        type(spread)
        .__mro__[2]
        .from_pretrained(
            folder / "sparse", attn_implementation="hf_sparse:band", distributed_config=DistributedConfig(tp_size=2)
        )
    )
    with torch.no_grad():
        wanted, found = whole(ids).logits, spread(ids).logits
        found = getattr(found, "full_tensor", lambda: found)()
        try:
            dense(ids)
            named = ""
        except ValueError as error:
            named = str(error)
    off = float((found - wanted).abs().max() / wanted.abs().max())
    if not torch.distributed.get_rank():
        said = {"size": spread.tp_size, "off": off, "named": named}
        (folder / "said.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    sys.stdout.flush()
    # taking down the group now and then never ends: gloo's thread and this one wait for each other
    os._exit(0)


if __name__ == "__main__":
    main()
