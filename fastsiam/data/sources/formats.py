"""Formats that the installed decoders read, by extension, or by the first bytes where the extension is unknown.

An image is a file that Pillow decodes by itself into one picture, or by its plugins for HEIC, AVIF and JPEG XL. Some
formats that Pillow opens are excluded: vector graphics, which other programs draw (EPS, WMF); films, of which it reads
only the header (MPEG); containers of measurements without a decoder (HDF5, GRIB, BUFR); and formats whose extension
usually means something else (point clouds `.pcd`, circuit boards `.gbr`, activities `.fit`). Camera raws and slides of
microscopes begin as a TIFF does, but Pillow finds a thumbnail in them, or too many pixels: they are excluded with
advice. Imports no torch.
"""

import contextlib
import re
from functools import cache
from importlib import import_module, util

import PIL
from PIL import Image, features

IMAGE = "image"
"""Result of `by_extension` and `by_beginning` for a file that can be decoded."""
NAMELESS = "files without a usual extension"
# Number of first bytes for `by_beginning`.
BEGINNING = 32

# Module, function that registers it ("" where the import does), and the format that it adds.
_PLUGINS = (
    ("pillow_heif", "register_heif_opener", "HEIF"),
    ("pi_heif", "register_heif_opener", "HEIF"),
    ("pillow_jxl", "", "JXL"),
    ("pillow_avif", "", "AVIF"),
)
# Pillow's formats that are one picture and decoded in the process itself.
_FORMATS = """
AVIF BLP BMP CUR DCX DDS DIB FITS FLI GIF HEIF ICNS ICO JPEG JPEG2000 JXL MPO PCX PNG PPM PSD QOI SGI SUN TGA TIFF WEBP
XBM XPM
"""
# Most files of these names are something else; images of Silicon Graphics are detected by their first bytes.
_AMBIGUOUS = (".bw", ".fit", ".icb", ".rgb", ".rgba", ".vda", ".vst")
# Features that Pillow may be built without.
_FEATURES = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
_NEWER = "pip install --upgrade pillow"
_CURES = {
    "pip install pillow-heif": ".heic .heif .hif .heics .heifs",
    "pip install pillow-jxl-plugin": ".jxl",
    _NEWER: ".avif .avifs .jfif .jp2 .jpe .j2k .jpc .jpf .jpx .j2c .qoi .webp",
    "convert them to .jpg": ".3fr .arw .cr2 .cr3 .crw .dng .erf .fff .iiq .kdc .mrw .nef .nrw .orf .pef .raf .rw2 "
    ".rwl .sr2 .srf .srw .x3f",
    "convert them to .png": ".ai .bpg .cdr .djv .djvu .emf .eps .jls .jxr .kra .svg .svgz .wdp .wmf .xcf",
    "convert them to .tif": ".dcm .dicom .exr .mha .mhd .nii .nrrd",
    "cut them into tiles": ".bif .czi .mrxs .ndpi .scn .svs .vsi",
}
# Texts and tables; programs; arrays and weights; archives; sound, films and shapes; fonts and checksums.
_NO_IMAGES = """
.aae .bib .cfg .conf .css .csv .doc .docx .epub .geojson .htm .html .ini .json .jsonl .log .md .ndjson .ods .odt .pdf
.ppt .pptx .ps .rst .rtf .tex .toml .tsv .txt .xls .xlsx .xml .xmp .yaml .yml
.bash .bat .c .cc .cmd .cpp .dll .exe .go .h .hpp .ipynb .jar .java .js .lnk .lua .m .o .php .pl .py .pyc .r .rb .rs .sh
.so .sql .ts .url .webloc
.arrow .beton .bson .ckpt .db .feather .gguf .h5 .hdf .hdf5 .idx .lmdb .mat .mdb .msgpack .nc .npy .npz .onnx .parquet
.pb .pickle .pkl .pt .pth .rec .safetensors .sqlite .tfrecord .zarr
.7z .bz2 .gz .iso .rar .tar .tbz .tgz .txz .xz .zip .zst
.aac .avi .flac .m2ts .m4a .m4v .mid .mkv .mov .mp3 .mp4 .mpeg .mpg .mts .ogg .opus .srt .vtt .wav .webm .wma .wmv
.dbf .gbr .glb .gltf .kml .las .laz .mtl .obj .off .pcd .ply .prj .shp .shx .stl
.asc .md5 .otf .sha1 .sha256 .sig .ttf .woff .woff2
"""

# Brands of ISO files (ISO/IEC 23008-12, AV1 Image File Format), as first or compatible brand.
_BRANDS = {
    b"avif": ("AVIF", ".avif"), b"avis": ("AVIF", ".avif"), b"heic": ("HEIF", ".heic"), b"heix": ("HEIF", ".heic"),
    b"hevc": ("HEIF", ".heic"), b"hevx": ("HEIF", ".heic"), b"heim": ("HEIF", ".heic"), b"heis": ("HEIF", ".heic"),
}  # fmt: skip
# Texts may begin with short signatures, so more is checked: of a bitmap its empty fields and the size of its header, of
# a portable pixmap a number.
_SIGNATURES = tuple(
    (re.compile(pattern, re.DOTALL), kind, extension)
    for pattern, kind, extension in (
        (rb"\xff\xd8\xff", "JPEG", ".jpg"),
        (rb"\x89PNG\r\n\x1a\n", "PNG", ".png"),
        (rb"GIF8[79]a", "GIF", ".gif"),
        (rb"RIFF....WEBP", "WEBP", ".webp"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF", ".tif"),
        (rb"BM....\0\0\0\0....[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP", ".bmp"),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51\0", "JPEG2000", ".jp2"),
        (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "JXL", ".jxl"),
        (rb"P[1-6]\s+(#|\d+\s)", "PPM", ".ppm"),
        (rb"8BPS\0\x01", "PSD", ".psd"),
        (rb"DDS \x7c\0\0\0", "DDS", ".dds"),
        (rb"qoif", "QOI", ".qoi"),
        (rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]", "SGI", ".sgi"),
        (rb"\x59\xa6\x6a\x95", "SUN", ".ras"),
        (rb"SIMPLE  = ", "FITS", ".fits"),
    )
)


@cache
def register_plugins() -> None:
    """Registers the installed plugins of Pillow; it finds its own by itself."""
    for module, function, kind in _PLUGINS:
        if (kind == "AVIF" and features.check("avif")) or util.find_spec(module) is None:
            continue
        # Pillow's own come first, or they would replace a plugin for the same format.
        Image.init()
        # A plugin that fails to load is treated as missing: its files are excluded with advice.
        with contextlib.suppress(Exception):
            plugin = import_module(module)
            if function:
                getattr(plugin, function)()


@cache
def decoders() -> str:
    """Returns Pillow's version and its formats in words; they decide which files are read."""
    return " ".join([f"Pillow {PIL.__version__}", *sorted(_readable() - {"MPO", "DIB"})])


@cache
def by_extension() -> dict[str, str]:
    """Returns IMAGE or the reason to exclude such a file, by extension in lower case with its dot.

    Files of other extensions are judged by their first bytes.
    """
    known = {extension: extension for extension in _NO_IMAGES.split()}
    known |= {extension: f"{extension} ({cure})" for cure, names in _CURES.items() for extension in names.split()}
    readable = _readable()
    for extension, kind in Image.registered_extensions().items():
        if kind in readable and extension not in _AMBIGUOUS:
            known[extension] = IMAGE
    return known


def by_beginning(data: bytes, otherwise: str) -> str:
    """Returns IMAGE where a file's first BEGINNING bytes are of a readable format, else the reason to exclude it.

    `otherwise`: the reason where they are not those of an image, mostly the file's extension.
    """
    kind, extension = format_of(data)
    if kind is None:
        return otherwise
    reason = by_extension().get(extension, extension)
    return IMAGE if kind in _readable() else reason


def begins_as_image(data: bytes) -> bool:
    """True where a file's bytes begin as those of a readable format."""
    return format_of(data[:BEGINNING])[0] in _readable()


def cure_of(data: bytes) -> str:
    """Returns `.heic (pip install pillow-heif)` for a format whose decoder is not installed; "" for others."""
    kind, extension = format_of(data)
    return "" if kind is None or kind in _readable() else by_extension().get(extension, "")


def format_of(data: bytes) -> tuple[str | None, str]:
    """Returns Pillow's name of the format that a file begins as, and its usual extension; (None, "") for no image."""
    if data[4:8] == b"ftyp":
        brands = [data[8:12], *(data[place : place + 4] for place in range(16, len(data), 4))]
        # `mif1` is any still image; one of AV1 says so beside it.
        image = ("HEIF", ".heic") if b"mif1" in brands else (None, "")
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), image)
    return next(((kind, extension) for pattern, kind, extension in _SIGNATURES if pattern.match(data)), (None, ""))


def is_image(name: str) -> bool:
    """True where a file of this name is an image by its extension."""
    return by_extension().get(extension_of(name)) is IMAGE


def extension_of(name: str) -> str:
    """Returns a name's extension in lower case; NAMELESS where there is none (`holiday.12`)."""
    match = re.search(r"\.\d?[a-z][a-z0-9_]{0,15}$", name.lower())
    return match[0] if match else NAMELESS


@cache
def _readable():
    register_plugins()
    Image.init()
    lacking = {
        kind
        for kind, feature in _FEATURES.items()
        if not features.check(feature) and kind in Image.OPEN and Image.OPEN[kind][0].__module__.startswith("PIL.")
    }
    return {kind for kind in _FORMATS.split() if (kind in Image.OPEN or kind == "MPO") and kind not in lacking}
