#!/usr/bin/env bash
# TensorBoard reads the event files of a folder in the order of their names, and compares the second, the process and
# the count in a name as text. So the eleventh file that a process starts is read before its third if both are of one
# second, and what is to come last in a run, such as the mark of a restart that takes points back, comes before.
#
# Needs Python 3.11 or later; installs tensorboard 2.21.0 into a temporary folder (PY=PYTHON uses one that has it).
# Exits 0 while TensorBoard behaves as described. Seen with tensorboard 2.21.0:
#   tensorboard 2.21.0
#   12 files written in the order [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
#   read in the order             [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
# Way round it: start a file in a later second than the last one of its folder.
set -euo pipefail
if [ -z "${PY:-}" ]; then
  folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q tensorboard==2.21.0 setuptools
fi
"$PY" - <<'P'
import logging
import sys
import tempfile
import time
from importlib.metadata import version

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

logging.disable(logging.WARNING)
print("tensorboard", version("tensorboard"))
with tempfile.TemporaryDirectory() as folder:
    time.sleep(1 - time.time() % 1)
    for file in range(12):
        writer = EventFileWriter(folder)
        value = Summary.Value(tag="file", simple_value=float(file))
        writer.add_event(Event(wall_time=time.time(), step=file, summary=Summary(value=[value])))
        writer.close()
    shown = EventAccumulator(folder, purge_orphaned_data=False)
    shown.Reload()
    read = [point.step for point in shown.Scalars("file")]
print("12 files written in the order", list(range(12)))
print("read in the order            ", read)
sys.exit(0 if read == [0, 1, 10, 11, *range(2, 10)] else 1)
P
