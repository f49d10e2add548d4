"""Fresh interpreters and torchrun jobs in the repository."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

# Fails the import of torch, whoever asks for it.
MASKED = """
import sys
class Mask:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ImportError("torch is masked")
sys.meta_path.insert(0, Mask())
from fastsiam.train import main
sys.exit(main(sys.argv[1:]))
"""

REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def torchrun(*arguments, module="fastsiam.train", restarts=0, **environment):
    """Two workers of `module`; the agent's process, which is killed with its workers where a test leaves it alive."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", module, "--config", "quickstart", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def run_python(*arguments, wait=True, **environment):
    """A fresh interpreter in the repository with one thread; CompletedProcess, or Popen where not to wait."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    start = subprocess.run if wait else subprocess.Popen
    more = {"timeout": 300} if wait else {}
    return start(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
    )
