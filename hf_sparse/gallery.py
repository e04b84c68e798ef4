"""The page ``docs/patterns.md``: every pattern with its fields, its source and its pictures. ``make docs`` writes it."""

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_sparse.drawing import reading_lines, write_picture
from hf_sparse.parts import Scope
from hf_sparse.patterns import PATTERNS, Pattern, by_head, pattern
from hf_sparse.patterns.combine import Union

# what stands outside of these two lines is written by hand, or by others
START = "<!-- patterns: `make docs` writes what follows, up to the next line of this kind -->"
END = "<!-- end of patterns -->"


@dataclass(frozen=True)
class Picture:
    """A picture of the page, and the settings it is drawn with.

    Attributes:
        pattern: with settings that show its structure at this length.
        name: sets it apart from other pictures of the same key, in words of letters and digits; empty for one alone.
        length: tokens.
        heads: heads; those that differ get a panel each.
        is_causal: whether keys ahead of the query are left out.
    """

    pattern: Pattern
    name: str = ""
    length: int = 32
    heads: int = 1
    is_causal: bool = False

    @property
    def file(self) -> str:
        """The picture's path, from the page."""
        return f"patterns/{'-'.join([self.pattern.key, *self.name.split()])}.png"

    @property
    def scope(self) -> Scope:
        return Scope(self.length, self.heads, is_causal=self.is_causal)


# One line for each picture, at least one for each pattern; the page has the order of PATTERNS.
PICTURES = (
    Picture(pattern("band", radius=3)),
    Picture(pattern("dilated", radius=3, dilation=2)),
    Picture(pattern("strided", stride=8)),
    Picture(pattern("block_local", block_size=8)),
    Picture(pattern("global", positions=(0, 12))),
    Picture(pattern("random", block_size=2, num_random_blocks=3)),
    Picture(pattern("longformer", window=6, global_tokens=(0, 1)), name="bidirectional"),
    Picture(pattern("longformer", window=6, global_tokens=(0, 1)), name="causal", is_causal=True),
    Picture(pattern("bigbird", block_size=2, num_random_blocks=2), name="published"),
    Picture(pattern("bigbird", block_size=2, num_random_blocks=2, random_plan="full_length"), name="full length"),
    Picture(pattern("bigbird", block_size=2, num_random_blocks=2, num_external_global=2), name="external global"),
    Picture(pattern("star"), length=24),
    Picture(pattern("etc", radius=3, num_global=4), name="global nodes"),
    Picture(
        pattern("etc", radius=3, segments=6, hard_global_to_long=True, hard_long_to_global=True), name="hard segments"
    ),
    Picture(pattern("sparse_transformer", kind="strided", stride=6), name="strided", is_causal=True),
    Picture(pattern("sparse_transformer", kind="fixed", stride=6, summary=1), name="fixed", is_causal=True),
    Picture(
        pattern("sparse_transformer", kind="fixed", stride=6, summary=1, heads="separate"),
        name="separate heads",
        heads=4,
        is_causal=True,
    ),
    Picture(pattern("bp_transformer", nodes_per_level=2), name="bidirectional"),
    Picture(pattern("bp_transformer", nodes_per_level=2), name="causal", is_causal=True),
    Picture(pattern("image_1d", block_size=8, memory=4), name="bidirectional"),
    Picture(pattern("image_1d", block_size=8, memory=8), name="causal", is_causal=True),
    Picture(pattern("image_2d", query_block=(2, 4), flange=(1, 1)), name="raster", length=64),
    Picture(
        pattern("image_2d", query_block=(2, 4), flange=(2, 2), order="block"),
        name="blocks causal",
        length=64,
        is_causal=True,
    ),
    Picture(pattern("axial", axis="row"), name="row", length=36),
    Picture(pattern("axial", axis="column"), name="column", length=36),
    Picture(pattern("strided", stride=8) | pattern("band", radius=2) | pattern("global", positions=(0,))),
    Picture(
        by_head({range(2): pattern("band", radius=3), 2: pattern("strided", stride=6), 3: pattern("global")}), heads=4
    ),
)


def write_page(folder: Path) -> None:
    """Write the generated part of ``patterns.md`` in a folder, and the pictures beside it.

    Raises:
        ValueError: if the page lacks the two lines between which to write, a pattern its picture, or matplotlib is missing.
    """
    path = folder / "patterns.md"
    text = page(path.read_text())
    (folder / "patterns").mkdir(exist_ok=True)
    for picture in PICTURES:
        write_picture(folder / picture.file, picture.pattern, picture.scope)
    path.write_text(text)


def page(text: str) -> str:
    """Return the text of the page with its generated part as it is now.

    Raises:
        ValueError: if the two lines between which to write are missing, or a pattern has no picture.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"docs/patterns.md must hold the two lines {START!r} and {END!r}")
    held = dict.fromkeys(picture.pattern.key for picture in PICTURES)
    for key, cls in PATTERNS.items():
        if key not in held and not cls.is_content_based:
            raise ValueError(f"add a line for {key} to PICTURES in hf_sparse/gallery.py, then run make docs")
    keys = [*PATTERNS, *(key for key in held if key not in PATTERNS)]
    sections = "\n".join(line for key in keys for line in _section(key))
    return f"{before}{START}\n\n{sections}\n{END}{after}"


def _section(key: str) -> Iterator[str]:
    """Yield the lines about one pattern."""
    pictures = [picture for picture in PICTURES if picture.pattern.key == key]
    cls = PATTERNS.get(key) or type(pictures[0].pattern)
    said = inspect.getdoc(cls) or ""
    yield from (f"## `{key}`", "", _one_line(said.splitlines()[0]), "")
    if key in PATTERNS:
        yield from ("| field | default | meaning |", "| --- | --- | --- |")
        for field in dataclasses.fields(cls):
            meaning = re.search(rf"^    {field.name}: (.*(?:\n {{8}}.*)*)", said, re.MULTILINE)
            yield f"| `{field.name}` | `{json.dumps(field.default)}` | {_one_line(meaning[1]) if meaning else ''} |"
        yield ""
    if source := re.search(r"^Source: (.*(?:\n.+)*)", said, re.MULTILINE):
        yield from (f"Source: {_one_line(source[1])}", "")
    for picture in pictures:
        drawn = picture.pattern
        mask = drawn.mask(picture.length, heads=picture.heads, is_causal=picture.is_causal)
        if picture.name:
            yield from (f"**{picture.name}**", "")
        yield from (f"![{' '.join([key, picture.name]).strip()}]({picture.file})", "")
        yield from ("```bash", command(picture), "```", "", "; ".join(reading_lines(mask)).capitalize() + ".", "")


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def command(picture: Picture) -> str:
    """Return the line for a shell that draws a picture."""
    drawn = picture.pattern
    members = drawn.patterns if isinstance(drawn, Union) else (drawn,)
    words = ["hf-sparse", "show"]
    if all(member.key in PATTERNS for member in members):
        words.append("|".join(member.key for member in members))
        for member in members:
            owner = f"{member.key}." if len(members) > 1 else ""
            for field in dataclasses.fields(member):
                value = getattr(member, field.name)
                if value != field.default:
                    said = value if isinstance(value, str) else json.dumps(value)
                    words += ["--set", f"{owner}{field.name}={said}"]
    else:
        words.append(drawn.json)
    words += ["--length", str(picture.length)]
    words += ["--heads", str(picture.heads)] * (picture.heads > 1) + ["--causal"] * picture.is_causal
    return shlex.join([*words, "--out", Path(picture.file).name])


if __name__ == "__main__":
    write_page(Path("docs"))
