"""Documents to learn from: the splits of a dataset, on the Hub or in a folder."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, Value, load_dataset
from pyarrow import ArrowInvalid
from pyarrow.parquet import read_metadata

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments

# how a file of a folder is read, by its ending
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
_IMAGES = "imagefolder"
# train-00000-of-00002.parquet
_PART = re.compile(r"-\d{5}-of-\d{5}$")


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
    found = _of_folder(folder, names, streamed) if folder.exists() else _of_hub(arguments, names, streamed)
    splits: dict[str, Any] = {}
    for kind, name in names.items():
        if name not in found:
            raise RecipeError(
                f"{arguments.dataset} has no split {name!r}; it has {', '.join(sorted(found))}: name one by --{kind}_split"
            )
        split = found[name]
        where = f"{arguments.dataset}: the split {name!r}"
        held = split.column_names or _first_columns(split, where)
        for column in columns:
            if column.partition(".")[0] not in held:
                raise RecipeError(f"{where} has no column {column!r}; it has {', '.join(held)}")
        if isinstance(split, Dataset):
            _check_values(split, columns, where)
        splits[kind] = split
    _check_kinds(splits, columns, arguments.dataset)
    return splits


def _first_columns(split: Any, where: str) -> list[str]:
    """Return the columns of a stream, whose first row is read."""
    try:
        first = next(iter(split), None)
    # datasets raises one of many classes where a file is not what its ending says, some of them its own
    except Exception as error:
        raise RecipeError(f"{where} cannot be read: {error or type(error).__name__}") from error
    if first is None:
        raise RecipeError(f"{where} is empty")
    return list(first)


def _check_values(split: Dataset, columns: tuple[str, ...], where: str) -> None:
    """Check that a split has documents, and that something stands in their columns."""
    if not len(split):
        raise RecipeError(f"{where} is empty")
    for column in columns:
        name, _, field = column.partition(".")
        lacking = split.data.column(name).null_count
        if lacking:
            raise RecipeError(f"{where} has {lacking} rows without {name!r}; fill them in, or leave those rows out")
        records = getattr(split.features[name], "feature", None)
        if field and not (isinstance(records, dict) and field in records):
            raise RecipeError(f"{where} has no field {field!r} in column {name!r}")
    first = split.features[columns[0].partition(".")[0]]
    if not isinstance(first, Image) and not any(_has_words(value) for value in split[columns[0]]):
        raise RecipeError(f"{where} has no text in column {columns[0]!r}")


def _has_words(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _check_kinds(splits: dict[str, Any], columns: tuple[str, ...], dataset: str) -> None:
    """Check that a column holds the same in all splits."""
    for column in columns:
        name = column.partition(".")[0]
        kinds = {kind: _kind(split.features[name]) for kind, split in splits.items() if isinstance(split, Dataset)}
        first = next(iter(kinds))
        for kind, found in kinds.items():
            # of nothing but empty lists it is not known what they hold
            if found != kinds[first] and "null" not in found + kinds[first]:
                raise RecipeError(
                    f"{dataset}: column {name!r} holds {kinds[first]} in the {first} split and {found} in the {kind} split"
                )


def _kind(feature: Any) -> str:
    """Say what a column holds."""
    own = getattr(feature, "feature", feature)
    if own is not feature:
        return f"lists of {_kind(own)}"
    if isinstance(own, Value):
        return "text" if "string" in own.dtype else "whole numbers" if "int" in own.dtype else own.dtype
    return "names" if isinstance(own, ClassLabel) else "records" if isinstance(own, dict) else type(own).__name__


def values_of(held: dict[str, list[Any]], column: str) -> list[Any]:
    """Return the values of a column of a batch: of "queries.text" a list for each row."""
    name, _, field = column.partition(".")
    if not field:
        return held[name]
    return [[record[field] for record in records] for records in held[name]]


def some_of(split: Dataset, count: int, column: str) -> Dataset:
    """Return rows chosen by the hash of what stands in a column, so that they are the same however the split is sorted."""
    if isinstance(split.features[column], Image):
        files = split.cast_column(column, Image(decode=False))[column]
        held = [file["bytes"] or Path(file["path"]).read_bytes() for file in files]
    else:
        held = [json.dumps(value, default=str).encode() for value in split[column]]
    said = [hashlib.sha256(value).hexdigest() for value in held]
    return split.select(sorted(sorted(range(len(said)), key=said.__getitem__)[:count]))


def _of_folder(folder: Path, names: dict[str, str], streamed: set[str]) -> dict[str, Any]:
    if not folder.is_dir():
        raise RecipeError(f"{folder} is a file; name the folder that holds a file for each split")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        # a folder of images for each label, in one for each split; or a file, or several as the Hub names them
        name = _PART.sub("", path.stem) if path.suffix in _READERS else path.name if path.is_dir() else None
        if name is None or not (path.suffix in _READERS or name in names.values()):
            continue
        before = files.setdefault(name, [])
        if before and name in names.values() and not (_is_part(path) and _is_part(before[0])):
            raise RecipeError(f"{folder} holds both {before[0].name} and {path.name}; leave one of them")
        before.append(path)
    if not files:
        raise RecipeError(f"{folder} holds no {', '.join(_READERS)} file")
    for name in set(names.values()) & set(files):
        _check_parts(folder, files[name])
    held: dict[str, Any] = dict.fromkeys(files)
    for name in set(names.values()) & set(files):
        path, parts = files[name][0], [str(part) for part in files[name]]
        reader = _IMAGES if path.is_dir() else _READERS[path.suffix]
        where: dict[str, Any] = {"data_dir": str(path)} if path.is_dir() else {"data_files": parts}
        if reader == "text":
            # a file is a document, not each of its lines
            where["sample_by"] = "document"
        try:
            held[name] = load_dataset(reader, split="train", streaming=name in streamed, **where)
        # datasets raises one of many classes where a file is not what its ending says, some of them its own
        except Exception as error:
            if reader == "parquet" and not any(_rows_of(part) for part in parts):
                raise RecipeError(f"{folder}: the split {name!r} is empty") from error
            why = str(error) if path.is_dir() or path.stat().st_size else "it is empty"
            raise RecipeError(f"{path} cannot be read as {reader}: {why or type(error).__name__}") from error
    return held


def _rows_of(path: str) -> int:
    """Return the rows that a parquet file says it has; 1 where it cannot be read."""
    try:
        return int(read_metadata(path).num_rows)
    except (OSError, ArrowInvalid):
        return 1


def _is_part(path: Path) -> bool:
    return path.is_file() and _PART.search(path.stem) is not None


def _check_parts(folder: Path, paths: list[Path]) -> None:
    """Check that no part of a split is missing, and that all are of one kind."""
    found = [_PART.search(path.stem) for path in paths if path.is_file()]
    if not any(found):
        return
    count = int(found[0][0].rpartition("-")[2])  # type: ignore[index]
    wanted = [f"-{i:05d}-of-{count:05d}" for i in range(count)]
    if [part and part[0] for part in found] != wanted or len({path.suffix for path in paths}) > 1:
        raise RecipeError(
            f"{folder} holds {', '.join(path.name for path in paths)}, which are not all {count} parts of a split; fetch it "
            "again, or remove what is of another"
        )


def _of_hub(arguments: RecipeArguments, names: dict[str, str], streamed: set[str]) -> dict[str, Any]:
    held = arguments.dataset, arguments.dataset_config
    try:
        if not streamed:
            return dict(load_dataset(*held))
        return {name: load_dataset(*held, split=name, streaming=name in streamed) for name in names.values()}
    except (OSError, ValueError) as error:
        way_out = "; name one by --dataset_config" if "Config name is missing" in str(error) else ""
        raise RecipeError(
            f"{held[0]!r} is no folder here and no dataset that the Hub gives: {error}{way_out}"
        ) from error
