"""Readers of files of text: each gives the documents that begin in a range of bytes, and what is none as `LeftOut`.

They read a stream forward, in bounded memory. What they give does not depend on where a file is cut into parts.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import Any

from raynium.data.text.documents import Column, Document, Item, Part, Wanted
from raynium.data.text.left_out import LeftOut

# One text is in memory as a whole, and its tokens take about 30 times as much.
MAX_DOCUMENT_BYTES = 128 * 2**20
# A text file that is the whole source is cut after lines into pieces of about this size, so that some can be held out.
PIECE_BYTES = 16_384
_JSON_BYTES = 65_536
# Between objects, and between those in an array.
_BETWEEN_VALUES = (re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*"))
# Numbers are no text: one of more digits than Python makes an integer of is read like any other.
_JSON = json.JSONDecoder(parse_int=float)
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class BadRecord(Exception):
    """A record that is no document and should be one. at: the byte of the file where it begins, or its row, from 0."""

    def __init__(self, at: int, problem: str):
        super().__init__(problem)
        self.at, self.problem = at, problem


def whole_text(stream: BufferedReader, part: Part) -> Iterator[Item]:
    # Bytes, not text: line ends stay as they are.
    content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        yield LeftOut(part.file.name, "too long", part.file.num_bytes)
    else:
        yield document_of_bytes(part.file.name, content.removeprefix(codecs.BOM_UTF8))


def text_pieces(stream: BufferedReader, part: Part) -> Iterator[Item]:
    """One piece for each multiple of PIECE_BYTES in the part; it begins with the next line after that."""
    if _is_utf_16(stream):
        yield from _left_out_as_utf_16(part)
        return
    grid = -(-part.begin // PIECE_BYTES) * PIECE_BYTES
    if grid:
        # From the byte before the first place at which a piece may begin: it may be the end of a line.
        position = stream.seek(grid - 1)
        held = stream.read(PIECE_BYTES + 1)
        begins = _piece_begins(held, 1)
        held, position = held[begins:], position + begins
    else:
        held, position = stream.read(PIECE_BYTES), 0
    if not held and not part.begin:
        yield LeftOut(part.file.name, "empty")
    while held and grid < part.end:
        grid += PIECE_BYTES
        held += stream.read(max(0, grid + PIECE_BYTES - position - len(held)))
        ends = _piece_begins(held, grid - position)
        mark = b"" if position else codecs.BOM_UTF8
        yield document_of_bytes(f"{part.file.name}:{position}", held[:ends].removeprefix(mark))
        held, position = held[ends:], position + ends


def _piece_begins(held: bytes, grid: int) -> int:
    """Where in these bytes the piece of that multiple begins. Where no line ends soon, a character stays whole."""
    line_end = held.find(b"\n", grid - 1, grid + PIECE_BYTES - 1)
    if line_end >= 0 or grid >= len(held):
        return line_end + 1 or len(held)
    # None has more than 3 bytes after its first.
    begins = grid
    while begins < min(grid + 3, len(held)) and 0x80 <= held[begins] < 0xC0:
        begins += 1
    return begins


def json_lines(stream: BufferedReader, part: Part, wanted: Wanted) -> Iterator[Item]:
    """Raises BadRecord for a line that holds no such field of text."""
    if _is_utf_16(stream):
        yield from _left_out_as_utf_16(part)
        return
    offset = 0
    if part.begin:
        # To the end of a line that begins in the part before.
        offset = stream.seek(part.begin - 1)
        offset += _skip_line(stream, part.end - offset)
    while offset < part.end and (line := stream.readline(MAX_DOCUMENT_BYTES + 1)):
        name, num_bytes = f"{part.file.name}:{offset}", len(line)
        if num_bytes > MAX_DOCUMENT_BYTES:
            num_bytes += 0 if line.endswith(b"\n") else _skip_line(stream)
            yield LeftOut(name, "too long", num_bytes)
        else:
            yield _json_document(name, line, wanted, offset)
        offset += num_bytes
    if not offset:
        yield LeftOut(part.file.name, "empty")


def _skip_line(stream: BufferedReader, most_bytes: int | None = None) -> int:
    """Read to the end of the line, or to the first end of a buffer after `most_bytes`. Returns how many bytes."""
    num_bytes = 0
    while (most_bytes is None or num_bytes < most_bytes) and (some := stream.readline(MAX_DOCUMENT_BYTES)):
        num_bytes += len(some)
        if some.endswith(b"\n"):
            break
    return num_bytes


def _json_document(name: str, line: bytes, wanted: Wanted, at: int) -> Item:
    if not line.removeprefix(codecs.BOM_UTF8).strip():
        return LeftOut(name, "empty")
    try:
        record = _decoder(wanted).decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return LeftOut(name, "not utf-8", len(line))
    except (ValueError, RecursionError) as error:
        raise BadRecord(at, f"not JSON ({error}); each line must be a JSON object") from error
    return _document_of(name, _text_of(record, wanted, at), len(line))


def json_values(stream: BufferedReader, part: Part, wanted: Wanted) -> Iterator[Item]:
    """Objects one after the other (often there is one), or in an array. Raises BadRecord, as `json_lines`."""
    if _is_utf_16(stream):
        yield from _left_out_as_utf_16(part)
        return
    # Bytes that are no UTF-8 become half surrogate pairs, so that they cost the one document that they are in.
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    decoder, held, at, row, in_array = _decoder(wanted), "", 0, 0, None
    while True:
        at = _BETWEEN_VALUES[in_array is True].match(held, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if in_array is None and at < len(held):
            in_array = held[at] == "["
            at += in_array
            continue
        if in_array and held[at : at + 1] == "]":
            break
        try:
            value, ends = decoder.raw_decode(held, at)
        except (ValueError, RecursionError) as error:
            tried = len(held) - at
            if tried > MAX_DOCUMENT_BYTES:
                problem = f"{getattr(error, 'msg', error)}, or longer than {MAX_DOCUMENT_BYTES:,} characters"
                raise BadRecord(row, f"not JSON ({problem}; give many documents as lines, .jsonl)") from error
            # As much again as is held, so that a long value is not tried at every step.
            more = stream.read(max(_JSON_BYTES, tried))
            held, at = held[at:] + decode(more, final=not more), 0
            if not more and not held and not in_array:
                break
            if not more:
                problem = f"not JSON ({getattr(error, 'msg', error)})" if held else "the file ends within an array"
                raise BadRecord(row, problem) from error
        else:
            name = f"{part.file.name}:{row}"
            # More characters are more bytes; it need not be measured for each.
            if 4 * (ends - at) > MAX_DOCUMENT_BYTES < (num_bytes := len(held[at:ends].encode(errors="replace"))):
                yield LeftOut(name, "too long", num_bytes)
            else:
                yield _document_of(name, _text_of(value, wanted, row), ends - at)
            at, row = ends, row + 1
    held = held[at + 1 :]
    while held or (held := decode(stream.read(_JSON_BYTES))):
        if held.strip():
            raise BadRecord(row, "text after the array's end")
        held = ""
    if not row:
        yield LeftOut(part.file.name, "empty")


def _integer(digits: str) -> int | float:
    # Python makes no integer of more.
    return int(digits) if len(digits) < 4300 else float(digits)


_JSON_OF_RECORDS = json.JSONDecoder(parse_int=_integer)


def _decoder(wanted: Wanted) -> json.JSONDecoder:
    return _JSON if isinstance(wanted, str) else _JSON_OF_RECORDS


def _text_of(record: Any, wanted: Wanted, at: int) -> str | None:
    """The text of a document, None where it is null. Raises BadRecord."""
    if not isinstance(wanted, str):
        return record_text(wanted, lambda name, required: _field(record, name, at, required=required), at)
    value = _field(record, wanted, at)
    if value is not None and not isinstance(value, str):
        raise BadRecord(at, f"{wanted!r} is {_kind_of(value)}, not a text")
    return value


def record_text(columns: tuple[Column, ...], value_of: Callable[[str, bool], Any], at: int) -> str | None:
    """A record as JSON, with what is there of these columns; None where one that it must have is null.

    value_of: gives the source's value of a name, and is told whether it must be there. Raises BadRecord.
    """
    record: dict[str, Any] = {}
    for column in columns:
        values = [value_of(name, column.required) for name in column.sources]
        value = values[0] if len(values) == 1 else _joined(values, column, at)
        if value is None and column.required:
            return None
        if value is not None:
            record[column.name] = value
    return json.dumps(record, ensure_ascii=False)


def _joined(values: list[Any], column: Column, at: int) -> str | None:
    for name, value in zip(column.sources, values, strict=True):
        if not isinstance(value, str | None):
            raise BadRecord(at, f"{name!r} is {_kind_of(value)}, and only texts are joined to a {column.name}")
    return "\n\n".join(filter(None, values)) or None


def _field(record: Any, text_field: str, at: int, *, required: bool = True) -> Any:
    """What is at a dotted name, None where it or what should hold it is null, or is not there and not `required`.

    Raises BadRecord.
    """
    if not isinstance(record, dict):
        raise BadRecord(at, f"{_kind_of(record)}, and a document is an object with its text in {text_field!r}")
    value, holder = record, ""
    for part in [text_field] if text_field in record else text_field.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise BadRecord(at, f"{holder!r} is {_kind_of(value)}, and holds no field {part!r}")
        if part not in value:
            if not required:
                return None
            inside = f" in {holder!r}" if holder else ""
            there = ", ".join(map(repr, list(value)[:20])) or "none"
            raise BadRecord(at, f"no field {part!r}{inside}; there are: {there}")
        value, holder = value[part], f"{holder}.{part}".lstrip(".")
    return value


def _kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _document_of(name: str, text: str | None, num_bytes: int) -> Item:
    if text is None:
        return LeftOut(name, "null", num_bytes)
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which is no character.
        return LeftOut(name, "not utf-8", num_bytes)
    return Document(name, text) if text else LeftOut(name, "empty")


def document_of_bytes(name: str, content: bytes) -> Item:
    """content: all that is text; a byte order mark is none at the beginning of a file, and text anywhere else."""
    if len(content) > MAX_DOCUMENT_BYTES:
        return LeftOut(name, "too long", len(content))
    if content.startswith(_UTF_16_MARKS):
        return LeftOut(name, "utf-16", len(content))
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return LeftOut(name, "not utf-8", len(content))
    return Document(name, text) if text else LeftOut(name, "empty")


def _is_utf_16(stream: BufferedReader) -> bool:
    """Asked at the beginning of a file, where it stays."""
    return stream.peek(2)[:2] in _UTF_16_MARKS


def _left_out_as_utf_16(part: Part) -> Iterator[Item]:
    """The file as a whole, told once: by the part in which it begins."""
    if part.begin == 0:
        yield LeftOut(part.file.name, "utf-16", part.file.num_bytes)
