"""Energy that a GPU uses, by NVML (`import pynvml`, from nvidia-ml-py); nothing is imported before a GPU is asked for.

Sources: NVIDIA, NVML API Reference, nvmlDeviceGetTotalEnergyConsumption and nvmlDeviceGetPowerUsage.
"""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLE_SECONDS = 0.1


def kilowatt_hours(joules: float) -> float:
    return joules / 3.6e6


class EnergyMeter:
    """Joules of one GPU since the meter was opened.

    NVML measures a card: what other processes on it use is in the number, and what the rest of the machine uses is not.
    `description` says how it is measured, or why it is not: "NVML total energy" (the driver's counter, from Volta on),
    "NVML power, sampled every 0.1 s" or "not available (REASON)". Close it, or use it in a `with`.
    """

    def __init__(self, source: "_Counter | _Samples | None", description: str, warn: Callable[[str], None]):
        self.description = description
        self._source, self._warn = source, warn
        self._final: float | None = None

    @classmethod
    def of(cls, device: "torch.device", warn: Callable[[str], None] = warnings.warn) -> "EnergyMeter":
        """A meter of the GPU that `device` is to this process; of another device, one that measures nothing.

        `warn(sentence)` is called at most once, by `joules` or `close`, when the GPU stops answering.
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
        """Since the meter was opened, until now or until `close`; None where not available. No host sync.

        A GPU that stops answering (lost, driver loaded again) is no error: `warn` is told, and from then on it is None.
        """
        if self._source is None:
            return self._final
        try:
            return self._source.joules()
        except _LostError as error:
            self._end()
            self._warn(f"the energy of the GPU is no longer measured: {error}")
            return None

    def close(self) -> None:
        """Stop measuring; `joules` stays what it was."""
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
    """The GPU does not answer any more; the text says why."""


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
            # It counts since the driver was loaded.
            raise _LostError("its counter went backwards, so the driver was loaded again")
        self._last = now
        return (now - self._first) / 1000

    def close(self) -> None:
        pass


class _Samples:
    """The integral over power, by the trapezoidal rule; a thread samples once `start` is called.

    From Ampere on (but for GA100) NVML's power is a mean over one second, which delays the integral, no more.
    """

    def __init__(self, nvml, handle):
        self.nvml, self._handle = nvml, handle
        self._watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        self._time = time.monotonic()
        self._joules = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastsiam energy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def joules(self) -> float:
        """Takes a sample as well, so that it is the energy until now."""
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
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self):
        while not self._closed.wait(SAMPLE_SECONDS):
            try:
                self.joules()
            except _LostError:
                # For the thread that asks next: it meets the same error, or one sample that spans the gap.
                continue


def _open(nvml, device):
    """What measures a GPU, and its description; None where nothing does."""
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
        samples = _Samples(nvml, handle)
    except nvml.NVMLError as error:
        return None, f"not available (NVML, total energy: {refused}; power: {error})"
    samples.start()
    return samples, f"NVML power, sampled every {SAMPLE_SECONDS:g} s"


def nvml_handle(nvml, device: "torch.device"):
    """NVML's handle of torch's device, by UUID, for NVML numbers all GPUs of a machine; None for a MIG instance."""
    import torch

    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        # CUDA gives the UUID of the instance, which NVML knows by another prefix; raises where it is neither.
        nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return None
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        # Most cards know no MIG.
        return handle
    return None if current == nvml.NVML_DEVICE_MIG_ENABLE else handle


def _shut_down(nvml):
    # A GPU that is lost may refuse this as well; NVML counts who has opened it, and others may have.
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlShutdown()
