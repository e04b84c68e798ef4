"""Folders of labelled documents, as a person would have them; nothing here knows hf_sparse."""

import json
import random
from pathlib import Path

FILLER = ("a", "every", "long", "of", "page", "reads", "the", "word")
THINGS = ("river", "stone")


def write_labelled(folder: Path, sizes: dict[str, int], *, shortest: int = 20, longest: int = 60) -> str:
    """Write splits as JSON lines, each document labelled by the one thing it names; return the folder."""
    drawn = random.Random(0)
    folder.mkdir()
    for split, count in sizes.items():
        lines = []
        for i in range(count):
            thing = THINGS[i % 2]
            words = [drawn.choice(FILLER) for _ in range(drawn.randint(shortest, longest))]
            for place in drawn.sample(range(len(words)), 8):
                words[place] = thing
            lines.append(json.dumps({"text": " ".join(words), "label": thing}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)
