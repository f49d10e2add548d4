"""Walk over the image files below a folder, with a count by reason of the excluded files."""

import errno
import functools
import os
import random
import re
import stat
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fastsiam.data.sources import excluded
from fastsiam.data.sources.formats import BEGINNING, IMAGE, NAMELESS, by_beginning, by_extension, extension_of, is_image

# Folders and files that systems make for themselves, in lower case: Synology, QNAP and NetApp; Windows; macOS, on disks
# of others and in archives; Linux and Python.
_SYSTEM_NAMES = """
@eadir|@tmp|@sharebin|#recycle|#snapshot|@recycle|@recently-snapshot|@__thumb|~snapshot
$recycle.bin|recycler|recycled|system volume information|found.000|thumbs.db|thumbs.db:encryptable|ehthumbs.db
ehthumbs_vista.db|desktop.ini|picasa.ini|zbthumbnail.info|pspbrwse.jbf
__macosx|network trash folder|temporary items|thevolumesettingsfolder|icon\r
lost+found|aquota.user|aquota.group|__pycache__
"""
_SYSTEM = frozenset(re.split(r"[|\n]", _SYSTEM_NAMES.strip("\n")))
# Beginnings of hidden ones: macOS, on disks of others; trash and thumbnails of desktops and phones; NAS and NFS;
# programs that synchronise folders.
_HIDDEN_NAMES = """
._ .ds_store .appledouble .appledb .appledesktop .spotlight-v100 .fseventsd .trashes .temporaryitems
.documentrevisions-v100 .volumeicon.icns .apdisk .localized
.trash .directory .thumb .picasa .comments .ipynb_checkpoints
.@ .snapshot .zfs .nfs .fuse_hidden .sync .stfolder .stversions .dropbox
"""
_HIDDEN = tuple(_HIDDEN_NAMES.split())
# Ends of files that Windows and Synology write beside a file.
_SYSTEM_ENDS = (":zone.identifier", "@synoeastream", "@synoresource")
# Ends of unfinished downloads and copies, and of editors' backup copies.
_UNFINISHED = (".crdownload", ".part", ".partial", ".filepart", ".download", ".aria2", ".tmp")
_COPIES = (".bak", ".orig", ".old", "_original", ".swp")

# Most unknown extensions that are counted separately.
_EXTENSIONS = 100
# Number of files opened of one unknown extension, drawn at random; where they differ, all are opened. A kind that is
# one in a thousand is missed in one draw of eight.
_OPENED = 2000
_READERS = 8
# Most places that could not be read and are checked again before a list is read from the cache.
_REMEMBERED = 1000


class Directory(NamedTuple):
    """State of a folder that changes where a file is added, removed or renamed."""

    name: str
    """Relative to the root, "" for the root itself."""
    mtime_ns: int
    inode: int


class Walk:
    """Listing of the folder `root`; iterating yields relative names and sizes in bytes of the image files.

    Reads each folder once. Folders that are links come last, so that the names do not depend on the file system's
    order. Raises `OSError` where `root` itself cannot be listed.
    """

    def __init__(self, root: Path):
        self.directories: list[Directory] = []
        """Every folder that was read, in its state before."""
        self.excluded: Counter[str] = Counter()
        """Counts by a reason of `fastsiam.data.sources.excluded`; complete at the end of the iteration."""
        self.closed: list[str] = []
        """Up to a thousand dead links and unreadable names; no mtime changes where they become readable."""
        self._root = root
        self._known = by_extension()
        self._links: list[str] = []
        self._unknown: dict[str, list[tuple[str, int]]] = {}

    def __iter__(self) -> Iterator[tuple[str, int]]:
        seen = set()
        folders = [""]
        while folders or self._links:
            if not folders:
                self._links.sort(reverse=True)
            folder, images = folders.pop() if folders else self._links.pop(), []
            try:
                status = os.stat(os.path.join(self._root, folder))
                if (status.st_dev, status.st_ino) in seen:
                    self.excluded[excluded.SEEN] += 1
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(os.path.join(self._root, folder)) as entries:
                    self.directories.append(Directory(folder, status.st_mtime_ns, status.st_ino))
                    self._read(f"{folder}/" if folder else "", entries, folders, images)
            except OSError as error:
                if not folder:
                    raise
                self._exclude_name(folder, error, excluded.FOLDERS)
            yield from images
        yield from self._by_beginning()

    def _read(self, prefix, entries, folders, images):
        """Adds the folders and images of a folder to the lists."""
        known = self._known
        for entry in entries:
            name = entry.name
            try:
                if name[0] == ".":
                    self._hidden(entry)
                elif entry.is_dir():
                    if name.lower() in _SYSTEM:
                        self.excluded[excluded.SYSTEM] += 1
                    else:
                        (self._links if entry.is_symlink() else folders).append(prefix + name)
                elif known.get(name[name.rfind(".") :].lower()) is IMAGE and entry.is_file():
                    images.append((prefix + name, entry.stat().st_size))
                else:
                    self._other(prefix + name, entry)
            except OSError as error:
                self._exclude_name(prefix + name, error, excluded.FILES)

    def _hidden(self, entry):
        if entry.name.lower().startswith(_HIDDEN):
            self.excluded[excluded.SYSTEM] += 1
        else:
            self.excluded[excluded.HIDDEN_FOLDERS if entry.is_dir() else excluded.HIDDEN_FILES] += 1

    def _other(self, name, entry):
        """Counts a file that is not an image by its name; raises `OSError`."""
        last = entry.name.lower()
        extension = extension_of(last)
        reason = self._known.get(extension)
        if last in _SYSTEM or last.endswith(_SYSTEM_ENDS):
            reason = excluded.SYSTEM
        elif extension.endswith(_UNFINISHED):
            reason = excluded.UNFINISHED
        elif extension.endswith(_COPIES) or last.endswith("~"):
            reason = excluded.COPIES
        elif extension == ".gz" and is_image(last[:-3]):
            reason = excluded.GZIPPED
        elif reason in (None, IMAGE):
            # Raises where a link leads nowhere.
            status = os.stat(os.path.join(self._root, name))
            if stat.S_ISREG(status.st_mode):
                known = len(self._unknown) < _EXTENSIONS or extension in self._unknown
                self._unknown.setdefault(extension if known else NAMELESS, []).append((name, status.st_size))
                return
            reason = excluded.DEVICES
        self.excluded[reason] += 1

    def _exclude_name(self, name, error, what):
        """Counts a name that could not be read; `what`: FILES or FOLDERS."""
        path = os.path.join(self._root, name)
        if error.errno == errno.ENOENT:
            # A name that is not a link has disappeared since its folder was read.
            reason = excluded.DEAD_LINKS if os.path.islink(path) else excluded.GONE
        elif error.errno == errno.ELOOP:
            reason = excluded.LOOPS
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason = f"{what} that may not be read"
        else:
            reason = f"{what} that cannot be read ({os.strerror(error.errno or errno.EIO)})"
        self.excluded[reason] += 1
        if reason != excluded.GONE and len(self.closed) < _REMEMBERED:
            self.closed.append(name)

    def _by_beginning(self):
        """Yields files that are images by their first bytes, and counts the others."""
        with ThreadPoolExecutor(_READERS) as pool:
            for extension, files in self._unknown.items():
                look = functools.partial(self._look, extension)
                opened = files if len(files) <= _OPENED else random.Random(0).sample(files, _OPENED)
                verdicts = list(pool.map(look, opened))
                if len(opened) < len(files):
                    alike = len(set(verdicts)) == 1
                    verdicts = verdicts[:1] * len(files) if alike else pool.map(look, files)
                for file, verdict in zip(files, verdicts, strict=True):
                    if verdict is IMAGE:
                        yield file
                    elif isinstance(verdict, OSError):
                        self._exclude_name(file[0], verdict, excluded.FILES)
                    else:
                        self.excluded[verdict] += 1

    def _look(self, extension, file):
        """Returns IMAGE, a reason to exclude the file, or the error of reading it."""
        try:
            with open(os.path.join(self._root, file[0]), "rb", buffering=0) as opened:
                return by_beginning(opened.read(BEGINNING), extension)
        except OSError as error:
            return error


def is_system(name: str) -> bool:
    """True for names of files and folders that systems create; they are neither images nor classes."""
    name = name.lower()
    return name.startswith(_HIDDEN) or name in _SYSTEM or name.endswith(_SYSTEM_ENDS)


def is_still_closed(root: Path, name: str) -> bool:
    """True where a name still cannot be read."""
    return not os.access(os.path.join(root, name), os.R_OK)
