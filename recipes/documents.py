"""Documents to learn from: the splits of a dataset, on the Hub or in a folder."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments

# how a file of a folder is read, by its ending
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def read_splits(arguments: RecipeArguments, columns: tuple[str, ...]) -> dict[str, Dataset]:
    """Return the splits "train", "validation" and "test".

    Args:
        arguments: name the dataset and what its splits are called.
        columns: that each has to have.

    Raises:
        RecipeError: if the dataset, a split or a column is missing, or a split is empty.
    """
    names = {kind: getattr(arguments, f"{kind}_split") for kind in ("train", "validation", "test")}
    found = (
        _of_folder(Path(arguments.dataset), names) if Path(arguments.dataset).exists() else _of_hub(arguments.dataset)
    )
    splits: dict[str, Dataset] = {}
    for kind, name in names.items():
        if name not in found:
            raise RecipeError(
                f"{arguments.dataset} has no split {name!r}; it has {', '.join(sorted(found))}: name one by --{kind}_split"
            )
        split = found[name]
        for column in columns:
            if column not in split.column_names:
                raise RecipeError(
                    f"{arguments.dataset}: the split {name!r} has no column {column!r}; it has {', '.join(split.column_names)}"
                )
        if not len(split):
            raise RecipeError(f"{arguments.dataset}: the split {name!r} is empty")
        splits[kind] = split
    return splits


def _of_folder(folder: Path, names: dict[str, str]) -> dict[str, Any]:
    if not folder.is_dir():
        raise RecipeError(f"{folder} is a file; name the folder that holds a file for each split")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _READERS}
    if not files:
        raise RecipeError(f"{folder} holds no {', '.join(_READERS)} file")
    held: dict[str, Any] = dict.fromkeys(files)
    for name in set(names.values()) & set(files):
        path = files[name]
        try:
            held[name] = load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        # datasets raises one of many classes where a file is not what its ending says, some of them its own
        except Exception as error:
            raise RecipeError(f"{path} cannot be read as {_READERS[path.suffix]}: {error}") from error
    return held


def _of_hub(name: str) -> dict[str, Any]:
    try:
        return dict(load_dataset(name))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name!r} is no folder here and no dataset that the Hub gives: {error}") from error
