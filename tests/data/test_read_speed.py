"""Speed of reading a folder past the page cache, and the file system that it lies on."""

import tarfile

import pytest

from fastsiam.data import read_speed

MOUNTS = """
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /data rw shared:7 - nfs4 server:/data rw
31 30 0:41 / /data/local\\040disk rw - xfs /dev/nvme rw
34 30 0:44 / /data/tab\\011stop rw - btrfs /dev/nvme rw
32 22 0:42 / /home rw - ext4 /dev/vdb rw
33 22 0:43 / /home rw - fuse.sshfs host:/ rw
"""


@pytest.mark.parametrize(
    ("path", "filesystem"),
    [
        ("/data/imagenet", "nfs4"),
        ("/data", "nfs4"),
        ("/database", "ext4"),
        ("/data/local disk/x", "xfs"),
        ("/data/tab\tstop/x", "btrfs"),
        ("/home/me", "fuse.sshfs"),
    ],
)
def test_the_file_system_of_a_path(path, filesystem):
    assert read_speed.filesystem_of(path, MOUNTS.strip()) == filesystem


def test_all_images_are_read_past_the_cache(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for number in range(20):
        (tmp_path / "a" / f"{number}.JPG").write_bytes(b"x" * (1000 + number))
    (tmp_path / "a" / "notes.txt").write_bytes(b"x" * 10**6)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    advice = []
    monkeypatch.setattr(read_speed.os, "posix_fadvise", lambda *given: advice.append(given[1:]))
    speed = read_speed.measure(tmp_path, threads=3, seconds=60.0)
    assert (speed.files, speed.num_bytes, speed.kind, speed.threads) == (20, 20 * 1000 + 190, "images", 3)
    assert speed.mean_image_bytes == pytest.approx(1009.5)
    assert advice == [(0, 0, read_speed.os.POSIX_FADV_DONTNEED)] * 20


def test_reading_ends_when_its_time_is_over(tmp_path, monkeypatch):
    """A clock that moves by a second a look: one thread begins 2 files of 3 MiB and comes to the second's middle."""
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(3 << 20))
    seconds = iter(range(1000))
    monkeypatch.setattr(read_speed.time, "perf_counter", lambda: float(next(seconds)))
    speed = read_speed.measure(tmp_path, threads=1, seconds=8.0)
    assert speed.files == 1
    assert 3 << 20 < speed.num_bytes < 6 << 20


def test_shards_count_by_their_images(tmp_path):
    for number, image in enumerate((2000, 4000)):
        (tmp_path / "image.jpg").write_bytes(bytes(image))
        (tmp_path / "label.cls").write_bytes(b"7")
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as tar:
            tar.add(tmp_path / "image.jpg", "k.jpg")
            tar.add(tmp_path / "image.jpg", "l.jpg")
            tar.add(tmp_path / "label.cls", "k.cls")
    (tmp_path / "image.jpg").unlink()
    speed = read_speed.measure(tmp_path, threads=2)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert (speed.files, speed.num_bytes, speed.kind) == (2, total, "shards")
    assert speed.mean_image_bytes in (2000, 4000)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    speed = read_speed.measure(tmp_path, threads=2)
    assert (speed.files, speed.num_bytes, speed.kind) == (0, 0, "nothing")


def test_network_file_systems():
    names = ("nfs4", "lustre", "9p", "fuse.sshfs", "fuse.gcsfuse", "ext4", "overlay", "tmpfs", "fuse.fuse-overlayfs")
    assert tuple(name for name in names if read_speed.is_network(name)) == names[:5]
