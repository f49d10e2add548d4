"""Files that a run cannot decode: told, written down, and known to all ranks."""

from pathlib import Path

from fastsiam.config import Config
from fastsiam.data.skip_list import SkipFile, SkipList
from fastsiam.data.sources.source import ImageSource
from fastsiam.run.metrics import Journal
from fastsiam.runtime.distributed import World


class BadFiles:
    """The skip lists of a run's images; the first rank writes skip.tsv, for the others, too."""

    def __init__(self, config: Config, folder: Path, journal: Journal, world: World):
        self._config, self._folder, self._journal, self._world = config, folder, journal, world
        self._lists: dict[str, SkipList] = {}
        self._sources: dict[str, ImageSource] = {}
        self._untold: list[tuple[str, int, str]] = []

    def skip_list(self, source: ImageSource | None, name: str, location: str | None) -> SkipList | None:
        """The list of a source, which begins with what NAME.tsv says; `location` is for people."""
        if source is None:
            return None
        file = SkipFile(self._folder / f"{name}.tsv", source)

        def report(index, reason, count):
            self._untold.append((name, index, reason))
            if not self._world.is_first:
                return
            try:
                file.add(index, reason)
            except OSError as error:
                self._journal.warn(f"{name}.tsv could not be written ({error.strerror}): a resume will meet it again")
            step = self._journal.state.step
            self._journal.write_plain({"kind": "bad_file", "step": step, "message": reason, "bad_files": count})
            of_all = f"another image takes its place ({count} of {len(source):,})"
            self._journal.say(f"bad file  {reason}; {of_all}", "yellow")

        known = self._world.share(file.known() if self._world.is_first else None)
        found = SkipList(len(source), self._config.data.max_bad_fraction, known, report, location)
        self._lists[name], self._sources[name] = found, source
        return found

    def exchange(self) -> None:
        """What one rank has found is left out by all from now on; raises `UserError` where it is too much.

        All ranks must ask.
        """
        mine, self._untold = self._untold, []
        everybodys = enumerate(self._world.collect(mine))
        with self._world.together():
            for rank, found in everybodys:
                if rank != self._world.rank:
                    for name, index, reason in found:
                        self._lists[name].add({index: reason})
        # Of the others: they have told everybody.
        self._untold.clear()

    def finish(self) -> None:
        """`exchange` for the last time, and tell how many images DALI has left to PIL; all ranks must ask."""
        self.exchange()
        mine = {(name, index) for name, source in self._sources.items() for index in source.converted}
        if converted := len(set().union(*self._world.collect(mine))):
            images = "image" if converted == 1 else "images"
            self._journal.say(f"converted {converted:,} {images} that DALI does not decode")
