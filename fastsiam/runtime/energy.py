"""Energy that a GPU uses, by NVML (pynvml of nvidia-ml-py, imported only for a GPU).

Sources: NVIDIA, NVML API Reference, nvmlDeviceGetTotalEnergyConsumption and nvmlDeviceGetPowerUsage.
"""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastsiam.errors import Notice

if TYPE_CHECKING:
    import torch

SAMPLE_SECONDS = 0.1


def kilowatt_hours(joules: float) -> float:
    return joules / 3.6e6


class EnergyMeter:
    """Joules of one GPU since the meter was opened.

    NVML measures a whole card: other processes on it are included, and the rest of the machine is not.
    `description` is the method, "NVML total energy" (the driver's counter, from Volta on) or "NVML power, sampled every
    0.1 s", or "not available (REASON)". Close it, or use it in a `with`.
    """

    def __init__(self, source: "_Counter | _Samples | None", description: str, warn: Callable[[str], None]):
        self.description = description
        self._source, self._warn = source, warn
        self._final: float | None = None

    @classmethod
    def of(cls, device: "torch.device", warn: Callable[[str], None] = warnings.warn) -> "EnergyMeter":
        """Returns the meter of a GPU; of another device, one that measures nothing.

        `warn(notice)` is called at most once, by `joules` or `close`, when the GPU stops answering.
        """
        if device.type != "cuda":
            return cls(None, f"not available ({device.type.upper()} device)", warn)
        try:
            import pynvml
        except ImportError:
            return cls(None, "not available (nvidia-ml-py is not installed)", warn)
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return cls(None, f"not available (NVML: {error})", warn)
        source, description = _open(pynvml, device)
        if source is None:
            _shut_down(pynvml)
        return cls(source, description, warn)

    def joules(self) -> float | None:
        """Returns the joules since the meter was opened, or until `close`; None where not available. No host sync.

        A GPU that stops answering (lost, driver loaded again) is not an error: `warn` is called, and the result is None
        from then on.
        """
        if self._source is None:
            return self._final
        try:
            return self._source.joules()
        except _LostError as error:
            self._end()
            self._warn(Notice(f"the energy of the GPU is no longer measured: {error}", "energy-lost"))
            return None

    def close(self) -> None:
        """Stops measuring; `joules` keeps its last value."""
        if self._source is not None:
            self._final = self.joules()
            self._end()

    def __enter__(self) -> "EnergyMeter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _end(self):
        source, self._source = self._source, None
        if source is not None:
            source.close()
            _shut_down(source.nvml)


class _LostError(Exception):
    """The GPU has stopped answering; the text is the reason."""


class _Counter:
    """The driver's counter of millijoules. `nvml` is the module pynvml, initialised."""

    def __init__(self, nvml, handle):
        self.nvml, self._handle = nvml, handle
        self._first = self._last = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self) -> float:
        try:
            now = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self.nvml.NVMLError as error:
            raise _LostError(f"NVML: {error}") from error
        if now < self._last:
            # The counter starts at 0 when the driver is loaded.
            raise _LostError("its counter went backwards, so the driver was loaded again")
        self._last = now
        return (now - self._first) / 1000

    def close(self) -> None:
        pass


class _Samples:
    """Integral of power by the trapezoidal rule, sampled by a thread.

    From Ampere on, except GA100, NVML's power is a mean over one second, which only delays the integral.
    """

    def __init__(self, nvml, handle):
        self.nvml, self._handle = nvml, handle
        self._watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        self._time = time.monotonic()
        self._joules = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastsiam energy", daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Takes a sample, and returns the energy until now."""
        try:
            with self._lock:
                watts, now = self.nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000, time.monotonic()
                self._joules += (self._watts + watts) / 2 * (now - self._time)
                self._watts, self._time = watts, now
                return self._joules
        except self.nvml.NVMLError as error:
            raise _LostError(f"NVML: {error}") from error

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self):
        while not self._closed.wait(SAMPLE_SECONDS):
            try:
                self.joules()
            except _LostError:
                # The thread that asks next meets the same error, or one sample that spans the gap.
                continue


def _open(nvml, device):
    """Returns the source of a GPU's energy, None where there is none, and its description."""
    try:
        handle = nvml_handle(nvml, device)
    except nvml.NVMLError as error:
        return None, f"not available (NVML does not find the GPU: {error})"
    if handle is None:
        return None, "not available (a MIG instance has no energy of its own, only its card)"
    try:
        return _Counter(nvml, handle), "NVML total energy"
    except nvml.NVMLError as error:
        refused = error
    try:
        return _Samples(nvml, handle), f"NVML power, sampled every {SAMPLE_SECONDS:g} s"
    except nvml.NVMLError as error:
        return None, f"not available (NVML, total energy: {refused}; power: {error})"


def nvml_handle(nvml, device: "torch.device"):
    """Returns NVML's handle of a device of torch, found by its UUID; None for a MIG instance."""
    import torch

    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        # CUDA has the UUID of the instance, to which NVML gives another prefix; raises where it is neither.
        nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return None
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        # Most cards do not support MIG.
        return handle
    return None if current == nvml.NVML_DEVICE_MIG_ENABLE else handle


def _shut_down(nvml):
    # A lost GPU may refuse this as well. NVML counts its users: others may still have it open.
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlShutdown()
