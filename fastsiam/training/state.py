"""Position of a run in its data and its budget."""

from dataclasses import dataclass


@dataclass
class State:
    """Position of a run; a checkpoint holds it."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    """Images of this epoch that finished steps have consumed, over all ranks."""
    images_seen: int = 0
    progress: float = 0.0
    """The share of the budget that is spent; every schedule is a function of it."""
    epoch_progress: float = 0.0
    """Progress when this epoch began."""
    train_seconds: float = 0.0
    """Spent waiting for data and stepping; evaluation and saving not counted."""
    wall_seconds: float = 0.0
    evaluation_cost: float | None = None
    """Cost of the last kNN, or spectrum without labels, in the unit of the budget, where that is time or energy."""
    save_cost: float | None = None
    """Cost of the last checkpoint, in the unit of the budget where that is energy, otherwise in seconds."""
    untrained_knn: float | None = None
    raw_pixels_knn: float | None = None
    knn: float | None = None
    """kNN top-1 in percent, as last measured, after step `knn_step`."""
    knn_step: int | None = None

    def advance(self, batch_size: int) -> None:
        self.step += 1
        self.cursor += batch_size
        self.images_seen += batch_size

    def next_epoch(self) -> None:
        self.epoch += 1
        self.cursor = 0
        self.epoch_progress = self.progress

    def where(self) -> dict[str, int | float]:
        """The fields with which most lines of metrics.jsonl begin."""
        names = ("step", "epoch", "images_seen", "train_seconds", "wall_seconds")
        return {name: getattr(self, name) for name in names}
