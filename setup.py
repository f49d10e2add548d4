from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fastsiam",
    version="0.1.0",
    description="SimSiam pretraining at the speed of the hardware: DALI views, compiled steps, measured results",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # fastsiam/kernels and fastsiam/configs are symlinks to the top-level folders: one import name everywhere.
    # Named, an editable install puts the checkout on sys.path: from the folder above a clone, where `fastsiam` is also
    # the name of the clone's folder, a finder that comes after the path would lose to it.
    package_dir={"": "."},
    packages=[*find_packages(include=["fastsiam", "fastsiam.*"]), "fastsiam.configs"],
    package_data={
        "fastsiam": ["py.typed"],
        "fastsiam.configs": ["*.yaml"],
        "fastsiam.report": ["page.css", "page.html.j2"],
        "fastsiam.embed": ["neighbours.html.j2"],
        "fastsiam.sweep": ["sweep.html.j2"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision",
        # torch brings it with its CUDA builds only; the kernels' interpreter and compiler need no GPU.
        "triton>=3.6",
        "numba>=0.61",
        # The tests on Triton 3.6, which torch 2.11 brings, need numpy<2.4: its interpreter fails with later ones.
        "numpy>=1.26",
        "pillow",
        "pydantic>=2.7",
        "pyyaml",
        "rich",
        "filelock",
        "jinja2",
        "psutil",
        "tensorboard",
        "matplotlib",
        "safetensors",
        "nvidia-ml-py",
    ],
    extras_require={
        # 1.51 is the first release with wheels for both CUDA majors. The two share one import path: install one.
        "dali": ["nvidia-dali-cuda120>=1.51"],
        "dali-cu13": ["nvidia-dali-cuda130>=1.51"],
        # Built from source: needs Debian's libopencv-dev, libturbojpeg0-dev and pkg-config. It imports distutils, which
        # from Python 3.12 on comes from setuptools.
        "ffcv": ["ffcv>=1.0.2", "setuptools"],
        # TIFFs that Pillow does not decode, or not as they were written: floating RGB, 64 bits, planes, BigTIFF.
        "tiff": ["tifffile", "imagecodecs"],
        # Features as .parquet.
        "parquet": ["pyarrow"],
        # Encoders timm:NAME and their published weights.
        "timm": ["timm>=1.0"],
        # COCO's average precision, and its masks.
        "detection": ["pycocotools"],
        # Exports to ONNX; onnxruntime checks them.
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        # What the benchmarks compare with; solo-learn pins an old torch and is measured from a checkout.
        "peers": ["lightly", "faiss-cpu", "scipy"],
        # Trackers that `fastsiam follow` writes to.
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny>=3"],
        "dev": [
            *("pytest", "pytest-xdist", "playwright", "tifffile", "imagecodecs"),
            *("pycocotools", "faster-coco-eval", "scikit-learn"),
            # Exports are read back by the libraries that they are for.
            *("onnx", "onnxscript", "onnxruntime", "timm>=1.0.16", "transformers"),
            *("ruff", "build", "setuptools", "wheel"),
        ],
    },
    entry_points={"console_scripts": ["fastsiam=fastsiam.__main__:main"]},
)
