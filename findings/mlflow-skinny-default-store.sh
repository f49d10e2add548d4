#!/usr/bin/env bash
# mlflow-skinny 3.17.2 cannot log one metric on the machine it is installed on, and its messages lead in a circle. Its
# default store is a SQLite file, which this package cannot open; the message speaks of a model registry, which nobody
# asked for, and names "file" as supported. A folder is refused too, in favour of SQLite. Only the last sentence of that
# second message leads out: it names an environment variable.
#
# Needs Python 3.11 or later; installs mlflow-skinny 3.17.2 into a temporary folder. Exits with 1 once any of the three
# lines differs. Seen with Python 3.11 (messages cut by the script):
#   mlflow-skinny 3.17.2
#   default store: UnsupportedModelRegistryStoreURIException: Model registry functionality is unavailable; got
#   unsupported URI 'sqlite:////FOLDER/mlflow.db' for model registry data storage. Supported URI schemes are: ['',
#   'file', 'databricks', 'databricks-uc', 'uc', 'http', 'https'].
#   file store: MlflowException: The filesystem tracking backend (e.g., './mlruns') is in maintenance mode and will not
#   receive further updates. Please migrate to a database backend (e.g., 'sqlite:///mlflow.db') to access the latest
#   MLflow features.
#   file store, MLFLOW_ALLOW_FILE_STORE=true: logged 1.0
# The ways round it: that variable, a server (http), or the package mlflow in place of mlflow-skinny.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q mlflow-skinny==3.17.2
export MLFLOW_DISABLE_TELEMETRY=true
unset MLFLOW_TRACKING_URI MLFLOW_REGISTRY_URI MLFLOW_ALLOW_FILE_STORE MLFLOW_RUN_ID MLFLOW_EXPERIMENT_ID
cat > "$work/log.py" <<'P'
import os
import sys

import mlflow

if len(sys.argv) > 2:
    mlflow.set_tracking_uri(sys.argv[2])
try:
    with mlflow.start_run() as run:
        mlflow.log_metric("loss", 1.0)
    said = f"logged {mlflow.get_run(run.info.run_id).data.metrics['loss']}"
except Exception as error:
    said = f"{type(error).__name__}: {str(error).strip()}".replace(os.getcwd(), "/FOLDER")
    for end in (" See https", " The `mlflow migrate"):
        said = said.split(end)[0]
print(f"{sys.argv[1]}: {said}")
P
mkdir "$work/here"
cd "$work/here"
python=$work/venv/bin/python
"$python" -c 'from importlib.metadata import version; print("mlflow-skinny", version("mlflow-skinny"))'
{
  "$python" "$work/log.py" "default store" 2>>"$work/log"
  "$python" "$work/log.py" "file store" "file:mlruns" 2>>"$work/log"
  export MLFLOW_ALLOW_FILE_STORE=true
  "$python" "$work/log.py" "file store, MLFLOW_ALLOW_FILE_STORE=true" "file:mlruns" 2>>"$work/log"
} | tee "$work/said"
grep -q "^default store: .*unsupported URI 'sqlite:.*'file'" "$work/said" &&
  grep -q "^file store: .*Please migrate to .*'sqlite:" "$work/said" &&
  grep -q "STORE=true: logged 1.0$" "$work/said"
