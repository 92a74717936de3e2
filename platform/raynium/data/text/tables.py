"""Readers of tables: a column of text, or those of a record, batch by batch. Messages name the columns there are."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import TYPE_CHECKING, Any

from raynium.data.text.documents import Item, Part, Wanted
from raynium.data.text.left_out import LeftOut
from raynium.data.text.readers import document_of_bytes, record_text
from raynium.errors import DataError, some
from raynium.storage.reading import will_read

if TYPE_CHECKING:
    import pyarrow as pa

# Rows and bytes that are in memory at once, of a column that may be a gigabyte.
BATCH_ROWS = 256
READ_BYTES = 2**20
# How an Arrow stream ends, and an Arrow file, which holds a stream after 8 bytes.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_ARROW_FILE = b"ARROW1"


def table_rows(stream: BufferedReader, part: Part, wanted: Wanted) -> Iterator[Item]:
    """The rows of an Arrow stream or file, or of those Parquet row groups that begin in the part.

    Raises DataError for a column that is not there or no text, and ValueError or OSError for damage.
    """
    import pyarrow as pa

    rows = _parquet_rows if part.file.kind == "parquet" else _arrow_rows
    try:
        yield from rows(stream, part, wanted)
    except pa.ArrowException as error:
        # Of many kinds; its OSErrors go on as they are.
        raise ValueError(str(error)) from error
    except MemoryError as error:
        raise ValueError("it says to hold more than this machine's memory") from error


def _parquet_rows(stream: BufferedReader, part: Part, wanted: Wanted) -> Iterator[Item]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(stream, buffer_size=READ_BYTES, pre_buffer=False)
    columns = _Columns.of(table.schema_arrow, wanted, part.file.shown)
    if not table.metadata.num_rows and not part.begin:
        yield LeftOut(part.file.name, "empty")
    row = 0
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        chunks = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
        if part.is_whole or part.begin <= min(_begin(group.column(0)), part.file.num_bytes - 1) < part.end:
            first = row
            # A nested column lies in several, by the paths of its leaves.
            read = [
                path for path in chunks if any(path == name or path.startswith(f"{name}.") for name in columns.paths)
            ]
            for chunk in map(chunks.__getitem__, read):
                will_read(stream, _begin(chunk), _begin(chunk) + chunk.total_compressed_size)
            for batch in table.iter_batches(BATCH_ROWS, [number], columns.paths, use_threads=False):
                yield from columns.items(batch, part.file.name, first)
                first += batch.num_rows
        row += group.num_rows


def _begin(chunk: Any) -> int:
    """The byte at which a column of a row group begins."""
    offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
    return max(0, min(offset for offset in offsets if offset is not None))


def _arrow_rows(stream: BufferedReader, part: Part, wanted: Wanted) -> Iterator[Item]:
    import pyarrow as pa

    stream.seek(max(0, part.file.num_bytes - len(_END_OF_STREAM)))
    if not (end := stream.read()).endswith(_ARROW_FILE) and end != _END_OF_STREAM:
        raise DataError(
            f"{part.file.shown} has no end of an Arrow stream: it is cut off, or was not closed; copy it or save the "
            "dataset again"
        )
    stream.seek(0)
    stream.seek(8 if stream.peek(6)[:6] == _ARROW_FILE else 0)
    row = 0
    with pa.ipc.open_stream(stream) as batches:
        columns = _Columns.of(batches.schema, wanted, part.file.shown)
        for batch in batches:
            for begin in range(0, batch.num_rows, BATCH_ROWS):
                some_rows = batch.slice(begin, BATCH_ROWS)
                yield from columns.items(some_rows, part.file.name, row)
                row += some_rows.num_rows
    if not row:
        yield LeftOut(part.file.name, "empty")


@dataclass(frozen=True)
class _Columns:
    """What of a table's rows makes documents. ways: the names that lead to each column, from the outermost."""

    wanted: Wanted
    ways: dict[str, list[str]]

    @classmethod
    def of(cls, schema: "pa.Schema", wanted: Wanted, place: str) -> "_Columns":
        """Raises DataError."""
        if isinstance(wanted, str):
            return cls(wanted, {wanted: _text_column(schema, wanted, place)})
        asked = [(name, column.required) for column in wanted for name in column.sources]
        there = {name: _way(schema, name, place)[0] for name, required in asked if required or _has(schema, name)}
        return cls(wanted, there)

    @property
    def paths(self) -> list[str]:
        return [".".join(way) for way in self.ways.values()]

    def items(self, batch: "pa.RecordBatch", name: str, first: int) -> Iterator[Item]:
        # Arrow trusts what it reads: a damaged length would have it read beyond the file's bytes, and die.
        batch.validate()
        if isinstance(self.wanted, str):
            yield from _items(_values(batch, self.ways[self.wanted]), name, first)
            return
        values = {column: _nested(batch, way) for column, way in self.ways.items()}
        for row in range(batch.num_rows):
            text = record_text(
                self.wanted, lambda name, _, row=row: values[name][row] if name in values else None, first + row
            )
            at = f"{name}:{first + row}"
            yield LeftOut(at, "null") if text is None else document_of_bytes(at, text.encode(errors="surrogateescape"))


def _has(schema: "pa.Schema", name: str) -> bool:
    return (name if name in schema.names else name.partition(".")[0]) in schema.names


def _nested(batch: "pa.RecordBatch", way: list[str]) -> list[Any]:
    """Values of any kind, without the nulls that a struct has for what a row does not say."""
    import pyarrow.compute as pc

    values: Any = batch.column(way[0])
    for name in way[1:]:
        values = pc.struct_field(values, name)  # pyright: ignore[reportAttributeAccessIssue]
    # Also that texts are UTF-8.
    values.validate(full=True)
    return [_without_nulls(value) for value in values.to_pylist()]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _text_column(schema: "pa.Schema", text_field: str, place: str) -> list[str]:
    """The names that lead to it, from the outermost. Raises DataError."""
    names, kind = _way(schema, text_field, place)
    if not _is_text(kind):
        raise DataError(f"{place}: column {text_field!r} is {kind}, not text; the columns of text are {_texts(schema)}")
    return names


def _way(schema: "pa.Schema", text_field: str, place: str) -> tuple[list[str], "pa.DataType"]:
    """The names that lead to a column, and its type. Raises DataError."""
    import pyarrow as pa

    names = [text_field] if text_field in schema.names else text_field.split(".")
    fields: Any = schema
    for depth, name in enumerate(names):
        if fields.get_field_index(name) < 0:
            inside = f" in {'.'.join(names[:depth])!r}" if depth else ""
            raise DataError(
                f"{place}: there is no column {name!r}{inside}; the columns of text are {_texts(schema)}, of all "
                f"{some([repr(each.name) for each in fields]) or 'none'}"
            )
        fields = fields.field(name).type
        if depth + 1 < len(names) and not pa.types.is_struct(fields):
            raise DataError(f"{place}: column {'.'.join(names[: depth + 1])!r} is {fields}, and holds no columns")
    return names, fields


def _texts(schema: "pa.Schema") -> str:
    return some([repr(field.name) for field in schema if _is_text(field.type)]) or "none"


def _is_text(kind: "pa.DataType") -> bool:
    """Also where all is null."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(matches(kind) for matches in is_text)


def _values(batch: "pa.RecordBatch", column: list[str]) -> list[bytes | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    values: Any = batch.column(column[0])
    for name in column[1:]:
        values = pc.struct_field(values, name)  # pyright: ignore[reportAttributeAccessIssue]
    if pa.types.is_dictionary(values.type):
        values.validate(full=True)
        values = values.dictionary_decode()
    # As bytes, since text that is no UTF-8 is left out and no damage.
    bytes_of = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    values = values.view(bytes_of.get(values.type, values.type))
    values.validate(full=True)
    return values.to_pylist()


def _items(values: list[bytes | None], name: str, first: int) -> Iterator[Item]:
    for row, value in enumerate(values, first):
        yield LeftOut(f"{name}:{row}", "null") if value is None else document_of_bytes(f"{name}:{row}", value)
