"""What wandb has written offline, which its 0.31 has no reader for: LevelDB's log format, after a header of 7 bytes."""

import json
import struct

_BLOCK = 32768


def records(path):
    """The protobuf records of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if _BLOCK - place % _BLOCK < 7:
            # Too little room for a header: padding.
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        # 1: a whole record, 2, 3, 4: its first, a middle, its last part.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values(items):
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
