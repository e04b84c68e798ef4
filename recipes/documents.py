"""Documents to learn from: the splits of a dataset, on the Hub or in a folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments

# how a file of a folder is read, by its ending
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
_IMAGES = "imagefolder"


def read_splits(arguments: RecipeArguments, columns: tuple[str, ...]) -> dict[str, Any]:
    """Return the splits "train", "validation" and "test"; "train" may be read on the way.

    Args:
        arguments: name the dataset and what its splits are called.
        columns: that each has to have; "queries.text" is the field "text" of records in the column "queries".

    Raises:
        RecipeError: if the dataset, a split or a column is missing, or a split is empty.
    """
    names = {kind: getattr(arguments, f"{kind}_split") for kind in ("train", "validation", "test")}
    folder = Path(arguments.dataset)
    streamed = {arguments.train_split} if arguments.streaming else set()
    found = _of_folder(folder, names, streamed) if folder.exists() else _of_hub(arguments.dataset, names, streamed)
    splits: dict[str, Any] = {}
    for kind, name in names.items():
        if name not in found:
            raise RecipeError(
                f"{arguments.dataset} has no split {name!r}; it has {', '.join(sorted(found))}: name one by --{kind}_split"
            )
        split = found[name]
        held = split.column_names or list(next(iter(split), {}))
        for column in columns:
            if column.partition(".")[0] not in held:
                raise RecipeError(
                    f"{arguments.dataset}: the split {name!r} has no column {column!r}; it has {', '.join(held)}"
                )
        if isinstance(split, Dataset) and not len(split):
            raise RecipeError(f"{arguments.dataset}: the split {name!r} is empty")
        splits[kind] = split
    return splits


def values_of(held: dict[str, list[Any]], column: str) -> list[Any]:
    """Return the values of a column of a batch: of "queries.text" a list for each row."""
    name, _, field = column.partition(".")
    if not field:
        return held[name]
    return [[record[field] for record in records] for records in held[name]]


def some_of(split: Dataset, count: int, column: str) -> Dataset:
    """Return rows chosen by the hash of what stands in a column, so that they are the same however the split is sorted."""
    said = [hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest() for value in split[column]]
    return split.select(sorted(sorted(range(len(said)), key=said.__getitem__)[:count]))


def _of_folder(folder: Path, names: dict[str, str], streamed: set[str]) -> dict[str, Any]:
    if not folder.is_dir():
        raise RecipeError(f"{folder} is a file; name the folder that holds a file for each split")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _READERS}
    # a folder of images for each label, in one for each split
    files |= {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name in names.values()}
    if not files:
        raise RecipeError(f"{folder} holds no {', '.join(_READERS)} file")
    held: dict[str, Any] = dict.fromkeys(files)
    for name in set(names.values()) & set(files):
        path = files[name]
        reader = _IMAGES if path.is_dir() else _READERS[path.suffix]
        where = {"data_dir": str(path)} if path.is_dir() else {"data_files": str(path)}
        if reader == "text":
            # a file is a document, not each of its lines
            where["sample_by"] = "document"
        try:
            held[name] = load_dataset(reader, split="train", streaming=name in streamed, **where)
        # datasets raises one of many classes where a file is not what its ending says, some of them its own
        except Exception as error:
            raise RecipeError(f"{path} cannot be read as {reader}: {error}") from error
    return held


def _of_hub(dataset: str, names: dict[str, str], streamed: set[str]) -> dict[str, Any]:
    try:
        if not streamed:
            return dict(load_dataset(dataset))
        return {name: load_dataset(dataset, split=name, streaming=name in streamed) for name in names.values()}
    except (OSError, ValueError) as error:
        raise RecipeError(f"{dataset!r} is no folder here and no dataset that the Hub gives: {error}") from error
