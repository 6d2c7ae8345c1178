"""
Files of samples that may hold their pictures: Parquet, webdataset's tars, JSON with data: URLs.

Only the text of a sample is read at first. A picture stays where it lies, a Place says where that
is, and nothing is unpacked to disk.
"""
import base64
import functools
import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parts.files import IMAGE, decode_json, errors_of_file, library, read_spans, typed

SPLITS = ("train", "test", "val", "dev")     # how the hub's files begin: test-00000-of-00003
PICTURE_EXTENSIONS = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


class Place(NamedTuple):
    """A picture inside a file of samples.

    Parquet   at: its row; n: which of the row's pictures it is
    tar       at, size: its bytes
    JSON      at, size: the bytes of its record; n: which of the record's data: URLs it is
    """
    file: str
    at: int
    size: int = None
    n: int = None

    def __repr__(self):
        unit = "row" if self.size is None else "byte"
        return f"{os.path.basename(self.file)}:{unit} {self.at}:{self.n or 0}"

    def read(self):
        """The picture as a file of its own would have it, in bytes. Raises OSError, ValueError."""
        if self.size is None:
            return picture_in_row(self)
        with open(self.file, "rb") as f:
            f.seek(self.at)
            content = f.read(self.size)
        if self.n is None:
            return content
        _, _, payload = data_urls(json.loads(content))[self.n].partition(",")
        return base64.b64decode(payload, validate=True)


def shards_of(source):
    """The files of a source of --data: itself, or the Parquet and tar files in a folder.

    Raises ValueError for a folder without, or with several splits: nobody trains on a test set
    because it lies beside the rest.
    """
    if not os.path.isdir(source):
        return [str(source)]
    files = sorted(path for path in Path(source).iterdir() if path.suffix in (".parquet", ".tar"))
    if not files:
        raise ValueError(f"{source}: no .parquet and no .tar file is in this folder")
    splits = {split for split in SPLITS for path in files if path.name.startswith(split)}
    if len(splits) > 1:
        raise ValueError(f"{source} holds several splits, {', '.join(sorted(splits))}; name the "
                         f"files, e.g. {source}/{min(splits, key=SPLITS.index)}*")
    return [str(path) for path in files]


def read_shard(path):
    """Yield (record, Place of the record or None) of a file; the Place is for its data: URLs.

    A record is as it was written, but its pictures are Places. What a file is, its content says.
    Raises ValueError for a file that cannot be read, or has not the columns.
    """
    with open(path, "rb") as f:
        head = f.read(262)
    if head.startswith(b"PAR1"):
        yield from read_parquet(path)
    elif head.endswith(b"ustar"):
        yield from read_tar(path)
    else:
        for record, start, size in read_spans(path):
            yield record, Place(path, start, size)


def data_urls(value):
    """All data: URLs in a value of JSON, in its order."""
    if isinstance(value, str):
        return [value] if value.startswith("data:") else []
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return []
    return [url for part in parts for url in data_urls(part)]


# -----------------------------------------------------------------------------
# Parquet


def open_parquet(path):
    """(ParquetFile, its column of pictures or None), memory-mapped. Raises ValueError."""
    return parquet_file(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=64)
def parquet_file(path, modified):
    parquet = library("pyarrow.parquet", f"{path}, which is Parquet,", "pyarrow")
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a complete Parquet file: {error}") from error
    names = file.schema_arrow.names
    found = f"its columns are {', '.join(names)}"
    if not {"conversations", "messages"} & set(names):
        raise ValueError(f"{path}: no column conversations or messages; {found}")
    columns = [name for name in ("image", "images") if name in names]
    if len(columns) > 1:
        raise ValueError(f"{path}: pictures are in image or in images, not in both; {found}")
    return file, columns[0] if columns else None


def read_parquet(path):
    """The rows of a Parquet file; the bytes of pictures are passed over where a path tells them."""
    file, pictures = open_parquet(path)
    leaves = [file.schema.column(i) for i in range(len(file.schema))]
    raw = [leaf.path for leaf in leaves
           if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE"]
    unread = {path.partition(".")[0] for path in raw} - {pictures}
    if unread:
        raise ValueError(f"{path}: column {min(unread)!r} holds bytes, and those of pictures are "
                         "read from image or images alone; rename it, or leave it out")
    columns = [leaf.path for leaf in leaves if leaf.path not in raw]
    if raw and not any(column.startswith(f"{pictures}.") for column in columns):
        columns += raw
    row = 0
    for batch in file.iter_batches(256, columns=columns, use_threads=False):
        for record in batch.to_pylist():
            if raw and record[pictures] is not None:
                inside = record[pictures]
                count = len(inside) if isinstance(inside, list) else 1
                record[pictures] = [Place(path, row, n=n) for n in range(count)]
            yield record, None
            row += 1


def picture_in_row(place):
    file, column = open_parquet(place.file)
    rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    ends = np.cumsum(rows)
    group = int(np.searchsorted(ends, place.at, side="right"))
    picture = pictures_of_group(file, column, group)[place.at - ends[group]].as_py()
    if isinstance(picture, list):
        picture = picture[place.n]
    if isinstance(picture, dict):
        picture = picture["bytes"]
    if not picture:
        raise ValueError("no bytes; were the pictures embedded when the file was written?")
    return picture


@functools.lru_cache(maxsize=1)              # the next sample may be its neighbour
def pictures_of_group(file, column, group):
    """The pictures of a group of rows, as pyarrow has them."""
    return file.read_row_group(group, columns=[column], use_threads=False).column(0)


# -----------------------------------------------------------------------------
# webdataset


def tar_members(path):
    """Yield the TarInfo of each member. TarError for a file that is damaged or compressed."""
    with tarfile.open(path, "r:") as tar:        # "r:" refuses compressed files
        for member in iter(tar.next, None):
            tar.members.clear()                  # it would keep them all
            yield member
        # tarfile takes a damaged header for the end
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(2 ** 20).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}; what follows is lost")


def read_tar(path):
    """The samples of a tar: members with one name up to the first dot, such as 7.json and 7.jpg.

    The .json is the record; or the .txt is the caption of the pictures. Several pictures are
    7.0.jpg, 7.1.jpg, ...
    """
    samples = {}
    try:
        for file in filter(tarfile.TarInfo.isfile, tar_members(path)):
            folder, base = os.path.split(file.name)
            stem, _, extension = base.partition(".")
            members = samples.setdefault(os.path.join(folder, stem), {})
            if extension.lower() in members:
                raise ValueError(f"{path}: {file.name} is in it twice")
            members[extension.lower()] = file.offset_data, file.size
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a complete, uncompressed tar file: {error}") from error
    samples.pop("", None)
    with open(path, "rb") as f:
        for key, members in samples.items():
            yield sample_in_tar(path, f, key, members), None


def sample_in_tar(path, f, key, members):
    """A record from {extension: (byte, size)}; an extension that is not read becomes a key."""
    def content(extension):
        at, size = members[extension]
        f.seek(at)
        return f.read(size)

    names = [name for name in members if "." + name.rpartition(".")[2] in PICTURE_EXTENSIONS]
    names.sort(key=lambda name: (len(name), name))       # 2.jpg before 10.jpg
    record = {}
    if "json" in members:
        where = f"{path}: {key}.json"
        with errors_of_file(where):
            record = decode_json(content("json"))
        typed(record, dict, where)
    if "txt" in members and not {"conversations", "messages"} & record.keys():
        caption = content("txt").decode(errors="replace")
        record = {"conversations": [{"from": "human", "value": IMAGE * len(names)},
                                    {"from": "gpt", "value": caption}]}
    others = members.keys() - {"json", "txt", *names}
    record = {"id": key} | record | {extension: key for extension in others}
    if names:
        record.pop("images", None)
        record["image"] = [Place(path, *members[name]) for name in names]
    return record
