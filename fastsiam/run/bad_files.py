"""Records images that fail to decode and shares the list across ranks."""

from pathlib import Path

from fastsiam.data.skip_list import SkipFile, SkipList
from fastsiam.data.sources.source import ImageSource
from fastsiam.errors import Notice
from fastsiam.run.metrics import Journal
from fastsiam.runtime.distributed import World


class BadFiles:
    """The lists of excluded images of a run; the first rank writes skip.tsv for all."""

    def __init__(self, max_fraction: float, folder: Path, journal: Journal, world: World):
        """`max_fraction`: share of the images of a source above which `UserError` ends the run."""
        self._max_fraction, self._folder, self._journal, self._world = max_fraction, folder, journal, world
        self._lists: dict[str, SkipList] = {}
        self._sources: dict[str, ImageSource] = {}
        self._unshared: list[tuple[str, int, str]] = []

    def skip_list(self, source: ImageSource | None, name: str, location: str | None) -> SkipList | None:
        """The list of a source, which begins with the images in NAME.tsv; `location` is for messages."""
        if source is None:
            return None
        file = SkipFile(self._folder / f"{name}.tsv", source)

        def report(index, reason, count):
            self._unshared.append((name, index, reason))
            if not self._world.is_first:
                return
            try:
                file.add(index, reason)
            except OSError as error:
                text = f"cannot write {name}.tsv ({error.strerror}); a resumed run will meet the file again"
                self._journal.warn(Notice(text, "skip-file-unwritten"))
            self._journal.write_at_step("bad_file", message=reason, bad_files=count)
            of_all = f"another image takes its place ({count} of {len(source):,})"
            self._journal.say(f"bad file  {reason}; {of_all}", "yellow")

        known = self._world.share(file.known() if self._world.is_first else None)
        found = SkipList(len(source), self._max_fraction, known, report, location)
        self._lists[name], self._sources[name] = found, source
        return found

    def exchange(self) -> None:
        """Exclude on all ranks what one of them has found; raises `UserError` above the limit. All ranks must call."""
        mine, self._unshared = self._unshared, []
        everybodys = enumerate(self._world.collect(mine))
        with self._world.together():
            for rank, found in everybodys:
                if rank != self._world.rank:
                    for name, index, reason in found:
                        self._lists[name].add({index: reason})
        # Adding the others' has reported them here once more.
        self._unshared.clear()

    def finish(self) -> None:
        """`exchange` for the last time, and print how many images DALI has left to PIL; all ranks must call."""
        self.exchange()
        mine = {(name, index) for name, source in self._sources.items() for index in source.converted}
        if converted := len(set().union(*self._world.collect(mine))):
            images = "image" if converted == 1 else "images"
            self._journal.say(f"converted {converted:,} {images} that DALI does not decode")
