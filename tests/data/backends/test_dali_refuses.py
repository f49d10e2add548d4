"""What DALI refuses, or shows otherwise than everybody, and PIL decodes is trained on, and known at the next start."""

import shutil

import numpy as np
import pytest
import torch

from fastsiam.data.backends.choose import open_backend
from fastsiam.data.loader import EvaluationLoader
from fastsiam.data.skip_list import SkipList
from fastsiam.data.sources import index_cache
from fastsiam.data.sources.image_header import ODD, PLAIN
from fastsiam.data.sources.open import open_source
from fastsiam.prepare.pack import pack
from fastsiam.train import main
from tests.support.images import exif_block, smooth
from tests.support.loaders import CPU, SPEC

REFUSED, TURNED, BAD = (1, 5, 6), 3, 9


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, with GIFs, a JPEG whose turn DALI does not see, and half of a JPEG."""
    generator = np.random.default_rng(0)
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(12):
        picture = smooth(generator)
        path = root / f"{number:02}.jpg"
        if number in REFUSED:
            picture.quantize(32).save(path, "GIF")
        elif number == TURNED:
            picture.save(path, quality=90, exif=exif_block(">", 4, 6))
        else:
            picture.save(path, quality=90)
    whole = (root / f"{BAD:02}.jpg").read_bytes()
    (root / f"{BAD:02}.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def believed_plain(location, monkeypatch):
    """A source whose headers hide what DALI cannot do, which only the cache of the next start tells."""
    monkeypatch.setattr(index_cache, "_SETTLED_NS", -(10**18))
    source = open_source(str(location))
    source.look(np.arange(12))
    assert source.kinds[[*REFUSED, TURNED]].tolist() == [ODD] * 4
    source.kinds[:] = PLAIN
    return source


def evaluated(source, batch_size=4):
    opened = open_backend("dali", source, (SPEC.size,), batch_size, 2, CPU)
    told = []
    skip = SkipList(12, 0.5, report=lambda *found: told.append(found))
    made = EvaluationLoader(source, SPEC, opened, batch_size=batch_size, crop_ratio=1.0, dtype=torch.float32, skip=skip)
    batches = list(made.batches())
    opened.close()
    return np.concatenate([b.indices for b in batches]).tolist(), torch.cat([b.images for b in batches]), told


@pytest.mark.parametrize("packed", [False, True])
def test_they_are_decoded_by_pil_and_only_what_pil_refuses_too_is_bad(folder, tmp_path, monkeypatch, packed):
    location = folder
    if packed:
        location = tmp_path / "packed"
        pack(open_source(str(folder)), location, 10**6)
    expected = evaluated(open_source(str(location)))
    source = believed_plain(location, monkeypatch)
    indices, views, told = evaluated(source)
    assert indices == expected[0] == [number for number in range(12) if number != BAD]
    assert torch.equal(views, expected[1])
    assert [found[0] for found in told] == [BAD]
    assert source.converted == {*REFUSED, TURNED}
    if not packed:
        assert open_source(str(location)).kinds[[*REFUSED, TURNED]].tolist() == [ODD] * 4


def test_a_run_says_once_how_many_it_has_converted(tiny, folder, tmp_path, monkeypatch, capsys):
    root = tmp_path / "more"
    shutil.copytree(folder, root)
    (root / f"{BAD:02}.jpg").unlink()
    real = index_cache.read_index

    def read(*arguments, **options):
        found = real(*arguments, **options)
        if found:
            found.kinds[:] = PLAIN
        return found

    believed_plain(folder, monkeypatch)
    source = open_source(str(root))
    source.look(np.arange(11))
    monkeypatch.setattr(index_cache, "read_index", read)
    where = (f"data.train={root}", "data.val=null", "data.backend=dali", "train.epochs=3")
    assert main(["--config", "quickstart", *tiny(*where)]) == 0
    said = capsys.readouterr().out
    assert said.count("converted 4 images that DALI does not decode") == 1
    assert "bad file" not in said
