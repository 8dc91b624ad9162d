"""The arrays of one encoder on one plan: their metadata, their files, and the rows that go into them."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Float32, UInt8

from patchmill.archive.arrays import array_document, attributes_of, encode, group_document
from patchmill.archive.layout import OUTPUT, features_folder, plan_folder
from patchmill.archive.records import seal, unseal
from patchmill.archive.shards import chunking
from patchmill.archive.whole import POOLS, WHOLE
from patchmill.errors import ArchiveError, SourceError
from patchmill.types import TOKEN, VALID_GOOD, VALID_NOT_WRITTEN, VALID_REMOVED, EncoderSpec, Shard

__all__ = ["VALID", "Features", "features_of", "half_rows", "load_features", "stored_shard_rows"]

VALID = "valid"  # the array beside the outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What the metadata of an encoder's arrays says; the metadata follows from it, byte for byte."""

    plan: str
    encoder: str
    rows: int  # of the plan
    shard_rows: int
    attributes: Mapping[str, Any]  # of the encoder's group: what its key hashes, and the outputs

    @property
    def outputs(self) -> Mapping[str, int]:
        """Name and width of each output."""
        return {str(name): int(width) for name, width in self.attributes["outputs"].items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of what each array holds of a tile: of the outputs, and of dense features where they are kept."""
        vectors: dict[str, tuple[int, ...]] = {name: (width,) for name, width in self.outputs.items()}
        tokens = self.attributes.get("tokens")
        return vectors if tokens is None else {**vectors, TOKEN: tuple(map(int, tokens))}

    def documents(self) -> dict[str, bytes]:
        """All metadata files by path relative to the source's folder, parents first."""
        folder = features_folder(self.plan, self.encoder)
        shard_rows, chunk_rows = chunking(self.rows, self.shard_rows)
        sealed = json.loads(seal(self.attributes))
        return {
            f"{plan_folder(self.plan)}/features/zarr.json": group_document({}),
            f"{folder}/zarr.json": group_document(sealed),
            **{
                f"{folder}/{name}/zarr.json": array_document(
                    (self.rows, *shape),
                    "float16",
                    file_rows=shard_rows,
                    chunk_rows=1 if name == TOKEN else chunk_rows,  # whoever wants one tile's tokens reads no others
                    fill=float("nan"),
                    names=("tile", *("row", "column")[: len(shape) - 1], "feature"),
                )
                for name, shape in self.shapes.items()
            },
            f"{folder}/{VALID}/zarr.json": array_document(
                (self.rows,), "uint8", file_rows=shard_rows, chunk_rows=chunk_rows, names=("tile",)
            ),
        }

    def shard_files(self, start: int) -> dict[str, str]:
        """The files of the shard that begins at row `start`: array name -> path relative to the source's folder."""
        folder, number = features_folder(self.plan, self.encoder), start // self.shard_rows
        outputs = {name: f"{folder}/{name}/c.{number}{'.0' * len(shape)}" for name, shape in self.shapes.items()}
        return {**outputs, VALID: f"{folder}/{VALID}/c.{number}"}

    def encode(self, start: int, arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, bytes]:
        """The content of each file of the shard that begins at row `start`, by path."""
        folder, documents = features_folder(self.plan, self.encoder), self.documents()
        return {
            path: encode(documents[f"{folder}/{name}/zarr.json"], arrays[name], start)
            for name, path in self.shard_files(start).items()
        }

    def encode_whole(self, arrays: Mapping[str, Float32[np.ndarray, "2 d"]]) -> dict[str, bytes]:
        """The files of the group that holds one vector per source, by path, parents first. arrays: see `pooled`."""
        group = f"{features_folder(self.plan, self.encoder)}/{WHOLE}"
        files = {f"{group}/zarr.json": group_document({"rows": list(POOLS)})}
        for name, vectors in arrays.items():
            document = array_document(
                vectors.shape, "float32", file_rows=len(POOLS), fill=float("nan"), names=("pool", "feature")
            )
            files[f"{group}/{name}/zarr.json"] = document
            files[f"{group}/{name}/c.0.0"] = encode(document, vectors, 0)
        return files


def features_of(plan: str, rows: int, spec: EncoderSpec, shard_rows: int) -> Features:
    """What the metadata of an encoder's arrays has to say. Raises ArchiveError for a name that no array may have."""
    for name in spec.outputs:
        if not re.fullmatch(OUTPUT, name) or name in (VALID, TOKEN, WHOLE):
            raise ArchiveError(spec.name, f"no array may be called {name!r}", "give the output another name")
    attributes = {
        "architecture": dict(spec.architecture),
        "weights": spec.weights,
        "view": spec.view.record(),
        "precision": spec.precision,
        "outputs": dict(spec.outputs),
        **({} if spec.tokens is None else {"tokens": list(spec.tokens)}),
    }
    stored_rows, _ = chunking(rows, shard_rows)
    return Features(plan=plan, encoder=spec.key, rows=rows, shard_rows=stored_rows, attributes=attributes)


def load_features(folder: Path, plan: str, encoder: str, rows: int) -> tuple[Features | None, dict[str, str]]:
    """What the metadata on the disk says, and which of its files are wrong: path relative to `folder` -> what is wrong.

    None where too little is left to tell. Raises OSError other than a missing file.
    """
    group = f"{features_folder(plan, encoder)}/zarr.json"
    try:
        attributes = unseal(_sealed_text(attributes_of((folder / group).read_bytes())))
        names = [*attributes["outputs"], VALID]
    except FileNotFoundError:
        return None, {group: "is missing"}
    except (ValueError, KeyError, TypeError):
        return None, {group: "is damaged"}
    sizes = stored_shard_rows(folder, plan, encoder, names)
    best: dict[str, str] | None = None
    features = None
    for size in dict.fromkeys(sizes):
        candidate = Features(plan=plan, encoder=encoder, rows=rows, shard_rows=size, attributes=attributes)
        wrong = {path: text for path, data in candidate.documents().items() if (text := _compare(folder / path, data))}
        if best is None or len(wrong) < len(best):
            features, best = candidate, wrong
    return features, {group: "its arrays are damaged"} if best is None else best


def stored_shard_rows(folder: Path, plan: str, encoder: str, names: Iterable[str]) -> list[int]:
    """The shard rows that the metadata of the arrays called `names` states, as far as it can be read."""
    sizes = []
    for name in names:
        path = folder / features_folder(plan, encoder) / name / "zarr.json"
        try:
            size = json.loads(path.read_bytes())["chunk_grid"]["configuration"]["chunk_shape"][0]
        except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
            continue
        if isinstance(size, int) and size >= 1:
            sizes.append(size)
    return sizes


def half_rows(
    shard: Shard, output: str, vectors: Float[np.ndarray, "n *shape"], valid: UInt8[np.ndarray, " n"]
) -> Float16[np.ndarray, "n *shape"]:
    """Vectors as they are stored: float16, NaN in every row that is not good.

    Raises SourceError, naming output and row, where a good row holds NaN or infinity or overflows float16 (65504);
    ArchiveError where `valid` says that a row was not embedded.
    """
    if not np.isin(valid, range(VALID_NOT_WRITTEN + 1, VALID_REMOVED + 1)).all():
        raise ArchiveError(shard.source, f"a row of the shard at {shard.start} was not embedded", "report this mistake")
    good = valid == VALID_GOOD
    with np.errstate(over="ignore"):
        rows = vectors.astype(np.float16)
    for kind, bad in (("is not finite", ~np.isfinite(vectors)), ("does not fit float16", ~np.isfinite(rows))):
        if (wrong := bad.reshape(len(bad), -1).any(axis=1) & good).any():
            row = shard.start + int(np.flatnonzero(wrong)[0])
            raise SourceError(
                shard.source, f"output {output!r} of row {row} {kind}", "use another precision or another encoder"
            )
    rows[~good] = np.nan
    return rows


def _compare(path: Path, expected: bytes) -> str:
    try:
        return "" if path.read_bytes() == expected else "is damaged"
    except FileNotFoundError:
        return "is missing"


def _sealed_text(attributes: Mapping[str, Any]) -> bytes:
    """The attributes as the text that was sealed; the document around them is compared byte for byte elsewhere."""
    return (json.dumps(attributes, sort_keys=True, indent=1) + "\n").encode()
